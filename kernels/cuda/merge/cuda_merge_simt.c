/* Results over parts of the keys into one, on any GPU since Ampere. See merge.cuh. */
#include "kernels/cuda/common/fill.h"
#include "kernels/cuda/merge/params.h"

#include <assert.h>

extern const struct cuda_image cuda_merge_simt_images[];

static struct cuda_module module = {.images = cuda_merge_simt_images};

static_assert((int)MERGE_F64 == (int)DTYPE_F64 && (int)MERGE_F32 == (int)DTYPE_F32 &&
                  (int)MERGE_F16 == (int)DTYPE_F16 && (int)MERGE_BF16 == (int)DTYPE_BF16,
              "kernels know types by these numbers");

#define MERGE(NAME, SUM)                                                                           \
    CUDA_KERNEL(module, "cuda_merge_simt_" NAME, MERGE_THREADS, MERGE_SHARED_BYTES(SUM))
/* By the narrowest type, for columns of 16 bytes; by the type of the sums, for columns of one element. */
static struct cuda_kernel f16 = MERGE("f16", 4), bf16 = MERGE("bf16", 4), f32 = MERGE("f32", 4),
                          elements_f32 = MERGE("elements_f32", 4),
                          elements_f64 = MERGE("elements_f64", 8),
                          table = CUDA_KERNEL(module, "cuda_merge_simt_table", MERGE_PARTS, 0);

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t rows_of(const struct problem *p) { return p->batch * p->heads_q * p->len_q; }

ROW_FUNCTIONS(cuda_merge_simt);

/* A block has some columns for each of its threads, as far as there are slots, or fewer, so that there are blocks for each
 * multiprocessor. */
bool cuda_merge_simt_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    enum { COLUMNS = 4, BLOCKS = 4 };
    const int64_t count = p->partials->count,
                  columns = ceil_divide(p->dim_v * dtype_bytes(p->dtype), 16),
                  wanted = MERGE_THREADS * COLUMNS / most(1, columns),
                  busy = rows_of(p) / (BLOCKS * (int64_t)caps->multiprocessors);
    const int64_t rows = least(least(MERGE_SLOTS / count, MERGE_ROWS), least(wanted, busy));
    plan->tile_q = (int32_t)most(1, rows);
    const int64_t blocks = ceil_divide(rows_of(p), plan->tile_q);
    if (blocks > INT32_MAX) {
        plan->why = "it takes more blocks than a grid has";
        return false;
    }
    plan->blocks = (int32_t)blocks;
    if (count > MERGE_PARTS)
        plan->workspace_bytes = (size_t)count * sizeof(struct merge_part);
    return true;
}

static struct merge_part part_of(const struct view *output, const struct view *lse) {
    struct merge_part part = {.output = output->data,
                              .lse = lse->data,
                              .output_dtype = (int32_t)output->dtype,
                              .lse_dtype = (int32_t)lse->dtype};
    memcpy(part.output_stride, output->stride, sizeof part.output_stride);
    memcpy(part.lse_stride, lse->stride, sizeof part.lse_stride);
    return part;
}

/* What the tensors of a call have in common. */
struct common {
    uint32_t outputs, lses; /* DTYPE_BIT()s */
    bool vectors;           /* rows are read and written 16 bytes at a time */
};

static void look_at(struct common *c, const struct problem *p, const struct partial *part) {
    const struct view *const v = &part->output;
    const int64_t lengths = v->stride[0] | v->stride[1] | v->stride[2] | p->dim_v;
    c->outputs |= DTYPE_BIT(v->dtype);
    c->lses |= DTYPE_BIT(part->lse.data ? part->lse.dtype : v->dtype);
    c->vectors &= (uintptr_t)v->data % 16 == 0 && lengths * dtype_bytes(v->dtype) % 16 == 0 &&
                  v->stride[3] == 1;
}

/* The same sums of the same types, whatever the layout. */
static struct cuda_kernel *kernel_of(const struct common *c) {
    if ((c->outputs | c->lses) & DTYPE_BIT(DTYPE_F64))
        return &elements_f64;
    if (!c->vectors)
        return &elements_f32;
    switch (c->outputs & ~DTYPE_BIT(DTYPE_F32)) {
    case 0:
        return &f32;
    case DTYPE_BIT(DTYPE_F16):
        return &f16;
    case DTYPE_BIT(DTYPE_BF16):
        return &bf16;
    default:
        return &elements_f32;
    }
}

/* Fills the parameters' parts, by way of the table if there are more than they have room for. */
static int32_t fill_parts(struct merge_params *params, const struct problem *p,
                          const struct exec *exec, struct common *c) {
    for (int32_t n = 0; n < params->count; n++) {
        const struct partial part = problem_partial(p, n);
        look_at(c, p, &part);
        params->parts[n % MERGE_PARTS] = part_of(&part.output, &part.lse);
        const bool full = (n + 1) % MERGE_PARTS == 0 || n + 1 == params->count;
        if (!params->table || !full)
            continue;
        params->first = n / MERGE_PARTS * MERGE_PARTS;
        const int32_t status = cuda_launch(&table, p->device_id, 1, exec->stream, params);
        if (status != DLATTN_OK)
            return status;
    }
    return DLATTN_OK;
}

int32_t cuda_merge_simt_launch(const struct plan *plan, const struct problem *p,
                               const struct exec *exec) {
    const struct partial result = {p->output, p->lse};
    struct common c = {.vectors = true};
    struct merge_params params = {.result = part_of(&p->output, &p->lse),
                                  .table = plan->workspace_bytes ? exec->workspace : NULL,
                                  .rows = rows_of(p),
                                  .heads = p->heads_q,
                                  .length = p->len_q,
                                  .count = (int32_t)p->partials->count,
                                  .block_rows = plan->tile_q};
    look_at(&c, p, &result);
    const int32_t status = fill_parts(&params, p, exec, &c);
    if (status != DLATTN_OK)
        return status;
    struct cuda_kernel *const kernel = kernel_of(&c);
    const bool one_element = kernel == &elements_f32 || kernel == &elements_f64;
    params.columns = (int32_t)(one_element ? p->dim_v : p->dim_v / (kernel == &f32 ? 4 : 8));
    params.by_columns = divisor_of(most(1, params.columns));
    return cuda_launch(kernel, p->device_id, plan->blocks, exec->stream, &params);
}
