"""Attention over a sequence that is spread over an axis of a mesh, called inside shard_map.

Keys come all at once (``all_gather``) or in turns around a ring (``ring``), each ``ppermute``
issued before the calls that hide it; or devices exchange rows for heads (``ulysses``), or groups of
neighbours do and the ring goes over the groups. ``docs/many-gpus.md`` says which way suits what.
Where devices differ in what they compute there is one branch for each kind, not for each device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from . import InvalidArgument
from ._context_parallel import (
    Call,
    Layout,
    Piece,
    Plan,
    Sizes,
    Way,
    band,
    check_layout,
    check_shapes,
    choose,
    depth,
    far_lse,
    in_order,
    length_of,
    places_of,
    plan,
    shards,
)
from ._jax_call import (
    Options,
    Tensors,
    by_platform,
    call,
    platforms,
    vary,
    varying_axes,
    wide_type,
)
from ._jax_native import DIFFERENTIABLE, Upstream, call_on, zeros
from ._options import Alignment, Window, alignment_code, window_sides
from .jax import KNOWS_WHAT_IS_WANTED, _bias, _floats, _mask

__all__ = ["arrange", "attention", "restore"]

ROWS = 2  # the axis of rows in [B, H, L, D]
MAIN = ("query", "key", "value")  # which always have gradients


# ---- What a caller sees


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: str,
    way: Way = "auto",
    ulysses_degree: int | None = None,
    layout: Layout = "contiguous",
    causal: bool = False,
    alignment: Alignment = "top_left",
    scale: float | None = None,
    softcap: float = 0.0,
    window: Window | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    query_length: int | None = None,
    key_length: int | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """``dlattn.jax.attention`` of a sequence of which each device along ``axis_name`` has a part.

    Inside ``jax.shard_map``: query ``[B, H, Lq / n, D]``, key and value ``[B, H_kv, Lk / n, D]``.
    Packed: ``[total / n, H, D]`` with ``cu_seqlens``, int32 ``[S + 1]``, where the sequences begin
    in the whole, in queries and keys alike. With ``layout="zigzag"`` the whole is first put in
    order by ``arrange``: under a causal mask all devices then have the same work.

    bias and mask: ``[B|1, H|1, Lq / n|1, Lk|1]``, the device's rows (``arrange`` of the whole) and
    all keys in the order of the sequence; alibi_slopes and sinks whole. shard_map itself sums the
    gradients of what all devices have alike.

    Other arguments, and what they mean, are those of ``dlattn.torch.context_parallel.attention``.
    Returns the device's rows of the output; with ``return_lse`` also their log-sum-exp. Both have
    first-order gradients in reverse mode.
    """
    n = lax.axis_size(axis_name)
    check_layout(layout)
    given = Tensors(
        *(query, key, value, _bias(bias, query), _mask(mask)),
        _floats("alibi_slopes", alibi_slopes, wide_type(query)),
        _floats("sinks", sinks, wide_type(query)),
        query_segments=query_segments,
        key_segments=key_segments,
    )
    if cu_seqlens is not None:
        given = _of_packed(given, cu_seqlens, axis_name, layout)
    _check(given, n)
    left, right = window_sides(window)
    rows, keys = (x.shape[ROWS] * n for x in given[:2])
    chosen = choose(way, ulysses_degree, _sizes(given, n))
    options = _Options(
        Options(scale, float(softcap), left, right, bool(causal), alignment_code(alignment)),
        length_of("query_length", query_length, rows),
        length_of("key_length", key_length, keys),
        *(layout, chosen.ulysses, chosen.gathers, axis_name),
    )
    output, lse = _exchanged(options, given)
    if cu_seqlens is not None:
        output, lse = output[0].swapaxes(0, 1), lse[0]
    return (output, lse) if return_lse else output


def arrange(
    x: jax.Array, devices: int, *, axis: int = ROWS, layout: Layout = "zigzag"
) -> jax.Array:
    """The whole with its rows in the order in which the devices have them."""
    check_layout(layout)
    if x.shape[axis] % devices:
        raise InvalidArgument(
            f"x: axis {axis} has {x.shape[axis]} rows, must be a multiple of {devices} devices; "
            "pad it, and say query_length and key_length"
        )
    parts = shards(layout, [x.shape[axis] // devices] * devices)
    return _slices(x, [rows for shard in parts for rows in shard], axis)


def restore(
    x: jax.Array, devices: int, *, axis: int = ROWS, layout: Layout = "zigzag"
) -> jax.Array:
    """The inverse of ``arrange``."""
    check_layout(layout)
    length = x.shape[axis] // devices
    order = in_order(shards(layout, [length] * devices))
    starts = (piece.rank * length + piece.places.start for piece in order)
    places = [range(start, start + len(piece.rows)) for start, piece in zip(starts, order)]
    return _slices(x, places, axis)


def _slices(x: jax.Array, places: Sequence[range], axis: int) -> jax.Array:
    pieces = [lax.slice_in_dim(x, part.start, part.stop, axis=axis) for part in places]
    return jnp.concatenate(pieces, axis)


# ---- What is given


class _Options(NamedTuple):
    attention: Options  # of the whole
    query_length: int
    key_length: int
    layout: str
    ulysses: int
    gathers: bool
    axis_name: str


def _of_packed(given: Tensors, cu_seqlens: Any, axis_name: str, layout: str) -> Tensors:
    """Packed sequences are one with a segment for each."""
    if given.query_segments is not None or given.key_segments is not None:
        raise InvalidArgument("cu_seqlens: cannot be combined with query_segments or key_segments")
    for name, x in zip(MAIN, given):
        if x.ndim != 3:
            raise InvalidArgument(f"{name}: has {x.ndim} axes, must have 3 with cu_seqlens")
        if x.shape[0] != given.query.shape[0]:
            raise InvalidArgument(f"{name}: has {x.shape[0]} rows, query {given.query.shape[0]}")
    n = lax.axis_size(axis_name)
    of_devices = shards(layout, [given.query.shape[0]] * n)
    starts = jnp.array([[part.start for part in shard] for shard in of_devices])
    here = starts[lax.axis_index(axis_name)]
    places = [start + jnp.arange(len(part)) for start, part in zip(here, of_devices[0])]
    ends = jnp.asarray(cu_seqlens)[1:]
    segments = jnp.searchsorted(ends, jnp.concatenate(places), side="right").astype(jnp.int32)
    query, key, value = (x.swapaxes(0, 1)[None] for x in given[:3])
    of_rows = {"query_segments": segments[None], "key_segments": segments[None]}
    return given._replace(query=query, key=key, value=value, **of_rows)


def _check(given: Tensors, n: int) -> None:
    query, key, value = given[:3]
    for name, x in zip(MAIN, given):
        if x.ndim != 4:
            raise InvalidArgument(f"{name}: has {x.ndim} axes, must have 4, [B, H, L, D]")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
        raise InvalidArgument(
            f"key, value: shapes are {key.shape}, {value.shape}, query's {query.shape}; batch, "
            "heads and keys must agree"
        )
    if (given.query_segments is None) != (given.key_segments is None):
        raise InvalidArgument("query_segments, key_segments: must be given together")
    options = {name: x.shape for name, x in given._asdict().items() if x is not None}
    for name in MAIN:
        options.pop(name)
    check_shapes(options, *query.shape[:3], key.shape[ROWS], n)


def _sizes(given: Tensors, n: int) -> Sizes:
    query, key, value = given[:3]
    (batch, heads, rows, dim), dim_v = query.shape, value.shape[3]
    pair_bytes = batch * (dim + dim_v) * query.dtype.itemsize
    of_host = jax.local_device_count()
    return Sizes(
        *(n, of_host, heads, key.shape[1], pair_bytes, pair_bytes, rows, key.shape[2]),
        has_alibi=given.alibi_slopes is not None,
    )


# ---- Rows for heads and back; JAX differentiates it


def _exchanged(options: _Options, given: Tensors) -> tuple[jax.Array, jax.Array]:
    """(output, lse), heads being shared by so many devices as the options say."""
    m = options.ulysses
    given = vary(given, varying_axes(given) | {options.axis_name})
    if m == 1:
        return _spread(options, given)
    query, key, value = given[:3]
    if key.shape[1] % m:  # then each device has one head of them, as others do
        key, value = (jnp.repeat(x, m // key.shape[1], axis=1) for x in (key, value))
    query, key, value = (_to_heads(options, x) for x in (query, key, value))
    others = {
        name: _of_heads(options, name, x, given.query)
        for name, x in given._asdict().items()
        if x is not None and name not in MAIN
    }
    output, lse = _spread(options, Tensors(query, key, value, **others))
    return _to_rows(options, output), _to_rows(options, lse[..., None])[..., 0]


def _of_heads(options: _Options, name: str, x: jax.Array, query: jax.Array) -> jax.Array:
    """What of an option goes with the device's heads."""
    m, is_of_pairs = options.ulysses, name in ("bias", "mask")
    if name.endswith("segments"):
        return _to_heads(options, _repeated(x[:, None, :, None], m))[:, 0, :, 0]
    if is_of_pairs and x.shape[ROWS] == query.shape[ROWS]:
        return _to_heads(options, x if x.shape[1] > 1 else _repeated(x, m))
    axis = 1 if is_of_pairs else x.ndim - 1
    if x.shape[axis] == 1:
        return x
    heads = query.shape[1] // m
    first = lax.axis_index(options.axis_name) % m * heads
    return lax.dynamic_slice_in_dim(x, first, heads, axis)


