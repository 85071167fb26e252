/*
 * merge and append, whichever row the library chooses on this machine and on lesser ones, against plain loops in double: every
 * layout and dtype, packed and paged, between guard pages, outputs and gaps filled before. A call cannot name a row of these
 * operations, so DLATTN_CPU takes instruction sets away instead. Built twice, as kernels_test is.
 */
#define _POSIX_C_SOURCE 200112L /* setenv */
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <criterion/parameterized.h>

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef BACKEND
#define BACKEND "cpu"
#define PLACE place_cpu
#endif

enum { FILL = 0xa5, MOST_PARTS = 70, MOST_TENSORS = 2 * MOST_PARTS + 2 };

struct cpu_set {
    char cpu[32]; /* DLATTN_CPU; "all" = not set */
};

static void free_sets(struct criterion_test_params *params) { cr_free(params->params); }

static struct criterion_test_params every_set(void) {
    static const struct cpu_set sets[] = {{"all"}, {""}, {"avx2"}, {"avx2,avx512"}};
    const size_t count = strcmp(BACKEND, "cpu") == 0 ? sizeof sets / sizeof sets[0] : 1;
    struct cpu_set *copy = cr_malloc(sizeof sets);
    memcpy(copy, sets, sizeof sets);
    return cr_make_param_array(struct cpu_set, copy, count, free_sets);
}

static const dlattn_api *api_with(const struct cpu_set *set) {
    if (strcmp(set->cpu, "all") != 0)
        setenv("DLATTN_CPU", set->cpu, 1);
    return test_api();
}

/* Skips an operation that no row of this backend, or not the one of DLATTN_TEST_ROW, does. */
static void expect_rows_of(const dlattn_api *api, const char *operation) {
    const char *const only = getenv("DLATTN_TEST_ROW");
    for (int32_t row = 0; row < api->kernel_count(); row++) {
        dlattn_kernel_info info = {.struct_size = sizeof info};
        cr_assert(eq(int, api->kernel_info(row, &info), DLATTN_OK));
        if (strcmp(info.backend, BACKEND) == 0 && strcmp(info.operation, operation) == 0 &&
            (!only || !only[0] || strcmp(info.name, only) == 0))
            return;
    }
    cr_skip_test("%s: no row of " BACKEND " is to be tested", operation);
}

static void wait_for_results(void) {
    if (PLACE.wait)
        PLACE.wait();
}

/* ---- Tensors between guard pages ---------------------------------------------------------------------------- */

/* The tensors of a call, the written ones with a copy of what they held. */
struct placed {
    struct tensor tensor[MOST_TENSORS];
    struct block block[MOST_TENSORS];
    bool written[MOST_TENSORS];
    int count;
};

static struct tensor *add(struct placed *p, enum element e, int ndim, const int64_t *shape,
                          enum layout layout, bool written) {
    cr_assert(p->count < MOST_TENSORS);
    p->written[p->count] = written;
    struct tensor *t = &p->tensor[p->count++];
    tensor_make(t, e, ndim, shape, layout, 0, FILL);
    return t;
}

static void put(struct placed *p, enum side side) {
    for (int n = 0; n < p->count; n++) {
        struct tensor *t = &p->tensor[n];
        p->block[n] = PLACE.take(t->bytes, t->alignment, side);
        PLACE.store(&p->block[n], t->image);
        t->dl.device = PLACE.device;
        t->dl.data = p->block[n].data;
        t->dl.byte_offset = t->first;
    }
}

/* Brings images back; inputs are as they were, and so is what lies between and around elements. */
static void take_back(struct placed *p, const char *what) {
    for (int n = 0; n < p->count; n++) {
        struct tensor *t = &p->tensor[n];
        size_t at = 0;
        unsigned char *before = malloc(t->bytes + 1);
        cr_assert(before != NULL);
        memcpy(before, t->image, t->bytes);
        cr_expect(PLACE.fetch(&p->block[n], t->image), "%s: tensor %d, around it", what, n);
        cr_expect(p->written[n] || memcmp(before, t->image, t->bytes) == 0,
                  "%s: input %d was written", what, n);
        cr_expect(tensor_gaps_hold(t, FILL, &at), "%s: tensor %d, byte %zu between elements", what,
                  n, at);
        free(before);
        PLACE.give(&p->block[n]);
    }
}

