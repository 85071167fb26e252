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

#endif /* DLATTN_CPU_BLOCK_H_ */
