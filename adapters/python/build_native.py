"""Puts the plugin and the shims into the wheel, and the glibc that they need into its tag.

Used by hatchling when the wheel is built from a checkout where `./dev lib` has run once; needs
Bazel and, to leave out debug information, strip. Whoever builds the libraries himself names their
folder by DLATTN_NATIVE. DLATTN_CUDA=off leaves out the kernels for GPUs, as it does for `./dev`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parents[2]
NATIVE = (
    "libdlattn.so.1",
    "adapters/python/_core.abi3.so",
    "adapters/xla/libdlattn_xla.so",
)


class NativeBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = os.environ.get("DLATTN_NATIVE")
        if folder is None:
            targets = ["//" + ":".join(name.rpartition("/")[::2]) for name in NATIVE]
            config = ["--config=cpu"] if os.environ.get("DLATTN_CUDA") == "off" else []
            subprocess.run(["bazel", "build", *config, *targets], cwd=ROOT, check=True)
        self.folder = tempfile.TemporaryDirectory()
        minors = []
        for name in NATIVE:
            file = Path(self.folder.name, Path(name).name)
            built = Path(folder, file.name) if folder else ROOT / "bazel-bin" / name
            subprocess.run(["strip", "--strip-all", "-o", file, built], check=True)
            build_data["force_include"][str(file)] = f"dlattn/{file.name}"
            minors.append(glibc_minor(file))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_{max(17, *minors)}_x86_64"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.folder.cleanup()


def glibc_minor(file: Path) -> int:
    """The newest 2.x whose symbols the library asks for, from the names in its string table."""
    return max(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", file.read_bytes()))
