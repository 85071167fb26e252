"""The reference rows against an oracle: docs/numerics.md in NumPy and float64 (formula.py)."""

import zlib

import numpy as np
import plugin
import pytest
from formula import forward as oracle
from plugin import EMPTY_LSE_INF, EXACT_SCALE, WINDOW, forward

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
    "offset": ({"causal": 1, "diagonal_offset": 3}, ()),
    "offset_back": (window(4, 2, diagonal_offset=-5, **BOTTOM), ("lengths", "alibi")),
    "segments": ({}, ("segments",)),
    "segments_causal": ({"causal": 1}, ("segments", "mask")),
    "segments_varlen": (BOTTOM, ("varlen_q", "varlen_k", "segments")),
    "segments_paged": ({}, ("paged", "segments")),
    "block_mask": ({"block_q": 2, "block_k": 4}, ("block_mask",)),
    "block_mask_mask": ({"block_q": 3, "block_k": 2, "causal": 1}, ("block_mask", "mask")),
    "block_mask_heads": ({"block_q": 8, "block_k": 3}, ("block_mask_heads", "mask")),
    "dropout": ({"dropout_probability": 0.3, "dropout_seed": 7}, ()),
    "dropout_offset": (
        {"dropout_probability": 0.6, "dropout_seed": 1 << 40 | 5, "dropout_offset": 1 << 35 | 9},
        ("sinks", "mask", "mask_rows"),
    ),
    "dropout_varlen": ({"dropout_probability": 0.5, "causal": 1}, ("varlen_q", "varlen_k")),
    "scales": ({}, ("scales",)),
    "scales_heads": ({"softcap": 2.0}, ("scales_heads",)),
    "scales_paged": ({}, ("paged", "scales_heads")),
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
    add_of_1_1(arrays, parts, rng)
    return arrays


def add_of_1_1(arrays, parts, rng):
    """Segments, block masks and scales."""
    packed_q, packed_k, paged = (x in parts for x in ("varlen_q", "varlen_k", "paged"))
    keys = 12 if paged else LK
    if "segments" in parts:
        q_shape = (PACKED_Q[-1],) if packed_q else (B, LQ)
        k_shape = (PACKED_K[-1],) if packed_k else (B, keys)
        arrays["query_segments"] = np.sort(rng.integers(0, 3, q_shape)).astype(np.int32)
        arrays["key_segments"] = np.sort(rng.integers(0, 3, k_shape)).astype(np.int32)
    if "block_mask" in parts:
        blocks = CASES["block_mask_mask" if "mask" in parts else "block_mask"][0]
        shape = (B, 1, -(-LQ // blocks["block_q"]), -(-LK // blocks["block_k"]))
        arrays["block_mask"] = rng.integers(0, 3, shape).astype(np.uint8)
    if "block_mask_heads" in parts:
        arrays["block_mask"] = rng.integers(0, 3, (1, H, 1, 4)).astype(np.uint8)
    if "scales" in parts:
        for name in ("query_scale", "key_scale", "value_scale"):
            arrays[name] = rng.uniform(0.5, 2, 1).astype(np.float32)
    if "scales_heads" in parts:
        entries = 10 if paged else B
        arrays["query_scale"] = rng.uniform(0.5, 2, (B, H)).astype(np.float32)
        arrays["key_scale"] = rng.uniform(0.5, 2, (entries, HKV)).astype(np.float32)
        arrays["value_scale"] = rng.uniform(0.5, 2, (entries, 1)).astype(np.float32)


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


# ---- Float8: every number of both formats, from the definition in arXiv:2209.05433


def float8(code, exponent_bits, mantissa_bits):
    """What the byte is; None: infinity or NaN."""
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1 if code & 0x80 else 1
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (2**mantissa_bits - 1)
    if (exponent_bits == 5 and exponent == 31) or (exponent_bits == 4 and code & 0x7F == 0x7F):
        return None
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (2**mantissa_bits + mantissa) * 2.0 ** (exponent - bias - mantissa_bits)


FORMATS = {"e4m3": (4, 3), "e5m2": (5, 2)}


@pytest.mark.parametrize("name", FORMATS)
def test_every_float8(name):
    """One key with weight 1 whose value is each finite number."""
    codes = np.array([c for c in range(256) if float8(c, *FORMATS[name]) is not None], np.uint8)
    arrays = {
        "query": np.zeros((1, 1, 1, 1)),
        "key": np.zeros((1, 1, 1, 1)),
        "value": codes.reshape(1, 1, 1, -1).copy(),
        "output": np.zeros((1, 1, 1, len(codes))),
    }
    forward(arrays, value_dtype=plugin.FLOAT8[name])
    wanted = [float8(int(c), *FORMATS[name]) for c in codes]
    np.testing.assert_array_equal(arrays["output"].ravel(), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_float8_with_scales(name):
    rng = np.random.default_rng(3)
    codes = {
        s: rng.integers(0, 0x70, (2, 4 if s == "query" else 2, 5, 8)).astype(np.uint8)
        for s in ("query", "key", "value")
    }
    scales = {
        f"{s}_scale": rng.uniform(0.01, 0.02, (2, 4 if s == "query" else 1)).astype(np.float32)
        for s in codes
    }
    wide = {
        s: np.vectorize(lambda c: float8(int(c), *FORMATS[name]))(x).astype(float)
        for s, x in codes.items()
    }
    results = {"output": np.zeros((2, 4, 5, 8)), "lse": np.zeros((2, 4, 5))}
    held = {f"{s}_dtype": plugin.FLOAT8[name] for s in codes}
    forward({**codes, **scales, **results}, causal=1, **held)
    compare(results, oracle({**wide, **scales}, {"causal": 1}), 1e-12)
