/*
 * Sizes of the blocks of cuda_bwd_sm80, for the kernels and for their launches.
 */
#ifndef DLATTN_CUDA_BWD_SIZES_H_
#define DLATTN_CUDA_BWD_SIZES_H_

/* Keys, values, three stages of queries, two of d_output, three of statistics, and two of weights that warps share. */
#define KEYS_SHARED_BYTES(D, WARPS, MT, BM)                                                        \
    ((WARPS) * (MT) * 32 * (D) + 10 * (BM) * (D) + 36 * (BM) + (WARPS) * (MT) * (BM) * 32)
/* Queries, d_output, and two stages of keys and values. */
#define ROWS_SHARED_BYTES(D, WARPS, MT, BN) ((WARPS) * (MT) * 64 * (D) + 8 * (BN) * (D))

enum { STATS_THREADS = 128, STATS_KEYS = 32 };
#define STATS_SHARED_BYTES(D) ((BWD_STATS_ROWS + STATS_KEYS) * (D) * 2)

enum { BIAS_THREADS = 128, BIAS_ROWS = 64, BIAS_KEYS = 32 };
#define BIAS_SHARED_BYTES(D) (2 * (BIAS_ROWS + BIAS_KEYS) * (D) * 2)

#endif /* DLATTN_CUDA_BWD_SIZES_H_ */
