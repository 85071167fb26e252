"""The rows of backward on the CPU against formula.py, and formula.py against finite differences."""

import re
import zlib
from pathlib import Path

import formula
import numpy as np
import pytest
from oracle_test import CASES, NARROW, make_arrays
from plugin import backward

WITHOUT = ("paged", "scales", "scales_heads")  # what backward refuses
GRADIENT_CASES = [n for n, (_, parts) in CASES.items() if not set(parts) & set(WITHOUT)]
DIFFERENTIABLE = ("query", "key", "value", "bias", "alibi_slopes", "sinks")
TABLE = (Path(__file__).parents[2] / "kernels/kernels.inc").read_text()
ROWS = re.findall(r"KERNEL\((cpu_bwd_(?!ref)\w+).*?\.dtypes = ([^,]*),", TABLE, re.DOTALL)
SHORT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FAST = [(row, e) for row, dtypes in ROWS for e in NARROW if SHORT[e] in dtypes.split(" | ")]


def make(name):
    options, parts = CASES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    arrays = make_arrays(parts, rng)
    d_output = rng.normal(size=arrays["output"].shape)
    d_lse = rng.normal(size=arrays["lse"].shape)
    for b, rows, output, lse in formula.forward(arrays, options):
        if rows is None:
            arrays["output"][b], arrays["lse"][b] = output, lse
        else:
            arrays["output"][rows] = output.transpose(1, 0, 2)
            arrays["lse"][:, rows] = lse
    return options, arrays, d_output, d_lse


def gradients_of(arrays, d_output, d_lse, dtypes=None, **options):
    """What the plugin writes, in the inputs' dtypes or others; 777 where it writes nothing."""
    names = [n for n in DIFFERENTIABLE if n in arrays]
    written = {
        f"d_{n}": np.full(arrays[n].shape, 777, (dtypes or {}).get(n, arrays[n].dtype))
        for n in names
    }
    backward(arrays, {"d_output": d_output, "d_lse": d_lse, **written}, **options)
    return {n: written[f"d_{n}"] for n in names}


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_reference_is_the_formula(name):
    options, arrays, d_output, d_lse = make(name)
    got = gradients_of(arrays, d_output, d_lse, **options)
    wanted = formula.backward(arrays, d_output, d_lse, options)
    for n, gradient in got.items():
        tolerance = 1e-11 if gradient.dtype == np.float64 else 1e-6
        np.testing.assert_allclose(gradient, wanted[n], tolerance, tolerance, err_msg=n)


@pytest.mark.parametrize(("kernel", "element"), FAST)
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_fast_rows_are_the_formula(name, element, kernel):
    """As far off as twice what NumPy misses in float32 and a millionth of the largest number. Rows
    that multiply bf16, by tiles or pairs, round weights, dS and, in delta, the output to the
    element's type: they may be off by four units in the last place of the largest number.

    The one loop of tests/kernels has the bounds of each element. A gradient in the tensor's own
    type is the same, rounded once.
    """
    to, back, unit = NARROW[element]
    options, arrays, d_output, d_lse = make(name)
    main = ("query", "key", "value", "output")
    arrays = {n: x.astype(np.float32) if x.dtype == float else x for n, x in arrays.items()}
    arrays |= {n: to(arrays[n]) for n in main}
    d_output, d_lse = to(d_output), d_lse.astype(np.float32)
    single = {**arrays, **{n: back(arrays[n]).astype(np.float32) for n in main}}
    double = {n: x.astype(float) if x.dtype == np.float32 else x for n, x in single.items()}
    naive = formula.backward(single, back(d_output).astype(np.float32), d_lse, options)
    wanted = formula.backward(double, back(d_output).astype(float), d_lse.astype(float), options)
    in_f32 = dict.fromkeys(DIFFERENTIABLE, np.float32)
    try:
        got = gradients_of(arrays, d_output, d_lse, in_f32, kernel=kernel.encode(), **options)
    except RuntimeError as error:
        if not re.search(f"{kernel} needs", str(error)):
            raise
        pytest.skip(str(error))
    own = gradients_of(arrays, d_output, d_lse, kernel=kernel.encode(), **options)
    share = 4 * unit if re.search("amx|avx512bf16", kernel) else 2.0**-20
    for n, gradient in got.items():
        naively = abs(naive[n] - wanted[n]).max(initial=0)
        bound = 2 * naively + share * abs(wanted[n]).max(initial=0)
        np.testing.assert_allclose(gradient, wanted[n], 0, bound, err_msg=n)
        rounded = back(to(gradient)) if n in main else gradient
        np.testing.assert_array_equal(back(own[n]) if n in main else own[n], rounded, err_msg=n)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_formula_is_the_slope(name):
    """Central differences of the loss in random directions, all of float64."""
    options, arrays, d_output, d_lse = make(name)
    arrays = {n: x.astype(float) if x.dtype == np.float32 else x for n, x in arrays.items()}
    wanted = formula.backward(arrays, d_output, d_lse, options)
    rng = np.random.default_rng(1)

    def loss(moved):
        total = 0.0
        for b, rows, output, lse in formula.forward({**arrays, **moved}, options):
            o = d_output[b] if rows is None else d_output[rows].transpose(1, 0, 2)
            e = d_lse[b] if rows is None else d_lse[:, rows]
            total += (o * output).sum() + np.where(np.isfinite(lse), e * lse, 0).sum()
        return total

    for n in (n for n in DIFFERENTIABLE if n in arrays):
        way = np.where(np.isfinite(arrays[n]), rng.normal(size=arrays[n].shape), 0)
        step = 1e-5
        ends = [loss({n: arrays[n] + sign * step * way}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((wanted[n] * way).sum(), slope, 1e-6, 1e-6, err_msg=n)


def test_threads_change_no_bit():
    options, arrays, d_output, d_lse = make("everything")
    one = gradients_of(arrays, d_output, d_lse, **options)
    for threads in (2, 3, 16):
        more = gradients_of(arrays, d_output, d_lse, threads=threads, **options)
        for n, gradient in one.items():
            np.testing.assert_array_equal(more[n], gradient, err_msg=n)


def test_nan_that_no_row_sees_reaches_no_gradient():
    options, arrays, d_output, d_lse = make("lengths_causal_bottom")
    wanted = gradients_of(arrays, d_output, d_lse, **options)
    for b, (rows, keys) in enumerate(zip(arrays["query_lengths"], arrays["key_lengths"])):
        for n in ("key", "value"):
            arrays[n][b, :, keys:] = np.nan
        arrays["query"][b, :, rows:] = d_output[b, :, rows:] = np.nan
    got = gradients_of(arrays, d_output, d_lse, **options)
    for n, gradient in got.items():
        np.testing.assert_array_equal(gradient, wanted[n], err_msg=n)


def test_stride_0_heads_have_gradients_of_their_own():
    options, arrays, d_output, d_lse = make("causal")
    for n in ("key", "value"):
        arrays[n] = np.broadcast_to(
            arrays[n][:, :1], (*arrays[n].shape[:1], 4, *arrays[n].shape[2:])
        )
    got = gradients_of(arrays, d_output, d_lse, **options)
    wanted = formula.backward(arrays, d_output, d_lse, options)
    np.testing.assert_allclose(got["key"], wanted["key"], 1e-11, 1e-11)
    assert np.abs(got["key"][:, 0] - got["key"][:, 1]).max() > 1e-3
