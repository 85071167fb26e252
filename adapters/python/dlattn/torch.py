"""Attention for PyTorch, on the CPU and on CUDA's current stream.

``scaled_dot_product_attention`` is a drop-in for the function of that name in
``torch.nn.functional``; ``attention`` has all of the plugin's features. Both differentiate, to any
order and in both modes, compile without a graph break, and work under ``torch.func`` (vmap goes
through the batch, one by one) and autocast.

Where PyTorch says that nobody watches (no gradient, transform, mode, subclass or compilation) the
plugin is called at once; else through the operator ``dlattn::forward``. Its backward pass,
``dlattn::backward``, is the plugin's own where it has a row for the call beside the reference, and
else computed here, some query rows at a time; forward-mode and higher derivatives come from a
composite of PyTorch's operators, which holds all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import Error, InvalidArgument, Unsupported, _core, _torch_provider
from ._native import serves
from ._options import Alignment, Window, alignment_code, block_sides, window_sides
from ._torch_backward import backward
from ._torch_math import DIFFERENTIABLE, Options, Tensors, composite, order_of

__all__ = ["attention", "patch", "scaled_dot_product_attention"]

# PyTorch before 2.10 cannot tell the C side which stream is current.
_HAS_EXCHANGE = hasattr(Tensor, "__dlpack_c_exchange_api__")


# ---- The drop-in


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, by the plugin.

    query ``[..., H, L, E]``, key ``[..., H_kv, S, E]``, value ``[..., H_kv, S, E_v]``, of two or
    more axes each; those before the last two broadcast. attn_mask: bool (True is visible) or float
    (added to the logits), broadcast to ``[..., H, L, S]``, or a ``CausalBias``. is_causal is
    aligned top left; it may be given together with a mask. The output has the query's layout.
    dropout_p: as in ``attention``.

    Raises ``dlattn.Unsupported`` (a NotImplementedError) for what no kernel of the device does,
    ``dlattn.InvalidArgument`` (a ValueError) for tensors that do not go together.
    """
    if attn_mask is None and not dropout_p and not _is_compiling():
        output = _core.plain(query, key, value, scale, is_causal, enable_gqa)
        if output is not None:
            return output
    alignment: Alignment = "top_left"
    if _is_causal_bias(attn_mask):
        if is_causal:
            raise InvalidArgument("is_causal: is True, and attn_mask a CausalBias; one is enough")
        attn_mask, is_causal, alignment = None, True, _alignment(attn_mask, query, key)
    if _is_compiling() or not _core.is_plain(query, key, value, attn_mask):
        _check_kinds(query=query, key=key, value=value, attn_mask=attn_mask)
    leading, query, key, value = _with_four_axes(query, key, value, enable_gqa)
    options = {
        "causal": is_causal,
        "alignment": alignment,
        "scale": scale,
        "dropout_p": dropout_p,
    }
    if attn_mask is None:
        output = attention(query, key, value, **options)
    else:
        attn_mask = _mask_of_four_axes(attn_mask, (*leading, *query.shape[-2:-1], key.shape[-2]))
        kind = "mask" if attn_mask.dtype == torch.bool else "bias"
        try:
            output = attention(query, key, value, **options, **{kind: attn_mask})
        except Error as error:  # by the name that the caller knows
            raise type(error)(str(error).replace(f"{kind}:", "attn_mask:", 1)) from None
    if len(leading) == 2:
        return output
    return output.reshape(*leading, *output.shape[2:])


