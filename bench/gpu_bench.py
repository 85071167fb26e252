"""Attention on the GPU: libdlattn beside PyTorch's backends, in one process and in turns.

    DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 python3 bench/gpu_bench.py [--out FILE.csv] [--quick]
                                                         [--ops fwd,bwd,fp8,decode,mla,merge,call]
                                                         [--dims 64,128,192/128]

Every case is timed in rounds: each implementation once per round, between two CUDA events, after a
short busy loop of the device so that the host's own time stays out. The figures are medians; the
spread is the distance between the quartiles in percent of the median. A product of 8192 x 8192
matrices and a copy of 1 GiB of the same process are written beside them. FLOPs = 2 B H Lq Lk
(D + D_v), for bwd 2 B H Lq Lk (3 D + 2 D_v) whatever a row computes twice, halved for causal. The
ops fwd+bias, fwd+mask and fwd+alibi are the same with that option, at one L. The op fp8 is fwd in
e4m3 with outputs of bf16, and beside it in bf16, both also by the rows that are named, by
FlashAttention 3 and, in e4m3, cuDNN where their packages fa3_fwd and cudnn are installed, and all
from CUDA graphs. Decoding is one query row for each head, also of bf16 over e4m3 keys and values,
and every call of it finds L2 cold: before it 256 MiB are read. (Were they written, the call would
pay for writing back what of them is still in L2.) Its GB/s are those of keys and values. The op
mla is decoding over the latent cache of MLA, likewise cold, whose GB/s are those of the cache, and
after it head dim 512. The op merge has the number of parts as Lk, and the bytes that it must read
and write as GB/s, beside a copy that reads and writes as many. Last come host times of one call on
a tiny problem: a planned call, and a bare cuLaunchKernel of an empty kernel with as many bytes of
parameters.
"""

import argparse
import csv
import ctypes
import datetime
import functools
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(Path(__file__).parents[1] / "abi"))
from dlattn_ctypes import Api, Desc, DLTensor, Exec, Gradients, Partials, Sku, Tensors

COLUMNS = [
    "date",
    "commit",
    "device",
    "op",
    "dtype",
    "B",
    "Hq",
    "Hkv",
    "Lq",
    "Lk",
    "D",
    "Dv",
    "causal",
    "threads",
    "impl",
    "kernel",
    "median_us",
    "spread_pct",
    "tflops",
    "gbs",
]
PEERS = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CODES = {
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bool: (6, 8),
    torch.int32: (0, 32),
    torch.float8_e4m3fn: (10, 8),
    torch.float8_e5m2: (12, 8),
}


# ---- The library ---------------------------------------------------------------------------------


class Library(Api):
    def call(self, causal, kernel=None, threads=0, **tensors):
        """A planned call of these tensors and the name of the row that runs it."""
        return Call(self, Desc(causal=int(causal), kernel=kernel, num_threads=threads), tensors)

    def gradients(self, causal, kernel, tensors, gradients):
        """The same for gradients: d_output, and those that are wanted."""
        return Call(self, Desc(causal=int(causal), kernel=kernel), tensors, gradients)


WORKSPACE_IS_ZERO = 2  # DLATTN_WORKSPACE_IS_ZERO


class Call:
    def __init__(self, library, desc, tensors, gradients=None, over_zeros=False):
        self.library = library
        self.keep = [*tensors.values(), *(gradients or {}).values()]
        self.slots = [slots(Tensors, tensors)]
        if gradients:
            self.slots.append(slots(Gradients, gradients))
        sku, plan = Sku(), ctypes.c_void_p()
        at = ctypes.addressof
        query, create, self.run = (
            (library.backward_query, library.backward_plan_create, library.backward_plan_run)
            if gradients
            else (library.query, library.plan_create, library.plan_run)
        )
        library.check(query(at(desc), *map(at, self.slots), at(sku)))
        library.check(create(at(desc), *map(at, self.slots), at(plan)))
        self.kernel, self.plan = sku.kernel.decode(), plan
        self.workspace = torch.zeros(
            sku.workspace_bytes + 1024, dtype=torch.uint8, device=self.keep[0].device
        )
        start = -self.workspace.data_ptr() % 1024
        self.exec = Exec(
            workspace=self.workspace.data_ptr() + start,
            workspace_bytes=sku.workspace_bytes,
            flags=WORKSPACE_IS_ZERO if over_zeros else 0,
        )

    def __call__(self):
        if self.workspace.is_cuda:
            self.exec.stream = torch.cuda.current_stream().cuda_stream
        at = ctypes.addressof
        self.library.check(self.run(self.plan, *map(at, self.slots), at(self.exec)))


