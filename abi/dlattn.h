/*
 * dlattn: attention for every ML runtime, behind one small C ABI.
 *
 *     const dlattn_api *api = dlattn_get_api(DLATTN_ABI_MAJOR);   // after dlopen + dlsym, see dlattn_loader.h
 *     dlattn_tensors t = {.struct_size = sizeof t, .query = &q, .key = &k, .value = &v, .output = &y};
 *     dlattn_forward_desc d = {.struct_size = sizeof d, .causal = 1};
 *     dlattn_sku sku = {.struct_size = sizeof sku};
 *     api->forward_query(&d, &t, &sku);                            // sku.workspace_bytes; reads no data
 *     dlattn_exec e = {.struct_size = sizeof e, .workspace = ws, .workspace_bytes = sku.workspace_bytes};
 *     if (api->forward(&d, &t, &e) != DLATTN_OK) puts(api->last_error());
 *
 * Rules that hold for every call
 * - Structs start with `struct_size`, which the caller sets to its own sizeof. Zero in any other field means
 *   "default" or "absent". The library reads what both sides know; a newer caller's tail must be zero.
 * - A status other than DLATTN_OK leaves every output untouched; last_error() then says what was wrong.
 *   Only DLATTN_DEVICE_ERROR and DLATTN_INTERNAL, which arise while a kernel runs, give no such promise.
 * - Tensors are borrowed for the call (on a GPU: until the stream has run it). Nothing is allocated, locked
 *   or synchronised by forward() and plan_run() after the first call on a device; the caller gives the workspace.
 * - Every function may be called from any thread at any time; a plan may be shared by threads.
 *
 * What is computed, per batch b, query head h and query row i:
 *     s_j = softcap(scale * <q_i, k_j>) + bias_ij - slope * |i + offset - j|      softcap(x) = c * tanh(x / c)
 *     o_i = sum_j exp(s_j) v_j / (exp(sink_h) + sum_j exp(s_j)),   lse_i = ln(exp(sink_h) + sum_j exp(s_j))
 * over the visible keys j. See docs/numerics.md for precision, NaN and empty rows.
 *
 * Four operations: forward (above), backward (its gradients), merge (results over parts of the keys into one) and append (new
 * keys and values into a cache). Each has NAME(), which checks, chooses and runs, and NAME_query(), which tells the kernel and
 * the workspace. What is marked 1.1 is absent from older libraries: look at dlattn_api.struct_size.
 */
#ifndef DLATTN_H_
#define DLATTN_H_

#include <stddef.h>
#include <stdint.h>

#ifndef DLPACK_DLPACK_H_
#include <dlpack/dlpack.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define DLATTN_ABI_MAJOR 1
#define DLATTN_ABI_MINOR 1

/* ---- Status ------------------------------------------------------------------------------------------- */

enum {
    DLATTN_OK = 0,
    DLATTN_INVALID_ARGUMENT = 1,   /* the call contradicts itself or this header */
    DLATTN_UNSUPPORTED = 2,        /* a legal call that no kernel of this library covers on that device */
    DLATTN_BUFFER_TOO_SMALL = 3,   /* the workspace is absent or too small; last_error() says the bytes needed */
    DLATTN_OUT_OF_MEMORY = 4,      /* of the host, by plan_create() */
    DLATTN_DEVICE_UNAVAILABLE = 5, /* no driver, no such device */
    DLATTN_DEVICE_ERROR = 6,       /* the driver refused; last_error() carries its text */
    DLATTN_VERSION_MISMATCH = 7,   /* a managed tensor of another DLPack major version */
    DLATTN_INTERNAL = 8            /* a fault of the library */
};

/* ---- What to compute ---------------------------------------------------------------------------------- */

/* Where the diagonal lies when the lengths differ. It places causal, window and ALiBi alike. */
enum {
    DLATTN_ALIGN_TOP_LEFT = 0,    /* offset = 0: row 0 meets key 0 (PyTorch is_causal, JAX) */
    DLATTN_ALIGN_BOTTOM_RIGHT = 1 /* offset = Lk - Lq: the last row meets the last key (FlashAttention, decode) */
};
/* To either, dlattn_forward_desc.diagonal_offset is added. */

