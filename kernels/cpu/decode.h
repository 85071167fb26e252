/*
 * Decoding on the CPU: few query rows, many keys, bound by reading keys and values. What the driver (decode.c) and the
 * bodies (decode_template.h) agree on.
 *
 * A task is (batch, kv head, part of the keys) and reads its keys and values once for all query rows of the head's
 * group; row r is query row r / group of head r % group. Here the vectors run along d. The keys are cut into parts
 * by the shape alone; whoever finishes the last part of a head merges them in order.
 */
#ifndef DLATTN_CPU_DECODE_H_
#define DLATTN_CPU_DECODE_H_

#include "kernels/kernel.h"

enum { DECODE_ROWS = 16, DECODE_TILE_K = 64, ROW_GROUP = 4 };

/* Rows of one tensor: where the next one lies, or all of them when pages scatter them. */
struct decode_rows {
    const char *data;
    int64_t stride; /* bytes */
    const char *const *pages;
};

/* logit = softcap(scale * score) + extra - slope * |position - key|, in natural units. */
struct decode_rule {
    bool any; /* more than a scale */
    float scale, softcap;
    bool alibi;
};

/* One tile of keys [first_key, first_key + n) against the rows of a part. Scores lie as [row / 4][key][row % 4]. */
struct decode_tile {
    const struct decode_rows *key, *value;
    int64_t first_key;
    int32_t n;
    const float *extra; /* as scores; bias or HIDDEN; NULL */
    bool bounded;       /* some row does not see all keys of the tile */
};

/* What a worker knows of a part; output, max and sum are the part's own. */
struct decode_part {
    int32_t rows; /* padded to whole groups of 4 */
    enum dtype dtype;
    int64_t dim_qk, dim_v;
    struct decode_rule rule;
    float *query;     /* [row][dim_qk padded to 16] */
    float *scores;    /* [row / 4][DECODE_TILE_K][4] */
    float *output;    /* [row][dim_v padded to 16] */
    float *max, *sum; /* [row]; max in units of log2(e) */
    float position[DECODE_ROWS], slope[DECODE_ROWS];
    int64_t lo[DECODE_ROWS], hi[DECODE_ROWS];
};

struct decode_body {
    void (*load_query)(float *to, const char *row, int64_t dim, enum dtype dtype);
    void (*attend)(struct decode_part *part, const struct decode_tile *tile);
    void (*store)(char *to, const float *row, int64_t dim, enum dtype dtype);
};

bool decode_plan(struct plan *plan, const struct problem *p);
int32_t decode_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                      const struct decode_body *body);

#endif /* DLATTN_CPU_DECODE_H_ */
