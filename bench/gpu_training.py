"""Gradients of what people train with on the GPU: packed sequences and grouped heads, beside what
else has them, in one process.

    DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 python3 bench/gpu_training.py
        [--out FILE.csv] [--dims 64,128,256] [--rounds N]

bf16, causal but where a line says otherwise; timing as in gpu_bench.py. Packed sequences have 16
heads and the lengths of gpu_options.py, grouped heads are 32 over 8 in 16k tokens of length 4096.
Peers are FlashAttention 2 and cuDNN of PyTorch and FlashAttention 4, each where it is installed and
takes the case. FLOPs count what is visible.
"""

import argparse
import functools

import torch
import torch.nn.functional as functional
from gpu_bench import PEERS, Call, Desc, common_columns, rounds, started, write_cases
from gpu_options import HEADS, normal, packed_lengths, rows_first
from torch.nn.attention import sdpa_kernel

try:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
except ImportError:
    _flash_attn_bwd = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


class Case:
    """Query, key, value and d_output as the plugin takes them, and the peers' gradients of them.
    `pairs`: visible rows times keys of one head, in all sequences."""

    def __init__(self, name, inputs, d_output, pairs, **desc):
        self.name, self.inputs, self.d_output, self.pairs = name, inputs, d_output, pairs
        self.desc, self.integers, self.peers = desc, {}, {}

    def autograd(self, name, forward):
        """A peer by PyTorch's autograd; forward(query, key, value)."""
        inputs = [t.detach().requires_grad_() for t in self.inputs]

        def make():
            output = forward(*inputs)
            return functools.partial(
                torch.autograd.grad, output, inputs, self.d_output, retain_graph=True
            )

        self.peers[name] = make

    def flash_attention_4(self, rows_of, **options):
        """Its default mode; rows_of(tensor) as it wants them."""
        if not _flash_attn_bwd:
            return

        def make():
            q, k, v, d_output = map(rows_of, (*self.inputs, self.d_output))
            output, lse = _flash_attn_fwd(q, k, v, return_lse=True, **options)[:2]
            return functools.partial(_flash_attn_bwd, q, k, v, output, d_output, lse, **options)

        self.peers["fa4"] = make

    def dlattn(self, library):
        tensors = dict(zip(("query", "key", "value"), self.inputs, strict=True)) | self.integers
        tensors["output"] = torch.empty_like(self.d_output)
        rows = self.d_output
        shape = rows.shape[:3] if rows.dim() == 4 else (rows.shape[1], rows.shape[0])
        tensors["lse"] = torch.empty(shape, device="cuda")
        Call(library, Desc(**self.desc), tensors)()
        gradients = {"d_output": self.d_output}
        gradients |= {f"d_{n}": torch.empty_like(tensors[n]) for n in ("query", "key", "value")}
        return Call(library, Desc(**self.desc), tensors, gradients)

    def run(self, library, count):
        calls = {"dlattn": self.dlattn(library)}
        for name, make in self.peers.items():
            peer = started(self.name, name, make)
            if peer:
                calls[name] = peer
        query, key, value = self.inputs
        heads, dim = query.shape[1], query.shape[-1]
        flops = 2 * heads * self.pairs * (3 * dim + 2 * value.shape[-1])
        for name, (median, spread) in rounds(calls, count).items():
            yield {
                "op": f"bwd+{self.name}",
                "dtype": "bf16",
                "B": query.shape[0] if query.dim() == 4 else self.batch,
                "Hq": heads,
                "Hkv": key.shape[1],
                "Lq": query.shape[2] if query.dim() == 4 else self.desc["max_seqlen_q"],
                "Lk": key.shape[2] if key.dim() == 4 else self.desc["max_seqlen_k"],
                "D": dim,
                "Dv": value.shape[-1],
                "causal": int(bool(self.desc.get("causal"))),
                "impl": name,
                "kernel": calls[name].kernel if name == "dlattn" else "",
                "median_us": f"{median:.2f}",
                "spread_pct": f"{spread:.1f}",
                "tflops": f"{flops / median / 1e6:.1f}",
            }


def packed(dim):
    for name, lengths in packed_lengths():
        total, longest = sum(lengths), max(lengths)
        q, k, v, d_output = (normal(total, HEADS, dim) for _ in range(4))
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        most = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        case = Case(name, (q, k, v), d_output, pairs, causal=1, **most)
        case.batch = len(lengths)
        ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        case.integers = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        case.flash_attention_4(lambda t: t, causal=True, **case.integers, **most)
        if varlen_attn:
            case.autograd(
                "fa2",
                lambda q, k, v, ends=ends, longest=longest: varlen_attn(
                    q, k, v, ends, ends, longest, longest, window_size=(-1, 0)
                ),
            )
        yield case


def grouped(dim):
    batch, length = 4, 4096
    for causal in (True, False):
        q, d_output = (rows_first(normal(batch, length, 32, dim)) for _ in range(2))
        k, v = (rows_first(normal(batch, length, 8, dim)) for _ in range(2))
        pairs = batch * (length * (length + 1) // 2 if causal else length * length)
        case = Case("gqa", (q, k, v), d_output, pairs, causal=int(causal))
        case.flash_attention_4(rows_first, causal=causal)
        for name in ("fa2", "cudnn"):

            def forward(q, k, v, backend=PEERS[name], causal=causal):
                with sdpa_kernel(backend):
                    return functional.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, enable_gqa=True
                    )

            case.autograd(name, forward)
        yield case


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--out")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--dims", default="64,128,256")
    options = options.parse_args()
    library, common = common_columns()
    path = options.out or f"bench/results/{common['date']}-{common['device']}-training.csv"
    cases = (
        list(case.run(library, options.rounds))
        for dim in map(int, options.dims.split(","))
        for case in (*packed(dim), *grouped(dim))
    )
    write_cases(path, common, options.rounds, cases)


if __name__ == "__main__":
    main()
