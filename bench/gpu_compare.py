"""Two builds of the library beside each other on a GPU, in one process and in turns.

    python3 bench/gpu_compare.py ./OLD.so ./NEW.so [--out FILE.csv] [--rounds N] [--kernel NAME]

The cases are those of gpu_bench.py: its grid of forward calls in bf16 and f16, and decoding with a
cold L2; with --kernel, forward calls alone, by that row. Prints old / new for each, which is above
1 where the new one is faster, and the geometric means. DLATTN_COMMIT is what the CSV shall name.
"""

import argparse
import csv
import datetime
import itertools
import math
import os

import torch
from gpu_bench import COLUMNS, Library, case_rows, decode_cases, grid, random_rows, rounds


def forward_cases():
    dims = ((64, 64), (128, 128), (256, 256))
    for op, dtype, (dim, _), causal, length in grid(("bf16", "f16"), False, dims):
        if op == "fwd":
            q, k, v = (random_rows(dtype, length, 2048 // dim, dim) for _ in range(3))
            yield op, dtype, q, k, v, causal


def time_case(libraries, case, kernel, count, flush):
    """The calls by name, and name -> (median, spread)."""
    op, _, q, k, v, causal = case
    calls, functions = {}, {}
    for name, library in libraries.items():
        tensors = {"query": q, "key": k, "value": v, "output": torch.empty_like(q)}
        calls[name] = library.call(causal, kernel, **tensors)
        if op == "decode":
            functions[f"before {name}"] = flush
        functions[name] = calls[name]
    return calls, rounds(functions, count)


def csv_lines(case, calls, times):
    op, dtype, q, k, v, causal = case
    read = 2 * k.numel() * k.element_size() if op == "decode" else 0
    found = {name: (f"dlattn {name}", call) for name, call in calls.items()}
    return case_rows(op, dtype, q, k, v, causal, found, times, read)


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
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--kernel", type=str.encode)
    given = parser.parse_args()
    libraries = {"old": Library(given.old), "new": Library(given.new)}
    other = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda").view(torch.int32)
    ratios, lines = {"fwd": [], "decode": []}, []
    decoding = () if given.kernel else (("decode", *case, False) for case in decode_cases())
    for case in itertools.chain(forward_cases(), decoding):
        calls, times = time_case(libraries, case, given.kernel, given.rounds, other.max)
        ratio = times["old"][0] / times["new"][0]
        op, dtype, q, k, *_, causal = case
        ratios[op].append(ratio)
        print(f"{op} {dtype} {list(q.shape)} {list(k.shape)} causal {int(causal)}: {ratio:.3f}")
        lines += csv_lines(case, calls, times)
    for op, of in ((op, of) for op, of in ratios.items() if of):
        mean = math.exp(sum(map(math.log, of)) / len(of))
        print(f"{op}: geometric mean {mean:.4f}, lowest {min(of):.3f}, {len(of)} cases")
    if given.out:
        write(given.out, lines)


if __name__ == "__main__":
    main()
