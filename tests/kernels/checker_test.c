/*
 * Would the loop notice? Kernels that are wrong on purpose, made from the reference, and what the checker has to say.
 */
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

static const dlattn_api *api;

static void *data_of(const DLTensor *t) { return (char *)t->data + t->byte_offset; }

/* ---- Wrong answers ---------------------------------------------------------------------------------------- */

static int32_t honest(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                      const dlattn_exec *exec) {
    return api->forward(desc, t, exec);
}

static int32_t scaled(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                      const dlattn_exec *exec) {
    dlattn_forward_desc wrong = *desc;
    wrong.scale = 1.0001 / sqrt((double)t->query->shape[3]);
    return api->forward(&wrong, t, exec);
}

static int32_t misaligned(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                          const dlattn_exec *exec) {
    dlattn_forward_desc wrong = *desc;
    wrong.alignment = !desc->alignment;
    return api->forward(&wrong, t, exec);
}

static int32_t unmasked(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                        const dlattn_exec *exec) {
    dlattn_tensors wrong = *t;
    wrong.mask = NULL;
    return api->forward(desc, &wrong, exec);
}

static int32_t beyond_lengths(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                              const dlattn_exec *exec) {
    dlattn_tensors wrong = *t;
    wrong.key_lengths = NULL;
    return api->forward(desc, &wrong, exec);
}

static int32_t empty_is_minus(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                              const dlattn_exec *exec) {
    dlattn_forward_desc wrong = *desc;
    wrong.flags &= ~DLATTN_EMPTY_LSE_INF;
    return api->forward(&wrong, t, exec);
}

/* Views without the last row or key. */
static DLTensor shortened(const DLTensor *t, int64_t shape[4]) {
    DLTensor cut = *t;
    memcpy(shape, t->shape, 4 * sizeof *shape);
    shape[2]--;
    cut.shape = shape;
    return cut;
}

static int32_t without_last_key(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                                const dlattn_exec *exec) {
    int64_t key_shape[4], value_shape[4];
    dlattn_tensors wrong = *t;
    const DLTensor key = shortened(t->key, key_shape), value = shortened(t->value, value_shape);
    wrong.key = &key;
    wrong.value = &value;
    return api->forward(desc, &wrong, exec);
}

static int32_t without_last_row(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                                const dlattn_exec *exec) {
    int64_t query_shape[4], output_shape[4];
    dlattn_tensors wrong = *t;
    const DLTensor query = shortened(t->query, query_shape),
                   output = shortened(t->output, output_shape);
    wrong.query = &query;
    wrong.output = &output;
    return api->forward(desc, &wrong, exec);
}

static int32_t no_lse(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                      const dlattn_exec *exec) {
    dlattn_tensors wrong = *t;
    wrong.lse = NULL;
    return api->forward(desc, &wrong, exec);
}

/* ---- Right answers, and something else -------------------------------------------------------------------- */

static int32_t rough(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                     const dlattn_exec *exec) {
    const int32_t status = api->forward(desc, t, exec);
    float *out = data_of(t->output);
    out[3] += 2e-6f;
    return status;
}

static int32_t rough_lse(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                         const dlattn_exec *exec) {
    const int32_t status = api->forward(desc, t, exec);
    float *lse = data_of(t->lse);
    lse[0] += 4e-5f * fmaxf(1, fabsf(lse[0]));
    return status;
}

static int32_t hides_nan(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                         const dlattn_exec *exec) {
    const int32_t status = api->forward(desc, t, exec);
    float *out = data_of(t->output);
    const int64_t count =
        t->output->shape[0] * t->output->shape[1] * t->output->shape[2] * t->output->shape[3];
    for (int64_t n = 0; n < count; n++)
        out[n] = isnan(out[n]) ? 0 : out[n];
    return status;
}

static int32_t spreads_nan(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                           const dlattn_exec *exec) {
    const int32_t status = api->forward(desc, t, exec);
    *(float *)data_of(t->output) = NAN;
    return status;
}

