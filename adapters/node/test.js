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

test("refusals", () => {
    assert.match(version, /^\d+\.\d+\.\d+$/);
    assert.throws(() => tensor(new Float32Array(3), [1, 1, 2, 2]), /data: has 3 elements, \[1,1,2,2\] has 4/);
    assert.throws(() => tensor([1, 2], [1, 1, 1, 2]), /data: must be a Float32Array or a Float64Array/);
    assert.throws(() => attention(q, k, v, { casual: true }), /casual: is no option of attention/);
    assert.throws(() => attention(q, k, v, { alignment: "left" }), /alignment: is left, must be topLeft or/);
    assert.throws(() => attention(q, make([2, 3, 7, 8], 2), v), /value: axis 1 \(heads\) is 2, must be 3 as in key/);
});