def _repeated(x: jax.Array, m: int) -> jax.Array:
    """Each device needs the only head of all rows."""
    return jnp.broadcast_to(x, (x.shape[0], m, *x.shape[2:]))


def _to_heads(options: _Options, x: jax.Array) -> jax.Array:
    """[B, H, L, D] -> [B, H / m, m L, D], in the order of the sequence."""
    rows = x.shape[ROWS]
    x = _all_to_all(options, x, 1, ROWS)
    return _slices(x, [_places(piece, rows) for piece in _first_order(options, rows)], ROWS)


def _to_rows(options: _Options, x: jax.Array) -> jax.Array:
    order = _first_order(options, x.shape[ROWS] // options.ulysses)
    places = places_of(tuple(piece.rows for piece in order))
    by_device = sorted(zip(order, places), key=lambda p: (p[0].rank, p[0].places.start))
    return _all_to_all(options, _slices(x, [at for _, at in by_device], ROWS), ROWS, 1)


def _first_order(options: _Options, rows: int) -> list[Piece]:
    """How the first devices that share heads have their rows, which is how all do: each group has a
    part of the sequence's first half and one of its second, or one part."""
    n = lax.axis_size(options.axis_name)
    return in_order(shards(options.layout, [rows] * n)[: options.ulysses])


def _places(piece: Piece, rows: int) -> range:
    start = piece.rank * rows + piece.places.start
    return range(start, start + len(piece.rows))


def _all_to_all(options: _Options, x: jax.Array, split: int, join: int) -> jax.Array:
    m, n = options.ulysses, lax.axis_size(options.axis_name)
    groups = [list(range(first, first + m)) for first in range(0, n, m)]
    return lax.all_to_all(
        x, options.axis_name, split, join, tiled=True, axis_index_groups=groups if m < n else None
    )


# ---- Keys that come, and what each device makes of them


def _plan(options: _Options, given: Tensors) -> Plan:
    o, m = options.attention, options.ulysses
    n = lax.axis_size(options.axis_name)
    rows, keys = (x.shape[ROWS] // m for x in given[:2])  # of a device
    seen = band(
        *(o.causal, o.window_left, o.window_right, o.alignment == 1),
        *(options.query_length, options.key_length, given.alibi_slopes is not None),
    )
    the = plan(options.layout, n, m, options.gathers, rows, keys, seen)
    for platform in platforms():
        the.check_placed(platform, str(given.query.dtype))
    return the


class _Keys(NamedTuple):
    """Of one step, in their order on the device that they come from."""

    key: jax.Array
    value: jax.Array
    segments: jax.Array | None
    bias: jax.Array | None  # the columns of these keys
    mask: jax.Array | None


def _keys(options: _Options, the: Plan, given: Tensors) -> Any:
    """The keys of each step; the next ones are on their way meanwhile."""
    here = given.key, given.value, given.key_segments
    if options.gathers:
        here = jax.tree.map(functools.partial(_gathered, options, in_order(the.of_keys)), here)
    for step in range(len(the.steps)):
        coming = here
        if step + 1 < len(the.steps):
            coming = _moved(options, here, 1)
        pairs = (_columns(options, the, step, x) for x in (given.bias, given.mask))
        yield _Keys(*here, *pairs)
        here = coming


def _columns(options: _Options, the: Plan, step: int, x: jax.Array | None) -> jax.Array | None:
    """Those of a bias or a mask that the keys of a step have, in the keys' order."""
    pieces = _pieces(options, the, step)
    if x is None or x.shape[3] == 1 or not pieces:
        return x
    parts = [lax.dynamic_slice_in_dim(x, start, length, 3) for start, length in pieces]
    return jnp.concatenate(parts, 3)


def _put_columns(
    options: _Options, the: Plan, step: int, total: jax.Array, part: jax.Array
) -> jax.Array:
    """``total`` with what a step has in these columns."""
    pieces = _pieces(options, the, step)
    if total.shape[3] == 1 or not pieces:
        return total + part
    at = 0
    for start, length in pieces:
        piece = lax.slice_in_dim(part, at, at + length, axis=3)
        total = lax.dynamic_update_slice_in_dim(total, piece, start, 3)
        at += length
    return total


def _pieces(options: _Options, the: Plan, step: int) -> list[tuple[jax.Array, int]]:
    """Where the keys of a step lie in the sequence, (start, length) of each range; none if they are
    the whole of it."""
    m, positions = options.ulysses, the.ranks // options.ulysses
    if the.gathers or positions == 1:
        return []
    by_position = [in_order(the.of_keys[p * m : (p + 1) * m]) for p in range(positions)]
    starts = jnp.array([[piece.rows.start for piece in pieces] for pieces in by_position])
    position = lax.axis_index(options.axis_name) // m
    mine = starts[(position - step) % positions]
    return [(start, len(piece.rows)) for start, piece in zip(mine, by_position[0])]


def _gathered(options: _Options, order: Sequence[Piece], x: jax.Array) -> jax.Array:
    axis = 1 if x.ndim == 2 else ROWS
    rows = x.shape[axis]
    x = lax.all_gather(x, options.axis_name, axis=axis, tiled=True)
    return _slices(x, [_places(piece, rows) for piece in order], axis)


def _moved(options: _Options, tree: Any, by: int) -> Any:
    """What the device so many positions before has."""
    n = lax.axis_size(options.axis_name)
    pairs = [(device, (device + by * options.ulysses) % n) for device in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, options.axis_name, pairs), tree)


def _by_position(
    options: _Options, step: Sequence[tuple[Call, ...]], run: Callable[..., Any], *given: Any
) -> Any:
    """``run(calls, *given)`` with the calls of the position: a branch for each that differs."""
    kinds = list(dict.fromkeys(step))
    if len(kinds) == 1:
        return run(kinds[0], *given)
    position = lax.axis_index(options.axis_name) // options.ulysses
    kind = jnp.array([kinds.index(calls) for calls in step])[position]
    return lax.switch(kind, [functools.partial(run, calls) for calls in kinds], *given)


def _part(
    options: _Options, call: Call, given: Tensors, keys: _Keys, sinks: jax.Array | None = None
) -> tuple[Options, Tensors]:
    """The plugin's call."""
    sides = (-1 if side is None else side for side in (call.left, call.right))
    o = options.attention
    alignment, offset = call.placed
    tensors = Tensors(
        _rows(given.query, call.rows),
        _rows(keys.key, call.keys),
        _rows(keys.value, call.keys),
        *(x if x is None else x[_at("bias", x, call)] for x in (keys.bias, keys.mask)),
        *(given.alibi_slopes, sinks),
        query_segments=_rows(given.query_segments, call.rows, 1),
        key_segments=_rows(keys.segments, call.keys, 1),
    )
    return Options(o.scale, o.softcap, *sides, False, alignment, diagonal_offset=offset), tensors


def _at(name: str, x: jax.Array, call: Call) -> tuple[slice, ...]:
    """Where in a tensor, or in its gradient, the part of a call is."""
    if name not in (*MAIN, "bias"):
        return (slice(None),)
    rows, keys = (slice(part.start, part.stop) for part in (call.rows, call.keys))
    if name != "bias":
        return slice(None), slice(None), rows if name == "query" else keys
    of_axes = zip(x.shape[2:], (rows, keys))
    return slice(None), slice(None), *(slice(None) if n == 1 else at for n, at in of_axes)


def _rows(x: jax.Array | None, part: range, axis: int = ROWS) -> Any:
    return None if x is None else lax.slice_in_dim(x, part.start, part.stop, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(options: _Options, given: Tensors) -> tuple[jax.Array, jax.Array]:
    """(output, lse) of the rows of a position of the ring."""
    the, query = _plan(options, given), given.query
    wide = wide_type(query)
    shape = (*query.shape[:3], given.value.shape[3])
    lse = -jnp.inf if given.sinks is None else given.sinks[:, None]  # a part that has no value
    merged = jnp.zeros(shape, wide), jnp.broadcast_to(jnp.asarray(lse, wide), shape[:3])
    merged = vary(merged, varying_axes(given))

    def run(calls: tuple[Call, ...], merged: Any, given: Tensors, keys: Any) -> Any:
        for one in calls:
            merged = _merge(merged, one.rows, call(*_part(options, one, given, keys)))
        return merged

    for step, keys in zip(the.steps, _keys(options, the, given)):
        merged = _by_position(options, step, run, merged, given, keys)
    return merged[0].astype(query.dtype), merged[1]


def _merge(merged: Any, rows: range, part: Any) -> Any:
    """Output and log-sum-exp of these rows over more keys. XLA makes one loop of it."""
    output, lse = merged
    before_output, before = _rows(output, rows), _rows(lse, rows)
    term, now = part[0].astype(output.dtype), part[1]
    both = jnp.logaddexp(before, now)
    of_before, of_now = (_weight(x, both)[..., None] for x in (before, now))
    at = (slice(None), slice(None), slice(rows.start, rows.stop))
    summed = of_before * before_output + of_now * term
    return output.at[at].set(summed), lse.at[at].set(both)


def _weight(lse: jax.Array, both: jax.Array) -> jax.Array:
    """How much of the whole a part is; nothing of an empty one."""
    return jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - both))


