/* Gradients for f32 on tensor cores, three products in tf32 for one in f32. See docs/cuda-backward.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/simt/bwd_sizes.h"
#include "kernels/cuda/tf32x3/bwd_sizes.h"

extern const struct cuda_image cuda_bwd_tf32x3_images[];

static struct cuda_module module = {.images = cuda_bwd_tf32x3_images};

#define KERNEL(name, threads, bytes) CUDA_KERNEL(module, "cuda_bwd_tf32x3_" name, threads, bytes)

/* Of a tile of sums, without and with options. */
#define TILE(D, WARPS, KEYS, ROWS, MINB)                                                           \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = ROWS,                                                                                 \
     .keys = KEYS,                                                                                 \
     .kernels = (struct cuda_kernel[]){OF_TILE("sums_" #D "_" #KEYS "_0", WARPS, D, KEYS, ROWS),   \
                                       OF_TILE("sums_" #D "_" #KEYS "_1", WARPS, D, KEYS, ROWS)}},
#define OF_TILE(name, WARPS, D, KEYS, ROWS)                                                        \
    KERNEL(name, (WARPS) * 32, TF32X3_BWD_SHARED_BYTES(D, KEYS, ROWS))
static const struct tile tiles[] = {
#include "kernels/cuda/tf32x3/bwd_tiles.inc"
};
#undef TILE
#undef OF_TILE

/* Of a tile of cuda_bwd_simt. */
enum { STATS, KEYS, ROWS, BIAS, FINISH };
#define OF_TILE(name, D, R, C) KERNEL(name #D, 128, BWD_SHARED_BYTES(float, D, R, C))
#define TILE(D, R, C)                                                                              \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = 8 * (R),                                                                              \
     .keys = 16 * (C),                                                                             \
     .kernels = (struct cuda_kernel[]){OF_TILE("stats_", D, R, C), OF_TILE("keys_", D, R, C),      \
                                       OF_TILE("rows_", D, R, C), OF_TILE("bias_", D, R, C),       \
                                       KERNEL("finish_" #D, FINISH_THREADS, 0)}},
static const struct tile simt_tiles[] = {
#include "kernels/cuda/simt/bwd_tiles.inc"
};
static struct cuda_kernel scan = KERNEL("scan", SCAN_THREADS, 0),
                          sinks = KERNEL("sinks", SUM_THREADS, SUM_SHARED_BYTES),
                          slopes = KERNEL("slopes", SUM_THREADS, SUM_SHARED_BYTES);

/* plan->variant: a tile of sums, and one of cuda_bwd_simt. */
enum { SIMT_TILE = 8 };

static const struct tile *sums_tile(const struct plan *plan) {
    return &tiles[plan->variant & ((1 << SIMT_TILE) - 1)];
}
static const struct tile *simt_tile(const struct plan *plan) {
    return &simt_tiles[plan->variant >> SIMT_TILE];
}

static struct bwd_row row_of(const struct plan *plan, const struct problem *p) {
    const struct tile *const simt = simt_tile(plan);
    return (struct bwd_row){
        .stats = &simt->kernels[STATS],
        .keys = &sums_tile(plan)->kernels[bwd_needs_logits(p)],
        .rows = &simt->kernels[ROWS],
        .bias = &simt->kernels[BIAS],
        .sinks = &sinks,
        .slopes = &slopes,
        .stats_rows = simt->rows,
        .bias_rows = simt->rows,
        .bias_keys = simt->keys,
    };
}

/* Of the workspace: statistics of rows, facts, and sums of queries or of slopes: where those are wanted, there are none of
 * queries. */
struct parts {
    size_t stats, facts, queries, slopes;
};

static struct parts parts_of(const struct plan *plan, const struct problem *p) {
    const size_t rows = (size_t)(p->heads_q * bwd_stats_rows(p));
    return (struct parts){rows * TF32X3_BWD_PLANES * sizeof(float),
                          (size_t)(p->batch * p->heads_kv) * SCAN_FACTS * sizeof(uint32_t),
                          rows * (size_t)sums_tile(plan)->dim_qk * sizeof(int64_t),
                          (size_t)blocks_of_rows(p, plan->tile_q) * sizeof(float)};
}

/* As cuda_fwd_tf32x3. */
static bool wanted(const struct problem *p, int32_t sm) {
    return p->kernel || sm == 80 || sm == 90 || sm == 100 || sm == 103;
}

ROW_FUNCTIONS(cuda_bwd_tf32x3);

/* Blocks of `rows` own tile_q rows, those of `sums` tile_k keys. */
bool cuda_bwd_tf32x3_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const int32_t sums = choose_tile(tiles, COUNT(tiles), false, p, caps, NULL),
                  simt = choose_tile(simt_tiles, COUNT(simt_tiles), false, p, caps, NULL);
    if (!wanted(p, caps->sm) || sums < 0 || simt < 0 ||
        tiles[sums].dim_qk != simt_tiles[simt].dim_qk)
        return false;
    plan->variant = simt << SIMT_TILE | sums;
    plan->tile_q = simt_tiles[simt].rows;
    plan->tile_k = tiles[sums].keys;
    const struct bwd_row row = row_of(plan, p);
    if (!bwd_plan(plan, p, &row) || blocks_of_keys(p, plan->tile_q) > INT32_MAX)
        return false;
    const struct parts parts = parts_of(plan, p);
    plan->workspace_bytes =
        parts.stats + parts.facts + (parts.queries > parts.slopes ? parts.queries : parts.slopes);
    return true;
}

int32_t cuda_bwd_tf32x3_launch(const struct plan *plan, const struct problem *p,
                               const struct exec *exec) {
    const struct bwd_row row = row_of(plan, p);
    const struct parts parts = parts_of(plan, p);
    const struct tile *const simt = simt_tile(plan);
    const bool keys = p->d_key.data || p->d_value.data, of_slopes = p->d_alibi_slopes.data != NULL,
               sums = p->d_query.data && !of_slopes;
    struct bwd_params params;
    bwd_fill(&params, p, plan->tile_q);
    params.key_blocks = (int32_t)ceil_divide(p->len_k, simt->rows);
    params.stats = exec->workspace;
    params.slope_sums = (char *)exec->workspace + parts.stats + parts.facts;
    const struct {
        bool wanted;
        struct cuda_kernel *kernel;
        int64_t blocks;
    } launches[] = {
        {true, &scan, blocks_of_keys(p, SCAN_KEYS)},
        {true, row.stats, blocks_of_rows(p, row.stats_rows)},
        {keys || sums, row.keys, blocks_of_keys(p, plan->tile_k)},
        {sums, &simt->kernels[FINISH], blocks_of_rows(p, BWD_STATS_ROWS)},
        {keys, &simt->kernels[KEYS], blocks_of_keys(p, simt->rows)},
        {p->d_query.data || of_slopes, row.rows, blocks_of_rows(p, plan->tile_q)},
        {p->d_bias.data != NULL, row.bias, bwd_bias_blocks(p, &row)},
        {p->d_sinks.data != NULL, &sinks, p->heads_q},
        {of_slopes, &slopes, bwd_slope_blocks(p)},
    };
    int32_t status = cuda_clear((char *)exec->workspace + parts.stats,
                                parts.facts + (sums ? parts.queries : 0), exec->stream);
    for (int32_t i = 0; i < COUNT(launches) && status == DLATTN_OK; i++)
        if (launches[i].wanted)
            status = cuda_launch(launches[i].kernel, p->device_id, (int32_t)launches[i].blocks,
                                 exec->stream, &params);
    return status;
}
