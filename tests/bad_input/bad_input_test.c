/*
 * Every way to call the library wrongly: the status, a message with the tensor's name and both values, and not one byte
 * written, through forward(), forward_query() and plans.
 */
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One call, about to be spoiled. The structs are followed by room for the tail of a newer caller. */
struct attempt {
    struct call call;
    struct block block[SLOTS];
    union {
        dlattn_forward_desc s;
        unsigned char bytes[sizeof(dlattn_forward_desc) + 16];
    } desc;
    union {
        dlattn_tensors s;
        unsigned char bytes[sizeof(dlattn_tensors) + 16];
    } tensors;
    union {
        dlattn_exec s;
        unsigned char bytes[sizeof(dlattn_exec) + 16];
    } exec;
    unsigned char *workspace; /* more than is needed, aligned to 64 */
};

#define TENSOR(slot) (a->call.tensor[slot])
#define SHAPE(slot) (TENSOR(slot).shape)
#define STRIDE(slot) (TENSOR(slot).stride)
#define DTYPE(slot) (TENSOR(slot).dl.dtype)

/* An integer tensor's entry, where the kernel will read it. */
static void set_int(struct attempt *a, enum slot slot, int64_t i, int32_t value) {
    const int64_t step = TENSOR(slot).dl.ndim == 1 ? STRIDE(slot)[0] : STRIDE(slot)[1];
    memcpy((char *)TENSOR(slot).dl.data + i * step * 4, &value, sizeof value);
}

static void on_gpu(struct attempt *a) {
    for (int slot = 0; slot < SLOTS; slot++)
        TENSOR(slot).dl.device = (DLDevice){kDLCUDA, 0};
}

/* ---- What can be wrong ------------------------------------------------------------------------------------ */

