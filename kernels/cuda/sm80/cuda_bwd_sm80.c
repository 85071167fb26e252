/* Gradients for f16 and bf16 on the tensor cores of any GPU since Ampere. See docs/cuda-backward.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/sm80/bwd_sizes.h"

extern const struct cuda_image cuda_bwd_sm80_images[];

static struct cuda_module module = {.images = cuda_bwd_sm80_images};

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

/* Kernels of a tile, of each type: the products, and what is done before and after. */
enum { PRODUCTS, PREPARE, FINISH };
#define SUMS(D, WARPS, MT, BM, MINB, LAG)                                                          \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = BM,                                                                                   \
     .keys = (WARPS) * (MT) * 8,                                                                   \
     .kernels =                                                                                    \
         (struct cuda_kernel[]){OF_SUMS("sums_", #D "_" #WARPS "_" #MT "_" #BM "_" #LAG,           \
                                        (WARPS) * 32, SUMS_SHARED_BYTES(D, WARPS, MT, BM, LAG)),   \
                                OF_SUMS("prepare_", #D "_" #WARPS "_" #MT "_" #BM "_" #LAG,        \
                                        STATS_THREADS, STATS_SHARED_BYTES(D)),                     \
                                OF_SUMS("finish_", #D "_" #WARPS "_" #MT "_" #BM "_" #LAG,         \
                                        FINISH_THREADS, FINISH_SHARED_BYTES)}},
#define OF_SUMS(kind, tile, threads, bytes)                                                        \
    CUDA_KERNEL(module, "cuda_bwd_sm80_f16_" kind tile, threads, bytes),                           \
        CUDA_KERNEL(module, "cuda_bwd_sm80_bf16_" kind tile, threads, bytes)
static const struct tile sums_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef SUMS

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

/* A tile of each kind in plan->variant, and one more than that of sums, 0: none. */
enum { KEYS_TILE = 0, ROWS_TILE = 5, STATS_TILE = 10, BIAS_TILE = 15, SUMS_TILE = 20 };

static int32_t tile_of(const struct plan *plan, int32_t kind) { return plan->variant >> kind & 31; }

static struct bwd_row row_of(const struct plan *plan, const struct problem *p) {
#define KERNEL(kind, tiles) kernel_for(&(tiles)[tile_of(plan, kind)], p->dtype)
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
        .start_early = true,
    };
#undef KERNEL
}

/* ---- Five products: d_query in sums of integers ---- */

static const struct tile *sums_tile(const struct plan *plan) {
    const int32_t tile = tile_of(plan, SUMS_TILE);
    return tile ? &sums_tiles[tile - 1] : NULL;
}

/* Of the workspace: statistics of rows with a factor of each, facts, sums. */
struct parts {
    size_t rows, facts, sums;
};

static struct parts parts_of(const struct problem *p, const struct tile *t) {
    const size_t rows = (size_t)(p->heads_q * bwd_stats_rows(p));
    return (struct parts){rows * SUM_PLANES * sizeof(float),
                          (size_t)(p->batch * p->heads_kv) * SUM_FACTS * sizeof(uint32_t),
                          rows * (size_t)t->dim_qk * sizeof(int32_t)};
}

static int64_t prepare_blocks(const struct problem *p) {
    return blocks_of_keys(p, SUM_KEYS) + blocks_of_rows(p, BWD_STATS_ROWS);
}

/* Whether rows see so many keys, more or less, that five products pay: they cost each row some work besides, which is less beside the
 * products of wide heads. Of what a mask cuts off seven products compute more. */
enum { SUMS_FROM_KEYS = 640, SUMS_FROM_KEYS_OF_WIDE_HEADS = 512, SUMS_FROM_MASKED_KEYS = 512 };