class Merge:
    """A merge of parts into output and lse, none of which needs a workspace."""

    def __init__(self, library, outputs, lses, output, lse):
        self.library, self.keep, self.exec = library, (outputs, lses, output, lse), Exec()
        self.partials = Partials(
            count=len(outputs),
            outputs=pointers(outputs),
            lses=pointers(lses),
            output=ctypes.pointer(describe(output)),
            lse=ctypes.pointer(describe(lse)),
        )
        sku, at = Sku(), ctypes.addressof
        library.check(library.merge_query(at(self.partials), at(sku)))
        self.kernel = sku.kernel.decode()

    def __call__(self):
        self.exec.stream = torch.cuda.current_stream().cuda_stream
        at = ctypes.addressof
        self.library.check(self.library.merge(at(self.partials), at(self.exec)))


def pointers(tensors):
    return (ctypes.POINTER(DLTensor) * len(tensors))(*(map(ctypes.pointer, map(describe, tensors))))


def slots(struct, tensors):
    return struct(**{name: ctypes.pointer(describe(t)) for name, t in tensors.items()})


def describe(t):
    code, bits = CODES[t.dtype]
    axes = ctypes.c_int64 * t.dim()
    device = (ctypes.c_int32 * 2)(*((2, t.device.index) if t.is_cuda else (1, 0)))
    return DLTensor(t.data_ptr(), device, t.dim(), code, bits, 1, axes(*t.shape), axes(*t.stride()))


# ---- Timing --------------------------------------------------------------------------------------


def microseconds(function, events):
    torch.cuda._sleep(3_000_000)  # the device is busy, some 1.7 ms, while the host enqueues
    events[0].record()
    function()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) * 1e3


def rounds(functions, count):
    """name -> (median, spread in percent) of `count` rounds after one that warms up."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = {name: [] for name in functions}
    for i in range(count + 1):
        for name, function in functions.items():
            t = microseconds(function, events)
            if i:
                times[name].append(t)
    return {name: summary(t) for name, t in times.items()}


def recorded(call):
    """What a call enqueues, from a CUDA graph. It holds the call, whose workspace the graph writes
    to: PyTorch unmaps what nothing holds when it records the next one."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay():
        graph.replay()

    replay.call = call
    return replay


def summary(times):
    quarters = statistics.quantiles(times, n=4)
    return quarters[1], (quarters[2] - quarters[0]) / quarters[1] * 100


# ---- What a call costs the host ------------------------------------------------------------------

EMPTY = b""".version 7.0
.target sm_80
.address_size 64
.visible .entry empty(.param .align 8 .b8 params[720]) { ret; }
"""


def bare_launch():
    driver = ctypes.CDLL("libcuda.so.1")
    module, function, params = ctypes.c_void_p(), ctypes.c_void_p(), (ctypes.c_char * 720)()
    assert driver.cuModuleLoadData(ctypes.byref(module), EMPTY) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"empty") == 0
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    return lambda: driver.cuLaunchKernel(function, 1, 1, 1, 128, 1, 1, 0, stream, pointers, None)


def planned_call(library, kernel):
    q = torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.float16)
    call = library.call(False, kernel, query=q, key=q, value=q, output=torch.empty_like(q))
    call()
    at = ctypes.addressof
    arguments = call.plan, at(call.slots[0]), at(call.exec)
    return call.kernel, lambda call=call: library.check(library.plan_run(*arguments))


def host_times(functions, count):
    times = {name: [] for name in functions}
    for _ in range(count):
        for name, function in functions.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(200):
                function()
            times[name].append((time.perf_counter() - begin) / 200 * 1e6)
    return {name: summary(t) for name, t in times.items()}


# ---- Cases ---------------------------------------------------------------------------------------


DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def grid(dtypes, quick, dims):
    """(op, dtype name, (D, D_v), causal, L): 16k tokens, H * D = 2048 as in FlashAttention 3's."""
    lengths = (512, 4096) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    for dtype in dtypes:
        for dim in dims:
            for causal in (False, True):
                for length in lengths if dtype != "f32" else lengths[:5:2]:
                    yield "fwd", dtype, dim, causal, length
            for option in OPTIONS:
                yield f"fwd+{option}", dtype, dim, False, 2048


def bias(q):
    """One for all of the batch, as of positions."""
    tensor = torch.randn(1, q.shape[1], q.shape[2], q.shape[2], device=q.device, dtype=q.dtype)
    return {"bias": tensor}, tensor


def mask(q):
    """One for all heads; 7 of 10 keys are visible, and in every row the first."""
    tensor = torch.rand(q.shape[0], 1, q.shape[2], q.shape[2], device=q.device) < 0.7
    tensor[..., 0] = True
    return {"mask": tensor}, tensor


def alibi(q):
    """Slopes; what has no such option gets them as a bias."""
    heads, length = q.shape[1:3]
    slopes = 2 ** (-8 * torch.arange(1, heads + 1, device=q.device) / heads)
    row = torch.arange(length, device=q.device)
    tensor = slopes[:, None, None] * -(row[:, None] - row).abs()
    return {"alibi_slopes": slopes}, tensor.to(q.dtype)[None]


# name -> query -> (what the library gets, the attn_mask that says the same to PyTorch)
OPTIONS = {"bias": bias, "mask": mask, "alibi": alibi}


# (dtype name, with a + that of keys and values if another, B, Hq, Hkv, Lk, D)
DECODE = (
    ("bf16", 1, 32, 8, 1024, 128),
    ("bf16", 1, 32, 8, 8192, 128),
    ("bf16", 1, 32, 8, 32768, 128),
    ("bf16", 1, 64, 8, 131072, 128),
    ("bf16", 8, 32, 8, 4096, 128),
    ("bf16", 16, 32, 8, 4096, 128),
    ("bf16", 16, 32, 8, 8192, 128),
    ("bf16", 64, 32, 8, 4096, 128),
    ("bf16", 16, 32, 32, 4096, 128),
    ("f16", 16, 32, 8, 8192, 128),
    ("bf16", 1, 32, 8, 8192, 64),
    ("bf16", 16, 32, 8, 8192, 64),
    ("bf16", 1, 16, 8, 8192, 256),
    ("bf16", 16, 16, 8, 4096, 256),
    ("bf16", 1, 16, 1, 65536, 128),
    ("bf16+e4m3", 1, 32, 8, 1024, 128),
    ("bf16+e4m3", 1, 32, 8, 8192, 128),
    ("bf16+e4m3", 1, 32, 8, 32768, 128),
    ("bf16+e5m2", 1, 32, 8, 32768, 128),
    ("f16+e4m3", 1, 32, 8, 32768, 128),
    ("bf16+e4m3", 1, 64, 8, 131072, 128),
    ("bf16+e4m3", 16, 32, 8, 8192, 128),
    ("bf16+e4m3", 64, 32, 8, 4096, 128),
    ("bf16+e4m3", 16, 32, 32, 4096, 128),
    ("bf16+e4m3", 1, 32, 8, 8192, 64),
    ("bf16+e4m3", 16, 32, 8, 8192, 64),
    ("bf16+e4m3", 1, 16, 8, 8192, 256),
    ("bf16+e4m3", 16, 16, 8, 4096, 256),
)


def calls_of(kernels, make):
    """make(kernel) for each of the rows, None being the first choice, once for each that runs."""
    found = {}
    for kernel in kernels:
        try:
            call = make(kernel)
        except RuntimeError:
            continue  # the row does not take this dtype, or not on this device
        found.setdefault(f"dlattn {call.kernel}", ("dlattn", call))
    return found


