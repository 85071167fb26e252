"""Arrays as the plugin's slots take them: views where that will do, small copies where not."""

from __future__ import annotations

import sys
from typing import Any, Callable, NamedTuple

from ._errors import InvalidArgument

BFLOAT = 4  # DLPack's kDLBfloat
INT32 = range(-(2**31), 2**31)


def slots(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    bias: Any,
    mask: Any,
    alibi_slopes: Any,
    sinks: Any,
    query_lengths: Any,
    key_lengths: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    block_table: Any,
) -> tuple[Any, ...]:
    """What ``_core`` reads for these, in the plugin's order."""
    return (
        _readable("query", query),
        _readable("key", key),
        _readable("value", value),
        _writable("output", out),
        lse if lse is None else _writable("lse", lse),
        bias if bias is None else _of_four_axes("bias", bias),
        mask if mask is None else _of_four_axes("mask", mask),
        alibi_slopes if alibi_slopes is None else _of_float32("alibi_slopes", alibi_slopes),
        sinks if sinks is None else _of_float32("sinks", sinks),
        query_lengths if query_lengths is None else _of_int32("query_lengths", query_lengths),
        key_lengths if key_lengths is None else _of_int32("key_lengths", key_lengths),
        cu_seqlens_q if cu_seqlens_q is None else _of_int32("cu_seqlens_q", cu_seqlens_q),
        cu_seqlens_k if cu_seqlens_k is None else _of_int32("cu_seqlens_k", cu_seqlens_k),
        block_table if block_table is None else _of_int32("block_table", block_table),
    )


def output_shape(query: Any, value: Any) -> tuple[int, ...]:
    """The query's, with the value's head_dim."""
    try:
        return (*query.shape[:-1], value.shape[-1])
    except (AttributeError, IndexError, TypeError):
        name, x = ("value", value) if hasattr(query, "shape") else ("query", query)
        what = f"has shape {x.shape}" if hasattr(x, "shape") else f"is of {type(x)}"
        raise InvalidArgument(f"{name}: {what}, must be an array with 3 or 4 axes") from None


# ---- One argument


def _readable(name: str, x: Any) -> Any:
    return (_KINDS.get(type(x)) or _kind(name, x)).view(x)


def _writable(name: str, x: Any) -> Any:
    kind = _KINDS.get(type(x)) or _kind(name, x)
    if not kind.writable:
        raise InvalidArgument(f"{name}: is of {type(x)}, arrays of JAX cannot be written to")
    return kind.view(x)


def _of_four_axes(name: str, x: Any) -> Any:
    """Axes of extent 1 in front, as NumPy broadcasts."""
    view = _readable(name, x)
    missing = 4 - getattr(x, "ndim", 4)
    return view if missing <= 0 else _readable(name, x[(None,) * missing + (...,)])


def _of_float32(name: str, x: Any) -> Any:
    view = _readable(name, x)
    kind = _KINDS[type(x)]
    return kind.cast(x, "float32") if kind.is_float(x) else view


def _of_int32(name: str, x: Any) -> Any:
    view = _readable(name, x)
    kind = _KINDS[type(x)]
    if not kind.is_integer(x):
        return view
    for bound in kind.bounds(x):
        if bound not in INT32:
            raise InvalidArgument(f"{name}: holds {bound}, which does not fit into int32")
    return kind.cast(x, "int32")


# ---- What can be asked of arrays of one type


class _Kind(NamedTuple):
    view: Callable[[Any], Any] = lambda x: x
    is_float: Callable[[Any], bool] = lambda x: False  # but not float32
    is_integer: Callable[[Any], bool] = lambda x: False  # but not int32
    bounds: Callable[[Any], tuple[int, ...]] = lambda x: ()
    cast: Callable[[Any, str], Any] = lambda x, dtype: x
    writable: bool = True


def _is_bfloat16(x: Any) -> bool:
    """ml_dtypes' type; NumPy knows no more of it than its size and its name."""
    return x.dtype.kind == "V" and x.dtype.name == "bfloat16"


_NUMPY = _Kind(
    view=lambda x: (x.view("uint16"), BFLOAT) if _is_bfloat16(x) else x,
    is_float=lambda x: x.dtype != "float32" and (x.dtype.kind == "f" or _is_bfloat16(x)),
    is_integer=lambda x: x.dtype != "int32" and x.dtype.kind in "iu",
    bounds=lambda x: (int(x.min()), int(x.max())) if x.size else (),
    cast=lambda x, dtype: x.astype(dtype),
)


def _standard(writable: bool) -> _Kind:
    """By the Python array API standard (CuPy and others); asking for bounds waits for a GPU."""

    def is_other(x: Any, dtype: str, kind: str) -> bool:
        xp = x.__array_namespace__()
        return x.dtype != getattr(xp, dtype) and xp.isdtype(x.dtype, kind)

    def bounds(x: Any) -> tuple[int, ...]:
        xp = x.__array_namespace__()
        return (int(xp.min(x)), int(xp.max(x))) if 0 not in x.shape else ()

    def cast(x: Any, dtype: str) -> Any:
        xp = x.__array_namespace__()
        return xp.astype(x, getattr(xp, dtype))

    return _Kind(
        is_float=lambda x: is_other(x, "float32", "real floating"),
        is_integer=lambda x: is_other(x, "int32", "integral"),
        bounds=bounds,
        cast=cast,
        writable=writable,
    )


_KINDS: dict[type, _Kind] = {}


def family(kind: type) -> str:
    """The framework that defines a type or what it inherits from: "numpy", "torch", "jax" or ""."""
    numpy = sys.modules.get("numpy")
    if numpy and issubclass(kind, numpy.ndarray):
        return "numpy"
    modules = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return "torch" if "torch" in modules else "jax" if modules & {"jax", "jaxlib"} else ""


def _kind(name: str, x: Any) -> _Kind:
    kind, of = type(x), family(type(x))
    if of == "numpy":
        import numpy

        if kind not in (numpy.ndarray, numpy.memmap):
            raise InvalidArgument(
                f"{name}: is of {kind}; a subclass of numpy.ndarray may mean more than its memory "
                "says (a mask, a unit), so only ndarray and memmap are taken"
            )
        made = _NUMPY
    elif of != "torch" and hasattr(kind, "__array_namespace__"):
        made = _standard(writable=of != "jax")
    else:
        made = _Kind(writable=of != "jax")
    return _KINDS.setdefault(kind, made)
