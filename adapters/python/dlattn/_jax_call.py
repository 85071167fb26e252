"""The custom call of dlattn.jax: what goes into it, and how it is vmapped."""

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

TARGET = "dlattn_forward"


def _register() -> None:
    shim = ctypes.CDLL(str(Path(__file__).with_name("libdlattn_xla.so")))
    for platform, symbol in (
        ("cpu", "dlattn_xla_forward_cpu"),
        ("CUDA", "dlattn_xla_forward_cuda"),
    ):
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(shim[symbol]), platform=platform)


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

    @property
    def has_gradient(self) -> bool:
        return self.cu_seqlens_q is None and self.block_table is None


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


OUTPUT_SLOT, LSE_SLOT = 3, 4
WINDOW_FLAG, EXACT_SCALE_FLAG = 1, 2


def wide_type(query: jax.Array) -> Any:
    """The type of sums and of the log-sum-exp: float32, for float64 itself."""
    return jnp.promote_types(query.dtype, jnp.float32)


# ---- The call


def call(options: Options, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    """(output, lse), on whatever platform the program is compiled for."""
    tensors = tensors._replace(
        **{
            name: x.astype(jnp.float32)
            for name in ("alibi_slopes", "sinks")
            if (x := getattr(tensors, name)) is not None
        }
    )
    present = [x for x in tensors if x is not None]
    if jax.default_backend() != "gpu":
        results = _platform_call(options, tensors, "cpu")(*present)
    else:
        branches = {name: _platform_call(options, tensors, name) for name in ("cpu", "cuda")}
        results = lax.platform_dependent(*present, **branches)
    return vary(results, varying_axes(tensors))


class _Planned(NamedTuple):
    slots: list[Any]
    results: list[jax.ShapeDtypeStruct]
    num_threads: int


def _plan(options: Options, tensors: Tensors, platform: str) -> _Planned:
    """What the plugin will do with this call. The number of threads is decided here, and not where
    the program runs, because the workspace has room for so many."""
    packed = tensors.cu_seqlens_q is not None
    query, value = tensors.query, tensors.value
    output = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype)
    lse_shape = query.shape[1::-1] if packed else query.shape[:-1]
    lse = jax.ShapeDtypeStruct(lse_shape, wide_type(query))

    slots: list[Any] = list(tensors)
    slots[OUTPUT_SLOT:OUTPUT_SLOT] = (output, lse)
    device = (1, 0) if platform == "cpu" else (2, 0)
    specs = [None if x is None else _spec(x, options, i, device) for i, x in enumerate(slots)]

    def choose(num_threads: int) -> Sku:
        return Sku(*_core.query(*specs, *options[:-1], None, num_threads, None, None))

    num_threads = choose(0).num_threads
    sku = choose(num_threads)
    results = [output, lse]
    if sku.workspace_bytes:
        results.append(jax.ShapeDtypeStruct((sku.workspace_bytes,), jnp.uint8))
    return _Planned(slots, results, num_threads)


def check(options: Options, tensors: Tensors) -> None:
    """Raises what tracing `call` would."""
    _plan(options, tensors, "cuda" if jax.default_backend() == "gpu" else "cpu")


def _platform_call(options: Options, tensors: Tensors, platform: str) -> Any:
    """The call for one platform, whose kernel says how much workspace it needs."""
    slots, results, num_threads = _plan(options, tensors, platform)
    attributes = {
        "slots": sum(1 << i for i, x in enumerate(slots) if x is not None),
        "flags": WINDOW_FLAG | (0 if options.scale is None else EXACT_SCALE_FLAG),
        "num_threads": num_threads,
        **options._asdict(),
        "scale": options.scale or 0.0,
        "causal": int(options.causal),
    }
    ffi_call = jax.ffi.ffi_call(TARGET, results)
    return lambda *present: tuple(ffi_call(*present, **attributes)[:2])


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
        if not tensors.has_gradient:
            raise Unsupported("dlattn.jax: packed and paged attention cannot be vmapped")
        query_axis = 1 if batched.query else 0
        batch = tensors.query.shape[query_axis]
        folded = Tensors(
            *(
                None if x is None else _fold(name, x, on, size, batch)
                for name, x, on in zip(Tensors._fields, tensors, batched)
            )
        )
        results = vmappable(folded)
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True, True)

    return vmappable


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