/* dlattn_forward_desc.flags */
#define DLATTN_WINDOW UINT64_C(1)        /* window_left and window_right count; without it both must be 0 or -1 */
#define DLATTN_EXACT_SCALE UINT64_C(2)   /* `scale` is taken as it is, even 0 */
#define DLATTN_EMPTY_LSE_INF UINT64_C(4) /* a row that sees no key gets lse +inf (FlashAttention 2), not -inf */
#define DLATTN_ANY_ORDER                                                                                               \
    UINT64_C(8) /* 1.1, backward: sums may be taken in any order where that is faster; bits then vary */

/* Options of one attention problem. All zero: softmax(Q K^T / sqrt(D)) V over every key. */
typedef struct dlattn_forward_desc {
    size_t struct_size;
    uint64_t flags;       /* DLATTN_WINDOW | ... ; an unknown bit is refused */
    double scale;         /* factor of q.k; 0 = 1 / sqrt(D_qk) unless DLATTN_EXACT_SCALE; must be finite */
    double softcap;       /* c > 0 caps logits at c * tanh(s / c); 0 = none */
    int64_t window_left;  /* with DLATTN_WINDOW: keys j >= i + offset - window_left are visible; -1 = unbounded */
    int64_t window_right; /* with DLATTN_WINDOW: keys j <= i + offset + window_right are visible; -1 = unbounded */
    int32_t causal;       /* 1: keys j <= i + offset are visible */
    int32_t alignment;    /* DLATTN_ALIGN_*: what offset is */
    int64_t max_seqlen_q; /* varlen: longest query sequence; 0 = total_q. Longer ones are an error (CPU), cut (GPU) */
    int64_t max_seqlen_k; /* varlen: longest key sequence; 0 = total_k */
    const char *kernel;   /* run this row (kernel_info.name) or refuse; NULL = the first that accepts */
    int32_t num_threads; /* CPU threads to plan for; 0 = as many as pay, of DLATTN_NUM_THREADS or the process's cores */
    int32_t reserved0;   /* zero */

    /* ABI 1.1 */
    double
        dropout_probability; /* in [0, 1): the chance of a weight to become 0; others are divided by 1 - that; lse has none */
    uint64_t
        dropout_seed; /* which weights: see docs/numerics.md, the same for forward and backward, whatever runs it */
    uint64_t dropout_offset; /* another stream of the same seed */
    int64_t
        diagonal_offset; /* added to the alignment's offset: where a shard of a longer sequence lies; at most 2^31 - 1 */
    int32_t block_q;     /* with block_mask: query rows and keys of one of its blocks, both at least 1 */
    int32_t block_k;
    DLDataType
        query_dtype;      /* what a uint8 tensor holds, for frameworks that cannot export float8: {10, 8, 1} e4m3fn, */
    DLDataType key_dtype; /* {12, 8, 1} e5m2; all zero: the tensor's own dtype */
    DLDataType value_dtype;
    int32_t reserved1; /* zero */
} dlattn_forward_desc;

