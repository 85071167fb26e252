"""dlattn.h for Python programs that do without the package: its structs, its table of functions.

Names and order are the header's, whose lists of tensors are read here. What pointers point to stays
the caller's to keep.
"""

import ctypes
import re
from pathlib import Path

HEADER = Path(__file__).with_name("dlattn.h").read_text()


def slots(name):
    """The tensors of one list of the header, DLATTN_TENSOR_LIST and the like."""
    (body,) = re.findall(rf"#define {name}\(SLOT, T\)((?:.*\\\n)*.*)", HEADER)
    return re.findall(r"SLOT\(T, (\w+)\)", body)


SLOTS = slots("DLATTN_TENSOR_LIST")
GRADIENTS = slots("DLATTN_GRADIENT_LIST")
APPEND = slots("DLATTN_APPEND_LIST")


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Sized(ctypes.Structure):
    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


def tensor_fields(names):
    return [("struct_size", ctypes.c_size_t)] + [(name, ctypes.POINTER(DLTensor)) for name in names]


class Tensors(Sized):
    _fields_ = tensor_fields(SLOTS)


class Gradients(Sized):
    _fields_ = tensor_fields(GRADIENTS)


class Partials(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("count", ctypes.c_int64),
        ("outputs", ctypes.POINTER(ctypes.POINTER(DLTensor))),
        ("lses", ctypes.POINTER(ctypes.POINTER(DLTensor))),
        ("output", ctypes.POINTER(DLTensor)),
        ("lse", ctypes.POINTER(DLTensor)),
    ]


class DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class AppendTensors(Sized):
    _fields_ = [
        *tensor_fields(APPEND),
        ("key_cache_dtype", DLDataType),
        ("value_cache_dtype", DLDataType),
    ]


class Desc(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("flags", ctypes.c_uint64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("causal", ctypes.c_int32),
        ("alignment", ctypes.c_int32),
        ("max_seqlen_q", ctypes.c_int64),
        ("max_seqlen_k", ctypes.c_int64),
        ("kernel", ctypes.c_char_p),
        ("num_threads", ctypes.c_int32),
        ("reserved0", ctypes.c_int32),
        ("dropout_probability", ctypes.c_double),
        ("dropout_seed", ctypes.c_uint64),
        ("dropout_offset", ctypes.c_uint64),
        ("diagonal_offset", ctypes.c_int64),
        ("block_q", ctypes.c_int32),
        ("block_k", ctypes.c_int32),
        ("query_dtype", DLDataType),
        ("key_dtype", DLDataType),
        ("value_dtype", DLDataType),
        ("reserved1", ctypes.c_int32),
    ]


class Exec(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("flags", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("parallel_for", ctypes.c_void_p),
        ("parallel_ctx", ctypes.c_void_p),
    ]


class Sku(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("kernel", ctypes.c_char_p),
        ("backend", ctypes.c_char_p),
        ("arch", ctypes.c_char_p),
        ("math", ctypes.c_char_p),
        ("accumulator", ctypes.c_char_p),
        ("features", ctypes.c_uint64),
        ("workspace_bytes", ctypes.c_size_t),
        ("workspace_alignment", ctypes.c_size_t),
        ("numbers", ctypes.c_int32 * 8),
        ("operation", ctypes.c_char_p),
        ("flags", ctypes.c_uint64),
    ]


# The functions of the table, in its order, behind struct_size and the two versions: how many
# arguments each takes.
TABLE = HEADER[HEADER.index("typedef struct dlattn_api {") : HEADER.index("} dlattn_api;")]
FUNCTIONS = {
    name: 0 if parameters == "void" else parameters.count(",") + 1
    for name, parameters in re.findall(r"\(\*(\w+)\)\(([^)]*)\)", TABLE)
}


class Api:
    """The functions of the table; each takes addresses. check() raises what a status says."""

    def __init__(self, path):
        library = ctypes.CDLL(path)
        library.dlattn_get_api.restype = ctypes.c_void_p
        slots = (ctypes.c_void_p * len(FUNCTIONS)).from_address(library.dlattn_get_api(1) + 16)
        for (name, count), slot in zip(FUNCTIONS.items(), slots):
            result = ctypes.c_char_p if name in ("version", "last_error") else ctypes.c_int32
            arguments = [ctypes.c_void_p] * count
            setattr(self, name, ctypes.CFUNCTYPE(result, *arguments)(slot))
        self.query = self.forward_query

    def check(self, status):
        if status:
            raise RuntimeError(self.last_error().decode())
