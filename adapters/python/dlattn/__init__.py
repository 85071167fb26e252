"""Attention for any DLPack array, computed by ``libdlattn.so.1``.

``attention`` takes arrays of any framework that speaks DLPack. ``dlattn.jax`` and ``dlattn.torch``
are drop-ins for the attention functions of those frameworks, with their transformations.

The plugin is searched where ``DLATTN_LIBRARY`` says, else beside this package, else where the
system looks.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, TypeVar

from . import _core
from ._arrays import (
    append_slots,
    family,
    gradient_slots,
    more_slots,
    output_shape,
    part_slots,
    slots,
)
from ._errors import (
    BY_STATUS,
    BufferTooSmall,
    DeviceError,
    DeviceUnavailable,
    Error,
    InternalError,
    InvalidArgument,
    LibraryNotFound,
    OutOfMemory,
    Unsupported,
    VersionMismatch,
)
from ._options import Alignment, Window, alignment_code, block_sides, window_sides

__all__ = [
    "BufferTooSmall",
    "Device",
    "DeviceError",
    "DeviceUnavailable",
    "Error",
    "Gradients",
    "InternalError",
    "InvalidArgument",
    "Kernel",
    "Library",
    "LibraryNotFound",
    "OutOfMemory",
    "Sku",
    "Unsupported",
    "VersionMismatch",
    "append",
    "attention",
    "attention_backward",
    "devices",
    "kernels",
    "library",
    "merge",
    "select",
]

Array = TypeVar("Array")
_core.bind_errors(BY_STATUS)


class Sku(NamedTuple):
    """The kernel that a call gets, and what it guarantees (``dlattn_sku`` in dlattn.h)."""

    kernel: str
    backend: str
    arch: str
    math: str
    accumulator: str
    features: int
    workspace_bytes: int
    workspace_alignment: int
    contiguous: bool
    deterministic: bool
    bit_stable: bool
    tile_q: int
    tile_k: int
    num_splits: int
    num_threads: int
    reference: bool


class Kernel(NamedTuple):
    """One row of the plugin's kernel table (``dlattn_kernel_info`` in dlattn.h)."""

    name: str
    operation: str
    backend: str
    arch: str
    dtypes: str
    features: int
    max_head_dim: int
    max_head_dim_v: int
    available: bool


class Device(NamedTuple):
    """One device of this machine (``dlattn_device_info`` in dlattn.h)."""

    type: int  # DLPack's: 1 is the CPU, 2 CUDA
    id: int
    name: str
    arch: str
    multiprocessors: int  # of a CPU: threads


class Library(NamedTuple):
    """The plugin that is in use."""

    path: str
    version: str
    abi: tuple[int, int]


def library() -> Library:
    """The plugin that is in use; raises LibraryNotFound, which names the places searched."""
    return Library(*_core.library())


def kernels() -> list[Kernel]:
    """The kernel table, best first."""
    return [Kernel(*row) for row in _core.kernels()]


def devices() -> list[Device]:
    """The devices of this machine, of which the CPU is the first."""
    return [Device(*row) for row in _core.devices()]


