/*
 * Forward attention on the CPU: what the driver (forward.c) and the bodies, one for each instruction set
 * (forward_template.h), agree on.
 *
 * A block is up to `lanes` query rows, one in each vector lane: (query row i, head g of the kv head's group) is lane
 * i * group + g of the block's run of rows. Scores are kept transposed, [key][lane], and so is the output,
 * [d_v][lane]. Then both products have one shape,
 *
 *     scores[key][lane] = sum over d    of key[key][d]     * query[d][lane]
 *     output[d_v][lane] += sum over keys of value[key][d_v] * weight[key][lane]
 *
 * a scalar of the left operand, broadcast from memory, times vectors of the right one: keys and values are read as
 * they lie, row-major, and need no packing but for their dtype; maximum, sum and masks of softmax need no
 * operation across lanes; the query is transposed once for all keys, the output once at the end.
 *
 * Operands are arrays of 32-bit words: one f32, or two bf16 that follow each other along the summed axis.
 */
#ifndef DLATTN_CPU_FORWARD_H_
#define DLATTN_CPU_FORWARD_H_

#include "kernels/cpu/block.h"

/* One operand of a product: `words` may point into the caller's tensor and is not aligned. */
struct operand {
    const float *words;
    int64_t stride; /* words from row to row */
};

/* One tile of keys. */
struct key_tile {
    struct operand key, value;
    int64_t first_key;
    int32_t n;
    int64_t dim_qk, dim_v;
    float scale; /* of scores, or of what the rule makes of them, to units of log2(e) */
    const struct logit_rule *rule; /* or NULL */
    const float *keep;  /* [key][lane]: 0 where dropout takes the weight, else 1; or NULL */
    struct fetch *next; /* of the next tile; what attend() leaves is fetched after it */
};

struct forward_body {
    int32_t lanes;
    int32_t vector_lanes;
    int32_t tile_k;
    int32_t step_k;            /* keys whose values a product takes at once; divides tile_k */
    int32_t elements_per_word; /* 1: f32, 2: bf16 */
    int32_t terms;             /* bf16 whose sum is an element */
    int32_t score_bytes;       /* scratch of attend() */

    /* A worker's set-up and clean-up. */
    void (*enter)(void);
    void (*leave)(void);
    /* b->query = the query rows, in the order of the body's product; unused lanes of b->vectors are 0.
     * scratch: lanes * padded row. */
    void (*pack_query)(const struct block *b, const char *const *rows, int64_t dim,
                       enum dtype dtype, float *scratch);
    /* n rows of keys or values as operands: in place where they can be used so, else in `to`. */
    struct operand (*load_key)(float *to, const struct rows *rows, int32_t n, int64_t dim,
                               enum dtype dtype);
    struct operand (*load_value)(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                 enum dtype dtype);
    /* Bias and masks as extra logits, [key][lane]; false if segments or blocks hide every key from every lane. scratch: lanes *
     * (n, padded, and a vector). */
    bool (*load_extra)(float *extra, const struct extra_row *rows,
                       const struct extra_layout *layout, const struct lane_masks *masks,
                       const struct block *b, int64_t first_key, int32_t n, float *scratch);
    void (*draw)(float *keep, const struct dropout *dropout, const struct block *b,
                 int64_t first_key, int32_t n);
    /* Brings max, sum and output of a block along by the keys of a tile. */
    void (*attend)(struct block *b, const struct key_tile *tile, float *scores);
    /* rows[lane][d] = output * factor[lane], rounded to dtype; not_finite[lane] says what came out.
     * scratch: lanes * padded d_v. */
    void (*store)(const struct block *b, const float *factor, char *const *rows, int64_t dim_v,
                  enum dtype dtype, float *scratch, bool *not_finite);
};

bool forward_plan(struct plan *plan, const struct problem *p, const struct forward_body *body);
int32_t forward_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                       const struct forward_body *body);

#endif /* DLATTN_CPU_FORWARD_H_ */
