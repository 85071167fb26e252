"""``attn_implementation="dlattn"`` for Hugging Face's transformers, once this module is imported.

    import dlattn.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dlattn")

Grouped-query heads, softcap, sinks, position bias, sliding windows and right padding are the
kernel's own: no tensor of the size of the logits is made for them. Left padding, blocks of
documents and masks of the caller's are boolean masks, and so is every mask that is made while a
program is traced, where lengths cannot be read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, __version__
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from . import InvalidArgument
from .torch import attention

__all__ = ["attention_forward", "attention_mask"]

if "q_offset" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(
        f"dlattn.transformers: found transformers {__version__}, whose mask functions have no "
        "q_offset; needed is one that has it, as 5.23 does"
    )


# ---- Masks
#
# What transformers calls a mask is one of three things here: None, a bool [B, 1, Lq, Lk], or a
# band, which is int64 [B, 1, 1, 4] on the CPU: for each batch how far a row sees to the left and to
# the right of its diagonal (-1: all), where the diagonal of row 0 is, and how many keys there are.
# A band says all by itself, because not every model that has a window hands it to its attention; on
# another device it would be right, too. It has four axes: a mask of two is taken for padding.

_UNBOUNDED = -1


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **rest: Any,
) -> Tensor | None:
    """The mask function of ``"dlattn"``: a band where one says it all, else what sdpa gets."""
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    sides = _sides(mask_function, local_size) if may_skip else None
    is_read = not any(isinstance(x, Tensor) and is_tracing(x) for x in (attention_mask, q_offset))
    if sides is not None and is_read and not torch.compiler.is_compiling():
        offset = int(q_offset) - kv_offset
        end = offset + q_length
        seen = min(end, kv_length) if sides[1] == 0 else kv_length
        lengths = _lengths(attention_mask, batch_size, seen, kv_length, kv_offset)
        is_aligned = offset == 0 or all(n == end for n in lengths or ())
        if lengths is not None and is_aligned:
            return _band(sides, offset, lengths, q_length, kv_length)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **rest,
    )


def _band(
    sides: tuple[int, int], offset: int, lengths: list[int], q_length: int, kv_length: int
) -> Tensor | None:
    """None where ``is_causal`` of the model's attention says the same."""
    is_whole = sides[0] == _UNBOUNDED and all(n == kv_length for n in lengths)
    if is_whole and (sides[1] == _UNBOUNDED or q_length == 1 or offset == 0):
        return None
    return torch.tensor([[[[*sides, offset, n]]] for n in lengths], dtype=torch.int64)


def _sides(mask_function: Any, local_size: int | None) -> tuple[int, int] | None:
    """How far rows see to the left and to the right; None if not only the distance decides."""
    if mask_function is causal_mask_function:
        return _UNBOUNDED, 0
    if mask_function is bidirectional_mask_function:
        return _UNBOUNDED, _UNBOUNDED
    if local_size is not None:
        # One that joins two: of chunks, which have a local_size as well, or of a window.
        names = {f.__qualname__.partition(".")[0] for f in _joined(mask_function)}
        if names == {"sliding_window_overlay", "causal_mask_function"}:
            return local_size - 1, 0
        if names == {"sliding_window_bidirectional_overlay", "bidirectional_mask_function"}:
            return local_size, local_size
    return None


def _joined(mask_function: Any) -> tuple[Any, ...]:
    """The functions whose intersection ``mask_function`` is."""
    is_intersection = mask_function.__qualname__ == "and_masks.<locals>.and_mask"
    if not is_intersection:
        return ()
    return inspect.getclosurevars(mask_function).nonlocals["mask_functions"]


def _lengths(
    padding: Tensor | None, batch_size: int, seen: int, kv_length: int, kv_offset: int
) -> list[int] | None:
    """How many keys each batch has, of ``seen``; None if some that are absent precede others."""
    if padding is None:
        return [seen] * batch_size
    there = prepare_padding_mask(padding, kv_length, kv_offset)[:, kv_offset:][:, :seen]
    lengths = there.sum(1)
    is_prefix = (there[:, 1:] <= there[:, :-1]).all().expand(1)
    *lengths, is_prefix = torch.cat((lengths, is_prefix)).tolist()  # waits for a GPU once
    return lengths if is_prefix else None


# ---- Attention


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool = False,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention function of ``"dlattn"``: ``[B, H, L, D]`` in, ``[B, L, H, D]`` out.

    A window among ``rest`` is in the mask already.
    """
    if output_attentions:
        raise InvalidArgument('output_attentions: "dlattn" makes no weights; "eager" does')
    if cache is not None:
        raise InvalidArgument('cache: "dlattn" has no paged implementation; "paged|sdpa" is one')
    options: dict[str, Any] = {"bias": position_bias}
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        options["causal"] = query.shape[2] > 1 and causal
    elif attention_mask.dtype == torch.int64:
        options |= _of_band(attention_mask.flatten(1).tolist(), key)
    elif attention_mask.dtype == torch.bool:
        options["mask"] = attention_mask
    else:
        options["bias"] = (
            attention_mask if position_bias is None else attention_mask + position_bias
        )
    output = attention(
        query,
        key,
        value,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
        **options,
    )
    return output.transpose(1, 2).contiguous(), None


def _of_band(band: list[list[int]], key: Tensor) -> dict[str, Any]:
    """The options that say what a band says."""
    left, right, offset, _ = band[0]
    lengths = tuple(row[3] for row in band)
    options: dict[str, Any] = {"causal": right == 0}
    if offset:
        options["alignment"] = "bottom_right"
    if left != _UNBOUNDED or right > 0:
        options["window"] = (None if left < 0 else left, None if right < 0 else right)
    if any(n != key.shape[2] for n in lengths):
        options["key_lengths"] = _on_device(lengths, key.device)
    return options


@functools.lru_cache(maxsize=8)
def _on_device(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """All layers of a step have the same."""
    return torch.tensor(lengths, dtype=torch.int32, device=device)


AttentionInterface.register("dlattn", attention_forward)
AttentionMaskInterface.register("dlattn", attention_mask)
