#include "tests/support/check.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

/* One query row of an upcast call, and room for what is computed of it. */
struct row {
    struct call *call;
    enum element element;
    int64_t b, h, i;
    double *score, *weight; /* [len_k] */
};

static const double *floats(const struct call *c, enum slot slot, const int64_t index[4]) {
    const struct tensor *t = &c->tensor[slot];
    int64_t offset = 0;
    for (int axis = 0; axis < t->dl.ndim; axis++)
        offset += index[axis] * t->stride[axis];
    return (const double *)(const void *)t->image + offset;
}

/* Products of the element type, summed in f32 as tensor cores and BLAS do; f64 in f64. */
static double dot(enum element e, const double *a, const double *b, int64_t n) {
    double wide = 0;
    float sum = 0;
    for (int64_t d = 0; d < n && e == F64; d++)
        wide += a[d] * b[d];
    for (int64_t d = 0; d < n && e != F64; d++)
        sum += (float)a[d] * (float)b[d];
    return e == F64 ? wide : element_round(e, sum);
}

static double extra(const struct row *r, enum slot slot, int64_t j) {
    const struct tensor *t = &r->call->tensor[slot];
    const int64_t at[4] = {r->b, r->h, r->i, j};
    int64_t index[4];
    for (int axis = 0; axis < 4; axis++)
        index[axis] = t->shape[axis] > 1 ? at[axis] : 0;
    return tensor_get(t, index);
}

static double score(const struct row *r, int64_t j) {
    const struct call *c = r->call;
    const struct features *f = &c->made_from.features;
    const struct shape *s = &c->made_from.shape;
    int64_t q[4], k[4];
    call_row(c, QUERY, r->b, r->h, r->i, q);
    call_row(c, KEY, r->b, r->h / (s->heads_q / s->heads_kv), j, k);
    const double scale = f->exact_scale || f->scale != 0 ? f->scale : 1 / sqrt((double)s->dim_qk);
    double x = dot(r->element, floats(c, QUERY, q), floats(c, KEY, k), s->dim_qk);
    x = element_round(r->element, x * scale);
    if (f->softcap > 0)
        x = element_round(r->element,
                          f->softcap * element_round(r->element, tanh(element_round(
                                                                     r->element, x / f->softcap))));
    if (c->has[BIAS])
        x = element_round(r->element, x + extra(r, BIAS, j));
    if (c->has[ALIBI_SLOPES]) {
        const int64_t index[4] = {f->alibi == 2 ? r->b : r->h, r->h};
        const double slope = tensor_get(&c->tensor[ALIBI_SLOPES], index);
        x = element_round(r->element,
                          x - slope * fabs((double)(r->i + c->span[r->b].diagonal - j)));
    }
    return x;
}

/* x as the softmax keeps it: f32, and f64 for f64. */
static double inner(const struct row *r, double x) {
    return element_round(r->element == F64 ? F64 : F32, x);
}

static double *output_row(const struct row *r, enum slot slot) {
    struct tensor *t = &r->call->tensor[slot];
    int64_t index[4];
    call_row(r->call, slot, r->b, r->h, r->i, index);
    return (double *)(void *)t->image +
           (floats(r->call, slot, index) - (const double *)(void *)t->image);
}

static void attend(const struct row *r) {
    const struct call *c = r->call;
    const struct shape *s = &c->made_from.shape;
    const int64_t keys = c->span[r->b].k_len;
    const double sink =
        c->has[SINKS] ? tensor_get(&c->tensor[SINKS], (int64_t[4]){r->h}) : -INFINITY;
    double most = sink;
    for (int64_t j = 0; j < keys; j++) {
        r->score[j] = call_sees(c, r->b, r->h, r->i, j) ? score(r, j) : -INFINITY;
        most = fmax(most, r->score[j]);
    }
    double total = sink == -INFINITY ? 0 : inner(r, exp(inner(r, sink - most)));
    for (int64_t j = 0; j < keys; j++) {
        r->weight[j] = r->score[j] == -INFINITY ? 0 : inner(r, exp(inner(r, r->score[j] - most)));
        total = inner(r, total + r->weight[j]);
    }
    double *out = output_row(r, OUTPUT);
    for (int64_t d = 0; d < s->dim_v; d++)
        out[d] = 0;
    for (int64_t j = 0; j < keys; j++) {
        int64_t index[4];
        if (r->score[j] == -INFINITY)
            continue;
        const double weight = element_round(r->element, inner(r, r->weight[j] / total));
        call_row(c, VALUE, r->b, r->h / (s->heads_q / s->heads_kv), j, index);
        const double *value = floats(c, VALUE, index);
        for (int64_t d = 0; d < s->dim_v; d++)
            out[d] = r->element == F64 ? out[d] + weight * value[d]
                                       : (float)out[d] + (float)weight * (float)value[d];
    }
    for (int64_t d = 0; d < s->dim_v; d++)
        out[d] = element_round(r->element, out[d]);
    if (c->has[LSE])
        *output_row(r, LSE) = inner(r, most + inner(r, log(total)));
}

void naive_forward(struct call *wide, enum element e) {
    const struct shape *s = &wide->made_from.shape;
    struct row r = {.call = wide, .element = e};
    r.score = calloc((size_t)s->len_k + 1, sizeof *r.score);
    r.weight = calloc((size_t)s->len_k + 1, sizeof *r.weight);
    assert(r.score && r.weight);
    for (r.b = 0; r.b < s->batch; r.b++) {
        for (r.h = 0; r.h < s->heads_q; r.h++) {
            for (r.i = 0; r.i < wide->span[r.b].q_rows; r.i++)
                attend(&r);
        }
    }
    free(r.score);
    free(r.weight);
}
