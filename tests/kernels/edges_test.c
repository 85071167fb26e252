/*
 * f32 at the edges of its range: infinity, the largest numbers, and logits of common size from vast keys and tiny queries or
 * the reverse. Each row of the CPU against the reference row; loose bounds, for kernels_test has the tight ones. And a
 * NaN that rounding to bf16 must not carry over into another number, and the codes of float8.
 */
#include "tests/support/cpu_rows.h"

#include <math.h>

enum { LENGTH = 150, DIM = 64, COUNT = LENGTH * DIM, SPECIAL = 70 * DIM + 3 };

struct edge {
    const char *name;
    float key, value;             /* in one element; 0: none */
    float query_scale, key_scale; /* of all */
    double scale;                 /* 0: the default */
};
static const struct edge edges[] = {
    {"plain", 0, 0, 1, 1, 0},
    {"infinite key", INFINITY, 0, 1, 1, 0},
    {"key of minus infinity", -INFINITY, 0, 1, 1, 0},
    {"key of minus infinity, NaN in its value", -INFINITY, NAN, 1, 1, 0},
    {"NaN in a key", NAN, 0, 1, 1, 0},
    {"infinite value", 0, INFINITY, 1, 1, 0},
    {"largest value", 0, 3.4028235e38f, 1, 1, 0},
    {"tiny queries, vast keys", 0, 0, 1e-36f, 1e36f, 0},
    {"vast queries, tiny keys", 0, 0, 1e36f, 1e-36f, 0},
    {"tiny queries, vast scale", 0, 0, 1e-36f, 1, 1e36},
    {"tiny keys, vast scale", 0, 0, 1, 1e-36f, 1e36},
};

struct arrays {
    float query[COUNT], key[COUNT], value[COUNT], output[COUNT], lse[LENGTH];
};

static void fill(struct arrays *a, const struct edge *edge) {
    for (uint64_t i = 0; i < COUNT; i++) {
        a->query[i] = (float)random_normal(1, i) * edge->query_scale;
        a->key[i] = (float)random_normal(2, i) * edge->key_scale;
        a->value[i] = (float)random_normal(3, i);
    }
    /* A key of minus infinity gives minus infinity to each row, and so weight 0. */
    for (int i = SPECIAL % DIM; edge->key == -INFINITY && i < COUNT; i += DIM)
        a->query[i] = fabsf(a->query[i]) + 0.1f;
    if (edge->key != 0)
        a->key[SPECIAL] = edge->key;
    if (edge->value != 0)
        a->value[SPECIAL] = edge->value;
}

/* The forward rows, for decoding has others, that take such elements. */
static void find_forward_rows(struct cpu_rows *rows, enum element element) {
    struct cpu_rows all;
    find_cpu_rows(&all, element);
    rows->count = 0;
    for (int n = 0; n < all.count; n++) {
        if (!(all.info[n].flags & DLATTN_KERNEL_DECODE))
            rows->info[rows->count++] = all.info[n];
    }
}

static void run(const dlattn_forward_desc *desc, const dlattn_tensors *tensors) {
    dlattn_sku sku;
    cr_assert(run_tensors(desc, tensors, &sku), "%s", test_api()->last_error());
}

/* Causal, with so many query heads over one of keys. */
static void forward_heads(struct arrays *a, const char *kernel, double scale, int64_t heads,
                          int64_t length, int32_t threads) {
    int64_t shape[] = {1, heads, length, DIM}, key_shape[] = {1, 1, length, DIM};
    const DLTensor like = {
        .device = {kDLCPU, 0}, .ndim = 4, .dtype = {kDLFloat, 32, 1}, .shape = shape};
    DLTensor query = like, key = like, value = like, output = like, lse = like;
    key.shape = value.shape = key_shape;
    query.data = a->query, key.data = a->key, value.data = a->value, output.data = a->output;
    lse.data = a->lse, lse.ndim = 3;
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = &query,
                                    .key = &key,
                                    .value = &value,
                                    .output = &output,
                                    .lse = &lse};
    const dlattn_forward_desc desc = {.struct_size = sizeof desc,
                                      .causal = 1,
                                      .kernel = kernel,
                                      .scale = scale,
                                      .num_threads = threads};
    run(&desc, &tensors);
}

static void forward(struct arrays *a, const char *kernel, const struct edge *edge) {
    forward_heads(a, kernel, edge->scale, 1, LENGTH, 1);
}

/* How many elements differ: by kind, or by more than f32 explains. */
static int wrong(const float *got, const float *want, int count) {
    int n = 0;
    for (int i = 0; i < count; i++)
        n += isnan(want[i])   ? !isnan(got[i])
             : isinf(want[i]) ? got[i] != want[i]
                              : !(fabsf(got[i] - want[i]) <= 1e-5f * fmaxf(1, fabsf(want[i])));
    return n;
}

/* A NaN that only later rows see, in the step of keys in which the first block ends: what the block makes of it must not depend
 * on which other blocks its thread has. */
