"""python -m dlattn: what it prints, and what it does not take."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import dlattn
import pytest
from dlattn.__main__ import main


def printed(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_machine():
    """As a person calls it."""
    done = subprocess.run(
        [sys.executable, "-m", "dlattn"], capture_output=True, text=True, check=True
    )
    library, devices, kernels = dlattn.library(), dlattn.devices(), dlattn.kernels()
    assert f"dlattn {library.version}, ABI 1." in done.stdout and library.path in done.stdout
    assert devices[0].type == 1 and devices[0].multiprocessors > 0
    assert f"cpu:0  {devices[0].name}" in done.stdout
    for k in kernels:
        assert f"\n{'*' if k.available else ' '} {k.name} " in done.stdout


def test_rows(capsys):
    """The row that takes it is the one that a call gets; each other says why it does not."""
    np = pytest.importorskip("numpy")
    query = np.zeros((2, 4, 33, 64), np.float32)
    taken = dlattn.select(query, query, query).kernel
    found = printed(capsys, "--q", "2,4,33,64")
    assert f"\n  {taken} takes it:" in found
    assert "no kernel for f32 on the CPU: the nearest, cpu_fwd_f64_avx2, takes f64" in found
    assert "\n    cpu_fwd_ref: could, too, but stands behind it" in found
    assert "cuda_fwd_sm80" not in found


def test_backward(capsys):
    found = printed(capsys, "--q", "1,2,5,8", "--dtype", "bf16", "--backward", "--causal")
    assert "backward of query [1, 2, 5, 8]" in found
    assert "cpu_bwd_ref: could, too" in found


def test_dropped_rows_name_the_feature(capsys):
    found = printed(capsys, "--q", "1,1,4,2000")
    assert "\n  cpu_fwd_ref takes it" in found
    assert "cpu_fwd_avx2" in found and "1024" in found


@pytest.mark.parametrize("more", [[], ["--causal", "--backward"], ["--window", "4,0"]])
def test_bench(capsys, more):
    if "--backward" in more and find_spec("torch") is None:
        assert main(["--q", "1,2,8,16", "--bench", *more]) == 1
        assert "--bench: gradients and GPUs are timed with PyTorch" in capsys.readouterr().err
        return
    found = printed(capsys, "--q", "1,2,8,16", "--kv", "1,1,9,16", "--bench", *more)
    (ours,) = (line for line in found.splitlines() if line.startswith("  dlattn"))
    assert float(ours.split()[-1]) > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--q", "1,2,3"], "--q: is (1, 2, 3), must be four numbers, B,H,L,D"),
        (["--kv", "1,2,3,4"], "--kv, --bench, --backward: go with --q"),
        (["--q", "1,2,3,4", "--device", "tpu"], "--device: is 'tpu', must be cpu, cuda or cuda:N"),
        (["--q", "1,2,3,4", "--window", "1"], "--window: is (1,), must be two numbers"),
    ],
)
def test_refusals(capsys, arguments, says):
    with pytest.raises(SystemExit):
        main(arguments)
    assert says in capsys.readouterr().err


def test_what_the_plugin_refuses(capsys):
    assert main(["--q", "1,3,4,8", "--kv", "1,2,4,8"]) == 1
    assert "has 2 heads, must divide the query's 3" in capsys.readouterr().err
