"""PyTorch's scaled_dot_product_attention, run by the plugin: the "DLATTN" of its flash attention
implementations, and dlattn.torch.patch()."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import dlattn.torch  # noqa: E402
from dlattn import _torch_provider  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

HAS_LIST = hasattr(torch.nn.attention, "activate_flash_attention_impl")


@contextlib.contextmanager
def activated():
    torch.nn.attention.activate_flash_attention_impl("DLATTN")
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


by_both = pytest.mark.parametrize(
    "switch",
    [
        pytest.param(activated, marks=pytest.mark.skipif(not HAS_LIST, reason="PyTorch is older")),
        dlattn.torch.patch,
    ],
    ids=["impl", "patch"],
)


@pytest.fixture
def calls(monkeypatch):
    """Names of what the plugin was called for: ``forward`` at once, or as an operator."""
    made = []
    for name in ("forward", "plain"):
        original = getattr(dlattn.torch._core, name)

        def spy(*args, name=name, original=original, **kwargs):
            result = original(*args, **kwargs)
            if result is not None or name == "forward":
                made.append(name)
            return result

        monkeypatch.setattr(dlattn.torch._core, name, spy)
    return made


def make(requires_grad=False, heads_kv=4, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (2, 4, 7, 16), (2, heads_kv, 9, 16), (2, heads_kv, 9, 16)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


@by_both
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.ones(7, 9).tril(1).bool()},
        {"attn_mask": torch.linspace(-1, 1, 63).view(7, 9)},
        {"enable_gqa": True},
    ],
    ids=["plain", "causal", "scale", "mask", "bias", "gqa"],
)
def test_forward_and_gradient(switch, options, calls):
    heads_kv = 2 if "enable_gqa" in options else 4
    found = []
    for context in (contextlib.nullcontext, switch):
        tensors = make(requires_grad=True, heads_kv=heads_kv)
        with context():
            output = F.scaled_dot_product_attention(*tensors, **options)
        output.square().sum().backward()
        found.append((output, *(x.grad for x in tensors)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    assert "forward" in calls, "PyTorch itself did it"


@by_both
def test_goes_and_comes_back(switch, calls):
    tensors = make()
    wanted = F.scaled_dot_product_attention(*tensors)
    assert not calls
    with switch():
        close(F.scaled_dot_product_attention(*tensors), wanted)
        with torch.inference_mode():
            close(F.scaled_dot_product_attention(*tensors), wanted)
    assert len(calls) == 2
    assert torch.equal(F.scaled_dot_product_attention(*tensors), wanted)
    assert len(calls) == 2


@by_both
def test_modules(switch, calls):
    """A stack of PyTorch's own layers, trained."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    wanted = layer(x, mask, is_causal=True)
    wanted.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with switch():
        found = layer(x, mask, is_causal=True)
    found.sum().backward()
    close(found, wanted)
    for p, g in zip(layer.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-4)
    assert "forward" in calls


@by_both
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_compiled(switch, mode):
    """The operator dlattn::forward stands in the program."""
    programs = []

    def keep(graph, _):
        programs.append(graph.code)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    tensors = make(requires_grad=True)
    torch._dynamo.reset()
    with switch(), mode():
        backend = aot_autograd(fw_compiler=keep)
        compiled = torch.compile(F.scaled_dot_product_attention, backend=backend, fullgraph=True)
        found = compiled(*tensors, is_causal=True)
    assert any("dlattn.forward" in code for code in programs)
    torch._dynamo.reset()
    close(found, F.scaled_dot_product_attention(*tensors, is_causal=True))


@by_both
def test_theirs_where_they_are_asked_for(switch, calls):
    tensors = make()
    with switch(), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*tensors)
    with switch():
        F.scaled_dot_product_attention(*tensors, dropout_p=0.5)
        F.scaled_dot_product_attention(*(x.to("meta") for x in tensors))
        torch.func.grad(lambda q: F.scaled_dot_product_attention(q, *tensors[1:]).sum())(tensors[0])
    assert not calls


@by_both
def test_their_words(switch):
    query, key, value = make()
    with switch(), pytest.raises(RuntimeError, match=r"The size of tensor|must match"):
        F.scaled_dot_product_attention(query, key[:, :3], value)
    with switch(), pytest.raises(TypeError, match=r"unexpected keyword|invalid combination"):
        F.scaled_dot_product_attention(query, key, value, softcap=1.0)


@pytest.mark.skipif(not HAS_LIST, reason="PyTorch is older")
def test_list():
    assert "DLATTN" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None, "activated by an import"
    with activated():
        assert torch.nn.attention.current_flash_attention_impl() == "DLATTN"


def test_older_pytorch(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    _torch_provider.register(dlattn.torch.scaled_dot_product_attention)


def test_import_takes_little_beside_torch():
    """Of the processor, and beside work of the same process: machines are busy and differ. A
    hundredth where it was written; one framework more would be a tenth."""
    code = (
        "import time; begin = time.process_time(); import torch; "
        "middle = time.process_time(); import dlattn.torch; "
        "print((time.process_time() - middle) / (middle - begin))"
    )
    shares = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(shares) < 1 / 30, shares
