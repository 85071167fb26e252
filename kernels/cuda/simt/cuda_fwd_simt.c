/* Forward attention for f32 and f64 on the CUDA cores of any GPU since Ampere. */
#include "kernels/cuda/common/fill.h"

extern const struct cuda_image cuda_fwd_simt_images[];

static struct cuda_module module = {.images = cuda_fwd_simt_images};

#define TILE(TYPE, CTYPE, D, R, C, EXTRAS)                                                         \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = 8 * (R),                                                                              \
     .keys = 16 * (C),                                                                             \
     .extras = EXTRAS,                                                                             \
     .kernels =                                                                                    \
         (struct cuda_kernel[]){CUDA_KERNEL(module, "cuda_fwd_simt_" #TYPE "_" #D "_" #EXTRAS,     \
                                            128, TILE_SHARED_BYTES(CTYPE, D, R, C))}},
#define F32(D, R, C, EXTRAS) TILE(f32, float, D, R, C, EXTRAS)
static const struct tile f32_tiles[] = {
#include "kernels/cuda/simt/tiles.inc"
};
#undef F32
#define F64(D, R, C, EXTRAS) TILE(f64, double, D, R, C, EXTRAS)
static const struct tile f64_tiles[] = {
#include "kernels/cuda/simt/tiles.inc"
};
#undef F64

static const struct tile *tiles_of(enum dtype dtype) {
    return dtype == DTYPE_F32 ? f32_tiles : f64_tiles;
}

ROW_FUNCTIONS(cuda_fwd_simt);

bool cuda_fwd_simt_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const struct tile *const tiles = tiles_of(p->dtype);
    const int32_t count = p->dtype == DTYPE_F32 ? COUNT(f32_tiles) : COUNT(f64_tiles);
    return offset_fits(plan, p) &&
           fwd_plan(plan, p, tiles, choose_tile(tiles, count, fwd_needs_pairs(p), p, caps, NULL));
}

int32_t cuda_fwd_simt_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    return fwd_launch(plan, p, exec, tiles_of(p->dtype));
}
