"""Causal self-attention in JAX, compiled.

    python adapters/python/examples/attention_jax.py 2 4 9 64 [cuda] <qkv.f32 >output.f32

The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
[batch, heads, length, head_dim] of float32; standard output gets the output in the same shape,
then the log-sum-exp of every row, [batch, heads, length]. With cuda it is computed on the first
GPU, in float16.
"""

import sys
from functools import partial

import dlattn.jax
import jax
import numpy as np

shape = [int(word) for word in sys.argv[1:5]]
device, dtype = ("cuda", "float16") if sys.argv[5:] == ["cuda"] else ("cpu", "float32")
qkv = np.frombuffer(sys.stdin.buffer.read(), np.float32).reshape(3, *shape).astype(dtype)
qkv = jax.device_put(list(qkv), jax.devices(device)[0])
attention = jax.jit(partial(dlattn.jax.attention, causal=True, return_lse=True))
for result in attention(*qkv):
    sys.stdout.buffer.write(np.asarray(result, np.float32).tobytes())
