"""The reference row against an oracle: docs/numerics.md written in NumPy, in float64.

Nothing here knows how the plugin computes: features meet as they do in the formula.
"""

import ctypes
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "abi"))
from dlattn_ctypes import Api, Desc, DLTensor, Exec, Tensors

# ---- The plugin

WINDOW, EXACT_SCALE, EMPTY_LSE_INF = 1, 2, 4
# DLPack codes and bits by NumPy's names; u2 are the bits of bfloat16.
DTYPES = {"f8": (2, 64), "f4": (2, 32), "f2": (2, 16), "i4": (0, 32), "u1": (1, 8), "u2": (4, 16)}


def dl_tensor(array):
    strides = [s // array.itemsize for s in array.strides]
    numbers = ctypes.c_int64 * array.ndim
    code, bits = DTYPES[array.dtype.str[1:]]
    cpu = (ctypes.c_int32 * 2)(1, 0)
    return DLTensor(
        array.ctypes.data,
        cpu,
        array.ndim,
        code,
        bits,
        1,
        numbers(*array.shape),
        numbers(*strides),
        0,
    )


def forward(arrays, **options):
    """Runs the reference row; arrays by slot, strided as they are."""
    held = {slot: dl_tensor(array) for slot, array in arrays.items()}
    tensors = Tensors(**{slot: ctypes.pointer(t) for slot, t in held.items()})
    desc = Desc(kernel=b"cpu_fwd_ref", num_threads=1, **options)
    workspace = np.zeros(1 << 20, np.uint8)
    start = -workspace.ctypes.data % 64
    run = Exec(workspace=workspace.ctypes.data + start, workspace_bytes=workspace.size - start)
    api = Api(os.environ["DLATTN_LIBRARY"])
    api.check(api.forward(*map(ctypes.addressof, (desc, tensors, run))))


# ---- The oracle


def sequences(arrays):
    """Per batch entry: its query, key and value as [H, L, D], and the rows of a packed output."""
    q, k, v = arrays["query"], arrays["key"], arrays["value"]
    cu_q, cu_k, table = (
        arrays.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "block_table")
    )
    for b in range(len(cu_q) - 1 if cu_q is not None else len(q)):
        rows = slice(cu_q[b], cu_q[b + 1]) if cu_q is not None else None
        keys = slice(cu_k[b], cu_k[b + 1]) if cu_k is not None else None
        query = q[b] if rows is None else q[rows].transpose(1, 0, 2)
        if table is not None:
            used = -(-int(arrays["key_lengths"][b]) // k.shape[2])
            key, value = (
                np.concatenate([x[0][:, :0], *(x[p] for p in table[b, :used])], axis=1)
                for x in (k, v)
            )
        elif keys is not None:
            key, value = k[keys].transpose(1, 0, 2), v[keys].transpose(1, 0, 2)
        else:
            key, value = k[b], v[b]
        yield b, rows, query, key, value


def oracle(arrays, options):
    """Output and lse for every sequence: [(where, output [H, L, Dv], lse [H, L])]."""
    flags = options.get("flags", 0)
    results = []
    for b, rows, query, key, value in sequences(arrays):
        heads, length = query.shape[:2]
        key_count = (
            min(key.shape[1], int(arrays["key_lengths"][b]))
            if "key_lengths" in arrays
            else key.shape[1]
        )
        row_count = (
            min(length, int(arrays["query_lengths"][b])) if "query_lengths" in arrays else length
        )
        key, value = (
            np.repeat(x[:, :key_count], heads // x.shape[0], axis=0) for x in (key, value)
        )
        scale = options.get("scale", 0)
        if scale == 0 and not flags & EXACT_SCALE:
            scale = query.shape[2] ** -0.5
        score = scale * np.einsum("hid,hjd->hij", query, key)
        if options.get("softcap"):
            score = options["softcap"] * np.tanh(score / options["softcap"])
        i = np.arange(length)[:, None] + (key_count - row_count if options.get("alignment") else 0)
        j = np.arange(key_count)[None, :]
        seen = np.broadcast_to(
            np.arange(length)[:, None] < row_count, (heads, length, key_count)
        ).copy()
        if options.get("causal"):
            seen &= j <= i
        if flags & WINDOW and options["window_left"] >= 0:
            seen &= j >= i - options["window_left"]
        if flags & WINDOW and options["window_right"] >= 0:
            seen &= j <= i + options["window_right"]

        def extra(name, b=b, heads=heads, length=length, key_count=key_count):
            x = arrays[name]
            x = x[b if len(x) > 1 else 0]
            x = np.broadcast_to(
                x, (heads, *(w if n == 1 else n for n, w in zip(x.shape[1:], (length, key_count))))
            )
            return x[:, :length, :key_count]

        if "bias" in arrays:
            score = score + extra("bias")
        if "mask" in arrays:
            seen &= extra("mask") != 0
        if "alibi_slopes" in arrays:
            slopes = arrays["alibi_slopes"]
            score = score - (slopes[b] if slopes.ndim == 2 else slopes)[:, None, None] * np.abs(
                i - j
            )
        score = np.where(seen, score, -np.inf)
        sink = arrays["sinks"][:, None] if "sinks" in arrays else np.full((heads, 1), -np.inf)
        sink = np.where(np.arange(length)[None] < length, sink, -np.inf)
        most = np.maximum(score.max(axis=2, initial=-np.inf), sink)
        safe = np.where(np.isfinite(most), most, 0)
        weight = np.exp(score - safe[:, :, None])
        total = weight.sum(axis=2) + np.exp(sink - safe)
        output = (
            np.einsum("hij,hjd->hid", weight, value) / np.where(total == 0, 1, total)[:, :, None]
        )
        with np.errstate(divide="ignore"):
            lse = safe + np.log(total)
        if flags & EMPTY_LSE_INF:
            lse = np.where(total == 0, np.inf, lse)
        results.append((b, rows, output, lse))
    return results


# ---- Cases


def window(left, right, **more):
    return dict(flags=WINDOW, window_left=left, window_right=right, **more)


B, H, HKV, LQ, LK, D, DV = 3, 4, 2, 7, 11, 6, 5
PACKED_Q, PACKED_K = [0, 3, 3, 10], [0, 5, 9, 16]
BOTTOM = {"alignment": 1}

CASES = {
    "plain": ({}, ()),
    "scale": ({"scale": 0.7}, ()),
    "scale_zero": ({"flags": EXACT_SCALE}, ()),
    "causal": ({"causal": 1}, ()),
    "causal_bottom": ({"causal": 1, **BOTTOM}, ()),
    "window": (window(2, 1), ()),
    "window_bottom": (window(3, 0, **BOTTOM), ()),
    "window_left": (window(1, -1), ()),
    "window_right": (window(-1, 2, causal=0), ()),
    "window_causal": (window(2, 5, causal=1), ()),
    "window_none_seen": (window(0, 0, **BOTTOM), ("lengths",)),
    "softcap": ({"softcap": 1.5}, ()),
    "softcap_bias": ({"softcap": 1.5, "causal": 1}, ("bias",)),
    "bias": ({}, ("bias",)),
    "bias_keys": ({}, ("bias_keys",)),
    "bias_heads": ({}, ("bias_heads",)),
    "bias_holes": ({}, ("bias", "bias_holes")),
    "mask": ({}, ("mask",)),
    "mask_keys": ({}, ("mask_keys",)),
    "mask_rows": ({}, ("mask", "mask_rows")),
    "mask_rows_inf": ({"flags": EMPTY_LSE_INF}, ("mask", "mask_rows")),
    "alibi": ({}, ("alibi",)),
    "alibi_batch_bottom": (BOTTOM, ("alibi_batch",)),
    "sinks": ({}, ("sinks",)),
    "sinks_mask_rows": ({}, ("sinks", "mask", "mask_rows")),
    "lengths": ({}, ("lengths",)),
    "lengths_causal_bottom": ({"causal": 1, **BOTTOM}, ("lengths",)),
    "varlen": ({}, ("varlen_q", "varlen_k")),
    "varlen_causal_bottom": ({"causal": 1, **BOTTOM}, ("varlen_q", "varlen_k")),
    "varlen_lengths_alibi": (BOTTOM, ("varlen_q", "varlen_k", "lengths", "alibi")),
    "paged": ({}, ("paged",)),
    "paged_varlen_causal": ({"causal": 1, **BOTTOM}, ("paged", "varlen_q")),
    "everything": (
        window(6, 3, causal=1, softcap=4.0, scale=0.5, **BOTTOM),
        ("bias", "mask", "alibi", "sinks", "lengths"),
    ),
    "transposed": ({"causal": 1}, ("transposed",)),
    "no_keys": ({}, ("no_keys",)),
    "no_keys_sinks": ({}, ("no_keys", "sinks")),
}


def make_arrays(parts, rng):
    """Random tensors in float64, integers and f32 extras as the ABI wants them."""
    lk = 0 if "no_keys" in parts else LK
    page = 4
    q_shape, o_shape = (B, H, LQ), (B, H, LQ)
    kv_shape = (B, HKV, lk)
    arrays = {}
    if "varlen_q" in parts:
        arrays["cu_seqlens_q"] = np.array(PACKED_Q, np.int32)
        q_shape = o_shape = (PACKED_Q[-1], H)
    if "varlen_k" in parts:
        arrays["cu_seqlens_k"] = np.array(PACKED_K, np.int32)
        kv_shape = (PACKED_K[-1], HKV)
    if "paged" in parts:
        kv_shape = (10, HKV, page)
        arrays["block_table"] = rng.permutation(10)[:9].reshape(3, 3).astype(np.int32)
        arrays["key_lengths"] = np.array([9, 0, 12], np.int32)
    arrays["query"], arrays["key"] = rng.normal(size=(*q_shape, D)), rng.normal(size=(*kv_shape, D))
    arrays["value"], arrays["output"] = (
        rng.normal(size=(*kv_shape, DV)),
        np.full((*o_shape, DV), 777.0),
    )
    arrays["lse"] = np.full((H, PACKED_Q[-1]) if "varlen_q" in parts else o_shape, 777.0)
    if "transposed" in parts:
        for name in ("query", "key", "value", "output"):
            arrays[name] = np.ascontiguousarray(arrays[name].transpose(0, 2, 1, 3)).transpose(
                0, 2, 1, 3
            )
    if "lengths" in parts:
        arrays["query_lengths"] = np.array([LQ, 2, 0], np.int32)
        arrays["key_lengths"] = np.array([4, 0, LK], np.int32)
    if "bias" in parts:
        arrays["bias"] = rng.normal(size=(B, H, LQ, lk))
    if "bias_holes" in parts:
        arrays["bias"][rng.random(arrays["bias"].shape) < 0.3] = -np.inf
    if "bias_keys" in parts:
        arrays["bias"] = rng.normal(size=(1, 1, 1, lk)).astype(np.float32)
    if "bias_heads" in parts:
        arrays["bias"] = rng.normal(size=(1, H, LQ, 1))
    if "mask" in parts:
        arrays["mask"] = (rng.random((B, 1, LQ, lk)) < 0.6).astype(np.uint8) * 3
    if "mask_rows" in parts:
        arrays["mask"][:, :, ::3] = 0
    if "mask_keys" in parts:
        arrays["mask"] = (rng.random((B, 1, 1, lk)) < 0.6).astype(np.uint8)
    if "alibi" in parts:
        arrays["alibi_slopes"] = rng.random(H).astype(np.float32)
    if "alibi_batch" in parts:
        arrays["alibi_slopes"] = rng.random((B, H)).astype(np.float32)
    if "sinks" in parts:
        arrays["sinks"] = rng.normal(size=H).astype(np.float32)
    return arrays


def compare(arrays, expected, tolerance):
    for b, rows, output, lse in expected:
        got = arrays["output"][b] if rows is None else arrays["output"][rows].transpose(1, 0, 2)
        got_lse = arrays["lse"][b] if rows is None else arrays["lse"][:, rows]
        np.testing.assert_allclose(got, output, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(got_lse, lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_oracle(name):
    options, parts = CASES[name]
    arrays = make_arrays(parts, np.random.default_rng(zlib.crc32(name.encode())))
    forward(arrays, **options)
    compare(arrays, oracle(arrays, options), 1e-12)


def to_bfloat16(x):
    """The bits, rounded to nearest even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


NARROW = {  # to the type, back from it, a unit in the last place of 1
    "float32": (lambda x: x.astype(np.float32), lambda x: x, 2.0**-23),
    "float16": (lambda x: x.astype(np.float16), lambda x: x, 2.0**-10),
    "bfloat16": (to_bfloat16, from_bfloat16, 2.0**-7),
}


@pytest.mark.parametrize("name", NARROW)
def test_narrow_types(name):
    """Each element type is read and rounded as IEEE 754 says: half a unit is all it may be off."""
    to, back, unit = NARROW[name]
    arrays = make_arrays((), np.random.default_rng(5))
    narrow = {slot: to(array) for slot, array in arrays.items() if slot != "lse"}
    narrow["lse"] = arrays["lse"].astype(np.float32)
    forward(narrow, causal=1)
    exact = {
        slot: back(array).astype(np.float64) for slot, array in narrow.items() if slot != "lse"
    }
    exact["lse"] = narrow["lse"]
    for b, _, output, lse in oracle(exact, {"causal": 1}):
        np.testing.assert_allclose(exact["output"][b], output, rtol=unit * 0.5001, atol=1e-12)
        np.testing.assert_allclose(narrow["lse"][b], lse, rtol=2.0**-23, atol=1e-7)
