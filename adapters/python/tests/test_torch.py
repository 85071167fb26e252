"""dlattn.torch against PyTorch's own attention, eager, differentiated and compiled, on the CPU.

What needs a GPU is in gpu_check.py.
"""

from __future__ import annotations

import functools
import warnings

import dlattn
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (its wheel needs CUDA's)")

import dlattn.torch  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

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


BROADCAST = {
    "five_axes": ((3, 2, 4, 5, 8), (3, 2, 4, 6, 8), (3, 2, 4, 6, 8)),
    "five_axes_of_1": ((3, 2, 4, 5, 8), (1, 2, 4, 6, 8), (3, 1, 1, 6, 8)),
    "mixed_ranks": ((2, 4, 5, 8), (6, 8), (4, 6, 8)),
    "query_of_two_axes": ((5, 8), (2, 4, 6, 8), (2, 4, 6, 8)),
    "batch_of_1": ((1, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)),
    "key_of_batch_1": ((2, 4, 5, 8), (1, 4, 6, 8), (2, 4, 6, 8)),
    "head_of_1": ((2, 1, 5, 8), (2, 4, 6, 8), (2, 1, 6, 8)),
    "one_kv_head": ((2, 4, 5, 8), (2, 1, 6, 8), (2, 1, 6, 3)),
}


@pytest.mark.parametrize("shapes", BROADCAST.values(), ids=BROADCAST)
def test_leading_axes_broadcast(shapes):
    tensors = [torch.randn(shape) for shape in shapes]
    expected = theirs(*tensors)
    assert ours(*tensors).shape == expected.shape
    close(ours(*tensors), expected)
    rank = expected.dim()
    for mask in (torch.randn((1,) * (rank - 2) + (5, 6)), torch.randn(*expected.shape[:-1], 6)):
        close(ours(*tensors, attn_mask=mask), theirs(*tensors, attn_mask=mask))
    for a, b in zip(gradients(ours, tensors), gradients(theirs, tensors)):
        close(a, b, 2e-5)


def test_grouped_query_of_other_ranks():
    for batch in ((), (3,), (2, 3)):
        shapes = (4, 5, 8), (2, 6, 8), (2, 6, 8)
        tensors = [torch.randn(*batch, *shape) for shape in shapes]
        close(ours(*tensors, enable_gqa=True), theirs(*tensors, enable_gqa=True))


@pytest.mark.parametrize("dim_v", [16, 8, 24])
@pytest.mark.parametrize("wants", [False, True])
def test_output_has_the_layout_of_the_query(dim_v, wants):
    query = torch.randn(2, 7, 3, 4, 16)[:, :, 0].transpose(1, 2)  # as projected, with its gaps
    key, value = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, dim_v)
    query = query.detach().requires_grad_(wants)
    output = ours(query, key, value)
    assert output.requires_grad == wants
    assert output.transpose(1, 2).is_contiguous()
    for f in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        output = f(*(x.to("meta") for x in (query, key, value)))
        assert output.transpose(1, 2).is_contiguous()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query.detach(), torch.ones_like(query))
        assert ours(dual, key, value).transpose(1, 2).is_contiguous()


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


def naive(query, key, value, bias=0.0, sinks=None):
    """Softmax in PyTorch's operators, in the type of the tensors."""
    logits = query @ key.mT * query.shape[-1] ** -0.5 + bias
    if sinks is not None:
        column = sinks[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], 3)
    return logits.softmax(-1)[..., : key.shape[2]] @ value


def test_gradient_in_float64():
    """To ten digits, also under a bias that takes the digits of a log-sum-exp in float32."""
    tensors = make(dtype=torch.float64)
    options = {
        "bias": torch.randn(7, 9, dtype=torch.float64) + 3e5,
        "sinks": torch.tensor([3e5, 0.5, 0.0, 3e5], dtype=torch.float64),
    }
    pairs = (gradients(f, tensors, **options) for f in (dlattn.torch.attention, naive))
    for name, a, b in zip(("query", "key", "value", "bias", "sinks"), *pairs):
        # The sinks are used in float32, which these are, and their gradient is rounded to it.
        close(a, b, 1e-6 if name == "sinks" else 1e-9)
    pairs = (gradients(f, tensors, is_causal=True) for f in (ours, theirs))
    for a, b in zip(*pairs):
        close(a, b, 1e-12)


