/* Gradients for f32 on the CUDA cores of any GPU since Ampere. See docs/cuda-backward.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/simt/bwd_sizes.h"

extern const struct cuda_image cuda_bwd_simt_images[];

static struct cuda_module module = {.images = cuda_bwd_simt_images};

/* Of a tile's kernels. */
enum { STATS, KEYS, ROWS, BIAS };

#define KERNEL(name) CUDA_KERNEL(module, "cuda_bwd_simt_" name, SUM_THREADS, SUM_SHARED_BYTES)
#define OF_TILE(D, NAME, R, C)                                                                     \
    CUDA_KERNEL(module, "cuda_bwd_simt_" NAME #D, 128, BWD_SHARED_BYTES(float, D, R, C))
#define TILE(D, R, C)                                                                              \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = 8 * (R),                                                                              \
     .keys = 16 * (C),                                                                             \
     .kernels = (struct cuda_kernel[]){OF_TILE(D, "stats_", R, C), OF_TILE(D, "keys_", R, C),      \
                                       OF_TILE(D, "rows_", R, C), OF_TILE(D, "bias_", R, C)}},
static const struct tile tiles[] = {
#include "kernels/cuda/simt/bwd_tiles.inc"
};
static struct cuda_kernel sinks = KERNEL("sinks"), slopes = KERNEL("slopes");

static struct bwd_row row_of(const struct plan *plan) {
    const struct tile *const t = &tiles[plan->variant];
    return (struct bwd_row){
        .stats = &t->kernels[STATS],
        .keys = &t->kernels[KEYS],
        .rows = &t->kernels[ROWS],
        .bias = &t->kernels[BIAS],
        .sinks = &sinks,
        .slopes = &slopes,
        .stats_rows = t->rows,
        .bias_rows = t->rows,
        .bias_keys = t->keys,
    };
}

ROW_FUNCTIONS(cuda_bwd_simt);

/* A block owns as many keys as rows. */
bool cuda_bwd_simt_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    plan->variant = choose_tile(tiles, COUNT(tiles), false, p, caps, NULL);
    if (plan->variant < 0)
        return false;
    plan->tile_q = plan->tile_k = tiles[plan->variant].rows;
    const struct bwd_row row = row_of(plan);
    return bwd_plan(plan, p, &row);
}

int32_t cuda_bwd_simt_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    const struct bwd_row row = row_of(plan);
    return bwd_launch(plan, p, exec, &row);
}
