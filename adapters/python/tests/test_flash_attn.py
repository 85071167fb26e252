"""dlattn.flash_attn: flash-attn's layouts, arguments and return values against the reference."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dlattn import flash_attn  # noqa: E402
from reference import attention as reference  # noqa: E402

OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "window": ({"window_size": (3, 2)}, {"window": (3, 2)}),
    "window_left": ({"window_size": (3, -1)}, {"window": (3, None)}),
    "window_causal": ({"causal": True, "window_size": (3, 4)}, {"causal": True, "window": (3, 0)}),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "alibi": ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},) * 2,
    "alibi_batch": ({"alibi_slopes": torch.rand(2, 4)},) * 2,
}
by_option = pytest.mark.parametrize(("ours", "theirs"), OPTIONS.values(), ids=OPTIONS)


def make(rows=7, keys=9, heads_kv=2, requires_grad=False):
    torch.manual_seed(0)
    shapes = (2, rows, 4, 16), (2, keys, heads_kv, 16), (2, keys, heads_kv, 16)
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def expected(q, k, v, **options):
    """(batch, length, heads, head_dim) -> (output in that layout, lse)."""
    tensors = (x.detach().double().transpose(1, 2).numpy() for x in (q, k, v))
    options = {n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    output, lse = reference(*tensors, alignment="bottom_right", **options)
    return torch.from_numpy(output).transpose(1, 2), torch.from_numpy(lse)


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


@by_option
def test_padded(ours, theirs):
    q, k, v = make()
    output, lse = expected(q, k, v, **theirs)
    found = flash_attn.flash_attn_func(q, k, v, **ours, return_attn_probs=True)
    assert len(found) == 3 and found[2] is None
    assert found[0].is_contiguous() and found[1].dtype == torch.float32
    close(found[0], output)
    close(found[1], lse)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **ours), found[0])


def test_arguments_by_position():
    q, k, v = make()
    found = flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, True, (3, -1), 1.5, torch.ones(4), True)
    wanted = {"scale": 0.3, "causal": True, "window": (3, None), "softcap": 1.5}
    close(found, expected(q, k, v, **wanted, alibi_slopes=torch.ones(4))[0])


def test_more_rows_than_keys():
    """The first rows see no key."""
    q, k, v = make(rows=9, keys=4)
    found = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (found[0][:, :5] == 0).all() and (found[1][..., :5] == -torch.inf).all()
    close(found[0], expected(q, k, v, causal=True)[0])


def test_packed_arguments():
    q, k, v = make(keys=7, heads_kv=4)
    alone = flash_attn.flash_attn_func(q, k, v, causal=True)
    kv, qkv = torch.stack((k, v), 2), torch.stack((q, k, v), 2)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv, causal=True), alone)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), alone)


def test_gradient():
    """Of a packed argument, against PyTorch's own operators in double."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 3, 4, 16, requires_grad=True)
    flash_attn.flash_attn_qkvpacked_func(qkv, causal=True).square().sum().backward()
    found, exact = qkv.grad, qkv.detach().double().requires_grad_()
    q, k, v = exact.permute(2, 0, 3, 1, 4)
    torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True
    ).square().sum().backward()
    close(found, exact.grad, 2e-5)


LENGTHS_Q, LENGTHS_K = (3, 0, 5), (4, 2, 9)


def packed():
    """(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)"""
    torch.manual_seed(0)
    q, *kv = (torch.randn(n, h, 16) for n, h in ((8, 4), (15, 2), (15, 2)))
    starts = [torch.tensor(np.cumsum((0, *x)), dtype=torch.int32) for x in (LENGTHS_Q, LENGTHS_K)]
    return q, *kv, *starts, 5, 9


@by_option
def test_varlen(ours, theirs):
    if ours.get("alibi_slopes", torch.zeros(1)).dim() == 2:
        ours = theirs = {"alibi_slopes": torch.rand(3, 4)}
    q, k, v, starts_q, starts_k, *_ = packed()
    arguments = packed()
    output, lse, _ = flash_attn.flash_attn_varlen_func(*arguments, **ours, return_attn_probs=True)
    assert output.shape == q.shape and lse.shape == (4, 8)
    for i in range(3):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        of_one = dict(theirs)
        if "alibi_slopes" in of_one and of_one["alibi_slopes"].dim() == 2:
            of_one["alibi_slopes"] = of_one["alibi_slopes"][i : i + 1]
        wanted = expected(q[None, rows], k[None, keys], v[None, keys], **of_one)
        close(output[None, rows], wanted[0])
        close(lse[None, :, rows], wanted[1])


def test_varlen_packed_arguments_and_gradient():
    q, _, _, starts, _, longest, _ = packed()
    qkv = torch.stack((q, q + 1, q - 1), 1).requires_grad_()
    found = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, causal=True)
    kv = qkv[:, 1:]
    again = flash_attn.flash_attn_varlen_kvpacked_func(
        qkv[:, 0], kv, starts, starts, longest, longest, causal=True
    )
    assert torch.equal(found, again)
    found.square().sum().backward()
    alone = qkv.detach()[starts[2] :].clone().requires_grad_()  # the last sequence
    flash_attn.flash_attn_qkvpacked_func(alone[None], causal=True).square().sum().backward()
    close(qkv.grad[starts[2] :], alone.grad.double())


