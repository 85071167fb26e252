"""Attention over a sequence that is spread over ranks: who holds which rows, and which calls of the
plugin each rank makes. Of PyTorch and JAX alike; nothing here computes or communicates.

Rows and keys are numbered through the whole sequence. What masks leave of them is a band: row i
sees key j where ``first <= j - i <= last``. Cut down to a part of the rows and a part of the keys
it is a window of the plugin, of sides 0 or more, so no call needs to know where its part lies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from . import InvalidArgument, Unsupported, kernels
from ._options import ALIGNMENTS

Layout = Literal["contiguous", "zigzag"]
Way = Literal["auto", "all_gather", "ring", "ulysses", "ring_ulysses"]
LAYOUTS = ("contiguous", "zigzag")
WAYS = ("auto", "all_gather", "ring", "ulysses", "ring_ulysses")

DIAGONAL_OFFSET = 0x80000  # of dlattn.h, among the features of a kernel

Shard = tuple[range, ...]  # the rows of the whole sequence that a rank holds, in its order


class Band(NamedTuple):
    """Which keys j a row i sees: by j - i, and by where rows and keys end."""

    first: float
    last: float
    rows: float = math.inf
    keys: float = math.inf
    diagonal: int | None = None  # the j - i from which ALiBi counts distances; None without it

    def moved(self, by: int) -> Band:
        """For rows and keys that are counted from elsewhere, and all there."""
        diagonal = None if self.diagonal is None else self.diagonal + by
        return Band(self.first + by, self.last + by, diagonal=diagonal)


class Call(NamedTuple):
    """One call of the plugin: rows and keys by their places on the rank, and its window."""

    rows: range
    keys: range
    left: int | None = None
    right: int | None = None
    diagonal: int = 0  # the j - i from which the window counts, and ALiBi

    @property
    def placed(self) -> tuple[int, int]:
        """The plugin's (alignment, diagonal_offset). The latter, which few kernels take, is 0 where
        the diagonal begins at the first key or ends at the last."""
        if self.diagonal and self.diagonal == len(self.keys) - len(self.rows):
            return ALIGNMENTS["bottom_right"], 0
        return ALIGNMENTS["top_left"], self.diagonal


# ---- Who holds what


def shards(layout: str, lengths: Sequence[int]) -> list[Shard]:
    """The shard of each rank, given how many rows each has.

    contiguous: one range each, in the order of the ranks. zigzag: the sequence in 2 n ranges of
    one length, of which rank r has number r and number 2 n - 1 - r, so that under a causal mask
    all ranks have the same work.
    """
    ends = [0]
    if layout == "contiguous":
        for length in lengths:
            ends.append(ends[-1] + length)
        return [(range(*pair),) for pair in zip(ends, ends[1:])]
    if len(set(lengths)) > 1 or lengths[0] % 2:
        raise InvalidArgument(
            f"layout: zigzag needs shards of one even length, they have {list(lengths)} rows"
        )
    half, count = lengths[0] // 2, 2 * len(lengths)
    halves = [range(half * i, half * (i + 1)) for i in range(count)]
    return [(halves[r], halves[count - 1 - r]) for r in range(len(lengths))]


def joined(ranges: Iterable[range]) -> Shard:
    """Neighbours that follow each other as one range."""
    found: list[range] = []
    for part in ranges:
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return tuple(found)


class Piece(NamedTuple):
    """A range of the whole sequence, and where it lies."""

    rows: range
    rank: int
    places: range


def in_order(parts: Sequence[Shard]) -> list[Piece]:
    """The pieces of several shards in the order of the sequence."""
    pieces = [
        Piece(rows, rank, places)
        for rank, shard in enumerate(parts)
        for rows, places in zip(shard, places_of(shard))
    ]
    return sorted(pieces, key=lambda piece: (piece.rows.start, piece.rows.stop))


def union(parts: Sequence[Shard]) -> Shard:
    """What a rank holds that holds these shards in the order of the sequence."""
    return joined(piece.rows for piece in in_order(parts))


def places_of(shard: Shard) -> list[range]:
    """Where on the rank each of its ranges lies."""
    found, at = [], 0
    for part in shard:
        found.append(range(at, at + len(part)))
        at += len(part)
    return found


# ---- Which calls


def band(
    causal: bool,
    left: int,
    right: int,
    bottom_right: bool,
    rows: int,
    keys: int,
    has_alibi: bool = False,
) -> Band:
    """Of causal and a window, whose sides are -1 where nothing bounds them, over a sequence of so
    many rows and keys."""
    last = math.inf if right < 0 else right
    if causal:
        last = min(last, 0)
    diagonal = 0 if has_alibi else None
    seen = Band(-math.inf if left < 0 else -left, last, diagonal=diagonal)
    return seen.moved(keys - rows if bottom_right else 0)._replace(rows=rows, keys=keys)


def cut(rows: range, keys: range, seen: Band) -> Call | None:
    """The rows that see some of the keys, and the keys that they see; None if there are none."""
    rows_stop, keys_stop = min(rows.stop, seen.rows), min(keys.stop, seen.keys)
    first_row = max(rows.start, keys.start - seen.last)
    end_row = min(rows_stop, keys_stop - seen.first)
    first_key = max(keys.start, first_row + seen.first)
    end_key = min(keys_stop, end_row + seen.last)
    if first_row >= end_row or first_key >= end_key:
        return None
    rows, keys = range(int(first_row), int(end_row)), range(int(first_key), int(end_key))
    here = seen.moved(rows.start - keys.start)
    diagonal = here.diagonal or 0
    return Call(
        rows,
        keys,
        int(diagonal - here.first) if -here.first < len(rows) - 1 else None,
        int(here.last - diagonal) if here.last < len(keys) - 1 else None,
        diagonal,
    )


def calls(rows: Shard, keys: Shard, seen: Band) -> tuple[Call, ...]:
    """What a rank that holds these rows computes once it has these keys: one call if one window
    over all of them shows each row what it sees, as far as it is with ALiBi, else one for each pair
    of ranges, those of most keys first: what comes later is added up."""
    pairs, exact = [], []
    for of_rows, row_places in zip(rows, places_of(rows)):
        for of_keys, key_places in zip(keys, places_of(keys)):
            to_rows, to_keys = row_places.start - of_rows.start, key_places.start - of_keys.start
            found = cut(of_rows, of_keys, seen)
            if found is not None:
                found = found._replace(
                    rows=_moved(found.rows, to_rows), keys=_moved(found.keys, to_keys)
                )
            pairs.append((row_places, key_places, seen.moved(to_keys - to_rows)))
            exact.append(found)
    busy = [call for call in exact if call is not None]
    if not busy:
        return ()
    box_rows, box_keys = (
        range(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in ([call.rows for call in busy], [call.keys for call in busy])
    )
    for candidate in dict.fromkeys((Band(-math.inf, math.inf), *(p[2] for p in pairs))):
        inside = ((_within(r, box_rows), _within(k, box_keys)) for r, k, _ in pairs)
        if all(cut(r, k, candidate) == call for (r, k), call in zip(inside, exact)):
            return (cut(box_rows, box_keys, candidate),)
    return tuple(sorted(busy, key=lambda call: -len(call.keys)))


def _moved(x: range, by: int) -> range:
    return range(x.start + by, x.stop + by)


def _within(x: range, box: range) -> range:
    return range(max(x.start, box.start), min(x.stop, box.stop))


class Plan(NamedTuple):
    """Of all ranks. Those that share heads are one position of the ring, which has their rows."""

    ranks: int
    degree: int  # ranks of a position
    gathers: bool  # keys come at once, in the order of the sequence
    of_rows: tuple[Shard, ...]  # by rank
    of_keys: tuple[Shard, ...]
    by_keys: tuple[Shard, ...]  # by position
    steps: tuple[tuple[tuple[Call, ...], ...], ...]  # by step and position

    def keys_at(self, position: int, step: int) -> Shard:
        """The keys that a position then has, which are its columns of a bias or a mask."""
        return union(self.of_keys) if self.gathers else self.by_keys[position - step]

    def check_placed(self, backend: str, dtype: str) -> None:
        """Refuses calls whose diagonal no kernel of the backend can have where it is."""
        if _takes_offsets(backend, dtype):
            return
        if any(call.placed[1] for step in self.steps for calls in step for call in calls):
            raise Unsupported(
                f"alibi_slopes: no kernel of {backend} counts distances between rows and keys of "
                f"{dtype} from elsewhere (diagonal_offset), as parts of the keys need it; "
                "way='ulysses' needs none, and neither does 'all_gather' under a causal mask"
            )


@functools.cache
def _takes_offsets(backend: str, dtype: str) -> bool:
    listed = {"bfloat16": "bf16"}.get(dtype, dtype.replace("float", "f"))
    return any(
        k.operation == "forward"
        and k.backend == backend
        and k.features & DIAGONAL_OFFSET
        and listed in k.dtypes.split()
        for k in kernels()
    )


@functools.cache
def plan(
    layout: str, ranks: int, degree: int, gathers: bool, rows: int, keys: int, seen: Band
) -> Plan:
    """For ranks that have so many rows and keys each. At step s of a ring position p has the keys
    of p - s; it has as many steps as some position needs."""
    of_rows, of_keys = (shards(layout, [count] * ranks) for count in (rows, keys))
    positions = range(ranks // degree)
    by_rows, by_keys = (
        [union(of[p * degree : (p + 1) * degree]) for p in positions] for of in (of_rows, of_keys)
    )
    if gathers:
        whole = union(of_keys)
        steps = [tuple(calls(by_rows[p], whole, seen) for p in positions)]
    else:
        steps = [
            tuple(calls(by_rows[p], by_keys[p - s], seen) for p in positions) for s in positions
        ]
    while len(steps) > 1 and not any(steps[-1]):
        steps.pop()
    return Plan(
        *(ranks, degree, gathers, tuple(of_rows), tuple(of_keys), tuple(by_keys), tuple(steps))
    )


def depth(parts: Iterable[range]) -> int:
    """How many of them some place is in."""
    parts = [part for part in parts if part]
    return max((sum(part.start in other for other in parts) for part in parts), default=0)


def far_lse(scale: float) -> float:
    """From where on kernels of a GPU trust no log-sum-exp: in f32 its last bits are worth too much
    there, or what it is in units of q k is beyond what f16 holds."""
    return min(700.0, 59000.0 * abs(scale))


class Cover:
    """Which places of a result hold something."""

    def __init__(self, length: int) -> None:
        self.missing = [range(length)]

    def take(self, part: range) -> list[range]:
        """Those of ``part`` that held nothing; they do from now on."""
        inside = [_within(gap, part) for gap in self.missing]
        outside = (
            rest
            for gap in self.missing
            for rest in (
                range(gap.start, min(gap.stop, part.start)),
                range(max(gap.start, part.stop), gap.stop),
            )
        )
        self.missing = [rest for rest in outside if rest]
        return [gap for gap in inside if gap]


# ---- What is given

Axes = tuple[tuple[int, bool], ...]  # extents, and whether 1 stands for them


def length_of(name: str, given: int | None, most: int) -> int:
    """Of the sequence without its padding; all of it unless given."""
    if given is None:
        return most
    if not 0 <= given <= most:
        raise InvalidArgument(f"{name}: is {given}, must be from 0 to {most}")
    return given


def check_shapes(
    shapes: Mapping[str, Sequence[int]],
    batch: int,
    heads: int,
    rows: int,
    keys: int,
    ranks: int,
) -> None:
    """Of the options that are tensors, on a rank that has so many rows and keys."""
    pairs = ((batch, True), (heads, True), (rows, True), (keys * ranks, True))
    of_heads = ((heads, False),)
    known: dict[str, tuple[Axes, ...]] = {
        "bias": (pairs,),
        "mask": (pairs,),
        "alibi_slopes": (of_heads, ((batch, False), *of_heads)),
        "sinks": (of_heads,),
        "query_segments": (((batch, False), (rows, False)),),
        "key_segments": (((batch, False), (keys, False)),),
    }
    for name, shape in shapes.items():
        if any(_fits(shape, axes) for axes in known[name]):
            continue
        wanted = " or ".join(
            f"[{', '.join(f'{n}|1' if or_one else f'{n}' for n, or_one in axes)}]"
            for axes in known[name]
        )
        why = ": the rank's rows and all keys" if name in ("bias", "mask") else ""
        raise InvalidArgument(f"{name}: shape is {list(shape)}, must be {wanted}{why}")


def _fits(shape: Sequence[int], axes: Axes) -> bool:
    if len(shape) != len(axes):
        return False
    return all(n == full or (or_one and n == 1) for n, (full, or_one) in zip(shape, axes))


# ---- Which way


class Sizes(NamedTuple):
    """What the choice goes by: of one rank, heads before any exchange."""

    ranks: int
    ranks_of_host: int
    heads: int
    heads_kv: int
    row_bytes: int  # of one row of query and output, one head
    key_bytes: int  # of one key and its value, one head
    rows: int
    keys: int
    free_bytes: float = math.inf
    has_alibi: bool = False


class Chosen(NamedTuple):
    """How many consecutive ranks share heads, and whether keys go around a ring or come at once."""

    ulysses: int
    gathers: bool


def choose(way: str, ulysses_degree: int | None, sizes: Sizes) -> Chosen:
    """By name, or for "auto" by the rule of docs/many-gpus.md."""
    n = sizes.ranks
    if way not in WAYS:
        raise InvalidArgument(f"way: is {way!r}, must be one of {', '.join(map(repr, WAYS))}")
    if ulysses_degree is not None and way != "ring_ulysses":
        raise InvalidArgument(f"ulysses_degree: is {ulysses_degree}, needs way='ring_ulysses'")
    if way == "auto":
        return _best(sizes)
    degree = {"ulysses": n, "ring_ulysses": ulysses_degree or _inner_degree(sizes)}.get(way, 1)
    if degree < 1 or n % degree:
        raise InvalidArgument(f"ulysses_degree: is {degree}, must divide the {n} ranks")
    if not can_share_heads(sizes, degree):
        raise InvalidArgument(
            f"way: {way!r} shares {sizes.heads} query and {sizes.heads_kv} key heads between "
            f"{degree} ranks, which must divide both, or be a multiple of the latter"
        )
    return Chosen(degree, way == "all_gather")


def can_share_heads(sizes: Sizes, degree: int) -> bool:
    heads, heads_kv = sizes.heads, sizes.heads_kv
    if degree == 1:
        return True
    if heads == 0 or heads_kv == 0 or heads % degree:
        return False
    return heads_kv % degree == 0 or degree % heads_kv == 0


def _inner_degree(sizes: Sizes) -> int:
    """The most ranks of one host that can share heads."""
    most = min(sizes.ranks_of_host, sizes.ranks)
    degrees = (d for d in range(most, 0, -1) if sizes.ranks % d == 0)
    return next(d for d in degrees if can_share_heads(sizes, d))


def _best(sizes: Sizes) -> Chosen:
    """Within a host what moves fewer bytes; beyond it a ring, whose steps hide them. With ALiBi
    what every kernel can do."""
    if sizes.has_alibi:
        shared = can_share_heads(sizes, sizes.ranks)
        return Chosen(sizes.ranks, False) if shared else Chosen(1, True)
    if sizes.ranks > sizes.ranks_of_host:
        return Chosen(_inner_degree(sizes), False)
    gathered = (sizes.ranks - 1) * sizes.keys * sizes.heads_kv * sizes.key_bytes
    if can_share_heads(sizes, sizes.ranks):
        exchanged = sizes.rows * sizes.heads * sizes.row_bytes
        exchanged += sizes.keys * max(sizes.heads_kv, sizes.ranks) * sizes.key_bytes
        if exchanged * (sizes.ranks - 1) < gathered * sizes.ranks:
            return Chosen(sizes.ranks, False)
    # Beside the keys there are copies in order, and backward their gradients in float32.
    return Chosen(1, 8 * gathered < sizes.free_bytes)


def check_layout(layout: Any) -> None:
    if layout not in LAYOUTS:
        raise InvalidArgument(f"layout: is {layout!r}, must be 'contiguous' or 'zigzag'")
