/* Forward attention for few query rows, f16 and bf16, any GPU since Ampere. See docs/cuda-decode.md. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/decode/params.h"

extern const unsigned char cuda_decode_sm80_image[];

static struct cuda_module module = {.image = cuda_decode_sm80_image};

#define TILE_OF(BYTES, NAME, D, NT, MT, WARPS, STAGES)                                             \
    {.dim_qk = D,                                                                                  \
     .dim_v = D,                                                                                   \
     .rows = (NT) * 8,                                                                             \
     .keys = (MT) * 16 * (WARPS),                                                                  \
     .kernels = F16_AND_BF16(module, "cuda_decode_sm80", NAME #D "_" #NT "_" #WARPS, (WARPS) * 32, \
                             TILE_SHARED_BYTES(BYTES, D, NT, MT, WARPS, STAGES))},
#define TILE(...) TILE_OF(2, "", __VA_ARGS__)
#define FLOAT8_TILE(...)
static const struct tile tiles[] = {
#include "kernels/cuda/decode/tiles.inc"
};
#undef TILE
#undef FLOAT8_TILE
#define TILE(...)
#define FLOAT8_TILE(...) TILE_OF(1, "float8_", __VA_ARGS__)
static const struct tile float8_tiles[] = {
#include "kernels/cuda/decode/tiles.inc"
};

#define MERGE(NAME)                                                                                \
    CUDA_KERNEL(module, "cuda_decode_sm80_merge_" NAME, MERGE_WARPS * 32, MERGE_SHARED_BYTES)
static struct cuda_kernel merge[] = {MERGE("f16"), MERGE("bf16")},
                          float8_merge[] = {MERGE("f16_float8"), MERGE("bf16_float8")};

static const struct tile *tiles_for(const struct problem *p) {
    return dtype_is_float8(p->key.dtype) ? float8_tiles : tiles;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Rows of one kv head. */
static int64_t packed_rows(const struct problem *p) {
    return p->len_q * (p->heads_q / p->heads_kv);
}

static int64_t tiles_of(const struct problem *p, int64_t rows) {
    return p->batch * p->heads_kv * ceil_divide(packed_rows(p), rows);
}

static bool has_room(const struct tile *t, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return t->rows >= packed_rows(p);
}

/* The forward rows have tiles of 128 rows, each on one multiprocessor for all of its keys. That is slower where they are so
 * few that 32 rows and a split of the keys at a time do not fill the GPU either, and keys many enough to be split. */
static bool suits(const struct problem *p, const struct caps *caps) {
    enum { ROWS = 32, KEYS = 512 };
    return p->kernel || packed_rows(p) <= ROWS ||
           (p->len_k >= KEYS && tiles_of(p, ROWS) * 4 <= (int64_t)caps->multiprocessors * 3);
}

/* One block for each multiprocessor, two where products of many rows count, and none with few keys. */
static int64_t splits_of(const struct problem *p, const struct tile *t, const struct caps *caps) {
    enum { LEAST_KEYS = 128, MOST_SPLITS = 256 };
    const int64_t blocks = (int64_t)caps->multiprocessors * (t->rows > 16 ? 2 : 1);
    const int64_t wanted = least(blocks / tiles_of(p, t->rows), p->len_k / LEAST_KEYS);
    return most(1, least(wanted, MOST_SPLITS));
}

/* All of one 16-bit type without scales; or float8 keys and values, whose scales are the same for all pages. */
static bool readable(struct plan *plan, const struct problem *p) {
    const bool scaled = p->features & DLATTN_FEATURE_SCALES,
               by_page = p->page_size && (p->key_scale.stride[0] | p->value_scale.stride[0]) != 0;
    if (dtype_is_float8(p->dtype) || dtype_is_float8(p->output.dtype))
        return false;
    if (dtype_is_float8(p->key.dtype) != dtype_is_float8(p->value.dtype))
        plan->why = "keys and values are both float8 or both of the query's dtype";
    else if (scaled && !dtype_is_float8(p->key.dtype))
        plan->why = "scales go with float8 keys and values";
    else if (by_page)
        plan->why = "scales are the same for all pages";
    return !plan->why;
}

ROW_FUNCTIONS(cuda_decode_sm80);

bool cuda_decode_sm80_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const bool float8 = dtype_is_float8(p->key.dtype);
    const struct tile *const all = tiles_for(p);
    const int32_t chosen =
        choose_tile(all, float8 ? COUNT(float8_tiles) : COUNT(tiles), false, p, caps, has_room);
    if (!readable(plan, p) || (p->dim_qk | p->dim_v) % (float8 ? 16 : 8) != 0 || !suits(p, caps) ||
        !fwd_plan(plan, p, all, chosen) || packed_rows(p) > FWD_MAX_LENGTH ||
        p->batch * p->heads_kv * packed_rows(p) > INT32_MAX)
        return false;
    const struct tile *const t = &all[chosen];
    const int64_t count = tiles_of(p, t->rows), splits = splits_of(p, t, caps);
    if (count * splits > INT32_MAX)
        return false;
    plan->splits = (int32_t)splits;
    plan->blocks = (int32_t)(count * splits);
    if (splits > 1)
        plan->workspace_bytes = (size_t)(count * splits * t->rows * (p->dim_v + 2) * 4);
    return true;
}

int32_t cuda_decode_sm80_launch(const struct plan *plan, const struct problem *p,
                                const struct exec *exec) {
    const struct tile *const t = &tiles_for(p)[plan->variant];
    struct decode_params params = {.heads_kv = (int32_t)p->heads_kv,
                                   .tile_rows = t->rows,
                                   .splits = plan->splits,
                                   .outputs = exec->workspace};
    fwd_fill(&params.fwd, p, t->rows);
    params.fwd.row_blocks = (int32_t)ceil_divide(packed_rows(p), t->rows);
    params.by_splits = divisor_of(params.splits);
    params.by_row_blocks = divisor_of(params.fwd.row_blocks);
    params.by_heads_kv = divisor_of(params.heads_kv);
    params.by_group = divisor_of(params.fwd.group);
    if (plan->splits > 1)
        params.sums = params.outputs + (int64_t)plan->blocks * t->rows * p->dim_v;
    const int32_t status =
        cuda_launch(kernel_for(t, p->dtype), p->device_id, plan->blocks, exec->stream, &params);
    if (status != DLATTN_OK || plan->splits == 1)
        return status;
    struct cuda_kernel *const merges = dtype_is_float8(p->key.dtype) ? float8_merge : merge;
    return cuda_launch_early(&merges[p->dtype == DTYPE_BF16], p->device_id,
                             (int32_t)(p->batch * p->heads_kv * packed_rows(p)), exec->stream,
                             &params);
}