Test(edges, hidden_nan_for_any_number_of_threads) {
    enum { HEADS = 4, ROWS = LENGTH / HEADS, HIDDEN = 20 };
    struct cpu_rows rows;
    struct arrays *one = malloc(sizeof *one), *many = malloc(sizeof *many);
    cr_assert(one && many);
    find_forward_rows(&rows, F32);
    for (int row = 0; row < rows.count; row++) {
        fill(one, &edges[0]);
        one->value[HIDDEN * DIM + 3] = NAN;
        *many = *one;
        forward_heads(one, rows.info[row].name, 0, HEADS, ROWS, 1);
        forward_heads(many, rows.info[row].name, 0, HEADS, ROWS, 8);
        for (int i = 0; i < HEADS * ROWS * DIM; i++)
            cr_expect(memcmp(&one->output[i], &many->output[i], 4) == 0 ||
                          (isnan(one->output[i]) && isnan(many->output[i])),
                      "%s: row %d is %.9g with a thread, %.9g with eight", rows.info[row].name,
                      i / DIM % ROWS, one->output[i], many->output[i]);
    }
    free(one);
    free(many);
}

Test(edges, every_cpu_row) {
    struct cpu_rows rows;
    struct arrays *got = malloc(sizeof *got), *want = malloc(sizeof *want);
    find_forward_rows(&rows, F32);
    for (int row = 0; row < rows.count; row++) {
        for (size_t e = 0; e < sizeof edges / sizeof edges[0]; e++) {
            fill(got, &edges[e]);
            fill(want, &edges[e]);
            /* A row may decline vast scales; then the library's choice must do them. */
            const bool named =
                edges[e].scale == 0 || strcmp(rows.info[row].name, "cpu_fwd_amx") != 0;
            forward(got, named ? rows.info[row].name : NULL, &edges[e]);
            forward(want, "cpu_fwd_ref", &edges[e]);
            cr_expect(eq(int, wrong(got->output, want->output, COUNT), 0), "%s: %s: output",
                      rows.info[row].name, edges[e].name);
            cr_expect(eq(int, wrong(got->lse, want->lse, LENGTH), 0), "%s: %s: lse",
                      rows.info[row].name, edges[e].name);
        }
    }
    free(got);
    free(want);
}

/* The bias of one row is a NaN of all bits: that row of bf16 is NaN, and no other. */
Test(edges, nan_of_all_bits) {
    enum { ROWS = 20, HIT = 3, ELEMENTS = ROWS * DIM };
    static uint16_t one[ELEMENTS], output[ELEMENTS];
    static float bias[ROWS * ROWS];
    struct cpu_rows rows;
    int64_t shape[] = {1, 1, ROWS, DIM}, square[] = {1, 1, ROWS, ROWS};
    const DLTensor like = {
        .data = one, .device = {kDLCPU, 0}, .ndim = 4, .dtype = {kDLBfloat, 16, 1}, .shape = shape};
    DLTensor query = like, key = like, value = like, result = like, extra = like;
    for (int i = 0; i < ELEMENTS; i++)
        one[i] = 0x3f80;
    memset(&bias[HIT * ROWS + 5], 0x7f, sizeof bias[0]);
    memset(&bias[HIT * ROWS + 5], 0xff, sizeof bias[0] - 1); /* 0x7fffffff */
    result.data = output;
    extra.data = bias, extra.shape = square, extra.dtype = (DLDataType){kDLFloat, 32, 1};
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = &query,
                                    .key = &key,
                                    .value = &value,
                                    .output = &result,
                                    .bias = &extra};
    find_forward_rows(&rows, BF16);
    for (int row = 0; row < rows.count; row++) {
        const dlattn_forward_desc desc = {
            .struct_size = sizeof desc, .kernel = rows.info[row].name, .num_threads = 1};
        if (!(rows.info[row].features & DLATTN_FEATURE_BIAS))
            continue;
        memset(output, 0, sizeof output);
        run(&desc, &tensors);
        int differ = 0;
        for (int i = 0; i < ELEMENTS; i++)
            differ += i / DIM == HIT ? (output[i] & 0x7fff) <= 0x7f80 : output[i] != one[0];
        cr_expect(eq(int, differ, 0), "%s", rows.info[row].name);
    }
}

/* Keys and values of all codes of a float8 that are finite; a head more than rows take at a time, and columns that fill vectors and not. */
enum { FEW_HEADS = 5, FEW_KEYS = 70, WIDTH = 104 };
struct float8_codes {
    float query[FEW_HEADS * WIDTH], output[FEW_HEADS * WIDTH];
    uint8_t key[FEW_KEYS * WIDTH], value[FEW_KEYS * WIDTH];
};

static uint8_t finite_code(enum element element, uint64_t seed, uint64_t i) {
    const uint8_t code = (uint8_t)random_below(seed, i, 256), above = element == E4M3 ? 0x7f : 0x7c;
    return (code & above) == above ? code ^ 4 : code;
}

