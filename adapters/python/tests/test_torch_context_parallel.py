"""dlattn.torch.context_parallel over processes on this machine (gloo), beside one process.

What needs several GPUs is in bench/many_gpus.py, which checks before it times.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools

import dlattn
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (its wheel needs CUDA's)")

import torch.distributed as dist  # noqa: E402
from dlattn.torch import context_parallel  # noqa: E402
from ranks import ranks  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402

whole_attention = dlattn.torch.attention
sdpa = torch.nn.functional.scaled_dot_product_attention
WAYS = ("all_gather", "ring", "ulysses", "ring_ulysses")
LAYOUTS = ("contiguous", "zigzag")
WEIGHTS = ("bias", "alibi_slopes", "sinks")
RESULTS = ("output", "lse", "d_query", "d_key", "d_value")


@pytest.fixture(scope="module", params=[2, 4])
def group(request):
    return ranks(request.param)


@pytest.fixture
def pair():
    return ranks(2)


def make(rows, keys, *, heads=4, heads_kv=2, dim=8, dim_v=8, dtype=torch.float32):
    """(query, key, value), cotangents of output and log-sum-exp; the same on every rank."""
    torch.manual_seed(0)
    shapes = (heads, rows, dim), (heads_kv, keys, dim), (heads_kv, keys, dim_v)
    tensors = [torch.randn((2, *shape), dtype=dtype) for shape in shapes]
    wide = torch.promote_types(dtype, torch.float32)
    return tensors, (
        torch.randn(2, heads, rows, dim_v, dtype=dtype),
        torch.randn(2, heads, rows, dtype=wide),
    )


def results(attention, tensors, cotangents, **options):
    """Output, log-sum-exp and gradients of the three tensors, and of the options that have one."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    leaves = {n: options[n].detach().clone().requires_grad_() for n in WEIGHTS if n in options}
    output, lse = attention(*tensors, **(options | leaves))
    seen = torch.where(lse.isfinite(), lse, 0)
    torch.autograd.backward((output, seen), (cotangents[0], cotangents[1].to(lse.dtype)))
    return [output.detach(), lse.detach(), *(x.grad for x in (*tensors, *leaves.values()))]


def degree_of(way):
    return 2 if way == "ring_ulysses" else None


