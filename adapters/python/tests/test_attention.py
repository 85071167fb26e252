"""dlattn.attention on NumPy arrays: every option against float64, every refusal."""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import dlattn
import numpy as np
import pytest
import reference

TOLERANCE = {np.float64: 1e-12, np.float32: 2e-6, np.float16: 2e-3}


def make(batch=2, heads=4, heads_kv=2, rows=7, keys=9, dim=16, dim_v=16, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    shapes = (batch, heads, rows, dim), (batch, heads_kv, keys, dim), (batch, heads_kv, keys, dim_v)
    return tuple(random.standard_normal(shape).astype(dtype) for shape in shapes)


def check(query, key, value, **options):
    """Compares output and lse with the reference."""
    lse = np.full(query.shape[:3], np.nan, np.float32)
    output = dlattn.attention(query, key, value, lse=lse, **options)
    expected, expected_lse = reference.attention(query, key, value, **options)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE[query.dtype.type])
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=2e-6)
    assert output.dtype == query.dtype
    assert output.shape == (*query.shape[:3], value.shape[3])


random = np.random.default_rng(1)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal_bottom_right": {"causal": True, "alignment": "bottom_right"},
    "scale": {"scale": 0.3},
    "scale_zero": {"scale": 0.0},
    "softcap": {"softcap": 0.7},
    "window": {"window": (3, 1)},
    "window_left": {"window": (2, None), "alignment": "bottom_right"},
    "bias": {"bias": random.standard_normal((2, 4, 7, 9)).astype(np.float32)},
    "bias_broadcast": {"bias": random.standard_normal((1, 4, 1, 9)).astype(np.float32)},
    "mask": {"mask": random.random((2, 1, 7, 9)) < 0.5},
    "mask_empty_rows": {"mask": np.arange(7)[None, None, :, None] > 2},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0], np.float32), "causal": True},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0], np.float32)},
    "key_lengths": {"key_lengths": np.array([9, 4], np.int32)},
    "query_lengths": {"query_lengths": np.array([0, 5], np.int32)},
    "lengths_bottom_right": {
        "query_lengths": np.array([3, 7], np.int32),
        "key_lengths": np.array([9, 8], np.int32),
        "causal": True,
        "alignment": "bottom_right",
    },
    "all": {
        "bias": random.standard_normal((1, 1, 7, 9)).astype(np.float32),
        "mask": random.random((2, 4, 7, 9)) < 0.7,
        "sinks": np.array([0.5, -1.0, 2.0, 0.0], np.float32),
        "window": (4, 2),
        "softcap": 1.5,
        "scale": 0.5,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option(options):
    check(*make(), **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (24, 40), (128, 96)])
def test_dtype_and_head_dim(dtype, dims):
    check(*make(dim=dims[0], dim_v=dims[1], dtype=dtype), causal=True)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_grouped_query(heads_kv):
    check(*make(heads_kv=heads_kv))


def test_decode():
    check(*make(rows=1, keys=300), causal=True, alignment="bottom_right")


def test_no_keys():
    check(*make(keys=0))


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (2, 1, 0, 3), (0, 1, 3, 2)])
def test_strides(axes):
    """Transposed and sliced views are read in place, and an output view is written in place."""
    inverse = np.argsort(axes)
    query, key, value = (np.ascontiguousarray(x.transpose(axes)).transpose(inverse) for x in make())
    whole = np.full((2, 4, 9, 20), np.nan, np.float32)
    out = whole[:, :, 1:8, 2:18]
    assert dlattn.attention(query, key, value, out=out) is out
    np.testing.assert_allclose(out, reference.attention(query, key, value)[0], atol=2e-6)
    out[:] = np.nan
    assert np.isnan(whole).all(), "elements outside of the view were written"


def test_varlen():
    query, key, value = (x[0].swapaxes(0, 1) for x in make(batch=1, rows=12, keys=12))
    begins = np.array([0, 5, 5, 12], np.int32)
    lse = np.empty((4, 12), np.float32)
    output = dlattn.attention(
        query,
        key,
        value,
        causal=True,
        lse=lse,
        cu_seqlens_q=begins,
        cu_seqlens_k=begins,
        max_seqlen_q=7,
        max_seqlen_k=7,
    )
    for begin, end in ((0, 5), (5, 12)):
        parts = (x[begin:end].swapaxes(0, 1)[None] for x in (query, key, value))
        expected, expected_lse = reference.attention(*parts, causal=True)
        np.testing.assert_allclose(output[begin:end].swapaxes(0, 1)[None], expected, atol=2e-6)
        np.testing.assert_allclose(lse[None, :, begin:end], expected_lse, rtol=1e-5)


def test_paged():
    query, key, value = make(rows=1, keys=16)
    lengths = np.array([16, 5], np.int32)
    pages = np.array(
        [[3, 0], [2, -1]], np.int32
    )  # the second page of the second sequence is never read
    keys = np.full((4, 2, 8, 16), np.nan, np.float32)
    values = keys.copy()
    for store, source in ((keys, key), (values, value)):
        store[3], store[0], store[2] = source[0, :, :8], source[0, :, 8:], source[1, :, :8]
    try:
        output = dlattn.attention(query, keys, values, key_lengths=lengths, block_table=pages)
    except dlattn.InvalidArgument:  # an entry that no key needs may be refused all the same
        pages[1, 1] = 0
        output = dlattn.attention(query, keys, values, key_lengths=lengths, block_table=pages)
    expected, _ = reference.attention(query, key, value, key_lengths=lengths)
    np.testing.assert_allclose(output, expected, atol=2e-6)


