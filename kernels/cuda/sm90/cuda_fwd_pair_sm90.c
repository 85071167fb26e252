/* Few tiles on Hopper, f16 and bf16: cuda_fwd_sm90 with tiles of 64 rows, whose keys two warpgroups share. See docs/cuda-sm90.md. */
#include "kernels/cuda/sm90/walk.h"
#include "kernels/cuda/sm90/work.h"

#define MODULE(D)                                                                                  \
    extern const struct cuda_image cuda_fwd_pair_sm90_##D##_images[];                              \
    static struct cuda_module module_##D = {.images = cuda_fwd_pair_sm90_##D##_images};
MODULE(64)
MODULE(96)
MODULE(128)

/* Those of tiles.inc that have room for a bias, halved. */
enum { ROWS = 64 };
#define KERNEL(D, NAME, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)                                \
    CUDA_KERNEL(                                                                                   \
        module_##D, "cuda_fwd_pair_sm90_" NAME, 128 * ((WARPGROUPS) + 1),                          \
        SM90_SHARED_BYTES(D, DV, KEYS, WARPGROUPS, SM90_PAIR_STAGES(STAGES), QUERY_STAGES, 0))
#define TILE_MANY_ROWS(...)
#define TILE_ALONE(...)
#define TILE_ANY(...)
#define TILE_BIAS(D, DV, KEYS, ...)                                                                \
    {.dim_qk = D,                                                                                  \
     .dim_v = DV,                                                                                  \
     .rows = ROWS,                                                                                 \
     .keys = KEYS,                                                                                 \
     .kernels =                                                                                    \
         (struct cuda_kernel[]){KERNEL(D, #D "_" #DV "_" #KEYS "_f16", DV, KEYS, __VA_ARGS__),     \
                                KERNEL(D, #D "_" #DV "_" #KEYS "_bf16", DV, KEYS, __VA_ARGS__)}},
#define TILE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                                   \
    TILE_##USE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)
#define SM90_D 0
static const struct tile tiles[] = {
#include "kernels/cuda/sm90/tiles.inc"
};

/* The tile, -1: the problem is for others. Twice as many blocks are still an index. */
enum { MOST_TILES = 1 << 30 };
static int32_t chosen(const struct problem *p, const struct caps *caps) {
    return sm90_takes(p) && p->len_k > 0 && sm90_tiles(p, ROWS) <= MOST_TILES
               ? choose_tile(tiles, COUNT(tiles), false, p, caps, NULL)
               : -1;
}

/* Whether each tile has a multiprocessor of its own, or those that wait for one have so few keys, as under a causal mask, that all are done
 * sooner, by a sixteenth, than cuda_fwd_sm90 is with its longest. */
static bool is_soon(const struct problem *p, const struct tile *t, int32_t multiprocessors) {
    enum { MOST_ROUNDS = 4 };
    const int64_t all = sm90_tiles(p, t->rows);
    if (all <= multiprocessors)
        return true;
    if (p->window_right == UNBOUNDED || all > MOST_ROUNDS * multiprocessors ||
        !sm90_fills_tiles(p, t->rows, 2) || !sm90_has_whole_columns(p))
        return false;
    const struct work paired = sm90_work(p, t->rows, t->keys, t->dim_v),
                      whole = sm90_work(p, 2 * t->rows, t->keys, t->dim_v);
    return 17 * sm90_time_paired(&paired, multiprocessors) <
           16 * sm90_time_whole(&whole, multiprocessors);
}

/* Whether both warpgroups have keys, and there is more to do than cuda_decode_sm80 does in one or two tiles, in tiles not mostly empty
 * where keys are many. */
static bool suits(const struct problem *p, const struct tile *t, const struct caps *caps) {
    enum { DECODED_ROWS = 32, FEW_KEYS = 1024 };
    const int64_t rows_of_key = p->len_q * (p->heads_q / p->heads_kv);
    return p->len_k > t->keys && (p->len_k <= FEW_KEYS || sm90_fills_tiles(p, t->rows, 4)) &&
           rows_of_key > (p->len_k <= FEW_KEYS ? DECODED_ROWS : 2 * DECODED_ROWS) &&
           is_soon(p, t, caps->multiprocessors);
}

bool sm90_pairs(const struct problem *p, const struct caps *caps) {
    const uint64_t options = DLATTN_FEATURE_VARLEN | DLATTN_FEATURE_PAGED;
    const int32_t tile = chosen(p, caps);
    return tile >= 0 && !(p->features & options) && suits(p, &tiles[tile], caps);
}

ROW_FUNCTIONS(cuda_fwd_pair_sm90);

bool cuda_fwd_pair_sm90_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    plan->variant = chosen(p, caps);
    if (plan->variant < 0 || (!p->kernel && !suits(p, &tiles[plan->variant], caps)))
        return false;
    sm90_plan_tile(plan, p, caps, &tiles[plan->variant]);
    plan->blocks = (int32_t)sm90_tiles(p, plan->tile_q);
    if (plan->blocks <= caps->multiprocessors)
        sm90_plan_walk(plan, p);
    else
        sm90_plan_longest_first(plan, p);
    return true;
}

int32_t cuda_fwd_pair_sm90_launch(const struct plan *plan, const struct problem *p,
                                  const struct exec *exec) {
    struct sm90_params params;
    const int32_t status = sm90_fill(&params, p, plan, exec->workspace);
    if (status != DLATTN_OK)
        return status;
    sm90_fill_walk(&params, p, plan);
    return cuda_launch(kernel_for(&tiles[plan->variant], p->dtype), p->device_id, plan->blocks,
                       exec->stream, &params);
}