def compare(way, layout, options, expected_options=None, tolerance=2e-5, **shape):
    """Each rank's results with its part of those of the whole."""
    shard = functools.partial(context_parallel.shard, layout=layout)
    tensors, cotangents = make(**shape)
    one = functools.partial(whole_attention, return_lse=True)
    many = functools.partial(
        context_parallel.attention,
        return_lse=True,
        way=way,
        layout=layout,
        ulysses_degree=degree_of(way),
    )
    expected = results(one, tensors, cotangents, **(expected_options or options))
    parts = [shard(x) for x in tensors], [shard(x) for x in cotangents]
    options = {name: shard_option(name, x, shard) for name, x in options.items()}
    found, again = (results(many, *parts, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again)), "other bits on the second run"
    names = (*RESULTS, *(name for name in WEIGHTS if name in options))
    for name, a, b in zip(names, found, expected):
        if name in RESULTS or (name == "bias" and b.shape[2] > 1):
            b = shard(b)
        else:  # what all ranks have alike: each has a share
            dist.all_reduce(a)
        # The others are sums of many pairs.
        largest = 1 if name in RESULTS else max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(
            *(x.double() for x in (a, b)),
            rtol=0,
            atol=tolerance * largest,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def shard_option(name, x, shard):
    if name.endswith("segments"):
        return shard(x, axis=1)
    return shard(x) if name in ("bias", "mask") and x.shape[2] > 1 else x


OPTIONS = {
    "plain": ({}, 32, 32),
    "causal": ({"causal": True, "softcap": 3.0}, 32, 32),
    "causal_many_keys": ({"causal": True}, 16, 48),
    "causal_bottom_right": ({"causal": True, "alignment": "bottom_right", "scale": 0.5}, 16, 48),
    "causal_few_keys": ({"causal": True, "alignment": "bottom_right"}, 48, 16),
    "window": ({"window": (5, 3)}, 32, 32),
    "window_and_causal": ({"window": (9, None), "causal": True}, 64, 64),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_and_gradients(group, options, way):
    options, rows, keys = options
    for layout in LAYOUTS:
        group.call(compare, way, layout, options, rows=rows, keys=keys)


def tensor_options():
    """By name: (options, rows, keys)."""
    torch.manual_seed(1)
    mask = torch.rand(2, 1, 32, 32) < 0.3
    mask[:, :, 3] = mask[:, :, 20] = False  # rows that see no key
    sinks = {"sinks": torch.randn(4)}
    slopes = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}
    causal = {"causal": True}
    from_the_end = {"causal": True, "alignment": "bottom_right"}
    return {
        "bias": ({"bias": torch.randn(2, 4, 32, 32), "causal": True, "softcap": 3.0}, 32, 32),
        "bias_of_all_heads": ({"bias": torch.randn(1, 1, 32, 32)}, 32, 32),
        "bias_of_keys": ({"bias": torch.randn(2, 4, 1, 48), **from_the_end}, 16, 48),
        "bias_of_rows": ({"bias": torch.randn(1, 4, 32, 1), "window": (9, 3), **sinks}, 32, 32),
        "mask": ({"mask": mask, **causal, **sinks}, 32, 32),
        "mask_of_keys": ({"mask": mask[:1, :, 5:6].to(torch.uint8)}, 32, 32),
        "alibi": ({**slopes, **causal}, 32, 32),
        "alibi_of_batch": ({"alibi_slopes": torch.rand(2, 4), "window": (9, 7), **sinks}, 32, 32),
        "alibi_from_the_end": ({**slopes, **from_the_end}, 16, 48),
        "sinks": ({**sinks, **from_the_end}, 48, 16),
        "all": (
            {"bias": torch.randn(1, 4, 32, 32), "mask": mask, **slopes, **sinks, **segments()[0]},
            32,
            32,
        ),
    }


@pytest.mark.parametrize("way", WAYS)
def test_tensor_options_and_gradients(group, way):
    for name, (options, rows, keys) in tensor_options().items():
        for layout in LAYOUTS:
            one = options
            if name == "all":
                one = {n: x for n, x in options.items() if not n.endswith("segments")}
                one = one | segments()[1] | {"mask": options["mask"] & segments()[1]["mask"]}
            group.call(compare, way, layout, options, one, rows=rows, keys=keys)


def segments():
    """(options, those of the whole without segments); rows of segment 4 see no key."""
    numbers = torch.tensor([[0] * 5 + [1] * 17 + [0] * 10, [3] * 16 + [4] * 16], dtype=torch.int32)
    keys = torch.where(numbers == 4, 5, numbers)
    mask = (numbers[:, :, None] == keys[:, None])[:, None]
    options = {"query_segments": numbers, "key_segments": keys, "causal": True}
    return options, {"mask": mask, "causal": True}


@pytest.mark.parametrize("way", WAYS)
def test_segments(group, way):
    for layout in LAYOUTS:
        group.call(compare, way, layout, *segments(), rows=32, keys=32)


def compare_by_operators(*args, **shape):
    """Parts are merged as where the plugin has no kernel for it."""
    from dlattn import _torch_context_parallel as ours

    merges, ours._merges = ours._merges, lambda device: False
    try:
        compare(*args, **shape)
    finally:
        ours._merges = merges


def test_merges_without_the_plugin(group):
    group.call(compare_by_operators, "ring", "zigzag", *segments(), rows=32, keys=32)
    half = {"tolerance": 0.03, "dtype": torch.bfloat16}
    group.call(compare_by_operators, "ring", "contiguous", {}, rows=32, keys=32, **half)


def packed(way, layout):
    """Sequences of 5, 0, 13 and 14 rows, each by itself; with a hand over the ranks' ends."""
    cu_seqlens = torch.tensor([0, 5, 5, 18, 32], dtype=torch.int32)
    tensors, cotangents = make(32, 32)
    tensors = [x[0].transpose(0, 1).contiguous() for x in tensors]
    cotangents = cotangents[0][0].transpose(0, 1), cotangents[1][0]
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    of_heads = {"sinks": torch.arange(4.0), "alibi_slopes": torch.arange(4.0) / 4}
    options = {"causal": True, "return_lse": True, **of_heads}
    one = functools.partial(whole_attention, **options, **lengths)
    many = functools.partial(
        context_parallel.attention,
        **options,
        cu_seqlens=cu_seqlens,
        way=way,
        layout=layout,
        ulysses_degree=degree_of(way),
    )

    def shard(x, axis):
        return context_parallel.shard(x, axis=axis, layout=layout)

    axes = (0, 1, 0, 0, 0)
    expected = [shard(x, axis) for x, axis in zip(results(one, tensors, cotangents), axes)]
    parts = [shard(x, 0) for x in tensors], (shard(cotangents[0], 0), shard(cotangents[1], 1))
    for a, b in zip(results(many, *parts), expected):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_packed_sequences(group, way):
    for layout in LAYOUTS:
        group.call(packed, way, layout)


def padding(way, layout, rows, keys):
    """From there on are none, whatever they hold: the last ranks may have no others."""
    tensors, cotangents = make(32, 32)
    lengths = {"query_length": rows, "key_length": keys}
    options = {"causal": True, "alignment": "bottom_right", "return_lse": True}
    one = functools.partial(
        whole_attention,
        **options,
        **{f"{name}s": torch.full((2,), n, dtype=torch.int32) for name, n in lengths.items()},
    )
    many = functools.partial(
        context_parallel.attention,
        **options,
        **lengths,
        way=way,
        layout=layout,
        ulysses_degree=degree_of(way),
    )
    shard = functools.partial(context_parallel.shard, layout=layout)
    for x, end in zip(tensors, (rows, keys, keys)):
        x[:, :, end:] = torch.nan
    expected = [shard(x) for x in results(one, tensors, cotangents)]
    found = results(many, [shard(x) for x in tensors], [shard(x) for x in cotangents])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(27, 27), (7, 11), (32, 0)])