static void drop(struct placed *p) {
    for (int n = 0; n < p->count; n++)
        tensor_free(&p->tensor[n]);
}

/* ---- Merge -------------------------------------------------------------------------------------------------- */

struct merge_case {
    int64_t batch, heads, rows, dim;
    int parts;
    enum element element, result, lse; /* result: of the output and of every other part, too */
    enum layout layout;
    bool packed, in_place, with_lse;
};

/* Row i of head h of batch b in an output or an lse. */
static void index_of(const struct merge_case *c, bool lse, const int64_t row[3], int64_t at[4]) {
    const int64_t packed_row = row[0] * c->rows + row[2];
    memset(at, 0, 4 * sizeof *at);
    memcpy(at, row, 3 * sizeof *at);
    if (!c->packed)
        return;
    at[0] = lse ? row[1] : packed_row;
    at[1] = lse ? packed_row : row[1];
    at[2] = 0;
}

/* A number that two types hold, but not the sum of a few of it. */
static double large(enum element a, enum element b) {
    return a == F16 || b == F16 ? 3e4 : a == F64 && b == F64 ? 1e308 : 1e38;
}

/* Some rows of a part saw no key, some no part did: whatever stands there has no weight. In others there is a NaN, an infinity
 * whose weight f32 does not hold, or what is too large to be added up. */
static void fill_row(const struct merge_case *c, struct placed *p, int n, int64_t i,
                     uint64_t seed) {
    struct tensor *output = &p->tensor[n], *lse = &p->tensor[c->parts + n];
    const int64_t row[3] = {i / c->rows / c->heads, i / c->rows % c->heads, i % c->rows};
    const uint64_t of = (uint64_t)(i * MOST_PARTS + n);
    const bool empty = i % 7 == 3 || random_below(seed, of, 4) == 0, far = n == 0 && i % 11 == 5;
    double x = 4 * random_normal(seed + 90, of);
    int64_t at[4];
    index_of(c, true, row, at);
    tensor_set(lse, at, empty ? -INFINITY : n == 1 && i % 13 == 6 ? NAN : far ? x - 200 : x);
    index_of(c, false, row, at);
    for (int64_t d = 0; d < c->dim; d++) {
        at[output->dl.ndim - 1] = d;
        x = random_normal(seed + (uint64_t)n, (uint64_t)(i * c->dim + d));
        tensor_set(output, at,
                   empty               ? NAN
                   : far && d % 3 == 0 ? INFINITY
                   : i % 5 == 4        ? large(c->element, c->result) * (d % 2 ? -1 : 1)
                                       : x);
    }
}

static void fill_parts(const struct merge_case *c, struct placed *p, uint64_t seed) {
    for (int n = 0; n < c->parts; n++) {
        for (int64_t i = 0; i < c->batch * c->heads * c->rows; i++)
            fill_row(c, p, n, i, seed);
    }
}

static double eps(enum element e) { return element_epsilon(e); }

static bool is_near(double got, double want, double bound) {
    return isfinite(want) ? fabs(got - want) <= bound : got == want || (isnan(got) && isnan(want));
}