def test_varlen_pages():
    q, k, v, starts_q, starts_k, *longest = packed()
    table = torch.tensor([[5, 0, 1], [2, 0, 0], [4, 1, 3]], dtype=torch.int32)
    pages = [torch.full((6, 4, 2, 16), torch.nan) for _ in range(2)]
    for i in range(3):
        for x, cache in zip((k, v), pages):
            of_one = x[starts_k[i] : starts_k[i + 1]]
            for at in range(of_one.shape[0]):
                cache[table[i, at // 4], at % 4] = of_one[at]
    found = flash_attn.flash_attn_varlen_func(
        q, *pages, starts_q, starts_k, *longest, causal=True, block_table=table
    )
    close(found, flash_attn.flash_attn_varlen_func(*packed(), causal=True).double())


@pytest.mark.parametrize("kind", ["rows", "chosen", "pages"])
@pytest.mark.parametrize("rows", [1, 3])
def test_cache(kind, rows):
    """New keys go behind those that are there, and all of them are seen."""
    torch.manual_seed(0)
    q, k, v = make(rows=rows, keys=rows)
    lengths = torch.tensor([5, 8], dtype=torch.int32)
    dense = [torch.randn(2, 12, 2, 16) for _ in range(2)]
    how = {"cache_seqlens": lengths, "causal": True, "window_size": (6, -1)}
    if kind == "rows":
        caches = [x.clone() for x in dense]
    elif kind == "chosen":
        caches = [torch.randn(5, 12, 2, 16).index_copy(0, torch.tensor([3, 1]), x) for x in dense]
        how["cache_batch_idx"] = torch.tensor([3, 1], dtype=torch.int32)
    else:
        table = torch.tensor([[4, 0, 7], [2, 6, 1]], dtype=torch.int32)
        caches = [torch.randn(9, 4, 2, 16) for _ in range(2)]
        for x, cache in zip(dense, caches):
            cache[table.long()] = x.unflatten(1, (3, 4))
        how["block_table"] = table
    output, lse = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, **how, return_softmax_lse=True
    )
    for i, n in enumerate((5, 8)):
        key, value = (
            torch.cat((x[i : i + 1, :n], new[i : i + 1]), 1) for x, new in zip(dense, (k, v))
        )
        wanted = expected(q[i : i + 1], key, value, causal=True, window=(6, None))
        close(output[i : i + 1], wanted[0])
        close(lse[i : i + 1], wanted[1])
    if kind == "rows":
        assert torch.equal(caches[0][1, 8 : 8 + rows], k[1]), "the cache was not written"
        assert torch.equal(caches[0][0, 5 + rows :], dense[0][0, 5 + rows :])


def test_cache_without_lengths_and_with_padding_on_the_left():
    q, k, v = make()
    close(flash_attn.flash_attn_with_kvcache(q, k, v), expected(q, k, v)[0])
    close(
        flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=6),
        expected(q, k[:, :6], v[:, :6])[0],
    )
    pads = torch.tensor([2, 0], dtype=torch.int32)
    found = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=9, cache_leftpad=pads)
    close(found[:1], expected(q[:1], k[:1, 2:], v[:1, 2:])[0])


def test_refusals():
    q, k, v = make()
    lengths = torch.tensor([5, 8], dtype=torch.int32)
    with pytest.raises(
        NotImplementedError, match="rotary_cos, rotary_sin: are not supported; rotate"
    ):
        flash_attn.flash_attn_with_kvcache(q, k, v, rotary_cos=q)
    with pytest.raises(ValueError, match=r"q: shape is \[7, 4, 16\], must be \(batch, length, hea"):
        flash_attn.flash_attn_func(q[0], k, v)
    with pytest.raises(ValueError, match=r"qkv: shape is .*must be \(batch, length, 3, heads"):
        flash_attn.flash_attn_qkvpacked_func(torch.zeros(2, 7, 2, 4, 16))
    with pytest.raises(
        ValueError, match="key: has 9 heads, must divide the query's 7"
    ):  # (batch, heads, length, head_dim)
        flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in make()))
    with pytest.raises(
        ValueError, match="cache_seqlens: holds 8, which with 2 new keys is beyond t"
    ):
        before = k.clone()
        flash_attn.flash_attn_with_kvcache(
            q[:, :2], k, v, k[:, :2].clone(), v[:, :2].clone(), cache_seqlens=lengths
        )
    assert torch.equal(k, before), "a refused call has written"
    with pytest.raises(ValueError, match=r"k: shape is .*must be"):
        flash_attn.flash_attn_with_kvcache(q, k, v, k[:, :2, :1], v[:, :2], cache_seqlens=lengths)
    with pytest.raises(TypeError, match="unexpected keyword argument 'q_descale'"):
        flash_attn.flash_attn_func(q, k, v, q_descale=1.0)
