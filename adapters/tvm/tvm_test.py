"""libdlattn_tvm.so under tvm-ffi and under Relax's virtual machine, against NumPy in float64.

./dev test gives the paths: DLATTN_LIBRARY is the plugin, DLATTN_TVM_LIBRARY is libdlattn_tvm.so.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

MODULE = os.environ["DLATTN_TVM_LIBRARY"]
SCALE = 0.3


@pytest.fixture(scope="module")
def dlattn():
    return tvm_ffi.load_module(MODULE)


def problem(seed=0, kv_heads=2):
    """query [2, 4, 9, 16], key [2, kv_heads, 11, 16] and value [2, kv_heads, 11, 24]."""
    rng = np.random.default_rng(seed)
    shapes = (2, 4, 9, 16), (2, kv_heads, 11, 16), (2, kv_heads, 11, 24)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def outputs():
    return np.full((2, 4, 9, 24), np.nan, np.float32), np.full((2, 4, 9), np.nan, np.float32)


def reference(query, key, value, scale=SCALE, causal=True, bias=0.0):
    """softmax(scale QK' + bias) V and its log-sum-exp, in float64; causal from the top left."""
    group = query.shape[1] // key.shape[1]
    query, key, value = (
        x.astype(np.float64) for x in (query, key.repeat(group, 1), value.repeat(group, 1))
    )
    logits = scale * query @ key.swapaxes(2, 3) + bias
    if causal:
        logits[..., ~np.tri(query.shape[2], key.shape[2], dtype=bool)] = -np.inf
    lse = np.log(np.exp(logits).sum(-1))
    return np.exp(logits - lse[..., None]) @ value, lse


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_forward(dlattn):
    query, key, value = problem()
    output, lse = outputs()
    dlattn.dlattn_forward(query, key, value, "causal", True, "scale", SCALE, output, lse)
    expected, expected_lse = reference(query, key, value)
    assert_close(output, expected)
    assert_close(lse, expected_lse)


def test_options(dlattn):
    """Tensors, integers, strings and None as values; and no lse."""
    query, key, value = problem()
    output, _ = outputs()
    bias = np.random.default_rng(1).standard_normal((1, 4, 1, 11), dtype=np.float32)
    kernel = dlattn.dlattn_kernel(query, key, value, "bias", bias, output)
    assert kernel.startswith("cpu_fwd_")
    options = {"bias": bias, "scale": SCALE, "kernel": kernel, "window_left": 20, "mask": None}
    pairs = [word for pair in options.items() for word in pair]
    dlattn.dlattn_forward(query, key, value, *pairs, output)
    assert_close(output, reference(query, key, value, causal=False, bias=bias)[0])


def test_window(dlattn):
    """A window of one key is that key's value."""
    query, key, value = problem(kv_heads=4)
    output, _ = outputs()
    dlattn.dlattn_forward(
        query, key, value, "window_left", 0, "window_right", 0, "alignment", 0, output
    )
    assert_close(output, value[:, :, :9])


def test_strides(dlattn):
    """Transposed, sliced and flipped views of larger arrays, and an output inside one."""
    query, key, value = problem()
    wide = np.full((2, 9, 8, 24), 7, np.float32)
    query, key = query[..., ::-1], key[..., ::-1]
    views = [np.ascontiguousarray(query.swapaxes(1, 2)).swapaxes(1, 2), key]
    views.append(np.repeat(value, 2, axis=3)[..., ::2])
    dlattn.dlattn_forward(*views, "scale", SCALE, "causal", 1, wide[:, :, ::2].swapaxes(1, 2))
    assert_close(wide[:, :, ::2].swapaxes(1, 2), reference(query, key, value)[0])
    assert (wide[:, :, 1::2] == 7).all()


def test_workspace(dlattn):
    query, key, value = problem()
    output, lse = outputs()
    least = dlattn.dlattn_workspace_bytes(query, key, value, output, lse)
    memory = np.empty(least + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][:least]
    dlattn.dlattn_forward(query, key, value, "scale", SCALE, "workspace", aligned, output, lse)
    assert_close(output, reference(query, key, value, causal=False)[0])
    if least > 0:
        with pytest.raises(ValueError, match=r"workspace: .* bytes are given"):
            dlattn.dlattn_forward(query, key, value, "workspace", aligned[:-1], output)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": 1}, TypeError, "query: must be a tensor"),
        ({"output": None}, TypeError, "output: must be a tensor"),
        ({"query": None}, TypeError, "query: must be a tensor, is of tvm-ffi's type None"),
        ({"options": ["causal", "yes"]}, TypeError, "causal: must be an int, .* type ffi.*Str"),
        ({"options": ["key_lengths", np.ones(2, int)]}, ValueError, "key_lengths: dtype is int64"),
        ({"options": ["key_lengths", 3]}, TypeError, "key_lengths: must be a tensor, .* type int"),
        (
            {"options": ["workspace", np.zeros(1 << 20, np.int8)]},
            ValueError,
            "workspace: must be a",
        ),
        (
            {"options": ["workspace", np.zeros((9, 9), "u1")[:, 1:]]},
            ValueError,
            "workspace: must be a",
        ),
        ({"options": ["num_threads", 1 << 40]}, TypeError, "num_threads: must be an int"),
        ({"options": ["mask", 1]}, TypeError, "mask: must be a tensor"),
        ({"options": ["scale", "large"]}, TypeError, "scale: must be a number"),
        ({"options": ["casual", True]}, ValueError, 'no option "casual"; it has causal, '),
        ({"options": ["kernel", "none such"]}, ValueError, 'no kernel "none such"'),
        ({"options": ["scale", float("inf")]}, ValueError, "scale"),
        ({"value": np.zeros((1, 2, 11, 24), np.float32)}, ValueError, "value: axis 0"),
        ({"query": np.zeros((2, 4, 9, 16), np.int32)}, RuntimeError, "query: dtype"),
        ({"lse": np.zeros((2, 4, 8), np.float32)}, ValueError, "lse: axis 2"),
    ],
)
def test_refusals(dlattn, change, error, message):
    """Each is the Python exception that fits, says why, and leaves the output as it was."""
    arguments = dict(zip(("query", "key", "value"), problem(), strict=True))
    output, lse = outputs()
    arguments |= {"options": [], "output": output, "lse": lse} | change
    options = arguments.pop("options")
    tensors = list(arguments.values())
    with pytest.raises(error, match=message):
        dlattn.dlattn_forward(*tensors[:3], *options, *tensors[3:])
    assert np.isnan(output).all()


