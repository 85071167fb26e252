/* Few query rows over many keys on Hopper, f16 and bf16: cuda_fwd_sm90 on parts of the keys. See docs/cuda-sm90.md. */
#include "kernels/cuda/sm90/fwd.h"

#define MODULE(D)                                                                                  \
    extern const struct cuda_image cuda_fwd_split_sm90_##D##_images[];                             \
    static struct cuda_module module_##D = {.images = cuda_fwd_split_sm90_##D##_images};
MODULE(64)
MODULE(96)
MODULE(128)
MODULE(192)
MODULE(256)

/* For both element types what computes parts, then what merges them. */
#define NAME(D, DV, KEYS, WARPGROUPS) "cuda_fwd_split_sm90_" #D "_" #DV "_" #KEYS "_" #WARPGROUPS
#define PARTS(D, NAME, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)                                 \
    CUDA_KERNEL(module_##D, NAME, 128 * ((WARPGROUPS) + 1),                                        \
                SM90_SHARED_BYTES(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, 1))
#define TILE_MANY_ROWS(...)
#define TILE_BIAS TILE_ANY
#define TILE_ANY(D, NAME, DV, KEYS, WARPGROUPS, ...)                                               \
    {.dim_qk = D,                                                                                  \
     .dim_v = DV,                                                                                  \
     .rows = 64 * (WARPGROUPS),                                                                    \
     .keys = KEYS,                                                                                 \
     .kernels = (struct cuda_kernel[]){PARTS(D, NAME "_f16", DV, KEYS, WARPGROUPS, __VA_ARGS__),   \
                                       PARTS(D, NAME "_bf16", DV, KEYS, WARPGROUPS, __VA_ARGS__),  \
                                       CUDA_KERNEL(module_##D, NAME "_f16_merge", 4 * (DV), 0),    \
                                       CUDA_KERNEL(module_##D, NAME "_bf16_merge", 4 * (DV), 0)}},
#define TILE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                                   \
    TILE_##USE(D, NAME(D, DV, KEYS, WARPGROUPS), DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)
#define SM90_D 0
static const struct tile tiles[] = {
#include "kernels/cuda/sm90/tiles.inc"
};

/* Tiles of rows, all of which have the same number where sequences differ. */
struct rows {
    int32_t pack_log2;
    int64_t per_head;
    int64_t tiles;
};

static struct rows rows_of(const struct problem *p, int32_t tile_q) {
    struct rows r = {.pack_log2 = sm90_pack_log2(p, tile_q)};
    r.per_head = ceil_divide(p->len_q << r.pack_log2, tile_q);
    r.tiles = r.per_head * p->batch * (p->heads_q >> r.pack_log2);
    return r;
}

/* Key tiles that tile `i` of a head visits if all sequences are as long as they may be. */
static int64_t visited(const struct problem *p, const struct rows *r, const struct tile *t,
                       int64_t i) {
    const int64_t diagonal = p->bottom_right ? p->len_k - p->len_q : 0,
                  first = i * t->rows >> r->pack_log2,
                  end = (((i + 1) * t->rows - 1) >> r->pack_log2) + 1,
                  last = (end < p->len_q ? end : p->len_q) - 1;
    const int64_t low = p->window_left == UNBOUNDED ? 0 : first + diagonal - p->window_left,
                  high = p->window_right == UNBOUNDED ? p->len_k
                                                      : last + diagonal + p->window_right + 1;
    const int64_t begin = (low > 0 ? low : 0) / t->keys,
                  finish = ceil_divide(high < p->len_k ? high : p->len_k, t->keys);
    return finish > begin ? finish - begin : 0;
}

/* Of all tiles of rows: how many they are, the key tiles that are visited by that with the fewest, by that with the most, and by all, and
 * the bytes of keys and values that they see. */
struct work {
    int64_t tiles, least, most, all, bytes;
    int64_t columns; /* of a row of the output */
    bool pairs;      /* not split, it is cuda_fwd_pair_sm90's */
};

static struct work work_of(const struct problem *p, const struct rows *r, const struct tile *t,
                           const struct caps *caps) {
    struct work w = {
        .tiles = r->tiles, .least = INT64_MAX, .columns = t->dim_v, .pairs = sm90_pairs(p, caps)};
    for (int64_t i = 0; i < r->per_head; i++) {
        const int64_t n = visited(p, r, t, i);
        w.least = n < w.least ? n : w.least;
        w.most = n > w.most ? n : w.most;
        w.all += n;
    }
    w.all *= r->tiles / r->per_head;
    const int64_t visited_keys = r->per_head * w.most * t->keys,
                  keys = visited_keys < p->len_k ? visited_keys : p->len_k;
    w.bytes = p->batch * p->heads_kv * keys * (p->dim_qk + p->dim_v) * 2;
    return w;
}

/* As fitted to an H100, in a 32nd of the time that a key tile takes. A round of tiles costs as much as one key tile more, a round of parts
 * as much as four, and each part one 32nd, or one for so many columns; a merge half as much again as a key tile for each eight parts but
 * the first. What cuda_fwd_sm90 needs at first, as its code is longer, are three key tiles, cuda_fwd_pair_sm90 three quarters of one, and
 * one for so many columns in each step besides. All keys and values come from memory once, so many bytes at a time. */
enum {
    UNIT = 32,
    PER_ROUND = UNIT,
    PER_ROUND_OF_PARTS = 4 * UNIT,
    COLUMNS_STORED = 128,
    MERGED_AT_ONCE = 8,
    PER_MORE = 3 * UNIT / 2,
    WHOLE_CODE = 3 * UNIT,
    PAIR_CODE = 3 * UNIT / 4,
    PAIR_STEP = 25,
    PAIR_COLUMNS = 7,
    BYTES_READ = 96 << 10
};

/* Of two things at the same time: the longer one, and more if the other takes nearly as long. */
static int64_t both(int64_t a, int64_t b) {
    const int64_t longer = a > b ? a : b, shorter = a + b - longer, even = shorter - longer * 3 / 4;
    return longer + (even > 0 ? even / 2 : 0);
}

/* In cuda_fwd_pair_sm90, whose steps have two key tiles, which have to come from L2. */
static int64_t time_of_pair(const struct work *w) {
    return (w->most + 1) / 2 * (PAIR_STEP + w->columns / PAIR_COLUMNS) + PAIR_CODE;
}

/* Until the last block has ended. Blocks get large and small parts in turn, so what they have to do is even but for half of what parts differ
 * by, unless one part is more than that, or as many of the smallest as there are rounds. */
static int64_t time_of(const struct work *w, int64_t parts, int32_t blocks) {
    const int64_t rounds = ceil_divide(w->tiles * parts, blocks),
                  uneven = parts > 1 ? (w->most - w->least) / parts / 2 : 0,
                  even = ceil_divide(w->all, blocks) + uneven,
                  largest = ceil_divide(w->most, parts),
                  smallest = rounds * ceil_divide(w->least, parts),
                  most = even > largest ? even : largest,
                  visits = most > smallest ? most : smallest,
                  stored = w->tiles * parts * ceil_divide(w->columns, COLUMNS_STORED),
                  merged = (parts - 1) / MERGED_AT_ONCE * PER_MORE;
    if (parts == 1 && w->pairs)
        return time_of_pair(w);
    return both(UNIT * visits, w->bytes / BYTES_READ) +
           (parts == 1 ? PER_ROUND * rounds + WHOLE_CODE
                       : PER_ROUND_OF_PARTS * rounds + stored + merged);
}

static int64_t better(const struct work *w, int64_t a, int64_t b, int32_t blocks) {
    const int64_t most = w->most < SM90_MOST_PARTS ? w->most : SM90_MOST_PARTS;
    b = b < most ? b : most;
    return b > 1 && time_of(w, b, blocks) < time_of(w, a, blocks) ? b : a;
}

/* As many as take the least time: those that fill one round of the grid or more, or quarters of one. */
enum { MOST_ROUNDS = 8 };
static int64_t parts_of(const struct work *w, int32_t blocks) {
    int64_t best = 1;
    for (int64_t rounds = 1; rounds <= MOST_ROUNDS; rounds++)
        best = better(w, best, rounds * blocks / w->tiles, blocks);
    for (int64_t quarters = 3; quarters > 0; quarters--)
        best = better(w, best, quarters * blocks / w->tiles / 4, blocks);
    return best;
}

ROW_FUNCTIONS(cuda_fwd_split_sm90);

/* Whether there are keys to split, more rows than two tiles of cuda_decode_sm80 have, or as many over many keys, and tiles not mostly
 * empty. */
static bool suits(const struct problem *p, const struct rows *rows, const struct tile *t) {
    enum { LEAST_STEPS = 8, DECODED_ROWS = 64, MANY_KEYS = 65536, LEAST_SHARE = 4 };
    const int64_t rows_of_key = p->len_q * (p->heads_q / p->heads_kv);
    return p->len_k >= (int64_t)LEAST_STEPS * t->keys &&
           rows_of_key >= DECODED_ROWS + (p->len_k < MANY_KEYS) &&
           p->batch * p->heads_q * p->len_q * LEAST_SHARE >= rows->tiles * t->rows;
}

bool cuda_fwd_split_sm90_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const int32_t chosen = choose_tile(tiles, COUNT(tiles), false, p, caps, NULL),
                  blocks = caps->multiprocessors;
    if (chosen < 0 || !sm90_takes(p))
        return false;
    const struct tile *const t = &tiles[chosen];
    const struct rows rows = rows_of(p, t->rows);
    if (rows.tiles > MOST_ROUNDS * blocks || (!p->kernel && !suits(p, &rows, t)))
        return false;
    const struct work work = work_of(p, &rows, t, caps);
    int64_t parts = parts_of(&work, blocks);
    if (parts == 1 && !p->kernel)
        return false;
    if (parts == 1 && work.most > 1)
        parts = 2;
    plan->variant = chosen;
    plan->tile_q = t->rows;
    plan->tile_k = t->keys;
    plan->splits = (int32_t)parts;
    plan->blocks = (int32_t)(rows.tiles * parts < blocks ? rows.tiles * parts : blocks);
    plan->workspace_bytes = (size_t)(rows.tiles * parts * t->rows * (t->dim_v + 2)) * 4;
    return true;
}

static void fill_split(struct sm90_params *params, const struct problem *p, const struct plan *plan,
                       const struct tile *t, float *workspace) {
    const struct rows rows = rows_of(p, t->rows);
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
    status = cuda_launch(&kernels[0], p->device_id, plan->blocks, exec->stream, &params);
    if (status != DLATTN_OK)
        return status;
    const int32_t strips = t->rows / 16;
    return cuda_launch_early(&kernels[2], p->device_id, params.tiles * strips, exec->stream,
                             &params);
}
