"""What one call costs on a tiny problem through each adapter, beside its framework's own attention.

    python bench/calls.py RESULTS.csv

needs the packages of adapters/tvm/requirements.txt and dlattn itself, the environment variables
DLATTN_LIBRARY and DLATTN_TVM_LIBRARY (see ./dev), and the Rust example `call` built for release:
cargo build --release --manifest-path adapters/rust/Cargo.toml --example call. On the CPU; f32,
[1, 4, 16, 64], one thread. The figures are medians of 201 runs of 50 calls.
"""

import csv
import datetime
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import dlattn
import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

ROOT = Path(__file__).resolve().parents[1]
RUNS, CALLS = 201, 50
HEAD = (
    "date,commit,device,op,dtype,B,Hq,Hkv,Lq,Lk,D,Dv,causal,threads,impl,kernel,median_us,"
    "spread_pct,tflops,gbs"
)


def microseconds(call):
    """Median and spread (between the quartiles, in percent) of short runs, some of which a busy
    machine interrupts."""
    runs = []
    for _ in range(RUNS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        runs.append((time.perf_counter() - began) / CALLS * 1e6)
    low, median, high = statistics.quantiles(runs, n=4)
    return median, (high - low) / median * 100


def numpy_rows():
    query, key, value, output = np.random.default_rng(0).standard_normal((4, 1, 4, 16, 64), "f")
    scale = np.float32(1 / 8)

    def softmax_attention():
        logits = query @ key.swapaxes(2, 3) * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ value

    yield "numpy-dlattn", lambda: dlattn.attention(query, key, value, out=output)
    yield "numpy", softmax_attention
    forward = tvm_ffi.load_module(os.environ["DLATTN_TVM_LIBRARY"]).dlattn_forward
    yield "tvm-ffi-dlattn", lambda: forward(query, key, value, output)


@I.ir_module
class Own:
    """Relax's attention, [B, L, H, D], as its compiler writes it."""

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
                "dlattn_forward", (query, key, value), out_ty=R.Tensor((1, 4, 16, 64), "float32")
            )
            R.output(output)
        return output


def relax_rows():
    for name, module, shape in (
        ("relax-dlattn", Plugin, (1, 4, 16, 64)),
        ("relax", Own, (1, 16, 4, 64)),
    ):
        executable = tvm.compile(module, target="llvm").jit()
        if module is Plugin:
            executable.import_module(tvm.runtime.load_module(os.environ["DLATTN_TVM_LIBRARY"]))
        main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        numbers = np.random.default_rng(0).standard_normal((3, *shape), "f")
        tensors = [tvm.runtime.tensor(x, tvm.cpu()) for x in numbers]
        yield name, lambda main=main, tensors=tensors: main(*tensors)


def rust_rows():
    """(implementation, kernel, median, spread) as the Rust example prints them."""
    example = ROOT / "adapters/rust/target/release/examples/call"
    done = subprocess.run([example], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        _, _, name, kernel, median, spread = line.split()
        yield name, kernel.strip("-"), float(median), float(spread)


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def main():
    zeros = np.zeros((1, 4, 16, 64), np.float32)
    kernel = dlattn.select(zeros, zeros, zeros).kernel
    rows = [
        (name, kernel if name.endswith("dlattn") else "", *microseconds(call))
        for make in (numpy_rows, relax_rows)
        for name, call in make()
    ]
    rows += rust_rows()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    common = [datetime.date.today().isoformat(), commit.strip(), cpu_name(), "call", "f32"]
    with open(sys.argv[1], "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        print(HEAD, file=file)
        for name, row, median, spread in rows:
            shape = [1, 4, 4, 16, 16, 64, 64, 0, os.environ["DLATTN_NUM_THREADS"]]
            figures = [f"{median:.2f}", f"{spread:.1f}", "", ""]
            writer.writerow([*common, *shape, name, row, *figures])
            print(f"{name:16} {row:16} {median:8.2f} us, spread {spread:.0f} %")


if __name__ == "__main__":
    main()
