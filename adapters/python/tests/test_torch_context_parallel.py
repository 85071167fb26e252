"""dlattn.torch.context_parallel over processes on this machine (gloo), beside one process.

What needs several GPUs is in bench/many_gpus.py, which checks before it times.
"""

from __future__ import annotations

import functools
import itertools

import dlattn
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (its wheel needs CUDA's)")

import torch.distributed as dist  # noqa: E402
from dlattn.torch import context_parallel  # noqa: E402
from ranks import ranks  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402

whole_attention = dlattn.torch.attention
sdpa = torch.nn.functional.scaled_dot_product_attention
WAYS = ("all_gather", "ring", "ulysses", "ring_ulysses")
LAYOUTS = ("contiguous", "zigzag")


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


def results(attention, tensors, cotangents):
    """Output, log-sum-exp and gradients of the three tensors."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    output, lse = attention(*tensors)
    seen = torch.where(lse.isfinite(), lse, 0)
    torch.autograd.backward((output, seen), (cotangents[0], cotangents[1].to(lse.dtype)))
    return [output.detach(), lse.detach(), *(x.grad for x in tensors)]


def degree_of(way):
    return 2 if way == "ring_ulysses" else None


def compare(way, layout, options, expected_options=None, tolerance=2e-5, **shape):
    """Each rank's results with its part of those of the whole."""
    shard = functools.partial(context_parallel.shard, layout=layout)
    tensors, cotangents = make(**shape)
    one = functools.partial(whole_attention, return_lse=True, **(expected_options or options))
    many = functools.partial(
        context_parallel.attention,
        return_lse=True,
        way=way,
        layout=layout,
        ulysses_degree=degree_of(way),
        **{n: shard(x, axis=1) if n.endswith("segments") else x for n, x in options.items()},
    )
    expected = [shard(x) for x in results(one, tensors, cotangents)]
    parts = [shard(x) for x in tensors], [shard(x) for x in cotangents]
    found = results(many, *parts)
    for name, a, b in zip(("output", "lse", "d_query", "d_key", "d_value"), found, expected):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    again = results(many, *parts)
    assert all(torch.equal(a, b) for a, b in zip(found, again)), "other bits on the second run"


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
    options = {"causal": True, "return_lse": True}
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


@pytest.mark.parametrize("way", WAYS)
def test_dtypes_and_shapes(pair, way):
    causal = {"causal": True}
    pair.call(
        compare, way, "zigzag", causal, tolerance=1e-12, rows=16, keys=16, dtype=torch.float64
    )
    half = {"tolerance": 0.03, "rows": 16, "keys": 16}
    pair.call(compare, way, "zigzag", causal, dtype=torch.bfloat16, **half)
    pair.call(compare, way, "zigzag", causal, dtype=torch.float16, **half)
    pair.call(compare, way, "contiguous", causal, rows=16, keys=16, dim=12, dim_v=5)
    pair.call(compare, way, "contiguous", causal, rows=16, keys=16, heads_kv=1)
    pair.call(compare, way, "contiguous", causal, rows=0, keys=16)
    pair.call(compare, way, "contiguous", causal, rows=16, keys=0)


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
    options = {"causal": True, "return_lse": True, "way": "ring"}
    eager = functools.partial(context_parallel.attention, **options)
    program = torch.compile(eager, backend="aot_eager", fullgraph=True)
    cotangents = [context_parallel.shard(x) for x in cotangents]
    for a, b in zip(results(program, parts, cotangents), results(eager, parts, cotangents)):
        assert torch.equal(a, b)


def test_compiles_without_a_break(pair):
    pair.call(compiled)


def of_dtensors():
    """On a mesh of batch and rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "rows"))
    tensors, cotangents = make(16, 16)
    placements = [Shard(0), Shard(2)]
    one = functools.partial(whole_attention, causal=True, return_lse=True)
    expected = results(one, tensors, cotangents)
    leaves = [distribute_tensor(x, mesh, placements).requires_grad_() for x in tensors]
    options = {"causal": True, "return_lse": True}
    output, lse = context_parallel.attention(*leaves, **options)
    cotangents = [distribute_tensor(x, mesh, placements) for x in cotangents]
    torch.autograd.backward((output, lse), cotangents)
    for a, b in zip((output, lse, *(x.grad for x in leaves)), expected):
        torch.testing.assert_close(a.full_tensor(), b, rtol=0, atol=2e-5)


def test_dtensors():
    ranks(4).call(of_dtensors)


def replaced():
    """A model that knows nothing of ranks, from tokens to its loss."""
    torch.manual_seed(0)
    x, labels = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    weights = torch.randn(3, 8, 8, requires_grad=True)

    def loss():
        q, k, v = (x @ w for w in weights)
        heads = (y.unflatten(2, (2, 4)).transpose(1, 2) for y in (q, k, v))
        output = sdpa(*heads, is_causal=True).transpose(1, 2).flatten(2)
        return (output - labels).square().sum()

    expected = torch.autograd.grad(loss(), weights)[0]
    before = x.clone()
    with context_parallel.replace_sdpa(buffers=[x, labels], buffer_seq_dims=[1, 1]):
        assert x.shape[1] == 16 // dist.get_world_size()
        found = torch.autograd.grad(loss(), weights)[0]
    assert torch.equal(x, before)
    dist.all_reduce(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
    ],
)
def test_a_rank_that_differs_is_an_error_on_all(pair, change, pattern, way):
    pair.call(refused, change, 1, pattern, way)


def test_another_way_is_an_error_on_all(pair):
    pair.call(refused, other_way, 1, "ulysses is 2 on rank 1, 1 on rank 0")


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
    with replace(), pytest.raises(dlattn.Unsupported, match="attn_mask, dropout_p"):
        sdpa(*(torch.zeros(1, 1, 4, 8) for _ in range(3)), dropout_p=0.5)


def test_bad_shards(pair):
    pair.call(refuse_shard)
