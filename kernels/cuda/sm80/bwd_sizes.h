/*
 * Sizes of the blocks of cuda_bwd_sm80, for the kernels and for their launches.
 */
#ifndef DLATTN_CUDA_BWD_SIZES_H_
#define DLATTN_CUDA_BWD_SIZES_H_

#include "kernels/cuda/common/bwd_params.h"

/* Keys, values, three stages of queries, two of d_output, three of statistics, and two of weights that warps share. */
#define KEYS_SHARED_BYTES(D, WARPS, MT, BM)                                                        \
    ((WARPS) * (MT) * 32 * (D) + 10 * (BM) * (D) + 36 * (BM) + (WARPS) * (MT) * (BM) * 32)
/* With sums of queries: one more stage of statistics, two of dS, and factors of columns; without LAG one less of queries, statistics
 * and weights. */
#define SUMS_SHARED_BYTES(D, WARPS, MT, BM, LAG)                                                   \
    (KEYS_SHARED_BYTES(D, WARPS, MT, BM) + 12 * (BM) + (WARPS) * (MT) * (BM) * 32 + 4 * (D) -      \
     (1 - (LAG)) * ((BM) * (2 * (D) + 12) + (WARPS) * (MT) * (BM) * 16))
/* Queries, d_output, and two stages of keys and values. */
#define ROWS_SHARED_BYTES(D, WARPS, MT, BN) ((WARPS) * (MT) * 64 * (D) + 8 * (BN) * (D))

enum { STATS_THREADS = 128, STATS_KEYS = 32 };
#define STATS_SHARED_BYTES(D) ((BWD_STATS_ROWS + STATS_KEYS) * (D) * 2)

/* Sums of queries are in tiles of so many rows and columns; of each kv head there are facts, of so many keys at a time. */
enum { SUM_ROWS = 16, SUM_COLUMNS = 32, SUM_FACTS = 288, SUM_KEYS = 64, SUM_PLANES = 5 };
enum {
    FINISH_THREADS = BWD_STATS_ROWS / SUM_ROWS * 32,
    FINISH_SHARED_BYTES = FINISH_THREADS * SUM_COLUMNS
};

enum { BIAS_THREADS = 128, BIAS_ROWS = 64, BIAS_KEYS = 32 };
#define BIAS_SHARED_BYTES(D) (2 * (BIAS_ROWS + BIAS_KEYS) * (D) * 2)

#endif /* DLATTN_CUDA_BWD_SIZES_H_ */
