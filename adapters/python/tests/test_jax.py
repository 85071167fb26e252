"""dlattn.jax against jax.nn.dot_product_attention, under every transformation."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["DLATTN_NUM_THREADS"] = "4"  # so that XLA's threads are used on any machine

import functools
import subprocess
import sys

import dlattn
import dlattn.jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
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


@pytest.fixture(scope="module", params=["native", "operators"])
def backward(request):
    """Whether the plugin's rows, the reference among them, or JAX's operators compute gradients;
    compiled programs remember it."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlattn._jax_native.serves", lambda *_, **__: request.param == "native")
        yield request.param
    jax.clear_caches()


by_both = pytest.mark.usefixtures("backward")

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
    "lengths": {
        "query_seq_lengths": jnp.array([3, 7]),
        "key_value_seq_lengths": jnp.array([4, 9]),
    },
}


@by_both
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


@by_both
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


@by_both
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


@by_both
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


@by_both
@pytest.mark.parametrize("window", [(1, -1), (-1, 2), (3, -2), [0, 1]], ids=str)
def test_window_beside_the_row(window):
    """A negative side leaves out the row's own key. Rows without keys are defined otherwise."""
    query, key, value = make()
    # With a mask, because JAX 0.8 forgets a window that comes alone.
    options = {"local_window_size": tuple(window), "mask": jnp.ones((1, 1, 1, 9), bool)}
    weight = normal(6, 2, 7, 4, 16)
    if window[1] < 0:
        weight = weight.at[:, : -window[1]].set(0)

    def gradients(f, **options):
        return jax.grad(lambda *x: jnp.sum(f(*x, **options) * weight), (0, 1, 2))(query, key, value)

    found = gradients(ours, local_window_size=window)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, gradients(theirs, **options))


# ---- The backward pass


HIDDEN_FROM_5_ON = {
    "key_lengths": {"key_lengths": [5, 5]},
    "mask": {"mask": np.arange(9) < 5},
    "mask_of_rows": {"mask": np.broadcast_to(np.arange(9) < 5, (7, 9)), "softcap": 0.7},
    "causal": {"causal": True, "query_lengths": [5, 5]},
    "window": {"window": (2, 1), "query_lengths": [4, 4], "sinks": [0.5, -1.0]},
    "alibi": {"alibi_slopes": [0.5, 0.1], "key_lengths": [5, 5], "alignment": "bottom_right"},
    "bias": {"bias": np.where(np.arange(9) < 5, 0, -np.inf).astype(np.float32)},
}


def all_gradients(tensors, **options):
    def loss(tensors):
        output, lse = dlattn.jax.attention(**tensors, **options, return_lse=True)
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(lse))

    return jax.jit(jax.grad(loss))(tensors)


def heads_first(**shape):
    return dict(zip(("query", "key", "value"), (x.swapaxes(1, 2) for x in make(**shape))))


@by_both
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("options", HIDDEN_FROM_5_ON.values(), ids=HIDDEN_FROM_5_ON)
def test_what_is_hidden_reaches_no_gradient(options, poison):
    tensors = heads_first(heads=2, heads_kv=1)
    expected = all_gradients(tensors, **options)
    # The key of a bias of -inf is read, and NaN minus infinity is NaN.
    for name in ["value"] if "bias" in options else ["key", "value"]:
        tensors[name] = tensors[name].at[:, :, 5:, ::3].set(poison)
    found = all_gradients(tensors, **options)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), found, expected)
    assert not np.any(found["key"][:, :, 5:]) and not np.any(found["value"][:, :, 5:])


@by_both
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_seen_reaches_the_gradients_of_those_who_see_it(name):
    """NaN in the last of 7 rows and keys; the last row alone sees it, and the last 3 keys."""
    tensors = heads_first(rows=7, keys=7)
    tensors[name] = tensors[name].at[:, :, 6, 0].set(jnp.nan)
    found = all_gradients(tensors, causal=True, window=(2, 0))
    for gradient, first in (("query", 6), ("key", 4), ("value", 4)):
        assert np.isfinite(found[gradient][:, :, :first]).all(), gradient
        # NaN in an element of the value is NaN in that element of the output, and of its gradient.
        seen = slice(0, 1) if gradient == name == "value" else slice(None)
        assert np.isnan(found[gradient][:, :, first:, seen]).all(), gradient


