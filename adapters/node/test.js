/** node --test test.js: the package by its own name, against plain loops. */
import assert from "node:assert/strict";
import test from "node:test";
import { attention, tensor, version } from "dlattn";

const numbers = (count, seed, Kind = Float32Array) => Kind.from({ length: count }, (_, i) => Math.sin(12.9898 * (i + seed)));
const make = (shape, seed, Kind) => tensor(numbers(shape.reduce((a, b) => a * b, 1), seed, Kind), shape);

/** In double; visible(row, key) says what a row sees. */
function reference(query, key, value, visible, scale = query.shape[3] ** -0.5) {
    const [batches, heads, rows, dim] = query.shape, [, headsKv, keys] = key.shape, dimV = value.shape[3];
    const output = [], lse = [];
    for (let row = 0; row < batches * heads * rows; row++) {
        const head = Math.floor(row / rows), batch = Math.floor(head / heads);
        const headKv = batch * headsKv + Math.floor((head % heads) / (heads / headsKv));
        const logits = [];
        for (let k = 0; k < keys; k++) {
            let sum = 0;
            for (let d = 0; d < dim; d++) sum += query.data[row * dim + d] * key.data[(headKv * keys + k) * dim + d];
            logits.push(visible(row % rows, k) ? sum * scale : -Infinity);
        }
        const total = logits.reduce((sum, x) => sum + Math.exp(x), 0);
        lse.push(Math.log(total));
        for (let d = 0; d < dimV; d++) {
            output.push(logits.reduce((sum, x, k) => sum + Math.exp(x) * value.data[(headKv * keys + k) * dimV + d], 0) / total);
        }
    }
    return { output, lse };
}

function close(found, wanted, tolerance) {
    assert.equal(found.length, wanted.length);
    wanted.forEach((x, i) => assert.ok(Math.abs(found[i] - x) <= tolerance, `${i}: ${found[i]}, wanted ${x}`));
}

const q = make([2, 4, 5, 8], 1), k = make([2, 2, 7, 8], 2), v = make([2, 2, 7, 6], 3);
for (const [name, options, visible, scale] of [
    ["plain", {}, () => true],
    ["causal", { causal: true }, (row, key) => key <= row],
    ["bottom right", { causal: true, alignment: "bottomRight" }, (row, key) => key <= row + 2],
    ["window", { window: [1, 2] }, (row, key) => key >= row - 1 && key <= row + 2],
    ["scale", { scale: 0.3 }, () => true, 0.3],
]) {
    test(name, () => {
        const { output, lse } = attention(q, k, v, { ...options, lse: true });
        const wanted = reference(q, k, v, visible, scale);
        assert.deepEqual(output.shape, [2, 4, 5, 6]);
        close(output.data, wanted.output, 1e-5);
        close(lse.data, wanted.lse, 1e-5);
    });
}

test("float64", () => {
    const [a, b, c] = [1, 2, 3].map((seed) => make([1, 2, 5, 8], seed, Float64Array));
    const { output, lse } = attention(a, b, c);
    assert.equal(lse, undefined);
    close(output.data, reference(a, b, c, () => true).output, 1e-13);
});

/** Bytes of float8, of either sign, between 1/8 and 2: from the first code on, so many. */
const codes = (count, first, many) => Uint8Array.from({ length: count }, (_, i) => (first + ((7 * i) % many)) | ((i % 3) % 2 << 7));

/** What such bytes with so many bits of mantissa stand for, each of the equal parts times its own scale. */
function widened(bytes, shape, mantissa, scales = [1]) {
    const bias = (1 << (6 - mantissa)) - 1, one = 1 << mantissa;
    const wide = (code) => (code & 0x80 ? -1 : 1) * (1 + (code % one) / one) * 2 ** (((code & 0x7f) >> mantissa) - bias);
    return tensor(Float32Array.from(bytes, (code, i) => wide(code) * scales[Math.floor((i * scales.length) / bytes.length)]), shape);
}

