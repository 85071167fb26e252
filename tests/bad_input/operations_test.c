/*
 * Every way to call backward, merge and append wrongly, and forward with what came in 1.1: the status, a message with the tensor's
 * name and both values, and not one byte written, by the call and by its query.
 */
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 4, BYTES = 1 << 14, FILL = 0x5c };

/* One tensor with its own memory, compact. */
struct made {
    DLTensor dl;
    int64_t shape[AXES], stride[AXES];
    unsigned char bytes[BYTES];
};

static const DLDataType f32 = {kDLFloat, 32, 1}, i32 = {kDLInt, 32, 1}, u8 = {kDLUInt, 8, 1};

static DLTensor *make(struct made *t, DLDataType dtype, int ndim, const int64_t *shape) {
    int64_t step = 1;
    for (int axis = ndim - 1; axis >= 0; axis--) {
        t->shape[axis] = shape[axis];
        t->stride[axis] = step;
        step *= shape[axis];
    }
    t->dl = (DLTensor){.data = t->bytes,
                       .device = {kDLCPU, 0},
                       .ndim = ndim,
                       .dtype = dtype,
                       .shape = t->shape,
                       .strides = t->stride};
    return &t->dl;
}
#define SHAPE(...)                                                                                 \
    (sizeof((int64_t[]){__VA_ARGS__}) / 8), (int64_t[]) { __VA_ARGS__ }

static void set_int(struct made *t, int i, int32_t value) {
    memcpy(t->bytes + i * 4, &value, sizeof value);
}

static void set_float(struct made *t, int i, float value) {
    memcpy(t->bytes + i * 4, &value, sizeof value);
}

static void fill(struct made *t, float value) {
    for (int i = 0; i < BYTES / 4; i++)
        set_float(t, i, value);
}

static bool holds(const struct made *t) {
    for (int i = 0; i < BYTES; i++) {
        if (t->bytes[i] != FILL)
            return false;
    }
    return true;
}

/* ---- The calls, right before they are spoiled: B 2, H 4 / 2, Lq 6, Lk 10, D 8, D_v 12 --------------------- */

enum { B = 2, H = 4, G = 2, LQ = 6, LK = 10, D = 8, DV = 12, CAPACITY = 16, NEW = 3, PARTS = 3 };

struct attempt {
    dlattn_forward_desc desc;
    dlattn_tensors tensors;
    dlattn_gradients gradients;
    dlattn_partials partials;
    dlattn_append_tensors append;
    dlattn_exec exec;
    unsigned char *workspace;
    /* of attention, and gradients */
    struct made query, key, value, output, lse, bias, slopes, sinks;
    struct made query_segments, key_segments, block_mask, query_scale, key_scale;
    struct made d_output, d_lse, d_query, d_key, d_value, d_bias, d_slopes, d_sinks;
    /* of merge: `output` and `lse` are what is written */
    struct made outputs[PARTS], lses[PARTS];
    const DLTensor *output_list[PARTS], *lse_list[PARTS];
    /* of append: `key` and `value` are the new rows */
    struct made key_cache, value_cache, cache_lengths, new_lengths, cu_seqlens, block_table;
};

static void prepare_exec(struct attempt *a) {
    a->workspace = aligned_alloc(64, 1 << 20);
    a->exec = (dlattn_exec){
        .struct_size = sizeof a->exec, .workspace = a->workspace, .workspace_bytes = 1 << 20};
}

