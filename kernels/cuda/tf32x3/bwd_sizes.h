/*
 * Sizes of the blocks of cuda_bwd_tf32x3, for the kernels and for their launches.
 */
#ifndef DLATTN_CUDA_TF32X3_BWD_SIZES_H_
#define DLATTN_CUDA_TF32X3_BWD_SIZES_H_

#include "kernels/cuda/common/bwd_params.h"

/* Statistics of a row: those of bwd_params, and the exponent of its sums. */
enum { TF32X3_BWD_PLANES = 4 };

/* Keys and values, queries and d_output of a step, weights and gradients of its pairs, two stages of statistics. */
#define TF32X3_BWD_SHARED_BYTES(D, KEYS, ROWS)                                                     \
    ((2 * ((KEYS) + (ROWS)) * (D) + 2 * (KEYS) * (ROWS) + 2 * TF32X3_BWD_PLANES * (ROWS)) * 4)

/* Facts of a kv head, and keys of a block that finds them. */
enum { SCAN_THREADS = 128, SCAN_KEYS = 64, SCAN_FACTS = 4 };

/* Sums of queries are in tiles of so many rows and columns. */
enum { SUM_ROWS = 32, SUM_COLUMNS = 32, FINISH_THREADS = 128 };

#endif /* DLATTN_CUDA_TF32X3_BWD_SIZES_H_ */