def implementations(library, q, k, v, causal, option, kernels):
    output = torch.empty_like(q[..., : v.shape[3]])
    extra, attn_mask = OPTIONS[option](q) if option else ({}, None)
    tensors = {"query": q, "key": k, "value": v, "output": output, **extra}
    found = calls_of(kernels, lambda kernel: library.call(causal, kernel, **tensors))
    for name, backend in PEERS.items() if k.dtype == q.dtype else ():

        def peer(backend=backend):
            with sdpa_kernel(backend):
                functional.scaled_dot_product_attention(
                    q, k, v, attn_mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                )

        try:
            peer()
        except RuntimeError:
            continue  # PyTorch's backend does not take this dtype or a mask
        found[name] = (name, peer)
    return found


COPY_BYTES = 1 << 30


def measure_ceilings(count):
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(big)
    return rounds({"gemm": lambda: a @ a, "copy": lambda: other.copy_(big)}, count)


def common_columns():
    """The library and what the lines of one run have in common; DLATTN_COMMIT is for a copy of the
    tree without git."""
    library = Library(os.environ.get("DLATTN_LIBRARY", "bazel-bin/libdlattn.so.1"))
    commit = (
        os.environ.get("DLATTN_COMMIT")
        or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    )
    return library, {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": torch.cuda.get_device_name().replace(" ", "-"),
        "threads": 0,
    }


def ceiling_rows(count, wanted=("gemm", "copy")):
    """What a large product and a large copy reach."""
    for op, (median, spread) in measure_ceilings(count).items():
        row = {
            "op": op,
            "impl": "torch",
            "median_us": f"{median:.2f}",
            "spread_pct": f"{spread:.1f}",
        }
        if op == "gemm":
            sizes = {"dtype": "bf16", "Lq": 8192, "Lk": 8192, "D": 8192}
            row |= sizes | {"tflops": f"{2 * 8192**3 / median / 1e6:.1f}"}
        else:
            row["gbs"] = f"{2 * COPY_BYTES / median / 1e3:.1f}"
        if op in wanted:
            print(op, row.get("tflops", row.get("gbs")), flush=True)
            yield row


def case_rows(op, dtype, q, k, v, causal, found, times, read=0):
    """What the CSV has of each implementation beside the common columns; `read` bytes are GB/s."""
    batch, heads, length_q, dim = q.shape
    heads_kv, length_k = k.shape[1:3]
    dim_v = v.shape[3]
    flops = 2 * batch * heads * length_q * length_k / (2 if causal else 1)
    flops *= 3 * dim + 2 * dim_v if op == "bwd" else dim + dim_v
    for name, (impl, function) in found.items():
        median, spread = times[name]
        yield {
            "op": op,
            "dtype": dtype,
            "B": batch,
            "Hq": heads,
            "Hkv": heads_kv,
            "Lq": length_q,
            "Lk": length_k,
            "D": dim,
            "Dv": dim_v,
            "causal": int(causal),
            "impl": impl,
            "kernel": function.kernel if isinstance(function, Call) else "",
            "median_us": f"{median:.2f}",
            "spread_pct": f"{spread:.1f}",
            "tflops": f"{flops / median / 1e6:.1f}",
            "gbs": f"{read / median / 1e3:.0f}" if read else "",
        }


def head_dims(text):
    """64,192/128 -> [(64, 64), (192, 128)], D and D_v."""
    pairs = (dims.split("/") for dims in text.split(","))
    return [(int(pair[0]), int(pair[-1])) for pair in pairs]


def random_rows(dtype, length, heads, dim):
    """[B, H, L, D] of 16k tokens, as a model's projections leave it."""
    shape = 16384 // length, length, heads, dim
    return torch.randn(shape, device="cuda", dtype=DTYPES[dtype]).transpose(1, 2)