static void prepare_attention(struct attempt *a, bool backward) {
    a->desc = (dlattn_forward_desc){.struct_size = sizeof a->desc, .block_q = 2, .block_k = 4};
    a->tensors = (dlattn_tensors){
        .struct_size = sizeof a->tensors,
        .query = make(&a->query, f32, SHAPE(B, H, LQ, D)),
        .key = make(&a->key, f32, SHAPE(B, G, LK, D)),
        .value = make(&a->value, f32, SHAPE(B, G, LK, DV)),
        .output = make(&a->output, f32, SHAPE(B, H, LQ, DV)),
        .lse = make(&a->lse, f32, SHAPE(B, H, LQ)),
        .bias = make(&a->bias, f32, SHAPE(1, H, LQ, LK)),
        .alibi_slopes = make(&a->slopes, f32, SHAPE(H)),
        .sinks = make(&a->sinks, f32, SHAPE(H)),
        .query_segments = make(&a->query_segments, i32, SHAPE(B, LQ)),
        .key_segments = make(&a->key_segments, i32, SHAPE(B, LK)),
        .block_mask = make(&a->block_mask, u8, SHAPE(1, 1, 3, 3)),
    };
    if (!backward) {
        a->tensors.query_scale = make(&a->query_scale, f32, SHAPE(1));
        a->tensors.key_scale = make(&a->key_scale, f32, SHAPE(B, G));
        memset(a->output.bytes, FILL, BYTES);
        memset(a->lse.bytes, FILL, BYTES);
        fill(&a->query_scale, 1);
        fill(&a->key_scale, 1);
        return;
    }
    a->gradients = (dlattn_gradients){
        .struct_size = sizeof a->gradients,
        .d_output = make(&a->d_output, f32, SHAPE(B, H, LQ, DV)),
        .d_lse = make(&a->d_lse, f32, SHAPE(B, H, LQ)),
        .d_query = make(&a->d_query, f32, SHAPE(B, H, LQ, D)),
        .d_key = make(&a->d_key, f32, SHAPE(B, G, LK, D)),
        .d_value = make(&a->d_value, f32, SHAPE(B, G, LK, DV)),
        .d_bias = make(&a->d_bias, f32, SHAPE(1, H, LQ, LK)),
        .d_alibi_slopes = make(&a->d_slopes, f32, SHAPE(H)),
        .d_sinks = make(&a->d_sinks, f32, SHAPE(H)),
    };
    struct made *const written[] = {&a->d_query, &a->d_key,    &a->d_value,
                                    &a->d_bias,  &a->d_slopes, &a->d_sinks};
    for (int i = 0; i < 6; i++)
        memset(written[i]->bytes, FILL, BYTES);
}

static void prepare_merge(struct attempt *a) {
    for (int n = 0; n < PARTS; n++) {
        a->output_list[n] = make(&a->outputs[n], f32, SHAPE(B, H, LQ, DV));
        a->lse_list[n] = make(&a->lses[n], f32, SHAPE(B, H, LQ));
    }
    a->partials = (dlattn_partials){.struct_size = sizeof a->partials,
                                    .count = PARTS,
                                    .outputs = a->output_list,
                                    .lses = a->lse_list,
                                    .output = make(&a->output, f32, SHAPE(B, H, LQ, DV)),
                                    .lse = make(&a->lse, f32, SHAPE(B, H, LQ))};
    memset(a->output.bytes, FILL, BYTES);
    memset(a->lse.bytes, FILL, BYTES);
}

static void prepare_append(struct attempt *a) {
    a->append = (dlattn_append_tensors){
        .struct_size = sizeof a->append,
        .key = make(&a->key, f32, SHAPE(B, G, NEW, D)),
        .value = make(&a->value, f32, SHAPE(B, G, NEW, DV)),
        .key_cache = make(&a->key_cache, f32, SHAPE(B, G, CAPACITY, D)),
        .value_cache = make(&a->value_cache, f32, SHAPE(B, G, CAPACITY, DV)),
        .cache_lengths = make(&a->cache_lengths, i32, SHAPE(B)),
        .new_lengths = make(&a->new_lengths, i32, SHAPE(B)),
        .key_scale = make(&a->key_scale, f32, SHAPE(B, G)),
    };
    for (int b = 0; b < B; b++) {
        set_int(&a->cache_lengths, b, 5);
        set_int(&a->new_lengths, b, NEW);
    }
    fill(&a->key_scale, 1);
    memset(a->key_cache.bytes, FILL, BYTES);
    memset(a->value_cache.bytes, FILL, BYTES);
}

