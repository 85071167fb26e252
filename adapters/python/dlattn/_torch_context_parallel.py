"""Attention over a sequence that is spread over the ranks of a process group.

Each rank calls ``attention`` with its rows and its keys; ``replace_sdpa`` makes PyTorch's own
attention do so. What moves goes through torch.distributed (NCCL, gloo), as bytes, and what is
computed is the plugin's forward, backward and merge. ``docs/many-gpus.md`` says which way suits
what.

Keys come all at once (``all_gather``) or in turns around a ring, the next while the last are
computed with; or ranks exchange rows for heads (``ulysses``), so that each has the whole
sequence for some of them; or consecutive ranks do that and the ring goes over such groups.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.overrides import TorchFunctionMode

from . import Error, InvalidArgument, Unsupported, _core, kernels, merge
from ._context_parallel import (
    Call,
    Cover,
    Layout,
    Piece,
    Plan,
    Shard,
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
from ._options import Alignment, Window, alignment_code, window_sides
from ._torch_math import DIFFERENTIABLE, Options, Tensors
from .torch import (
    _arguments,
    _as_float,
    _autocast,
    _check_kinds,
    _is_any_autocast_enabled,
    _is_causal_bias,
    _is_compiling,
    _lse,
    _names,
    _output,
    _padded,
    _stream,
)

__all__ = ["attention", "replace_sdpa", "shard", "unshard"]

ROWS = 2  # the axis of rows in [B, H, L, D]


# ---- What a caller sees


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    way: Way = "auto",
    ulysses_degree: int | None = None,
    layout: Layout = "contiguous",
    causal: bool = False,
    alignment: Alignment = "top_left",
    scale: float | None = None,
    softcap: float = 0.0,
    window: Window | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_length: int | None = None,
    key_length: int | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    check: bool = True,
    return_lse: bool = False,
) -> Any:
    """``dlattn.torch.attention`` of a sequence of which each rank has a part (see ``shard``).

    query ``[B, H, Lq / n, D]``, key and value ``[B, H_kv, Lk / n, D]`` on each of n ranks: the same
    shapes, types and options on all of them. Packed: ``[total / n, H, D]`` with ``cu_seqlens``,
    int32 ``[S + 1]``, where the sequences begin in the whole, in queries and keys alike.
    DTensors that are sharded by rows have their mesh with them.

    group:  ProcessGroup or DeviceMesh of one axis; default all ranks.
    way:    "all_gather", "ring", "ulysses", "ring_ulysses" (of ``ulysses_degree`` ranks each), or
            "auto", which goes by sizes and by how many ranks are of one host.
    layout: "contiguous", or "zigzag": the first and the last of 2 n ranges for the first rank, and
            so on, which gives all ranks the same work under a causal mask.
    bias, mask: ``[B|1, H|1, Lq / n|1, Lk|1]``, the rank's rows (``shard`` of the whole) and all
            keys, in the order of the sequence whatever the layout.
    alibi_slopes, sinks: whole on every rank. Of what all ranks have alike, a bias of one row
            included, each gets its share of the gradient; the sum over the ranks, as of every
            other weight, is left to the caller.
    query_length, key_length: rows and keys of the whole sequence from there on are padding.
    query_segments, key_segments: int32 ``[B, Lq / n]``, ``[B, Lk / n]``: a key is visible only to
            rows of its own number.

    Other options as in ``dlattn.torch.attention``; alignment, window and ALiBi's distances mean the
    whole sequence.
    check:  before anything moves the ranks compare shapes, types and options; one that differs, or
            does not come, is an error on all, which names it. Without, a call saves half a
            millisecond of the host's time, and ranks that differ may wait for ever.

    Returns the rank's rows of the output; with ``return_lse`` also their log-sum-exp. Both have
    first-order gradients in reverse mode. The same bits on every run.
    """
    if _is_dtensor(query):
        given = {name: x for name, x in locals().items() if name not in ("query", "key", "value")}
        return _of_dtensors(query, key, value, given)
    group = _group_of(group)
    try:
        _check_kinds(bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks)
        if _is_any_autocast_enabled():
            query, key, value, bias = _autocast(query, key, value, bias)
        tensors = _Tensors(
            *(query, key, value),
            None if bias is None else _padded(_as_float(bias, query.dtype), 4),
            None if mask is None else _padded(mask, 4),
            *(_as_float(alibi_slopes), _as_float(sinks), query_segments, key_segments),
        )
        tensors = _with_four_axes(tensors, cu_seqlens, group, layout)
        _check(tensors, group)
        left, right = window_sides(window)
        chosen = choose(way, ulysses_degree, _sizes(tensors, group))
        check_layout(layout)
        whole = [x.shape[ROWS] * group.size() for x in tensors[:2]]
        lengths = [
            length_of(name, given, most)
            for name, given, most in zip(_LENGTHS, (query_length, key_length), whole)
        ]
        options = _Options(
            *(scale, float(softcap), left, right, causal, alignment_code(alignment)),
            *(*lengths, layout, chosen.ulysses, chosen.gathers, _wanted(tensors)),
            group.group_name,
        )
    except Error as error:
        if check and not _is_compiling():
            _agree(group, _error(error))
        raise
    agreed = torch.ops.dlattn.context_agree(*tensors, *options) if check else None
    output, lse = _exchanged(tensors, options, agreed, group)
    if cu_seqlens is not None:
        output, lse = output[0].transpose(0, 1), lse[0]
    return (output, lse.float()) if return_lse else output


def shard(
    x: Tensor, group: Any = None, *, axis: int = ROWS, layout: Layout = "contiguous"
) -> Tensor:
    """This rank's part of a tensor that is whole on every rank."""
    group = _group_of(group)
    check_layout(layout)
    if x.shape[axis] % group.size():
        raise InvalidArgument(
            f"x: axis {axis} has {x.shape[axis]} rows, must be a multiple of {group.size()} ranks; "
            "pad it, and say query_length and key_length"
        )
    mine = shards(layout, [x.shape[axis] // group.size()] * group.size())[group.rank()]
    return torch.cat([x.narrow(axis, part.start, len(part)) for part in mine], axis)


@torch.no_grad()
def unshard(
    x: Tensor, group: Any = None, *, axis: int = ROWS, layout: Layout = "contiguous"
) -> Tensor:
    """The whole of what ``shard`` has spread, on every rank."""
    group = _group_of(group)
    check_layout(layout)
    parts = _all_gather(x, group)
    order = in_order(shards(layout, [x.shape[axis]] * group.size()))
    pieces = (parts[p.rank].narrow(axis, p.places.start, len(p.places)) for p in order)
    return torch.cat(list(pieces), axis)


@contextlib.contextmanager
def replace_sdpa(
    group: Any = None,
    *,
    buffers: Sequence[Tensor] = (),
    buffer_seq_dims: Sequence[int] = (),
    no_restore_buffers: Sequence[Tensor] = (),
    layout: Layout = "zigzag",
    **options: Any,
) -> Iterator[None]:
    """Within it ``torch.nn.functional.scaled_dot_product_attention`` is that over the group.

    buffers: tensors that depend on the sequence (tokens, positions, labels), whole on every rank;
    within, each holds the rank's part along its ``buffer_seq_dims``, and afterwards the whole
    again, unless it is among ``no_restore_buffers``. An ``attn_mask`` has the rank's rows and all
    keys, as a buffer whose ``buffer_seq_dims`` are those of the rows. options: those of
    ``attention``, such as ``way``.
    """
    if len(buffers) != len(buffer_seq_dims):
        raise InvalidArgument(
            f"buffer_seq_dims: has {len(buffer_seq_dims)} axes, there are {len(buffers)} buffers"
        )
    group = _group_of(group)
    kept = []
    for x, axis in zip(buffers, buffer_seq_dims):
        if not any(x is other for other in no_restore_buffers):
            kept.append((x, x.clone()))
        _become(x, shard(x, group, axis=axis, layout=layout))
    try:
        with _Replaced(functools.partial(attention, group=group, layout=layout, **options)):
            yield
    finally:
        for x, whole in kept:
            _become(x, whole)


@torch.no_grad()
def _become(x: Tensor, other: Tensor) -> None:
    x.resize_(other.shape).copy_(other)


class _Replaced(TorchFunctionMode):
    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise Unsupported(f"dropout_p: is {dropout_p}, is not supported over many ranks")
        if _is_causal_bias(attn_mask):
            raise Unsupported("attn_mask: is a CausalBias; is_causal is supported over many ranks")
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise InvalidArgument(
                f"key: has {key.shape[1]} heads, query {query.shape[1]}; enable_gqa=True allows it"
            )
        options: dict[str, Any] = {"causal": is_causal, "scale": scale}
        if attn_mask is not None:
            options["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
        return self.attention(query, key, value, **options)


# ---- What is given


_LENGTHS = ("query_length", "key_length")
_SEGMENTS = ("query_segments", "key_segments")


class _Tensors(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None


class _Options(NamedTuple):
    """Of the operator, in its order."""

    scale: float | None
    softcap: float
    window_left: int
    window_right: int
    causal: bool
    alignment: int
    query_length: int
    key_length: int
    layout: str
    ulysses: int
    gathers: bool
    wanted: int  # bits of DIFFERENTIABLE: what has a gradient
    group_name: str


def _wanted(tensors: _Tensors) -> int:
    if not torch.is_grad_enabled():
        return 0
    given = (getattr(tensors, name) for name in DIFFERENTIABLE)
    return sum(1 << i for i, x in enumerate(given) if x is not None and x.requires_grad)


def _group_of(group: Any) -> dist.ProcessGroup:
    if group is None:
        group = dist.group.WORLD
        if group is None:
            raise InvalidArgument("group: torch.distributed has not been initialised")
    if isinstance(group, dist.ProcessGroup):
        return group
    if not hasattr(group, "get_group") or group.ndim != 1:
        raise InvalidArgument(f"group: is {group}, must be a ProcessGroup or a mesh of one axis")
    return group.get_group()


def _is_dtensor(x: Any) -> bool:
    return hasattr(x, "device_mesh") and hasattr(x, "placements")


def _of_dtensors(query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
    """Over the axis of the mesh along which rows are sharded; others may shard batch and heads."""
    from torch.distributed.tensor import DTensor, Shard

    mesh, placements = query.device_mesh, tuple(query.placements)
    for name, x in (("key", key), ("value", value)):
        if not _is_dtensor(x) or (x.device_mesh, tuple(x.placements)) != (mesh, placements):
            raise InvalidArgument(f"{name}: must be a DTensor of the query's mesh and placements")
    axes = [i for i, placement in enumerate(placements) if placement.is_shard(ROWS)]
    others = [p for p in placements if not (p.is_replicate() or p.is_shard(0) or p.is_shard(1))]
    if len(axes) != 1 or len(others) > 1 or options["group"] is not None:
        raise InvalidArgument(
            f"query: placements are {placements}; rows must be sharded along one axis of the mesh, "
            "which is the group"
        )
    options["group"] = mesh.get_group(axes[0])
    for name in _Tensors._fields[3:]:
        options[name] = _local(options[name], placements)
    results = attention(*(x.to_local() for x in (query, key, value)), **options)
    if not options["return_lse"]:
        return DTensor.from_local(results, mesh, placements)
    of_lse = [Shard(2) if p.is_shard(ROWS) else p for p in placements]
    return tuple(DTensor.from_local(x, mesh, p) for x, p in zip(results, (placements, of_lse)))


def _local(x: Any, placements: Sequence[Any]) -> Any:
    """Of what is alike where the query is sharded, each rank has a share of the gradient."""
    if not _is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    of_gradient = [
        Partial() if p.is_replicate() and not of_query.is_replicate() else p
        for p, of_query in zip(x.placements, placements)
    ]
    return x.to_local(grad_placements=of_gradient)


def _with_four_axes(
    tensors: _Tensors, cu_seqlens: Tensor | None, group: dist.ProcessGroup, layout: str
) -> _Tensors:
    """Packed sequences are one with a segment for each."""
    if cu_seqlens is None:
        return tensors
    if tensors.query_segments is not None or tensors.key_segments is not None:
        raise InvalidArgument("cu_seqlens: cannot be combined with query_segments or key_segments")
    query, key, value = tensors[:3]
    for name, x in zip(("query", "key", "value"), tensors):
        if x.dim() != 3:
            raise InvalidArgument(f"{name}: has {x.dim()} axes, must have 3 with cu_seqlens")
        if x.shape[0] != query.shape[0]:
            raise InvalidArgument(f"{name}: has {x.shape[0]} rows, query {query.shape[0]}")
    mine = shards(layout, [query.shape[0]] * group.size())[group.rank()]
    places = [torch.arange(part.start, part.stop, device=query.device) for part in mine]
    ends = cu_seqlens[1:].to(query.device)
    segments = torch.bucketize(torch.cat(places), ends, right=True, out_int32=True)[None]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return tensors._replace(
        query=query, key=key, value=value, query_segments=segments, key_segments=segments
    )


def _check(tensors: _Tensors, group: dist.ProcessGroup) -> None:
    """What the plugin would refuse on one rank must be refused before anything moves."""
    query, key, value = tensors[:3]
    for name, x in zip(("query", "key", "value"), tensors):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise InvalidArgument(f"{name}: must be a torch.Tensor of 4 axes, [B, H, L, D]")
        if x.dtype != query.dtype or x.device != query.device:
            raise InvalidArgument(
                f"{name}: is {x.dtype} on {x.device}, query is {query.dtype} on {query.device}"
            )
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
        raise InvalidArgument(
            f"key, value: shapes are {list(key.shape)}, {list(value.shape)}, query's "
            f"{list(query.shape)}; batch, heads and keys must agree"
        )
    if key.shape[3] != query.shape[3]:
        raise InvalidArgument(f"key: head_dim is {key.shape[3]}, query's {query.shape[3]}")
    if query.shape[1] % max(key.shape[1], 1) or (query.shape[1] and not key.shape[1]):
        raise InvalidArgument(
            f"query: has {query.shape[1]} heads, must be a multiple of key's {key.shape[1]}"
        )
    if (tensors.query_segments is None) != (tensors.key_segments is None):
        raise InvalidArgument("query_segments, key_segments: must be given together")
    _check_options(tensors, group)


def _check_options(tensors: _Tensors, group: dist.ProcessGroup) -> None:
    query, given = tensors.query, {}
    dtypes = {
        "bias": (torch.float32, query.dtype),
        "mask": (torch.bool, torch.uint8),
        "alibi_slopes": (torch.float32,),
        "sinks": (torch.float32,),
        "query_segments": (torch.int32,),
        "key_segments": (torch.int32,),
    }
    for name, wanted in dtypes.items():
        x = getattr(tensors, name)
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.device != query.device:
            raise InvalidArgument(f"{name}: must be a torch.Tensor on {query.device}")
        if x.dtype not in wanted:
            kinds = " or ".join(str(dtype) for dtype in dict.fromkeys(wanted))
            raise InvalidArgument(f"{name}: is {x.dtype}, must be {kinds}")
        given[name] = x.shape
    check_shapes(given, *query.shape[:3], tensors.key.shape[ROWS], group.size())


def _sizes(tensors: _Tensors, group: dist.ProcessGroup) -> Sizes:
    query, key, value = tensors[:3]
    (batch, heads, rows, dim), dim_v = query.shape, value.shape[3]
    pair_bytes = batch * (dim + dim_v) * query.element_size()
    of_host = int(os.environ.get("LOCAL_WORLD_SIZE", group.size()))
    memory = {}
    if query.is_cuda:
        memory["free_bytes"] = torch.cuda.get_device_properties(query.device).total_memory / 2
    return Sizes(
        group.size(),
        of_host,
        heads,
        key.shape[1],
        pair_bytes,
        pair_bytes,
        rows,
        key.shape[2],
        has_alibi=tensors.alibi_slopes is not None,
        **memory,
    )


# ---- Agreement

_calls: dict[str, int] = {}  # of each group, so far


def _agree(group: dist.ProcessGroup, description: Sequence[tuple[str, Any]]) -> None:
    """Refuses on every rank what some rank sees otherwise.

    Through the store by which the ranks have found each other: nothing waits for a GPU, and no
    collective begins that another rank would not join.
    """
    call = _calls[group.group_name] = _calls.get(group.group_name, 0) + 1
    store = dist.distributed_c10d._world.pg_map[group][1]

    def key(call: int, rank: int) -> str:
        return f"dlattn/{call}/{rank}"

    ours = json.dumps(description)
    store.set(key(call, group.rank()), ours)
    keys = [key(call, rank) for rank in range(group.size())]
    try:
        theirs = [x.decode() for x in store.multi_get(keys)]
    except dist.DistStoreError as error:
        late = [rank for rank, one in enumerate(keys) if not store.check([one])]
        raise Error(f"context_parallel: ranks {late} have not made this call: {error}") from None
    if call > 1:  # who has come here has read what was there for the last call
        store.delete_key(key(call - 1, group.rank()))
    if any(other != ours for other in theirs):
        raise InvalidArgument(f"context_parallel: {_difference([json.loads(x) for x in theirs])}")


def _difference(of_ranks: Sequence[Any]) -> str:
    first = dict(of_ranks[0])
    for rank, other in enumerate(of_ranks):
        if "error" in dict(other):
            return f"rank {rank} has {dict(other)['error']}"
    return next(
        f"{name} is {found} on rank {rank}, {first.get(name)} on rank 0"
        for rank, other in enumerate(of_ranks)
        for name, found in other
        if found != first.get(name)
    )


def _description(tensors: _Tensors, options: _Options) -> list[tuple[str, Any]]:
    of_tensors = (
        (name, None if x is None else f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}")
        for name, x in tensors._asdict().items()
    )
    of_options = options._asdict() | {"wanted": _names(options.wanted)}
    return [*of_tensors, *((n, x) for n, x in of_options.items() if n != "group_name")]


def _error(error: Error) -> list[tuple[str, Any]]:
    return [("error", f"{type(error).__name__}: {error}")]


def _agreement(*inputs: Any) -> Tensor:
    """Nothing, which what moves something takes: so a compiler keeps the order."""
    tensors = _Tensors(*(x if x is None else x.detach() for x in inputs[:_COUNT]))
    options = _Options(*inputs[_COUNT:])
    group = _resolve_process_group(options.group_name)
    refusal = _refusal(tensors, options, group)
    _agree(group, _description(tensors, options) if refusal is None else _error(refusal))
    if refusal is not None:
        raise refusal
    return _agreement_fake(*inputs)


def _refusal(tensors: _Tensors, options: _Options, group: dist.ProcessGroup) -> Error | None:
    """What the plugin says to such calls, of which this rank may have none."""
    t, o = tensors, options
    rows, keys = (x.shape[ROWS] for x in t[:2])
    if t.query.numel() == 0 or keys == 0:
        return None
    call = Call(range(rows), range(keys))
    pairs = (_part(x, call) for x in (t.bias, t.mask))
    given = Tensors(*t[:3], *pairs, t.alibi_slopes, t.sinks)
    results = _forward_fake(None, *tensors)
    sides = o.window_left, o.window_right
    asked = Options(o.scale, o.softcap, *sides, o.causal, o.alignment, 0, 0)
    more = {n: x for n, x in zip(_SEGMENTS, t[-2:]) if x is not None}
    try:
        dtype = str(t.query.dtype).removeprefix("torch.")
        _plan(options, rows, keys, t, group).check_placed(t.query.device.type, dtype)
        _core.query(*_arguments(given, asked, *results), **more)
    except Error as error:
        return error
    return None


def _agreement_fake(*inputs: Any) -> Tensor:
    return inputs[0].new_empty(0, dtype=torch.uint8)


# ---- Collectives. What they move is bytes to them.


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.numel() else x


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...]"""
    x = x.detach().contiguous()
    found = x.new_empty((group.size(), *x.shape))
    if x.numel():
        dist.all_gather_into_tensor(_bytes(found).flatten(0, 1), _bytes(x), group)
    return found


def _all_to_all(x: Tensor, group: dist.ProcessGroup, first: int = 0) -> Tensor:
    """[m, ...], entry i going to rank ``first + i``, which may be some of the group."""
    splits = [int(first <= rank < first + x.shape[0]) for rank in range(group.size())]
    found = torch.empty_like(x)
    if x.numel():
        dist.all_to_all_single(_bytes(found), _bytes(x), splits, splits, group)
    return found


Move = tuple[int, int, Tensor]  # number, the other rank, contiguous rows


def _move(sends: Sequence[Move], receives: Sequence[Move], group: dist.ProcessGroup) -> None:
    """All at once; what is sent as a number is received as that."""
    moves = [
        dist.P2POp(move, _bytes(x.view(-1)), dist.get_global_rank(group, rank), group, number)
        for move, of_kind in ((dist.isend, sends), (dist.irecv, receives))
        for number, rank, x in of_kind
        if x.numel()
    ]
    _wait(dist.batch_isend_irecv(moves) if moves else [])


def _gathered(
    tensors: Sequence[Tensor], parts: Sequence[Shard], group: dist.ProcessGroup
) -> list[Tensor]:
    """Those of all ranks in the order of the sequence. Rows are outermost in memory, so pieces come
    where they belong."""
    me, found, sends, receives = group.rank(), [], [], []
    others = [rank for rank in range(group.size()) if rank != me]
    numbers = itertools.count()
    for x in tensors:
        ours = x.detach().movedim(_axis(x), 0).contiguous()
        whole = ours.new_empty((len(ours) * group.size(), *ours.shape[1:]))
        found.append(whole.movedim(0, _axis(x)))
        for number, (rows, rank, places) in zip(numbers, in_order(parts)):
            to = whole[rows.start : rows.stop]
            if rank != me:
                receives.append((number, rank, to))
                continue
            piece = ours[places.start : places.stop]
            to.copy_(piece)
            sends += [(number, other, piece) for other in others]
    _move(sends, receives, group)
    return found


def _summed(
    tensors: Sequence[Tensor], parts: Sequence[Shard], group: dist.ProcessGroup
) -> list[Tensor]:
    """The way back of what each rank has for the whole: of a rank's own rows the sum over the
    ranks, in their order."""
    me, found, sends, receives = group.rank(), [], [], []
    others = [rank for rank in range(group.size()) if rank != me]
    numbers = itertools.count()
    for x in tensors:
        whole = x.movedim(_axis(x), 0).contiguous()
        ours = whole.new_empty((group.size(), len(whole) // group.size(), *whole.shape[1:]))
        found.append((ours, _axis(x)))
        for number, (rows, rank, places) in zip(numbers, in_order(parts)):
            piece = whole[rows.start : rows.stop]
            if rank != me:
                sends.append((number, rank, piece))
                continue
            to = ours[:, places.start : places.stop]
            to[me].copy_(piece)
            receives += [(number, other, to[other]) for other in others]
    _move(sends, receives, group)
    return [ours.sum(0).movedim(0, axis) for ours, axis in found]


class _Ring(NamedTuple):
    """A rank's place in the ring of positions, each of which has ``degree`` ranks."""

    group: dist.ProcessGroup
    degree: int

    @property
    def position(self) -> int:
        return self.group.rank() // self.degree

    def peer(self, by: int) -> int:
        ranks, mine = self.group.size(), self.group.rank()
        return dist.get_global_rank(self.group, (mine + by * self.degree) % ranks)

    def send(self, tensors: Sequence[Tensor], by: int, tag: int = 0) -> tuple[list[Tensor], Any]:
        """(what the rank so many positions before sends, what must be awaited for it)."""
        found = [torch.empty_like(x) for x in tensors]
        moves = []
        for i, (ours, theirs) in enumerate(zip(tensors, found)):
            if ours.numel():
                for move, x, peer in (
                    (dist.isend, ours, self.peer(by)),
                    (dist.irecv, theirs, self.peer(-by)),
                ):
                    moves.append(dist.P2POp(move, _bytes(x), peer, self.group, tag + i))
        return found, dist.batch_isend_irecv(moves) if moves else []

    def around(self, tensors: Sequence[Tensor], steps: int) -> Iterator[Sequence[Tensor]]:
        """Those of each step; the next ones are on their way meanwhile."""
        if steps > 1:
            tensors = [x.detach().contiguous() for x in tensors]
        for _ in range(steps - 1):
            coming, works = self.send(tensors, 1)
            yield tensors
            _wait(works)
            tensors = coming
        yield tensors


def _wait(works: Any) -> None:
    for work in works:
        work.wait()


# ---- The operators' signatures


_library = torch.library.Library("dlattn", "FRAGMENT")
_COUNT = len(_Tensors._fields)
_INPUTS = ", ".join(f"Tensor{'?' if i > 2 else ''} {x}" for i, x in enumerate(_Tensors._fields))
_OPTIONS = (
    "float? scale, float softcap, int window_left, int window_right, bool causal, int alignment, "
    "SymInt query_length, SymInt key_length, str layout, int ulysses, bool gathers, int wanted, "
    "str group_name"
)
_library.define(f"context_agree({_INPUTS}, {_OPTIONS}) -> Tensor")
_library.define(
    f"context_forward(Tensor? agreed, {_INPUTS}, {_OPTIONS}) -> (Tensor output, Tensor lse)"
)
_library.define(
    f"context_backward(Tensor d_output, Tensor d_lse, Tensor output, Tensor lse, {_INPUTS}, "
    f"{_OPTIONS}) -> ({', '.join('Tensor' for _ in DIFFERENTIABLE)})"
)
_library.define(
    f"context_exchange(Tensor[] tensors, Tensor? agreed, bool back, {_OPTIONS}) -> Tensor[]"
)


# ---- Rows for heads and back: an operator of its own, so that autograd keeps what it gives


def _exchange(
    tensors: Sequence[Tensor], agreed: Tensor | None, back: bool, *inputs: Any
) -> list[Tensor]:
    """[B, H, L, D] -> [B, H / m, m L, D] in the order of the sequence, or ``back``, of m
    consecutive ranks."""
    options = _Options(*inputs)
    group = _resolve_process_group(options.group_name)
    return [(_to_rows if back else _to_heads)(x.detach(), options, group) for x in tensors]


def _to_heads(x: Tensor, options: _Options, group: dist.ProcessGroup) -> Tensor:
    m, rank = options.ulysses, group.rank()
    order = _order(x.shape[ROWS], m, options, group)
    parts = x.unflatten(1, (m, x.shape[1] // m)).movedim(1, 0).contiguous()
    return _joined(_all_to_all(parts, group, rank - rank % m), order, ROWS)


def _to_rows(x: Tensor, options: _Options, group: dist.ProcessGroup) -> Tensor:
    m, rank = options.ulysses, group.rank()
    parts = _parted(x, _order(x.shape[ROWS] // m, m, options, group), m)
    return _all_to_all(parts, group, rank - rank % m).movedim(0, 1).flatten(1, 2)


def _order(rows: int, m: int, options: _Options, group: dist.ProcessGroup) -> list[Piece]:
    first = group.rank() - group.rank() % m
    return in_order(shards(options.layout, [rows] * group.size())[first : first + m])


def _axis(x: Tensor) -> int:
    """That of the rows; segments are [B, L]."""
    return 1 if x.dim() == 2 else ROWS


def _joined(parts: Tensor, order: Sequence[Piece], axis: int) -> Tensor:
    """[m, ...], one of each rank, as one in the order of the sequence."""
    pieces = (parts[p.rank].narrow(axis, p.places.start, len(p.places)) for p in order)
    return torch.cat(list(pieces), axis)


def _parted(x: Tensor, order: Sequence[Piece], m: int) -> Tensor:
    """The inverse of _joined."""
    batch, heads, rows, dim = x.shape
    parts = x.new_empty((m, batch, heads, rows // m, dim))
    for piece, at in zip(order, places_of(tuple(p.rows for p in order))):
        part = parts[piece.rank].narrow(ROWS, piece.places.start, len(piece.places))
        part.copy_(x.narrow(ROWS, at.start, len(at)))
    return parts


def _exchange_fake(
    tensors: Sequence[Tensor], agreed: Tensor | None, back: bool, *inputs: Any
) -> list[Tensor]:
    m = _Options(*inputs).ulysses

    def shape(x: Tensor) -> list[Any]:
        batch, heads, rows, dim = x.shape
        return [batch, heads * m, rows // m, dim] if back else [batch, heads // m, rows * m, dim]

    return [x.new_empty(shape(x)) for x in tensors]


def _keep_exchange(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    tensors, _, ctx.back, *ctx.options = inputs
    # A bias comes behind query, key and value; what comes behind it has no gradient.
    has_bias = _Options(*ctx.options).wanted >> DIFFERENTIABLE.index("bias") & 1
    ctx.count = 3 + (has_bias and len(tensors) > 3 and tensors[3].is_floating_point())


def _exchange_gradient(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    found = torch.ops.dlattn.context_exchange(
        list(gradients[: ctx.count]), None, not ctx.back, *ctx.options
    )
    found = found + [None] * (len(gradients) - len(found))
    return found, None, None, *(None for _ in ctx.options)


def _exchanged(
    tensors: _Tensors, options: _Options, agreed: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(output, lse), heads being shared by so many ranks as the options say."""
    operators, m = torch.ops.dlattn, options.ulysses
    if m == 1:
        return operators.context_forward(agreed, *tensors, *options)
    key, value = tensors.key, tensors.value
    if key.shape[1] % m:  # then each rank has one head of them, as others do
        key, value = (x.repeat_interleave(m // key.shape[1], 1) for x in (key, value))
    heads = tensors.query.shape[1] // m
    moved, here = {"query": tensors.query, "key": key, "value": value}, {}
    first = group.rank() % m * heads
    for name, x in zip(_Tensors._fields[3:], tensors[3:]):
        if x is None:
            continue
        if name.endswith("segments"):
            moved[name] = x[:, None, :, None].expand(-1, m, -1, -1)  # of all rows for each rank
        elif name in ("bias", "mask") and x.shape[ROWS] == tensors.query.shape[ROWS]:
            moved[name] = x if x.shape[1] > 1 else x.expand(-1, m, -1, -1)
        else:
            axis = 1 if name in ("bias", "mask") else x.dim() - 1
            here[name] = x if x.shape[axis] == 1 else x.narrow(axis, first, heads)
    found = operators.context_exchange(list(moved.values()), agreed, False, *options)
    of_heads = dict(zip(moved, found)) | here
    for name in _SEGMENTS:
        if name in of_heads:
            of_heads[name] = of_heads[name][:, 0, :, 0]
    results = operators.context_forward(None, *_Tensors(**of_heads), *options)
    output, lse = results[0], results[1][..., None]
    output, lse = operators.context_exchange([output, lse], None, True, *options)
    return output, lse[..., 0]


# ---- Sums of what the calls of a rank give


class _Sums:
    """A result by rows: ``place`` says where a call writes, ``settle`` adds what it wrote."""

    def __init__(self, *totals: Tensor, dtype: torch.dtype) -> None:
        self.totals = totals
        self.dtype = dtype  # in which calls write the first of them
        self.cover = Cover(totals[0].shape[2])

    def place(self, part: range) -> list[Tensor]:
        self.missing = self.cover.take(part)
        self.parts = _rows(self.totals, part)
        self.is_first = self.missing == [part]
        if self.is_first and self.totals[0].dtype == self.dtype:
            self.terms = self.parts
        else:
            dtypes = (self.dtype, *(x.dtype for x in self.parts[1:]))
            self.terms = [torch.empty_like(x, dtype=dtype) for x, dtype in zip(self.parts, dtypes)]
        return self.terms

    def settle(self) -> None:
        if self.terms is self.parts:
            return
        if self.is_first:
            for part, term in zip(self.parts, self.terms):
                part.copy_(term)
            return
        for gap in self.missing:
            self.clear(gap)
        self.add(*self.parts, *self.terms)

    def finish(self) -> tuple[Tensor, ...]:
        for gap in self.cover.take(range(self.totals[0].shape[2])):
            self.clear(gap)
        return self.totals

    def clear(self, part: range) -> None:
        for x in _rows(self.totals, part):
            x.zero_()

    def add(self, part: Tensor, term: Tensor) -> None:
        part += term


class _Merged(_Sums):
    """Output and log-sum-exp of rows over the keys so far, and over the sink: of a row's first call
    or, if it has none that is the first, by itself."""

    def __init__(self, *totals: Tensor, dtype: torch.dtype, sinks: Tensor | None) -> None:
        super().__init__(*totals, dtype=dtype)
        self.sinks = sinks

    def clear(self, part: range) -> None:
        output, lse = _rows(self.totals, part)
        output.zero_()
        if self.sinks is None:
            lse.fill_(-torch.inf)
        else:
            lse.copy_(self.sinks[:, None])

    def add(self, output: Tensor, lse: Tensor, term: Tensor, of_term: Tensor) -> None:
        if _merges(output.device.type):
            merge([output, term], [lse, of_term], out=output, lse=lse, stream=_stream(output))
            return
        both = torch.logaddexp(lse, of_term)
        before, now = (_weight(x, both)[..., None] for x in (lse, of_term))
        output.mul_(before).addcmul_(term, now)
        lse.copy_(both)


def _weight(lse: Tensor, both: Tensor) -> Tensor:
    """How much of the whole a part is; nothing of an empty one."""
    return torch.where(lse == -torch.inf, 0, (lse - both).exp())


@functools.cache
def _merges(device: str) -> bool:
    return any(k.operation == "merge" and k.backend == device for k in kernels())


def _rows(tensors: Sequence[Tensor], part: range) -> list[Tensor]:
    return [x[:, :, part.start : part.stop] for x in tensors]


# ---- The operators


def _plan(o: _Options, rows: int, keys: int, t: _Tensors, group: dist.ProcessGroup) -> Plan:
    """For so many rows and keys of a rank."""
    seen = band(
        *(o.causal, o.window_left, o.window_right, o.alignment == 1),
        *(o.query_length, o.key_length, t.alibi_slopes is not None),
    )
    return plan(o.layout, group.size(), o.ulysses, o.gathers, rows, keys, seen)


class _Keys(NamedTuple):
    """Of one step, in their order on the rank that they come from."""

    key: Tensor
    value: Tensor
    segments: Tensor | None
    bias: Tensor | None  # the columns of these keys
    mask: Tensor | None


class _Job:
    """What forward and backward have in common: the rank's tensors, its plan, and its keys' way."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.options = o = _Options(*inputs[_COUNT:])
        self.tensors = t = _Tensors(*(x if x is None else x.detach() for x in inputs[:_COUNT]))
        self.group = _resolve_process_group(o.group_name)
        self.ring = _Ring(self.group, o.ulysses)
        rows, keys = (x.shape[ROWS] // o.ulysses for x in t[:2])  # of a rank
        self.plan = _plan(o, rows, keys, t, self.group)
        self.steps = [step[self.ring.position] for step in self.plan.steps]
        self.calls = [call for step in self.steps for call in step]

    def columns(self, step: int) -> Shard:
        return self.plan.keys_at(self.ring.position, step)

    def arrivals(self) -> Iterator[tuple[_Keys, tuple[Call, ...]]]:
        """The keys and the calls of each step."""
        t = self.tensors
        given = [x for x in (*t[1:3], t.key_segments) if x is not None]
        if self.options.gathers:
            given = _gathered(given, self.plan.of_keys, self.group)
        for step, here in enumerate(self.ring.around(given, len(self.steps))):
            key, value, segments = (*here, None)[:3]
            columns = (_columns(x, self.columns(step)) for x in (t.bias, t.mask))
            yield _Keys(key, value, segments, *columns), self.steps[step]

    def run(
        self,
        call: Call,
        query: Tensor,
        keys: _Keys,
        *results: Tensor,
        sinks: Tensor | None,
        **more: Any,
    ) -> None:
        """The plugin's call, of the rows that the call names."""
        o, t = self.options, self.tensors
        key, value = _rows(keys[:2], call.keys)
        if t.query_segments is not None:
            more["query_segments"] = t.query_segments[:, call.rows.start : call.rows.stop]
            more["key_segments"] = keys.segments[:, call.keys.start : call.keys.stop]
        sides = (-1 if side is None else side for side in (call.left, call.right))
        alignment, offset = call.placed
        if offset:
            more["diagonal_offset"] = offset
        options = Options(o.scale, o.softcap, *sides, False, alignment, 0, 0)
        pairs = (_part(x, call) for x in (keys.bias, keys.mask))
        tensors = Tensors(query, key, value, *pairs, t.alibi_slopes, sinks)
        _core.forward(*_arguments(tensors, options, *results, stream=_stream(query)), **more)


def _columns(x: Tensor | None, keys: Shard) -> Tensor | None:
    """Those of a bias or a mask that some keys have, in the keys' order."""
    if x is None or x.shape[3] == 1:
        return x
    parts = [x[..., part.start : part.stop] for part in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


def _part(x: Tensor | None, call: Call) -> Tensor | None:
    """A bias's or a mask's of one call."""
    if x is None:
        return None
    if x.shape[ROWS] > 1:
        x = x[:, :, call.rows.start : call.rows.stop]
    return x if x.shape[3] == 1 else x[..., call.keys.start : call.keys.stop]


def _forward(agreed: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
    job = _Job(inputs)
    query, sinks = job.tensors.query, job.tensors.sinks
    output, lse = _forward_fake(agreed, *inputs)
    if depth(call.rows for call in job.calls) > 2:  # each merge would round
        output = torch.empty_like(output, dtype=lse.dtype)
    merged = _Merged(output, lse, dtype=query.dtype, sinks=sinks)
    for keys, calls in job.arrivals():
        for call in calls:
            results = merged.place(call.rows)
            of_call = sinks if merged.is_first else None
            job.run(call, *_rows([query], call.rows), keys, *results, sinks=of_call)
            merged.settle()
    output, lse = merged.finish()
    return output.to(query.dtype), lse


def _forward_fake(agreed: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
    query, value = inputs[0], inputs[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    return _output(query, value), _lse(query, False, wide)


def _backward(
    d_output: Tensor, d_lse: Tensor, output: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    job = _Job(inputs)
    query, key, value = job.tensors[:3]
    upstream = [x.detach().contiguous() for x in (output, lse, d_output, d_lse)]
    is_shared = depth(call.rows for call in job.calls) > 1
    takes_lse = _takes_lse_of_all(query, lse, job.options.scale) if is_shared else True
    d_query = _Sums(_wide_like(query) if is_shared else torch.empty_like(query), dtype=query.dtype)
    d_query.dtype = d_query.totals[0].dtype
    of_options = _OptionSums(job)
    travelling, works, of_parts = None, [], None
    for step, (keys, calls) in enumerate(job.arrivals()):
        if of_parts is None:  # asks the device, so not before the first keys are on their way
            of_parts = not takes_lse
        found = [_sum_for(job, x) for x in keys[:2]]
        of_options.begin(step)
        for call in calls:
            targets = [d_query.place(call.rows), *(x.place(call.keys) for x in found)]
            targets = dict(zip(_GRADIENTS, (x[0] for x in targets))) | of_options.place(call)
            _call_backward(job, call, keys, upstream, is_shared, of_parts, targets)
            for sums in (d_query, *found, of_options):
                sums.settle()
        of_options.end()
        totals = [sums.finish()[0] for sums in found]
        if step:
            _wait(works)
            totals = [
                before.add_(total) if calls else before for before, total in zip(travelling, totals)
            ]
        is_last = step + 1 == len(job.steps)
        if len(job.steps) > 1:  # on with the keys, and from their last stop home
            travelling, works = job.ring.send(totals, -step if is_last else 1, tag=8)
        else:
            travelling = totals
    _wait(works)
    if job.options.gathers:
        travelling = _summed(travelling, job.plan.of_keys, job.group)
    d_main = zip((d_query.finish()[0], *travelling), (query, key, value))
    return *(_as(g, x) for g, x in d_main), *of_options.finish(upstream)


_GRADIENTS = [f"d_{name}" for name in DIFFERENTIABLE]


class _OptionSums:
    """The gradients of bias, slopes and sinks, empty if not wanted. Calls add to the first two."""

    def __init__(self, job: _Job) -> None:
        self.job, t, names = job, job.tensors, _names(job.options.wanted)
        self.bias, self.slopes = (
            torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
            if name in names
            else None
            for name, x, dtype in (
                ("bias", t.bias, _bias_dtype(t.bias)),
                ("alibi_slopes", t.alibi_slopes, torch.float32),
            )
        )

    def begin(self, step: int) -> None:
        self.keys = self.job.columns(step)
        self.columns = _columns(self.bias, self.keys)

    def place(self, call: Call) -> dict[str, Tensor]:
        """Where a call writes; calls share no pair of a row and a key, but they may share what
        stands for many pairs."""
        self.sums: list[tuple[Tensor, Tensor]] = []
        found = {}
        if self.columns is not None:
            part = found["d_bias"] = _part(self.columns, call)
            if _is_of_many(self.bias):
                found["d_bias"] = torch.empty_like(part, memory_format=torch.contiguous_format)
                self.sums.append((part, found["d_bias"]))
        if self.slopes is not None:
            found["d_alibi_slopes"] = torch.empty_like(self.slopes)
            self.sums.append((self.slopes, found["d_alibi_slopes"]))
        return found

    def settle(self) -> None:
        for total, term in self.sums:
            total += term

    def end(self) -> None:
        if self.columns is None or self.columns.shape[3] == 1 or len(self.keys) == 1:
            return  # written in place
        for keys, places in zip(self.keys, places_of(self.keys)):
            part = self.columns[..., places.start : places.stop]
            self.bias[..., keys.start : keys.stop] = part

    def finish(self, upstream: Sequence[Tensor]) -> list[Tensor]:
        t = self.job.tensors
        bias = self.bias if self.bias is None else self.bias.to(t.bias.dtype)
        found = bias, self.slopes, _sink_gradient(self.job, *upstream)
        return [t.query.new_empty(0) if g is None else g for g in found]


def _is_of_many(bias: Tensor) -> bool:
    """Whether an element stands for many rows or keys."""
    return 1 in bias.shape[2:]


def _bias_dtype(bias: Tensor | None) -> torch.dtype | None:
    """Of sums."""
    if bias is None or not _is_of_many(bias):
        return None
    return torch.promote_types(bias.dtype, torch.float32)


def _sink_gradient(
    job: _Job, output: Tensor, lse: Tensor, d_output: Tensor, d_lse: Tensor
) -> Tensor | None:
    """A sink is a part of the row's keys that has output 0."""
    if "sinks" not in _names(job.options.wanted):
        return None
    sinks = job.tensors.sinks
    weight = _weight(sinks[:, None], lse)
    of_output = (d_output.to(lse.dtype) * output).sum(-1)
    # Whatever comes to a row that sees no key reaches nothing.
    of_output = torch.where((output != 0).any(-1), of_output, 0)
    found = torch.where(weight == 0, 0, weight * (d_lse - of_output))
    return found.sum((0, 2)).to(sinks.dtype)


def _as(gradient: Tensor, x: Tensor) -> Tensor:
    """In the layout that the operator's fake promises, too."""
    found = torch.empty_like(x)
    same = gradient.dtype == found.dtype and gradient.stride() == found.stride()
    return gradient if same else found.copy_(gradient)


def _wide_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _sum_for(job: _Job, like: Tensor) -> _Sums:
    """In float32 what is added up, on this rank or on others."""
    is_alone = job.group.size() == job.options.ulysses and depth(c.keys for c in job.calls) < 2
    total = torch.empty_like(like) if is_alone else _wide_like(like)
    return _Sums(total, dtype=total.dtype)


def _takes_lse_of_all(query: Tensor, lse: Tensor, scale: float | None) -> Tensor | bool:
    """Whether the kernel makes weights from the log-sum-exp that it is given, and not from the
    logits that it sees: on tensor cores, but for rows whose log-sum-exp is far from 0."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    limit = far_lse(query.shape[3] ** -0.5 if scale is None else scale)
    return ~((lse.abs() >= limit) & lse.isfinite()).any()


def _call_backward(
    job: _Job,
    call: Call,
    keys: _Keys,
    upstream: Sequence[Tensor],
    is_shared: bool,
    of_parts: bool,
    targets: dict[str, Tensor],
) -> None:
    """The gradients by one call's rows and keys.

    With the log-sum-exp of all keys the weights of a part of them are those of the whole. Else the
    results of the part by itself are differentiated, and how they were merged:
    output = sum exp(lse_n - lse) output_n.
    """
    query = _rows([job.tensors.query], call.rows)[0]
    output, lse, d_output, d_lse = _rows(upstream, call.rows)
    if of_parts:
        of_call = torch.empty_like(output), torch.empty_like(lse)
        job.run(call, query, keys, *of_call, sinks=None)
        weight = _weight(of_call[1], lse)
        wide = d_output.to(lse.dtype)
        d_lse = weight * (d_lse + (wide * (of_call[0].to(lse.dtype) - output)).sum(-1))
        d_output = wide * weight[..., None]
        output, lse = of_call
    sinks = None if is_shared else job.tensors.sinks  # else it is in the log-sum-exp of all
    more = {"d_output": d_output, "d_lse": d_lse, **targets}
    job.run(call, query, keys, output, lse, sinks=sinks, **more)


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, options = _Tensors(*inputs[4 : 4 + _COUNT]), _Options(*inputs[4 + _COUNT :])
    wanted = {*DIFFERENTIABLE[:3], *_names(options.wanted)}
    return tuple(
        torch.empty_like(getattr(tensors, name)) if name in wanted else inputs[0].new_empty(0)
        for name in DIFFERENTIABLE
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *inputs = inputs
    ctx.save_for_backward(*inputs[:_COUNT], *output)
    ctx.options = inputs[_COUNT:]


def _gradient(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    *tensors, output, lse = ctx.saved_tensors
    given = (d_output, d_lse, output, lse, *tensors, *ctx.options)
    found = dict(zip(DIFFERENTIABLE, torch.ops.dlattn.context_backward(*given)))
    wanted = {*DIFFERENTIABLE[:3], *_names(_Options(*ctx.options).wanted)}
    of_tensors = (found[name] if name in wanted else None for name in _Tensors._fields)
    return None, *of_tensors, *(None for _ in ctx.options)


for _name, _function, _fake in (
    ("context_agree", _agreement, _agreement_fake),
    ("context_exchange", _exchange, _exchange_fake),
    ("context_forward", _forward, _forward_fake),
    ("context_backward", _backward, _backward_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _function, _device)
    torch.library.register_fake(f"dlattn::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "dlattn::context_exchange", _exchange_gradient, setup_context=_keep_exchange, lib=_library
)
torch.library.register_autograd(
    "dlattn::context_forward", _gradient, setup_context=_keep, lib=_library
)
