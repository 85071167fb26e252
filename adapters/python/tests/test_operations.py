"""``attention_backward``, ``merge``, ``append`` and what ``attention`` has of ABI 1.1, for NumPy.

That their numbers are right, tests/oracle shows; here: that arguments go where they belong.
"""

import dlattn
import numpy as np
import pytest

RNG = np.random.default_rng(0)


def arrays(*shapes, dtype=np.float64):
    return [RNG.standard_normal(shape).astype(dtype) for shape in shapes]


def attend(q, k, v, **options):
    lse = np.empty(q.shape[:3], options.pop("lse_dtype", q.dtype))
    return dlattn.attention(q, k, v, lse=lse, **options), lse


def test_backward_is_the_slope():
    q, k, v, bias = arrays((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3), (1, 4, 1, 7))
    slopes, sinks = (np.abs(x) for x in arrays((4,), (4,), dtype=np.float32))
    options = {"causal": True, "alignment": "bottom_right", "softcap": 2.0, "window": (4, None)}
    options |= {
        "dropout_probability": 0.3,
        "dropout_seed": 5,
        "alibi_slopes": slopes,
        "sinks": sinks,
    }
    output, lse = attend(q, k, v, bias=bias, **options)
    d_output, d_lse = arrays(output.shape, lse.shape)
    got = dlattn.attention_backward(
        d_output, q, k, v, output, lse, d_lse=d_lse, bias=bias, **options
    )
    for name in ("query", "key", "value", "bias"):
        tensors = {"query": q, "key": k, "value": v, "bias": bias}
        (way,) = arrays(tensors[name].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = tensors | {name: tensors[name] + step * way}
            o, e = attend(
                *(moved[n] for n in ("query", "key", "value")), bias=moved["bias"], **options
            )
            ends.append((d_output * o).sum() + (d_lse * e).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert np.isclose((getattr(got, name) * way).sum(), slope, 1e-6, 1e-6), name
    assert got.alibi_slopes.shape == got.sinks.shape == (4,)
    assert got.query.dtype == np.float64 and got.sinks.dtype == np.float32


def test_backward_of_what_is_wanted():
    q, k, v = arrays((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), dtype=np.float32)
    output, lse = attend(q, k, v)
    (d_output,) = arrays(output.shape, dtype=np.float32)
    every = dlattn.attention_backward(d_output, q, k, v, output, lse)
    one = dlattn.attention_backward(d_output, q, k, v, output, lse, wanted=("value",))
    assert one.query is None and one.key is None and (one.value == every.value).all()
    with pytest.raises(dlattn.InvalidArgument, match="wanted: 'bias'"):
        dlattn.attention_backward(d_output, q, k, v, output, lse, wanted=("bias",))
    with pytest.raises(
        dlattn.InvalidArgument, match="d_output: axis 2 is 2, must be 3 as in output"
    ):
        dlattn.attention_backward(d_output[:, :, :2], q, k, v, output, lse)


@pytest.mark.parametrize("masked", ["query_segments", "block_mask"])
def test_masks_of_documents(masked):
    q, k, v = arrays((2, 2, 6, 4), (2, 2, 6, 4), (2, 2, 6, 4))
    document = np.array([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1]])
    mask = document[:, None, :, None] == document[:, None, None, :]
    if masked == "block_mask":
        blocks = mask[:, :, ::2, ::2].astype(np.uint8) * 2
        got = dlattn.attention(q, k, v, block_mask=blocks, block_size=(2, 2))
    else:
        got = dlattn.attention(q, k, v, query_segments=document, key_segments=document)
    np.testing.assert_allclose(got, dlattn.attention(q, k, v, mask=mask), 1e-12, 1e-12)


def test_offset_and_scales():
    q, k, v = arrays((1, 1, 4, 8), (1, 1, 8, 8), (1, 1, 8, 8))
    whole = dlattn.attention(np.concatenate([q, q], 2), k, v, causal=True)
    shard = dlattn.attention(q, k, v, causal=True, diagonal_offset=4)
    np.testing.assert_allclose(shard, whole[:, :, 4:], 1e-12, 1e-12)
    scaled = dlattn.attention(
        q, k, v, key_scale=[[2.0]] * np.ones((1, 1)), value_scale=np.full(1, 3.0)
    )
    np.testing.assert_allclose(scaled, 3 * dlattn.attention(q, 2 * k, v), 1e-12, 1e-12)


def test_float8_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = arrays((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    for name in ("float8_e4m3fn", "float8_e5m2"):
        narrow = [x.astype(getattr(ml_dtypes, name)) for x in (k, v)]
        got = dlattn.attention(q.astype(np.float32), *narrow)
        wanted = dlattn.attention(q, *(x.astype(np.float64) for x in narrow))
        np.testing.assert_allclose(got, wanted, 1e-5, 1e-5)


def test_float8_with_scales():
    """Codes, a scale for each head and for each page, beside float64 of what they stand for."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = arrays((2, 4, 3, 32), (5, 2, 16, 32), (5, 2, 16, 32), dtype=np.float32)
    k, v = k.astype(ml_dtypes.float8_e4m3fn), v.astype(ml_dtypes.float8_e5m2)
    scales = [x.astype(np.float32) for x in np.random.default_rng(3).uniform(0.5, 2, (2, 5, 2))]
    paged = {
        "block_table": np.array([[3, 0], [1, 4]], np.int32),
        "key_lengths": np.array([30, 20], np.int32),
    }
    got = dlattn.attention(q, k, v, key_scale=scales[0], value_scale=scales[1], **paged)
    wide = (
        x.astype(np.float64) * s[:, :, None, None].astype(np.float64)
        for x, s in zip((k, v), scales)
    )
    wanted = dlattn.attention(q.astype(np.float64), *wide, **paged)
    np.testing.assert_allclose(got, wanted, 1e-5, 1e-5)
    with pytest.raises(dlattn.InvalidArgument, match=r"key_scale: axis 1 \(heads\) is 3"):
        dlattn.attention(q, k, v, key_scale=np.ones((5, 3), np.float32), **paged)
    with pytest.raises(dlattn.Unsupported, match="output: dtype is float8_e4m3fn"):
        dlattn.attention(q.astype(k.dtype), k, v, **paged)


def test_merge_of_two_halves():
    q, k, v = arrays((2, 3, 4, 8), (2, 3, 9, 8), (2, 3, 9, 8), dtype=np.float32)
    whole, whole_lse = attend(q, k, v)
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 4), (4, 9))]
    outputs, lses = zip(*parts)
    output, lse = dlattn.merge(outputs, lses)
    np.testing.assert_allclose(output, whole, 1e-5, 1e-5)
    np.testing.assert_allclose(lse, whole_lse, 1e-5, 1e-5)
    same, _ = dlattn.merge(outputs, lses, out=outputs[0], lse=lses[0])
    assert same is outputs[0] and (same == output).all()


def test_merge_refusals():
    (a, b), lse = arrays((1, 1, 2, 3), (1, 1, 4, 3)), np.zeros((1, 1, 2))
    with pytest.raises(dlattn.InvalidArgument, match=r"outputs\[1\]: axis 2"):
        dlattn.merge([a, b], [lse, lse])
    with pytest.raises(dlattn.InvalidArgument, match="lses: has 1 arrays, outputs has 2"):
        dlattn.merge([a, a], [lse])
    with pytest.raises(dlattn.InvalidArgument, match="are empty"):
        dlattn.merge([], [])
    with pytest.raises(dlattn.InvalidArgument, match=r"outputs\[0\]: is of <class 'list'>"):
        dlattn.merge([[1]], [lse], out=a, lse=lse)


def test_append_and_attend():
    k, v = arrays((2, 1, 6, 4), (2, 1, 6, 4), dtype=np.float32)
    caches = [np.full((2, 1, 8, 4), np.nan, np.float16) for _ in "kv"]
    lengths = np.zeros(2, np.int64)
    for first, end in ((0, 2), (2, 6)):
        dlattn.append(k[:, :, first:end], v[:, :, first:end], *caches, lengths)
        lengths += end - first
    for cache, rows in zip(caches, (k, v)):
        assert (cache[:, :, :6] == rows.astype(np.float16)).all() and np.isnan(
            cache[:, :, 6:]
        ).all()
    with pytest.raises(dlattn.InvalidArgument, match="cache_lengths: entry 0 is 6, and 4 rows"):
        dlattn.append(k[:, :, 2:], v[:, :, 2:], *caches, lengths)
    frozen = caches[0].copy()
    frozen.flags.writeable = False
    with pytest.raises(dlattn.InvalidArgument, match="key_cache: is read-only"):
        dlattn.append(k[:, :, :1], v[:, :, :1], frozen, caches[1], lengths)


def test_append_rounds_once():
    """A quotient a little above halfway between two numbers of f16, by less than f32 tells."""
    rows, caches = np.full((1, 1, 1, 1), 1.25, np.float32), np.zeros((2, 1, 1, 1, 1), np.float16)
    scale = np.array([1.2493899], np.float32)
    assert 0 < 1.25 / float(scale[0]) - (1 + 2**-11) < 2**-24
    dlattn.append(rows, rows, *caches, np.zeros(1, np.int64), key_scale=scale, value_scale=scale)
    assert (caches == np.float16(1 + 2**-10)).all()


def test_refusals_name_the_argument():
    q, k = arrays((1, 1, 4, 8), (1, 1, 8, 8))
    for options, says in (
        ({"query_segments": np.zeros((1, 4), np.int32)}, "key_segments: is absent"),
        ({"dropout_probability": 1.5}, "dropout_probability: is 1.5"),
        ({"block_size": 3}, "block_size: is 3"),
        ({"block_mask": np.zeros((1, 1, 1, 1), np.uint8)}, "block_q and block_k: are 0 and 0"),
        ({"key_scale": np.array([-1.0])}, r"key_scale: entry \[0, 0\] is -1"),
        ({"dropout_probability": 0.1, "dropout_seed": -1}, "dropout_seed: is -1"),
    ):
        with pytest.raises(dlattn.InvalidArgument, match=says):
            dlattn.attention(q, k, k, **options)


def test_listed_by_operation():
    operations = {k.operation for k in dlattn.kernels()}
    assert operations == {"forward", "backward", "merge", "append"}
