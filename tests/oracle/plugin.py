"""Rows of the plugin on NumPy arrays, through the C ABI; the reference unless another is named."""

import ctypes
import os
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "abi"))
from dlattn_ctypes import (
    Api,
    AppendTensors,
    Desc,
    DLDataType,
    DLTensor,
    Exec,
    Gradients,
    Partials,
    Tensors,
)

WINDOW, EXACT_SCALE, EMPTY_LSE_INF = 1, 2, 4
FLOAT8 = {"e4m3": DLDataType(10, 8, 1), "e5m2": DLDataType(12, 8, 1)}
# DLPack codes and bits by NumPy's names; u2 are the bits of bfloat16.
DTYPES = {"f8": (2, 64), "f4": (2, 32), "f2": (2, 16), "i4": (0, 32), "u1": (1, 8), "u2": (4, 16)}


def dl_tensor(array):
    strides = [s // array.itemsize for s in array.strides]
    numbers = ctypes.c_int64 * array.ndim
    code, bits = DTYPES[array.dtype.str[1:]]
    cpu = (ctypes.c_int32 * 2)(1, 0)
    shape = numbers(*array.shape)
    return DLTensor(array.ctypes.data, cpu, array.ndim, code, bits, 1, shape, numbers(*strides), 0)


def pointers(arrays):
    return {slot: ctypes.pointer(dl_tensor(array)) for slot, array in arrays.items()}


def call(function, *structs, threads=1):
    """Runs one function of the table with these structs and a workspace."""
    api = Api(os.environ["DLATTN_LIBRARY"])
    workspace = np.zeros(1 << 20, np.uint8)
    start = -workspace.ctypes.data % 64
    run = Exec(workspace=workspace.ctypes.data + start, workspace_bytes=workspace.size - start)
    api.check(getattr(api, function)(*map(ctypes.addressof, (*structs, run))))


def forward(arrays, kernel=b"cpu_fwd_ref", **options):
    """Arrays by slot, strided as they are; output and lse are written."""
    call("forward", Desc(kernel=kernel, num_threads=1, **options), Tensors(**pointers(arrays)))


def backward(arrays, gradients, threads=1, kernel=b"cpu_bwd_ref", **options):
    """Gradients by slot; those that begin with d_ and belong to an input are written."""
    desc = Desc(kernel=kernel, num_threads=threads, **options)
    call("backward", desc, Tensors(**pointers(arrays)), Gradients(**pointers(gradients)))


def merge(outputs, lses, output, lse):
    tensors = [pointers(dict(enumerate(parts))) for parts in (outputs, lses)]
    lists = [(type(t[0]) * len(t))(*t.values()) for t in tensors]
    whole = pointers({"output": output, "lse": lse})
    call("merge", Partials(count=len(outputs), outputs=lists[0], lses=lists[1], **whole))


def append(arrays, **dtypes):
    call("append", AppendTensors(**pointers(arrays), **dtypes))
