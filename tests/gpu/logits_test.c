/*
 * Logits from one to the end of the range of f32, or of f64 in that type: every row of the GPU against a softmax in double.
 * They differ from each other by enough that rounding them, as any sum in f32 does, cannot change which is the largest.
 */
#include "tests/gpu/attention.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* What makes logits large, or what else takes part. Keys have whole numbers c_j, rows a_i from 1 to 3. */
enum kind {
    SHUFFLED,       /* a_i c_j, of both signs, times a scale */
    IN_ELEMENTS,    /* the same, but query and key are large, not the scale */
    RISING,         /* c_j grows with j: the maximum moves all the time */
    NEGATIVE,       /* all near the least, in log2 past the end of f32 */
    FROM_DEPTHS,    /* the first half far below 0, the rest near it */
    CAUSAL_RISING,  /* with a causal mask */
    NEGATIVE_SCALE, /* and so all with the other sign */
    CAPPED,         /* by softcap */
    BIASED, /* by a bias, but for every fourth row, whose keys all have the least number of f32 */
    BIASED_NO_LSE, /* the same, and nobody asks for lse */
    SLOPED,        /* by ALiBi */
    MASKED,        /* every third key is */
    WITH_SINKS,    /* one in the middle of the logits, one of the least number of f32 */
    KINDS
};

static const struct {
    const char *name;
    uint64_t feature; /* that a row must have */
} kinds[KINDS] = {{"shuffled", 0},
                  {"in elements", 0},
                  {"rising", 0},
                  {"negative", 0},
                  {"from depths", 0},
                  {"causal, rising", DLATTN_FEATURE_CAUSAL},
                  {"negative scale", 0},
                  {"capped", DLATTN_FEATURE_SOFTCAP},
                  {"biased", DLATTN_FEATURE_BIAS},
                  {"biased, no lse", DLATTN_FEATURE_BIAS},
                  {"sloped", DLATTN_FEATURE_ALIBI},
                  {"masked", DLATTN_FEATURE_MASK},
                  {"with sinks", DLATTN_FEATURE_SINKS}};

enum {
    HEADS = 2,
    MOST_DIM = 128,
    STEP = 32 /* a key's number is STEP * high + low, each of few bits */
};

struct extents {
    int64_t rows, keys, dim;
};

struct problem {
    enum kind kind;
    enum element element;
    int64_t rows, keys, dim;
    double most; /* of the logits' magnitudes */
    dlattn_forward_desc desc;
    struct tensor query, key, value, output, lse, bias, mask, slopes, sinks;
};

/* ---- Inputs --------------------------------------------------------------------------------------------------- */

static double row_number(int64_t i) { return (double)(1 + i % 3); }

static int64_t key_number(const struct problem *p, int64_t j) {
    const int64_t shuffled =
        j * 37 % p->keys; /* all different: 37 divides no number of keys here */
    switch (p->kind) {
    case RISING:
    case CAUSAL_RISING:
        return j - p->keys / 2;
    case NEGATIVE:
        return shuffled - 4 * p->keys;
    case FROM_DEPTHS:
        return j < p->keys / 2 ? shuffled - p->keys : 0;
    default:
        return shuffled - p->keys / 2;
    }
}

static bool has_bias(const struct problem *p) {
    return p->kind == BIASED || p->kind == BIASED_NO_LSE;
}

/* What a logit is for each unit of a_i c_j. */
static double unit(const struct problem *p) {
    const double furthest = p->kind == NEGATIVE ? 4 : p->kind == FROM_DEPTHS ? 1 : 0.5;
    return p->most / (3 * furthest * (double)p->keys);
}

static void set(struct tensor *t, int64_t i0, int64_t i1, int64_t i2, int64_t i3, double x) {
    tensor_set(t, (const int64_t[4]){i0, i1, i2, i3}, x);
}

static double get(const struct tensor *t, int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
    return tensor_get(t, (const int64_t[4]){i0, i1, i2, i3});
}

