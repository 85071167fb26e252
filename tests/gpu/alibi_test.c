/*
 * ALiBi of cuda_fwd_sm90: over so many keys that it finds out first which of them are too far to count, among them keys and values that
 * count however far they are; and slopes so steep that few keys count, before the first key and behind the last, too. Some rows of each
 * head against a softmax in double.
 */
#include "tests/gpu/attention.h"

#include <math.h>

static const char *const ROW = "cuda_fwd_sm90";

enum kind {
    NORMAL,
    FAR_SCORE,  /* one key far away has a score that outweighs its distance in one head */
    FAR_VALUE,  /* one value far away is so large that its weight counts */
    NAN_IN_KEY, /* far away: all rows that see it are NaN */
    NAN_IN_VALUE,
    NAN_BEHIND, /* keys and values behind the sequence's end are NaN, which nobody sees */
    STEEP,
    KINDS
};

static const char *const names[KINDS] = {"normal",       "far score",  "far value", "NaN in key",
                                         "NaN in value", "NaN behind", "steep"};

enum {
    HEADS = 4,
    HEADS_KV = 2,
    FAR = 7 /* a key */,
    LENGTH = 4100,
    SHORT = 1030,
    BEHIND = 60,
    WIDEST = 256
};

struct choice {
    enum element element;
    int64_t rows, keys, dim, dim_v;
    int32_t causal, alignment;
};
static const struct choice long_ones[] = {
    {BF16, LENGTH, LENGTH, 64, 64, 1, DLATTN_ALIGN_TOP_LEFT},
    {F16, LENGTH, LENGTH, 128, 128, 1, DLATTN_ALIGN_TOP_LEFT},
    {F16, LENGTH, LENGTH, 40, 40, 0, DLATTN_ALIGN_TOP_LEFT},
    {BF16, 3000, LENGTH, 128, 128, 1, DLATTN_ALIGN_BOTTOM_RIGHT},
    {BF16, LENGTH, LENGTH, 96, 96, 1, DLATTN_ALIGN_TOP_LEFT},
    {BF16, LENGTH, LENGTH, 256, 256, 1, DLATTN_ALIGN_TOP_LEFT},
};
/* The last tile of keys is whole where there are 1,024, of 112 keys where there are 1,008. */
static const struct choice short_ones[] = {
    {BF16, SHORT, SHORT, 64, 64, 1, DLATTN_ALIGN_TOP_LEFT},
    {F16, 1500, SHORT, 64, 64, 1, DLATTN_ALIGN_TOP_LEFT},
    {BF16, 1500, 1024, 64, 64, 0, DLATTN_ALIGN_TOP_LEFT},
    {BF16, 1500, SHORT, 96, 96, 1, DLATTN_ALIGN_TOP_LEFT},
    {F16, SHORT, SHORT, 128, 128, 1, DLATTN_ALIGN_TOP_LEFT},
    {F16, 1500, 1024, 128, 128, 1, DLATTN_ALIGN_TOP_LEFT},
    {BF16, 1500, SHORT, 128, 128, 0, DLATTN_ALIGN_TOP_LEFT},
    {F16, 1500, SHORT, 192, 128, 1, DLATTN_ALIGN_TOP_LEFT},
    {BF16, 1500, 1008, 192, 128, 1, DLATTN_ALIGN_TOP_LEFT},
    {BF16, 700, SHORT, 192, 192, 1, DLATTN_ALIGN_BOTTOM_RIGHT},
    {F16, 1500, 1024, 256, 256, 1, DLATTN_ALIGN_TOP_LEFT},
    {BF16, 1500, SHORT, 256, 256, 0, DLATTN_ALIGN_BOTTOM_RIGHT},
};
enum {
    LONG_ONES = sizeof long_ones / sizeof long_ones[0],
    SHORT_ONES = sizeof short_ones / sizeof short_ones[0]
};

struct problem {
    enum kind kind;
    const struct choice *choice;
    struct tensor query, key, value, output, lse, slopes, lengths;
};

static double number(uint64_t seed, uint64_t n) {
    return (double)random_below(seed, n, 128) / 32 - 2;
}

/* Of heads that see next to nothing far away, that see all, and, below 0, that see far keys best. */
static double slope(enum kind kind, int64_t head) {
    static const double usual[HEADS] = {0.5, 0.05, -0x1p-9, 2}, steep[HEADS] = {0.5, 1.1, 4, 30};
    return kind == STEEP ? steep[head] : usual[head];
}

