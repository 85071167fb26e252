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

enum { MAX_ROWS = 16, ROW_GROUP = 4, DECODE_TILE_K = 64 };

/* Of `rows` in a part. */
static inline int64_t score_index(int64_t row, int64_t key, int32_t rows) {
    return rows == 1
               ? key
               : row / ROW_GROUP * (DECODE_TILE_K * ROW_GROUP) + key * ROW_GROUP + row % ROW_GROUP;
}

/* Of a row of the query or of the output, whose rest is 0. */
static inline int64_t padded_dim(int64_t dim) { return round_up(dim, 64); }

/* What softmax has of ROW_GROUP rows, or of one, for each lane of a vector: lane l is row l % ROW_GROUP. */
struct row_lanes {
    float max[16], top[16], minus[16]; /* part->max and its origin_of() */
    float sum[16];                     /* of the lane's own weights */
};

/* The rows of one task and what they have gathered from its keys. */
struct part {
    enum dtype key_dtype, value_dtype;
    bool query_is_bf16; /* each of its elements is one */
    int32_t rows;       /* 1 or a multiple of ROW_GROUP */
    int64_t dim_qk, dim_v;
    float *query;     /* [row][padded_dim(dim_qk)], in the order and times the unit of keys */
    float *scores;    /* MAX_ROWS * DECODE_TILE_K */
    float *output;    /* [row][padded_dim(dim_v)], not yet divided by sum, likewise of values */
    void *own;        /* the body's, body_bytes() */
    float *max, *sum; /* [row]; max is the score that sum and output are relative to */
    struct row_lanes *lanes;            /* [row / ROW_GROUP] */
    int64_t lo[MAX_ROWS], hi[MAX_ROWS]; /* keys that a row sees */
    float position[MAX_ROWS], slope[MAX_ROWS];
};

/* Cache lines of a tile's keys or values to be asked for beside other work, in the first-level cache or, with to_l2, the second:
 * so many groups of `lines` that lie `step` bytes apart. A group is a row, or, of rows that lie side by side, a line of each of so many
 * equal shares of the tile, for the hardware reads ahead within a page by itself, and so in several at once. */
struct fetch_groups {
    uintptr_t at;            /* the next group, an address or what would come after the last one */
    int64_t stride;          /* so many bytes on lies the one after it */
    const char *const *rows; /* or NULL: where groups are instead */
    int64_t step;
    int32_t lines, groups; /* two or more; how many are left */
    bool to_l2;
};

/* This often stands between so few other instructions that two lines by themselves are worth it. */
static inline void fetch_next(struct fetch_groups *f) {
    if (f->groups == 0)
        return;
    const char *const line = f->rows ? *f->rows++ : (const char *)f->at;
    f->at += (uintptr_t)f->stride;
    f->groups--;
    if (f->to_l2) {
        __builtin_prefetch(line, 0, 2);
        __builtin_prefetch(line + f->step, 0, 2);
#pragma clang loop unroll(disable)
        for (int32_t i = 2; i < f->lines; i++)
            __builtin_prefetch(line + i * f->step, 0, 2);
    } else {
        __builtin_prefetch(line, 0, 3);
        __builtin_prefetch(line + f->step, 0, 3);
#pragma clang loop unroll(disable)
        for (int32_t i = 2; i < f->lines; i++)
            __builtin_prefetch(line + i * f->step, 0, 3);
    }
}

/* Keys [first_key, first_key + n) of it, n <= DECODE_TILE_K. */
struct part_tile {
    struct rows key, value;
    int64_t first_key;
    int32_t n;
    struct fetch_groups values; /* of this tile, while its keys are scored, or of the next one */
    struct fetch_groups keys;   /* of the next one, while values are summed */
    float scale; /* of scores, or of what the rule makes of them, to units of log2(e) */
    const struct logit_rule *rule; /* or NULL */
    bool bounded;                  /* some row does not see every key */
};

struct decode_body {
    int32_t lanes;       /* of a vector */
    int32_t least_rows;  /* that a part has: 1 or ROW_GROUP */
    int32_t output_rows; /* room for the output of a part is a multiple of so many rows */
    bool fetches_tiles;  /* of keys and values, one ahead, into the second-level cache */
    size_t (*body_bytes)(const struct problem *p); /* of part->own, or NULL: none */
    void (*enter)(void); /* on each thread before its first part, or NULL */
    void (*leave)(void);
    void (*start)(const struct part *part); /* once its query is there, or NULL */
    /* A row of the query to f32 and one of the output back, in the order in which attend() takes elements of keys and
     * values, whose dtype is `other`. */
    void (*widen)(float *to, const char *from, int64_t n, enum dtype dtype, enum dtype other);
    void (*narrow)(char *to, const float *from, int64_t n, enum dtype dtype, enum dtype other);
    /* to[j] = extra logit of key first_key + j, n <= DECODE_TILE_K of them. */
    void (*load_extra_row)(float *to, const struct extra_row *row,
                           const struct extra_layout *layout, int64_t first_key, int32_t n);
    void (*attend)(const struct part *part, struct part_tile *tile);
};

bool decode_plan(struct plan *plan, const struct problem *p, const struct caps *caps,
                 const struct decode_body *body);
int32_t decode_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                      const struct decode_body *body);

#endif /* DLATTN_CPU_DECODE_H_ */
