"""The backward pass of dlattn.jax by the plugin: a custom call, as the forward pass is one."""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from . import Unsupported
from ._jax_backward import gradients
from ._jax_call import (
    Options,
    Tensors,
    attributes_of,
    by_platform,
    folded,
    in_float32,
    plan,
    platforms,
    unfolded,
    vary,
    varying_axes,
)
from ._native import serves

TARGET = "dlattn_backward"
DIFFERENTIABLE = ("query", "key", "value", "bias", "alibi_slopes", "sinks")


class Upstream(NamedTuple):
    """What the backward pass takes beside the inputs of the forward pass."""

    output: jax.Array
    lse: jax.Array
    d_output: jax.Array
    d_lse: jax.Array | None  # None is 0


class _Call(NamedTuple):
    """A backward call of the plugin, planned for one platform."""

    arguments: dict[str, Any]  # by slot, in their order
    results: dict[str, Any]
    workspace_bytes: int
    num_threads: int


def is_native(options: Options, wanted: tuple[str, ...], tensors: Tensors, *results: Any) -> bool:
    """Whether the plugin computes these gradients anywhere, given output and log-sum-exp; nothing
    else does for packed sequences. Without query rows all are 0."""
    if tensors.query.size == 0:
        return False
    if tensors.cu_seqlens_q is not None:
        return True
    upstream = Upstream(*results, results[0], None)
    calls = (_plan(options, wanted, tensors, upstream, name) for name in platforms())
    return bool(wanted) and any(call is not None for call in calls)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def native_gradients(
    options: Options, wanted: tuple[str, ...], tensors: Tensors, upstream: Upstream
) -> tuple[jax.Array, ...]:
    """The gradients of the tensors that are ``wanted``, in that order."""
    return _vmappable(options, wanted)(tensors, upstream)


def _forward(
    options: Options, wanted: tuple[str, ...], tensors: Tensors, upstream: Upstream
) -> Any:
    return native_gradients(options, wanted, tensors, upstream), (tensors, upstream)


def _backward(options: Options, wanted: tuple[str, ...], saved: Any, cotangents: Any) -> Any:
    """Second order: through the same gradients in JAX's operators, which take no output and no
    log-sum-exp."""
    tensors, upstream = saved
    if tensors.cu_seqlens_q is not None:
        raise Unsupported("dlattn.jax: packed attention has first-order gradients alone")
    chunked = functools.partial(_chunked, options, wanted)
    given = upstream.d_output, upstream.d_lse
    d_tensors, (d_d_output, d_d_lse) = jax.vjp(chunked, tensors, given)[1](cotangents)
    return d_tensors, Upstream(None, None, d_d_output, d_d_lse)


native_gradients.defvjp(_forward, _backward)


def _chunked(
    options: Options, wanted: tuple[str, ...], tensors: Tensors, given: Any
) -> tuple[jax.Array, ...]:
    d_output, d_lse = given
    if d_lse is None:
        d_lse = zeros(jax.typeof(d_output[..., 0]), tensors)
    found = gradients(options, tensors, d_output, d_lse)
    return tuple(getattr(found, name) for name in wanted)


def zeros(like: Any, tensors: Tensors) -> jax.Array:
    """Of that shape and type, where the tensors are."""
    return vary(jnp.zeros(like.shape, like.dtype), varying_axes(tensors))


# ---- The call


def _plan(
    options: Options,
    wanted: tuple[str, ...],
    tensors: Tensors,
    upstream: Upstream,
    platform: str,
    is_wide: bool = False,
) -> _Call | None:
    """None where JAX's operators had better compute it."""
    given = dict(zip(Tensors._fields, in_float32(tensors)))
    inputs = ("query", "key", "value", "output", "lse")
    slots = {**given, **upstream._asdict()}
    slots = {name: slots[name] for name in (*inputs, *Tensors._fields[3:], "d_output", "d_lse")}
    results = {
        f"d_{name}": jax.ShapeDtypeStruct(given[name].shape, _type(given[name], is_wide))
        for name in wanted
    }
    must = tensors.cu_seqlens_q is not None
    found = plan(options, {**slots, **results}, platform, None if must else serves)
    if found is None:
        return None
    arguments = {name: x for name, x in slots.items() if x is not None}
    return _Call(arguments, results, *found)


def _type(x: Any, is_wide: bool) -> Any:
    """Of a tensor's gradient: the tensor's own, or that of sums."""
    return jnp.promote_types(x.dtype, jnp.float32) if is_wide else x.dtype


def _call(
    options: Options, wanted: tuple[str, ...], tensors: Tensors, upstream: Upstream
) -> tuple[jax.Array, ...]:
    leaves, structure = jax.tree.flatten((tensors, upstream))

    def on(platform: str) -> Callable[..., tuple[jax.Array, ...]]:
        def run(*leaves: jax.Array) -> tuple[jax.Array, ...]:
            return call_on(platform, options, wanted, *jax.tree.unflatten(structure, leaves))

        return run

    return by_platform(on, leaves)


def call_on(
    platform: str,
    options: Options,
    wanted: tuple[str, ...],
    tensors: Tensors,
    upstream: Upstream,
    is_wide: bool = False,
) -> tuple[jax.Array, ...]:
    """The gradients on one platform, in the types of the tensors or of sums."""
    call = _plan(options, wanted, tensors, upstream, platform, is_wide)
    if call is None:
        found = _chunked(options, wanted, tensors, (upstream.d_output, upstream.d_lse))
    else:
        found = _run(options, call)
    given = (getattr(tensors, name) for name in wanted)
    found = tuple(g.astype(_type(x, is_wide)) for g, x in zip(found, given))
    return vary(found, varying_axes(tensors))


def _run(options: Options, call: _Call) -> tuple[jax.Array, ...]:
    results = list(call.results.values())
    if call.workspace_bytes:
        results.append(jax.ShapeDtypeStruct((call.workspace_bytes,), jnp.uint8))
    attributes = attributes_of(options, (*call.arguments, *call.results), call.num_threads)
    found = jax.ffi.ffi_call(TARGET, results)(*call.arguments.values(), **attributes)
    return tuple(found[: len(call.results)])


# ---- vmap


@functools.cache
def _vmappable(options: Options, wanted: tuple[str, ...]) -> Any:
    @custom_vmap
    def vmappable(tensors: Tensors, upstream: Upstream) -> tuple[jax.Array, ...]:
        return _call(options, wanted, tensors, upstream)

    @vmappable.def_vmap
    def rule(size: int, batched: Any, tensors: Tensors, upstream: Upstream) -> Any:
        """The new axis becomes part of the batch, that of every tensor, which has its gradient in
        each of its entries; but sinks have no batch."""
        on, on_upstream = batched
        if not tensors.can_fold:
            raise Unsupported("dlattn.jax: packed and paged attention cannot be vmapped")
        if tensors.sinks is not None:
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
            mapped = jax.vmap(
                lambda t, u: _chunked(options, wanted, t, (u.d_output, u.d_lse)), tuple(axes)
            )
            found = mapped(tensors, upstream)
            return found, tuple(True for _ in found)
        batch = tensors.query.shape[1 if on.query else 0]
        many, many_upstream = (
            folded(x, is_batched, size, batch, whole=True)
            for x, is_batched in ((tensors, on), (upstream, on_upstream))
        )
        found = tuple(
            unfolded(g, getattr(tensors, name), getattr(on, name), size, batch)
            for name, g in zip(wanted, vmappable(many, many_upstream))
        )
        return found, tuple(True for _ in found)

    return vmappable