/* clang-format off: one line for each way, where it fits */
/* BAD(name, status, "fragments of the message", what spoils it); RUN: seen only where data is read */
#define BAD_FORWARD                                                                                \
    BAD(dropout_negative, INVALID_ARGUMENT, ("dropout_probability", "-0.1"),                       \
        a->desc.dropout_probability = -0.1)                                                        \
    BAD(dropout_one, INVALID_ARGUMENT, ("dropout_probability", "is 1", "below 1"),                 \
        a->desc.dropout_probability = 1)                                                           \
    BAD(dropout_nan, INVALID_ARGUMENT, ("dropout_probability", "nan"),                             \
        a->desc.dropout_probability = NAN)                                                         \
    BAD(offset_beyond, INVALID_ARGUMENT, ("diagonal_offset", "2147483648"),                        \
        a->desc.diagonal_offset = INT64_C(1) << 31)                                                \
    BAD(block_q_zero, INVALID_ARGUMENT, ("block_q", "0 and 4", "at least 1"), a->desc.block_q = 0) \
    BAD(no_block_mask, INVALID_ARGUMENT, ("block_q", "2 and 4", "0 without"),                      \
        a->tensors.block_mask = NULL)                                                              \
    BAD(block_rows, INVALID_ARGUMENT, ("block_mask", "axis 2 (row blocks)", "4", "3"),             \
        a->block_mask.shape[2] = 4)                                                                \
    BAD(block_keys, INVALID_ARGUMENT, ("block_mask", "axis 3 (key blocks)", "1", "3"),             \
        a->block_mask.shape[3] = 1)                                                                \
    BAD(segments_alone, INVALID_ARGUMENT, ("key_segments", "absent", "query_segments"),            \
        a->tensors.key_segments = NULL)                                                            \
    BAD(key_segments_alone, INVALID_ARGUMENT, ("query_segments", "absent", "key_segments"),        \
        a->tensors.query_segments = NULL)                                                          \
    BAD(segments_length, INVALID_ARGUMENT, ("key_segments", "axis 1", "9", "10"),                  \
        a->key_segments.shape[1] = 9)                                                              \
    BAD(segments_dtype, INVALID_ARGUMENT, ("query_segments", "float32", "int32"),                  \
        a->query_segments.dl.dtype = f32)                                                          \
    BAD(scale_heads, INVALID_ARGUMENT, ("key_scale", "axis 1", "4", "2"),                          \
        a->key_scale.shape[1] = 4)                                                                 \
    BAD(scale_dtype, INVALID_ARGUMENT, ("query_scale", "int32", "float32"),                        \
        a->query_scale.dl.dtype = i32)                                                             \
    BAD(scale_axes, INVALID_ARGUMENT, ("key_scale", "3 axes"), a->key_scale.dl.ndim = 3)           \
    BAD(scale_length, INVALID_ARGUMENT, ("query_scale", "axis 0", "2", "1"),                       \
        a->query_scale.shape[0] = 2)                                                               \
    BAD(float8_output, UNSUPPORTED, ("output", "float8_e4m3fn", "bfloat16"),                       \
        a->output.dl.dtype = (DLDataType){kDLFloat8_e4m3fn, 8, 1})                                 \
    BAD(wide_beside_float8, INVALID_ARGUMENT, ("output", "float16", "query", "float32"),           \
        (a->key.dl.dtype = (DLDataType){kDLFloat8_e5m2, 8, 1},                                     \
         a->output.dl.dtype = (DLDataType){kDLFloat, 16, 1}))                                      \
    BAD(held_dtype, INVALID_ARGUMENT, ("key", "float32", "float8_e4m3fn", "uint8"),                \
        a->desc.key_dtype = (DLDataType){kDLFloat8_e4m3fn, 8, 1})                                  \
    BAD(held_other, INVALID_ARGUMENT, ("value", "uint8", "int8"),                                  \
        (a->value.dl.dtype = u8, a->desc.value_dtype = (DLDataType){kDLInt, 8, 1}))                \
    BAD(reserved1, INVALID_ARGUMENT, ("reserved1", "7"), a->desc.reserved1 = 7)                    \
    RUN(scale_zero, INVALID_ARGUMENT, ("query_scale", "[0, 0] is 0", "positive"),                  \
        set_float(&a->query_scale, 0, 0))                                                          \
    RUN(scale_nan, INVALID_ARGUMENT, ("key_scale", "[1, 0] is", "nan"),                            \
        set_float(&a->key_scale, 2, NAN))                                                          \
    RUN(scale_below_zero, INVALID_ARGUMENT, ("key_scale", "[1, 1] is -3", "positive"),             \
        set_float(&a->key_scale, 3, -3))                                                           \
    RUN(scale_infinite, INVALID_ARGUMENT, ("key_scale", "[0, 1] is inf"),                          \
        set_float(&a->key_scale, 1, INFINITY))