/* Results in the case's own dtypes, as the call found them: the parts before it. */
static void expect_row(const struct merge_case *c, const struct tensor *before,
                       const struct tensor *output, const struct tensor *lse, const int64_t row[3],
                       const char *what) {
    const double sums = c->element == F64 && c->result == F64 ? eps(F64) : eps(F32);
    double most = -INFINITY, total = 0;
    int64_t at[4];
    index_of(c, true, row, at);
    for (int n = 0; n < c->parts; n++)
        most = fmax(most, tensor_get(&before[c->parts + n], at));
    for (int n = 0; n < c->parts; n++) {
        const double of_part = tensor_get(&before[c->parts + n], at);
        total += of_part == -INFINITY ? 0 : exp(of_part - most);
    }
    const double want_lse = total == 0 ? -INFINITY : most + log(total);
    if (lse) {
        const double got = tensor_get(lse, at),
                     bound = (8 * sums + eps(c->lse)) * fmax(1, fabs(want_lse));
        cr_expect(is_near(got, want_lse, bound), "%s: lse %g, must be %g", what, got, want_lse);
    }
    for (int64_t d = 0; d < c->dim; d++) {
        double want = 0, size = 0;
        for (int n = 0; n < c->parts; n++) {
            index_of(c, true, row, at);
            const double of_part = tensor_get(&before[c->parts + n], at);
            if (of_part == -INFINITY)
                continue;
            index_of(c, false, row, at);
            at[before[n].dl.ndim - 1] = d;
            const double term = exp(of_part - want_lse) * tensor_get(&before[n], at);
            want += term;
            size += fabs(term) * (8 + fabs(of_part) + fabs(want_lse));
        }
        index_of(c, false, row, at);
        at[output->dl.ndim - 1] = d;
        const double got = tensor_get(output, at);
        cr_expect(is_near(got, want,
                          eps(c->result) * fabs(want) + sums * size +
                              (c->result == F16 ? 0x1p-25 : DBL_MIN)),
                  "%s: output %g, must be %g", what, got, want);
    }
}

static void make_merge(const struct merge_case *c, struct placed *p) {
    const int64_t whole[] = {c->batch, c->heads, c->rows, c->dim},
                  packed[] = {c->batch * c->rows, c->heads, c->dim},
                  packed_lse[] = {c->heads, c->batch * c->rows};
    p->count = 0;
    for (int n = 0; n < c->parts; n++)
        add(p, n % 2 ? c->result : c->element, c->packed ? 3 : 4, c->packed ? packed : whole,
            c->layout, c->in_place && n == 1);
    for (int n = 0; n < c->parts; n++)
        add(p, c->lse, c->packed ? 2 : 3, c->packed ? packed_lse : whole, c->layout,
            c->in_place && n == 1);
    if (c->in_place)
        return;
    add(p, c->result, c->packed ? 3 : 4, c->packed ? packed : whole, c->layout, true);
    add(p, c->lse, c->packed ? 2 : 3, c->packed ? packed_lse : whole, c->layout, true);
}

static void check_merge(const dlattn_api *api, const struct merge_case *c, uint64_t seed) {
    struct placed p = {.count = 0}, before = {.count = 0};
    const DLTensor *outputs[MOST_PARTS], *lses[MOST_PARTS];
    char what[160];
    snprintf(what, sizeof what, "%s/%s/%s [%d, %d, %d, %d] x %d %s%s%s%s", element_name(c->element),
             element_name(c->result), element_name(c->lse), (int)c->batch, (int)c->heads,
             (int)c->rows, (int)c->dim, c->parts, layout_name(c->layout),
             c->packed ? " packed" : "", c->in_place ? " in place" : "",
             c->with_lse ? "" : " without lse");
    make_merge(c, &p);
    make_merge(c, &before);
    fill_parts(c, &p, seed);
    fill_parts(c, &before, seed);
    put(&p, seed & 1 ? AT_BEGIN : AT_END);
    for (int n = 0; n < c->parts; n++) {
        outputs[n] = &p.tensor[n].dl;
        lses[n] = &p.tensor[c->parts + n].dl;
    }
    const int target = c->in_place ? 1 : 2 * c->parts,
              target_lse = c->in_place ? c->parts + 1 : target + 1;
    const struct tensor *lse = c->with_lse ? &p.tensor[target_lse] : NULL;
    const dlattn_partials partials = {.struct_size = sizeof partials,
                                      .count = c->parts,
                                      .outputs = outputs,
                                      .lses = lses,
                                      .output = &p.tensor[target].dl,
                                      .lse = lse ? &lse->dl : NULL};
    dlattn_sku sku = {.struct_size = sizeof sku};
    cr_assert(eq(int, api->merge_query(&partials, &sku), DLATTN_OK), "%s: %s", what,
              api->last_error());
    struct block workspace = PLACE.take(sku.workspace_bytes, sku.workspace_alignment, AT_END);
    const dlattn_exec exec = {.struct_size = sizeof exec,
                              .workspace = workspace.data,
                              .workspace_bytes = sku.workspace_bytes};
    cr_expect(eq(int, api->merge(&partials, &exec), DLATTN_OK), "%s: %s", what, api->last_error());
    wait_for_results();
    PLACE.give(&workspace);
    take_back(&p, what);
    for (int64_t i = 0; i < c->batch * c->heads * c->rows; i++) {
        const int64_t row[3] = {i / c->rows / c->heads, i / c->rows % c->heads, i % c->rows};
        expect_row(c, before.tensor, &p.tensor[target], lse, row, what);
    }
    drop(&p);
    drop(&before);
}

