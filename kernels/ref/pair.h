/*
 * One query row and one key, as docs/numerics.md has them, in double: what the reference rows of forward and backward are made of.
 */
#ifndef DLATTN_REF_PAIR_H_
#define DLATTN_REF_PAIR_H_

#include "src/element.h"
#include "src/kernel.h"
#include "src/philox.h"

/* Query row i of head h of batch b. */
struct query_row {
    const struct problem *p;
    struct sequence s;
    int64_t b, h, i;
};

/* First element of row l of head h of batch b. */
static inline int64_t row_of(const struct view *v, int64_t b, int64_t h, int64_t l) {
    return b * v->stride[0] + h * v->stride[1] + l * v->stride[2];
}

static inline double element(const struct view *v, int64_t first, int64_t d) {
    return load_element(v->data, v->dtype, first + d * v->stride[3]);
}

/* What a row is read in parts of. */
enum { PART = 64 };

/* The n elements from `first` on, as doubles, at most PART: where they lie, if that is what lies there, as in most calls, which are of
 * tests that ask for the truth; else in `room`. */
static inline const double *part_of(const struct view *v, int64_t first, int64_t n, double *room) {
    const char *const at = (const char *)v->data + first * dtype_bytes(v->dtype);
    if (v->dtype == DTYPE_F64 && v->stride[3] == 1 && (uintptr_t)at % sizeof(double) == 0)
        return (const double *)(const void *)at;
    switch (v->dtype) {
#define LOAD(constant, ...)                                                                        \
    case DTYPE_##constant:                                                                         \
        for (int64_t d = 0; d < n; d++)                                                            \
            room[d] = load_element(v->data, DTYPE_##constant, first + d * v->stride[3]);           \
        break;
        DTYPE_LIST(LOAD)
#undef LOAD
    case DTYPE_COUNT: /* of no tensor; clang-tidy does not know */
        memset(room, 0, (size_t)n * sizeof *room);
        break;
    }
    return room;
}

static inline int64_t part_at(int64_t d, int64_t n) { return n - d < PART ? n - d : PART; }

/* The elements of a row, times `factor`, added to `sums`. */
static inline void add_row(double *restrict sums, double factor, const struct view *v,
                           int64_t first, int64_t n) {
    double room[PART];
    for (int64_t d = 0; d < n; d += PART) {
        const double *const part = part_of(v, first + d * v->stride[3], part_at(d, n), room);
        for (int64_t i = 0; i < part_at(d, n); i++)
            sums[d + i] += factor * part[i];
    }
}

/* Four sums, so that an addition need not wait for the one before. */
static inline double dot(const struct view *a, int64_t first_a, const struct view *b,
                         int64_t first_b, int64_t n) {
    double sums[4] = {0}, room_a[PART], room_b[PART];
    for (int64_t d = 0; d < n; d += PART) {
        const int64_t count = part_at(d, n), fours = count / 4 * 4;
        const double *const x = part_of(a, first_a + d * a->stride[3], count, room_a),
                            *const y = part_of(b, first_b + d * b->stride[3], count, room_b);
        for (int64_t i = 0; i < fours; i += 4) {
            for (int64_t lane = 0; lane < 4; lane++)
                sums[lane] += x[i + lane] * y[i + lane];
        }
        for (int64_t i = fours; i < count; i++)
            sums[i - fours] += x[i] * y[i];
    }
    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

static inline int64_t kv_head(const struct problem *p, int64_t h) {
    return h / (p->heads_q / p->heads_kv);
}

/* First element of row i in a tensor that is shaped as query or output. */
static inline int64_t query_at(const struct query_row *r, const struct view *v) {
    return row_of(v, r->b, r->h, r->s.q_start + r->i);
}

/* First element of key or value j, through the block table if there is one. */
static inline int64_t key_at(const struct query_row *r, const struct view *v, int64_t j) {
    const struct problem *p = r->p;
    const int64_t g = kv_head(p, r->h);
    if (!(p->features & DLATTN_FEATURE_PAGED))
        return row_of(v, r->b, g, r->s.k_start + j);
    return row_of(v, problem_page(p, r->b, j), g, j % p->page_size);
}

static inline bool masked(const struct query_row *r, int64_t j) {
    const struct view *mask = &r->p->mask;
    return mask->data &&
           !((const uint8_t *)mask->data)[row_of(mask, r->b, r->h, r->i) + j * mask->stride[3]];
}

/* Whether the masks leave key j to the row; the windows are visible_keys(). */
static inline bool unmasked(const struct query_row *r, int64_t j) {
    const struct problem *p = r->p;
    const struct view *q = &p->query_segments, *k = &p->key_segments, *blocks = &p->block_mask;
    if (q->data) {
        int32_t of_row, of_key;
        memcpy(&of_row, (const char *)q->data + 4 * row_of(q, r->b, 0, r->s.q_start + r->i), 4);
        memcpy(&of_key, (const char *)k->data + 4 * row_of(k, r->b, 0, r->s.k_start + j), 4);
        if (of_row != of_key)
            return false;
    }
    if (blocks->data) {
        const uint8_t state =
            ((const uint8_t *)blocks->data)[row_of(blocks, r->b, r->h, r->i / p->block_q) +
                                            j / p->block_k * blocks->stride[3]];
        if (state != 1)
            return state != 0;
    }
    return !masked(r, j);
}

static inline double key_scale_at(const struct query_row *r, const struct view *scale, int64_t j) {
    const bool paged = r->p->features & DLATTN_FEATURE_PAGED && scale->data;
    return scale_at(scale, paged ? problem_page(r->p, r->b, j) : r->b, kv_head(r->p, r->h));
}

static inline double distance(const struct query_row *r, int64_t j) {
    return fabs((double)(r->i + r->s.diagonal - j));
}

static inline double slope_of(const struct query_row *r) {
    const struct view *slopes = &r->p->alibi_slopes;
    return slopes->data ? load_element(slopes->data, DTYPE_F32,
                                       r->b * slopes->stride[0] + r->h * slopes->stride[1])
                        : 0;
}

/* The capped logit of query and key alone, and in *slope the derivative of the cap. */
static inline double capped_score(const struct query_row *r, int64_t j, double *slope) {
    const struct problem *p = r->p;
    const double product =
        dot(&p->query, query_at(r, &p->query), &p->key, key_at(r, &p->key, j), p->dim_qk);
    const double x = p->scale * product * scale_at(&p->query_scale, r->b, r->h) *
                     key_scale_at(r, &p->key_scale, j);
    *slope = 1;
    if (p->softcap <= 0)
        return x;
    const double t = tanh(x / p->softcap);
    *slope = 1 - t * t;
    return p->softcap * t;
}

/* s_ij; -infinity where the key is hidden. */
static inline double logit(const struct query_row *r, int64_t j, double *slope) {
    const struct problem *p = r->p;
    *slope = 0;
    if (!unmasked(r, j))
        return -INFINITY;
    double x = capped_score(r, j, slope);
    if (p->bias.data)
        x += element(&p->bias, row_of(&p->bias, r->b, r->h, r->i), j);
    if (p->alibi_slopes.data)
        x -= slope_of(r) * distance(r, j);
    return x;
}

/* The sink's logit, -infinity without one. */
static inline double sink_of(const struct query_row *r) {
    const struct view *sinks = &r->p->sinks;
    return sinks->data ? load_element(sinks->data, DTYPE_F32, r->h * sinks->stride[1]) : -INFINITY;
}

/* What dropout makes of a weight: 0, or 1 / (1 - probability). */
static inline double kept(const struct query_row *r, int64_t j) {
    const struct problem *p = r->p;
    if (p->dropout_probability == 0)
        return 1;
    uint32_t x[4] = {(uint32_t)(j / 4), (uint32_t)r->i, (uint32_t)(r->b * p->heads_q + r->h),
                     (uint32_t)p->dropout_offset};
    philox(x, (uint32_t)p->dropout_seed,
           (uint32_t)(p->dropout_seed >> 32) ^ (uint32_t)(p->dropout_offset >> 32));
    const double threshold = p->dropout_probability * 0x1p32;
    return (double)x[j % 4] < threshold ? 0 : 1 / (1 - p->dropout_probability);
}

#endif /* DLATTN_REF_PAIR_H_ */
