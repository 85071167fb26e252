/* The gradients of an upcast call by plain loops, and how far a row of the table may be from each element of them. */
#include "tests/support/plain.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One element of a gradient: a sum over pairs of a row and a key, and what its error is made of. */
struct sum {
    double value, squares; /* of the terms */
    double errors;         /* squares of independent ones */
    int64_t terms;
    /* Of the row that is summed now, what its lse, its delta and a rounded d_output move together. */
    double scaled, shifted, drifted;
};

/* A number that flows from a pair into sums, times something of theirs that is exact. */
struct flow {
    double value, weight; /* the derivative of the value by the row's delta, but for its sign */
    double error, drift;
};

/* Of the row that is summed now. */
struct errors {
    double lse, delta; /* of the lse relative to the weights, of delta in itself */
    double output;     /* of d_output times output, rounded */
    bool rounds;       /* d_output may be rounded to a shorter type */
};

/* <d_output, value> of a pair, the sum of its terms' sizes, and what rounding d_output moves it by. */
struct projection {
    double product, size, rounded;
};

struct gathering {
    struct call *values;
    struct sum *sums[SLOTS]; /* of each gradient that is wanted, compact; else NULL */
    struct errors of_row;
    struct projection *projection; /* [keys]; of the row that is summed now */
    double *d_output_rounding;     /* [dim_v]; what rounding its d_output costs */
};

static void add(struct sum *s, const struct flow *flow, double times) {
    s->value += flow->value * times;
    s->squares += square(flow->value * times);
    s->errors += square(flow->error * times);
    s->terms++;
    s->scaled += flow->value * times;
    s->shifted += flow->weight * times;
    s->drifted += flow->drift * fabs(times);
}

/* The row has no more terms in this sum. NaN in its delta is nothing to a value. */
static void settle(struct sum *s, const struct errors *of_row) {
    s->errors += square(of_row->lse * s->scaled) + square(s->drifted);
    if (s->shifted != 0)
        s->errors += square(of_row->delta * s->shifted);
    s->scaled = s->shifted = s->drifted = 0;
}

/* A term that is all that the row has in this sum: add() and settle() in one. */
static void add_whole(struct sum *s, const struct flow *flow, double times,
                      const struct errors *of_row) {
    const double value = flow->value * times, shifted = flow->weight * times;
    s->value += value;
    s->squares += square(value);
    s->terms++;
    s->errors += square(flow->error * times) + square(of_row->lse * value) +
                 square(flow->drift * times) + (shifted != 0 ? square(of_row->delta * shifted) : 0);
}

/* The sum of an element of a compact tensor, in which axes of extent 1 stand for all. */
static struct sum *sum_at(const struct gathering *g, enum slot slot, const int64_t index[4]) {
    const struct tensor *t = &g->values->tensor[slot];
    int64_t offset = 0;
    for (int axis = 0; axis < t->dl.ndim; axis++)
        offset = offset * t->shape[axis] + (t->shape[axis] > 1 ? index[axis] : 0);
    return &g->sums[slot][offset];
}

/* Of the first element of a row of D_QUERY, or of key j in D_KEY and D_VALUE. */
static struct sum *sum_row(const struct gathering *g, enum slot slot, int64_t b, int64_t h,
                           int64_t l) {
    int64_t index[4];
    call_row(g->values, slot, b, h, l, index);
    return sum_at(g, slot, index);
}

static struct sum *slope_sum(const struct gathering *g, const struct row *r) {
    const bool each_batch = r->call->made_from.features.alibi == 2;
    return sum_at(g, D_ALIBI_SLOPES, (int64_t[4]){each_batch ? r->b : r->h, r->h});
}

/* ---- A row and a key ------------------------------------------------------------------------- */

static double epsilon_of_sums(const struct row *r) {
    return element_epsilon(type_of_sums(r->call->made_from.element));
}

static struct projection project(const struct gathering *g, const struct row *r, int64_t j) {
    const double *d_output = query_row(r, D_OUTPUT), *values = r->value[j], factor = r->factor[j];
    struct projection p = {0};
    for (int64_t d = 0; factor != 0 && d < r->call->made_from.shape.dim_v; d++) {
#pragma clang fp reassociate(on)
        const double value = factor * values[d], term = d_output[d] * value;
        p.product += term;
        p.size += fabs(term);
        p.rounded += square(g->d_output_rounding[d] * value);
    }
    p.rounded = sqrt(p.rounded);
    return p;
}

static void project_all(struct gathering *g, const struct row *r) {
    const enum element e = r->call->made_from.element;
    const double *d_output = query_row(r, D_OUTPUT);
    for (int64_t d = 0; d < r->call->made_from.shape.dim_v; d++)
        g->d_output_rounding[d] = factor_rounding(e, d_output[d]);
    for (int64_t j = 0; j < r->keys; j++) {
        if (r->value[j])
            g->projection[j] = project(g, r, j);
    }
}

