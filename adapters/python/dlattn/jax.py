"""Attention for JAX, as XLA custom calls into ``libdlattn.so.1``; on the CPU and on CUDA.

``dot_product_attention`` is a drop-in for ``jax.nn.dot_product_attention``; ``attention`` has all
of the plugin's features. Both work under jit, vmap, grad and shard_map (over batch and heads; a
sharded jit without shard_map gathers its inputs first). One shim serves JAX 0.8 and later.

The backward pass is computed here from output and log-sum-exp, a chunk of query rows at a time.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from . import Sku, Unsupported, _core
from ._options import ALIGNMENTS, Alignment, Window, alignment_code, window_sides

__all__ = ["attention", "dot_product_attention"]

TARGET = "dlattn_forward"
BACKWARD_ROWS = (
    128  # query rows for which the backward pass holds logits, [B, H, 128, Lk], at a time
)


def _register() -> None:
    shim = ctypes.CDLL(str(Path(__file__).with_name("libdlattn_xla.so")))
    for platform, symbol in (
        ("cpu", "dlattn_xla_forward_cpu"),
        ("CUDA", "dlattn_xla_forward_cuda"),
    ):
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(shim[symbol]), platform=platform)


_register()


# ---- What is called


class Tensors(NamedTuple):
    """The plugin's inputs, in the order of its slots; absent ones are None."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    sinks: jax.Array | None = None
    query_lengths: jax.Array | None = None
    key_lengths: jax.Array | None = None
    cu_seqlens_q: jax.Array | None = None
    cu_seqlens_k: jax.Array | None = None
    block_table: jax.Array | None = None


class Options(NamedTuple):
    """Everything else; known when a program is traced."""

    scale: float | None
    softcap: float
    window_left: int
    window_right: int
    causal: bool
    alignment: int
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    heads_axis: int = 1  # 1: [B, H, L, D], 2: [B, L, H, D]


OUTPUT_SLOT, LSE_SLOT, SLOTS = 3, 4, 14
WINDOW_FLAG, EXACT_SCALE_FLAG = 1, 2


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
) -> Any:
    """``jax.nn.dot_product_attention``, by the plugin.

    query ``[B, T, N, H]``, key and value ``[B, S, K, H]`` (B may be left out), N a multiple of K;
    bias and bool mask ``[B|1, N|1, T|1, S|1]``; lengths int ``[B]``. The rules are JAX's, but for
    rows that see no key: they become 0, where JAX gives the mean of all values.

    Returns the output ``[B, T, N, H]``; with ``return_residual`` also the log-sum-exp of the
    logits, float32 ``[B, T, N]``, -inf for a row that sees no key. Both can be differentiated.

    Raises ``dlattn.InvalidArgument`` (a ValueError) or ``dlattn.Unsupported`` (a
    NotImplementedError) while tracing; XLA's own exception for lengths that are out of range.
    """
    single = query.ndim == 3
    if single:
        query, key, value = query[None], key[None], value[None]
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    left, right = local_window_size or (-1, -1)
    options = Options(scale, 0.0, left, right, is_causal, ALIGNMENTS["top_left"], heads_axis=2)
    tensors = Tensors(
        query,
        key,
        value,
        _as_float(_as_4d(bias), query),
        _as_4d(mask),
        query_lengths=_as_int32(query_seq_lengths),
        key_lengths=_as_int32(key_value_seq_lengths),
    )
    output, lse = _jitted(options, tensors)
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
    scale: float | None = None,
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
    return_lse: bool = False,
) -> Any:
    """``dlattn.attention`` (see there) for JAX: query ``[B, H, Lq, D]``, or packed or paged.

    Returns the output; with ``return_lse`` also the float32 log-sum-exp ``[B, H, Lq]`` (packed:
    ``[H, total_q]``). Packed and paged calls have no gradient and cannot be vmapped.
    """
    left, right = window_sides(window)
    options = Options(
        scale, softcap, left, right, causal, alignment_code(alignment), max_seqlen_q, max_seqlen_k
    )
    tensors = Tensors(
        query,
        key,
        value,
        _as_float(bias, query),
        mask,
        _as_float(alibi_slopes),
        _as_float(sinks),
        *map(_as_int32, (query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, block_table)),
    )
    output, lse = _jitted(options, tensors)
    return (output, lse) if return_lse else output


