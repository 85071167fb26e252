/* Plan and launch of rows whose tiles have packed rows of a kv head and whose keys may be split: packed.cuh. */
#ifndef DLATTN_CUDA_PACKED_H_
#define DLATTN_CUDA_PACKED_H_

#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/common/packed_params.h"

/* Rows of one kv head, and tiles of `rows` of them in the whole problem. */
int64_t packed_rows(const struct problem *p);
int64_t packed_tiles(const struct problem *p, int64_t rows);

/* As many splits of at least so many keys as make `blocks` blocks of the tiles. */
int64_t packed_splits(const struct problem *p, const struct tile *t, int64_t blocks,
                      int64_t least_keys);

/* fwd_plan() with splits and their workspace. `chosen`: of choose_tile(). */
bool packed_plan(struct plan *plan, const struct problem *p, const struct tile *tiles,
                 int32_t chosen, int64_t splits);

/* What kernels with tiles of `rows` get. */
void packed_fill(struct packed_params *params, const struct plan *plan, const struct problem *p,
                 const struct exec *exec, int32_t rows);

/* Launches the kernel, and the one that merges splits where there are any. `params` may be the first member of what the kernel gets. */
int32_t packed_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                      struct cuda_kernel *kernel, struct cuda_kernel *merge,
                      struct packed_params *params);

/* Whether a row of values is the beginning of a row of keys. */
bool value_is_view_of_key(const struct problem *p);

#endif /* DLATTN_CUDA_PACKED_H_ */
