"""Attention in PyTorch's own operators, for derivatives that the plugin does not compute.

``composite`` is differentiable in every mode and to any order, and holds all logits at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._options import visible_keys


class Tensors(NamedTuple):
    """The plugin's inputs, in the order of its slots; absent ones are None."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    block_mask: Tensor | None = None


DIFFERENTIABLE = ("query", "key", "value", "bias", "alibi_slopes", "sinks")


class Options(NamedTuple):
    """Everything else."""

    scale: float | None
    softcap: float
    window_left: int
    window_right: int
    causal: bool
    alignment: int
    max_seqlen_q: int
    max_seqlen_k: int
    block_q: int = 0  # of block_mask: rows and keys of a block
    block_k: int = 0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None  # int64, of no axes, on the CPU; None without dropout


class Logits(NamedTuple):
    """Of some query rows; each ``[B, H, rows, Lk]``, or broadcasts to it."""

    values: Tensor  # -inf where the key is not visible
    capped: Tensor  # before bias and slopes
    visible: Tensor
    distance: Tensor  # how far the key is from the row


def no_autocast(like: Tensor) -> torch.autocast:
    """Within it, products have the type of their factors."""
    return torch.autocast(like.device.type, enabled=False)


def widen(x: Tensor) -> Tensor:
    """To the type of the sums: float32, or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grouped(x: Tensor, heads_kv: int) -> Tensor:
    """[B, H, ...] -> [B, H_kv, H / H_kv, ...]."""
    return x.unflatten(1, (heads_kv, x.shape[1] // max(heads_kv, 1)))


def rows_of(x: Tensor, first: int, last: int) -> Tensor:
    """Rows [first, last) of a tensor that may be broadcast along them."""
    return x if x.shape[2] == 1 else x[:, :, first:last]


def logits_of(
    t: Tensors, options: Options, query: Tensor, key: Tensor, first: int, last: int
) -> Logits:
    """For rows [first, last), from these rows of the widened query and from the widened key."""
    heads_kv = key.shape[1]
    scale = query.shape[3] ** -0.5 if options.scale is None else options.scale
    capped = (grouped(query, heads_kv) @ key[:, :, None].mT * scale).flatten(1, 2)
    if options.softcap:
        capped = options.softcap * torch.tanh(capped / options.softcap)
    keys, device = key.shape[2], query.device
    row = torch.arange(first, last, device=device)[:, None]
    distance, visible = visible_keys(
        options, t, row, torch.arange(keys, device=device), t.query.shape[2], keys
    )
    values = capped
    if t.bias is not None:
        values = values + rows_of(t.bias, first, last)
    if t.alibi_slopes is not None:
        values = values - t.alibi_slopes.to(values.dtype)[..., None, None] * distance.abs()
    visible = visible & _seen(t, options, first, last)
    visible = visible & (values != -torch.inf)
    return Logits(torch.where(visible, values, -torch.inf), capped, visible, distance)


def _seen(t: Tensors, options: Options, first: int, last: int) -> Tensor:
    """Which keys rows [first, last) see by mask, block mask and segments."""
    seen = t.query.new_ones((1, 1, 1, 1), dtype=torch.bool)
    if t.mask is not None:
        seen = rows_of(t.mask, first, last) != 0
    if t.block_mask is not None:
        row = torch.arange(first, last, device=t.query.device)[:, None] // options.block_q
        key = torch.arange(t.key.shape[2], device=t.query.device) // options.block_k
        state = t.block_mask[:, :, row, key]
        seen = (state != 0) & (seen | (state == 2))
    if t.query_segments is not None:
        of_rows = t.query_segments[:, None, first:last, None]
        seen = seen & (of_rows == t.key_segments[:, None, None])
    return seen


def largest(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Of each row, what is taken out before exp, ``[B, H, rows, 1]``: 0 where nothing is seen."""
    floor = logits.new_full((*logits.shape[:3], 1), -torch.inf)
    if sinks is not None:
        floor = floor.maximum(sinks[:, None, None])
    if logits.shape[3]:
        floor = floor.maximum(logits.amax(3, keepdim=True))
    return torch.where(floor == -torch.inf, 0, floor)


def composite(t: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """(output, lse) of a call that is neither packed nor paged."""
    with no_autocast(t.query):
        query, key, value = widen(t.query), widen(t.key), widen(t.value)
        rows, heads_kv = query.shape[2], key.shape[1]
        # What is in keys that no row sees must reach no derivative: 0 * NaN would be NaN.
        _, _, visible, _ = logits_of(t, options, query, key, 0, rows)
        seen = visible.any(2).expand(query.shape[0], query.shape[1], -1)
        seen = grouped(seen, heads_kv).any(2)[..., None]
        key, value = torch.where(seen, key, 0), torch.where(seen, value, 0)
        logits, _, visible, _ = logits_of(t, options, query, key, 0, rows)
        peak = largest(logits.detach(), None if t.sinks is None else t.sinks.detach())
        weights = torch.where(visible, (logits - peak).exp(), 0)
        total = weights.sum(3, keepdim=True)
        if t.sinks is not None:
            total = total + (t.sinks[:, None, None] - peak).exp()
        is_empty = total == 0
        total = torch.where(is_empty, 1, total)
        output = (grouped(weights, heads_kv) @ value[:, :, None]).flatten(1, 2) / total
        lse = torch.where(is_empty, -torch.inf, total.log() + peak).squeeze(3)
        return in_order_of(t.query, output.to(t.query.dtype)), lse


def order_of(x: Tensor) -> list[int]:
    """The axes of a tensor, from that of the largest stride to that of the smallest."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def in_order_of(like: Tensor, x: Tensor) -> Tensor:
    """The same numbers in memory whose axes have the order of those of ``like``."""
    order = order_of(like)
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)
