/* Forward attention for f32 on tensor cores, three products in tf32 for one in f32. See docs/cuda-tf32x3.md. */
#include "kernels/cuda/common/fill.h"

extern const struct cuda_image cuda_fwd_tf32x3_images[];

static struct cuda_module module = {.images = cuda_fwd_tf32x3_images};

#define TILE(D, WARPS, BN, MINB, EXTRAS)                                                           \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = (WARPS) * 16,                                                                         \
     .keys = BN,                                                                                   \
     .blocks = MINB,                                                                               \
     .extras = EXTRAS,                                                                             \
     .kernels =                                                                                    \
         (struct cuda_kernel[]){CUDA_KERNEL(module, "cuda_fwd_tf32x3_" #D "_" #BN "_" #EXTRAS,     \
                                            (WARPS) * 32, TILE_SHARED_BYTES(D, WARPS, BN))}},
static const struct tile tiles[] = {
#include "kernels/cuda/tf32x3/tiles.inc"
};

/* GPUs of data centers do tf32 at eight times the rate of f32; the others at one to two times, where three products for
 * one are no gain: there this row is for who asks for it. */
static bool wanted(const struct problem *p, int32_t sm) {
    return p->kernel || sm == 80 || sm == 90 || sm == 100 || sm == 103;
}

ROW_FUNCTIONS(cuda_fwd_tf32x3);

bool cuda_fwd_tf32x3_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    return wanted(p, caps->sm) && offset_fits(plan, p) &&
           fwd_plan(plan, p, tiles,
                    choose_tile(tiles, COUNT(tiles), fwd_needs_pairs(p), p, caps, NULL));
}

int32_t cuda_fwd_tf32x3_launch(const struct plan *plan, const struct problem *p,
                               const struct exec *exec) {
    return fwd_launch(plan, p, exec, tiles);
}