@pytest.mark.parametrize("size", [2.0**10, 2.0**20, 2.0**52])
def test_gradient_at_large_logits(size):
    """Integers times powers of 2: logits without rounding, up to 2^110, and ties among them."""
    torch.manual_seed(0)
    query, key = torch.randint(-2, 3, (2, 1, 2, 64, 4)).float().unbind()
    tensors = [query * size, key * size, torch.randn(1, 2, 64, 4)]
    value_gradients = [
        gradients(f, [x.to(t) for x in tensors])[2]
        for f, t in ((ours, torch.float32), (naive, torch.float64))
    ]
    close(*value_gradients, 1e-4)
    one_key = [tensors[0], tensors[1][:, :, :1], tensors[2][:, :, :1]]
    leaf = one_key[2].clone().requires_grad_()
    ours(*one_key[:2], leaf).sum().backward()
    assert (leaf.grad == 64).all()


NAN, INF = float("nan"), float("inf")


def spoiled(x, what):
    """With something that is not finite in the keys from the seventh on."""
    x = x.clone()
    x[:, :, 6:] = what
    return x


@pytest.mark.parametrize("what", [NAN, INF])
@pytest.mark.parametrize("hiding", ["lengths", "mask", "causal", "bias"])
def test_what_is_hidden_reaches_no_gradient(hiding, what):
    options = {
        "lengths": {"key_lengths": torch.tensor([6, 6])},
        "mask": {"mask": torch.arange(9) < 6},
        "causal": {"causal": True},
        "bias": {"bias": torch.where(torch.arange(9) < 6, 0.0, -INF)},
    }[hiding]
    query, key, value = make()
    query = query[:, :, :6]
    call = functools.partial(dlattn.torch.attention, **options)
    # numerics.md: a bias hides the value alone, NaN of a key outlives it.
    bad_key = key if hiding == "bias" else spoiled(key, what)
    expected = gradients(call, (query, key, value))
    for a, b in zip(gradients(call, (query, bad_key, spoiled(value, what))), expected):
        close(a, b, 2e-6)
        assert (b[:, :, 6:] == 0).all()


def test_what_some_rows_see_reaches_no_others():
    """NaN in the last key of a causal call is seen by the last row; so is that of its query."""
    for spoil in range(3):
        tensors = make(rows=9)
        tensors[spoil][:, :, 8] = NAN
        call = functools.partial(dlattn.torch.attention, causal=True)
        d_query, d_key, d_value = gradients(call, tensors)
        assert d_query[:, :, :8].isfinite().all()
        assert d_query[:, :, 8].isnan().all()
        assert d_key.isnan().all()  # the last row sees all keys
        assert d_value.isnan().all() == (spoil < 2)


def test_nan_of_the_output_gradient_stays_in_its_document():
    tensors = [x.requires_grad_() for x in make(rows=9)]
    document = torch.arange(9) < 4
    output = ours(*tensors, attn_mask=document[:, None] == document)
    d_output = torch.ones_like(output)
    d_output[:, :, 0] = NAN
    output.backward(d_output)
    for x in tensors:
        assert x.grad[:, :, 4:].isfinite().all()
    assert tensors[2].grad[:, :, :4].isnan().all()


def test_rows_that_see_nothing_have_no_gradient():
    tensors = make()
    mask = torch.zeros(7, 9, dtype=torch.bool)
    for x in gradients(ours, tensors, attn_mask=mask):
        assert (x == 0).all()
    sinks = torch.zeros(4, requires_grad=True)
    options = {"sinks": sinks, "query_lengths": torch.tensor([3, 7]), "return_lse": True}
    lse = dlattn.torch.attention(*tensors, mask=mask, **options)[1]
    assert (lse == 0).all()
    lse.sum().backward()
    assert (sinks.grad == 14).all()  # each row's log-sum-exp is the sink


