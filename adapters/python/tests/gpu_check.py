"""dlattn.jax and dlattn.torch on an NVIDIA GPU, against the frameworks' own attention.

    PYTHONPATH=FOLDER_OF_THE_PACKAGE python gpu_check.py jax|torch [CALLS.csv]

Needs no pytest. Every difference is printed; the exit status is the number of failed checks. Then
the time of one call on a tiny problem is measured and, if asked for, appended to CALLS.csv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CASES = [  # batch, heads, heads_kv, rows, keys, dim, causal
    (2, 4, 4, 128, 128, 64, False),
    (2, 4, 4, 128, 128, 64, True),
    (1, 8, 2, 300, 300, 128, True),
    (1, 8, 2, 257, 513, 128, False),
    (3, 4, 1, 1, 777, 128, False),
    (1, 4, 4, 1024, 1024, 64, True),
]
failed = 0


def check(name: str, found: Any, expected: Any, tolerance: float) -> None:
    global failed
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    difference = np.abs(found - expected)
    worst = np.unravel_index(np.nanargmax(difference), difference.shape)
    good = bool((difference <= tolerance).all())
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'} {name}: {difference[worst]:.2e} at {worst}", flush=True)


def attempt(step: Callable[[], None]) -> None:
    global failed
    try:
        step()
    except Exception:
        failed += 1
        print(f"FAIL {step.__name__}", flush=True)
        traceback.print_exc()


def report(impl: str, dtype: str, kernel: str, device: str, samples: list[float]) -> None:
    """One line of design.md's CSV for a call on a problem of 1 x 1 x 16 x 64."""
    median = float(np.median(samples))
    spread = float(np.subtract(*np.percentile(samples, [75, 25])) / median * 100)
    commit = os.environ.get("DLATTN_COMMIT", "")
    case = f"{time.strftime('%Y-%m-%d')},{commit},{device},call,{dtype},1,1,1,16,16,64,64,0"
    line = f"{case},,{impl},{kernel},{median:.2f},{spread:.1f},,"
    print(line, flush=True)
    if len(sys.argv) > 2:
        with Path(sys.argv[2]).open("a") as file:
            print(line, file=file)


def per_call(call: Callable[[], Any], finish: Callable[[], Any], count: int = 300) -> list[float]:
    """Microseconds that the host spends on a call, over rounds of `count`."""
    samples = []
    for _ in range(15):
        finish()
        began = time.perf_counter()
        for _ in range(count):
            call()
        samples.append((time.perf_counter() - began) / count * 1e6)
        finish()
    return samples


def gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]


# ---- JAX


def check_jax() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import dlattn.jax
    import jax
    import jax.numpy as jnp

    ours = jax.jit(
        dlattn.jax.dot_product_attention, static_argnames=("is_causal", "return_residual")
    )
    theirs = jax.jit(jax.nn.dot_product_attention, static_argnames=("is_causal",))
    print(jax.__version__, jax.devices())

    def tensors(case: tuple, dtype: Any) -> list[Any]:
        batch, heads, heads_kv, rows, keys, dim, _ = case
        shapes = (rows, heads), (keys, heads_kv), (keys, heads_kv)
        return [
            jax.random.normal(jax.random.key(i), (batch, *shape, dim), dtype)
            for i, shape in enumerate(shapes)
        ]

    def forward() -> None:
        for dtype in (jnp.bfloat16, jnp.float16):
            for case in CASES:
                x = tensors(case, dtype)
                wide = [t.astype(jnp.float32) for t in x]
                expected = theirs(*wide, is_causal=case[-1])
                found, lse = ours(*x, is_causal=case[-1], return_residual=True)
                tolerance = 3e-2 if dtype == jnp.bfloat16 else 4e-3
                check(
                    f"jax {dtype.__name__} {case}", found.astype(jnp.float32), expected, tolerance
                )
                assert bool(jnp.isfinite(lse).all())

    def gradients() -> None:
        x = tensors(CASES[2], jnp.bfloat16)

        def loss(f: Any, *x: Any) -> Any:
            return jnp.sum(f(*x, is_causal=True).astype(jnp.float32) ** 2)

        found = jax.jit(jax.grad(lambda *x: loss(ours, *x), (0, 1, 2)))(*x)
        wide = [t.astype(jnp.float32) for t in x]
        expected = jax.jit(jax.grad(lambda *x: loss(theirs, *x), (0, 1, 2)))(*wide)
        for name, a, b in zip("qkv", found, expected):
            check(f"jax gradient {name}", a.astype(jnp.float32), b, 0.02 * float(jnp.abs(b).max()))

    def loop() -> None:
        """Twenty calls in one program, so that XLA may put them into a CUDA graph."""
        query, key, value = tensors(CASES[5], jnp.bfloat16)

        def run(f: Any, dtype: Any) -> Any:
            q, k, v = (x.astype(dtype) for x in (query, key, value))
            for _ in range(20):
                q = f(q, k, v, is_causal=True)
            return q.astype(jnp.float32)

        found = jax.jit(lambda: run(ours, jnp.bfloat16))()
        check("jax 20 calls", found, jax.jit(lambda: run(theirs, jnp.float32))(), 6e-2)

    def on_cpu() -> None:
        with jax.default_device(jax.devices("cpu")[0]):
            x = tensors(CASES[1], jnp.float32)
            check("jax on the CPU", ours(*x, is_causal=True), theirs(*x, is_causal=True), 1e-5)

    def overhead() -> None:
        x = tensors((1, 1, 1, 16, 16, 64, False), jnp.bfloat16)
        for name, f in (("dlattn.jax", ours), ("jax.nn.dot_product_attention", theirs)):
            f(*x).block_until_ready()
            kept: list[Any] = []

            def call(f: Any = f, kept: list[Any] = kept) -> None:
                kept[:] = [f(*x)]

            samples = per_call(call, lambda kept=kept: [y.block_until_ready() for y in kept])
            report(name, "bf16", "", gpu_name(), samples)

    for step in (forward, gradients, loop, on_cpu, overhead):
        attempt(step)


