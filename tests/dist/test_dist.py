"""What `./dev dist` made, each installed from dist/ in an empty place and used there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
VERSION = re.search(r'DLATTN_VERSION "([^"]+)"', (ROOT / "src/version.h").read_text())[1]
SHAPE = 1, 2, 5, 8
NUMBERS = [((7 * i) % 23 - 11) / 8 for i in range(3 * 1 * 2 * 5 * 8)]
QKV = struct.pack(f"{len(NUMBERS)}f", *NUMBERS)


def one(pattern):
    (file,) = DIST.glob(pattern)
    return file


def run(*command, cwd=None, data=None, **environment):
    """Without what leads to a build in this checkout."""
    own = {n: x for n, x in os.environ.items() if not n.startswith("DLATTN") and n != "PYTHONPATH"}
    done = subprocess.run(
        [str(x) for x in command], cwd=cwd, env=own | environment, input=data, capture_output=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode()[-3000:]
    return done.stdout


def unpack(file, folder):
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment that has the wheel and NumPy."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    made = folder / "bin/python"
    pip = (made, "-m", "pip", "install", "-q", "--only-binary=:all:")
    run(*pip, one("*.whl"), "numpy==" + version("numpy"), PATH="")  # no compiler to be found
    return made


@pytest.fixture(scope="module")
def expected(python, tmp_path_factory):
    """Causal attention of QKV by the wheel: output, then log-sum-exp."""
    script = ROOT / "adapters/python/examples/attention.py"
    return run(python, script, *SHAPE, cwd=tmp_path_factory.mktemp("empty"), data=QKV)


def test_sums():
    lines = (DIST / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {str(x.relative_to(DIST)) for x in DIST.rglob("*") if x.is_file()}
    assert listed.keys() == files - {"SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256((DIST / name).read_bytes()).hexdigest() == digest, name
    bill = json.loads((DIST / "dlattn.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    of_files = {
        c["name"]: c["hashes"][0]["content"] for c in bill["components"] if c["type"] == "file"
    }
    assert of_files == {n: x for n, x in listed.items() if n != "dlattn.cdx.json"}
    purls = [c["purl"] for c in bill["components"] if c["type"] == "library"]
    for package in ("koffi@", "apache-tvm-ffi@", "liblzma-dev@5"):
        assert any(package in x for x in purls), package


def test_wheel(python, expected):
    wheel = one("*.whl")
    assert wheel.stat().st_size < 20 * 2**20
    assert len(expected) == 4 * (2 * 5 * 8 + 2 * 5)
    printed = run(python, "-m", "dlattn").decode()
    assert f"{python.parent.parent}/lib" in printed and "cpu_fwd_ref" in printed


def test_wheel_is_for_old_systems():
    """By its symbols, whatever its name says."""
    wheel = one("*-py3-none-manylinux_2_17_x86_64.whl")
    said = run(sys.executable, "-m", "auditwheel", "show", wheel).decode()
    assert 'platform tag: "manylinux_2_17_x86_64"' in " ".join(said.split()), said


def test_sdist(tmp_path):
    """Around libraries that are there: a wheel of the same files, and the same sources as here."""
    native = tmp_path / "native"
    native.mkdir()
    with zipfile.ZipFile(one("*.whl")) as archive:
        names = archive.namelist()
        for name in names:
            if ".so" in name:
                (native / Path(name).name).write_bytes(archive.read(name))
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    source = next(x for x in DIST.glob("dlattn-[0-9]*.tar.gz"))
    run(*pip, "-w", tmp_path / "wheel", source, cwd=tmp_path, DLATTN_NATIVE=str(native))
    (made,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        assert sorted(archive.namelist()) == sorted(names)
    inside = unpack(source, tmp_path / "source")
    assert (inside / "PKG-INFO").read_text().startswith("Metadata-Version:")
    for name in ("dev", "WORKSPACE", "src/api.c", "kernels/kernels.inc"):
        assert (inside / name).read_bytes() == (ROOT / name).read_bytes()
    assert os.access(inside / "dev", os.X_OK)


@pytest.fixture
def sdk(tmp_path):
    return unpack(one("dlattn-sdk-*.tar.gz"), tmp_path)


def test_sdk(sdk, expected):
    """By pkg-config's flags; the program finds the library where the system looks."""
    flags = run("pkg-config", "--cflags", "dlattn", PKG_CONFIG_PATH=str(sdk / "lib/pkgconfig"))
    program = sdk.parent / "attention"
    source = sdk / "share/dlattn/attention.c"
    run("clang-19", *flags.decode().split(), source, "-o", program, "-lm")
    assert run(program, *SHAPE, data=QKV, LD_LIBRARY_PATH=str(sdk / "lib")) == expected
    assert b"cpu_fwd_ref" in run(sdk / "bin/dlattn-info")


OLD_LIBRARIES = ROOT / ".deps/old-glibc/lib/x86_64-linux-gnu"
OLD_LOADER = OLD_LIBRARIES / "ld-linux-x86-64.so.2"


