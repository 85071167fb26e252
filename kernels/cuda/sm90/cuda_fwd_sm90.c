/* Forward attention for f16 and bf16 on Hopper: TMA, wgmma, warp specialisation. See docs/cuda-sm90.md. */
#include "kernels/cuda/sm90/host.h"

#include <math.h>

/* One image for each head dim. */
#define MODULE(D)                                                                                  \
    extern const unsigned char cuda_fwd_sm90_##D##_image[];                                        \
    static struct cuda_module module_##D = {.image = cuda_fwd_sm90_##D##_image};
MODULE(64)
MODULE(96)
MODULE(128)
MODULE(192)
MODULE(256)

/* A kernel for each element type without softcap, then the same with it. */
#define KERNELS(D, NAME, WARPGROUPS, BYTES)                                                        \
    (struct cuda_kernel[]) {                                                                       \
        KERNEL(D, NAME "_f16", WARPGROUPS, BYTES), KERNEL(D, NAME "_bf16", WARPGROUPS, BYTES),     \
            KERNEL(D, NAME "_f16_softcap", WARPGROUPS, BYTES),                                     \
            KERNEL(D, NAME "_bf16_softcap", WARPGROUPS, BYTES)                                     \
    }
#define KERNEL(D, NAME, WARPGROUPS, BYTES)                                                         \
    CUDA_KERNEL(module_##D, "cuda_fwd_sm90_" NAME, 128 * ((WARPGROUPS) + 1), BYTES)
#define TILE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, ...)                                   \
    {.dim_qk = D,                                                                                  \
     .dim_v = DV,                                                                                  \
     .rows = 64 * (WARPGROUPS),                                                                    \
     .keys = KEYS,                                                                                 \
     .kernels = KERNELS(D, #D "_" #DV "_" #KEYS "_" #WARPGROUPS, WARPGROUPS,                       \
                        SM90_SHARED_BYTES(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES))},
#define SM90_D 0
static const struct tile tiles[] = {
#include "kernels/cuda/sm90/tiles.inc"
};

static bool bounded(const struct problem *p) {
    return p->window_left != UNBOUNDED || p->window_right != UNBOUNDED;
}

/* Query heads of a group that share a tile, as a power of two: as many as make fewer tiles, at most the 64 rows of a
 * warpgroup. */
enum { MOST_PACK_LOG2 = 6, MOST_PACK = 1 << MOST_PACK_LOG2 };
static int32_t pack_log2(const struct problem *p, int32_t tile_q) {
    const int64_t group = p->heads_q / p->heads_kv;
    int32_t best = 0;
    for (int32_t log2 = 1; log2 <= MOST_PACK_LOG2 && group % (1 << log2) == 0; log2++) {
        if (ceil_divide(p->len_q << log2, tile_q) < ceil_divide(p->len_q << best, tile_q)
                                                        << (log2 - best))
            best = log2;
    }
    return best;
}

/* Query rows of the multiprocessor that has most of them. */
static int64_t busiest_rows(const struct problem *p, int32_t tile_q, int32_t multiprocessors) {
    const int32_t log2 = pack_log2(p, tile_q);
    const int64_t heads = p->batch * (p->heads_q >> log2);
    return ceil_divide(ceil_divide(p->len_q << log2, tile_q) * heads, multiprocessors) * tile_q;
}

/* Tiles of three warpgroups take a sixth less time for a row than tiles of two, but need more rows to fill the
 * multiprocessors, and lose with short keys and a causal mask or window, where they multiply more that is hidden. */
static bool has_many_rows(const struct problem *p, const struct caps *caps) {
    if (bounded(p) && p->len_k <= 1024)
        return false;
    return 5 * busiest_rows(p, 192, caps->multiprocessors) <
           6 * busiest_rows(p, 128, caps->multiprocessors);
}

static bool suits(const struct tile *t, const struct problem *p, const struct caps *caps) {
    return t->rows <= 128 || has_many_rows(p, caps);
}

/* The rows of all tiles, as the blocks take them. */
static int64_t tiles_of(const struct problem *p, int32_t tile_q) {
    const int32_t log2 = pack_log2(p, tile_q);
    return ceil_divide(p->len_q << log2, tile_q) * p->batch * (p->heads_q >> log2);
}

ROW_FUNCTIONS(cuda_fwd_sm90);

bool cuda_fwd_sm90_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    if (!(p->scale > 0) || p->dim_v % 8 != 0 || p->len_k == 0 || p->len_k > SM90_MAX_LENGTH ||
        p->len_q * (p->heads_q / p->heads_kv) > SM90_MAX_LENGTH ||
        ceil_divide(p->len_q, 64) * p->heads_q * p->batch > INT32_MAX ||
        !mappable(&p->query, p->batch, p->heads_q, p->len_q, MOST_PACK) ||
        !mappable(&p->key, p->batch, p->heads_kv, p->len_k, 1) ||
        !mappable(&p->value, p->batch, p->heads_kv, p->len_k, 1) ||
        !mappable(&p->output, p->batch, p->heads_q, p->len_q, MOST_PACK))
        return false;
    const int32_t chosen = choose_tile(tiles, COUNT(tiles), false, p, caps, suits);
    if (chosen < 0)
        return false;
    const int64_t all = tiles_of(p, tiles[chosen].rows);
    plan->variant = chosen;
    plan->tile_q = tiles[chosen].rows;
    plan->tile_k = tiles[chosen].keys;
    plan->blocks = all < caps->multiprocessors ? (int32_t)all : caps->multiprocessors;
    return true;
}

