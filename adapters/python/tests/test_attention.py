"""dlattn.attention on NumPy arrays: every option against float64, every refusal."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import array_api_strict
import dlattn
import ml_dtypes
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


def test_backwards():
    """Views of negative strides are read in place."""
    query, key, value = make()
    output = dlattn.attention(query[:, :, ::-1], key[..., ::-1], value[:, ::-1])
    expected, _ = reference.attention(query[:, :, ::-1], key[..., ::-1], value[:, ::-1])
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)


def test_bfloat16():
    """ml_dtypes' arrays are read and written in place, strided ones too."""
    bfloat16 = ml_dtypes.bfloat16
    query, key, value = (x.astype(bfloat16) for x in make())
    expected, expected_lse = reference.attention(query, key, value)
    output = dlattn.attention(query, key, value)
    assert output.dtype == bfloat16
    np.testing.assert_allclose(output.astype(np.float32), expected, rtol=0, atol=2e-2)

    wide = np.full((2, 4, 9, 20), 7, bfloat16)
    lse = np.zeros((2, 4, 7), bfloat16)
    bias = np.zeros((9,), bfloat16)
    out = wide[:, :, 1:8, 2:18]
    query.flags.writeable = False
    assert dlattn.attention(query, key, value, bias=bias, out=out, lse=lse) is out
    np.testing.assert_array_equal(out, output)
    np.testing.assert_allclose(lse.astype(np.float32), expected_lse, rtol=1e-2, atol=1e-2)
    assert (wide[:, :, 0] == 7).all()
    assert dlattn.select(query, key, value).math == "bf16"


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_masks_broadcast_from_the_right(axes):
    shape = (2, 4, 7, 9)[4 - axes :]
    mask = random.random(shape) < 0.7
    bias = random.standard_normal(shape).astype(np.float32)
    query, key, value = make()
    output = dlattn.attention(query, key, value, mask=mask, bias=bias)
    expected, _ = reference.attention(query, key, value, mask=mask, bias=bias)
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)