def attention(
    query: Array,
    key: Any,
    value: Any,
    *,
    causal: bool = False,
    alignment: Alignment = "top_left",
    scale: float | None = None,
    softcap: float = 0.0,
    window: Window | None = None,
    bias: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    query_lengths: Any = None,
    key_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    block_table: Any = None,
    query_segments: Any = None,
    key_segments: Any = None,
    block_mask: Any = None,
    block_size: tuple[int, int] | None = None,
    query_scale: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
    diagonal_offset: int = 0,
    dropout_probability: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    out: Any = None,
    lse: Any = None,
    kernel: str | None = None,
    num_threads: int = 0,
    stream: int | None = None,
) -> Array:
    """``softmax(scale * query key^T + bias) value`` over the visible keys.

    All arrays are of one framework and on one device, with any strides. E is float16, bfloat16
    (NumPy: that of ml_dtypes), float32 or float64; query, key and value may also be ml_dtypes'
    float8_e4m3fn or float8_e5m2. Of NumPy's own classes ndarray and memmap are
    taken: others may mean more than their memory says, as a masked array does.

    query:  E ``[B, H, Lq, D]``; packed ``[total_q, H, D]`` with ``cu_seqlens_q``.
    key:    E ``[B, H_kv, Lk, D]``; packed ``[total_k, H_kv, D]`` with ``cu_seqlens_k``; pages
            ``[pages, H_kv, page_size, D]`` with ``block_table``. H is a multiple of H_kv.
    value:  as ``key`` with its own last extent D_v.
    causal: key j is visible to row i iff ``j <= i + offset``, where offset is 0
            (``alignment="top_left"``) or ``Lk - Lq`` (``"bottom_right"``: the last row meets the
            last key).
    scale:  default ``1 / sqrt(D)``.
    softcap: c > 0 caps logits at ``c * tanh(logit / c)``.
    window: (left, right): keys from ``i + offset - left`` to ``i + offset + right`` are visible;
            None is unbounded.
    bias:   float32 or E, added to the logits; ``mask``: bool, True is visible. Each axis of ``[B,
            H, Lq, Lk]`` may be 1, and axes in front may be left out.
    alibi_slopes: float32 ``[H]`` or ``[B, H]``. ``sinks``: float32 ``[H]``, logits that carry no
            value. Both are converted from other float types.
    query_lengths, key_lengths: int32 ``[B]``; rows and keys from there on count as absent.
    cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``, where the packed sequences begin, the longest of
            which has ``max_seqlen_q``, ``max_seqlen_k`` (default: all).
    block_table: int32 ``[B, max_pages]``, page indices; needs ``key_lengths``. It, lengths and
            beginnings are converted from other integer types, whose values are looked at for that:
            on a GPU this waits for them.
    query_segments, key_segments: int32 ``[B, Lq]`` and ``[B, Lk]`` (packed: ``[total]``); a key
            is visible only to rows with its own number, as documents in one sequence are.
    block_mask: uint8 ``[B, H, ceil(Lq / block_q), ceil(Lk / block_k)]`` with
            ``block_size=(block_q, block_k)``: 0 hides a block of keys from a block of rows, in 1
            ``mask`` decides, in 2 it is not read. The first two axes may be 1.
    query_scale, key_scale, value_scale: float32 ``[1]``, ``[B, H]`` (key, value: H_kv) or, for
            pages, ``[pages, H_kv]``: what is multiplied with the tensor.
    diagonal_offset: added to ``offset``: where a shard of a longer sequence lies.
    dropout_probability: each weight becomes 0 with it and is else divided by 1 - it; which, seed
            and offset say, the same for ``attention_backward``.
    out:    array to write instead of a new one. A row that sees no key becomes 0. It and ``lse``
            share no element with each other or an input (``out=query`` is refused), but may lie
            between the elements of one, as views of one array do.
    lse:    float32 or E ``[B, H, Lq]`` (packed: ``[H, total_q]``) to write log-sum-exp of the
            logits to (natural logarithm; -inf for a row that sees no key).
    kernel: name of the kernel to use (``kernels()``), default the best.
    num_threads: CPU threads; default as many as pay, of ``DLATTN_NUM_THREADS`` or the process's
            cores.
    stream: CUstream as an integer; default: the framework's current stream if it can be asked for
            (PyTorch, CuPy), else CUDA's legacy default stream. On a GPU the call returns at once;
            keep inputs that the framework does not order by stream alive until it has run.

    Returns ``out``. Arrays of JAX, which cannot be written to, and tensors of PyTorch go through
    ``dlattn.jax.attention`` and ``dlattn.torch.attention``, and have their gradients.

    Thread-safe; the GIL is released while a kernel runs. Raises InvalidArgument (a ValueError) or
    Unsupported (a NotImplementedError) with the tensor's name and both values, LibraryNotFound (an
    ImportError), or another Error.
    """
    framework = _FRAMEWORKS.get(type(query)) or _framework(type(query))
    if framework.attention is not None:
        options = {name: x for name, x in locals().items() if name != "framework"}
        return framework.attention(**_without_defaults(options, framework.lacks))
    if out is None:
        out = framework.empty(query, output_shape(query, value))
    if stream is None and framework.stream:
        stream = framework.stream(query)
    left, right = window_sides(window)
    is_plain = (
        query_segments is key_segments is block_mask is block_size is None
        and query_scale is key_scale is value_scale is None
        and not (diagonal_offset or dropout_probability)
    )
    more = {} if is_plain else _more(locals())
    _core.forward(
        *slots(
            query,
            key,
            value,
            out,
            lse,
            bias,
            mask,
            alibi_slopes,
            sinks,
            query_lengths,
            key_lengths,
            cu_seqlens_q,
            cu_seqlens_k,
            block_table,
        ),
        scale,
        softcap,
        left,
        right,
        causal,
        alignment_code(alignment),
        max_seqlen_q,
        max_seqlen_k,
        kernel,
        num_threads,
        stream,
        framework.workspace,
        **more,
    )
    return out