static int32_t restless(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                        const dlattn_exec *exec) {
    static int calls;
    const int32_t status = api->forward(desc, t, exec);
    float *out = data_of(t->output);
    if (calls++ % 2)
        *out = nextafterf(*out, 10);
    return status;
}

static int32_t writes_gap(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                          const dlattn_exec *exec) {
    const int32_t status = api->forward(desc, t, exec);
    ((float *)data_of(t->output))[t->output->shape[3]] = 0;
    return status;
}

static int32_t writes_before(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                             const dlattn_exec *exec) {
    const int32_t status = api->forward(desc, t, exec);
    ((unsigned char *)data_of(t->output))[-1] = 0;
    return status;
}

static int32_t writes_input(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                            const dlattn_exec *exec) {
    const int32_t status = api->forward(desc, t, exec);
    ((float *)data_of(t->value))[1] = 0;
    return status;
}

static int32_t refuses(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                       const dlattn_exec *exec) {
    (void)desc;
    (void)t;
    (void)exec;
    return DLATTN_INTERNAL;
}

/* ---- The checker ------------------------------------------------------------------------------------------ */

static const struct {
    const char *name;
    int32_t (*forward)(const dlattn_forward_desc *, const dlattn_tensors *, const dlattn_exec *);
    const char *features;
    const char *said; /* part of the verdict; NULL: nothing is wrong */
} wrongs[] = {
    {"honest", honest, "lse", NULL},
    {"scaled", scaled, "plain", "output["},
    {"misaligned", misaligned, "causal", "output["},
    {"unmasked", unmasked, "mask_keys", "output["},
    {"beyond_lengths", beyond_lengths, "key_lengths", "output["},
    {"empty_is_minus", empty_is_minus, "mask_rows_inf", "is -inf, must be inf"},
    {"without_last_key", without_last_key, "plain", "output["},
    {"without_last_row", without_last_row, "plain", "output["},
    {"no_lse", no_lse, "lse", "lse["},
    {"rough", rough, "plain", "output[0, 0, 0, 3]"},
    {"rough_lse", rough_lse, "lse", "lse[0, 0, 0, 0]"},
    {"hides_nan", hides_nan, "nan_query", "must be nan"},
    {"spreads_nan", spreads_nan, "plain", "output[0, 0, 0, 0] is nan"},
    {"restless", restless, "plain", "in a second run"},
    {"writes_gap", writes_gap, "odd", "output: byte"},
    {"writes_before", writes_before, "shifted", "output: byte"},
    {"writes_input", writes_input, "plain", "value: an input was written"},
    {"refuses", refuses, "plain", "internal error"},
};

Test(checker, notices) {
    api = test_api();
    for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
        const struct subject subject = {
            .api = api, .place = &place_cpu, .kernel = "cpu_fwd_ref", .forward = wrongs[i].forward};
        const struct test_case c = {
            {2, 2, 1, 18, 40, 24, 24}, *features_named(wrongs[i].features), F32, 77};
        struct verdict v;
        check_case(&v, &subject, &c);
        if (wrongs[i].said) {
            cr_expect(eq(int, v.outcome, FAILED), "%s: %s", wrongs[i].name, v.text);
            cr_expect(strstr(v.text, wrongs[i].said) != NULL, "%s: %s", wrongs[i].name, v.text);
        } else {
            cr_expect(eq(int, v.outcome, PASSED), "%s: %s", wrongs[i].name, v.text);
        }
    }
}

/* ---- Backward --------------------------------------------------------------------------------------------- */

#define BACKWARD_ARGUMENTS                                                                         \
    const dlattn_forward_desc *desc, const dlattn_tensors *t, const dlattn_gradients *g,           \
        const dlattn_exec *exec

static int32_t honest_backward(BACKWARD_ARGUMENTS) { return api->backward(desc, t, g, exec); }

