"""Makes what is handed out of what is built: `./dev dist` builds and calls this.

    python tools/dist/dist.py sdk|sdist|kernels|npm|sums OUT

sdk: the library, its headers and dlattn-info for C and C++; sdist: the sources, which pip builds
where Bazel is, or around libraries that DLATTN_NATIVE names the folder of; kernels: what a repository of
Hugging Face's kernels holds; npm: a folder for `npm pack`; sums: SHA256SUMS and an SBOM (CycloneDX) of what OUT holds. Archives of the same sources have
the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "bazel-bin"
VERSION = re.search(r'DLATTN_VERSION "([^"]+)"', (ROOT / "src/version.h").read_text())[1]
HEADERS = ("dlattn.h", "dlattn_features.h", "dlattn_loader.h")
# A source tree builds by the one backend of the Python package, from its folder.
SDIST_PYPROJECT = """\
[build-system]
requires = ["hatchling==1.31.0"]
build-backend = "sdist_backend"
backend-path = ["tools/dist"]
"""


# ---- For C and C++


def sdk(out: Path) -> None:
    version = {"@VERSION@": VERSION, "@MAJOR@": VERSION.partition(".")[0]}
    files = {
        "lib/libdlattn.so.1": stripped(BUILT / "libdlattn.so.1"),
        "bin/dlattn-info": stripped(BUILT / "tools/dlattn-info"),
        "include/dlpack/dlpack.h": (ROOT / ".deps/dlpack/include/dlpack/dlpack.h").read_bytes(),
        "lib/pkgconfig/dlattn.pc": filled("dlattn.pc", version),
        "lib/cmake/dlattn/dlattnConfig.cmake": filled("dlattnConfig.cmake", version),
        "lib/cmake/dlattn/dlattnConfigVersion.cmake": filled("dlattnConfigVersion.cmake", version),
        "share/dlattn/LICENSE": (ROOT / "LICENSE").read_bytes(),
        "share/dlattn/attention.c": (ROOT / "adapters/c/attention.c").read_bytes(),
    }
    files |= {f"include/{name}": (ROOT / "abi" / name).read_bytes() for name in HEADERS}
    name = f"dlattn-sdk-{VERSION}-linux-x86_64"
    write_archive(out / f"{name}.tar.gz", name, files, {"lib/libdlattn.so": "libdlattn.so.1"})


def stripped(file: Path) -> bytes:
    with tempfile.NamedTemporaryFile() as copy:
        subprocess.run(["strip", "--strip-all", "-o", copy.name, file], check=True)
        return Path(copy.name).read_bytes()


def filled(template: str, values: dict[str, str]) -> bytes:
    text = (ROOT / "tools/dist" / template).read_text()
    for name, value in values.items():
        text = text.replace(name, value)
    return text.encode()


def write_archive(
    file: Path, prefix: str, contents: dict[str, bytes], links: dict[str, str] | None = None
) -> None:
    with file.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, 0) as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            add_files(archive, prefix, contents)
            for name, target in (links or {}).items():
                member = tarfile.TarInfo(f"{prefix}/{name}")
                member.type, member.linkname = tarfile.SYMTYPE, target
                archive.addfile(member)


def add_files(archive: tarfile.TarFile, prefix: str, contents: dict[str, bytes]) -> None:
    """Which the owner may write and, in bin or of scripts, everybody run."""
    for name, data in sorted(contents.items()):
        member = tarfile.TarInfo(f"{prefix}/{name}")
        is_program = name.startswith("bin/") or data.startswith(b"#!")
        member.size, member.mode = len(data), 0o755 if is_program else 0o644
        archive.addfile(member, io.BytesIO(data))


# ---- Sources, and the package for Node


def sdist(out: Path) -> None:
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"dlattn-{VERSION}.dist-info/METADATA")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    files = {n: (ROOT / n).read_bytes() for n in names.split("\0") if n and (ROOT / n).is_file()}
    files |= {"PKG-INFO": metadata, "pyproject.toml": SDIST_PYPROJECT.encode()}
    write_archive(out / f"dlattn-{VERSION}.tar.gz", f"dlattn-{VERSION}", files)


def npm(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("index.js", "package.json", "README.md"):
        shutil.copy(ROOT / "adapters/node" / name, out)
    shutil.copy(ROOT / "LICENSE", out)
    package = json.loads((out / "package.json").read_text())
    if package["version"] != VERSION:
        raise SystemExit(f"adapters/node/package.json: version is not {VERSION}")
    (out / "libdlattn.so.1").write_bytes(stripped(BUILT / "libdlattn.so.1"))


# ---- For Hugging Face's kernels

KERNEL_INIT = """\
\"\"\"Attention for CPUs and NVIDIA GPUs, with flash-attn's functions; `dlattn` is the whole package.\"\"\"

