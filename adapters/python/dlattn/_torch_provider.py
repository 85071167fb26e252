"""PyTorch's own ``scaled_dot_product_attention`` by the plugin: as one of its flash attention
implementations, or, for a PyTorch that has no such list, in its module for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._errors import InvalidArgument, Unsupported

NAME = "DLATTN"
# With a gradient or without (Autograd), and in inference mode.
KEYS = ("AutogradCPU", "AutogradCUDA", "CPU", "CUDA")
MAX_HEAD_DIM_CUDA = 256  # a program that is compiled asks no kernel whether it can


def register(attention: Callable[..., Tensor]) -> None:
    """Where PyTorch has a list of implementations, ``attention`` is one of them: a function like
    ``scaled_dot_product_attention``, which raises where it cannot."""
    if hasattr(torch.nn.attention, "register_flash_attention_impl"):
        torch.nn.attention.register_flash_attention_impl(
            NAME, register_fn=lambda: _Handle(attention)
        )


class _Handle:
    """What lasts until ``restore_flash_attention_impl``.

    It stands before the operator that chooses among PyTorch's kernels, and so takes masks, bias and
    what else its flash kernels leave out.
    """

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        operator = torch.ops.aten.scaled_dot_product_attention.default
        chosen = _with_fallback(attention, operator.decompose)
        self._library = torch.library.Library("aten", "IMPL")
        for key in KEYS:
            self._library.impl("scaled_dot_product_attention", chosen, key)

    def remove(self) -> None:
        self._library._destroy()


@contextlib.contextmanager
def patched(attention: Callable[..., Tensor]) -> Iterator[None]:
    theirs = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _with_fallback(attention, theirs)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = theirs


def _with_fallback(
    attention: Callable[..., Tensor], theirs: Callable[..., Tensor]
) -> Callable[..., Tensor]:
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
        given = (query, key, value, attn_mask, dropout_p, is_causal)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        if _is_for_us(query, value, dropout_p):
            try:
                return attention(*given, **options)
            except (InvalidArgument, Unsupported):
                pass  # theirs may be able to, or says in its own words why not
        return theirs(*given, **options)

    return scaled_dot_product_attention


def _is_for_us(query: Tensor, value: Tensor, dropout_p: float) -> bool:
    """Dropout stays theirs, whose random numbers come from the device's generator, and so do
    transforms of torch.func, which have been resolved where an implementation is called."""
    if dropout_p or not torch._C._get_flash_sdp_enabled():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    is_small = max(query.shape[-1], value.shape[-1]) <= MAX_HEAD_DIM_CUDA
    return query.device.type == "cpu" or (query.device.type == "cuda" and is_small)
