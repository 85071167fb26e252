"""Which gradients the plugin itself computes; a framework's operators compute the others."""

from __future__ import annotations

from typing import Any

from . import Sku, Unsupported, _core


def serves(*args: Any, **more: Any) -> bool:
    """Whether the plugin has a row of its own for this call of ``_core``, which may be of specs.

    A reference row would do, too, but in plain loops: a framework's operators are faster.
    """
    try:
        return not Sku(*_core.query(*args, **more)).reference
    except Unsupported:
        return False
