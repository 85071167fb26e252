"""The folders for Hugging Face's kernels, loaded by their path as that package does it."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
DIST = Path(__file__).resolve().parents[2] / "dist"


def test_kernels(tmp_path, monkeypatch):
    """Of another name than the package's, in a process that need not have the package."""
    monkeypatch.delenv("DLATTN_LIBRARY", raising=False)
    (file,) = DIST.glob("dlattn-kernels-*.tar.xz")
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path, filter="data")
    (repository,) = tmp_path.iterdir()
    variants = sorted((repository / "build").iterdir())
    assert [x.name for x in variants] == ["torch-cpu", "torch-cuda"]
    found = [json.loads((x / "metadata.json").read_text()) for x in variants]
    assert [x["backend"]["type"] for x in found] == ["cpu", "cuda"]
    assert found[0]["id"] != found[1]["id"]

    name = found[0]["id"]
    spec = importlib.util.spec_from_file_location(name, variants[0] / "__init__.py")
    kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    assert "dlattn" not in sys.modules, "an import leads out of the folder"
    assert kernel.dlattn.library().path.startswith(str(tmp_path))
    q = torch.randn(2, 5, 4, 16, requires_grad=True)
    output = kernel.flash_attn_func(q, q, q, causal=True)
    x = q.transpose(1, 2)
    wanted = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    torch.testing.assert_close(output, wanted.transpose(1, 2))
    output.sum().backward()
    assert q.grad is not None
    with pytest.raises(ValueError, match="k: shape is"):
        kernel.flash_attn_func(q, q[0], q)
    with pytest.raises(kernel.dlattn.InvalidArgument):
        kernel.attention(x, x[:, :3], x)
