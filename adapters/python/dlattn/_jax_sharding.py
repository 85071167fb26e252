"""dlattn.jax under explicit sharding: each device calls the plugin on its own part.

The query says how: its batch, heads and rows stay where they are, and so does the output; what goes
with them is sharded alike, and everything else, the length of the keys above all, is gathered.
"""

from __future__ import annotations

import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from . import Unsupported
from ._jax_backward import visible_from
from ._jax_call import SCALES, Options, Tensors, check, wide_type

Attend = Callable[[Options, Tensors], tuple[jax.Array, jax.Array]]


def attend_explicitly(attend: Attend, options: Options, tensors: Tensors) -> Any:
    """``attend`` on each device's part of the tensors; None if nothing is sharded explicitly."""
    mesh = _explicit_mesh(tensors)
    if mesh is None:
        return None
    check(options, tensors)
    tensors, axes = _align(options, tensors, mesh)
    specs = _specs(options, tensors, axes)
    here = jax.tree.map(
        lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), tensors, specs
    )
    rows_axis = 3 - options.heads_axis
    rows = tensors.query.shape[rows_axis] if axes["t"] else 0

    def on_device(tensors: Tensors) -> tuple[jax.Array, jax.Array]:
        if axes["t"] is None:
            return attend(options, tensors)
        first = lax.axis_index(axes["t"]) * tensors.query.shape[rows_axis]
        return attend(*_rows_from(first, rows, options, tensors))

    query = specs.query
    lse = query[:-1] if tensors.cu_seqlens_q is None else query[1::-1]
    explicit = _explicit_axes(mesh)
    if explicit == set(mesh.axis_names):
        explicit = set()  # says all, but for those that a vmap around this has taken
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(query, PartitionSpec(*lse)),
        axis_names=explicit,
    )(here)


def _explicit_axes(mesh: Any) -> set[str]:
    types = zip(mesh.axis_names, mesh.axis_types)
    return {name for name, kind in types if kind == AxisType.Explicit}


def _explicit_mesh(tensors: Tensors) -> Any:
    for x in jax.tree.leaves(tensors):
        sharding = jax.typeof(x).sharding
        if any(axis is not None for axis in sharding.spec) and _explicit_axes(sharding.mesh):
            return sharding.mesh
    return None


# ---- Which axes of the query others have: b is the batch, n heads, t rows, k heads of the keys


def _letters(options: Options, tensors: Tensors) -> Tensors:
    """One letter for each axis of each tensor; "." is whole on every device."""
    if tensors.cu_seqlens_q is not None:
        query, key = ".n.", ".k."
    else:
        query, key = ("bnt.", "bk..") if options.heads_axis == 1 else ("btn.", "b.k.")
    if tensors.block_table is not None:
        key = ".k.."
    elif tensors.cu_seqlens_k is not None:
        key = ".k."
    segments = ("bt", "b.") if tensors.cu_seqlens_q is None else (".", ".")
    slopes = "n" if tensors.alibi_slopes is None else "bn"[-tensors.alibi_slopes.ndim :]
    main = (query, key, key, "bnt.", "bnt.", slopes, "n")
    of_keys = "bk" if tensors.block_table is None else ".k"
    scales = (
        "." if x is None or x.ndim == 1 else letters
        for letters, x in zip(("bn", of_keys, of_keys), (getattr(tensors, n) for n in SCALES))
    )
    return Tensors(*main, "b", "b", ".", ".", "b.", *segments, *scales)


def _align(options: Options, tensors: Tensors, mesh: Any) -> tuple[Tensors, dict[str, Any]]:
    """The mesh axes of each letter; and the tensors with as many key heads as can be divided."""
    query = tensors.query
    axes = dict.fromkeys("bnt.k")
    axes.update(zip(_letters(options, tensors).query, jax.typeof(query).sharding.spec))
    axes["."] = None
    if tensors.block_table is not None:
        axes["t"] = None
    names = axes["n"] if isinstance(axes["n"], tuple) else (axes["n"],)
    devices = math.prod(mesh.shape[name] for name in names if name is not None)
    heads_axis = options.heads_axis if tensors.block_table is None else 1
    heads, heads_kv = query.shape[options.heads_axis], tensors.key.shape[heads_axis]
    if heads_kv == 1:  # every device has it
        return tensors, axes
    axes["k"] = axes["n"]
    if devices > 1 and heads_kv % devices:
        if tensors.key_scale is not None or tensors.value_scale is not None:
            raise Unsupported(
                f"key: {heads_kv} heads with scales cannot be divided among {devices} devices"
            )
        key, value = (
            _repeat(x, heads // heads_kv, heads_axis, mesh) for x in (tensors.key, tensors.value)
        )
        tensors = tensors._replace(key=key, value=value)
    return tensors, axes


def _repeat(x: jax.Array, count: int, axis: int, mesh: Any) -> jax.Array:
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = None
    x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
    shape = (*x.shape[: axis + 1], count, *x.shape[axis + 1 :])
    spec.insert(axis + 1, None)
    x = jnp.expand_dims(x, axis + 1)
    x = jnp.broadcast_to(x, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    return x.reshape(*shape[:axis], shape[axis] * count, *shape[axis + 2 :])


def _specs(options: Options, tensors: Tensors, axes: dict[str, Any]) -> Tensors:
    def one(letters: str, x: jax.Array | None) -> PartitionSpec | None:
        if x is None:
            return None
        extents = zip(letters, x.shape, strict=True)
        broadcast = x is not tensors.query
        return PartitionSpec(
            *(None if broadcast and extent == 1 else axes[at] for at, extent in extents)
        )

    return Tensors(*map(one, _letters(options, tensors), tensors))


# ---- Rows of a longer sequence


def _rows_from(
    first: jax.Array, rows: int, options: Options, tensors: Tensors
) -> tuple[Options, Tensors]:
    """A call for rows [first, ...) of ``rows``: what depends on the row becomes mask and bias."""
    by_distance = options.causal or max(options.window_left, options.window_right) >= 0
    slopes, mask, bias = tensors.alibi_slopes, tensors.mask, tensors.bias
    if not by_distance and slopes is None and tensors.query_lengths is None:
        return options, tensors
    rows_axis = 3 - options.heads_axis
    chunk, keys = tensors.query.shape[rows_axis], tensors.key.shape[rows_axis]
    distance, visible = visible_from(options, tensors, first, chunk, rows, keys)
    if mask is not None:
        visible = visible & (mask != 0)
    if slopes is not None:
        fall = -slopes[..., None, None] * jnp.abs(distance)
        bias = (fall if bias is None else bias + fall).astype(wide_type(tensors.query))
    return (
        options._replace(causal=False, window_left=-1, window_right=-1),
        tensors._replace(
            mask=visible, bias=bias, alibi_slopes=None, query_lengths=None, key_lengths=None
        ),
    )