/* ---- The tiles ------------------------------------------------------------------------------------------------ */

static struct sm90_divisor divisor(int64_t d) {
    struct sm90_divisor r = {0, 0};
    if (d > 1) {
        r.shift = 31u - (uint32_t)__builtin_clz((uint32_t)d - 1);
        r.multiplier =
            (uint32_t)(((UINT64_C(1) << (32 + r.shift)) + (uint64_t)d - 1) / (uint64_t)d);
    }
    return r;
}

/* With a bounded window the heads of a group have at most one tile for each block of the grid, see tile_at(): what the
 * blocks work on at one time then spans few heads, whose keys and values stay in L2; and whole batches where it can, whose
 * heads lie side by side in device memory. Other masks take head by head. */
static int64_t heads_per_group(const struct problem *p, const struct sm90_params *params,
                               int32_t blocks) {
    int64_t heads = bounded(p) ? blocks / params->tiles_per_head : 1;
    if (heads > params->heads)
        heads -= heads % params->heads;
    return heads < 1 ? 1 : heads < params->heads_total ? heads : params->heads_total;
}

static void fill_tiles(struct sm90_params *params, const struct problem *p,
                       const struct plan *plan) {
    const int32_t log2 = pack_log2(p, plan->tile_q), pack = 1 << log2;
    params->pack_log2 = log2;
    params->heads = (int32_t)(p->heads_q / pack);
    params->heads_per_kv = (int32_t)(p->heads_q / p->heads_kv / pack);
    params->tiles_per_head = (int32_t)ceil_divide(p->len_q * pack, plan->tile_q);
    params->heads_total = (int32_t)(p->batch * params->heads);
    params->tiles = params->tiles_per_head * params->heads_total;
    params->heads_per_group = (int32_t)heads_per_group(p, params, plan->blocks);
    params->groups = (int32_t)ceil_divide(params->heads_total, params->heads_per_group);
    params->by_tiles_per_head = divisor(params->tiles_per_head);
    params->by_group_tiles = divisor((int64_t)params->heads_per_group * params->tiles_per_head);
    params->by_group_heads = divisor(params->heads_per_group);
    params->by_last_group_heads =
        divisor(params->heads_total - (params->groups - 1) * params->heads_per_group);
    params->by_heads = divisor(params->heads);
    params->by_heads_per_kv = divisor(params->heads_per_kv);
}

/* ---- The tensors ---------------------------------------------------------------------------------------------- */