@by_both
def test_rows_without_keys_have_gradient_0():
    tensors = heads_first()
    mask = np.arange(7)[:, None] < 4

    def loss(query):
        output, lse = dlattn.jax.attention(query, tensors["key"], tensors["value"], **options)
        return jnp.sum(output[:, :, 4:]) + jnp.sum(jnp.exp(lse[:, :, 4:]) ** 2)

    for options in ({"mask": mask}, {"query_lengths": [4, 4]}, {"query_lengths": np.zeros(2, int)}):
        options["return_lse"] = True
        assert not np.any(jax.jit(jax.grad(loss))(tensors["query"]))


@by_both
def test_gradient_at_large_logits():
    """Logits of 3e6, whose log-sum-exp float32 rounds to a quarter: weights of 1/2 and of 1/3."""
    query, key, value = (
        np.full((1, 1, 64, 1), 3e3),
        np.full((1, 1, 2, 1), 1e3),
        np.ones((1, 1, 2, 1)),
    )
    sinks = np.array([3e6], np.float32)
    attention = functools.partial(dlattn.jax.attention, query, key, scale=1)
    close(jax.grad(lambda v: jnp.sum(attention(v)))(value), np.full((1, 1, 2, 1), 32), 0)
    found = jax.grad(lambda v, s: jnp.sum(attention(v, sinks=s)), (0, 1))(value, sinks)
    rounding = 64 * 2**-24 * 64 / 3  # of 64 additions in float32
    close(found[0], np.full((1, 1, 2, 1), 64 / 3), rounding)
    close(found[1], [-64 / 3 * 2 / 3], rounding)


