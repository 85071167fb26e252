"""The backward pass of dlattn.jax in JAX's operators: some query rows at a time, from the inputs
alone; for calls of which the plugin has no row but the reference, and for second order.

The softmax of every row is computed anew from its logits, and not from the log-sum-exp of the
forward pass, whose rounding at large logits would be a factor in every weight. What a row does not
see reaches none of its gradients, whatever it holds: neither NaN nor infinity is ever multiplied
by the 0 of an invisible key.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._jax_call import Options, Tensors, wide_type
from ._options import visible_keys

BACKWARD_ROWS = 128  # query rows whose logits, [B, H, 128, Lk], are held at a time

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class _Rows(NamedTuple):
    """What belongs to some query rows, [B, H, rows, ...]."""

    first: jax.Array
    query: jax.Array
    d_output: jax.Array
    d_lse: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None


class _Sums(NamedTuple):
    """Gradients of what all rows share."""

    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None


class _Softmax(NamedTuple):
    """Some rows of it, [B, H, rows, Lk], and what its derivative needs."""

    weights: jax.Array  # 0 where a key is not visible
    sink_weights: jax.Array | None  # [B, H, rows]
    visible: jax.Array
    distance: jax.Array  # how far key j is from row i
    slope: jax.Array | float  # of the logits, by the product of query and key


def gradients(options: Options, tensors: Tensors, d_output: jax.Array, d_lse: jax.Array) -> Tensors:
    """The gradient of each tensor that has one.

    With P the softmax of S and delta = sum(P * dO V^T) - dlse: dV = P^T dO,
    dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q (FlashAttention, arXiv:2205.14135,
    algorithm 4); a softcap puts the derivative of its tanh before the scale.
    """
    if tensors.query.size == 0:
        return Tensors(*(_zeros(x) for x in tensors))
    wide = wide_type(tensors.query)
    query, key, value, d_output = (
        _heads_first(x.astype(wide), options) for x in (*tensors[:3], d_output)
    )
    d_lse = _heads_first(d_lse, options)
    rows = query.shape[2]
    chunk = min(rows, BACKWARD_ROWS)
    bias, mask = tensors.bias, tensors.mask
    bias_has_rows = bias is not None and bias.shape[2] > 1
    mask_has_rows = mask is not None and mask.shape[2] > 1
    every_row = Tensors(query, key, value, bias, mask, *tensors[5:])

    def step(sums: _Sums, part: _Rows) -> Any:
        if bias is not None and not bias_has_rows:
            part = part._replace(bias=bias)
        if mask is not None and not mask_has_rows:
            part = part._replace(mask=mask)
        added, d_query, d_bias = _chunk_gradients(options, every_row, part)
        if bias_has_rows:
            added = added._replace(bias=None)
        return jax.tree.map(jnp.add, sums, added), (d_query, d_bias if bias_has_rows else None)

    shared = _Sums(key, value, None if bias_has_rows else bias, tensors.alibi_slopes, tensors.sinks)
    sums = jax.tree.map(lambda x: jnp.zeros_like(x, wide), shared)
    parts = _Rows(
        jnp.arange(0, rows, chunk),
        *(_split(x, chunk) for x in (query, d_output, d_lse)),
        _split(bias, chunk) if bias_has_rows else None,
        _split(mask, chunk) if mask_has_rows else None,
    )
    sums, (d_query, d_bias) = lax.scan(step, sums, parts)
    d_bias = _join(d_bias, rows) if bias_has_rows else sums.bias
    main = (_heads_first(x, options) for x in (_join(d_query, rows), sums.key, sums.value))
    found = (*main, d_bias, None, sums.alibi_slopes, sums.sinks)
    return Tensors(*(g if g is None else g.astype(x.dtype) for g, x in zip(found, tensors)))


def _chunk_gradients(
    options: Options, tensors: Tensors, part: _Rows
) -> tuple[_Sums, jax.Array, jax.Array | None]:
    """What some rows add to the sums, their part of dQ, and of dB."""
    query, key, value = part.query, tensors.key, tensors.value
    heads_kv = key.shape[1]
    grouped = functools.partial(_grouped, heads_kv=heads_kv)
    softmax = _softmax(options, tensors, part)
    visible, weights = softmax.visible, softmax.weights
    d_weights = _einsum("bkgqd,bksd->bkgqs", grouped(part.d_output), value).reshape(weights.shape)
    delta = jnp.sum(jnp.where(visible, weights * d_weights, 0), axis=3) - part.d_lse
    d_logits = jnp.where(visible, weights * (d_weights - delta[..., None]), 0)
    d_products = grouped(jnp.where(visible, d_logits * softmax.slope, 0))

    # A row whose dO is not finite spoils the values that it sees.
    spoiled = visible & ~jnp.isfinite(part.d_output).all(axis=3, keepdims=True)
    weights = grouped(jnp.where(spoiled, jnp.nan, weights))
    d_bias = d_slopes = d_sinks = None
    if part.bias is not None:
        d_bias = _sum_to(d_logits, part.bias.shape)
    if tensors.alibi_slopes is not None:
        by_head = -jnp.sum(d_logits * jnp.abs(softmax.distance), axis=(2, 3))
        d_slopes = _sum_to(by_head, tensors.alibi_slopes.shape)
    if tensors.sinks is not None:
        sink_weights = softmax.sink_weights
        d_sinks = -jnp.sum(jnp.where(sink_weights != 0, sink_weights * delta, 0), axis=(0, 2))
    sums = _Sums(
        _einsum("bkgqs,bkgqd->bksd", d_products, grouped(_finite(query))),
        _einsum("bkgqs,bkgqd->bksd", weights, grouped(_finite(part.d_output))),
        d_bias,
        d_slopes,
        d_sinks,
    )
    d_query = _einsum("bkgqs,bksd->bkgqd", d_products, _finite(key)).reshape(query.shape)
    return sums, d_query, d_bias


def _softmax(options: Options, tensors: Tensors, part: _Rows) -> _Softmax:
    key, sinks = tensors.key, tensors.sinks
    batch, heads, chunk, dim = part.query.shape
    slope = scale = dim**-0.5 if options.scale is None else options.scale
    products = _einsum("bkgqd,bksd->bkgqs", _grouped(part.query, key.shape[1]), key)
    logits = scale * products.reshape(batch, heads, chunk, key.shape[2])
    if options.softcap:
        capped = jnp.tanh(logits / options.softcap)
        logits, slope = options.softcap * capped, scale * (1 - capped**2)
    distance, visible = visible_from(
        options, tensors, part.first, chunk, tensors.query.shape[2], key.shape[2]
    )
    if tensors.query_segments is not None:
        rows = part.first + jnp.arange(chunk)
        here = jnp.take(tensors.query_segments, rows, axis=1, mode="clip")
        visible = visible & (here[:, None, :, None] == tensors.key_segments[:, None, None])
    if part.bias is not None:
        logits = logits + part.bias
    if tensors.alibi_slopes is not None:
        logits = logits - tensors.alibi_slopes[..., None, None] * jnp.abs(distance)
    if part.mask is not None:
        visible = visible & (part.mask != 0)
    visible = visible & (logits != -jnp.inf)
    logits = jnp.where(visible, logits, -jnp.inf)
    most = jnp.max(logits, axis=3, keepdims=True, initial=-jnp.inf)
    if sinks is not None:
        sinks = sinks[:, None, None]
        most = jnp.maximum(most, sinks)
    most = lax.stop_gradient(jnp.where(most == -jnp.inf, 0, most))
    weights = jnp.where(visible, jnp.exp(logits - most), 0)
    total = jnp.sum(weights, axis=3, keepdims=True)
    sink_weights = None
    if sinks is not None:
        sink_weights = jnp.exp(sinks - most)
        total = total + sink_weights
        sink_weights = jnp.where(total == 0, 0, sink_weights / total)[..., 0]
    # Zero again, as 0 divided by a total of NaN is not.
    weights = jnp.where(visible, weights / jnp.where(total == 0, 1, total), 0)
    return _Softmax(weights, sink_weights, visible, distance, slope)


def visible_from(
    options: Options, tensors: Tensors, first: Any, chunk: int, rows: int, keys: int
) -> tuple[jax.Array, jax.Array]:
    """``visible_keys`` for rows [first, first + chunk)."""
    row = (first + jnp.arange(chunk))[None, None, :, None]
    key = jnp.arange(keys)[None, None, None]
    return visible_keys(options, tensors, row, key, rows, keys, options.diagonal_offset)


def _finite(x: jax.Array) -> jax.Array:
    """NaN and infinity as 0: where one of them counts, the other factor is NaN already."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _zeros(x: jax.Array | None) -> jax.Array | None:
    return jnp.zeros_like(x) if x is not None and jnp.issubdtype(x.dtype, jnp.floating) else None


def _grouped(x: jax.Array, heads_kv: int) -> jax.Array:
    """[B, H, ...] -> [B, H_kv, H / H_kv, ...]."""
    return x.reshape(x.shape[0], heads_kv, x.shape[1] // heads_kv, *x.shape[2:])


def _heads_first(x: jax.Array, options: Options) -> jax.Array:
    """[B, L, H, ...] <-> [B, H, L, ...], where the caller has heads second."""
    return x.swapaxes(1, 2) if options.heads_axis == 2 else x


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, H, rows, ...] -> [chunks, B, H, chunk, ...], the last chunk padded with zeros."""
    count = -(-x.shape[2] // chunk)
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, count * chunk - x.shape[2])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:2], count, chunk, *x.shape[3:]), 2, 0)


def _join(x: jax.Array, rows: int) -> jax.Array:
    """The inverse of _split."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])[:, :, :rows]


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the axes that were broadcast from ``shape``."""
    x = jnp.sum(x, axis=tuple(range(x.ndim - len(shape))))
    return jnp.sum(x, axis=tuple(i for i, n in enumerate(shape) if n != x.shape[i]), keepdims=True)
