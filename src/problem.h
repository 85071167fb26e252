/*
 * What one call asks, checked and normalised: all that a kernel needs to know, and nothing of DLPack. Built from what the caller
 * handed over by problem.c (forward, backward), merge.c and append.c; every rule of the ABI holds for it.
 */
#ifndef DLATTN_PROBLEM_H_
#define DLATTN_PROBLEM_H_

#include "abi/dlattn.h"
#include "src/dtype.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum operation { FORWARD, BACKWARD, MERGE, APPEND, OPERATION_COUNT };
const char *operation_name(enum operation operation);

enum backend { BACKEND_CPU, BACKEND_CUDA };

/* No bound on that side of the window: larger than any length, small enough that sums of a few do not overflow. */
#define UNBOUNDED (INT64_C(1) << 60)

/* A tensor as [B, H, L, D]. `data` has byte_offset added and points to element 0; strides are in elements and of either sign;
 * broadcast axes have stride 0. Packed tensors have a batch stride of 0 and start at row cu_seqlens[b]; paged ones have the stride
 * of a page in stride[0]. bias and mask are [B, H, Lq, Lk], block_mask [B, H, row blocks, key blocks], lse [B, H, Lq],
 * alibi_slopes [B, H], sinks [-, H], segments [B, -, L], scales [B or page, H], other integer tensors [B] or [B, n] in
 * stride[0] and stride[1]. Absent: all zero. */
struct view {
    void *data;
    int64_t stride[4];
    enum dtype dtype;
};

/* A factor of the tensor whose scale this is; 1 without one. `b`: the batch entry, or the page. */
static inline float scale_at(const struct view *scale, int64_t b, int64_t h) {
    float factor = 1;
    if (scale->data)
        memcpy(&factor,
               (const char *)scale->data +
                   (b * scale->stride[0] + h * scale->stride[1]) * (int64_t)sizeof factor,
               sizeof factor);
    return factor;
}

struct problem {
    enum operation operation;
    enum backend backend;
    int32_t device_id;
    uint64_t features; /* DLATTN_FEATURE_* that this problem asks */
    uint64_t present;  /* bit i: slot i of the operation's list (slots.inc) is given */
    enum dtype
        dtype; /* of query (append: key; merge: output); the other three are of it, too, unless MIXED_DTYPES is asked */
    bool contiguous; /* every tensor of the operation's first five is compact row-major */
    bool empty_lse_inf;
    bool bottom_right;
    bool any_order; /* backward: sums need no fixed order */
    bool planning;  /* built without data: pointers are NULL and say nothing */

    int64_t batch;
    int64_t heads_q;
    int64_t heads_kv; /* divides heads_q; forward: 1 for stride-0 heads */
    int64_t len_q;    /* of the longest sequence; append: rows of new keys */
    int64_t len_k;    /* most keys that one sequence can have; append: the cache's capacity */
    int64_t dim_qk;
    int64_t dim_v;
    int64_t total_q; /* rows of a packed query, else 0 */
    int64_t total_k;
    int64_t page_size; /* keys of a page, 0 = not paged */
    int64_t pages;
    int64_t max_pages; /* columns of block_table; on a GPU 0 if there are no pages */

    double scale;
    double softcap;          /* 0 = none */
    int64_t window_left;     /* >= 0 or UNBOUNDED */
    int64_t window_right;    /* causal folded in: 0 */
    int64_t diagonal_offset; /* added to the alignment's */
    int64_t block_q, block_k;
    double dropout_probability; /* 0 = none */
    uint64_t dropout_seed, dropout_offset;
    int32_t threads;
    const char *kernel; /* the row the caller insists on, or NULL */

    const dlattn_partials *partials; /* merge: see problem_partial() */

#define VIEW(T, name) struct view name;
    DLATTN_GRADIENT_LIST(VIEW, )
    /* Of append, whose cache_lengths are key_lengths here, and whose new_lengths are query_lengths. */
    struct view key_cache, value_cache;
    DLATTN_TENSOR_LIST(VIEW, )
#undef VIEW
};

/* Checks and normalises a call of forward, or of backward where there are gradients. `with_data` = false reads no data pointer
 * (query and plan creation). Returns a status; the message names the tensor, the axis and both values. */
int32_t problem_build(struct problem *p, const dlattn_forward_desc *desc,
                      const dlattn_tensors *tensors, const dlattn_gradients *gradients,
                      bool with_data);
int32_t merge_build(struct problem *p, const dlattn_partials *in, bool with_data);
int32_t append_build(struct problem *p, const dlattn_append_tensors *tensors, bool with_data);

/* Integer tensors and scales in host memory against the extents: for CPU problems, before anything is written. */
int32_t problem_check_values(const struct problem *p);

/* Nothing to write: legal, and no kernel is asked about it. */
bool problem_is_empty(const struct problem *p);

/* Whether a plan made for `planned` can run `p`: all is the same but data pointers and their alignment. The message names
 * the first tensor or field that differs. */
int32_t problem_check_same(const struct problem *planned, const struct problem *p);

/* Calls visit(ctx, name, view) for each tensor of the problem that has data, until one returns another status than OK. */
typedef int32_t (*problem_visitor)(void *ctx, const char *name, const struct view *view);
int32_t problem_visit(const struct problem *p, problem_visitor visit, void *ctx);

/* One sequence of the batch. Query row i meets key j = i + diagonal. */
struct sequence {
    int64_t q_start, k_start; /* first row in the packed tensors, else 0 */
    int64_t q_rows,
        k_rows; /* rows of query and keys that this sequence owns; outputs and gradients of all are written */
    int64_t q_len, k_len; /* rows and keys that take part */
    int64_t diagonal;
};

/* For CPU problems: reads the length tensors, which must lie in host memory. */
struct sequence problem_sequence(const struct problem *p, int64_t b);

/* For CPU problems with a block table: the page of key j of batch b. Always a page that exists, whatever the table holds: a tile
 * of keys may reach beyond those that were checked. */
int64_t problem_page(const struct problem *p, int64_t b, int64_t j);

/* Part n of a merge. */
struct partial {
    struct view output, lse;
};
struct partial problem_partial(const struct problem *p, int64_t n);

/* Keys [lo, hi) that the windows leave to query row i; empty if lo >= hi. */
static inline void visible_keys(const struct problem *p, const struct sequence *s, int64_t i,
                                int64_t *lo, int64_t *hi) {
    int64_t first = i + s->diagonal - p->window_left, end = i + s->diagonal + p->window_right + 1;
    *lo = first > 0 ? first : 0;
    *hi = i >= s->q_len ? 0 : end < s->k_len ? end : s->k_len;
}

#endif /* DLATTN_PROBLEM_H_ */