/*
 * The tensors of one call, `T` being how they are handed over. Logical axes, any strides (0 broadcasts an input, negative ones
 * run backwards from element 0), byte_offset honoured, NULL strides = compact row-major, no extent above 2^31 - 1. On a GPU each
 * element is aligned to its own size. Optional ones are NULL. All live on one device (kDLCPU or kDLCUDAHost; kDLCUDA or
 * kDLCUDAManaged). dtype E: float16, bfloat16, float32 or float64, the same for query, key, value and output. Since 1.1 these
 * four may differ (E is the output's then), and query, key and value may be float8_e4m3fn or float8_e5m2.
 *
 *   query          E  [B, H, Lq, D]           or packed [total_q, H, D] with cu_seqlens_q
 *   key            E  [B, H_kv, Lk, D]        or packed [total_k, H_kv, D] with cu_seqlens_k,
 *                                             or pages  [pages, H_kv, page_size, D] with block_table
 *   value          E  [B, H_kv, Lk, D_v]      as key; H must be a multiple of H_kv (query head h reads kv head h / (H / H_kv))
 *   output         E  [B, H, Lq, D_v]         or packed [total_q, H, D_v]; written whole; no stride 0, no element twice
 *   lse            float32 or E  [B, H, Lq]   or packed [H, total_q]; optional; natural logarithm; written whole
 *   bias           float32 or E  [B|1, H|1, Lq|1, Lk|1]  optional; added to the capped logit
 *   mask           bool or uint8 [B|1, H|1, Lq|1, Lk|1]  optional; non-zero = visible
 *   alibi_slopes   float32 [H] or [B, H]      optional
 *   sinks          float32 [H]                optional; a logit in the denominator that carries no value
 *   query_lengths  int32 [B]                  optional; rows from there on give output 0 and an empty row's lse
 *   key_lengths    int32 [B]                  optional (required with block_table); keys from there on are never read
 *   cu_seqlens_q   int32 [B + 1]              optional; ascending from 0 to total_q
 *   cu_seqlens_k   int32 [B + 1]              optional; ascending from 0 to total_k; goes with cu_seqlens_q
 *   block_table    int32 [B, max_pages]       optional; page of keys [n * page_size, (n + 1) * page_size) of batch b
 * and since 1.1
 *   query_segments int32 [B, Lq]              or packed [total_q]; optional, with key_segments: a key is visible to a row only
 *   key_segments   int32 [B, Lk]              or packed [total_k]    if their numbers are equal (documents in one sequence)
 *   block_mask     uint8 [B|1, H|1, ceil(Lq / block_q), ceil(Lk / block_k)]  optional; of each block of rows and keys:
 *                                             0 = no key is visible, 1 = `mask` decides, 2 = `mask` is not read;
 *                                             causal, window, lengths and segments hold in any case
 *   query_scale    float32 [1] or [B|1, H|1]          optional; positive and finite: a query counts as query * query_scale
 *   key_scale      float32 [1] or [B|1, H_kv|1],      with block_table [pages|1, H_kv|1]; optional; likewise
 *   value_scale    float32 [1] or [B|1, H_kv|1],      with block_table [pages|1, H_kv|1]; optional; likewise
 *
 * A stride-0 head axis on both key and value is multi-query attention, whatever the head count says.
 * Output and lse share no element with each other or with an input; they may interleave with them in one buffer.
 * Entries of block_table for pages in which lengths, causal and window leave no key to any row may be anything; a mask does
 * not count.
 * Integer tensors and scales in host memory are checked before anything is written. On a GPU their values cannot be seen
 * from the host: lengths are clamped to the extents, rows and keys outside them are neither read nor written.
 */
#define DLATTN_TENSOR_LIST(SLOT, T)                                                                                    \
    SLOT(T, query)                                                                                                     \
    SLOT(T, key)                                                                                                       \
    SLOT(T, value)                                                                                                     \
    SLOT(T, output)                                                                                                    \
    SLOT(T, lse)                                                                                                       \
    SLOT(T, bias)                                                                                                      \
    SLOT(T, mask)                                                                                                      \
    SLOT(T, alibi_slopes)                                                                                              \
    SLOT(T, sinks)                                                                                                     \
    SLOT(T, query_lengths)                                                                                             \
    SLOT(T, key_lengths)                                                                                               \
    SLOT(T, cu_seqlens_q)                                                                                              \
    SLOT(T, cu_seqlens_k)                                                                                              \
    SLOT(T, block_table)                                                                                               \
    SLOT(T, query_segments)                                                                                            \
    SLOT(T, key_segments)                                                                                              \
    SLOT(T, block_mask)                                                                                                \
    SLOT(T, query_scale)                                                                                               \
    SLOT(T, key_scale)                                                                                                 \
    SLOT(T, value_scale)

#define DLATTN_SLOT(T, name) T name;
#define DLATTN_TENSOR_SLOTS(T)                                                                                         \
    size_t struct_size;                                                                                                \
    DLATTN_TENSOR_LIST(DLATTN_SLOT, T)

/* Plain tensors, borrowed for the call. */
typedef struct dlattn_tensors {
    DLATTN_TENSOR_SLOTS(const DLTensor *)
} dlattn_tensors;

struct DLManagedTensorVersioned;

/* The same slots as DLPack exchanges them before version 1.0 ... */
typedef struct dlattn_managed_tensors {
    DLATTN_TENSOR_SLOTS(struct DLManagedTensor *)
} dlattn_managed_tensors;

/* ... and since 1.0: the major version must be 1 and an output must not be READ_ONLY. */
typedef struct dlattn_versioned_tensors {
    DLATTN_TENSOR_SLOTS(struct DLManagedTensorVersioned *)
} dlattn_versioned_tensors;