/* Q or O as [D, pack, Lq, H / pack, B], the query heads of one tile being neighbours, in boxes of `rows` rows. */
static int32_t map_rows(struct cuda_tensor_map *map, const struct problem *p,
                        const struct sm90_params *params, const struct view *v, int64_t dim,
                        int64_t rows) {
    const int64_t pack = INT64_C(1) << params->pack_log2;
    const int64_t heads = pack < rows ? pack : rows;
    const int64_t *s = v->stride;
    const uint64_t extent[] = {(uint64_t)dim, (uint64_t)pack, (uint64_t)p->len_q,
                               (uint64_t)params->heads, (uint64_t)p->batch};
    const uint64_t stride[] = {step(s[1]), step(s[2]), step(s[1] * pack), step(s[0])};
    const uint32_t box[] = {64, (uint32_t)heads, (uint32_t)(rows / heads), 1, 1};
    return cuda_tensor_map(map, p->dtype, v->data, 5, extent, stride, box, 128);
}

static int32_t map_keys(struct cuda_tensor_map *map, const struct problem *p, const struct view *v,
                        int64_t dim, int32_t tile_k) {
    const uint64_t extent[] = {(uint64_t)dim, (uint64_t)p->len_k, (uint64_t)p->heads_kv,
                               (uint64_t)p->batch};
    const uint64_t stride[] = {step(v->stride[2]), step(v->stride[1]), step(v->stride[0])};
    const uint32_t box[] = {64, (uint32_t)tile_k, 1, 1};
    return cuda_tensor_map(map, p->dtype, v->data, 4, extent, stride, box, 128);
}

static void fill_problem(struct sm90_params *params, const struct problem *p) {
    const double log2_e = 1.4426950408889634;
    *params = (struct sm90_params){
        .output = p->output.data,
        .lse = p->lse.data,
        .query_lengths = p->query_lengths.data,
        .key_lengths = p->key_lengths.data,
        .output_strides = strides(&p->output),
        .lse_strides = strides(&p->lse),
        .query = p->query.data,
        .key = p->key.data,
        .value = p->value.data,
        .query_strides = strides(&p->query),
        .key_strides = strides(&p->key),
        .value_strides = strides(&p->value),
        .len_q = (int32_t)p->len_q,
        .len_k = (int32_t)p->len_k,
        .dim_qk = (int32_t)p->dim_qk,
        .dim_v = (int32_t)p->dim_v,
        .window_left = window(p->window_left),
        .window_right = window(p->window_right),
        .query_lengths_stride = p->query_lengths.stride[0],
        .key_lengths_stride = p->key_lengths.stride[0],
        .bottom_right = p->bottom_right,
        .lse_is_element = p->lse.dtype != DTYPE_F32,
        .empty_lse = p->empty_lse_inf ? INFINITY : -INFINITY,
        .scale = (float)p->scale,
        .scale_log2 = (float)((p->softcap > 0 ? 1 : p->scale) * log2_e),
        .softcap = (float)p->softcap,
    };
}

static int32_t fill_maps(struct sm90_params *params, const struct problem *p, int32_t tile_k) {
    int32_t status = map_rows(&params->query_map, p, params, &p->query, p->dim_qk, 64);
    if (status == DLATTN_OK)
        status = map_rows(&params->output_map, p, params, &p->output, p->dim_v, 16);
    if (status == DLATTN_OK)
        status = map_keys(&params->key_map, p, &p->key, p->dim_qk, tile_k);
    if (status == DLATTN_OK)
        status = map_keys(&params->value_map, p, &p->value, p->dim_v, tile_k);
    return status;
}

int32_t cuda_fwd_sm90_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    struct sm90_params params;
    fill_problem(&params, p);
    fill_tiles(&params, p, plan);
    const int32_t status = fill_maps(&params, p, plan->tile_k);
    if (status != DLATTN_OK)
        return status;
    struct cuda_kernel *const kernel = kernel_for(&tiles[plan->variant], p->dtype);
    return cuda_launch(kernel + 2 * (p->softcap > 0), p->device_id, plan->blocks, exec->stream,
                       &params);
}
