/* Gradients for f32 on tensor cores, three products in tf32 for one in f32. See docs/cuda-backward.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/simt/bwd_sizes.h"
#include "kernels/cuda/tf32x3/bwd_sizes.h"

extern const unsigned char cuda_bwd_tf32x3_image[];

static struct cuda_module module = {.image = cuda_bwd_tf32x3_image};

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

/* Of a tile of cuda_bwd_simt. */
enum { STATS, ROWS, BIAS, FINISH };
#define TILE(D, R, C)                                                                              \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = 8 * (R),                                                                              \
     .keys = 16 * (C),                                                                             \
     .kernels = (struct cuda_kernel[]){KERNEL("stats_" #D, 128, BWD_SHARED_BYTES(float, D, R, C)), \
                                       KERNEL("rows_" #D, 128, BWD_SHARED_BYTES(float, D, R, C)),  \
                                       KERNEL("bias_" #D, 128, BWD_SHARED_BYTES(float, D, R, C)),  \
                                       KERNEL("finish_" #D, FINISH_THREADS, 0)}},
static const struct tile simt_tiles[] = {
#include "kernels/cuda/simt/bwd_tiles.inc"
};
static struct cuda_kernel scan = KERNEL("scan", SCAN_THREADS, 0),
                          sinks = KERNEL("sinks", SUM_THREADS, SUM_SHARED_BYTES),
                          slopes = KERNEL("slopes", SUM_THREADS, SUM_SHARED_BYTES);

/* plan->variant: a tile of sums, and one of cuda_bwd_simt. */
enum { SIMT_TILE = 8 };

static const struct tile *simt_tile(const struct plan *plan) {
    return &simt_tiles[plan->variant >> SIMT_TILE];
}

static struct bwd_row row_of(const struct plan *plan, const struct problem *p) {
    const struct tile *const sums = &tiles[plan->variant & ((1 << SIMT_TILE) - 1)], *const simt =
                                                                                        simt_tile(
                                                                                            plan);
    return (struct bwd_row){
        .stats = &simt->kernels[STATS],
        .keys = &sums->kernels[bwd_needs_logits(p)],
        .rows = &simt->kernels[ROWS],
        .bias = &simt->kernels[BIAS],
        .sinks = &sinks,
        .slopes = &slopes,
        .stats_rows = simt->rows,
        .bias_rows = simt->rows,
        .bias_keys = simt->keys,
    };
}

/* ---- d_query in sums of integers ---- */

/* Of the workspace: statistics of rows, facts, sums. */
struct parts {
    size_t stats, facts, sums;
};

static struct parts parts_of(const struct plan *plan, const struct problem *p) {
    const size_t rows = (size_t)(p->heads_q * bwd_stats_rows(p));
    return (struct parts){rows * TF32X3_BWD_PLANES * sizeof(float),
                          (size_t)(p->batch * p->heads_kv) * SCAN_FACTS * sizeof(uint32_t),
                          rows * (size_t)simt_tile(plan)->dim_qk * sizeof(int64_t)};
}

static int64_t scan_blocks(const struct problem *p) {
    return p->batch * p->heads_kv * ceil_divide(p->len_k, SCAN_KEYS);
}

/* As has_sums() of the kernels. */
static bool has_sums(const struct problem *p) { return p->d_query.data && !p->d_alibi_slopes.data; }

/* Known to the launch alone: a plan may have no pointers. */
static int32_t launch_sums(const struct plan *plan, const struct problem *p,
                           const struct exec *exec, const struct bwd_row *row) {
    const struct parts parts = parts_of(plan, p);
    const int64_t heads = p->batch * p->heads_q;
    struct bwd_params params;
    bwd_fill(&params, p, plan->tile_q);
    params.key_blocks = (int32_t)ceil_divide(p->len_k, plan->tile_k);
    params.stats = exec->workspace;
    const struct {
        struct cuda_kernel *kernel;
        int64_t blocks; /* 0: not launched */
    } launches[] = {
        {&scan, scan_blocks(p)},
        {row->stats, heads * ceil_divide(p->len_q, row->stats_rows)},
        {row->keys, p->batch * p->heads_kv * params.key_blocks},
        {&simt_tile(plan)->kernels[FINISH], heads * ceil_divide(p->len_q, BWD_STATS_ROWS)},
        {row->rows, heads * ceil_divide(p->len_q, plan->tile_q)},
        {row->bias, p->d_bias.data ? bwd_bias_blocks(p, row) : 0},
        {row->sinks, p->d_sinks.data ? p->heads_q : 0},
    };
    int32_t status =
        cuda_clear((char *)exec->workspace + parts.stats, parts.facts + parts.sums, exec->stream);
    for (int32_t i = 0; i < COUNT(launches) && status == DLATTN_OK; i++)
        if (launches[i].blocks > 0)
            status = cuda_launch(launches[i].kernel, p->device_id, (int32_t)launches[i].blocks,
                                 exec->stream, &params);
    return status;
}

/* As cuda_fwd_tf32x3. */
static bool wanted(const struct problem *p, int32_t sm) {
    return p->kernel || sm == 80 || sm == 90 || sm == 100 || sm == 103;
}

ROW_FUNCTIONS(cuda_bwd_tf32x3);

bool cuda_bwd_tf32x3_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const int32_t sums = choose_tile(tiles, COUNT(tiles), false, p, caps, NULL),
                  simt = choose_tile(simt_tiles, COUNT(simt_tiles), false, p, caps, NULL);
    if (sums < 0 || simt < 0 || !wanted(p, caps->sm))
        return false;
    plan->variant = simt << SIMT_TILE | sums;
    plan->tile_q = simt_tiles[simt].rows;
    plan->tile_k = tiles[sums].keys;
    const struct bwd_row row = row_of(plan, p);
    if (!bwd_plan(plan, p, &row) || scan_blocks(p) > INT32_MAX)
        return false;
    const struct parts parts = parts_of(plan, p);
    const size_t bytes = parts.stats + parts.facts + parts.sums;
    plan->workspace_bytes = bytes > plan->workspace_bytes ? bytes : plan->workspace_bytes;
    return true;
}

int32_t cuda_bwd_tf32x3_launch(const struct plan *plan, const struct problem *p,
                               const struct exec *exec) {
    const struct bwd_row row = row_of(plan, p);
    return has_sums(p) ? launch_sums(plan, p, exec, &row) : bwd_launch(plan, p, exec, &row);
}
