"""Attention in float64 NumPy, one line for each rule of dlattn.h: what the tests compare with."""

from __future__ import annotations

import numpy as np


def attention(
    query,
    key,
    value,
    *,
    causal=False,
    alignment="top_left",
    scale=None,
    softcap=0.0,
    window=(None, None),
    bias=0.0,
    mask=True,
    alibi_slopes=None,
    sinks=None,
    query_lengths=None,
    key_lengths=None,
):
    """[B, H, Lq, D], [B, H_kv, Lk, D], [B, H_kv, Lk, D_v] -> output, lse."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, heads, rows, dim = query.shape
    group, keys = heads // key.shape[1], key.shape[2]
    key, value = key.repeat(group, 1), value.repeat(group, 1)
    query_lengths = np.full(batch, rows) if query_lengths is None else np.asarray(query_lengths)
    key_lengths = np.full(batch, keys) if key_lengths is None else np.asarray(key_lengths)

    logits = query @ key.swapaxes(2, 3) * (1 / np.sqrt(dim) if scale is None else scale)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    # How far key j is from row i, [B, 1, Lq, Lk]; each batch has a bottom right of its own.
    offset = key_lengths - query_lengths if alignment == "bottom_right" else np.zeros(batch, int)
    distance = np.arange(keys) - np.arange(rows)[:, None] - offset[:, None, None, None]
    logits = logits + np.asarray(bias, np.float64)
    if alibi_slopes is not None:
        logits = logits - np.asarray(alibi_slopes, np.float64)[..., None, None] * abs(distance)
    left, right = window
    visible = np.broadcast_to(mask, logits.shape) & (
        np.arange(keys) < key_lengths[:, None, None, None]
    )
    visible = visible & (np.arange(rows)[:, None] < query_lengths[:, None, None, None])
    visible = visible & (distance <= 0 if causal else True)
    visible = visible & (distance >= -left if left is not None else True)
    visible = visible & (distance <= right if right is not None else True)

    logits = np.where(visible, logits, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(
            np.asarray(sinks, np.float64)[:, None, None], (batch, heads, rows, 1)
        )
        absent = np.arange(rows)[:, None] >= query_lengths[:, None, None, None]
        logits = np.concatenate([logits, np.where(absent, -np.inf, sink)], axis=3)
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.maximum(logits.max(axis=3, keepdims=True, initial=-np.inf), -1e300)
        weights = np.exp(logits - largest)
        total = weights.sum(axis=3, keepdims=True)
        output = weights[..., :keys] @ value / np.where(total == 0, 1, total)
        lse = np.log(total[..., 0]) + largest[..., 0]
    return output, lse
