/* From a problem to the parameters of a kernel. */
#ifndef DLATTN_CUDA_FILL_H_
#define DLATTN_CUDA_FILL_H_

#include "kernels/cuda/common/bwd_params.h"
#include "src/kernel.h"

/* True if lengths and counts fit the kernels' 32-bit indices, and blocks of the plan's tile_q rows a grid; else plan->why. */
bool fwd_fits(struct plan *plan, const struct problem *p);

/* Parameters for blocks of `tile_q` rows; *blocks is how many there are. */
void fwd_fill(struct fwd_params *params, const struct problem *p, int32_t tile_q, int64_t *blocks);

/* The same for gradients: fwd_fits() with the window's arithmetic on an offset diagonal, and fwd_fill() with all but what the
 * kernels split by themselves: key_blocks, stats, slope_sums. */
bool bwd_fits(struct plan *plan, const struct problem *p);
void bwd_fill(struct bwd_params *params, const struct problem *p, int32_t tile_q, int64_t *blocks);

/* Rows that statistics of one head have room for. */
int64_t bwd_stats_rows(const struct problem *p);

/* How many blocks of so much shared memory a multiprocessor holds. */
int64_t fwd_blocks(const struct caps *caps, int32_t shared_memory_bytes);

#endif /* DLATTN_CUDA_FILL_H_ */