# ---- Gradients


def _forward(options: _Options, primals: Any) -> Any:
    given = jax.tree.map(lambda x: x.value, primals)
    results = _spread(options, given)
    present = [name for name in DIFFERENTIABLE if getattr(primals, name) is not None]
    wanted = [n for n in present if getattr(primals, n).perturbed or not KNOWS_WHAT_IS_WANTED]
    return results, (given, dict.fromkeys(wanted, ()), results)  # names go as structure


def _backward(options: _Options, saved: Any, cotangents: Any) -> tuple[Tensors]:
    given, wanted, results = saved
    wanted = tuple(name for name in DIFFERENTIABLE if name in MAIN or name in wanted)
    the = _plan(options, given)
    position_calls = (
        [call for step in the.steps for call in step[p]] for p in range(len(the.steps[0]))
    )
    is_shared = any(depth(call.rows for call in calls) > 1 for calls in position_calls)
    upstream = Upstream(
        *results, *(zeros(x.aval, given) if isinstance(x, SymbolicZero) else x for x in cotangents)
    )
    of_calls = tuple(name for name in wanted if name != "sinks")
    run = functools.partial(_step_gradients, options, is_shared, of_calls)
    sums: dict[str, Any] = {name: _zeros_for(getattr(given, name), upstream) for name in of_calls}
    travelling: Any = None
    for step, (calls, keys) in enumerate(zip(the.steps, _keys(options, the, given))):
        added = _by_position(options, calls, run, given, upstream, keys)
        for name in of_calls:
            if name == "bias":
                sums[name] = _put_columns(options, the, step, sums[name], added[name])
            elif name not in ("key", "value"):
                sums[name] = sums[name] + added[name]
        of_keys = [added["key"], added["value"]]
        if step:  # on with the keys
            travelling = _moved(options, travelling, 1)
            of_keys = [before + more for before, more in zip(travelling, of_keys)]
        travelling = of_keys
    if len(the.steps) > 1:  # and from their last stop home
        travelling = _moved(options, travelling, 1 - len(the.steps))
    if options.gathers:
        travelling = [_sum_home(options, the, x) for x in travelling]
    sums["key"], sums["value"] = travelling
    if "sinks" in wanted:
        of_sinks = _sink_gradient(given.sinks, upstream)
        sums["sinks"] = vary(of_sinks, varying_axes((given, upstream)))  # without rows it is not
    found = {name: sums[name].astype(getattr(given, name).dtype) for name in wanted}
    return (Tensors(**dict.fromkeys(Tensors._fields) | found),)


