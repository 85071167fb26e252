/*
 * What the kernels of cuda_merge_simt get, by value. Shared by the C side, which fills it, and CUDA C++.
 */
#ifndef DLATTN_CUDA_MERGE_PARAMS_H_
#define DLATTN_CUDA_MERGE_PARAMS_H_

#include "kernels/cuda/common/params.h"

/* enum dtype of src/dtype.h */
enum { MERGE_F64, MERGE_F32, MERGE_F16, MERGE_BF16 };

enum {
    MERGE_THREADS = 128,
    MERGE_PARTS = 32,   /* that the parameters have room for */
    MERGE_SLOTS = 1024, /* of a block, one for each of its rows and each part */
    MERGE_ROWS = 64,    /* at most, of a block */
};

/* Slots, and where the result of each row goes. SUM: bytes of what sums are computed in. */
#define MERGE_SLOT_BYTES(SUM) (8 + 2 * (SUM))
#define MERGE_SHARED_BYTES(SUM) (MERGE_SLOTS * MERGE_SLOT_BYTES(SUM) + MERGE_ROWS * 16)

/* A part, or the result. */
struct merge_part {
    void *output, *lse;                      /* lse of the result: NULL if it is not wanted */
    int64_t output_stride[4], lse_stride[3]; /* of [B, H, L, D] and [B, H, L], in elements */
    int32_t output_dtype, lse_dtype;
};

struct merge_params {
    struct merge_part result, parts[MERGE_PARTS];
    struct merge_part *table;    /* all parts, in the workspace, if there are more of them */
    int64_t rows, heads, length; /* rows of all heads of the batch; one head has `length` */
    int32_t count;
    int32_t first;      /* where `parts` stands in the table that is written */
    int32_t block_rows; /* of each block but the last */
    int32_t columns;    /* of a row: elements, or vectors of 16 bytes of the narrowest type */
    struct divisor by_columns;
};

#endif /* DLATTN_CUDA_MERGE_PARAMS_H_ */
