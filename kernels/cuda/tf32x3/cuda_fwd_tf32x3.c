/* Forward attention for f32 on tensor cores, three products in tf32 for one in f32. See docs/cuda-tf32x3.md. */
#include "kernels/cuda/common/fill.h"
#include "src/cuda_driver.h"

extern const unsigned char cuda_fwd_tf32x3_image[];

static struct cuda_module module = {.image = cuda_fwd_tf32x3_image};

#define TILE(D, WARPS, BN, MINB)                                                                   \
    {D,                                                                                            \
     (WARPS) * 16,                                                                                 \
     BN,                                                                                           \
     MINB,                                                                                         \
     {.module = &module,                                                                           \
      .name = "cuda_fwd_tf32x3_" #D "_" #BN,                                                       \
      .threads = (WARPS) * 32,                                                                     \
      .shared_memory_bytes = TILE_SHARED_BYTES(D, WARPS, BN)}},
static struct tile {
    int32_t dim, rows, keys;
    int32_t blocks; /* of a multiprocessor */
    struct cuda_kernel kernel;
} tiles[] = {
#include "kernels/cuda/tf32x3/tiles.inc"
};
enum { TILES = sizeof tiles / sizeof tiles[0] };

/* GPUs of data centers do tf32 at eight times the rate of f32; the others at one to two times, where three products for
 * one are no gain: there this row is for who asks for it. */
static bool wanted(const struct problem *p, int32_t sm) {
    return p->kernel || sm == 80 || sm == 90 || sm == 100 || sm == 103;
}

static bool covers(const struct tile *t, const struct problem *p, const struct caps *caps) {
    return t->dim >= p->dim_qk && t->dim >= p->dim_v &&
           t->kernel.shared_memory_bytes <= caps->shared_memory_bytes;
}

static bool filled(const struct tile *t, const struct caps *caps) {
    return fwd_blocks(caps, t->kernel.shared_memory_bytes) >= t->blocks;
}

ROW_FUNCTIONS(cuda_fwd_tf32x3);

bool cuda_fwd_tf32x3_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const struct tile *best = NULL;
    for (const struct tile *t = tiles; t < tiles + TILES && !(best && filled(best, caps)); t++) {
        if (covers(t, p, caps) && (!best || (t->dim == best->dim && filled(t, caps))))
            best = t;
    }
    if (!best || !wanted(p, caps->sm))
        return false;
    plan->variant = (int32_t)(best - tiles);
    plan->tile_q = best->rows;
    plan->tile_k = best->keys;
    return fwd_fits(plan, p);
}

int32_t cuda_fwd_tf32x3_launch(const struct plan *plan, const struct problem *p,
                               const struct exec *exec) {
    struct fwd_params params;
    int64_t blocks;
    fwd_fill(&params, p, plan->tile_q, &blocks);
    return cuda_launch(&tiles[plan->variant].kernel, p->device_id, blocks, exec->stream, &params);
}
