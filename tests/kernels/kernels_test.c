/*
 * The one loop: every row of the table, on every shape and every feature, against the reference. A row that is added to
 * kernels.inc is tested without a change here. Built twice: for the CPU's rows, and with BACKEND and PLACE for the GPU's.
 */
#define _POSIX_C_SOURCE 200112L /* setenv */
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <criterion/parameterized.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef BACKEND
#define BACKEND "cpu"
#define PLACE place_cpu
#endif

/* Sanitizers are slow: under them rows take some of the cases. */
#if defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define SANITIZED 0
#endif
enum { RANDOM_CASES = 120, SHOWN_FAILURES = 8 };

/* What one test process checks: all rows of an operation, or what the library chooses when it may use only some instruction sets. */
struct job {
    char cpu[64]; /* DLATTN_CPU; "all" = not set */
    enum element element;
    bool backward;
};

struct row {
    dlattn_kernel_info info;
    bool is_thorough; /* takes all cases, not one of three or so */
    bool takes_all;   /* may decline for want of a feature or a head dim alone */
    int checked, declined, failed;
    uint64_t covered; /* DLATTN_FEATURE_* of the cases that ran */
};

enum { MOST_ROWS = 64 };

struct loop {
    const struct job *job;
    int count;
    struct row row[MOST_ROWS];
    struct subject subject[MOST_ROWS];
    uint64_t seed;
};

/* Which rows a case is for, a bit for each. */
typedef uint64_t rows;

static rows rows_where(const struct loop *loop, bool (*has)(const struct row *)) {
    rows found = 0;
    for (int i = 0; i < loop->count; i++)
        found |= (rows)has(&loop->row[i]) << i;
    return found;
}
static bool is_any(const struct row *row) { return row->info.name != NULL; }
static bool is_thorough(const struct row *row) { return row->is_thorough; }

static void count(struct row *row, struct verdict *v, const struct job *job) {
    if (row->takes_all && v->outcome == DECLINED && strstr(v->text, "declines this problem"))
        v->outcome = FAILED;
    row->checked += v->outcome != DECLINED;
    row->declined += v->outcome == DECLINED;
    row->failed += v->outcome == FAILED;
    row->covered |= v->outcome == PASSED ? v->sku.features : 0;
    if (v->outcome == FAILED && row->failed <= SHOWN_FAILURES)
        fprintf(stderr, "%s (DLATTN_CPU %s): %s\n", v->sku.kernel ? v->sku.kernel : row->info.name,
                job->cpu, v->text);
}

static void check_for(struct loop *loop, rows who, const struct shape *shape,
                      const struct features *features) {
    struct verdict v[MOST_ROWS];
    struct subject subjects[MOST_ROWS];
    struct row *checked[MOST_ROWS];
    struct test_case c = {*shape, *features, loop->job->element, loop->seed++};
    int n = 0;
    c.features.backward = loop->job->backward;
    if (loop->job->backward && features_are_forward_only(features))
        return;
    for (int i = 0; i < loop->count; i++) {
        if (!(who >> i & 1))
            continue;
        checked[n] = &loop->row[i];
        subjects[n++] = loop->subject[i];
    }
    if (n > 0)
        check_subjects(v, subjects, n, &c);
    for (int i = 0; i < n; i++)
        count(checked[i], &v[i], loop->job);
}

static void check(struct loop *loop, const struct shape *shape, const struct features *features) {
    check_for(loop, rows_where(loop, is_any), shape, features);
}
static void check_thoroughly(struct loop *loop, const struct shape *shape,
                             const struct features *features) {
    check_for(loop, rows_where(loop, is_thorough), shape, features);
}