test("float8", () => {
    const keyScale = [0.5, 2, 1, 0.25], valueScale = [4, 0.5];
    const [qBytes, kBytes, vBytes] = [codes(320, 0x20, 32), codes(224, 0x20, 32), codes(168, 0x30, 16)];
    const key = tensor(kBytes, k.shape, "float8_e4m3fn"), value = tensor(vBytes, v.shape, "float8_e5m2");
    const [wideK, wideV] = [widened(kBytes, k.shape, 3, keyScale), widened(vBytes, v.shape, 2, valueScale)];
    const scales = {
        keyScale: tensor(Float32Array.from(keyScale), [2, 2]), valueScale: tensor(Float32Array.from(valueScale), [2, 1]),
    };
    const { output, lse } = attention(q, key, value, { ...scales, lse: true });
    const wanted = reference(q, wideK, wideV, () => true);
    close(output.data, wanted.output, 1e-5);
    close(lse.data, wanted.lse, 1e-5);

    // In double, scales that are powers of two give the very bits.
    const exact = { kernel: "cpu_fwd_ref" };
    assert.deepEqual(attention(q, key, value, { ...scales, ...exact }).output, attention(q, wideK, wideV, exact).output);

    const query = tensor(Buffer.from(qBytes), q.shape, "float8_e4m3fn");
    const narrow = attention(query, key, value, { ...scales, queryScale: 0.5 }).output;
    close(narrow.data, reference(widened(qBytes, q.shape, 3, [0.5]), wideK, wideV, () => true).output, 1e-5);
});

test("float8 pages with scales of their own", () => {
    const [query, bytes, scales] = [make([1, 2, 1, 8], 1), codes(96, 0x20, 32), [0.5, 2, 3]];
    const pages = tensor(bytes, [3, 1, 4, 8], "float8_e4m3fn"), { data } = widened(bytes, [3, 1, 4, 8], 3, scales);
    const scale = tensor(Float32Array.from(scales), [3, 1]);
    const options = {
        blockTable: tensor(Int32Array.of(2, 0), [1, 2]), keyLengths: tensor(Int32Array.of(7), [1]), keyScale: scale, valueScale: scale,
    };
    const keys = tensor(Float32Array.of(...data.subarray(64), ...data.subarray(0, 24)), [1, 1, 7, 8]);
    close(attention(query, pages, pages, options).output.data, reference(query, keys, keys, () => true).output, 1e-5);
    assert.throws(() => attention(query, pages, pages, { ...options, keyLengths: undefined }), /key_lengths: is absent, block_table needs it/);
    assert.throws(() => attention(query, pages, pages, { ...options, keyLengths: 7 }), /keyLengths: must be a tensor of an Int32Array/);
});

test("float8 refusals", () => {
    const key = tensor(codes(224, 0x20, 32), k.shape, "float8_e4m3fn");
    const refused = (options, says) => assert.throws(() => attention(q, key, key, options), says);
    refused({ keyScale: -1 }, /key_scale: entry \[0, 0\] is -1, must be positive and finite/);
    refused({ queryScale: NaN }, /query_scale: entry \[0, 0\] is -?nan, must be positive/);
    refused({ valueScale: tensor(new Float32Array(2), [1, 2]) }, /value_scale: entry \[0, 0\] is 0, must be positive/);
    refused({ keyScale: tensor(new Float32Array(3), [1, 3]) }, /key_scale: axis 1 \(heads\) is 3/);
    refused({ keyScale: tensor(new Float64Array(1), [1]) }, /keyScale: must be a number or a tensor of a Float32Array/);
    refused({ keyScale: "2" }, /keyScale: must be a number or a tensor of a Float32Array/);
    assert.throws(() => tensor(new Uint8Array(4), [1, 1, 2, 2]), /dtype: is undefined, a Uint8Array needs float8_e4m3fn or float8_e5m2/);
    assert.throws(() => tensor(new Uint8Array(4), [1, 1, 2, 2], "float8"), /dtype: is float8, a Uint8Array needs/);
    assert.throws(() => tensor(new Float32Array(4), [1, 1, 2, 2], "float8_e5m2"), /dtype: is float8_e5m2, only a Uint8Array has one/);
    assert.throws(() => attention(q, { data: new Uint8Array(224), shape: k.shape }, k), /dtype: is undefined/);
});

test("refusals", () => {
    assert.match(version, /^\d+\.\d+\.\d+$/);
    assert.throws(() => tensor(new Float32Array(3), [1, 1, 2, 2]), /data: has 3 elements, \[1,1,2,2\] has 4/);
    assert.throws(() => tensor([1, 2], [1, 1, 1, 2]), /data: must be a Float32Array, Float64Array, Int32Array or a Uint8Array with a dtype/);
    assert.throws(() => attention(q, k, v, { casual: true }), /casual: is no option of attention/);
    assert.throws(() => attention(q, k, v, { alignment: "left" }), /alignment: is left, must be topLeft or/);
    assert.throws(() => attention(q, make([2, 3, 7, 8], 2), v), /value: axis 1 \(heads\) is 2, must be 3 as in key/);
});