#define BAD_BACKWARD                                                                               \
    BAD(no_gradients, INVALID_ARGUMENT, ("gradients", "all are absent"),                           \
        (a->gradients.d_query = a->gradients.d_key = a->gradients.d_value = a->gradients.d_bias =  \
             NULL,                                                                                 \
         a->gradients.d_alibi_slopes = a->gradients.d_sinks = NULL))                               \
    BAD(no_d_output, INVALID_ARGUMENT, ("d_output", "absent"), a->gradients.d_output = NULL)       \
    BAD(no_lse, INVALID_ARGUMENT, ("lse", "absent"),                                               \
        (a->tensors.lse = NULL, a->gradients.d_lse = NULL))                                        \
    BAD(no_output, INVALID_ARGUMENT, ("output", "absent"), a->tensors.output = NULL)               \
    BAD(no_bias, INVALID_ARGUMENT, ("d_bias", "bias is absent"), a->tensors.bias = NULL)           \
    BAD(no_sinks, INVALID_ARGUMENT, ("d_sinks", "sinks is absent"), a->tensors.sinks = NULL)       \
    BAD(d_output_dim, INVALID_ARGUMENT, ("d_output", "axis 3 is 8", "12"),                         \
        a->d_output.shape[3] = 8)                                                                  \
    BAD(d_key_heads, INVALID_ARGUMENT, ("d_key", "axis 1 is 4", "2"), a->d_key.shape[1] = 4)       \
    BAD(d_bias_batch, INVALID_ARGUMENT, ("d_bias", "axis 0 is 2", "1"), a->d_bias.shape[0] = 2)    \
    BAD(d_query_axes, INVALID_ARGUMENT, ("d_query", "3 axes", "4"), a->d_query.dl.ndim = 3)        \
    BAD(d_query_dtype, INVALID_ARGUMENT, ("d_query", "float16", "float32"),                        \
        a->d_query.dl.dtype.bits = 16)                                                             \
    BAD(d_sinks_dtype, INVALID_ARGUMENT, ("d_sinks", "int32", "float32"),                          \
        a->d_sinks.dl.dtype = i32)                                                                 \
    BAD(d_key_stride_0, INVALID_ARGUMENT, ("d_key", "axis 1", "stride 0"), a->d_key.stride[1] = 0) \
    BAD(d_value_overlap, INVALID_ARGUMENT, ("d_value", "axis 2", "stride 11"),                     \
        a->d_value.stride[2] = 11)                                                                 \
    BAD(device, INVALID_ARGUMENT, ("d_key", "cuda 0", "cpu 0"),                                    \
        a->d_key.dl.device.device_type = kDLCUDA)                                                  \
    BAD(scales, UNSUPPORTED, ("backward", "scales"),                                               \
        a->tensors.key_scale = make(&a->key_scale, f32, SHAPE(1)))                                 \
    BAD(row_of_forward, INVALID_ARGUMENT, ("kernel", "\"cpu_fwd_ref\""),                           \
        a->desc.kernel = "cpu_fwd_ref")                                                            \
    BAD(small_struct, INVALID_ARGUMENT, ("gradients", "struct_size is 64", "72"),                  \
        a->gradients.struct_size = 64)                                                             \
    RUN(no_data, INVALID_ARGUMENT, ("d_output", "NULL"), a->d_output.dl.data = NULL)               \
    RUN(d_query_is_query, INVALID_ARGUMENT, ("d_query", "shares memory with query"),               \
        a->d_query.dl.data = a->query.bytes)                                                       \
    RUN(two_in_one, INVALID_ARGUMENT, ("d_key", "shares memory with d_value"),                     \
        a->d_key.dl.data = a->d_value.bytes)                                                       \
    RUN(d_value_is_d_output, INVALID_ARGUMENT, ("d_value", "shares memory with d_output"),         \
        a->d_value.dl.data = a->d_output.bytes)

