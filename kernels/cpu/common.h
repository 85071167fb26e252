/* What the drivers of the CPU rows share: where rows lie, how logits are made, how a row ends. */
#ifndef DLATTN_CPU_COMMON_H_
#define DLATTN_CPU_COMMON_H_

#include "src/kernel.h"

#include <math.h>
#include <stdatomic.h>

/* In the extra logits of a tile: the boolean mask hides this key. A NaN that no program makes. */
#define HIDDEN_BITS UINT32_C(0xffd1a77e)

#define LOG2_E 1.4426950408889634

/* Rows of a tensor: row r at data + r * stride bytes if `rows` is NULL (they lie evenly), else at rows[r]. Each counts as itself times
 * scale[r], if that is not NULL. */
struct rows {
    const char *data;
    int64_t stride;
    const char *const *rows;
    const float *scale;
};

static inline const void *row_at(const struct rows *r, int64_t index) {
    return r->rows ? r->rows[index] : r->data + index * r->stride;
}

/* Copies n rows of dim elements, element by element: d of row r from from[r] + d * from_step to to[r] + d * to_step. Steps are
 * in elements. */
void copy_elements(char *const *to, int64_t to_step, const char *const *from, int64_t from_step,
                   int32_t n, int64_t dim, enum dtype dtype);

/* Rows of v whose elements follow each other: the n `rows` of dim elements themselves, or copies at `to`. */
struct rows dense_rows(const struct rows *rows, int32_t n, int64_t dim, const struct view *v,
                       enum dtype dtype, char *to);

/* The elements of v's rows, dim each, follow each other. */
static inline bool is_dense(const struct view *v, int64_t dim) {
    return dim < 2 || v->stride[3] == 1;
}

/* Of dense copies of n rows; 0 if v needs none. */
static inline int64_t copy_bytes(const struct view *v, int64_t n, int64_t dim) {
    return is_dense(v, dim) ? 0 : n * dim * dtype_bytes(v->dtype);
}

/* Asks for rows [from, to), `bytes` of each, in the second-level cache. */
static inline void prefetch_rows(const struct rows *rows, int64_t from, int64_t to, int64_t bytes) {
    for (int64_t r = from; r < to; r++)
        for (int64_t at = 0; at < bytes; at += 64)
            __builtin_prefetch((const char *)row_at(rows, r) + at, 0, 2);
}

/* Rows of keys and values, or of gradients, to be asked for a few at a time beside other work: all at once they would be waited
 * for. */
struct fetch {
    struct rows keys, values;
    int64_t key_bytes, value_bytes; /* of a row */
    int64_t row, end;               /* what is left */
    int64_t pace;                   /* rows beside each tile of a product */
};

/* Whether what is written at the end, rows as wide as a query's, is worth asking for beforehand: more than a core has at hand. */
static inline bool outgrows_caches(const struct problem *p, const struct view *v, int64_t dim) {
    return p->batch * p->heads_q * p->len_q * dim * dtype_bytes(v->dtype) > INT64_C(2) << 20;
}

static inline void fetch_rows(struct fetch *f, int64_t rows) {
    const int64_t end = rows < f->end - f->row ? f->row + rows : f->end;
    prefetch_rows(&f->keys, f->row, end, f->key_bytes);
    prefetch_rows(&f->values, f->row, end, f->value_bytes);
    f->row = end;
}

/* logit = softcap(scale * score) + extra - slope * |position - key|; it stands in for the score. */
struct logit_rule {
    float scale, softcap;
    bool alibi;
    const float *extra;                   /* bias or HIDDEN in the order of the scores, or NULL */
    const float *query_scale, *key_scale; /* factors of each row's and each key's scores, or NULL */
};

/* Where the extra logits of a query row lie: strides in elements along the keys; absent ones are NULL. */
struct extra_row {
    const char *bias;
    const uint8_t *mask;
};
struct extra_layout {
    enum dtype bias_dtype;
    int64_t bias_stride, mask_stride;
};

/* Vectors of e4m3 come as 2^-8 of themselves. */
static inline float float8_unit(enum dtype dtype) { return dtype == DTYPE_E4M3 ? 256 : 1; }

static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* The next `bytes` of a workspace, 64-byte aligned; with *at starting from 0 this measures. */
void *carve(uintptr_t *at, int64_t bytes);

/* Query heads of a kv head; 0 if there are no heads. */
int64_t group_of(const struct problem *p);

/* Element 0 of row l of head h of batch b. */
static inline char *element_at(const struct view *v, enum dtype dtype, int64_t b, int64_t h,
                               int64_t l) {
    return (char *)v->data +
           (b * v->stride[0] + h * v->stride[1] + l * v->stride[2]) * dtype_bytes(dtype);
}

/* Bias and mask of row i of head h of batch b, from key 0 on. */
struct extra_row extra_row_at(const struct problem *p, int64_t b, int64_t h, int64_t i);

/* Keys or values [first, first + n) of a sequence; pages are looked up row by row, into pointers[n]. */
struct rows kv_rows(const struct problem *p, const struct view *v, const struct sequence *s,
                    int64_t b, int64_t h, int64_t first, int32_t n, const char **pointers);

