"""Causal self-attention through tvm-ffi.

    export DLATTN_TVM_LIBRARY=bazel-bin/adapters/tvm/libdlattn_tvm.so
    DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 \\
        python adapters/tvm/attention.py 2 4 9 64 [cuda] <qkv.f32 >output.f32

The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
[batch, heads, length, head_dim] of float32; standard output gets the output in the same shape,
then the log-sum-exp of every row, [batch, heads, length]. With cuda it is computed on the current
GPU, in float16, the tensors being PyTorch's.
"""

import os
import sys

import numpy as np
import tvm_ffi

dlattn = tvm_ffi.load_module(os.environ["DLATTN_TVM_LIBRARY"])
shape = [int(word) for word in sys.argv[1:5]]
qkv = np.frombuffer(bytearray(sys.stdin.buffer.read()), np.float32).reshape(3, *shape)
output, lse = np.empty(shape, np.float32), np.empty(shape[:3], np.float32)
if sys.argv[5:] == ["cuda"]:
    import torch

    qkv = torch.from_numpy(qkv).to("cuda", torch.float16)
    output, lse = torch.empty_like(qkv[0]), torch.from_numpy(lse).cuda()
dlattn.dlattn_forward(*qkv, "causal", True, output, lse)
if sys.argv[5:] == ["cuda"]:
    output, lse = output.float().cpu().numpy(), lse.cpu().numpy()
sys.stdout.buffer.write(output.tobytes() + lse.tobytes())
