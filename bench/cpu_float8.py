"""Float8 keys and values on a CPU beside those of the query's dtype, in one process and in turns.

    DLATTN_LIBRARY=./libdlattn.so.1 python3 bench/cpu_float8.py RESULTS.csv [FILTER] [--rounds N]

Writes a line for each row and mixture of dtypes, and prints how many times as fast float8 is; only
cases whose line has FILTER in it. Figures are medians of the rounds of one thread, spread_pct the
distance between the quartiles. The op read is a maximum, by NumPy, over as many bytes as the keys
and values of the decoding that follows it have. NumPy is all that it needs.
"""

import argparse
import csv
import datetime
import os
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "abi"))
from cpu_compare import Call, random, seconds
from cpu_model import COLUMNS, commit, device
from dlattn_ctypes import Api, Desc

HEAD = COLUMNS[:-1]  # no framework
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1}
FORWARD = ("cpu_fwd_amx", "cpu_fwd_avx512", "cpu_fwd_avx2")
DECODE = ("cpu_decode_avx512vbmi", "cpu_decode_avx512", "cpu_decode_avx2")
TILES = ("cpu_decode_amx",)
# op, rows, dtypes of the query, (B, Hq, Hkv, Lq, Lk, D, causal)
CASES = [
    ("fwd", FORWARD, ("bf16",), (1, 8, 8, 1024, 1024, 64, 0)),
    ("fwd", FORWARD, ("bf16", "f16"), (1, 8, 8, 1024, 1024, 128, 0)),
    ("fwd", FORWARD, ("bf16",), (1, 8, 8, 1024, 1024, 128, 1)),
    ("fwd", FORWARD, ("bf16",), (8, 12, 12, 128, 128, 64, 0)),
    ("fwd", FORWARD[:1], ("bf16",), (1, 32, 8, 128, 8192, 128, 0)),
    ("decode", DECODE, ("bf16", "f16", "f32"), (1, 32, 8, 1, 65536, 128, 0)),
    ("decode", DECODE, ("bf16",), (1, 32, 32, 1, 16384, 128, 0)),
    ("decode", DECODE, ("bf16",), (8, 32, 8, 1, 8192, 64, 0)),
    ("decode", TILES, ("bf16",), (1, 32, 8, 1, 65536, 128, 0)),
    ("decode", TILES, ("bf16",), (8, 32, 8, 1, 8192, 64, 0)),
    ("decode", TILES + DECODE[:2], ("bf16",), (1, 64, 8, 1, 32768, 128, 0)),
    ("decode", TILES + DECODE[:2], ("bf16",), (1, 32, 2, 1, 65536, 128, 0)),
]


def timed(functions, rounds):
    """Median in seconds and spread in percent of each function, all of them in turns."""
    times = {name: [] for name in functions}
    for n in range(rounds + 1):
        for name, function in functions.items():
            time = seconds(function)
            if n:
                times[name].append(time)
    result = {}
    for name, of in times.items():
        quartiles = statistics.quantiles(of, n=4)
        median = statistics.median(of)
        result[name] = median, 100 * (quartiles[2] - quartiles[0]) / median
    return result


def measure(library, case, kernel, dtype, rounds):
    """The lines of a row: keys and values of the query's dtype and of both kinds of float8."""
    op, _, _, (batch, heads, heads_kv, len_q, len_k, dim, causal) = case
    rng = np.random.default_rng(1)
    query = random(rng, (batch, heads, len_q, dim), dtype)
    desc = Desc(causal=causal, num_threads=1, kernel=kernel.encode())
    functions = {}
    for of_keys in (dtype, "e4m3", "e5m2"):
        key, value = (random(rng, (batch, heads_kv, len_k, dim), of_keys) for _ in range(2))
        functions[of_keys] = Call(library, desc, (query, key, value), dtype, of_keys)
        if op == "decode" and of_keys != "e5m2":
            words = [x.reshape(-1).view(np.uint64) for x in (key, value)]
            functions["read " + of_keys] = lambda words=words: [x.max() for x in words]
    times = timed(functions, rounds)
    products = 4 * batch * heads * len_q * len_k * dim / (1 + causal)
    for name, (median, spread) in times.items():
        of_keys = name.removeprefix("read ")
        read = 2 * batch * heads_kv * len_k * dim * BYTES[of_keys]
        yield {
            "op": "read" if name.startswith("read") else op,
            "dtype": dtype if of_keys == dtype else f"{dtype}+{of_keys}",
            "B": batch,
            "Hq": heads,
            "Hkv": heads_kv,
            "Lq": len_q,
            "Lk": len_k,
            "D": dim,
            "Dv": dim,
            "causal": causal,
            "threads": 1,
            "impl": "numpy" if name.startswith("read") else "dlattn",
            "kernel": "" if name.startswith("read") else kernel,
            "median_us": f"{median * 1e6:.2f}",
            "spread_pct": f"{spread:.1f}",
            "tflops": "" if name.startswith("read") else f"{products / median / 1e12:.4f}",
            "gbs": f"{read / median / 1e9:.2f}",
        }
    ratios = (f"{name} {times[dtype][0] / times[name][0]:.2f}" for name in ("e4m3", "e5m2"))
    print(kernel, dtype, *case[3], "times as fast:", *ratios, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results")
    parser.add_argument("filter", nargs="?", default="")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    library = Api(os.environ["DLATTN_LIBRARY"])
    same = {"date": datetime.date.today().isoformat(), "commit": commit(), "device": device()}
    with open(given.results, "w", newline="") as file:
        out = csv.DictWriter(file, HEAD, lineterminator="\n")
        out.writeheader()
        for case in CASES:
            for kernel in case[1]:
                for dtype in case[2]:
                    if given.filter in f"{kernel} {dtype} {case[3]}":
                        for line in measure(library, case, kernel, dtype, given.rounds):
                            out.writerow({**same, **line})
                            file.flush()


if __name__ == "__main__":
    main()