@pytest.mark.parametrize("shape", [(0, 4, 7, 9), (2, 0, 7, 9), (2, 4, 0, 9), (2, 4, 7, 0)])
def test_gradient_of_nothing(shape):
    batch, heads, rows, keys = shape
    for x in gradients(ours, make(batch, heads, heads, rows, keys)):
        assert (x == 0).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("options", [{}, *EXTRA.values()], ids=["plain", *EXTRA])
def test_other_derivatives(options):
    """Forward mode and second order, by finite differences."""
    tensors = [x.requires_grad_() for x in make(heads_kv=2, dim=4, dtype=torch.float64)]

    def finite(*x):
        output, lse = dlattn.torch.attention(*x, return_lse=True, **options)
        return output, torch.where(lse.isfinite(), lse, 0).double()

    def output(*x):
        return finite(*x)[0]

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), x.detach()) for x in tensors]
        for a, b in zip(finite(*duals), finite(*(x.detach() for x in tensors))):
            close(forward_ad.unpack_dual(a).primal, b, 1e-6 if a.dim() == 3 else 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.autograd.gradcheck(output, tensors, fast_mode=True, check_forward_ad=True)
        torch.autograd.gradgradcheck(output, tensors, fast_mode=True)


@pytest.mark.filterwarnings("ignore")  # theirs go one by one, too
def test_func_derivatives():
    """torch.func of other modes and orders, beside PyTorch's attention of plain operators."""
    x = make(batch=1, heads=1, heads_kv=1, rows=3, keys=4, dim=2, dtype=torch.float64)
    func = torch.func

    def squares(f):
        return lambda *x: (f(*x, is_causal=True) ** 2).sum()

    for transform in (
        lambda f: func.jvp(squares(f), tuple(x), tuple(x)),
        lambda f: func.jacfwd(squares(f), (0, 1, 2))(*x),
        lambda f: func.hessian(squares(f), (0, 2))(*x),
        lambda f: func.jacrev(func.jacfwd(squares(f)))(*x),
        lambda f: func.jacrev(func.jacrev(squares(f), 1), 2)(*x),
        lambda f: func.grad(lambda q: func.grad(squares(f))(q, *x[1:]).pow(3).sum())(x[0]),
    ):
        with sdpa_kernel(SDPBackend.MATH):
            expected = transform(theirs)
        torch.testing.assert_close(transform(ours), expected, rtol=0, atol=1e-12)


# ---- Who watches


def test_tracing():
    """What is recorded is the call, not its output."""
    tensors, others = make(), [x.flip(0) for x in make()]
    for f in (ours, dlattn.torch.attention):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda *x: f(*x), tuple(tensors), check_trace=False)  # noqa: B023
        close(traced(*others), f(*others), 0)
        recorded = make_fx(lambda *x: f(*x), tracing_mode="real")(*tensors)  # noqa: B023
        close(recorded(*others), f(*others), 0)


def test_modes_and_subclasses():
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    tensors = make()
    own = [tensors[0].as_subclass(Own), *tensors[1:]]
    for f in (ours, dlattn.torch.attention):
        for mode in (Dispatch, Function):
            with mode():
                close(f(*tensors), theirs(*tensors))
            assert any("dlattn.forward" in name for name in seen)
            seen.clear()
        assert type(f(*own)) is Own
        assert any("dlattn.forward" in name for name in seen)
        seen.clear()


def test_flops():
    tensors = [x.requires_grad_() for x in make()]

    def count(f):
        with FlopCounterMode(display=False) as counter:
            f(*tensors).sum().backward()
        return counter.get_total_flops()

    assert count(ours) == 7 * 2 * (2 * 4 * 7 * 9) * 16  # two products forward, five backward
    packed = [x[0].transpose(0, 1) for x in make()]
    rows, keys = torch.tensor([0, 3, 7]), torch.tensor([0, 5, 9])
    with FlopCounterMode(display=False) as counter:
        dlattn.torch.attention(*packed, cu_seqlens_q=rows, cu_seqlens_k=keys)
    assert counter.get_total_flops() == 2 * 4 * (3 * 5 + 4 * 4) * (16 + 16)


