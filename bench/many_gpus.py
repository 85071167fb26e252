"""Attention over several GPUs beside one GPU on the same work, PyTorch's own and ring-flash-attn.

    torchrun --nproc-per-node N bench/many_gpus.py OUT.csv [--lengths 32768,131072] [--seconds S]

Checks every way first, on a small case, against one GPU. Then times causal and full attention of
one sequence, 32 query and 8 key heads of 128, bf16; forward, and with backward (op fwd+bwd).
All ranks do the work of one GPU at once, each by itself (gpus 1), or share it. Cases are timed in
rounds, each implementation once per round. A time is that between two CUDA events, on the slowest
rank, the ranks starting together behind a short busy loop of the device, which keeps the host's own
time out; that is printed apart. The figures are medians; share is the time of one GPU by dlattn
/ (gpus * time). FLOPs are counted as in gpu_bench.py.

PyTorch's context_parallel runs with its cuDNN and flash kernels; it takes no fewer key heads than
query heads, so it gets them repeated. ring-flash-attn (PyPI) runs where it can be imported and
gives what one GPU gives, by its zigzag function under a causal mask, with the kernels of flash-attn
or, where that is not installed, with PyTorch's FlashAttention 2. From 200,000 rows
on there is one round. What is beyond ``--seconds`` is left out.
"""

import argparse
import contextlib
import csv
import datetime
import functools
import itertools
import os
import statistics
import time
import warnings

import dlattn.torch
import ring_flash_attn_peer
import torch
import torch.distributed as dist
from dlattn.torch import context_parallel
from many_gpus_csv import COLUMNS, DIM, HEADS, HEADS_KV, WAYS, line, rounds_of
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 100_000  # rows
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def say(*words):
    if dist.get_rank() == 0:
        print(*words, flush=True)


# ---- Right?


def make(rows, keys, heads, heads_kv, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = (heads, rows), (heads_kv, keys), (heads_kv, keys), (heads, rows)
    return [torch.randn(1, *shape, DIM, device="cuda", dtype=dtype) for shape in shapes]


def results(attention, query, key, value, d_output, **options):
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output, lse = attention(*leaves, **options)
    output.backward(d_output)
    return [output.detach(), lse, *(x.grad for x in leaves)]


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def options_checked(rows):
    """For 8 heads; one rank's rows of bias and mask are ``shard`` of these."""
    pairs = torch.randn(1, 1, rows, rows, device="cuda")
    of_heads = torch.linspace(0, 1, 8, device="cuda")
    causal = {"causal": True}
    return (
        *({}, causal, {"window": (700, 0)}, {**causal, "softcap": 20.0}),
        *({"bias": pairs}, {"mask": pairs > 0, "sinks": of_heads}),
        {"alibi_slopes": of_heads, **causal},
    )


def check():
    """No way's error beside float32 may be more than half above that of one GPU."""
    n, counted, bad = dist.get_world_size(), 0, 0
    tensors = make(1024 * n, 1024 * n, 8, 2)
    one = functools.partial(dlattn.torch.attention, return_lse=True)
    for options, layout in itertools.product(options_checked(1024 * n), ("contiguous", "zigzag")):
        shard = functools.partial(context_parallel.shard, layout=layout)
        exact = results(one, *(x.float() for x in tensors), **options)
        single = [error(a, b) for a, b in zip(results(one, *tensors, **options), exact)]
        ours = {k: shard(x) if k in ("bias", "mask") else x for k, x in options.items()}
        for way in WAYS:
            many = functools.partial(
                context_parallel.attention, way=way, layout=layout, return_lse=True
            )
            try:
                found, again = (results(many, *map(shard, tensors), **ours) for _ in range(2))
            except dlattn.Unsupported as refusal:
                say(f"{way} {layout} {list(options)}: {refusal}")
                continue
            errors = [error(a, shard(b)) for a, b in zip(found, exact)]
            same = all(torch.equal(a, b) for a, b in zip(found, again))
            right = all(e <= 1.5 * of_one + 1e-6 for e, of_one in zip(errors, single))
            counted += 1
            bad += not (right and same)
            if not (right and same):
                figures = " ".join(f"{e:.1e}/{s:.1e}" for e, s in zip(errors, single))
                print(
                    f"WRONG on rank {dist.get_rank()}: {way} {layout} {list(options)} "
                    f"same bits {same}",
                    figures,
                )
    say(f"checked {counted} cases, {bad} wrong")
    return bad


# ---- ring-flash-attn


def heads_last(x):
    """As flash-attn has them: [B, L, H, D]."""
    return x.transpose(1, 2).contiguous()


def find_ring_flash_attn():
    """Its functions, by whether they are causal; none where they are not there or not right."""
    try:
        functions = ring_flash_attn_peer.functions()
    except ImportError as problem:
        say(f"left out: ring-flash-attn, which cannot be imported ({problem})")
        return {}
    found = {}
    for causal, function in functions.items():
        theirs = functools.partial(function, causal=causal)
        wrong = error_of_peer(theirs, causal)
        if wrong < 0.02:
            found[causal] = theirs
        else:
            say(f"left out: {function.__name__}, whose error beside one GPU is {wrong:.1e}")
    return found


def error_of_peer(attention, causal):
    """The largest on any rank."""
    n = dist.get_world_size()
    tensors = make(1024 * n, 1024 * n, 8, 2)[:3]
    layout = "zigzag" if causal else "contiguous"
    shard = functools.partial(context_parallel.shard, layout=layout)
    output = attention(*(heads_last(shard(x)) for x in tensors)).transpose(1, 2)
    exact = shard(dlattn.torch.attention(*(x.float() for x in tensors), causal=causal))
    found = torch.tensor([error(output, exact)], device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


# ---- How fast?


BUSY_CYCLES = 4_000_000  # some 2 ms


def milliseconds(step):
    """Of the slowest rank, once all have come."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.all_reduce(torch.zeros(1, device="cuda"))
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    step()
    end.record()
    end.synchronize()
    took = torch.tensor([start.elapsed_time(end)], device="cuda")
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def step_of(attention, tensors, backward):
    """One forward pass, and with ``backward`` the gradients of all three tensors."""
    query, key, value, d_output = tensors
    if not backward:
        return lambda: attention(query, key, value)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, d_output)


def of_pytorch(backend, causal, query, key, value):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(backend):
        return sdpa(query, key, value, is_causal=causal)


def around(mesh, length, causal):
    """PyTorch's context, which wants a tensor of the sequence; it deals halves out as we do."""
    if mesh is None:
        return contextlib.nullcontext()
    from torch.distributed.tensor.experimental import _attention, context_parallel

    _attention._cp_options.enable_load_balance = causal
    buffer = torch.zeros(length, device="cuda")
    return context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0])


