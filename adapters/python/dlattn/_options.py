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
