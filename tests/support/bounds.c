#include "tests/support/plain.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double *floats(const struct call *c, enum slot slot, const int64_t index[4]) {
    const struct tensor *t = &c->tensor[slot];
    int64_t offset = 0;
    for (int axis = 0; axis < t->dl.ndim; axis++)
        offset += index[axis] * t->stride[axis];
    return (const double *)(const void *)t->image + offset;
}

const double *query_row(const struct row *r, enum slot slot) {
    int64_t index[4];
    call_row(r->call, slot, r->b, r->h, r->i, index);
    return floats(r->call, slot, index);
}

static int64_t kv_head(const struct row *r) {
    const struct shape *s = &r->call->made_from.shape;
    return r->h / (s->heads_q / s->heads_kv);
}

const double *kv_row(const struct row *r, enum slot slot, int64_t j) {
    int64_t index[4];
    call_row(r->call, slot, r->b, kv_head(r), j, index);
    return floats(r->call, slot, index);
}

/* Of OUTPUT or LSE. */
static double *result_row(const struct row *r, enum slot slot) {
    struct tensor *t = &r->call->tensor[slot];
    return (double *)(void *)t->image + (query_row(r, slot) - (const double *)(void *)t->image);
}

static double bias(const struct row *r, int64_t j) {
    return call_bias(r->call, r->b, r->h, r->i, j);
}

double sink_of(const struct row *r) {
    const struct call *c = r->call;
    return c->has[SINKS] ? tensor_get(&c->tensor[SINKS], (int64_t[4]){r->h}) : -INFINITY;
}

double distance_of(const struct row *r, int64_t j) {
    return fabs((double)(r->i + r->call->span[r->b].diagonal - j));
}

static double alibi(const struct row *r, int64_t j) {
    const int64_t index[4] = {r->call->made_from.features.alibi == 2 ? r->b : r->h, r->h};
    if (!r->call->has[ALIBI_SLOPES])
        return 0;
    return tensor_get(&r->call->tensor[ALIBI_SLOPES], index) * distance_of(r, j);
}

double scale_of(const struct row *r, int64_t j) {
    const struct features *f = &r->call->made_from.features;
    const double scale = f->exact_scale || f->scale != 0
                             ? f->scale
                             : 1 / sqrt((double)r->call->made_from.shape.dim_qk);
    return scale * call_scale(r->call, QUERY_SCALE, r->b, r->h, 0) *
           call_scale(r->call, KEY_SCALE, r->b, kv_head(r), j);
}

double scaled_product(const struct row *r, int64_t j) {
    const double *q = query_row(r, QUERY), *k = kv_row(r, KEY, j);
    double x = 0;
    for (int64_t d = 0, dim = r->call->made_from.shape.dim_qk; d < dim; d++) {
#pragma clang fp reassociate(on)
        x += q[d] * k[d];
    }
    return x * scale_of(r, j);
}

static double score(const struct row *r, int64_t j) {
    const double x = scaled_product(r, j), cap = r->call->made_from.features.softcap;
    return (cap > 0 ? cap * tanh(x / cap) : x) + bias(r, j) - alibi(r, j);
}

static void weigh(struct row *r) {
    const struct call *c = r->call;
    const double sink = sink_of(r);
    r->keys = c->span[r->b].k_len;
    r->most = sink;
    for (int64_t j = 0; j < r->keys; j++) {
        r->score[j] = call_sees(c, r->b, r->h, r->i, j) ? score(r, j) : -INFINITY;
        r->value[j] = r->score[j] == -INFINITY ? NULL : kv_row(r, VALUE, j);
        r->factor[j] = r->value[j] ? call_scale(c, VALUE_SCALE, r->b, kv_head(r), j) *
                                         call_keeps(c, r->b, r->h, r->i, j)
                                   : 0;
        r->most = fmax(r->most, r->score[j]);
    }
    r->total = sink == -INFINITY ? 0 : exp(sink - r->most);
    for (int64_t j = 0; j < r->keys; j++) {
        r->weight[j] = r->value[j] ? exp(r->score[j] - r->most) : 0;
        r->total += r->weight[j];
    }
    for (int64_t j = 0; j < r->keys; j++)
        r->weight[j] /= r->value[j] ? r->total : 1;
}