/* Every shape, plain, causal, and with tensors of 8 bits. */
static void loop_shapes(struct loop *loop) {
    for (int i = 0; i < check_shape_count; i++) {
        check(loop, &check_shapes[i], features_named("causal_bottom_right"));
        check(loop, &check_shapes[i], features_named(i % 2 ? "cache_scales" : "cache_e5m2"));
        check(loop, &check_shapes[i], features_named(i % 2 ? "query_e4m3" : "query_cache_e5m2"));
        check_thoroughly(loop, &check_shapes[i], features_named("lse"));
    }
}

/* Rows and keys one below, at and above a tile and two of them, by the rows that have this tile. */
static void loop_tile(struct loop *loop, rows who, int64_t tile_q, int64_t tile_k) {
    static const char *const sets[] = {"lse", "causal_lse", "lengths_causal"},
                             *const float8_sets[] = {"query_plain", "query_causal",
                                                     "query_lengths"};
    for (int64_t n = 0; n < 36; n++) {
        const int64_t times_q = 1 + n / 3 % 2, times_k = 1 + n / 6 % 2;
        const struct shape s = {
            1, 2, 1, tile_q * times_q + n % 3 - 1, tile_k * times_k + n / 12 - 1, 32, 32};
        const rows now = n % 5 == 0 ? who : who & rows_where(loop, is_thorough);
        check_for(loop, now, &s, features_named(sets[n % 7 % 3]));
        check_for(loop, now, &s, features_named(float8_sets[n % 7 % 3]));
    }
}
static void loop_tiles(struct loop *loop) {
    rows left = rows_where(loop, is_any);
    for (int i = 0; i < loop->count; i++) {
        const dlattn_kernel_info *const first = &loop->row[i].info;
        rows alike = 0;
        for (int j = i; j < loop->count; j++)
            alike |= (rows)(loop->row[j].info.tile_q == first->tile_q &&
                            loop->row[j].info.tile_k == first->tile_k)
                     << j;
        if (alike & left)
            loop_tile(loop, alike & left, first->tile_q, first->tile_k);
        left &= ~alike;
    }
}

/* Every feature, on two of: keys beyond one tile and groups, decoding, a square, odd head dims; and on a longer decoding. */
static void loop_features(struct loop *loop) {
    static const struct shape shapes[] = {
        {2, 4, 2, 37, 75, 64, 64},
        {3, 4, 1, 1, 90, 64, 64},
        {1, 2, 2, 70, 70, 32, 32},
        {2, 2, 1, 13, 6, 20, 12},
    };
    for (int i = 0; i < feature_set_count; i++) {
        check(loop, &shapes[i % 4], &feature_sets[i]);
        check_thoroughly(loop, &shapes[(i + 1) % 4], &feature_sets[i]);
        check_thoroughly(loop, &(struct shape){4, 6, 2, 5, 333, 40, 40}, &feature_sets[i]);
    }
}

/* More than a tile of rows and keys: biases, whose rows are a multiple of 16 bytes apart, as a GPU's copy engine wants it, and rows behind
 * a sequence, which see nothing of a tile that others see whole. */
static void loop_long(struct loop *loop) {
    static const struct shape shapes[] = {{2, 4, 2, 150, 264, 64, 64}, {3, 2, 1, 70, 136, 128, 96}};
    for (int i = 0; i < feature_set_count; i++) {
        if (feature_sets[i].bias || feature_sets[i].query_lengths)
            check(loop, &shapes[i % 2], &feature_sets[i]);
    }
}

/* Heads that have more tiles than a GPU of some hundred multiprocessors has of these, or one for each of most: kernels whose blocks have one
 * tile, and those whose blocks take several. */
static void loop_many_heads(struct loop *loop) {
    static const struct shape shapes[] = {{3, 16, 8, 190, 264, 64, 64},
                                          {3, 24, 24, 130, 140, 128, 128},
                                          {3, 18, 18, 130, 140, 128, 128}};
    static const char *const sets[] = {"lse", "causal_lse", "lengths_causal", "causal_bottom_right",
                                       "window_bottom_right"};
    for (size_t i = 0; i < sizeof sets / sizeof sets[0]; i++)
        for (size_t j = 0; j < sizeof shapes / sizeof shapes[0]; j++)
            check(loop, &shapes[j], features_named(sets[i]));
}

