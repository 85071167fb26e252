/* Forward attention for queries of e4m3 on the tensor cores of any GPU since Ada. See docs/fp8.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/sm89/params.h"

extern const struct cuda_image cuda_fwd_fp8_sm89_images[];

static struct cuda_module module = {.images = cuda_fwd_fp8_sm89_images};

/* Of e4m3 keys and values, then of e5m2. */
#define TILE(D, WARPS, MT, BN, MINB, EXTRAS)                                                       \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = (WARPS) * (MT) * 16,                                                                  \
     .keys = BN,                                                                                   \
     .blocks = MINB,                                                                               \
     .extras = EXTRAS,                                                                             \
     .kernels =                                                                                    \
         (struct cuda_kernel[]){CUDA_KERNEL(module, "cuda_fwd_fp8_sm89_e4m3_" #D "_" #EXTRAS,      \
                                            (WARPS) * 32, SM89_SHARED_BYTES(D, WARPS, MT, BN)),    \
                                CUDA_KERNEL(module, "cuda_fwd_fp8_sm89_e5m2_" #D "_" #EXTRAS,      \
                                            (WARPS) * 32, SM89_SHARED_BYTES(D, WARPS, MT, BN))}},
static const struct tile tiles[] = {
#include "kernels/cuda/sm89/tiles.inc"
};

ROW_FUNCTIONS(cuda_fwd_fp8_sm89);

bool cuda_fwd_fp8_sm89_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    return fwd_takes_float8(plan, p) &&
           fwd_plan(plan, p, tiles,
                    choose_tile(tiles, COUNT(tiles), fwd_needs_extras(p), p, caps, NULL));
}

int32_t cuda_fwd_fp8_sm89_launch(const struct plan *plan, const struct problem *p,
                                 const struct exec *exec) {
    struct sm89_params params = {.output_dtype = p->output.dtype == DTYPE_F32   ? SM89_F32
                                                 : p->output.dtype == DTYPE_F16 ? SM89_F16
                                                                                : SM89_BF16};
    fwd_fill(&params.fwd, p, plan->tile_q);
    return cuda_launch(&tiles[plan->variant].kernels[p->key.dtype == DTYPE_E5M2], p->device_id,
                       plan->blocks, exec->stream, &params);
}
