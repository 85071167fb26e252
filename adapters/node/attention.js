/**
 * Causal self-attention in Node without native code of one's own: koffi calls the plugin's C ABI.
 *
 *     npm ci --ignore-scripts
 *     DLATTN_LIBRARY=../../bazel-bin/libdlattn.so.1 node attention.js 2 4 9 64 <qkv.f32 >output.f32
 *
 * The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
 * [batch, heads, length, head_dim] of float32; standard output gets the output in the same shape, then the
 * log-sum-exp of every row, [batch, heads, length].
 */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import koffi from "koffi";

// The structs of abi/dlattn.h, field by field. A field left out of a literal below must be zero, so `zero` fills it.
const fields = (type, names) => Object.fromEntries(names.split(" ").map((name) => [name, type]));
const DLTensor = koffi.struct({
    data: "void *", device_type: "int32", device_id: "int32", ndim: "int32", code: "uint8", bits: "uint8",
    lanes: "uint16", shape: "int64 *", strides: "int64 *", byte_offset: "uint64",
});
const Desc = koffi.struct({
    struct_size: "size_t", flags: "uint64", ...fields("double", "scale softcap"),
    ...fields("int64", "window_left window_right"), ...fields("int32", "causal alignment"),
    ...fields("int64", "max_seqlen_q max_seqlen_k"), kernel: "char *", ...fields("int32", "num_threads reserved0"),
});
const slots = "query key value output lse bias mask alibi_slopes sinks query_lengths key_lengths " +
    "cu_seqlens_q cu_seqlens_k block_table";
const Tensors = koffi.struct({ struct_size: "size_t", ...fields(koffi.pointer(DLTensor), slots) });
const Exec = koffi.struct({
    struct_size: "size_t", flags: "uint64", ...fields("void *", "stream workspace"), workspace_bytes: "size_t",
    ...fields("void *", "parallel_for parallel_ctx"),
});
const Sku = koffi.struct({
    struct_size: "size_t", ...fields("char *", "kernel backend arch math accumulator"), features: "uint64",
    ...fields("size_t", "workspace_bytes workspace_alignment"),
    ...fields("int32", "contiguous deterministic bit_stable tile_q tile_k num_splits num_threads reserved0"),
});
const functions = "version last_error status_name forward_query forward"; // the first slots; the table is append-only
const Api = koffi.struct({
    struct_size: "size_t", ...fields("uint32", "abi_major abi_minor"), ...fields("void *", functions),
});
const zero = (struct, values) => ({
    ...Object.fromEntries(Object.entries(struct.members).map(([name, { type }]) =>
        [name, type.primitive === "Pointer" || type.primitive === "String" ? null : 0])),
    struct_size: koffi.sizeof(struct), ...values,
});

// 1. The table of functions; once in a process. koffi never closes the library.
const path = process.env.DLATTN_LIBRARY ?? "libdlattn.so.1";
if (path.includes("/") && !existsSync(path)) throw new Error(`libdlattn was not found: ${path}`);
const library = koffi.load(path);
const table = library.func("dlattn_get_api", koffi.pointer(Api), ["uint32"])(1);
if (!table) throw new Error("this library does not serve ABI 1");
const api = koffi.decode(table, Api);
if (Number(api.struct_size) < koffi.sizeof(Api)) throw new Error("this library's table of functions is cut short");
const bind = (slot, result, parameters) => koffi.decode(slot, koffi.proto(result, parameters));
const arguments_ = [koffi.pointer(Desc), koffi.pointer(Tensors)];
const lastError = bind(api.last_error, "str", []);
const query = bind(api.forward_query, "int32", [...arguments_, koffi.inout(koffi.pointer(Sku))]);
const forward = bind(api.forward, "int32", [...arguments_, koffi.pointer(Exec)]);
const check = (status) => { if (status !== 0) throw new Error(lastError()); };

// 2. Tensors over typed arrays; null strides say "row-major, no gaps".
const shape = process.argv.slice(2, 6).map(Number);
const count = shape.reduce((a, b) => a * b, 1);
const bytes = new Uint8Array(readFileSync(0));
if (shape.length !== 4 || bytes.length !== 3 * 4 * count) throw new Error("the input is not 3 x B x H x L x D floats");
const input = new Float32Array(bytes.buffer);
const tensor = (data, dims) => zero(DLTensor, {
    data, device_type: 1, ndim: dims.length, code: 2, bits: 32, lanes: 1, shape: BigInt64Array.from(dims, BigInt),
});
const output = new Float32Array(count), lse = new Float32Array(count / shape[3]);
const [q, k, v] = [0, 1, 2].map((i) => tensor(input.subarray(i * count, (i + 1) * count), shape));
const tensors = zero(Tensors, { query: q, key: k, value: v, output: tensor(output, shape), lse: tensor(lse, shape.slice(0, 3)) });

// 3. Which kernel that is and its workspace; then the call. On the CPU the result is there on return.
const desc = zero(Desc, { causal: 1 }), sku = zero(Sku, {});
check(query(desc, tensors, sku));
const alignment = BigInt(sku.workspace_alignment); // a power of two
const memory = koffi.alloc("uint8", Number(sku.workspace_bytes) + Number(alignment)); // koffi frees it with the process
const workspace = (memory + alignment - 1n) & -alignment;
check(forward(desc, tensors, zero(Exec, { workspace, workspace_bytes: sku.workspace_bytes })));
writeFileSync(1, Buffer.concat([output, lse].map((a) => new Uint8Array(a.buffer))));