#define BAD_MERGE                                                                                  \
    BAD(no_parts, INVALID_ARGUMENT, ("count", "is 0", "1"), a->partials.count = 0)                 \
    BAD(negative_parts, INVALID_ARGUMENT, ("count", "is -1"), a->partials.count = -1)              \
    BAD(many_parts, INVALID_ARGUMENT, ("count", "1025", "1024"), a->partials.count = 1025)         \
    BAD(no_outputs, INVALID_ARGUMENT, ("outputs", "NULL"), a->partials.outputs = NULL)             \
    BAD(no_lses, INVALID_ARGUMENT, ("lses", "NULL"), a->partials.lses = NULL)                      \
    BAD(no_output, INVALID_ARGUMENT, ("output", "absent"), a->partials.output = NULL)              \
    BAD(no_part, INVALID_ARGUMENT, ("outputs[1]", "absent"), a->output_list[1] = NULL)             \
    BAD(no_part_lse, INVALID_ARGUMENT, ("lses[2]", "absent"), a->lse_list[2] = NULL)               \
    BAD(part_shape, INVALID_ARGUMENT, ("outputs[2]", "axis 2", "5", "6"),                          \
        a->outputs[2].shape[2] = 5)                                                                \
    BAD(part_lse_shape, INVALID_ARGUMENT, ("lses[0]", "axis 1", "3", "4"),                         \
        a->lses[0].shape[1] = 3)                                                                   \
    BAD(part_axes, INVALID_ARGUMENT, ("outputs[1]", "3 axes", "4"), a->outputs[1].dl.ndim = 3)     \
    BAD(part_dtype, INVALID_ARGUMENT, ("lses[1]", "int32", "float32"), a->lses[1].dl.dtype = i32)  \
    BAD(part_device, INVALID_ARGUMENT, ("outputs[1]", "cuda 0", "cpu 0"),                          \
        a->outputs[1].dl.device.device_type = kDLCUDA)                                             \
    BAD(output_stride_0, INVALID_ARGUMENT, ("output", "axis 1", "stride 0"),                       \
        a->output.stride[1] = 0)                                                                   \
    RUN(part_no_data, INVALID_ARGUMENT, ("lses[1]", "NULL"), a->lses[1].dl.data = NULL)            \
    RUN(output_between_parts, INVALID_ARGUMENT, ("output", "shares memory with outputs[1]"),       \
        a->output.dl.data = a->outputs[1].bytes + 4)                                               \
    RUN(lse_is_an_output, INVALID_ARGUMENT, ("lse", "shares memory with outputs[2]"),              \
        a->lse.dl.data = a->outputs[2].bytes)                                                      \
    RUN(lse_is_the_output, INVALID_ARGUMENT, ("output", "shares memory with lse"),                 \
        a->lse.dl.data = a->output.bytes)