static int32_t scaled_backward(BACKWARD_ARGUMENTS) {
    dlattn_forward_desc wrong = *desc;
    wrong.scale = 1.0001 / sqrt((double)t->query->shape[3]);
    return api->backward(&wrong, t, g, exec);
}

static int32_t misaligned_backward(BACKWARD_ARGUMENTS) {
    dlattn_forward_desc wrong = *desc;
    wrong.alignment = !desc->alignment;
    return api->backward(&wrong, t, g, exec);
}

static int32_t drops_others(BACKWARD_ARGUMENTS) {
    dlattn_forward_desc wrong = *desc;
    wrong.dropout_offset++;
    return api->backward(&wrong, t, g, exec);
}

static int32_t drops_nothing(BACKWARD_ARGUMENTS) {
    dlattn_forward_desc wrong = *desc;
    wrong.dropout_probability = 0;
    return api->backward(&wrong, t, g, exec);
}

static int32_t unmasked_backward(BACKWARD_ARGUMENTS) {
    dlattn_tensors wrong = *t;
    wrong.mask = NULL;
    return api->backward(desc, &wrong, g, exec);
}

static int32_t beyond_lengths_backward(BACKWARD_ARGUMENTS) {
    dlattn_tensors wrong = *t;
    wrong.key_lengths = NULL;
    return api->backward(desc, &wrong, g, exec);
}

static int32_t without_d_lse(BACKWARD_ARGUMENTS) {
    dlattn_gradients wrong = *g;
    wrong.d_lse = NULL;
    return api->backward(desc, t, &wrong, exec);
}

static int32_t without_d_sinks(BACKWARD_ARGUMENTS) {
    dlattn_gradients wrong = *g;
    wrong.d_sinks = NULL;
    return api->backward(desc, t, &wrong, exec);
}

static int32_t rough_bias(BACKWARD_ARGUMENTS) {
    const int32_t status = api->backward(desc, t, g, exec);
    *(float *)data_of(g->d_bias) *= 1.001F;
    return status;
}

/* The last row of the query reaches no key. */
static int32_t without_last_row_backward(BACKWARD_ARGUMENTS) {
    dlattn_tensors wrong = *t;
    dlattn_gradients of_them = *g;
    int64_t shapes[4][4];
    const DLTensor query = shortened(t->query, shapes[0]), output = shortened(t->output, shapes[1]),
                   d_output = shortened(g->d_output, shapes[2]),
                   d_query = shortened(g->d_query, shapes[3]);
    DLTensor lse = *t->lse;
    int64_t lse_shape[3] = {lse.shape[0], lse.shape[1], lse.shape[2] - 1};
    lse.shape = lse_shape;
    wrong.query = &query;
    wrong.output = &output;
    wrong.lse = &lse;
    of_them.d_output = &d_output;
    of_them.d_query = &d_query;
    of_them.d_lse = NULL;
    return api->backward(desc, &wrong, &of_them, exec);
}

static int32_t rough_backward(BACKWARD_ARGUMENTS) {
    const int32_t status = api->backward(desc, t, g, exec);
    ((float *)data_of(g->d_key))[3] += 2e-6F;
    return status;
}

static int32_t hides_nan_backward(BACKWARD_ARGUMENTS) {
    const int32_t status = api->backward(desc, t, g, exec);
    float *d_query = data_of(g->d_query);
    const int64_t *shape = g->d_query->shape;
    for (int64_t n = 0; n < shape[0] * shape[1] * shape[2] * shape[3]; n++)
        d_query[n] = isnan(d_query[n]) ? 0 : d_query[n];
    return status;
}

static int32_t spreads_nan_backward(BACKWARD_ARGUMENTS) {
    const int32_t status = api->backward(desc, t, g, exec);
    *(float *)data_of(g->d_value) = NAN;
    return status;
}

static int32_t restless_backward(BACKWARD_ARGUMENTS) {
    static int calls;
    const int32_t status = api->backward(desc, t, g, exec);
    float *d_value = data_of(g->d_value);
    if (calls++ % 2)
        *d_value = nextafterf(*d_value, 10);
    return status;
}

