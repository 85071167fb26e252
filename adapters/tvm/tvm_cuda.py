"""libdlattn_tvm.so on a GPU with torch tensors, against torch's own attention in float32.

    python3 adapters/tvm/tvm_cuda.py

needs torch, apache-tvm-ffi and the environment variables DLATTN_LIBRARY (libdlattn.so.1) and
DLATTN_TVM_LIBRARY (libdlattn_tvm.so). Prints a line for each test and fails with the first that
does.
"""

import os

import torch
import tvm_ffi
from torch.nn.functional import scaled_dot_product_attention as sdpa

dlattn = tvm_ffi.load_module(os.environ["DLATTN_TVM_LIBRARY"])
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def problem(dtype=torch.float16, heads=8, kv_heads=2, rows=129, keys=257, dim=64):
    def random(heads, length):
        return torch.randn(2, heads, length, dim, device="cuda").to(dtype)

    return random(heads, rows), random(kv_heads, keys), random(kv_heads, keys)


def reference(query, key, value, causal=False, mask=None):
    return sdpa(
        query.float(), key.float(), value.float(), attn_mask=mask, is_causal=causal, enable_gqa=True
    )


def check(output, expected):
    difference = (output.float() - expected).abs().max().item()
    assert difference <= TOLERANCE[output.dtype], f"differs by {difference}"


def refuses(error, message, *arguments):
    try:
        dlattn.dlattn_forward(*arguments)
    except error as raised:
        assert message in str(raised), raised
    else:
        raise AssertionError(f"{message}: was not refused")


def test_types_and_head_dims():
    for dtype in TOLERANCE:
        for dim in (64, 128):
            for causal in (False, True):
                query, key, value = problem(dtype, dim=dim)
                output, lse = torch.empty_like(query), query.new_empty(2, 8, 129).float()
                dlattn.dlattn_forward(query, key, value, "causal", causal, output, lse)
                check(output, reference(query, key, value, causal))
                logits = query.float() @ key.float().repeat_interleave(4, 1).mT / dim**0.5
                if causal:
                    visible = torch.ones(129, 257, dtype=torch.bool, device="cuda").tril()
                    logits = logits.masked_fill(~visible, -torch.inf)
                torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-4)


def test_views():
    """[B, L, H, D] in memory, and an output inside a larger tensor."""
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem())
    wide = torch.full((2, 129, 16, 64), 7, dtype=torch.float16, device="cuda")
    output = wide[:, :, ::2].transpose(1, 2)
    dlattn.dlattn_forward(query, key, value, output)
    check(output, reference(query, key, value))
    assert (wide[:, :, 1::2] == 7).all()


def test_optional_tensors():
    query, key, value = problem()
    output = torch.empty_like(query)
    lengths = torch.tensor([200, 3], dtype=torch.int32, device="cuda")
    dlattn.dlattn_forward(query, key, value, "key_lengths", lengths, output)
    mask = torch.arange(257, device="cuda") < lengths[:, None, None, None]
    check(output, reference(query, key, value, mask=mask))
    dlattn.dlattn_forward(query, key, value, "mask", mask.contiguous(), output)
    check(output, reference(query, key, value, mask=mask))


def test_stream_of_torch():
    """On a side stream the call waits for what torch put there, and torch for the call."""
    side = torch.cuda.Stream()
    late, key, value = problem()
    query, output = torch.zeros_like(late), torch.empty_like(late)
    expected = reference(late, key, value)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        query.copy_(late)
        dlattn.dlattn_forward(query, key, value, output)
        copy = output.clone()
    side.synchronize()
    check(copy, expected)


def test_stream_argument():
    """The same with the stream named, from outside of torch's context."""
    side = torch.cuda.Stream()
    late, key, value = problem()
    query, output = torch.zeros_like(late), torch.empty_like(late)
    expected = reference(late, key, value)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        query.copy_(late)
    dlattn.dlattn_forward(query, key, value, "stream", side.cuda_stream, output)
    side.synchronize()
    check(output, expected)


def test_graph():
    """Captured once and replayed on other numbers."""
    query, key, value = problem()
    output = torch.empty_like(query)
    dlattn.dlattn_forward(query, key, value, output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dlattn.dlattn_forward(query, key, value, output)
    query.normal_()
    output.zero_()
    graph.replay()
    check(output, reference(query, key, value))


def test_refusals():
    query, key, value = problem()
    output = torch.full_like(query, 5)
    refuses(ValueError, "value: axis 0", query, key, value[:1], output)
    refuses(ValueError, "key", query, key.cpu(), value, output)
    refuses(ValueError, "no row", query, key, value, "kernel", "none such", output)
    torch.cuda.synchronize()
    assert (output == 5).all()


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            torch.cuda.synchronize()
            print("ok  ", name, flush=True)