def _as_4d(x: jax.Array | None) -> jax.Array | None:
    return x if x is None or x.ndim == 4 else x.reshape((1,) * (4 - x.ndim) + x.shape)


def _as_float(x: jax.Array | None, like: jax.Array | None = None) -> jax.Array | None:
    """float32, or the type of ``like``."""
    if x is None or (like is not None and x.dtype == like.dtype):
        return x
    return x.astype(jnp.float32)


def _as_int32(x: jax.Array | None) -> jax.Array | None:
    return x if x is None else jnp.asarray(x, jnp.int32)


# ---- The custom call


def _call(options: Options, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    """(output, lse), on whatever platform the program is compiled for."""
    present = [x for x in tensors if x is not None]
    if jax.default_backend() != "gpu":
        results = _platform_call(options, tensors, "cpu")(*present)
    else:
        branches = {name: _platform_call(options, tensors, name) for name in ("cpu", "cuda")}
        results = lax.platform_dependent(*present, **branches)
    return _vary(results, _varying_axes(tensors))


def _platform_call(options: Options, tensors: Tensors, platform: str) -> Any:
    """The call for one platform, whose kernel says how much workspace it needs."""
    packed = tensors.cu_seqlens_q is not None
    query, value = tensors.query, tensors.value
    output = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype)
    lse_shape = query.shape[1::-1] if packed else query.shape[:-1]
    lse = jax.ShapeDtypeStruct(lse_shape, jnp.float32)

    slots: list[Any] = list(tensors)
    slots[OUTPUT_SLOT:OUTPUT_SLOT] = (output, lse)
    device = (1, 0) if platform == "cpu" else (2, 0)
    specs = [None if x is None else _spec(x, options, i, device) for i, x in enumerate(slots)]
    sku = Sku(*_core.query(*specs, *options[:-1], None, 0, None, None))
    results = [output, lse]
    if sku.workspace_bytes:
        results.append(jax.ShapeDtypeStruct((sku.workspace_bytes,), jnp.uint8))

    flags = WINDOW_FLAG | (0 if options.scale is None else EXACT_SCALE_FLAG)
    attributes = {
        "slots": sum(1 << i for i, x in enumerate(slots) if x is not None),
        "flags": flags,
        **options._asdict(),
        "scale": float(options.scale or 0),
        "softcap": float(options.softcap),
        "causal": int(options.causal),
    }
    call = jax.ffi.ffi_call(TARGET, results)
    return lambda *present: tuple(call(*present, **attributes)[:2])


CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}


def _spec(x: Any, options: Options, slot: int, device: tuple[int, int]) -> tuple[Any, ...]:
    """What the plugin sees of an array, heads before rows."""
    name = jnp.dtype(x.dtype).name
    kind = name.rstrip("0123456789")
    bits = int(name[len(kind) :] or 8)
    shape, strides = list(x.shape), [1] * len(x.shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    if options.heads_axis == 2 and slot <= LSE_SLOT and len(shape) >= 3:
        for row in (shape, strides):
            row[1], row[2] = row[2], row[1]
    return tuple(shape), tuple(strides), CODES.get(kind, 5), bits, *device


# ---- shard_map: what differs from device to device, which JAX follows for its own operations alone


def _varying_axes(tensors: Any) -> frozenset[str]:
    types = [jax.typeof(x) for x in jax.tree.leaves(tensors)]
    # JAX 0.8 has vma, later ones have manual_axis_type.
    axes = (t.vma if hasattr(t, "vma") else t.manual_axis_type.varying for t in types)
    return frozenset().union(*axes)


def _vary(tensors: Any, axes: frozenset[str]) -> Any:
    """Marks all tensors as different along `axes`; one that was not gets the sum of gradients."""

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying_axes(x)))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)  # JAX 0.8

    return jax.tree.map(one, tensors)


# ---- vmap: the new axis becomes part of the batch


