"""dlattn.jax against jax.nn.dot_product_attention, under every transformation."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["DLATTN_NUM_THREADS"] = "4"  # so that XLA's threads are used on any machine

import functools

import dlattn
import dlattn.jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

TOLERANCE = {"float32": 5e-6, "float16": 4e-3, "bfloat16": 3e-2}
ours = dlattn.jax.dot_product_attention
theirs = jax.jit(
    functools.partial(jax.nn.dot_product_attention, implementation="xla"),
    static_argnames=("scale", "is_causal", "local_window_size"),
)


def normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def make(batch=2, rows=7, keys=9, heads=4, heads_kv=2, dim=16, dtype="float32"):
    return (
        normal(1, batch, rows, heads, dim, dtype=dtype),
        normal(2, batch, keys, heads_kv, dim, dtype=dtype),
        normal(3, batch, keys, heads_kv, dim, dtype=dtype),
    )


def close(a, b, tolerance=5e-6):
    np.testing.assert_allclose(*(np.asarray(x, np.float64) for x in (a, b)), rtol=0, atol=tolerance)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bias": {"bias": normal(4, 2, 4, 7, 9)},
    "bias_broadcast": {"bias": normal(4, 1, 4, 1, 9), "is_causal": True},
    "bias_low_rank": {"bias": normal(4, 7, 9)},
    # The first key is always visible: rows without keys are defined otherwise in JAX.
    "mask": {"mask": (normal(5, 2, 1, 7, 9) > 0).at[..., 0].set(True)},
    "key_lengths": {"key_value_seq_lengths": jnp.array([9, 4])},
    "query_lengths": {"query_seq_lengths": jnp.array([3, 7])},
    "lengths_causal": {
        "query_seq_lengths": jnp.array([3, 7]),
        "key_value_seq_lengths": jnp.array([4, 9]),
        "is_causal": True,
    },
    # With a mask, because JAX 0.8 forgets a window that comes alone.
    "window": {"local_window_size": 2, "mask": jnp.ones((1, 1, 1, 9), bool)},
    "window_pair": {"local_window_size": (3, 0), "is_causal": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option_and_gradient(options):
    tensors = make()
    arrays = {name: x for name, x in options.items() if name == "bias"}
    rest = {name: x for name, x in options.items() if name != "bias"}
    weight = normal(6, 2, 7, 4, 16)

    def loss(attention, tensors, arrays):
        return jnp.sum(attention(*tensors, **arrays, **rest) * weight)

    close(ours(*tensors, **options), theirs(*tensors, **options))
    found = jax.jit(jax.grad(functools.partial(loss, ours), (0, 1)))(tensors, arrays)
    expected = jax.jit(jax.grad(functools.partial(loss, theirs), (0, 1)))(tensors, arrays)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads_kv", [1, 4])
def test_dtype(dtype, heads_kv):
    tensors = make(dtype=dtype, heads_kv=heads_kv, dim=64)
    found = ours(*tensors, is_causal=True)
    assert found.dtype == dtype
    exact = (x.astype(jnp.float32) for x in tensors)  # XLA's CPU cannot always do it in float16
    close(found, theirs(*exact, is_causal=True), TOLERANCE[dtype])


def test_one_sequence():
    query, key, value = (x[0] for x in make())
    output, lse = ours(query, key, value, return_residual=True)
    assert lse.shape == (7, 4)
    close(output, theirs(query, key, value))


def test_lse_and_its_gradient():
    query, key, value = make()

    def expected(query):
        logits = jnp.einsum("btkgh,bskh->btkgs", query.reshape(2, 7, 2, 2, 16), key) / 4
        return jax.nn.logsumexp(logits, axis=-1).reshape(2, 7, 4)

    def found(query):
        return ours(query, key, value, return_residual=True)[1]

    close(found(query), expected(query))
    weight = normal(6, 2, 7, 4)
    gradients = (
        jax.jit(jax.grad(lambda q, f=f: jnp.sum(f(q) * weight)))(query) for f in (found, expected)
    )
    close(*gradients)


def test_backward_in_chunks():
    """More rows than a chunk has, and not a multiple of it."""
    query, key, value = make(rows=300, keys=310)

    def loss(f, *x):
        return jnp.sum(jnp.sin(f(*x, is_causal=True)))

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(query, key, value)
        for f in (ours, theirs)
    )
    jax.tree.map(lambda a, b: close(a, b, 5e-5), found, expected)


def test_backward_memory():
    """Never L x L: less than an eighth of it."""
    length = 8192
    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    step = jax.jit(jax.grad(lambda *x: jnp.sum(ours(*x)), (0, 1, 2)))
    memory = step.lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * length * 4 / 8


EXTRA = {
    "softcap": {"softcap": 0.8},
    "bottom_right": {"causal": True, "alignment": "bottom_right", "window": (4, None)},
    "alibi": {"alibi_slopes": jnp.array([0.5, 0.1, 0.2, 0.0]), "causal": True},
    "sinks": {"sinks": jnp.array([0.5, -1.0, 2.0, 0.0])},
    "empty_rows": {"mask": jnp.arange(7)[None, None, :, None] > 2},
}


@pytest.mark.parametrize("options", EXTRA.values(), ids=EXTRA)
def test_features_that_jax_has_not(options):
    """dlattn.jax.attention against float64, its gradients against finite differences of it."""
    query, key, value = (x.swapaxes(1, 2) for x in make())
    output, lse = dlattn.jax.attention(query, key, value, **options, return_lse=True)
    expected, expected_lse = reference.attention(query, key, value, **options)
    close(output, expected)
    close(lse, expected_lse)
    close(dlattn.attention(query, key, value, **options), output, 0)

    weight = np.asarray(normal(6, *output.shape), np.float64)
    floats = {n: x for n, x in options.items() if n in ("alibi_slopes", "sinks")}
    rest = {n: x for n, x in options.items() if n not in floats}
    arguments = {"query": query, "key": key, "value": value, **floats}

    def loss(arguments):
        return jnp.sum(dlattn.jax.attention(**arguments, **rest) * weight.astype(np.float32))

    found = jax.jit(jax.grad(loss))(arguments)
    for name, x in arguments.items():
        direction = np.asarray(normal(7, *x.shape), np.float64)
        ends = []
        for step in (1e-5, -1e-5):
            moved = {**arguments, name: np.asarray(x, np.float64) + step * direction}
            tensors = [moved.pop(n) for n in ("query", "key", "value")]
            ends.append(np.sum(reference.attention(*tensors, **moved, **rest)[0] * weight))
        np.testing.assert_allclose(
            np.sum(found[name] * direction),
            (ends[0] - ends[1]) / 2e-5,
            rtol=2e-4,
            atol=2e-4,
            err_msg=name,
        )


# ---- Transformations


@pytest.mark.parametrize("axes", [(0, None, None), (None, 1, 1), (2, 0, 1), (0, 0, 0)])
def test_vmap(axes):
    tensors = make()
    added = [
        x if axis is None else jnp.moveaxis(jnp.stack([x, 2 * x, -x]), 0, axis)
        for x, axis in zip(tensors, axes)
    ]
    for f in (lambda f: f, lambda f: jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1, 2))):
        found = jax.jit(jax.vmap(f(ours), axes))(*added)
        expected = jax.jit(jax.vmap(f(theirs), axes))(*added)
        jax.tree.map(lambda a, b: close(a, b, 2e-5), found, expected)


@pytest.mark.parametrize("shape", [(1, 4, 1, 9), (2, 1, 7, 9)])
@pytest.mark.parametrize("axis", [None, 0])
def test_vmap_with_bias(shape, axis):
    query, key, value = (jnp.stack([x, -x]) for x in make())
    bias = normal(8, *(() if axis is None else (2,)), *shape)
    both = (jax.jit(jax.vmap(f, (0, 0, 0, axis)))(query, key, value, bias) for f in (ours, theirs))
    close(*both)


def test_vmap_twice():
    query, key, value = make()
    many = jnp.stack([query, -query]), jnp.stack([key, 2 * key, 3 * key])
    both = (
        jax.jit(jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, None)))(*many, value)
        for f in (ours, theirs)
    )
    close(*both)


def test_shard_map():
    """Batch over 4 devices and heads over 2: each device calls the plugin on its own part."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("batch", "heads"))
    spec = P("batch", None, "heads", None)
    tensors = make(batch=8)

    def loss(f, *x):
        return jnp.sum(jnp.sin(f(*x)))

    causal = functools.partial(ours, is_causal=True)
    sharded = jax.shard_map(causal, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    program = jax.jit(sharded)
    close(program(*tensors), theirs(*tensors, is_causal=True))
    assert len(program(*tensors).sharding.device_set) == 8
    found = jax.jit(jax.grad(functools.partial(loss, sharded), (0, 1, 2)))(*tensors)
    expected = jax.jit(
        jax.grad(functools.partial(loss, functools.partial(theirs, is_causal=True)), (0, 1, 2))
    )(*tensors)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, expected)