class Gradients(NamedTuple):
    """What ``attention_backward`` returns; None for what is not wanted or not given."""

    query: Any
    key: Any
    value: Any
    bias: Any
    alibi_slopes: Any
    sinks: Any


def attention_backward(
    d_output: Any,
    query: Array,
    key: Any,
    value: Any,
    output: Any,
    lse: Any,
    *,
    d_lse: Any = None,
    wanted: tuple[str, ...] | None = None,
    **options: Any,
) -> Gradients:
    """Gradients of ``<d_output, output> + <d_lse, lse>`` by the inputs of ``attention``.

    output, lse: what ``attention`` wrote for the same inputs and options, which are named as there
    (all but ``out``). wanted: names of fields of ``Gradients``; default all whose tensors are
    given. Each is a new array shaped and typed as its tensor. The same bits on every run and for
    any number of threads. Pages, float8 and scales have no gradients.

    For arrays of NumPy and of frameworks without gradients of their own; JAX and PyTorch
    differentiate ``attention``.
    """
    o = _read_options("attention_backward", options)
    framework = _framework(type(query))
    if framework.attention is not None:
        raise Unsupported(f"query: {type(query)} has gradients of its own; differentiate attention")
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {n: o[n] for n in ("bias", "alibi_slopes", "sinks")}
    names = [n for n, x in tensors.items() if x is not None] if wanted is None else list(wanted)
    for name in names:
        if tensors.get(name) is None:
            raise InvalidArgument(f"wanted: {name!r} is not among the tensors of this call")
    made = {n: framework.empty(tensors[n], tuple(tensors[n].shape)) for n in names}
    o |= {"out": output, "lse": lse}
    if o["stream"] is None and framework.stream:
        o["stream"] = framework.stream(query)
    gradients = gradient_slots(
        {"d_output": d_output, "d_lse": d_lse}, {f"d_{n}": x for n, x in made.items()}
    )
    main = slots(query, key, value, *(o[name] for name in _TENSORS))
    _core.forward(
        *main, *(o[name] for name in _OPTIONS), framework.workspace, **_more(o), **gradients
    )
    return Gradients(*(made.get(n) for n in Gradients._fields))