from . import dlattn
from .dlattn.flash_attn import *  # noqa: F403
from .dlattn.torch import attention, scaled_dot_product_attention
"""


def kernels(out: Path) -> None:
    """One folder for each backend of PyTorch: the package binds to no PyTorch and no CUDA."""
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("dlattn/") and "xla" not in n]
        package = {name: archive.read(name) for name in names}
    files = {"README.md": (ROOT / "docs/python.md").read_bytes()}
    digest = hashlib.sha256(b"".join(package.values())).hexdigest()
    for backend in ("cpu", "cuda"):
        metadata = {
            "id": f"_dlattn_{backend}_{digest[:12]}",
            "name": "dlattn",
            "version": int(VERSION.partition(".")[0]),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        made = {"__init__.py": KERNEL_INIT.encode(), "metadata.json": json.dumps(metadata).encode()}
        files |= {f"build/torch-{backend}/{n}": data for n, data in (made | package).items()}
    name = f"dlattn-kernels-{VERSION}"
    with tarfile.open(out / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        add_files(archive, name, files)


# ---- What there is


def sums(out: Path) -> None:
    files = sorted(x for x in out.rglob("*") if x.is_file() and x.name != "SHA256SUMS")
    digests = {str(x.relative_to(out)): hashlib.sha256(x.read_bytes()).hexdigest() for x in files}
    digests.pop("dlattn.cdx.json", None)
    sbom = json.dumps(bill_of_materials(digests), indent=1).encode() + b"\n"
    (out / "dlattn.cdx.json").write_bytes(sbom)
    digests["dlattn.cdx.json"] = hashlib.sha256(sbom).hexdigest()
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    (out / "SHA256SUMS").write_text("".join(lines))


def bill_of_materials(digests: dict[str, str]) -> dict[str, object]:
    """The files, and what of others is in them or is fetched with them; what only builds is not."""
    files = [
        {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
        for name, digest in digests.items()
    ]
    others = [
        library("dlpack", pinned("third_party/dlpack/requirements.txt", "apache-tvm-ffi"), "pypi"),
        library("liblzma-dev", debian_version("liblzma-dev"), "deb/debian"),
        library("koffi", node_pin("koffi"), "npm"),
        *(library(name, crate_pin(name), "cargo") for name in ("half", "libloading", "candle-core")),
    ]
    seed = "".join(digests.values())
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, seed)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "name": "dlattn",
                "version": VERSION,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": files + others,
    }


def library(name: str, version: str, registry: str) -> dict[str, str]:
    package = "apache-tvm-ffi" if name == "dlpack" else name  # whose wheel has DLPack's header
    purl = f"pkg:{registry}/{package}@{version}"
    return {"type": "library", "name": name, "version": version, "purl": purl}


def pinned(file: str, package: str) -> str:
    return re.search(rf"^{package}==(\S+)", (ROOT / file).read_text(), re.MULTILINE)[1]


def debian_version(package: str) -> str:
    return subprocess.check_output(["dpkg-query", "-W", "-f=${Version}", package], text=True)


def node_pin(package: str) -> str:
    return json.loads((ROOT / "adapters/node/package.json").read_text())["dependencies"][package]


def crate_pin(crate: str) -> str:
    lock = (ROOT / "adapters/rust/Cargo.lock").read_text()
    return re.search(rf'name = "{crate}"\nversion = "([^"]+)"', lock)[1]


COMMANDS = {"sdk": sdk, "sdist": sdist, "kernels": kernels, "npm": npm, "sums": sums}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](Path(sys.argv[2]))