static bool sums_pay(const struct problem *p) {
    const double length = p->total_k > 0 ? (double)p->total_k / (double)p->batch : (double)p->len_k,
                 window = (double)p->window_left + (double)p->window_right + 1;
    const bool left = p->window_left != UNBOUNDED, right = p->window_right != UNBOUNDED;
    if (!left && !right)
        return length >= (p->dim_qk > 128 ? SUMS_FROM_KEYS_OF_WIDE_HEADS : SUMS_FROM_KEYS);
    const double keys = left && right ? window : length / 2;
    return (keys < length ? keys : length) >= SUMS_FROM_MASKED_KEYS;
}

/* Known only when there are pointers: otherwise seven products in a workspace that has room for five. */
static bool suit_sums(const struct bwd_params *params) {
    const int32_t aligned =
        FWD_ALIGNED_QUERY | FWD_ALIGNED_KEY | FWD_ALIGNED_VALUE | FWD_ALIGNED_OUTPUT;
    return params->d_query.data && (params->d_key.data || params->d_value.data) &&
           (params->f.flags & aligned) == aligned && params->flags & BWD_ALIGNED_D_OUTPUT;
}

static int32_t launch_sums(const struct problem *p, const struct exec *exec, const struct tile *t,
                           struct bwd_params *params) {
    const struct parts parts = parts_of(p, t);
    params->stats = exec->workspace;
    struct cuda_kernel *const of_type = kernel_for(t, p->dtype);
    const struct {
        struct cuda_kernel *kernel;
        int64_t blocks; /* 0: not launched */
    } launches[] = {
        {of_type + 2 * PREPARE, prepare_blocks(p)},
        {of_type + 2 * PRODUCTS, blocks_of_keys(p, t->keys)},
        {of_type + 2 * FINISH, blocks_of_rows(p, BWD_STATS_ROWS)},
        {&sinks_kernels[p->dtype == DTYPE_BF16], p->d_sinks.data ? p->heads_q : 0},
    };
    int32_t status = cuda_clear((char *)exec->workspace + parts.rows, parts.facts, exec->stream);
    for (int32_t i = 0; i < COUNT(launches) && status == DLATTN_OK; i++)
        if (launches[i].blocks > 0)
            status = cuda_launch_early(launches[i].kernel, p->device_id,
                                       (int32_t)launches[i].blocks, exec->stream, params);
    return status;
}

ROW_FUNCTIONS(cuda_bwd_sm80);

bool cuda_bwd_sm80_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
#define CHOOSE(tiles) choose_tile(tiles, COUNT(tiles), bwd_needs_logits(p), p, caps, NULL)
    const int32_t keys = CHOOSE(keys_tiles), rows = CHOOSE(rows_tiles), stats = CHOOSE(stats_tiles),
                  bias = CHOOSE(bias_tiles);
    int32_t sums = CHOOSE(sums_tiles);
#undef CHOOSE
    if (keys < 0 || rows < 0 || stats < 0 || bias < 0)
        return false;
    if (sums >= 0 &&
        (sums_tiles[sums].dim_qk != keys_tiles[keys].dim_qk || prepare_blocks(p) > INT32_MAX ||
         p->features & DLATTN_FEATURE_UNALIGNED || !sums_pay(p)))
        sums = -1;
    plan->variant = keys << KEYS_TILE | rows << ROWS_TILE | stats << STATS_TILE |
                    bias << BIAS_TILE | (sums + 1) << SUMS_TILE;
    plan->tile_q = rows_tiles[rows].rows;
    plan->tile_k = keys_tiles[keys].keys;
    const struct bwd_row row = row_of(plan, p);
    if (!bwd_plan(plan, p, &row))
        return false;
    const struct tile *const t = sums_tile(plan);
    if (t) {
        const struct parts parts = parts_of(p, t);
        plan->workspace_bytes = parts.rows + parts.facts + parts.sums;
    }
    return true;
}

int32_t cuda_bwd_sm80_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    const struct tile *const t = sums_tile(plan);
    if (t) {
        struct bwd_params params;
        bwd_fill(&params, p, plan->tile_q);
        if (suit_sums(&params))
            return launch_sums(p, exec, t, &params);
    }
    const struct bwd_row row = row_of(plan, p);
    return bwd_launch(plan, p, exec, &row);
}
