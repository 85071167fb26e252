#include "kernels/cuda/sm90/walk.h"

struct walk {
    int32_t blocks, tiles_per_head;
    int32_t heads, heads_of_batch; /* that have tiles of their own */
    int32_t tile_cost;             /* as much as so many tiles of rows of keys */
};

static int32_t heads_of(const struct rows *r) { return (int32_t)(r->tiles / r->per_head); }

static struct walk walk_of(const struct problem *p, int32_t tile_q, int32_t blocks) {
    enum { BESIDES_KEYS = 2 };
    const struct rows r = sm90_rows(p, tile_q);
    const int64_t later = p->bottom_right && p->len_k > p->len_q ? p->len_k - p->len_q : 0;
    return (struct walk){
        .blocks = blocks,
        .tiles_per_head = (int32_t)r.per_head,
        .heads = heads_of(&r),
        .heads_of_batch = (int32_t)(p->heads_q >> r.pack_log2),
        .tile_cost = (BESIDES_KEYS << r.pack_log2) + (int32_t)((later << r.pack_log2) / tile_q),
    };
}

/* The heads of a group have at most one tile for each block of the grid, see place(): what the blocks work on at one time then
 * spans few heads, whose keys and values stay in L2; and whole batches where it can, whose heads lie side by side in device
 * memory. */
static int32_t heads_at_one_time(const struct walk *w) {
    int32_t heads = w->blocks / w->tiles_per_head;
    if (heads > w->heads_of_batch)
        heads -= heads % w->heads_of_batch;
    return heads < 1 ? 1 : heads < w->heads ? heads : w->heads;
}

/* What the busiest block has to do under a causal mask, in tiles of rows of keys: place() for every eleventh block. */
static int64_t busiest(const struct walk *w, int32_t heads_per_group) {
    enum { LOOKED_AT = 11 };
    const int32_t group_tiles = heads_per_group * w->tiles_per_head,
                  groups = (int32_t)ceil_divide(w->heads, heads_per_group);
    int64_t most = 0;
    for (int32_t block = 0; block < w->blocks; block += LOOKED_AT) {
        int64_t work = 0;
        for (int32_t i = block; i < w->heads * w->tiles_per_head; i += w->blocks) {
            const int32_t group = i / group_tiles, left = w->heads - group * heads_per_group,
                          step = (i - group * group_tiles) /
                                 (left < heads_per_group ? left : heads_per_group);
            work +=
                w->tile_cost + ((groups - group) % 2 == 0 ? step : w->tiles_per_head - 1 - step);
        }
        most = work > most ? work : most;
    }
    return most;
}

bool sm90_walks_evenly(const struct problem *p, int32_t tile_q, int32_t blocks) {
    enum { MOST_ROUNDS = 32 };
    const bool first_see_nothing = p->bottom_right && p->len_q > p->len_k;
    return p->window_left == UNBOUNDED && bounded(p) && !first_see_nothing && !sm90_is_listed(p) &&
           sm90_tiles(p, tile_q) <= MOST_ROUNDS * (int64_t)blocks;
}

/* Under a causal mask tiles of a group that is cut off at the end make some blocks busier than others: so many heads as come out even,
 * if that spares a fiftieth, as far as their keys and values fit into L2. Masks that bound nothing take head by head. */
static int32_t heads_per_group(const struct problem *p, int32_t tile_q, int32_t blocks) {
    enum { MOST_TRIED = 6, MOST_BYTES = 32 << 20 };
    if (!bounded(p) || sm90_is_listed(p) || blocks == 0)
        return 1;
    const struct walk w = walk_of(p, tile_q, blocks);
    int32_t best = heads_at_one_time(&w), tried = 0;
    if (!sm90_walks_evenly(p, tile_q, blocks) || w.heads * w.tiles_per_head <= blocks)
        return best;
    const int64_t bytes = p->len_k * (p->dim_qk + p->dim_v) * dtype_bytes(p->key.dtype) *
                          p->heads_kv / w.heads_of_batch;
    int64_t least = busiest(&w, best);
    for (int32_t heads = best + 1;
         tried < MOST_TRIED && heads <= w.heads && heads * bytes <= MOST_BYTES; heads++) {
        if (w.heads % heads)
            continue;
        const int64_t most = busiest(&w, heads);
        if (50 * most < 49 * least) {
            best = heads;
            least = most;
        }
        tried++;
    }
    return best;
}

int64_t sm90_busiest_keys(const struct problem *p, int32_t tile_q, int32_t blocks) {
    const struct walk w = walk_of(p, tile_q, blocks);
    return busiest(&w, heads_per_group(p, tile_q, blocks)) * tile_q >> sm90_pack_log2(p, tile_q);
}

void sm90_plan_walk(struct plan *plan, const struct problem *p) {
    plan->heads_per_group = heads_per_group(p, plan->tile_q, plan->blocks);
    const int64_t of_head = sm90_rows(p, plan->tile_q).per_head,
                  blocks = plan->blocks / plan->heads_per_group;
    plan->neighbours = (int32_t)(blocks < 1 ? 1 : blocks < of_head ? blocks : of_head);
}

void sm90_plan_longest_first(struct plan *plan, const struct problem *p) {
    const struct rows r = sm90_rows(p, plan->tile_q);
    plan->heads_per_group = heads_of(&r);
    plan->neighbours = 1;
}

void sm90_fill_walk(struct sm90_params *params, const struct problem *p, const struct plan *plan) {
    const struct rows r = sm90_rows(p, plan->tile_q);
    params->tiles_per_head = (int32_t)r.per_head;
    params->heads_total = heads_of(&r);
    params->tiles = (int32_t)r.tiles;
    params->heads_per_group = plan->heads_per_group;
    params->groups = (int32_t)ceil_divide(params->heads_total, params->heads_per_group);
    params->neighbours = plan->neighbours;
    params->by_neighbours = divisor(params->neighbours);
    params->by_group_tiles = divisor((int64_t)params->heads_per_group * params->tiles_per_head);
    params->by_group_heads = divisor(params->heads_per_group);
    params->by_last_group_heads =
        divisor(params->heads_total - (params->groups - 1) * params->heads_per_group);
}