/* The scale, and the powers of two that queries and keys are multiplied by, whose product is the unit of logits. */
static double shares(const struct problem *p, double *query, double *key) {
    *query = *key = 1;
    if (has_bias(p) || p->kind == SLOPED)
        return 0x1p-8;
    if (p->kind == IN_ELEMENTS || p->kind == FROM_DEPTHS) { /* elements below 2^16, sums 2^127 */
        const int most = p->element == F16   ? 9
                         : p->element == F64 ? 500
                                             : 57,
                  half = (int)fmin(fmax(log2(unit(p)) / 2, 0), most);
        *query = *key = ldexp(1, half);
    }
    if (p->kind == FROM_DEPTHS)
        return 0.25;
    return (p->kind == NEGATIVE_SCALE ? -1 : 1) * unit(p) / (*query * *key);
}

static void fill_main(struct problem *p) {
    double of_query, of_key;
    p->desc.scale = shares(p, &of_query, &of_key);
    for (int64_t h = 0; h < HEADS; h++) {
        for (int64_t i = 0; i < p->rows; i++) {
            const double a = row_number(i) * of_query;
            for (int64_t d = 0; d < p->dim; d++)
                set(&p->query, 0, h, i, d, d == 0 ? STEP * a : d == 1 ? a : d == 2 ? 1 : 0);
        }
    }
    for (int64_t j = 0; j < p->keys; j++) {
        const int64_t c = key_number(p, j), high = (int64_t)floor((double)c / STEP);
        const bool shallow = p->kind == FROM_DEPTHS && j >= p->keys / 2;
        for (int64_t d = 0; d < p->dim; d++) {
            const double x = d == 0   ? (double)high * of_key
                             : d == 1 ? (double)(c - STEP * high) * of_key
                                      : 0;
            set(&p->key, 0, 0, j, d, shallow && d == 2 ? (double)(j % 7) : x);
            set(&p->value, 0, 0, j, d,
                (double)random_below(7, (uint64_t)(j * p->dim + d), 256) / 64 - 2);
        }
    }
}

static void fill_options(struct problem *p) {
    const double most = fmin(p->most, FLT_MAX);
    for (int64_t i = 0; i < p->rows; i++) {
        for (int64_t j = 0; j < p->keys; j++) {
            const double x = row_number(i) * (double)key_number(p, j) * unit(p);
            set(&p->bias, 0, 0, i, j, i % 4 && has_bias(p) ? x : -FLT_MAX);
            set(&p->mask, 0, 0, i, j, (i + j) % 3 != 0);
        }
    }
    for (int64_t h = 0; h < HEADS; h++) {
        set(&p->slopes, h, 0, 0, 0, most / (double)p->keys);
        set(&p->sinks, h, 0, 0, 0, h ? -FLT_MAX : most / 2);
    }
}

static void make_problem(struct problem *p, enum kind kind, enum element e, const struct extents *s,
                         double most) {
    *p = (struct problem){
        .kind = kind, .element = e, .rows = s->rows, .keys = s->keys, .dim = s->dim, .most = most};
    const struct {
        struct tensor *tensor;
        enum element element;
        int axes;
        int64_t shape[4];
    } all[] = {
        {&p->query, e, 4, {1, HEADS, s->rows, s->dim}},
        {&p->key, e, 4, {1, 1, s->keys, s->dim}},
        {&p->value, e, 4, {1, 1, s->keys, s->dim}},
        {&p->output, e, 4, {1, HEADS, s->rows, s->dim}},
        {&p->bias, F32, 4, {1, 1, s->rows, s->keys}},
        {&p->mask, U8, 4, {1, 1, s->rows, s->keys}},
        {&p->slopes, F32, 1, {HEADS}},
        {&p->sinks, F32, 1, {HEADS}},
        {&p->lse, e == F64 ? F64 : F32, 3, {1, HEADS, s->rows}},
    };
    for (size_t t = 0; t < sizeof all / sizeof all[0]; t++)
        tensor_make(all[t].tensor, all[t].element, all[t].axes, all[t].shape, COMPACT, 0, 0);
    p->desc = (dlattn_forward_desc){.struct_size = sizeof p->desc,
                                    .flags = DLATTN_EXACT_SCALE,
                                    .causal = kind == CAUSAL_RISING,
                                    .alignment = DLATTN_ALIGN_BOTTOM_RIGHT,
                                    .softcap = kind == CAPPED ? 40 : 0};
    fill_main(p);
    fill_options(p);
    for (size_t t = 0; t < sizeof all / sizeof all[0]; t++)
        upload(all[t].tensor);
}

