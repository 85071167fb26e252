"""What queries, keys and values of 8 bits cost in accuracy on a GPU: errors against float64.

    DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 python3 bench/gpu_float8_errors.py RESULTS.csv

Queries, keys and values of e4m3, with one scale for each tensor or one for each head, by which its
largest element becomes the largest of the type; beside them bf16. The output is bf16, of e4m3 also
f32. Errors are the root of their mean square relative to that of the result, mean over heads:
`whole` against float64 of what was rounded, `row` against float64 of what the tensors hold, which
is what the kernel itself misses. FlashAttention 3 stands beside where its package is installed.

Inputs are those of float8_errors.py: random, normal in all elements, heads 1/8 to 16 times as
large; outliers, the same with 4 channels of each key 20 times and one of each value 8 times as
large; long, random with 65536 keys; positive, the same with values around 2, whose sums grow all
the time; sink, whose first key has a weight of about a half in each row.
"""

import csv
import sys

import torch
from gpu_bench import common_columns, flash_attention_3

HEADS, DIMS = 8, (128, 256)
# Keys, of 512 rows.
INPUTS = {"random": 2048, "outliers": 2048, "long": 65536, "positive": 65536, "sink": 4096}
HEAD = ("date", "commit", "device", "input", "Lk", "D", "dtype", "scales", "output", "impl")
HEAD += ("whole", "row")
E4M3 = torch.float8_e4m3fn


def make(name, dim):
    """Query, key and value in f32; the query is as much smaller as the key is larger."""
    rows, keys = 512, INPUTS[name]
    torch.manual_seed(1)
    size = torch.exp2(torch.arange(HEADS, device="cuda") - 3.0)[:, None, None]
    query, key, value = (torch.randn(1, HEADS, n, dim, device="cuda") for n in (rows, keys, keys))
    if name == "outliers":
        key[..., :4] *= 20
        query[..., :4] /= 20
        value[..., 0] *= 8
    if name == "positive":
        value += 2
    if name == "sink":
        query[..., 0] = 8
        key[..., 0] = 0
        key[:, :, 0] = 0
        key[:, :, 0, 0] = (torch.tensor(keys).log() + 0.5).item() * dim**0.5 / 8
    return query / size, key * size, value * size


def rounded(x, scales):
    """[1, H, L, D] as e4m3 and its scale, [1, H] or [1]."""
    axes = (0, 2, 3) if scales == "head" else (0, 1, 2, 3)
    scale = x.abs().amax(axes, keepdim=True) / 448
    return (x / scale).to(E4M3), scale[..., 0, 0] if scales == "head" else scale.reshape(1)


def attention(query, key, value):
    """In float64."""
    weights = torch.softmax(query.double() @ key.double().mT * query.shape[-1] ** -0.5, -1)
    return weights @ value.double()


def error(output, wanted):
    """Of each head, then their mean: heads differ in size."""
    axes = (0, 2, 3)
    missed = (output.double() - wanted).square().mean(axes) / wanted.square().mean(axes)
    return f"{missed.sqrt().mean().item():.2e}"


def by_flash_attention_3(tensors, scales):
    descale = {f"{n}_descale": s.expand(1, HEADS).contiguous() for n, s in zip("qkv", scales)}
    call = flash_attention_3(*tensors, False, **descale)
    if call is None:
        return None
    out = call()
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def results(library, tensors, scales):
    """(output's name, implementation, output)."""
    given = dict(zip(("query_scale", "key_scale", "value_scale"), scales))
    for dtype in (torch.bfloat16, torch.float32) if scales else (torch.bfloat16,):
        out = torch.empty(tensors[0].shape, dtype=dtype, device="cuda")
        call = library.call(
            False, **dict(zip(("query", "key", "value"), tensors)), output=out, **given
        )
        call()
        yield str(dtype).removeprefix("torch."), call.kernel, out
    peer = by_flash_attention_3(tensors, scales)
    if peer is not None:
        yield "bfloat16", "fa3", peer


def lines(library, name, dim):
    wide = make(name, dim)
    wanted = attention(*wide)
    for dtype, of in (("bf16", None), ("e4m3", "tensor"), ("e4m3", "head")):
        held = [x.bfloat16() for x in wide]
        tensors, scales = held, ()
        if of:
            tensors, scales = zip(*(rounded(x, of) for x in wide))
            held = [t.double() * s.reshape(1, -1, 1, 1) for t, s in zip(tensors, scales)]
        of_tensors = attention(*held)
        for output, impl, result in results(library, tensors, scales):
            yield {
                "input": name,
                "Lk": wide[1].shape[2],
                "D": dim,
                "dtype": dtype,
                "scales": of or "none",
                "output": output,
                "impl": impl,
                "whole": error(result, wanted),
                "row": error(result, of_tensors),
            }


def main():
    library, common = common_columns()
    same = {name: common[name] for name in HEAD[:3]}
    with open(sys.argv[1], "w", newline="") as file:
        out = csv.DictWriter(file, HEAD, lineterminator="\n")
        out.writeheader()
        for dim in DIMS:
            for name in INPUTS:
                for line in lines(library, name, dim):
                    out.writerow(same | line)
                    print(*line.values(), flush=True)


if __name__ == "__main__":
    main()
