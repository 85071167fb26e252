/*
 * Would the loop notice? Kernels that are wrong on purpose, made from the reference, and what the checker has to say.
 */
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>
#include <signal.h>
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