/*
 * ABI 1.1. What backward() takes beside the call of forward(), whose output and lse (both required) are its inputs. Gradients of
 *     loss = <d_output, output> + <d_lse, lse>
 * with P_ij = exp(s_ij - lse_i), delta_i = <d_output_i, output_i> - d_lse_i, dS_ij = P_ij (<d_output_i, v_j> - delta_i)
 * (FlashAttention, arXiv:2205.14135, algorithm 4; docs/numerics.md adds softcap, bias, ALiBi, sinks, scales and dropout):
 *     d_value_j = sum_i P_ij d_output_i,   d_key_j = scale sum_i dS_ij q_i,   d_query_i = scale sum_j dS_ij k_j
 *
 *   d_output        in   as output, its dtype or float32
 *   d_lse           in   optional; as lse, its dtype or float32
 *   d_query         out  as query   each optional: NULL = not wanted, at least one is. Shaped as the tensor that it belongs to, of its
 *   d_key           out  as key     dtype or float32; written whole; no stride 0, no element shared with another tensor. Where
 *   d_value         out  as value   the tensor has an axis of extent 1 that stands for more, its gradient is the sum over them;
 *   d_bias          out  as bias    where it has stride 0, its gradient has each element by itself
 *   d_alibi_slopes  out  as alibi_slopes, float32
 *   d_sinks         out  as sinks, float32
 *
 * What no row sees has gradient 0, and so have rows that see nothing, whatever stands there: NaN and infinity included. Paged
 * keys are refused (DLATTN_UNSUPPORTED), and so are float8 tensors and scales.
 */
#define DLATTN_GRADIENT_LIST(SLOT, T)                                                                                  \
    SLOT(T, d_output)                                                                                                  \
    SLOT(T, d_lse)                                                                                                     \
    SLOT(T, d_query)                                                                                                   \
    SLOT(T, d_key)                                                                                                     \
    SLOT(T, d_value)                                                                                                   \
    SLOT(T, d_bias)                                                                                                    \
    SLOT(T, d_alibi_slopes)                                                                                            \
    SLOT(T, d_sinks)

typedef struct dlattn_gradients {
    size_t struct_size;
    DLATTN_GRADIENT_LIST(DLATTN_SLOT, const DLTensor *)
} dlattn_gradients;

/*
 * ABI 1.1. What merge() combines: results over disjoint parts of the keys of the same rows.
 *     m_i = max_n lse_ni,  lse_i = m_i + ln sum_n exp(lse_ni - m_i),  output_i = sum_n exp(lse_ni - lse_i) output_ni
 * A part with lse -inf has no weight, whatever its output holds; a row without any other gets output 0 and lse -inf. A sink
 * belongs to exactly one of the parts.
 *
 *   outputs[n]  E  [B, H, Lq, D_v]  or packed [total_q, H, D_v];   lses[n]  float32 or E  [B, H, Lq]  or packed [H, total_q]
 *   output      E                                                  lse      float32 or E, optional
 * All of one shape; E: float16, bfloat16, float32 or float64, each its own. output and lse may be outputs[n] and lses[n] for one n,
 * at the same address with the same strides and dtype, and share no element with any other.
 */
typedef struct dlattn_partials {
    size_t struct_size;
    int64_t count; /* at least 1, at most 1024 */
    const DLTensor *const *outputs;
    const DLTensor *const *lses;
    const DLTensor *output;
    const DLTensor *lse;
} dlattn_partials;

/*
 * ABI 1.1. What append() writes into a cache: row i of batch b becomes key (and value) cache_lengths[b] + i, converted to the
 * cache's dtype (to nearest even; what is beyond the range of a float8 becomes its largest finite number; NaN stays NaN), after
 * division by the scale if there is one. cache_lengths stays as it is.
 *
 *   key, value              E  [B, H_kv, Ln, D], [B, H_kv, Ln, D_v]  or packed [total, H_kv, D] with cu_seqlens
 *   key_cache, value_cache  E or float8  [B, H_kv, capacity, D]      or pages [pages, H_kv, page_size, D] with block_table
 *   cache_lengths           int32 [B]       rows that are there
 *   new_lengths             int32 [B]       optional; rows of key and value from there on are left out
 *   cu_seqlens              int32 [B + 1]   optional; ascending from 0 to total
 *   block_table             int32 [B, max_pages]  optional
 *   key_scale, value_scale  float32 [1] or [B|1, H_kv|1], with block_table [pages|1, H_kv|1]; optional; positive and finite
 *
 * Rows past the end of the cache are refused where host memory tells (CPU) and left out on a GPU. Nothing else of the cache is
 * touched. The caches share no element with anything else; no two batches append to one page.
 */