/* Options that leave nothing of some tiles of keys, more than 32 of them, on each tile of a GPU. */
static void loop_hidden(struct loop *loop) {
    static const struct shape shapes[] = {{2, 2, 1, 150, 1300, 64, 64},
                                          {1, 2, 2, 150, 1300, 128, 128},
                                          {1, 2, 1, 70, 1300, 256, 256}};
    for (int i = 0; i < feature_set_count; i++)
        for (int j = 0; j < 3; j++)
            if (feature_sets[i].segment_rows || feature_sets[i].block_k > 64)
                check(loop, &shapes[j], &feature_sets[i]);
}

/* Keys that a row takes in parts, of which some rows see but a few. Every feature, but not on every shape and dtype. */
static void loop_parts(struct loop *loop) {
    static const struct shape shapes[] = {
        {1, 2, 1, 20, 8200, 16, 24}, {1, 3, 1, 35, 12300, 8, 8}, {1, 6, 2, 3, 8191, 16, 16}};
    const int of_dtype = (int)loop->job->element % 3;
    for (int i = of_dtype; i < feature_set_count; i += SANITIZED ? 9 : 3)
        check(loop, &shapes[i / 3 % 3], &feature_sets[i]);
}

/* Rows that see nothing and shall have an lse of +inf, many and few. */
static void loop_empty(struct loop *loop) {
    static const struct shape shapes[] = {{3, 4, 2, 40, 9, 32, 32}, {3, 4, 2, 4, 2, 32, 32}};
    for (int i = 0; i < feature_set_count; i++) {
        if (!feature_sets[i].empty_lse_inf)
            continue;
        check(loop, &shapes[0], &feature_sets[i]);
        check(loop, &shapes[1], &feature_sets[i]);
    }
}

/* Gradients of wide heads, for which a GPU has kernels of their own: every feature, and rows and keys around their tiles. Then of heads
 * that are wide only while few rows see a key, which here are many. */
static void loop_wide(struct loop *loop) {
    static const struct shape shapes[] = {
        {1, 4, 2, 70, 70, 160, 160}, {1, 2, 1, 37, 75, 192, 128}, {2, 2, 1, 19, 66, 256, 256}};
    for (int i = 0; i < feature_set_count; i++)
        check(loop, &shapes[i % 3], &feature_sets[i]);
    for (int64_t n = 0; n < 9; n++) {
        const struct shape s = {1, 2, 1, 127 + n % 3, 63 + n / 3, 200, 136 + 8 * n};
        check(loop, &s, features_named(n % 2 ? "lengths_causal" : "causal_lse"));
    }
    for (int i = 0; i < feature_set_count; i += 4) {
        const struct shape s = {1, 4, 2, 1100, 66, 128, i % 8 ? 128 : 104};
        check(loop, &s, &feature_sets[i]);
    }
}

/* Heads wider than most rows take: groups, decoding of a latent cache, rows and keys beyond a tile. A CPU, whose rows have no kernels
 * of their own for these, gets some of the features. */
static bool has_wide_heads(const struct row *row) {
    return row->info.max_head_dim > 256 && !(row->info.flags & DLATTN_KERNEL_REFERENCE);
}
static void loop_wide_heads(struct loop *loop, bool few) {
    const rows who = rows_where(loop, has_wide_heads);
    static const struct shape shapes[] = {{2, 4, 2, 37, 75, 512, 512},
                                          {1, 16, 1, 1, 300, 576, 512},
                                          {1, 4, 1, 5, 90, 576, 512},
                                          {1, 2, 1, 70, 70, 320, 272},
                                          {2, 24, 1, 3, 141, 400, 400}};
    for (int i = 0; i < feature_set_count; i++) {
        if (few && i % 16 != 0 && !feature_sets[i].view)
            continue;
        check_for(loop, who, &shapes[i % 5], &feature_sets[i]);
        if (!few)
            check_for(loop, who, &shapes[(i + 1) % 5], &feature_sets[i]);
        if (feature_sets[i].view) { // latent caches that many rows share
            static const struct shape latent[] = {{2, 36, 1, 3, 150, 576, 512},
                                                  {1, 72, 1, 1, 400, 576, 512},
                                                  {3, 40, 1, 2, 70, 520, 504}};
            for (size_t j = 0; j < sizeof latent / sizeof latent[0]; j++)
                check_for(loop, who, &latent[j], &feature_sets[i]);
        }
    }
}