/* The gradient of the logit, and of query times key before the cap; of the value, to be multiplied by d_output. */
struct pair {
    struct flow logit, product, value;
};

static struct pair pair_of(const struct gathering *g, const struct row *r, int64_t j,
                           double delta) {
    const struct errors *const of_row = &g->of_row;
    const struct projection p = g->projection[j];
    const enum element e = r->call->made_from.element;
    const double u = epsilon_of_sums(r), least = least_normal(type_of_sums(e)),
                 weight = r->weight[j], m = r->size[j], cap = r->call->made_from.features.softcap;
    double slope = 1, slope_error = 0;
    if (cap > 0) {
        const double t = tanh(r->product[j] / cap);
        slope = 1 - t * t;
        slope_error = 2 * u * (1 + slope * m / cap);
    }
    const double d_logit = weight * (p.product - delta),
                 error = u * (m * fabs(d_logit) + weight * (p.size + fabs(delta))) +
                         least * (1 + p.size + fabs(delta)),
                 drift = of_row->rounds ? weight * (p.rounded + of_row->output) : 0,
                 kept = weight * r->factor[j],
                 kept_error = u * m * kept + factor_rounding(e, kept) + least +
                              (of_row->rounds ? element_epsilon(e) * kept : 0);
    return (struct pair){
        .logit = {d_logit, weight, error + factor_rounding(e, d_logit), drift},
        .product = {d_logit * slope, weight * slope,
                    error * slope + fabs(d_logit) * slope_error +
                        factor_rounding(e, d_logit * slope),
                    drift * slope},
        .value = {kept, 0, kept_error, 0},
    };
}

static void gather_pair(struct gathering *g, const struct row *r, int64_t j,
                        const struct pair *pair) {
    const struct shape *s = &r->call->made_from.shape;
    const int64_t kv_head = r->h / (s->heads_q / s->heads_kv);
    const double scale = r->scale * r->key[j].scale, *k = r->key[j].key, *q = query_row(r, QUERY),
                 *d_output = query_row(r, D_OUTPUT);
    struct sum *const d_query = g->sums[D_QUERY] ? sum_row(g, D_QUERY, r->b, r->h, r->i) : NULL,
                      *const d_key = g->sums[D_KEY] ? sum_row(g, D_KEY, r->b, kv_head, j) : NULL,
                      *const d_value =
                          g->sums[D_VALUE] ? sum_row(g, D_VALUE, r->b, kv_head, j) : NULL;
    for (int64_t d = 0; d_query && d < s->dim_qk; d++)
        add(&d_query[d], &pair->product, scale * k[d]);
    for (int64_t d = 0; d_key && d < s->dim_qk; d++)
        add_whole(&d_key[d], &pair->product, scale * q[d], &g->of_row);
    for (int64_t d = 0; d_value && r->factor[j] != 0 && d < s->dim_v; d++)
        add_whole(&d_value[d], &pair->value, d_output[d], &g->of_row);
    if (g->sums[D_BIAS])
        add(sum_at(g, D_BIAS, (int64_t[4]){r->b, r->h, r->i, j}), &pair->logit, 1);
    if (g->sums[D_ALIBI_SLOPES])
        add(slope_sum(g, r), &pair->logit, -distance_of(r, j));
}

/* ---- A row ----------------------------------------------------------------------------------- */

static void settle_row(struct gathering *g, const struct row *r) {
    const struct tensor *bias = &g->values->tensor[BIAS];
    const bool apart = g->sums[D_BIAS] && bias->shape[3] > 1;
    for (int64_t d = 0; g->sums[D_QUERY] && d < r->call->made_from.shape.dim_qk; d++)
        settle(sum_row(g, D_QUERY, r->b, r->h, r->i) + d, &g->of_row);
    for (int64_t j = 0; g->sums[D_BIAS] && j < (apart ? r->keys : 1); j++)
        settle(sum_at(g, D_BIAS, (int64_t[4]){r->b, r->h, r->i, j}), &g->of_row);
    if (g->sums[D_ALIBI_SLOPES])
        settle(slope_sum(g, r), &g->of_row);
}