@by_both
def test_gradients_in_float64(backward):
    """To 1e-10, under a bias that moves the log-sum-exp to where float32 has steps of 1/32."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        query, key, value = (normal(i, 1, 2, 6, 8, dtype="float64") for i in (1, 2, 3))
        arguments = {
            "query": query,
            "key": key,
            "value": value,
            "bias": normal(4, 1, 2, 6, 6, dtype="float64") + 3e5,
            "sinks": jnp.array([3e5, 2.5]),
        }

        def plain(query, key, value, bias, sinks):
            logits = query @ key.mT / np.sqrt(8) + bias
            sinks = jnp.broadcast_to(sinks[:, None, None], (1, 2, 6, 1))
            lse = jax.nn.logsumexp(jnp.concatenate([logits, sinks], 3), 3)
            return jnp.exp(logits - lse[..., None]) @ value, lse

        def loss(f):
            def of(arguments):
                output, lse = f(**arguments)
                return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(lse - 3e5))

            return of

        ours = functools.partial(dlattn.jax.attention, return_lse=True)
        assert ours(**arguments)[1].dtype == jnp.float64
        found, expected = (jax.jit(jax.grad(loss(f)))(arguments) for f in (ours, plain))
        for name in arguments:
            # The plugin has sinks, and so their gradient, in float32.
            is_rounded = name == "sinks" and backward == "native"
            close(found[name], expected[name], 1e-6 if is_rounded else 1e-10)


@by_both
@pytest.mark.parametrize("extent", ["batch", "rows", "keys", "heads"])
def test_gradients_without_elements(extent):
    shape = {extent: 0, **({"heads_kv": 0} if extent == "heads" else {})}
    tensors = heads_first(**shape)
    heads = tensors["query"].shape[1]
    tensors["bias"], tensors["sinks"] = jnp.zeros((1, 1, 1, 1)), jnp.zeros(heads)
    found = all_gradients(tensors)
    for name, x in tensors.items():
        assert found[name].shape == x.shape
        if name != "sinks":
            assert not np.any(found[name])


def programs_of_gradients(f, *arguments):
    """The plugin's backward calls in the gradient's program."""
    text = jax.jit(f).lower(*arguments).as_text()
    return [line for line in text.splitlines() if "@dlattn_backward" in line]


@by_both
def test_only_what_is_wanted_is_computed(backward):
    query, key, value = make()
    bias = normal(4, 2, 4, 7, 9)

    def loss(*x):
        return jnp.sum(ours(*x))

    for wanted, slots in (((0, 1, 2), 0b0111), ((1,), 0b0010), ((0, 3), 0b1001)):
        lines = programs_of_gradients(jax.grad(loss, wanted), query, key, value, bias)
        if backward == "operators":
            assert not lines
        else:
            # Inputs up to the bias, and the output's gradient, for the log-sum-exp has none.
            slots = slots if dlattn.jax.KNOWS_WHAT_IS_WANTED else 0b1111
            assert f"slots = {0b111111 | 1 << 20 | slots << 22} :" in lines[0]


@by_both
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_in_narrow_types(dtype):
    """Within the rounding of output and gradients, beside float32."""
    tensors = make(rows=40, keys=50, dtype=dtype)

    def loss(f, *x):
        return jnp.sum(jnp.sin(f(*x, is_causal=True).astype(jnp.float32)))

    found = jax.jit(jax.grad(functools.partial(loss, ours), (0, 1, 2)))(*tensors)
    wide = (x.astype(jnp.float32) for x in tensors)
    expected = jax.jit(jax.grad(functools.partial(loss, theirs), (0, 1, 2)))(*wide)
    for a, b in zip(found, expected):
        assert a.dtype == dtype
        close(a, b, 4 * float(jnp.finfo(dtype).eps) * float(jnp.max(jnp.abs(b))))


def test_gradients_of_packed_sequences():
    """Beside the same sequences one by one."""
    rows, keys = np.array([0, 3, 3, 7]), np.array([0, 5, 7, 12])
    tensors = normal(1, 7, 4, 16), normal(2, 12, 2, 16), normal(3, 12, 2, 16)
    weight = normal(4, 7, 4, 16)

    def packed(*x):
        return dlattn.jax.attention(*x, cu_seqlens_q=rows, cu_seqlens_k=keys, causal=True)

    def one_by_one(query, key, value):
        return jnp.concatenate(
            [
                theirs(query[a:b], key[c:d], value[c:d], is_causal=True)
                for a, b, c, d in zip(rows, rows[1:], keys, keys[1:])
                if a < b
            ]
        )

    def gradient(f):
        return jax.grad(lambda *x: jnp.sum(f(*x) * weight), (0, 1, 2))

    found, expected = (jax.jit(gradient(f))(*tensors) for f in (packed, one_by_one))
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, expected)
    with pytest.raises(dlattn.Unsupported, match="packed attention has first-order gradients"):
        jax.grad(lambda x: jnp.sum(gradient(packed)(x, *tensors[1:])[0]))(tensors[0])
    with pytest.raises(dlattn.Unsupported, match="packed and paged attention cannot be vmapped"):
        jax.vmap(gradient(packed))(*(x[None] for x in tensors))
    pages = normal(5, 2, 4, 8, 16)
    options = {"block_table": np.zeros((1, 2)).astype(int), "key_lengths": np.array([8])}
    with pytest.raises(dlattn.Unsupported, match="paged attention has no gradient"):
        jax.grad(lambda x: jnp.sum(dlattn.jax.attention(x, pages, pages, **options)))(
            normal(6, 1, 4, 7, 16)
        )


# ---- Transformations


EXTRA_VMAP = {
    "bias_for_all": {"bias": normal(4, 1, 4, 7, 9)},
    "bias_of_rows": {"bias": normal(4, 2, 1, 7, 1)},
    "slopes": {"alibi_slopes": jnp.array([0.5, 0.1, 0.2, 0.0])},
    "sinks": {"sinks": jnp.array([0.5, -1.0, 2.0, 0.0])},
}


@by_both
@pytest.mark.parametrize("options", EXTRA_VMAP.values(), ids=EXTRA_VMAP)
def test_vmap_of_gradients_of_what_is_shared(options):
    """Each entry has its own gradient of what all share, as the entries one by one have."""
    query, key, value = (jnp.stack([x.swapaxes(1, 2), -x.swapaxes(1, 2)]) for x in make())

    def loss(query, value, options):
        return jnp.sum(jnp.sin(dlattn.jax.attention(query, key[0], value, **options)))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    found = jax.vmap(gradient, (0, 0, None))(query, value, options)
    one_by_one = [gradient(query[n], value[n], options) for n in range(2)]
    jax.tree.map(lambda a, *b: close(a, jnp.stack(b), 2e-5), found, *one_by_one)


@by_both
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


@by_both
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


@by_both
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


SHARDED = {
    "nowhere": (P(), P(), {}),
    "batch": (P("x"), P("x"), {"is_causal": True}),
    "batch_of_the_query_alone": (P("x"), P(), {}),
    "heads": (P(None, None, "y"), P(None, "x", "y"), {"is_causal": True}),
    "more_than_the_keys_have": (P(None, None, ("x", "y")), P(), {}),
    "rows": (P("x", "y"), P("x", "y"), {"is_causal": True, "local_window_size": (3, 1)}),
    "rows_and_lengths": (
        P(None, ("y", "x")),
        P(None, None, "y"),
        {"query_seq_lengths": [3, 8], "key_value_seq_lengths": [9, 4]},
    ),
    "bias_and_mask": (
        P("x", "y"),
        P(),
        {"bias": normal(4, 2, 4, 8, 10), "mask": np.arange(10) + np.arange(8)[:, None] < 12},
    ),
}


@by_both
@pytest.mark.parametrize("query_spec, key_spec, options", SHARDED.values(), ids=SHARDED)
def test_explicit_sharding(query_spec, key_spec, options):
    """Output and gradients lie where what they belong to lies."""
    tensors = make(rows=8, keys=10)

    def loss(query, key, value, attention):
        output = attention(query, key, value, **options)
        return jnp.sum(jnp.sin(output)), output

    def run(attention, tensors):
        return jax.jit(jax.grad(functools.partial(loss, attention=attention), (0, 1, 2), True))(
            *tensors
        )

    expected = run(ours, tensors)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(tensors, (query_spec, key_spec, key_spec))
        ]
        gradients, output = run(ours, placed)
        assert ours(*placed, **options).sharding == output.sharding
    jax.tree.map(lambda a, b: close(a, b, 2e-5), (gradients, output), expected)
    assert output.sharding.is_equivalent_to(placed[0].sharding, 4)
    for gradient, x in zip(gradients, placed):
        assert gradient.sharding.is_equivalent_to(x.sharding, 4)


@by_both
def test_explicit_sharding_of_every_feature():
    """Rows of a longer sequence: ALiBi, a window from the bottom right, sinks and the lse."""
    tensors = heads_first(rows=8)
    tensors["alibi_slopes"] = jnp.array([0.5, 0.1, 0.2, 0.0])
    tensors["sinks"] = jnp.array([0.5, -1.0, 2.0, 0.0])
    options = {"causal": True, "window": (5, None), "alignment": "bottom_right"}
    expected = all_gradients(tensors, **options)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        tensors["query"] = jax.device_put(tensors["query"], NamedSharding(mesh, P(None, "x", "y")))
        _, lse = dlattn.jax.attention(**tensors, **options, return_lse=True)
        assert jax.typeof(lse).sharding.spec == P(None, "x", "y")
        found = all_gradients(tensors, **options)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, expected)


def test_explicit_sharding_of_packed_heads():
    tensors = [normal(i, 9, 4, 16) for i in (1, 2, 3)]
    lengths = {name: np.array([0, 4, 9]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    expected = dlattn.jax.attention(*tensors, **lengths)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        tensors[0] = jax.device_put(tensors[0], NamedSharding(mesh, P(None, "x")))
        found = jax.jit(functools.partial(dlattn.jax.attention, **lengths))(*tensors)
    assert jax.typeof(found).sharding.spec == P(None, "x", None)
    close(found, expected)


@by_both
@pytest.mark.parametrize("spec", [P(None, "x"), P("x", "y")], ids=str)
def test_vmap_under_explicit_sharding(spec):
    tensors = [jnp.stack([x, -x]) for x in make()]
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    f = jax.jit(jax.vmap(jax.grad(lambda *x: jnp.sum(ours(*x)), (0, 1, 2))))
    expected = f(*tensors)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in tensors]
        found = f(*placed)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, expected)


@by_both
def test_scale_as_a_value():
    """A number of any kind, and a traced one, which has a gradient."""
    query, key, value = make()
    expected = theirs(query, key, value, scale=0.3)
    for scale in (np.float64(0.3), np.float32(0.3), jnp.float32(0.3), np.array(0.3)):
        close(ours(query, key, value, scale=scale), expected)
    close(jax.jit(lambda s: ours(query, key, value, scale=s))(0.3), expected)

    def gradient(f):
        return jax.grad(lambda s: jnp.sum(jnp.sin(f(query, key, value, scale=s))))

    xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    close(gradient(ours)(0.3), gradient(xla)(0.3), 2e-5)
    scales = jnp.array([0.3, -1.0, 0.0])
    close(jax.vmap(gradient(ours))(scales), jax.vmap(gradient(xla))(scales), 5e-5)
    half = [x.astype(jnp.float16) for x in (query, key, value)]
    found = jax.jit(lambda s: ours(*half, scale=s))(jnp.float32(0.3))
    assert found.dtype == jnp.float16


@by_both
def test_remat_donation_and_second_order():
    query, key, value = make()

    def loss(f, query):
        return jnp.sum(jnp.sin(f(query, key, value, is_causal=True)))

    def second(f):
        first = jax.grad(functools.partial(loss, f))
        return jax.grad(lambda query: jnp.sum(first(query) * jnp.cos(query)))

    expected = jax.grad(functools.partial(loss, theirs))(query)
    found = jax.jit(jax.grad(jax.checkpoint(functools.partial(loss, ours))))(query)
    close(found, expected, 2e-5)
    close(jax.jit(second(ours))(query), jax.jit(second(theirs))(query), 2e-5)
    step = jax.jit(lambda query: query - ours(query, key, value), donate_argnums=0)
    close(step(query + 0), query - theirs(query, key, value))


def test_the_threads_that_are_planned_are_run():
    """The program names them; a run with more of them would need more workspace."""
    x = np.ones((1, 512, 8, 64), np.float32)
    threads = dlattn.select(*(x.swapaxes(1, 2),) * 3).num_threads
    assert threads == 4
    assert f"num_threads = {threads} :" in jax.jit(ours).lower(x, x, x).as_text()
    first = jnp.ones((1, 8, 512, 64))
    close(raw_call({"query": first, "key": first, "value": first}, num_threads=1)[0], first)


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


# ---- What callers give


@by_both
def test_lists_numpy_and_weak_types():
    query, key, value = make()
    expected = ours(query, key, value, mask=jnp.ones((7, 9), bool).at[3].set(False))
    mask = np.ones((7, 9), bool)
    mask[3] = False
    close(ours(*(np.asarray(x) for x in (query, key, value)), mask=mask), expected, 0)
    close(ours(*(x.tolist() for x in (query, key, value)), mask=mask.tolist()), expected, 0)
    first = (x.swapaxes(1, 2) for x in (query, key, value))
    close(dlattn.jax.attention(*first, mask=mask[None]).swapaxes(1, 2), expected, 0)
    lengths = {"query_seq_lengths": [3, 7], "key_value_seq_lengths": np.array([4, 9], np.int64)}
    close(ours(query, key, value, **lengths), theirs(query, key, value, **OPTIONS["lengths"]))
    weak = jnp.full((1, 2, 1, 4), 0.5)
    assert weak.weak_type
    assert jax.grad(lambda x: jnp.sum(ours(x, x, x)))(weak).dtype == jnp.float32


# ---- Refusals


def refusals():
    query, key, value = make()
    main = (query, key, value)
    attention, partial = dlattn.jax.attention, functools.partial
    ones = np.ones((2, 1, 7, 9))
    yield "local_window_size: is 'a'", lambda: ours(*main, local_window_size="a")
    yield r"local_window_size: is \[1\]", lambda: ours(*main, local_window_size=[1])
    yield "local_window_size: is 1.5", lambda: ours(*main, local_window_size=1.5)
    yield "local_window_size.*traced", lambda: jax.jit(partial(ours, *main))(local_window_size=2)
    yield "mask: dtype is float32.*the bias", lambda: ours(*main, mask=ones)
    yield "mask: dtype is int32", lambda: attention(*main, mask=ones.astype(int))
    yield "mask: has 5 axes", lambda: attention(*main, mask=ones[None] > 0)
    yield "bias: dtype is complex64", lambda: ours(*main, bias=ones * 1j)
    yield "bias: axis 3", lambda: ours(*main, bias=ones[..., :8])
    yield "query_seq_lengths: dtype is float32", lambda: ours(*main, query_seq_lengths=[1.5, 2])
    yield "query_seq_lengths: axis 0", lambda: ours(*main, query_seq_lengths=[1, 2, 3])
    yield "key_value_seq_lengths: axis 0", lambda: ours(*main, key_value_seq_lengths=[1, 2, 3])
    yield "key: has 2 axes, must have 4, or 3", lambda: ours(query, key[0, 0], value)
    yield r"value: axis 1 \(\w+\) is 8, must be 9 as in key", lambda: ours(query, key, value[:, :8])
    yield (
        r"value: axis 2 \(\w+\) is 1, must be 2 as in key",
        lambda: ours(query, key, value[:, :, :1]),
    )
    yield "key: dtype is f", lambda: ours(query.astype(jnp.bfloat16), key, value)
    yield "key: is not an array", lambda: ours(query, "key", value)
    yield "value: is a masked array", lambda: ours(query, key, np.ma.array(value, mask=value > 0))
    yield "scale: has shape", lambda: jax.jit(lambda s: ours(*main, scale=s))(jnp.ones(2))
    yield "softcap.*traced", lambda: jax.jit(lambda s: attention(*main, softcap=s))(1.0)
    yield "is_causal.*traced", lambda: jax.jit(lambda s: ours(*main, is_causal=s))(True)
    yield "max_seqlen_q: is 1.5", lambda: attention(*main, max_seqlen_q=1.5)


@pytest.mark.parametrize(
    "message, call", [*refusals()], ids=lambda x: x if isinstance(x, str) else ""
)
def test_refusal_names_the_argument(message, call):
    with pytest.raises(dlattn.InvalidArgument, match=message):
        call()


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(name):
    """A cache of 8 bits with a scale for each head, beside float64 of what it stands for."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, heads, rows, 32)), jnp.float32)
        for heads, rows in ((4, 5), (2, 70), (2, 70))
    )
    key, value = key.astype(name), value.astype(jnp.float8_e4m3fn)
    scales = {n: jnp.asarray(rng.uniform(0.5, 2, (2, 2)), jnp.float32) for n in ("key", "value")}
    options = {f"{n}_scale": x for n, x in scales.items()}
    wide = (
        np.asarray(x, np.float64) * np.asarray(scales[n], np.float64)[:, :, None, None]
        for n, x in (("key", key), ("value", value))
    )
    wanted = dlattn.attention(np.asarray(query, np.float64), *wide)
    for f in (dlattn.jax.attention, dlattn.attention, jax.jit(dlattn.jax.attention)):
        np.testing.assert_allclose(f(query, key, value, **options), wanted, 1e-5, 1e-5)
    with pytest.raises(dlattn.Unsupported, match="float8 and scales of tensors have no gradient"):
        jax.grad(lambda q: dlattn.jax.attention(q, key, value).sum())(query)
    with pytest.raises(dlattn.Unsupported, match="scales of tensors cannot be vmapped"):
        jax.vmap(lambda q: dlattn.jax.attention(q, key, value, **options))(query[None])
    with pytest.raises(dlattn.InvalidArgument, match=r"key_scale: axis 1 \(heads\) is 3"):
        dlattn.jax.attention(query, key, value, key_scale=jnp.ones((2, 3)))
    with pytest.raises(Exception, match=r"value_scale: entry \[0, 0\] is -1"):
        jax.block_until_ready(dlattn.jax.attention(query, key, value, value_scale=-jnp.ones(1)))


