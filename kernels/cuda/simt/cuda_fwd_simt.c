/* Forward attention for f32 and f64 on the CUDA cores of any GPU since Ampere. */
#include "kernels/cuda/common/fill.h"
#include "src/cuda_driver.h"

extern const unsigned char cuda_fwd_simt_image[];

static struct cuda_module module = {.image = cuda_fwd_simt_image};

enum tile_type { f32 = DTYPE_F32, f64 = DTYPE_F64 };

#define TILE(TYPE, CTYPE, D, R, C)                                                                 \
    {TYPE,                                                                                         \
     D,                                                                                            \
     8 * (R),                                                                                      \
     16 * (C),                                                                                     \
     {.module = &module,                                                                           \
      .name = "cuda_fwd_simt_" #TYPE "_" #D,                                                       \
      .threads = 128,                                                                              \
      .shared_memory_bytes = TILE_SHARED_BYTES(CTYPE, D, R, C)}},
static struct tile {
    enum tile_type type;
    int32_t dim, rows, keys;
    struct cuda_kernel kernel;
} tiles[] = {
#include "kernels/cuda/simt/tiles.inc"
};
enum { TILES = sizeof tiles / sizeof tiles[0] };

ROW_FUNCTIONS(cuda_fwd_simt);

bool cuda_fwd_simt_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    for (int32_t i = 0; i < TILES; i++) {
        const struct tile *t = &tiles[i];
        if ((int)t->type != (int)p->dtype || t->dim < p->dim_qk || t->dim < p->dim_v ||
            t->kernel.shared_memory_bytes > caps->shared_memory_bytes)
            continue;
        plan->variant = i;
        plan->tile_q = t->rows;
        plan->tile_k = t->keys;
        return fwd_fits(plan, p);
    }
    return false;
}

int32_t cuda_fwd_simt_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    struct fwd_params params;
    int64_t blocks;
    fwd_fill(&params, p, plan->tile_q, &blocks);
    return cuda_launch(&tiles[plan->variant].kernel, p->device_id, blocks, exec->stream, &params);
}
