/* Forward attention for f16 and bf16 on Hopper: TMA, wgmma, warp specialisation. See docs/cuda-sm90.md. */
#include "kernels/cuda/sm90/fwd.h"
#include "kernels/cuda/sm90/walk.h"

#include <float.h>
#include <math.h>

/* One image for each head dim, which also has the kernels that run before it where tiles depend on data. */
#define MODULE(D)                                                                                  \
    extern const struct cuda_image cuda_fwd_sm90_##D##_images[];                                   \
    static struct cuda_module module_##D = {.images = cuda_fwd_sm90_##D##_images};
MODULE(64)
MODULE(96)
MODULE(128)
MODULE(192)
MODULE(256)

/* What a kernel is compiled for, see Variant in tile.cuh; between them what finds out how far ALiBi reaches, about lists, and about masks
 * and segments. Each for both element types. */
enum kind {
    PLAIN,
    PLACED,
    ALIBI,
    NORMS,
    REACH,
    SOFTCAP,
    ANY_OPTION,
    ANY_BIAS,
    LIST,
    SEEN,
    BIAS,
    BIAS_F32,
    ROWS
};

/* By USE of tiles.inc: MANY_ROWS is for those up to REACH alone, ALONE for the first, BIAS for those of that name, too. */
#define KERNELS_MANY_ROWS(D, NAME, ...)                                                            \
    (struct cuda_kernel[]) {                                                                       \
        TWO(D, NAME, "", __VA_ARGS__, 0), TWO(D, NAME, "_placed", __VA_ARGS__, 0),                 \
            TWO(D, NAME, "_alibi", __VA_ARGS__, 0), FINDS(D, "norms_"), FINDS(D, "reach_")         \
    }
#define KERNELS_ALONE(D, NAME, ...)                                                                \
    (struct cuda_kernel[]) { TWO(D, NAME, "_alone", __VA_ARGS__, 0) }
#define KERNELS_ANY(...)                                                                           \
    (struct cuda_kernel[]) { OPTIONS(__VA_ARGS__) }
#define KERNELS_BIAS(...)                                                                          \
    (struct cuda_kernel[]) {                                                                       \
        OPTIONS(__VA_ARGS__), COPIES_BIAS("", __VA_ARGS__), COPIES_BIAS("_f32", __VA_ARGS__),      \
            COPIES_ROWS(__VA_ARGS__)                                                               \
    }
#define OPTIONS(D, NAME, ...)                                                                      \
    TWO(D, NAME, "", __VA_ARGS__, 0), TWO(D, NAME, "_placed", __VA_ARGS__, 1),                     \
        TWO(D, NAME, "_alibi", __VA_ARGS__, 1), FINDS(D, "norms_"), FINDS(D, "reach_"),            \
        TWO(D, NAME, "_softcap", __VA_ARGS__, 1), TWO(D, NAME, "_any", __VA_ARGS__, 1),            \
        TWO(D, NAME, "_any_bias", __VA_ARGS__, 1),                                                 \
        BEFORE(D, "list_", SM90_LIST_THREADS, SM90_LIST_BYTES),                                    \
        BEFORE(D, "seen_", SM90_SEEN_THREADS, SM90_SEEN_BYTES)
#define COPIES_BIAS(OF, D, NAME, ...)                                                              \
    KERNEL_OF(D, NAME "_f16_bias" OF, SM90_BIAS_SHARED_BYTES(D, __VA_ARGS__), __VA_ARGS__),        \
        KERNEL_OF(D, NAME "_bf16_bias" OF, SM90_BIAS_SHARED_BYTES(D, __VA_ARGS__), __VA_ARGS__)
#define COPIES_ROWS(D, NAME, ...) TWO(D, NAME, "_rows", __VA_ARGS__, 1)
#define TWO(D, NAME, VARIANT, ...)                                                                 \
    KERNEL(D, NAME "_f16" VARIANT, __VA_ARGS__), KERNEL(D, NAME "_bf16" VARIANT, __VA_ARGS__)
#define KERNEL(D, NAME, DV, KEYS, WARPGROUPS, ...)                                                 \
    KERNEL_OF(D, NAME, SM90_SHARED_BYTES(D, DV, KEYS, WARPGROUPS, __VA_ARGS__), DV, KEYS,          \
              WARPGROUPS, __VA_ARGS__)
