/* The gradients of attention for f16 and bf16 on Hopper: TMA, wgmma, sums in fixed point. See docs/cuda-backward.md. */
#include "kernels/cuda/sm90/bwd_params.h"
#include "kernels/cuda/sm90/host.h"

/* One image for each head dim. */
#define MODULE(D)                                                                                  \
    extern const struct cuda_image cuda_bwd_sm90_##D##_images[];                                   \
    static struct cuda_module module_##D = {.images = cuda_bwd_sm90_##D##_images};
MODULE(64)
MODULE(128)
MODULE(192)
MODULE(256)

enum { MAIN_THREADS = 384 };

/* The kernels of a tile, each for f16 and for bf16. Those with softcap follow those without. MAIN has no dQ where heads are wide; then
 * there are PREPARE and QUERIES. */
enum { MAIN, ROWS = MAIN + 2, KEYS = ROWS + 2, PREPARE = KEYS + 2, QUERIES };

#define BOTH(D, NAME, SUFFIX, THREADS, BYTES)                                                      \
    CUDA_KERNEL(module_##D, "cuda_bwd_sm90_" NAME "_f16" SUFFIX, THREADS, BYTES),                  \
        CUDA_KERNEL(module_##D, "cuda_bwd_sm90_" NAME "_bf16" SUFFIX, THREADS, BYTES)
#define CAPPED(D, NAME, THREADS, BYTES)                                                            \
    BOTH(D, NAME, "", THREADS, BYTES), BOTH(D, NAME, "_softcap", THREADS, BYTES)
#define SMALL(D, NAME) CAPPED(D, NAME, SM90_BWD_SMALL_THREADS, SM90_BWD_SMALL_BYTES)
#define PREPARED(D, NAME) BOTH(D, NAME, "", SM90_BWD_SMALL_THREADS, SM90_BWD_SMALL_BYTES)
#define KERNELS(D)                                                                                 \
    (struct cuda_kernel[]) {                                                                       \
        CAPPED(D, #D, MAIN_THREADS, SM90_BWD_MAIN_BYTES(D)), SMALL(D, "rows_" #D),                 \
            SMALL(D, "keys_" #D)                                                                   \
    }
#define WIDE_KERNELS(D, DV, DIMS)                                                                  \
    (struct cuda_kernel[]) {                                                                       \
        CAPPED(D, "wide_keys_" DIMS, MAIN_THREADS, SM90_BWD_WIDE_KEYS_BYTES(D, DV)),               \
            SMALL(D, "odd_rows_" DIMS), SMALL(D, "odd_keys_" DIMS), PREPARED(D, "prepare_" DIMS),  \
            CAPPED(D, "wide_rows_" DIMS, MAIN_THREADS, SM90_BWD_WIDE_ROWS_BYTES(D, DV))            \
    }
#define TILE(D)                                                                                    \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = SM90_BWD_TILE_Q,                                                                      \
     .keys = SM90_BWD_TILE_K,                                                                      \
     .kernels = KERNELS(D)},
#define WIDE_TILE(D, DV)                                                                           \
    {.dim_qk = D,                                                                                  \
     .dim_v = DV,                                                                                  \
     .rows = SM90_BWD_WIDE_TILE,                                                                   \
     .keys = SM90_BWD_WIDE_TILE,                                                                   \
     .kernels = WIDE_KERNELS(D, DV, #D "_" #DV)},
#define SM90_D 0
static const struct tile tiles[] = {
#include "kernels/cuda/sm90/bwd_tiles.inc"
};

static bool is_wide(const struct tile *t) { return t->keys == SM90_BWD_WIDE_TILE; }

/* ---- The workspace ------------------------------------------------------------------------------------------------ */

/* Tiles of rows of one head: packed sequences share none. */
static int64_t row_tiles(const struct problem *p) {
    return p->total_q > 0 ? p->total_q / SM90_BWD_TILE_Q + p->batch
                          : p->batch * ceil_divide(p->len_q, SM90_BWD_TILE_Q);
}

/* The walk of sm90_bwd_params: the first tasks find their units prepared; when a unit is to be finished, blocks have come so many
 * tasks further that its own are done; and slots are free again some tasks before they are needed. */
enum { TASKS_AHEAD = 132, TASKS_BEHIND = 448, TASKS_BEHIND_64 = 340, TASKS_SPARE = 160 };

struct walk {
    int64_t units, ahead, behind, slots;
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A walk over units of so many tasks. */
static struct walk walk_over(const struct problem *p, int32_t dim, int64_t tasks) {
    const bool soon = dim == 64 && p->total_k == 0; /* packed sequences differ too much */
    struct walk w = {.units = p->batch * p->heads_kv};
    w.ahead = least(ceil_divide(TASKS_AHEAD, tasks), w.units);
    w.behind = least(ceil_divide(soon ? TASKS_BEHIND_64 : TASKS_BEHIND, tasks), w.units);
    w.slots = least(w.behind + ceil_divide(TASKS_SPARE, tasks), w.units);
    return w;
}

/* Packed sequences have the tasks of one of mean length, unless their slots, each as long as the longest, would take more than twice
 * what sums of all rows do. */
static struct walk walk_of(const struct problem *p, int32_t dim) {
    const int64_t mean = p->total_k > 0 ? ceil_divide(p->total_k, p->batch) : p->len_k;
    const struct walk w = walk_over(p, dim, ceil_divide(mean, SM90_BWD_TILE_K));
    const bool small =
        w.slots * ceil_divide(p->len_q, SM90_BWD_TILE_Q) <= 2 * p->heads_kv * row_tiles(p);
    return small ? w : walk_over(p, dim, ceil_divide(p->len_k, SM90_BWD_TILE_K));
}

/* How many rows see a key, more or less. */
static double rows_of_key(const struct problem *p) {
    const double length = p->total_q > 0 ? (double)p->total_q / (double)p->batch : (double)p->len_q,
                 window = (double)p->window_left + (double)p->window_right + 1;
    const bool left = p->window_left < SM90_UNBOUNDED, right = p->window_right < SM90_UNBOUNDED;
    const double rows = left && right ? window : left || right ? length / 2 : length;
    return rows < length ? rows : length;
}

/* How many of `blocks` run errands, so that these take as long as the tasks. Measured in steps of a task, one of which takes as
 * long as four steps besides its own: the errands of 128 keys with as many rows take 3.2 at D = 64, 3.06 at 128. */
static int32_t errand_blocks(const struct problem *p, int32_t dim, int32_t blocks) {
    const int64_t heads = p->heads_q / p->heads_kv;
    const double group = (double)heads, task = group * rows_of_key(p) / 64 + 4,
                 errands = (dim > 64 ? 3.06 : 3.2) * (2 * group + 1) / 3;
    return 1 + (int32_t)((double)(blocks - 1) * errands / (errands + task));
}

/* Bytes of each part, in this order; all but the last are multiples of 256. */
struct parts {
    size_t facts, rows, sums;
};

static size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

static struct parts parts_of(const struct problem *p, const struct tile *t) {
    const int64_t facts = p->batch * p->heads_kv * (SM90_BWD_KEYS + t->dim_qk) + SM90_BWD_COUNTERS;
    const size_t tiles_of_heads = (size_t)(p->heads_q * row_tiles(p));
    const size_t tiles_of_slots =
        (size_t)(walk_of(p, t->dim_qk).slots * (p->heads_q / p->heads_kv) *
                 ceil_divide(p->len_q, SM90_BWD_TILE_Q));
    return (struct parts){
        .facts = round_up((size_t)facts * 4),
        .rows = round_up(tiles_of_heads * SM90_BWD_ROW_BYTES),
        .sums = is_wide(t) ? 0 : tiles_of_slots * SM90_BWD_TILE_Q * (size_t)t->dim_qk * 4,
    };
}

/* ---- The plan --------------------------------------------------------------------------------------------------------- */

/* Blocks of the kernels that take keys, and rows, one tile each. */
static int64_t key_blocks(const struct problem *p) { return blocks_of_keys(p, SM90_BWD_TILE_K); }
static int64_t row_blocks(const struct problem *p) { return blocks_of_rows(p, SM90_BWD_TILE_Q); }

static bool takes(const struct problem *p) {
    const int64_t longest = p->len_q > p->len_k ? p->len_q : p->len_k,
                  q_batch = p->total_q > 0 ? 1 : p->batch, k_batch = p->total_k > 0 ? 1 : p->batch;
    return p->scale > 0 && p->dim_qk % 8 == 0 && p->dim_v % 8 == 0 && p->len_q > 0 &&
           p->len_k > 0 && longest <= SM90_MAX_LENGTH && p->lse.dtype == DTYPE_F32 &&
           (!p->d_lse.data || p->d_lse.dtype == DTYPE_F32) && p->d_output.dtype == p->dtype &&
           4 * p->batch * p->heads_kv * ceil_divide(longest, SM90_BWD_ERRAND) <= INT32_MAX &&
           row_blocks(p) <= INT32_MAX && row_tiles(p) <= INT32_MAX &&
           blocks_of_keys(p, SM90_BWD_WIDE_TILE) + p->heads_q <= INT32_MAX &&
           mappable(&p->query, q_batch, p->heads_q, p->len_q, 1) &&
           mappable(&p->d_output, q_batch, p->heads_q, p->len_q, 1) &&
           mappable(&p->key, k_batch, p->heads_kv, p->len_k, 1) &&
           mappable(&p->value, k_batch, p->heads_kv, p->len_k, 1);
}

ROW_FUNCTIONS(cuda_bwd_sm90);

/* At head dim 128 the kernels of wide heads, which have no errands, are ahead while few rows see a key. */
enum { WIDE_UP_TO_ROWS = 512 };

static bool suits(const struct tile *t, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return !is_wide(t) || rows_of_key(p) <= WIDE_UP_TO_ROWS;
}

bool cuda_bwd_sm90_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const int32_t chosen = choose_tile(tiles, COUNT(tiles), false, p, caps, suits);
    if (chosen < 0 || !takes(p))
        return false;
    const struct parts parts = parts_of(p, &tiles[chosen]);
    const int64_t blocks = key_blocks(p) + 1; /* one that runs errands */
    plan->variant = chosen;
    plan->tile_q = tiles[chosen].rows;
    plan->tile_k = tiles[chosen].keys;
    plan->blocks = (int32_t)(is_wide(&tiles[chosen]) ? caps->multiprocessors
                                                     : least(blocks, caps->multiprocessors));
    plan->workspace_bytes = parts.facts + parts.rows + parts.sums;
    plan->workspace_alignment = 256;
    return true;
}

/* ---- The tensors ------------------------------------------------------------------------------------------------------ */

/* Rows of sequences that may end anywhere, in boxes of 64 columns and `box` rows. Row i of a sequence that takes part with n rows from
 * row s on is (length - n + i, s + n): both axes have the stride of a row, the origin lies `length` rows before the tensor's, and behind
 * the sequence the first coordinate is past its extent, so that zeros arrive whatever the tensor holds there. */
static int32_t map_rows(struct cuda_tensor_map *map, const struct problem *p, const struct view *v,
                        int64_t dim, int64_t length, int64_t heads, bool packed,
                        uint32_t box_rows) {
    const uint64_t row = step(v, v->stride[2]), most = UINT64_C(1) << 31;
    const uint64_t extent[] = {(uint64_t)dim, (uint64_t)length, most, (uint64_t)heads,
                               packed ? 1 : (uint64_t)p->batch};
    const uint64_t stride[] = {row, row, step(v, v->stride[1]), step(v, v->stride[0])};
    const uint32_t box[] = {64, box_rows, 1, 1, 1};
    const char *const origin = (const char *)v->data - (uint64_t)length * row;
    return cuda_tensor_map(map, p->dtype, origin, 5, extent, stride, box, 128);
}

static int32_t fill_maps(struct sm90_bwd_params *params, const struct problem *p,
                         const struct tile *t) {
    const uint32_t tile_k = (uint32_t)t->keys;
    const bool packed_q = p->cu_seqlens_q.data, packed_k = p->cu_seqlens_k.data;
    int32_t status = map_rows(&params->query_map, p, &p->query, p->dim_qk, p->len_q, p->heads_q,
                              packed_q, SM90_BWD_TILE_Q);
    if (status == DLATTN_OK)
        status = map_rows(&params->d_output_map, p, &p->d_output, p->dim_v, p->len_q, p->heads_q,
                          packed_q, SM90_BWD_TILE_Q);
    if (status == DLATTN_OK)
        status = map_rows(&params->key_map, p, &p->key, p->dim_qk, p->len_k, p->heads_kv, packed_k,
                          tile_k);
    if (status == DLATTN_OK)
        status = map_rows(&params->value_map, p, &p->value, p->dim_v, p->len_k, p->heads_kv,
                          packed_k, tile_k);
    return status;
}

static struct sm90_gradient gradient(const struct view *v) {
    return (struct sm90_gradient){v->data, strides(v), v->dtype == DTYPE_F32};
}

static void fill_tensors(struct sm90_bwd_params *params, const struct problem *p) {
    *params = (struct sm90_bwd_params){
        .query = p->query.data,
        .key = p->key.data,
        .value = p->value.data,
        .output = p->output.data,
        .d_output = p->d_output.data,
        .lse = p->lse.data,
        .d_lse = p->d_lse.data,
        .sinks = p->sinks.data,
        .d_sinks = p->d_sinks.data,
        .query_strides = strides(&p->query),
        .key_strides = strides(&p->key),
        .value_strides = strides(&p->value),
        .output_strides = strides(&p->output),
        .d_output_strides = strides(&p->d_output),
        .lse_strides = strides(&p->lse),
        .d_lse_strides = strides(&p->d_lse),
        .sinks_stride = p->sinks.stride[1],
        .d_sinks_stride = p->d_sinks.stride[1],
        .d_query = gradient(&p->d_query),
        .d_key = gradient(&p->d_key),
        .d_value = gradient(&p->d_value),
        .query_lengths = p->query_lengths.data,
        .key_lengths = p->key_lengths.data,
        .cu_seqlens_q = p->cu_seqlens_q.data,
        .cu_seqlens_k = p->cu_seqlens_k.data,
        .query_lengths_stride = p->query_lengths.stride[0],
        .key_lengths_stride = p->key_lengths.stride[0],
        .cu_seqlens_q_stride = p->cu_seqlens_q.stride[0],
        .cu_seqlens_k_stride = p->cu_seqlens_k.stride[0],
        .total_q = (int32_t)p->total_q,
        .total_k = (int32_t)p->total_k,
    };
}

static void fill_problem(struct sm90_bwd_params *params, const struct problem *p) {
    params->batch = (int32_t)p->batch;
    params->heads_q = (int32_t)p->heads_q;
    params->heads_kv = (int32_t)p->heads_kv;
    params->group = (int32_t)(p->heads_q / p->heads_kv);
    params->len_q = (int32_t)p->len_q;
    params->len_k = (int32_t)p->len_k;
    params->dim_qk = (int32_t)p->dim_qk;
    params->dim_v = (int32_t)p->dim_v;
    params->window_left = window(p->window_left);
    params->window_right = window(p->window_right);
    params->bottom_right = p->bottom_right;
    params->key_tiles = (int32_t)ceil_divide(p->len_k, SM90_BWD_TILE_K);
    params->row_tiles = (int32_t)ceil_divide(p->len_q, SM90_BWD_TILE_Q);
    params->errands =
        (int32_t)ceil_divide(p->len_q > p->len_k ? p->len_q : p->len_k, SM90_BWD_ERRAND);
    params->scale = (float)p->scale;
    params->scale_log2 = (float)((p->softcap > 0 ? 1 : p->scale) * LOG2_E);
    params->softcap = (float)p->softcap;
}

static void fill_workspace(struct sm90_bwd_params *params, const struct problem *p,
                           const struct parts *parts, int32_t dim, char *workspace) {
    params->facts = (uint32_t *)workspace;
    params->next = (int32_t *)params->facts + p->batch * p->heads_kv * (SM90_BWD_KEYS + dim);
    params->rows = workspace + parts->facts;
    params->sums = (int32_t *)(workspace + parts->facts + parts->rows);
    params->tiles = (int32_t)row_tiles(p);
    const struct walk w = walk_of(p, dim);
    params->units = (int32_t)w.units;
    params->ahead = (int32_t)w.ahead;
    params->behind = (int32_t)w.behind;
    params->slots = (int32_t)w.slots;
}

int32_t cuda_bwd_sm90_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    const struct tile *const t = &tiles[plan->variant];
    const struct parts parts = parts_of(p, t);
    const bool wide = is_wide(t), capped = p->softcap > 0;
    struct sm90_bwd_params params;
    fill_tensors(&params, p);
    fill_problem(&params, p);
    fill_workspace(&params, p, &parts, t->dim_qk, exec->workspace);
    params.errand_blocks = errand_blocks(p, t->dim_qk, plan->blocks);
    int32_t status = fill_maps(&params, p, t);
    const struct {
        int32_t kind;
        int64_t blocks; /* 0: not launched */
    } launches[] = {
        {PREPARE, wide ? row_blocks(p) : 0},
        {MAIN + capped, wide ? least(blocks_of_keys(p, t->keys), plan->blocks) : plan->blocks},
        {QUERIES + capped, wide ? least(blocks_of_rows(p, SM90_BWD_WIDE_ROWS), plan->blocks) : 0},
        {ROWS + capped, least(row_blocks(p), plan->blocks)},
        {KEYS + capped, least(key_blocks(p), plan->blocks) + (p->d_sinks.data ? p->heads_q : 0)},
    };
    if (status == DLATTN_OK)
        status = cuda_clear(params.facts, parts.facts, exec->stream);
    for (int32_t i = 0; i < COUNT(launches) && status == DLATTN_OK; i++) {
        if (launches[i].blocks > 0)
            status = cuda_launch_early(kernel_for(t, p->dtype) + 2 * launches[i].kind, p->device_id,
                                       (int32_t)launches[i].blocks, exec->stream, &params);
    }
    return status;
}