/* Queries of 8 bits on every tile that a GPU has for them: heads of each width, rows and keys beyond a tile and two; and more keys than the tensor
 * cores add up by themselves, once and twice. */
static void loop_float8(struct loop *loop) {
    static const struct shape shapes[] = {
        {1, 2, 1, 150, 300, 128, 128},  {1, 2, 2, 70, 270, 256, 256},
        {2, 4, 2, 140, 141, 64, 48},    {1, 4, 1, 70, 141, 96, 192},
        {1, 2, 1, 20, 2500, 128, 128},  {2, 2, 2, 10, 2200, 64, 64},
        {1, 2, 2, 10, 4500, 256, 256},  {1, 2, 2, 330, 400, 64, 64},
        {1, 1, 1, 270, 1100, 128, 128}, {1, 1, 1, 390, 1030, 64, 64}};
    for (int i = 0; i < feature_set_count; i++)
        for (size_t j = 0; j < sizeof shapes / sizeof shapes[0] && feature_sets[i].query == E4M3;
             j++)
            check(loop, &shapes[j], &feature_sets[i]);
}

static void loop_random(struct loop *loop) {
    for (uint64_t n = 0; n < RANDOM_CASES; n++) {
        const struct features f = features_random(n);
        const int64_t groups = 1 << random_below(n, 50, 3), heads_kv = 1 + random_below(n, 51, 2);
        const int64_t dim = 1 + random_below(n, 52, 80);
        const struct shape s = {1 + random_below(n, 53, 3),
                                heads_kv * groups,
                                heads_kv,
                                1 + random_below(n, 54, 50),
                                1 + random_below(n, 55, 150),
                                dim,
                                random_below(n, 56, 3) ? dim : 1 + random_below(n, 57, 80)};
        if (n % 3 == 0)
            check(loop, &s, &f);
        else
            check_thoroughly(loop, &s, &f);
    }
}

/* ---- Jobs ------------------------------------------------------------------------------------------------- */

static dlattn_kernel_info kernel_info(const dlattn_api *api, int32_t row) {
    dlattn_kernel_info info = {.struct_size = sizeof info};
    cr_assert(eq(int, api->kernel_info(row, &info), DLATTN_OK));
    return info;
}

static struct job *add_job(struct job *job, const char *cpu, enum element e, bool backward) {
    snprintf(job->cpu, sizeof job->cpu, "%s", cpu);
    job->element = e;
    job->backward = backward;
    return job + 1;
}

static dlattn_kernel_info find_kernel(const dlattn_api *api, const char *name) {
    for (int32_t row = 0; row < api->kernel_count(); row++) {
        const dlattn_kernel_info info = kernel_info(api, row);
        if (strcmp(info.name, name) == 0)
            return info;
    }
    cr_fatal("no row %s", name);
}

/* The only row that is to be tested, by DLATTN_TEST_ROW, which ./dev test-row sets; NULL: all of them. */
static const char *only_row(void) {
    const char *name = getenv("DLATTN_TEST_ROW");
    return name && name[0] ? name : NULL;
}

static bool wanted(const char *row) { return !only_row() || strcmp(row, only_row()) == 0; }

