"""The example, on the real model; it compares every logit with a plain softmax attention."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "adapters/python/examples/smollm2.py"
PROMPT = "What is the capital of France?"


def test_writes_and_checks_itself():
    (weights,) = (ROOT / ".deps/smollm2").glob("*.gguf")
    done = subprocess.run(
        [sys.executable, EXAMPLE, weights, "--prompt", PROMPT, "--tokens", "8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert "greedy tokens equal" in done.stdout
