/* Blocks of query rows, one row in each vector lane: what the drivers of forward and backward share. */
#ifndef DLATTN_CPU_BLOCK_H_
#define DLATTN_CPU_BLOCK_H_

#include "kernels/cpu/common.h"

enum { MAX_LANES = 64 };

struct block {
    float *query;                 /* [words][lanes] */
    float *output;                /* [d_v, padded][lanes], not yet divided by sum */
    int32_t rows;                 /* lanes in use */
    int32_t vectors;              /* vectors that cover them */
    bool fresh;                   /* no output yet */
    int64_t first, end;           /* keys that some lane sees */
    int64_t full_first, full_end; /* keys that every lane sees */
    int64_t lo[MAX_LANES], hi[MAX_LANES];
    float position[MAX_LANES]; /* key on the diagonal */
    float slope[MAX_LANES];
    float max[MAX_LANES]; /* the score that sum and output are relative to; -inf: none yet */
    float top[MAX_LANES], minus[MAX_LANES]; /* origin_of() it */
    bool unseen;                            /* some lane has no maximum yet */
    bool vast;                              /* some top is not 0 */
    float sum[MAX_LANES];
};

/* Rows [first_row, first_row + rows) of a run of heads, counted as i * heads + head. */
struct task {
    const struct problem *p;
    struct sequence s;
    int64_t b, first_head, heads;
    int64_t first_row, rows;
};

/* Query row i of head h. */
struct query_row {
    int64_t i, h;
};

static inline struct query_row query_row_at(const struct task *t, int64_t row) {
    return (struct query_row){row / t->heads, t->first_head + row % t->heads};
}

static inline void next_query_row(const struct task *t, struct query_row *row) {
    if (++row->h == t->first_head + t->heads) {
        row->h -= t->heads;
        row->i++;
    }
}

static inline uint64_t lanes_in_use(const struct block *b) { return UINT64_MAX >> (64 - b->rows); }

/* Where rows [first, first + count) of the task's heads begin in a tensor that is shaped as query or output. */
void point_at_rows(char **rows, const struct view *v, const struct task *t, int64_t first,
                   int32_t count);

/* A block of rows [first, first + count) of the task's heads that has seen no key yet; its query is not packed. */
void start_block(struct block *b, const struct task *t, int64_t first, int32_t count,
                 int32_t vector_lanes);

/* Segments and block mask, for the lanes of a block. */
struct lane_masks {
    bool segments, blocks;
    uint32_t segment[MAX_LANES];
    const char *key_segments; /* of key 0 */
    int64_t key_segment_stride;
    const uint8_t *states[MAX_LANES]; /* of the block mask, of key 0 */
    int64_t state_stride, block_k;
};

/* Those of the block of rows from first_row on. */
void find_masks(struct lane_masks *m, const struct task *t, const struct block *b,
                int64_t first_row);

/* Bias and mask of these rows, in rows[MAX_LANES]. */
struct extra_layout find_extra(struct extra_row *rows, const struct task *t, const struct block *b,
                               int64_t first_row);

/* What dropout draws from: words of philox for (key / 4, row, sequence and head, stream). */
struct dropout {
    uint64_t threshold; /* words below it drop their weight */
    float factor;       /* of a weight that is kept */
    uint32_t key[2], stream;
    uint32_t row[MAX_LANES], head[MAX_LANES];
};

/* That of these rows. */
void find_dropout(struct dropout *d, const struct task *t, const struct block *b, int64_t first_row,
                  float factor);

/* 1 / (1 - p); 1 without dropout. */
static inline float kept_factor(const struct problem *p) {
    return (float)(1 / (1 - p->dropout_probability));
}

#endif /* DLATTN_CPU_BLOCK_H_ */