#define BAD_APPEND                                                                                 \
    BAD(no_key, INVALID_ARGUMENT, ("key", "absent"), a->append.key = NULL)                         \
    BAD(no_cache, INVALID_ARGUMENT, ("value_cache", "absent"), a->append.value_cache = NULL)       \
    BAD(no_lengths, INVALID_ARGUMENT, ("cache_lengths", "absent"), a->append.cache_lengths = NULL) \
    BAD(cache_heads, INVALID_ARGUMENT, ("key_cache", "axis 1", "4", "2"),                          \
        a->key_cache.shape[1] = 4)                                                                 \
    BAD(cache_dim, INVALID_ARGUMENT, ("value_cache", "axis 3", "8", "12"),                         \
        a->value_cache.shape[3] = 8)                                                               \
    BAD(cache_batch, INVALID_ARGUMENT, ("key_cache", "axis 0", "3", "2"),                          \
        a->key_cache.shape[0] = 3)                                                                 \
    BAD(two_capacities, INVALID_ARGUMENT, ("value_cache", "axis 2", "15", "16"),                   \
        a->value_cache.shape[2] = 15)                                                              \
    BAD(value_length, INVALID_ARGUMENT, ("value", "axis 2", "2", "3"), a->value.shape[2] = 2)      \
    BAD(value_dtype, INVALID_ARGUMENT, ("value", "float64", "float32"),                            \
        a->value.dl.dtype.bits = 64)                                                               \
    BAD(key_dtype, UNSUPPORTED, ("key", "uint8", "float16"), a->key.dl.dtype = u8)                 \
    BAD(lengths_dtype, INVALID_ARGUMENT, ("cache_lengths", "float32", "int32"),                    \
        a->cache_lengths.dl.dtype = f32)                                                           \
    BAD(cache_stride_0, INVALID_ARGUMENT, ("key_cache", "axis 0", "stride 0"),                     \
        a->key_cache.stride[0] = 0)                                                                \
    BAD(held_dtype, INVALID_ARGUMENT, ("key_cache", "float32", "float8_e5m2"),                     \
        a->append.key_cache_dtype = (DLDataType){kDLFloat8_e5m2, 8, 1})                            \
    BAD(table_batch, INVALID_ARGUMENT, ("block_table", "axis 0", "1", "2"),                        \
        a->append.block_table = make(&a->block_table, i32, SHAPE(1, 4)))                           \
    RUN(cache_is_key, INVALID_ARGUMENT, ("key_cache", "shares memory with key"),                   \
        a->key_cache.dl.data = a->key.bytes)                                                       \
    RUN(one_cache, INVALID_ARGUMENT, ("key_cache", "shares memory with value_cache"),              \
        a->key_cache.dl.data = a->value_cache.bytes)                                               \
    RUN(no_room, INVALID_ARGUMENT, ("cache_lengths", "entry 1 is 14", "3 rows", "16"),             \
        set_int(&a->cache_lengths, 1, 14))                                                         \
    RUN(length_negative, INVALID_ARGUMENT, ("cache_lengths", "entry 0 is -1"),                     \
        set_int(&a->cache_lengths, 0, -1))                                                         \
    RUN(new_beyond, INVALID_ARGUMENT, ("new_lengths", "entry 1 is 4", "0 to 3"),                   \
        set_int(&a->new_lengths, 1, 4))                                                            \
    RUN(scale_negative, INVALID_ARGUMENT, ("key_scale", "[1, 1] is -2"),                           \
        set_float(&a->key_scale, 3, -2))                                                           \
    RUN(page_beyond, INVALID_ARGUMENT, ("block_table", "entry [0, 0] is 9", "2 pages"),            \
        (a->append.block_table = make(&a->block_table, i32, SHAPE(2, 1)),                          \
         set_int(&a->block_table, 0, 9)))

#define RUN BAD
#define BAD(name, status, says, ...)                                                               \
    static void SPOIL(name)(struct attempt * a) { __VA_ARGS__; }
#define SPOIL(name) spoil_forward_##name
BAD_FORWARD
#undef SPOIL
#define SPOIL(name) spoil_backward_##name
BAD_BACKWARD
#undef SPOIL
#define SPOIL(name) spoil_merge_##name
BAD_MERGE
#undef SPOIL
#define SPOIL(name) spoil_append_##name
BAD_APPEND
#undef SPOIL
#undef BAD
#undef RUN
/* clang-format on */

struct bad {
    const char *name;
    bool runs; /* a query, which reads no data, sees nothing wrong */
    int32_t status;
    const char *says[4];
    void (*spoil)(struct attempt *);
};
#define UNWRAP(...) {__VA_ARGS__}
#define BAD(name, status, says, ...) {#name, false, DLATTN_##status, UNWRAP says, SPOIL(name)},
#define RUN(name, status, says, ...) {#name, true, DLATTN_##status, UNWRAP says, SPOIL(name)},
#define SPOIL(name) spoil_forward_##name
static const struct bad bad_forward[] = {BAD_FORWARD};
#undef SPOIL
#define SPOIL(name) spoil_backward_##name
static const struct bad bad_backward[] = {BAD_BACKWARD};
#undef SPOIL
#define SPOIL(name) spoil_merge_##name
static const struct bad bad_merge[] = {BAD_MERGE};
#undef SPOIL
#define SPOIL(name) spoil_append_##name
static const struct bad bad_append[] = {BAD_APPEND};
#undef SPOIL

/* ---- Trying it -------------------------------------------------------------------------------------------- */

enum operation { FORWARD, BACKWARD, MERGE, APPEND };

static struct attempt *prepare(enum operation operation) {
    struct attempt *a = calloc(1, sizeof *a);
    prepare_exec(a);
    if (operation == MERGE)
        prepare_merge(a);
    else if (operation == APPEND)
        prepare_append(a);
    else
        prepare_attention(a, operation == BACKWARD);
    return a;
}