static int32_t writes_gap_backward(BACKWARD_ARGUMENTS) {
    const int32_t status = api->backward(desc, t, g, exec);
    ((float *)data_of(g->d_query))[g->d_query->shape[3]] = 0;
    return status;
}

static int32_t writes_before_backward(BACKWARD_ARGUMENTS) {
    const int32_t status = api->backward(desc, t, g, exec);
    ((unsigned char *)data_of(g->d_key))[-1] = 0;
    return status;
}

static int32_t writes_lse(BACKWARD_ARGUMENTS) {
    const int32_t status = api->backward(desc, t, g, exec);
    *(float *)data_of(t->lse) = 0;
    return status;
}

/* A weight of 0 times what a blind row has for its d_output. */
static int32_t leaks(BACKWARD_ARGUMENTS) {
    const int32_t status = api->backward(desc, t, g, exec);
    const float *d_output = data_of(g->d_output);
    const int64_t *shape = g->d_output->shape;
    float *d_value = data_of(g->d_value);
    for (int64_t n = 0; n < shape[0] * shape[1] * shape[2] * shape[3]; n++)
        d_value[n % shape[3]] += 0 * d_output[n];
    return status;
}

static const struct {
    const char *name;
    int32_t (*backward)(BACKWARD_ARGUMENTS);
    const char *features;
    const char *said; /* part of the verdict; NULL: nothing is wrong */
} wrongs_of_backward[] = {
    {"honest", honest_backward, "bias_keys", NULL},
    {"scaled", scaled_backward, "plain", "d_query["},
    {"misaligned", misaligned_backward, "causal", "d_key["},
    {"drops_others", drops_others, "dropout", "d_value["},
    {"drops_nothing", drops_nothing, "dropout", "d_query["},
    {"unmasked", unmasked_backward, "mask_keys", "d_value["},
    {"beyond_lengths", beyond_lengths_backward, "key_lengths", "d_query["},
    {"without_d_lse", without_d_lse, "plain", "d_query["},
    {"without_d_sinks", without_d_sinks, "sinks", "d_sinks["},
    {"rough_bias", rough_bias, "bias_keys", "d_bias[0, 0, 0, 0]"},
    {"without_last_row", without_last_row_backward, "plain", "d_key["},
    {"rough", rough_backward, "plain", "d_key[0, 0, 0, 3]"},
    {"hides_nan", hides_nan_backward, "nan_query", "must be nan"},
    {"spreads_nan", spreads_nan_backward, "plain", "d_value[0, 0, 0, 0] is nan"},
    {"restless", restless_backward, "plain", "in a second run"},
    {"writes_gap", writes_gap_backward, "odd", "d_query: byte"},
    {"writes_before", writes_before_backward, "shifted", "d_key: byte"},
    {"writes_lse", writes_lse, "plain", "lse: an input was written"},
    {"leaks", leaks, "mask_rows", "d_value[0, 0, 0, 0] is nan"},
};

/* The first case from seed 77 on that has every gradient. */
static struct test_case with_every_gradient(const char *features) {
    struct test_case c = {{2, 2, 1, 18, 40, 24, 24}, *features_named(features), F32, 76};
    bool every = false;
    c.features.backward = true;
    while (!every) {
        struct call call;
        c.seed++;
        call_make(&call, &c);
        every = call.has[D_LSE] && call.has[D_QUERY] && call.has[D_KEY] && call.has[D_VALUE] &&
                call.has[D_BIAS] == call.has[BIAS] && call.has[D_SINKS] == call.has[SINKS];
        call_free(&call);
    }
    return c;
}