ParameterizedTestParameters(parts, merge) { return every_set(); }

ParameterizedTest(struct cpu_set *set, parts, merge) {
    static const int64_t shapes[][4] = {{2, 3, 5, 16}, {1, 1, 1, 1}, {2, 2, 33, 40},
                                        {1, 4, 7, 65}, {3, 2, 0, 8}, {2, 1, 3, 128},
                                        {1, 2, 3, 0}};
    const dlattn_api *api = api_with(set);
    uint64_t seed = 1;
    expect_rows_of(api, "merge");
    for (enum element e = F64; e <= BF16; e++) {
        for (enum layout layout = COMPACT; layout < MIXED; layout++) {
            for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++, seed++) {
                const int parts = 1 + (int)(seed % 5);
                const struct merge_case c = {shapes[s][0],
                                             shapes[s][1],
                                             shapes[s][2],
                                             shapes[s][3],
                                             parts,
                                             e,
                                             seed % 4 == 1 ? (e + seed / 4 % 4) % 4 : e,
                                             seed % 3 ? F32 : e,
                                             layout,
                                             seed % 4 == 0,
                                             seed % 5 == 0 && parts > 1,
                                             seed % 7 != 0};
                check_merge(api, &c, seed);
            }
        }
    }
}

/* As many parts, or rows, as a kernel may have to take in several goes. */
ParameterizedTestParameters(parts, merge_of_many) { return every_set(); }

ParameterizedTest(struct cpu_set *set, parts, merge_of_many) {
    static const int parts[] = {31, 32, 33, 64, 65, MOST_PARTS};
    const dlattn_api *api = api_with(set);
    const int64_t heads = strcmp(BACKEND, "cpu") == 0 ? 2 : 80;
    expect_rows_of(api, "merge");
    for (uint64_t n = 0; n < sizeof parts / sizeof parts[0]; n++) {
        const enum element e = n % 4, result = n < 4 ? e : F32;
        const enum layout layout = n % 3 ? COMPACT : ODD;
        check_merge(api,
                    &(struct merge_case){1, 3, 5, 24, parts[n], e, result, F32, layout, n == 2,
                                         n % 2 == 1, true},
                    n);
        check_merge(api,
                    &(struct merge_case){2, heads, 219, 8, 2, e, result, F32, layout, n == 3,
                                         n % 2 == 1, true},
                    n);
    }
}

/* ---- Append ------------------------------------------------------------------------------------------------- */

enum { BATCH = 3, HEADS = 2, CAPACITY = 12, PAGE = 4, NEW_ROWS = 4 };

struct append_case {
    enum element element, cache;
    enum layout layout;
    int64_t dim, dim_v;
    bool packed, paged, new_lengths;
    int scales; /* 0: none, 1: [1], 2: one for each batch entry, or page, and head */
};

enum {
    A_KEY,
    A_VALUE,
    A_KEY_CACHE,
    A_VALUE_CACHE,
    A_CACHE_LENGTHS,
    A_NEW_LENGTHS,
    A_CU,
    A_TABLE,
    A_KEY_SCALE,
    A_VALUE_SCALE
};

static const int64_t cached[BATCH] = {3, 0, 8}, added[BATCH] = {4, 2, 0},
                     packed_at[] = {0, 4, 6, 6};
static const int64_t pages[BATCH][CAPACITY / PAGE] = {{7, 2, 5}, {0, 8, 3}, {4, 1, 6}};

