/**
 * Attention by libdlattn.so.1, without native code of one's own: koffi calls the plugin's C ABI.
 *
 *     import { attention, tensor } from "dlattn";
 *     const { output, lse } = attention(tensor(q, [1, 8, 128, 64]), k, v, { causal: true, lse: true });
 *
 * The plugin is the one that DLATTN_LIBRARY names, else the one beside this file, else what the system finds.
 */
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
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
    "cu_seqlens_q cu_seqlens_k block_table query_segments key_segments block_mask query_scale key_scale value_scale";
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

// The table of functions; koffi never closes the library.
const beside = fileURLToPath(new URL("libdlattn.so.1", import.meta.url));
const path = process.env.DLATTN_LIBRARY ?? (existsSync(beside) ? beside : "libdlattn.so.1");
if (path.includes("/") && !existsSync(path)) throw new Error(`libdlattn was not found: ${path}`);
const library = koffi.load(path);
const table = library.func("dlattn_get_api", koffi.pointer(Api), ["uint32"])(1);
if (!table) throw new Error("this library does not serve ABI 1");
const api = koffi.decode(table, Api);
if (Number(api.struct_size) < koffi.sizeof(Api)) throw new Error("this library's table of functions is cut short");
const bind = (slot, result, parameters) => koffi.decode(slot, koffi.proto(result, parameters));
const arguments_ = [koffi.pointer(Desc), koffi.pointer(Tensors)];
const lastError = bind(api.last_error, "str", []);
const select = bind(api.forward_query, "int32", [...arguments_, koffi.inout(koffi.pointer(Sku))]);
const forward = bind(api.forward, "int32", [...arguments_, koffi.pointer(Exec)]);
const check = (status) => { if (status !== 0) throw new Error(lastError()); };

const KINDS = new Map([
    [Float32Array, { code: 2, bits: 32 }], [Float64Array, { code: 2, bits: 64 }], [Int32Array, { code: 0, bits: 32 }],
]);
const FLOAT8 = new Map([["float8_e4m3fn", { code: 10, bits: 8 }], ["float8_e5m2", { code: 12, bits: 8 }]]);

/** DLPack's code and bits. */
function kindOf(data, dtype) {
    if (data instanceof Uint8Array) {
        if (!FLOAT8.has(dtype)) throw new TypeError(`dtype: is ${dtype}, a Uint8Array needs ${[...FLOAT8.keys()].join(" or ")}`);
        return FLOAT8.get(dtype);
    }
    if (!KINDS.has(data?.constructor)) throw new TypeError("data: must be a Float32Array, Float64Array, Int32Array or a Uint8Array with a dtype");
    if (dtype !== undefined) throw new TypeError(`dtype: is ${dtype}, only a Uint8Array has one`);
    return KINDS.get(data.constructor);
}

/**
 * A typed array as a tensor of this shape, row-major without gaps: a Float32Array, a Float64Array, an Int32Array (lengths, pages), or a
 * Uint8Array with the dtype that its bytes hold, "float8_e4m3fn" or "float8_e5m2".
 */
export function tensor(data, shape, dtype) {
    const count = shape.reduce((a, b) => a * b, 1);
    kindOf(data, dtype);
    if (data.length !== count) throw new RangeError(`data: has ${data.length} elements, [${shape}] has ${count}`);
    return { data, shape, dtype };
}

// Null strides say "row-major, no gaps".
const dlpack = ({ data, shape, dtype }) => zero(DLTensor, {
    data, device_type: 1, ndim: shape.length, ...kindOf(data, dtype), lanes: 1, shape: BigInt64Array.from(shape, BigInt),
});
// The optional tensors: their slots, what they hold, and what may be said instead.
const INTEGERS = { Kind: Int32Array, must: "must be a tensor of an Int32Array" };
const SCALE = { Kind: Float32Array, must: "must be a number or a tensor of a Float32Array" };
const OPTIONAL = {
    keyLengths: { slot: "key_lengths", ...INTEGERS }, blockTable: { slot: "block_table", ...INTEGERS },
    queryScale: { slot: "query_scale", ...SCALE }, keyScale: { slot: "key_scale", ...SCALE }, valueScale: { slot: "value_scale", ...SCALE },
};
const OPTIONS = new Set([
    "causal", "scale", "softcap", "window", "alignment", "numThreads", "kernel", "lse", ...Object.keys(OPTIONAL),
]);
const ALIGNMENTS = { topLeft: 0, bottomRight: 1 };
const WINDOW = 1n; // DLATTN_WINDOW of dlattn.h

