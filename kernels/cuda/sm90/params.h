/*
 * What the host hands to a kernel of cuda_fwd_sm90 or cuda_fwd_fp8_sm90, by value: C11 and CUDA C++ read the same struct.
 */
#ifndef DLATTN_SM90_PARAMS_H_
#define DLATTN_SM90_PARAMS_H_

#include "src/tensor_map.h"

#include <stdalign.h>

/* Strides in elements: batch, head, row. */
struct sm90_strides {
    int64_t batch, head, row;
};

/* A divisor d >= 1 for divide(): multiplier 0 for d = 1, else ceil(2^(32 + shift) / d). Both are read at once. */
struct sm90_divisor {
    alignas(8) uint32_t multiplier;
    uint32_t shift;
};

/* Sequences packed one behind the other, number b from row cu_seqlens[b] on. */
struct sm90_packing {
    const int32_t *cu_seqlens; /* NULL: they are not */
    int64_t stride;
    int32_t total; /* rows */
};

/* Of float8: [B, H], stride 0 where an axis is broadcast. */
struct sm90_scale {
    const float *data; /* NULL: 1 */
    int64_t batch, head;
};

/* [B, H, Lq, Lk], stride 0 where an axis is broadcast. */
struct sm90_by_score {
    const void *data; /* NULL: none */
    int64_t batch, head, row, key;
    int32_t is_wide; /* any eight keys are neighbours, and aligned as one */
};

/* The order in which blocks claim tiles of rows, in the workspace: those with the most keys first. */
struct sm90_listed {
    int32_t sequence;
    int32_t first; /* of the sequence's tiles in the list: they stand together */
};
struct sm90_list {
    int32_t next;  /* that no block has claimed yet, counted for each head */
    int32_t tiles; /* of all sequences */
    struct sm90_listed of[1 /* tiles */];
};

/* The walk of SPLIT kernels over parts: [row tiles / team_rows, B, H_kv, parts, team_rows, heads_per_kv]. The tiles of a team read
 * the same keys at the same time. Part i of all has a tile's sums and outputs in the workspace, by strips of 16 rows. */
struct sm90_split {
    int32_t parts;                 /* of each tile */
    int32_t team_rows, team_tiles; /* tiles_per_head or 1, and that times heads_per_kv */
    int32_t key_heads, heads_kv;   /* B * H_kv, H_kv */
    struct sm90_divisor by_parts, by_team_tiles, by_key_heads, by_heads_kv;
    float *outputs; /* [part, strip, eight columns, lane] as in registers, not divided by the sum */
    float *
        sums; /* [part, strip, row]: log2 of the scale of outputs and sum, -inf if no key was seen; the sum */
};

/* The capped score x = q.k as an exponent of 2. Where x^2 is at most a limit it is x times a polynomial of x^2, from which nobody is to
 * divide on the device. */
struct sm90_cap {
    float line_limit, line[2];
    float polynomial_limit, polynomial[4];
    float twice, most; /* else most - 2 most / (2^(twice x) + 1) */
};

/* Of a part of a head's keys: the largest |key|^2, and the largest |x| of values. */
struct sm90_norms {
    float key_square, value;
};

struct sm90_params {
    /* Boxes are 128 bytes wide: 64 elements, of float8 128. */
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
    int32_t heads_per_group; /* heads whose tiles are interleaved, see place() */
    int32_t groups;
    int32_t neighbours; /* blocks that begin with tiles of one head */
    struct sm90_divisor by_neighbours;
    struct sm90_divisor by_group_tiles; /* heads_per_group * tiles_per_head */
    struct sm90_divisor by_group_heads, by_last_group_heads, by_heads, by_heads_per_kv;