# ---- PyTorch


def check_torch() -> None:
    import dlattn
    import dlattn.torch
    import torch
    import torch.nn.functional as F

    ours, theirs = dlattn.torch.scaled_dot_product_attention, F.scaled_dot_product_attention
    print(torch.__version__, torch.cuda.get_device_name())

    def tensors(case: tuple, dtype: Any, device: str = "cuda") -> list[Any]:
        batch, heads, heads_kv, rows, keys, dim, _ = case
        torch.manual_seed(0)
        shapes = (heads, rows), (heads_kv, keys), (heads_kv, keys)
        return [torch.randn((batch, *shape, dim), dtype=dtype, device=device) for shape in shapes]

    def numpy(x: Any) -> Any:
        return x.detach().float().cpu().numpy()

    def forward() -> None:
        for dtype in (torch.bfloat16, torch.float16):
            for case in CASES:
                x = tensors(case, dtype)
                wide = [t.float() for t in x]
                expected = theirs(*wide, is_causal=case[-1], enable_gqa=True)
                found = ours(*x, is_causal=case[-1], enable_gqa=True)
                tolerance = 3e-2 if dtype == torch.bfloat16 else 4e-3
                check(f"torch {dtype} {case}", numpy(found), numpy(expected), tolerance)
            print(dlattn.select(*x, causal=True).kernel)

    def strided() -> None:
        x = [
            t.transpose(1, 2).contiguous().transpose(1, 2)
            for t in tensors(CASES[1], torch.bfloat16)
        ]
        check("torch strided", numpy(ours(*x)), numpy(theirs(*x)), 3e-2)

    def compiled() -> None:
        x = tensors(CASES[1], torch.bfloat16)
        model = torch.compile(lambda q, k, v: ours(-q, k, v, is_causal=True), fullgraph=True)
        wide = [t.float() for t in x]
        expected = theirs(-wide[0], *wide[1:], is_causal=True)
        check("torch compiled", numpy(model(*x)), numpy(expected), 3e-2)

    def gradients() -> None:
        def run(f: Any, x: list[Any]) -> list[Any]:
            x = [t.detach().clone().requires_grad_() for t in x]
            (f(*x, is_causal=True, enable_gqa=True).float() ** 2).sum().backward()
            return [t.grad for t in x]

        x = tensors(CASES[2], torch.bfloat16)
        wide = [t.float() for t in x]
        for name, a, b in zip("qkv", run(ours, x), run(theirs, wide)):
            check(f"torch gradient {name}", numpy(a), numpy(b), 0.02 * float(b.abs().max()))

    def current_stream() -> None:
        """Inputs that the current stream makes late; a call elsewhere would read old ones."""
        query, key, value = tensors(CASES[5], torch.bfloat16)
        expected = theirs(*(-x.float() for x in (query, key, value)))
        late = [torch.zeros_like(x) for x in (query, key, value)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for x, source in zip(late, (query, key, value)):
                torch.neg(source, out=x)
            found = ours(*late)
        stream.synchronize()
        check("torch current stream", numpy(found), numpy(expected), 3e-2)

    def graph() -> None:
        x = tensors(CASES[5], torch.bfloat16)
        ours(*x)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = ours(*x, is_causal=True)
        x[0].mul_(2)
        captured.replay()
        check("torch CUDA graph", numpy(found), numpy(theirs(*x, is_causal=True)), 3e-2)

    def overhead() -> None:
        for device, dtype, name in (
            ("cuda", torch.bfloat16, "bf16"),
            ("cpu", torch.float32, "f32"),
        ):
            x = tensors((1, 1, 1, 16, 16, 64, False), dtype, device)
            kernel = dlattn.select(*x).kernel
            where = gpu_name() if device == "cuda" else "host CPU of " + gpu_name()
            with torch.no_grad():
                for impl, f in (("dlattn.torch", ours), ("torch.nn.functional.sdpa", theirs)):
                    f(*x)
                    samples = per_call(lambda f=f, x=x: f(*x), torch.cuda.synchronize)
                    report(impl, name, kernel if f is ours else "", where, samples)

    for step in (forward, strided, gradients, current_stream, graph, overhead, compiled):
        attempt(step)


if __name__ == "__main__":
    {"jax": check_jax, "torch": check_torch}[sys.argv[1]]()
    print(f"{failed} failed")
    raise SystemExit(min(failed, 100))
