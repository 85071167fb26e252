"""dlattn.torch against PyTorch's own attention, eager, differentiated and compiled, on the CPU.

What needs a GPU is in gpu_check.py.
"""

from __future__ import annotations

import functools

import dlattn
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (its wheel needs CUDA's)")

import dlattn.torch  # noqa: E402

ours = dlattn.torch.scaled_dot_product_attention
theirs = torch.nn.functional.scaled_dot_product_attention


def make(batch=2, heads=4, heads_kv=4, rows=7, keys=9, dim=16, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (heads, rows), (heads_kv, keys), (heads_kv, keys)
    return [torch.randn((batch, *shape, dim), dtype=dtype) for shape in shapes]


def close(a, b, tolerance=5e-6):
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)


def gradients(f, tensors, **options):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    floats = {n: x.detach().clone().requires_grad_() for n, x in options.items() if is_float(x)}
    output = f(*tensors, **{**options, **floats})
    output.mul(torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [x.grad for x in (*tensors, *floats.values())]


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


torch.manual_seed(1)
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "mask": {"attn_mask": torch.rand(2, 4, 7, 9) < 0.6},
    "mask_low_rank": {"attn_mask": torch.rand(7, 9) < 0.6},
    "mask_empty_rows": {"attn_mask": torch.arange(7)[:, None] > torch.zeros(9) + 2},
    "bias": {"attn_mask": torch.randn(2, 4, 7, 9)},
    "bias_broadcast": {"attn_mask": torch.randn(1, 4, 1, 9)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option_and_gradient(options):
    tensors = make()
    close(ours(*tensors, **options), theirs(*tensors, **options))
    for a, b in zip(gradients(ours, tensors, **options), gradients(theirs, tensors, **options)):
        close(a, b, 2e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float16", 4e-3), ("bfloat16", 3e-2)]
)
def test_dtype(dtype, tolerance):
    tensors = make(dtype=getattr(torch, dtype))
    found = ours(*tensors, is_causal=True)
    assert found.dtype == tensors[0].dtype
    close(found, theirs(*(x.double() for x in tensors), is_causal=True), tolerance)


def test_grouped_query():
    tensors = make(heads_kv=2)
    close(ours(*tensors, enable_gqa=True), theirs(*tensors, enable_gqa=True))
    pairs = (gradients(f, tensors, enable_gqa=True) for f in (ours, theirs))
    for a, b in zip(*pairs):
        close(a, b, 2e-5)
    with pytest.raises(ValueError, match="key: has 2 heads, query 4; enable_gqa=True"):
        ours(*tensors)


@pytest.mark.parametrize("axes", [2, 3])
def test_fewer_axes(axes):
    tensors = [x[(0,) * (4 - axes)] for x in make()]
    mask = torch.rand((*tensors[0].shape[:-1], 9)) < 0.7
    close(ours(*tensors), theirs(*tensors))
    close(ours(*tensors, attn_mask=mask), theirs(*tensors, attn_mask=mask))


def test_views():
    """Transposed, expanded and sliced tensors are read in place."""
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make())
    key = key[:, :1].expand(-1, 4, -1, -1)
    query = query[:, :, 1:]
    close(ours(query, key, value), theirs(query, key, value))


def test_backward_in_chunks():
    tensors = make(batch=1, heads=2, heads_kv=2, rows=300, keys=310)
    pairs = (gradients(f, tensors, is_causal=True) for f in (ours, theirs))
    for a, b in zip(*pairs):
        close(a, b, 5e-5)


EXTRA = {
    "softcap": {"softcap": 0.8},
    "bottom_right": {"causal": True, "alignment": "bottom_right", "window": (4, None)},
    "lengths": {
        "query_lengths": torch.tensor([3, 7], dtype=torch.int32),
        "key_lengths": torch.tensor([9, 4], dtype=torch.int32),
        "causal": True,
        "alignment": "bottom_right",
    },
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 0.0]), "causal": True},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("options", EXTRA.values(), ids=EXTRA)
def test_gradients_of_other_features(options):
    """By finite differences, in float64; those of the float32 tensors along one direction."""
    tensors = [x.requires_grad_() for x in make(heads_kv=2, dtype=torch.float64)]
    attention = functools.partial(dlattn.torch.attention, return_lse=True, **options)

    def finite(*x):
        output, lse = attention(*x)
        return output, torch.where(lse.isfinite(), lse, 0).double()

    assert torch.autograd.gradcheck(lambda *x: finite(*x)[0], tensors, fast_mode=True)
    for name in options.keys() & {"alibi_slopes", "sinks"}:
        x = options[name]
        step = 1e-2 * torch.randn(x.shape)
        with torch.no_grad():
            ends = [
                dlattn.torch.attention(*tensors, **{**options, name: x + sign * step}).sum()
                for sign in (1, -1)
            ]
        leaf = x.clone().requires_grad_()
        dlattn.torch.attention(*tensors, **{**options, name: leaf}).sum().backward()
        close((leaf.grad * step).sum(), (ends[0] - ends[1]) / 2, 1e-4)