/* A value that dropout drops counts as 0, whatever it holds. */
static double scaled_value(double factor, double value) { return factor == 0 ? 0 : factor * value; }

void attend(struct row *r) {
    const int64_t dim_v = r->call->made_from.shape.dim_v;
    weigh(r);
    memset(r->sums, 0, (size_t)dim_v * sizeof *r->sums);
    for (int64_t j = 0; j < r->keys; j++) {
        const double weight = r->weight[j], factor = r->factor[j], *value = r->value[j];
        for (int64_t d = 0; d < dim_v && value; d++)
            r->sums[d].output += weight * scaled_value(factor, value[d]);
    }
}

static void put_result(struct row *r) {
    double *output = result_row(r, OUTPUT);
    attend(r);
    for (int64_t d = 0; d < r->call->made_from.shape.dim_v; d++)
        output[d] = r->sums[d].output;
    const double none = r->call->made_from.features.empty_lse_inf ? INFINITY : -INFINITY;
    if (r->call->has[LSE])
        *result_row(r, LSE) = r->total == 0 ? none : r->most + log(r->total);
}

/* ---- What a right row may miss ---------------------------------------------------------------------------- */

/* Weights of e4m3 are multiplied by 2^8. */
double least_normal(enum element e) {
    return e == F16 || e == E4M3 ? 0x1p-14 : e == F64 ? 0x1p-1022 : 0x1p-126;
}

double rounding(enum element e, double x) {
    return element_epsilon(e) * fmax(fabs(x), least_normal(e));
}

double factor_rounding(enum element e, double x) {
    return e == F16 || e == BF16 || e == E4M3 ? rounding(e, x) : 0;
}

/* What weights may be rounded to. */
static enum element weight_type(const struct row *r) {
    return r->call->has_e4m3_weights ? E4M3 : r->call->made_from.element;
}

/* Of scores and sums. The tensor cores sum products of float8 to 13 bits. */
static double epsilon_of_sums(const struct row *r) {
    return r->call->has_e4m3_weights ? 0x1p-13
                                     : element_epsilon(type_of_sums(r->call->made_from.element));
}

enum element type_of_sums(enum element e) { return e == F64 ? F64 : F32; }

double score_size(const struct row *r, int64_t j) {
    const double *q = query_row(r, QUERY), *k = kv_row(r, KEY, j);
    double products = 0;
    for (int64_t d = 0, dim = r->call->made_from.shape.dim_qk; d < dim; d++) {
#pragma clang fp reassociate(on)
        products += fabs(q[d] * k[d]);
    }
    return 1 + products * fabs(scale_of(r, j)) + r->call->made_from.features.softcap +
           fabs(bias(r, j)) + alibi(r, j);
}

/* What a weight loses that is rounded to its type; over float8 values it may be f16, whose steps stop shrinking. */
static double lost_weight(const struct row *r, double weight) {
    const struct test_case *c = &r->call->made_from;
    const double f16 = c->features.value && c->element == BF16 ? rounding(F16, weight) : 0;
    return fmax(rounding(weight_type(r), weight), f16);
}

static void add_key(const struct row *r, int64_t j, double size) {
    const enum element e = r->call->made_from.element;
    const double weight = r->weight[j], lost = lost_weight(r, weight * r->total) / r->total;
    const bool tiny = weight * r->total < least_normal(type_of_sums(e));
    const double factor = r->factor[j], *values = r->value[j];
    for (int64_t d = 0, dim = r->call->made_from.shape.dim_v; d < dim; d++) {
        struct sums *s = &r->sums[d];
        const long double value = scaled_value(factor, values[d]),
                          moved = weight * size * (value - s->output);
        s->values += weight * value * weight * value;
        s->rounded += lost * value * lost * value;
        s->scored += moved * moved;
        s->tiny += tiny ? fabs(weight * (double)value) : 0;
    }
}

