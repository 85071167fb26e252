"""Attention for PyTorch, on the CPU and on CUDA's current stream.

``scaled_dot_product_attention`` is a drop-in for the function of that name in
``torch.nn.functional``; ``attention`` has all of the plugin's features. Both differentiate, compile
without a graph break, and work under ``torch.func`` (vmap goes through the batch, one by one).

Where nothing is recorded (no gradient, no compilation) the plugin is called at once; else through
the operator ``dlattn::forward``. Its backward pass is computed here, some query rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import InvalidArgument, Unsupported, _core
from ._options import Alignment, Window, alignment_code, window_sides

__all__ = ["attention", "scaled_dot_product_attention"]

BACKWARD_ROWS = 128  # query rows whose logits, [B, H, 128, Lk], the backward pass holds at a time

# PyTorch before 2.10 cannot tell the C side which stream is current.
_HAS_EXCHANGE = hasattr(Tensor, "__dlpack_c_exchange_api__")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, by the plugin.

    query ``[B, H, L, E]``, key ``[B, H_kv, S, E]``, value ``[B, H_kv, S, E_v]``; or ``[B, L, E]``,
    or ``[L, E]``. attn_mask: bool (True is visible) or float (added to the logits), broadcast to
    ``[B, H, L, S]``. is_causal is aligned top left; it may be given together with a mask.

    Raises ``dlattn.Unsupported`` (a NotImplementedError) for dropout, ``dlattn.InvalidArgument`` (a
    ValueError) for tensors that do not go together.
    """
    if attn_mask is None and not dropout_p and not _is_compiling():
        output = _core.plain(query, key, value, scale, is_causal, enable_gqa)
        if output is not None:
            return output
    if dropout_p:
        raise Unsupported(f"dropout_p: is {dropout_p}, dlattn has no dropout")
    if _is_any_autocast_enabled():
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    axes = query.dim()
    if axes > 4:
        raise Unsupported(f"query: has {axes} axes, dlattn takes at most 4")
    if axes < 4:
        query, key, value = (_with_heads(x) for x in (query, key, value))
    heads, heads_kv = query.size(1), key.size(1)
    if heads != heads_kv and heads_kv != 1 and not enable_gqa:
        raise InvalidArgument(
            f"key: has {heads_kv} heads, query {heads}; enable_gqa=True allows it"
        )
    if attn_mask is None:
        output = attention(query, key, value, causal=is_causal, scale=scale)
    else:
        if axes == 3 and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        kind = "mask" if attn_mask.dtype == torch.bool else "bias"
        output = attention(query, key, value, causal=is_causal, scale=scale, **{kind: attn_mask})
    return output if axes == 4 else output.squeeze(1) if axes == 3 else output[0, 0]


def _with_heads(x: Tensor) -> Tensor:
    """[B, L, D] or [L, D] -> [B, 1, L, D]."""
    return x.unsqueeze(-3) if x.dim() == 3 else x[None, None]


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As PyTorch does for its own attention: floats, but not float64, in autocast's type."""
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Tensor | None) -> Tensor | None:
        is_cast = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if is_cast else x

    return tuple(cast(x) for x in tensors)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    alignment: Alignment = "top_left",
    scale: float | None = None,
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
    out: Tensor | None = None,
    lse: Tensor | None = None,
    kernel: str | None = None,
    num_threads: int = 0,
    stream: int | None = None,
    return_lse: bool = False,
) -> Any:
    """``dlattn.attention`` (see there); with ``return_lse`` also the float32 log-sum-exp.

    Differentiable in query, key, value, bias, alibi_slopes and sinks, and through the log-sum-exp;
    but not where ``out``, ``lse``, ``kernel``, ``num_threads`` or ``stream`` is given, nor for
    packed and paged calls.
    """
    left, right = window_sides(window)
    tensors = (
        *(bias, mask, alibi_slopes, sinks, query_lengths, key_lengths),
        *(cu_seqlens_q, cu_seqlens_k, block_table),
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
    )
    if _is_plain(query, key, value, bias, alibi_slopes, sinks):
        if out is None:
            out = _output(query, value)
        if lse is None and return_lse:
            lse = _lse(query, cu_seqlens_q is not None)
        if stream is None:
            stream = _stream(query)
        how = (kernel, num_threads, stream, _workspace)
        _core.forward(query, key, value, out, lse, *tensors, *options, *how)
        return (out, lse) if return_lse else out
    if out is not None or lse is not None or kernel or num_threads or stream is not None:
        raise InvalidArgument(
            "out, lse, kernel, num_threads, stream: go with no gradient and no compilation"
        )
    forward = _Forward.apply if _are_transforms_active() else torch.ops.dlattn.forward
    out, lse = forward(query, key, value, *tensors, *options)
    return (out, lse) if return_lse else out