static double key_at(const struct problem *p, int64_t head, int64_t j, int64_t d) {
    if ((p->kind == NAN_IN_KEY && j == FAR && head == 0 && d == 1) ||
        (p->kind == NAN_BEHIND && j >= LENGTH - BEHIND))
        return NAN;
    /* Queries have 2 there: 50 more than 0.05 x LENGTH. */
    if (p->kind == FAR_SCORE && j == FAR && d == 0)
        return floor((0.05 * LENGTH + 50) / 2 * sqrt((double)p->choice->dim) / 16) * 16;
    return number(2, (uint64_t)((head * LENGTH + j) * WIDEST + d));
}

static double value_at(const struct problem *p, int64_t head, int64_t j, int64_t d) {
    if ((p->kind == NAN_IN_VALUE && j == FAR && head == 0 && d == 3) ||
        (p->kind == NAN_BEHIND && j >= LENGTH - BEHIND))
        return NAN;
    if (p->kind == FAR_VALUE && j == FAR)
        return p->choice->element == F16 ? 0x1p15 : 0x1p120;
    return number(3, (uint64_t)((head * LENGTH + j) * WIDEST + d));
}

static void make_rows(struct problem *p) {
    const int64_t dim = p->choice->dim;
    for (int64_t h = 0; h < HEADS; h++) {
        for (int64_t i = 0; i < p->choice->rows; i++) {
            for (int64_t d = 0; d < dim; d++)
                tensor_set(&p->query, (const int64_t[4]){0, h, i, d},
                           d ? number(1, (uint64_t)((h * LENGTH + i) * WIDEST + d)) : 2);
        }
    }
    for (int64_t h = 0; h < HEADS_KV; h++) {
        for (int64_t j = 0; j < p->choice->keys; j++) {
            for (int64_t d = 0; d < dim; d++)
                tensor_set(&p->key, (const int64_t[4]){0, h, j, d}, key_at(p, h, j, d));
            for (int64_t d = 0; d < p->choice->dim_v; d++)
                tensor_set(&p->value, (const int64_t[4]){0, h, j, d}, value_at(p, h, j, d));
        }
    }
}

static void make_problem(struct problem *p, enum kind kind, const struct choice *s) {
    *p = (struct problem){.kind = kind, .choice = s};
    const struct {
        struct tensor *tensor;
        enum element element;
        int axes;
        int64_t shape[4];
    } all[] = {
        {&p->query, s->element, 4, {1, HEADS, s->rows, s->dim}},
        {&p->key, s->element, 4, {1, HEADS_KV, s->keys, s->dim}},
        {&p->value, s->element, 4, {1, HEADS_KV, s->keys, s->dim_v}},
        {&p->output, s->element, 4, {1, HEADS, s->rows, s->dim_v}},
        {&p->lse, F32, 3, {1, HEADS, s->rows}},
        {&p->slopes, F32, 1, {HEADS}},
        {&p->lengths, I32, 1, {1}},
    };
    const size_t count = sizeof all / sizeof all[0];
    for (size_t t = 0; t < count; t++)
        tensor_make(all[t].tensor, all[t].element, all[t].axes, all[t].shape, COMPACT, 0, 0);
    make_rows(p);
    for (int64_t h = 0; h < HEADS; h++)
        tensor_set(&p->slopes, &h, slope(kind, h));
    tensor_set(&p->lengths, (const int64_t[1]){0},
               (double)(s->keys - (kind == NAN_BEHIND ? BEHIND : 0)));
    for (size_t t = 0; t < count; t++)
        upload(all[t].tensor);
}

static void run(const dlattn_api *api, struct problem *p, dlattn_sku *sku) {
    const dlattn_forward_desc desc = {.struct_size = sizeof desc,
                                      .kernel = ROW,
                                      .causal = p->choice->causal,
                                      .alignment = p->choice->alignment};
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = &p->query.dl,
                                    .key = &p->key.dl,
                                    .value = &p->value.dl,
                                    .output = &p->output.dl,
                                    .lse = &p->lse.dl,
                                    .alibi_slopes = &p->slopes.dl,
                                    .key_lengths = &p->lengths.dl};
    MUST(run_call(api, &desc, &tensors, sku));
    download(&p->output);
    download(&p->lse);
}

