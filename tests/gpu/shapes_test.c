/*
 * Calls too large for the loop over all elements: which row and tile takes each, and some of its rows against a softmax in
 * double.
 */
#include "tests/gpu/attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct choice {
    const char *wanted;
    enum element element;
    int64_t batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v;
    int32_t causal;
    const char *row;
    int32_t tile_q, tile_k, splits;
    uint64_t feature;
} choices[] = {
#define CHOICE(...) {__VA_ARGS__, 0},
#define OPTION(feature, ...) {__VA_ARGS__, DLATTN_FEATURE_##feature},
#include "tests/gpu/choices.inc"
#undef CHOICE
#undef OPTION
};

enum { WIDEST = 512 }; /* of a row of the output */

struct attention_of {
    struct tensor query, key, value, output, lse, slopes;
};

/* Logits lie on either side of where a cap is no longer a line. */
static const double SOFTCAP = 20;
static double softcap(const struct choice *c) {
    return c->feature == DLATTN_FEATURE_SOFTCAP ? SOFTCAP : 0;
}

/* From one that hides all but the nearest keys to none, and one below 0. */
static const double SLOPES[] = {0.5, 0x1p-6, 3, 0x1p-9, 0, 0.0625, -0x1p-8, 30};
enum { KINDS_OF_SLOPES = sizeof SLOPES / sizeof SLOPES[0] };
static double slope(const struct choice *c, int64_t h) {
    return c->feature == DLATTN_FEATURE_ALIBI ? SLOPES[h % KINDS_OF_SLOPES] : 0;
}

/* Between -2 and 2 in steps of 1/32, which every type holds. */
static void fill(struct tensor *t, uint64_t seed) {
    int64_t index[4] = {0};
    uint64_t n = 0;
    for (int64_t left = tensor_count(t); left > 0; left--, tensor_next(t, index))
        tensor_set(t, index, (double)random_below(seed, n++, 128) / 32 - 2);
}

static void make_tensors(struct attention_of *a, const struct choice *c) {
    const struct {
        struct tensor *tensor;
        int64_t heads, length, dim;
    } all[] = {{&a->query, c->heads_q, c->len_q, c->dim_qk},
               {&a->key, c->heads_kv, c->len_k, c->dim_qk},
               {&a->value, c->heads_kv, c->len_k, c->dim_v},
               {&a->output, c->heads_q, c->len_q, c->dim_v}};
    for (size_t t = 0; t < 4; t++) {
        const int64_t shape[4] = {c->batch, all[t].heads, all[t].length, all[t].dim};
        tensor_make(all[t].tensor, c->element, 4, shape, COMPACT, 0, OUTPUT_FILL);
        if (t < 3)
            fill(all[t].tensor, t);
        upload(all[t].tensor);
    }
    tensor_make(&a->lse, c->element == F64 ? F64 : F32, 3,
                (const int64_t[]){c->batch, c->heads_q, c->len_q}, COMPACT, 0, OUTPUT_FILL);
    upload(&a->lse);
    tensor_make(&a->slopes, F32, 1, &c->heads_q, COMPACT, 0, 0);
    for (int64_t h = 0; h < c->heads_q; h++)
        tensor_set(&a->slopes, &h, slope(c, h));
    upload(&a->slopes);
}

/* Row i of head h in double, and its lse, which is returned. Alignment is top left. */
static double attend(const struct attention_of *a, const struct choice *c, int64_t b, int64_t h,
                     int64_t i, double output[WIDEST]) {
    const struct row_in_double row = {
        .query = &a->query,
        .key = &a->key,
        .value = &a->value,
        .batch = b,
        .head = h,
        .head_kv = h / (c->heads_q / c->heads_kv),
        .row = i,
        .keys = c->causal && i < c->len_k ? i + 1 : c->len_k,
        .met = i,
        .softcap = softcap(c),
        .slope = slope(c, h),
    };
    return attend_in_double(&row, output);
}

