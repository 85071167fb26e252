/* Forward attention for float8 on Hopper: cuda_fwd_sm90's tiles and parameters, and kernels of its own. See docs/fp8.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/sm90/walk.h"

/* One image for each head dim, which also has the kernel that lists tiles. */
#define MODULE(D)                                                                                  \
    extern const struct cuda_image cuda_fwd_fp8_sm90_##D##_images[];                               \
    static struct cuda_module module_##D = {.images = cuda_fwd_fp8_sm90_##D##_images};
MODULE(64)
MODULE(128)
MODULE(256)

/* Of e4m3 and of e5m2 keys and values, the one that lists tiles, and of tiles that are not short the first two with softcap. */
enum { E4M3, E5M2, LIST, SOFTCAP };
#define KERNEL(D, NAME, KEYS, WARPGROUPS, ...)                                                     \
    CUDA_KERNEL(module_##D, "cuda_fwd_fp8_sm90_" NAME, 128 * ((WARPGROUPS) + 1),                   \
                SM90_FLOAT8_SHARED_BYTES(D, KEYS, WARPGROUPS, __VA_ARGS__))
#define KERNELS_SHORT(D, ...)                                                                      \
    (struct cuda_kernel[]) {                                                                       \
        KERNEL(D, #D "_short_e4m3", __VA_ARGS__), KERNEL(D, #D "_short_e5m2", __VA_ARGS__),        \
            LISTER(D)                                                                              \
    }
#define KERNELS_ANY(D, ...)                                                                        \
    (struct cuda_kernel[]) {                                                                       \
        KERNEL(D, #D "_e4m3", __VA_ARGS__), KERNEL(D, #D "_e5m2", __VA_ARGS__), LISTER(D),         \
            KERNEL(D, #D "_e4m3_softcap", __VA_ARGS__), KERNEL(D, #D "_e5m2_softcap", __VA_ARGS__) \
    }
#define LISTER(D)                                                                                  \
    CUDA_KERNEL(module_##D, "cuda_fwd_fp8_sm90_list_" #D, SM90_LIST_THREADS, SM90_LIST_BYTES)
#define TILE(D, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, BLOCKS, USE)                               \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = 64 * (WARPGROUPS),                                                                    \
     .keys = KEYS,                                                                                 \
     .blocks = BLOCKS,                                                                             \
     .most_keys = SM90_FLOAT8_SETTLES_##USE ? 0 : SM90_FLOAT8_SETTLED_KEYS(D),                     \
     .kernels = KERNELS_##USE(D, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, BLOCKS, USE)},
#define SM90_D 0
static const struct tile tiles[] = {
#include "kernels/cuda/sm90/fp8_tiles.inc"
};

/* A short tile of 128 rows takes a tenth longer for each than one of 192, which leaves more of a head's last tile empty, and under a mask
 * computes more of what is hidden. */
static bool suits(const struct tile *t, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return !t->most_keys ||
           (p->len_k <= t->most_keys && p->softcap == 0 &&
            (t->blocks == 1 || bounded(p) ||
             11 * ceil_divide(p->len_q, 128) * 128 <= 10 * ceil_divide(p->len_q, 192) * 192));
}

ROW_FUNCTIONS(cuda_fwd_fp8_sm90);

bool cuda_fwd_fp8_sm90_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const int32_t chosen = choose_tile(tiles, COUNT(tiles), false, p, caps, suits);
    if (!fwd_takes_float8(plan, p) || !sm90_takes(p) || !sm90_has_boxes(p) ||
        (p->dim_qk | p->dim_v) % 16 != 0 || chosen < 0)
        return false;
    plan->variant = chosen;
    sm90_plan_tile(plan, p, caps, &tiles[chosen]);
    sm90_plan_walk(plan, p);
    return true;
}

int32_t cuda_fwd_fp8_sm90_launch(const struct plan *plan, const struct problem *p,
                                 const struct exec *exec) {
    struct cuda_kernel *const kernels = tiles[plan->variant].kernels;
    struct cuda_kernel *const kernel =
        kernels + (p->softcap > 0 ? SOFTCAP : 0) + (p->key.dtype == DTYPE_E5M2 ? E5M2 : E4M3);
    struct sm90_params params;
    int32_t status = sm90_fill(&params, p, plan, exec->workspace);
    if (status != DLATTN_OK)
        return status;
    if (!sm90_is_listed(p)) {
        sm90_fill_walk(&params, p, plan);
        return cuda_launch(kernel, p->device_id, plan->blocks, exec->stream, &params);
    }
    status = cuda_launch(kernels + LIST, p->device_id, 1, exec->stream, &params);
    if (status != DLATTN_OK)
        return status;
    return cuda_launch_early(kernel, p->device_id, plan->blocks, exec->stream, &params);
}