#define KERNEL_OF(D, NAME, BYTES, DV, KEYS, WARPGROUPS, ...)                                       \
    CUDA_KERNEL(module_##D, "cuda_fwd_sm90_" NAME, 128 * ((WARPGROUPS) + 1), BYTES)
#define FINDS(D, NAME)                                                                             \
    CUDA_KERNEL(module_##D, "cuda_fwd_sm90_" NAME #D "_f16", SM90_REACH_THREADS,                   \
                SM90_REACH_BYTES),                                                                 \
        CUDA_KERNEL(module_##D, "cuda_fwd_sm90_" NAME #D "_bf16", SM90_REACH_THREADS,              \
                    SM90_REACH_BYTES)
#define BEFORE(D, NAME, THREADS, BYTES)                                                            \
    CUDA_KERNEL(module_##D, "cuda_fwd_sm90_" NAME #D, THREADS, BYTES),                             \
        CUDA_KERNEL(module_##D, "cuda_fwd_sm90_" NAME #D, THREADS, BYTES)
enum { IS_MANY_ROWS = false, IS_ALONE = true, IS_ANY = false, IS_BIAS = false };
#define TILE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                                   \
    {.dim_qk = D,                                                                                  \
     .dim_v = DV,                                                                                  \
     .rows = 64 * (WARPGROUPS),                                                                    \
     .keys = KEYS,                                                                                 \
     .alone = IS_##USE,                                                                            \
     .kernels = KERNELS_##USE(D, #D "_" #DV "_" #KEYS "_" #WARPGROUPS, DV, KEYS, WARPGROUPS,       \
                              STAGES, QUERY_STAGES)},
#define SM90_D 0
static const struct tile tiles[] = {
#include "kernels/cuda/sm90/tiles.inc"
};

/* ---- The plan ------------------------------------------------------------------------------------------------- */

static bool has(const struct problem *p, uint64_t features) { return p->features & features; }

/* Whether tiles see what mask and segments leave to them. */
static bool is_seen(const struct problem *p) {
    return has(p, DLATTN_FEATURE_MASK | DLATTN_FEATURE_SEGMENTS);
}

/* Whether a bias is the only option that changes scores, and a tensor map can say what it is but for where it lies; axes that are
 * broadcast have no stride there. */
static bool copies_bias(const struct problem *p) {
    const int64_t *s = p->bias.stride, bytes = dtype_bytes(p->bias.dtype);
    bool can = s[3] == 1 && p->dim_qk <= 128 && p->dim_v <= 128 && !is_seen(p) &&
               !has(p, DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_SOFTCAP);
    for (int i = 0; i < 3; i++)
        can &= s[i] >= 0 && s[i] < INT64_C(1) << 38 && s[i] * bytes % 16 == 0;
    return can;
}

/* Biases that are no copies are read element by element, which cuda_fwd_sm80 does in less time. */
static bool takes_bias(const struct problem *p) {
    return !has(p, DLATTN_FEATURE_BIAS) || copies_bias(p) || has(p, DLATTN_FEATURE_SEGMENTS);
}

/* Whether chunks of 16 bytes up to a head's last row are. */
static bool is_within_32_bits(const struct problem *p, const struct view *t) {
    return (p->pages - 1) * (t->stride[0] / 8) + (p->page_size - 1) * (t->stride[2] / 8) <=
           UINT32_MAX;
}

static bool can_copy_rows(const struct problem *p) {
    const uint64_t others = DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_SOFTCAP | DLATTN_FEATURE_BIAS;
    return !has(p, others) && !is_seen(p) && p->dim_qk <= 128 && p->dim_v <= 128 &&
           p->dim_qk % 8 == 0 && is_within_32_bits(p, &p->key) && is_within_32_bits(p, &p->value);
}

bool sm90_has_boxes(const struct problem *p) {
    enum { LEAST_KEYS_OF_BOX = 4 };
    return p->page_size % LEAST_KEYS_OF_BOX == 0;
}

/* Boxes of four keys take longer than their rows. */
bool sm90_copies_rows(const struct problem *p) {
    enum { LEAST_KEYS_OF_BETTER_BOX = 8 };
    return !sm90_has_boxes(p) || (p->page_size % LEAST_KEYS_OF_BETTER_BOX != 0 && can_copy_rows(p));
}

static enum kind variant_of(const struct problem *p) {
    const uint64_t placed = DLATTN_FEATURE_VARLEN | DLATTN_FEATURE_PAGED;
    const bool alibi = has(p, DLATTN_FEATURE_ALIBI), softcap = has(p, DLATTN_FEATURE_SOFTCAP);
    if (has(p, DLATTN_FEATURE_BIAS))
        return !copies_bias(p) || (uintptr_t)p->bias.data % 16 != 0 ? ANY_BIAS
               : p->bias.dtype == DTYPE_F32                         ? BIAS_F32
                                                                    : BIAS;
    return is_seen(p) || (alibi && softcap) ? ANY_OPTION
           : alibi                          ? ALIBI
           : softcap                        ? SOFTCAP
           : sm90_copies_rows(p)            ? ROWS
           : has(p, placed)                 ? PLACED
                                            : PLAIN;
}

/* Whether tiles are listed on the device: they depend on lengths. */
bool sm90_is_listed(const struct problem *p) { return has(p, DLATTN_FEATURE_VARLEN); }

/* Query heads of a group that share a tile, as a power of two: as many as make fewer tiles, at most the 64 rows of a
 * warpgroup. */
enum { MOST_PACK_LOG2 = 6, MOST_PACK = 1 << MOST_PACK_LOG2 };
int32_t sm90_pack_log2(const struct problem *p, int32_t tile_q) {
    /* Each head has a mask or a bias of its own. */
    const int64_t group =
        has(p, DLATTN_FEATURE_MASK | DLATTN_FEATURE_BIAS) ? 1 : p->heads_q / p->heads_kv;
    int32_t best = 0;
    for (int32_t log2 = 1; log2 <= MOST_PACK_LOG2 && group % (1 << log2) == 0; log2++) {
        if (ceil_divide(p->len_q << log2, tile_q) < ceil_divide(p->len_q << best, tile_q)
                                                        << (log2 - best))
            best = log2;
    }
    return best;
}

struct rows sm90_rows(const struct problem *p, int32_t tile_q) {
    struct rows r = {.pack_log2 = sm90_pack_log2(p, tile_q)};
    r.per_head = ceil_divide(p->len_q << r.pack_log2, tile_q);
    r.tiles = r.per_head * p->batch * (p->heads_q >> r.pack_log2);
    return r;
}

/* Tiles of rows of all sequences, for each head of those that share none. Packed sequences have at most as many as this, wherever they
 * end, unless they overlap. */
static int64_t row_tiles(const struct problem *p, int32_t tile_q) {
    const struct rows r = sm90_rows(p, tile_q);
    const int64_t of_longest = r.per_head * p->batch,
                  of_all = (p->total_q << r.pack_log2) / tile_q + p->batch;
    return p->total_q > 0 && of_all < of_longest ? of_all : of_longest;
}

int64_t sm90_tiles(const struct problem *p, int32_t tile_q) {
    return row_tiles(p, tile_q) * (p->heads_q >> sm90_pack_log2(p, tile_q));
}

/* What tiles of rows see, see seen.cuh. Those of heads and sequences that see the same are one. */
struct seen {
    bool by_batch, by_head;
    int64_t heads, tiles, rows, words;
};

static struct seen seen_of(const struct problem *p, int32_t tile_q, int32_t tile_k) {
    const uint64_t of_batch =
        DLATTN_FEATURE_SEGMENTS | DLATTN_FEATURE_LENGTHS | DLATTN_FEATURE_VARLEN;
    struct seen s = {.by_batch = has(p, of_batch) || p->mask.stride[0] != 0,
                     .by_head = p->mask.stride[1] != 0};
    s.heads = s.by_head ? p->heads_q : 1;
    s.tiles = sm90_rows(p, tile_q).per_head;
    s.rows = sm90_is_listed(p) ? row_tiles(p, tile_q) : (s.by_batch ? p->batch : 1) * s.tiles;
    s.words = ceil_divide(ceil_divide(p->len_k, tile_k), 32);
    return s;
}

/* Bytes of each part of the workspace, in this order; the first is a multiple of 8. */
struct parts {
    size_t list, seen, norms, reach;
};

/* Parts of the keys of all heads. */
static int64_t norms_of(const struct problem *p) {
    return p->batch * p->heads_kv * SM90_REACH_PARTS;
}

/* Whether it is found out first how far rows have to look, see reach.cuh. That may read all queries, keys and values once, some 6 % of the
 * time that 8,192 rows and keys take: not where few rows, or rows at the beginning of the keys alone, look at few of them. */
static bool has_reach(const struct problem *p) {
    enum { LEAST_ROWS = 4096, LEAST_KEYS = 4096 };
    const bool is_last_seen =
        p->bottom_right || p->window_right == UNBOUNDED || p->window_right >= p->len_k - p->len_q;
    const int64_t seen = is_last_seen ? p->len_k : p->len_q + p->window_right;
    return variant_of(p) == ALIBI && !sm90_is_listed(p) && p->page_size == 0 &&
           p->len_q * (p->heads_q / p->heads_kv) >= LEAST_ROWS && seen >= LEAST_KEYS &&
           2 * seen >= p->len_k && (p->window_left == UNBOUNDED || p->window_left >= LEAST_KEYS) &&
           norms_of(p) <= INT32_MAX;
}

static struct parts parts_of(const struct problem *p, int32_t tile_q, int32_t tile_k) {
    const struct seen s = seen_of(p, tile_q, tile_k);
    return (struct parts){
        .list = sm90_is_listed(p) ? sizeof(struct sm90_list) +
                                        (size_t)row_tiles(p, tile_q) * sizeof(struct sm90_listed)
                                  : 0,
        .seen = is_seen(p) ? (size_t)(s.heads * s.rows * 2 * s.words) * 4 : 0,
        .norms = has_reach(p) ? (size_t)norms_of(p) * sizeof(struct sm90_norms) : 0,
        .reach = has_reach(p) ? (size_t)sm90_tiles(p, tile_q) * sizeof(int32_t) : 0,
    };
}

/* ---- The tile ------------------------------------------------------------------------------------------------- */

/* Query rows of the multiprocessor that has most of them. */
static int64_t busiest_rows(const struct problem *p, int32_t tile_q, int32_t multiprocessors) {
    return ceil_divide(sm90_tiles(p, tile_q), multiprocessors) * tile_q;
}

/* Tiles of three warpgroups take a sixth less time for a row than tiles of two, but need more rows to fill the
 * multiprocessors, and lose with short keys and a causal mask or window, where they multiply more that is hidden. Six sevenths of the keys
 * are fitted. With ALiBi they take a twenty-fifth less. */
static bool has_many_rows(const struct problem *p, const struct caps *caps) {
    const int32_t multiprocessors = caps->multiprocessors;
    if (bounded(p) && p->len_k <= 1024)
        return false;
    const bool alibi = variant_of(p) == ALIBI;
    if (sm90_walks_evenly(p, 128, multiprocessors)) {
        const int64_t many = sm90_busiest_keys(p, 192, multiprocessors),
                      few = sm90_busiest_keys(p, 128, multiprocessors);
        return alibi ? 4 * many < 3 * few : 7 * many < 6 * few;
    }
    const int64_t many = busiest_rows(p, 192, multiprocessors),
                  few = busiest_rows(p, 128, multiprocessors);
    return alibi ? 24 * many < 25 * few : 5 * many < 6 * few;
}

/* Calls of half as many tiles are mostly cuda_fwd_pair_sm90's. Above D 64 it is the start alone that gets shorter, not the steps. */
static bool is_alone(const struct problem *p, int32_t tile_q, int32_t multiprocessors) {
    enum { MOST_KEYS_OF_WIDE_HEADS = 4096 };
    const int64_t all = sm90_tiles(p, tile_q);
    return variant_of(p) == PLAIN &&
           (p->len_k <= MOST_KEYS_OF_WIDE_HEADS || (p->dim_qk <= 64 && p->dim_v <= 64)) &&
           all <= multiprocessors && 2 * all > multiprocessors;
}

static bool suits(const struct tile *t, const struct problem *p, const struct caps *caps) {
    enum { LEAST_PAGE_OF_MANY_ROWS = 16 };
    if (t->alone)
        return is_alone(p, t->rows, caps->multiprocessors);
    return t->rows <= 128 ||
           (variant_of(p) <= ALIBI && !sm90_is_listed(p) &&
            p->page_size % LEAST_PAGE_OF_MANY_ROWS == 0 && has_many_rows(p, caps));
}

static bool takes_pages(const struct problem *p) {
    return !sm90_copies_rows(p) || can_copy_rows(p);
}

static bool takes_tensors(const struct problem *p) {
    const bool packed_q = p->total_q > 0, packed_k = p->total_k > 0, pages = p->page_size > 0;
    const int64_t q_batch = packed_q ? 1 : p->batch,
                  k_batch = pages      ? p->pages
                            : packed_k ? 1
                                       : p->batch,
                  k_rows = pages ? p->page_size : p->len_k;
    return mappable(&p->query, q_batch, p->heads_q, p->len_q, MOST_PACK) &&
           mappable(&p->output, q_batch, p->heads_q, p->len_q, MOST_PACK) &&
           mappable(&p->key, k_batch, p->heads_kv, k_rows, 1) &&
           mappable(&p->value, k_batch, p->heads_kv, k_rows, 1);
}

/* Whether blocks that find out what tiles see, of the shortest steps and fewest rows, make a grid. */
static bool takes_seen(const struct problem *p) {
    const struct seen s = seen_of(p, 128, 64);
    return !is_seen(p) || s.words == 0 || s.rows <= INT32_MAX / s.heads / s.words;
}

bool sm90_takes(const struct problem *p) {
    return p->scale > 0 && p->dim_v % 8 == 0 && (p->len_k > 0 || p->page_size > 0) &&
           p->len_k <= SM90_MAX_LENGTH &&
           p->len_q * (p->heads_q / p->heads_kv) <= SM90_MAX_LENGTH && p->total_q <= INT32_MAX &&
           p->total_k <= INT32_MAX && p->batch <= INT32_MAX / 2 && p->pages <= INT32_MAX &&
           row_tiles(p, 64) * p->heads_q <= INT32_MAX && takes_pages(p) && takes_tensors(p) &&
           takes_seen(p) && takes_bias(p);
}

void sm90_plan_tile(struct plan *plan, const struct problem *p, const struct caps *caps,
                    const struct tile *tile) {
    plan->tile_q = tile->rows;
    plan->tile_k = tile->keys;
    const int64_t all = sm90_tiles(p, plan->tile_q);
    const int64_t most = caps->multiprocessors * (int64_t)(tile->blocks > 1 ? tile->blocks : 1);
    const struct parts parts = parts_of(p, plan->tile_q, plan->tile_k);
    plan->blocks = (int32_t)(all < most ? all : most);
    plan->workspace_bytes = parts.list + parts.seen + parts.norms + parts.reach;
}

ROW_FUNCTIONS(cuda_fwd_sm90);

bool cuda_fwd_sm90_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    if (!sm90_takes(p))
        return false;
    const int32_t chosen = choose_tile(tiles, COUNT(tiles), false, p, caps, suits);
    if (chosen < 0)
        return false;
    plan->variant = chosen;
    sm90_plan_tile(plan, p, caps, &tiles[chosen]);
    sm90_plan_walk(plan, p);
    return true;
}

/* ---- The tiles ------------------------------------------------------------------------------------------------ */

static void fill_heads(struct sm90_params *params, const struct problem *p, int32_t tile_q) {
    const int32_t log2 = sm90_pack_log2(p, tile_q), pack = 1 << log2;
    params->pack_log2 = log2;
    params->heads = (int32_t)(p->heads_q / pack);
    params->heads_per_kv = (int32_t)(p->heads_q / p->heads_kv / pack);
    params->by_heads = divisor(params->heads);
    params->by_heads_per_kv = divisor(params->heads_per_kv);
    params->batch = (int32_t)p->batch;
    params->tile_q = tile_q;
}

/* ---- The tensors ---------------------------------------------------------------------------------------------- */

/* Elements of 128 bytes. */
static uint32_t box_columns(const struct view *v) { return dtype_is_float8(v->dtype) ? 128 : 64; }

/* Q or O as [D, pack, Lq, H / pack, B], the query heads of one tile being neighbours, in boxes of `rows` rows. Packed: [D, pack, Lq,
 * end, H / pack] from Lq rows before the tensor on, see packed_row(). */
static int32_t map_rows(struct cuda_tensor_map *map, const struct problem *p,
                        const struct sm90_params *params, const struct view *v, int64_t dim,
                        int64_t rows) {
    const int64_t pack = INT64_C(1) << params->pack_log2;
    const int64_t heads = pack < rows ? pack : rows;
    const int64_t *s = v->stride;
    const bool packed = p->total_q > 0;
    const uint64_t row = step(v, s[2]), all_heads = step(v, s[1] * pack);
    const uint64_t outer = packed ? (uint64_t)p->total_q + 1 : (uint64_t)params->heads,
                   last = packed ? (uint64_t)params->heads : (uint64_t)p->batch;
    const uint64_t extent[] = {(uint64_t)dim, (uint64_t)pack, (uint64_t)p->len_q, outer, last};
    const uint64_t stride[] = {step(v, s[1]), row, packed ? row : all_heads,
                               packed ? all_heads : step(v, s[0])};
    const uint32_t box[] = {box_columns(v), (uint32_t)heads, (uint32_t)(rows / heads), 1, 1};
    const char *const origin = (const char *)v->data - (packed ? (uint64_t)p->len_q * row : 0);
    return cuda_tensor_map(map, v->dtype, origin, 5, extent, stride, box, 128);
}

int32_t sm90_map_keys(struct cuda_tensor_map *map, const struct problem *p, const struct view *v,
                      int64_t dim, int32_t box_keys) {
    const bool packed = p->total_k > 0, pages = p->page_size > 0;
    const uint64_t row = step(v, v->stride[2]), head = step(v, v->stride[1]),
                   heads = (uint64_t)p->heads_kv,
                   rows = (uint64_t)(pages ? p->page_size : p->len_k);
    const uint64_t extent[] = {(uint64_t)dim, rows, packed ? (uint64_t)p->total_k + 1 : heads,
                               packed ? heads : (uint64_t)(pages ? p->pages : p->batch)};
    const uint64_t stride[] = {row, packed ? row : head, packed ? head : step(v, v->stride[0])};
    const uint32_t box[] = {box_columns(v), (uint32_t)box_keys, 1, 1};
    const char *const origin = (const char *)v->data - (packed ? rows * row : 0);
    return cuda_tensor_map(map, v->dtype, origin, 4, extent, stride, box, 128);
}

/* Extents and strides of axes that are broadcast are those of one element. */
static int32_t map_bias(struct cuda_tensor_map *map, const struct problem *p) {
    const struct view *const v = &p->bias;
    const uint64_t bytes = v->dtype == DTYPE_F32 ? 4 : 2;
    const int64_t all[] = {p->len_q, p->heads_q, p->batch};
    uint64_t extent[4] = {(uint64_t)p->len_k}, stride[3];
    for (int i = 0; i < 3; i++) {
        const int64_t s = v->stride[2 - i];
        extent[i + 1] = s ? (uint64_t)all[i] : 1;
        stride[i] = s ? (uint64_t)s * bytes : 16;
    }
    const uint32_t box[] = {(uint32_t)(128 / bytes), v->stride[2] ? 64 : 1, 1, 1};
    return cuda_tensor_map(map, v->dtype, v->data, 4, extent, stride, box, 128);
}

/* A cache of no pages has no keys to map: nobody copies any. Outputs of float8 rows leave by plain stores. */
static int32_t fill_maps(struct sm90_params *params, const struct problem *p) {
    int32_t status = map_rows(&params->query_map, p, params, &p->query, p->dim_qk, 64);
    if (status == DLATTN_OK && !dtype_is_float8(p->dtype))
        status = map_rows(&params->output_map, p, params, &p->output, p->dim_v, 16);
    params->key_map = params->value_map = params->query_map;
    if (status == DLATTN_OK && p->len_k > 0)
        status = sm90_map_keys(&params->key_map, p, &p->key, p->dim_qk, params->box_keys);
    if (status == DLATTN_OK && p->len_k > 0)
        status = sm90_map_keys(&params->value_map, p, &p->value, p->dim_v, params->box_keys);
    const enum kind variant = variant_of(p);
    if (status == DLATTN_OK && p->len_k > 0 && (variant == BIAS || variant == BIAS_F32))
        status = map_bias(&params->bias_map, p);
    return status;
}

/* The square of the largest |q.k| for which |y| is at most `bound`; below 0, so for none, if f32 has no such number. */
static float square_limit(double bound, double ratio) {
    const double limit = bound / ratio * (bound / ratio);
    return limit < FLT_MIN ? -1 : limit > FLT_MAX ? FLT_MAX : (float)limit;
}

/* tanh(y) / y of y^2, for |y| <= 0.5: the polynomial of least relative error, 2^-20.8. */
static const double TANH_BY_Y[] = {0.9999994557709385, -0.33326317935941324, 0.13190296603209212,
                                   -0.04440222612768409};
static double tanh_by_y(double x) {
    return ((TANH_BY_Y[3] * x + TANH_BY_Y[2]) * x + TANH_BY_Y[1]) * x + TANH_BY_Y[0];
}

/* How far the line is good, that is, from what y on it changes a score x = softcap * y by more than 2^-17 max(1, min(x, 8)): the line through
 * two points is off by softcap * y^5 / 60 at most. */
static double line_bound(double softcap) {
    double y = 0.5;
    for (;; y *= 0.9375) {
        const double x = softcap * y, size = x < 1 ? 1 : x > 8 ? 8 : x;
        if (x * y * y * y * y <= 60 * 0x1p-17 * size)
            return y;
    }
}

/* log2(e) * softcap * tanh(y), y = scale * q.k / softcap. */
static void fill_cap(struct sm90_cap *cap, const struct problem *p) {
    if (p->softcap == 0)
        return;
    const double bound = line_bound(p->softcap);
    const double middle = bound * bound / 2, low = middle * (1 - 0.70710678118654752),
                 high = middle * (1 + 0.70710678118654752),
                 slope = (tanh_by_y(high) - tanh_by_y(low)) / (high - low);
    const double ratio = p->scale / p->softcap;
    double factor = p->scale * LOG2_E;
    cap->twice = (float)(2 * factor / p->softcap);
    cap->most = (float)(LOG2_E * p->softcap);
    cap->line[0] = (float)(factor * (tanh_by_y(low) - slope * low));
    cap->line[1] = (float)(factor * ratio * ratio * slope);
    cap->line_limit = square_limit(bound, ratio);
    cap->polynomial_limit = square_limit(0.5, ratio);
    for (int i = 0; i < 4; i++) {
        cap->polynomial[i] = (float)(TANH_BY_Y[i] * factor);
        factor *= ratio * ratio;
    }
    if (!isfinite(cap->polynomial[3]))
        cap->line_limit = cap->polynomial_limit = -1;
}

static struct sm90_scale scale(const struct view *v) {
    return (struct sm90_scale){v->data, v->stride[0], v->stride[1]};
}

static struct sm90_by_score by_position(const struct problem *p, const struct view *v) {
    const int64_t *s = v->stride;
    const bool is_wide =
        s[3] == 1 && (s[0] | s[1] | s[2] | p->len_k) % 8 == 0 && (uintptr_t)v->data % 8 == 0;
    return (struct sm90_by_score){v->data, s[0], s[1], s[2], s[3], is_wide};
}

static void fill_workspace(struct sm90_params *params, const struct problem *p,
                           const struct plan *plan, char *workspace) {
    const struct parts parts = parts_of(p, plan->tile_q, plan->tile_k);
    const struct seen s = seen_of(p, plan->tile_q, plan->tile_k);
    params->list = sm90_is_listed(p) ? (struct sm90_list *)workspace : NULL;
    params->list_capacity = (int32_t)row_tiles(p, plan->tile_q);
    params->seen = is_seen(p) ? (uint32_t *)(workspace + parts.list) : NULL;
    params->seen_words = (int32_t)s.words;
    params->seen_rows = (int32_t)s.rows;
    params->seen_tiles = (int32_t)s.tiles;
    params->seen_by_batch = s.by_batch;
    params->seen_by_head = s.by_head;
    params->tile_k = plan->tile_k;
    if (has_reach(p)) {
        params->norms = (struct sm90_norms *)(workspace + parts.list + parts.seen);
        params->reach = (int32_t *)((char *)params->norms + parts.norms);
    }
}

/* What only other variants than PLAIN read, and sinks. */
static void fill_options(struct sm90_params *params, const struct problem *p,
                         const struct plan *plan, void *workspace) {
    params->packed_q =
        (struct sm90_packing){p->cu_seqlens_q.data, p->cu_seqlens_q.stride[0], (int32_t)p->total_q};
    params->packed_k =
        (struct sm90_packing){p->cu_seqlens_k.data, p->cu_seqlens_k.stride[0], (int32_t)p->total_k};
    fill_workspace(params, p, plan, workspace);
    fill_cap(&params->cap, p);
    params->exponent_scale =
        has(p, DLATTN_FEATURE_SOFTCAP | DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_BIAS)
            ? 1
            : params->scale_log2;
    params->mask = by_position(p, &p->mask);
    params->query_segments = p->query_segments.data;
    params->key_segments = p->key_segments.data;
    params->query_segments_strides = strides(&p->query_segments);
    params->key_segments_strides = strides(&p->key_segments);
    params->sinks = p->sinks.data;
    params->sinks_stride = p->sinks.stride[1];
    params->alibi_slopes = p->alibi_slopes.data;
    params->alibi_batch_stride = p->alibi_slopes.stride[0];
    params->alibi_head_stride = p->alibi_slopes.stride[1];
    params->block_table = p->page_size > 0 ? p->block_table.data : NULL;
    params->table_batch_stride = p->block_table.stride[0];
    params->table_page_stride = p->block_table.stride[1];
    params->pages = (int32_t)p->pages;
    params->page_size = (int32_t)p->page_size;
    params->box_keys = p->page_size > 0 ? box_keys(p, plan->tile_k) : plan->tile_k;
    params->boxes = plan->tile_k / params->box_keys;
    params->by_page_size = divisor(p->page_size);
    params->bias = by_position(p, &p->bias);
    params->bias_is_f32 = p->bias.dtype == DTYPE_F32;
    params->bias_box_bytes = p->bias.stride[2] ? 64 * 128 : 128;
    params->batch_inside = !sm90_is_listed(p) && p->bias.stride[0] == 0;
    params->by_batch = divisor(p->batch);
    params->query_scale = scale(&p->query_scale);
    params->key_scale = scale(&p->key_scale);
    params->value_scale = scale(&p->value_scale);
    params->output_dtype = p->output.dtype == DTYPE_F32   ? SM90_F32
                           : p->output.dtype == DTYPE_F16 ? SM90_F16
                                                          : SM90_BF16;
}

static void fill_problem(struct sm90_params *params, const struct problem *p) {
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
        .scale_log2 = (float)((p->softcap > 0 ? 1 : p->scale) * LOG2_E),
        .softcap = (float)p->softcap,
    };
}

