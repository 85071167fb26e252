"""dlattn.torch against PyTorch's own attention, eager, differentiated and compiled, on the CPU.

What needs a GPU is in gpu_check.py.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
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
from torch.utils.checkpoint import checkpoint  # noqa: E402
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


@pytest.fixture(params=["native", "operators"])
def backward(request, monkeypatch):
    """Whether the plugin's rows, the reference among them, or PyTorch's operators do it."""
    monkeypatch.setattr(dlattn.torch, "serves", lambda *_, **__: request.param == "native")
    return request.param


by_both = pytest.mark.usefixtures("backward")

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


@by_both
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


@by_both
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


@by_both
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


@by_both
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
    "segments": {
        "query_segments": torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 6, 7]]),
        "key_segments": torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 3], [5, 5, 5, 5, 5, 5, 6, 6, 6]]),
        "causal": True,
    },
    "block_mask": {
        "block_mask": torch.tensor([[[[1, 2], [0, 1], [2, 0]]]] * 2, dtype=torch.uint8),
        "block_size": (3, 5),
        "mask": torch.rand(2, 1, 7, 9) < 0.6,
    },
}


def visible_by_segments(options):
    return options["query_segments"][:, None, :, None] == options["key_segments"][:, None, None]


def visible_by_blocks(options):
    state = options["block_mask"].repeat_interleave(3, 2)[:, :, :7].repeat_interleave(5, 3)[..., :9]
    return (state != 0) & (options["mask"] | (state == 2))


@pytest.mark.parametrize(
    ("name", "visible"), [("segments", visible_by_segments), ("block_mask", visible_by_blocks)]
)
def test_what_says_the_same_as_a_mask(name, visible, backward):
    options, tensors = EXTRA[name], make(heads_kv=2)
    causal = options.get("causal", False)

    def by_mask(*tensors):
        return dlattn.torch.attention(*tensors, mask=visible(options), causal=causal)

    def by_option(*tensors):
        return dlattn.torch.attention(*tensors, **options)

    compiled = torch.compile(by_option, backend="aot_eager", fullgraph=True)
    for f in (by_option, compiled):
        assert torch.equal(f(*tensors), by_mask(*tensors))
        for a, b in zip(gradients(f, tensors), gradients(by_mask, tensors)):
            close(a, b)
    assert not torch.equal(by_option(*tensors), dlattn.torch.attention(*tensors, causal=causal))


@by_both
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


@by_both
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


@by_both
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


def test_lse_of_float64(monkeypatch):
    """Gradients are computed from one in float64; the caller gets float32."""
    seen = []
    monkeypatch.setattr(dlattn.torch, "serves", lambda *args, **_: seen.append(args[4].dtype))
    tensors = [x.requires_grad_() for x in make(dtype=torch.float64)]
    output, lse = dlattn.torch.attention(*tensors, return_lse=True)
    assert lse.dtype == torch.float32
    (output.sum() + lse.sum()).backward()
    assert seen == [torch.float64]


@by_both
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


@by_both
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


@by_both
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


@by_both
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


@by_both
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


@by_both
@pytest.mark.parametrize("shape", [(0, 4, 7, 9), (2, 0, 7, 9), (2, 4, 0, 9), (2, 4, 7, 0)])
def test_gradient_of_nothing(shape):
    batch, heads, rows, keys = shape
    bias = torch.randn(1, 1, 1, 1)
    for x in gradients(ours, make(batch, heads, heads, rows, keys), attn_mask=bias):
        assert (x == 0).all()


@by_both
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


@by_both
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


# ---- Gradients that the plugin alone computes


def test_serves():
    """A row that is not the reference; what no row takes is not served either."""
    tensors, output = make(), torch.empty(2, 4, 7, 16)
    options = (*(None,) * 10, None, 0.0, -1, -1, False, 0, 0, 0)

    def serves(kernel, *inputs):
        return dlattn.torch.serves(*inputs, output, *options, kernel, 0, None, None)

    names = {k.name for k in dlattn.kernels() if k.available}
    assert serves(None, *tensors) == bool(names & {"cpu_fwd_avx2", "cpu_fwd_avx512"})
    assert not serves("cpu_fwd_ref", *tensors)
    assert not serves(None, *(x.int() for x in tensors))
    with pytest.raises(dlattn.InvalidArgument, match="key: axis 3"):
        serves(None, tensors[0], tensors[1][..., :8], tensors[2])


class Calls:
    """The names of the gradients that each call of the plugin writes."""

    def __init__(self, monkeypatch):
        self.seen, call = [], dlattn._core.forward

        def forward(*args, **more):
            written = (name.removeprefix("d_") for name in more if name.startswith("d_"))
            self.seen.append([name for name in written if name not in ("output", "lse")])
            return call(*args, **more)

        monkeypatch.setattr(dlattn._core, "forward", forward)


@by_both
def test_only_what_is_wanted_is_computed(backward, monkeypatch):
    query, key, value = make()
    sinks = torch.zeros(4)
    calls = Calls(monkeypatch)
    for leaves in ((query, value), (key,), (sinks,)):
        for x in (query, key, value, sinks):
            x.requires_grad_(any(x is leaf for leaf in leaves)).grad = None
        output = dlattn.torch.attention(query, key, value, sinks=sinks)
        output.sum().backward()
        tensors = {"query": query, "key": key, "value": value, "sinks": sinks}
        assert [n for n, x in tensors.items() if x.grad is not None] == [
            n for n, x in tensors.items() if x.requires_grad
        ]
    native = [["query", "value"], ["key"], ["sinks"]] if backward == "native" else []
    assert [names for names in calls.seen if names] == native


@by_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_in_narrow_types(dtype):
    """Within the rounding of the output and of the gradients, beside float64."""
    tensors = make(heads_kv=2, rows=40, keys=50, dtype=dtype)
    found = gradients(functools.partial(ours, is_causal=True, enable_gqa=True), tensors)
    expected = gradients(
        functools.partial(theirs, is_causal=True, enable_gqa=True), [x.double() for x in tensors]
    )
    for a, b in zip(found, expected):
        assert a.dtype == dtype
        close(a, b, 4 * torch.finfo(dtype).eps * b.abs().max().item())


@by_both
def test_gradient_has_the_layout_of_the_tensor():
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in make()]
    for x in torch.autograd.grad(ours(*tensors).sum(), tensors):
        assert x.transpose(1, 2).is_contiguous()


@by_both
def test_checkpointing():
    tensors = make()

    def again(*x):
        return checkpoint(ours, *x, use_reentrant=False)

    for a, b in zip(gradients(again, tensors), gradients(ours, tensors)):
        close(a, b, 0)


def test_gradient_of_packed_sequences():
    """Beside the same sequences one by one, in float64."""
    torch.manual_seed(0)
    rows, keys = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 5, 7, 12])
    tensors = [torch.randn(n, h, 16) for n, h in ((7, 4), (12, 2), (12, 2))]
    packed = functools.partial(
        dlattn.torch.attention, cu_seqlens_q=rows, cu_seqlens_k=keys, causal=True
    )

    def one_by_one(query, key, value):
        outputs = []
        for n in range(3):
            q = query[rows[n] : rows[n + 1]]
            k, v = (x[keys[n] : keys[n + 1]] for x in (key, value))
            parts = (x.transpose(0, 1)[None] for x in (q, k, v))
            outputs.append(theirs(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs)

    expected = gradients(one_by_one, [x.double() for x in tensors])
    for f in (packed, torch.compile(packed, backend="aot_eager", fullgraph=True)):
        for a, b in zip(gradients(f, tensors), expected):
            close(a, b, 2e-5)
    leaf = tensors[0].requires_grad_()
    (grad,) = torch.autograd.grad(packed(*tensors).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="first-order gradients in reverse mode alone"):
        grad.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="first-order"):
        packed(forward_ad.make_dual(leaf, leaf), *tensors[1:])


def test_dropout():
    """Seeds come from PyTorch's generator; the weights that are left are found by values that are
    the rows of a unit matrix."""
    query, key, _ = make(batch=2, rows=40, keys=16)
    p, kept = 0.4, []
    weights = (query.double() @ key.double().mT / 4).softmax(-1)
    for _ in range(2):
        torch.manual_seed(3)
        kept.append(ours(query, key, torch.eye(16).expand(2, 4, 16, 16), dropout_p=p) / weights)
    close(kept[0], kept[1], 0)
    keep = kept[0].round(decimals=3)
    assert set(keep.unique().tolist()) == {0, round(1 / (1 - p), 3)}
    assert abs((keep == 0).double().mean() - p) < 0.03
    keep = (keep != 0) / (1 - p)

    def expected(query, key, value):
        return (query @ key.mT / 4).softmax(-1).mul(keep) @ value

    def found(*x):
        torch.manual_seed(3)
        return ours(*x, dropout_p=p)

    def again(*x):
        torch.manual_seed(3)
        call = functools.partial(ours, dropout_p=p)
        return checkpoint(call, *x, use_reentrant=False)

    tensors = query, key, torch.randn(2, 4, 16, 16)
    doubles = [x.double() for x in tensors]
    close(found(*tensors), expected(*doubles))
    for f in (found, again):
        for a, b in zip(gradients(f, tensors), gradients(expected, doubles)):
            close(a, b, 2e-5)


def test_dropout_under_transforms():
    tensors = [torch.stack([x, x]) for x in make()]
    compiled = torch.compile(
        functools.partial(ours, dropout_p=0.5), backend="aot_eager", fullgraph=True
    )
    first, second = (compiled(*(x[0] for x in tensors)) for _ in range(2))
    assert (first != second).any()  # each run draws its own
    dropped = functools.partial(ours, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(*tensors)
    for randomness, are_equal in (("same", True), ("different", False)):
        one, other = torch.vmap(dropped, randomness=randomness)(*tensors)
        assert (one == other).all() == are_equal
    leaf = tensors[0][0].requires_grad_()
    (grad,) = torch.autograd.grad(
        dropped(leaf, tensors[1][0], tensors[2][0]).sum(), leaf, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="first-order gradients in reverse mode alone"):
        grad.sum().backward()


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


@by_both
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


@by_both
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


@by_both
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


@by_both
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


@by_both
def test_autocast_leaves_the_gradient_alone():
    tensors = [x.requires_grad_() for x in make(dtype=torch.float32)]
    output = ours(*tensors)
    expected = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(output.sum(), tensors)
    for a, b in zip(found, expected):
        close(a, b, 0)


@by_both
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


@by_both
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


@by_both
def test_operator():
    tensors = [x.requires_grad_() for x in make()]
    options = (None,) * 12 + (None, 0.0, -1, -1, True, 0, 0, 0, 0, 0, 0.0, None)
    torch.library.opcheck(torch.ops.dlattn.forward.default, (*tensors, *options))
    output, lse = torch.ops.dlattn.forward(*tensors, *options)
    upstream = (torch.randn_like(x).requires_grad_() for x in (output, lse))
    for wanted in (0b000111, 0b000100):
        inputs = (*upstream, output.detach(), lse.detach(), wanted, *tensors, *options)
        torch.library.opcheck(torch.ops.dlattn.backward.default, inputs)
        upstream = inputs[:2]


@by_both
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


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("key_type", FLOAT8)
@pytest.mark.parametrize("value_type", FLOAT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_float8(key_type, value_type, dtype, rows):
    """A cache of 8 bits with a scale for each head, beside float64 of what it stands for."""
    query, key, value = make(heads_kv=2, rows=rows, keys=70, dim=32)
    query, key, value = query.to(dtype), key.to(key_type), value.to(value_type)
    key_scale, value_scale = torch.rand(2, 2) + 0.5, torch.rand(1, 2).double() + 0.5
    options = {"key_scale": key_scale, "value_scale": value_scale}
    wanted = theirs(
        query.double(),
        key.double() * key_scale[:, :, None, None],
        value.double() * value_scale[:, :, None, None],
        enable_gqa=True,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for attention in (dlattn.torch.attention, dlattn.attention):
        output = attention(query, key, value, **options)
        assert output.dtype == dtype
        close(output, wanted, tolerance)
    with torch.autocast("cpu"):  # the query alone becomes bfloat16
        output = dlattn.torch.attention(query, key, value, **options)
    close(output, wanted, 0.05)


def test_float8_queries():
    query, key, value = (x.to(torch.float8_e4m3fn) for x in make(rows=33))
    out = torch.empty(query.shape, dtype=torch.bfloat16)
    scale = torch.tensor([2.0])
    output = dlattn.torch.attention(query, key, value, query_scale=scale, out=out)
    assert output is out
    close(out, theirs(2 * query.double(), key.double(), value.double()), 0.02)
    with pytest.raises(dlattn.Unsupported, match="output: dtype is float8_e4m3fn"):
        dlattn.torch.attention(query, key, value)
    query = make(rows=33)[0]
    for wrong, words in (
        (torch.tensor([-1.0]), r"key_scale: entry \[0, 0\] is -1"),
        (torch.tensor([[1.0] * 4, [float("nan")] * 4]), r"key_scale: entry \[1, 0\] is -?nan"),
        (torch.ones(2, 3), r"key_scale: axis 1 \(heads\) is 3"),
        (torch.ones(1, dtype=torch.int32), "key_scale: dtype is int32"),
        (1.5, "key_scale: is a builtins.float"),
    ):
        with pytest.raises(dlattn.InvalidArgument, match=words):
            dlattn.torch.attention(query, key, value, key_scale=wrong)
    with pytest.raises(dlattn.InvalidArgument, match="scales of tensors: need plain tensors"):
        dlattn.torch.attention(query.requires_grad_(), key, value, key_scale=scale)


def test_refusals():
    query, key, value = make()
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"dropout_p: is {p}, must be at least 0 and less"):
            ours(query, key, value, dropout_p=p)
    with pytest.raises(ValueError, match=r"key: axis 3 \(head_dim\) is 8, must be 16 as in query"):
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
    pages = [torch.randn(2, 4, 8, 16, requires_grad=True) for _ in range(2)]
    with pytest.raises(NotImplementedError, match="paged attention has no gradient"):
        table = torch.zeros(2, 1).int()
        attention(*pages, block_table=table, key_lengths=torch.tensor([8, 8]))


def quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def key3(key):
    """With a batch of 3."""
    return torch.cat([key, key[:1]])


def run_alone(code, **environment):
    """What a Python of its own prints, with torch and dlattn.torch imported."""
    code = "import os\nimport torch\nimport dlattn.torch as dt\n" + textwrap.dedent(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "3", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


COUNT_THREADS = """
    count = lambda: len(os.listdir("/proc/self/task"))
    x = torch.randn(1, 8, 512, 64)
    torch.randn(512, 512) @ torch.randn(512, 512), (x + x).sum()
    before = count()
    dt.attention(x, x, x)
    print(before, count())