def test_padding(group, way, lengths):
    for layout in LAYOUTS:
        group.call(padding, way, layout, *lengths)


def idle(way):
    """Nobody sees more than the first 4 rows and keys."""
    from dlattn import _torch_context_parallel as ours

    tensors, cotangents = make(16, 16)
    parts = (
        [context_parallel.shard(x) for x in tensors],
        [context_parallel.shard(x) for x in cotangents],
    )
    called, forward = [], ours._core.forward
    ours._core.forward = lambda *args, **more: (called.append(1), forward(*args, **more))
    try:
        many = functools.partial(
            context_parallel.attention, way=way, query_length=4, key_length=4, return_lse=True
        )
        output, lse, *_, d_sinks = results(many, *parts, sinks=torch.arange(4.0))
    finally:
        ours._core.forward = forward
    if dist.get_rank():
        assert not called and (output == 0).all()
        assert (lse == torch.arange(4.0)[:, None]).all()
        torch.testing.assert_close(d_sinks, parts[1][1].sum((0, 2)))
    else:
        assert called


@pytest.mark.parametrize("way", ["all_gather", "ring"])
def test_ranks_whose_rows_see_no_key_compute_nothing(group, way):
    group.call(idle, way)


@pytest.mark.parametrize("way", WAYS)
def test_dtypes_and_shapes(pair, way):
    causal = {"causal": True}
    pair.call(
        compare, way, "zigzag", causal, tolerance=1e-12, rows=16, keys=16, dtype=torch.float64
    )
    half = {"tolerance": 0.03, "rows": 16, "keys": 16}
    pair.call(compare, way, "zigzag", causal, dtype=torch.bfloat16, **half)
    pair.call(compare, way, "zigzag", causal, dtype=torch.float16, **half)
    options = {"bias": torch.randn(1, 4, 1, 16).bfloat16(), "sinks": torch.zeros(4), **causal}
    pair.call(compare, way, "zigzag", options, dtype=torch.bfloat16, **half)
    pair.call(compare, way, "contiguous", causal, rows=16, keys=16, dim=12, dim_v=5)
    pair.call(compare, way, "contiguous", causal, rows=16, keys=16, heads_kv=1)
    pair.call(compare, way, "contiguous", causal, rows=0, keys=16)
    pair.call(compare, way, "contiguous", causal, rows=16, keys=0)
    sinks = {"sinks": torch.arange(4.0), **causal}
    for rows, keys in (0, 16), (16, 0):
        options = {"bias": torch.zeros(1, 4, rows, keys), **sinks}
        pair.call(compare, way, "contiguous", options, rows=rows, keys=keys)