def test_read_only_output(dlattn):
    query, key, value = problem()
    output, _ = outputs()
    output.flags.writeable = False
    with pytest.raises(BufferError):
        dlattn.dlattn_forward(query, key, value, output)
    assert np.isnan(output).all()


def test_arity(dlattn):
    query, key, value = problem()
    output, lse = outputs()
    with pytest.raises(TypeError, match="output: is missing"):
        dlattn.dlattn_forward(query, key, value)
    with pytest.raises(TypeError, match="causal: has no value"):
        dlattn.dlattn_forward(query, key, value, "causal")
    with pytest.raises(TypeError, match="after lse"):
        dlattn.dlattn_forward(query, key, value, output, lse, lse)


def derivative(f, x, direction, step=1e-6):
    """Of the number f(x), in that direction, by central differences in float64."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def gradients():
    """Arrays for those of query, key and value."""
    return [np.full(x.shape, np.nan, np.float32) for x in problem()]


def test_backward(dlattn):
    """Beside finite differences of the reference; the bias and the log-sum-exp are among it."""
    inputs = dict(zip(("query", "key", "value"), problem(), strict=True))
    rng = np.random.default_rng(1)
    inputs["bias"] = rng.standard_normal((1, 4, 1, 11), dtype=np.float32)
    output, lse = outputs()
    options = ["causal", True, "scale", SCALE, "bias", inputs["bias"]]
    main = [inputs[name] for name in ("query", "key", "value")]
    dlattn.dlattn_forward(*main, *options, output, lse)
    d_output, d_lse = (rng.standard_normal(x.shape, dtype=np.float32) for x in (output, lse))
    found = dict(zip(inputs, [*gradients(), np.full_like(inputs["bias"], np.nan)], strict=True))
    written = [found[name] for name in ("query", "key", "value")]
    options += ["d_lse", d_lse, "d_bias", found["bias"]]
    arguments = [d_output, *main, output, lse, *options, *written]
    assert dlattn.dlattn_backward_kernel(*arguments).startswith("cpu_bwd_")
    assert dlattn.dlattn_backward_workspace_bytes(*arguments) >= 0
    dlattn.dlattn_backward(*arguments)
    for name, gradient in found.items():
        direction = rng.standard_normal(inputs[name].shape)

        def loss(x, name=name):
            output, lse = reference(**{**inputs, name: x})
            return (output * d_output).sum() + (lse * d_lse).sum()

        expected = derivative(loss, inputs[name].astype(np.float64), direction)
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=2e-5, atol=2e-5)


def test_backward_of_what_is_wanted(dlattn):
    query, key, value = problem()
    output, lse = outputs()
    dlattn.dlattn_forward(query, key, value, output, lse)
    main = [np.ones_like(output), query, key, value, output, lse]
    d_query, d_key, d_value = gradients()
    dlattn.dlattn_backward(*main, d_query, d_key, d_value)
    alone = gradients()[1]
    dlattn.dlattn_backward(*main, None, alone, None)
    np.testing.assert_array_equal(alone, d_key)
    with pytest.raises(ValueError, match="gradients: all are absent"):
        dlattn.dlattn_backward(*main, None, None, None)
    with pytest.raises(TypeError, match="d_value: is missing; the arguments are d_output, query"):
        dlattn.dlattn_backward(*main, d_query, d_key)
    with pytest.raises(TypeError, match="lse: must be a tensor, is of tvm-ffi's type None"):
        dlattn.dlattn_backward(*main[:-1], None, d_query, d_key, d_value)
    with pytest.raises(ValueError, match="d_query: axis 3"):
        dlattn.dlattn_backward(*main, d_query[..., :8], None, None)
    with pytest.raises(ValueError, match='no option "d_bias"; it has causal'):
        dlattn.dlattn_forward(query, key, value, "d_bias", d_key, output)


def test_missing_library():
    """The error names the places searched."""
    program = f"import tvm_ffi; tvm_ffi.load_module({MODULE!r}).dlattn_version()"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"DLATTN_LIBRARY": "/no/such/file"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "RuntimeError: libdlattn was not found" in run.stderr
    assert "/no/such/file: cannot open shared object" in run.stderr


@I.ir_module
class Attention:
    """Attention between two transposes, [B, L, H, D] in and out; all but the call is TVM's own."""

    @R.function
    def main(
        query: R.Tensor((2, 9, 4, 16), "float32"),
        key: R.Tensor((2, 11, 2, 16), "float32"),
        value: R.Tensor((2, 11, 2, 24), "float32"),
    ):
        with R.dataflow():
            query_bhld = R.permute_dims(query, axes=[0, 2, 1, 3])
            key_bhld = R.permute_dims(key, axes=[0, 2, 1, 3])
            value_bhld = R.permute_dims(value, axes=[0, 2, 1, 3])
            both = R.call_dps_packed(
                "dlattn_forward",
                (
                    query_bhld,
                    key_bhld,
                    value_bhld,
                    R.str("causal"),
                    R.prim_value(True),
                    R.str("scale"),
                    R.prim_value(0.3),
                ),
                out_ty=[R.Tensor((2, 4, 9, 24), "float32"), R.Tensor((2, 4, 9), "float32")],
            )
            output = R.permute_dims(both[0], axes=[0, 2, 1, 3])
            lse = both[1]
            R.output(output, lse)
        return (output, lse)


def test_relax():
    executable = tvm.compile(Attention, target="llvm").jit()
    executable.import_module(tvm.runtime.load_module(MODULE))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    query, key, value = problem()
    arguments = [
        tvm.runtime.tensor(np.ascontiguousarray(x.swapaxes(1, 2)), tvm.cpu())
        for x in (query, key, value)
    ]
    output, lse = (x.numpy() for x in machine["main"](*arguments))
    expected, expected_lse = reference(query, key, value)
    assert_close(output.swapaxes(1, 2), expected)
    assert_close(lse, expected_lse)
