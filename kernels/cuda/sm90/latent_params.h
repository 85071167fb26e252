/*
 * What the kernels of cuda_fwd_latent_sm90 get, by value, and sizes of their blocks. Shared by the C side and CUDA C++.
 */
#ifndef DLATTN_SM90_LATENT_PARAMS_H_
#define DLATTN_SM90_LATENT_PARAMS_H_

#include "kernels/cuda/common/packed_params.h"
#include "src/tensor_map.h"

struct latent_params {
    struct packed_params packed; /* alone what the merge reads */
    struct cuda_tensor_map
        key_map; /* [D, Lk, H_kv, B] or [D, page_size, H_kv, pages], box {64, box_keys, 1, 1} */
    int32_t box_keys, boxes; /* keys that one copy brings, and how many fill a tile */
};

/* Head dims are filled up to these with zeros. */
enum { LATENT_D = 576, LATENT_DV = 512 };
/* Packed rows of a block, keys of a tile. */
enum { LATENT_ROWS = 64, LATENT_KEYS = 64 };
enum { LATENT_THREADS = 384 };
/* 64 rows of 64 columns. */
enum { LATENT_COLUMN_BYTES = 64 * 128 };
/* Queries but for their last columns, which are in registers; weights that warpgroups give each other; two tiles of keys; sums of rows of both
 * warpgroups, and what they are relative to; mbarriers; and 1024 to align. */
enum {
    LATENT_SHARED_BYTES = (LATENT_DV / 64 + 2 + 2 * LATENT_D / 64) * LATENT_COLUMN_BYTES +
                          3 * LATENT_ROWS * 4 + 160 + 1024
};
enum { LATENT_MERGE_WARPS = 8 };
enum { LATENT_MERGE_BYTES = LATENT_MERGE_WARPS * (LATENT_DV / 128 * 32 * 16 + 8) };

#endif /* DLATTN_SM90_LATENT_PARAMS_H_ */
