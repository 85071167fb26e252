"""Forward attention on the CPU: libdlattn beside PyTorch, in one process and in turns.

    DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 python3 bench/cpu_torch.py [--out results.csv]

The two take turns in bouts: a pause, so that neither inherits the other's spinning threads, two
calls to warm up, then timed ones. The figures are medians; the spread is the distance between the
quartiles in percent of the median. Every output is compared with PyTorch's in f32.
FLOPs = 4 B H Lq Lk D, halved for causal; bytes are those of key and value. A third in turn, "read",
only adds up the keys and values of a decoding step: what memory allows. In the end the speed of
each case on all threads is compared with that on the fewest.
"""

import argparse
import csv
import datetime
import os
import platform
import subprocess
import time

import torch
import torch.nn.functional as functional
from gpu_bench import COLUMNS, Library, summary

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOLERANCE = {"f32": 1e-5, "bf16": 2e-2, "f16": 2e-3}
CASES = (  # op, B, Hq (0: as many as threads, 4 at least), Hkv, Lq, Lk, D, causal
    ("fwd", 1, 0, 0, 2048, 2048, 64, False),
    ("fwd", 1, 0, 0, 2048, 2048, 128, False),
    ("fwd", 1, 0, 0, 2048, 2048, 128, True),
    ("fwd", 8, 12, 12, 128, 128, 64, False),
    ("decode", 1, 32, 8, 1, 4096, 128, False),
    ("decode", 1, 32, 32, 1, 4096, 128, False),
)


def bouts(functions, seconds):
    """name -> (median in microseconds, spread in percent)."""
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["dlattn"]) < 6:
        for name, function in functions.items():
            time.sleep(0.02)
            function()
            function()
            for _ in range(3):
                start = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: summary(t) for name, t in times.items()}


def bench(library, dtype, threads, case, seconds):
    """One case: CSV fields of both implementations."""
    op, batch, heads, heads_kv, len_q, len_k, dim, causal = case
    heads, heads_kv = heads or max(4, threads), heads_kv or max(4, threads)
    torch.set_num_threads(threads)
    shapes = (heads, len_q), (heads_kv, len_k), (heads_kv, len_k)
    q, k, v = (torch.randn(batch, h, length, dim).to(DTYPES[dtype]) for h, length in shapes)
    gqa = heads != heads_kv

    def torch_sdpa():
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    output = torch.empty_like(q)
    call = library.call(causal, threads=threads, query=q, key=k, value=v, output=output)
    functions = {"torch": torch_sdpa, "dlattn": call}
    if op == "decode":
        words = k.view(torch.float32), v.view(torch.float32)
        functions["read"] = lambda: [w.sum() for w in words]
    times = bouts(functions, seconds)
    exact = functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=causal, enable_gqa=gqa
    )
    error = (output.float() - exact).abs().max().item()
    if not error < TOLERANCE[dtype]:
        raise RuntimeError(f"{call.kernel} {dtype} {case}: off by {error}")
    flops = 4 * batch * heads * len_q * len_k * dim / (2 if causal else 1)
    read = 2 * k.numel() * k.element_size()
    names = {"op": op, "B": batch, "Hq": heads, "Hkv": heads_kv}
    names |= {"Lq": len_q, "Lk": len_k, "D": dim, "Dv": dim}
    for impl, (median, spread) in times.items():
        yield dict(
            names,
            dtype=dtype,
            causal=int(causal),
            threads=threads,
            impl=impl,
            kernel=call.kernel if impl == "dlattn" else "",
            median_us=round(median, 2),
            spread_pct=round(spread, 1),
            tflops=round(flops / median / 1e6, 4) if impl != "read" else "",
            gbs=round(read / median / 1e3, 2),
            workspace=call.exec.workspace_bytes // threads if impl == "dlattn" else "",
        )


def report(rows):
    """One line: the case, both speeds, their ratio, the machine's own reading, workspace."""
    peer, own = rows["torch"], rows["dlattn"]
    unit, name = ("gbs", "GB/s") if own["op"] == "decode" else ("tflops", "TFLOP/s")
    limit = f", read {rows['read']['gbs']} GB/s" if "read" in rows else ""
    print(
        *(own[f] for f in COLUMNS[:14] if f in own),
        f"{own['kernel']} {own[unit]} {name} beside {peer[unit]}{limit}:",
        f"x{peer['median_us'] / own['median_us']:.2f},",
        f"{own['workspace'] / 1024:.0f} KiB a thread",
        flush=True,
    )


def report_scaling(speeds):
    """speeds: (dtype, case) -> {threads: TFLOP/s}"""
    for (dtype, case), speed in speeds.items():
        few, many = min(speed), max(speed)
        if few < many:
            print(
                f"{dtype} {case}: {many} threads do {speed[many] / speed[few]:.1f} times",
                f"the work of {few}",
            )


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--out")
    options.add_argument("--threads", default=f"{os.cpu_count()},1,2")
    options.add_argument("--seconds", type=float, default=1.0, help="for each case")
    options = options.parse_args()
    library = Library(os.environ.get("DLATTN_LIBRARY", "bazel-bin/libdlattn.so.1"))
    date, device = datetime.date.today().isoformat(), f"{platform.machine()}-{os.cpu_count()}"
    commit = (
        os.environ.get("DLATTN_COMMIT")
        or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    )
    with open(
        options.out or f"bench/results/{date}-{device}-cpu-torch.csv", "w", newline=""
    ) as file:
        out = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        out.writeheader()
        speeds = {}
        for threads in map(int, options.threads.split(",")):
            for dtype in DTYPES:
                for case in CASES:
                    rows = {
                        r["impl"]: r for r in bench(library, dtype, threads, case, options.seconds)
                    }
                    for row in rows.values():
                        out.writerow(dict(row, date=date, commit=commit, device=device))
                    file.flush()
                    report(rows)
                    speeds.setdefault((dtype, case), {})[threads] = rows["dlattn"]["tflops"]
        report_scaling(speeds)


if __name__ == "__main__":
    main()
