#include "kernels/cuda/common/fill.h"

#include <math.h>

bool fwd_fits(struct plan *plan, const struct problem *p) {
    const int64_t heads = p->batch * p->heads_q, row_blocks = ceil_divide(p->len_q, plan->tile_q);
    if (p->len_q > FWD_MAX_LENGTH || p->len_k > FWD_MAX_LENGTH || p->page_size > FWD_MAX_LENGTH)
        plan->why = "a sequence may have at most 2^28 rows or keys";
    else if (heads > INT32_MAX)
        plan->why = "there may be at most 2^31 - 1 heads in all sequences together";
    else if (row_blocks * heads > INT32_MAX)
        plan->why = "it takes more blocks than a grid has; max_seqlen_q, the rows of the longest "
                    "sequence, makes them fewer";
    else
        plan->blocks = (int32_t)(row_blocks * heads);
    return !plan->why;
}

bool fwd_plan(struct plan *plan, const struct problem *p, const struct tile *tiles,
              int32_t chosen) {
    if (chosen < 0)
        return false;
    plan->variant = chosen;
    plan->tile_q = tiles[chosen].rows;
    plan->tile_k = tiles[chosen].keys;
    return fwd_fits(plan, p);
}

int32_t fwd_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                   const struct tile *tiles) {
    struct fwd_pair_params params;
    fwd_fill(&params.fwd, p, plan->tile_q);
    pair_fill(&params.pair, p);
    return cuda_launch(kernel_for(&tiles[plan->variant], p->dtype), p->device_id, plan->blocks,
                       exec->stream, &params);
}

static struct fwd_view view(const struct view *v) {
    return (struct fwd_view){v->data, {v->stride[0], v->stride[1], v->stride[2], v->stride[3]}};
}

/* True if rows can be read and written 16 bytes at a time. `inner`: extent of the last axis. */
static bool aligned(const struct view *v, int64_t bytes, int64_t inner) {
    const int64_t strides = v->stride[0] | v->stride[1] | v->stride[2];
    return (uintptr_t)v->data % 16 == 0 && (strides | inner) * bytes % 16 == 0 && v->stride[3] == 1;
}

/* True if elements 2 j and 2 j + 1 of every row can be read at once. */
static bool paired(const struct view *v, int64_t bytes) {
    const int64_t strides = v->stride[0] | v->stride[1] | v->stride[2];
    return ((uintptr_t)v->data & (2 * bytes - 1)) == 0 && strides % 2 == 0 && v->stride[3] == 1;
}

static int32_t window(int64_t keys) {
    return keys < FWD_MAX_LENGTH ? (int32_t)keys : FWD_UNBOUNDED;
}

void fwd_fill(struct fwd_params *params, const struct problem *p, int32_t tile_q) {
    const bool causal = p->window_right != UNBOUNDED;
    *params = (struct fwd_params){
        .query = view(&p->query),
        .key = view(&p->key),
        .value = view(&p->value),
        .output = view(&p->output),
        .lse = view(&p->lse),
        .bias = view(&p->bias),
        .mask = view(&p->mask),
        .alibi_slopes = view(&p->alibi_slopes),
        .sinks = view(&p->sinks),
        .query_lengths = view(&p->query_lengths),
        .key_lengths = view(&p->key_lengths),
        .cu_seqlens_q = view(&p->cu_seqlens_q),
        .cu_seqlens_k = view(&p->cu_seqlens_k),
        .block_table = view(&p->block_table),
        .total_q = p->total_q,
        .total_k = p->total_k,
        .pages = p->pages,
        .batch = (int32_t)p->batch,
        .heads_q = (int32_t)p->heads_q,
        .group = (int32_t)(p->heads_q / p->heads_kv),
        .len_q = (int32_t)p->len_q,
        .len_k = (int32_t)p->len_k,
        .dim_qk = (int32_t)p->dim_qk,
        .dim_v = (int32_t)p->dim_v,
        .page_size = (int32_t)p->page_size,
        .max_pages = (int32_t)p->max_pages,
        .window_left = window(p->window_left),
        .window_right = window(p->window_right),
        .flags =
            (aligned(&p->query, dtype_bytes(p->query.dtype), p->dim_qk) ? FWD_ALIGNED_QUERY : 0) |
            (aligned(&p->key, dtype_bytes(p->key.dtype), p->dim_qk) ? FWD_ALIGNED_KEY : 0) |
            (aligned(&p->value, dtype_bytes(p->value.dtype), p->dim_v) ? FWD_ALIGNED_VALUE : 0) |
            (aligned(&p->output, dtype_bytes(p->output.dtype), p->dim_v) ? FWD_ALIGNED_OUTPUT : 0) |
            (p->bottom_right ? FWD_BOTTOM_RIGHT : 0) | (p->empty_lse_inf ? FWD_EMPTY_LSE_INF : 0) |
            (p->lse.dtype == DTYPE_F32 ? FWD_LSE_F32 : 0) |
            (p->bias.dtype == DTYPE_F32 ? FWD_BIAS_F32 : 0) | (causal ? FWD_LONGEST_FIRST : 0) |
            (paired(&p->bias, dtype_bytes(p->bias.dtype)) ? FWD_PAIRED_BIAS : 0) |
            (paired(&p->mask, 1) ? FWD_PAIRED_MASK : 0) |
            (p->key.dtype == DTYPE_E5M2 ? FWD_KEY_E5M2 : 0) |
            (p->value.dtype == DTYPE_E5M2 ? FWD_VALUE_E5M2 : 0),
        .row_blocks = (int32_t)ceil_divide(p->len_q, tile_q),
        .scale = p->scale,
        .softcap = p->softcap,
        .exponent_scale = (float)(p->scale * LOG2_E),
        .query_scale = view(&p->query_scale),
        .key_scale = view(&p->key_scale),
        .value_scale = view(&p->value_scale),
    };
}