/* Weights and outputs are rounded to the element, each by up to half a unit of what values and outputs have at most. */
static void check_row(const struct attention_of *a, const struct choice *c, int64_t b, int64_t h,
                      int64_t i) {
    double want[WIDEST];
    const double lse = attend(a, c, b, h, i, want), precision = c->element == F64 ? 1e-12 : 1e-5,
                 bound = precision + 2 * element_epsilon(c->element);
    const double got_lse = tensor_get(&a->lse, (const int64_t[4]){b, h, i});
    cr_expect(fabs(got_lse - lse) <= precision * fmax(1, fabs(lse)),
              "%s, head %d, row %d: lse is %.9g, must be %.9g", c->row, (int)h, (int)i, got_lse,
              lse);
    for (int64_t d = 0; d < c->dim_v; d++) {
        const double got = tensor_get(&a->output, (const int64_t[4]){b, h, i, d});
        cr_expect(fabs(got - want[d]) <= bound * fmax(1, fabs(want[d])),
                  "%s, head %d, row %d, column %d is %.9g, must be %.9g", c->row, (int)h, (int)i,
                  (int)d, got, want[d]);
    }
}

/* First and last of a tile, the last of all, and some by chance. */
static int64_t row_at(const struct choice *c, int n) {
    const int64_t edges[] = {0, c->tile_q - 1, c->tile_q, c->len_q / 2, c->len_q - 1};
    return n < 5 ? edges[n] % c->len_q : random_below(11, (uint64_t)n, c->len_q);
}

/* None is left out: every element is a number, and the sentinel that was there before is none. */
static bool all_written(const struct tensor *t) {
    int64_t index[4] = {0};
    for (int64_t left = tensor_count(t); left > 0; left--, tensor_next(t, index)) {
        if (!(fabs(tensor_get(t, index)) < 100))
            return false;
    }
    return true;
}

static void check_choice(const dlattn_api *api, const struct choice *c, bool an_h100) {
    struct attention_of a;
    dlattn_sku sku;
    const dlattn_forward_desc desc = {.struct_size = sizeof desc,
                                      .kernel = c->wanted,
                                      .causal = c->causal,
                                      .softcap = softcap(c)};
    make_tensors(&a, c);
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = &a.query.dl,
                                    .key = &a.key.dl,
                                    .value = &a.value.dl,
                                    .output = &a.output.dl,
                                    .lse = &a.lse.dl,
                                    .alibi_slopes =
                                        c->feature == DLATTN_FEATURE_ALIBI ? &a.slopes.dl : NULL};
    MUST(run_call(api, &desc, &tensors, &sku));
    download(&a.output);
    download(&a.lse);
    fprintf(stderr, "%s %s, B%d H%d/%d L%d/%d D%d/%d%s: tile %d x %d, %d splits\n", sku.kernel,
            element_name(c->element), (int)c->batch, (int)c->heads_q, (int)c->heads_kv,
            (int)c->len_q, (int)c->len_k, (int)c->dim_qk, (int)c->dim_v, c->causal ? " causal" : "",
            sku.tile_q, sku.tile_k, sku.num_splits);
    if (an_h100) {
        cr_expect(strcmp(sku.kernel, c->row) == 0, "%s, must be %s", sku.kernel, c->row);
        cr_expect(eq(int, sku.tile_q, c->tile_q), "%s", c->row);
        cr_expect(eq(int, sku.tile_k, c->tile_k), "%s", c->row);
        cr_expect(eq(int, sku.num_splits, c->splits), "%s", c->row);
    }
    cr_expect(all_written(&a.output), "%s", c->row);
    cr_expect(all_written(&a.lse), "%s", c->row);
    for (int n = 0; n < 16; n++)
        check_row(&a, c, n % c->batch, n * 5 % c->heads_q, row_at(c, n));
    struct tensor *const all[] = {&a.query, &a.key, &a.value, &a.output, &a.lse, &a.slopes};
    for (size_t t = 0; t < sizeof all / sizeof all[0]; t++)
        discard(all[t]);
}

/* What choices.inc says of rows and tiles holds for this GPU. */
static bool is_an_h100(const dlattn_api *api) {
    dlattn_device_info info = {.struct_size = sizeof info};
    MUST(api->device_info(1, &info));
    return strcmp(info.arch, "sm_90") == 0 && info.multiprocessors == 132;
}

Test(gpu_shapes, long_and_half_empty) {
    const dlattn_api *api = gpu_api();
    const bool an_h100 = is_an_h100(api);
    if (!an_h100)
        fprintf(stderr, "not 132 multiprocessors of sm_90: which row and tile is not asked\n");
    for (size_t n = 0; n < sizeof choices / sizeof choices[0]; n++)
        check_choice(api, &choices[n], an_h100);
}
