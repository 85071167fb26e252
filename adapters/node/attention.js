/**
 * Causal self-attention of what stands on standard input:
 *
 *     npm ci --ignore-scripts
 *     DLATTN_LIBRARY=../../bazel-bin/libdlattn.so.1 node attention.js 2 4 9 64 <qkv.f32 >output.f32
 *
 * The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
 * [batch, heads, length, head_dim] of float32; standard output gets the output in the same shape, then the
 * log-sum-exp of every row, [batch, heads, length].
 */
import { readFileSync, writeFileSync } from "node:fs";
import { attention, tensor } from "./index.js";

const shape = process.argv.slice(2, 6).map(Number);
const count = shape.reduce((a, b) => a * b, 1);
const bytes = new Uint8Array(readFileSync(0));
if (shape.length !== 4 || bytes.length !== 3 * 4 * count) throw new Error("the input is not 3 x B x H x L x D floats");
const input = new Float32Array(bytes.buffer);
const [query, key, value] = [0, 1, 2].map((i) => tensor(input.subarray(i * count, (i + 1) * count), shape));
const { output, lse } = attention(query, key, value, { causal: true, lse: true });
writeFileSync(1, Buffer.concat([output, lse].map(({ data }) => new Uint8Array(data.buffer))));