def test_gradient_of_lse():
    tensors = make()

    def expected(query, key, _):
        return (query @ key.mT / 4).logsumexp(-1)

    def found(*x):
        return dlattn.torch.attention(*x, return_lse=True)[1]

    close(found(*tensors), expected(*tensors))
    for a, b in zip(gradients(found, tensors)[:2], gradients(expected, tensors)[:2]):
        close(a, b, 2e-5)


def test_compiles_without_graph_breaks():
    tensors = make()

    def model(f, q, k, v):
        return f(q * 2, k, v, is_causal=True) + 1

    compiled = torch.compile(functools.partial(model, ours), fullgraph=True, backend="aot_eager")
    close(compiled(*tensors), model(theirs, *tensors))
    pairs = gradients(compiled, tensors), gradients(functools.partial(model, theirs), tensors)
    for a, b in zip(*pairs):
        close(a, b, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(dtype):
    """The type of the result, too, is that of PyTorch's own attention."""
    tensors = make(dtype=dtype)
    mask = torch.randn(7, 9, dtype=dtype)

    def model(f, *x):
        return f(*x, attn_mask=mask) * 2

    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(ours, *tensors), model(theirs, *tensors)
        compiled = torch.compile(functools.partial(model, ours), fullgraph=True, backend="eager")
        assert compiled(*tensors).dtype == expected.dtype
    assert found.dtype == expected.dtype
    close(found, expected, 5e-2 if dtype == torch.float32 else 1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # theirs goes one by one, too
def test_func_transforms():
    """torch.func: vmap with and without an axis of its own in each tensor, grad, and both."""
    x = [torch.stack([t, t.flip(1)]) for t in make()]
    key = x[1][0]

    def squares(f):
        return lambda *x: (f(*x, is_causal=True) ** 2).sum()

    for transform in (
        lambda f: torch.vmap(f)(*x),
        lambda f: torch.vmap(f, (0, None, 0))(x[0], key, x[2]),
        lambda f: torch.func.grad(squares(f), (0, 1, 2))(x[0][0], key, x[2][0]),
        lambda f: torch.vmap(torch.func.grad(squares(f)), (0, None, 0))(x[0], key, x[2]),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=0, atol=2e-5)


def test_meta_device():
    x = [t.to("meta") for t in make(dtype=torch.float16)]
    assert ours(*x).shape == theirs(*x).shape
    assert ours(*x).device.type == "meta"


def test_operator():
    tensors = [x.requires_grad_() for x in make()]
    options = (None,) * 9 + (None, 0.0, -1, -1, True, 0, 0, 0)
    torch.library.opcheck(torch.ops.dlattn.forward.default, (*tensors, *options))


def test_one_function_for_all():
    """dlattn.attention takes tensors, writes where it is told, and differentiates."""
    query, key, value = make()
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    assert dlattn.attention(query, key, value, out=out, lse=lse) is out
    close(out, theirs(query, key, value))
    query.requires_grad_()
    dlattn.attention(query, key, value).sum().backward()
    assert query.grad is not None
    with pytest.raises(dlattn.InvalidArgument, match="no gradient"):
        dlattn.attention(query, key, value, out=out)


def test_refusals():
    query, key, value = make()
    with pytest.raises(NotImplementedError, match=r"dropout_p: is 0.1"):
        ours(query, key, value, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"key: axis 3 \(head_dim\) is 8, query makes it 16"):
        ours(query, key[..., :8], value)
    with pytest.raises(ValueError, match="key: dtype is f64, query's is f32"):
        ours(query, key.double(), value)
    with pytest.raises(NotImplementedError, match="query: dtype"):
        ours(query.int(), key.int(), value.int())
