/*
 * What a backward kernel gets, by value: the forward's parameters, and what only gradients ask. Shared by the C side, which fills
 * it, and CUDA C++.
 */
#ifndef DLATTN_CUDA_BWD_PARAMS_H_
#define DLATTN_CUDA_BWD_PARAMS_H_

#include "kernels/cuda/common/params.h"

/* bwd_params.flags */
enum {
    BWD_ALIGNED_D_OUTPUT = 1, /* of the element type, and aligned as FWD_ALIGNED_QUERY says */
    BWD_D_OUTPUT_F32 = 2,
    BWD_D_LSE_F32 = 4,
    BWD_D_QUERY_F32 = 8,
    BWD_D_KEY_F32 = 16,
    BWD_D_VALUE_F32 = 32,
    BWD_D_BIAS_F32 = 64,
    BWD_ALIGNED_D_QUERY = 128, /* as FWD_ALIGNED_QUERY, for its own type */
    BWD_ALIGNED_D_KEY = 256,
    BWD_ALIGNED_D_VALUE = 512,
    BWD_LOGITS = 1024, /* statistics are relative to logits, not to products of query and key */
    BWD_ROWS_BESIDE_KEYS = 2048, /* struct bwd_row, start_early */
};

/* Statistics of rows lie in groups of this many: each sequence begins with one. */
enum { BWD_STATS_ROWS = 64 };

/* Blocks that add up sinks and slopes: threads, and room for a number of each warp. */
enum { SUM_THREADS = 256, SUM_SHARED_BYTES = SUM_THREADS / 32 * 8 };

struct bwd_params {
    struct fwd_params f;
    struct fwd_view d_output, d_lse, d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks;
    struct pair_params pair;
    /* [3][heads_q][stats_rows]: of each row what scores are relative to, the exponent of 2 of the sum of its weights relative to that
     * (infinity: it takes no part), and delta. f64 and its exponents are of e. */
    void *stats;
    int64_t stats_rows;
    void *slope_sums; /* [batch][heads_q][row_blocks] */
    int32_t heads_kv;
    int32_t key_blocks;
    int32_t flags;
};

#endif /* DLATTN_CUDA_BWD_PARAMS_H_ */