def merge(
    outputs: Any, lses: Any, *, out: Any = None, lse: Any = None, stream: int | None = None
) -> tuple[Any, Any]:
    """(output, lse) over all keys, from results over disjoint parts of them.

    outputs: sequence of arrays ``[B, H, Lq, D_v]`` (packed: ``[total_q, H, D_v]``), lses: of as
    many ``[B, H, Lq]`` (``[H, total_q]``), as ``attention`` wrote them for the same queries. A part
    whose lse is -inf has no weight. out, lse: arrays to write, which may be those of one part;
    default new ones like the first part's.
    """
    if not len(outputs) or not len(lses):
        raise InvalidArgument("outputs and lses: are empty, must have at least one part")
    framework = _framework(type(outputs[0]))
    out = framework.empty(outputs[0], tuple(outputs[0].shape)) if out is None else out
    lse = framework.empty(lses[0], tuple(lses[0].shape)) if lse is None else lse
    if stream is None and framework.stream:
        stream = framework.stream(out)
    _core.merge(*part_slots(outputs, lses, out, lse), stream, framework.workspace)
    return out, lse


def append(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    cache_lengths: Any,
    *,
    new_lengths: Any = None,
    cu_seqlens: Any = None,
    block_table: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
    stream: int | None = None,
) -> None:
    """Writes new keys and values into a cache, behind the ``cache_lengths[b]`` that are there.

    key, value: ``[B, H_kv, L, D]`` or packed ``[total, H_kv, D]`` with ``cu_seqlens``; rows from
    ``new_lengths[b]`` on are left out. key_cache, value_cache: ``[B, H_kv, capacity, D]``, or
    ``[pages, H_kv, page_size, D]`` with ``block_table``; of any float type, float8 included, to
    which rows are rounded after division by the scale, if there is one. ``cache_lengths`` stays as
    it is.
    """
    given = {n: x for n, x in locals().items() if n != "stream"}
    framework = _framework(type(key_cache))
    if stream is None and framework.stream:
        stream = framework.stream(key_cache)
    _core.append(*append_slots(**given), stream, framework.workspace)


def select(query: Any, key: Any, value: Any, **options: Any) -> Sku:
    """The kernel that ``attention`` would use for these arrays and options; computes nothing."""
    o = _read_options("select", options)
    framework = _framework(type(query))
    if o["out"] is None:
        o["out"] = framework.empty(query, output_shape(query, value))
    tensors = slots(query, key, value, *(o[name] for name in _TENSORS))
    given = (o[name] for name in _OPTIONS)
    return Sku(*_core.query(*tensors, *given, framework.workspace, **_more(o)))


# The arguments of _core after query, key and value; those behind them go by name.
_TENSORS = (
    *("out", "lse", "bias", "mask", "alibi_slopes", "sinks", "query_lengths", "key_lengths"),
    *("cu_seqlens_q", "cu_seqlens_k", "block_table"),
)
_OPTIONS = (
    *("scale", "softcap", "window_left", "window_right", "causal", "alignment"),
    *("max_seqlen_q", "max_seqlen_k", "kernel", "num_threads", "stream"),
)
_MORE_TENSORS = (
    *("query_segments", "key_segments", "block_mask"),
    *("query_scale", "key_scale", "value_scale"),
)
_MORE_OPTIONS = ("diagonal_offset", "dropout_probability", "dropout_seed", "dropout_offset")


