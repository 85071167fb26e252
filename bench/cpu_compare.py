"""Two builds of the library beside each other on a CPU, in one process and in turns.

    python3 bench/cpu_compare.py ./OLD.so ./NEW.so [--ops LIST] [--threads N] [--csv FILE]

The cases are like cpu_bench's: forward, decoding, and few rows over many keys, in every dtype of
the CPU's rows and in bf16 over e4m3. Prints old / new for each, which is above 1 where the new one
is faster, from the shortest times of both, whether the outputs have the same bits, and the
geometric means. NumPy is all that it needs.
"""

import argparse
import csv
import ctypes
import datetime
import math
import sys
import time
from pathlib import Path

import numpy as np
from cpu_model import commit, device

sys.path.append(str(Path(__file__).parents[1] / "abi"))
from dlattn_ctypes import Api, Desc, DLTensor, Exec, Sku, Tensors

# DLPack's code and bits, and what NumPy keeps the bits in.
DTYPES = {
    "f32": (2, 32, np.float32),
    "f16": (2, 16, np.float16),
    "bf16": (4, 16, np.uint16),
    "f64": (2, 64, np.float64),
}
FLOAT8 = {"e4m3": (10, 8, np.uint8), "e5m2": (12, 8, np.uint8)}
# op, batch, heads_q, heads_kv, len_q, len_k, dim, causal
SHAPES = [
    ("fwd", 1, 8, 8, 1024, 1024, 64, 0),
    ("fwd", 1, 8, 8, 1024, 1024, 64, 1),
    ("fwd", 1, 8, 8, 1024, 1024, 128, 0),
    ("fwd", 1, 8, 8, 1024, 1024, 128, 1),
    ("fwd", 8, 12, 12, 128, 128, 64, 0),
    ("decode", 1, 32, 8, 1, 8192, 128, 0),
    ("decode", 1, 32, 32, 1, 2048, 128, 0),
    ("decode", 1, 32, 8, 1, 32768, 128, 0),
    ("decode", 1, 64, 8, 1, 32768, 128, 0),
    ("decode", 8, 32, 8, 1, 8192, 64, 0),
    ("few", 1, 32, 1, 1, 32768, 128, 0),
    ("few", 1, 128, 1, 1, 16384, 128, 0),
    ("few", 1, 8, 1, 64, 32768, 128, 0),
    ("few", 1, 32, 8, 16, 8192, 128, 0),
]
OPS = ("fwd", "decode", "few")
KEYS = ("dtype", "op", "B", "Hq", "Hkv", "Lq", "Lk", "D", "causal", "threads")
HEAD = ("date", "commit", "device", *KEYS, "old_kernel", "kernel", "old_us", "us", "ratio", "bits")


def random(rng, shape, dtype):
    x = rng.uniform(-2, 2, shape).astype(np.float32)
    if dtype == "bf16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    if dtype in FLOAT8:  # any codes of finite numbers below 2
        return rng.integers(0, 64, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    return x.astype(DTYPES[dtype][2])


def describe(array, dtype):
    code, bits, _ = (DTYPES | FLOAT8)[dtype]
    axes = (ctypes.c_int64 * array.ndim)(*array.shape)
    cpu = (ctypes.c_int32 * 2)(1, 0)
    return DLTensor(array.ctypes.data, cpu, array.ndim, code, bits, 1, axes, None)


class Call:
    """A planned call, the name of the row that runs it, and its output. Keys and values may be of
    another dtype than the query."""

    def __init__(self, library, desc, inputs, dtype, of_keys=None):
        self.library, self.inputs = library, inputs
        self.output = np.zeros_like(inputs[0])
        names = ("query", "key", "value", "output")
        dtypes = (dtype, of_keys or dtype, of_keys or dtype, dtype)
        self.tensors = Tensors(
            **{
                name: ctypes.pointer(describe(array, of_array))
                for name, array, of_array in zip(names, (*inputs, self.output), dtypes)
            }
        )
        sku, self.plan, at = Sku(), ctypes.c_void_p(), ctypes.addressof
        library.check(library.query(at(desc), at(self.tensors), at(sku)))
        library.check(library.plan_create(at(desc), at(self.tensors), at(self.plan)))
        self.kernel = sku.kernel.decode()
        self.memory = np.zeros(sku.workspace_bytes + 4096, np.uint8)
        start = -self.memory.ctypes.data % 4096
        self.exec = Exec(
            workspace=self.memory.ctypes.data + start, workspace_bytes=sku.workspace_bytes
        )

    def __call__(self):
        at = ctypes.addressof
        self.library.check(self.library.plan_run(self.plan, at(self.tensors), at(self.exec)))


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compare(libraries, shape, dtype, of_keys, rounds, threads):
    """The rows that run it, the shortest time of both, and whether the bits are the same."""
    _, batch, heads_q, heads_kv, len_q, len_k, dim, causal = shape
    rng = np.random.default_rng(1)
    query = random(rng, (batch, heads_q, len_q, dim), dtype)
    key, value = (random(rng, (batch, heads_kv, len_k, dim), of_keys) for _ in range(2))
    desc = Desc(causal=causal, num_threads=threads)
    calls = [Call(library, desc, (query, key, value), dtype, of_keys) for library in libraries]
    times = [[seconds(call) for call in calls] for _ in range(rounds + 1)][1:]
    old, new = (min(column) for column in zip(*times))
    same = np.array_equal(calls[0].output, calls[1].output)
    return calls[0].kernel, calls[1].kernel, old, new, "same" if same else "other"


def lines(given):
    """A dict of HEAD's columns for each case, but date, commit and device."""
    libraries = [Api(given.old), Api(given.new)]
    for shape in (shape for shape in SHAPES if shape[0] in given.ops.split(",")):
        dtypes = [(dtype, dtype) for dtype in DTYPES]
        for dtype, of_keys in dtypes + [("bf16", "e4m3")] * (shape[0] != "fwd"):
            names = dtype if dtype == of_keys else f"{dtype}+{of_keys}"
            old_kernel, kernel, old, new, bits = compare(
                libraries, shape, dtype, of_keys, given.rounds, given.threads
            )
            line = dict(zip(KEYS, (names, *shape, given.threads)))
            yield line | {
                "old_kernel": old_kernel,
                "kernel": kernel,
                "old_us": f"{old * 1e6:.1f}",
                "us": f"{new * 1e6:.1f}",
                "ratio": f"{old / new:.3f}",
                "bits": bits,
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", help="lines are added to it")
    given = parser.parse_args()
    ratios, done = {}, []
    for line in lines(given):
        ratios.setdefault(line["op"], []).append(float(line["ratio"]))
        print(*line.values(), flush=True)
        done.append(line)
    for op, of in ratios.items():
        mean = math.exp(sum(map(math.log, of)) / len(of))
        print(f"{op}: geometric mean {mean:.4f}, lowest {min(of):.3f}, {len(of)} cases")
    if given.csv:
        names = {"date": datetime.date.today().isoformat(), "commit": commit(), "device": device()}
        with open(given.csv, "a", newline="") as file:
            out = csv.DictWriter(file, HEAD, lineterminator="\n")
            if file.tell() == 0:
                out.writeheader()
            out.writerows(names | line for line in done)


if __name__ == "__main__":
    main()