bool fwd_needs_extras(const struct problem *p) {
    const uint64_t extras = DLATTN_FEATURE_SOFTCAP | DLATTN_FEATURE_BIAS | DLATTN_FEATURE_MASK |
                            DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_PAGED |
                            DLATTN_FEATURE_DIAGONAL_OFFSET;
    return p->features & extras || !(p->scale > 0);
}

bool fwd_takes_float8(struct plan *plan, const struct problem *p) {
    const bool by_page = p->page_size && (p->key_scale.stride[0] | p->value_scale.stride[0]) != 0;
    if (!dtype_is_float8(p->dtype))
        return false;
    if (p->dtype != DTYPE_E4M3)
        plan->why = "queries are float8_e4m3fn";
    else if (!dtype_is_float8(p->key.dtype) || p->key.dtype != p->value.dtype)
        plan->why = "keys and values are both float8_e4m3fn or both float8_e5m2";
    else if (dtype_is_float8(p->output.dtype))
        plan->why = "outputs are float16, bfloat16 or float32";
    else if (by_page)
        plan->why = "scales are the same for all pages";
    return !plan->why;
}

bool offset_fits(struct plan *plan, const struct problem *p) {
    const int64_t offset = p->diagonal_offset < 0 ? -p->diagonal_offset : p->diagonal_offset;
    if (offset + p->len_q + p->len_k > FWD_UNBOUNDED)
        plan->why = "diagonal_offset and the lengths may be at most 2^29 together";
    return !plan->why;
}

struct divisor divisor_of(int64_t d) {
    struct divisor r = {.shift = 31};
    while (INT64_C(1) << (r.shift - 31) < d)
        r.shift++;
    r.multiplier = (uint32_t)(((INT64_C(1) << r.shift) + d - 1) / d);
    return r;
}

bool fwd_needs_pairs(const struct problem *p) {
    return p->features & (PAIR_FEATURES | DLATTN_FEATURE_DIAGONAL_OFFSET);
}

void pair_fill(struct pair_params *params, const struct problem *p) {
    *params = (struct pair_params){
        .query_segments = view(&p->query_segments),
        .key_segments = view(&p->key_segments),
        .block_mask = view(&p->block_mask),
        .block_q = divisor_of(p->block_q > 0 ? p->block_q : 1),
        .block_k = divisor_of(p->block_k > 0 ? p->block_k : 1),
        .diagonal_offset = (int32_t)p->diagonal_offset,
        .dropout = p->dropout_probability > 0,
        .keep = (float)(1 / (1 - p->dropout_probability)),
        .dropped_upto = (uint32_t)fmax(ceil(p->dropout_probability * 0x1p32) - 1, 0),
        .seed = {(uint32_t)p->dropout_seed,
                 (uint32_t)(p->dropout_seed >> 32) ^ (uint32_t)(p->dropout_offset >> 32)},
        .offset = (uint32_t)p->dropout_offset,
        .dropout_probability = p->dropout_probability,
    };
}

bool bwd_fits(struct plan *plan, const struct problem *p) {
    return offset_fits(plan, p) && fwd_fits(plan, p);
}

bool bwd_needs_logits(const struct problem *p) {
    const uint64_t options = DLATTN_FEATURE_SOFTCAP | DLATTN_FEATURE_BIAS | DLATTN_FEATURE_MASK |
                             DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_SEGMENTS |
                             DLATTN_FEATURE_BLOCK_MASK | DLATTN_FEATURE_DROPOUT;
    return p->features & options || !(p->scale > 0);
}

int64_t bwd_stats_rows(const struct problem *p) {
    const int64_t group = BWD_STATS_ROWS;
    return p->total_q > 0 ? (p->total_q / group + p->batch + 1) * group
                          : (p->len_q + group - 1) / group * group * p->batch;
}

