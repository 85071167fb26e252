/*
 * Logits to the end of f32's range and beyond, on every row of the CPU: the softmax takes the maximum out, so their size
 * must not matter.
 */
#include "tests/support/cpu_rows.h"

#include <float.h>
#include <math.h>

/* ---- Cases ------------------------------------------------------------------------------------------------------ */

/* What is done to the random numbers of a call. `size` is that of queries and keys; its square that of logits. */
static void each(struct call *c, enum slot slot, double (*next)(double, const int64_t *, double),
                 double size) {
    const struct tensor *t = &c->tensor[slot];
    int64_t index[4] = {0};
    for (int64_t n = c->has[slot] ? tensor_count(t) : 0; n > 0; n--, tensor_next(t, index))
        tensor_set(&c->tensor[slot], index, next(tensor_get(t, index), index, size));
}

static double times(double x, const int64_t *index, double size) { return (void)index, x * size; }
static double times_square(double x, const int64_t *index, double size) {
    return (void)index, x * size * size;
}
static double same(double x, const int64_t *index, double size) {
    return (void)x, (void)index, size;
}
static double minus(double x, const int64_t *index, double size) {
    return (void)x, (void)index, -size;
}
static double positive(double x, const int64_t *index, double size) {
    return (void)index, fabs(x) * size;
}
/* Small keys after vast negative ones. */
static double late(double x, const int64_t *index, double size) {
    return index[2] < 290 ? -(1 + fabs(x)) * size : x / size;
}
/* As models hide keys: by the lowest number, in some rows all of them. The highest one shows a key. */
static double lowest(double x, const int64_t *index, double size) {
    (void)size;
    if (index[2] % 5 == 0 || index[3] % 3 == 0)
        return -(double)FLT_MAX;
    return index[2] % 5 == 1 && index[3] == 4 ? (double)FLT_MAX : x;
}
/* Two sizes that f32 tells apart and, in units of log2(e), does not hold. */
static double two_ends(double x, const int64_t *index, double size) {
    (void)x, (void)size;
    return (index[3] % 2 ? -3.2e38 : -2.8e38);
}
static double largest(double x, const int64_t *index, double size) {
    return (void)size, index[0] % 2 ? (double)FLT_MAX : x < 0 ? x : -(double)FLT_MAX;
}

typedef double change(double, const int64_t *, double);
struct kind {
    struct features features;
    change *query, *key, *bias, *slopes, *sinks;
    double softcap; /* times the logits' size */
    double most;    /* size; 0: any */
};

static const struct kind kinds[] = {
    {{.name = "plain"}, .query = times, .key = times},
    {{.name = "causal", .causal = true}, .query = times, .key = times},
    {{.name = "window", .window = true, .window_left = 20, .window_right = 9},
     .query = times,
     .key = times},
    {{.name = "negative scale", .scale = -0.2}, .query = times, .key = times},
    {{.name = "scale 3", .scale = 3}, .query = times, .key = times},
    {{.name = "all alike"}, .query = same, .key = same},
    {{.name = "all alike, negative"}, .query = same, .key = minus},
    {{.name = "vast minus first"}, .query = positive, .key = late},
    {{.name = "vast minus first, mask", .mask = EVERY_AXIS}, .query = positive, .key = late},
    {{.name = "softcap"}, .query = times, .key = times, .softcap = 3},
    {{.name = "mask", .mask = AXIS_Q | AXIS_K, .mask_rows = true}, .query = times, .key = times},
    {{.name = "bias", .bias = EVERY_AXIS}, .query = times, .key = times, .bias = times_square},
    {{.name = "vast bias", .bias = EVERY_AXIS}, .bias = times_square},
    {{.name = "lowest bias", .bias = EVERY_AXIS}, .bias = lowest},
    {{.name = "lowest bias, huge logits", .bias = EVERY_AXIS},
     .query = times,
     .key = times,
     .bias = lowest,
     .most = 1e8}, /* beyond, double tells apart what f32 does not */
    {{.name = "two ends", .bias = EVERY_AXIS}, .bias = two_ends},
    {{.name = "alibi", .alibi = 1}, .query = times, .key = times, .slopes = times_square},
    {{.name = "sinks", .sinks = true}, .query = times, .key = times, .sinks = times_square},
    {{.name = "largest sinks", .sinks = true, .window = true, .window_left = 3}, .sinks = largest},
    {{.name = "largest sinks, huge logits", .sinks = true},
     .query = times,
     .key = times,
     .sinks = largest},
};

static const struct shape shapes[] = {
    {1, 2, 1, 70, 150, 16, 16},                          /* forward, two blocks */
    {1, 2, 2, 3, 700, 16, 24},                           /* decoding, parts of keys */
    {2, 1, 1, 1, 600, 16, 16},  {1, 1, 1, 6, 1, 16, 16}, /* one key */
    {1, 1, 1, 2, 9000, 16, 16}, /* the reference takes them in three runs */
};
static const double sizes[] = {1e3, 1e4, 1e5, 1e8, 1e13, 1e18};

/* ---- One case --------------------------------------------------------------------------------------------------- */