static struct tensor *optional(struct placed *p, bool wanted, enum element e, int ndim,
                               const int64_t *shape, enum layout layout) {
    struct tensor *t = add(p, e, ndim, shape, layout, false);
    int64_t at[4] = {0};
    for (int64_t n = 0; wanted && n < tensor_count(t); n++, tensor_next(t, at))
        tensor_set(t, at, e == F32 ? 0.5 + (double)(n % 5) : 0);
    return t;
}

static void make_append(const struct append_case *c, struct placed *p) {
    const int64_t slots = c->paged ? BATCH * CAPACITY / PAGE : BATCH,
                  length = c->paged ? PAGE : CAPACITY, ends[] = {BATCH + 1}, batch[] = {BATCH};
    const int64_t scale[] = {c->scales == 2 ? slots : 1, HEADS};
    p->count = 0;
    for (int n = 0; n < 2; n++) {
        const int64_t dim = n ? c->dim_v : c->dim, whole[] = {BATCH, HEADS, NEW_ROWS, dim},
                      packed[] = {packed_at[BATCH], HEADS, dim};
        struct tensor *t =
            add(p, c->element, c->packed ? 3 : 4, c->packed ? packed : whole, c->layout, false);
        int64_t at[4] = {0};
        for (int64_t i = 0; i < tensor_count(t); i++, tensor_next(t, at))
            tensor_set(t, at, 3 * random_normal(7 + (uint64_t)n, (uint64_t)i));
    }
    for (int n = 0; n < 2; n++)
        add(p, c->cache, 4, (int64_t[]){slots, HEADS, length, n ? c->dim_v : c->dim}, c->layout,
            true);
    struct tensor *lengths = add(p, I32, 1, batch, c->layout, false),
                  *rows = optional(p, c->new_lengths, I32, 1, batch, COMPACT),
                  *cu = optional(p, c->packed, I32, 1, ends, COMPACT),
                  *table =
                      optional(p, c->paged, I32, 2, (int64_t[]){BATCH, CAPACITY / PAGE}, COMPACT);
    for (int64_t b = 0; b <= BATCH; b++) {
        tensor_set(cu, (int64_t[4]){b}, (double)packed_at[b]);
        if (b == BATCH)
            break;
        tensor_set(lengths, (int64_t[4]){b}, (double)cached[b]);
        tensor_set(rows, (int64_t[4]){b}, (double)added[b]);
        for (int64_t n = 0; n < CAPACITY / PAGE; n++)
            tensor_set(table, (int64_t[4]){b, n}, (double)pages[b][n]);
    }
    optional(p, true, F32, c->scales == 1 ? 1 : 2, scale, COMPACT);
    optional(p, true, F32, c->scales == 1 ? 1 : 2, scale, COMPACT);
}

/* The new row that belongs at row l of batch b of a cache, or -1. */
static int64_t row_for(const struct append_case *c, int64_t b, int64_t l) {
    const int64_t rows = c->packed || c->new_lengths ? added[b] : NEW_ROWS, i = l - cached[b];
    return i >= 0 && i < rows ? i : -1;
}

static void expect_cache(const struct append_case *c, const struct placed *p,
                         const struct placed *before, int which, const char *what) {
    const struct tensor *got = &p->tensor[A_KEY_CACHE + which],
                        *new_rows = &p->tensor[A_KEY + which],
                        *scales = &p->tensor[A_KEY_SCALE + which];
    const int64_t dim = which ? c->dim_v : c->dim;
    for (int64_t n = 0; n < BATCH * HEADS * CAPACITY * dim; n++) {
        const int64_t d = n % dim, l = n / dim % CAPACITY, g = n / dim / CAPACITY % HEADS,
                      b = n / dim / CAPACITY / HEADS, i = row_for(c, b, l);
        const int64_t slot = c->paged ? pages[b][l / PAGE] : b;
        const int64_t at[4] = {slot, g, c->paged ? l % PAGE : l, d};
        double want = tensor_get(&before->tensor[A_KEY_CACHE + which], at);
        if (i >= 0) {
            const int64_t packed[4] = {packed_at[b] + i, g, d}, whole[4] = {b, g, i, d},
                          entry[4] = {c->scales == 2 ? slot : 0, c->scales == 1 ? 0 : g};
            want = tensor_get(new_rows, c->packed ? packed : whole);
            if (c->scales)
                want /= tensor_get(scales, entry);
            want = element_round(c->cache, want);
        }
        const double value = tensor_get(got, at);
        cr_expect(memcmp(&value, &want, sizeof want) == 0 ||
                      (c->scales && fabs(value - want) <= 2 * eps(c->cache) * fabs(want)),
                  "%s: %s[%d, %d, %d, %d] is %g, must be %g", what, which ? "value" : "key", (int)b,
                  (int)g, (int)l, (int)d, value, want);
    }
}

