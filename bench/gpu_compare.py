"""Two builds of the library beside each other on a GPU, in one process and in turns.

    python3 bench/gpu_compare.py ./OLD.so ./NEW.so [--ops fwd,bwd,decode,options] [--dims 64,128]
        [--dtypes bf16,f16] [--kernel NAME] [--rounds N] [--out FILE.csv]

The cases of fwd, bwd and decode are those of gpu_bench.py, decoding with a cold L2; with --kernel,
forward and backward calls run that row. Those of options are gpu_options.py's. Prints old / new for
each, which is above 1 where the new one is faster, and whether the two gave other bits; then the
geometric means, and those of each row. DLATTN_COMMIT is what the CSV shall name.
"""

import argparse
import csv
import datetime
import math
import os
from collections import defaultdict

import torch
from gpu_bench import (
    COLUMNS,
    Call,
    Desc,
    Library,
    case_rows,
    decode_cases,
    grid,
    head_dims,
    random_rows,
    recorded,
    rounds,
)
from gpu_options import GROUPS


class Plain:
    """A case of gpu_bench.py: forward, backward or decoding."""

    def __init__(self, op, dtype, q, k, v, causal=False, kernel=None):
        self.name, self.dtype, self.q, self.k, self.v, self.causal = op, dtype, q, k, v, causal
        self.desc = Desc(causal=int(causal), kernel=kernel)
        self.like_output = q if q.shape[3] == v.shape[3] else v  # then it has the query's rows
        self.gradients = {}
        self.tensors = {"query": q, "key": k, "value": v, "output": self.new_output()}

    def new_output(self):
        return torch.empty_like(self.like_output)

    def with_gradients(self, library):
        """All of one output and lse, by the first choice."""
        self.tensors["lse"] = torch.empty(self.q.shape[:3], device="cuda", dtype=torch.float32)
        Call(library, Desc(causal=int(self.causal)), self.tensors)()
        self.gradients = {"d_output": torch.randn_like(self.like_output)}
        return self

    def call(self, library):
        """With results of its own."""
        if self.gradients:
            inputs = {"d_query": self.q, "d_key": self.k, "d_value": self.v}
            wanted = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
            return Call(library, self.desc, self.tensors, self.gradients | wanted)
        return Call(library, self.desc, self.tensors | {"output": self.new_output()})

    def rows(self, kernels, times):
        read = 2 * self.k.numel() * self.k.element_size() if self.name == "decode" else 0
        found = {name: (name, None) for name in times}
        tensors = self.q, self.k, self.v
        for row in case_rows(self.name, self.dtype, *tensors, self.causal, found, times, read):
            yield row | {"kernel": kernels[row["impl"]]}


def plain_cases(op, given):
    kernel = given.kernel
    for found, dtype, (dim, dim_v), causal, length in grid(given.dtypes, False, given.dims):
        if found == "fwd":
            q, k, v = (random_rows(dtype, length, 2048 // dim, d) for d in (dim, dim, dim_v))
            yield Plain(op, dtype, q, k, v, causal, kernel)


def cases(op, given, library):
    if op == "decode":
        return (Plain("decode", *case) for case in decode_cases())
    if op == "options":
        return (c for dim, _ in given.dims for group in GROUPS.values() for c in group(dim, False))
    if op == "bwd":
        return (case.with_gradients(library) for case in plain_cases(op, given))
    return plain_cases(op, given)


def time_case(libraries, case, count, flush):
    """Rows of the CSV, old / new, and whether both gave the same bits."""
    calls = {name: case.call(library) for name, library in libraries.items()}
    functions = {}
    for name, call in calls.items():
        if case.name == "decode":
            functions[f"before {name}"] = flush
        functions[name] = recorded(call)
    times = rounds(functions, count)
    times = {name: times[name] for name in calls}
    kernels = {name: call.kernel for name, call in calls.items()}
    results = zip(*(call.keep for call in calls.values()), strict=True)
    equal = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in results)
    return list(case.rows(kernels, times)), times["old"][0] / times["new"][0], equal


def write(path, lines):
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("DLATTN_COMMIT", ""),
        "device": torch.cuda.get_device_name(),
        "threads": 0,
    }
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({**common, **line} for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--ops", type=lambda text: text.split(","), default=["fwd", "decode"])
    parser.add_argument("--dims", type=head_dims, default="64,128,256")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bf16", "f16"])
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--kernel", type=str.encode)
    given = parser.parse_args()
    libraries = {"old": Library(given.old), "new": Library(given.new)}
    other = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda").view(torch.int32)
    ratios, lines, differ = defaultdict(list), [], 0
    for op in given.ops:
        for case in cases(op, given, libraries["new"]):
            rows, ratio, equal = time_case(libraries, case, given.rounds, other.max)
            lines += rows
            first = rows[0]
            ratios[op].append(ratio)
            ratios[f"{op} {first['kernel']} D {first['D']}"].append(ratio)
            differ += not equal
            shape = ", ".join(str(first[axis]) for axis in ("B", "Hq", "Hkv", "Lq", "Lk", "D"))
            print(
                f"{first['op']} {first['dtype']} [{shape}] causal {first['causal']}",
                f"{first['kernel']}: {ratio:.3f}{'' if equal else ', other bits'}",
                flush=True,
            )
    for what, of in ratios.items():
        mean = math.exp(sum(map(math.log, of)) / len(of))
        print(f"{what}: geometric mean {mean:.4f}, lowest {min(of):.3f}, {len(of)} cases")
    print(f"{differ} cases gave other bits")
    if given.out:
        write(given.out, lines)


if __name__ == "__main__":
    main()