int32_t sm90_fill(struct sm90_params *params, const struct problem *p, const struct plan *plan,
                  void *workspace) {
    fill_problem(params, p);
    fill_heads(params, p, plan->tile_q);
    fill_options(params, p, plan, workspace);
    return fill_maps(params, p);
}

int32_t cuda_fwd_sm90_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    struct cuda_kernel *const kernels = kernel_for(&tiles[plan->variant], p->dtype);
    const struct seen seen = seen_of(p, plan->tile_q, plan->tile_k);
    struct sm90_params params;
    int32_t status = sm90_fill(&params, p, plan, exec->workspace);
    if (!sm90_is_listed(p))
        sm90_fill_walk(&params, p, plan);
    const struct {
        enum kind kind;
        int64_t blocks; /* 0: it is not needed */
    } launches[] = {
        {LIST, sm90_is_listed(p)},
        {SEEN, is_seen(p) ? seen.heads * seen.rows * seen.words : 0},
        {NORMS, has_reach(p) ? norms_of(p) : 0},
        {REACH, has_reach(p) ? sm90_tiles(p, plan->tile_q) : 0},
        {variant_of(p), plan->blocks},
    };
    bool first = true;
    for (int32_t i = 0; i < COUNT(launches) && status == DLATTN_OK; i++) {
        if (launches[i].blocks == 0)
            continue;
        status = (first ? cuda_launch
                        : cuda_launch_early)(kernels + 2 * launches[i].kind, p->device_id,
                                             (int32_t)launches[i].blocks, exec->stream, &params);
        first = false;
    }
    return status;
}
