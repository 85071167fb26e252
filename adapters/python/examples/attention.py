"""Causal self-attention of NumPy arrays.

    python adapters/python/examples/attention.py 2 4 9 64 <qkv.f32 >output.f32

The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
[batch, heads, length, head_dim] of float32; standard output gets the output in the same shape,
then the log-sum-exp of every row, [batch, heads, length].
"""

import sys

import dlattn
import numpy as np

shape = [int(word) for word in sys.argv[1:]]
query, key, value = np.frombuffer(sys.stdin.buffer.read(), np.float32).reshape(3, *shape)
lse = np.empty(shape[:3], np.float32)
output = dlattn.attention(query, key, value, causal=True, lse=lse)
sys.stdout.buffer.write(output.tobytes() + lse.tobytes())
