/* Forward attention for heads up to 576, f16 and bf16, any GPU since Ampere. See docs/cuda-wide.md. */
#include "kernels/cuda/common/packed.h"

extern const struct cuda_image cuda_fwd_wide_sm80_images[];

static struct cuda_module module = {.images = cuda_fwd_wide_sm80_images};

/* Both kinds of a tile ask for what the larger of the two needs: which it will be, only addresses say. */
#define KERNEL_OF(NAME, ROWS, BN, WM, WN, STAGES, VIEW_STAGES)                                     \
    CUDA_KERNEL(module, "cuda_fwd_wide_sm80_" NAME #ROWS "_" #BN "_" #STAGES, (WM) * (WN) * 64,    \
                WIDE_TILE_BYTES(                                                                   \
                    ROWS, BN, WN,                                                                  \
                    (BN) * 2 * WIDE_MOST((STAGES) * (WIDE_D + WIDE_DV), (VIEW_STAGES) * WIDE_D)))
#define TILE(ROWS, BN, ...)                                                                        \
    {.dim_qk = WIDE_D,                                                                             \
     .dim_v = WIDE_DV,                                                                             \
     .rows = ROWS,                                                                                 \
     .keys = BN,                                                                                   \
     .kernels = (struct cuda_kernel[]){KERNEL_OF("f16_", ROWS, BN, __VA_ARGS__),                   \
                                       KERNEL_OF("bf16_", ROWS, BN, __VA_ARGS__),                  \
                                       KERNEL_OF("f16_view_", ROWS, BN, __VA_ARGS__),              \
                                       KERNEL_OF("bf16_view_", ROWS, BN, __VA_ARGS__)}},
static const struct tile tiles[] = {
#include "kernels/cuda/wide/tiles.inc"
};

#define MERGE(NAME)                                                                                \
    CUDA_KERNEL(module, "cuda_fwd_wide_sm80_merge_" NAME, MERGE_WARPS * 32, MERGE_SHARED_BYTES)
static struct cuda_kernel merge[] = {MERGE("f16"), MERGE("bf16")};

/* Tiles of few rows are for those that need no other: rows that a tile shares read keys once. */
static bool suits(const struct tile *t, const struct problem *p, const struct caps *caps) {
    enum { FEW = 16 };
    (void)caps;
    return t->rows <= FEW && packed_rows(p) <= t->rows;
}

ROW_FUNCTIONS(cuda_fwd_wide_sm80);

bool cuda_fwd_wide_sm80_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const int32_t chosen = choose_tile(tiles, COUNT(tiles), false, p, caps, suits);
    if (chosen < 0 || !offset_fits(plan, p))
        return false;
    return packed_plan(plan, p, tiles, chosen,
                       packed_splits(p, &tiles[chosen], caps->multiprocessors, tiles[chosen].keys));
}

int32_t cuda_fwd_wide_sm80_launch(const struct plan *plan, const struct problem *p,
                                  const struct exec *exec) {
    const struct tile *const t = &tiles[plan->variant];
    struct cuda_kernel *const kernels = t->kernels + (value_is_view_of_key(p) ? 2 : 0);
    const int bf16 = p->dtype == DTYPE_BF16;
    struct packed_params params;
    packed_fill(&params, plan, p, exec, t->rows);
    return packed_launch(plan, p, exec, &kernels[bf16], &merge[bf16], &params);
}
