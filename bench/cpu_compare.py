"""Two builds of the library beside each other on a CPU, in one process and in turns.

    python3 bench/cpu_compare.py ./OLD.so ./NEW.so [--rounds N] [--threads N]

The cases are like cpu_bench's: forward and decoding, in every dtype of the CPU's rows. Prints old /
new for each, which is above 1 where the new one is faster, from the shortest times of both, whether
the outputs have the same bits, and the geometric means. NumPy is all that it needs.
"""

import argparse
import ctypes
import math
import sys
import time
from pathlib import Path

import numpy as np

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
]


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


def compare(libraries, shape, dtype, rounds, threads):
    _, batch, heads_q, heads_kv, len_q, len_k, dim, causal = shape
    rng = np.random.default_rng(1)
    query = random(rng, (batch, heads_q, len_q, dim), dtype)
    key, value = (random(rng, (batch, heads_kv, len_k, dim), dtype) for _ in range(2))
    desc = Desc(causal=causal, num_threads=threads)
    calls = [Call(library, desc, (query, key, value), dtype) for library in libraries]
    times = [[seconds(call) for call in calls] for _ in range(rounds + 1)][1:]
    old, new = (min(column) for column in zip(*times))
    same = np.array_equal(calls[0].output, calls[1].output)
    return old / new, new, calls[1].kernel, same


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    libraries = [Api(given.old), Api(given.new)]
    ratios = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            ratio, seconds, kernel, same = compare(
                libraries, shape, dtype, given.rounds, given.threads
            )
            ratios.setdefault(shape[0], []).append(ratio)
            bits = "same bits" if same else "other bits"
            print(f"{shape} {dtype} {kernel} {seconds * 1e3:.2f} ms: {ratio:.3f}, {bits}")
    for op, of in ratios.items():
        mean = math.exp(sum(map(math.log, of)) / len(of))
        print(f"{op}: geometric mean {mean:.4f}, lowest {min(of):.3f}, {len(of)} cases")


if __name__ == "__main__":
    main()
