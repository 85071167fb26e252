/*
 * Decoding on the CPU: few query rows, many keys, bound by reading keys and values. What the driver (decode.c) and the
 * bodies (decode_template.h) agree on.
 *
 * A task is (batch, kv head, part of the keys) and reads its keys and values once for all query rows of the head's
 * group: row r is query row r / group of head r % group. Here the vectors run along d. Rows are taken four at a time,
 * padded with zeros, or a single one by itself; scores lie as [row / 4][key][row % 4], so that a vector holds all four rows
 * of some keys, or as [key].
 */
#ifndef DLATTN_CPU_DECODE_H_
#define DLATTN_CPU_DECODE_H_

#include "kernels/cpu/common.h"

enum { MAX_ROWS = 16, ROW_GROUP = 4, DECODE_TILE_K = 64, MAX_SPLITS = 64 };

/* Of `rows` in a part. */
static inline int64_t score_index(int64_t row, int64_t key, int32_t rows) {
    return rows == 1
               ? key
               : row / ROW_GROUP * (DECODE_TILE_K * ROW_GROUP) + key * ROW_GROUP + row % ROW_GROUP;
}

/* The rows of one task and what they have gathered from its keys. */
struct part {
    enum dtype key_dtype, value_dtype;
    int32_t rows; /* 1 or a multiple of ROW_GROUP */
    int64_t dim_qk, dim_v;
    float *query;     /* [row][dim_qk, padded to 16], in the order and times the unit of keys */
    float *scores;    /* MAX_ROWS * DECODE_TILE_K */
    float *output;    /* [row][dim_v, padded to 16], not yet divided by sum, likewise of values */
    float *max, *sum; /* [row]; max is the score that sum and output are relative to */
    struct origin *origin;              /* [row]: origin_of() it */
    int64_t lo[MAX_ROWS], hi[MAX_ROWS]; /* keys that a row sees */
    float position[MAX_ROWS], slope[MAX_ROWS];
};

/* Rows of a tile to be fetched one by one beside other work, into the first-level cache or, with to_l2, the second. Those of a
 * whole tile that lie side by side are taken from each of 2^pages_log2 pages in turn, where the hardware reads ahead within a
 * page by itself, and so in all of them at once. */
struct row_fetch {
    struct rows rows;
    int64_t first, bytes; /* of a row */
    int32_t n, done;
    int32_t pages_log2;
    bool to_l2;
};

static inline void fetch_next(struct row_fetch *f) {
    if (f->done == f->n)
        return;
    const int32_t j = f->done++, page = j & ((1 << f->pages_log2) - 1);
    const int64_t row = f->first + page * (DECODE_TILE_K >> f->pages_log2) + (j >> f->pages_log2);
    const char *at = row_at(&f->rows, row);
    const char *const end = at + f->bytes;
    if (f->to_l2)
        for (; at < end; at += 64)
            __builtin_prefetch(at, 0, 2);
    else
        for (; at < end; at += 64)
            __builtin_prefetch(at, 0, 3);
}

/* Keys [first_key, first_key + n) of it, n <= DECODE_TILE_K. */
struct part_tile {
    struct rows key, value;
    int64_t first_key;
    int32_t n;
    struct row_fetch values; /* of this tile, while its keys are scored */
    struct row_fetch keys;   /* of the next one, while values are summed */
    float scale;             /* of scores, or of what the rule makes of them, to units of log2(e) */
    const struct logit_rule *rule; /* or NULL */
    bool bounded;                  /* some row does not see every key */
};

struct decode_body {
    /* A row of the query to f32 and one of the output back, in the order in which attend() takes elements of keys and
     * values, whose dtype is `other`. */
    void (*widen)(float *to, const char *from, int64_t n, enum dtype dtype, enum dtype other);
    void (*narrow)(char *to, const float *from, int64_t n, enum dtype dtype, enum dtype other);
    /* to[j] = extra logit of key first_key + j, n <= DECODE_TILE_K of them. */
    void (*load_extra_row)(float *to, const struct extra_row *row,
                           const struct extra_layout *layout, int64_t first_key, int32_t n);
    void (*attend)(const struct part *part, struct part_tile *tile);
};

bool decode_plan(struct plan *plan, const struct problem *p, const struct caps *caps);
int32_t decode_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                      const struct decode_body *body);

#endif /* DLATTN_CPU_DECODE_H_ */
