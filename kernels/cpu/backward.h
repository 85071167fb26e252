/*
 * Backward attention on the CPU: what the driver (backward.c) and the bodies, one for each instruction set
 * (backward_template.h), agree on.
 *
 * A block is one of forward: up to `lanes` query rows, one in each vector lane. Of a block and a tile of keys
 *
 *     weights[key][lane]   = 2^(logit - what the row's logits are relative to),  logit from sum over d of key[key][d] * query[d][lane]
 *     d_weights[key][lane] = sum over d of value[key][d] * d_output[d][lane]
 *
 * are made, weights become P and d_weights become dS, and
 *
 *     d_value[key][d]  += sum over lanes of weights[key][lane] * d_output[lane][d]
 *     d_key[key][d]    += sum over lanes of d_weights[key][lane] * query[lane][d]
 *     d_query[d][lane] += sum over keys of key[key][d] * d_weights[key][lane]
 *
 * P and dS need the sum of a row's weights and its delta. A body with `one_walk` takes them from lse and output. Others meet the
 * keys twice: first the weights of all tiles are kept, with the maxima that they are relative to, while sum and delta add up.
 *
 * Bodies pack operands as their products like them: query and d_output for sums over d and for sums over lanes, keys and values.
 * Gradients of keys and values are panels of `lanes` columns, [panel][key][column].
 */
#ifndef DLATTN_CPU_BACKWARD_H_
#define DLATTN_CPU_BACKWARD_H_

#include "kernels/cpu/forward.h"

struct backward_block {
    int64_t first_row;                 /* of the task */
    struct block rows;                 /* rows.output is d_query, [d][lane], before the scale */
    float *d_output;                   /* as rows.query, for sums over d */
    float *query_rows, *d_output_rows; /* for sums over lanes */
    float delta
        [MAX_LANES]; /* as weights add up: of weight * d_weight; then delta of docs/numerics.md */
    float inverse
        [MAX_LANES]; /* of the sum of all weights, sink included; not with one_walk, where rows.minus is -lse */
    float distances[MAX_LANES]; /* sum of dS * distance from the diagonal */
    bool finite;                /* query and d_output */
};

struct backward_tile {
    struct operand key, value;
    int64_t first_key;
    int32_t n;
    int64_t dim_qk, dim_v;
    float scale; /* of scores, or of what the rule makes of them, to units of log2(e) */
    const struct logit_rule *rule; /* of weigh(); or NULL */
    const float *keep; /* of weigh(), with `drops`: [key][lane], 0 or dropout's factor */
    float factor;      /* of dropout */
    bool hides;        /* there are extra logits */
    bool drops;
    bool d_logits;                    /* dS is wanted by others than the products */
    bool finite;                      /* the keys */
    float *weights, *d_weights, *max; /* [key][lane], max [lane] */
    float *cap_slopes;                /* [key][lane]: derivatives of the cap; NULL without one */
    float *packed;                    /* packed_bytes of the body's */
    struct fetch *next;               /* of the task's gradients */
};

/* Where the gradients of a tile go: panels, `stride` apart, and `tile` behind those of the tile before. NULL: not wanted. */
struct backward_sums {
    float *d_key, *d_value;
    int64_t stride, tile;
    bool fresh; /* nothing was added yet, and what stands there means nothing */
    bool d_query, distances;
};

struct backward_body {
    int32_t blocks; /* that go over the keys together */
    int32_t lanes;
    int32_t vector_lanes;
    int32_t tile_k;
    int32_t step;  /* what d is padded to */
    int32_t terms; /* bf16 whose sum is an element */
    int32_t packed_bytes;
    bool
        one_walk; /* sum and delta come from lse and output; weigh() leaves scores, the rest is differentiate()'s */
    bool
        finite_only; /* sums over keys and lanes do not leave out what is hidden: 0 * NaN would be NaN */

    /* The row that computes the call if a logit is beyond f32; with one_walk if an lse is large or rounded; and with finite_only if a
     * query, key or d_output is not finite. */
    bool (*stand_in_plan)(struct plan *plan, const struct problem *p, const struct caps *caps);
    int32_t (*stand_in_launch)(const struct plan *plan, const struct problem *p,
                               const struct exec *exec);
    /* A worker's set-up and clean-up. */
    void (*enter)(void);
    void (*leave)(void);
    /* rows[lane] for sums over d and over lanes; NULL: a row of zeros. False if some of it is not finite. scratch: a
     * row. */
    bool (*pack)(const struct block *b, float *transposed, float *rows_of_lanes,
                 const char *const *rows, int64_t dim, enum dtype dtype, float *scratch);
    /* n rows of keys or values as operands: in place where they can be used so, else in `to`. */
    struct operand (*load_key)(float *to, const struct rows *rows, int32_t n, int64_t dim,
                               enum dtype dtype);
    struct operand (*load_value)(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                 enum dtype dtype);
    bool (*finite)(const struct operand *rows, int32_t n, int64_t dim);
    /* As forward's. */
    bool (*load_extra)(float *extra, const struct extra_row *rows,
                       const struct extra_layout *layout, const struct lane_masks *masks,
                       const struct block *b, int64_t first_key, int32_t n, float *scratch);
    void (*draw)(float *keep, const struct dropout *dropout, const struct block *b,
                 int64_t first_key, int32_t n);
    /* Of rows of n elements that follow each other. */
    float (*dot)(const char *x, enum dtype x_dtype, const char *y, enum dtype y_dtype, int64_t n);
    /* Weights and d_weights of a tile; sum and delta of the block's rows follow. */
    void (*weigh)(struct backward_block *b, const struct backward_tile *t);
    /* P in place of the weights, as the values meet it, and dS in place of d_weights. seen[key], kept[key]: the lanes that see
     * the key, and those whose weight is not dropped. */
    void (*differentiate)(struct backward_block *b, const struct backward_tile *t, uint64_t *seen,
                          uint64_t *kept);
    /* Adds what a tile has to every gradient, d_query in the block. */
    void (*accumulate)(struct backward_block *b, const struct backward_tile *t,
                       const struct backward_sums *sums, const uint64_t *seen,
                       const uint64_t *kept);
    void (*store)(const struct block *b, const float *factor, char *const *rows, int64_t dim,
                  enum dtype dtype, float *scratch, bool *not_finite);
    /* to[0 .. n) = factor * the sum of `count` rows of panels, `stride` apart, in their order. */
    void (*store_sums)(char *to, const float *const *rows, int32_t count, int64_t stride,
                       float factor, int64_t n, enum dtype dtype);
};

bool backward_plan(struct plan *plan, const struct problem *p, const struct backward_body *body);
int32_t backward_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                        const struct backward_body *body);

#endif /* DLATTN_CPU_BACKWARD_H_ */