/* clang-format off: one line for each way, where it fits */
/* BAD(name, features of the call, status, "fragments of the message", what spoils it) */
#define BAD_CALLS                                                                                  \
    /* tensors that are absent or have the wrong number of axes */                                 \
    BAD(no_query, "lse", INVALID_ARGUMENT, ("query", "absent"), a->tensors.s.query = NULL)         \
    BAD(no_key, "lse", INVALID_ARGUMENT, ("key", "absent"), a->tensors.s.key = NULL)               \
    BAD(no_value, "lse", INVALID_ARGUMENT, ("value", "absent"), a->tensors.s.value = NULL)         \
    BAD(no_output, "lse", INVALID_ARGUMENT, ("output", "absent"), a->tensors.s.output = NULL)      \
    BAD(query_axes, "lse", INVALID_ARGUMENT, ("query", "3 axes", "4"), TENSOR(QUERY).dl.ndim = 3)  \
    BAD(value_axes, "lse", INVALID_ARGUMENT, ("value", "5 axes", "4"), TENSOR(VALUE).dl.ndim = 5)  \
    BAD(output_no_axes, "lse", INVALID_ARGUMENT, ("output", "0 axes", "4"),                        \
        TENSOR(OUTPUT).dl.ndim = 0)                                                                \
    BAD(negative_axes, "lse", INVALID_ARGUMENT, ("key", "-1 axes", "4"), TENSOR(KEY).dl.ndim = -1) \
    BAD(lse_axes, "lse", INVALID_ARGUMENT, ("lse", "2 axes", "3"), TENSOR(LSE).dl.ndim = 2)        \
    BAD(bias_axes, "bias", INVALID_ARGUMENT, ("bias", "2 axes", "4"), TENSOR(BIAS).dl.ndim = 2)    \
    BAD(packed_axes, "varlen", INVALID_ARGUMENT, ("query", "4 axes", "3"),                         \
        TENSOR(QUERY).dl.ndim = 4)                                                                 \
    BAD(no_shape, "lse", INVALID_ARGUMENT, ("key", "shape is NULL"), TENSOR(KEY).dl.shape = NULL)  \
                                                                                                   \
    /* shapes that disagree */                                                                     \
    BAD(key_batch, "lse", INVALID_ARGUMENT, ("key", "axis 0", "3", "2"), SHAPE(KEY)[0] = 3)        \
    BAD(key_dim, "lse", INVALID_ARGUMENT, ("key", "axis 3", "15", "16"), SHAPE(KEY)[3] = 15)       \
    BAD(value_batch, "lse", INVALID_ARGUMENT, ("value", "axis 0", "1", "2"), SHAPE(VALUE)[0] = 1)  \
    BAD(value_heads, "lse", INVALID_ARGUMENT, ("value", "axis 1", "4", "2"), SHAPE(VALUE)[1] = 4)  \
    BAD(value_length, "lse", INVALID_ARGUMENT, ("value", "axis 2", "9", "10"),                     \
        SHAPE(VALUE)[2] = 9)                                                                       \
    BAD(output_batch, "lse", INVALID_ARGUMENT, ("output", "axis 0", "1", "2"),                     \
        SHAPE(OUTPUT)[0] = 1)                                                                      \
    BAD(output_heads, "lse", INVALID_ARGUMENT, ("output", "axis 1", "2", "4"),                     \
        SHAPE(OUTPUT)[1] = 2)                                                                      \
    BAD(output_length, "lse", INVALID_ARGUMENT, ("output", "axis 2", "5", "6"),                    \
        SHAPE(OUTPUT)[2] = 5)                                                                      \
    BAD(output_dim, "lse", INVALID_ARGUMENT, ("output", "axis 3", "17", "16"),                     \
        SHAPE(OUTPUT)[3] = 17)                                                                     \
    BAD(lse_heads, "lse", INVALID_ARGUMENT, ("lse", "axis 1", "2", "4"), SHAPE(LSE)[1] = 2)        \
    BAD(lse_length, "lse", INVALID_ARGUMENT, ("lse", "axis 2", "7", "6"), SHAPE(LSE)[2] = 7)       \
    BAD(bias_keys, "bias", INVALID_ARGUMENT, ("bias", "axis 3", "9", "10"), SHAPE(BIAS)[3] = 9)    \
    BAD(mask_rows, "mask", INVALID_ARGUMENT, ("mask", "axis 2", "5", "6"), SHAPE(MASK)[2] = 5)     \
    BAD(slopes_heads, "alibi", INVALID_ARGUMENT, ("alibi_slopes", "axis 0", "2", "4"),             \
        SHAPE(ALIBI_SLOPES)[0] = 2)                                                                \
    BAD(slopes_batch, "alibi_batch", INVALID_ARGUMENT, ("alibi_slopes", "axis 0", "1", "2"),       \
        SHAPE(ALIBI_SLOPES)[0] = 1)                                                                \
    BAD(sinks_heads, "sinks", INVALID_ARGUMENT, ("sinks", "axis 0", "1", "4"),                     \
        SHAPE(SINKS)[0] = 1)                                                                       \
    BAD(lengths_batch, "key_lengths", INVALID_ARGUMENT, ("key_lengths", "axis 0", "1", "2"),       \
        SHAPE(KEY_LENGTHS)[0] = 1)                                                                 \
    BAD(cu_k_batch, "varlen", INVALID_ARGUMENT, ("cu_seqlens_k", "axis 0", "2", "3"),              \
        SHAPE(CU_SEQLENS_K)[0] = 2)                                                                \
    BAD(cu_q_empty, "varlen", INVALID_ARGUMENT, ("cu_seqlens_q", "no entries"),                    \
        SHAPE(CU_SEQLENS_Q)[0] = 0)                                                                \
    BAD(table_batch, "paged", INVALID_ARGUMENT, ("block_table", "axis 0", "1", "2"),               \
        SHAPE(BLOCK_TABLE)[0] = 1)                                                                 \
    BAD(page_size, "paged", INVALID_ARGUMENT, ("key", "axis 2 (page_size)", "0"),                  \
        SHAPE(KEY)[2] = SHAPE(VALUE)[2] = 0)                                                       \
    BAD(head_dim_zero, "lse", INVALID_ARGUMENT, ("head_dim", "0", "1"),                            \
        SHAPE(QUERY)[3] = SHAPE(KEY)[3] = 0)                                                       \
    BAD(negative_extent, "lse", INVALID_ARGUMENT, ("query", "axis 2", "-6"), SHAPE(QUERY)[2] = -6) \
    BAD(heads_no_multiple, "lse", INVALID_ARGUMENT, ("key", "3 heads", "4"),                       \
        SHAPE(KEY)[1] = SHAPE(VALUE)[1] = 3)                                                       \
    BAD(heads_none, "lse", INVALID_ARGUMENT, ("key", "0 heads", "4"),                              \
        SHAPE(KEY)[1] = SHAPE(VALUE)[1] = 0)                                                       \
    BAD(paged_no_lengths, "paged", INVALID_ARGUMENT, ("key_lengths", "absent"),                    \
        a->tensors.s.key_lengths = NULL)                                                           \
    BAD(paged_packed, "paged", INVALID_ARGUMENT, ("block_table", "cu_seqlens_k"),                  \
        a->tensors.s.cu_seqlens_k = a->tensors.s.key_lengths)                                      \
                                                                                                   \
    /* types */                                                                                    \
    BAD(mixed_dtypes, "lse", INVALID_ARGUMENT, ("key", "float16", "float32"),                      \
        DTYPE(KEY).bits = 16)                                                                      \
    BAD(output_dtype, "lse", INVALID_ARGUMENT, ("output", "float64", "float32"),                   \
        DTYPE(OUTPUT).bits = 64)                                                                   \
    BAD(unknown_dtype, "lse", UNSUPPORTED, ("query", "int32", "bfloat16"),                         \
        DTYPE(QUERY).code = kDLInt)                                                                \
    BAD(unknown_bits, "lse", UNSUPPORTED, ("value", "float8", "float16"), DTYPE(VALUE).bits = 8)   \
    BAD(future_dtype, "lse", UNSUPPORTED, ("query", "code 200"), DTYPE(QUERY).code = 200)          \
    BAD(zero_bits, "lse", UNSUPPORTED, ("query", "float0"), DTYPE(QUERY).bits = 0)                 \
    BAD(lanes, "lse", INVALID_ARGUMENT, ("value", "4 lanes", "1"), DTYPE(VALUE).lanes = 4)         \
    BAD(no_lanes, "lse", INVALID_ARGUMENT, ("query", "0 lanes", "1"), DTYPE(QUERY).lanes = 0)      \
    BAD(lse_dtype, "lse", INVALID_ARGUMENT, ("lse", "float16", "float32"), DTYPE(LSE).bits = 16)   \
    BAD(bias_dtype, "bias", INVALID_ARGUMENT, ("bias", "float64", "float32"),                      \
        DTYPE(BIAS).bits = 64)                                                                     \
    BAD(mask_dtype, "mask", INVALID_ARGUMENT, ("mask", "uint32", "bool"), DTYPE(MASK).bits = 32)   \
    BAD(slopes_dtype, "alibi", INVALID_ARGUMENT, ("alibi_slopes", "float16", "float32"),           \
        DTYPE(ALIBI_SLOPES).bits = 16)                                                             \
    BAD(sinks_dtype, "sinks", INVALID_ARGUMENT, ("sinks", "float64", "float32"),                   \
        DTYPE(SINKS).bits = 64)                                                                    \
    BAD(lengths_dtype, "key_lengths", INVALID_ARGUMENT, ("key_lengths", "int64", "int32"),         \
        DTYPE(KEY_LENGTHS).bits = 64)                                                              \
    BAD(table_dtype, "paged", INVALID_ARGUMENT, ("block_table", "uint32", "int32"),                \
        DTYPE(BLOCK_TABLE).code = kDLUInt)                                                         \
                                                                                                   \
    /* devices */                                                                                  \
    BAD(two_devices, "lse", INVALID_ARGUMENT, ("value", "cuda 0", "cpu 0"),                        \
        TENSOR(VALUE).dl.device.device_type = kDLCUDA)                                             \
    BAD(two_gpus, "plain", INVALID_ARGUMENT, ("output", "cuda 1", "cuda 0"),                       \
        (on_gpu(a), TENSOR(OUTPUT).dl.device.device_id = 1))                                       \
    BAD(lengths_elsewhere, "key_lengths", INVALID_ARGUMENT, ("key_lengths", "cuda 0", "cpu 0"),    \
        TENSOR(KEY_LENGTHS).dl.device.device_type = kDLCUDA)                                       \
    BAD(unknown_device, "lse", UNSUPPORTED, ("key", "device type 7"),                              \
        TENSOR(KEY).dl.device.device_type = kDLVulkan)                                             \
                                                                                                   \
    /* strides */                                                                                  \
    BAD(output_overlap_reversed, "lse", INVALID_ARGUMENT, ("output", "axis 2", "-15", "16"),       \
        STRIDE(OUTPUT)[2] = -15)                                                                   \
    BAD(least_stride, "lse", INVALID_ARGUMENT, ("value", "axis 0", "-9223372036854775808"),        \
        STRIDE(VALUE)[0] = INT64_MIN)                                                              \
    BAD(output_stride_0, "lse", INVALID_ARGUMENT, ("output", "axis 1", "stride 0", "4"),           \
        STRIDE(OUTPUT)[1] = 0)                                                                     \
    BAD(lse_stride_0, "lse", INVALID_ARGUMENT, ("lse", "axis 2", "stride 0", "6"),                 \
        STRIDE(LSE)[2] = 0)                                                                        \
    BAD(output_overlap, "lse", INVALID_ARGUMENT, ("output", "axis 2", "15", "16"),                 \
        STRIDE(OUTPUT)[2] = 15)                                                                    \
    BAD(output_overlap_outer, "lse", INVALID_ARGUMENT, ("output", "axis 0", "300"),                \
        STRIDE(OUTPUT)[0] = 300)                                                                   \
    BAD(lse_overlap, "lse", INVALID_ARGUMENT, ("lse", "axis 1", "5", "6"), STRIDE(LSE)[1] = 5)     \
    BAD(huge_stride, "lse", INVALID_ARGUMENT, ("value", "axis 0", "9223372036854775807"),          \
        STRIDE(VALUE)[0] = INT64_MAX)                                                              \
    BAD(huge_product, "lse", INVALID_ARGUMENT, ("key", "axis 2", "2305843009213693952"),           \
        STRIDE(KEY)[2] = INT64_C(1) << 61)                                                         \
    BAD(huge_sum, "lse", INVALID_ARGUMENT, ("query", "offsets overflow"),                          \
        STRIDE(QUERY)[0] = STRIDE(QUERY)[1] = STRIDE(QUERY)[2] = INT64_MAX / 40)                   \
    BAD(huge_extents, "lse", INVALID_ARGUMENT, ("key", "axis", "4611686018427387904"),             \
        (SHAPE(KEY)[2] = INT64_C(1) << 62, STRIDE(KEY)[2] = 0))                                    \
    BAD(huge_length, "lse", INVALID_ARGUMENT, ("key", "axis 2", "2147483648"),                     \
        (SHAPE(KEY)[2] = SHAPE(VALUE)[2] = INT64_C(1) << 31,                                       \
         STRIDE(KEY)[2] = STRIDE(VALUE)[2] = 0))                                                   \
    BAD(huge_pages, "paged", INVALID_ARGUMENT, ("block_table", "2147483647", "16"),                \
        (SHAPE(BLOCK_TABLE)[1] = INT32_MAX, STRIDE(BLOCK_TABLE)[1] = 0))                           \
    BAD(many_elements, "lse", INVALID_ARGUMENT, ("key", "elements overflows", "2147483647"),       \
        (SHAPE(KEY)[0] = SHAPE(KEY)[1] = SHAPE(KEY)[2] = INT32_MAX,                                \
         STRIDE(KEY)[0] = STRIDE(KEY)[1] = 0, STRIDE(KEY)[2] = 0))                                 \
                                                                                                   \
    /* options */                                                                                  \
    BAD(scale_nan, "lse", INVALID_ARGUMENT, ("scale", "nan", "finite"), a->desc.s.scale = NAN)     \
    BAD(scale_inf, "lse", INVALID_ARGUMENT, ("scale", "inf", "finite"),                            \
        a->desc.s.scale = INFINITY)                                                                \
    BAD(softcap_nan, "lse", INVALID_ARGUMENT, ("softcap", "nan", "finite"),                        \
        a->desc.s.softcap = NAN)                                                                   \
    BAD(softcap_inf, "lse", INVALID_ARGUMENT, ("softcap", "inf", "finite"),                        \
        a->desc.s.softcap = INFINITY)                                                              \
    BAD(softcap_negative, "lse", INVALID_ARGUMENT, ("softcap", "-1", "at least 0"),                \
        a->desc.s.softcap = -1)                                                                    \
    BAD(unknown_flag, "lse", UNSUPPORTED, ("flags", "0x8000000000"),                               \
        a->desc.s.flags = UINT64_C(0x8000000000))                                                  \
    BAD(causal_2, "lse", INVALID_ARGUMENT, ("causal", "2", "0 or 1"), a->desc.s.causal = 2)        \
    BAD(alignment_9, "lse", INVALID_ARGUMENT, ("alignment", "9", "DLATTN_ALIGN"),                  \
        a->desc.s.alignment = 9)                                                                   \
    BAD(window_left, "window", INVALID_ARGUMENT, ("window_left", "-2", "-1"),                      \
        a->desc.s.window_left = -2)                                                                \
    BAD(window_right, "window", INVALID_ARGUMENT, ("window_right", "-7", "-1"),                    \
        a->desc.s.window_right = -7)                                                               \
    BAD(window_left_unused, "lse", INVALID_ARGUMENT, ("window_left", "5", "DLATTN_WINDOW"),        \
        a->desc.s.window_left = 5)                                                                 \
    BAD(window_right_unused, "lse", INVALID_ARGUMENT, ("window_right", "-3", "DLATTN_WINDOW"),     \
        a->desc.s.window_right = -3)                                                               \
    BAD(num_threads, "lse", INVALID_ARGUMENT, ("num_threads", "-1", "0"),                          \
        a->desc.s.num_threads = -1)                                                                \
    BAD(reserved, "lse", INVALID_ARGUMENT, ("reserved0", "5", "0"), a->desc.s.reserved0 = 5)       \
    BAD(max_seqlen, "varlen", INVALID_ARGUMENT, ("max_seqlen", "-1", "0"),                         \
        a->desc.s.max_seqlen_k = -1)                                                               \
    BAD(unknown_kernel, "lse", INVALID_ARGUMENT, ("kernel", "\"cpu_fwd_dream\""),                  \
        a->desc.s.kernel = "cpu_fwd_dream")                                                        \
                                                                                                   \
    /* structs of another time */                                                                  \
    BAD(desc_small, "lse", INVALID_ARGUMENT, ("desc", "struct_size is 8", "88"),                   \
        a->desc.s.struct_size = 8)                                                                 \
    BAD(desc_zero, "lse", INVALID_ARGUMENT, ("desc", "struct_size is 0", "88"),                    \
        a->desc.s.struct_size = 0)                                                                 \
    BAD(tensors_small, "lse", INVALID_ARGUMENT, ("tensors", "struct_size is 119", "120"),          \
        a->tensors.s.struct_size = 119)                                                            \
    BAD(desc_tail, "lse", UNSUPPORTED, ("desc", "byte 151", "144"),                                \
        (a->desc.s.struct_size = 152, a->desc.bytes[151] = 1))                                     \
    BAD(tensors_tail, "lse", UNSUPPORTED, ("tensors", "byte 168", "168"),                          \
        (a->tensors.s.struct_size = 176, a->tensors.bytes[168] = 1))

