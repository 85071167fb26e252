"""What keys and values of 8 bits cost in accuracy: errors against float64, into a CSV.

    python3 bench/float8_errors.py RESULTS.csv

`append` makes caches of float8 from keys and values of f32, with one scale for the tensor or one
for each head, by which its largest element becomes the largest of the type; beside them stand
caches of bf16. A query of bf16 meets them; the output is f32 (the query then counts as f32, which
it fits into) or bf16. Errors are the root of their mean square relative to that of the result:
`whole` against float64 of the keys and values before they were rounded, `row` against float64 of
what the cache holds, which is what the kernel itself misses.

Inputs: random, normal in all elements, heads 1/8 to 16 times as large; outliers, the same with 4
channels of each key 20 times and one of each value 8 times as large; long, random with 65536 keys.
Needs the package, NumPy and ml_dtypes.
"""

import argparse
import csv
import datetime

import dlattn
import ml_dtypes
import numpy as np
from cpu_model import commit

HEADS, DIM = 8, 64
INPUTS = {"random": (64, 2048), "outliers": (64, 2048), "long": (8, 65536)}
CACHES = [("bfloat16", "none")] + [
    (dtype, scales) for dtype in ("float8_e4m3fn", "float8_e5m2") for scales in ("tensor", "head")
]
HEAD = ("date", "commit", "input", "Lk", "output", "cache", "scales", "kernel", "whole", "row")


def make(name, rng):
    """Query, key and value; the query is as much smaller as the key is larger."""
    rows, keys = INPUTS[name]
    size = np.exp2(np.arange(HEADS) - 3.0)[:, None, None]
    query, key, value = (rng.standard_normal((1, HEADS, n, DIM)) for n in (rows, keys, keys))
    if name == "outliers":
        key[..., :4] *= 20
        query[..., :4] /= 20
        value[..., 0] *= 8
    query, key, value = (x.astype(np.float32) for x in (query / size, key * size, value * size))
    return query.astype(ml_dtypes.bfloat16), key, value


def rounded(key, value, dtype, scales):
    """Caches of them, and the scales that go with them, if they have any."""
    dtype = np.dtype(getattr(ml_dtypes, dtype))
    if scales == "none":
        return [x.astype(dtype) for x in (key, value)], {}
    axes = (2, 3) if scales == "head" else (0, 1, 2, 3)
    largest = float(ml_dtypes.finfo(dtype).max)
    factors = {
        name: (np.abs(x).max(axes, keepdims=True)[..., 0, 0] / largest).astype(np.float32)
        for name, x in (("key_scale", key), ("value_scale", value))
    }
    caches = [np.zeros(x.shape, dtype) for x in (key, value)]
    dlattn.append(key, value, *caches, np.zeros(1, np.int32), **factors)
    return caches, factors


def attention(query, key, value):
    """In float64."""
    logits = query @ key.swapaxes(2, 3) * DIM**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def error(output, wanted):
    """Of each head, then their mean: heads differ in size."""
    axes = (0, 2, 3)
    return np.mean(np.sqrt(np.mean((output - wanted) ** 2, axes) / np.mean(wanted**2, axes)))


def lines(name):
    query, key, value = make(name, np.random.default_rng(1))
    wide = query.astype(np.float64)
    wanted = attention(wide, key.astype(np.float64), value.astype(np.float64))
    for dtype, scales in CACHES:
        caches, factors = rounded(key, value, dtype, scales)
        sizes = factors.values() or (np.ones((1, 1), np.float32),) * 2
        held = (x.astype(np.float64) * s[..., None, None] for x, s in zip(caches, sizes))
        of_cache = attention(wide, *held)
        for output in ("float32", "bfloat16") if factors else ("bfloat16",):
            given = query.astype(output)
            result = dlattn.attention(given, *caches, **factors)
            yield {
                "input": name,
                "Lk": key.shape[2],
                "output": output,
                "cache": dtype,
                "scales": scales,
                "kernel": dlattn.select(given, *caches, **factors).kernel,
                "whole": f"{error(result.astype(np.float64), wanted):.2e}",
                "row": f"{error(result.astype(np.float64), of_cache):.2e}",
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results")
    given = parser.parse_args()
    same = {"date": datetime.date.today().isoformat(), "commit": commit()}
    with open(given.results, "w", newline="") as file:
        out = csv.DictWriter(file, HEAD, lineterminator="\n")
        out.writeheader()
        for name in INPUTS:
            for line in lines(name):
                out.writerow({**same, **line})
                print(*line.values(), flush=True)


if __name__ == "__main__":
    main()