static void drop_problem(struct problem *p) {
    struct tensor *const all[] = {&p->query, &p->key,  &p->value,  &p->output, &p->lse,
                                  &p->bias,  &p->mask, &p->slopes, &p->sinks};
    for (size_t t = 0; t < sizeof all / sizeof all[0]; t++)
        discard(all[t]);
}

static dlattn_tensors tensors_of(const struct problem *p) {
    return (dlattn_tensors){.struct_size = sizeof(dlattn_tensors),
                            .query = &p->query.dl,
                            .key = &p->key.dl,
                            .value = &p->value.dl,
                            .output = &p->output.dl,
                            .lse = p->kind == BIASED_NO_LSE ? NULL : &p->lse.dl,
                            .bias = has_bias(p) ? &p->bias.dl : NULL,
                            .mask = p->kind == MASKED ? &p->mask.dl : NULL,
                            .alibi_slopes = p->kind == SLOPED ? &p->slopes.dl : NULL,
                            .sinks = p->kind == WITH_SINKS ? &p->sinks.dl : NULL};
}

/* ---- What must come out --------------------------------------------------------------------------------------- */

static double logit(const struct problem *p, int64_t h, int64_t i, int64_t j) {
    const int64_t place = i + p->keys - p->rows - j; /* 0 on the diagonal */
    double dot = 0;
    if ((p->desc.causal && place < 0) || (p->kind == MASKED && get(&p->mask, 0, 0, i, j) == 0))
        return -INFINITY;
    for (int64_t d = 0; d < 3; d++)
        dot += get(&p->query, 0, h, i, d) * get(&p->key, 0, 0, j, d);
    double x = dot * p->desc.scale;
    if (p->desc.softcap > 0)
        x = p->desc.softcap * tanh(x / p->desc.softcap);
    if (has_bias(p))
        x += get(&p->bias, 0, 0, i, j);
    if (p->kind == SLOPED)
        x -= get(&p->slopes, h, 0, 0, 0) * fabs((double)place);
    return x;
}

/* A row's output, and its lse, which is returned. */
static double attend(const struct problem *p, int64_t h, int64_t i, double output[MOST_DIM]) {
    double *const x = malloc((size_t)p->keys * sizeof *x), total = 0;
    const double sink = p->kind == WITH_SINKS ? get(&p->sinks, h, 0, 0, 0) : -INFINITY;
    double most = sink;
    for (int64_t j = 0; j < p->keys; j++) {
        x[j] = logit(p, h, i, j);
        most = fmax(most, x[j]);
    }
    for (int64_t d = 0; d < p->dim; d++)
        output[d] = 0;
    for (int64_t j = 0; j < p->keys; j++) {
        const double weight = exp(x[j] - most);
        total += weight;
        for (int64_t d = 0; d < p->dim && weight > 0; d++)
            output[d] += weight * get(&p->value, 0, 0, j, d);
    }
    total += exp(sink - most);
    for (int64_t d = 0; d < p->dim; d++)
        output[d] /= total;
    free(x);
    return most + log(total);
}

/* Whether x is y, or off by no more than the parts of one that are named, of 1 or of y. */
static bool close_to(double x, double y, double relative) {
    return fabs(x - y) <= relative * fmax(1, fabs(y));
}