@functools.cache
def _vmappable(options: Options) -> Any:
    @custom_vmap
    def call(tensors: Tensors) -> tuple[jax.Array, jax.Array]:
        return _call(options, tensors)

    @call.def_vmap
    def rule(size: int, batched: Any, tensors: Tensors) -> Any:
        (batched,) = batched
        if tensors.cu_seqlens_q is not None or tensors.block_table is not None:
            raise Unsupported("dlattn.jax: packed and paged attention cannot be vmapped")
        query_axis = 1 if batched.query else 0
        batch = tensors.query.shape[query_axis]
        folded = Tensors(
            *(
                None if x is None else _fold(name, x, on, size, batch)
                for name, x, on in zip(Tensors._fields, tensors, batched)
            )
        )
        results = call(folded)
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True, True)

    return call


def _fold(name: str, x: jax.Array, batched: bool, size: int, batch: int) -> jax.Array:
    """[size, B, ...] -> [size * B, ...]; what has no batch axis of its own gets one, if needed."""
    without_batch = name == "sinks" or (name == "alibi_slopes" and x.ndim - batched == 1)
    if not batched and (without_batch or (name in ("bias", "mask") and x.shape[0] == 1)):
        return x
    if name == "sinks":
        raise Unsupported("dlattn.jax: sinks cannot be vmapped, as they are shared by the batch")
    if not batched:
        x = jnp.broadcast_to(x, (size, *x.shape))
    if without_batch:
        x = x[:, None]
    if x.shape[1] != batch:
        x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
    return x.reshape(size * batch, *x.shape[2:])


# ---- grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    return _vmappable(options)(tensors)


def _attention_fwd(options: Options, tensors: Tensors) -> Any:
    if tensors.cu_seqlens_q is not None or tensors.block_table is not None:
        raise Unsupported("dlattn.jax: packed and paged attention has no gradient")
    output, lse = _attention(options, tensors)
    return (output, lse), (tensors, output, lse)