static void make(struct call *c, const struct kind *kind, const struct shape *shape,
                 enum element element, double size) {
    struct test_case from = {*shape, kind->features, element, 3};
    from.features.lse = LSE_F32;
    if (kind->softcap > 0)
        from.features.softcap = kind->softcap * size * size;
    call_make(c, &from);
    const struct {
        enum slot slot;
        change *change;
    } changes[] = {{QUERY, kind->query},
                   {KEY, kind->key},
                   {BIAS, kind->bias},
                   {ALIBI_SLOPES, kind->slopes},
                   {SINKS, kind->sinks}};
    for (size_t n = 0; n < sizeof changes / sizeof changes[0]; n++) {
        if (changes[n].change)
            each(c, changes[n].slot, changes[n].change, size);
    }
    call_use_images(c);
}

static bool is_wrong(double got, double want, double bound, enum element element) {
    const double rounded = element_round(element, want);
    return isfinite(rounded) ? !(fabs(got - want) <= bound)
                             : !(got == rounded || (isnan(got) && isnan(rounded)));
}

/* Each output within its own bound. */
static int wrong_outputs(const struct tensor *got, const struct tensor *want,
                         const struct tensor *bounds) {
    int n = 0;
    int64_t index[4] = {0};
    for (int64_t left = tensor_count(got); left > 0; left--, tensor_next(got, index))
        n += is_wrong(tensor_get(got, index), tensor_get(want, index), tensor_get(bounds, index),
                      got->element);
    return n;
}

/* Terms of a logit of this size may cancel. */
static int wrong_lse(const struct tensor *got, const struct tensor *want, double size) {
    int n = 0;
    int64_t index[4] = {0};
    for (int64_t left = tensor_count(got); left > 0; left--, tensor_next(got, index)) {
        const double y = tensor_get(want, index);
        n += is_wrong(tensor_get(got, index), y, 1e-5 + 1e-6 * (size * size + fabs(y)),
                      got->element);
    }
    return n;
}

static void check(struct cpu_rows *rows, const struct kind *kind, const struct shape *shape,
                  enum element element, double size) {
    struct call made, want, bounds;
    dlattn_sku sku;
    make(&made, kind, shape, element, size);
    call_upcast(&want, &made);
    call_upcast(&bounds, &made);
    plain_bounds_of_exact_scores(&bounds);
    call_use_images(&want);
    cr_assert(run_call(&want, "cpu_fwd_ref", &sku));
    for (int n = 0; n <= rows->count; n++) {
        const char *row =
            n < rows->count ? rows->info[n].name : NULL; /* last the library's choice */
        if (!run_call(&made, row, &sku))
            continue;
        rows->ran[n]++;
        const int output = wrong_outputs(&made.tensor[OUTPUT], &want.tensor[OUTPUT],
                                         &bounds.tensor[OUTPUT]),
                  lse = wrong_lse(&made.tensor[LSE], &want.tensor[LSE], size);
        cr_expect(output + lse == 0, "%s %s: %s, size %g, Lq %d Lk %d: %d outputs, %d lse",
                  sku.kernel, element_name(element), kind->features.name, size, (int)shape->len_q,
                  (int)shape->len_k, output, lse);
    }
    call_free(&bounds);
    call_free(&want);
    call_free(&made);
}

/* A sanitizer takes one size of those that a plain build takes SHARE of. */
#if defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define SANITIZED 0
#endif
enum { SHARE = SANITIZED ? 3 : 1 };

static void check_element(enum element element, double most) {
    struct cpu_rows rows;
    find_cpu_rows(&rows, element);
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++)
        for (size_t n = 0; n < sizeof sizes / sizeof sizes[0]; n += SHARE)
            for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
                if (sizes[n] <= most && (kinds[k].most == 0 || sizes[n] <= kinds[k].most))
                    check(&rows, &kinds[k], &shapes[i], element, sizes[n]);
    expect_all_ran(&rows);
}

Test(huge_logits, f64) { check_element(F64, INFINITY); }
Test(huge_logits, f32) { check_element(F32, INFINITY); }
Test(huge_logits, f16) { check_element(F16, 1.1e4); }
Test(huge_logits, bf16) { check_element(BF16, INFINITY); }

/* Products that f32 does not hold, and options. A row that is named may decline such an option. */
Test(huge_logits, beyond_f32) {
    static const struct kind beyond[] = {
        {{.name = "all alike"}, .query = same, .key = same},
        {{.name = "all alike, negative"}, .query = same, .key = minus},
        {{.name = "tiny softcap", .softcap = 1e-50}, .query = times},
        {{.name = "tiny softcap, huge scale", .scale = 1e50, .softcap = 1e-50}, .query = NULL},
        {{.name = "huge softcap", .softcap = 1e50}, .query = NULL},
        {{.name = "tiny scale", .scale = 1e-50}, .query = times},
    };
    static const enum element elements[] = {F32, BF16};
    for (int e = 0; e < 2; e++) {
        struct cpu_rows rows;
        find_cpu_rows(&rows, elements[e]);
        for (size_t k = 0; k < sizeof beyond / sizeof beyond[0]; k++)
            for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
                check(&rows, &beyond[k], &shapes[i], elements[e], 1e20);
    }
}
