"""ring-flash-attn (PyPI), whose kernels are those of flash-attn where that is installed, else
PyTorch's own FlashAttention 2.
"""

import importlib.util
import sys
import types

import torch


def functions():
    """By whether they are causal: (query, key, value, causal=...), all [B, L, H, D] -> output."""
    if importlib.util.find_spec("flash_attn") is None:
        module = types.ModuleType("flash_attn")
        module.flash_attn_interface = types.ModuleType("flash_attn.flash_attn_interface")
        module.flash_attn_interface.__dict__.update(
            _flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward
        )
        sys.modules["flash_attn"] = module
        sys.modules["flash_attn.flash_attn_interface"] = module.flash_attn_interface
    spec = importlib.util.find_spec("ring_flash_attn")
    if spec is None:
        raise ImportError("there is no ring_flash_attn")
    # The package itself imports transformers, which these two do not need.
    package = sys.modules["ring_flash_attn"] = types.ModuleType("ring_flash_attn")
    package.__path__ = list(spec.submodule_search_locations)
    from ring_flash_attn.ring_flash_attn import ring_flash_attn_func
    from ring_flash_attn.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func

    return {False: ring_flash_attn_func, True: zigzag_ring_flash_attn_func}


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    """Without options, as the timings have none."""
    output, lse, rng_state, _, _ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, causal, False),
        scale=softmax_scale,
    )
    return output, lse, None, rng_state


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
):
    """PyTorch's operator gives new tensors, which are copied to where they are wanted."""
    state = torch.zeros(2, device=q.device, dtype=torch.uint64)
    unused = torch.empty(0, device=q.device)
    found = torch.ops.aten._flash_attention_backward(
        *(dout, q, k, v, out, softmax_lse.contiguous(), None, None, q.shape[1], k.shape[1]),
        *(dropout_p, causal, state, unused),
        scale=softmax_scale,
    )
    for to, gradient in zip((dq, dk, dv), found):
        to.copy_(gradient)
