"""Puts the plugin and the shims into the wheel, and the glibc that they need into its tag.

Used by hatchling when the wheel is built from a checkout where `./dev lib` has run once; needs
Bazel.
"""

from __future__ import annotations

import re
import subprocess
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
        bazel = ["bazel"]
        targets = ["//" + ":".join(name.rpartition("/")[::2]) for name in NATIVE]
        subprocess.run([*bazel, "build", "--config=release", *targets], cwd=ROOT, check=True)
        where = subprocess.run(
            [*bazel, "info", "--config=release", "bazel-bin"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        files = [Path(where, name) for name in NATIVE]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_{max(map(glibc_minor, files))}_x86_64"
        for file in files:
            build_data["force_include"][str(file)] = f"dlattn/{file.name}"


def glibc_minor(file: Path) -> int:
    """The newest 2.x whose symbols the library asks for, from the names in its string table."""
    return max(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", file.read_bytes()))
