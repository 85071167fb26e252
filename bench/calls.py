"""What one call costs on a tiny problem through each adapter, beside its framework's own attention.

    python bench/calls.py RESULTS.csv [--device cpu|cuda] FRAMEWORK...

Frameworks: numpy, tvm-ffi, relax, jax, torch, candle; each must be installed, with dlattn, and
./dev bench-calls runs all that are. All need DLATTN_LIBRARY, tvm-ffi and relax DLATTN_TVM_LIBRARY,
candle the command of the Rust example `call` in CANDLE_CALL. RESULTS.csv gets its header, or new
lines if it exists; DLATTN_COMMIT names the commit outside of a checkout.

Self-attention of [1, 4, 16, 64]: on the CPU in f32 with one thread, a call until its result is
there; on a GPU in f16, the host's time to enqueue a call. An adapter and its framework take turns,
201 runs of 50 calls each; the figures are the median run and the distance between the quartiles.
"""

import argparse
import csv
import datetime
import os
import shlex
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

HEAD = (
    "date,commit,device,op,dtype,B,Hq,Hkv,Lq,Lk,D,Dv,causal,threads,impl,kernel,median_us,"
    "spread_pct,tflops,gbs"
)
SHAPE = 1, 4, 16, 64  # [B, H, L, D]
RUNS, CALLS = 201, 50


def numbers(shape=SHAPE):
    return np.random.default_rng(0).standard_normal((3, *shape), "f")


def done():
    """What a framework whose calls return with their results has to wait for."""


def numpy_calls(device):
    import dlattn

    query, key, value = numbers()
    output = np.empty_like(query)
    scale = np.float32(SHAPE[3] ** -0.5)

    def softmax_attention():
        logits = query @ key.swapaxes(2, 3) * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ value

    kernel = dlattn.select(query, key, value).kernel
    yield "numpy-dlattn", kernel, lambda: dlattn.attention(query, key, value, out=output), done
    yield "numpy", "", softmax_attention, done


def tvm_ffi_calls(device):
    """tvm-ffi has no attention; its tensors on a GPU are torch's."""
    import tvm_ffi

    module = tvm_ffi.load_module(os.environ["DLATTN_TVM_LIBRARY"])
    forward, wait, others = module.dlattn_forward, done, []
    if device == "cuda":
        import torch

        tensors = torch.from_numpy(numbers()).to("cuda", torch.float16).unbind()
        output, wait = torch.empty_like(tensors[0]), torch.cuda.synchronize
        sdpa = torch.nn.functional.scaled_dot_product_attention
        others = [("torch", "", lambda: sdpa(*tensors), wait)]
    else:
        tensors = numbers()
        output = np.empty_like(tensors[0])
    query, key, value = tensors
    kernel = module.dlattn_kernel(query, key, value, output)
    yield "tvm-ffi-dlattn", kernel, lambda: forward(query, key, value, output), wait
    yield from others


def relax_calls(device):
    """Relax's own attention is of [B, L, H, D], as its compiler writes it."""
    import tvm
    from tvm import relax
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Own:
        @R.function
        def main(
            query: R.Tensor((1, 16, 4, 64), "float32"),
            key: R.Tensor((1, 16, 4, 64), "float32"),
            value: R.Tensor((1, 16, 4, 64), "float32"),
        ):
            with R.dataflow():
                output = R.nn.attention(query, key, value)
                R.output(output)
            return output

    @I.ir_module
    class Plugin:
        @R.function
        def main(
            query: R.Tensor((1, 4, 16, 64), "float32"),
            key: R.Tensor((1, 4, 16, 64), "float32"),
            value: R.Tensor((1, 4, 16, 64), "float32"),
        ):
            with R.dataflow():
                output = R.call_dps_packed(
                    "dlattn_forward",
                    (query, key, value),
                    out_ty=R.Tensor((1, 4, 16, 64), "float32"),
                )
                R.output(output)
            return output

    plugin = tvm.runtime.load_module(os.environ["DLATTN_TVM_LIBRARY"])
    for name, module, shape in (
        ("relax-dlattn", Plugin, (1, 4, 16, 64)),
        ("relax", Own, (1, 16, 4, 64)),
    ):
        executable = tvm.compile(module, target="llvm").jit()
        executable.import_module(plugin)
        main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        tensors = [tvm.runtime.tensor(x, tvm.cpu()) for x in numbers(shape)]
        kernel = plugin["dlattn_kernel"](*tensors, tensors[0]) if module is Plugin else ""
        yield name, kernel, lambda main=main, tensors=tensors: main(*tensors), done