Test(checker, notices_in_backward) {
    api = test_api();
    for (size_t i = 0; i < sizeof wrongs_of_backward / sizeof wrongs_of_backward[0]; i++) {
        const char *name = wrongs_of_backward[i].name, *said = wrongs_of_backward[i].said;
        const struct subject subject = {.api = api,
                                        .place = &place_cpu,
                                        .kernel = "cpu_bwd_ref",
                                        .backward = wrongs_of_backward[i].backward};
        const struct test_case c = with_every_gradient(wrongs_of_backward[i].features);
        struct verdict v;
        check_case(&v, &subject, &c);
        cr_expect(eq(int, v.outcome, said ? FAILED : PASSED), "%s: %s", name, v.text);
        cr_expect(said == NULL || strstr(v.text, said), "%s: %s", name, v.text);
    }
}

/* ---- One key of one row ----------------------------------------------------------------------------------- */

/* What goes wrong with it. */
enum slip { LOST, TWICE, LOST_IN_LSE, SLIPS };

enum { SLIP_DIM = 64 };

/* In the case that runs: the last row, which sees all keys, and one of them that weighs no less than the average. */
static struct {
    enum slip slip;
    enum element element;
    double weight, value[SLIP_DIM];
} slipped;

static void draw_slip(const struct test_case *from) {
    static double weight[1000];
    struct call c;
    const int64_t keys = from->shape.len_k, last = from->shape.len_q - 1;
    double total = 0;
    call_make(&c, from);
    for (int64_t j = 0; j < keys; j++) {
        double dot = 0;
        for (int64_t d = 0; d < SLIP_DIM; d++)
            dot += tensor_get(&c.tensor[QUERY], (int64_t[4]){0, 0, last, d}) *
                   tensor_get(&c.tensor[KEY], (int64_t[4]){0, 0, j, d});
        weight[j] = exp(dot / sqrt(SLIP_DIM));
        total += weight[j];
    }
    int64_t key = random_below(from->seed, 901, keys);
    while (weight[key] * (double)keys < total)
        key = (key + 1) % keys;
    slipped.element = from->element;
    slipped.weight = weight[key] / total;
    for (int64_t d = 0; d < SLIP_DIM; d++)
        slipped.value[d] = tensor_get(&c.tensor[VALUE], (int64_t[4]){0, 0, key, d});
    call_free(&c);
}

static int32_t slips(const dlattn_forward_desc *desc, const dlattn_tensors *t,
                     const dlattn_exec *exec) {
    const int32_t status = api->forward(desc, t, exec);
    const int64_t last = t->output->shape[2] - 1;
    const double by = slipped.slip == TWICE ? slipped.weight : -slipped.weight;
    struct tensor row = {.element = slipped.element, .dl.ndim = 1, .shape = {SLIP_DIM}};
    row.image = (unsigned char *)data_of(t->output) +
                (size_t)(last * SLIP_DIM) * element_bytes(slipped.element);
    row.stride[0] = 1;
    for (int64_t d = 0; d < SLIP_DIM && slipped.slip != LOST_IN_LSE; d++) {
        const int64_t at[4] = {d};
        tensor_set(&row, at, tensor_get(&row, at) + by * slipped.value[d]);
    }
    if (slipped.slip == LOST_IN_LSE)
        ((float *)data_of(t->lse))[last] += (float)log1p(by);
    return status;
}

/* A key that one row loses, or has twice, is noticed in every try, in each type, with few keys and many, also beside rows
 * that see few keys and so are larger and rounded more. */
