"""dlattn.jax.context_parallel over the GPUs of one process beside one of them.

    python3 bench/many_gpus_jax.py OUT.csv [--lengths 32768,131072] [--ways all_gather,ring]

Checks every way first, then times causal attention as bench/many_gpus.py does, but from the host:
a time is that until the results are there.
"""

import argparse
import csv
import functools
import statistics
import time

import dlattn.jax
import jax
import jax.numpy as jnp
import numpy as np
from dlattn.jax import context_parallel
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from many_gpus_csv import COLUMNS, DIM, HEADS, HEADS_KV, WAYS, line, rounds_of

SPEC = PartitionSpec(None, None, "rows")
START = time.perf_counter()


def make(rows, heads, heads_kv, placed):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (heads, heads_kv, heads_kv, heads)
    return [
        jax.device_put(jax.random.normal(k, (1, h, rows, DIM), jnp.bfloat16), placed)
        for k, h in zip(keys, shapes)
    ]


def over(mesh, way):
    def here(query, key, value):
        options = {"axis_name": "rows", "way": way, "layout": "zigzag", "causal": True}
        return context_parallel.attention(query, key, value, **options)

    return jax.shard_map(here, mesh=mesh, in_specs=(SPEC,) * 3, out_specs=SPEC)


def with_gradients(attention):
    def results(query, key, value, d_output):
        output, pull = jax.vjp(attention, query, key, value)
        return output, *pull(d_output)

    return results


def say(*words):
    print(f"{time.perf_counter() - START:.1f} s:", *words, flush=True)


def check(mesh, ways):
    n = mesh.size
    whole = make(1024 * n, 8, 2, jax.devices()[0])
    one = jax.jit(with_gradients(functools.partial(dlattn.jax.attention, causal=True)))
    expected = [np.asarray(x, np.float32) for x in one(*whole)]
    exact = [np.asarray(x) for x in one(*(x.astype(jnp.float32) for x in whole))]
    parts = [context_parallel.arrange(np.asarray(x), n) for x in whole]
    parts = jax.device_put(parts, NamedSharding(mesh, SPEC))
    say("one GPU has computed")
    for way in ways:
        call = jax.jit(with_gradients(over(mesh, way)))
        found, again = ([np.asarray(x, np.float32) for x in call(*parts)] for _ in range(2))
        same = all((a == b).all() for a, b in zip(found, again))
        found = [np.asarray(context_parallel.restore(x, n)) for x in found]
        of_many, of_one = (
            [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(results, exact)]
            for results in (found, expected)
        )
        figures = " ".join(f"{a:.1e}/{b:.1e}" for a, b in zip(of_many, of_one))
        say(f"{way}: errors beside those of one GPU {figures}, same bits {same}")
        if not same or any(a > 1.5 * b for a, b in zip(of_many, of_one)):
            raise SystemExit("wrong results are not timed")


def milliseconds(call, tensors):
    jax.block_until_ready(tensors)
    start = time.perf_counter()
    jax.block_until_ready(call(*tensors))
    return 1e3 * (time.perf_counter() - start)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("out")
    options.add_argument("--lengths", default="32768,131072")
    options.add_argument("--ways", default=",".join(WAYS))
    options = options.parse_args()
    ways = options.ways.split(",")
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    say(f"{mesh.size} devices")
    check(mesh, ways)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for length in map(int, options.lengths.split(",")):
            for op in ("fwd", "fwd+bwd"):
                for found in time_case(mesh, length, op, ways):
                    writer.writerow(found)
                    file.flush()
                    columns = ("op", "Lq", "impl", "median_us", "tflops", "share")
                    say(*(found[n] for n in columns))


def time_case(mesh, length, op, ways):
    one = functools.partial(dlattn.jax.attention, causal=True)
    whole = make(length, HEADS, HEADS_KV, jax.devices()[0])
    parts = make(length, HEADS, HEADS_KV, NamedSharding(mesh, SPEC))
    cases = {"dlattn.jax": (one, whole)}
    cases |= {f"dlattn.jax {way}": (over(mesh, way), parts) for way in ways}
    calls, found = {}, {name: [] for name in cases}
    for name, (attention, tensors) in cases.items():
        backward = op == "fwd+bwd"
        function = with_gradients(attention) if backward else attention
        calls[name] = jax.jit(function), tensors if backward else tensors[:3]
    for _ in range(rounds_of(length)):
        for name, call in calls.items():
            found[name].append(milliseconds(*call))
    of_one = statistics.median(found["dlattn.jax"][1:])
    for name, times in found.items():
        gpus = 1 if name == "dlattn.jax" else mesh.size
        device = jax.devices()[0].device_kind
        yield line(device, op, length, True, name, times[1:], gpus, of_one)


if __name__ == "__main__":
    main()