INTEGERS = ["int8", "uint8", "int16", "uint32", "int64", "uint64", ">i4", ">i8"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_types(dtype):
    lengths = np.array([9, 4], dtype)
    check(*make(), key_lengths=lengths, query_lengths=lengths - 2)


@pytest.mark.parametrize("name", ["key_lengths", "query_lengths", "cu_seqlens_q", "block_table"])
@pytest.mark.parametrize("value", [2**31, 2**32 + 4, -(2**31) - 1])
@pytest.mark.parametrize("asarray", [np.asarray, array_api_strict.asarray])
def test_integers_beyond_int32(name, value, asarray):
    query, key, value_ = (asarray(x) for x in make())
    with pytest.raises(dlattn.InvalidArgument, match=f"^{name}: holds {value}, .* fit into int32"):
        dlattn.attention(query, key, value_, **{name: asarray(np.array([4, value]))})


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", ml_dtypes.bfloat16])
def test_slopes_and_sinks_of_other_float_types(dtype):
    numbers = np.array([0.5, -1.0, 2.0, 0.0], dtype)
    check(*make(), sinks=numbers, alibi_slopes=numbers)


def test_memmap(tmp_path):
    query, key, value = make()
    stored = np.memmap(tmp_path / "query", query.dtype, "w+", shape=query.shape)
    stored[:] = query
    output = dlattn.attention(stored, key, value)
    assert type(output) is np.ndarray
    np.testing.assert_array_equal(output, dlattn.attention(query, key, value))


def test_array_api():
    """A library of which no more is known than the array API standard."""
    xp = array_api_strict
    query, key, value = make()
    options = {
        "mask": random.random((7, 9)) < 0.7,
        "sinks": np.array([0.5, -1.0, 2.0, 0.0]),
        "key_lengths": np.array([9, 4]),
    }
    output = dlattn.attention(
        *map(xp.asarray, (query, key, value)),
        **{name: xp.asarray(x) for name, x in options.items()},
    )
    assert isinstance(output, type(xp.asarray(query)))
    expected, _ = reference.attention(query, key, value, **options)
    np.testing.assert_allclose(np.asarray(output), expected, rtol=0, atol=2e-6)


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
    assert sku.reference == (sku.kernel == "cpu_fwd_ref")
    named = dlattn.select(query, key, value, kernel="cpu_fwd_ref")
    assert named.reference
    assert named.kernel == "cpu_fwd_ref"
    assert named.math == "f64"


# ---- Refusals


REFUSED = {
    "head_dim": (make()[0], make(dim=8)[1], make()[2], {}, "key.*head_dim.* 8.* 16"),
    "heads": (
        make()[0],
        make(heads_kv=3)[1],
        make(heads_kv=3)[2],
        {},
        "has 3 heads, must divide.* 4",
    ),
    "axes": (make()[0], make()[1][0], make()[2], {}, "key: has 3 axes, must have 4"),
    "dtypes": (
        make()[0],
        make(dtype=np.float16)[1],
        make()[2],
        {},
        "key: dtype is float16, .* float32",
    ),
    "scale": (*make(), {"scale": float("inf")}, "scale: is inf, must be finite"),
    "window": (*make(), {"window": (-2, 0)}, "window_left: is -2"),
    "window_number": (*make(), {"window": 3}, r"window: is 3, must be \(left, right\)"),
    "window_long": (*make(), {"window": [1, 2, 3]}, r"window: is \[1, 2, 3\], must be"),
    "window_float": (*make(), {"window": (1.5, 2)}, r"window: is \(1.5, 2\), must be"),
    "window_wide": (*make(), {"window": (1 << 70, 2)}, "window_left: is 11805.* 64 bits"),
    "alignment": (*make(), {"alignment": "bottomright"}, "alignment: is 'bottomright', .*'top_le"),
    "alignment_list": (*make(), {"alignment": []}, r"alignment: is \[\], must be"),
    "scale_text": (*make(), {"scale": "large"}, "scale: is 'large', must be a number"),
    "softcap_none": (*make(), {"softcap": None}, "softcap: is None, must be a number"),
    "causal_array": (
        *make(),
        {"causal": make()[0]},
        r"causal: is array\(.*, must be True or False",
    ),
    "num_threads": (*make(), {"num_threads": 1.5}, "num_threads: is 1.5, must be an int"),
    "num_threads_wide": (*make(), {"num_threads": (1 << 32) + 1}, "num_threads: is .* 32 bits"),
    "max_seqlen": (*make(), {"max_seqlen_q": "7"}, "max_seqlen_q: is '7', must be an int"),
    "kernel_number": (*make(), {"kernel": 3}, "kernel: is 3, must be the name of a kernel"),
    "kernel_nul": (*make(), {"kernel": "cpu_fwd_ref\0"}, r"kernel: is 'cpu_fwd_ref\\x00', must"),
    "key_list": (make()[0], [[1.0]], make()[2], {}, "key: is of <class 'list'>, must be an array"),
    "key_none": (make()[0], None, make()[2], {}, "key: is absent"),
    "key_scalar": (make()[0], np.float32(1), make()[2], {}, "key: is of <class 'numpy.float32'>"),
    "lengths_list": (*make(), {"key_lengths": [9, 4]}, "key_lengths: is of <class 'list'>"),
    "lengths_float": (
        *make(),
        {"key_lengths": np.ones(2)},
        "key_lengths: dtype is float64, .*int32",
    ),
    "bias_float64": (*make(), {"bias": np.ones((7, 9))}, "bias: dtype is float64, must be float32"),
    "mask_axes": (*make(), {"mask": np.ones((1,) * 5, bool)}, "mask: has 5 axes, must have 4"),
    "lse_masked": (*make(), {"lse": np.ma.ones((2, 4, 7), "f4")}, "lse: is of .*MaskedArray'>"),
    "sinks_integers": (
        *make(),
        {"sinks": np.ones(4, int)},
        "sinks: dtype is int64, must be float32",
    ),
    "big_endian": (
        make(dtype=">f4")[0],
        *make()[1:],
        {},
        "query: dtype is >f4, its producer refuse",
    ),
    "objects": (
        *make()[:2],
        make(dtype=object)[2],
        {},
        "value: dtype is object, its producer refuse",
    ),
    "long_double": (*make()[:2], make(dtype="g")[2], {}, "value: dtype is float128, its producer"),
    "float8": (
        make(dtype=ml_dtypes.float8_e4m3b11fnuz)[0],
        *make()[1:],
        {},
        "query: dtype is float8_e4m3b11fnuz, its producer refuses",
    ),
    "stream": (*make(), {"stream": 1}, "query: .* its producer refuses.* stream"),
    "out_shape": (*make(), {"out": make(rows=6)[0]}, "output: axis 2 .* is 6, must be 7 as in"),
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
    "kernel": (*make(), {"kernel": "nonesuch"}, 'no kernel "nonesuch"'),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusal(case):
    query, key, value, options, message = case
    message = re.compile(message, re.DOTALL)
    options = {"out": np.full(query.shape, 7, np.float32), **options}
    before = options["out"].copy()
    with pytest.raises(dlattn.InvalidArgument, match=message) as caught:
        dlattn.attention(query, key, value, **options)
    assert isinstance(caught.value, ValueError)
    np.testing.assert_array_equal(options["out"], before)


def test_integers_are_unsupported():
    query, key, value = (x.astype(np.int32) for x in make())
    with pytest.raises(dlattn.Unsupported, match="query: dtype is int32, must be float16"):
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


NO_ARRAYS = {
    "list": [[1.0]],
    "none": None,
    "number": 1.0,
    "scalar": np.float32(1),
    "no_axes": np.array(1, np.float32),
    "masked": np.ma.masked_array(make()[0]),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("x", NO_ARRAYS.values(), ids=NO_ARRAYS)
@pytest.mark.parametrize("function", [dlattn.attention, dlattn.select])
def test_what_is_no_array(function, x, place):
    """The message names the argument, also where the output's shape comes from it."""
    arrays = list(make())
    arrays[place] = x
    name = ("query", "key", "value")[place]
    with pytest.raises(dlattn.InvalidArgument, match=f"^{name}: "):
        function(*arrays)


class Metres(np.ndarray):
    """Its numbers alone are not what it means."""


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "lse", "mask", "sinks"])
@pytest.mark.parametrize("kind", [Metres, np.matrix, np.ma.MaskedArray])
def test_subclasses_of_arrays(name, kind):
    arguments = dict(zip(("query", "key", "value"), make(), strict=True))
    arguments[name] = np.zeros((7, 9), np.float32).view(kind)
    slot = "output" if name == "out" else name
    with pytest.raises(dlattn.InvalidArgument, match=f"^{slot}: is of .*subclass of numpy.ndarray"):
        dlattn.attention(**arguments)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "lse"])