def _with_four_axes(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """(the output's axes before its rows, the tensors as [B, H, L, D]), without copies where
    PyTorch's views can do it."""
    axes = query.dim(), key.dim(), value.dim()
    if min(axes) < 2:
        name = ("query", "key", "value")[axes.index(min(axes))]
        raise InvalidArgument(f"{name}: has {min(axes)} axes, must have at least 2")
    if axes == (4, 4, 4):
        of_query, of_key = query.shape[:2], key.shape[:2]
        alike = enable_gqa or of_key == of_query
        if alike and of_key == value.shape[:2] and of_key[0] == of_query[0]:
            return of_query, query, key, value
    padded = [_padded(x, max(*axes, 4)) for x in (query, key, value)]
    batch = _broadcast(*(x.shape[:-3] for x in padded))
    heads, heads_k, heads_v = (x.shape[-3] for x in padded)
    heads_kv = heads_v if heads_k == 1 else heads_k
    if not enable_gqa:
        if heads != heads_kv and heads != 1 and heads_kv != 1:
            raise InvalidArgument(
                f"key: has {heads_kv} heads, query {heads}; enable_gqa=True allows it"
            )
        heads = heads_kv if heads == 1 else heads
        heads_kv = heads_kv if heads_k == heads_v == 1 else heads
    padded = [
        _expanded(x, (*batch, n)).flatten(0, -4)
        for x, n in zip(padded, (heads, heads_kv, heads_kv))
    ]
    return (*batch, heads)[max(4 - max(axes), 0) :], *padded


def _padded(x: Tensor, axes: int) -> Tensor:
    """With leading axes of 1."""
    return x if x.dim() >= axes else x[(None,) * (axes - x.dim())]


def _expanded(x: Tensor, leading: Sequence[int]) -> Tensor:
    """With these extents before the last two."""
    return x if x.shape[:-2] == leading else x.expand(*leading, -1, -1)


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        query, key, value = (list(shape) for shape in shapes)
        raise InvalidArgument(
            f"key, value: axes before the heads are {key}, {value}, query's {query}"
        ) from None


def _mask_of_four_axes(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As [B|1, H|1, L|1, S|1], but for leading axes, of one that broadcasts to ``shape``."""
    axes, given = len(shape), mask.shape
    fits = len(given) <= axes
    for n, full in zip(reversed(given), reversed(shape)):
        fits = fits and (n == 1 or n == full)  # Dynamo finds no symbolic extent by `in`
    if not fits:
        raise InvalidArgument(f"attn_mask: shape is {list(given)}, must broadcast to {list(shape)}")
    if axes <= 4:
        return mask
    mask = _padded(mask, axes)
    if all(n == 1 for n in mask.shape[:-3]):
        return mask[(0,) * (axes - 4)]
    return mask.expand(*shape[:-3], -1, -1, -1).flatten(0, -4)


def _is_causal_bias(x: Any) -> bool:
    """Whether a tensor of a type whose memory means nothing."""
    if x is None or type(x) in _TENSORS:
        return False
    from torch.nn.attention.bias import CausalBias

    return isinstance(x, CausalBias)


def _alignment(bias: Any, query: Tensor, key: Tensor) -> Alignment:
    found, meant = (query.shape[-2], key.shape[-2]), (bias.seq_len_q, bias.seq_len_kv)
    if found != meant:
        raise InvalidArgument(
            f"attn_mask: is a CausalBias of {list(meant)}, query and key make it {list(found)}"
        )
    return "top_left" if bias.variant.name == "UPPER_LEFT" else "bottom_right"


def patch() -> AbstractContextManager[None]:
    """Within it ``torch.nn.functional.scaled_dot_product_attention``, in all threads, is the
    plugin's, and PyTorch's own where the plugin refuses.

    For a PyTorch without ``torch.nn.attention.activate_flash_attention_impl``, which after the
    import of this module knows "DLATTN", and reaches callers in C++ and compiled programs, too.
    """
    return _torch_provider.patched(scaled_dot_product_attention)


_torch_provider.register(scaled_dot_product_attention)


# ---- Everything


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    alignment: Alignment = "top_left",
    scale: float | Tensor | None = None,
    softcap: float = 0.0,
    window: Window | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    block_table: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: tuple[int, int] | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    kernel: str | None = None,
    num_threads: int = 0,
    stream: int | None = None,
    return_lse: bool = False,
) -> Any:
    """``dlattn.attention`` (see there); with ``return_lse`` also the float32 log-sum-exp.

    bias and mask may lack leading axes; alibi_slopes and sinks of other floats become float32,
    int64 lengths, indices and segments int32. scale may be a tensor of one number.

    query, key and value may be float8_e4m3fn or float8_e5m2, each by itself; a query that is needs
    ``out``, of a wide type. query_scale, key_scale and value_scale are factors of theirs, ``[1]``
    or ``[B|1, heads|1]`` (pages: ``[pages|1, H_kv|1]``): what PyTorch's quantized attention calls
    q_descale, k_descale and v_descale.

    dropout_p: each weight becomes 0 with it and is else divided by 1 - it; which, a seed says that
    comes from PyTorch's generator of the CPU (``torch.manual_seed``), whatever the device.

    Differentiable in query, key, value, bias, alibi_slopes, sinks and scale, and through the
    log-sum-exp; but not where ``out``, ``lse``, ``kernel``, ``num_threads``, ``stream`` or a scale
    of a tensor is given, nor for paged calls and float8. Packed calls and dropout have first-order
    gradients in reverse mode alone.
    """
    left, right = window_sides(window)
    if isinstance(scale, Tensor) or isinstance(softcap, Tensor):
        query, scale = _scaled(query, scale, softcap)
    tensors = (
        *(bias, mask, alibi_slopes, sinks, query_lengths, key_lengths),
        *(cu_seqlens_q, cu_seqlens_k, block_table),
        *(query_segments, key_segments, block_mask),
    )
    named = ("query_scale", query_scale), ("key_scale", key_scale), ("value_scale", value_scale)
    scales = {name: x for name, x in named if x is not None}
    is_plain = not _is_compiling() and _core.is_plain(
        query, key, value, *tensors, out, lse, *scales.values()
    )
    if not is_plain:
        _check_kinds(**dict(zip(Tensors._fields, (query, key, value, *tensors))), **scales)
    if _is_any_autocast_enabled():
        query, key, value, bias = _autocast(query, key, value, bias)
    if bias is not None:
        bias = _padded(_as_float(bias, query.dtype), 4)
    if mask is not None:
        mask = _padded(mask, 4)
    tensors = (
        bias,
        mask,
        _as_float(alibi_slopes),
        _as_float(sinks),
        _as_int32("query_lengths", query_lengths),
        _as_int32("key_lengths", key_lengths),
        _as_int32("cu_seqlens_q", cu_seqlens_q),
        _as_int32("cu_seqlens_k", cu_seqlens_k),
        _as_int32("block_table", block_table),
        _as_int32("query_segments", query_segments),
        _as_int32("key_segments", key_segments),
        block_mask,
    )
    options = (
        scale,
        softcap,
        left,
        right,
        causal,
        alignment_code(alignment),
        max_seqlen_q,
        max_seqlen_k,
        *(block_sides(block_size) if block_size is not None else (0, 0)),
        dropout_p,
        _dropout_seed(dropout_p),
    )
    if is_plain:
        written = [x for x in (out, lse) if x is not None]
        if out is None:
            out = _output(query, value)
        if lse is None and return_lse:
            lse = _lse(query, cu_seqlens_q is not None)
        if stream is None:
            stream = _stream(query)
        t, o = Tensors(query, key, value, *tensors), Options(*options)
        by_name = {name: _as_float(x) for name, x in scales.items()} | _named(t, o)
        _core.forward(*_arguments(t, o, out, lse, kernel, num_threads, stream), **by_name)
        for x in written:
            if not x.is_inference():
                torch.autograd.graph.increment_version(x)
    elif (
        out is not None or lse is not None or kernel or num_threads or stream is not None or scales
    ):
        raise InvalidArgument(
            "out, lse, kernel, num_threads, stream, scales of tensors: need plain tensors, "
            "no gradient, no mode or transform and no compilation"
        )
    elif forward_ad._current_level >= 0:  # tensors may have tangents
        t, o = Tensors(query, key, value, *tensors), Options(*options)
        _check_composite(t, o)
        out, lse = composite(t, o)
    else:
        if _are_transforms_active():
            forward = _Forward.apply
        elif _is_for_autograd_alone(query, key, value, *tensors):
            forward = _Eager.apply
        else:
            forward = torch.ops.dlattn.forward
        out, lse = forward(query, key, value, *tensors, *options)
    return (out, lse.float()) if return_lse else out


def _check_kinds(**tensors: Any) -> None:
    """Refuses, by name, what cannot become a tensor of the plugin; PyTorch would name operators."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            kind = type(x)
            raise InvalidArgument(
                f"{name}: is a {kind.__module__}.{kind.__qualname__}, must be a torch.Tensor"
            )
        if x.is_nested:
            raise Unsupported(
                f"{name}: is a nested tensor; attention takes padded ones with key_lengths and "
                "packed ones with cu_seqlens_q and cu_seqlens_k"
            )
        if _is_causal_bias(x):
            raise Unsupported(f"{name}: is a CausalBias; attention takes causal and alignment")
        if x.layout != torch.strided:
            raise Unsupported(f"{name}: layout is {x.layout}, must be {torch.strided}")
        if x.is_quantized:
            raise Unsupported(f"{name}: dtype is {x.dtype}, dlattn reads no quantized tensors")
        if x.device.type not in ("cpu", "cuda", "meta"):
            raise Unsupported(f"{name}: is on {x.device}, must be on the CPU or on CUDA")


def _scaled(query: Tensor, scale: Any, softcap: Any) -> tuple[Tensor, float | None]:
    """A scale that is a tensor goes into the query, so that it has its gradient."""
    if isinstance(softcap, Tensor):
        raise InvalidArgument("softcap: is a torch.Tensor, must be a number")
    _check_kinds(query=query)
    if scale.dim():
        raise InvalidArgument(f"scale: shape is {list(scale.shape)}, must be that of one number")
    return query * scale.to(query.dtype), 1.0


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As PyTorch does for its own attention: floats, but not float64, in autocast's type. Float8
    stays."""
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Tensor | None) -> Tensor | None:
        is_cast = x is not None and x.is_floating_point() and x.itemsize in (2, 4)
        return x.to(dtype) if is_cast else x

    return tuple(cast(x) for x in tensors)


def _as_float(x: Tensor | None, or_dtype: torch.dtype = torch.float32) -> Tensor | None:
    """float32, or ``or_dtype`` if it is that already."""
    if x is None or x.dtype in (torch.float32, or_dtype) or not x.is_floating_point():
        return x
    return x.float()


def _as_int32(name: str, x: Tensor | None) -> Tensor | None:
    """Where numbers cannot be read, what int32 cannot hold becomes the nearest that it can: it is
    out of range, too."""
    if x is None or x.dtype != torch.int64:
        return x
    if not _is_compiling() and x.device.type == "cpu" and _core.is_plain(x):
        wrong = x[x != x.int()]
        if wrong.numel():
            raise InvalidArgument(f"{name}: holds {wrong[0]}, must fit in int32")
    return x.clamp(-(2**31), 2**31 - 1).int()


def _dropout_seed(dropout_p: float) -> Tensor | None:
    """A tensor, so that compiled programs draw another in each run, and checkpoints the same."""
    if not dropout_p:
        return None
    if not 0 < dropout_p < 1:
        raise InvalidArgument(f"dropout_p: is {dropout_p}, must be at least 0 and less than 1")
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


# ---- The call itself

_TENSORS = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active  # of torch.func
_quiet_inference_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_core.bind_torch(
    *_TENSORS,
    torch._C._dispatch_tls_local_include_set,
    _quiet_inference_keys.add(torch._C.DispatchKey.ADInplaceOrView),
    _quiet_inference_keys,
    torch._C._is_torch_function_mode_enabled,
    forward_ad,
    "_current_level",
    _is_any_autocast_enabled,
    torch.is_grad_enabled,
    "requires_grad",
    Tensor.is_neg,
    torch.empty_like,
)
_core.use_openmp()  # PyTorch's own threads, which spin between its operators


def _arguments(
    t: Tensors,
    options: Options,
    output: Tensor,
    lse: Tensor | None,
    kernel: str | None = None,
    num_threads: int = 0,
    stream: int | None = None,
) -> tuple[Any, ...]:
    """What ``_core`` takes by position."""
    how = (kernel, num_threads, stream, _workspace)
    return (*t[:3], output, lse, *t[3:-3], *options[:-4], *how)


def _named(t: Tensors, options: Options) -> dict[str, Any]:
    """What it takes by name."""
    named = {name: x for name, x in zip(Tensors._fields[-3:], t[-3:]) if x is not None}
    block_q, block_k, p, seed = options[-4:]
    if block_q or block_k:
        named |= {"block_q": block_q, "block_k": block_k}
    if seed is not None:
        named |= {"dropout_probability": p, "dropout_seed": seed.item()}
    return named


def _stream(query: Tensor) -> int | None:
    if _HAS_EXCHANGE or not query.is_cuda:
        return None
    return torch.cuda.current_stream(query.device).cuda_stream or 1


def _workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _output(query: Tensor, value: Tensor) -> Tensor:
    """In memory as the query, without its gaps; for another head_dim its axes have that order."""
    if query.shape[-1] == value.shape[-1]:
        return torch.empty_like(query)
    shape = (*query.shape[:-1], value.shape[-1])
    return torch.empty_permuted(shape, order_of(query), dtype=query.dtype, device=query.device)


def _lse(query: Tensor, packed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = query.shape[:2][::-1] if packed else query.shape[:-1]
    return query.new_empty(shape, dtype=dtype)


# ---- The operator

_OPTIONS = (
    "float? scale, float softcap, int window_left, int window_right, bool causal, int alignment, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int block_q, int block_k, float dropout_p, "
    "Tensor? dropout_seed"
)
_INPUTS = ", ".join(f"Tensor{'?' if i > 2 else ''} {x}" for i, x in enumerate(Tensors._fields))
_COUNT = len(Tensors._fields)

_library = torch.library.Library("dlattn", "DEF")
_library.define(f"forward({_INPUTS}, {_OPTIONS}) -> (Tensor output, Tensor lse)")
_library.define(
    "backward(Tensor d_output, Tensor d_lse, Tensor output, Tensor lse, int wanted, "
    f"{_INPUTS}, {_OPTIONS}) -> ({', '.join('Tensor' for _ in DIFFERENTIABLE)})"
)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    t, options = _detached(inputs[:_COUNT]), Options(*inputs[_COUNT:])
    output, lse = _forward_fake(*inputs)
    arguments = _arguments(t, options, output, lse, stream=_stream(t.query))
    _core.forward(*arguments, **_named(t, options))
    return output, lse


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The log-sum-exp is float64 for float64, whose gradients would lose digits by float32."""
    t = Tensors(*inputs[:_COUNT])
    wide = torch.promote_types(t.query.dtype, torch.float32)
    return _output(t.query, t.value), _lse(t.query, t.cu_seqlens_q is not None, wide)


def _detached(tensors: Sequence[Tensor | None]) -> Tensors:
    return Tensors(*(x if x is None else x.detach() for x in tensors))


def _backward(
    d_output: Tensor, d_lse: Tensor, output: Tensor, lse: Tensor, wanted: int, *inputs: Any
) -> tuple[Tensor, ...]:
    """One gradient for each of DIFFERENTIABLE; that of one that is not wanted is empty."""
    t, options = _detached(inputs[:_COUNT]), Options(*inputs[_COUNT:])
    upstream = {"d_output": d_output.detach(), "d_lse": d_lse.detach()}
    results = output.detach(), lse.detach()
    gradients = _native_backward(upstream, results, wanted, t, options)
    if gradients is None:
        found = backward(d_output, d_lse, t, options, _names(wanted))
        gradients = tuple(t.query.new_empty(0) if g is None else g for g in found)
    return gradients


def _native_backward(
    upstream: dict[str, Tensor],
    results: tuple[Tensor, Tensor],
    wanted: int,
    t: Tensors,
    options: Options,
) -> tuple[Tensor, ...] | None:
    """By the plugin; None if PyTorch's operators had better do it."""
    if upstream["d_output"].stride(-1) != 1:  # of a sum, say; fast rows do not read that
        upstream["d_output"] = upstream["d_output"].contiguous()
    gradients = _empty_gradients(wanted, t)
    if t.query.numel() == 0:
        return tuple(g.zero_() for g in gradients)
    arguments = _arguments(t, options, *results, stream=_stream(t.query))
    more = upstream | _named(t, options)
    for name in _names(wanted):
        more[f"d_{name}"] = gradients[DIFFERENTIABLE.index(name)]
    if not (_is_native_alone(t, options) or serves(*arguments, **more)):
        return None
    if wanted:
        _core.forward(*arguments, **more)
    return gradients


def _empty_gradients(wanted: int, t: Tensors) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x) if wanted >> i & 1 else t.query.new_empty(0)
        for i, x in enumerate(getattr(t, name) for name in DIFFERENTIABLE)
    )


