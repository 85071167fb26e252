"""dlattn.h for Python programs that do without the package: its structs, its table of functions.

Names and order are those of the header. What pointers point to stays the caller's to keep.
"""

import ctypes

SLOTS = [
    "query",
    "key",
    "value",
    "output",
    "lse",
    "bias",
    "mask",
    "alibi_slopes",
    "sinks",
    "query_lengths",
    "key_lengths",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "block_table",
]


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


class Tensors(Sized):
    _fields_ = [("struct_size", ctypes.c_size_t)] + [
        (name, ctypes.POINTER(DLTensor)) for name in SLOTS
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
    ]


class Api:
    """The functions of the table; each takes addresses. check() raises what a status says."""

    def __init__(self, path):
        library = ctypes.CDLL(path)
        library.dlattn_get_api.restype = ctypes.c_void_p
        slots = (ctypes.c_void_p * 12).from_address(library.dlattn_get_api(1) + 16)
        self.last_error = ctypes.CFUNCTYPE(ctypes.c_char_p)(slots[1])
        three = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self.query, self.forward, self.plan_create, self.plan_run = (
            three(slots[i]) for i in (3, 4, 7, 11)
        )

    def check(self, status):
        if status:
            raise RuntimeError(self.last_error().decode())