def _read_options(function: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of ``attention``, windows and alignment as the plugin has them."""
    unknown = options.keys() - attention.__kwdefaults__.keys()
    if unknown:
        raise TypeError(f"{function}: attention has no argument {', '.join(sorted(unknown))}")
    o = {**attention.__kwdefaults__, **options}
    o["window_left"], o["window_right"] = window_sides(o["window"])
    o["alignment"] = alignment_code(o["alignment"])
    return o


def _more(o: dict[str, Any]) -> dict[str, Any]:
    """What goes by name, if it differs from its default."""
    more = more_slots(**{n: o[n] for n in _MORE_TENSORS if o[n] is not None})
    more |= {n: o[n] for n in _MORE_OPTIONS if o[n] != 0}
    if o["block_size"] is not None:
        more["block_q"], more["block_k"] = block_sides(o["block_size"])
    return more


def _lacking(function: Callable[..., Any]) -> tuple[str, ...]:
    """Other frameworks' functions do not have all of what came later."""
    later = (*_MORE_TENSORS, *_MORE_OPTIONS, "block_size")
    return tuple(name for name in later if name not in function.__kwdefaults__)


def _without_defaults(o: dict[str, Any], lacks: tuple[str, ...]) -> dict[str, Any]:
    """What is lacking is refused where it is asked."""
    defaults = attention.__kwdefaults__
    for name in lacks:
        if o[name] is not None and (defaults[name] is None or o[name] != defaults[name]):
            raise Unsupported(f"{name}: is not supported yet for arrays of {type(o['query'])}")
    return {name: x for name, x in o.items() if name not in lacks}


class _Framework(NamedTuple):
    """How arrays of one type are made, on the device of one; or who does all the work."""

    empty: Callable[[Any, tuple[int, ...]], Any]
    workspace: Callable[[Any, int], Any]
    attention: Callable[..., Any] | None = None
    lacks: tuple[str, ...] = ()  # of our options, what that function does not have
    stream: Callable[[Any], int | None] | None = None  # that is current on the array's device


_FRAMEWORKS: dict[type, _Framework] = {}


def _framework(kind: type) -> _Framework:
    name = family(kind)
    if name == "numpy":
        import numpy as np

        made = _Framework(lambda like, shape: np.empty(shape, like.dtype), _no_workspace)
    elif name == "torch":
        from . import torch

        made = _Framework(
            lambda like, shape: like.new_empty(shape),
            torch._workspace,
            torch.attention,
            _lacking(torch.attention),
        )
    elif name == "jax":
        from . import jax

        made = _Framework(_no_output, _no_workspace, _jax_attention, _lacking(jax.attention))
    elif name == "cupy":
        made = _Framework(_cupy_empty, _cupy_workspace, stream=_cupy_stream)
    elif hasattr(kind, "__array_namespace__"):
        made = _Framework(_standard_empty, _standard_workspace)
    else:
        made = _Framework(_no_output, _no_workspace)
    _FRAMEWORKS[kind] = made
    return made


def _cupy_empty(like: Any, shape: tuple[int, ...]) -> Any:
    import cupy

    with like.device:
        return cupy.empty(shape, like.dtype)


def _cupy_workspace(like: Any, size: int) -> Any:
    import cupy

    with like.device:
        return cupy.empty(size, cupy.uint8)


def _cupy_stream(like: Any) -> int | None:
    import cupy

    with like.device:
        return cupy.cuda.get_current_stream().ptr or None


def _standard_empty(like: Any, shape: tuple[int, ...]) -> Any:
    """By the Python array API standard."""
    return like.__array_namespace__().empty(shape, dtype=like.dtype, device=like.device)


def _standard_workspace(like: Any, size: int) -> Any:
    xp = like.__array_namespace__()
    return xp.empty(size, dtype=xp.uint8, device=like.device)


def _jax_attention(
    *, out: Any, lse: Any, kernel: Any, num_threads: int, stream: Any, **options: Any
) -> Any:
    from . import jax

    if out is not None or lse is not None:
        raise InvalidArgument(
            "out, lse: JAX arrays cannot be written to; dlattn.jax.attention returns both"
        )
    if kernel is not None or num_threads or stream is not None:
        raise InvalidArgument("kernel, num_threads, stream: are chosen by XLA")
    return jax.attention(**options)


def _no_output(like: Any, shape: tuple[int, ...]) -> Any:
    raise InvalidArgument(
        f"output: {type(like)} does not say how such an array is made; give out=, of shape {shape}"
    )


def _no_workspace(like: Any, size: int) -> Any:
    raise Unsupported(f"{type(like)} cannot allocate {size} bytes of workspace on its device")
