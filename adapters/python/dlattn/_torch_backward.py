"""The backward pass in PyTorch's own operators, some query rows at a time: for calls of which the
plugin has no row but the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._torch_math import (
    DIFFERENTIABLE,
    Options,
    Tensors,
    grouped,
    largest,
    logits_of,
    no_autocast,
    rows_of,
    widen,
)

ROWS = 128  # query rows whose logits, [B, H, 128, Lk], are held at a time


def backward(
    d_output: Tensor, d_lse: Tensor, t: Tensors, options: Options, wanted: Sequence[str]
) -> tuple[Tensor | None, ...]:
    """The gradients of the differentiable tensors; None for one that is not wanted.

    As in FlashAttention (arXiv:2205.14135, algorithm 4), with P = softmax(S): dV = P^T dO,
    dS = P * (dO V^T - sum(P * dO V^T) + dlse), dQ = scale dS K, dK = scale dS^T Q; a softcap puts
    the derivative of its tanh before the scale. P is made from S alone: with a stored log-sum-exp,
    which is rounded, its rows would not sum to 1.

    What is not finite reaches what it is visible to and nothing else. As 0 * NaN is NaN, products
    over keys or rows take zeros in its place; where it is visible, P or dS is NaN already.
    """
    with no_autocast(t.query):
        return _backward(d_output, d_lse[..., None], t, options, wanted)


def _backward(
    d_output: Tensor, d_lse: Tensor, t: Tensors, options: Options, wanted: Sequence[str]
) -> tuple[Tensor | None, ...]:
    key, value = widen(t.key), widen(t.value)
    finite_key = _finite(key)
    rows, dim = t.query.shape[2:]
    heads_kv = key.shape[1]
    scale = dim**-0.5 if options.scale is None else options.scale
    sources = [getattr(t, name) if name in wanted else None for name in DIFFERENTIABLE]
    gradients = [x if x is None else torch.zeros_like(x, dtype=key.dtype) for x in sources]
    d_query, d_key, d_value, d_bias, d_slopes, d_sinks = gradients

    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        query, d_rows = (widen(x[:, :, first:last]) for x in (t.query, d_output))
        logits, capped, visible, distance = logits_of(t, options, query, key, first, last)
        peak = largest(logits, t.sinks)
        weights = (logits - peak).exp()
        total = weights.sum(3, keepdim=True)
        if t.sinks is not None:
            sink = (t.sinks[:, None, None] - peak).exp()
            total = total + sink
        p = torch.where(visible, weights / torch.where(total == 0, 1, total), 0)
        d_p = (grouped(d_rows, heads_kv) @ value[:, :, None].mT).flatten(1, 2)
        delta = torch.where(visible, p * d_p, 0).sum(3, keepdim=True)
        delta = delta - d_lse[:, :, first:last]
        d_logits = torch.where(visible, p * (d_p - delta), 0)
        if d_value is not None:
            p = torch.where(visible, p + (d_rows * 0).sum(3, keepdim=True), 0)  # NaN of dO
            d_value += (grouped(p, heads_kv).mT @ grouped(_finite(d_rows), heads_kv)).sum(2)
        if d_bias is not None:
            target = rows_of(d_bias, first, last)
            target += d_logits.sum_to_size(target.shape)
        if d_slopes is not None:
            d_slopes -= (d_logits * distance.abs()).sum((2, 3)).sum_to_size(d_slopes.shape)
        if d_sinks is not None:
            d_sinks -= (sink / total * delta).sum((0, 2, 3))
        if options.softcap:
            d_logits = torch.where(visible, d_logits * (1 - (capped / options.softcap) ** 2), 0)
        d_logits = grouped(d_logits * scale, heads_kv)
        if d_query is not None:
            d_query[:, :, first:last] = (d_logits @ finite_key[:, :, None]).flatten(1, 2)
        if d_key is not None:
            d_key += (d_logits.mT @ grouped(_finite(query), heads_kv)).sum(2)

    return tuple(x if x is None else g.to(x.dtype) for x, g in zip(sources, gradients))


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)
