"""Arrays as the plugin's slots take them: views where that will do, small copies where not."""

from __future__ import annotations

import sys
from typing import Any, Callable, NamedTuple

from ._errors import InvalidArgument

# DLPack's codes of what NumPy has only by ml_dtypes, and an own type of the same size for each.
CODES = {"bfloat16": (4, "uint16"), "float8_e4m3fn": (10, "uint8"), "float8_e5m2": (12, "uint8")}
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


def more_slots(
    *,
    query_segments: Any = None,
    key_segments: Any = None,
    block_mask: Any = None,
    query_scale: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
) -> dict[str, Any]:
    """What ``_core`` reads for these, by name; those that are absent are left out."""
    given = {
        "query_segments": (_of_int32, query_segments),
        "key_segments": (_of_int32, key_segments),
        "block_mask": (_of_four_axes, block_mask),
        "query_scale": (_of_float32, query_scale),
        "key_scale": (_of_float32, key_scale),
        "value_scale": (_of_float32, value_scale),
    }
    return {name: read(name, x) for name, (read, x) in given.items() if x is not None}


def gradient_slots(inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """``d_output`` and ``d_lse``, and the gradients to be written."""
    read = {name: _readable(name, x) for name, x in inputs.items() if x is not None}
    return read | {name: _writable(name, x) for name, x in outputs.items()}


def part_slots(outputs: Any, lses: Any, out: Any, lse: Any) -> tuple[Any, ...]:
    """The partial results of a merge, and where it goes."""
    try:
        lists = [tuple(parts) for parts in (outputs, lses)]
    except TypeError:
        raise InvalidArgument("outputs and lses: must be sequences of arrays") from None
    if len(lists[0]) != len(lists[1]):
        raise InvalidArgument(f"lses: has {len(lists[1])} arrays, outputs has {len(lists[0])}")
    read = (
        tuple(_readable(f"{name}[{n}]", x) for n, x in enumerate(parts))
        for name, parts in zip(("outputs", "lses"), lists)
    )
    return (*read, _writable("output", out), lse if lse is None else _writable("lse", lse))


def append_slots(
    key: Any, value: Any, key_cache: Any, value_cache: Any, **rest: Any
) -> tuple[Any, ...]:
    """The tensors of an append, in the plugin's order."""
    integers = ("cache_lengths", "new_lengths", "cu_seqlens", "block_table")
    return (
        _readable("key", key),
        _readable("value", value),
        _writable("key_cache", key_cache),
        _writable("value_cache", value_cache),
        *(None if rest[n] is None else _of_int32(n, rest[n]) for n in integers),
        *(
            None if rest[n] is None else _of_float32(n, rest[n])
            for n in ("key_scale", "value_scale")
        ),
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


# By dtype, whose name NumPy takes a microsecond to spell: the entry of CODES, or None.
_RETYPED: dict[Any, tuple[int, str] | None] = {}


def _retyped(x: Any) -> tuple[int, str] | None:
    """NumPy knows no more of a type of ml_dtypes than its size and its name."""
    dtype = x.dtype
    try:
        return _RETYPED[dtype]
    except KeyError:
        code = CODES.get(dtype.name) if dtype.kind in "Vf" else None
        return _RETYPED.setdefault(dtype, code)


def _numpy_view(x: Any) -> Any:
    retyped = _retyped(x)
    return x if retyped is None else (x.view(retyped[1]), retyped[0])


_NUMPY = _Kind(
    view=_numpy_view,
    is_float=lambda x: x.dtype != "float32" and (x.dtype.kind == "f" or _retyped(x) is not None),
    is_integer=lambda x: x.dtype != "int32" and x.dtype.kind in "iu",
    bounds=lambda x: (int(x.min()), int(x.max())) if x.size else (),
    cast=lambda x, dtype: x.astype(dtype),
)


def _standard(writable: bool) -> _Kind:
    """By the Python array API standard; asking for bounds waits for a GPU."""

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


_CUPY = _Kind(
    is_float=lambda x: x.dtype != "float32" and x.dtype.kind in "fV",
    is_integer=lambda x: x.dtype != "int32" and x.dtype.kind in "iu",
    bounds=lambda x: (int(x.min()), int(x.max())) if x.size else (),
    cast=lambda x, dtype: x.astype(dtype),
)
_KINDS: dict[type, _Kind] = {}


def family(kind: type) -> str:
    """The framework that defines a type or what it inherits from: "numpy", "torch", "jax", "cupy"
    or ""."""
    numpy = sys.modules.get("numpy")
    if numpy and issubclass(kind, numpy.ndarray):
        return "numpy"
    modules = {base.__module__.partition(".")[0] for base in kind.__mro__}
    if modules & {"jax", "jaxlib"}:
        return "jax"
    return next((name for name in ("torch", "cupy") if name in modules), "")


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
    elif of == "cupy":
        made = _CUPY
    elif of != "torch" and hasattr(kind, "__array_namespace__"):
        made = _standard(writable=of != "jax")
    else:
        made = _Kind(writable=of != "jax")
    return _KINDS.setdefault(kind, made)