Test(checker, notices_one_key_of_one_row) {
    enum { TRIES = 25 };
    static const struct {
        int64_t len_q, len_k;
        const char *features;
    } cases[] = {{3, 3, "lse"}, {40, 40, "causal_lse"}, {120, 120, "causal_lse"}, {3, 1000, "lse"}};
    static const char *const names[SLIPS] = {"lost", "twice", "lost in lse"};
    const struct subject subject = {
        .api = api = test_api(), .place = &place_cpu, .kernel = "cpu_fwd_ref", .forward = slips};
    for (enum element e = F32; e <= BF16; e++) {
        for (int n = 0; n < 4 * SLIPS; n++) {
            const int64_t len_q = cases[n / SLIPS].len_q, len_k = cases[n / SLIPS].len_k;
            int noticed = 0;
            slipped.slip = (enum slip)(n % SLIPS);
            for (uint64_t seed = 1; seed <= TRIES; seed++) {
                const struct test_case c = {{1, 1, 1, len_q, len_k, SLIP_DIM, SLIP_DIM},
                                            *features_named(cases[n / SLIPS].features),
                                            e,
                                            seed};
                struct verdict v;
                draw_slip(&c);
                check_case(&v, &subject, &c);
                noticed += v.outcome == FAILED;
            }
            cr_expect(eq(int, noticed, TRIES), "%s, %lld keys, %s", element_name(e),
                      (long long)len_k, names[slipped.slip]);
        }
    }
}

/* ---- A right row in short floats -------------------------------------------------------------------------- */

/* Backward as a fast row computes it, from the output and the lse of forward, with sums in f32 and, in f16 and bf16, weights and
 * gradients of logits rounded before they meet the tensors. Of what the library offers it knows causal, softcap, bias and groups. */
struct short_row {
    const dlattn_forward_desc *desc;
    struct tensor query, key, value, output, lse, bias, d_output, d_lse, d_query, d_key, d_value;
    enum element element;
    int64_t b, h, i;
    float *d_of_key, *d_of_value; /* [len_k][SLIP_DIM], of the head */
};

/* The pair that is lost, if any: of the last row the first key from `from` on whose logit has no less gradient than the average. */
static struct {
    bool loses;
    int64_t from;
} short_slip;

static struct tensor tensor_of(const DLTensor *t) {
    struct tensor v = {.element = F64, .dl = {.ndim = t ? t->ndim : 0}};
    if (!t)
        return v;
    v.element = t->dtype.bits == 64          ? F64
                : t->dtype.bits == 32        ? F32
                : t->dtype.code == kDLBfloat ? BF16
                                             : F16;
    memcpy(v.shape, t->shape, (size_t)t->ndim * sizeof *t->shape);
    memcpy(v.stride, t->strides, (size_t)t->ndim * sizeof *t->strides);
    v.image = data_of(t);
    return v;
}

static float at(const struct tensor *t, int64_t b, int64_t h, int64_t l, int64_t d) {
    return t->image ? (float)tensor_get(t, (int64_t[4]){b, h, l, d}) : 0;
}

static int64_t group_of(const struct short_row *r) {
    return r->h / (r->query.shape[1] / r->key.shape[1]);
}

static int64_t keys_of(const struct short_row *r) {
    const int64_t keys = r->key.shape[2];
    return r->desc->causal && r->i + 1 < keys ? r->i + 1 : keys;
}

static float delta_of(const struct short_row *r) {
    float delta = -at(&r->d_lse, r->b, r->h, r->i, 0);
    for (int64_t d = 0; d < SLIP_DIM; d++)
        delta += at(&r->d_output, r->b, r->h, r->i, d) * at(&r->output, r->b, r->h, r->i, d);
    return delta;
}

static float weight_of(const struct short_row *r, int64_t j, float *slope) {
    const float scale = 1 / sqrtf(SLIP_DIM), cap = (float)r->desc->softcap;
    float x = 0;
    for (int64_t d = 0; d < SLIP_DIM; d++)
        x += at(&r->query, r->b, r->h, r->i, d) * at(&r->key, r->b, group_of(r), j, d);
    x *= scale;
    *slope = 1;
    if (cap > 0) {
        const float t = tanhf(x / cap);
        x = cap * t;
        *slope = 1 - t * t;
    }
    return expf(x + at(&r->bias, r->b, r->h, r->i, j) - at(&r->lse, r->b, r->h, r->i, 0));
}