#define DLATTN_APPEND_LIST(SLOT, T)                                                                                    \
    SLOT(T, key)                                                                                                       \
    SLOT(T, value)                                                                                                     \
    SLOT(T, key_cache)                                                                                                 \
    SLOT(T, value_cache)                                                                                               \
    SLOT(T, cache_lengths)                                                                                             \
    SLOT(T, new_lengths)                                                                                               \
    SLOT(T, cu_seqlens)                                                                                                \
    SLOT(T, block_table)                                                                                               \
    SLOT(T, key_scale)                                                                                                 \
    SLOT(T, value_scale)

typedef struct dlattn_append_tensors {
    size_t struct_size;
    DLATTN_APPEND_LIST(DLATTN_SLOT, const DLTensor *)
    DLDataType key_cache_dtype; /* what a uint8 cache holds; all zero: its own dtype */
    DLDataType value_cache_dtype;
} dlattn_append_tensors;

/* ---- Where and with what to run it -------------------------------------------------------------------- */

/* Calls body(body_ctx, i) once for each i in [0, count), on any threads in any order; returns when all are done. */
typedef void (*dlattn_parallel_body)(void *body_ctx, int64_t index);
typedef void (*dlattn_parallel_for)(void *ctx, int64_t count, dlattn_parallel_body body, void *body_ctx);

/* dlattn_exec.flags. Managed calls take their tensors: once `tensors` and `exec` could be read, every deleter runs exactly once
 * before the call returns, whatever else is wrong, an unreadable desc included. */
#define DLATTN_TAKE_OWNERSHIP UINT64_C(1)
/* 1.1: the workspace holds zeros, and will hold zeros when the call has run: one that the caller clears once serves many
 * calls, and some kernels then need one launch less. */
#define DLATTN_WORKSPACE_IS_ZERO UINT64_C(2)

/* How one call runs. All zero: default stream, no workspace, the library's own threads. */
typedef struct dlattn_exec {
    size_t struct_size;
    uint64_t flags;
    void *stream;           /* CUstream; 0, 1 (legacy) and 2 (per-thread) keep CUDA's meanings. CPU: ignored */
    void *workspace;        /* on the tensors' device, aligned to sku.workspace_alignment; contents arbitrary; */
    size_t workspace_bytes; /* not shared by calls that may run at the same time */
    dlattn_parallel_for parallel_for; /* CPU: the host's threads; NULL = the library's own pool */
    void *parallel_ctx;
} dlattn_exec;

/* ---- What was chosen ---------------------------------------------------------------------------------- */

/* Bits of what a problem asks and a kernel has. */
#define DLATTN_FEATURE_CAUSAL UINT64_C(0x1)
#define DLATTN_FEATURE_WINDOW UINT64_C(0x2)
#define DLATTN_FEATURE_SOFTCAP UINT64_C(0x4)
#define DLATTN_FEATURE_BIAS UINT64_C(0x8)
#define DLATTN_FEATURE_MASK UINT64_C(0x10)
#define DLATTN_FEATURE_ALIBI UINT64_C(0x20)
#define DLATTN_FEATURE_SINKS UINT64_C(0x40)
#define DLATTN_FEATURE_LENGTHS UINT64_C(0x80)
#define DLATTN_FEATURE_VARLEN UINT64_C(0x100)
#define DLATTN_FEATURE_PAGED UINT64_C(0x200)
#define DLATTN_FEATURE_GQA UINT64_C(0x400)           /* fewer kv heads than query heads */
#define DLATTN_FEATURE_HEAD_DIM_V UINT64_C(0x800)    /* D_v != D_qk */
#define DLATTN_FEATURE_STRIDED UINT64_C(0x1000)      /* any outer strides, innermost stride 1 */
#define DLATTN_FEATURE_INNER_STRIDE UINT64_C(0x2000) /* an innermost stride other than 1 */
#define DLATTN_FEATURE_UNALIGNED                                                                                       \
    UINT64_C(0x4000) /* a base or outer stride of query, key, value or output that is not a multiple of 16 bytes */
