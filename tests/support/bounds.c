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

static const double *kv_row(const struct row *r, enum slot slot, int64_t j) {
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

static double scale_of_row(const struct row *r) {
    const struct features *f = &r->call->made_from.features;
    const double scale = f->exact_scale || f->scale != 0
                             ? f->scale
                             : 1 / sqrt((double)r->call->made_from.shape.dim_qk);
    return scale * call_scale(r->call, QUERY_SCALE, r->b, r->h, 0);
}

/* Of a key that the row sees: its product with the query, and the sizes of its terms, of which a score consists. */
static void put_score(struct row *r, int64_t j) {
    const double *q = query_row(r, QUERY), *k = r->key[j].key, scale = r->scale * r->key[j].scale,
                 cap = r->call->made_from.features.softcap, added = bias(r, j), taken = alibi(r, j);
    double product = 0, size = 0;
    for (int64_t d = 0, dim = r->call->made_from.shape.dim_qk; d < dim; d++) {
#pragma clang fp reassociate(on)
        const double term = q[d] * k[d];
        product += term;
        size += fabs(term);
    }
    r->product[j] = product * scale;
    r->size[j] = 1 + size * fabs(scale) + cap + fabs(added) + taken;
    r->score[j] = (cap > 0 ? cap * tanh(r->product[j] / cap) : r->product[j]) + added - taken;
}

static void weigh(struct row *r) {
    const struct call *c = r->call;
    const double sink = sink_of(r);
    r->most = sink;
    for (int64_t j = 0; j < r->keys; j++) {
        r->score[j] = -INFINITY;
        if (call_sees(c, r->b, r->h, r->i, j))
            put_score(r, j);
        r->value[j] = r->score[j] == -INFINITY ? NULL : r->key[j].value;
        r->factor[j] = r->value[j] ? r->key[j].value_scale * call_keeps(c, r->b, r->h, r->i, j) : 0;
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
    double *restrict output = r->sums.output;
    weigh(r);
    memset(output, 0, (size_t)dim_v * sizeof *output);
    for (int64_t j = 0; j < r->keys; j++) {
        const double weight = r->weight[j], factor = r->factor[j], *value = r->value[j];
        for (int64_t d = 0; d < dim_v && value; d++)
            output[d] += weight * scaled_value(factor, value[d]);
    }
}

static void put_result(struct row *r) {
    double *output = result_row(r, OUTPUT);
    attend(r);
    for (int64_t d = 0; d < r->call->made_from.shape.dim_v; d++)
        output[d] = r->sums.output[d];
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

/* What a weight loses that is rounded to its type; over float8 values it may be f16, whose steps stop shrinking. */
static double lost_weight(const struct row *r, double weight) {
    const struct test_case *c = &r->call->made_from;
    const double f16 = c->features.value && c->element == BF16 ? rounding(F16, weight) : 0;
    return fmax(rounding(weight_type(r), weight), f16);
}

/* What a key has in the sums. `size` says what its score's rounding works on. */
struct share {
    const double *values;
    double factor, weight, lost, moved; /* the last of a value that is 1 from the output */
};

static void add_squares(struct squares *sums, const double *output, const struct share *s,
                        int64_t dim) {
    for (int64_t d = 0; d < dim; d++) {
        const long double value = scaled_value(s->factor, s->values[d]),
                          moved = s->moved * (value - output[d]);
        sums[d].values += s->weight * value * s->weight * value;
        sums[d].rounded += s->lost * value * s->lost * value;
        sums[d].scored += moved * moved;
    }
}

static void add_short_squares(const struct sums *sums, const struct share *s, int64_t dim) {
    const double *restrict values = s->values, *restrict output = sums->output;
    double *restrict weighted = sums->values, *restrict rounded = sums->rounded,
                     *restrict scored = sums->scored;
    const double factor = s->factor, weight = s->weight, lost = s->lost, moved = s->moved;
    for (int64_t d = 0; d < dim; d++) {
        const double value = scaled_value(factor, values[d]);
        weighted[d] += square(weight * value);
        rounded[d] += square(lost * value);
        scored[d] += square(moved * (value - output[d]));
    }
}

static void add_key(const struct row *r, int64_t j, double size) {
    const enum element e = r->call->made_from.element;
    const int64_t dim = r->call->made_from.shape.dim_v;
    const double weight = r->weight[j];
    const struct share s = {r->value[j], r->factor[j], weight,
                            lost_weight(r, weight * r->total) / r->total, weight * size};
    if (e == F64)
        add_squares(r->sums.squares, r->sums.output, &s, dim);
    else
        add_short_squares(&r->sums, &s, dim);
    const bool tiny = weight * r->total < least_normal(type_of_sums(e));
    for (int64_t d = 0; tiny && d < dim; d++)
        r->sums.tiny[d] += fabs(weight * scaled_value(s.factor, s.values[d]));
}

/* Of the sums of element d. */
struct roots {
    double values, rounded, scored;
};

static struct roots roots_of(const struct row *r, int64_t d) {
    const struct sums *const s = &r->sums;
    const struct squares *const of = &s->squares[d];
    if (r->call->made_from.element == F64)
        return (struct roots){(double)sqrtl(of->values), (double)sqrtl(of->rounded),
                              (double)sqrtl(of->scored)};
    return (struct roots){sqrt(s->values[d]), sqrt(s->rounded[d]), sqrt(s->scored[d])};
}

/* The terms stand in docs/numerics.md, "The bound". */
static double output_bound(const struct row *r, int64_t d, int64_t seen) {
    const enum element e = r->call->made_from.element, of_weights = weight_type(r);
    const bool rounds = of_weights == F16 || of_weights == BF16 || of_weights == E4M3;
    const struct roots s = roots_of(r, d);
    const double size = fabs(r->sums.output[d]),
                 weights = factor_rounding(of_weights, size) + (rounds ? WALK * s.rounded : 0),
                 sums = sqrt((double)seen) * (s.values + size) + s.scored,
                 bound = rounding(e, size) + weights + WALK * epsilon_of_sums(r) * sums +
                         r->sums.tiny[d];
    return e == F64 ? 2 * bound : bound; /* the reference misses as much */
}

static double lse_bound(const struct row *r, double mean_size) {
    const enum element e = r->call->made_from.element,
                       stored = r->call->made_from.features.lse == LSE_ELEMENT ? e : F32;
    const double lse = r->most + log(r->total);
    return (e == F64 ? 1e-12 : 1e-5) * fmax(1, fabs(lse)) + rounding(stored, lse) +
           WALK * epsilon_of_sums(r) * mean_size;
}

static void clear_sums(const struct sums *s, int64_t dim_v) {
    double *const sums[] = {s->tiny, s->values, s->rounded, s->scored};
    for (size_t i = 0; i < sizeof sums / sizeof sums[0]; i++)
        memset(sums[i], 0, (size_t)dim_v * sizeof *sums[i]);
    memset(s->squares, 0, (size_t)dim_v * sizeof *s->squares);
}

/* With exact scores only exp rounds. */
static void put_bounds_of(struct row *r, bool exact_scores) {
    const int64_t dim_v = r->call->made_from.shape.dim_v;
    double *output = result_row(r, OUTPUT), mean_size = 0;
    int64_t seen = 0;
    attend(r);
    clear_sums(&r->sums, dim_v);
    for (int64_t j = 0; j < r->keys; j++) {
        if (!r->value[j])
            continue;
        const double size = exact_scores ? 1 : r->size[j];
        add_key(r, j, size);
        mean_size += r->weight[j] * size;
        seen++;
    }
    for (int64_t d = 0; d < dim_v; d++)
        output[d] = output_bound(r, d, seen);
    if (r->call->has[LSE])
        *result_row(r, LSE) = lse_bound(r, mean_size);
}

static void put_bounds(struct row *r) { put_bounds_of(r, false); }

static void put_exact_bounds(struct row *r) { put_bounds_of(r, true); }

/* ---- Rows of a call --------------------------------------------------------------------------------------- */

static double *doubles(int64_t count) {
    double *const room = calloc((size_t)count + 1, sizeof *room);
    assert(room);
    return room;
}

static void take_room(struct row *r) {
    const struct shape *const s = &r->call->made_from.shape;
    double **const of_keys[] = {&r->product, &r->size, &r->score, &r->weight, &r->factor},
                   **const of_dims[] = {&r->sums.output, &r->sums.tiny, &r->sums.values,
                                        &r->sums.rounded, &r->sums.scored};
    for (size_t i = 0; i < sizeof of_keys / sizeof of_keys[0]; i++)
        *of_keys[i] = doubles(s->len_k);
    for (size_t i = 0; i < sizeof of_dims / sizeof of_dims[0]; i++)
        *of_dims[i] = doubles(s->dim_v);
    r->key = calloc((size_t)s->len_k + 1, sizeof *r->key);
    r->value = calloc((size_t)s->len_k + 1, sizeof *r->value);
    r->sums.squares = calloc((size_t)s->dim_v + 1, sizeof *r->sums.squares);
    assert(r->key && r->value && r->sums.squares);
}

static void free_room(struct row *r) {
    void *const room[] = {r->product,     r->size,        r->score,        r->weight,
                          r->factor,      r->sums.output, r->sums.tiny,    r->sums.values,
                          r->sums.scored, r->key,         r->sums.rounded, r->sums.squares};
    for (size_t i = 0; i < sizeof room / sizeof room[0]; i++)
        free(room[i]);
    free(r->value);
}

static void find_keys(struct row *r) {
    r->keys = r->call->span[r->b].k_len;
    r->scale = scale_of_row(r);
    for (int64_t j = 0; j < r->keys; j++)
        r->key[j] = (struct key){
            kv_row(r, KEY, j),
            kv_row(r, VALUE, j),
            call_scale(r->call, KEY_SCALE, r->b, kv_head(r), j),
            call_scale(r->call, VALUE_SCALE, r->b, kv_head(r), j),
        };
}

void each_row(struct call *wide, void (*put)(struct row *), void *context) {
    const struct shape *s = &wide->made_from.shape;
    struct row r = {.call = wide, .context = context};
    take_room(&r);
    for (r.b = 0; r.b < s->batch; r.b++) {
        for (r.h = 0; r.h < s->heads_q; r.h++) {
            find_keys(&r);
            for (r.i = 0; r.i < wide->span[r.b].q_rows; r.i++)
                put(&r);
        }
    }
    free_room(&r);
}

void plain_forward(struct call *wide) { each_row(wide, put_result, NULL); }

void plain_bounds(struct call *wide) { each_row(wide, put_bounds, NULL); }

void plain_bounds_of_exact_scores(struct call *wide) { each_row(wide, put_exact_bounds, NULL); }