def _zeros_for(x: jax.Array, upstream: Upstream) -> jax.Array:
    """In the type of sums."""
    axes = varying_axes((x, upstream))
    return vary(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), axes)


def _sink_gradient(sinks: jax.Array, upstream: Upstream) -> jax.Array:
    """A sink is a part of the row's keys that has output 0."""
    output, lse, d_output, d_lse = upstream
    weight = _weight(sinks[:, None], lse)
    of_output = jnp.sum(d_output.astype(lse.dtype) * output, axis=-1)
    # Whatever comes to a row that sees no key reaches nothing.
    of_output = jnp.where((output != 0).any(-1), of_output, 0)
    return jnp.sum(jnp.where(weight == 0, 0, weight * (d_lse - of_output)), axis=(0, 2))


def _step_gradients(
    options: _Options,
    is_shared: bool,
    wanted: tuple[str, ...],
    calls: tuple[Call, ...],
    given: Tensors,
    upstream: Upstream,
    keys: _Keys,
) -> dict[str, jax.Array]:
    """Of all rows and of the keys of one step."""
    of_step = given._replace(key=keys.key, value=keys.value, bias=keys.bias)
    sums = {name: _zeros_for(getattr(of_step, name), upstream) for name in wanted}
    for one in calls:
        terms = _call_gradients(options, is_shared, wanted, one, given, upstream, keys)
        for name, term in zip(wanted, terms):
            sums[name] = sums[name].at[_at(name, sums[name], one)].add(term)
    return sums


