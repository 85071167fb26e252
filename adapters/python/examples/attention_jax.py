"""Causal self-attention in JAX, compiled.

    python adapters/python/examples/attention_jax.py 2 4 9 64 <qkv.f32 >output.f32

The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
[batch, heads, length, head_dim] of float32; standard output gets the output in the same shape,
then the log-sum-exp of every row, [batch, heads, length].
"""

import sys
from functools import partial

import dlattn.jax
import jax
import numpy as np

shape = [int(word) for word in sys.argv[1:]]
query, key, value = np.frombuffer(sys.stdin.buffer.read(), np.float32).reshape(3, *shape)
attention = jax.jit(partial(dlattn.jax.attention, causal=True, return_lse=True))
output, lse = attention(query, key, value)
sys.stdout.buffer.write(np.asarray(output).tobytes() + np.asarray(lse).tobytes())
