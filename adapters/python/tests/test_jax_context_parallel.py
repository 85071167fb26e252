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


def results(call, tensors, cotangents):
    """Output, log-sum-exp and gradients of the three tensors."""

    def finite(*tensors):
        output, lse = call(*tensors)
        return (output, jnp.where(jnp.isfinite(lse), lse, 0)), lse

    (output, _), pull, lse = jax.vjp(finite, *tensors, has_aux=True)
    return output, lse, *pull(cotangents)


def many(devices, way, layout, options, tensors, cotangents, segments=(), batches=1):
    """The same of devices that each have a part, put together again; the second time it must have
    the same bits."""
    names = ("batch", "rows")
    mesh = Mesh(np.array(jax.devices()[: batches * devices]).reshape(batches, devices), names)
    spec = PartitionSpec("batch", None, "rows")

    def here(query, key, value):
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
        )

    def with_segments(query, key, value, query_segments, key_segments):
        options.update(query_segments=query_segments, key_segments=key_segments)
        return here(query, key, value)

    specs = (spec,) * 3 + (PartitionSpec("batch", "rows"),) * len(segments)
    function = with_segments if segments else here
    spread = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(spec, spec))

    @jax.jit
    def call(tensors, segments, cotangents):
        return results(lambda *x: spread(*x, *segments), tensors, cotangents)

    given = tensors, segments, cotangents
    given = jax.tree.map(
        lambda x: context_parallel.arrange(x, devices, axis=min(x.ndim - 1, 2), layout=layout),
        given,
    )
    found, again = call(*given), call(*given)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(found, again))
    return [context_parallel.restore(np.asarray(x), devices, layout=layout) for x in found]


def compare(found, expected, tolerance=2e-5):
    for name, a, b in zip(("output", "lse", "d_query", "d_key", "d_value"), found, expected):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), 0, tolerance, err_msg=name
        )


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
    compare(many(4, way, "zigzag", {"causal": True}, *given, (numbers, numbers)), expected)


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
