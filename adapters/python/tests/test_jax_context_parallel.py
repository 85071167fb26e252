"""dlattn.jax.context_parallel over eight devices of the host, beside one."""

from __future__ import annotations

import functools
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import dlattn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dlattn.jax import attention, context_parallel
from jax.sharding import Mesh, PartitionSpec

WAYS = ("all_gather", "ring", "ulysses", "ring_ulysses")
WEIGHTS = ("bias", "alibi_slopes", "sinks")
RESULTS = ("output", "lse", "d_query", "d_key", "d_value")
OPTIONS = {
    "plain": ({"softcap": 3.0}, 32, 32),
    "causal_bottom_right": ({"causal": True, "alignment": "bottom_right", "scale": 0.5}, 16, 48),
    "padding": ({"query_length": 27, "key_length": 30, "window": (9, 3)}, 32, 32),
}


def make(rows, keys, heads=4, heads_kv=2, dtype=np.float32):
    """(query, key, value), cotangents of output and log-sum-exp."""
    random = np.random.default_rng(0)
    shapes = (heads, rows, 8), (heads_kv, keys, 8), (heads_kv, keys, 8), (heads, rows, 8)
    *tensors, d_output = (random.standard_normal((2, *s)).astype(dtype) for s in shapes)
    return tuple(tensors), (d_output, random.standard_normal((2, heads, rows)).astype(np.float32))


def results(call, tensors, cotangents, arrays=None):
    """Output, log-sum-exp and gradients of the three tensors, and of the arrays that have one."""
    weights, others = {}, {}
    for name, x in (arrays or {}).items():
        (weights if name in WEIGHTS else others)[name] = x

    def finite(tensors, weights):
        output, lse = call(*tensors, **weights, **others)
        return (output, jnp.where(jnp.isfinite(lse), lse, 0)), lse

    (output, _), pull, lse = jax.vjp(finite, tensors, weights, has_aux=True)
    gradients, of_weights = pull(cotangents)
    return output, lse, *gradients, *(of_weights[name] for name in WEIGHTS if name in weights)


def spec_of(name, x):
    """How the whole is spread over batch and rows."""
    if name in ("alibi_slopes", "sinks"):
        return PartitionSpec(*("batch",) * (x.ndim - 1))
    axes = ["batch" if len(x) > 1 else None, "rows"]
    if not name.endswith("segments"):
        axes = [axes[0], None, "rows" if x.shape[2] > 1 else None]
    return PartitionSpec(*axes)


def many(devices, way, layout, options, tensors, cotangents, arrays=None, batches=1):
    """The same of devices that each have a part, put together again; the second time it must have
    the same bits."""
    names = ("batch", "rows")
    mesh = Mesh(np.array(jax.devices()[: batches * devices]).reshape(batches, devices), names)
    spec = PartitionSpec("batch", None, "rows")
    arrays = arrays or {}
    specs = {name: spec_of(name, x) for name, x in arrays.items()}

    def here(query, key, value, arrays):
        return context_parallel.attention(
            query,
            key,
            value,
            axis_name="rows",
            way=way,
            layout=layout,
            ulysses_degree=2 if way == "ring_ulysses" else None,
            return_lse=True,
            **options,
            **arrays,
        )

    spread = jax.shard_map(here, mesh=mesh, in_specs=(*(spec,) * 3, specs), out_specs=(spec, spec))

    @jax.jit
    def call(tensors, arrays, cotangents):
        return results(lambda *x, **arrays: spread(*x, arrays), tensors, cotangents, arrays)

    def is_spread(name):
        return "rows" in specs.get(name, ())

    def arrange(x):
        return context_parallel.arrange(x, devices, axis=min(x.ndim - 1, 2), layout=layout)

    arranged = {name: arrange(x) if is_spread(name) else x for name, x in arrays.items()}
    given = jax.tree.map(arrange, tensors), arranged, jax.tree.map(arrange, cotangents)
    found, again = call(*given), call(*given)
    for a, b in zip(found, again):
        np.testing.assert_array_equal(a, b, "other bits on the second run")
    names = (*RESULTS, *(name for name in WEIGHTS if name in arrays))
    return [
        context_parallel.restore(np.asarray(x), devices, layout=layout)
        if name in RESULTS or is_spread(name)
        else x
        for name, x in zip(names, found)
    ]