/* Row i of head h in double, and its lse, which is returned. */
static double attend(const struct problem *p, int64_t h, int64_t i, double output[WIDEST]) {
    const int64_t keys = (int64_t)tensor_get(&p->lengths, (const int64_t[1]){0});
    const bool bottom_right = p->choice->alignment == DLATTN_ALIGN_BOTTOM_RIGHT;
    const int64_t met = i + (bottom_right ? keys - p->choice->rows : 0);
    const struct row_in_double row = {
        .query = &p->query,
        .key = &p->key,
        .value = &p->value,
        .head = h,
        .head_kv = h / (HEADS / HEADS_KV),
        .row = i,
        .keys = p->choice->causal && met < keys ? met + 1 : keys,
        .met = met,
        .slope = slope(p->kind, h),
    };
    return attend_in_double(&row, output);
}

static bool close_to(double got, double want, double off) {
    return isnan(want) ? isnan(got) : fabs(got - want) <= off * fmax(1, fabs(want));
}

static void check_row(const struct problem *p, const char *kernel, int64_t h, int64_t i) {
    double want[WIDEST];
    const double lse = attend(p, h, i, want),
                 got_lse = tensor_get(&p->lse, (const int64_t[4]){0, h, i}),
                 off = 1e-5 + 4 * element_epsilon(p->choice->element);
    cr_expect(close_to(got_lse, lse, 1e-5),
              "%s, %s, head dim %d, head %d, row %d: lse is %g, must be %g", kernel, names[p->kind],
              (int)p->choice->dim, (int)h, (int)i, got_lse, lse);
    for (int64_t d = 0; d < p->choice->dim_v; d++) {
        const double got = tensor_get(&p->output, (const int64_t[4]){0, h, i, d});
        cr_expect(close_to(got, want[d], off),
                  "%s, %s, head dim %d, head %d, row %d: output[%d] is %g, must be %g", kernel,
                  names[p->kind], (int)p->choice->dim, (int)h, (int)i, (int)d, got, want[d]);
    }
}

/* The first and the last, those beside the far key, those from which on a value of 2^120 there no longer counts, and some by chance. */
static void check_rows(const struct problem *p, const char *kernel) {
    const int64_t rows = p->choice->rows,
                  some[] = {0, FAR - 1, FAR, 127, 128, 1400, 1600, rows / 2, rows - 1};
    enum { NAMED = sizeof some / sizeof some[0], ROWS = 16 };
    for (int64_t h = 0; h < HEADS; h++) {
        for (int n = 0; n < ROWS; n++)
            check_row(p, kernel, h, n < NAMED ? some[n] : random_below(9, (uint64_t)n, rows));
    }
}

/* On either side of where rows of a warpgroup begin, and those behind the last key up to where no weight beside that of distance 0 is
 * a number of f32. */
static void check_edges(const struct problem *p, const char *kernel) {
    const int64_t rows = p->choice->rows, keys = p->choice->keys;
    for (int64_t h = 0; h < HEADS; h++) {
        for (int64_t i = 0; i < rows; i += 64) {
            check_row(p, kernel, h, i);
            check_row(p, kernel, h, i > 0 ? i - 1 : rows - 1);
        }
        for (int64_t i = keys; i < rows && i < keys + 320; i += 5)
            check_row(p, kernel, h, i);
    }
}

static const dlattn_api *hopper_api(void) {
    const dlattn_api *const api = gpu_api();
    if (!row_if_here(api, ROW))
        cr_skip_test("no Hopper");
    return api;
}

static void check_choice(const dlattn_api *api, enum kind kind, const struct choice *choice,
                         void (*check)(const struct problem *p, const char *kernel)) {
    struct problem p;
    dlattn_sku sku;
    make_problem(&p, kind, choice);
    run(api, &p, &sku);
    const bool finds_reach = sku.workspace_bytes > 0, should = choice->keys == LENGTH;
    cr_expect(eq(int, finds_reach, should), "%s, %d keys", sku.kernel, (int)choice->keys);
    check(&p, sku.kernel);
    struct tensor *const all[] = {&p.query, &p.key,    &p.value,  &p.output,
                                  &p.lse,   &p.slopes, &p.lengths};
    for (size_t t = 0; t < sizeof all / sizeof all[0]; t++)
        discard(all[t]);
}

Test(gpu_alibi, what_counts_however_far) {
    const dlattn_api *api = hopper_api();
    for (enum kind kind = 0; kind < STEEP; kind++) {
        for (size_t n = 0; n < LONG_ONES; n++)
            check_choice(api, kind, &long_ones[n], check_rows);
    }
}

Test(gpu_alibi, steep_slopes) {
    const dlattn_api *api = hopper_api();
    for (size_t n = 0; n < SHORT_ONES; n++)
        check_choice(api, STEEP, &short_ones[n], check_edges);
}
