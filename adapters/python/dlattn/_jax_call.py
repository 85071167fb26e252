"""The custom call of dlattn.jax: what goes into it, and how it is vmapped."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from . import Sku, Unsupported, _core

TARGET = "dlattn_forward"


def _register() -> None:
    shim = ctypes.CDLL(str(Path(__file__).with_name("libdlattn_xla.so")))
    for operation in ("forward", "backward"):
        for platform in ("cpu", "CUDA"):
            handler = jax.ffi.pycapsule(shim[f"dlattn_xla_{operation}_{platform.lower()}"])
            jax.ffi.register_ffi_target(f"dlattn_{operation}", handler, platform=platform)


_register()


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
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    query_scale: jax.Array | None = None
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @property
    def can_fold(self) -> bool:
        """Whether there is a batch, which can be made longer."""
        return self.cu_seqlens_q is None and self.block_table is None

    @property
    def has_float8(self) -> bool:
        """Float8, or the scales that go with it."""
        named = {name for name, x in zip(self._fields, self) if x is not None}
        kinds = {jnp.dtype(x.dtype).name for x in self[:3]}
        return not named.isdisjoint(SCALES) or not kinds.isdisjoint(FLOAT8)


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
    diagonal_offset: int = 0


WINDOW_FLAG, EXACT_SCALE_FLAG = 1, 2
SCALES = Tensors._fields[-3:]
# Of dlattn_tensors, as far as they are known here, and behind it of dlattn_gradients.
SLOTS = {
    name: slot
    for first, names in (
        (0, (*Tensors._fields[:3], "output", "lse", *Tensors._fields[3:-3])),
        (17, SCALES),
        (20, ("d_output", "d_lse", *(f"d_{name}" for name in Tensors._fields[:4]))),
        (26, ("d_alibi_slopes", "d_sinks")),
    )
    for slot, name in enumerate(names, first)
}
BY_NAME = ("query_segments", "key_segments", *SCALES)  # what _core takes so
OF_HEADS = {"query", "key", "value", "output", "lse"}  # and their gradients: heads are an axis


def wide_type(query: jax.Array) -> Any:
    """The type of sums and of the log-sum-exp: float32, for float64 itself."""
    return jnp.promote_types(query.dtype, jnp.float32)


def in_float32(tensors: Tensors) -> Tensors:
    """What the plugin takes in no other type."""
    narrow = {
        name: x.astype(jnp.float32)
        for name in ("alibi_slopes", "sinks")
        if (x := getattr(tensors, name)) is not None
    }
    return tensors._replace(**narrow)


# ---- The call


def call(options: Options, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    """(output, lse), on whatever platform the program is compiled for."""
    tensors = in_float32(tensors)
    present = [x for x in tensors if x is not None]
    results = by_platform(lambda name: _platform_call(options, tensors, name), present)
    return vary(results, varying_axes(tensors))


def platforms() -> tuple[str, ...]:
    """Where a program may run."""
    return ("cpu", "cuda") if jax.default_backend() == "gpu" else ("cpu",)


def by_platform(on: Callable[[str], Any], arguments: list[jax.Array]) -> Any:
    """``on(platform)(*arguments)`` for the platform that the program is compiled for."""
    branches = {name: on(name) for name in platforms()}
    if len(branches) == 1:
        return branches["cpu"](*arguments)
    return lax.platform_dependent(*arguments, **branches)


def plan(
    options: Options,
    slots: dict[str, Any],
    platform: str,
    is_wanted: Callable[..., bool] | None = None,
) -> tuple[int, int] | None:
    """(workspace in bytes, number of threads) of the call with these arrays by slot, or None if it
    is not wanted. The number of threads is decided here, and not where the program runs, because
    the workspace has room for so many."""
    device = (1, 0) if platform == "cpu" else (2, 0)
    specs = {n: None if x is None else _spec(n, x, options, device) for n, x in slots.items()}
    by_name = {n: x for n, x in specs.items() if _goes_by_name(n) and x is not None}
    if options.diagonal_offset:
        by_name["diagonal_offset"] = options.diagonal_offset
    tensors = [x for n, x in specs.items() if not _goes_by_name(n)]

    def arguments(num_threads: int) -> tuple[Any, ...]:
        return (*tensors, *options[:-2], None, num_threads, None, None)

    if is_wanted is not None and not is_wanted(*arguments(0), **by_name):
        return None
    num_threads = Sku(*_core.query(*arguments(0), **by_name)).num_threads
    sku = Sku(*_core.query(*arguments(num_threads), **by_name))
    return sku.workspace_bytes, num_threads


def _goes_by_name(slot: str) -> bool:
    return slot.startswith("d_") or slot in BY_NAME


def _plan_forward(options: Options, tensors: Tensors, platform: str) -> tuple[Any, ...]:
    """(slots, what the call gives, number of threads)."""
    packed = tensors.cu_seqlens_q is not None
    query, value = tensors.query, tensors.value
    output = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype)
    lse_shape = query.shape[1::-1] if packed else query.shape[:-1]
    lse = jax.ShapeDtypeStruct(lse_shape, wide_type(query))
    written = {"output": output, "lse": lse}
    inputs = tensors._asdict()
    main = {name: inputs.pop(name) for name in Tensors._fields[:3]}
    slots = {**main, **written, **inputs}
    workspace_bytes, num_threads = plan(options, slots, platform)
    results = [output, lse]
    if workspace_bytes:
        results.append(jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8))
    return [name for name, x in slots.items() if x is not None], results, num_threads


def check(options: Options, tensors: Tensors) -> None:
    """Raises what tracing `call` would."""
    _plan_forward(options, tensors, platforms()[-1])


def _platform_call(options: Options, tensors: Tensors, platform: str) -> Any:
    """The call for one platform, whose kernel says how much workspace it needs."""
    names, results, num_threads = _plan_forward(options, tensors, platform)
    attributes = attributes_of(options, names, num_threads)
    ffi_call = jax.ffi.ffi_call(TARGET, results)
    return lambda *present: tuple(ffi_call(*present, **attributes)[:2])


def attributes_of(options: Options, names: Iterable[str], num_threads: int) -> dict[str, Any]:
    """Those of a custom call that has these slots."""
    return {
        "slots": sum(1 << SLOTS[name] for name in names),
        "flags": WINDOW_FLAG | (0 if options.scale is None else EXACT_SCALE_FLAG),
        "num_threads": num_threads,
        **options._asdict(),
        "scale": options.scale or 0.0,
        "causal": int(options.causal),
    }


CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}
FLOAT8 = {"float8_e4m3fn": 10, "float8_e5m2": 12}


def _spec(slot: str, x: Any, options: Options, device: tuple[int, int]) -> tuple[Any, ...]:
    """What the plugin sees of an array, heads before rows."""
    name = jnp.dtype(x.dtype).name
    kind = name.rstrip("0123456789")
    code, bits = CODES.get(kind, 5), int(name[len(kind) :] or 8)
    if name in FLOAT8:
        code, bits = FLOAT8[name], 8
    shape, strides = list(x.shape), [1] * len(x.shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    if options.heads_axis == 2 and slot.removeprefix("d_") in OF_HEADS and len(shape) >= 3:
        for row in (shape, strides):
            row[1], row[2] = row[2], row[1]
    return tuple(shape), tuple(strides), code, bits, *device


# ---- shard_map: what differs from device to device, which JAX follows for its own operations alone


def varying_axes(tensors: Any) -> frozenset[str]:
    types = [jax.typeof(x) for x in jax.tree.leaves(tensors)]
    # JAX 0.8 has vma, later ones have manual_axis_type.
    axes = (t.vma if hasattr(t, "vma") else t.manual_axis_type.varying for t in types)
    return frozenset().union(*axes)


def vary(tensors: Any, axes: frozenset[str]) -> Any:
    """Marks all tensors as different along `axes`; one that was not gets the sum of gradients."""

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)  # JAX 0.8

    return jax.tree.map(one, tensors)


# ---- vmap: the new axis becomes part of the batch


@functools.cache
def vmappable_call(options: Options) -> Any:
    @custom_vmap
    def vmappable(tensors: Tensors) -> tuple[jax.Array, jax.Array]:
        return call(options, tensors)

    @vmappable.def_vmap
    def rule(size: int, batched: Any, tensors: Tensors) -> Any:
        (batched,) = batched
        if not tensors.can_fold:
            raise Unsupported("dlattn.jax: packed and paged attention cannot be vmapped")
        if any(getattr(tensors, name) is not None for name in SCALES):
            raise Unsupported("dlattn.jax: scales of tensors cannot be vmapped")
        query_axis = 1 if batched.query else 0
        batch = tensors.query.shape[query_axis]
        results = vmappable(folded(tensors, batched, size, batch))
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True, True)

    return vmappable


def folded(tensors: Any, batched: Any, size: int, batch: int, whole: bool = False) -> Any:
    """The named tuple with [size, B, ...] as [size * B, ...]; ``whole``: none is left as it is, so
    that a gradient of each has an entry for each of the batch."""
    found = {
        name: None if x is None else _fold(name, x, getattr(batched, name), size, batch, whole)
        for name, x in tensors._asdict().items()
    }
    return type(tensors)(**found)


def _fold(name: str, x: jax.Array, batched: bool, size: int, batch: int, whole: bool) -> jax.Array:
    """What has no batch axis of its own gets one, if needed."""
    without_batch = name == "sinks" or (name == "alibi_slopes" and x.ndim - batched == 1)
    can_stay = without_batch or (name in ("bias", "mask") and x.shape[0] == 1)
    if not batched and can_stay and not whole:
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


def unfolded(g: jax.Array, x: jax.Array, batched: bool, size: int, batch: int) -> jax.Array:
    """The gradients [size, ...] of a tensor that was folded wholly, from that of what it became."""
    g = g.reshape(size, batch, *g.shape[1:])
    shape = (size, *(x.shape[1:] if batched else x.shape))
    if g.shape == shape:
        return g
    return jnp.sum(g, axis=1).reshape(shape)