Test(kernels, there_is_such_a_row) {
    if (only_row())
        cr_expect(strcmp(find_kernel(test_api(), only_row()).backend, BACKEND) == 0,
                  "%s is no row of " BACKEND, only_row());
}

static void free_jobs(struct criterion_test_params *params) { cr_free(params->params); }

/* Whether the loop is over this row. */
static bool belongs_to(const struct job *job, const dlattn_kernel_info *row) {
    return strcmp(row->backend, BACKEND) == 0 && wanted(row->name) &&
           strcmp(row->operation, job->backward ? "backward" : "forward") == 0 &&
           element_is_listed(row->dtypes, job->element);
}

ParameterizedTestParameters(kernels, row) {
    const dlattn_api *api = test_api();
    struct job *jobs = cr_malloc(8 * sizeof *jobs), *end = jobs;
    for (int i = 0; i < 8; i++) {
        add_job(end, "all", (enum element)(F64 + i % 4), i >= 4);
        bool any = false;
        for (int32_t row = 0; row < api->kernel_count(); row++) {
            const dlattn_kernel_info info = kernel_info(api, row);
            any |= belongs_to(end, &info);
        }
        end += any;
    }
    return cr_make_param_array(struct job, jobs, (size_t)(end - jobs), free_jobs);
}

static bool is_reference(const dlattn_kernel_info *row) {
    return row->flags & DLATTN_KERNEL_REFERENCE;
}

/* The reference of backward takes three times as long as any other row, and is held to NumPy's results by tests/oracle. */
static bool takes_every_case(const dlattn_kernel_info *row, bool backward) {
    return !SANITIZED && !(is_reference(row) && backward);
}

/* A row of the CPU takes all that it claims, lest the choice depend on what no caller sees. What those for few query rows leave
 * to others, choice_test says; a GPU's may leave to others what lies off 16 bytes. */
static bool takes_all(const dlattn_kernel_info *row) {
    return strcmp(row->backend, "cpu") == 0 && !(row->flags & DLATTN_KERNEL_DECODE);
}

static void add_rows(struct loop *loop) {
    const dlattn_api *api = test_api();
    for (int32_t i = 0; i < api->kernel_count(); i++) {
        const dlattn_kernel_info info = kernel_info(api, i);
        if (!belongs_to(loop->job, &info) || !info.available)
            continue;
        cr_assert(lt(int, loop->count, MOST_ROWS));
        loop->row[loop->count] =
            (struct row){.info = info,
                         .is_thorough = takes_every_case(&info, loop->job->backward),
                         .takes_all = takes_all(&info)};
        loop->subject[loop->count++] =
            (struct subject){.api = api, .place = &PLACE, .kernel = info.name};
    }
}

static void report(const struct row *row, const struct job *job) {
    fprintf(stderr, "%s %s: %d cases, %d declined\n", row->info.name, element_name(job->element),
            row->checked, row->declined);
    cr_expect(eq(int, row->failed, 0), "%s: %d of %d cases failed", row->info.name, row->failed,
              row->checked);
    cr_expect(eq(ulong, row->covered & row->info.features, row->info.features),
              "%s claims features that no case reached: 0x%llx", row->info.name,
              (unsigned long long)(row->info.features & ~row->covered));
}

ParameterizedTest(struct job *job, kernels, row) {
    const bool cuda = strcmp(BACKEND, "cuda") == 0;
    struct loop loop = {.job = job, .seed = 1};
    add_rows(&loop);
    if (loop.count == 0)
        cr_skip_test("no row of it runs here");
    loop_shapes(&loop);
    loop_tiles(&loop);
    loop_features(&loop);
    loop_empty(&loop);
    if (job->backward && cuda)
        loop_wide(&loop);
    if (!job->backward && cuda)
        loop_float8(&loop);
    if (!job->backward)
        loop_wide_heads(&loop, !cuda);
    loop_random(&loop);
    if (!job->backward)
        loop_parts(&loop);
    if (!job->backward && cuda) {
        loop_long(&loop);
        loop_many_heads(&loop);
    }
    if (cuda)
        loop_hidden(&loop);
    for (int i = 0; i < loop.count; i++)
        report(&loop.row[i], job);
}