static void check_append(const dlattn_api *api, const struct append_case *c, uint64_t seed) {
    struct placed p = {.count = 0}, before = {.count = 0};
    char what[160];
    snprintf(what, sizeof what, "%s to %s D%d/%d %s%s%s%s scales %d", element_name(c->element),
             element_name(c->cache), (int)c->dim, (int)c->dim_v, layout_name(c->layout),
             c->packed ? " packed" : "", c->paged ? " paged" : "",
             c->new_lengths ? " new_lengths" : "", c->scales);
    make_append(c, &p);
    make_append(c, &before);
    put(&p, seed & 1 ? AT_BEGIN : AT_END);
    const dlattn_append_tensors t = {
        .struct_size = sizeof t,
        .key = &p.tensor[A_KEY].dl,
        .value = &p.tensor[A_VALUE].dl,
        .key_cache = &p.tensor[A_KEY_CACHE].dl,
        .value_cache = &p.tensor[A_VALUE_CACHE].dl,
        .cache_lengths = &p.tensor[A_CACHE_LENGTHS].dl,
        .new_lengths = c->new_lengths ? &p.tensor[A_NEW_LENGTHS].dl : NULL,
        .cu_seqlens = c->packed ? &p.tensor[A_CU].dl : NULL,
        .block_table = c->paged ? &p.tensor[A_TABLE].dl : NULL,
        .key_scale = c->scales ? &p.tensor[A_KEY_SCALE].dl : NULL,
        .value_scale = c->scales ? &p.tensor[A_VALUE_SCALE].dl : NULL,
    };
    dlattn_sku sku = {.struct_size = sizeof sku};
    cr_assert(eq(int, api->append_query(&t, &sku), DLATTN_OK), "%s: %s", what, api->last_error());
    struct block workspace = PLACE.take(sku.workspace_bytes, sku.workspace_alignment, AT_END);
    const dlattn_exec exec = {.struct_size = sizeof exec,
                              .workspace = workspace.data,
                              .workspace_bytes = sku.workspace_bytes};
    cr_expect(eq(int, api->append(&t, &exec), DLATTN_OK), "%s: %s", what, api->last_error());
    wait_for_results();
    PLACE.give(&workspace);
    take_back(&p, what);
    expect_cache(c, &p, &before, 0, what);
    expect_cache(c, &p, &before, 1, what);
    drop(&p);
    drop(&before);
}

ParameterizedTestParameters(parts, append) { return every_set(); }

ParameterizedTest(struct cpu_set *set, parts, append) {
    static const int64_t dims[][2] = {{16, 16}, {7, 12}, {64, 33}};
    const dlattn_api *api = api_with(set);
    expect_rows_of(api, "append");
    uint64_t seed = 0;
    for (enum element e = F64; e <= BF16; e++) {
        for (enum element cache = F64; cache <= BF16; cache++) {
            for (enum layout layout = COMPACT; layout < MIXED; layout++, seed++) {
                const struct append_case c = {e,
                                              cache,
                                              layout,
                                              dims[seed % 3][0],
                                              dims[seed % 3][1],
                                              seed % 2 == 0,
                                              seed / 2 % 2 == 0,
                                              seed / 4 % 2 == 0,
                                              (int)(seed % 5 % 3)};
                check_append(api, &c, seed);
            }
        }
    }
}