/* delta of a row that sees keys, and the errors that all of its pairs have in common. */
static double find_delta(struct gathering *g, const struct row *r) {
    const struct call *c = r->call;
    const enum element e = c->made_from.element,
                       stored = c->made_from.features.lse == LSE_ELEMENT ? e : F32;
    const double u = epsilon_of_sums(r), lse = r->most + log(r->total),
                 *d_output = query_row(r, D_OUTPUT);
    double delta = 0, sizes = 0, rounded = 0, output = 0;
    project_all(g, r);
    for (int64_t j = 0; j < r->keys; j++) {
        if (!r->value[j])
            continue;
        delta += r->weight[j] * g->projection[j].product;
        sizes += r->weight[j] * g->projection[j].size;
    }
    for (int64_t j = 0; j < r->keys; j++) {
        if (r->value[j])
            rounded += square(u * r->size[j] * r->weight[j] * (g->projection[j].product - delta));
    }
    for (int64_t d = 0; d < c->made_from.shape.dim_v; d++) {
        rounded += square(rounding(e, r->sums.output[d]) * d_output[d]);
        output += square(g->d_output_rounding[d] * r->sums.output[d]);
    }
    const double d_lse = c->has[D_LSE] ? *query_row(r, D_LSE) : 0;
    g->of_row = (struct errors){
        .lse = rounding(stored, lse) + u * fabs(lse),
        .delta = sqrt(rounded) + u * (sizes + fabs(d_lse)),
        .output = sqrt(output),
        .rounds = call_gradient_element(c, D_OUTPUT) != e && (e == F16 || e == BF16),
    };
    return delta - d_lse;
}

/* A row that sees no key, but has a sink: all that it moves is that. */
static double delta_of_sink(struct gathering *g, const struct row *r) {
    const double d_lse = r->call->has[D_LSE] ? *query_row(r, D_LSE) : 0;
    g->of_row = (struct errors){.delta = epsilon_of_sums(r) * fabs(d_lse)};
    return -d_lse;
}

static void gather_sink(struct gathering *g, const struct row *r, double delta) {
    const double weight = exp(sink_of(r) - r->most) / r->total;
    const struct flow flow = {-weight * delta, weight,
                              epsilon_of_sums(r) * (1 + fabs(sink_of(r))) * fabs(weight * delta),
                              0};
    add_whole(&g->sums[D_SINKS][r->h], &flow, 1, &g->of_row);
}

static void gather_row(struct row *r) {
    struct gathering *g = r->context;
    bool sees = false;
    attend(r);
    for (int64_t j = 0; j < r->keys; j++)
        sees |= r->value[j] != NULL;
    if (!sees && sink_of(r) == -INFINITY)
        return;
    const double delta = sees ? find_delta(g, r) : delta_of_sink(g, r);
    for (int64_t j = 0; j < r->keys; j++) {
        if (!r->value[j])
            continue;
        const struct pair pair = pair_of(g, r, j, delta);
        gather_pair(g, r, j, &pair);
    }
    settle_row(g, r);
    if (g->sums[D_SINKS] && sink_of(r) != -INFINITY)
        gather_sink(g, r, delta);
}

/* ---- The call -------------------------------------------------------------------------------- */

/* The terms stand in docs/numerics.md, "The bound of a gradient". */
static double bound_of(const struct call *c, enum slot slot, const struct sum *s) {
    const enum element e = c->made_from.element, stored = call_gradient_element(c, slot);
    const double sums = element_epsilon(type_of_sums(e)) * sqrt((double)s->terms) *
                        (sqrt(s->squares) + fabs(s->value)),
                 /* no reference has them in double */
        roundings = slot == D_ALIBI_SLOPES || slot == D_SINKS ? 2 : 1,
                 bound = roundings * rounding(stored, s->value) + least_normal(type_of_sums(e)) +
                         WALK * (sqrt(s->errors) + sums);
    return e == F64 ? 2 * bound : bound;
}

void plain_gradients(struct call *values, struct call *bounds) {
    struct gathering g = {.values = values};
    for (enum slot slot = D_QUERY; slot < SLOTS; slot++) {
        g.sums[slot] = values->has[slot] ? calloc((size_t)tensor_count(&values->tensor[slot]) + 1,
                                                  sizeof *g.sums[slot])
                                         : NULL;
        assert(!values->has[slot] || g.sums[slot]);
    }
    g.projection = calloc((size_t)values->made_from.shape.len_k + 1, sizeof *g.projection);
    g.d_output_rounding =
        calloc((size_t)values->made_from.shape.dim_v + 1, sizeof *g.d_output_rounding);
    assert(g.projection && g.d_output_rounding);
    each_row(values, gather_row, &g);
    free(g.projection);
    free(g.d_output_rounding);
    for (enum slot slot = D_QUERY; slot < SLOTS; slot++) {
        struct tensor *t = &values->tensor[slot];
        int64_t index[4] = {0};
        for (int64_t n = 0, count = g.sums[slot] ? tensor_count(t) : 0; n < count;
             n++, tensor_next(t, index)) {
            tensor_set(t, index, g.sums[slot][n].value);
            tensor_set(&bounds->tensor[slot], index, bound_of(values, slot, &g.sums[slot][n]));
        }
        free(g.sums[slot]);
    }
}