@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_float8_is_sharded_with_its_scales(axis):
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 4, 5, 16), "key": (2, 2, 9, 16), "value": (2, 2, 9, 16)}
    tensors = {n: jnp.asarray(rng.standard_normal(x), jnp.float32) for n, x in shapes.items()}
    tensors |= {n: tensors[n].astype(jnp.float8_e4m3fn) for n in ("key", "value")}
    tensors |= {
        "key_scale": jnp.asarray(rng.uniform(0.5, 2, (2, 2)), jnp.float32),
        "value_scale": jnp.asarray(rng.uniform(0.5, 2, (1, 2)), jnp.float32),
    }
    wanted = dlattn.jax.attention(**tensors)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    spec = P("x") if axis == "batch" else P(None, "x")
    with jax.set_mesh(mesh):
        tensors["query"] = jax.device_put(tensors["query"], NamedSharding(mesh, spec))
        np.testing.assert_array_equal(dlattn.jax.attention(**tensors), wanted)


def test_symbolic_sizes_are_refused():
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 4, 2, 8"), jnp.float32)
    with pytest.raises(dlattn.Unsupported, match="query: axis 0 has the symbolic size b"):
        export.export(jax.jit(ours))(shape, shape, shape)


def raw_call(tensors, **attributes):
    """The custom call itself, as another program that runs XLA makes it, on one thread."""
    sku = dlattn.select(*(np.asarray(x) for x in tensors.values()), num_threads=1)
    shape = tensors["query"].shape
    results = [jax.ShapeDtypeStruct(x, jnp.float32) for x in (shape, shape[:3])]
    results.append(jax.ShapeDtypeStruct((sku.workspace_bytes,), jnp.uint8))
    call = jax.ffi.ffi_call("dlattn_forward", results)
    attributes = {"slots": 0b11111, "num_threads": 1, **attributes}  # up to output and lse
    output, lse, _ = jax.jit(functools.partial(call, **attributes))(*tensors.values())
    return np.asarray(output), np.asarray(lse)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_attributes_are_read_by_dtype(kind):
    window, exact_scale = 1, 2  # flags of dlattn.h
    tensors = heads_first(batch=1, rows=1, keys=3, heads=1, heads_kv=1)
    found, _ = raw_call(tensors, flags=exact_scale, scale=kind(2), softcap=kind(1))
    close(found, dlattn.jax.attention(**tensors, scale=2.0, softcap=1.0))
    if np.issubdtype(kind, np.signedinteger):
        options = {"flags": kind(window), "window_left": kind(-1), "window_right": kind(1)}
        found, _ = raw_call(tensors, **options)
        close(found, dlattn.jax.attention(**tensors, window=(None, 1)))


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"causal": np.float64(1)}, "attribute causal: must be a scalar of an integer type"),
        ({"scale": "1"}, "attribute scale: must be a scalar of float64"),
        ({"window_lefft": 1}, "attribute window_lefft: is not known"),
        ({"alignment": np.int64(1 << 32)}, "attribute alignment: is 4294967296, must be from"),
        ({"heads_axis": 3}, "attribute heads_axis: is 3, must be from 0 to 2"),
        ({"slots": np.int64(0b11111 | 1 << 22)}, "attribute slots: names gradients"),
    ],
    ids=str,
)
def test_other_attributes_are_refused(attributes, message):
    with pytest.raises(Exception, match=message):
        raw_call(heads_first(), **attributes)