def test_many_shapes_share_the_plan_cache():
    """More problems than the cache has places, twice, so that plans are replaced and met again."""
    for _ in range(2):
        for keys in range(1, 400):
            query, key, value = make(
                batch=1, heads=1, heads_kv=1, rows=1, keys=keys, dim=4, dim_v=4, seed=keys
            )
            output = dlattn.attention(query, key, value, num_threads=1)
            np.testing.assert_allclose(output, reference.attention(query, key, value)[0], atol=2e-6)


def test_threads():
    def one(seed):
        check(*make(rows=seed + 1, keys=2 * seed + 1, seed=seed), causal=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, list(range(24)) * 4))


def test_select():
    query, key, value = make(dtype=np.float16)
    sku = dlattn.select(query, key, value, causal=True)
    assert sku.kernel in [row.name for row in dlattn.kernels()]
    assert sku.backend == "cpu"
    named = dlattn.select(query, key, value, kernel="cpu_fwd_ref")
    assert named.kernel == "cpu_fwd_ref"
    assert named.math == "f64"


# ---- Refusals


REFUSED = {
    "head_dim": (make()[0], make(dim=8)[1], make()[2], {}, "key.*head_dim.* 8.* 16"),
    "heads": (make()[0], make(heads_kv=3)[1], make(heads_kv=3)[2], {}, "3 heads do not divide.* 4"),
    "axes": (make()[0], make()[1][0], make()[2], {}, "key: has 3 axes, must have 4"),
    "dtypes": (
        make()[0],
        make(dtype=np.float16)[1],
        make()[2],
        {},
        "key: dtype is f16, query's is f32",
    ),
    "scale": (*make(), {"scale": float("inf")}, "scale: is inf, must be finite"),
    "window": (*make(), {"window": (-2, 0)}, "window_left: is -2"),
    "negative_stride": (make()[0][:, :, ::-1], *make()[1:], {}, "query: axis 2 has stride -16"),
    "out_shape": (*make(), {"out": make(rows=6)[0]}, "output: axis 2 .* is 6, .* makes it 7"),
    "out_broadcast": (
        *make(),
        {
            "out": np.lib.stride_tricks.as_strided(
                np.zeros(16, np.float32), (2, 4, 7, 16), (0, 0, 0, 4)
            )
        },
        "output: axis . has stride 0",
    ),
    "lse_dtype": (*make(), {"lse": np.zeros((2, 4, 7), np.float64)}, "lse: dtype"),
    "kernel": (*make(), {"kernel": "nonesuch"}, 'no row "nonesuch"'),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusal(case):
    query, key, value, options, message = case
    options = {"out": np.full(query.shape, 7, np.float32), **options}
    before = options["out"].copy()
    with pytest.raises(dlattn.InvalidArgument, match=message) as caught:
        dlattn.attention(query, key, value, **options)
    assert isinstance(caught.value, ValueError)
    np.testing.assert_array_equal(options["out"], before)


def test_integers_are_unsupported():
    query, key, value = (x.astype(np.int32) for x in make())
    with pytest.raises(dlattn.Unsupported, match=r"query: dtype \(code 0, 32 bits\)"):
        dlattn.attention(query, key, value)


def test_read_only_inputs_are_read_and_outputs_refused():
    query, key, value = make()
    for x in (query, key, value):
        x.flags.writeable = False
    output = dlattn.attention(query, key, value)
    before = query.copy()
    with pytest.raises(dlattn.InvalidArgument, match="output: is read-only"):
        dlattn.attention(query, key, value, out=query)
    np.testing.assert_array_equal(query, before)
    assert output.flags.writeable


def test_no_dlpack():
    with pytest.raises((TypeError, AttributeError)):
        dlattn.attention([1.0], [1.0], [1.0])


# ---- The protocol


class Legacy:
    """A producer from before DLPack 1.0: no max_version, capsules without a version."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_legacy_producer():
    query, key, value = make()
    out = np.empty_like(query)
    dlattn.attention(Legacy(query), Legacy(key), Legacy(value), out=Legacy(out))
    np.testing.assert_array_equal(out, dlattn.attention(query, key, value))
    with pytest.raises(TypeError, match="give out="):
        dlattn.attention(Legacy(query), Legacy(key), Legacy(value))


class Future:
    """A producer of DLPack 2.0, of whose tensors nothing may be read."""

    def __init__(self):
        self.words = (ctypes.c_uint32 * 32)(2, 0)

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        )
        return new(ctypes.addressof(self.words), b"dltensor_versioned", None)


def test_future_producer():
    query, _, value = make()
    with pytest.raises(dlattn.VersionMismatch, match="DLPack major version is 2, dlattn reads 1"):
        dlattn.attention(query, Future(), value)


def test_nothing_is_kept():
    query, key, value = make()
    counts = [sys.getrefcount(x) for x in (query, key, value)]
    for _ in range(10):
        dlattn.attention(query, key, value)
        with pytest.raises(dlattn.InvalidArgument):
            dlattn.attention(query, key, value, scale=float("nan"))
    assert [sys.getrefcount(x) for x in (query, key, value)] == counts
