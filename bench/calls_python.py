"""What one call costs on a tiny problem through dlattn.jax and dlattn.torch, beside JAX's and
PyTorch's own attention.

    taskset -c 0 python bench/calls_python.py jax|torch RESULTS.csv

needs dlattn and that framework in the environment, and DLATTN_COMMIT outside of a checkout. On the
CPU; f32, [1, 4, 16, 64], one thread; JAX under jit. The figures are medians of 15 runs of 1000
calls.
"""

import csv
import datetime
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HEAD = (
    "date,commit,device,op,dtype,B,Hq,Hkv,Lq,Lk,D,Dv,causal,threads,impl,kernel,median_us,"
    "spread_pct,tflops,gbs"
)
CALLS, RUNS = 1000, 15


def microseconds(call):
    """Median, and the quartiles' distance in percent of it."""
    runs = []
    for _ in range(RUNS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        runs.append((time.perf_counter() - began) / CALLS * 1e6)
    low, median, high = statistics.quantiles(runs, n=4)
    return median, (high - low) / median * 100


def jax_rows():
    import dlattn.jax
    import jax

    numbers = np.random.default_rng(0).standard_normal((3, 1, 16, 4, 64), "f")
    tensors = [jax.numpy.asarray(x) for x in numbers]
    for name, attention in (
        ("jax-dlattn", dlattn.jax.dot_product_attention),
        ("jax", jax.nn.dot_product_attention),
    ):
        program = jax.jit(attention)
        yield name, lambda program=program: program(*tensors).block_until_ready()


def torch_rows():
    import dlattn.torch
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tensors = torch.randn(3, 1, 4, 16, 64).unbind()
    for name, attention in (
        ("torch-dlattn", dlattn.torch.scaled_dot_product_attention),
        ("torch", torch.nn.functional.scaled_dot_product_attention),
    ):
        yield name, lambda attention=attention: attention(*tensors)


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def main(framework, path):
    import dlattn

    commit = os.environ.get("DLATTN_COMMIT") or subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], text=True
    )
    like = np.zeros((1, 4, 16, 64), "f")
    kernel = dlattn.select(like, like, like).kernel
    case = [datetime.date.today().isoformat(), commit.strip(), cpu_name(), "call", "f32"]
    case += [1, 4, 4, 16, 16, 64, 64, 0, 1]
    path = Path(path)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(HEAD.split(","))
        for name, call in {"jax": jax_rows, "torch": torch_rows}[framework]():
            median, spread = microseconds(call)
            row = kernel if name.endswith("dlattn") else ""
            writer.writerow([*case, name, row, f"{median:.2f}", f"{spread:.1f}", "", ""])
            print(f"{name:14}{median:8.2f} us  {row}")


if __name__ == "__main__":
    main(*sys.argv[1:])
