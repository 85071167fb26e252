/* Gradients for f32 and f64 on the CUDA cores of any GPU since Ampere. See docs/cuda-backward.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/simt/bwd_sizes.h"

extern const unsigned char cuda_bwd_simt_image[];

static struct cuda_module module = {.image = cuda_bwd_simt_image};

/* Of a tile's kernels. */
enum { STATS, KEYS, ROWS, BIAS };

#define TILE(TYPE, CTYPE, D, R, C)                                                                 \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = 8 * (R),                                                                              \
     .keys = 16 * (C),                                                                             \
     .kernels = (struct cuda_kernel[]){CUDA_KERNEL(module, "cuda_bwd_simt_" #TYPE "_stats_" #D,    \
                                                   128, BWD_SHARED_BYTES(CTYPE, D, R, C)),         \
                                       CUDA_KERNEL(module, "cuda_bwd_simt_" #TYPE "_keys_" #D,     \
                                                   128, BWD_SHARED_BYTES(CTYPE, D, R, C)),         \
                                       CUDA_KERNEL(module, "cuda_bwd_simt_" #TYPE "_rows_" #D,     \
                                                   128, BWD_SHARED_BYTES(CTYPE, D, R, C)),         \
                                       CUDA_KERNEL(module, "cuda_bwd_simt_" #TYPE "_bias_" #D,     \
                                                   128, BWD_SHARED_BYTES(CTYPE, D, R, C))}},
#define F32(D, R, C) TILE(f32, float, D, R, C)
static const struct tile f32_tiles[] = {
#include "kernels/cuda/simt/bwd_tiles.inc"
};
#undef F32
#define F64(D, R, C) TILE(f64, double, D, R, C)
static const struct tile f64_tiles[] = {
#include "kernels/cuda/simt/bwd_tiles.inc"
};
#undef F64

#define SUM_KERNEL(name) CUDA_KERNEL(module, "cuda_bwd_simt_" name, SUM_THREADS, SUM_SHARED_BYTES)
static struct cuda_kernel sinks[] = {SUM_KERNEL("f32_sinks"), SUM_KERNEL("f64_sinks")},
                          slopes[] = {SUM_KERNEL("f32_slopes"), SUM_KERNEL("f64_slopes")};

static struct bwd_row row_of(const struct plan *plan, const struct problem *p) {
    const bool f64 = p->dtype == DTYPE_F64;
    const struct tile *const t = &(f64 ? f64_tiles : f32_tiles)[plan->variant];
    return (struct bwd_row){
        .stats = &t->kernels[STATS],
        .keys = &t->kernels[KEYS],
        .rows = &t->kernels[ROWS],
        .bias = &t->kernels[BIAS],
        .sinks = &sinks[f64],
        .slopes = &slopes[f64],
        .stats_rows = t->rows,
        .bias_rows = t->rows,
        .bias_keys = t->keys,
    };
}

ROW_FUNCTIONS(cuda_bwd_simt);

/* A block owns as many keys as rows. */
bool cuda_bwd_simt_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const bool f64 = p->dtype == DTYPE_F64;
    const struct tile *const tiles = f64 ? f64_tiles : f32_tiles;
    plan->variant =
        choose_tile(tiles, f64 ? COUNT(f64_tiles) : COUNT(f32_tiles), false, p, caps, NULL);
    if (plan->variant < 0)
        return false;
    plan->tile_q = plan->tile_k = tiles[plan->variant].rows;
    const struct bwd_row row = row_of(plan, p);
    return bwd_plan(plan, p, &row);
}

int32_t cuda_bwd_simt_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    const struct bwd_row row = row_of(plan, p);
    return bwd_launch(plan, p, exec, &row);
}