/* How many rows of an output are wrong; the first is told. */
static int wrong_rows(const struct problem *p, const char *kernel) {
    const double off = p->element == F64 ? 1e-12 : 1e-5,
                 off_output = off + 4 * element_epsilon(p->element);
    double want[MOST_DIM] = {0};
    int wrong = 0;
    for (int64_t h = 0; h < HEADS; h++) {
        for (int64_t i = 0; i < p->rows; i++) {
            const double lse = attend(p, h, i, want), got_lse = get(&p->lse, 0, h, i, 0);
            int64_t d = 0;
            while (d < p->dim && close_to(get(&p->output, 0, h, i, d), want[d], off_output))
                d++;
            if (d == p->dim && (p->kind == BIASED_NO_LSE || close_to(got_lse, lse, off)))
                continue;
            const int64_t at = d < p->dim ? d : 0;
            if (wrong++ == 0)
                fprintf(stderr,
                        "%s %s, %s up to %g, %d rows, %d keys, head %d, row %d: output[%d] is %g, "
                        "must be %g; lse is %g, must be %g\n",
                        kernel, element_name(p->element), kinds[p->kind].name, p->most,
                        (int)p->rows, (int)p->keys, (int)h, (int)i, (int)at,
                        get(&p->output, 0, h, i, at), want[at], got_lse, lse);
        }
    }
    return wrong;
}

/* ---- Tests ---------------------------------------------------------------------------------------------------- */

/* 0 if the row takes it and is right, -1 if it declines, else the number of wrong rows. */
static int check(const dlattn_api *api, const char *kernel, enum kind kind, enum element e,
                 const struct extents *s, double most) {
    struct problem p;
    dlattn_sku sku;
    make_problem(&p, kind, e, s, most);
    const dlattn_tensors tensors = tensors_of(&p);
    p.desc.kernel = kernel;
    const int32_t status = run_call(api, &p.desc, &tensors, &sku);
    int wrong = -1;
    if (status != DLATTN_UNSUPPORTED) {
        MUST(status);
        download(&p.output);
        download(&p.lse);
        wrong = wrong_rows(&p, sku.kernel);
    }
    drop_problem(&p);
    return wrong;
}

/* The largest magnitude of a logit: 1, then so much that weights beside those of a depth exceed f16, that one key has all of the weight, and
 * up to the end of the range. */
static const double most_f32[] = {1,      0x1p13, 0x1p23, 0x1p24,  0x1p25,  0x1p27,
                                  0x1p31, 0x1p40, 0x1p64, 0x1p100, 0x1p126, 3.3e38};
static const double most_f64[] = {0x1p50, 0x1p56, 0x1p62, 0x1p200, 0x1p1000, 1.7e308};

/* Rows of a tile or two, few rows over keys that are split, and several steps at a head dim whose kernels bring large weights back elsewhere. */
static const struct extents shapes[] = {{70, 200, 64}, {2, 1500, 64}, {20, 600, 128}};

static void check_row(const dlattn_api *api, const dlattn_kernel_info *row, enum element e,
                      double most, int *checked) {
    for (enum kind kind = 0; kind < KINDS; kind++) {
        if (kinds[kind].feature & ~row->features)
            continue;
        const uint64_t in_f32 = DLATTN_FEATURE_BIAS | DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_SINKS;
        if (kinds[kind].feature & in_f32 && most > FLT_MAX)
            continue;
        for (size_t n = 0; n < sizeof shapes / sizeof shapes[0]; n++) {
            const int wrong = check(api, row->name, kind, e, &shapes[n], most);
            *checked += wrong >= 0;
            cr_expect(wrong <= 0, "%s %s, head dim %d, %s up to %g: %d rows are wrong", row->name,
                      element_name(e), (int)shapes[n].dim, kinds[kind].name, most, wrong);
        }
    }
}

Test(gpu_logits, huge_to_the_end_of_the_range) {
    const dlattn_api *api = gpu_api();
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        for (enum element e = F64; e <= BF16; e++) {
            int checked = 0;
            if (!row_takes(&rows[row], e))
                continue;
            for (size_t n = 0; n < sizeof most_f32 / sizeof most_f32[0]; n++)
                check_row(api, &rows[row], e, most_f32[n], &checked);
            for (size_t n = 0; e == F64 && n < sizeof most_f64 / sizeof most_f64[0]; n++)
                check_row(api, &rows[row], e, most_f64[n], &checked);
            fprintf(stderr, "%s %s: %d cases\n", rows[row].name, element_name(e), checked);
            cr_expect(gt(int, checked, 0), "%s %s", rows[row].name, element_name(e));
        }
    }
}
