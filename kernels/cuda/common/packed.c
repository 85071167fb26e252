#include "kernels/cuda/common/packed.h"

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t packed_rows(const struct problem *p) { return p->len_q * (p->heads_q / p->heads_kv); }

int64_t packed_tiles(const struct problem *p, int64_t rows) {
    return p->batch * p->heads_kv * ceil_divide(packed_rows(p), rows);
}

int64_t packed_splits(const struct problem *p, const struct tile *t, int64_t blocks,
                      int64_t least_keys) {
    enum { MOST_SPLITS = 256 };
    const int64_t wanted = least(blocks / packed_tiles(p, t->rows), p->len_k / least_keys);
    return most(1, least(wanted, MOST_SPLITS));
}

static int64_t columns_of(const struct problem *p) { return ceil_divide(p->dim_v, 4) * 4; }

bool packed_plan(struct plan *plan, const struct problem *p, const struct tile *tiles,
                 int32_t chosen, int64_t splits) {
    if (!fwd_plan(plan, p, tiles, chosen))
        return false;
    const int32_t rows = tiles[chosen].rows;
    const int64_t count = packed_tiles(p, rows);
    if (packed_rows(p) > FWD_MAX_LENGTH || p->batch * p->heads_kv * packed_rows(p) > INT32_MAX ||
        count * splits > INT32_MAX)
        return false;
    plan->splits = (int32_t)splits;
    plan->blocks = (int32_t)(count * splits);
    if (splits > 1)
        plan->workspace_bytes = (size_t)(count * splits * rows * (columns_of(p) + 2) * 4);
    return true;
}

void packed_fill(struct packed_params *params, const struct plan *plan, const struct problem *p,
                 const struct exec *exec, int32_t rows) {
    *params = (struct packed_params){.heads_kv = (int32_t)p->heads_kv,
                                     .tile_rows = rows,
                                     .splits = plan->splits,
                                     .columns = (int32_t)columns_of(p),
                                     .diagonal_offset = (int32_t)p->diagonal_offset,
                                     .outputs = exec->workspace};
    fwd_fill(&params->fwd, p, rows);
    params->fwd.row_blocks = (int32_t)ceil_divide(packed_rows(p), rows);
    params->by_splits = divisor_of(params->splits);
    params->by_row_blocks = divisor_of(params->fwd.row_blocks);
    params->by_heads_kv = divisor_of(params->heads_kv);
    params->by_group = divisor_of(params->fwd.group);
    if (plan->splits > 1)
        params->sums = params->outputs + (int64_t)plan->blocks * rows * params->columns;
}

int32_t packed_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                      struct cuda_kernel *kernel, struct cuda_kernel *merge,
                      struct packed_params *params) {
    const int32_t status = cuda_launch(kernel, p->device_id, plan->blocks, exec->stream, params);
    if (status != DLATTN_OK || plan->splits == 1 || params->arrived)
        return status;
    return cuda_launch_early(merge, p->device_id,
                             (int32_t)(p->batch * p->heads_kv * packed_rows(p)), exec->stream,
                             params);
}

bool value_is_view_of_key(const struct problem *p) {
    const int64_t *const k = p->key.stride, *const v = p->value.stride;
    return p->key.data == p->value.data && p->dim_v <= p->dim_qk && k[0] == v[0] &&
           (p->heads_kv == 1 || k[1] == v[1]) && k[2] == v[2] && k[3] == v[3];
}
