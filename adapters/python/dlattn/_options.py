"""Options that every entry of the package reads alike."""

from __future__ import annotations

import operator
from typing import Any, Literal, Optional

from ._errors import InvalidArgument

Alignment = Literal["top_left", "bottom_right"]
Window = tuple[Optional[int], Optional[int]]

ALIGNMENTS = {"top_left": 0, "bottom_right": 1}
UNBOUNDED = -1


def alignment_code(alignment: Any) -> int:
    """The plugin's number for ``alignment``."""
    code = ALIGNMENTS.get(alignment) if isinstance(alignment, str) else None
    if code is None:
        names = " or ".join(repr(name) for name in ALIGNMENTS)
        raise InvalidArgument(f"alignment: is {alignment!r}, must be {names}")
    return code


def window_sides(window: Any) -> tuple[int, int]:
    """(left, right) of ``window``, -1 for a side without bound; ``None`` bounds neither."""
    if window is None:
        return UNBOUNDED, UNBOUNDED
    try:
        left, right = (UNBOUNDED if side is None else operator.index(side) for side in window)
    except (TypeError, ValueError):
        raise InvalidArgument(
            f"window: is {window!r}, must be (left, right), each an int or None"
        ) from None
    return left, right


def block_sides(block_size: Any) -> tuple[int, int]:
    """(rows, keys) of a block of ``block_mask``."""
    try:
        rows, keys = (operator.index(side) for side in block_size)
    except (TypeError, ValueError):
        raise InvalidArgument(
            f"block_size: is {block_size!r}, must be (rows, keys), each an int"
        ) from None
    return rows, keys


def visible_keys(
    options: Any, tensors: Any, row: Any, key: Any, rows: int, keys: int, diagonal: int = 0
) -> Any:
    """(how far each ``key`` is from each ``row``, if lengths, causal and window let it be seen).

    Both of the axes ``[B|1, 1, rows, keys]``, against which the indices ``row`` and ``key``
    broadcast; of PyTorch's tensors and JAX's arrays alike. ``rows`` and ``keys``: how many there
    are without lengths; ``diagonal`` is added to the offset of the alignment.
    """
    row_end, key_end = (
        extent if lengths is None else lengths[:, None, None, None]
        for lengths, extent in ((tensors.query_lengths, rows), (tensors.key_lengths, keys))
    )
    distance = key - row - (key_end - row_end if options.alignment else 0) - diagonal
    visible = (key < key_end) & (row < row_end)
    if options.causal:
        visible = visible & (distance <= 0)
    if options.window_left >= 0:
        visible = visible & (distance >= -options.window_left)
    if options.window_right >= 0:
        visible = visible & (distance <= options.window_right)
    return distance, visible