def _names(wanted: int) -> list[str]:
    """Of DIFFERENTIABLE, by the bits that say which are wanted."""
    return [name for i, name in enumerate(DIFFERENTIABLE) if wanted >> i & 1]


def _backward_fake(
    d_output: Tensor, d_lse: Tensor, output: Tensor, lse: Tensor, wanted: int, *inputs: Any
) -> tuple[Tensor, ...]:
    return _empty_gradients(wanted, Tensors(*inputs[:_COUNT]))


def _is_native_alone(t: Tensors, options: Options) -> bool:
    """Whether PyTorch's operators would compute something else."""
    return t.cu_seqlens_q is not None or options.dropout_p > 0


def _check_composite(t: Tensors, options: Options) -> None:
    if t.block_table is not None:
        raise Unsupported("dlattn.torch: paged attention has no gradient")
    if _is_native_alone(t, options):
        raise Unsupported(
            "dlattn.torch: packed attention and dropout have first-order gradients in reverse mode "
            "alone"
        )


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    t, options = Tensors(*inputs[:_COUNT]), Options(*inputs[_COUNT:])
    if t.block_table is not None:
        raise Unsupported("dlattn.torch: paged attention has no gradient")
    ctx.save_for_backward(*t, options.dropout_seed, *output)
    ctx.options = options._replace(dropout_seed=None)


