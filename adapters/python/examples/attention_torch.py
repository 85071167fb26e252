"""Causal self-attention of PyTorch's tensors.

    python adapters/python/examples/attention_torch.py 2 4 9 64 [cuda] <qkv.f32 >output.f32

The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
[batch, heads, length, head_dim] of float32; standard output gets the output in the same shape,
then the log-sum-exp of every row, [batch, heads, length]. With cuda it is computed on the current
GPU, in float16.
"""

import sys

import dlattn.torch
import torch

shape = [int(word) for word in sys.argv[1:5]]
qkv = torch.frombuffer(bytearray(sys.stdin.buffer.read()), dtype=torch.float32).view(3, *shape)
if sys.argv[5:] == ["cuda"]:
    qkv = qkv.to("cuda", torch.float16)
results = dlattn.torch.attention(*qkv, causal=True, return_lse=True)
for result in results:
    sys.stdout.buffer.write(result.float().cpu().numpy().tobytes())
