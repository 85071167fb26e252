"""dlattn.jax and dlattn.torch on an NVIDIA GPU, against the frameworks' own attention.

    PYTHONPATH=FOLDER_OF_THE_PACKAGE python gpu_check.py jax|torch|compile|provider|cupy

Needs no pytest. Every difference is printed, one line for each check; the exit status is the number
of failed checks. `compile` is torch.compile with Inductor, for the GPU and for the CPU.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from reference import attention

CASES = [  # batch, heads, heads_kv, rows, keys, dim, causal
    (2, 4, 4, 128, 128, 64, False),
    (2, 4, 4, 128, 128, 64, True),
    (1, 8, 2, 300, 300, 128, True),
    (1, 8, 2, 257, 513, 128, False),
    (3, 4, 1, 1, 777, 128, False),
    (1, 4, 4, 1024, 1024, 64, True),
]
TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 2e-5}
failed = 0


def check(name: str, found: Any, expected: Any, tolerance: float) -> None:
    global failed
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    difference = np.abs(found - expected)
    worst = tuple(int(i) for i in np.unravel_index(np.nanargmax(difference), difference.shape))
    good = bool((difference <= tolerance).all())
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'} {name}: {difference[worst]:.2e} at {worst}", flush=True)


def refused(name: str, error: type, words: str, call: Callable[[], Any]) -> None:
    global failed
    good, said = False, "was not refused"
    try:
        call()
    except Exception as raised:
        said = f"{type(raised).__name__}: {raised}"
        good = isinstance(raised, error) and words in said
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'} {name} is refused: {said}", flush=True)


def attempt(step: Callable[[], None]) -> None:
    global failed
    try:
        step()
    except Exception:
        failed += 1
        print(f"FAIL {step.__name__}", flush=True)
        traceback.print_exc()


def numbers(case: tuple) -> list[Any]:
    """Query, key and value, [B, H, L, D]."""
    batch, heads, heads_kv, rows, keys, dim, _ = case
    shapes = (heads, rows), (heads_kv, keys), (heads_kv, keys)
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, *shape, dim), np.float32) for shape in shapes]


# ---- JAX


def check_jax() -> None:
    import dlattn.jax
    import jax
    import jax.numpy as jnp

    static = ("is_causal", "return_residual")
    ours = jax.jit(dlattn.jax.dot_product_attention, static_argnames=static)
    theirs = jax.jit(jax.nn.dot_product_attention, static_argnames=("is_causal",))
    print(jax.__version__, jax.devices())
    assert jax.default_backend() == "gpu"

    def tensors(case: tuple, dtype: Any) -> list[Any]:
        """[B, L, H, D]"""
        return [jnp.asarray(x.swapaxes(1, 2), dtype) for x in numbers(case)]

    def wide(x: list[Any]) -> list[Any]:
        return [t.astype(jnp.float32) for t in x]

    def forward() -> None:
        for name, tolerance in TOLERANCE.items():
            for case in CASES:
                x = tensors(case, jnp.dtype(name))
                found, lse = ours(*x, is_causal=case[-1], return_residual=True)
                inputs = [np.asarray(t, np.float32).swapaxes(1, 2) for t in x]
                output, sums = (t.swapaxes(1, 2) for t in attention(*inputs, causal=case[-1]))
                check(f"jax {name} {case}", found, output, tolerance)
                check(f"jax {name} {case} lse", lse, sums, 1e-4)

    def gradients() -> None:
        """By the plugin where it has a row, which is said, else by JAX's operators."""

        def gradient(f: Any, causal: bool) -> Any:
            def loss(*x: Any) -> Any:
                return jnp.sum(f(*x, is_causal=causal).astype(jnp.float32) ** 2)

            return jax.jit(jax.grad(loss, (0, 1, 2)))

        for dtype, tolerance in {"bfloat16": 0.02, "float16": 0.005, "float32": 1e-4}.items():
            for case in CASES:
                x = tensors(case, jnp.dtype(dtype))
                step = gradient(ours, case[-1])
                native = "dlattn_backward" in step.lower(*x).as_text()
                with jax.default_matmul_precision("highest"):
                    expected = gradient(theirs, case[-1])(*wide(x))
                for name, a, b in zip("qkv", step(*x), expected):
                    what = f"jax {dtype} {case} gradient {name}, native: {native}"
                    check(what, a, b, tolerance * float(jnp.abs(b).max()))

    def segments() -> None:
        """Documents in one sequence, forward and backward, beside the same as a mask."""
        documents = jnp.broadcast_to(jnp.arange(1024, dtype=jnp.int32) // 150, (2, 1024))
        same = documents[:, None, :, None] == documents[:, None, None, :]

        def by_segments(*x: Any) -> Any:
            x = [t.swapaxes(1, 2) for t in x]
            found = dlattn.jax.attention(*x, query_segments=documents, key_segments=documents)
            return found.swapaxes(1, 2)

        def results(f: Callable[..., Any], x: list[Any]) -> list[Any]:
            def loss(*x: Any) -> Any:
                return jnp.sum(f(*x).astype(jnp.float32) ** 2)

            return [jax.jit(f)(*x), *jax.jit(jax.grad(loss, (0, 1, 2)))(*x)]

        for name, tolerance in {"bfloat16": 0.03, "float16": 0.005, "float32": 1e-4}.items():
            x = tensors((*CASES[0][:3], 1024, 1024, 64, False), jnp.dtype(name))
            with jax.default_matmul_precision("highest"):
                expected = results(partial(jax.nn.dot_product_attention, mask=same), wide(x))
            for what, a, b in zip(("output", *"qkv"), results(by_segments, x), expected):
                bound = tolerance * max(1.0, float(jnp.abs(b).max()))
                check(f"jax {name} segments {what}", a, b, bound)

    def mapped() -> None:
        """Over a new axis of queries and values, with one key for all."""
        query, key, value = tensors(CASES[0], jnp.float16)
        x = [jnp.stack([query, -query]), key, jnp.stack([value, value * 2])]
        axes = (0, None, 0)
        found = jax.jit(jax.vmap(ours, axes))(*x)
        expected = jax.vmap(theirs, axes)(*wide(x))
        check("jax vmap", found, expected, 2 * TOLERANCE["float16"])

    def loop() -> None:
        """Twenty calls in one program, so that XLA may put them into a CUDA graph."""
        x = tensors(CASES[5], jnp.bfloat16)

        def run(f: Any, x: list[Any]) -> Any:
            query, key, value = x
            for _ in range(20):
                query = f(query, key, value, is_causal=True)
            return query.astype(jnp.float32)

        found = jax.jit(lambda *x: run(ours, x))(*x)
        check("jax 20 calls", found, jax.jit(lambda *x: run(theirs, x))(*wide(x)), 6e-2)

    def on_cpu() -> None:
        with jax.default_device(jax.devices("cpu")[0]):
            x = tensors(CASES[1], jnp.float32)
            check("jax on the CPU", ours(*x, is_causal=True), theirs(*x, is_causal=True), 1e-5)

    def refusals() -> None:
        query, key, value = tensors(CASES[0], jnp.float16)
        refused("jax head_dim", ValueError, "head_dim", lambda: ours(query, key[..., :8], value))
        x = [t.astype(jnp.int32) for t in (query, key, value)]
        refused("jax dtype", NotImplementedError, "dtype", lambda: ours(*x))

    for step in (forward, gradients, segments, mapped, loop, on_cpu, refusals):
        attempt(step)


# ---- PyTorch


def torch_tensors(case: tuple, dtype: Any, device: str = "cuda") -> list[Any]:
    import torch

    return [torch.from_numpy(x).to(device, dtype) for x in numbers(case)]


def check_torch() -> None:
    import dlattn
    import dlattn.torch
    import torch
    import torch.nn.functional as F

    tensors = torch_tensors
    ours, theirs = dlattn.torch.scaled_dot_product_attention, F.scaled_dot_product_attention
    print(torch.__version__, torch.cuda.get_device_name())

    def numpy(x: Any) -> Any:
        return x.detach().double().cpu().numpy()

    def wide(x: list[Any]) -> list[Any]:
        return [t.detach().double() for t in x]

    def forward() -> None:
        for name, tolerance in TOLERANCE.items():
            for case in CASES:
                x = tensors(case, getattr(torch, name))
                expected = theirs(*wide(x), is_causal=case[-1], enable_gqa=True)
                found = ours(*x, is_causal=case[-1], enable_gqa=True)
                check(f"torch {name} {case}", numpy(found), numpy(expected), tolerance)
            print(dlattn.select(*x, causal=True).kernel)

    def strided() -> None:
        x = tensors(CASES[1], torch.float16)
        x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
        check("torch [B, L, H, D]", numpy(ours(*x)), numpy(theirs(*wide(x))), 4e-3)

    def float8() -> None:
        if torch.cuda.get_device_capability() != (9, 0):
            return
        for case in CASES[:3]:
            x = [t.to(torch.float8_e4m3fn) for t in tensors(case, torch.float16)]
            out = torch.empty(x[0].shape, dtype=torch.bfloat16, device="cuda")
            two = torch.full((1,), 2.0, device="cuda")
            dlattn.torch.attention(*x, causal=case[-1], query_scale=two, out=out)
            q, k, v = wide(x)
            expected = theirs(2 * q, k, v, is_causal=case[-1], enable_gqa=True)
            check(f"torch float8_e4m3fn {case}", numpy(out), numpy(expected), 0.25)

    def masks() -> None:
        x = tensors(CASES[3], torch.float16)
        mask = torch.rand(1, 8, 257, 513, device="cuda") < 0.7
        bias = torch.where(mask, 0.5, -1.0)
        for name, given, wanted in (("mask", mask, mask), ("bias", bias.half(), bias.double())):
            found = ours(*x, attn_mask=given, enable_gqa=True)
            expected = theirs(*wide(x), attn_mask=wanted, enable_gqa=True)
            check(f"torch {name}", numpy(found), numpy(expected), 4e-3)

    def run(f: Any, x: list[Any]) -> list[Any]:
        x = [t.detach().clone().requires_grad_() for t in x]
        (f(*x, enable_gqa=True).float() ** 2).sum().backward()
        return [t.grad for t in x]

    def gradients() -> None:
        """By the plugin where it has a row, which is said, else by PyTorch's operators."""
        tolerances = {"bfloat16": 0.02, "float16": 0.005, "float32": 1e-4}
        for name, tolerance in tolerances.items():
            for case in CASES:
                x = tensors(case, getattr(torch, name))
                served = []
                with watched(served):
                    found = run(partial(ours, is_causal=case[-1]), x)
                expected = run(partial(theirs, is_causal=case[-1]), wide(x))
                for letter, a, b in zip("qkv", found, expected):
                    what = f"torch {name} {case} gradient {letter}, native: {served[0]}"
                    check(what, numpy(a), numpy(b), tolerance * float(b.abs().max()))

    @contextmanager
    def watched(served: list[bool]) -> Iterator[None]:
        """Appends whether the plugin serves each backward call."""
        ask = dlattn.torch.serves

        def asked(*args: Any, **more: Any) -> bool:
            served.append(ask(*args, **more))
            return served[-1]

        dlattn.torch.serves = asked
        try:
            yield
        finally:
            dlattn.torch.serves = ask

    def has_backward() -> bool:
        rows = (k for k in dlattn.kernels() if k.operation == "backward" and k.available)
        return any(k.backend == "cuda" for k in rows)

    def packed_gradients() -> None:
        """Three sequences, one of them empty, beside the same one by one."""
        if not has_backward():
            print("torch packed gradients: no backward row for this GPU")
            return
        query, key, value = (t[0].transpose(0, 1) for t in tensors(CASES[2], torch.bfloat16))
        ends = torch.tensor([0, 100, 100, 300], device="cuda", dtype=torch.int32)
        options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "causal": True}

        def packed(*x: Any, enable_gqa: bool) -> Any:
            return dlattn.torch.attention(*x, **options)

        def one_by_one(*x: Any, enable_gqa: bool) -> Any:
            parts = [t.transpose(0, 1)[None].split([100, 200], 2) for t in x]
            outputs = (theirs(*part, is_causal=True, enable_gqa=True) for part in zip(*parts))
            return torch.cat(list(outputs), 2)[0].transpose(0, 1)

        x = [query, key, value]
        for letter, a, b in zip("qkv", run(packed, x), run(one_by_one, wide(x))):
            bound = 0.02 * float(b.abs().max())
            check(f"torch packed gradient {letter}", numpy(a), numpy(b), bound)

    def gradients_on_a_stream() -> None:
        """Upstream gradients that the current stream makes late."""
        x = [t.requires_grad_() for t in tensors(CASES[5], torch.bfloat16)]
        output = ours(*x, is_causal=True)
        given = torch.randn_like(output)
        expected = torch.autograd.grad(output, x, given, retain_graph=True)
        late = torch.zeros_like(given)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            output = ours(*x, is_causal=True)
            torch.cuda._sleep(50_000_000)
            late.copy_(given)
            found = torch.autograd.grad(output, x, late)
        stream.synchronize()
        for letter, a, b in zip("qkv", found, expected):
            check(f"torch gradient {letter} on a stream", numpy(a), numpy(b), 0)

    def gradients_in_a_graph() -> None:
        x = [t.requires_grad_() for t in tensors(CASES[5], torch.bfloat16)]

        def step() -> Any:
            return torch.autograd.grad(ours(*x, is_causal=True).sum(), x)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as PyTorch wants it before a capture
            step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = step()
        with torch.no_grad():
            x[0].mul_(2)
        captured.replay()
        for letter, a, b in zip("qkv", found, step()):
            check(f"torch gradient {letter} in a CUDA graph", numpy(a), numpy(b), 0)

    def current_stream() -> None:
        """Inputs that the current stream makes late; a call elsewhere would read old ones."""
        x = tensors(CASES[5], torch.bfloat16)
        expected = ours(*(-t for t in x))
        late = [torch.zeros_like(t) for t in x]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for t, source in zip(late, x):
                torch.neg(source, out=t)
            found = ours(*late)
        stream.synchronize()
        check("torch current stream", numpy(found), numpy(expected), 0)

    def graph() -> None:
        x = tensors(CASES[5], torch.bfloat16)
        ours(*x)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = ours(*x, is_causal=True)
        x[0].mul_(2)
        captured.replay()
        check("torch CUDA graph", numpy(found), numpy(ours(*x, is_causal=True)), 0)

    def array_interface() -> None:
        """dlattn.attention over arrays that speak DLPack's Python methods alone, as CuPy's do."""

        class Array:
            def __init__(self, tensor: Any) -> None:
                self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

            def __dlpack__(self, **options: Any) -> Any:
                return self.tensor.__dlpack__(**options)

            def __dlpack_device__(self) -> Any:
                return self.tensor.__dlpack_device__()

        x = tensors(CASES[1], torch.float16)
        out = torch.empty_like(x[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            dlattn.attention(*(Array(t) for t in x), out=Array(out), stream=stream.cuda_stream)
        stream.synchronize()
        check("DLPack methods", numpy(out), numpy(theirs(*wide(x))), 4e-3)

    def documents() -> None:
        """Three in a sequence, by numbers and by blocks, beside a mask: output and gradients."""
        length = 300
        number = (torch.arange(length, device="cuda") >= 64).int()
        number[192:] = 2
        mask = number[:, None] == number
        blocks = 2 * mask[::4, ::4].to(torch.uint8)[None, None]
        for name, tolerance in {"bfloat16": 0.03, "float32": 1e-4}.items():
            x = tensors((2, 4, 2, length, length, 64, False), getattr(torch, name))
            numbers = number.expand(2, -1)
            for what, options in (
                ("segments", {"query_segments": numbers, "key_segments": numbers}),
                ("block mask", {"block_mask": blocks, "block_size": (4, 4)}),
            ):

                def by_option(*x: Any, enable_gqa: bool, options: Any = options) -> Any:
                    return dlattn.torch.attention(*x, **options)

                found = [by_option(*x, enable_gqa=True), *run(by_option, x)]
                by_mask = partial(theirs, attn_mask=mask)
                expected = [by_mask(*wide(x), enable_gqa=True), *run(by_mask, wide(x))]
                for letter, a, b in zip("oqkv", found, expected):
                    bound = tolerance * max(1.0, float(b.abs().max()))
                    check(f"torch {name} {what} {letter}", numpy(a), numpy(b), bound)

    def dropout() -> None:
        """One seed drops the same weights on any device: output and gradients beside the CPU's."""

        def results(name: str, device: str, case: tuple) -> list[Any]:
            x = [t.requires_grad_() for t in tensors(case, getattr(torch, name), device)]
            torch.manual_seed(5)
            output = ours(*x, dropout_p=0.3, is_causal=case[-1], enable_gqa=True)
            output.float().square().sum().backward()
            return [output, *(t.grad for t in x)]

        for name, tolerance in {"bfloat16": 0.03, "float16": 0.005, "float32": 1e-4}.items():
            for case in CASES[1:4]:
                pairs = zip(results(name, "cuda", case), results(name, "cpu", case))
                for what, (a, b) in zip(("output", *"qkv"), pairs):
                    bound = tolerance * max(1.0, float(b.abs().max()))
                    check(f"torch {name} {case} dropout {what}", numpy(a), numpy(b), bound)

    def merging() -> None:
        """Of a few parts, and of more than a launch takes at once, whose table is a workspace."""
        q, k, v = tensors(CASES[3], torch.bfloat16)
        expected = numpy(theirs(*wide([q, k, v]), enable_gqa=True))
        for width in (257, 10):
            pairs = zip(k.split(width, 2), v.split(width, 2))
            parts = [dlattn.torch.attention(q, *pair, return_lse=True) for pair in pairs]
            output, _ = dlattn.merge(*(list(x) for x in zip(*parts)))
            check(f"torch merge of {len(parts)}", numpy(output), expected, 3e-2)

    def refusals() -> None:
        q, k, v = tensors(CASES[0], torch.float16)
        refused("torch head_dim", ValueError, "key: axis 3", lambda: ours(q, k[..., :8], v))
        refused("torch device", ValueError, "key", lambda: ours(q, k.cpu(), v))
        refused(
            "torch dtype", NotImplementedError, "dtype", lambda: ours(q.int(), k.int(), v.int())
        )

    for step in (
        *(forward, strided, float8, masks, gradients, packed_gradients, current_stream, graph),
        *(gradients_on_a_stream, gradients_in_a_graph, array_interface, documents, dropout),
        *(merging, refusals),
    ):
        attempt(step)


def check_compile() -> None:
    """One graph, by Inductor. On the GPU it compiles the operations around ours. On the CPU there
    are none, for it would first start PyTorch anew for each instruction set, to see whether its
    C++ runs: a minute or more.
    """
    import dlattn.torch
    import torch

    def bare(query: Any, key: Any, value: Any) -> Any:
        f = dlattn.torch.scaled_dot_product_attention
        return f(query, key, value, is_causal=True)

    def between(query: Any, key: Any, value: Any) -> Any:
        return bare(-query, key, value) + 1

    def compiled(model: Any, device: str, dtype: Any) -> None:
        x = torch_tensors(CASES[1], dtype, device)
        expected = model(*x).float().cpu()
        found = torch.compile(model, fullgraph=True)(*x).float().cpu()
        check(f"torch compiled {device}", found, expected, 2e-3)

    attempt(lambda: compiled(between, "cuda", torch.float16))
    attempt(lambda: compiled(bare, "cpu", torch.float32))


def check_cupy() -> None:
    """dlattn.attention makes its output, and runs on CuPy's current stream."""
    import cupy
    import dlattn

    random = np.random.default_rng(0)
    shapes = (2, 4, 33, 64), (2, 2, 65, 64), (2, 2, 65, 64)
    exact = [random.standard_normal(shape).astype(np.float16) for shape in shapes]
    wanted, wanted_lse = attention(*exact, causal=True, key_lengths=np.array([65, 40]))

    def call() -> None:
        lse = cupy.empty((2, 4, 33), np.float32)
        lengths = cupy.asarray([65, 40])  # int64, which is converted
        x = [cupy.asarray(a) for a in exact]
        found = dlattn.attention(*x, causal=True, key_lengths=lengths, lse=lse)
        assert type(found) is cupy.ndarray, type(found)
        check("CuPy", found.get().astype(float), wanted, 4e-3)
        check("CuPy log-sum-exp", lse.get().astype(float), wanted_lse, 1e-3)

    def current_stream() -> None:
        """What is made on a stream, behind much work, is read on it."""
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            big = cupy.ones((4096, 4096), np.float32)
            for _ in range(20):
                big = big @ big * 1e-4
            x = [cupy.asarray(a) + cupy.float16(0) * big[0, 0].astype(np.float16) for a in exact]
            found = dlattn.attention(*x, causal=True, key_lengths=cupy.asarray([65, 40]))
        stream.synchronize()
        check("CuPy stream", found.get().astype(float), wanted, 4e-3)

    attempt(call)
    attempt(current_stream)


def check_provider() -> None:
    """PyTorch's own attention by the plugin, and transformers where it is."""
    import dlattn.torch  # noqa: F401
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def activated() -> None:
        x = torch_tensors(CASES[1], torch.bfloat16, "cuda")
        wanted = scaled_dot_product_attention(*(t.float() for t in x), is_causal=True)
        x = [t.requires_grad_() for t in x]
        torch.nn.attention.activate_flash_attention_impl("DLATTN")
        try:
            found = scaled_dot_product_attention(*x, is_causal=True)
            name = type(found.grad_fn).__name__
        finally:
            torch.nn.attention.restore_flash_attention_impl()
        assert "ScaledDotProduct" not in name, f"PyTorch's own: {name}"
        check("activated", found.detach().float().cpu(), wanted.cpu(), 3e-2)

    def model() -> None:
        import dlattn.transformers  # noqa: F401
        import transformers

        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
        config = transformers.MistralConfig(**sizes, head_dim=64, sliding_window=16)
        torch.manual_seed(0)
        with torch.device("cuda"):
            made = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager")
            tokens = torch.randint(97, (2, 40))
            there = torch.ones(2, 40, dtype=torch.int64)
            there[1, 30:] = 0
        with torch.no_grad():
            wanted = made(tokens, attention_mask=there).logits
            made.set_attn_implementation("dlattn")
            found = made(tokens, attention_mask=there).logits
        where = there.bool()
        check("transformers", found[where].cpu(), wanted[where].cpu(), 2e-3)

    attempt(activated)
    attempt(model)


CHECKS = {
    "jax": check_jax,
    "torch": check_torch,
    "compile": check_compile,
    "cupy": check_cupy,
    "provider": check_provider,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    print(f"{failed} failed, {time.process_time():.0f} s of the CPU")
    raise SystemExit(min(failed, 100))
