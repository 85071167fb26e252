"""dlattn.flax as attention_fn of nnx and linen beside flax's own; the example that trains."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

flax = pytest.importorskip("flax")

import dlattn.flax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ours = dlattn.flax.dot_product_attention


def normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def make(*leading, dtype="float32"):
    return [normal(i, *leading, n, 4, 8, dtype=dtype) for i, n in enumerate((5, 7, 7))]


def close(a, b, tolerance=5e-6):
    np.testing.assert_allclose(*(np.asarray(x, np.float64) for x in (a, b)), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "leading"),
    [
        *(("plain", ()), ("causal", (2,)), ("mask", (2,)), ("mask", (2, 3))),
        *(("float_mask", (2,)), ("bias", (2, 3))),
    ],
)
def test_function(kind, leading):
    """Any axes in front; masks of flax's own type, broadcast."""
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"mask": jnp.arange(7) < normal(8, *leading, 1, 5, 1) * 2 + 4},
        "float_mask": {"mask": (normal(8, 5, 7) > -0.5).astype(jnp.float32)},
        "bias": {"bias": normal(8, 4, 5, 7)},
    }[kind]
    tensors = make(*leading)

    def loss(f, *x):
        return (f(*x, **options) ** 2).sum()

    close(ours(*tensors, **options), nnx.dot_product_attention(*tensors, **options))
    found = jax.grad(lambda *x: loss(ours, *x), (0, 1, 2))(*tensors)
    wanted = jax.grad(lambda *x: loss(nnx.dot_product_attention, *x), (0, 1, 2))(*tensors)
    for a, b in zip(found, wanted):
        close(a, b, 2e-5)


def test_dtype():
    tensors = make(2)
    assert ours(*tensors, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    mixed = [tensors[0].astype(jnp.bfloat16), *tensors[1:]]
    assert ours(*mixed).dtype == jnp.float32


def test_nnx_layer():
    x = normal(1, 2, 9, 32)
    layers = [
        nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0), **options)
        for options in ({}, {"attention_fn": ours})
    ]
    mask = nnx.make_causal_mask(jnp.ones((2, 9)))
    wanted, found = (layer(x, mask=mask) for layer in layers)
    close(found, wanted)


def test_linen_layer():
    x = normal(1, 2, 9, 32)
    layers = [linen.MultiHeadAttention(4, **options) for options in ({}, {"attention_fn": ours})]
    variables = layers[0].init(jax.random.key(0), x)
    mask = linen.make_causal_mask(jnp.ones((2, 9)))
    wanted, found = (layer.apply(variables, x, mask=mask) for layer in layers)
    close(found, wanted)


def test_refusals():
    x = make(2)
    with pytest.raises(NotImplementedError, match=r"dropout_rate: dlattn.jax has no dropout"):
        ours(*x, dropout_rate=0.1, dropout_rng=jax.random.key(0))
    assert ours(*x, dropout_rate=0.1, deterministic=True).shape == x[0].shape
    with pytest.raises(NotImplementedError, match="module: dlattn makes no attention weights"):
        ours(*x, module=object())


def test_example_trains():
    command = [sys.executable, EXAMPLES / "train_nnx.py", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[0] > 2 and losses[-1] < 0.5, done.stdout
