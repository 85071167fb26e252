/*
 * One attention problem, checked and normalised: all that a kernel needs to know, and nothing of
 * DLPack. Built by problem.c from what the caller handed over; every rule of the ABI holds for it.
 */
#ifndef DLATTN_PROBLEM_H_
#define DLATTN_PROBLEM_H_

#include "abi/dlattn.h"

#include <stdbool.h>
#include <stdint.h>

enum dtype { DTYPE_F64, DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_COUNT };

#define DTYPE_BIT(d) (1u << (d))

static inline int64_t dtype_bytes(enum dtype d) {
    return d == DTYPE_F64 ? 8 : d == DTYPE_F32 ? 4 : 2;
}

const char *dtype_name(enum dtype d);

enum backend { BACKEND_CPU, BACKEND_CUDA };

/* No bound on that side of the window: larger than any length, small enough that sums of a few do
 * not overflow. */
#define UNBOUNDED (INT64_C(1) << 60)

/* A tensor as [B, H, L, D]. `data` has byte_offset added; strides are in elements; broadcast axes
 * have stride 0. Packed (varlen) tensors have a batch stride of 0 and start at row cu_seqlens[b]; a
 * paged key or value has the stride of a page in stride[0]. bias and mask are [B, H, Lq, Lk], lse
 * is [B, H, Lq], alibi_slopes [B, H], sinks [-, H], integer tensors [B] or [B, n] in stride[0] and
 * stride[1]. Absent: data and strides zero. */
struct view {
    void *data;
    int64_t stride[4];
};

struct problem {
    enum backend backend;
    int32_t device_id;
    enum dtype dtype; /* of query, key, value and output */
    enum dtype lse_dtype;
    enum dtype bias_dtype;
    uint64_t features; /* DLATTN_FEATURE_* that this problem asks */
    uint32_t present;  /* bit i: slot i of dlattn_tensors is given */
    bool contiguous;   /* query, key, value, output and lse are compact row-major */
    bool empty_lse_inf;
    bool bottom_right;
    bool planning; /* built without data: pointers are NULL and say nothing */

    int64_t batch;
    int64_t heads_q;
    int64_t heads_kv; /* divides heads_q; 1 for stride-0 heads */
    int64_t len_q;    /* of the longest sequence */
    int64_t len_k;    /* most keys that one sequence can have */
    int64_t dim_qk;
    int64_t dim_v;
    int64_t total_q; /* rows of a packed query, else 0 */
    int64_t total_k;
    int64_t page_size; /* keys of a page, 0 = not paged */
    int64_t pages;
    int64_t max_pages; /* columns of block_table; on a GPU 0 if there are no pages */

    double scale;
    double softcap;       /* 0 = none */
    int64_t window_left;  /* >= 0 or UNBOUNDED */
    int64_t window_right; /* causal folded in: 0 */
    int32_t threads;

    struct view query, key, value, output, lse;
    struct view bias, mask, alibi_slopes, sinks;
    struct view query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, block_table;
    const char *kernel; /* the row the caller insists on, or NULL */
};

/* Checks and normalises. `with_data` = false reads no data pointer (query and plan creation).
 * Returns a status; the message names the tensor, the axis and both values. */
int32_t problem_build(struct problem *p, const dlattn_forward_desc *desc,
                      const dlattn_tensors *tensors, bool with_data);

/* Host integer tensors (lengths, cu_seqlens, block_table) against the extents: for CPU problems,
 * before anything is written. */
int32_t problem_check_values(const struct problem *p);

/* No output at all: legal, and no kernel is asked about it. */
static inline bool problem_is_empty(const struct problem *p) {
    return p->batch == 0 || p->heads_q == 0 || p->len_q == 0;
}

/* Whether a plan made for `planned` can run `p`: all is the same but data pointers and their alignment. The message names
 * the first tensor or field that differs. */
int32_t problem_check_same(const struct problem *planned, const struct problem *p);

/* One sequence of the batch. Query row i meets key j = i + diagonal. */
struct sequence {
    int64_t q_start, k_start; /* first row in the packed tensors, else 0 */
    int64_t q_rows; /* rows of query and output that this sequence owns; all of them are written */
    int64_t q_len, k_len; /* rows and keys that take part */
    int64_t diagonal;
};

/* For CPU problems: reads the length tensors, which must lie in host memory. */
struct sequence problem_sequence(const struct problem *p, int64_t b);

/* For CPU problems with a block table: the page of key j of batch b. Always a page that exists, whatever the table holds: a tile
 * of keys may reach beyond those that were checked. */
int64_t problem_page(const struct problem *p, int64_t b, int64_t j);

/* Keys [lo, hi) that the windows leave to query row i; empty if lo >= hi. */
static inline void visible_keys(const struct problem *p, const struct sequence *s, int64_t i,
                                int64_t *lo, int64_t *hi) {
    int64_t first = i + s->diagonal - p->window_left, end = i + s->diagonal + p->window_right + 1;
    *lo = first > 0 ? first : 0;
    *hi = i >= s->q_len ? 0 : end < s->k_len ? end : s->k_len;
}

#endif /* DLATTN_PROBLEM_H_ */
