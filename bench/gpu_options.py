"""The options of attention on the GPU: libdlattn beside what else has them, in one process.

    DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 python3 bench/gpu_options.py
        [--out FILE.csv] [--dims 64,128] [--only packed,paged] [--no-flex] [--rounds N] [--graphs]

bf16, B 2, H 16, L 8192 unless a case says otherwise; timing as in gpu_bench.py. Peers are
FlashAttention 4 (flash_attn.cute), cuDNN through PyTorch and compiled FlexAttention, for few
rows and few tiles FlashAttention 3 (fa3_fwd) and PyTorch's FlashAttention 2, and for packed and
paged sequences FlashInfer, each where it is installed and takes the case. FLOPs count what is
visible: half for a causal mask, the pairs of a window, of documents and of packed sequences; a
random mask counts as none. With --graphs calls are replayed from CUDA graphs, so that what they
cost the host does not count: short calls of FlashAttention 3 and 4 take longer there than on the
GPU.
"""

import argparse
import functools
import random

import torch
import torch.nn.functional as functional
from gpu_bench import (
    Call,
    Desc,
    common_columns,
    flash_attention_3,
    recorded,
    rounds,
    started,
    write_cases,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

WINDOW = 1  # DLATTN_WINDOW
BATCH, HEADS, LENGTH = 2, 16, 8192

try:
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None
try:
    import flashinfer
except ImportError:
    flashinfer = None


def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def rows_first(t):
    """[B, H, L, D] as [B, L, H, D], as FlashAttention wants it."""
    return t.transpose(1, 2)


class Case:
    """One call and its peers. `pairs`: visible rows times keys of one head, in all sequences."""

    def __init__(self, name, dim, heads_kv=HEADS, heads=HEADS, pairs=None, **desc):
        self.name, self.dim, self.heads, self.heads_kv = name, dim, heads, heads_kv
        self.desc = desc
        self.pairs = pairs
        self.peers = {}

    def dense(self, length=LENGTH, length_k=None, batch=BATCH):
        self.shape = batch, length, length_k or length
        self.q = rows_first(normal(batch, length, self.heads, self.dim))
        self.k, self.v = (
            rows_first(normal(batch, self.shape[2], self.heads_kv, self.dim)) for _ in range(2)
        )
        self.tensors = {"query": self.q, "key": self.k, "value": self.v}
        if self.pairs is None:
            whole = batch * length * self.shape[2]
            self.pairs = whole - batch * length * (length - 1) // 2 if self.causal else whole
        return self

    @property
    def causal(self):
        return bool(self.desc.get("causal"))

    def flash(self, **options):
        """FlashAttention 4 on the same tensors."""
        if flash_attn_func:
            q, k, v = map(rows_first, (self.q, self.k, self.v))
            self.peers["fa4"] = lambda: flash_attn_func(q, k, v, causal=self.causal, **options)
        return self

    def older_flash(self):
        """FlashAttention 3, which chooses the parts of the keys (0), and the 2 of PyTorch, whose
        causal is that of the last rows."""
        newer = flash_attention_3(self.q, self.k, self.v, self.causal, num_splits=0)
        if newer:
            self.peers["fa3"] = newer
        q, k, v = map(rows_first, (self.q, self.k, self.v))
        lengths = q.shape[1], k.shape[1]
        self.peers["fa2"] = lambda: torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, *lengths, 0.0, self.causal, False
        )
        return self

    def flash_paged(self, key, value, table, lengths):
        if flash_attn_varlen_func:
            q, k, v = map(rows_first, (self.q, key, value))
            self.peers["fa4"] = lambda: flash_attn_varlen_func(
                q, k, v, page_table=table, seqused_k=lengths, causal=True
            )

    def cudnn(self, attn_mask=None, whole=False):
        """`whole`: without the mask of last rows, for which PyTorch has no cuDNN, and which hides
        little."""

        def call():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                functional.scaled_dot_product_attention(
                    self.q,
                    self.k,
                    self.v,
                    attn_mask,
                    is_causal=self.causal and not whole,
                    enable_gqa=self.heads != self.heads_kv,
                )

        self.peers["cudnn-whole" if whole else "cudnn"] = call
        return self

    def flex(self, score_mod=None, visible=None):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        batch, length, length_k = self.shape
        mask = visible and create_block_mask(visible, batch, None, length, length_k)
        self.peers["flex"] = lambda: compiled(self.q, self.k, self.v, score_mod, mask)
        return self

    def call(self, library):
        desc = dict(self.desc)
        if "window_left" in desc:
            desc["flags"] = WINDOW
        output = torch.empty_like(self.tensors["query"])
        return Call(library, Desc(**desc), {**self.tensors, "output": output})

    def run(self, library, count, graphs):
        calls = {"dlattn": self.call(library)}
        for name, peer in self.peers.items():
            if started(self.name, name, lambda peer=peer: peer):
                calls[name] = peer
        kernels = {"dlattn": calls["dlattn"].kernel}
        if graphs:
            calls = {name: recorded(call) for name, call in calls.items()}
        return self.rows(kernels, rounds(calls, count))

    def rows(self, kernels, times):
        """What the CSV has of each implementation; `kernels` of the library's by name."""
        batch, length, length_k = self.shape
        for name, (median, spread) in times.items():
            flops = 4 * self.heads * self.pairs * self.dim
            yield {
                "op": f"fwd+{self.name}",
                "dtype": "bf16",
                "B": batch,
                "Hq": self.heads,
                "Hkv": self.heads_kv,
                "Lq": length,
                "Lk": length_k,
                "D": self.dim,
                "Dv": self.dim,
                "causal": int(self.causal),
                "impl": name,
                "kernel": kernels.get(name, ""),
                "median_us": f"{median:.2f}",
                "spread_pct": f"{spread:.1f}",
                "tflops": f"{flops / median / 1e6:.1f}",
            }


