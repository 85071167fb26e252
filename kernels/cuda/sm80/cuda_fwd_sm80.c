/* Forward attention for f16 and bf16 on the tensor cores of any GPU since Ampere. See docs/cuda-sm80.md. */
#include "kernels/cuda/common/fill.h"
#include "src/cuda_driver.h"

extern const unsigned char cuda_fwd_sm80_image[];

static struct cuda_module module = {.image = cuda_fwd_sm80_image};

#define INSTANCE(tile, warps, bytes)                                                               \
    {.module = &module,                                                                            \
     .name = "cuda_fwd_sm80_" tile,                                                                \
     .threads = (warps) * 32,                                                                      \
     .shared_memory_bytes = (bytes)}

/* One compiled tile, for both element types. */
struct tile {
    int32_t dim_qk, dim_v, rows, keys;
    int32_t blocks; /* of a multiprocessor */
    bool extras;
    struct cuda_kernel f16, bf16;
};

#define TILE(D, DV, WARPS, MT, BN, STAGES, SPLIT, MINB, EXTRAS)                                    \
    {D,                                                                                            \
     DV,                                                                                           \
     TILE_ROWS(WARPS, MT, SPLIT),                                                                  \
     BN,                                                                                           \
     MINB,                                                                                         \
     EXTRAS,                                                                                       \
     INSTANCE("f16_" #D "_" #DV "_" #WARPS "_" #MT "_" #BN "_" #STAGES "_" #EXTRAS, WARPS,         \
              TILE_SHARED_BYTES(D, DV, WARPS, MT, BN, STAGES, SPLIT)),                             \
     INSTANCE("bf16_" #D "_" #DV "_" #WARPS "_" #MT "_" #BN "_" #STAGES "_" #EXTRAS, WARPS,        \
              TILE_SHARED_BYTES(D, DV, WARPS, MT, BN, STAGES, SPLIT))},
static struct tile tiles[] = {
#include "kernels/cuda/sm80/tiles.inc"
};
enum { TILES = sizeof tiles / sizeof tiles[0] };

static bool needs_extras(const struct problem *p) {
    const uint64_t extras = DLATTN_FEATURE_SOFTCAP | DLATTN_FEATURE_BIAS | DLATTN_FEATURE_MASK |
                            DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_PAGED;
    return p->features & extras || !(p->scale > 0);
}

static bool covers(const struct tile *t, const struct problem *p, const struct caps *caps) {
    return t->dim_qk >= p->dim_qk && t->dim_v >= p->dim_v && t->extras >= needs_extras(p) &&
           t->f16.shared_memory_bytes <= caps->shared_memory_bytes;
}

/* True if blocks of so many rows, of which a multiprocessor holds one, and steps of so many keys pay: there is a block for
 * every multiprocessor, and what a causal mask or a window cuts off is little beside what rows see. */
static bool is_long(const struct tile *t, const struct problem *p, const struct caps *caps) {
    const bool cut = p->window_left != UNBOUNDED || p->window_right != UNBOUNDED;
    const bool bounded = p->window_left != UNBOUNDED && p->window_right != UNBOUNDED;
    const int64_t window = bounded ? p->window_left + p->window_right + 1 : p->len_k;
    const int64_t seen = window < p->len_k ? window : p->len_k;
    const int64_t blocks = (p->len_q + t->rows - 1) / t->rows * p->batch * p->heads_q;
    return seen >= (cut ? 2048 : 512) && blocks >= caps->multiprocessors;
}

static bool suits(const struct tile *t, const struct problem *p, const struct caps *caps) {
    return fwd_blocks(caps, t->f16.shared_memory_bytes) >= t->blocks &&
           (t->keys < 128 || is_long(t, p, caps));
}

ROW_FUNCTIONS(cuda_fwd_sm80);

bool cuda_fwd_sm80_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const struct tile *best = NULL;
    for (const struct tile *t = tiles; t < tiles + TILES; t++) {
        if (!covers(t, p, caps))
            continue;
        if (best && (t->dim_qk != best->dim_qk || t->dim_v != best->dim_v))
            break;
        if (!best || suits(t, p, caps))
            best = t;
        if (suits(best, p, caps))
            break;
    }
    if (!best)
        return false;
    plan->variant = (int32_t)(best - tiles);
    plan->tile_q = best->rows;
    plan->tile_k = best->keys;
    return fwd_fits(plan, p);
}

int32_t cuda_fwd_sm80_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    struct tile *t = &tiles[plan->variant];
    struct fwd_params params;
    int64_t blocks;
    fwd_fill(&params, p, plan->tile_q, &blocks);
    return cuda_launch(p->dtype == DTYPE_F16 ? &t->f16 : &t->bf16, p->device_id, blocks,
                       exec->stream, &params);
}
