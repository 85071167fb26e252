/* Forward attention for few query rows, f16 and bf16, any GPU since Ampere. See docs/cuda-decode.md. */
#include "kernels/cuda/common/packed.h"

extern const struct cuda_image cuda_decode_sm80_images[];

static struct cuda_module module = {.images = cuda_decode_sm80_images};

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

static bool has_room(const struct tile *t, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return t->rows >= packed_rows(p);
}

/* The forward rows have tiles of 128 rows, each on one multiprocessor for all of its keys. That is slower where they are so
 * few that 32 rows and a split of the keys at a time do not fill the GPU either, and keys many enough to be split. */
static bool suits(const struct problem *p, const struct caps *caps) {
    enum { ROWS = 32, KEYS = 512 };
    return p->kernel || packed_rows(p) <= ROWS ||
           (p->len_k >= KEYS && packed_tiles(p, ROWS) * 4 <= (int64_t)caps->multiprocessors * 3);
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
    enum { LEAST_KEYS = 128, MOST_PARTS = 128 };
    const bool float8 = dtype_is_float8(p->key.dtype);
    const struct tile *const all = tiles_for(p);
    const int32_t chosen =
        choose_tile(all, float8 ? COUNT(float8_tiles) : COUNT(tiles), false, p, caps, has_room);
    if (!readable(plan, p) || (p->dim_qk | p->dim_v) % (float8 ? 16 : 8) != 0 || !suits(p, caps) ||
        chosen < 0)
        return false;
    /* One block for each multiprocessor, two where products of many rows count. */
    const int64_t blocks = (int64_t)caps->multiprocessors * (all[chosen].rows > 16 ? 2 : 1);
    if (!packed_plan(plan, p, all, chosen, packed_splits(p, &all[chosen], blocks, LEAST_KEYS)))
        return false;
    /* Over zeros the last block of a tile merges its splits, if they have few rows: each of its warps reads one after the other. */
    const int32_t rows = all[chosen].rows;
    const int64_t parts = plan->splits * (packed_rows(p) < rows ? packed_rows(p) : rows);
    plan->keeps_zero = plan->splits == 1 || parts <= MOST_PARTS;
    if (plan->splits > 1) /* packed_params.arrived */
        plan->workspace_bytes += (size_t)(plan->blocks / plan->splits) * sizeof(int32_t);
    return true;
}

int32_t cuda_decode_sm80_launch(const struct plan *plan, const struct problem *p,
                                const struct exec *exec) {
    const struct tile *const t = &tiles_for(p)[plan->variant];
    struct cuda_kernel *const merges = dtype_is_float8(p->key.dtype) ? float8_merge : merge;
    struct packed_params params;
    packed_fill(&params, plan, p, exec, t->rows);
    if (exec->workspace_is_zero && plan->splits > 1)
        params.arrived = (int32_t *)(params.sums + (int64_t)plan->blocks * t->rows * 2);
    return packed_launch(plan, p, exec, kernel_for(t, p->dtype), &merges[p->dtype == DTYPE_BF16],
                         &params);
}
