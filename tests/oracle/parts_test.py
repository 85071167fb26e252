"""Merging parts of the keys, and appending to caches, against NumPy."""

import formula
import numpy as np
import plugin
import pytest
from oracle_test import FORMATS, float8


def parts_of(rng, keys):
    """One attention whole, and over pieces of its keys; the third piece is empty."""
    q, k, v = (rng.normal(size=(2, 3, n, 6)) for n in (4, keys, keys))
    whole = formula.forward({"query": q, "key": k, "value": v}, {})
    ends = [0, 3, 3, keys]
    pieces = [
        formula.forward({"query": q, "key": k[:, :, a:b], "value": v[:, :, a:b]}, {})
        for a, b in zip(ends, ends[1:])
    ]

    def stack(results, n):
        return np.stack([r[n] for r in results])

    return (
        stack(whole, 2),
        stack(whole, 3),
        [stack(p, 2) for p in pieces],
        [stack(p, 3) for p in pieces],
    )


def test_merge_is_the_whole():
    output, lse, outputs, lses = parts_of(np.random.default_rng(2), 9)
    outputs[1][:] = np.nan  # a part that saw no key has no weight
    got, got_lse = np.zeros_like(output), np.zeros_like(lse)
    plugin.merge(outputs, lses, got, got_lse)
    np.testing.assert_allclose(got, output, 1e-13, 1e-13)
    np.testing.assert_allclose(got_lse, lse, 1e-13, 1e-13)


def test_merge_in_place_and_narrow():
    output, lse, outputs, lses = parts_of(np.random.default_rng(4), 9)
    outputs, lses = ([x.astype(np.float32) for x in xs] for xs in (outputs, lses))
    plugin.merge(outputs, lses, outputs[0], lses[0])
    np.testing.assert_allclose(outputs[0], output, 1e-6, 1e-6)
    np.testing.assert_allclose(lses[0], lse, 1e-6, 1e-6)


def test_merge_of_nothing():
    empty, lse = np.full((1, 1, 2, 3), np.nan), np.full((1, 1, 2), -np.inf)
    got, got_lse = np.ones((1, 1, 2, 3)), np.ones((1, 1, 2))
    plugin.merge([empty, empty], [lse, lse], got, got_lse)
    np.testing.assert_array_equal(got, 0)
    np.testing.assert_array_equal(got_lse, -np.inf)


def test_merge_refuses_another_shape():
    a, lse = np.zeros((1, 1, 2, 3)), np.zeros((1, 1, 2))
    with pytest.raises(
        RuntimeError, match=r"outputs\[1\]: axis 2 \(length\) is 4, must be 2 as in output"
    ):
        plugin.merge([a, np.zeros((1, 1, 4, 3))], [lse, lse], a.copy(), lse.copy())


def new_rows(rng):
    return {n: rng.normal(size=(2, 3, 4, d)) * 3 for n, d in (("key", 5), ("value", 7))}


def test_append():
    rows = new_rows(np.random.default_rng(5))
    caches = {f"{n}_cache": np.full((2, 3, 9, x.shape[3]), 777.0) for n, x in rows.items()}
    lengths, new = np.array([2, 5], np.int32), np.array([3, 4], np.int32)
    plugin.append({**rows, **caches, "cache_lengths": lengths, "new_lengths": new})
    for n, x in rows.items():
        wanted = np.full(caches[f"{n}_cache"].shape, 777.0)
        for b in range(2):
            wanted[b, :, lengths[b] : lengths[b] + new[b]] = x[b, :, : new[b]]
        np.testing.assert_array_equal(caches[f"{n}_cache"], wanted)


def to_float8(x, name):
    """Nearest, ties to the even code, saturated."""
    codes = [c for c in range(128) if float8(c, *FORMATS[name]) is not None]
    values = np.array([float8(c, *FORMATS[name]) for c in codes])
    at = np.clip(np.searchsorted(values, np.abs(x)), 1, len(values) - 1)
    low, high = values[at - 1], values[at]
    up = (np.abs(x) - low > high - np.abs(x)) | (
        (np.abs(x) - low == high - np.abs(x)) & (at % 2 == 0)
    )
    return (np.where(up, at, at - 1) | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_append_packed_rows_to_float8_pages(name):
    rng = np.random.default_rng(6)
    cu = np.array([0, 5, 6], np.int32)
    rows = {
        n: rng.normal(size=(6, 3, 4)) * 10.0 ** rng.integers(-4, 6, (6, 3, 4))
        for n in ("key", "value")
    }
    caches = {f"{n}_cache": np.full((5, 3, 2, 4), 99, np.uint8) for n in rows}
    table, lengths = np.array([[4, 0, 2, 1], [3, -1, -1, -1]], np.int32), np.array([1, 0], np.int32)
    scales = {f"{n}_scale": rng.uniform(0.5, 2, (5, 3)).astype(np.float32) for n in rows}
    held = {f"{n}_cache_dtype": plugin.FLOAT8[name] for n in rows}
    plugin.append(
        {
            **rows,
            **caches,
            **scales,
            "cache_lengths": lengths,
            "cu_seqlens": cu,
            "block_table": table,
        },
        **held,
    )
    for n, x in rows.items():
        wanted = np.full((5, 3, 2, 4), 99, np.uint8)
        for b in range(2):
            for i in range(cu[b + 1] - cu[b]):
                page, at = table[b, (lengths[b] + i) // 2], (lengths[b] + i) % 2
                scale = scales[f"{n}_scale"][page][:, None].astype(np.float64)
                wanted[page, :, at] = to_float8(x[cu[b] + i] / scale, name)
        np.testing.assert_array_equal(caches[f"{n}_cache"], wanted)


def test_append_refuses_what_has_no_room():
    rows = new_rows(np.random.default_rng(7))
    caches = {f"{n}_cache": np.full((2, 3, 9, x.shape[3]), 777.0) for n, x in rows.items()}
    with pytest.raises(
        RuntimeError, match="entry 1 is 6, and 4 rows are to be appended; the cache has room for 9"
    ):
        plugin.append({**rows, **caches, "cache_lengths": np.array([2, 6], np.int32)})
    assert (caches["key_cache"] == 777).all()
