/*
 * What kernels for packed rows of a kv head get, by value. Shared by the C side, which fills it, and CUDA C++.
 */
#ifndef DLATTN_CUDA_PACKED_PARAMS_H_
#define DLATTN_CUDA_PACKED_PARAMS_H_

#include "kernels/cuda/common/params.h"

struct packed_params {
    struct fwd_params fwd; /* row_blocks: tiles of packed rows that share one kv head */
    int32_t heads_kv;
    int32_t tile_rows;
    int32_t splits;
    int32_t columns; /* of a row of `outputs`: dim_v, rounded up to a multiple of 4 */
    int32_t diagonal_offset;
    struct divisor by_splits, by_row_blocks, by_heads_kv, by_group;
    /* In the caller's workspace, of row r in split s of tile t; unused where there is one split. */
    float *outputs; /* [t][s][r][columns], not yet divided by the sum */
    float *
        sums; /* [t][s][r][2]: log2 of the scale of output and sum, -inf if no key was seen; the sum */
    /* [t]: splits that have left their parts. The last one merges them, and leaves zeros in all three. NULL: another kernel merges. */
    int32_t *arrived;
};

#endif /* DLATTN_CUDA_PACKED_PARAMS_H_ */