def test_wheel_on_an_old_system(tmp_path):
    """Its loader finds each symbol in the file where it is to be, but those of Python and TVM."""
    with zipfile.ZipFile(one("*.whl")) as archive:
        archive.extractall(tmp_path)
    libraries = sorted(x for x in tmp_path.rglob("*.so*") if x.is_file())
    assert len(libraries) == 3
    elsewhere = re.compile(r"undefined symbol: (_?Py|TVMFFI)|libtvm_ffi\.so => not found")
    trace = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_BIND_NOW": "1", "LD_WARN": "1"}
    for library in libraries:
        done = subprocess.run(
            (OLD_LOADER, "--library-path", OLD_LIBRARIES, library),
            capture_output=True,
            env=os.environ | trace,
        )
        said = (done.stdout + done.stderr).decode().splitlines()
        assert any(str(OLD_LIBRARIES / "libc.so.6") in line for line in said), said
        wrong = [x for x in said if re.search("not found|not defined|undefined", x)]
        assert not [x for x in wrong if not elsewhere.search(x)], library


def test_sdk_on_an_old_system(sdk, expected):
    """Another libm, whose logarithm may end in another bit."""
    old = (OLD_LOADER, "--library-path", f"{OLD_LIBRARIES}:{sdk / 'lib'}")
    assert b"cpu_fwd_ref" in run(*old, sdk / "bin/dlattn-info")
    program = sdk.parent / "attention"
    libraries = [OLD_LIBRARIES / x for x in ("libc.so.6", "libm.so.6", "libdl.so.2")]
    linked = ("-fuse-ld=lld", "-Wl,--allow-shlib-undefined", *libraries)
    source = sdk / "share/dlattn/attention.c"
    run("clang-19", f"-I{sdk / 'include'}", source, *linked, "-o", program)
    found = run(*old, program, *SHAPE, data=QKV)
    count = len(expected) // 4
    numbers = zip(struct.unpack(f"{count}f", found), struct.unpack(f"{count}f", expected))
    assert all(abs(x - y) < 1e-6 for x, y in numbers)


def test_sdk_linked(sdk):
    """-ldlattn, and a version that a program asks for."""
    (sdk.parent / "main.c").write_text(
        "#include <dlattn.h>\nint main(void) { return dlattn_get_api(1)->abi_minor < 1; }\n"
    )
    config = {"PKG_CONFIG_PATH": str(sdk / "lib/pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "dlattn >= 1.0", **config).decode().split()
    program = sdk.parent / "main"
    run("clang-19", sdk.parent / "main.c", *flags, "-o", program)
    run(program, LD_LIBRARY_PATH=str(sdk / "lib"))


def test_sdk_cmake(sdk, expected):
    project = sdk.parent / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\n"
        "project(host C)\n"
        "find_package(dlattn 1.0 REQUIRED)\n"
        f"add_executable(host {sdk}/share/dlattn/attention.c)\n"
        "target_link_libraries(host dlattn::loader m)\n"
        f"add_executable(linked {sdk}/share/dlattn/attention.c)\n"
        "target_link_libraries(linked dlattn::dlattn dl m)\n"
    )
    run("cmake", "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={sdk}")
    run("cmake", "--build", project / "build")
    for name in ("host", "linked"):
        command = (project / "build" / name, *SHAPE)
        assert run(*command, data=QKV, LD_LIBRARY_PATH=str(sdk / "lib")) == expected


def test_npm(tmp_path, expected):
    """The package finds the library that it carries."""
    run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", one("*.tgz"), cwd=tmp_path)
    shutil.copy(ROOT / "adapters/node/test.js", tmp_path / "test.mjs")
    said = run("node", "--test", "test.mjs", cwd=tmp_path).decode()
    assert "# fail 0" in said and "# pass 0" not in said


MAIN_RS = """
use dlattn::{Library, Options, Tensor, TensorMut, Tensors};

fn main() -> Result<(), dlattn::Error> {
    let shape = [1, 1, 2, 4];
    let (q, k, v) = (vec![1f32; 8], vec![1f32; 8], (0..8u8).map(f32::from).collect::<Vec<_>>());
    let mut o = vec![0f32; 8];
    Library::get()?.forward(
        &Options { causal: true, ..Options::default() },
        &mut Tensors::new(
            Tensor::new(&q, &shape)?,
            Tensor::new(&k, &shape)?,
            Tensor::new(&v, &shape)?,
            TensorMut::new(&mut o, &shape)?,
        ),
    )?;
    println!("{o:?}");
    Ok(())
}
"""


@pytest.mark.skipif(shutil.which("cargo") is None, reason="no cargo here (https://rustup.rs)")
def test_crates(tmp_path):
    """The one for candle, which takes minutes to compile, asks for the other as an index has it."""
    crates = {}
    for name in ("dlattn", "dlattn-candle"):
        (tmp_path / name).mkdir()
        crates[name] = unpack(one(f"{name}-[0-9]*.crate"), tmp_path / name)
    candle = (crates["dlattn-candle"] / "Cargo.toml").read_text()
    assert f'[dependencies.dlattn]\nversion = "{VERSION}"' in candle
    program = tmp_path / "program"
    (program / "src").mkdir(parents=True)
    (program / "src/main.rs").write_text(MAIN_RS)
    (program / "Cargo.toml").write_text(
        '[package]\nname = "program"\nversion = "0.0.0"\nedition = "2021"\n'
        f'[dependencies]\ndlattn = {{ path = "{crates["dlattn"]}" }}\n'
    )
    shutil.copy(crates["dlattn"] / "Cargo.lock", program)
    with zipfile.ZipFile(one("*.whl")) as archive:
        library = archive.extract("dlattn/libdlattn.so.1", tmp_path)
    printed = run("cargo", "run", "-q", cwd=program, DLATTN_LIBRARY=library)
    assert printed.decode().strip() == "[0.0, 1.0, 2.0, 3.0, 2.0, 3.0, 4.0, 5.0]"
