/* Gradients for f16 and bf16 on the tensor cores of any GPU since Ampere. See docs/cuda-backward.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/sm80/bwd_sizes.h"
#include "src/cuda_driver.h"

extern const unsigned char cuda_bwd_sm80_image[];

static struct cuda_module module = {.image = cuda_bwd_sm80_image};

#define INSTANCE(instance, block_threads, bytes)                                                   \
    {.module = &module,                                                                            \
     .name = "cuda_bwd_sm80_" instance,                                                            \
     .threads = (block_threads),                                                                   \
     .shared_memory_bytes = (bytes)}

/* One compiled tile of a kernel, for both element types. `own`: rows or keys of a block. */
struct tile {
    int32_t dim, own;
    bool extras;
    struct cuda_kernel f16, bf16;
};

#define TILE(name, D, OWN, EXTRAS, threads, bytes)                                                 \
    {D, OWN, EXTRAS, INSTANCE("f16_" name, threads, bytes), INSTANCE("bf16_" name, threads, bytes)},

#define KEYS(D, WARPS, MT, BM, MINB, EXTRAS)                                                       \
    TILE("keys_" #D "_" #WARPS "_" #MT "_" #BM "_" #EXTRAS, D, (WARPS) * (MT) * 8, EXTRAS,         \
         (WARPS) * 32, KEYS_SHARED_BYTES(D, WARPS, MT, BM))
static struct tile keys_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef KEYS

#define ROWS(D, WARPS, MT, BN, MINB, EXTRAS)                                                       \
    TILE("rows_" #D "_" #WARPS "_" #MT "_" #BN "_" #EXTRAS, D, (WARPS) * (MT) * 16, EXTRAS,        \
         (WARPS) * 32, ROWS_SHARED_BYTES(D, WARPS, MT, BN))
static struct tile rows_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef ROWS

#define STATS(D, EXTRAS)                                                                           \
    TILE("stats_" #D "_" #EXTRAS, D, BWD_STATS_ROWS, EXTRAS, STATS_THREADS, STATS_SHARED_BYTES(D))
static struct tile stats_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef STATS

#define BIAS(D) TILE("bias_" #D, D, BIAS_ROWS, true, BIAS_THREADS, BIAS_SHARED_BYTES(D))
static struct tile bias_tiles[] = {
#include "kernels/cuda/sm80/bwd_tiles.inc"
};
#undef BIAS

static struct tile sinks_tiles[] = {TILE("sinks", 256, 1, true, SUM_THREADS, SUM_SHARED_BYTES)};
static struct cuda_kernel slopes_kernel = INSTANCE("slopes", SUM_THREADS, SUM_SHARED_BYTES);

#define COUNT(tiles) ((int32_t)(sizeof(tiles) / sizeof((tiles)[0])))

static bool needs_extras(const struct problem *p) {
    const uint64_t extras = DLATTN_FEATURE_SOFTCAP | DLATTN_FEATURE_BIAS | DLATTN_FEATURE_MASK |
                            DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_SEGMENTS |
                            DLATTN_FEATURE_BLOCK_MASK | DLATTN_FEATURE_DROPOUT;
    return p->features & extras || !(p->scale > 0);
}

/* The first that covers the problem on a GPU with so much shared memory; `count` if none does. */
static int32_t choose(const struct tile *tiles, int32_t count, const struct problem *p,
                      int64_t shared_memory_bytes) {
    int32_t i = 0;
    while (i < count && (tiles[i].dim < p->dim_qk || tiles[i].dim < p->dim_v ||
                         tiles[i].extras != needs_extras(p) ||
                         tiles[i].f16.shared_memory_bytes > shared_memory_bytes))
        i++;
    return i;
}

static int32_t run(struct tile *tile, const struct problem *p, const struct exec *exec,
                   int64_t blocks, struct bwd_params *params) {
    return cuda_launch(p->dtype == DTYPE_F16 ? &tile->f16 : &tile->bf16, p->device_id, blocks,
                       exec->stream, params);
}

/* Of stats, then of slope_sums. */
static int64_t stats_floats(const struct problem *p) { return 3 * p->heads_q * bwd_stats_rows(p); }
static int64_t row_blocks(const struct problem *p, int32_t rows) {
    return p->batch * p->heads_q * ((p->len_q + rows - 1) / rows);
}
static int64_t key_blocks(const struct problem *p, int32_t keys) {
    return (p->len_k + keys - 1) / keys;
}

/* A block for each part of the bias that has a gradient of its own. */
static int64_t bias_blocks(const struct problem *p) {
    const int64_t *const stride = p->d_bias.stride;
    return (stride[0] ? p->batch : 1) * (stride[1] ? p->heads_q : 1) *
           (stride[2] ? (p->len_q + BIAS_ROWS - 1) / BIAS_ROWS : 1) *
           (stride[3] ? (p->len_k + BIAS_KEYS - 1) / BIAS_KEYS : 1);
}

ROW_FUNCTIONS(cuda_bwd_sm80);

bool cuda_bwd_sm80_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const int32_t keys = choose(keys_tiles, COUNT(keys_tiles), p, caps->shared_memory_bytes),
                  rows = choose(rows_tiles, COUNT(rows_tiles), p, caps->shared_memory_bytes);
    if (keys == COUNT(keys_tiles) || rows == COUNT(rows_tiles))
        return false;
    plan->variant = keys << 8 | rows;
    plan->tile_q = rows_tiles[rows].own;
    plan->tile_k = keys_tiles[keys].own;
    if (!bwd_fits(plan, p))
        return false;
    if (key_blocks(p, plan->tile_k) * p->heads_kv * p->batch > INT32_MAX ||
        row_blocks(p, BWD_STATS_ROWS) > INT32_MAX || bias_blocks(p) > INT32_MAX) {
        plan->why = "it takes more blocks than a grid has; max_seqlen_q and max_seqlen_k, the "
                    "lengths of the longest sequences, make them fewer";
        return false;
    }
    plan->workspace_bytes = (size_t)(stats_floats(p) + row_blocks(p, plan->tile_q)) * sizeof(float);
    return true;
}