/* Names the rows that the loop passes over, a test for each. */
ParameterizedTestParameters(kernels, row_runs_here) {
    const dlattn_api *api = test_api();
    int32_t *rows = cr_malloc((size_t)api->kernel_count() * sizeof *rows), *end = rows;
    for (int32_t row = 0; row < api->kernel_count(); row++) {
        const dlattn_kernel_info info = kernel_info(api, row);
        if (strcmp(info.backend, BACKEND) == 0 && wanted(info.name))
            *end++ = row;
    }
    return cr_make_param_array(int32_t, rows, (size_t)(end - rows), free_jobs);
}

ParameterizedTest(int32_t *row, kernels, row_runs_here) {
    const dlattn_kernel_info info = kernel_info(test_api(), *row);
    if (!info.available)
        cr_skip_test("%s needs %s", info.name, info.arch);
}

/* The library's own choice. On the CPU also on lesser machines: DLATTN_CPU takes instruction sets away. */
ParameterizedTestParameters(kernels, choice) {
    static const char *const sets[] = {"all", "", "avx2", "avx2,avx512"};
    const size_t count = strcmp(BACKEND, "cpu") == 0 ? sizeof sets / sizeof sets[0] : 1;
    struct job *jobs = cr_malloc(4 * count * sizeof *jobs), *end = jobs;
    for (size_t i = 0; i < count; i++) {
        for (enum element e = F64; e <= BF16 && !only_row(); e++)
            end = add_job(end, sets[i], e, false);
    }
    return cr_make_param_array(struct job, jobs, (size_t)(end - jobs), free_jobs);
}

/* The widest heads that any row of this backend takes, of keys and of values. */
struct widest {
    int64_t qk, v;
};
static struct widest widest_head(const dlattn_api *api, enum element e) {
    struct widest widest = {0, 0};
    for (int32_t row = 0; row < api->kernel_count(); row++) {
        const dlattn_kernel_info info = kernel_info(api, row);
        if (strcmp(info.backend, BACKEND) == 0 && strcmp(info.operation, "forward") == 0 &&
            element_is_listed(info.dtypes, e) && info.max_head_dim > widest.qk)
            widest = (struct widest){info.max_head_dim, info.max_head_dim_v};
    }
    return widest;
}

/* A GPU has few rows for float8, and for heads above 256 none with the options of pairs. */
static bool has_row(const struct shape *s, const struct features *f) {
    if (strcmp(BACKEND, "cpu") == 0)
        return true;
    const bool wide = s->dim_qk > 256 || s->dim_v > 256;
    return !features_have_8_bits(f) && !(wide && (f->segments || f->block_q || f->dropout > 0));
}

ParameterizedTest(struct job *job, kernels, choice) {
    if (strcmp(job->cpu, "all") != 0)
        setenv("DLATTN_CPU", job->cpu, 1);
    struct loop loop = {.job = job,
                        .count = 1,
                        .row[0].info.name = "",
                        .subject[0] = {.api = test_api(), .place = &PLACE},
                        .seed = 5000};
    const struct widest widest = widest_head(test_api(), job->element);
    for (int i = 0; i < feature_set_count; i += SANITIZED ? 3 : 1) {
        const struct shape *shape = &check_shapes[(i * 7 + 5) % check_shape_count];
        if (has_row(shape, &feature_sets[i]) && shape->dim_qk <= widest.qk &&
            shape->dim_v <= widest.v)
            check(&loop, shape, &feature_sets[i]);
    }
    cr_expect(eq(int, loop.row[0].failed, 0), "%d of %d cases failed", loop.row[0].failed,
              loop.row[0].checked);
}