static void fill_codes(struct float8_codes *a, enum element element) {
    for (uint64_t i = 0; i < FEW_HEADS * WIDTH; i++)
        a->query[i] = (float)random_normal(1, i);
    for (uint64_t i = 0; i < FEW_KEYS * WIDTH; i++) {
        a->key[i] = finite_code(element, 2, i);
        a->value[i] = finite_code(element, 3, i);
    }
}

static void attend_codes(struct float8_codes *a, const char *kernel, enum element element) {
    const uint8_t code = element == E4M3 ? kDLFloat8_e4m3fn : kDLFloat8_e5m2;
    int64_t shape[] = {1, FEW_HEADS, 1, WIDTH}, key_shape[] = {1, 1, FEW_KEYS, WIDTH};
    const DLTensor like = {
        .device = {kDLCPU, 0}, .ndim = 4, .dtype = {kDLFloat, 32, 1}, .shape = shape};
    DLTensor query = like, key = like, value = like, output = like;
    query.data = a->query, output.data = a->output, key.data = a->key, value.data = a->value;
    key.shape = value.shape = key_shape;
    key.dtype = value.dtype = (DLDataType){code, 8, 1};
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = &query,
                                    .key = &key,
                                    .value = &value,
                                    .output = &output};
    const dlattn_forward_desc desc = {.struct_size = sizeof desc,
                                      .kernel = kernel,
                                      .scale = element == E4M3 ? 0x1p-11 : 0x1p-18,
                                      .num_threads = 1};
    run(&desc, &tensors);
}

/* How many outputs of a row are not the reference's, where `key` and `value` hold a NaN. */
static int wrong_codes(const char *kernel, enum element element, uint8_t nan, int key, int value) {
    static struct float8_codes got, want;
    fill_codes(&want, element);
    if (key >= 0)
        want.key[key] = nan;
    if (value >= 0)
        want.value[value] = nan;
    got = want;
    attend_codes(&got, kernel, element);
    attend_codes(&want, "cpu_fwd_ref", element);
    const float largest = element == E4M3 ? 448 : 57344;
    for (int i = 0; i < FEW_HEADS * WIDTH; i++) {
        got.output[i] /= largest;
        want.output[i] /= largest;
    }
    return wrong(got.output, want.output, FEW_HEADS * WIDTH);
}

Test(edges, codes_of_8_bits) {
    static const int columns[] = {3, 40, 70, 101};
    struct cpu_rows rows;
    find_cpu_rows(&rows, F32);
    for (int row = 0; row < rows.count; row++) {
        const char *const name = rows.info[row].name;
        for (enum element e = E4M3; e <= E5M2; e++) {
            if (!element_is_listed(rows.info[row].dtypes, e))
                continue;
            cr_expect(eq(int, wrong_codes(name, e, 0, -1, -1), 0), "%s, %d", name, e);
            for (int n = 0; n < 8; n++) {
                const int at = 33 * WIDTH + columns[n / 2];
                const uint8_t nan = n % 2 ? 0xff : 0x7f;
                cr_expect(eq(int, wrong_codes(name, e, nan, at, -1), 0), "%s, key %d", name, at);
                cr_expect(eq(int, wrong_codes(name, e, nan, -1, at), 0), "%s, value %d", name, at);
            }
        }
    }
}

/* Times the unit of e4m3 keys the query is more than f32 holds, and no logit is: the keys are 0 there. */
Test(edges, vast_query_over_codes) {
    static struct float8_codes got, want;
    struct cpu_rows rows;
    find_cpu_rows(&rows, F32);
    for (int row = 0; row < rows.count; row++) {
        if (!element_is_listed(rows.info[row].dtypes, E4M3))
            continue;
        fill_codes(&want, E4M3);
        want.query[3] = 0x1p121f;
        for (int key = 0; key < FEW_KEYS; key++)
            want.key[key * WIDTH + 3] = 0;
        got = want;
        attend_codes(&got, rows.info[row].name, E4M3);
        attend_codes(&want, "cpu_fwd_ref", E4M3);
        cr_expect(eq(int, wrong(got.output, want.output, FEW_HEADS * WIDTH), 0), "%s",
                  rows.info[row].name);
    }
}

/* Heads that share keys differ in the scale of their queries, which are then sums of terms by AMX, infinity being none. */
Test(edges, infinite_key_beside_scales_of_heads) {
    const struct features features = {.name = "infinite key, scales",
                                      .scales = 2,
                                      .nan = NAN_KEY,
                                      .planted = -INFINITY,
                                      .lse = LSE_F32};
    struct cpu_rows rows;
    find_cpu_rows_of(&rows, 1u << F32 | 1u << F16 | 1u << BF16);
    for (int row = 0; row < rows.count; row++) {
        const struct test_case c = {
            {1, 8, 1, 1, 300, 64, 64}, features, shortest_element(&rows.info[row]), 5};
        const struct subject subject = {
            .api = test_api(), .place = &place_cpu, .kernel = rows.info[row].name};
        struct verdict v;
        check_case(&v, &subject, &c);
        cr_expect(v.outcome != FAILED, "%s", v.text);
        rows.ran[row] += v.outcome == PASSED;
    }
    expect_all_ran(&rows);
}
