"""One libdlattn.so.1 under every adapter: the same input must give the same bits.

Each client is a filter in a process of its own: its arguments are batch, heads, length and
head_dim, its standard input is query, key and value as raw float32, its standard output the output
and the log-sum-exp of causal attention. With one more argument, "cuda", it computes on a GPU, in
float16. ./dev test gives the paths: DLATTN_LIBRARY is the plugin, DLATTN_CLIENTS has a line
"NAME COMMAND" for each client, DLATTN_CLIENTS_DEVICE may be cuda.
"""

import os
import shlex
import subprocess

import numpy as np
import pytest

CLIENTS = dict(line.split(maxsplit=1) for line in os.environ["DLATTN_CLIENTS"].splitlines())
DEVICE = os.environ.get("DLATTN_CLIENTS_DEVICE", "")
SHAPE = 2, 3, 37, 40


def run(client, data, shape=SHAPE, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [*shlex.split(CLIENTS[client]), *map(str, shape), *DEVICE.split()],
        input=data,
        env=os.environ | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
    )


@pytest.fixture(scope="module")
def qkv():
    numbers = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    return numbers.astype(np.float16).astype(np.float32)  # so that no client rounds them


@pytest.fixture(scope="module")
def expected(qkv):
    """The bytes that the first client gives, checked against float64."""
    done = run(next(iter(CLIENTS)), qkv.tobytes())
    assert done.returncode == 0, done.stderr.decode()
    query, key, value = qkv.astype(np.float64)
    logits = query @ key.swapaxes(2, 3) / np.sqrt(SHAPE[3])
    logits[..., ~np.tri(SHAPE[2], dtype=bool)] = -np.inf
    lse = np.log(np.exp(logits).sum(-1))
    output = np.exp(logits - lse[..., None]) @ value
    got = np.frombuffer(done.stdout, np.float32)
    wanted = np.concatenate([output.ravel(), lse.ravel()])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-3 if DEVICE else 1e-5)
    return done.stdout


@pytest.mark.parametrize("client", CLIENTS)
def test_same_bits(client, qkv, expected):
    done = run(client, qkv.tobytes())
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == expected


@pytest.mark.skipif("c" not in CLIENTS or DEVICE != "", reason="of the C program on the CPU")
def test_gradients_in_c(qkv):
    """Beside float64, with the output's gradient behind the value."""
    d_output = np.random.default_rng(1).standard_normal(SHAPE, dtype=np.float32)
    command = [*shlex.split(CLIENTS["c"]), *map(str, SHAPE), "backward"]
    data = qkv.tobytes() + d_output.tobytes()
    done = subprocess.run(command, input=data, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    query, key, value = qkv.astype(np.float64)
    logits = query @ key.swapaxes(2, 3) / np.sqrt(SHAPE[3])
    logits[..., ~np.tri(SHAPE[2], dtype=bool)] = -np.inf
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    d_weights = d_output @ value.swapaxes(2, 3)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_logits /= np.sqrt(SHAPE[3])
    expected = d_logits @ key, d_logits.swapaxes(2, 3) @ query, weights.swapaxes(2, 3) @ d_output
    found = np.frombuffer(done.stdout, np.float32)[-3 * query.size :].reshape(3, *SHAPE)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("client", CLIENTS)
def test_missing_library(client, qkv):
    """No result without that very file, and the error names it: no client has a copy of its own."""
    done = run(client, qkv.tobytes(), DLATTN_LIBRARY="/no/such/file")
    assert done.returncode != 0
    assert done.stdout == b""
    assert b"/no/such/file" in done.stderr


@pytest.mark.parametrize("client", CLIENTS)
def test_refusal(client):
    """A head_dim of 0 is refused with the plugin's words, or before by the client."""
    done = run(client, b"", shape=(2, 3, 37, 0))
    assert done.returncode != 0
    assert done.stdout == b""
    assert done.stderr


@pytest.mark.parametrize("client", CLIENTS)
def test_truncated_input(client, qkv):
    """Nothing is computed from what was never read."""
    done = run(client, qkv.tobytes()[:-1])
    assert done.returncode != 0
    assert done.stdout == b""


@pytest.mark.parametrize("client", CLIENTS)
def test_result_that_cannot_be_written(client, qkv):
    with open("/dev/full", "wb") as full:
        done = run(client, qkv.tobytes(), stdout=full)
    assert done.returncode != 0