# ---- Cases ---------------------------------------------------------------------------------------


def causal_rule(b, h, q, k):
    return q >= k


def plain(dim, flex):
    yield Case("none", dim, causal=1).dense().flash().cudnn()
    yield Case("none", dim).dense().flash().cudnn()
    yield Case("gqa", dim, heads=32, heads_kv=8, causal=1).dense().flash().cudnn()
    pairs = BATCH * (1025 * LENGTH - 1025 * 1024 // 2)
    yield (
        Case("window", dim, pairs=pairs, causal=1, window_left=1024, window_right=0)
        .dense()
        .flash(window_size=(1024, 0))
    )
    yield Case("softcap", dim, causal=1, softcap=30.0).dense().flash(softcap=30.0)
    case = Case("sinks", dim, causal=1).dense()
    sinks = torch.randn(HEADS, device="cuda")
    case.tensors["sinks"] = sinks
    yield case.flash(learnable_sink=sinks.to(torch.bfloat16))


def by_score(dim, flex):
    case = Case("alibi", dim, causal=1).dense()
    slopes = 2 ** (-8 * torch.arange(1, HEADS + 1, device="cuda") / HEADS)
    case.tensors["alibi_slopes"] = slopes
    if flex:
        case.flex(lambda s, b, h, q, k: s - slopes[h] * (q - k).abs(), causal_rule)
    yield case
    case = Case("bias", dim).dense()
    bias = normal(1, HEADS, LENGTH, LENGTH)
    case.tensors["bias"] = bias
    if flex:
        case.flex(lambda s, b, h, q, k: s + bias[0, h, q, k])
    yield case.cudnn(bias)
    case = Case("mask", dim).dense()
    mask = torch.rand(BATCH, 1, LENGTH, LENGTH, device="cuda") < 0.9
    case.tensors["mask"] = mask
    yield case.cudnn(mask)


def documents(dim, flex):
    """Nine documents in each sequence, as segments, and as a boolean mask."""
    number = (torch.arange(LENGTH, device="cuda", dtype=torch.int32) // 911).contiguous()
    lengths = torch.bincount(number).tolist()
    pairs = BATCH * sum(n * (n + 1) // 2 for n in lengths)
    case = Case("segments", dim, pairs=pairs, causal=1).dense()
    case.tensors["query_segments"] = case.tensors["key_segments"] = number.expand(
        BATCH, -1
    ).contiguous()
    if flex:
        case.flex(None, lambda b, h, q, k: (q >= k) & (number[q] == number[k]))
    yield case
    mask = (number[:, None] == number)[None, None]
    case = Case("document-mask", dim, pairs=pairs, causal=1).dense()
    case.tensors["mask"] = mask
    yield case


def packed_lengths():
    """Name and lengths, in random order, of what is packed."""
    for name, lengths in (
        ("packed-12", [200 + round(3800 * i / 11) for i in range(12)]),
        ("packed-64", [128 + round(896 * i / 63) for i in range(64)]),
    ):
        random.Random(1).shuffle(lengths)
        yield name, lengths


def planned(wrapper, layout, *numbers, **options):
    """A wrapper of FlashInfer's, by its kernels for Hopper, once it is planned."""
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    made = wrapper(workspace, layout, backend="fa3")
    made.plan(*numbers, causal=True, q_data_type=torch.bfloat16, **options)
    return made


def packed(dim, flex):
    cases = [(name, HEADS, HEADS, lengths) for name, lengths in packed_lengths()]
    cases.append(("packed-12-gqa", 32, 8, cases[0][3]))
    for name, heads, heads_kv, lengths in cases:
        total, longest = sum(lengths), max(lengths)
        case = Case(
            name, dim, heads_kv, heads, causal=1, max_seqlen_q=longest, max_seqlen_k=longest
        )
        case.pairs = sum(n * (n + 1) // 2 for n in lengths)
        case.shape = len(lengths), longest, longest
        q, k, v = (normal(total, n, dim) for n in (heads, heads_kv, heads_kv))
        ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        case.tensors = {"query": q, "key": k, "value": v}
        case.tensors["cu_seqlens_q"] = case.tensors["cu_seqlens_k"] = ends
        if flashinfer and dim == 128:
            ragged = planned(
                flashinfer.BatchPrefillWithRaggedKVCacheWrapper,
                "NHD",
                *(ends, ends, heads, heads_kv, dim),
            )
            case.peers["flashinfer"] = functools.partial(ragged.run, q, k, v)
        if flash_attn_varlen_func:
            case.peers["fa4"] = lambda q=q, k=k, v=v, ends=ends, longest=longest: (
                flash_attn_varlen_func(
                    q,
                    k,
                    v,
                    cu_seqlens_q=ends,
                    cu_seqlens_k=ends,
                    max_seqlen_q=longest,
                    max_seqlen_k=longest,
                    causal=True,
                )
            )
        yield case


def paged(dim, flex):
    """Pages in random order; FlashAttention 4 beside those that it takes."""
    cases = [(f"paged-{size}", size, HEADS, HEADS) for size in (1, 4, 8, 16, 64, 128, 256)]
    for name, size, heads, heads_kv in (*cases, ("paged-16-gqa", 16, 32, 8)):
        case = Case(name, dim, heads_kv, heads, causal=1).dense()
        pages = BATCH * LENGTH // size
        table = torch.randperm(pages, device="cuda").to(torch.int32).view(BATCH, -1)
        lengths = torch.full((BATCH,), LENGTH, device="cuda", dtype=torch.int32)
        key, value = (normal(pages, heads_kv, size, dim) for _ in range(2))
        case.tensors |= {"key": key, "value": value, "block_table": table, "key_lengths": lengths}
        case.flash_paged(key, value, table, lengths)
        if flashinfer and dim == 128:
            ends = torch.arange(BATCH + 1, device="cuda", dtype=torch.int32)
            pages_of = planned(
                flashinfer.BatchPrefillWithPagedKVCacheWrapper,
                "HND",
                *(ends * LENGTH, ends * (LENGTH // size), table.flatten()),
                *(torch.full((BATCH,), size, device="cuda", dtype=torch.int32), heads, heads_kv),
                *(dim, size),
            )
            rows = rows_first(case.q).reshape(-1, heads, dim)
            case.peers["flashinfer"] = functools.partial(pages_of.run, rows, (key, value))
        yield case


def chunked(dim, flex):
    """The last rows of a long sequence."""
    for rows in (4, 16, 64, 256, 1024):
        for length in (4096, 32768, 131072):
            case = Case("chunk", dim, heads=32, heads_kv=8, causal=1, alignment=1)
            case.pairs = rows * length - rows * (rows - 1) // 2
            yield case.dense(rows, length, 1).flash().older_flash().cudnn(whole=True)


def square(name, dim, shapes):
    for heads, length in shapes:
        for causal in (0, 1):
            case = Case(name, dim, heads=heads, heads_kv=heads, causal=causal)
            yield case.dense(length, batch=1).flash().older_flash().cudnn()


def half_empty(dim, flex):
    """Fewer tiles than an H100 has multiprocessors, or hardly more."""
    yield from square("half-empty", dim, ((2, 16384), (4, 4096), (8, 2048), (8, 1024)))


def short(dim, flex):
    """Calls of some ten microseconds."""
    shapes = ((8, 256), (8, 512), (16, 512), (32, 200), (12, 700), (4, 1024), (4, 2048), (2, 4096))
    yield from square("short", dim, shapes)


GROUPS = {
    f.__name__: f for f in (plain, by_score, documents, packed, paged, chunked, half_empty, short)
}


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--out")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--dims", default="128,64")
    options.add_argument("--only", default=",".join(GROUPS))
    options.add_argument("--no-flex", action="store_true")
    options.add_argument("--graphs", action="store_true")
    options = options.parse_args()
    library, common = common_columns()
    path = options.out or f"bench/results/{common['date']}-{common['device']}-options.csv"
    cases = (
        list(case.run(library, options.rounds, options.graphs))
        for dim in map(int, options.dims.split(","))
        for group in options.only.split(",")
        for case in GROUPS[group](dim, not options.no_flex)
    )
    write_cases(path, common, options.rounds, cases)


if __name__ == "__main__":
    main()