def test_negated_in_name_only():
    query = torch.randn(2, 4, 7, 16, dtype=torch.complex64).conj().imag
    bias = torch.randn(7, 9, dtype=torch.complex64).conj().imag
    assert query.is_neg()
    assert bias.is_neg()
    _, key, value = make()
    close(ours(query, key, value), theirs(query, key, value))
    found = dlattn.torch.attention(query, key, value, bias=bias)
    close(found, theirs(query, key, value, attn_mask=bias.resolve_neg()))


def test_zeros_without_memory():
    zeros = torch._efficientzerotensor((2, 4, 7, 16))
    _, key, value = make()
    for f in (ours, dlattn.torch.attention):
        close(f(zeros, key, value), theirs(torch.zeros(zeros.shape), key, value))


def test_inference_mode():
    with torch.inference_mode():
        tensors = make()
        out = torch.empty_like(tensors[0])
        close(ours(*tensors), theirs(*tensors))
        close(dlattn.torch.attention(*tensors, out=out), theirs(*tensors))


def test_writing_is_noticed():
    """Autograd refuses to go back through a tensor that `out` has overwritten since."""
    tensors = make()
    out = torch.ones_like(tensors[0])
    product = torch.ones_like(out).requires_grad_() * out
    dlattn.torch.attention(*tensors, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_gradient_of_scale():
    tensors = make()
    a, b = (torch.tensor(0.3, requires_grad=True) for _ in range(2))
    (ours(*tensors, scale=a) ** 2).mean().backward()
    (theirs(tensors[0] * b, *tensors[1:], scale=1.0) ** 2).mean().backward()
    close(a.grad, b.grad, 2e-5)
    close(ours(*tensors, scale=torch.tensor(0.3)), theirs(*tensors, scale=0.3))


def test_causal_bias():
    query, key, value = make()
    for mask in (causal_upper_left(7, 9), causal_lower_right(7, 9)):
        expected = theirs(query, key, value, attn_mask=mask)
        for wants in (False, True):
            close(ours(query.requires_grad_(wants), key, value, attn_mask=mask), expected)
    with pytest.raises(dlattn.InvalidArgument, match=r"attn_mask: .* \[9, 9\], .* \[7, 9\]"):
        ours(query, key, value, attn_mask=causal_upper_left(9, 9))
    with pytest.raises(dlattn.Unsupported, match="bias: is a CausalBias"):
        dlattn.torch.attention(query, key, value, bias=causal_upper_left(7, 9))


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


def test_compiles_for_all_lengths():
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 6, 7):
        query, key, value = make(rows=length, keys=length + 2)
        close(compiled(query, key, value), theirs(query, key, value))
        mask = torch.randn(length, length + 2)
        close(compiled(query, key, value, mask), theirs(query, key, value, mask))


def test_autocast_of_attention():
    """All that has the element type is cast, and nothing that the plugin wants in float32."""
    query, key, value = make()
    options = {"sinks": torch.zeros(4), "softcap": 5.0, "bias": torch.randn(7, 9)}
    expected = dlattn.torch.attention(query, key, value, **options)
    for wants in (False, True):
        leaf = query.clone().requires_grad_(wants)
        with torch.autocast("cpu", torch.bfloat16):
            found = dlattn.torch.attention(leaf, key, value.bfloat16(), **options)
            assert found.dtype == torch.bfloat16
            close(found, expected, 5e-2)
            if wants:
                found.sum().backward()
                assert leaf.grad.dtype == torch.float32


def test_autocast_leaves_the_gradient_alone():
    tensors = [x.requires_grad_() for x in make(dtype=torch.float32)]
    output = ours(*tensors)
    expected = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(output.sum(), tensors)
    for a, b in zip(found, expected):
        close(a, b, 0)