/* A run of keys and their values. */
struct kv_tile {
    struct rows keys, values;
    int64_t first;
    int32_t n;
};

/* Up to tile_k keys of a sequence from `first` on, n = 0 at the end; pages are looked up into pointers[2 * tile_k]. */
struct kv_tile kv_tile_at(const struct problem *p, const struct sequence *s, int64_t b, int64_t h,
                          int64_t first, int64_t end, int32_t tile_k, const char **pointers);

/* What block n of so many asks for of the next tile. Rows whose elements lie apart are left to the hardware. */
struct fetch kv_tile_share(const struct problem *p, const struct kv_tile *next, int64_t n,
                           int64_t blocks);

enum { MAX_SPLITS = 64 }; /* parts of the keys of a head */

/* Of n counters of what is done. */
static inline size_t counters_bytes(int64_t n) {
    return (size_t)round_up(n * (int64_t)sizeof(_Atomic int32_t), 64);
}

/* Counts one of so many as done: true for the last, whose thread sees what those of the others wrote. */
static inline bool count_done(_Atomic int32_t *done, int64_t of) {
    return atomic_fetch_add_explicit(done, 1, memory_order_acq_rel) + 1 == of;
}

/* Runs of tile_q rows in the group of a kv head of one batch. */
int64_t runs_of(const struct problem *p, int64_t tile_q);

/* Tasks of as many rows as the table's tile says, but of no fewer than `lanes`: fewer where that would leave threads without
 * work. */
void plan_tasks(struct plan *plan, const struct problem *p, int64_t lanes);

/* A mask of any kind. */
bool has_mask(const struct problem *p);

/* The problem as it is for a kv head of a batch: the scales that its queries and keys have in common have become part of p.scale.
 * query_scale and key_scale are left where rows or keys differ in them, and value_scale in any case. `own`: where it may stand. */
const struct problem *problem_of_head(const struct problem *p, int64_t b, int64_t kv_head,
                                      struct problem *own);

/* Keys, or values, of one head differ in their scale. */
bool differs_by_page(const struct problem *p, const struct view *scale);

/* Room for the scales of n keys or values. */
int64_t page_scale_bytes(const struct problem *p, const struct view *scale, int64_t n);

/* Those of keys or values [first, first + n), in to[n]; NULL if they do not differ. */
const float *page_scales(const struct problem *p, const struct view *scale, int64_t b, int64_t h,
                         int64_t first, int32_t n, float *to);

/* True if scores need more than a positive scale before softmax: then they are made logits first. */
bool needs_rule(const struct problem *p);

/* What takes scores, or logits, to units of log2(e). */
float score_scale(const struct problem *p);

/* True if scale and softcap are normal numbers of f32, with some room. */
bool options_fit_f32(const struct problem *p);

/* Of a row whose largest known score is `max`, a score s weighs 2^(scale * (s - top) + minus). Mostly top is 0 and `minus`
 * the scaled maximum, rounded, so that one fma does it: what rounding leaves is the same for all weights of the row, and
 * divided out. It is half an ulp of the scaled maximum, though, and exponents of f32 end at 127: from VAST_LOGIT on the
 * maximum is taken out first. */
#define VAST_LOGIT 0x1p26f
struct origin {
    float top, minus;
};

static inline struct origin origin_of(float max, float scale) {
    const float bits = max * scale;
    if (max == -INFINITY) /* no key yet: scores of -inf weigh 0 */
        return (struct origin){0, 0};
    return fabsf(bits) > VAST_LOGIT ? (struct origin){max, 0} : (struct origin){0, -bits};
}

/* What sums of weights are multiplied by when the maximum goes from `before` to `after`. */
static inline float rescaling(float before, float after, float scale) {
    const struct origin from = origin_of(before, scale), to = origin_of(after, scale);
    if (before == after)
        return 1;
    if (before == -INFINITY)
        return 0;
    return exp2f((float)(((double)from.top - to.top) * scale + ((double)to.minus - from.minus)));
}

/* True for a row whose scores f32 did not hold: the largest is infinity, or none is left of keys that are all in sight, or the scale
 * that scales have made is none for f32. */
bool row_overflowed(const struct problem *p, const struct sequence *s, int64_t i, float max,
                    float sum);

/* What the weights of a row, relative to its largest score `max` and adding up to `sum`, come to with the sink: they are to be
 * multiplied by shrink / sum. */
struct row_total {
    double base; /* log2 of what `sum` is relative to */
    float shrink, sink, sum;
};
struct row_total row_total_of(const struct problem *p, int64_t h, float max, float sum);

/* Ends query row i of head h: its output is a sum of values whose weights, relative to `max`, add up to `sum`.
 * Counts the sink, writes lse, and returns the factor that the output still needs: of values that have one scale, that too. */
float end_row(const struct problem *p, const struct sequence *s, int64_t b, int64_t h, int64_t i,
              float max, float sum);

#endif /* DLATTN_CPU_COMMON_H_ */