def implementations(length, causal, mesh, rings):
    """(name, number of GPUs, attention, tensors, mesh of PyTorch's context)"""
    n = dist.get_world_size()
    whole = make(length, length, HEADS, HEADS_KV)
    one = functools.partial(dlattn.torch.attention, causal=causal)
    yield "dlattn", 1, one, whole, None
    layout = "zigzag" if causal else "contiguous"
    parts = [context_parallel.shard(x, layout=layout) for x in whole]
    for way in WAYS:
        many = functools.partial(context_parallel.attention, way=way, layout=layout, causal=causal)
        yield f"dlattn {way}", n, many, parts, None
    if causal in rings:
        yield "ring-flash-attn", n, rings[causal], [heads_last(x) for x in parts], None
    repeated = [x.repeat_interleave(HEADS // x.shape[1], 1) for x in parts]
    for name, backend in PEERS.items():
        if name == "cudnn" or length < SHORT:
            theirs = functools.partial(of_pytorch, backend, causal)
            yield f"torch context_parallel {name}", n, theirs, repeated, mesh


def rounds(length, cases):
    """Milliseconds of each. What ran before decides how fast the clocks are, so short ones run once
    more beforehand."""
    found = {name: [] for name in cases}
    for _ in range(rounds_of(length)):
        for name, (step, context) in list(cases.items()):
            try:
                with context():
                    if length < SHORT:
                        step()
                    found[name].append(milliseconds(step))
            except (RuntimeError, NotImplementedError) as problem:
                say(f"{name} {length}: {str(problem)[:300]}")
                del cases[name]
    return {name: found[name][1:] or found[name] for name in cases}


def time_case(length, causal, backward, mesh, rings, write):
    """Writes a line for each implementation; the first is what others are a share of."""
    cases, gpus = {}, {}
    for name, count, attention, tensors, theirs in implementations(length, causal, mesh, rings):
        context = functools.partial(around, theirs, length, causal)
        cases[name] = step_of(attention, tensors, backward), context
        gpus[name] = count
    found = rounds(length, cases)
    of_one = statistics.median(found["dlattn"])
    device, op = torch.cuda.get_device_name(), "fwd+bwd" if backward else "fwd"
    for name, times in found.items():
        write(line(device, op, length, causal, name, times, gpus[name], of_one))


def host_cost():
    """Milliseconds of the host for one call on tiny tensors, with the check and without."""
    tensors = [context_parallel.shard(x) for x in make(256, 256, 8, 8)[:3]]
    for checked in (True, False):
        for way in WAYS:
            call = functools.partial(context_parallel.attention, *tensors, way=way, check=checked)
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                call()
            took = (time.perf_counter() - start) / 50
            torch.cuda.synchronize()
            say(f"host: {way} check={checked} {took * 1e3:.3f} ms")


def main():
    options = argparse.ArgumentParser()
    options.add_argument("out")
    options.add_argument("--lengths", default="32768,131072,524288")
    options.add_argument("--seconds", type=float, default=600)
    options = options.parse_args()
    warnings.filterwarnings("ignore")
    start = time.monotonic()
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    patience = datetime.timedelta(minutes=5)  # for a rank that does not come
    dist.init_process_group("nccl", device_id=torch.device("cuda", local), timeout=patience)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    if check():
        raise SystemExit("wrong results are not timed")
    host_cost()
    rings = find_ring_flash_attn()
    with open(options.out if dist.get_rank() == 0 else os.devnull, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()

        def write(found):
            writer.writerow(found)
            file.flush()
            say(*(found[n] for n in ("op", "Lq", "causal", "impl", "median_us", "tflops", "share")))

        for length in map(int, options.lengths.split(",")):
            for backward, causal in itertools.product((False, True), (True, False)):
                left = torch.tensor([options.seconds - (time.monotonic() - start)], device="cuda")
                dist.broadcast(left, 0)
                if left.item() < 0:
                    say(f"left out: {length} causal={causal} backward={backward}")
                    continue
                time_case(length, causal, backward, mesh, rings, write)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
