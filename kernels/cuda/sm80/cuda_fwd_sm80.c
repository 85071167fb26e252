/* Forward attention for f16 and bf16 on the tensor cores of any GPU since Ampere. See docs/cuda-sm80.md. */
#include "kernels/cuda/common/fill.h"

extern const struct cuda_image cuda_fwd_sm80_images[];

static struct cuda_module module = {.images = cuda_fwd_sm80_images};

#define TILE(D, DV, WARPS, MT, BN, STAGES, SPLIT, MINB, EXTRAS)                                    \
    {.dim_qk = D,                                                                                  \
     .dim_v = DV,                                                                                  \
     .rows = TILE_ROWS(WARPS, MT, SPLIT),                                                          \
     .keys = BN,                                                                                   \
     .blocks = MINB,                                                                               \
     .extras = EXTRAS,                                                                             \
     .kernels = F16_AND_BF16(                                                                      \
         module, "cuda_fwd_sm80", #D "_" #DV "_" #WARPS "_" #MT "_" #BN "_" #STAGES "_" #EXTRAS,   \
         (WARPS) * 32, TILE_SHARED_BYTES(D, DV, WARPS, MT, BN, STAGES, SPLIT))},
static const struct tile tiles[] = {
#include "kernels/cuda/sm80/tiles.inc"
};

/* 2: with the options of pairs, which have tiles of their own. */
static int32_t needed_extras(const struct problem *p) {
    return p->features & PAIR_FEATURES ? 2 : fwd_needs_extras(p);
}

/* True if blocks of so many rows, of which a multiprocessor holds one, and steps of so many keys pay: there is a block for
 * every multiprocessor, and what a causal mask or a window cuts off is little beside what rows see. */
static bool is_long(const struct tile *t, const struct problem *p, const struct caps *caps) {
    const bool cut = p->window_left != UNBOUNDED || p->window_right != UNBOUNDED;
    const bool bounded = p->window_left != UNBOUNDED && p->window_right != UNBOUNDED;
    const int64_t window = bounded ? p->window_left + p->window_right + 1 : p->len_k;
    const int64_t seen = window < p->len_k ? window : p->len_k;
    const int64_t blocks = ceil_divide(p->len_q, t->rows) * p->batch * p->heads_q;
    return seen >= (cut ? 2048 : 512) && blocks >= caps->multiprocessors;
}

static bool suits(const struct tile *t, const struct problem *p, const struct caps *caps) {
    return t->keys < 128 || is_long(t, p, caps);
}

ROW_FUNCTIONS(cuda_fwd_sm80);

bool cuda_fwd_sm80_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    return offset_fits(plan, p) &&
           fwd_plan(plan, p, tiles,
                    choose_tile(tiles, COUNT(tiles), needed_extras(p), p, caps, suits));
}

int32_t cuda_fwd_sm80_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    return fwd_launch(plan, p, exec, tiles);
}