def compare(found, expected, tolerance=2e-5):
    names = (*RESULTS, *(f"option {i}" for i in range(len(found) - len(RESULTS))))
    for name, a, b in zip(names, found, expected):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        largest = 1 if name in RESULTS else abs(b).max(initial=1)  # sums of many pairs
        np.testing.assert_allclose(a, b, 0, tolerance * largest, err_msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_and_gradients(options, way):
    options, rows, keys = options
    one = dict(options)
    for name in ("query_length", "key_length"):
        if name in one:
            one[f"{name}s"] = np.full(2, one.pop(name), np.int32)
    given = make(rows, keys)
    expected = results(functools.partial(attention, return_lse=True, **one), *given)
    layout = "zigzag" if options.get("causal") else "contiguous"
    compare(many(4, way, layout, dict(options), *given), expected)


@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_segments(way):
    numbers = np.array([[0] * 5 + [1] * 17 + [0] * 10, [3] * 16 + [4] * 16], np.int32)
    given = make(32, 32)
    mask = (numbers[:, :, None] == numbers[:, None])[:, None]
    expected = results(
        functools.partial(attention, causal=True, return_lse=True, mask=mask), *given
    )
    segments = {"query_segments": numbers, "key_segments": numbers}
    compare(many(4, way, "zigzag", {"causal": True}, *given, segments), expected)


def arrays_of(names, rows=32, keys=32):
    random = np.random.default_rng(1)
    mask = random.random((2, 1, rows, keys)) < 0.5
    mask[:, :, [3, -4] if rows else []] = False  # rows that see no key
    made = {
        "bias": random.standard_normal((1, 4, rows, keys)).astype(np.float32),
        "mask": mask,
        "alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0], np.float32),
        "sinks": random.standard_normal(4).astype(np.float32),
        "bias_of_heads": random.standard_normal((2, 1, rows, keys)).astype(np.float32),
        "bias_of_keys": random.standard_normal((1, 4, 1, keys)).astype(np.float32),
        "bias_of_rows": random.standard_normal((2, 4, rows, 1)).astype(np.float32),
        "mask_of_keys": mask[:, :, 5:6].astype(np.uint8),
        "alibi_slopes_of_batch": random.random((2, 4)).astype(np.float32),
    }
    return {name.split("_of_")[0]: made[name] for name in names}


FROM_THE_END = {"causal": True, "alignment": "bottom_right"}


@pytest.mark.parametrize(
    ("way", "layout", "options", "names", "shape"),
    [
        ("ring", "zigzag", {"causal": True}, ("bias", "mask", "alibi_slopes", "sinks"), (32, 32)),
        ("ring", "contiguous", FROM_THE_END, ("bias_of_rows", "sinks"), (48, 16)),
        ("all_gather", "zigzag", FROM_THE_END, ("bias_of_keys", "alibi_slopes_of_batch"), (16, 48)),
        ("all_gather", "contiguous", {"window": (9, 7)}, ("bias", "mask", "sinks"), (32, 32)),
        ("ulysses", "zigzag", {}, ("bias_of_heads", "mask", "alibi_slopes", "sinks"), (32, 32)),
        ("ulysses", "contiguous", {"causal": True}, ("bias_of_keys", "mask_of_keys"), (32, 32)),
        ("ring_ulysses", "zigzag", {"causal": True}, ("bias", "mask", "sinks"), (32, 32)),
        ("ring_ulysses", "contiguous", {}, ("bias_of_rows", "alibi_slopes_of_batch"), (32, 32)),
    ],
)
def test_array_options_and_gradients(way, layout, options, names, shape):
    given, arrays = make(*shape), arrays_of(names, *shape)
    expected = results(functools.partial(attention, return_lse=True, **options), *given, arrays)
    compare(many(4, way, layout, options, *given, arrays), expected)


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)])
def test_empty_shards(shape):
    given, arrays = make(*shape), arrays_of(("bias_of_keys", "sinks"), *shape)
    expected = results(functools.partial(attention, return_lse=True), *given, arrays)
    compare(many(2, "ring", "contiguous", {}, *given, arrays), expected)