/* Seen only by calls that read data and run. */
#define BAD_RUNS                                                                                   \
    BAD(no_data, "lse", INVALID_ARGUMENT, ("value", "NULL"), TENSOR(VALUE).dl.data = NULL)         \
    BAD(no_output_data, "lse", INVALID_ARGUMENT, ("output", "NULL"),                               \
        TENSOR(OUTPUT).dl.data = NULL)                                                             \
    BAD(no_lengths_data, "key_lengths", INVALID_ARGUMENT, ("key_lengths", "NULL"),                 \
        TENSOR(KEY_LENGTHS).dl.data = NULL)                                                        \
    BAD(output_is_key, "lse", INVALID_ARGUMENT, ("output", "shares memory with key"),              \
        TENSOR(OUTPUT).dl.data = TENSOR(KEY).dl.data)                                              \
    BAD(output_ends_in_value, "lse", INVALID_ARGUMENT, ("output", "shares memory with value"),     \
        TENSOR(OUTPUT).dl.data = (char *)TENSOR(VALUE).dl.data + TENSOR(VALUE).bytes - 4)          \
    BAD(output_begins_before_query, "lse", INVALID_ARGUMENT,                                       \
        ("output", "shares memory with query"),                                                    \
        TENSOR(OUTPUT).dl.data = (char *)TENSOR(QUERY).dl.data - TENSOR(OUTPUT).bytes + 1)         \
    BAD(lse_is_output, "lse", INVALID_ARGUMENT, ("output", "shares memory with lse"),              \
        TENSOR(LSE).dl.data = TENSOR(OUTPUT).dl.data)                                              \
    BAD(lse_is_bias, "bias_keys", INVALID_ARGUMENT, ("lse", "shares memory with bias"),            \
        TENSOR(LSE).dl.data = TENSOR(BIAS).dl.data)                                                \
    BAD(exec_small, "lse", INVALID_ARGUMENT, ("exec", "struct_size is 55", "56"),                  \
        a->exec.s.struct_size = 55)                                                                \
    BAD(exec_tail, "lse", UNSUPPORTED, ("exec", "byte 63", "56"),                                  \
        (a->exec.s.struct_size = 64, a->exec.bytes[63] = 1))                                       \
    BAD(exec_flag, "lse", UNSUPPORTED, ("exec.flags", "0x10"), a->exec.s.flags = 16)               \
    BAD(no_workspace, "lse", BUFFER_TOO_SMALL, ("workspace", "0 bytes", "needs"),                  \
        a->exec.s.workspace = NULL)                                                                \
    BAD(small_workspace, "lse", BUFFER_TOO_SMALL, ("workspace", "63 bytes", "needs"),              \
        a->exec.s.workspace_bytes = 63)                                                            \
    BAD(unaligned_workspace, "lse", INVALID_ARGUMENT, ("workspace", "not a multiple of 64"),       \
        a->exec.s.workspace = a->workspace + 8)                                                    \
    BAD(cu_first, "varlen", INVALID_ARGUMENT, ("cu_seqlens_q", "entry 0 is 1", "0"),               \
        set_int(a, CU_SEQLENS_Q, 0, 1))                                                            \
    BAD(cu_falls, "varlen", INVALID_ARGUMENT, ("cu_seqlens_k", "entry 1 is -3", "from 0"),         \
        set_int(a, CU_SEQLENS_K, 1, -3))                                                           \
    BAD(cu_beyond, "varlen", INVALID_ARGUMENT, ("cu_seqlens_k", "entry 1 is 1000", "to"),          \
        set_int(a, CU_SEQLENS_K, 1, 1000))                                                         \
    BAD(cu_short, "varlen", INVALID_ARGUMENT, ("cu_seqlens_q", "entry", "rows"),                   \
        (set_int(a, CU_SEQLENS_Q, 1, 1), set_int(a, CU_SEQLENS_Q, 2, 1)))                          \
    BAD(cu_longer_than_stated, "varlen", INVALID_ARGUMENT,                                         \
        ("cu_seqlens_k", "max_seqlen", "at most 2"), a->desc.s.max_seqlen_k = 2)                   \
    BAD(length_negative, "key_lengths", INVALID_ARGUMENT,                                          \
        ("key_lengths", "entry 1 is -1", "0 to 10"), set_int(a, KEY_LENGTHS, 1, -1))               \
    BAD(length_beyond, "key_lengths", INVALID_ARGUMENT,                                            \
        ("key_lengths", "entry 0 is 11", "0 to 10"), set_int(a, KEY_LENGTHS, 0, 11))               \
    BAD(query_length_beyond, "query_lengths", INVALID_ARGUMENT,                                    \
        ("query_lengths", "entry 1 is 7", "0 to 6"), set_int(a, QUERY_LENGTHS, 1, 7))              \
    BAD(page_beyond, "paged", INVALID_ARGUMENT, ("block_table", "[0, 0] is 4", "4 pages"),         \
        (set_int(a, KEY_LENGTHS, 0, 10), set_int(a, BLOCK_TABLE, 0, 4)))                           \
    BAD(page_negative, "paged", INVALID_ARGUMENT, ("block_table", "[0, 0] is -1", "4 pages"),      \
        (set_int(a, KEY_LENGTHS, 0, 10), set_int(a, BLOCK_TABLE, 0, -1)))

