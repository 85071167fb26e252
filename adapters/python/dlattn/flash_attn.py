"""The functions of the package flash-attn, by the plugin: people change one import.

    from dlattn.flash_attn import flash_attn_func

Names, arguments, layouts and return values are those of flash-attn 2; on the CPU they work as well,
and in every dtype that the plugin has. Causal rows and windows are aligned bottom right. All but
``flash_attn_with_kvcache`` differentiate. What differs: a row that sees no key has the log-sum-exp
-inf (as in flash-attn 3 and 4), ``deterministic`` is always so, ``num_splits`` is the plugin's to
choose, and rotary embeddings are not applied here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import InvalidArgument, Unsupported
from .torch import attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]


# ---- Padded: (batch, length, heads, head_dim)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Output like q; with ``return_attn_probs`` also the log-sum-exp ``(batch, heads, length)`` and
    None, where flash-attn has what only its tests read."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_axes(name, x, "batch", "length", "heads", "head_dim")
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if not return_attn_probs:
        return attention(query, key, value, **options).transpose(1, 2)
    output, lse = attention(query, key, value, **options, return_lse=True)
    return output.transpose(1, 2), lse, None


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_func`` of ``kv (batch, length, 2, heads, head_dim)``."""
    _check_axes("kv", kv, "batch", "length", 2, "heads", "head_dim")
    return flash_attn_func(q, *kv.unbind(2), *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_func`` of ``qkv (batch, length, 3, heads, head_dim)``."""
    _check_axes("qkv", qkv, "batch", "length", 3, "heads", "head_dim")
    return flash_attn_func(*qkv.unbind(2), *args, **kwargs)


# ---- Packed: (total, heads, head_dim)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """As ``flash_attn_func``; the log-sum-exp is ``(heads, total)``. With ``block_table`` k and v
    are ``(pages, page_size, heads, head_dim)``."""
    of_keys = ("total",) if block_table is None else ("pages", "page_size")
    for name, x, axes in (("q", q, ("total",)), ("k", k, of_keys), ("v", v, of_keys)):
        _check_axes(name, x, *axes, "heads", "head_dim")
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    if block_table is None:
        options |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
    else:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        options |= {"block_table": block_table, "key_lengths": cu_seqlens_k.diff()}
    if not return_attn_probs:
        return attention(q, k, v, **options)
    return *attention(q, k, v, **options, return_lse=True), None


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_varlen_func`` of ``kv (total, 2, heads, head_dim)``."""
    _check_axes("kv", kv, "total", 2, "heads", "head_dim")
    return flash_attn_varlen_func(q, *kv.unbind(1), *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Any:
    """``flash_attn_varlen_func`` of ``qkv (total, 3, heads, head_dim)``."""
    _check_axes("qkv", qkv, "total", 3, "heads", "head_dim")
    sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(*qkv.unbind(1), *sequences, *args, **kwargs)


# ---- With a cache


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Writes k and v, if given, into the caches behind the ``cache_seqlens`` keys that are there,
    and attends to all of them.

    k_cache, v_cache: ``(batch_cache, capacity, heads, head_dim)``, of which q has the rows
    ``cache_batch_idx``, or with ``block_table`` ``(pages, page_size, heads, head_dim)``.
    """
    if rotary_cos is not None or rotary_sin is not None:
        raise Unsupported(
            "rotary_cos, rotary_sin: are not supported; rotate q and k before the call"
        )
    if cache_leftpad is not None and (block_table is not None or cache_batch_idx is not None):
        raise Unsupported("cache_leftpad: cannot be combined with block_table or cache_batch_idx")
    if block_table is not None and cache_batch_idx is not None:
        raise InvalidArgument("cache_batch_idx: cannot be combined with block_table")
    if (k is None) != (v is None):
        raise InvalidArgument("k, v: must be given together")
    if k is not None and cache_seqlens is None:
        raise InvalidArgument("cache_seqlens: is None, must say where k and v go")
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check_axes(name, x, "batch", "length", "heads", "head_dim")
    if cache_batch_idx is not None:  # a row of the cache is one page
        block_table = cache_batch_idx[:, None]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = _lengths(cache_seqlens, capacity, q)
    if k is not None:
        _check_room(k, v, k_cache, v_cache, lengths, capacity)
        _append(k, k_cache, lengths, block_table)
        _append(v, v_cache, lengths, block_table)
        lengths = lengths + k.shape[1]
    options = _options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if cache_leftpad is not None:
        keys = torch.arange(capacity, device=q.device)
        options["mask"] = (keys >= cache_leftpad[:, None])[:, None, None]
    query, key, value = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    options |= {"key_lengths": lengths, "block_table": block_table}
    if not return_softmax_lse:
        return attention(query, key, value, **options).transpose(1, 2)
    output, lse = attention(query, key, value, **options, return_lse=True)
    return output.transpose(1, 2), lse


def _lengths(given: int | Tensor | None, capacity: int, q: Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given
    n = capacity if given is None else given
    return torch.full((q.shape[0],), n, dtype=torch.int32, device=q.device)


def _check_room(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, capacity: int
) -> None:
    """On a GPU, whose lengths are not read, PyTorch finds what lies outside."""
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        _check_axes(name, x, lengths.shape[0], k.shape[1], *cache.shape[2:])
    if lengths.device.type == "cpu" and lengths.numel() and lengths.max() + k.shape[1] > capacity:
        raise InvalidArgument(
            f"cache_seqlens: holds {lengths.max()}, which with {k.shape[1]} new keys is beyond the "
            f"{capacity} that the cache has room for"
        )


def _append(new: Tensor, cache: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Writes ``new (batch, length, ...)`` behind the first ``lengths`` of each batch."""
    position = lengths.long()[:, None] + torch.arange(new.shape[1], device=new.device)
    if block_table is None:
        page = torch.arange(new.shape[0], device=new.device)[:, None]
    else:
        page = block_table.long().gather(1, position // cache.shape[1])
        position = position % cache.shape[1]
    cache[page, position] = new.to(cache.dtype)


# ---- What all have in common


def _check_axes(name: str, x: Any, *axes: str | int) -> None:
    """Numbers among ``axes`` are extents."""
    if not isinstance(x, Tensor):
        raise InvalidArgument(f"{name}: is a {type(x).__qualname__}, must be a torch.Tensor")
    fits = x.dim() == len(axes)
    if not fits or any(isinstance(n, int) and n != x.shape[i] for i, n in enumerate(axes)):
        must = ", ".join(map(str, axes))
        raise InvalidArgument(f"{name}: shape is {list(x.shape)}, must be ({must})")


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """Those of ``dlattn.torch.attention``."""
    left, right = window_size
    return {
        "causal": causal,
        "alignment": "bottom_right",
        "scale": softmax_scale,
        "softcap": softcap,
        "window": (None if left < 0 else left, None if right < 0 else right),
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
    }