def test_nan_stays_where_it_is_seen():
    """A mask leaves key 5, which is NaN, to row 12; row 7 sees nothing, and what comes to it is
    NaN."""
    tensors, cotangents = make(16, 16)
    tensors[1][:, :, 5] = tensors[2][:, :, 5] = cotangents[0][:, :, 7] = np.nan
    mask = np.ones((1, 1, 16, 16), bool)
    mask[..., 5] = mask[:, :, 7] = False
    hidden, others = mask.copy(), np.arange(16) != 12
    mask[:, :, 12, 5] = True
    sinks = np.zeros(4, np.float32)
    spread = functools.partial(many, 2, "ring", "zigzag", {}, tensors, cotangents)
    for x in spread({"mask": mask})[:3]:
        rows = np.isnan(x).reshape(*x.shape[:3], -1).any(3)
        assert rows[:, :, 12].all() and not rows[:, :, others].any()
    output, lse, d_query, *_, d_sinks = spread({"mask": hidden, "sinks": sinks})
    assert all(np.isfinite(x).all() for x in (output, lse, d_query, d_sinks))
    assert (output[:, :, 7] == 0).all() and (lse[:, :, 7] == 0).all()


def test_segments_on_one_device():
    """dlattn.jax.attention itself, by the plugin and by JAX's operators."""
    numbers = np.array([[0] * 100 + [1] * 40, [3] * 16 + [4] * 124], np.int32)
    given = make(140, 140)
    mask = (numbers[:, :, None] == numbers[:, None])[:, None]
    segments = {"query_segments": numbers, "key_segments": numbers}
    expected = results(functools.partial(attention, return_lse=True, mask=mask), *given)
    by_segments = functools.partial(attention, return_lse=True, **segments)
    compare(results(by_segments, *given), expected)
    from dlattn import _jax_native

    serves, _jax_native.serves = _jax_native.serves, lambda *_, **__: False
    try:
        compare(results(by_segments, *given), expected)
    finally:
        _jax_native.serves = serves