def test_shard_map_with_shared_bias():
    """The gradient of what all devices share is the sum of theirs."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    spec = P("batch")
    tensors, bias = make(batch=4), normal(8, 1, 4, 7, 9)
    sharded = jax.shard_map(ours, mesh=mesh, in_specs=(spec, spec, spec, P()), out_specs=spec)

    def loss(f, bias):
        return jnp.sum(jnp.sin(f(*tensors, bias)))

    both = (jax.jit(jax.grad(functools.partial(loss, f)))(bias) for f in (sharded, theirs))
    close(*both, 2e-5)


def test_in_a_loop():
    """Several calls in one program, one after the other, with XLA's threads."""
    query, key, value = make(batch=1, rows=128, keys=128, heads=8, heads_kv=8, dim=32)

    def body(f, x, _):
        return f(x, key, value, is_causal=True), None

    both = (
        jax.jit(lambda x, f=f: jax.lax.scan(functools.partial(body, f), x, length=20)[0])(query)
        for f in (ours, theirs)
    )
    close(*both)


# ---- Refusals


def test_wrong_shapes_raise_while_tracing():
    query, key, value = make()
    with pytest.raises(ValueError, match=r"key: axis 3 \(head_dim\) is 8, query makes it 16"):
        jax.jit(ours)(query, key[..., :8], value)
    with pytest.raises(ValueError, match="3 heads do not divide the query's 4"):
        ours(query, normal(1, 2, 9, 3, 16), normal(1, 2, 9, 3, 16))
    with pytest.raises(NotImplementedError, match="query: dtype"):
        ours(*(x.astype(jnp.int8) for x in (query, key, value)))


def test_wrong_values_raise_while_running():
    query, key, value = make()
    with pytest.raises(Exception, match=r"key_lengths.*10"):
        jax.block_until_ready(ours(query, key, value, key_value_seq_lengths=jnp.array([9, 10])))
    close(ours(query, key, value), theirs(query, key, value))


def test_arrays_cannot_be_written():
    query, key, value = (x.swapaxes(1, 2) for x in make())
    with pytest.raises(dlattn.InvalidArgument, match="JAX arrays cannot be written to"):
        dlattn.attention(query, key, value, out=query)