# ---- The call itself


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether nobody watches: no compilation, no gradient, no tensor that only stands for one."""
    if _is_compiling() or _are_transforms_active():
        return False
    watched = _is_grad_enabled()
    for x in tensors:
        if x is not None and (
            type(x) not in _TENSORS or (watched and x.requires_grad) or x.is_meta
        ):
            return False
    return True


_TENSORS = (Tensor, torch.nn.Parameter)
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active  # of torch.func
_core.bind_torch(
    *_TENSORS,
    _are_transforms_active,
    _is_any_autocast_enabled,
    _is_grad_enabled,
    "requires_grad",
    torch.empty_like,
)


def _stream(query: Tensor) -> int | None:
    if _HAS_EXCHANGE or not query.is_cuda:
        return None
    return torch.cuda.current_stream(query.device).cuda_stream or 1


def _workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _output(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _lse(query: Tensor, packed: bool) -> Tensor:
    shape = query.shape[:2][::-1] if packed else query.shape[:-1]
    return query.new_empty(shape, dtype=torch.float32)


# ---- The operator

_TENSOR_NAMES = (
    *("query", "key", "value", "bias", "mask", "alibi_slopes", "sinks"),
    *("query_lengths", "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "block_table"),
)
_OPTIONS = (
    "float? scale, float softcap, int window_left, int window_right, bool causal, int alignment, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_INPUTS = ", ".join(f"Tensor{'?' if i > 2 else ''} {name}" for i, name in enumerate(_TENSOR_NAMES))

_library = torch.library.Library("dlattn", "DEF")
_library.define(f"forward({_INPUTS}, {_OPTIONS}) -> (Tensor output, Tensor lse)")
_library.define(
    "backward(Tensor d_output, Tensor d_lse, Tensor output, Tensor lse, "
    f"{_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tensors, options = rest[:9], rest[9:]
    output, lse = _output(query, value), _lse(query, tensors[6] is not None)
    main = (x.detach() for x in (query, key, value))
    tensors = (x if x is None else x.detach() for x in tensors)
    _core.forward(*main, output, lse, *tensors, *options, None, 0, _stream(query), _workspace)
    return output, lse


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _output(query, value), _lse(query, rest[6] is not None)


def _backward(
    d_output: Tensor, d_lse: Tensor, output: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, bias, alibi_slopes and sinks; an absent one is empty.

    As in FlashAttention (arXiv:2205.14135, algorithm 4): with P = exp(S - lse) and
    delta = sum(dO * O) - dlse: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K,
    dK = scale dS^T Q; a softcap puts the derivative of its tanh before the scale.
    """
    query, key, value, bias, mask, slopes, sinks, query_lengths, key_lengths = rest[:9]
    scale, softcap, left, right, causal, alignment = rest[12:18]
    wide = torch.promote_types(query.dtype, torch.float32)
    _batch, heads, rows, dim = query.shape
    heads_kv, keys = key.shape[1:3]
    scale = dim**-0.5 if scale is None else scale

    def grouped(x: Tensor) -> Tensor:
        """[B, H, ...] -> [B, H_kv, H / H_kv, ...]."""
        return x.to(wide).unflatten(1, (heads_kv, heads // heads_kv))

    def part(x: Tensor) -> Tensor:
        """The rows of this chunk of a tensor that may be broadcast along them."""
        return x if x.shape[2] == 1 else x[:, :, first:last]

    wide_key, wide_value = key.to(wide)[:, :, None], value.to(wide)[:, :, None]
    delta = (d_output.to(wide) * output.to(wide)).sum(3) - d_lse
    seen = lse.isfinite()
    safe_lse = torch.where(seen, lse, 0)
    d_query = torch.empty_like(query, dtype=wide)
    d_key, d_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    d_bias, d_slopes = (_zeros(x, query, wide) for x in (bias, slopes))
    every_key = torch.arange(keys, device=query.device)
    row_end = rows if query_lengths is None else query_lengths[:, None, None, None]
    key_end = keys if key_lengths is None else key_lengths[:, None, None, None]

    for first in range(0, rows, BACKWARD_ROWS):
        last = min(first + BACKWARD_ROWS, rows)
        row = torch.arange(first, last, device=query.device)[:, None]
        distance = every_key - row - (key_end - row_end if alignment else 0)
        visible = (every_key < key_end) & (row < row_end) & seen[:, :, first:last, None]
        if causal:
            visible = visible & (distance <= 0)
        if left >= 0:
            visible = visible & (distance >= -left)
        if right >= 0:
            visible = visible & (distance <= right)
        rows_query = grouped(query[:, :, first:last])
        rows_d_output = grouped(d_output[:, :, first:last])
        logits = (rows_query @ wide_key.mT * scale).flatten(1, 2)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        capped = logits
        if bias is not None:
            logits = logits + part(bias)
        if slopes is not None:
            logits = logits - slopes[..., None, None] * distance.abs()
        if mask is not None:
            visible = visible & (part(mask) != 0)
        p = torch.where(visible, logits - safe_lse[:, :, first:last, None], -torch.inf).exp()
        d_p = (rows_d_output @ wide_value.mT).flatten(1, 2)
        d_logits = p * (d_p - delta[:, :, first:last, None])
        d_value += (grouped(p).mT @ rows_d_output).sum(2)
        if bias is not None:
            target = part(d_bias)
            target += d_logits.sum_to_size(target.shape)
        if slopes is not None:
            d_slopes -= (d_logits * distance.abs()).sum((2, 3)).sum_to_size(slopes.shape)
        if softcap:
            d_logits = d_logits * (1 - (capped / softcap) ** 2)
        d_logits = grouped(d_logits) * scale
        d_query[:, :, first:last] = (d_logits @ wide_key).flatten(1, 2)
        d_key += (d_logits.mT @ rows_query).sum(2)

    d_sinks = _zeros(sinks, query, wide)
    if sinks is not None:
        p_sink = torch.where(seen, sinks[:, None] - safe_lse, -torch.inf).exp()
        d_sinks -= (p_sink * delta).sum((0, 2))
    gradients = (d_query, d_key, d_value, d_bias, d_slopes, d_sinks)
    sources = (query, key, value, bias, slopes, sinks)
    return tuple(g if x is None else g.to(x.dtype) for g, x in zip(gradients, sources))


def _zeros(like: Tensor | None, query: Tensor, dtype: torch.dtype) -> Tensor:
    return query.new_empty(0) if like is None else torch.zeros_like(like, dtype=dtype)


def _backward_fake(
    d_output: Tensor, d_lse: Tensor, output: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    query, key, value, bias, _, slopes, sinks = rest[:7]
    sources = (query, key, value, bias, slopes, sinks)
    return tuple(query.new_empty(0) if x is None else torch.empty_like(x) for x in sources)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    if inputs[9] is not None or inputs[11] is not None:
        raise Unsupported("dlattn.torch: packed and paged attention has no gradient")
    ctx.save_for_backward(*output, *inputs[:12])
    ctx.options = inputs[12:]


def _autograd(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    output, lse, *tensors = ctx.saved_tensors
    gradients = torch.ops.dlattn.backward(d_output, d_lse, output, lse, *tensors, *ctx.options)
    d_query, d_key, d_value, d_bias, d_slopes, d_sinks = (
        g if x is not None else None
        for g, x in zip(gradients, (*tensors[:4], tensors[5], tensors[6]))
    )
    without = (None,) * (5 + len(ctx.options))
    return d_query, d_key, d_value, d_bias, None, d_slopes, d_sinks, *without


class _Forward(torch.autograd.Function):
    """The operator for torch.func, which takes gradients from nothing else."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.dlattn.forward(*inputs)


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)
torch.library.register_fake("dlattn::forward", _forward_fake, lib=_library)
torch.library.register_fake("dlattn::backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "dlattn::forward", _autograd, setup_context=_setup_context, lib=_library
)