static float d_logit_of(const struct short_row *r, int64_t j, float weight, float delta) {
    float product = 0;
    for (int64_t d = 0; d < SLIP_DIM; d++)
        product += at(&r->d_output, r->b, r->h, r->i, d) * at(&r->value, r->b, group_of(r), j, d);
    return weight * (product - delta);
}

/* -1: none. */
static int64_t lost_key(const struct short_row *r, float delta) {
    const int64_t keys = keys_of(r);
    float slope, sum = 0;
    int64_t key = short_slip.from % keys;
    if (!short_slip.loses || r->i + 1 < r->query.shape[2])
        return -1;
    for (int64_t j = 0; j < keys; j++)
        sum += fabsf(d_logit_of(r, j, weight_of(r, j, &slope), delta));
    while (fabsf(d_logit_of(r, key, weight_of(r, key, &slope), delta)) * (float)keys < sum)
        key = (key + 1) % keys;
    return key;
}

static void short_pairs(struct short_row *r) {
    const float scale = 1 / sqrtf(SLIP_DIM), delta = delta_of(r);
    const int64_t lost = lost_key(r, delta);
    float d_query[SLIP_DIM] = {0}, slope = 0;
    for (int64_t j = 0; j < keys_of(r); j++) {
        const float weight = j == lost ? 0 : weight_of(r, j, &slope),
                    d_logit =
                        (float)element_round(r->element, slope * d_logit_of(r, j, weight, delta)),
                    rounded = (float)element_round(r->element, weight);
        for (int64_t d = 0; d < SLIP_DIM; d++) {
            d_query[d] += d_logit * at(&r->key, r->b, group_of(r), j, d);
            r->d_of_key[j * SLIP_DIM + d] += d_logit * at(&r->query, r->b, r->h, r->i, d);
            r->d_of_value[j * SLIP_DIM + d] +=
                rounded * (float)element_round(r->element, at(&r->d_output, r->b, r->h, r->i, d));
        }
    }
    for (int64_t d = 0; d < SLIP_DIM; d++)
        tensor_set(&r->d_query, (int64_t[4]){r->b, r->h, r->i, d}, scale * d_query[d]);
}

static void short_head(struct short_row *r, int64_t b, int64_t g) {
    const int64_t group = r->query.shape[1] / r->key.shape[1], keys = r->key.shape[2];
    memset(r->d_of_key, 0, (size_t)(keys * SLIP_DIM) * sizeof *r->d_of_key);
    memset(r->d_of_value, 0, (size_t)(keys * SLIP_DIM) * sizeof *r->d_of_value);
    r->b = b;
    for (r->h = g * group; r->h < (g + 1) * group; r->h++) {
        for (r->i = 0; r->i < r->query.shape[2]; r->i++)
            short_pairs(r);
    }
    for (int64_t n = 0; n < keys * SLIP_DIM; n++) {
        const int64_t index[4] = {b, g, n / SLIP_DIM, n % SLIP_DIM};
        tensor_set(&r->d_key, index, r->d_of_key[n] / sqrtf(SLIP_DIM));
        tensor_set(&r->d_value, index, r->d_of_value[n]);
    }
}

static int32_t short_backward(BACKWARD_ARGUMENTS) {
    struct short_row r = {.desc = desc,
                          .query = tensor_of(t->query),
                          .key = tensor_of(t->key),
                          .value = tensor_of(t->value),
                          .output = tensor_of(t->output),
                          .lse = tensor_of(t->lse),
                          .bias = tensor_of(t->bias),
                          .d_output = tensor_of(g->d_output),
                          .d_lse = tensor_of(g->d_lse),
                          .d_query = tensor_of(g->d_query),
                          .d_key = tensor_of(g->d_key),
                          .d_value = tensor_of(g->d_value)};
    const size_t count = (size_t)(r.key.shape[2] * SLIP_DIM);
    (void)exec;
    r.element = r.query.element;
    r.d_of_key = malloc((count + 1) * sizeof *r.d_of_key);
    r.d_of_value = malloc((count + 1) * sizeof *r.d_of_value);
    for (int64_t n = 0; n < r.key.shape[0] * r.key.shape[1]; n++)
        short_head(&r, n / r.key.shape[1], n % r.key.shape[1]);
    free(r.d_of_key);
    free(r.d_of_value);
    return DLATTN_OK;
}

