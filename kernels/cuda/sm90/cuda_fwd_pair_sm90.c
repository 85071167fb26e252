/* Few tiles on Hopper, f16 and bf16: cuda_fwd_sm90 with tiles of 64 rows, whose keys two warpgroups share. See docs/cuda-sm90.md. */
#include "kernels/cuda/sm90/fwd.h"

#define MODULE(D)                                                                                  \
    extern const struct cuda_image cuda_fwd_pair_sm90_##D##_images[];                              \
    static struct cuda_module module_##D = {.images = cuda_fwd_pair_sm90_##D##_images};
MODULE(64)
MODULE(96)
MODULE(128)

/* Those of tiles.inc that have room for a bias, halved. */
enum { ROWS = 64 };
#define KERNEL(D, NAME, DV, KEYS, WARPGROUPS, ...)                                                 \
    CUDA_KERNEL(module_##D, "cuda_fwd_pair_sm90_" NAME, 128 * ((WARPGROUPS) + 1),                  \
                SM90_SHARED_BYTES(D, DV, KEYS, WARPGROUPS, __VA_ARGS__, 0))
#define TILE_MANY_ROWS(...)
#define TILE_ANY(...)
#define TILE_BIAS(D, DV, KEYS, ...)                                                                \
    {.dim_qk = D,                                                                                  \
     .dim_v = DV,                                                                                  \
     .rows = ROWS,                                                                                 \
     .keys = KEYS,                                                                                 \
     .kernels =                                                                                    \
         (struct cuda_kernel[]){KERNEL(D, #D "_" #DV "_" #KEYS "_f16", DV, KEYS, __VA_ARGS__),     \
                                KERNEL(D, #D "_" #DV "_" #KEYS "_bf16", DV, KEYS, __VA_ARGS__)}},
#define TILE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                                   \
    TILE_##USE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)
#define SM90_D 0
static const struct tile tiles[] = {
#include "kernels/cuda/sm90/tiles.inc"
};

ROW_FUNCTIONS(cuda_fwd_pair_sm90);

/* For calls that name it: beside gradients on another stream a launch has failed once (CUDA error 719), it is not known of which kernel. Each
 * tile has a multiprocessor of its own. */
bool cuda_fwd_pair_sm90_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    if (!p->kernel || !sm90_takes(p) || sm90_tiles(p, ROWS) > caps->multiprocessors)
        return false;
    plan->variant = choose_tile(tiles, COUNT(tiles), false, p, caps, NULL);
    if (plan->variant < 0)
        return false;
    sm90_plan_tile(plan, p, caps, &tiles[plan->variant]);
    return true;
}

int32_t cuda_fwd_pair_sm90_launch(const struct plan *plan, const struct problem *p,
                                  const struct exec *exec) {
    struct sm90_params params;
    const int32_t status = sm90_fill(&params, p, plan, exec->workspace);
    if (status != DLATTN_OK)
        return status;
    sm90_fill_walk(&params, p, plan);
    return cuda_launch(kernel_for(&tiles[plan->variant], p->dtype), p->device_id, plan->blocks,
                       exec->stream, &params);
}