def test_output_among_inputs(name):
    """What shares an element with an input is refused; what lies between its elements is not."""
    whole = make(heads_kv=4, rows=9, dim=32)[0]
    arguments = dict(zip(("query", "key", "value"), make(heads_kv=4, rows=9), strict=True))
    shared = (
        whole[..., :9] if name == "bias" else whole[..., 0] if name == "lse" else whole[..., ::2]
    )
    before = whole.copy()
    with pytest.raises(dlattn.InvalidArgument, match="shares memory with"):
        dlattn.attention(**{**arguments, name: shared}, out=whole[..., :16])
    np.testing.assert_array_equal(whole, before)
    if name in arguments:
        expected = dlattn.attention(**{**arguments, name: shared.copy()})
        dlattn.attention(**{**arguments, name: shared}, out=whole[..., 1::2])
        np.testing.assert_allclose(whole[..., 1::2], expected, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(whole[..., ::2], before[..., ::2])


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
    with pytest.raises(dlattn.InvalidArgument, match=r"^output: .* give out="):
        dlattn.attention(Legacy(query), Legacy(key), Legacy(value))


class Copying(Legacy):
    """A producer that exports a copy, and says so as DLPack 1 has it."""

    def __dlpack__(self, *, max_version, stream=None):
        return self.array.__dlpack__(max_version=max_version, copy=True)


class Elsewhere(Legacy):
    """A producer whose own memory is on another device than the copy that it exports."""

    def __dlpack_device__(self):
        return 2, 0


@pytest.mark.parametrize("kind", [Copying, Elsewhere])
@pytest.mark.parametrize("name", ["out", "lse"])
def test_outputs_that_are_copies(kind, name):
    """The caller would never see what is written there; as an input a copy is as good."""
    query, key, value = make()
    whole = np.full(query.shape, 7, np.float32)
    written = {"out": whole, "lse": np.full(query.shape[:3], 7, np.float32)}
    message = f"^{'output' if name == 'out' else name}: .*producer hands over a copy"
    with pytest.raises(dlattn.InvalidArgument, match=message):
        dlattn.attention(query, key, value, **{**written, name: kind(written[name])})
    assert all((x == 7).all() for x in written.values())
    dlattn.attention(query, kind(key), value, **written)
    np.testing.assert_array_equal(whole, dlattn.attention(query, key, value))


class Talkative(Legacy):
    def __dlpack__(self, **_):
        return "no capsule"


class Failing(Legacy):
    def __dlpack__(self, **_):
        raise MemoryError("not the array's fault")


def test_producers_that_fail():
    query, key, value = make()
    with pytest.raises(dlattn.InvalidArgument, match=r"^key: the __dlpack__ of .*'no capsule'"):
        dlattn.attention(query, Talkative(key), value)
    with pytest.raises(MemoryError, match="not the array's fault"):
        dlattn.attention(query, Failing(key), value)


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
    with pytest.raises(
        dlattn.VersionMismatch, match="key: DLPack major version is 2, dlattn reads 1"
    ):
        dlattn.attention(query, Future(), value)


def test_nothing_is_kept():
    query, key, value = make()
    counts = [sys.getrefcount(x) for x in (query, key, value)]
    for _ in range(10):
        dlattn.attention(query, key, value)
        with pytest.raises(dlattn.InvalidArgument):
            dlattn.attention(query, key, value, scale=float("nan"))
    assert [sys.getrefcount(x) for x in (query, key, value)] == counts


class CupyArray:
    """What dlattn asks of an array of CuPy, on a CPU."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.size = x, x.shape, x.dtype, x.size
        self.device = contextlib.nullcontext()

    def __dlpack__(self, **options):
        return self.x.__dlpack__()

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()

    def min(self):
        return self.x.min()

    def max(self):
        return self.x.max()

    def astype(self, dtype):
        return CupyArray(self.x.astype(dtype))


def test_cupy(monkeypatch):
    """Makes the output and converts small arguments; CuPy itself is in gpu_check.py."""
    cupy = types.ModuleType("cupy")
    cupy.ndarray, CupyArray.__module__ = CupyArray, "cupy"
    cupy.empty = lambda shape, dtype: CupyArray(np.empty(shape, dtype))
    stream = types.SimpleNamespace(ptr=0)
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    query, key, value = (np.random.default_rng(0).standard_normal((2, 2, 5, 8)) for _ in range(3))
    lengths = np.array([5, 3])
    found = dlattn.attention(
        *map(CupyArray, (query, key, value)), key_lengths=CupyArray(lengths), causal=True
    )
    assert type(found) is CupyArray
    wanted = dlattn.attention(query, key, value, key_lengths=lengths.astype(np.int32), causal=True)
    assert np.array_equal(found.x, wanted)
    with pytest.raises(ValueError, match="key_lengths: holds 4294967296"):
        x = CupyArray(query)
        dlattn.attention(x, x, x, key_lengths=CupyArray(np.array([2**32, 1])))
