"""What many_gpus.py and many_gpus_jax.py have in common: the problem, and lines about it."""

import datetime
import os
import statistics

COLUMNS = [
    *("date", "commit", "device", "op", "dtype", "B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "causal"),
    *("threads", "impl", "kernel", "median_us", "spread_pct", "tflops", "gbs", "gpus", "share"),
]
HEADS, HEADS_KV, DIM = 32, 8, 128
WAYS = ("all_gather", "ring", "ulysses")


def line(device, op, length, causal, impl, times, gpus, of_one):
    """times: milliseconds; of_one: the median of one GPU."""
    median = statistics.median(times)
    flops = 4 * HEADS * length * length * DIM
    flops *= (0.5 if causal else 1) * (3.5 if op == "fwd+bwd" else 1)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("DLATTN_COMMIT", ""),
        "device": device,
        "op": op,
        "dtype": "bf16",
        **{"B": 1, "Hq": HEADS, "Hkv": HEADS_KV, "Lq": length, "Lk": length, "D": DIM, "Dv": DIM},
        "causal": int(causal),
        "impl": impl,
        "median_us": round(median * 1e3, 1),
        "spread_pct": round(100 * (max(times) - min(times)) / median, 1),
        "tflops": round(flops / median / 1e9, 1),
        "gpus": gpus,
        "share": round(of_one / gpus / median, 3),
    }


def rounds_of(length):
    """How often each implementation runs; the first time is not counted if there are others."""
    return 1 if length >= 200_000 else 4 if length > 100_000 else 9
