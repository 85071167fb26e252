/* The compiled tiles of a row, and which of them a problem gets. */
#ifndef DLATTN_CUDA_TILE_H_
#define DLATTN_CUDA_TILE_H_

#include "src/cuda_driver.h"

/* What was compiled for one line of a tiles.inc. */
struct tile {
    int32_t dim_qk, dim_v; /* head dims are filled up to these with zeros */
    int32_t rows, keys;    /* that a block owns, or takes in one step */
    int32_t
        blocks; /* that a multiprocessor must hold at a time, or it is for want of a better one; 0: no matter */
    int32_t extras;    /* also for options that cost registers, of rows that say which; 0: none */
    bool alone;        /* for calls with no more tiles than multiprocessors, of rows that say so */
    int32_t most_keys; /* of a sequence, of rows that say so; 0: any */
    struct cuda_kernel
        *kernels; /* f16, bf16, and what else the row says; all want the same shared memory */
};

#define CUDA_KERNEL(module_, name_, threads_, bytes)                                               \
    {.module = &(module_), .name = (name_), .threads = (threads_), .shared_memory_bytes = (bytes)}

/* ROW_f16_NAME and ROW_bf16_NAME. */
#define F16_AND_BF16(module, row, name, threads, bytes)                                            \
    (struct cuda_kernel[]) {                                                                       \
        CUDA_KERNEL(module, row "_f16_" name, threads, bytes),                                     \
            CUDA_KERNEL(module, row "_bf16_" name, threads, bytes)                                 \
    }

#define LOG2_E 1.4426950408889634

#define COUNT(array) ((int32_t)(sizeof(array) / sizeof((array)[0])))

/* Whether a tile that covers the problem is the one for it, among those of the same head dims. */
typedef bool (*tile_suits)(const struct tile *t, const struct problem *p, const struct caps *caps);

/* Tiles are listed narrowest first. The first that covers the problem's head dims, has the extras that are asked for and fits the
 * GPU's shared memory says which head dims it will be. Of the tiles of these the first that suits, with as many blocks on a
 * multiprocessor as it says, is chosen, or else the last. Its index, -1 if none covers the problem. `suits` may be NULL. */
int32_t choose_tile(const struct tile *tiles, int32_t count, int32_t extras,
                    const struct problem *p, const struct caps *caps, tile_suits suits);

static inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Blocks that own so many rows of a query head, or keys of a kv head, each. */
static inline int64_t blocks_of_rows(const struct problem *p, int64_t rows) {
    return p->batch * p->heads_q * ceil_divide(p->len_q, rows);
}
static inline int64_t blocks_of_keys(const struct problem *p, int64_t keys) {
    return p->batch * p->heads_kv * ceil_divide(p->len_k, keys);
}

static inline struct cuda_kernel *kernel_for(const struct tile *t, enum dtype dtype) {
    return &t->kernels[dtype == DTYPE_BF16];
}

#endif /* DLATTN_CUDA_TILE_H_ */