"""


def test_runs_on_the_team_of_pytorch():
    before, after = run_alone(COUNT_THREADS)
    assert after == before


def test_own_threads_where_their_number_is_set():
    before, after = run_alone(COUNT_THREADS, DLATTN_NUM_THREADS="3")
    assert int(after) == int(before) + 2


def test_set_num_threads_counts():
    one, three = run_alone("""
        import dlattn
        x = torch.randn(1, 8, 512, 64)
        torch.set_num_threads(1)
        print(dlattn.select(x, x, x).num_threads)
        torch.set_num_threads(3)
        print(dlattn.select(x, x, x).num_threads)
    """)
    assert (one, three) == ("1", "3")


def test_child_of_a_fork_has_threads_of_its_own():
    (status,) = run_alone("""
        x = torch.randn(1, 8, 512, 64)
        expected = bytes(dt.attention(x, x, x).untyped_storage())
        child = os.fork()
        if child == 0:  # PyTorch's own operators would wait for a team that is not there
            os._exit(0 if bytes(dt.attention(x, x, x).untyped_storage()) == expected else 1)
        print(os.waitpid(child, 0)[1])
    """)
    assert status == "0"


def test_threads_of_a_team_change_no_bit():
    x = torch.randn(2, 4, 300, 64, requires_grad=True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = dlattn.torch.attention(x, x, x)
        results.append((output, *torch.autograd.grad(output.sum(), x)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