static void discard(struct attempt *a) {
    free(a->workspace);
    free(a);
}

static int32_t run(const dlattn_api *api, enum operation operation, struct attempt *a) {
    switch (operation) {
    case FORWARD:
        return api->forward(&a->desc, &a->tensors, &a->exec);
    case BACKWARD:
        return api->backward(&a->desc, &a->tensors, &a->gradients, &a->exec);
    case MERGE:
        return api->merge(&a->partials, &a->exec);
    default:
        return api->append(&a->append, &a->exec);
    }
}

static int32_t query(const dlattn_api *api, enum operation operation, struct attempt *a,
                     dlattn_sku *sku) {
    switch (operation) {
    case FORWARD:
        return api->forward_query(&a->desc, &a->tensors, sku);
    case BACKWARD:
        return api->backward_query(&a->desc, &a->tensors, &a->gradients, sku);
    case MERGE:
        return api->merge_query(&a->partials, sku);
    default:
        return api->append_query(&a->append, sku);
    }
}

static bool untouched(enum operation operation, const struct attempt *a) {
    switch (operation) {
    case BACKWARD:
        return holds(&a->d_query) && holds(&a->d_key) && holds(&a->d_value) && holds(&a->d_bias) &&
               holds(&a->d_slopes) && holds(&a->d_sinks);
    case APPEND:
        return holds(&a->key_cache) && holds(&a->value_cache);
    default:
        return holds(&a->output) && holds(&a->lse);
    }
}

static void expect(const dlattn_api *api, const struct bad *bad, int32_t status,
                   const char *function) {
    cr_expect(eq(int, status, bad->status), "%s: %s: %s", bad->name, function, api->last_error());
    for (int i = 0; i < 4 && bad->says[i]; i++)
        cr_expect(strstr(api->last_error(), bad->says[i]) != NULL, "%s: %s: \"%s\" lacks \"%s\"",
                  bad->name, function, api->last_error(), bad->says[i]);
}

static void expect_all_refused(enum operation operation, const struct bad *all, size_t count) {
    const dlattn_api *api = test_api();
    for (size_t i = 0; i < count; i++) {
        struct attempt *a = prepare(operation);
        dlattn_sku sku = {.struct_size = sizeof sku};
        all[i].spoil(a);
        const int32_t asked = query(api, operation, a, &sku);
        if (all[i].runs)
            cr_expect(eq(int, asked, DLATTN_OK), "%s: a query reads no data: %s", all[i].name,
                      api->last_error());
        else
            expect(api, &all[i], asked, "query");
        cr_expect(all[i].runs == (sku.kernel != NULL), "%s: the sku", all[i].name);
        expect(api, &all[i], run(api, operation, a), "call");
        cr_expect(untouched(operation, a), "%s wrote", all[i].name);
        discard(a);
    }
}

#define COUNT(list) (sizeof(list) / sizeof *(list))
Test(operations, forward) { expect_all_refused(FORWARD, bad_forward, COUNT(bad_forward)); }
Test(operations, backward) { expect_all_refused(BACKWARD, bad_backward, COUNT(bad_backward)); }
Test(operations, merge) { expect_all_refused(MERGE, bad_merge, COUNT(bad_merge)); }
Test(operations, append) { expect_all_refused(APPEND, bad_append, COUNT(bad_append)); }

/* All that is spoiled above is right before. */
Test(operations, unspoiled) {
    const dlattn_api *api = test_api();
    for (enum operation o = FORWARD; o <= APPEND; o++) {
        struct attempt *a = prepare(o);
        cr_expect(eq(int, run(api, o, a), DLATTN_OK), "%s", api->last_error());
        cr_expect(not(untouched(o, a)));
        discard(a);
    }
}

