/*
 * What the host hands to a cuda_fwd_sm90 kernel, by value: C11 and CUDA C++ read the same struct.
 */
#ifndef DLATTN_SM90_PARAMS_H_
#define DLATTN_SM90_PARAMS_H_

#include "src/tensor_map.h"

/* Strides in elements: batch, head, row. */
struct sm90_strides {
    int64_t batch, head, row;
};

/* A divisor d >= 1 for divide(): multiplier 0 for d = 1, else ceil(2^(32 + shift) / d). */
struct sm90_divisor {
    uint32_t multiplier, shift;
};

struct sm90_params {
    struct cuda_tensor_map
        query_map; /* [D, pack, Lq, H / pack, B], box {64, pack, 64 / pack, 1, 1} */
    struct cuda_tensor_map key_map;   /* [D, Lk, H_kv, B], box {64, tile_k, 1, 1} */
    struct cuda_tensor_map value_map; /* [D_v, Lk, H_kv, B], box {64, tile_k, 1, 1} */
    struct cuda_tensor_map
        output_map; /* [D_v, pack, Lq, H / pack, B], a box of 16 rows of 64 elements */

    void *output;
    void *lse;                                  /* NULL: not wanted */
    const int32_t *query_lengths, *key_lengths; /* NULL: len_q, len_k */
    struct sm90_strides output_strides, lse_strides;

    /* Read only where a row must be computed again, see exact_row(). */
    const void *query, *key, *value;
    struct sm90_strides query_strides, key_strides, value_strides;

    int32_t len_q, len_k;
    int32_t dim_qk, dim_v;
    int32_t window_left, window_right; /* SM90_UNBOUNDED, or >= 0 */
    int64_t query_lengths_stride, key_lengths_stride;
    int32_t bottom_right;
    int32_t lse_is_element; /* LSE has the element type, not f32 */
    float empty_lse;        /* of a row that sees no key */

    float scale;      /* factor of q.k */
    float scale_log2; /* from a score to the exponent of 2: scale * log2(e), with softcap log2(e) */
    float softcap;    /* 0 = none */

    /* The tiles: `pack` query heads of one key head share a tile, row r of it being query row r >> pack_log2 of
     * head r & (pack - 1). */
    int32_t pack_log2;
    int32_t heads;        /* H / pack */
    int32_t heads_per_kv; /* heads / H_kv */
    int32_t tiles_per_head;
    int32_t heads_total;     /* B * heads */
    int32_t tiles;           /* tiles_per_head * heads_total */
    int32_t heads_per_group; /* heads whose tiles are interleaved, see tile_at() */
    int32_t groups;
    struct sm90_divisor by_tiles_per_head;
    struct sm90_divisor by_group_tiles; /* heads_per_group * tiles_per_head */
    struct sm90_divisor by_group_heads, by_last_group_heads, by_heads, by_heads_per_kv;
};

#define SM90_UNBOUNDED (1 << 30)
#define SM90_MAX_LENGTH                                                                            \
    (1 << 28) /* of len_q * pack and len_k: sums of positions and bounds stay in int32 */

#endif /* DLATTN_SM90_PARAMS_H_ */
