/* From a problem to a plan, and to the parameters of a kernel. */
#ifndef DLATTN_CUDA_FILL_H_
#define DLATTN_CUDA_FILL_H_

#include "kernels/cuda/common/bwd_params.h"
#include "kernels/cuda/common/tile.h"

/* True if lengths and counts fit the kernels' 32-bit indices, and plan->blocks, one for each tile_q rows of a head, a grid; else
 * plan->why. */
bool fwd_fits(struct plan *plan, const struct problem *p);

/* True if a window's arithmetic on an offset diagonal fits 32 bits; else plan->why. */
bool offset_fits(struct plan *plan, const struct problem *p);

/* True if options or the scale make more of a product of query and key than its positive multiple, or keys lie in pages: a tile with
 * `extras` is needed. */
bool fwd_needs_extras(const struct problem *p);

/* True of queries of e4m3 over keys and values of one float8, and a wider output; else plan->why, if the query is float8. */
bool fwd_takes_float8(struct plan *plan, const struct problem *p);

/* Parameters for blocks of `tile_q` rows. */
void fwd_fill(struct fwd_params *params, const struct problem *p, int32_t tile_q);

/* The options of pair_params, and whether the problem asks for what is there: these, or an offset of the diagonal. */
#define PAIR_FEATURES (DLATTN_FEATURE_DROPOUT | DLATTN_FEATURE_SEGMENTS | DLATTN_FEATURE_BLOCK_MASK)
bool fwd_needs_pairs(const struct problem *p);
void pair_fill(struct pair_params *params, const struct problem *p);

/* The plan and the launch of a row of which each tile is one kernel. `chosen`: of choose_tile(). The parameters are fwd_pair_params. */
bool fwd_plan(struct plan *plan, const struct problem *p, const struct tile *tiles, int32_t chosen);
int32_t fwd_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                   const struct tile *tiles);

struct divisor divisor_of(int64_t d);

/* The same for gradients: fwd_fits() with offset_fits(), and fwd_fill() with all but what the
 * kernels split by themselves: key_blocks, stats, slope_sums. */
bool bwd_fits(struct plan *plan, const struct problem *p);
void bwd_fill(struct bwd_params *params, const struct problem *p, int32_t tile_q);

/* Rows that statistics of one head have room for. */
int64_t bwd_stats_rows(const struct problem *p);

/* True if scores are logits: an option or the scale makes more of a product of query and key than its multiple. */
bool bwd_needs_logits(const struct problem *p);

/* The kernels of a row of gradients in which no block adds to what another adds to. Blocks of `rows` and `keys` own the plan's
 * tile_q rows and tile_k keys. */
struct bwd_row {
    struct cuda_kernel *stats, *keys, *rows, *bias, *sinks, *slopes;
    int32_t stats_rows, bias_rows, bias_keys; /* that blocks of two others own */
    /* Each waits for the kernel before it, and `rows` at its end alone, if it runs beside `keys`. */
    bool start_early;
};

/* One for each part of the bias, and for each slope, that has a gradient of its own. */
int64_t bwd_bias_blocks(const struct problem *p, const struct bwd_row *row);
int64_t bwd_slope_blocks(const struct problem *p);

bool bwd_plan(struct plan *plan, const struct problem *p, const struct bwd_row *row);
int32_t bwd_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                   const struct bwd_row *row);

#endif /* DLATTN_CUDA_FILL_H_ */