def _call_gradients(
    options: _Options,
    is_shared: bool,
    wanted: tuple[str, ...],
    one: Call,
    given: Tensors,
    upstream: Upstream,
    keys: _Keys,
) -> tuple[jax.Array, ...]:
    """In the type of sums. With the log-sum-exp of all keys, and of the sink, the weights of a part
    of them are those of the whole, where a kernel takes it; else the part by itself is
    differentiated."""
    o, tensors = _part(options, one, given, keys, None if is_shared else given.sinks)
    upstream = Upstream(*(_rows(x, one.rows) for x in upstream))
    leaves, structure = jax.tree.flatten((tensors, upstream))
    is_half = given.query.dtype.itemsize == 2

    def on(platform: str) -> Callable[..., tuple[jax.Array, ...]]:
        def whole(tensors: Tensors, upstream: Upstream) -> tuple[jax.Array, ...]:
            return call_on(platform, o, wanted, tensors, upstream, is_wide=True)

        def part(tensors: Tensors, upstream: Upstream) -> tuple[jax.Array, ...]:
            return whole(tensors, _of_part(o, tensors, upstream))

        def run(*leaves: jax.Array) -> tuple[jax.Array, ...]:
            tensors, upstream = jax.tree.unflatten(structure, leaves)
            if not is_shared:
                return whole(tensors, upstream)
            if platform == "cpu" or not is_half:
                return part(tensors, upstream)
            lse = jnp.abs(upstream.lse)
            limit = far_lse(tensors.query.shape[3] ** -0.5 if o.scale is None else o.scale)
            is_far = jnp.any((lse >= limit) & (lse < jnp.inf))
            return lax.cond(is_far, part, whole, tensors, upstream)

        return run

    return by_platform(on, leaves)