def hidden_nan(way, layout):
    """The last key is NaN: only the last row sees it."""
    tensors, _ = make(16, 16)
    tensors[1][:, :, -1] = tensors[2][:, :, -1] = torch.nan
    parts = [context_parallel.shard(x, layout=layout) for x in tensors]
    options = {"way": way, "layout": layout, "ulysses_degree": degree_of(way)}
    output = context_parallel.attention(*parts, causal=True, **options)
    output = context_parallel.unshard(output, layout=layout)
    assert output[:, :, :-1].isfinite().all()
    assert output[:, :, -1].isnan().all()


@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_where_it_is_seen(pair, way):
    for layout in LAYOUTS:
        pair.call(hidden_nan, way, layout)
        pair.call(masked_nan, way, layout)


def masked_nan(way, layout):
    """A mask leaves key 5, which is NaN, to row 12; row 7 sees nothing, and what comes to it is
    NaN."""
    tensors, cotangents = make(16, 16)
    tensors[1][:, :, 5] = tensors[2][:, :, 5] = cotangents[0][:, :, 7] = torch.nan
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    mask[:, :, :, 5] = mask[:, :, 7] = False
    mask[:, :, 12, 5] = True
    shard = functools.partial(context_parallel.shard, layout=layout)
    unshard = functools.partial(context_parallel.unshard, layout=layout)
    options = {"way": way, "layout": layout, "ulysses_degree": degree_of(way)}
    many = functools.partial(context_parallel.attention, return_lse=True, **options)
    given = {"mask": shard(mask), "bias": torch.zeros(1, 4, 16 // dist.get_world_size(), 16)}
    parts = [shard(x) for x in tensors], [shard(x) for x in cotangents]
    *found, d_bias = results(many, *parts, **given)
    output, lse, d_query, *of_keys = (unshard(x) for x in found)
    for x in (output, lse, d_query, unshard(d_bias)):
        rows = x.isnan().flatten(3).any(3) if x.dim() == 4 else x.isnan()
        assert rows[:, :, 12].all() and not rows[:, :, [i for i in range(16) if i != 12]].any()
    for x in of_keys:  # the rest of row 12 is spoiled by key 5
        assert x.isnan().any(3)[:, :, 5].all()
    hidden = shard(mask & (torch.arange(16) != 5))
    output, lse, *gradients = results(many, *parts, sinks=torch.zeros(4), mask=hidden)
    assert all(x.isfinite().all() for x in (output, lse, gradients[0], gradients[-1]))
    assert (unshard(output)[:, :, 7] == 0).all() and (unshard(lse)[:, :, 7] == 0).all()


def shard_and_back(layout):
    x = torch.arange(2 * 16 * 3).view(2, 16, 3)
    part = context_parallel.shard(x, axis=1, layout=layout)
    assert part.shape == (2, 16 // dist.get_world_size(), 3)
    assert torch.equal(context_parallel.unshard(part, axis=1, layout=layout), x)
    return part[0, :, 0].tolist()


def test_shard_and_unshard(group):
    rows = [x // 3 for x in itertools.chain(*group.call(shard_and_back, "contiguous"))]
    assert rows == list(range(16))
    first = group.call(shard_and_back, "zigzag")[0]
    half = len(first) // 2
    assert [x // 3 for x in first] == [*range(half), *range(16 - half, 16)]


def compiled():
    (query, key, value), cotangents = make(16, 16)
    parts = [context_parallel.shard(x) for x in (query, key, value)]
    cotangents = [context_parallel.shard(x) for x in cotangents]
    tensors = {"bias": context_parallel.shard(torch.randn(1, 4, 16, 16)), "sinks": torch.ones(4)}
    for way, more in ("ring", {}), ("ulysses", tensors):
        options = {"causal": True, "return_lse": True, "way": way}
        eager = functools.partial(context_parallel.attention, **options)
        program = torch.compile(eager, backend="aot_eager", fullgraph=True)
        found, expected = (results(f, parts, cotangents, **more) for f in (program, eager))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_compiles_without_a_break(pair):
    pair.call(compiled)


def of_dtensors():
    """On a mesh of batch and rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "rows"))
    tensors, cotangents = make(16, 16)
    placements = [Shard(0), Shard(2)]
    more = {"bias": torch.randn(1, 1, 16, 16), "sinks": torch.randn(4)}
    one = functools.partial(whole_attention, causal=True, return_lse=True)
    expected = results(one, tensors, cotangents, **more)
    leaves = [distribute_tensor(x, mesh, placements).requires_grad_() for x in tensors]
    options = {"causal": True, "return_lse": True}
    of_options = {"bias": [Replicate(), Shard(2)], "sinks": [Replicate(), Replicate()]}
    weights = [distribute_tensor(more[n], mesh, p).requires_grad_() for n, p in of_options.items()]
    output, lse = context_parallel.attention(*leaves, **options, **dict(zip(of_options, weights)))
    cotangents = [distribute_tensor(x, mesh, placements) for x in cotangents]
    torch.autograd.backward((output, lse), cotangents)
    for a, b in zip((output, lse, *(x.grad for x in (*leaves, *weights))), expected):
        torch.testing.assert_close(a.full_tensor(), b, rtol=0, atol=2e-5)


def test_dtensors():
    ranks(4).call(of_dtensors)


def replaced():
    """A model that knows nothing of ranks, from tokens to its loss."""
    torch.manual_seed(0)
    x, labels = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    weights = torch.randn(3, 8, 8, requires_grad=True)
    masks = torch.rand(16, 16) < 0.5, torch.randn(2, 1, 16, 16)

    def loss(**options):
        q, k, v = (x @ w for w in weights)
        heads = (y.unflatten(2, (2, 4)).transpose(1, 2) for y in (q, k, v))
        output = sdpa(*heads, **options).transpose(1, 2).flatten(2)
        return (output - labels).square().sum()

    options = ({"is_causal": True}, *({"attn_mask": mask} for mask in masks))
    masks[0][:, 0] = True  # else PyTorch's rows that see nothing are NaN
    expected = [torch.autograd.grad(loss(**o), weights)[0] for o in options]
    before = x.clone()
    buffers = {"buffers": [x, labels, *masks], "buffer_seq_dims": [1, 1, 0, 2]}
    with context_parallel.replace_sdpa(**buffers):
        assert x.shape[1] == 16 // dist.get_world_size()
        found = [torch.autograd.grad(loss(**o), weights)[0] for o in options]
    assert torch.equal(x, before)
    for a, b in zip(found, expected):
        dist.all_reduce(a)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_replaces_the_attention_of_pytorch(group):
    group.call(replaced)


# ---- Which way, by itself


def test_the_rule():
    from dlattn._context_parallel import Chosen, Sizes, choose

    sizes = Sizes(2, 8, 32, 8, 512, 512, 65536, 65536)
    assert choose("auto", None, sizes) == Chosen(1, True)  # few key heads: they are cheap to have
    assert choose("auto", None, sizes._replace(ranks=8)) == Chosen(8, False)  # less moves
    assert choose("auto", None, sizes._replace(ranks=8, heads=36, heads_kv=6)) == Chosen(1, True)
    full = sizes._replace(free_bytes=2**30)
    assert choose("auto", None, full) == Chosen(1, False)  # keys do not fit
    assert choose("auto", None, sizes._replace(ranks=32)) == Chosen(8, False)  # over hosts
    assert choose("ring_ulysses", 4, sizes._replace(ranks=8)) == Chosen(4, False)
    alibi = sizes._replace(has_alibi=True)
    assert choose("auto", None, alibi._replace(ranks=32)) == Chosen(32, False)
    assert choose("auto", None, alibi._replace(heads=7, heads_kv=7)) == Chosen(1, True)


def alibi_without_offsets():
    """As on a GPU: what has one diagonal from the first key, or to the last, needs no other."""
    from dlattn import _context_parallel as ours

    takes_offsets, ours._takes_offsets = ours._takes_offsets, lambda *_: False
    try:
        slopes = {"alibi_slopes": torch.arange(1.0, 5) / 8}
        causal = {**slopes, "causal": True}
        for options, way, layout in (
            (slopes, "ulysses", "contiguous"),
            (slopes, "auto", "zigzag"),
            (causal, "all_gather", "zigzag"),
            ({**causal, "window": (9, None)}, "all_gather", "contiguous"),
        ):
            compare(way, layout, options, rows=32, keys=32)
        refused_by = "no kernel of cpu counts distances.*way='ulysses' needs none"
        refused = [{"way": "ring", **causal}]
        if dist.get_world_size() > 2:  # else the ends of the keys are those of a rank's rows
            refused += [
                {"way": "all_gather", **slopes},
                {"way": "ring_ulysses", "ulysses_degree": 2, **causal},
            ]
        for options in refused:
            refuse_alike(refused_by, error=dlattn.Unsupported, **options)
    finally:
        ours._takes_offsets = takes_offsets


def test_alibi_where_kernels_take_no_offset(group):
    group.call(alibi_without_offsets)


def test_which_kernels_take_an_offset(monkeypatch):
    from dlattn import _context_parallel as ours

    row = next(k for k in dlattn.kernels() if k.name == "cpu_fwd_ref")
    rows = [
        row._replace(backend="gpu", dtypes="f16 bf16"),
        row._replace(backend="gpu", dtypes="f64 f32", features=0),
        row._replace(backend="gpu", dtypes="f32", operation="backward"),
    ]
    monkeypatch.setattr(ours, "kernels", lambda: rows)
    takes = ours._takes_offsets.__wrapped__
    assert takes("gpu", "bfloat16") and takes("gpu", "float16")
    assert not takes("gpu", "float32") and not takes("gpu", "float64")
    assert not takes("cpu", "bfloat16")


# ---- What is refused, on every rank alike


def refused(change, rank, pattern, operator="ring", **options):
    """``change`` is what one rank does otherwise."""
    tensors, _ = make(16, 16)
    parts = [context_parallel.shard(x) for x in tensors]
    options = {"way": operator, **options}
    if dist.get_rank() == rank:
        parts, options = change(parts, options)
    with pytest.raises(dlattn.InvalidArgument, match=pattern):
        context_parallel.attention(*parts, **options)


def longer(parts, options):
    return [torch.cat([x, x], 2) for x in parts], options


def in_double(parts, options):
    return [x.double() for x in parts], options


def mixed(parts, options):
    return [parts[0].double(), *parts[1:]], options


def causally(parts, options):
    return parts, {**options, "causal": True}


def other_way(parts, options):
    return parts, {**options, "way": "ulysses"}


def with_sinks(parts, options):
    return parts, {**options, "sinks": torch.zeros(4)}


def with_one_head_of_bias(parts, options):
    return parts, {**options, "bias": options["bias"][:, :1]}


def with_gradients(parts, options):
    return [x.requires_grad_() for x in parts], options


def with_too_wide_a_mask(parts, options):
    return parts, {**options, "mask": torch.ones(1, 1, 8, 17, dtype=torch.bool)}


@pytest.mark.parametrize("way", ["ring", "ulysses"])
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (longer, r"\[2, 4, 16, 8\] on rank 1, float32 \[2, 4, 8, 8\] on rank 0"),
        (in_double, r"float64 \[2, 4, 8, 8\] on rank 1, float32 \[2, 4, 8, 8\] on rank 0"),
        (
            mixed,
            r"rank 1 has InvalidArgument: key: is torch.float32 on cpu, query is torch.float64",
        ),
        (causally, "causal is True on rank 1, False on rank 0"),
        (with_sinks, r"sinks is float32 \[4\] on rank 1, None on rank 0"),
        (
            with_one_head_of_bias,
            r"bias is float32 \[1, 1, 8, 16\] on rank 1, float32 \[1, 4, 8, 16\] on rank 0",
        ),
        (with_gradients, r"wanted is \['query', 'key', 'value'\] on rank 1, \[\] on rank 0"),
        (
            with_too_wide_a_mask,
            r"rank 1 has InvalidArgument: mask: shape is \[1, 1, 8, 17\], must be "
            r"\[2\|1, 4\|1, 8\|1, 16\|1\]: the rank's rows and all keys",
        ),
    ],
)
def test_a_rank_that_differs_is_an_error_on_all(pair, change, pattern, way):
    more = {"bias": torch.zeros(1, 4, 8, 16)} if change is with_one_head_of_bias else {}
    pair.call(refused, change, 1, pattern, way, **more)


def test_another_way_is_an_error_on_all(pair):
    pair.call(refused, other_way, 1, "ulysses is 2 on rank 1, 1 on rank 0")


def absent():
    from dlattn import _torch_context_parallel as ours

    name = dist.group.WORLD.group_name
    store = dist.distributed_c10d._world.pg_map[dist.group.WORLD][1]
    before = store.timeout
    store.set_timeout(datetime.timedelta(seconds=1))
    try:
        if dist.get_rank():
            ours._calls[name] += 1  # as if it had been made
            return
        with pytest.raises(dlattn.Error, match=r"ranks \[1\] have not made this call"):
            context_parallel.attention(*(context_parallel.shard(x) for x in make(16, 16)[0]))
    finally:
        store.set_timeout(before)


def test_a_rank_that_does_not_come_is_named(pair):
    pair.call(absent)


def unknown_to_the_plugin():
    """Rank 1, which would have no call to make, hears of it, too."""
    for check in True, False:
        parts = [context_parallel.shard(x.to(torch.int32)) for x in make(16, 16)[0]]
        with contextlib.ExitStack() as stack:
            if check or dist.get_rank() == 0:
                stack.enter_context(pytest.raises(dlattn.Unsupported, match="dtype"))
            context_parallel.attention(*parts, query_length=8, way="all_gather", check=check)


def test_what_the_plugin_refuses_is_refused_on_all(pair):
    pair.call(unknown_to_the_plugin)


def refuse_alike(
    pattern, axis=2, layout="contiguous", rows=16, error=dlattn.InvalidArgument, **options
):
    parts = [context_parallel.shard(x) for x in make(rows, rows)[0]]
    with pytest.raises(error, match=pattern):
        context_parallel.attention(*parts, layout=layout, **options)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"way": "fast"}, "way: is 'fast', must be one of 'auto', 'all_gather'"),
        ({"layout": "striped"}, "layout: is 'striped', must be 'contiguous' or 'zigzag'"),
        (
            {"layout": "zigzag", "rows": 6},
            r"zigzag needs shards of one even length, they have \[3, 3\]",
        ),
        ({"ulysses_degree": 2}, "ulysses_degree: is 2, needs way='ring_ulysses'"),
        ({"ulysses_degree": 3, "way": "ring_ulysses"}, "is 3, must divide the 2 ranks"),
        ({"key_length": 17}, "key_length: is 17, must be from 0 to 16"),
        ({"window": (1, 2, 3)}, "window: is"),
        ({"sinks": torch.zeros(5)}, r"sinks: shape is \[5\], must be \[4\]"),
        ({"alibi_slopes": torch.zeros(1, 1, 4)}, r"must be \[4\] or \[2, 4\]"),
        ({"bias": torch.zeros(16, 16)}, r"bias: shape is \[1, 1, 16, 16\], must be \[2|1, 4|1, 8|"),
        ({"mask": torch.zeros(8, 16)}, "mask: is torch.float32, must be torch.bool or torch.uint8"),
        ({"bias": 1.0, "way": "ulysses"}, "bias: is a builtins.float, must be a torch.Tensor"),
        ({"query_segments": torch.zeros(2, 8, dtype=torch.int32)}, "must be given together"),
    ],
)
def test_bad_arguments(pair, options, pattern):
    pair.call(refuse_alike, pattern, **options)


def refuse_shard():
    with pytest.raises(dlattn.InvalidArgument, match="has 15 rows, must be a multiple of 2 ranks"):
        context_parallel.shard(torch.zeros(1, 1, 15, 8))
    replace = context_parallel.replace_sdpa
    one = [torch.zeros(4)]
    with pytest.raises(dlattn.InvalidArgument, match="there are 1 buffers"), replace(buffers=one):
        pass
    with replace(), pytest.raises(dlattn.Unsupported, match="dropout_p: is 0"):
        sdpa(*(torch.zeros(1, 1, 4, 8) for _ in range(3)), dropout_p=0.5)


def test_bad_shards(pair):
    pair.call(refuse_shard)
