/* Gradients for f16 and bf16 on the tensor cores of any GPU since Ampere. See docs/cuda-backward.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/sm80/bwd_sizes.h"

extern const unsigned char cuda_bwd_sm80_image[];

static struct cuda_module module = {.image = cuda_bwd_sm80_image};

#define TILE(name, D, ROWS, KEYS, EXTRAS, threads, bytes)                                          \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = ROWS,                                                                                 \
     .keys = KEYS,                                                                                 \
     .extras = EXTRAS,                                                                             \
     .kernels = F16_AND_BF16(module, "cuda_bwd_sm80", name, threads, bytes)},

#define KEYS(D, WARPS, MT, BM, MINB, EXTRAS)                                                       \
    TILE("keys_" #D "_" #WARPS "_" #MT "_" #BM "_" #EXTRAS, D, BM, (WARPS) * (MT) * 8, EXTRAS,     \
         (WARPS) * 32, KEYS_SHARED_BYTES(D, WARPS, MT, BM))
static const struct tile keys_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef KEYS

#define ROWS(D, WARPS, MT, BN, MINB, EXTRAS)                                                       \
    TILE("rows_" #D "_" #WARPS "_" #MT "_" #BN "_" #EXTRAS, D, (WARPS) * (MT) * 16, BN, EXTRAS,    \
         (WARPS) * 32, ROWS_SHARED_BYTES(D, WARPS, MT, BN))
static const struct tile rows_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef ROWS

#define STATS(D, EXTRAS)                                                                           \
    TILE("stats_" #D "_" #EXTRAS, D, BWD_STATS_ROWS, 0, EXTRAS, STATS_THREADS,                     \
         STATS_SHARED_BYTES(D))
static const struct tile stats_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef STATS

#define BIAS(D) TILE("bias_" #D, D, BIAS_ROWS, BIAS_KEYS, true, BIAS_THREADS, BIAS_SHARED_BYTES(D))
static const struct tile bias_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef BIAS

static struct cuda_kernel sinks_kernels[] = {
    CUDA_KERNEL(module, "cuda_bwd_sm80_f16_sinks", SUM_THREADS, SUM_SHARED_BYTES),
    CUDA_KERNEL(module, "cuda_bwd_sm80_bf16_sinks", SUM_THREADS, SUM_SHARED_BYTES)};
static struct cuda_kernel slopes_kernel =
    CUDA_KERNEL(module, "cuda_bwd_sm80_slopes", SUM_THREADS, SUM_SHARED_BYTES);

/* A tile of each kind, in plan->variant. */
enum { KEYS_TILE = 0, ROWS_TILE = 8, STATS_TILE = 16, BIAS_TILE = 24 };

static struct bwd_row row_of(const struct plan *plan, const struct problem *p) {
#define KERNEL(kind, tiles) kernel_for(&(tiles)[plan->variant >> (kind) & 127], p->dtype)
    return (struct bwd_row){
        .stats = KERNEL(STATS_TILE, stats_tiles),
        .keys = KERNEL(KEYS_TILE, keys_tiles),
        .rows = KERNEL(ROWS_TILE, rows_tiles),
        .bias = KERNEL(BIAS_TILE, bias_tiles),
        .sinks = &sinks_kernels[p->dtype == DTYPE_BF16],
        .slopes = &slopes_kernel,
        .stats_rows = BWD_STATS_ROWS,
        .bias_rows = BIAS_ROWS,
        .bias_keys = BIAS_KEYS,
    };
#undef KERNEL
}

ROW_FUNCTIONS(cuda_bwd_sm80);

bool cuda_bwd_sm80_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
#define CHOOSE(tiles) choose_tile(tiles, COUNT(tiles), bwd_needs_logits(p), p, caps, NULL)
    const int32_t keys = CHOOSE(keys_tiles), rows = CHOOSE(rows_tiles), stats = CHOOSE(stats_tiles),
                  bias = CHOOSE(bias_tiles);
#undef CHOOSE
    if (keys < 0 || rows < 0 || stats < 0 || bias < 0)
        return false;
    plan->variant = keys << KEYS_TILE | rows << ROWS_TILE | stats << STATS_TILE | bias << BIAS_TILE;
    plan->tile_q = rows_tiles[rows].rows;
    plan->tile_k = keys_tiles[keys].keys;
    const struct bwd_row row = row_of(plan, p);
    return bwd_plan(plan, p, &row);
}

int32_t cuda_bwd_sm80_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    const struct bwd_row row = row_of(plan, p);
    return bwd_launch(plan, p, exec, &row);
}
