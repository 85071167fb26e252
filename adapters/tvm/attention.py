"""Causal self-attention through tvm-ffi.

    export DLATTN_TVM_LIBRARY=bazel-bin/adapters/tvm/libdlattn_tvm.so
    DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 \\
        python adapters/tvm/attention.py 2 4 9 64 <qkv.f32 >output.f32

The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
[batch, heads, length, head_dim] of float32; standard output gets the output in the same shape,
then the log-sum-exp of every row, [batch, heads, length].
"""

import os
import sys

import numpy as np
import tvm_ffi

shape = [int(word) for word in sys.argv[1:]]
query, key, value = np.frombuffer(bytearray(sys.stdin.buffer.read()), np.float32).reshape(3, *shape)
output, lse = np.empty(shape, np.float32), np.empty(shape[:3], np.float32)
dlattn = tvm_ffi.load_module(os.environ["DLATTN_TVM_LIBRARY"])
dlattn.dlattn_forward(query, key, value, "causal", True, output, lse)
sys.stdout.buffer.write(output.tobytes() + lse.tobytes())