def test_types_and_ranks_that_are_converted():
    tensors = make()
    call = functools.partial(dlattn.torch.attention, *tensors)
    sinks, slopes = torch.randn(4).bfloat16(), torch.rand(4).bfloat16()
    for options, converted in (
        ({"sinks": sinks}, {"sinks": sinks.float()}),
        ({"alibi_slopes": slopes}, {"alibi_slopes": slopes.float()}),
        ({"key_lengths": torch.tensor([3, 9])}, {"key_lengths": torch.tensor([3, 9]).int()}),
        ({"bias": torch.ones(7, 9).bfloat16()}, {"bias": torch.ones(1, 1, 7, 9)}),
        ({"mask": torch.ones(4, 7, 9).bool()}, {"mask": torch.ones(1, 4, 7, 9).bool()}),
    ):
        close(call(**options), call(**converted), 0)
    sinks.requires_grad_()
    call(sinks=sinks).sum().backward()
    assert sinks.grad.dtype == torch.bfloat16
    with pytest.raises(dlattn.InvalidArgument, match="key_lengths: holds 4294967299, must fit"):
        call(key_lengths=torch.tensor([2**32 + 3, 9]))


def test_packed_and_paged_with_int64():
    query, key, value = make(batch=1)
    rows, keys = torch.tensor([0, 7]), torch.tensor([0, 9])
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    found = dlattn.torch.attention(*packed, cu_seqlens_q=rows, cu_seqlens_k=keys)
    close(found.transpose(0, 1), theirs(query, key, value)[0])
    pages = [torch.nn.functional.pad(x, (0, 0, 0, 7)).unflatten(2, (2, 8)) for x in (key, value)]
    pages = [x[0].transpose(0, 1) for x in pages]
    options = {"block_table": torch.tensor([[0, 1]]), "key_lengths": torch.tensor([9])}
    close(dlattn.torch.attention(query, *pages, **options), theirs(query, key, value))


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
    with pytest.raises(ValueError, match="key: dtype is float64, query's is float32"):
        ours(query, key.double(), value)
    with pytest.raises(NotImplementedError, match="query: dtype"):
        ours(query.int(), key.int(), value.int())


@pytest.mark.filterwarnings("ignore")  # PyTorch's prototypes say so
def test_refusals_by_name():
    query, key, value = make()
    nested = torch.nested.nested_tensor([torch.randn(4, 7, 16)])
    jagged = torch.nested.nested_tensor([torch.randn(4, 7)], layout=torch.jagged)
    wide = torch.zeros(7, 10)
    for error, words, call in (
        (NotImplementedError, "query: is a nested tensor", lambda: ours(nested, key, value)),
        (NotImplementedError, "key: is a nested tensor", lambda: ours(query, jagged, value)),
        (NotImplementedError, "key: layout is .*coo", lambda: ours(query, key.to_sparse(), value)),
        (
            NotImplementedError,
            "value: dtype is .*qint8",
            lambda: ours(query, key, quantized(value)),
        ),
        (NotImplementedError, "query: dtype", lambda: ours(query.cfloat(), key, value)),
        (ValueError, "query: is a .*list, must be", lambda: ours([1.0], key, value)),
        (ValueError, r"attn_mask: shape is \[7, 10\]", lambda: ours(query, key, value, wide)),
        (ValueError, "attn_mask: dtype", lambda: ours(query, key, value, wide[:, :9].long())),
        (ValueError, r"key, value: axes .* \[3\], \[2\]", lambda: ours(query, key3(key), value)),
        (ValueError, "key: has 1 axes", lambda: ours(query, key[0, 0, 0], value)),
    ):
        with pytest.raises(error, match=words):
            call()
    attention = functools.partial(dlattn.torch.attention, query)
    for words, tensors, options in (
        ("key: has 3 axes, must have 4", (key[0], value[0]), {}),
        ("key_lengths: is a .*list, must be", (key, value), {"key_lengths": [3, 4]}),
        ("window: is 3, must be", (key, value), {"window": 3}),
        (r"scale: shape is \[3\]", (key, value), {"scale": torch.ones(3)}),
        ("softcap: is a torch.Tensor", (key, value), {"softcap": torch.tensor(1.0)}),
    ):
        with pytest.raises(ValueError, match=words):
            attention(*tensors, **options)
    packed = [x[0].transpose(0, 1).requires_grad_() for x in (query, key, value)]
    with pytest.raises(NotImplementedError, match="packed and paged attention has no gradient"):
        ends = torch.tensor([0, 7]), torch.tensor([0, 9])
        dlattn.torch.attention(*packed, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])


def quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def key3(key):
    """With a batch of 3."""
    return torch.cat([key, key[:1]])