def test_wrong_shapes_raise_while_tracing():
    query, key, value = make()
    with pytest.raises(ValueError, match=r"key: axis 3 \(head_dim\) is 8, must be 16 as in query"):
        jax.jit(ours)(query, key[..., :8], value)
    with pytest.raises(ValueError, match="has 3 heads, must divide the query's 4"):
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


ELSEWHERE = """
import pathlib
import dlattn.jax, jax, jax.numpy as jnp
from jax import export

shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in SHAPES]
call = jax.jit(lambda *x: dlattn.jax.dot_product_attention(*x, is_causal=True))
checks = [export.DisabledSafetyCheck.custom_call("dlattn_" + x) for x in ("forward", "backward")]
program = export.export(call, disabled_checks=checks)(*shapes)
pathlib.Path("program").write_bytes(program.serialize(vjp_order=1))
"""


@pytest.mark.parametrize("cpu", ["", "avx2 f16c"])
def test_exported_elsewhere(cpu, tmp_path):
    """In another process, whose kernels need less workspace than those of this machine."""
    tensors = make(rows=70, keys=300, dim=64)
    script = ELSEWHERE.replace("SHAPES", repr([x.shape for x in tensors]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"DLATTN_CPU": cpu},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    program = export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    cotangent = normal(4, *tensors[0].shape)
    wanted, pullback = jax.vjp(functools.partial(ours, is_causal=True), *tensors)
    close(program.call(*tensors), wanted)
    for a, b in zip(program.vjp().call(*tensors, cotangent), pullback(cotangent)):
        close(a, b, 2e-5)