    /* What PLAIN kernels do not read, but for sinks. With packed rows the maps of query and output are [D, pack, Lq, end, H / pack], with
     * packed keys those of key and value are [D, Lk, end, H_kv]: see packed_row(). */
    struct sm90_packing packed_q, packed_k;
    struct sm90_list *list; /* NULL: the walk follows from the shape alone */
    int32_t list_capacity;
    int32_t batch, tile_q;
    struct sm90_cap cap;
    /* From what options leave of a score to an exponent of 2: 1, or scale_log2 if they left it alone. */
    float exponent_scale;
    struct sm90_by_score mask;
    const int32_t *query_segments, *key_segments;
    struct sm90_strides query_segments_strides, key_segments_strides; /* head: 0 */
    uint32_t *
        seen; /* in the workspace, for mask and segments: [heads, tiles of rows, some or all, words]; NULL: there are none */
    int32_t seen_words;                  /* of 32 key tiles */
    int32_t seen_rows;                   /* tiles of rows of one head */
    int32_t seen_tiles;                  /* of the longest sequence */
    int32_t seen_by_batch, seen_by_head; /* 0: all of them see the same */
    int32_t tile_k;
    const float *sinks; /* NULL: none */
    int64_t sinks_stride;
    const float *alibi_slopes;
    int64_t alibi_batch_stride, alibi_head_stride;
    /* With pages key and value are [pages, H_kv, page_size, D], and the maps [D, page_size, H_kv, pages]. */
    const int32_t *block_table; /* NULL: no pages */
    int64_t table_batch_stride, table_page_stride;
    int32_t pages, page_size;
    int32_t box_keys,
        boxes; /* keys that one copy brings, and how many fill a tile; without pages all and 1 */
    struct sm90_divisor by_page_size;

    /* A bias, of the element type or f32: [Lk, Lq, H, B], a box of 128 bytes of keys and 64 rows, axes that are broadcast having one
     * element. Kernels that are not made for one read it element by element. */
    struct cuda_tensor_map bias_map;
    struct sm90_by_score bias;
    int32_t bias_is_f32;
    int32_t bias_box_bytes; /* a row of a box alone where all rows have the same */
    int32_t
        batch_inside; /* the walk takes each head of all batches before the next head: they have a bias in common */
    struct sm90_divisor by_batch;
    struct sm90_split split;

    /* Of float8, whose output has a dtype of its own. */
    struct sm90_scale query_scale, key_scale, value_scale;
    int32_t output_dtype; /* SM90_F32, SM90_F16 or SM90_BF16 */

    /* With ALiBi, in the workspace, see reach.cuh: of parts of the keys of each head, and of each tile of rows. NULL: rows look at all keys.
     * Last, so that what other kernels read lies where it did. */
    struct sm90_norms *norms;
    int32_t *reach;
};

enum { SM90_F32, SM90_F16, SM90_BF16 };

enum { SM90_LIST_THREADS = 1024, SM90_LIST_BYTES = 2048 };
enum { SM90_SEEN_THREADS = 256, SM90_SEEN_BYTES = 8 };
enum { SM90_REACH_PARTS = 32, SM90_REACH_THREADS = 256, SM90_REACH_BYTES = 8 };
enum { SM90_MOST_PARTS = 256 };

/* Boxes of a bias, 64 rows and 128 bytes of its keys each, that shared memory holds for each warpgroup; from 65 head dims on instead of a
 * second stage of queries. */
#define SM90_BIAS_BOXES(D) ((D) > 64 ? 2 : 4)
#define SM90_BIAS_QUERY_STAGES(D, QUERY_STAGES) ((D) > 64 ? 1 : (QUERY_STAGES))

/* See write_distances(). Wider tiles leave no room for it. */
#define SM90_DISTANCE_BYTES(D, KEYS) ((D) > 64 ? 0 : 16 * (KEYS))

/* Of float8: keys whose P V the tensor cores add up before O is settled. */
#define SM90_FLOAT8_SETTLED_KEYS(D) ((D) <= 128 ? 1024 : 2048)

#define SM90_UNBOUNDED (1 << 30)
#define SM90_MAX_LENGTH                                                                            \
    (1 << 28) /* of len_q * pack and len_k: sums of positions and bounds stay in int32 */

#endif /* DLATTN_SM90_PARAMS_H_ */