def _attention_bwd(options: Options, residuals: Any, cotangents: Any) -> tuple[Tensors]:
    """Gradients as in FlashAttention (arXiv:2205.14135, algorithm 4), and of bias, slopes, sinks.

    With P = exp(S - lse) and delta = sum(dO * O) - dlse: dV = P^T dO, dS = P * (dO V^T - delta),
    dQ = scale dS K, dK = scale dS^T Q; a softcap puts the derivative of its tanh before the scale.
    """
    tensors, output, lse = residuals
    bias, mask, slopes = tensors.bias, tensors.mask, tensors.alibi_slopes
    query, key, value, output, lse, d_output, d_lse = (
        _heads_first(x.astype(jnp.promote_types(x.dtype, jnp.float32)), options)
        for x in (*tensors[:3], output, lse, *cotangents)
    )
    batch, heads, rows, dim = query.shape
    heads_kv, keys = key.shape[1:3]
    scale = dim**-0.5 if options.scale is None else options.scale
    chunk = min(rows, BACKWARD_ROWS) or 1
    bias_has_rows = bias is not None and bias.shape[2] > 1
    mask_has_rows = mask is not None and mask.shape[2] > 1
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def grouped(x: jax.Array) -> jax.Array:
        """[B, H, ...] -> [B, H_kv, H / H_kv, ...]."""
        return x.reshape(batch, heads_kv, heads // heads_kv, *x.shape[2:])

    def chunk_gradients(carry: Any, parts: Any) -> Any:
        d_key, d_value, d_bias, d_slopes = carry
        first, query, d_output, lse, seen, delta, bias_rows, mask_rows = parts
        logits = einsum("bkgqd,bksd->bkgqs", grouped(query), key) * scale
        logits = logits.reshape(batch, heads, chunk, keys)
        if options.softcap:
            logits = options.softcap * jnp.tanh(logits / options.softcap)
        capped = logits
        distance, visible = _visible(options, tensors, first, chunk, rows, keys)
        if bias is not None:
            logits = logits + (bias_rows if bias_has_rows else bias)
        if slopes is not None:
            logits = logits - slopes[..., None, None] * jnp.abs(distance)
        if mask is not None:
            visible = visible & ((mask_rows if mask_has_rows else mask) != 0)
        visible = visible & seen[..., None]
        # The inner where keeps infinities out of exp, whose product with 0 would not be 0.
        p = jnp.where(visible, jnp.exp(jnp.where(visible, logits - lse[..., None], 0)), 0)
        d_p = einsum("bkgqd,bksd->bkgqs", grouped(d_output), value).reshape(p.shape)
        d_logits = p * (d_p - delta[..., None])
        d_value += einsum("bkgqs,bkgqd->bksd", grouped(p), grouped(d_output))
        d_bias_rows = None
        if bias_has_rows:
            d_bias_rows = _sum_to(d_logits, (*bias.shape[:2], chunk, bias.shape[3]))
        elif bias is not None:
            d_bias += _sum_to(d_logits, bias.shape)
        if slopes is not None:
            d_slopes -= _sum_to(jnp.sum(d_logits * jnp.abs(distance), axis=(2, 3)), slopes.shape)
        if options.softcap:
            d_logits *= 1 - (capped / options.softcap) ** 2
        d_logits = grouped(d_logits) * scale
        d_key += einsum("bkgqs,bkgqd->bksd", d_logits, grouped(query))
        d_query = einsum("bkgqs,bksd->bkgqd", d_logits, key).reshape(query.shape)
        return (d_key, d_value, d_bias, d_slopes), (d_query, d_bias_rows)

    seen = jnp.isfinite(lse)
    delta = jnp.sum(d_output * output, axis=3) - d_lse
    carry = (
        jnp.zeros_like(key),
        jnp.zeros_like(value),
        None if bias is None or bias_has_rows else jnp.zeros_like(bias, query.dtype),
        None if slopes is None else jnp.zeros_like(slopes, query.dtype),
    )
    parts = (
        jnp.arange(0, rows, chunk),
        *(_split(x, chunk) for x in (query, d_output, lse, seen, delta)),
        _split(bias, chunk) if bias_has_rows else None,
        _split(mask, chunk) if mask_has_rows else None,
    )
    carry, (d_query, d_bias_rows) = lax.scan(chunk_gradients, carry, parts)
    d_key, d_value, d_bias, d_slopes = carry
    if bias_has_rows:
        d_bias = _join(d_bias_rows, rows)
    d_sinks = None
    if tensors.sinks is not None:
        p_sink = jnp.where(seen, jnp.exp(tensors.sinks[:, None] - jnp.where(seen, lse, 0)), 0)
        d_sinks = -jnp.sum(p_sink * delta, axis=(0, 2))
    d_main = (_heads_first(x, options) for x in (_join(d_query, rows), d_key, d_value))
    gradients = (*d_main, d_bias, None, d_slopes, d_sinks)
    cast = (g if g is None else g.astype(x.dtype) for g, x in zip(gradients, tensors))
    return (Tensors(*cast),)


def _heads_first(x: jax.Array, options: Options) -> jax.Array:
    """[B, L, H, ...] <-> [B, H, L, ...], where the caller has heads second."""
    return x.swapaxes(1, 2) if options.heads_axis == 2 else x


def _visible(
    options: Options, tensors: Tensors, first: jax.Array, chunk: int, rows: int, keys: int
) -> Any:
    """(how far key j is from row i, whether it is visible) for rows [first, first + chunk)."""
    row = (first + jnp.arange(chunk))[None, None, :, None]
    key = jnp.arange(keys)[None, None, None, :]
    row_end, key_end = (
        extent if lengths is None else lengths[:, None, None, None]
        for lengths, extent in ((tensors.query_lengths, rows), (tensors.key_lengths, keys))
    )
    distance = key - row - (key_end - row_end if options.alignment else 0)
    visible = (key < key_end) & (row < row_end)
    if options.causal:
        visible = visible & (distance <= 0)
    if options.window_left >= 0:
        visible = visible & (distance >= -options.window_left)
    if options.window_right >= 0:
        visible = visible & (distance <= options.window_right)
    return distance, visible


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, H, rows, ...] -> [chunks, B, H, chunk, ...], the last chunk padded with zeros."""
    count = -(-x.shape[2] // chunk)
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, count * chunk - x.shape[2])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:2], count, chunk, *x.shape[3:]), 2, 0)


def _join(x: jax.Array, rows: int) -> jax.Array:
    """The inverse of _split."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :rows]


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the axes that were broadcast from ``shape``."""
    x = jnp.sum(x, axis=tuple(range(x.ndim - len(shape))))
    return jnp.sum(x, axis=tuple(i for i, n in enumerate(shape) if n < x.shape[i]), keepdims=True)


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(jax.jit, static_argnums=0)
def _jitted(options: Options, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    return _attention(options, _vary(tensors, _varying_axes(tensors)))
