"""``attention_fn`` for flax's attention layers, of nnx and of linen.

layer = nnx.MultiHeadAttention(8, 512, attention_fn=dlattn.flax.dot_product_attention, ...)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from . import Unsupported
from .jax import dot_product_attention as _attention

__all__ = ["dot_product_attention"]


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Any = None,
    is_causal: bool = False,
) -> Array:
    """``flax.nnx.dot_product_attention`` by the plugin: ``[..., L, H, D]`` with any axes in front.

    Not there: dropout of weights, and weights themselves, which a ``module`` is given to keep.
    """
    if dropout_rate and not deterministic:
        raise Unsupported("dropout_rate: dlattn.jax has no dropout; set it to 0 or deterministic")
    if module is not None:
        raise Unsupported("module: dlattn makes no attention weights to keep in one")
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    if mask is not None:
        mask = mask != 0  # flax makes masks of floats
    leading = query.shape[:-3]
    if len(leading) != 1:
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        bias, mask = (_with_one_batch_axis(x, leading) for x in (bias, mask))
    output = _attention(query, key, value, bias=bias, mask=mask, is_causal=is_causal)
    return output.reshape(*leading, *output.shape[-3:])


def _with_one_batch_axis(x: Array | None, leading: tuple[int, ...]) -> Array | None:
    """Of a bias or mask ``[..., H, Lq, Lk]``, whose axes in front broadcast."""
    if x is None or x.ndim <= 3:
        return x
    return jnp.broadcast_to(x, (*leading, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