#define DLATTN_FEATURE_LSE UINT64_C(0x8000)
/* 1.1 */
#define DLATTN_FEATURE_DROPOUT UINT64_C(0x10000)
#define DLATTN_FEATURE_SEGMENTS UINT64_C(0x20000)
#define DLATTN_FEATURE_BLOCK_MASK UINT64_C(0x40000)
#define DLATTN_FEATURE_DIAGONAL_OFFSET UINT64_C(0x80000)
#define DLATTN_FEATURE_MIXED_DTYPES UINT64_C(0x100000) /* query, key, value and output are not of one dtype */
#define DLATTN_FEATURE_SCALES UINT64_C(0x200000)

/* dlattn_sku.flags and dlattn_kernel_info.flags, since 1.1: what a row is, beside what it can do. */
#define DLATTN_KERNEL_REFERENCE UINT64_C(1) /* plain loops in double: the truth for the others, complete and slow */
#define DLATTN_KERNEL_ANY_ORDER UINT64_C(2) /* chosen only for calls with DLATTN_ANY_ORDER: its bits vary */
#define DLATTN_KERNEL_DECODE UINT64_C(4)    /* for few query rows over many keys: it declines other problems */
#define DLATTN_KERNEL_KEEPS_ZERO                                                                                       \
    UINT64_C(8) /* gains from DLATTN_WORKSPACE_IS_ZERO; for other rows the library clears the workspace afterwards */

/* The kernel that a call gets, and what it guarantees. Strings are static. */
typedef struct dlattn_sku {
    size_t struct_size;
    const char *kernel;  /* row name, the same in tests, benchmarks and profilers */
    const char *backend; /* "cpu" or "cuda" */
    const char *arch;    /* least machine of the row: "x86-64", "avx512", "sm_80" ... */
    const char *math;    /* precision of the products: "f64", "f32", "tf32x3" (f32 in three), "f16", "bf16", "e4m3" */
    const char *accumulator; /* precision of the sums: "f64" or "f32" */
    uint64_t features;       /* what this problem asks, DLATTN_FEATURE_* */
    size_t workspace_bytes;
    size_t workspace_alignment;
    int32_t contiguous;    /* 1: every tensor is compact row-major, 0: the strided path */
    int32_t deterministic; /* 1: no result depends on the order in which threads finish */
    int32_t bit_stable;    /* 1: the same bits on every run on the same device, for any number of threads */
    int32_t tile_q;        /* query rows and keys of one step */
    int32_t tile_k;
    int32_t num_splits; /* parts in which the keys of one row are summed, then merged; 1 = whole */
    int32_t num_threads;
    int32_t reserved0;
    /* ABI 1.1 */
    const char *operation; /* "forward", "backward", "merge", "append" */
    uint64_t flags;        /* DLATTN_KERNEL_*: a host may prefer operators of its own to a reference row */
} dlattn_sku;

/* One row of the kernel table. */
typedef struct dlattn_kernel_info {
    size_t struct_size;
    const char *name;
    const char *operation; /* "forward"; since 1.1 also "backward", "merge", "append" */
    const char *backend;
    const char *arch;
    const char *dtypes; /* "f32 f16 bf16" */
    uint64_t features;  /* everything it can do */
    int32_t max_head_dim;
    int32_t max_head_dim_v;
    int32_t tile_q;
    int32_t tile_k;
    int32_t available; /* 1: this machine can run it */
    int32_t reserved0;
    uint64_t flags; /* 1.1: DLATTN_KERNEL_* */
} dlattn_kernel_info;

/* One device. The CPU is always the first. */
typedef struct dlattn_device_info {
    size_t struct_size;
    int32_t device_type; /* DLDeviceType */
    int32_t device_id;
    char name[128];
    char arch[128];          /* CPU: "avx2 f16c avx512 ..."; GPU: "sm_90" */
    int32_t multiprocessors; /* GPU: SMs; CPU: threads of the built-in pool */
    int32_t reserved0;
    int64_t shared_memory_bytes; /* GPU: most shared memory of a block; CPU: 0 */
} dlattn_device_info;

/* ---- The table of functions --------------------------------------------------------------------------- */

/* A choice of kernel for one problem (shapes, strides, dtypes, options, device); immutable once made. */
typedef struct dlattn_plan dlattn_plan;

/* Append-only: a slot never moves or changes its meaning within a major version. A host that wants to run with
 * older libraries checks that `struct_size` covers a later slot. No slot below struct_size is NULL. */