@pytest.mark.parametrize("way", ["all_gather", "ring_ulysses"])
def test_packed_sequences(way):
    """Of 5, 0, 13 and 14 rows, each by itself; with a hand over the devices' ends."""
    cu_seqlens = np.array([0, 5, 5, 18, 32], np.int32)
    tensors, _ = make(32, 32)
    packed = [x[0].swapaxes(0, 1) for x in tensors]
    expected = attention(*packed, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    mesh = Mesh(np.array(jax.devices()[:4]), ("rows",))

    def here(*tensors):
        return context_parallel.attention(
            *tensors,
            axis_name="rows",
            way=way,
            layout="zigzag",
            ulysses_degree=2 if way == "ring_ulysses" else None,
            causal=True,
            cu_seqlens=cu_seqlens,
        )

    spec = PartitionSpec("rows")
    spread = jax.jit(jax.shard_map(here, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))
    found = spread(*(context_parallel.arrange(x, 4, axis=0) for x in packed))
    found = context_parallel.restore(found, 4, axis=0)
    np.testing.assert_allclose(found, expected, 0, 2e-5)


def test_eight_devices_and_batches():
    given = make(48, 48, heads=8, heads_kv=8)
    expected = results(functools.partial(attention, causal=True, return_lse=True), *given)
    causal = {"causal": True}
    for way in ("auto", "ring_ulysses"):
        compare(many(8, way, "zigzag", causal, *given), expected)
    compare(many(4, "ring", "zigzag", causal, *given, batches=2), expected)


def test_bfloat16():
    given = make(32, 32, dtype=jnp.bfloat16)
    expected = results(functools.partial(attention, causal=True, return_lse=True), *given)
    compare(many(4, "ring", "zigzag", {"causal": True}, *given), expected, 0.06)


def test_one_branch_for_each_kind_of_device():
    """Beside the first step, in which all do alike, devices have keys of earlier ones or of later
    ones; and no array has an element for each pair of rows and keys."""
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    spec = PartitionSpec(None, None, "rows")

    def here(*tensors):
        options = {"axis_name": "rows", "way": "ring", "layout": "zigzag", "causal": True}
        return context_parallel.attention(*tensors, **options)

    spread = jax.shard_map(here, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    text = jax.jit(spread).lower(*make(8 * 300, 8 * 300)[0]).as_text()
    assert text.count("stablehlo.custom_call @dlattn_forward") == 1 + 2 * 7
    assert not any(f"{a}x{b}x" in text for a in (150, 300) for b in (150, 300))


def test_alibi_where_kernels_take_no_offset(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr("dlattn._context_parallel._takes_offsets", lambda *_: False)
    given, arrays = make(32, 32), arrays_of(("alibi_slopes",))
    for options, way in ({"causal": True}, "all_gather"), ({}, "auto"):
        call = functools.partial(attention, return_lse=True, **options)
        compare(many(4, way, "zigzag", options, *given, arrays), results(call, *given, arrays))
    with pytest.raises(dlattn.Unsupported, match="no kernel of cpu counts distances"):
        many(4, "ring", "zigzag", {"causal": True}, *given, arrays)


def test_alibi_by_the_operators_of_jax(monkeypatch):
    """Where the plugin has no row for gradients but the reference, whose calls have diagonals of
    their own, too."""
    monkeypatch.setattr("dlattn._jax_native.serves", lambda *_, **__: False)
    given, arrays = make(16, 16), arrays_of(("alibi_slopes", "sinks"), 16, 16)
    expected = results(functools.partial(attention, return_lse=True), *given, arrays)
    compare(many(2, "ring", "contiguous", {}, *given, arrays), expected)


def test_arrange_and_restore():
    x = np.arange(32).reshape(1, 32)
    parts = context_parallel.arrange(x, 4, axis=1).reshape(4, 8)
    assert parts[0].tolist() == [0, 1, 2, 3, 28, 29, 30, 31]
    assert parts[3].tolist() == list(range(12, 20))
    assert (context_parallel.restore(parts.reshape(1, 32), 4, axis=1) == x).all()
    with pytest.raises(dlattn.InvalidArgument, match="has 32 rows, must be a multiple of 5"):
        context_parallel.arrange(x, 5, axis=1)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"way": "fast"}, "way: is 'fast', must be one of"),
        ({"layout": "striped"}, "layout: is 'striped'"),
        ({"way": "ulysses", "heads_kv": 3, "heads": 6}, "shares 6 query and 3 key heads between 4"),
        ({"key_length": 33}, "key_length: is 33, must be from 0 to 32"),
        ({"keys": 16, "query_segments": np.zeros((2, 8), np.int32)}, "must be given together"),
        ({"sinks": np.zeros(5)}, r"sinks: shape is \[5\], must be \[4\]"),
        (
            {"bias": np.zeros((8, 8))},
            r"bias: shape is \[1, 1, 8, 8\], must be \[2\|1, 4\|1, 8\|1, 32",
        ),
        ({"mask": np.zeros((8, 32))}, "mask: dtype is float"),
    ],
)
def test_bad_arguments(options, pattern):
    options = dict(options)
    shape = {name: options.pop(name) for name in ("heads", "heads_kv") if name in options}
    tensors, _ = make(32, options.pop("keys", 32), **shape)
    way = options.pop("way", "ring")

    def here(*tensors):
        return context_parallel.attention(*tensors, axis_name="rows", way=way, **options)

    mesh = Mesh(np.array(jax.devices()[:4]), ("rows",))
    spec = PartitionSpec(None, None, "rows")
    with pytest.raises(dlattn.InvalidArgument, match=pattern):
        jax.shard_map(here, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)(*tensors)
