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

static bool needs_extras(const struct problem *p) {
    const uint64_t extras = DLATTN_FEATURE_SOFTCAP | DLATTN_FEATURE_BIAS | DLATTN_FEATURE_MASK |
                            DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_SEGMENTS |
                            DLATTN_FEATURE_BLOCK_MASK | DLATTN_FEATURE_DROPOUT;
    return p->features & extras || !(p->scale > 0);
}

/* Of stats, then of slope_sums. */
static int64_t stats_floats(const struct problem *p) { return 3 * p->heads_q * bwd_stats_rows(p); }
static int64_t row_blocks(const struct problem *p, int32_t rows) {
    return p->batch * p->heads_q * ceil_divide(p->len_q, rows);
}

/* A block for each part of the bias that has a gradient of its own. */
static int64_t bias_blocks(const struct problem *p) {
    const int64_t *const stride = p->d_bias.stride;
    return (stride[0] ? p->batch : 1) * (stride[1] ? p->heads_q : 1) *
           (stride[2] ? ceil_divide(p->len_q, BIAS_ROWS) : 1) *
           (stride[3] ? ceil_divide(p->len_k, BIAS_KEYS) : 1);
}

/* Blocks of each kernel. */
struct blocks {
    int64_t stats, keys, rows, bias, slopes;
};

static struct blocks blocks_of(const struct plan *plan, const struct problem *p) {
    return (struct blocks){
        .stats = row_blocks(p, BWD_STATS_ROWS),
        .keys = p->batch * p->heads_kv * ceil_divide(p->len_k, plan->tile_k),
        .rows = row_blocks(p, plan->tile_q),
        .bias = bias_blocks(p),
        .slopes = (p->d_alibi_slopes.stride[0] ? p->batch : 1) * p->heads_q,
    };
}

/* ---- The plan ----------------------------------------------------------------------------------------------------- */

/* A tile of each kind, in plan->variant. */
enum { KEYS_TILE = 0, ROWS_TILE = 8, STATS_TILE = 16, BIAS_TILE = 24 };

static const struct tile *tile_of(const struct plan *plan, const struct tile *tiles, int kind) {
    return &tiles[plan->variant >> kind & 127];
}

ROW_FUNCTIONS(cuda_bwd_sm80);

bool cuda_bwd_sm80_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
#define CHOOSE(tiles) choose_tile(tiles, COUNT(tiles), needs_extras(p), p, caps, NULL)
    const int32_t keys = CHOOSE(keys_tiles), rows = CHOOSE(rows_tiles), stats = CHOOSE(stats_tiles),
                  bias = CHOOSE(bias_tiles);
#undef CHOOSE
    if (keys < 0 || rows < 0 || stats < 0 || bias < 0)
        return false;
    plan->variant = keys << KEYS_TILE | rows << ROWS_TILE | stats << STATS_TILE | bias << BIAS_TILE;
    plan->tile_q = rows_tiles[rows].rows;
    plan->tile_k = keys_tiles[keys].keys;
    if (!bwd_fits(plan, p))
        return false;
    const struct blocks blocks = blocks_of(plan, p);
    if (blocks.keys > INT32_MAX || blocks.stats > INT32_MAX || blocks.bias > INT32_MAX) {
        plan->why = "it takes more blocks than a grid has; max_seqlen_q and max_seqlen_k, the "
                    "lengths of the longest sequences, make them fewer";
        return false;
    }
    plan->workspace_bytes = (size_t)(stats_floats(p) + blocks.rows) * sizeof(float);
    return true;
}

/* ---- The launch --------------------------------------------------------------------------------------------------- */

int32_t cuda_bwd_sm80_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    const struct blocks blocks = blocks_of(plan, p);
    struct bwd_params params;
    bwd_fill(&params, p, plan->tile_q);
    params.flags |= needs_extras(p) ? BWD_LOGITS : 0;
    params.key_blocks = (int32_t)ceil_divide(p->len_k, plan->tile_k);
    params.stats = exec->workspace;
    params.slope_sums = params.stats + stats_floats(p);
    const bool slopes = p->d_alibi_slopes.data != NULL;
#define KERNEL(kind, tiles) kernel_for(tile_of(plan, tiles, kind), p->dtype)
    const struct {
        bool wanted;
        struct cuda_kernel *kernel;
        int64_t blocks;
    } launches[] = {
        {true, KERNEL(STATS_TILE, stats_tiles), blocks.stats},
        {p->d_key.data || p->d_value.data, KERNEL(KEYS_TILE, keys_tiles), blocks.keys},
        {p->d_query.data || slopes, KERNEL(ROWS_TILE, rows_tiles), blocks.rows},
        {p->d_bias.data != NULL, KERNEL(BIAS_TILE, bias_tiles), blocks.bias},
        {p->d_sinks.data != NULL, &sinks_kernels[p->dtype == DTYPE_BF16], p->heads_q},
        {slopes, &slopes_kernel, blocks.slopes},
    };
#undef KERNEL
    int32_t status = DLATTN_OK;
    for (int32_t i = 0; i < COUNT(launches) && status == DLATTN_OK; i++)
        if (launches[i].wanted)
            status = cuda_launch(launches[i].kernel, p->device_id, (int32_t)launches[i].blocks,
                                 exec->stream, &params);
    return status;
}
