/*
 * What a forward kernel gets, by value. Shared by the C side, which fills it, and CUDA C++.
 */
#ifndef DLATTN_CUDA_PARAMS_H_
#define DLATTN_CUDA_PARAMS_H_

#include <stdint.h>

/* `struct view` of problem.h: strides in elements, absent: NULL. */
struct fwd_view {
    void *data;
    int64_t stride[4];
};

/* A divisor for divide(): x / d is x * multiplier >> shift for all x below 2^31. An integer division takes a hundred cycles. */
struct divisor {
    uint32_t multiplier, shift;
};

/* fwd_params.flags */
enum {
    FWD_ALIGNED_QUERY =
        1, /* base, strides and extent of the last axis are multiples of 16 bytes, its stride is 1 */
    FWD_ALIGNED_KEY = 2,
    FWD_ALIGNED_VALUE = 4,
    FWD_ALIGNED_OUTPUT = 8,
    FWD_BOTTOM_RIGHT = 16,
    FWD_EMPTY_LSE_INF = 32,
    FWD_LSE_F32 = 64,
    FWD_BIAS_F32 = 128,
    FWD_LONGEST_FIRST =
        256, /* blocks of one head from its last row to its first: causal work shrinks to the end */
    FWD_PAIRED_BIAS = 512, /* keys 2 j and 2 j + 1 of a row are neighbours, aligned as a pair */
    FWD_PAIRED_MASK = 1024,
    FWD_KEY_E5M2 = 2048, /* of the two float8; else e4m3 */
    FWD_VALUE_E5M2 = 4096,
};

/* Lengths, and with them sums of a row, a diagonal and a window, stay inside an int. */
enum { FWD_MAX_LENGTH = 1 << 28, FWD_UNBOUNDED = 1 << 29 };

struct fwd_params {
    struct fwd_view query, key, value, output, lse, bias, mask, alibi_slopes, sinks;
    struct fwd_view query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, block_table;
    int64_t total_q, total_k; /* rows of packed tensors */
    int64_t pages;
    int32_t batch, heads_q, group; /* query heads of one kv head */
    int32_t len_q, len_k;          /* most rows and keys of one sequence */
    int32_t dim_qk, dim_v;
    int32_t page_size, max_pages;
    int32_t window_left, window_right; /* FWD_UNBOUNDED: none; causal is window_right 0 */
    int32_t flags;
    int32_t row_blocks; /* blocks that share one head */
    double scale;
    double softcap;       /* 0 = none */
    float exponent_scale; /* scale * log2(e): exponents of 2 per unit of score */
    struct fwd_view query_scale, key_scale, value_scale; /* absent: 1 */
};

/* What came with ABI 1.1: options of a pair of a row and a key, for kernels that have them. */
struct pair_params {
    struct fwd_view query_segments, key_segments, block_mask;
    struct divisor block_q, block_k;
    int32_t diagonal_offset;
    int32_t dropout;       /* 1: weights are dropped */
    float keep;            /* 1 / (1 - dropout_probability) */
    uint32_t dropped_upto; /* with dropout: random words up to this one drop their weight */
    uint32_t seed[2], offset;
    double dropout_probability;
};

/* Of a forward row that has them. Kernels of tiles without EXTRAS read `fwd` alone. */
struct fwd_pair_params {
    struct fwd_params fwd;
    struct pair_params pair;
};

#endif /* DLATTN_CUDA_PARAMS_H_ */
