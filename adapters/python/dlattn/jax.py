"""Attention for JAX, as XLA custom calls into ``libdlattn.so.1``; on the CPU and on CUDA.

``dot_product_attention`` is a drop-in for ``jax.nn.dot_product_attention``; ``attention`` has all
of the plugin's features. Both work under jit, vmap, grad and shard_map, and under explicit sharding
of the query's batch, heads and rows, which the output keeps (where rows are sharded, causal,
window, lengths of the query and ALiBi become a mask and a bias). Where the compiler shards
(``AxisType.Auto``) it gathers the inputs first; shard_map over batch and heads avoids it. One shim
serves JAX 0.8 and later.

Gradients are the plugin's own where it has a row for the call beside the reference, else JAX's
operators compute them, some query rows at a time; those of second order always.

Kernel, workspace and threads are planned when a program is traced. So sizes must be known there,
and options must be values; ``scale`` may be traced, too.
"""

from __future__ import annotations

import functools
import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from . import Error, InvalidArgument, Unsupported
from ._jax_backward import gradients
from ._jax_call import Options, Tensors, vary, varying_axes, vmappable_call, wide_type
from ._jax_native import DIFFERENTIABLE, Upstream, is_native, native_gradients, zeros
from ._jax_sharding import attend_explicitly
from ._options import ALIGNMENTS, UNBOUNDED, Alignment, Window, alignment_code, window_sides