static double root(long double x) { return (double)sqrtl(x); }

/* The terms stand in docs/numerics.md, "The bound". */
static double output_bound(const struct row *r, const struct sums *s, int64_t seen) {
    const enum element e = r->call->made_from.element, of_weights = weight_type(r);
    const bool rounds = of_weights == F16 || of_weights == BF16 || of_weights == E4M3;
    const double size = fabs(s->output),
                 weights =
                     factor_rounding(of_weights, size) + (rounds ? WALK * root(s->rounded) : 0),
                 sums = sqrt((double)seen) * (root(s->values) + size) + root(s->scored),
                 bound = rounding(e, size) + weights + WALK * epsilon_of_sums(r) * sums + s->tiny;
    return e == F64 ? 2 * bound : bound; /* the reference misses as much */
}

static double lse_bound(const struct row *r, double mean_size) {
    const enum element e = r->call->made_from.element,
                       stored = r->call->made_from.features.lse == LSE_ELEMENT ? e : F32;
    const double lse = r->most + log(r->total);
    return (e == F64 ? 1e-12 : 1e-5) * fmax(1, fabs(lse)) + rounding(stored, lse) +
           WALK * epsilon_of_sums(r) * mean_size;
}

/* `size` says what a score's rounding works on. */
static void put_bounds_of(struct row *r, double (*size)(const struct row *, int64_t)) {
    double *output = result_row(r, OUTPUT), mean_size = 0;
    int64_t seen = 0;
    attend(r);
    for (int64_t j = 0; j < r->keys; j++) {
        if (!r->value[j])
            continue;
        const double of_key = size(r, j);
        add_key(r, j, of_key);
        mean_size += r->weight[j] * of_key;
        seen++;
    }
    for (int64_t d = 0; d < r->call->made_from.shape.dim_v; d++)
        output[d] = output_bound(r, &r->sums[d], seen);
    if (r->call->has[LSE])
        *result_row(r, LSE) = lse_bound(r, mean_size);
}

static double exp_alone(const struct row *r, int64_t j) { return (void)r, (void)j, 1; }

static void put_bounds(struct row *r) { put_bounds_of(r, score_size); }

static void put_exact_bounds(struct row *r) { put_bounds_of(r, exp_alone); }

/* ---- Rows of a call --------------------------------------------------------------------------------------- */

void each_row(struct call *wide, void (*put)(struct row *), void *context) {
    const struct shape *s = &wide->made_from.shape;
    const size_t keys = (size_t)s->len_k + 1;
    struct row r = {.call = wide, .context = context};
    r.score = calloc(keys, sizeof *r.score);
    r.weight = calloc(keys, sizeof *r.weight);
    r.value = calloc(keys, sizeof *r.value);
    r.factor = calloc(keys, sizeof *r.factor);
    r.sums = calloc((size_t)s->dim_v + 1, sizeof *r.sums);
    assert(r.score && r.weight && r.value && r.factor && r.sums);
    for (r.b = 0; r.b < s->batch; r.b++) {
        for (r.h = 0; r.h < s->heads_q; r.h++) {
            for (r.i = 0; r.i < wide->span[r.b].q_rows; r.i++)
                put(&r);
        }
    }
    free(r.score);
    free(r.weight);
    free(r.value);
    free(r.factor);
    free(r.sums);
}

void plain_forward(struct call *wide) { each_row(wide, put_result, NULL); }

void plain_bounds(struct call *wide) { each_row(wide, put_bounds, NULL); }

void plain_bounds_of_exact_scores(struct call *wide) { each_row(wide, put_exact_bounds, NULL); }