Test(operations, null_pointers) {
    const dlattn_api *api = test_api();
    struct attempt *a = prepare(BACKWARD);
    dlattn_sku sku = {.struct_size = sizeof sku};
    dlattn_plan *plan = NULL;
    cr_expect(
        eq(int, api->backward(&a->desc, &a->tensors, NULL, &a->exec), DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "gradients: is NULL") != NULL);
    cr_expect(
        eq(int, api->backward_query(&a->desc, &a->tensors, NULL, &sku), DLATTN_INVALID_ARGUMENT));
    cr_expect(eq(int, api->merge(NULL, &a->exec), DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "partials: is NULL") != NULL);
    cr_expect(eq(int, api->append(NULL, &a->exec), DLATTN_INVALID_ARGUMENT));
    cr_expect(eq(int, api->append_query(NULL, &sku), DLATTN_INVALID_ARGUMENT));
    cr_assert(
        eq(int, api->backward_plan_create(&a->desc, &a->tensors, &a->gradients, &plan), DLATTN_OK));
    cr_expect(eq(int, api->plan_run(plan, &a->tensors, &a->exec), DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "was made for backward") != NULL);
    cr_expect(
        eq(int, api->backward_plan_run(plan, &a->tensors, &a->gradients, &a->exec), DLATTN_OK));
    a->gradients.d_bias = NULL;
    cr_expect(eq(int, api->backward_plan_can_run(plan, &a->tensors, &a->gradients),
                 DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "with d_bias, which is absent now") != NULL);
    api->plan_destroy(plan);
    discard(a);
}

/* A workspace that was cleared once is given back cleared, by whichever row. */
Test(operations, workspace_is_given_back_zero) {
    const dlattn_api *api = test_api();
    struct attempt *a = prepare(BACKWARD);
    memset(a->workspace, 0, 1 << 20);
    a->exec.flags = DLATTN_WORKSPACE_IS_ZERO;
    cr_assert(eq(int, run(api, BACKWARD, a), DLATTN_OK), "%s", api->last_error());
    for (int i = 0; i < 1 << 20; i++)
        cr_assert(eq(int, a->workspace[i], 0), "byte %d", i);
    discard(a);
}

/* Without a batch, what sums over it is 0. */
Test(operations, sums_over_nothing_are_zero) {
    const dlattn_api *api = test_api();
    struct made *t = calloc(14, sizeof *t);
    cr_assert(t != NULL);
    struct made *d_bias = &t[11], *d_slopes = &t[12], *d_sinks = &t[13];
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = make(&t[0], f32, SHAPE(0, H, LQ, D)),
                                    .key = make(&t[1], f32, SHAPE(0, H, LK, D)),
                                    .value = make(&t[2], f32, SHAPE(0, H, LK, D)),
                                    .output = make(&t[3], f32, SHAPE(0, H, LQ, D)),
                                    .lse = make(&t[4], f32, SHAPE(0, H, LQ)),
                                    .bias = make(&t[5], f32, SHAPE(1, H, LQ, LK)),
                                    .alibi_slopes = make(&t[6], f32, SHAPE(H)),
                                    .sinks = make(&t[7], f32, SHAPE(H))};
    const dlattn_gradients gradients = {.struct_size = sizeof gradients,
                                        .d_output = make(&t[8], f32, SHAPE(0, H, LQ, D)),
                                        .d_query = make(&t[9], f32, SHAPE(0, H, LQ, D)),
                                        .d_key = make(&t[10], f32, SHAPE(0, H, LK, D)),
                                        .d_bias = make(d_bias, f32, SHAPE(1, H, LQ, LK)),
                                        .d_alibi_slopes = make(d_slopes, f32, SHAPE(H)),
                                        .d_sinks = make(d_sinks, f32, SHAPE(H))};
    const struct {
        struct made *made;
        int elements;
    } written[] = {{d_bias, H * LQ * LK}, {d_slopes, H}, {d_sinks, H}};
    const dlattn_forward_desc desc = {.struct_size = sizeof desc};
    const dlattn_exec exec = {.struct_size = sizeof exec};
    for (size_t n = 0; n < COUNT(written); n++)
        fill(written[n].made, 1);
    cr_assert(eq(int, api->backward(&desc, &tensors, &gradients, &exec), DLATTN_OK), "%s",
              api->last_error());
    for (size_t n = 0; n < COUNT(written); n++)
        for (int i = 0; i < BYTES / 4; i++) {
            float x;
            memcpy(&x, written[n].made->bytes + 4 * i, sizeof x);
            cr_expect(eq(flt, x, i < written[n].elements ? 0 : 1), "gradient %zu, element %d", n,
                      i);
        }
    free(t);
}
