"""The training example, on the real model; it compares every loss with PyTorch's attention."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "adapters/python/examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import smollm2_train

    return smollm2_train


def test_learns_and_checks_itself(tmp_path):
    (weights,) = (ROOT / ".deps/smollm2").glob("*.gguf")
    text = tmp_path / "text"
    text.write_text("Each step reads these few words anew, and so the loss must fall.\n")
    options = ["--text", text, "--steps", "3", "--length", "24", "--rate", "1e-4"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "smollm2_train.py", weights, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 losses equal" in done.stdout
    first, last = re.search(r"dlattn +│ ([0-9.]+) +│ ([0-9.]+)", done.stdout).groups()
    assert float(last) < float(first) - 0.1


def test_other_losses_fail(example):
    runs = [example.Run.__new__(example.Run) for _ in range(2)]
    runs[0].losses, runs[1].losses = [3.0, 2.0], [3.0, 2.0002]
    assert not example.compare(*runs)
    runs[1].losses = [3.0, 2.00005]
    assert example.compare(*runs)


def test_pieces_follow_each_other_and_begin_anew(example):
    batches = example.cut(list(range(10)), steps=2, batch=2, length=3)
    assert [b.tolist() for b in batches] == [
        [[0, 1, 2, 3], [3, 4, 5, 6]],
        [[6, 7, 8, 9], [9, 0, 1, 2]],
    ]