int32_t cuda_bwd_sm80_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    struct tile *const keys = &keys_tiles[plan->variant >> 8], *const rows =
                                                                   &rows_tiles[plan->variant & 255];
    struct bwd_params params;
    int64_t blocks;
    bwd_fill(&params, p, plan->tile_q, &blocks);
    params.flags |= needs_extras(p) ? BWD_LOGITS : 0;
    params.key_blocks = (int32_t)key_blocks(p, plan->tile_k);
    params.stats = exec->workspace;
    params.slope_sums = params.stats + stats_floats(p);
    const bool slopes = p->d_alibi_slopes.data != NULL;
    const struct {
        struct tile *tile;
        int64_t blocks;
        bool wanted;
    } launches[] = {
        {&stats_tiles[choose(stats_tiles, COUNT(stats_tiles), p, INT64_MAX)],
         row_blocks(p, BWD_STATS_ROWS), true},
        {keys, params.key_blocks * p->heads_kv * p->batch, p->d_key.data || p->d_value.data},
        {rows, blocks, p->d_query.data || slopes},
        {&bias_tiles[p->d_bias.data ? choose(bias_tiles, COUNT(bias_tiles), p, INT64_MAX) : 0],
         bias_blocks(p), p->d_bias.data != NULL},
        {sinks_tiles, p->heads_q, p->d_sinks.data != NULL},
    };
    for (int32_t i = 0; i < COUNT(launches); i++) {
        const int32_t status = launches[i].wanted
                                   ? run(launches[i].tile, p, exec, launches[i].blocks, &params)
                                   : DLATTN_OK;
        if (status != DLATTN_OK)
            return status;
    }
    if (!slopes)
        return DLATTN_OK;
    return cuda_launch(&slopes_kernel, p->device_id,
                       (p->d_alibi_slopes.stride[0] ? p->batch : 1) * p->heads_q, exec->stream,
                       &params);
}