static int32_t bwd_flags(const struct problem *p) {
    const struct {
        const struct view *view;
        int64_t inner;
        int32_t f32, aligned;
    } gradients[] = {{&p->d_output, p->dim_v, BWD_D_OUTPUT_F32, 0},
                     {&p->d_lse, 1, BWD_D_LSE_F32, 0},
                     {&p->d_query, p->dim_qk, BWD_D_QUERY_F32, BWD_ALIGNED_D_QUERY},
                     {&p->d_key, p->dim_qk, BWD_D_KEY_F32, BWD_ALIGNED_D_KEY},
                     {&p->d_value, p->dim_v, BWD_D_VALUE_F32, BWD_ALIGNED_D_VALUE},
                     {&p->d_bias, 1, BWD_D_BIAS_F32, 0}};
    int32_t flags = 0;
    for (size_t i = 0; i < sizeof gradients / sizeof gradients[0]; i++) {
        const struct view *v = gradients[i].view;
        flags |= v->dtype == DTYPE_F32 ? gradients[i].f32 : 0;
        flags |= aligned(v, dtype_bytes(v->dtype), gradients[i].inner) ? gradients[i].aligned : 0;
    }
    if (p->d_output.dtype == p->dtype && aligned(&p->d_output, dtype_bytes(p->dtype), p->dim_v))
        flags |= BWD_ALIGNED_D_OUTPUT;
    return flags | (bwd_needs_logits(p) ? BWD_LOGITS : 0);
}

void bwd_fill(struct bwd_params *params, const struct problem *p, int32_t tile_q) {
    *params = (struct bwd_params){
        .d_output = view(&p->d_output),
        .d_lse = view(&p->d_lse),
        .d_query = view(&p->d_query),
        .d_key = view(&p->d_key),
        .d_value = view(&p->d_value),
        .d_bias = view(&p->d_bias),
        .d_alibi_slopes = view(&p->d_alibi_slopes),
        .d_sinks = view(&p->d_sinks),
        .stats_rows = bwd_stats_rows(p),
        .heads_kv = (int32_t)p->heads_kv,
        .flags = bwd_flags(p),
    };
    fwd_fill(&params->f, p, tile_q);
    pair_fill(&params->pair, p);
}

/* Blocks of each kernel of a row. */
struct blocks {
    int64_t stats, keys, rows, bias, slopes;
};

int64_t bwd_bias_blocks(const struct problem *p, const struct bwd_row *row) {
    const int64_t *const stride = p->d_bias.stride;
    return (stride[0] ? p->batch : 1) * (stride[1] ? p->heads_q : 1) *
           (stride[2] ? ceil_divide(p->len_q, row->bias_rows) : 1) *
           (stride[3] ? ceil_divide(p->len_k, row->bias_keys) : 1);
}

int64_t bwd_slope_blocks(const struct problem *p) {
    return (p->d_alibi_slopes.stride[0] ? p->batch : 1) * p->heads_q;
}

static struct blocks blocks_of(const struct plan *plan, const struct problem *p,
                               const struct bwd_row *row) {
    return (struct blocks){
        .stats = blocks_of_rows(p, row->stats_rows),
        .keys = blocks_of_keys(p, plan->tile_k),
        .rows = blocks_of_rows(p, plan->tile_q),
        .bias = bwd_bias_blocks(p, row),
        .slopes = bwd_slope_blocks(p),
    };
}

static int64_t stats_bytes(const struct problem *p) {
    return 3 * p->heads_q * bwd_stats_rows(p) * (int64_t)sizeof(float);
}

bool bwd_plan(struct plan *plan, const struct problem *p, const struct bwd_row *row) {
    if (!bwd_fits(plan, p))
        return false;
    const struct blocks blocks = blocks_of(plan, p, row);
    if (blocks.keys > INT32_MAX || blocks.stats > INT32_MAX || blocks.bias > INT32_MAX) {
        plan->why = "it takes more blocks than a grid has; max_seqlen_q and max_seqlen_k, the "
                    "lengths of the longest sequences, make them fewer";
        return false;
    }
    plan->workspace_bytes = (size_t)(stats_bytes(p) + blocks.rows * (int64_t)sizeof(float));
    return true;
}

int32_t bwd_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                   const struct bwd_row *row) {
    const struct blocks blocks = blocks_of(plan, p, row);
    struct bwd_params params;
    bwd_fill(&params, p, plan->tile_q);
    params.key_blocks = (int32_t)ceil_divide(p->len_k, plan->tile_k);
    params.stats = exec->workspace;
    params.slope_sums = (char *)exec->workspace + stats_bytes(p);
    const bool slopes = p->d_alibi_slopes.data != NULL, keys = p->d_key.data || p->d_value.data;
    const struct {
        bool wanted;
        struct cuda_kernel *kernel;
        int64_t blocks;
    } launches[] = {
        {true, row->stats, blocks.stats},
        {keys, row->keys, blocks.keys},
        {p->d_query.data || slopes, row->rows, blocks.rows},
        {p->d_bias.data != NULL, row->bias, blocks.bias},
        {p->d_sinks.data != NULL, row->sinks, p->heads_q},
        {slopes, row->slopes, blocks.slopes},
    };
    if (row->start_early && keys && blocks.keys > 0)
        params.flags |= BWD_ROWS_BESIDE_KEYS;
    int32_t status = DLATTN_OK;
    for (int32_t i = 0; i < COUNT(launches) && status == DLATTN_OK; i++)
        if (launches[i].wanted)
            status = (row->start_early ? cuda_launch_early : cuda_launch)(
                launches[i].kernel, p->device_id, (int32_t)launches[i].blocks, exec->stream,
                &params);
    return status;
}