#define BAD(name, features, status, says, spoil)                                                   \
    static void spoil_##name(struct attempt *a) { spoil; }
BAD_CALLS
BAD_RUNS
#undef BAD

/* clang-format on */
#define UNWRAP(...) {__VA_ARGS__}
struct bad {
    const char *name, *features;
    int32_t status;
    const char *says[4];
    void (*spoil)(struct attempt *);
};
#define BAD(name, features, status, says, spoil)                                                   \
    {#name, features, DLATTN_##status, UNWRAP says, spoil_##name},
static const struct bad bad_calls[] = {BAD_CALLS};
static const struct bad bad_runs[] = {BAD_RUNS};
#undef BAD

/* ---- Trying it -------------------------------------------------------------------------------------------- */

static void prepare_case(struct attempt *a, const struct test_case *from) {
    memset(a, 0, sizeof *a);
    call_make(&a->call, from);
    for (int slot = 0; slot < SLOTS; slot++) {
        struct tensor *t = &a->call.tensor[slot];
        if (!a->call.has[slot])
            continue;
        a->block[slot] = place_cpu.take(t->bytes, t->alignment, AT_END);
        place_cpu.store(&a->block[slot], t->image);
        t->dl.device = place_cpu.device;
        t->dl.data = a->block[slot].data;
    }
    a->desc.s = a->call.desc;
    a->desc.s.num_threads = 2;
    a->tensors.s = call_tensors(&a->call);
    a->workspace = aligned_alloc(64, 1 << 20);
    a->exec.s = (dlattn_exec){
        .struct_size = sizeof(dlattn_exec), .workspace = a->workspace, .workspace_bytes = 1 << 19};
}

static void prepare(struct attempt *a, const char *features) {
    prepare_case(a,
                 &(struct test_case){{2, 4, 2, 6, 10, 16, 16}, *features_named(features), F32, 3});
}

static void discard(struct attempt *a) {
    for (int slot = 0; slot < SLOTS; slot++) {
        if (a->call.has[slot])
            place_cpu.give(&a->block[slot]);
    }
    free(a->workspace);
    call_free(&a->call);
}

/* No output byte changed since prepare(). */
static bool untouched(const struct attempt *a) {
    bool same = true;
    for (int slot = OUTPUT; slot <= LSE; slot++) {
        const struct tensor *t = &a->call.tensor[slot];
        same &= !a->call.has[slot] || memcmp(a->block[slot].data, t->image, t->bytes) == 0;
    }
    return same;
}

static void expect(const dlattn_api *api, const struct bad *bad, const struct attempt *a,
                   const char *function, int32_t status) {
    cr_expect(eq(int, status, bad->status), "%s: %s: %s", bad->name, function, api->last_error());
    for (int i = 0; i < 4 && bad->says[i]; i++)
        cr_expect(strstr(api->last_error(), bad->says[i]) != NULL, "%s: %s: \"%s\" lacks \"%s\"",
                  bad->name, function, api->last_error(), bad->says[i]);
    cr_expect(untouched(a), "%s: %s wrote an output", bad->name, function);
}

static dlattn_plan *const no_plan = (dlattn_plan *)0x10;

static void expect_query_refused(const dlattn_api *api, const struct bad *bad, struct attempt *a) {
    dlattn_sku sku, before;
    dlattn_plan *plan = no_plan;
    memset(&sku, 0x5c, sizeof sku);
    sku.struct_size = sizeof sku;
    before = sku;
    expect(api, bad, a, "forward_query", api->forward_query(&a->desc.s, &a->tensors.s, &sku));
    cr_expect(memcmp(&sku, &before, sizeof sku) == 0, "%s: forward_query wrote the sku", bad->name);
    expect(api, bad, a, "plan_create", api->plan_create(&a->desc.s, &a->tensors.s, &plan));
    cr_expect(plan == no_plan, "%s: plan_create set the plan", bad->name);
}

/* plan_run() refuses what forward() refuses. */
static void expect_plan_refuses(const dlattn_api *api, const struct bad *bad) {
    struct attempt a;
    dlattn_plan *plan;
    prepare(&a, bad->features);
    bad->spoil(&a);
    cr_assert(eq(int, api->plan_create(&a.desc.s, &a.tensors.s, &plan), DLATTN_OK), "%s: %s",
              bad->name, api->last_error());
    expect(api, bad, &a, "plan_run", api->plan_run(plan, &a.tensors.s, &a.exec.s));
    api->plan_destroy(plan);
    discard(&a);
}

Test(bad_input, calls) {
    const dlattn_api *api = test_api();
    for (size_t i = 0; i < sizeof bad_calls / sizeof bad_calls[0]; i++) {
        const struct bad *bad = &bad_calls[i];
        struct attempt a;
        prepare(&a, bad->features);
        bad->spoil(&a);
        expect_query_refused(api, bad, &a);
        expect(api, bad, &a, "forward", api->forward(&a.desc.s, &a.tensors.s, &a.exec.s));
        discard(&a);
    }
}

Test(bad_input, runs) {
    const dlattn_api *api = test_api();
    for (size_t i = 0; i < sizeof bad_runs / sizeof bad_runs[0]; i++) {
        const struct bad *bad = &bad_runs[i];
        struct attempt a;
        dlattn_sku sku = {.struct_size = sizeof sku};
        prepare(&a, bad->features);
        bad->spoil(&a);
        cr_expect(eq(int, api->forward_query(&a.desc.s, &a.tensors.s, &sku), DLATTN_OK),
                  "%s: a query reads no data: %s", bad->name, api->last_error());
        expect(api, bad, &a, "forward", api->forward(&a.desc.s, &a.tensors.s, &a.exec.s));
        discard(&a);
        expect_plan_refuses(api, bad);
    }
}

/* All that is spoiled above is right before. */
Test(bad_input, unspoiled) {
    const dlattn_api *api = test_api();
    static const char *const sets[] = {
        "lse",   "plain",  "bias",        "bias_keys",     "mask",   "alibi", "alibi_batch",
        "sinks", "window", "key_lengths", "query_lengths", "varlen", "paged"};
    for (size_t i = 0; i < sizeof sets / sizeof sets[0]; i++) {
        struct attempt a;
        prepare(&a, sets[i]);
        cr_expect(eq(int, api->forward(&a.desc.s, &a.tensors.s, &a.exec.s), DLATTN_OK), "%s: %s",
                  sets[i], api->last_error());
        cr_expect(not(untouched(&a)));
        discard(&a);
    }
}

/* ---- Pointers, plans and listings ------------------------------------------------------------------------- */

#define EXPECT_REFUSED(call, want, fragment)                                                       \
    do {                                                                                           \
        cr_expect(eq(int, (call), (want)), "%s", #call);                                           \
        cr_expect(strstr(api->last_error(), fragment) != NULL, "%s: \"%s\"", #call,                \
                  api->last_error());                                                              \
    } while (0)

Test(bad_input, null_pointers) {
    const dlattn_api *api = test_api();
    struct attempt a;
    dlattn_sku sku = {.struct_size = sizeof sku};
    dlattn_plan *plan;
    prepare(&a, "lse");
    EXPECT_REFUSED(api->forward(NULL, &a.tensors.s, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                   "desc: is NULL");
    EXPECT_REFUSED(api->forward(&a.desc.s, NULL, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                   "tensors: is NULL");
    EXPECT_REFUSED(api->forward(&a.desc.s, &a.tensors.s, NULL), DLATTN_INVALID_ARGUMENT,
                   "exec: is NULL");
    EXPECT_REFUSED(api->forward_query(NULL, &a.tensors.s, &sku), DLATTN_INVALID_ARGUMENT,
                   "desc: is NULL");
    EXPECT_REFUSED(api->forward_query(&a.desc.s, NULL, &sku), DLATTN_INVALID_ARGUMENT,
                   "tensors: is NULL");
    EXPECT_REFUSED(api->forward_query(&a.desc.s, &a.tensors.s, NULL), DLATTN_INVALID_ARGUMENT,
                   "sku: is NULL");
    EXPECT_REFUSED(api->forward_managed(&a.desc.s, NULL, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                   "tensors: is NULL");
    EXPECT_REFUSED(api->forward_versioned(&a.desc.s, NULL, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                   "tensors: is NULL");
    EXPECT_REFUSED(api->plan_create(&a.desc.s, &a.tensors.s, NULL), DLATTN_INVALID_ARGUMENT,
                   "plan: is NULL");
    EXPECT_REFUSED(api->plan_can_run(NULL, &a.tensors.s), DLATTN_INVALID_ARGUMENT, "plan: is NULL");
    EXPECT_REFUSED(api->plan_run(NULL, &a.tensors.s, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                   "plan: is NULL");
    EXPECT_REFUSED(api->plan_sku(NULL, &sku), DLATTN_INVALID_ARGUMENT, "plan: is NULL");
    api->plan_destroy(NULL);
    cr_assert(eq(int, api->plan_create(&a.desc.s, &a.tensors.s, &plan), DLATTN_OK));
    EXPECT_REFUSED(api->plan_run(plan, NULL, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                   "tensors: is NULL");
    EXPECT_REFUSED(api->plan_run(plan, &a.tensors.s, NULL), DLATTN_INVALID_ARGUMENT,
                   "exec: is NULL");
    EXPECT_REFUSED(api->plan_sku(plan, NULL), DLATTN_INVALID_ARGUMENT, "sku: is NULL");
    api->plan_destroy(plan);
    cr_expect(untouched(&a));
    discard(&a);
}

Test(bad_input, small_outputs) {
    const dlattn_api *api = test_api();
    struct attempt a;
    dlattn_sku sku = {.struct_size = 103}; /* 1.0 has 104 */
    dlattn_kernel_info kernel = {.struct_size = 8};
    dlattn_device_info device = {.struct_size = 8};
    prepare(&a, "lse");
    EXPECT_REFUSED(api->forward_query(&a.desc.s, &a.tensors.s, &sku), DLATTN_INVALID_ARGUMENT,
                   "sku: struct_size is");
    EXPECT_REFUSED(api->kernel_info(0, &kernel), DLATTN_INVALID_ARGUMENT, "info: struct_size is 8");
    EXPECT_REFUSED(api->device_info(0, &device), DLATTN_INVALID_ARGUMENT, "info: struct_size is 8");
    EXPECT_REFUSED(api->kernel_info(0, NULL), DLATTN_INVALID_ARGUMENT, "info: is NULL");
    kernel.struct_size = sizeof kernel;
    device.struct_size = sizeof device;
    EXPECT_REFUSED(api->kernel_info(-1, &kernel), DLATTN_INVALID_ARGUMENT, "index: is -1");
    EXPECT_REFUSED(api->kernel_info(api->kernel_count(), &kernel), DLATTN_INVALID_ARGUMENT,
                   "index: is");
    EXPECT_REFUSED(api->device_info(api->device_count(), &device), DLATTN_INVALID_ARGUMENT,
                   "index: is");
    discard(&a);
}

/* A plan takes other data, and no other problem. */
Test(bad_input, plan_of_another_problem) {
    static const struct {
        enum slot slot;
        int axis;
        const char *says;
    } others[] = {{QUERY, 2, "query's stride along rows is 4128 now, not 16"},
                  {KEY, 1, "key's stride along heads is 4448 now, not 160"},
                  {VALUE, 0, "value's stride along the batch is 4864 now, not 320"},
                  {OUTPUT, 1, "output's stride along heads is 4320 now, not 96"}};
    const dlattn_api *api = test_api();
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        struct attempt planned, other;
        dlattn_plan *plan;
        prepare(&planned, "lse");
        prepare(&other, "sliced");
        cr_assert(eq(int, api->plan_create(&planned.desc.s, &planned.tensors.s, &plan), DLATTN_OK));
        cr_expect(eq(int, api->plan_can_run(plan, &planned.tensors.s), DLATTN_OK));
        planned.tensors.s.lse = NULL;
        EXPECT_REFUSED(api->plan_can_run(plan, &planned.tensors.s), DLATTN_INVALID_ARGUMENT,
                       "with lse, which is absent now");
        planned.tensors.s.lse = &planned.call.tensor[LSE].dl;
        planned.call.tensor[others[i].slot].stride[others[i].axis] =
            other.call.tensor[others[i].slot].stride[others[i].axis] + 4096;
        EXPECT_REFUSED(api->plan_can_run(plan, &planned.tensors.s), DLATTN_INVALID_ARGUMENT,
                       others[i].says);
        EXPECT_REFUSED(api->plan_run(plan, &planned.tensors.s, &planned.exec.s),
                       DLATTN_INVALID_ARGUMENT, others[i].says);
        cr_expect(untouched(&planned));
        api->plan_destroy(plan);
        discard(&planned);
        discard(&other);
    }
}

Test(bad_input, gpu_without_driver) {
    const dlattn_api *api = test_api();
    const struct bad bad = {"gpu", "lse", DLATTN_DEVICE_UNAVAILABLE, {"CUDA"}, on_gpu};
    struct attempt a;
    if (api->device_count() > 1)
        cr_skip_test("a GPU is here");
    prepare(&a, bad.features);
    bad.spoil(&a);
    expect_query_refused(api, &bad, &a);
    expect(api, &bad, &a, "forward", api->forward(&a.desc.s, &a.tensors.s, &a.exec.s));
    discard(&a);
}

/* An element across its own alignment ends a GPU's context, so it is refused before a driver is asked. */
Test(bad_input, elements_across_their_alignment_on_a_gpu) {
    static const struct {
        const char *features;
        enum slot slot;
    } tensors[] = {
        {"lse", QUERY},         {"lse", KEY},           {"lse", VALUE},          {"lse", OUTPUT},
        {"lse", LSE},           {"bias", BIAS},         {"alibi", ALIBI_SLOPES}, {"sinks", SINKS},
        {"paged", BLOCK_TABLE}, {"paged", KEY_LENGTHS}, {"varlen", CU_SEQLENS_Q}};
    const dlattn_api *api = test_api();
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        struct attempt a;
        prepare(&a, tensors[i].features);
        on_gpu(&a);
        a.call.tensor[tensors[i].slot].dl.byte_offset += 2;
        EXPECT_REFUSED(api->forward(&a.desc.s, &a.tensors.s, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                       "not a multiple of an element's 4 bytes");
        EXPECT_REFUSED(api->forward(&a.desc.s, &a.tensors.s, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                       slot_name(tensors[i].slot));
        cr_expect(untouched(&a));
        discard(&a);
    }
}

/* Query, key, value and output that lie in turns in one buffer, [B, L, 4, H, D], share nothing. */
Test(bad_input, outputs_between_inputs) {
    enum { LENGTH = 7, HEADS = 2, DIM = 8, NUMBERS = LENGTH * 4 * HEADS * DIM };
    const dlattn_api *api = test_api();
    float numbers[NUMBERS], apart[LENGTH * HEADS * DIM];
    int64_t shape[] = {1, HEADS, LENGTH, DIM}, stride[] = {0, DIM, 4 * HEADS * DIM, 1};
    DLTensor t[4];
    for (int i = 0; i < NUMBERS; i++)
        numbers[i] = (float)random_normal(5, (uint64_t)i);
    for (int i = 0; i < 4; i++)
        t[i] = (DLTensor){.data = numbers + i * HEADS * DIM,
                          .device = {kDLCPU, 0},
                          .ndim = 4,
                          .dtype = {kDLFloat, 32, 1},
                          .shape = shape,
                          .strides = stride};
    DLTensor output = t[3];
    output.data = apart;
    output.strides = NULL;
    void *workspace = aligned_alloc(64, 1 << 20);
    const dlattn_forward_desc desc = {.struct_size = sizeof desc};
    const dlattn_exec exec = {
        .struct_size = sizeof exec, .workspace = workspace, .workspace_bytes = 1 << 20};
    dlattn_tensors tensors = {.struct_size = sizeof tensors,
                              .query = &t[0],
                              .key = &t[1],
                              .value = &t[2],
                              .output = &output};
    cr_assert(eq(int, api->forward(&desc, &tensors, &exec), DLATTN_OK), "%s", api->last_error());
    tensors.output = &t[3];
    cr_assert(eq(int, api->forward(&desc, &tensors, &exec), DLATTN_OK), "%s", api->last_error());
    for (int l = 0; l < LENGTH; l++)
        for (int h = 0; h < HEADS; h++)
            cr_expect(memcmp(numbers + ((l * 4 + 3) * HEADS + h) * DIM,
                             apart + (h * LENGTH + l) * DIM, DIM * sizeof(float)) == 0);
    t[3].data = numbers + 3 * HEADS * DIM - 1; /* one element into the values */
    EXPECT_REFUSED(api->forward(&desc, &tensors, &exec), DLATTN_INVALID_ARGUMENT,
                   "shares memory with value");
    free(workspace);
}

/* 40 keys in pages of 4, of which the last three rows see 33 to 39. */
static const struct test_case windowed_pages = {
    {1, 2, 2, 3, 40, 16, 16},
    {.page_size = 4, .window = true, .window_left = 4, .bottom_right = true},
    F32,
    3,
};
enum { FIRST_PAGE_SEEN = 33 / 4, TABLE_COLUMNS = 40 / 4 };

/* Pages left of every row's window are nobody's: their entries may be anything. */
Test(bad_input, pages_that_no_row_sees) {
    static const int32_t wild[] = {-1, INT32_MAX, INT32_MIN, 12};
    const dlattn_api *api = test_api();
    struct attempt a;
    unsigned char right[3 * 2 * 16 * sizeof(float)];
    prepare_case(&a, &windowed_pages);
    cr_assert(eq(int, api->forward(&a.desc.s, &a.tensors.s, &a.exec.s), DLATTN_OK), "%s",
              api->last_error());
    cr_assert(eq(sz, a.call.tensor[OUTPUT].bytes, sizeof right));
    memcpy(right, a.block[OUTPUT].data, sizeof right);
    for (size_t i = 0; i < sizeof wild / sizeof wild[0]; i++) {
        for (int64_t n = 0; n < FIRST_PAGE_SEEN; n++)
            set_int(&a, BLOCK_TABLE, n, wild[i]);
        memset(a.block[OUTPUT].data, 0, sizeof right);
        cr_expect(eq(int, api->forward(&a.desc.s, &a.tensors.s, &a.exec.s), DLATTN_OK), "%s",
                  api->last_error());
        cr_expect(memcmp(a.block[OUTPUT].data, right, sizeof right) == 0, "entries %d", wild[i]);
    }
    set_int(&a, BLOCK_TABLE, FIRST_PAGE_SEEN, -1);
    EXPECT_REFUSED(api->forward(&a.desc.s, &a.tensors.s, &a.exec.s), DLATTN_INVALID_ARGUMENT,
                   "[0, 8] is -1");
    discard(&a);
}

/* A thread of the host that writes lengths and pages while a call runs spoils its result, but no other memory: between the
 * checks and the work the host's own parallel_for has its say. */
static void spoil_then_run(void *ctx, int64_t count, dlattn_parallel_body body, void *body_ctx) {
    struct attempt *a = ctx;
    for (int64_t n = 0; n < TABLE_COLUMNS && a->call.has[BLOCK_TABLE]; n++)
        set_int(a, BLOCK_TABLE, n, n % 2 ? INT32_MAX : INT32_MIN);
    for (int slot = QUERY_LENGTHS; slot <= CU_SEQLENS_K; slot++) {
        for (int64_t i = 0; a->call.has[slot] && i < a->call.tensor[slot].shape[0]; i++)
            set_int(a, (enum slot)slot, i, i % 2 ? INT32_MIN : INT32_MAX);
    }
    for (int64_t i = 0; i < count; i++)
        body(body_ctx, i);
}

static bool surroundings_hold(const struct block *block) {
    void *bytes = malloc(block->bytes + 1);
    const bool hold = place_cpu.fetch(block, bytes);
    free(bytes);
    return hold;
}

Test(bad_input, integers_written_during_a_call) {
    static const char *const sets[] = {"key_lengths", "query_lengths", "varlen_lengths"};
    const dlattn_api *api = test_api();
    for (int i = 0; i < 4; i++) {
        for (int32_t row = 0; row < api->kernel_count(); row++) {
            struct attempt a;
            dlattn_kernel_info info = {.struct_size = sizeof info};
            api->kernel_info(row, &info);
            if (!info.available || strcmp(info.backend, "cpu") != 0 ||
                strcmp(info.operation, "forward") != 0)
                continue;
            if (i == 3)
                prepare_case(&a, &windowed_pages);
            else
                prepare(&a, sets[i]);
            a.desc.s.kernel = info.name;
            a.exec.s.parallel_for = spoil_then_run;
            a.exec.s.parallel_ctx = &a;
            const int32_t status = api->forward(&a.desc.s, &a.tensors.s, &a.exec.s);
            cr_expect(status == DLATTN_OK || status == DLATTN_UNSUPPORTED, "%s: %s", info.name,
                      api->last_error());
            for (int slot = 0; slot < SLOTS; slot++) {
                if (a.call.has[slot])
                    cr_expect(surroundings_hold(&a.block[slot]), "%s", info.name);
            }
            discard(&a);
        }
    }
}

/* Listings find nothing wrong. */
Test(bad_input, listings_leave_the_last_error) {
    const dlattn_api *api = test_api();
    char before[512];
    EXPECT_REFUSED(api->forward(NULL, NULL, NULL), DLATTN_INVALID_ARGUMENT, "desc: is NULL");
    snprintf(before, sizeof before, "%s", api->last_error());
    for (int32_t i = 0; i < api->kernel_count(); i++) {
        dlattn_kernel_info info = {.struct_size = sizeof info};
        cr_expect(eq(int, api->kernel_info(i, &info), DLATTN_OK));
    }
    for (int32_t i = 0; i < api->device_count(); i++) {
        dlattn_device_info info = {.struct_size = sizeof info};
        cr_expect(eq(int, api->device_info(i, &info), DLATTN_OK));
    }
    cr_expect(strcmp(api->last_error(), before) == 0, "\"%s\"", api->last_error());
}

/* A failing call leaves its message to its own thread; a status has a name. */
Test(bad_input, names_of_statuses) {
    const dlattn_api *api = test_api();
    for (int32_t status = DLATTN_OK; status <= DLATTN_INTERNAL; status++)
        cr_expect(strcmp(api->status_name(status), "unknown status") != 0, "%d", status);
    cr_expect(strcmp(api->status_name(-1), "unknown status") == 0);
    cr_expect(strcmp(api->status_name(99), "unknown status") == 0);
}