/* The first case from that seed on that has the three gradients that the short row writes, and no other. */
static struct test_case short_case(int64_t len_q, int64_t len_k, const char *features,
                                   enum element e, uint64_t seed) {
    struct test_case c = {
        {2, 2, 1, len_q, len_k, SLIP_DIM, SLIP_DIM}, *features_named(features), e, seed};
    c.features.backward = true;
    for (;; c.seed++) {
        struct call call;
        call_make(&call, &c);
        const bool right =
            call.has[D_QUERY] && call.has[D_KEY] && call.has[D_VALUE] && !call.has[D_BIAS];
        call_free(&call);
        if (right)
            return c;
    }
}

static const struct {
    int64_t len_q, len_k;
    const char *features;
} short_cases[] = {{3, 3, "lse"},           {40, 40, "causal_lse"},  {20, 70, "softcap"},
                   {33, 65, "lse_element"}, {50, 50, "huge_logits"}, {30, 30, "bias"},
                   {3, 500, "lse"},         {130, 130, "causal_lse"}};
enum { SHORT_CASES = sizeof short_cases / sizeof short_cases[0] };

Test(checker, allows_what_short_floats_cost) {
    api = test_api();
    const struct subject subject = {
        .api = api, .place = &place_cpu, .kernel = "cpu_bwd_ref", .backward = short_backward};
    short_slip.loses = false;
    for (enum element e = F32; e <= BF16; e++) {
        for (uint64_t n = 0; n < 2 * SHORT_CASES; n++) {
            struct verdict v;
            const struct test_case c =
                short_case(short_cases[n % SHORT_CASES].len_q, short_cases[n % SHORT_CASES].len_k,
                           short_cases[n % SHORT_CASES].features, e, 1000 * n);
            check_case(&v, &subject, &c);
            cr_expect(eq(int, v.outcome, PASSED), "%s", v.text);
        }
    }
}

/* A pair that one row loses, in the gradients of the row, its key and its value. */
Test(checker, notices_one_pair_of_a_gradient) {
    enum { TRIES = 3 };
    api = test_api();
    const struct subject subject = {
        .api = api, .place = &place_cpu, .kernel = "cpu_bwd_ref", .backward = short_backward};
    short_slip.loses = true;
    for (enum element e = F32; e <= BF16; e++) {
        for (uint64_t n = 0; n < TRIES * SHORT_CASES; n++) {
            struct verdict v;
            const struct test_case c =
                short_case(short_cases[n % SHORT_CASES].len_q, short_cases[n % SHORT_CASES].len_k,
                           short_cases[n % SHORT_CASES].features, e, 1000 * n);
            short_slip.from = random_below(n, 903, 1000);
            check_case(&v, &subject, &c);
            cr_expect(eq(int, v.outcome, FAILED), "%s", v.text);
        }
    }
}

/* ---- Memory ----------------------------------------------------------------------------------------------- */

/* A stray access ends at a guard page. */
Test(checker, guards_end, .signal = SIGSEGV) {
    const struct block b = place_cpu.take(100, 4, AT_END);
    *(volatile unsigned char *)(b.data + 100) = 0;
}

Test(checker, guards_begin, .signal = SIGSEGV) {
    const struct block b = place_cpu.take(100, 4, AT_BEGIN);
    *(volatile unsigned char *)(b.data - 1) = 0;
}

Test(checker, sees_slack_written) {
    struct block b = place_cpu.take(100, 4, AT_BEGIN);
    unsigned char back[100];
    cr_expect(place_cpu.fetch(&b, back));
    b.data[100] = 0;
    cr_expect(not(place_cpu.fetch(&b, back)));
    place_cpu.give(&b);
}