def jax_calls(device):
    """Under jit, [B, L, H, D]."""
    os.environ["JAX_PLATFORMS"] = device
    import dlattn.jax
    import jax

    batch, heads, length, dim = SHAPE
    dtype = "float32" if device == "cpu" else "float16"
    tensors = [jax.numpy.asarray(x, dtype) for x in numbers((batch, length, heads, dim))]
    last = []

    def wait():
        for output in last:
            output.block_until_ready()

    for name, attention in (
        ("jax-dlattn", dlattn.jax.dot_product_attention),
        ("jax", jax.nn.dot_product_attention),
    ):
        program = jax.jit(attention)

        def call(program=program):
            last[:] = [program(*tensors)]
            if device == "cpu":
                wait()

        yield name, "", call, wait


def torch_calls(device):
    import dlattn.torch
    import torch

    torch.set_num_threads(1)
    dtype = torch.float32 if device == "cpu" else torch.float16
    tensors = torch.from_numpy(numbers()).to(device, dtype).unbind()
    wait = done if device == "cpu" else torch.cuda.synchronize
    kernel = dlattn.select(*tensors).kernel
    for name, row, attention in (
        ("torch-dlattn", kernel, dlattn.torch.scaled_dot_product_attention),
        ("torch", "", torch.nn.functional.scaled_dot_product_attention),
    ):
        yield name, row, lambda attention=attention: attention(*tensors), wait


def in_turns(calls):
    """(implementation, kernel, median, spread) of calls that one process can make."""
    calls = list(calls)
    runs = [[] for _ in calls]
    for _, _, call, wait in calls:
        call()
        wait()
    for _ in range(RUNS):
        for times, (_, _, call, wait) in zip(runs, calls):
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter() - began) / CALLS * 1e6)
            wait()
    for times, (name, kernel, _, _) in zip(runs, calls):
        low, median, high = statistics.quantiles(times, n=4)
        yield name, kernel, median, (high - low) / median * 100


def candle_figures(device):
    """The same from the Rust example, which takes turns as in_turns does."""
    command = [*shlex.split(os.environ["CANDLE_CALL"]), device]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in lines.splitlines():
        name, kernel, median, spread = line.split()
        yield name, kernel.strip("-"), float(median), float(spread)


FIGURES = {
    "numpy": lambda device: in_turns(numpy_calls(device)),
    "tvm-ffi": lambda device: in_turns(tvm_ffi_calls(device)),
    "relax": lambda device: in_turns(relax_calls(device)),
    "jax": lambda device: in_turns(jax_calls(device)),
    "torch": lambda device: in_turns(torch_calls(device)),
    "candle": candle_figures,
}


def device_name(device):
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
        return subprocess.check_output(query, text=True).strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("frameworks", nargs="+", choices=FIGURES)
    o = parser.parse_args()
    commit = os.environ.get("DLATTN_COMMIT")
    commit = commit or subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, text=True
    )
    batch, heads, length, dim = SHAPE
    dtype, threads = ("f32", 1) if o.device == "cpu" else ("f16", "")
    case = [datetime.date.today().isoformat(), commit.strip(), device_name(o.device), "call"]
    case += [dtype, batch, heads, heads, length, length, dim, dim, 0, threads]
    is_new = not o.results.exists()
    with o.results.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(HEAD.split(","))
        for framework in o.frameworks:
            for name, kernel, median, spread in FIGURES[framework](o.device):
                writer.writerow([*case, name, kernel, f"{median:.2f}", f"{spread:.1f}", "", ""])
                print(f"{o.device:5}{name:17}{kernel:18}{median:8.2f} us, spread {spread:.0f} %")


if __name__ == "__main__":
    main()
