/*
 * Forward attention in f64 on the CPU: what the driver (f64.c) and the bodies (f64_template.h) agree on.
 *
 * Blocks, lanes and products are those of forward.h. What differs: everything is double, logits are relative to their true
 * maximum, and keys and values may have any strides, for a product takes one scalar of them at a time.
 */
#ifndef DLATTN_CPU_F64_H_
#define DLATTN_CPU_F64_H_

#include "kernels/cpu/common.h"

enum { F64_MAX_LANES = 32, F64_TILE_K = 64 };

/* In the extra logits of a tile: the boolean mask hides this key. A NaN that no program makes. */
#define F64_HIDDEN_BITS UINT64_C(0xfffd1a77e0ddba11)

struct f64_block {
    double *query;                /* [dim_qk][lanes] */
    double *output;               /* [dim_v][lanes], not yet divided by sum */
    int32_t rows;                 /* lanes in use */
    int32_t vectors;              /* that cover them */
    bool fresh;                   /* no output yet */
    int64_t first, end;           /* keys that some lane sees */
    int64_t full_first, full_end; /* keys that every lane sees */
    int64_t lo[F64_MAX_LANES], hi[F64_MAX_LANES];
    double position[F64_MAX_LANES]; /* key on the diagonal */
    double slope[F64_MAX_LANES];
    double max
        [F64_MAX_LANES]; /* logit that sum and output are relative to; -inf before the first key */
    double sum[F64_MAX_LANES];
};

/* Element e of key r at data[r * row_stride + e * element_stride], which need not be aligned. */
struct f64_operand {
    const double *data;
    int64_t row_stride, element_stride;
};

/* One tile of keys. */
struct f64_tile {
    struct f64_operand key, value;
    int64_t first_key;
    int32_t n;
    int64_t dim_qk, dim_v;
    bool
        rule; /* logits are softcap(scale * score) + extra - slope * |position - key|, not scale * score alone */
    double scale, softcap;
    bool alibi;
    const double *extra; /* [key][lane], or NULL */
    struct fetch *next;  /* of the next tile; what attend() leaves is fetched after it */
};

struct f64_body {
    int32_t vector_lanes;
    int32_t vectors; /* of a block at most */
    /* to[column][row] = from[row][column]; rows and columns are whole fours. */
    void (*transpose)(double *to, int64_t to_stride, const double *from, int64_t from_stride,
                      int64_t rows, int64_t columns);
    /* Brings max, sum and output of a block along by the keys of a tile. */
    void (*attend)(struct f64_block *b, const struct f64_tile *tile, double *scores);
    /* output[d][lane] *= factor[lane]; finite[lane] says whether all that came out is. */
    void (*scale_output)(const struct f64_block *b, const double *factor, int64_t dim_v,
                         bool *finite);
};

bool f64_plan(struct plan *plan, const struct problem *p, const struct f64_body *body);
int32_t f64_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                   const struct f64_body *body);

#endif /* DLATTN_CPU_F64_H_ */
