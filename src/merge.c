/* Partial results of one shape -> struct problem. */
#include "src/kernel.h"
#include "src/tensor.h"

#include <stdio.h>
#include <string.h>

enum { MOST_PARTS = 1024 };

/* One part while it is read. */
struct part {
    char output_name[32], lse_name[32];
    struct tensor output, lse;
};

static const char *output_axes(const DLTensor *output) {
    return output->ndim == 3 ? "THV" : "BHQV";
}
static const char *lse_axes(const DLTensor *output) { return output->ndim == 3 ? "HT" : "BHQ"; }

static int32_t read_pair(const struct tensor *output, const struct tensor *lse,
                         const DLTensor *first, struct extents *e, struct view *output_view,
                         struct view *lse_view) {
    static const char wide[] = "float16, bfloat16, float32 or float64";
    TRY(tensor_read_dtype(output, WIDE_DTYPES, wide, &output_view->dtype));
    TRY(tensor_read(output, output_axes(first), e, output_view));
    if (!lse->dl)
        return DLATTN_OK;
    TRY(tensor_read_dtype(lse, WIDE_DTYPES, wide, &lse_view->dtype));
    return tensor_read(lse, lse_axes(first), e, lse_view);
}

static int32_t open_pair(struct tensor *output, struct tensor *lse, const char *output_name,
                         const char *lse_name, const DLTensor *output_dl, const DLTensor *lse_dl,
                         const DLTensor *first, bool with_data) {
    *output = *lse = (struct tensor){0};
    if (!output_dl)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is absent", output_name);
    TRY(tensor_open(output, output_name, output_dl, first->ndim == 3 ? 3 : 4, with_data));
    if (lse_dl)
        TRY(tensor_open(lse, lse_name, lse_dl, first->ndim == 3 ? 2 : 3, with_data));
    return DLATTN_OK;
}

static bool same_memory(const struct tensor *a, const struct tensor *b) {
    return (const char *)a->dl->data + a->dl->byte_offset ==
               (const char *)b->dl->data + b->dl->byte_offset &&
           a->dtype.code == b->dtype.code && a->dtype.bits == b->dtype.bits &&
           memcmp(a->stride, b->stride, sizeof a->stride) == 0;
}

/* In place is the only way in which an output may be an input. */
static int32_t check_apart(const struct tensor *written, const struct tensor *read, bool in_place) {
    if (!written->dl || !read->dl || !tensor_overlap(written, read) ||
        (in_place && same_memory(written, read)))
        return DLATTN_OK;
    return fail(DLATTN_INVALID_ARGUMENT,
                "%s: shares memory with %s; it may be the same tensor or have no element in common",
                written->name, read->name);
}

static int32_t check_memory(const struct problem *p, const struct tensor *output,
                            const struct tensor *lse, const struct part *part) {
    const struct tensor *const all[] = {&part->output, &part->lse};
    for (int i = 0; i < 2; i++) {
        if (p->backend == BACKEND_CUDA)
            TRY(tensor_check_alignment(all[i]));
        TRY(check_apart(output, all[i], i == 0));
        TRY(check_apart(lse, all[i], i == 1));
    }
    return DLATTN_OK;
}

static int32_t read_part(struct problem *p, int64_t n, const struct tensor *output,
                         const struct tensor *lse, struct extents *e, bool with_data) {
    const dlattn_partials *in = p->partials;
    struct part part;
    struct view output_view = {0}, lse_view = {0};
    snprintf(part.output_name, sizeof part.output_name, "outputs[%lld]", (long long)n);
    snprintf(part.lse_name, sizeof part.lse_name, "lses[%lld]", (long long)n);
    if (!in->lses[n])
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is absent", part.lse_name);
    TRY(open_pair(&part.output, &part.lse, part.output_name, part.lse_name, in->outputs[n],
                  in->lses[n], in->output, with_data));
    TRY(tensor_check_device(p, &part.output, output));
    TRY(tensor_check_device(p, &part.lse, output));
    TRY(read_pair(&part.output, &part.lse, in->output, e, &output_view, &lse_view));
    return with_data ? check_memory(p, output, lse, &part) : DLATTN_OK;
}

static int32_t check_outputs(const struct problem *p, const struct tensor *output,
                             const struct tensor *lse, bool with_data) {
    TRY(tensor_check_writable(output));
    if (lse->dl)
        TRY(tensor_check_writable(lse));
    if (!with_data)
        return DLATTN_OK;
    if (p->backend == BACKEND_CUDA) {
        TRY(tensor_check_alignment(output));
        if (lse->dl)
            TRY(tensor_check_alignment(lse));
    }
    return check_apart(output, lse, false);
}

int32_t merge_build(struct problem *p, const dlattn_partials *in, bool with_data) {
    struct tensor t[2];
    struct extents e;
    memset(p, 0, sizeof *p);
    *p = (struct problem){.operation = MERGE, .planning = !with_data, .partials = in};
    if (in->count < 1 || in->count > MOST_PARTS)
        return fail(DLATTN_INVALID_ARGUMENT, "count: is %lld, must be from 1 to %d",
                    (long long)in->count, MOST_PARTS);
    if (!in->outputs || !in->lses)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is NULL", in->outputs ? "lses" : "outputs");
    if (!in->output)
        return fail(DLATTN_INVALID_ARGUMENT, "output: is absent");
    TRY(open_pair(&t[0], &t[1], "output", "lse", in->output, in->lse, in->output, with_data));
    tensor_device(p, t, 2);
    TRY(tensor_check_device(p, &t[0], &t[0]));
    if (t[1].dl)
        TRY(tensor_check_device(p, &t[1], &t[0]));
    extents_start(&e);
    TRY(read_pair(&t[0], &t[1], in->output, &e, &p->output, &p->lse));
    TRY(check_outputs(p, &t[0], &t[1], with_data));
    for (int64_t n = 0; n < in->count; n++)
        TRY(read_part(p, n, &t[0], &t[1], &e, with_data));
    p->dtype = p->output.dtype;
    p->batch = in->output->ndim == 3 ? 1 : e.of['B'];
    p->len_q = in->output->ndim == 3 ? e.of['T'] : e.of['Q'];
    p->heads_q = p->heads_kv = e.of['H'];
    p->dim_qk = p->dim_v = e.of['V'];
    p->features = t[1].dl ? DLATTN_FEATURE_LSE : 0;
    p->contiguous = tensor_is_compact(&t[0]) && (!t[1].dl || tensor_is_compact(&t[1]));
    return DLATTN_OK;
}

/* Read again for each part: a merge has any number of them, and no memory for their views. */
struct partial problem_partial(const struct problem *p, int64_t n) {
    const DLTensor *first = p->partials->output;
    struct partial part = {0};
    struct tensor output, lse;
    struct extents e;
    extents_start(&e);
    open_pair(&output, &lse, "outputs", "lses", p->partials->outputs[n], p->partials->lses[n],
              first, false);
    read_pair(&output, &lse, first, &e, &part.output, &part.lse);
    return part;
}