function describe(options) {
    for (const name of Object.keys(options)) {
        if (!OPTIONS.has(name)) throw new TypeError(`${name}: is no option of attention, which has ${[...OPTIONS].join(", ")}`);
    }
    const { causal = false, scale = 0, softcap = 0, window, alignment = "topLeft", numThreads = 0, kernel = null } = options;
    if (!(alignment in ALIGNMENTS)) throw new TypeError(`alignment: is ${alignment}, must be topLeft or bottomRight`);
    const [left, right] = window ?? [0, 0];
    return zero(Desc, {
        flags: window ? WINDOW : 0n, scale, softcap, window_left: left, window_right: right, causal: Number(causal),
        alignment: ALIGNMENTS[alignment], num_threads: numThreads, kernel,
    });
}

/** The slots of the optional tensors that there are; a number is a scale of the whole tensor. */
function optionalSlots(options) {
    const slots = {};
    for (const [name, { slot, Kind, must }] of Object.entries(OPTIONAL)) {
        const given = options[name] ?? null;
        if (given === null) continue;
        const isScale = typeof given === "number" && Kind === Float32Array;
        const found = isScale ? tensor(Float32Array.of(given), [1]) : given;
        if (!(found.data instanceof Kind)) throw new TypeError(`${name}: ${must}`);
        slots[slot] = dlpack(found);
    }
    return slots;
}

/**
 * softmax(scale * query key^T) value over the keys that are visible.
 *
 * query: tensor of [B, H, Lq, D]; key [B, H_kv, Lk, D]; value [B, H_kv, Lk, D_v]; all of one type, or of float8, each its own. Options:
 * causal, scale (default 1 / sqrt(D)), softcap, window [left, right] (-1 is unbounded), alignment "topLeft" or "bottomRight" of causal
 * and window, numThreads, kernel, and lse: true for the log-sum-exp of each row;
 * keyLengths [B]: keys from there on are not read; with it blockTable [B, max_pages]: which pages are each batch's, where key and value
 * are [pages, H_kv, page_size, D]; both tensors of an Int32Array;
 * queryScale, keyScale, valueScale, which multiply these tensors: a positive number, or a tensor of a Float32Array, [B|1, H|1] or
 * [B|1, H_kv|1], of pages [pages|1, H_kv|1].
 * Returns { output, lse }, both tensors; the output is of the query's type, or of float32 if that is float8.
 */
export function attention(query, key, value, options = {}) {
    const desc = describe(options);
    const shape = [...query.shape.slice(0, -1), value.shape.at(-1)];
    const made = (dims, Kind) => tensor(new Kind(dims.reduce((a, b) => a * b, 1)), dims);
    const output = made(shape, query.dtype ? Float32Array : query.data.constructor);
    const lse = options.lse ? made(shape.slice(0, -1), Float32Array) : undefined;
    const slots = { query: dlpack(query), key: dlpack(key), value: dlpack(value), output: dlpack(output), ...optionalSlots(options) };
    const tensors = zero(Tensors, lse ? { ...slots, lse: dlpack(lse) } : slots);
    const sku = zero(Sku, {});
    check(select(desc, tensors, sku));
    const alignment = BigInt(sku.workspace_alignment); // a power of two
    const memory = koffi.alloc("uint8", Number(sku.workspace_bytes) + Number(alignment));
    try {
        const workspace = (memory + alignment - 1n) & -alignment;
        check(forward(desc, tensors, zero(Exec, { workspace, workspace_bytes: sku.workspace_bytes })));
    } finally {
        koffi.free(memory);
    }
    return { output, lse };
}

/** The version of the plugin that is in use. */
export const version = bind(api.version, "str", [])();