def forward_rows(library, dtypes, quick, dims, kernels, count):
    """The case_rows of each case of the grid."""
    for op, dtype, (dim, dim_v), causal, length in grid(dtypes, quick, dims):
        q, k, v = (random_rows(dtype, length, 2048 // dim, d) for d in (dim, dim, dim_v))
        option = op.partition("+")[2]
        found = implementations(library, q, k, v, causal, option, kernels)
        times = rounds({name: f for name, (_, f) in found.items()}, count)
        yield list(case_rows(op, dtype, q, k, v, causal, found, times))


def backward_peers(dtype):
    """PyTorch's memory-efficient backend is what it has for f32."""
    names = ("mem_efficient",) if dtype == torch.float32 else ("fa2", "cudnn")
    return {name: PEERS[name] for name in names}


def flash_attention_4(q, k, v, d_output, causal):
    """Its backward in its default mode; None where it is not installed or does not take this."""
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    except ImportError:
        return None
    q, k, v, d_output = (t.transpose(1, 2) for t in (q, k, v, d_output))
    try:
        output, lse = _flash_attn_fwd(q, k, v, causal=causal, return_lse=True)[:2]
        call = functools.partial(_flash_attn_bwd, q, k, v, output, d_output, lse, causal=causal)
        call()
    except (AssertionError, NotImplementedError, RuntimeError, ValueError):
        return None
    return call


def backward_implementations(library, q, k, v, d_output, causal, kernels):
    """All from one output and lse, PyTorch's peers from their own."""
    output = torch.empty_like(d_output)
    lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    library.call(causal, query=q, key=k, value=v, output=output, lse=lse)()
    tensors = {"query": q, "key": k, "value": v, "output": output, "lse": lse}
    gradients = {"d_output": d_output}
    gradients |= {f"d_{name}": torch.empty_like(tensors[name]) for name in list(tensors)[:3]}
    found = calls_of(kernels, lambda row: library.gradients(causal, row, tensors, gradients))
    for name, backend in backward_peers(q.dtype).items():
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        try:
            with sdpa_kernel(backend):
                result = functional.scaled_dot_product_attention(*inputs, is_causal=causal)
            peer = functools.partial(
                torch.autograd.grad, result, inputs, d_output, retain_graph=True
            )
            peer()
        except RuntimeError:
            continue  # PyTorch's backend does not take these head dims
        found[name] = (name, peer)
    fa4 = flash_attention_4(q, k, v, d_output, causal)
    if fa4:
        found["fa4"] = ("fa4", fa4)
    return found


def backward_rows(library, dtypes, quick, dims, kernels, count):
    """The case_rows of each case of the grid without options."""
    for op, dtype, (dim, dim_v), causal, length in grid(dtypes, quick, dims):
        if op != "fwd":
            continue
        q, k, v, d_output = (
            random_rows(dtype, length, 2048 // dim, d) for d in (dim, dim, dim_v, dim_v)
        )
        found = backward_implementations(library, q, k, v, d_output, causal, kernels)
        times = rounds({name: f for name, (_, f) in found.items()}, count)
        yield list(case_rows("bwd", dtype, q, k, v, causal, found, times))


def flash_attention_3(q, k, v, causal, **options):
    """Its forward, None where it is not installed; outputs of e4m3 are bf16."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return functools.partial(flash_attn_func, q, k, v, causal=causal, **options)


def cudnn_float8(q, k, v, causal):
    """cuDNN's forward of e4m3, by its package cudnn; None where that is not installed. On Hopper
    its outputs are of e4m3, too, half of the bytes of the others'; all its scales are 1."""
    try:
        import cudnn
    except ImportError:
        return None
    types = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=types.FP8_E4M3,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
    )
    output, one = torch.empty_like(v), torch.ones([1] * 4, device=q.device)
    inputs = [graph.tensor(dim=t.shape, stride=t.stride()) for t in (q, k, v)]
    scalar = {"dim": [1] * 4, "stride": [1] * 4, "data_type": types.FLOAT}
    names = [f"descale_{name}" for name in "qkvs"] + ["scale_s", "scale_o"]
    scales = {name: graph.tensor(**scalar) for name in names}
    out, _, *largest = graph.sdpa_fp8(
        *inputs,
        **scales,
        generate_stats=False,
        attn_scale=q.shape[3] ** -0.5,
        use_causal_mask=bool(causal),
    )
    out.set_output(True).set_dim(output.shape).set_stride(output.stride())
    out.set_data_type(types.FP8_E4M3)
    for each in largest:
        each.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(types.FLOAT)
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
    given = zip([*inputs, out], (q, k, v, output), strict=True)
    memory = {node: tensor.view(torch.uint8) for node, tensor in given}
    memory |= dict.fromkeys(scales.values(), one)
    memory |= {each: torch.empty_like(one) for each in largest}
    handle = cudnn.create_handle()

    def call():
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(memory, workspace, handle=handle)
        return output

    return call


def started(case, name, make):
    """What make() gives of a peer, once it has run; None, and a line, where it declines."""
    try:
        peer = make()
        if peer:
            peer()
        torch.cuda.synchronize()
    except Exception as error:  # each peer has its own ways to decline
        print(f"  {case}: {name} declines: {str(error).splitlines()[0][:100]}")
        return None
    return peer


def write_cases(path, common, count, cases):
    """The rows of each case into a CSV, and a line of them to the terminal."""
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, restval="")
        out.writeheader()
        out.writerows(common | row for row in ceiling_rows(count, ("gemm",)))
        for rows in cases:
            out.writerows(common | row for row in rows)
            file.flush()
            first = rows[0]
            shape = ", ".join(str(first[axis]) for axis in ("B", "Lq", "Lk"))
            times = ", ".join(f"{r['impl']} {r['median_us']} us ({r['tflops']})" for r in rows)
            print(
                f"{first['op']} D {first['D']} [{shape}] causal {first['causal']}:",
                f"{first['kernel']}: {times}",
                flush=True,
            )


def float8_rows(library, dtypes, quick, dims, kernels, count):
    """The case_rows of each case of the grid without options, in bf16 and in e4m3."""
    for op, _, (dim, dim_v), causal, length in grid(["bf16"], quick, dims):
        if op != "fwd":
            continue
        wide = [random_rows("bf16", length, 2048 // dim, d) for d in (dim, dim, dim_v)]
        output = torch.empty_like(wide[2])
        found = {}
        tensors = {"bf16": wide, "e4m3": [t.to(FLOAT8["e4m3"]) for t in wide]}
        for dtype, (q, k, v) in tensors.items():
            given = {"query": q, "key": k, "value": v, "output": output}
            call = functools.partial(library.call, causal, **given)
            found[dtype] = calls_of(kernels, lambda kernel, call=call: call(kernel=kernel))
            peer = flash_attention_3(q, k, v, causal)
            if peer:
                found[dtype][f"fa3 {dtype}"] = ("fa3", peer)
        case = f"e4m3 D {dim} L {length} causal {causal}"
        cudnn = started(case, "cudnn", functools.partial(cudnn_float8, *tensors["e4m3"], causal))
        if cudnn:
            found["e4m3"]["cudnn e4m3"] = ("cudnn", cudnn)
        calls = {name: f for both in found.values() for name, (_, f) in both.items()}
        times = rounds({name: recorded(f) for name, f in calls.items()}, count)
        yield [
            row
            for dtype, both in found.items()
            for row in case_rows("fwd", dtype, *tensors[dtype], causal, both, times)
        ]


def decode_cases():
    """The cases of DECODE: dtype, query, key, value."""
    for dtype, batch, heads, heads_kv, length, dim in DECODE:
        own, _, cached = dtype.partition("+")
        q = torch.randn(batch, heads, 1, dim, device="cuda", dtype=DTYPES[own])
        k, v = (
            torch.randn(batch, heads_kv, length, dim, device="cuda", dtype=DTYPES[own])
            for _ in range(2)
        )
        if cached:
            k, v = (t.to(FLOAT8[cached]) for t in (k, v))
        yield dtype, q, k, v


def cold_rounds(found, other, count):
    """rounds() in which each call finds the tensor `other` in L2."""
    cold = {}
    for name, (_, function) in found.items():
        cold[f"before {name}"] = other.max
        cold[name] = function
    return rounds(cold, count)


def decode_rows(library, kernels, count):
    """The case_rows of each of decode_cases(), with the GB/s of its keys and values."""
    other = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda").view(torch.int32)
    for dtype, q, k, v in decode_cases():
        found = implementations(library, q, k, v, False, None, kernels)
        tensors = {"query": q, "key": k, "value": v, "output": torch.empty_like(q)}
        over_zeros = Call(library, Desc(), tensors, over_zeros=True)
        found["over zeros"] = ("dlattn over zeros", over_zeros)
        times = cold_rounds(found, other, count)
        read = 2 * k.numel() * k.element_size()
        yield from case_rows("decode", dtype, q, k, v, False, found, times, read)


# Batch and query heads over one latent cache: 4,096 keys of 576 columns, in pages of 64, of which
# the first 512 columns are the values.
MLA = ((1, 16), (64, 16), (128, 128))


def mla_operators(q, k, v, scale):
    """Each sequence's heads as the rows of two products and a softmax."""
    q, k, v = q[:, :, 0], k[:, 0], v[:, 0]
    return lambda: ((q @ k.mT) * scale).softmax(-1) @ v


def memory_efficient(q, k, v, causal=False):
    """PyTorch's backend that takes wide heads; those that share keys and values repeat them."""
    k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))

    def call():
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def wide_peers(found, case, **peers):
    """Adds the peers that take the case."""
    for name, peer in peers.items():
        if started(case, name, lambda peer=peer: peer):
            found[name] = (name, peer)
    return found


def mla_rows(library, count):
    """The case_rows of decoding over MLA's latent cache, with the GB/s of its keys; D 512."""
    other = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda").view(torch.int32)
    for batch, heads in MLA:
        q = torch.randn(batch, heads, 1, 576, device="cuda", dtype=torch.bfloat16)
        pages = torch.randn(batch * 64, 1, 64, 576, device="cuda", dtype=torch.bfloat16)
        table = torch.randperm(batch * 64, device="cuda").to(torch.int32).view(batch, 64)
        lengths = torch.full((batch,), 4096, device="cuda", dtype=torch.int32)
        call = library.call(
            False,
            query=q,
            key=pages,
            value=pages[..., :512],
            output=torch.empty_like(q[..., :512]),
            block_table=table,
            key_lengths=lengths,
        )
        k = pages.view(batch, 1, 4096, 576)  # peers read pages in their order
        v = k[..., :512]
        found = wide_peers(
            {"dlattn": ("dlattn", call)},
            f"mla {batch} x {heads}",
            operators=mla_operators(q, k, v, 576**-0.5),
            mem_efficient=memory_efficient(q, k, v),
        )
        times = cold_rounds(found, other, count)
        yield from case_rows("mla", "bf16", q, k, v, False, found, times, k.nbytes)
    for causal in False, True:
        q, k, v = (
            torch.randn(2, 2048, 8, 512, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        call = library.call(causal, query=q, key=k, value=v, output=torch.empty_like(v))
        found = wide_peers(
            {"dlattn": ("dlattn", call)},
            f"D 512 causal {causal}",
            mem_efficient=memory_efficient(q, k, v, causal),
        )
        times = rounds({name: function for name, (_, function) in found.items()}, count)
        yield from case_rows("fwd", "bf16", q, k, v, causal, found, times)


# (dtypes of the parts, the first also of the result; B, H, L, D, whether heads are inner). Of two
# dtypes the result is the first part, as in a ring of many steps.
MERGE = (
    ("bf16,bf16", 1, 32, 65536, 128, False),
    ("bf16,bf16", 1, 32, 65536, 128, True),
    ("f16,f16", 1, 32, 65536, 64, False),
    ("f32,f32", 1, 32, 32768, 128, False),
    ("f32,bf16", 1, 32, 65536, 128, False),
    (",".join(["bf16"] * 8), 1, 32, 16384, 128, False),
    ("bf16,bf16", 1, 32, 4096, 128, False),
    ("bf16,bf16", 64, 32, 1, 128, False),
)


def parts_of(names, batch, heads, length, dim, inner):
    """Outputs and log-sum-exps of the parts, and where they are merged into."""
    shape = (batch, length, heads, dim) if inner else (batch, heads, length, dim)
    outputs = [torch.randn(shape, device="cuda", dtype=DTYPES[n]) for n in names]
    outputs = [x.transpose(1, 2) if inner else x for x in outputs]
    lses = [torch.randn(batch, heads, length, device="cuda") for _ in names]
    in_place = len(set(names)) > 1
    result = [x[0] if in_place else torch.empty_like(x[0]) for x in (outputs, lses)]
    return outputs, lses, *result


def merged_by_operators(outputs, lses, output, lse):
    """What PyTorch has for two parts, the first of which becomes the result."""
    both = torch.logaddexp(*lses)
    before, now = ((x - both).exp()[..., None] for x in lses)
    outputs[0].mul_(before).addcmul_(outputs[1], now.to(outputs[1].dtype))
    lses[0].copy_(both)


def merge_rows(library, count):
    """What the CSV has of each case of MERGE."""
    for names, *shape in MERGE:
        tensors = parts_of(names.split(","), *shape)
        moved = sum(x.nbytes for x in (*tensors[0], *tensors[1], *tensors[2:]))
        copied = torch.empty(2, moved // 2, device="cuda", dtype=torch.uint8)
        found = {"dlattn": Merge(library, *tensors)}
        found["copy"] = lambda copied=copied: copied[0].copy_(copied[1])
        if len(tensors[0]) == 2:
            found["operators"] = functools.partial(merged_by_operators, *tensors)
        batch, heads, length, dim, _ = shape
        for name, (median, spread) in rounds(found, count).items():
            yield {
                "op": "merge+strides" if shape[-1] else "merge",
                "dtype": "+".join(dict.fromkeys(names.split(","))),
                **{"B": batch, "Hq": heads, "Hkv": heads, "Lq": length, "Lk": len(tensors[0])},
                **{"D": dim, "Dv": dim},
                "impl": "dlattn" if name == "dlattn" else f"torch {name}",
                "kernel": getattr(found[name], "kernel", ""),
                "median_us": f"{median:.2f}",
                "spread_pct": f"{spread:.1f}",
                "gbs": f"{moved / median / 1e3:.0f}",
            }


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--out")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--dtypes", default=",".join(DTYPES))
    options.add_argument("--ops", default="fwd,decode,call")
    options.add_argument("--dims", default="64,128,256", help="of fwd and bwd, D or D/D_v")
    options.add_argument(
        "--kernels",
        default="cuda_fwd_sm80,cuda_fwd_simt,cuda_bwd_sm80,cuda_bwd_simt",
        help="rows to time beside the first choice",
    )
    options = options.parse_args()
    library, common = common_columns()
    path = options.out or f"bench/results/{common['date']}-{common['device']}-forward.csv"
    dims = head_dims(options.dims)
    kernels = [None] + [k.encode() for k in options.kernels.split(",") if k]
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, restval="")
        out.writeheader()
        out.writerows(common | row for row in ceiling_rows(options.rounds))

        directions = {"fwd": forward_rows, "bwd": backward_rows, "fp8": float8_rows}
        for rows in itertools.chain.from_iterable(
            rows_of(
                library, options.dtypes.split(","), options.quick, dims, kernels, options.rounds
            )
            for op, rows_of in directions.items()
            if op in options.ops.split(",")
        ):
            out.writerows(dict(common, **row) for row in rows)
            case = rows[0]
            print(
                *(case["op"], case["dtype"]),
                f"D {case['D']} causal {case['causal']} L {case['Lq']}:",
                ", ".join(f"{r['kernel'] or r['impl']} {r['dtype']} {r['tflops']}" for r in rows),
                flush=True,
            )

        rows = decode_rows(library, kernels, options.rounds) if "decode" in options.ops else ()
        if "mla" in options.ops:
            rows = itertools.chain(rows, mla_rows(library, options.rounds))
        if "merge" in options.ops:
            rows = itertools.chain(rows, merge_rows(library, options.rounds))
        for row in rows:
            out.writerow(dict(common, **row))
            print(*(row[c] for c in COLUMNS if c in row), flush=True)

        if "call" not in options.ops:
            return
        calls = {"cuLaunchKernel": bare_launch()}
        for kernel in None, b"cuda_fwd_sm80":
            name, planned = planned_call(library, kernel)
            calls.setdefault(name, planned)
        for name, (median, spread) in host_times(calls, options.rounds).items():
            impl = "cuLaunchKernel" if name == "cuLaunchKernel" else "dlattn"
            row = dict(
                common,
                op="call",
                dtype="f16",
                B=1,
                Hq=1,
                Hkv=1,
                Lq=64,
                Lk=64,
                D=64,
                Dv=64,
                causal=0,
            )
            out.writerow(
                dict(
                    row,
                    impl=impl,
                    kernel=name if impl == "dlattn" else "",
                    median_us=f"{median:.2f}",
                    spread_pct=f"{spread:.1f}",
                )
            )
            print("call", name, f"{median:.2f} us")


if __name__ == "__main__":
    main()
