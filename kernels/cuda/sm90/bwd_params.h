/*
 * What the host hands to the kernels of cuda_bwd_sm90, by value: C11 and CUDA C++ read the same struct. docs/cuda-backward.md draws
 * how they work together.
 */
#ifndef DLATTN_SM90_BWD_PARAMS_H_
#define DLATTN_SM90_BWD_PARAMS_H_

#include "kernels/cuda/sm90/params.h"

/* Rows of one step, and keys that one block owns. */
enum { SM90_BWD_TILE_Q = 64, SM90_BWD_TILE_K = 128 };

/* Rows, and keys, that a warp prepares or finishes at once. */
enum { SM90_BWD_ERRAND = 64 };

/* Threads of a block that computes odd heads or sinks, and its shared memory: a number for each of them. */
enum { SM90_BWD_SMALL_THREADS = 256, SM90_BWD_SMALL_BYTES = 4 * SM90_BWD_SMALL_THREADS };

/* Tiles in shared memory of Q, one of which waits for dK while the next two are on their way, and of dO. */
enum { SM90_BWD_QUERY_STAGES = 3, SM90_BWD_STAGES = 2 };

/* Of a block: K, V and K once more, the stages of Q and dO, dS twice; what rows and columns have besides; two tasks, eight for each
 * mbarrier, 1024 to align. */
#define SM90_BWD_SHARED_BYTES(D)                                                                   \
    (2 * (D) *                                                                                     \
         (3 * SM90_BWD_TILE_K + (SM90_BWD_QUERY_STAGES + SM90_BWD_STAGES) * SM90_BWD_TILE_Q) +     \
     2 * 128 * SM90_BWD_TILE_K + (SM90_BWD_QUERY_STAGES * 2 + 1) * 16 * 128 +                      \
     SM90_BWD_QUERY_STAGES * 2 * 4 * SM90_BWD_TILE_Q + 4 * (D) + 2 * 64 +                          \
     8 * (13 + 2 * SM90_BWD_QUERY_STAGES + 2 * SM90_BWD_STAGES) + 1024)

/* What each block is launched with: those that run errands have buffers of 16 KB, a number for each column and for each row of two
 * tiles in each of 12 warps. */
#define SM90_BWD_ERRAND_BYTES(D) (12 * (16384 + 4 * (D) + 2 * 4 * SM90_BWD_TILE_Q) + 1024)
#define SM90_BWD_MAIN_BYTES(D)                                                                     \
    (SM90_BWD_SHARED_BYTES(D) > SM90_BWD_ERRAND_BYTES(D) ? SM90_BWD_SHARED_BYTES(D)                \
                                                         : SM90_BWD_ERRAND_BYTES(D))

/* Wide heads: rows or keys of a tile, and rows of a block that computes dQ; registers, in all those with which a block starts, 3 x 168. */
enum { SM90_BWD_WIDE_TILE = 64, SM90_BWD_WIDE_ROWS = 128 };
enum { SM90_BWD_WIDE_PRODUCER_REGISTERS = 24, SM90_BWD_WIDE_CONSUMER_REGISTERS = 240 };

/* Tiles in shared memory of Q and of dO, and of V, as many as there is room for. */
#define SM90_BWD_WIDE_STAGES(D) ((D) > 192 ? 2 : 3)
#define SM90_BWD_WIDE_VALUE_STAGES(D) ((D) > 192 ? 1 : 2)

/* Of a block of dK and dV: K and V, the stages of Q and dO, two of weights; what rows have besides, the task, eight for each mbarrier,
 * 1024 to align. */
#define SM90_BWD_WIDE_KEYS_BYTES(D, DV)                                                            \
    (128 * ((D) + (DV)) * (1 + SM90_BWD_WIDE_STAGES(D)) + 4 * 64 * 64 +                            \
     SM90_BWD_WIDE_STAGES(D) * 8 * 64 + 64 + 16 * (1 + 2 * SM90_BWD_WIDE_STAGES(D)) + 1024)
/* Of a block of dQ: Q and dO of 128 rows, two stages of K and those of V. */
#define SM90_BWD_WIDE_ROWS_BYTES(D, DV)                                                            \
    (128 * (4 * (D) + (2 + SM90_BWD_WIDE_VALUE_STAGES(D)) * (DV)) + 64 +                           \
     16 * (5 + SM90_BWD_WIDE_VALUE_STAGES(D)) + 1024)