__all__ = ["attention", "dot_product_attention"]


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
) -> Any:
    """``jax.nn.dot_product_attention``, by the plugin.

    query ``[B, T, N, H]``, key and value ``[B, S, K, H]`` (B may be left out), N a multiple of K;
    bias and bool mask ``[B|1, N|1, T|1, S|1]``, or the last axes of it; lengths int ``[B]``;
    local_window_size n or (left, right): key j is visible to row i if i - left <= j <= i + right.

    Returns the output ``[B, T, N, H]``; with ``return_residual`` also the log-sum-exp of the logits
    ``[B, T, N]``. What differs from JAX:

    - A row that sees no key becomes 0, where JAX gives the mean of all values; its log-sum-exp is
      -inf, where JAX gives a large negative number.
    - The log-sum-exp is float32 (float64 for float64), where JAX rounds it to the type of the key;
      and it has a gradient, which JAX stops.
    - The value may have another last extent than the key.
    - Lengths beyond T and S are refused, where JAX takes them as T and S.

    Raises ``dlattn.InvalidArgument`` (a ValueError) or ``dlattn.Unsupported`` (a
    NotImplementedError) while tracing; XLA's own exception, which says query_lengths and
    key_lengths, for lengths that are out of range.
    """
    query, key, value = _arrays(query=query, key=key, value=value)
    single = query.ndim == 3
    query, key, value = (x[None] if x.ndim == 3 else x for x in (query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise InvalidArgument(f"{name}: has {x.ndim} axes, must have 4, or 3 without a batch")
    query, scale = _scaled(query, scale)
    window, mask = _local_window(local_window_size), _mask(mask)
    if window is not None and min(window) < 0:
        mask, window = _within(window, mask, query.shape[1], key.shape[1]), None
    left, right = window or (UNBOUNDED, UNBOUNDED)
    causal = _flag("is_causal", is_causal)
    options = Options(scale, 0.0, left, right, causal, ALIGNMENTS["top_left"], heads_axis=2)
    tensors = Tensors(
        query,
        key,
        value,
        _bias(bias, query),
        mask,
        query_lengths=_integers("query_seq_lengths", query_seq_lengths),
        key_lengths=_integers("key_value_seq_lengths", key_value_seq_lengths),
    )
    try:
        output, lse = _jitted(options, tensors)
    except Error as error:
        raise type(error)(_in_the_words_of_jax(str(error))) from None
    if single:
        output, lse = output[0], lse[0]
    return (output, lse) if return_residual else output


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    alignment: Alignment = "top_left",
    scale: float | jax.Array | None = None,
    softcap: float = 0.0,
    window: Window | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    query_lengths: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    cu_seqlens_q: jax.Array | None = None,
    cu_seqlens_k: jax.Array | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    block_table: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    query_scale: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """``dlattn.attention`` (see there) for JAX: query ``[B, H, Lq, D]``, or packed or paged.

    Returns the output; with ``return_lse`` also the log-sum-exp ``[B, H, Lq]`` (packed:
    ``[H, total_q]``), float32, or float64 for float64. Paged calls have no gradient, packed ones a
    first-order one; neither can be vmapped. A traced ``scale`` multiplies the query, in its type.
    key and value may be float8_e4m3fn or float8_e5m2, each by itself; such calls, and those with
    scales of tensors, have no gradient.
    """
    query, key, value = _arrays(query=query, key=key, value=value)
    query, scale = _scaled(query, scale)
    options = Options(
        scale,
        _number("softcap", softcap),
        *window_sides(window),
        _flag("causal", causal),
        alignment_code(alignment),
        _integer("max_seqlen_q", max_seqlen_q),
        _integer("max_seqlen_k", max_seqlen_k),
    )
    integers = {
        "query_lengths": query_lengths,
        "key_lengths": key_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "block_table": block_table,
        "query_segments": query_segments,
        "key_segments": key_segments,
    }
    tensors = Tensors(
        query,
        key,
        value,
        _bias(bias, query),
        _mask(mask),
        _floats("alibi_slopes", alibi_slopes, wide_type(query)),
        _floats("sinks", sinks, wide_type(query)),
        **{name: _integers(name, x) for name, x in integers.items()},
        query_scale=_floats("query_scale", query_scale, jnp.float32),
        key_scale=_floats("key_scale", key_scale, jnp.float32),
        value_scale=_floats("value_scale", value_scale, jnp.float32),
    )
    output, lse = _jitted(options, tensors)
    return (output, lse) if return_lse else output


# ---- What a caller may give: arrays, or what becomes one


def _arrays(**given: Any) -> list[jax.Array]:
    return [_array(name, x) for name, x in given.items()]


def _array(name: str, x: Any) -> jax.Array:
    if isinstance(x, np.ma.MaskedArray):
        raise InvalidArgument(
            f"{name}: is a masked array, whose mask would be lost; pass it as mask"
        )
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{name}: is not an array: {error}") from None
    if x.ndim > 4:
        raise InvalidArgument(f"{name}: has {x.ndim} axes, must have at most 4")
    for axis, extent in enumerate(x.shape):
        if not isinstance(extent, int):
            raise Unsupported(
                f"{name}: axis {axis} has the symbolic size {extent}; dlattn plans for sizes that "
                "are known, so export the program once for each size"
            )
    return x


def _floats(name: str, x: Any, dtype: Any) -> jax.Array | None:
    if x is None:
        return None
    x = _array(name, x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating) or x.dtype == bool:
        raise InvalidArgument(f"{name}: dtype is {x.dtype}, must be a real number's")
    return x.astype(dtype)


def _bias(x: Any, query: jax.Array) -> jax.Array | None:
    """[B|1, H|1, Lq|1, Lk|1] of the query's type, or float32."""
    if x is None:
        return None
    x = _with_4_axes(_array("bias", x))
    return _floats("bias", x, query.dtype if x.dtype == query.dtype else jnp.float32)


def _mask(x: Any) -> jax.Array | None:
    if x is None:
        return None
    x = _array("mask", x)
    if x.dtype.name not in ("bool", "uint8"):
        raise InvalidArgument(
            f"mask: dtype is {x.dtype}, must be bool, True for a visible key; what is added to the "
            "logits is the bias"
        )
    return _with_4_axes(x)


def _with_4_axes(x: jax.Array) -> jax.Array:
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _integers(name: str, x: Any) -> jax.Array | None:
    if x is None:
        return None
    x = _array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise InvalidArgument(f"{name}: dtype is {x.dtype}, must be int32")
    return x.astype(jnp.int32)


def _scaled(query: jax.Array, scale: Any) -> tuple[jax.Array, float | None]:
    """(query, the plugin's scale): one that is traced has become a factor of the query."""
    if not isinstance(scale, jax.core.Tracer):
        return query, None if scale is None else _number("scale", scale)
    if scale.shape:
        raise InvalidArgument(f"scale: has shape {scale.shape}, must be one number")
    scale = _floats("scale", scale, wide_type(query))
    return (query * scale).astype(query.dtype), 1.0


KNOWN_WHEN_TRACED = "that is known when the program is traced"


def _number(name: str, x: Any) -> float:
    try:
        return float(x)
    except (TypeError, ValueError):
        raise InvalidArgument(f"{name}: is {x!r}, must be a number {KNOWN_WHEN_TRACED}") from None


def _flag(name: str, x: Any) -> bool:
    try:
        return bool(x)
    except (TypeError, ValueError):
        raise InvalidArgument(f"{name}: is {x!r}, must be a bool {KNOWN_WHEN_TRACED}") from None


def _integer(name: str, x: Any) -> int:
    try:
        return operator.index(x)
    except TypeError:
        raise InvalidArgument(f"{name}: is {x!r}, must be an int {KNOWN_WHEN_TRACED}") from None


# ---- JAX's window, whose sides may be negative, and JAX's words

LONGEST = 2**31 - 1  # as far as keys can be apart


def _local_window(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        sides = size if hasattr(size, "__len__") else (size, size)
        left, right = (min(operator.index(side), LONGEST) for side in sides)
    except (TypeError, ValueError):
        raise InvalidArgument(
            f"local_window_size: is {size!r}, must be an int or a pair of them {KNOWN_WHEN_TRACED}"
        ) from None
    return left, right


def _within(window: tuple[int, int], mask: jax.Array | None, rows: int, keys: int) -> jax.Array:
    """The window as a mask: a plugin's window always has the key of the row's own number."""
    left, right = window
    distance = np.arange(keys) - np.arange(rows)[:, None]
    inside = jnp.asarray((distance >= -left) & (distance <= right))[None, None]
    return inside if mask is None else inside & (mask != 0)


def _in_the_words_of_jax(message: str) -> str:
    """Names and axes as `dot_product_attention` has them."""
    message = message.replace("query_lengths", "query_seq_lengths")
    message = message.replace("key_lengths", "key_value_seq_lengths")
    swapped = {"1": "2", "2": "1"}
    return re.sub(
        r"^(query|key|value): axis ([12])\b",
        lambda found: f"{found[1]}: axis {swapped[found[2]]}",
        message,
    )


# ---- Compiled, differentiated, and on each device


@functools.partial(jax.jit, static_argnums=0)
def _jitted(options: Options, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    sharded = attend_explicitly(_attend, options, tensors)
    return _attend(options, tensors) if sharded is None else sharded


def _attend(options: Options, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    return _differentiable(options, vary(tensors, varying_axes(tensors)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(options: Options, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    return vmappable_call(options)(tensors)


# JAX 0.8 traces a rule for other arguments once more, and fails if it then saves something else.
KNOWS_WHAT_IS_WANTED = jax.__version_info__ >= (0, 10)


def _forward(options: Options, primals: Any) -> Any:
    """Saves the results only if the plugin computes the gradients."""
    tensors = jax.tree.map(lambda x: x.value, primals)
    if tensors.block_table is not None:
        raise Unsupported("dlattn.jax: paged attention has no gradient")
    if tensors.has_float8:
        raise Unsupported("dlattn.jax: float8 and scales of tensors have no gradient")
    present = [name for name in DIFFERENTIABLE if getattr(primals, name) is not None]
    wanted = [n for n in present if getattr(primals, n).perturbed or not KNOWS_WHAT_IS_WANTED]
    results = _differentiable(options, tensors)
    saved = None
    if is_native(options, tuple(wanted), tensors, *results):
        # Gradients of gradients do not go through what is saved.
        saved = tuple(jax.lax.stop_gradient(x) for x in results)
    return results, (tensors, dict.fromkeys(wanted, ()), saved)  # names go as structure


def _backward(options: Options, residuals: Any, cotangents: Any) -> tuple[Tensors]:
    tensors, wanted, saved = residuals
    d_output, d_lse = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    if d_output is None:
        d_output = zeros(cotangents[0].aval, tensors)
    if saved is None:
        d_lse = zeros(cotangents[1].aval, tensors) if d_lse is None else d_lse
        return (gradients(options, tensors, d_output, d_lse),)
    names = tuple(name for name in DIFFERENTIABLE if name in wanted)
    found = native_gradients(options, names, tensors, Upstream(*saved, d_output, d_lse))
    by_name = dict(zip(names, found))
    return (Tensors(*map(by_name.get, Tensors._fields)),)


def __getattr__(name: str) -> Any:
    """``context_parallel``, when it is asked for."""
    if name != "context_parallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _jax_context_parallel

    return _jax_context_parallel


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)