typedef struct dlattn_api {
    size_t struct_size;
    uint32_t abi_major;
    uint32_t abi_minor;

    /* Version of the library for people, "1.0.0". Static. */
    const char *(*version)(void);
    /* Why this thread's last failing call failed, in one sentence; "" before the first. Valid until the next one. */
    const char *(*last_error)(void);
    /* Name of a status, "invalid argument"; never NULL. Static. */
    const char *(*status_name)(int32_t status);

    /* Fills *sku with what forward() would use, or says why nothing fits. Reads no tensor data: data may be NULL. */
    int32_t (*forward_query)(const dlattn_forward_desc *desc, const dlattn_tensors *tensors, dlattn_sku *sku);
    /* Checks, chooses and runs. CPU: returns when done. GPU: enqueues on exec->stream. */
    int32_t (*forward)(const dlattn_forward_desc *desc, const dlattn_tensors *tensors, const dlattn_exec *exec);
    /* forward() on managed tensors, which stay the caller's unless DLATTN_TAKE_OWNERSHIP (then a GPU call
     * synchronises the stream before it runs the deleters). A NULL deleter is skipped. When `tensors` or `exec`
     * itself cannot be read (NULL, too small, an unknown tail) the tensors stay the caller's; if only
     * desc cannot be read, the deleters run all the same. */
    int32_t (*forward_managed)(const dlattn_forward_desc *desc, const dlattn_managed_tensors *tensors,
                               const dlattn_exec *exec);
    int32_t (*forward_versioned)(const dlattn_forward_desc *desc, const dlattn_versioned_tensors *tensors,
                                 const dlattn_exec *exec);

    /* Chooses once for many calls. Reads no tensor data. *plan is set on success only; free it with plan_destroy. */
    int32_t (*plan_create)(const dlattn_forward_desc *desc, const dlattn_tensors *tensors, dlattn_plan **plan);
    /* Frees a plan; NULL is allowed. No call may be using it. */
    void (*plan_destroy)(dlattn_plan *plan);
    /* OK if plan_run would accept these tensors (same shapes, strides, dtypes and device; other data). */
    int32_t (*plan_can_run)(const dlattn_plan *plan, const dlattn_tensors *tensors);
    int32_t (*plan_sku)(const dlattn_plan *plan, dlattn_sku *sku);
    /* forward() without the choosing. */
    int32_t (*plan_run)(const dlattn_plan *plan, const dlattn_tensors *tensors, const dlattn_exec *exec);

    /* The kernel table, best first, and the devices of this machine. */
    int32_t (*kernel_count)(void);
    int32_t (*kernel_info)(int32_t index, dlattn_kernel_info *info);
    int32_t (*device_count)(void);
    int32_t (*device_info)(int32_t index, dlattn_device_info *info);

    /* ABI 1.1. As their namesakes of forward; a plan is destroyed by plan_destroy and described by plan_sku. */
    int32_t (*backward_query)(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                              const dlattn_gradients *gradients, dlattn_sku *sku);
    int32_t (*backward)(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                        const dlattn_gradients *gradients, const dlattn_exec *exec);
    int32_t (*backward_plan_create)(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                                    const dlattn_gradients *gradients, dlattn_plan **plan);
    int32_t (*backward_plan_can_run)(const dlattn_plan *plan, const dlattn_tensors *tensors,
                                     const dlattn_gradients *gradients);
    int32_t (*backward_plan_run)(const dlattn_plan *plan, const dlattn_tensors *tensors,
                                 const dlattn_gradients *gradients, const dlattn_exec *exec);
    int32_t (*merge_query)(const dlattn_partials *partials, dlattn_sku *sku);
    int32_t (*merge)(const dlattn_partials *partials, const dlattn_exec *exec);
    int32_t (*append_query)(const dlattn_append_tensors *tensors, dlattn_sku *sku);
    int32_t (*append)(const dlattn_append_tensors *tensors, const dlattn_exec *exec);
} dlattn_api;

/* The one exported function: the table of that major version, or NULL if this library does not serve it.
 * Static, constant, never freed. */
#if defined(_WIN32)
#define DLATTN_EXPORT __declspec(dllexport)
#else
#define DLATTN_EXPORT __attribute__((visibility("default")))
#endif
DLATTN_EXPORT const dlattn_api *dlattn_get_api(uint32_t major);
typedef const dlattn_api *(*dlattn_get_api_fn)(uint32_t major);

#ifdef __cplusplus
}
#endif

#endif /* DLATTN_H_ */
