"""Attention inside a model on the CPU: libdlattn beside the framework's own, in turns.

    python bench/cpu_model.py torch|jax [--out FILE.csv] [--threads 16,4,1] [--dtypes f32,bf16,f16]
                              [--ops fwd,bwd] [--seconds S]

Needs the Python package and PyTorch or JAX. An implementation's turn is four layers: a product of
matrices by the framework, attention by the implementation, the next product, and so on. Attention
alone is timed, but right after the framework's threads have worked, which is when a second pool
fights them. The first layer of a turn warms up. `bwd` is the gradient of query, key and value
alone, from what forward has kept. The figures are medians; the spread is the distance between the
quartiles in percent of the median. Every result is compared with that of the framework in f32.
FLOPs = 4 B H Lq Lk D, halved for causal, 2.5 times that for bwd; bytes are those of key and value,
with `read`, their sum by the framework, for what memory gives. JAX has as many threads as the
process has cores: it is started anew, bound to some of them, for each number of threads.
"""

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

COLUMNS = (
    *("date", "commit", "device", "op", "dtype", "B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "causal"),
    *("threads", "impl", "kernel", "median_us", "spread_pct", "tflops", "gbs", "framework"),
)
TOLERANCE = {"f32": 2e-5, "bf16": 3e-2, "f16": 4e-3}  # of the largest element
CASES = (  # B, Hq, Hkv, Lq, Lk, D, causal
    (1, 8, 8, 2048, 2048, 64, False),
    (1, 8, 8, 2048, 2048, 128, False),
    (1, 8, 8, 2048, 2048, 128, True),
    (8, 12, 12, 128, 128, 64, False),
    (16, 12, 12, 197, 197, 64, False),
    (1, 32, 8, 1, 4096, 128, False),
)
LAYERS = 4
PRODUCT = 768  # rows and columns of the matrices between which attention stands


class Torch:
    """PyTorch, in whose layout heads come before rows."""

    heads, rows = 1, 2

    def __init__(self, threads):
        import dlattn.torch
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.torch, self.own = torch, torch.nn.functional.scaled_dot_product_attention
        self.ours = dlattn.torch.scaled_dot_product_attention
        self.dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
        self.matrix = torch.randn(PRODUCT, PRODUCT)

    def product(self):
        self.matrix @ self.matrix

    def random(self, shape, dtype):
        return self.torch.randn(shape).to(self.dtypes[dtype])

    def forward(self, which, causal, gqa):
        function = self.ours if which == "dlattn" else self.own
        return lambda *tensors: function(*tensors, is_causal=causal, enable_gqa=gqa)

    def backward(self, forward, tensors, d_output):
        tensors = [x.detach().requires_grad_() for x in tensors]
        output = forward(*tensors)
        return lambda: self.torch.autograd.grad(output, tensors, d_output, retain_graph=True)

    def wait(self, results):
        return results

    def widened(self, x):
        return x.detach().float()

    def read(self, tensors):
        words = [x.view(self.torch.float32) for x in tensors]
        return lambda: [x.sum() for x in words]


class Jax:
    """JAX, in whose layout rows come before heads."""

    heads, rows = 2, 1

    def __init__(self, threads):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import dlattn.jax
        import jax

        self.jax, self.own = jax, jax.nn.dot_product_attention
        self.ours = dlattn.jax.dot_product_attention
        self.dtypes = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
        self.key = jax.random.key(0)
        self.matrix = self.random((PRODUCT, PRODUCT), "f32")
        self.multiply = jax.jit(lambda x: x @ x)

    def product(self):
        self.multiply(self.matrix).block_until_ready()

    def random(self, shape, dtype):
        self.key, key = self.jax.random.split(self.key)
        return self.jax.random.normal(key, shape, self.dtypes[dtype])

    def forward(self, which, causal, gqa):
        function = self.ours if which == "dlattn" else self.own
        return self.jax.jit(lambda *tensors: function(*tensors, is_causal=causal))

    def backward(self, forward, tensors, d_output):
        _, pullback = self.jax.jit(lambda *tensors: self.jax.vjp(forward, *tensors))(*tensors)
        call = self.jax.jit(lambda pullback, d_output: pullback(d_output))
        return lambda: call(pullback, d_output)

    def wait(self, results):
        return self.jax.block_until_ready(results)

    def widened(self, x):
        return x.astype("float32")

    def read(self, tensors):
        add = self.jax.jit(lambda *tensors: [x.sum() for x in tensors])
        return lambda: add(*tensors)


def turns(framework, functions, seconds):
    """name -> (median in microseconds, spread in percent, the last results)."""
    times, results = {name: [] for name in functions}, {}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < LAYERS - 1:
        for name, function in functions.items():
            for layer in range(LAYERS):
                framework.product()
                start = time.perf_counter()
                results[name] = framework.wait(function())
                if layer:
                    times[name].append((time.perf_counter() - start) * 1e6)
    return {name: (*summary(t), results[name]) for name, t in times.items()}


def summary(times):
    """(median, distance between the quartiles in percent of it)"""
    low, median, high = statistics.quantiles(times, n=4)
    return median, 100 * (high - low) / median


def check(framework, results, exact, dtype, what):
    for x, y in zip(results, exact):
        y = framework.widened(y)
        error = float(abs(framework.widened(x) - y).max() / abs(y).max())
        if not error < TOLERANCE[dtype]:
            raise RuntimeError(f"{what}: off by {error}")


def bench(framework, op, dtype, threads, case, seconds):
    """One case: CSV fields of each implementation."""
    batch, heads, heads_kv, len_q, len_k, dim, causal = case
    own, gqa = type(framework).__name__.lower(), heads != heads_kv

    def tensor(heads, length):
        shape = [batch, 0, 0, dim]
        shape[framework.heads], shape[framework.rows] = heads, length
        return framework.random(shape, dtype)

    tensors = tensor(heads, len_q), tensor(heads_kv, len_k), tensor(heads_kv, len_k)
    d_output = tensor(heads, len_q)
    forwards = {name: framework.forward(name, causal, gqa) for name in (own, "dlattn")}
    functions = {name: lambda f=f: f(*tensors) for name, f in forwards.items()}
    wide = [framework.widened(x) for x in tensors]
    exact = (forwards[own](*wide),)
    if op == "bwd":
        functions = {n: framework.backward(f, tensors, d_output) for n, f in forwards.items()}
        exact = framework.backward(forwards[own], wide, framework.widened(d_output))()
    if len_q == 1:
        functions["read"] = framework.read(tensors[1:])
    found = turns(framework, functions, seconds)
    results = found["dlattn"][2]
    results = results if op == "bwd" else (results,)
    check(framework, results, exact, dtype, f"{op} {dtype} {case}")
    flops = 4 * batch * heads * len_q * len_k * dim / (2 if causal else 1)
    flops *= 2.5 if op == "bwd" else 1
    read = sum(x.nbytes for x in tensors[1:])
    for impl, (median, spread, _) in found.items():
        yield dict(
            zip(COLUMNS[3:14], (op, dtype, *case[:6], dim, int(causal), threads)),
            impl=impl,
            median_us=round(median, 1),
            spread_pct=round(spread, 1),
            tflops=round(flops / median / 1e6, 4) if impl != "read" else "",
            gbs=round(read / median / 1e3, 2),
            framework=own,
        )


def report(rows, own):
    """One line: the case, both times, their ratio, and the machine's own reading."""
    peer, ours = rows[own], rows["dlattn"]
    read = f", read {rows['read']['gbs']} GB/s, ours {ours['gbs']}" if "read" in rows else ""
    print(
        *(ours[name] for name in COLUMNS[3:14]),
        f"{ours['median_us']} us beside {peer['median_us']}:",
        f"x{peer['median_us'] / ours['median_us']:.2f} (+-{ours['spread_pct']:.0f} %,",
        f"{peer['spread_pct']:.0f} %){read}",
        flush=True,
    )


def device():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    return f"{name or platform.machine()}, {len(os.sched_getaffinity(0))} threads"


def commit():
    command = ["git", "rev-parse", "--short", "HEAD"]
    return os.environ.get("DLATTN_COMMIT") or subprocess.check_output(command, text=True).strip()


def run(options, threads):
    framework = {"torch": Torch, "jax": Jax}[options.framework]
    names = {"date": datetime.date.today().isoformat(), "commit": commit(), "device": device()}
    framework = framework(threads)
    fresh = not Path(options.out).exists()
    with open(options.out, "a", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, restval="")
        if fresh:
            out.writeheader()
        for op in options.ops.split(","):
            for dtype in options.dtypes.split(","):
                for case in CASES:
                    if op == "bwd" and case[3] == 1:
                        continue
                    found = bench(framework, op, dtype, threads, case, options.seconds)
                    rows = {row["impl"]: row for row in found}
                    out.writerows(names | row for row in rows.values())
                    file.flush()
                    report(rows, options.framework)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("framework", choices=("torch", "jax"))
    options.add_argument("--out")
    options.add_argument("--threads", default=str(len(os.sched_getaffinity(0))))
    options.add_argument("--dtypes", default="f32,bf16,f16")
    options.add_argument("--ops", default="fwd,bwd")
    options.add_argument("--seconds", type=float, default=0.5, help="for each case")
    options = options.parse_args()
    name = f"{datetime.date.today().isoformat()}-{platform.machine()}-cpu-{options.framework}-model"
    options.out = options.out or f"bench/results/{name}.csv"
    first, *others = options.threads.split(",")
    run(options, int(first))
    if others:
        command = [sys.executable, __file__, options.framework, f"--threads={','.join(others)}"]
        for option in ("out", "dtypes", "ops", "seconds"):
            command.append(f"--{option}={getattr(options, option)}")
        raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
