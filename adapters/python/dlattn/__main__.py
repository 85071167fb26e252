"""What the plugin is on this machine, and what it does with a problem: ``python -m dlattn --help``.

A report of a fault is most useful with what this prints.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import dlattn

from . import _core
from ._arrays import CODES

FRAMEWORKS = ("numpy", "torch", "jax", "cupy", "transformers", "apache-tvm-ffi")
# By name: DLPack's code and bits.
DTYPES = {"f64": (2, 64), "f32": (2, 32), "f16": (2, 16), "bf16": (CODES["bfloat16"][0], 16)}
TORCH_DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
DEVICE_TYPES = {"cpu": 1, "cuda": 2}
RUNS = 15


class Problem(NamedTuple):
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: str
    device: tuple[int, int]
    backward: bool
    options: dict[str, Any]  # of dlattn.attention


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        _print_machine()
        problem = _problem(parser, given)
        if problem is None:
            _print_kernels()
            return 0
        _print_rows(problem)
        if given.bench:
            _print_times(problem)
    except dlattn.Error as error:
        print(error, file=sys.stderr)
        return 1
    return 0


# ---- What is asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlattn",
        description="Prints the plugin, the devices and the kernels of this machine; with a shape "
        "which kernel takes it, and why others do not.",
    )
    numbers = {"type": _numbers, "metavar": "B,H,L,D"}
    parser.add_argument("--q", **numbers, help="shape of query")
    parser.add_argument("--kv", **numbers, help="shape of key and value, default that of query")
    parser.add_argument("--dv", type=int, metavar="D", help="head_dim of value, default key's")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or cuda:N")
    parser.add_argument("--causal", action="store_true", help="aligned bottom right")
    parser.add_argument("--window", type=_numbers, metavar="LEFT,RIGHT", help="-1 is unbounded")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--backward", action="store_true", help="the gradients' kernels")
    parser.add_argument(
        "--bench", action="store_true", help="times it beside PyTorch's, where that is installed"
    )
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(","))


def _problem(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Problem | None:
    if given.q is None:
        if given.kv is not None or given.bench or given.backward:
            parser.error("--kv, --bench, --backward: go with --q")
        return None
    key = given.kv or given.q
    for name, shape in (("--q", given.q), ("--kv", key)):
        if len(shape) != 4:
            parser.error(f"{name}: is {shape}, must be four numbers, B,H,L,D")
    kind, _, number = given.device.partition(":")
    if kind not in DEVICE_TYPES or not (number or "0").isdigit():
        parser.error(f"--device: is {given.device!r}, must be cpu, cuda or cuda:N")
    options: dict[str, Any] = {"causal": given.causal, "softcap": given.softcap}
    if given.causal or given.window:
        options["alignment"] = "bottom_right"
    if given.window:
        if len(given.window) != 2:
            parser.error(f"--window: is {given.window}, must be two numbers, LEFT,RIGHT")
        options["window"] = tuple(None if side < 0 else side for side in given.window)
    value = (*key[:3], given.dv or key[3])
    device = DEVICE_TYPES[kind], int(number or 0)
    return Problem(given.q, key, value, given.dtype, device, given.backward, options)


# ---- What is printed


def _print_machine() -> None:
    path, version, (major, minor) = dlattn.library()
    print(f"dlattn {version}, ABI {major}.{minor}, {path}")
    libc = " ".join(platform.libc_ver())
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {libc}")
    print(", ".join(f"{name} {_version(name)}" for name in FRAMEWORKS if _version(name)))
    print("\ndevices")
    names = {number: name for name, number in DEVICE_TYPES.items()}
    for d in dlattn.devices():
        print(f"  {names.get(d.type, d.type)}:{d.id}  {d.name}, {d.multiprocessors} x {d.arch}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _print_kernels() -> None:
    print("\nkernels, best first (* runs on this machine)")
    for k in dlattn.kernels():
        mark = "*" if k.available else " "
        print(f"{mark} {k.name:24}{k.operation:10}{k.arch:14}{k.dtypes}")


def _print_rows(problem: Problem) -> None:
    """Which row takes it, and what each of the others says."""
    operation = "backward" if problem.backward else "forward"
    print(f"\n{operation} of query {list(problem.query)}, key {list(problem.key)}, {problem.dtype}")
    chosen = _sku(problem)
    work = f"{chosen.workspace_bytes} bytes of workspace"
    print(f"  {chosen.kernel} takes it: {chosen.num_splits} splits, {work}")
    for k in dlattn.kernels():
        if (k.operation, k.backend) == (operation, chosen.backend) and k.name != chosen.kernel:
            print(f"    {k.name}: {_word(problem, k.name)}")


def _word(problem: Problem, kernel: str) -> str:
    try:
        _sku(problem, kernel)
    except dlattn.Error as error:
        return str(error)
    return "could, too, but stands behind it"


def _sku(problem: Problem, kernel: str | None = None) -> dlattn.Sku:
    """Of tensors that are not there."""
    output = (*problem.query[:3], problem.value[3])
    tensors = [_spec(problem, x) for x in (problem.query, problem.key, problem.value, output)]
    lse = _spec(problem, problem.query[:3], DTYPES["f32"])
    more = {}
    if problem.backward:
        more = {"d_output": tensors[3], "d_query": tensors[0]}
        more |= {"d_key": tensors[1], "d_value": tensors[2]}
    o = dlattn._read_options("select", problem.options | {"kernel": kernel})
    absent = (None,) * (len(dlattn._TENSORS) - 2)
    options = (o[name] for name in dlattn._OPTIONS)
    found = _core.query(
        *tensors, lse if problem.backward else None, *absent, *options, None, **more
    )
    return dlattn.Sku(*found)


def _spec(
    problem: Problem, shape: tuple[int, ...], dtype: tuple[int, int] | None = None
) -> tuple[Any, ...]:
    strides = [1]
    for extent in shape[:0:-1]:
        strides.insert(0, strides[0] * extent)
    return (shape, tuple(strides), *(dtype or DTYPES[problem.dtype]), *problem.device)


# ---- Times


def _print_times(problem: Problem) -> None:
    calls = _torch_calls(problem) if _version("torch") else _numpy_calls(problem)
    print(f"\nmicroseconds, median of {RUNS}, in turns")
    for name, median in _medians(calls).items():
        print(f"  {name:24}{median:12.1f}")


def _medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(RUNS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if run > 1:  # the first warm up
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def _torch_calls(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Until the result is there."""
    import torch

    from . import torch as ours

    kind, number = problem.device
    device = torch.device("cpu" if kind == DEVICE_TYPES["cpu"] else f"cuda:{number}")
    dtype = getattr(torch, TORCH_DTYPES[problem.dtype])
    tensors = [
        torch.randn(shape, dtype=dtype, device=device, requires_grad=problem.backward)
        for shape in problem[:3]
    ]

    def done(output: torch.Tensor) -> None:
        if problem.backward:
            torch.autograd.grad(output, tensors, output.detach())
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls = {"dlattn": lambda: done(ours.attention(*tensors, **problem.options))}
    if problem.options.get("window") is None and not problem.options["softcap"]:
        calls["PyTorch"] = lambda: done(_torch_sdpa(problem, *tensors))
    return calls


def _torch_sdpa(problem: Problem, query: Any, key: Any, value: Any) -> Any:
    """Whose causal mask is aligned top left."""
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    options: dict[str, Any] = {"enable_gqa": problem.query[1] != problem.key[1]}
    if problem.options["causal"] and problem.query[2] == problem.key[2]:
        options["is_causal"] = True
    elif problem.options["causal"] and problem.query[2] > 1:
        options["attn_mask"] = causal_lower_right(problem.query[2], problem.key[2])
    return scaled_dot_product_attention(query, key, value, **options)


def _numpy_calls(problem: Problem) -> dict[str, Callable[[], Any]]:
    import numpy as np

    if problem.backward or problem.device[0] != DEVICE_TYPES["cpu"]:
        raise dlattn.Unsupported("--bench: gradients and GPUs are timed with PyTorch, not here")
    dtype = "float32" if problem.dtype == "bf16" else TORCH_DTYPES[problem.dtype]
    random = np.random.default_rng(0)
    tensors = [random.standard_normal(shape).astype(dtype) for shape in problem[:3]]
    return {f"dlattn, {dtype}": lambda: dlattn.attention(*tensors, **problem.options)}


if __name__ == "__main__":
    sys.exit(main())
