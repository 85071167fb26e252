#include "kernels/cuda/common/fill.h"

static int64_t row_blocks(const struct problem *p, int32_t tile_q) {
    return (p->len_q + tile_q - 1) / tile_q;
}

bool fwd_fits(struct plan *plan, const struct problem *p) {
    if (p->len_q > FWD_MAX_LENGTH || p->len_k > FWD_MAX_LENGTH || p->page_size > FWD_MAX_LENGTH)
        plan->why = "a sequence may have at most 2^28 rows or keys";
    else if (p->batch * p->heads_q > INT32_MAX)
        plan->why = "there may be at most 2^31 - 1 heads in all sequences together";
    else if (row_blocks(p, plan->tile_q) * p->batch * p->heads_q > INT32_MAX)
        plan->why = "it takes more blocks than a grid has; max_seqlen_q, the rows of the longest "
                    "sequence, makes them fewer";
    return !plan->why;
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

void fwd_fill(struct fwd_params *params, const struct problem *p, int32_t tile_q, int64_t *blocks) {
    const int64_t bytes = dtype_bytes(p->dtype);
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
            (aligned(&p->query, bytes, p->dim_qk) ? FWD_ALIGNED_QUERY : 0) |
            (aligned(&p->key, bytes, p->dim_qk) ? FWD_ALIGNED_KEY : 0) |
            (aligned(&p->value, bytes, p->dim_v) ? FWD_ALIGNED_VALUE : 0) |
            (aligned(&p->output, bytes, p->dim_v) ? FWD_ALIGNED_OUTPUT : 0) |
            (p->bottom_right ? FWD_BOTTOM_RIGHT : 0) | (p->empty_lse_inf ? FWD_EMPTY_LSE_INF : 0) |
            (p->lse.dtype == DTYPE_F32 ? FWD_LSE_F32 : 0) |
            (p->bias.dtype == DTYPE_F32 ? FWD_BIAS_F32 : 0) | (causal ? FWD_LONGEST_FIRST : 0) |
            (paired(&p->bias, dtype_bytes(p->bias.dtype)) ? FWD_PAIRED_BIAS : 0) |
            (paired(&p->mask, 1) ? FWD_PAIRED_MASK : 0),
        .row_blocks = (int32_t)row_blocks(p, tile_q),
        .scale = p->scale,
        .softcap = p->softcap,
        .exponent_scale = (float)(p->scale * 1.4426950408889634),
    };
    *blocks = params->row_blocks * p->batch * p->heads_q;
}

int64_t fwd_blocks(const struct caps *caps, int32_t shared_memory_bytes) {
    /* A multiprocessor has 1 KiB more than one block may use, and the driver takes 1 KiB of each block. */
    return (caps->shared_memory_bytes + 1024) / (shared_memory_bytes + 1024);
}
