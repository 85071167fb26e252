"""One libdlattn.so.1 under every adapter: the same input must give the same bits.

Each client is a filter in a process of its own: its arguments are batch, heads, length and
head_dim, its standard input is query, key and value as raw float32, its standard output the output
and the log-sum-exp of causal attention. ./dev test gives the paths: DLATTN_LIBRARY is the plugin,
DLATTN_CLIENTS has a line "NAME COMMAND" for each client.
"""

import os
import shlex
import subprocess

import numpy as np
import pytest

CLIENTS = dict(line.split(maxsplit=1) for line in os.environ["DLATTN_CLIENTS"].splitlines())
SHAPE = 2, 3, 37, 40


def run(client, data, shape=SHAPE, **environment):
    return subprocess.run(
        [*shlex.split(CLIENTS[client]), *map(str, shape)],
        input=data,
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def qkv():
    return np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def expected(qkv):
    """The bytes that the plain C client gives, checked against float64."""
    done = run("c", qkv.tobytes())
    assert done.returncode == 0, done.stderr.decode()
    query, key, value = qkv.astype(np.float64)
    logits = query @ key.swapaxes(2, 3) / np.sqrt(SHAPE[3])
    logits[..., ~np.tri(SHAPE[2], dtype=bool)] = -np.inf
    lse = np.log(np.exp(logits).sum(-1))
    output = np.exp(logits - lse[..., None]) @ value
    got = np.frombuffer(done.stdout, np.float32)
    np.testing.assert_allclose(got, np.concatenate([output.ravel(), lse.ravel()]), atol=1e-5)
    return done.stdout


@pytest.mark.parametrize("client", CLIENTS)
def test_same_bits(client, qkv, expected):
    done = run(client, qkv.tobytes())
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == expected


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