/* What rows have besides, for one tile of them. In f32: the factor of a row's fixed-point sums; -lse in units of q k, with softcap
 * of exponents of 2, and -inf where the row sees nothing; -delta = d_lse - <d_output, output>. Then -lse (not with softcap) and -delta
 * once more as the sum of three elements, [term][row], as S and dP begin with them: a product with ones adds them on the tensor cores.
 * A swizzle of 128 bytes is in these. */
enum { SM90_BWD_FACTOR, SM90_BWD_LSE, SM90_BWD_DELTA, SM90_BWD_STATS };
enum { SM90_BWD_TERMS = 3, SM90_BWD_TERM_BYTES = SM90_BWD_TERMS * SM90_BWD_TILE_Q * 2 };
enum { SM90_BWD_ROW_BYTES = SM90_BWD_STATS * SM90_BWD_TILE_Q * 4 + 2 * SM90_BWD_TERM_BYTES };

/* What is known of a unit: the keys and values of one head, and the rows of its query heads. Maxima are bits of floats that are not
 * negative, so that their order is that of integers. */
enum {
    SM90_BWD_ODD, /* 1: something is not finite, or beyond what the fast path takes: the head is computed by plain loops */
    SM90_BWD_VALUE,    /* the largest norm of a value, squared */
    SM90_BWD_PREPARED, /* errands that have found all this, and what rows have, and zeroed sums */
    SM90_BWD_SUMMED,   /* tiles of keys that have added to d_query */
    SM90_BWD_FINISHED, /* errands that have read these sums */
    SM90_BWD_KEYS      /* for each column, the largest |key| */
};

/* Counters of what blocks and warps have claimed. */
enum {
    SM90_BWD_NEXT_BLOCK,
    SM90_BWD_NEXT_TASK,
    SM90_BWD_NEXT_FIRST, /* errands before the first tasks */
    SM90_BWD_NEXT_ERRAND,
    SM90_BWD_COUNTERS
};
/* The same of wide heads: tasks of keys, and of rows. */
enum { SM90_BWD_NEXT_KEYS, SM90_BWD_NEXT_ROWS };

struct sm90_gradient {
    void *data; /* NULL: not wanted */
    struct sm90_strides strides;
    int32_t is_float;
};

struct sm90_bwd_params {
    /* [D, L, start + L, H, B]: see map_rows(). Boxes of 64 columns and a tile of rows or keys. */
    struct cuda_tensor_map query_map, d_output_map, key_map, value_map;

    const void *query, *key, *value, *output, *d_output;
    struct sm90_strides query_strides, key_strides, value_strides, output_strides, d_output_strides;
    const float *lse, *d_lse; /* d_lse: NULL = 0 */
    struct sm90_strides lse_strides, d_lse_strides;
    const float *sinks; /* NULL: none */
    float *d_sinks;
    int64_t sinks_stride, d_sinks_stride;
    struct sm90_gradient d_query, d_key, d_value;

    const int32_t *query_lengths, *key_lengths, *cu_seqlens_q, *cu_seqlens_k; /* NULL: none */
    int64_t query_lengths_stride, key_lengths_stride, cu_seqlens_q_stride, cu_seqlens_k_stride;
    int32_t total_q, total_k; /* rows of packed tensors */

    /* The workspace. */
    uint32_t *facts; /* [B, H_kv, SM90_BWD_KEYS + D] */
    int32_t *next;   /* [SM90_BWD_COUNTERS] */
    char *rows;      /* [H, tiles, SM90_BWD_ROW_BYTES] */
    int32_t *
        sums; /* d_query in fixed point: [slots, group, row_tiles, 64 D], in the order in which blocks hold it */
    int32_t tiles; /* of one head, all sequences: sequence b begins at first_tile() */

    /* The walk over units, each of which has the sums of slot unit % slots: what is done before the first tasks, how many later one is
     * finished than another is prepared, and how many of the blocks run errands. */
    int32_t units, slots, ahead, behind, errand_blocks;

    int32_t batch, heads_q, heads_kv, group;
    int32_t len_q, len_k, dim_qk, dim_v;
    int32_t window_left, window_right; /* SM90_UNBOUNDED, or >= 0 */
    int32_t bottom_right;
    int32_t key_tiles, row_tiles, errands; /* of the longest sequence */
    float scale, scale_log2;               /* scale * log2(e) */
    float softcap;                         /* 0 = none */
};

#endif /* DLATTN_SM90_BWD_PARAMS_H_ */