def _of_part(o: Options, tensors: Tensors, upstream: Upstream) -> Upstream:
    """By the derivative of output = sum exp(lse_n - lse) output_n, as parts are merged."""
    output, lse = call(o, tensors)
    weight = _weight(lse, upstream.lse)
    d_output = upstream.d_output.astype(lse.dtype)
    apart = output.astype(lse.dtype) - upstream.output
    d_lse = weight * (upstream.d_lse + jnp.sum(d_output * apart, axis=-1))
    return Upstream(output, lse, d_output * weight[..., None], d_lse)


def _sum_home(options: _Options, the: Plan, x: jax.Array) -> jax.Array:
    """The sum over the devices, in their order, of the gradients of this one's keys."""
    order = in_order(the.of_keys)
    places = places_of(tuple(piece.rows for piece in order))
    by_device = sorted(zip(order, places), key=lambda p: (p[0].rank, p[0].places.start))
    x = _slices(x, [at for _, at in by_device], ROWS)
    x = x.reshape(*x.shape[:ROWS], the.ranks, x.shape[ROWS] // the.ranks, x.shape[3])
    x = lax.all_to_all(jnp.moveaxis(x, ROWS, 0), options.axis_name, 0, 0, tiled=True)
    return functools.reduce(jnp.add, x)


_spread.defvjp(_forward, _backward, symbolic_zeros=True)