def _gradient(
    ctx: Any, d_output: Tensor, d_lse: Tensor, apply: Any = None
) -> tuple[Tensor | None, ...]:
    if apply is None:
        apply = _Backward.apply if _are_transforms_active() else torch.ops.dlattn.backward
    *tensors, seed, output, lse = ctx.saved_tensors
    options = ctx.options._replace(dropout_seed=seed)
    needs = dict(zip(Tensors._fields, ctx.needs_input_grad))
    wanted = sum(1 << i for i, name in enumerate(DIFFERENTIABLE) if needs[name])
    found = apply(d_output, d_lse, output, lse, wanted, *tensors, *options)
    gradients = dict(zip(DIFFERENTIABLE, found))
    of_tensors = (gradients[name] if needs[name] else None for name in Tensors._fields)
    return *of_tensors, *(None for _ in options)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d_output, d_lse, _, _, wanted, *rest = inputs
    ctx.save_for_backward(d_output, d_lse, *rest[:_COUNT])
    ctx.wanted = wanted
    ctx.options = Options(*rest[_COUNT:])._replace(dropout_seed=None)


def _second_gradient(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Through the gradients of the composite, which takes no output and no log-sum-exp."""
    d_output, d_lse, *tensors = ctx.saved_tensors
    t, options, wanted = Tensors(*tensors), ctx.options, _names(ctx.wanted)
    _check_composite(t, options)
    names = [name for name in DIFFERENTIABLE if getattr(t, name) is not None]

    def gradients(d_output: Tensor, d_lse: Tensor, *present: Tensor) -> tuple[Tensor, ...]:
        def call(*present: Tensor) -> tuple[Tensor, Tensor]:
            return composite(t._replace(**dict(zip(names, present))), options)

        found = torch.func.vjp(call, *present)[1]((d_output, d_lse))
        return tuple(x for name, x in zip(names, found) if name in wanted)

    present = (getattr(t, name) for name in names)
    given = tuple(x for name, x in zip(DIFFERENTIABLE, cotangents) if name in wanted)
    d_d_output, d_d_lse, *found = torch.func.vjp(gradients, d_output, d_lse, *present)[1](given)
    of_tensors = dict(zip(names, found))
    of_rest = (None for _ in options)
    return (
        *(d_d_output, d_d_lse, None, None, None),
        *(of_tensors.get(name) for name in Tensors._fields),
        *of_rest,
    )


class _Forward(torch.autograd.Function):
    """The operator for torch.func, which takes gradients from nothing else."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_forward)
    backward = staticmethod(_gradient)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.dlattn.forward(*inputs)


class _Eager(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which takes longer than a short call itself."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_forward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        is_watched = torch.is_grad_enabled() or not _is_for_autograd_alone(d_output, d_lse)
        return _gradient(ctx, d_output, d_lse, None if is_watched else _backward)


def _is_for_autograd_alone(*tensors: Tensor | None) -> bool:
    """Whether nobody else sees a call of these, no mode, subclass or trace, and all are memory that
    means what it says."""
    return (
        not _is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
        and all(x is None or (type(x) in _TENSORS and _is_memory(x)) for x in tensors)
    )


def _is_memory(x: Tensor) -> bool:
    return not (x.is_meta or x.is_neg() or x._is_zerotensor())


class _Backward(torch.autograd.Function):
    """The same for its gradient."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_backward)
    backward = staticmethod(_second_gradient)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return torch.ops.dlattn.backward(*inputs)


for _name, _function, _fake, _setup, _derivative in (
    ("forward", _forward, _forward_fake, _setup_forward, _gradient),
    ("backward", _backward, _backward_fake, _setup_backward, _second_gradient),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _function, _device)
    torch.library.register_fake(f"dlattn::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"dlattn::{_name}", _derivative, setup_context=_setup, lib=_library
    )


# ---- What torch.utils.flop_counter counts: whatever masks leave out, as in PyTorch


@register_flop_formula(torch.ops.dlattn.forward, get_raw=True)
def _forward_flops(*inputs: Any, **_: Any) -> int:
    """Two products: of rows and keys, D long, and of rows and values, over the keys."""
    t = Tensors(*inputs[:_COUNT])
    return 2 * _pairs(t, Options(*inputs[_COUNT:])) * (t.query.shape[-1] + t.value.shape[-1])


@register_flop_formula(torch.ops.dlattn.backward, get_raw=True)
def _backward_flops(*inputs: Any, **_: Any) -> int:
    """Five: logits and the gradients of query and key, D long; those of weights and of value."""
    inputs = inputs[5:]  # behind the two gradients, the two results and what is wanted
    t = Tensors(*inputs[:_COUNT])
    depth = 3 * t.query.shape[-1] + 2 * t.value.shape[-1]
    return 2 * _pairs(t, Options(*inputs[_COUNT:])) * depth


def _pairs(t: Tensors, options: Options) -> int:
    """How many pairs of a query row and a key there are, over all heads."""
    if t.cu_seqlens_q is not None:
        rows = _lengths(t.cu_seqlens_q, options.max_seqlen_q or t.query.shape[0])
        if t.block_table is not None:
            keys = [t.block_table.shape[1] * t.key.shape[2]] * len(rows)
        else:
            keys = _lengths(t.cu_seqlens_k, options.max_seqlen_k or t.key.shape[0])
        return t.query.shape[1] * sum(a * b for a, b in zip(rows, keys))
    keys = t.key.shape[2] * (1 if t.block_table is None else t.block_table.shape[1])
    return t.query.shape[:3].numel() * keys


def _lengths(offsets: Tensor, longest: int) -> list[int]:
    """Of packed sequences; each the longest where there are no numbers to read."""
    if type(offsets) in _TENSORS and not offsets.is_meta:
        return offsets.diff().tolist()
    return [longest] * (offsets.shape[0] - 1)


def __getattr__(name: str) -> Any:
    """``context_parallel``, when it is asked for: not every PyTorch has torch.distributed."""
    if name != "context_parallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _torch_context_parallel

    return _torch_context_parallel
