"""The wheel in an environment of its own; what is said where the plugin is not to be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import dlattn

ROOT = Path(__file__).resolve().parents[3]
TRY = """
import numpy as np, dlattn
x = np.ones((1, 1, 2, 8), np.float32)
print(dlattn.attention(x, x, x).sum())
"""


def python(interpreter, code, **environment):
    return subprocess.run(
        [interpreter, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel_in_a_clean_environment(tmp_path):
    (wheel,) = (ROOT / ".deps/wheel").glob("*.whl")
    assert "-py3-none-manylinux_2_" in wheel.name
    venv.create(tmp_path, with_pip=True)
    interpreter = tmp_path / "bin/python"
    # No PATH: there is no compiler to be found.
    subprocess.run(
        [
            interpreter,
            "-m",
            "pip",
            "install",
            "-q",
            "--only-binary=:all:",
            wheel,
            "numpy==" + version("numpy"),
        ],
        env={**os.environ, "PATH": ""},
        check=True,
    )
    code = "import dlattn; print(dlattn.library().path); " + TRY
    done = python(interpreter, code, DLATTN_LIBRARY="", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    path, total = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path)
    assert float(total) == 16


def test_missing_library_names_the_places(tmp_path):
    done = python(sys.executable, TRY, DLATTN_LIBRARY="/nonexistent/libdlattn.so.1")
    assert "dlattn._errors.LibraryNotFound" in done.stderr
    assert "where DLATTN_LIBRARY says" in done.stderr
    assert "/nonexistent/libdlattn.so.1: cannot open" in done.stderr

    package = shutil.copytree(Path(dlattn.__file__).parent, tmp_path / "dlattn")
    (package / "libdlattn.so.1").unlink()
    done = python(sys.executable, TRY, DLATTN_LIBRARY="", PYTHONPATH=str(tmp_path))
    assert "dlattn._errors.LibraryNotFound" in done.stderr
    assert f"{package}/libdlattn.so.1: " in done.stderr, done.stderr
    assert "\n  libdlattn.so.1: " in done.stderr, "the system's places were not searched"


def test_other_library():
    core = Path(dlattn.__file__).with_name("_core.abi3.so")
    done = python(sys.executable, TRY, DLATTN_LIBRARY=str(core))
    assert f"{core}: has no dlattn_get_api" in done.stderr


def test_import_takes_little_beside_the_start_of_python():
    """Of the processor, and beside work of the same process: machines are busy and differ. Some
    17 ms where Python takes 13; NumPy alone would be 80."""
    code = (
        "import time; start = time.process_time(); import dlattn; "
        "print(start, time.process_time() - start)"
    )
    runs = [map(float, python(sys.executable, code).stdout.split()) for _ in range(5)]
    start, took = map(min, zip(*runs, strict=True))
    assert took < 2.5 * start, (took, start)
