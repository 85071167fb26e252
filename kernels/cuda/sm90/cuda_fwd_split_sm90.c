/* Few query rows over many keys on Hopper, f16 and bf16: cuda_fwd_sm90 on parts of the keys. See docs/cuda-sm90.md. */
#include "kernels/cuda/sm90/work.h"

#define MODULE(D)                                                                                  \
    extern const struct cuda_image cuda_fwd_split_sm90_##D##_images[];                             \
    static struct cuda_module module_##D = {.images = cuda_fwd_split_sm90_##D##_images};
MODULE(64)
MODULE(96)
MODULE(128)
MODULE(192)
MODULE(256)

/* For both element types what computes parts, then what merges them; up to D 128 also what computes parts of pages of few keys. */
enum { MERGES = 2, BY_ROWS = 4 };
#define NAME(D, DV, KEYS, WARPGROUPS) "cuda_fwd_split_sm90_" #D "_" #DV "_" #KEYS "_" #WARPGROUPS
#define PARTS(D, NAME, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)                                 \
    CUDA_KERNEL(module_##D, NAME, 128 * ((WARPGROUPS) + 1),                                        \
                SM90_SHARED_BYTES(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, 1))
#define MERGED(D, NAME, OF, DV, ...)                                                               \
    PARTS(D, NAME "_f16" OF, DV, __VA_ARGS__), PARTS(D, NAME "_bf16" OF, DV, __VA_ARGS__),         \
        CUDA_KERNEL(module_##D, NAME "_f16" OF "_merge", 4 * (DV), 0),                             \
        CUDA_KERNEL(module_##D, NAME "_bf16" OF "_merge", 4 * (DV), 0)
#define TILE_OF(D, DV, ROWS, KEYS, ...)                                                            \
    {.dim_qk = D,                                                                                  \
     .dim_v = DV,                                                                                  \
     .rows = ROWS,                                                                                 \
     .keys = KEYS,                                                                                 \
     .kernels = (struct cuda_kernel[]){__VA_ARGS__}},
#define TILE_MANY_ROWS(...)
#define TILE_ALONE(...)
#define TILE_ANY(D, NAME, DV, KEYS, WARPGROUPS, ...)                                               \
    TILE_OF(D, DV, 64 * (WARPGROUPS), KEYS, MERGED(D, NAME, "", DV, KEYS, WARPGROUPS, __VA_ARGS__))
#define TILE_BIAS(D, NAME, DV, KEYS, WARPGROUPS, ...)                                              \
    TILE_OF(D, DV, 64 * (WARPGROUPS), KEYS,                                                        \
            MERGED(D, NAME, "", DV, KEYS, WARPGROUPS, __VA_ARGS__),                                \
            PARTS(D, NAME "_f16_rows", DV, KEYS, WARPGROUPS, __VA_ARGS__),                         \
            PARTS(D, NAME "_bf16_rows", DV, KEYS, WARPGROUPS, __VA_ARGS__))                        \
    PAIR_##D(D, NAME, DV, KEYS, WARPGROUPS, __VA_ARGS__)
/* Rows that are no whole columns are not for pairs, see sm90_has_whole_columns(). */
#define PAIR_64 PAIR
#define PAIR_96(...)
#define PAIR_128 PAIR
#define PAIR(D, NAME, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)                                  \
    TILE_OF(                                                                                       \
        D, DV, 64, KEYS,                                                                           \
        MERGED(D, NAME, "_pair", DV, KEYS, WARPGROUPS, SM90_PAIR_STAGES(STAGES), QUERY_STAGES))
#define TILE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                                   \
    TILE_##USE(D, NAME(D, DV, KEYS, WARPGROUPS), DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)
#define SM90_D 0
static const struct tile tiles[] = {
#include "kernels/cuda/sm90/tiles.inc"
};

/* Whether two warpgroups share its rows. */
static bool is_paired(const struct tile *t) { return t->rows == 64; }

/* Without parts. Where pairs wait for each other parts of uneven tiles take two thirds of what they are said to. */
static int64_t time_of_others(const struct problem *p, const struct tile *t,
                              const struct caps *caps) {
    const struct work of_tile = sm90_work(p, t->rows, t->keys, t->dim_v);
    const int64_t whole = sm90_time_whole(&of_tile, caps->multiprocessors);
    if (!sm90_pairs(p, caps))
        return whole;
    const struct work of_half = sm90_work(p, t->rows / 2, t->keys, t->dim_v);
    const int64_t paired = sm90_time_paired(&of_half, caps->multiprocessors);
    if (sm90_tiles(p, t->rows / 2) <= caps->multiprocessors)
        return paired;
    return paired * 3 / 2 < whole ? paired * 3 / 2 : whole;
}

/* What takes the least time so far; one part: that of others. */
struct choice {
    int32_t variant;
    int64_t parts, time;
};

/* Parts that fill one round of the grid or more, or quarters of one; pairs have one round. */
enum { MOST_ROUNDS = 8 };
static void look_for_parts(struct choice *best, int32_t variant, const struct problem *p,
                           int32_t blocks) {
    static const int8_t quarters[] = {4, 3, 2, 1, 8, 12, 16, 20, 24, 28, 4 * MOST_ROUNDS};
    const struct tile *const t = &tiles[variant];
    const struct work w = sm90_work(p, t->rows, t->keys, t->dim_v);
    const int64_t most = w.most < SM90_MOST_PARTS ? w.most : SM90_MOST_PARTS;
    for (int32_t i = 0; i < (is_paired(t) ? 4 : COUNT(quarters)); i++) {
        const int64_t wanted = quarters[i] * blocks / w.tiles / 4,
                      parts = wanted < most ? wanted : most;
        if (parts < 2)
            continue;
        const int64_t time =
            is_paired(t) ? sm90_time_split_paired(&w, parts) : sm90_time_split(&w, parts, blocks);
        if (time < best->time)
            *best = (struct choice){variant, parts, time};
    }
}

ROW_FUNCTIONS(cuda_fwd_split_sm90);

/* Whether there are keys to split, more rows than cuda_decode_sm80 has in a tile, or two, or as many over many keys, and tiles not
 * mostly empty: half full where cuda_decode_sm80 has no more than two. */
static bool suits(const struct problem *p, const struct tile *t) {
    enum { LEAST_STEPS = 8, DECODED_ROWS = 32, MANY_KEYS = 65536 };
    const int64_t rows_of_key = p->len_q * (p->heads_q / p->heads_kv);
    return p->len_k >= (int64_t)LEAST_STEPS * t->keys &&
           (is_paired(t) ? rows_of_key > DECODED_ROWS
                         : rows_of_key >= 2 * DECODED_ROWS + (p->len_k < MANY_KEYS)) &&
           sm90_fills_tiles(p, t->rows, rows_of_key <= 2 * DECODED_ROWS ? 2 : 4);
}

/* Whether a pair's tile stands behind the one for the head dims, is made for the problem, and two parts of each have a multiprocessor each. */
static bool has_pair(const struct problem *p, int32_t variant, const struct caps *caps) {
    const struct tile *const t = &tiles[variant + 1];
    return variant + 1 < COUNT(tiles) && is_paired(t) && sm90_has_whole_columns(p) &&
           !sm90_copies_rows(p) && t->kernels[0].shared_memory_bytes <= caps->shared_memory_bytes &&
           2 * sm90_rows(p, t->rows).tiles <= caps->multiprocessors;
}

/* If a row is named, two parts at least where there are two key tiles. */
static bool choose(struct choice *best, const struct problem *p, int32_t variant,
                   const struct caps *caps) {
    const bool pairs = has_pair(p, variant, caps);
    const int32_t pair = variant + pairs;
    const bool wide_suits = p->kernel || suits(p, &tiles[variant]),
               pair_suits = pairs && (p->kernel || suits(p, &tiles[pair]));
    if (!wide_suits && !pair_suits)
        return false;
    *best = (struct choice){variant, 1, time_of_others(p, &tiles[variant], caps)};
    if (wide_suits)
        look_for_parts(best, variant, p, caps->multiprocessors);
    if (pair_suits)
        look_for_parts(best, pair, p, caps->multiprocessors);
    if (best->parts == 1 && p->kernel) {
        best->variant = pair;
        best->parts = p->len_k > tiles[pair].keys ? 2 : 1;
    }
    return best->parts > 1 || p->kernel;
}

bool cuda_fwd_split_sm90_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const int32_t widest = choose_tile(tiles, COUNT(tiles), false, p, caps, NULL),
                  blocks = caps->multiprocessors;
    struct choice chosen;
    if (widest < 0 || !sm90_takes(p) ||
        sm90_rows(p, tiles[widest].rows).tiles > (int64_t)MOST_ROUNDS * blocks ||
        !choose(&chosen, p, widest, caps))
        return false;
    const struct tile *const t = &tiles[chosen.variant];
    const int64_t all = sm90_rows(p, t->rows).tiles * chosen.parts;
    plan->variant = chosen.variant;
    plan->tile_q = t->rows;
    plan->tile_k = t->keys;
    plan->splits = (int32_t)chosen.parts;
    plan->blocks = (int32_t)(all < blocks ? all : blocks);
    plan->workspace_bytes = (size_t)(all * t->rows * (t->dim_v + 2)) * 4;
    return true;
}

static void fill_split(struct sm90_params *params, const struct problem *p, const struct plan *plan,
                       const struct tile *t, float *workspace) {
    const struct rows rows = sm90_rows(p, t->rows);
    const int64_t all = rows.tiles * plan->splits;
    params->list = NULL;
    params->tiles_per_head = (int32_t)rows.per_head;
    params->tiles = (int32_t)rows.tiles;
    struct sm90_split *const s = &params->split;
    s->parts = plan->splits;
    s->team_rows = all <= plan->blocks ? params->tiles_per_head : 1;
    s->team_tiles = s->team_rows * params->heads_per_kv;
    s->heads_kv = (int32_t)p->heads_kv;
    s->key_heads = (int32_t)(p->batch * p->heads_kv);
    s->by_parts = divisor(s->parts);
    s->by_team_tiles = divisor(s->team_tiles);
    s->by_key_heads = divisor(s->key_heads);
    s->by_heads_kv = divisor(s->heads_kv);
    s->outputs = workspace;
    s->sums = workspace + all * t->rows * t->dim_v;
}

int32_t cuda_fwd_split_sm90_launch(const struct plan *plan, const struct problem *p,
                                   const struct exec *exec) {
    const struct tile *const t = &tiles[plan->variant];
    struct cuda_kernel *const kernels = kernel_for(t, p->dtype);
    struct sm90_params params;
    int32_t status = sm90_fill(&params, p, plan, exec->workspace);
    if (status != DLATTN_OK)
        return status;
    fill_split(&params, p, plan, t, exec->workspace);
    status = cuda_launch(&kernels[sm90_copies_rows(p) ? BY_ROWS : 0], p->device_id, plan->blocks,
                         exec->stream, &params);
    if (status != DLATTN_OK)
        return status;
    const int32_t strips = t->rows / 16;
    return cuda_launch_early(&kernels[MERGES], p->device_id, params.tiles * strips, exec->stream,
                             &params);
}
