/*
 * What the one loop leaves out of the fast backward rows of the CPU: many blocks of rows and their sums, on any number of
 * threads; more keys than a worker keeps the weights of; logits that f32 does not hold; and numbers that are not finite.
 */
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Calls visit for each backward row but the reference, where this machine has what it needs, and the element with the most digits
 * that the row takes. */
static void each_row(void (*visit)(const char *row, enum element element)) {
    const dlattn_api *api = test_api();
    for (int32_t n = 0; n < api->kernel_count(); n++) {
        dlattn_kernel_info info = {.struct_size = sizeof info};
        cr_assert(eq(int, api->kernel_info(n, &info), DLATTN_OK));
        if (strcmp(info.operation, "backward") != 0 || strcmp(info.backend, "cpu") != 0 ||
            info.flags & DLATTN_KERNEL_REFERENCE)
            continue;
        if (info.available)
            visit(info.name, element_is_listed(info.dtypes, F32)   ? F32
                             : element_is_listed(info.dtypes, F16) ? F16
                                                                   : BF16);
        else
            fprintf(stderr, "%s is skipped: it needs %s\n", info.name, info.arch);
    }
}

static void expect_right(const char *row, const struct test_case *c) {
    const struct subject subject = {.api = test_api(), .place = &place_cpu, .kernel = row};
    struct verdict v;
    check_case(&v, &subject, c);
    cr_expect(v.outcome == PASSED, "%s: %s", row, v.text);
}

static void *workspace_of(const dlattn_sku *sku) {
    void *workspace = aligned_alloc(64, (sku->workspace_bytes + 64) / 64 * 64);
    memset(workspace, 0xff, sku->workspace_bytes);
    return workspace;
}

/* Output and lse of the call, without which rows that trust them leave it to others. */
static void run_forward(struct call *c) {
    const dlattn_api *api = test_api();
    dlattn_sku sku = {.struct_size = sizeof sku};
    const dlattn_tensors tensors = call_tensors(c);
    c->desc.kernel = "cpu_fwd_ref";
    cr_assert(eq(int, api->forward_query(&c->desc, &tensors, &sku), DLATTN_OK));
    void *workspace = workspace_of(&sku);
    const dlattn_exec exec = {
        .struct_size = sizeof exec, .workspace = workspace, .workspace_bytes = sku.workspace_bytes};
    cr_assert(eq(int, api->forward(&c->desc, &tensors, &exec), DLATTN_OK), "%s", api->last_error());
    free(workspace);
}

static void run_tensors(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                        const dlattn_gradients *gradients) {
    const dlattn_api *api = test_api();
    dlattn_sku sku = {.struct_size = sizeof sku};
    cr_assert(eq(int, api->backward_query(desc, tensors, gradients, &sku), DLATTN_OK), "%s",
              api->last_error());
    void *workspace = workspace_of(&sku);
    const dlattn_exec exec = {
        .struct_size = sizeof exec, .workspace = workspace, .workspace_bytes = sku.workspace_bytes};
    cr_assert(eq(int, api->backward(desc, tensors, gradients, &exec), DLATTN_OK), "%s",
              api->last_error());
    free(workspace);
}

/* The call's gradients into its images. */
static void run(struct call *c, const char *row, int32_t threads) {
    const dlattn_tensors tensors = call_tensors(c);
    const dlattn_gradients gradients = call_gradients(c);
    run_forward(c);
    c->desc.kernel = row;
    c->desc.num_threads = threads;
    run_tensors(&c->desc, &tensors, &gradients);
}

static void expect_same_bits(const char *row, const char *what, const struct call *a,
                             const struct call *b) {
    for (int slot = D_QUERY; slot < SLOTS; slot++)
        if (a->has[slot])
            cr_expect(memcmp(a->tensor[slot].image, b->tensor[slot].image, a->tensor[slot].bytes) ==
                          0,
                      "%s, %s: %s has other bits", row, what, slot_name((enum slot)slot));
}

/* ---- Many blocks ------------------------------------------------------------------------------ */

/* Whose sums go over blocks, heads and batch entries. */
static const struct features many_sums[] = {
    {.name = "heads",
     .alibi = 1,
     .sinks = true,
     .bias = AXIS_H | AXIS_Q | AXIS_K,
     .softcap = 3,
     .dropout = 0.3,
     .lse = LSE_F32,
     .backward = true},
    {.name = "keys", .bias = AXIS_K, .causal = true, .lse = LSE_F32, .backward = true},
    {.name = "rows",
     .bias = AXIS_B | AXIS_Q,
     .mask = AXIS_B | AXIS_K,
     .lse = LSE_F32,
     .backward = true},
    {.name = "one",
     .bias = AXIS_NONE,
     .window = true,
     .window_left = 40,
     .alibi = 2,
     .lse = LSE_F32,
     .backward = true},
};
enum { SETS = sizeof many_sums / sizeof many_sums[0] };

static struct test_case many_blocks(int set, enum element element) {
    return (struct test_case){{2, 4, 2, 290, 130, 24, 40}, many_sums[set], element, 7};
}

static void check_many_blocks(const char *row, enum element element) {
    for (int set = 0; set < SETS; set++) {
        const struct test_case c = many_blocks(set, element);
        expect_right(row, &c);
    }
}

Test(backward, many_blocks) { each_row(check_many_blocks); }

static void check_threads(const char *row, enum element element) {
    static const int32_t threads[] = {2, 3, 16};
    for (int set = 0; set < SETS; set++) {
        const struct test_case from = many_blocks(set, element);
        struct call one, more;
        call_make(&one, &from);
        call_use_images(&one);
        run(&one, row, 1);
        for (int n = 0; n < 3; n++) {
            char what[64];
            call_make(&more, &from);
            call_use_images(&more);
            run(&more, row, threads[n]);
            snprintf(what, sizeof what, "%s, %d threads", from.features.name, threads[n]);
            expect_same_bits(row, what, &more, &one);
            call_free(&more);
        }
        call_free(&one);
    }
}

Test(backward, threads) { each_row(check_threads); }

/* ---- Many keys -------------------------------------------------------------------------------- */

static void check_many_keys(const char *row, enum element element) {
    const struct features plain = {.name = "plain", .lse = LSE_F32, .backward = true},
                          masked = {.name = "masked",
                                    .mask = AXIS_B | AXIS_K,
                                    .softcap = 2,
                                    .dropout = 0.4,
                                    .lse = LSE_F32,
                                    .backward = true};
    expect_right(row, &(struct test_case){{1, 2, 1, 3, 16384 + 130, 8, 8}, plain, element, 1});
    expect_right(row, &(struct test_case){{1, 1, 1, 2, 16384 + 70, 8, 8}, masked, element, 2});
}

Test(backward, many_keys) { each_row(check_many_keys); }

/* ---- Large gradients -------------------------------------------------------------------------- */

/* More than 2 MiB: where they lie is asked for before they are written. */
static void check_large(const char *row, enum element element) {
    const struct features causal = {
        .name = "causal", .causal = true, .layout = HEADS_INNER, .lse = LSE_F32, .backward = true};
    expect_right(row, &(struct test_case){{2, 32, 16, 600, 70, 32, 24}, causal, element, 5});
}

Test(backward, large) { each_row(check_large); }

/* ---- Numbers at the edge, and beyond it ------------------------------------------------------- */

/* 213 rows of a head of keys: an odd number in the last block. */
static const struct test_case edge_case = {
    {1, 3, 1, 71, 90, 16, 16},
    {.name = "edge", .causal = true, .lse = LSE_F32, .backward = true},
    F32,
    3};

/* The row and the reference on a call with one number replaced, and all queries multiplied. */
static void run_edge(struct call *c, const char *row, enum element element, enum slot slot,
                     const int64_t index[4], double number, double logits) {
    struct test_case from = edge_case;
    from.element = element;
    from.features.logits = logits;
    call_make(c, &from);
    if (number != 0)
        tensor_set(&c->tensor[slot], index, number);
    call_use_images(c);
    run(c, row, 1);
}

/* A row with a logit beyond f32 leaves the call to the reference. f16 has none. */
static void check_overflow(const char *row, enum element element) {
    const int64_t first[4] = {0};
    struct call got, wanted;
    if (element == F16)
        return;
    run_edge(&got, row, element, QUERY, first, 0, 1e38);
    run_edge(&wanted, "cpu_bwd_ref", element, QUERY, first, 0, 1e38);
    expect_same_bits(row, "logits beyond f32", &got, &wanted);
    call_free(&got);
    call_free(&wanted);
}

Test(backward, overflow) { each_row(check_overflow); }

static bool alike(double x, double y, double tolerance) {
    return isnan(x) ? isnan(y) : x == y || fabs(x - y) <= tolerance * (1 + fabs(y));
}

static void expect_alike(const char *row, enum element element, const char *what,
                         const struct call *got, const struct call *wanted) {
    const double tolerance = element == F32 ? 1e-4 : element == F16 ? 1e-3 : 1e-2;
    for (int slot = D_QUERY; slot < SLOTS; slot++) {
        const struct tensor *t = &got->tensor[slot];
        int64_t index[4] = {0}, wrong = 0;
        for (int64_t left = got->has[slot] ? tensor_count(t) : 0; left > 0;
             left--, tensor_next(t, index))
            wrong +=
                !alike(tensor_get(t, index), tensor_get(&wanted->tensor[slot], index), tolerance);
        cr_expect(eq(long, wrong, 0), "%s: %s, with %s", row, slot_name((enum slot)slot), what);
    }
}

/* NaN and infinity reach what they reach by the formula, and nothing else. */
static void check_not_finite(const char *row, enum element element) {
    static const struct {
        enum slot slot;
        int64_t index[4];
        double number;
    } edges[] = {
        {D_OUTPUT, {0, 1, 3, 2}, NAN},
        {D_OUTPUT, {0, 0, 40, 5}, INFINITY},
        {D_OUTPUT, {0, 1, 69, 15}, -INFINITY},
        {QUERY, {0, 1, 20, 4}, NAN},
        {KEY, {0, 0, 50, 1}, NAN},
        {KEY, {0, 0, 80, 1}, NAN},
        {VALUE, {0, 0, 33, 7}, NAN},
        {VALUE, {0, 0, 75, 7}, INFINITY},
        {VALUE, {0, 0, 10, 0}, INFINITY},
        {D_LSE, {0, 1, 12, 0}, NAN},
    };
    for (size_t n = 0; n < sizeof edges / sizeof edges[0]; n++) {
        struct call got, wanted;
        run_edge(&got, row, element, edges[n].slot, edges[n].index, edges[n].number, 0);
        run_edge(&wanted, "cpu_bwd_ref", element, edges[n].slot, edges[n].index, edges[n].number,
                 0);
        char what[64];
        snprintf(what, sizeof what, "%g in %s", edges[n].number, slot_name(edges[n].slot));
        expect_alike(row, element, what, &got, &wanted);
        call_free(&got);
        call_free(&wanted);
    }
}

Test(backward, not_finite) { each_row(check_not_finite); }

/* The call of edge_case with a key that a mask alone hides from every row and whose value has a NaN. Tensors have garbage where no
 * row looks, and rows that want finite keys leave the call to others: so all keys are in sight. */
static void run_masked(struct call *c, const char *row, enum element element) {
    enum { HIDDEN = 33 };
    struct test_case from = edge_case;
    from.element = element;
    from.features.causal = false;
    from.features.mask = EVERY_AXIS;
    call_make(c, &from);
    for (int64_t h = 0; h < from.shape.heads_q; h++)
        for (int64_t i = 0; i < from.shape.len_q; i++)
            tensor_set(&c->tensor[MASK], (int64_t[]){0, h, i, HIDDEN}, 0);
    tensor_set(&c->tensor[VALUE], (int64_t[]){0, 0, HIDDEN, 7}, NAN);
    call_use_images(c);
    run(c, row, 1);
}

static void check_nan_behind_a_mask(const char *row, enum element element) {
    struct call got, wanted;
    run_masked(&got, row, element);
    run_masked(&wanted, "cpu_bwd_ref", element);
    expect_alike(row, element, "NaN behind a mask", &got, &wanted);
    call_free(&got);
    call_free(&wanted);
}

Test(backward, nan_behind_a_mask) { each_row(check_nan_behind_a_mask); }

/* ---- One walk --------------------------------------------------------------------------------- */

/* A row that takes an lse as it was rounded leaves a call in which that costs too much to one that does not. */
static void check_large_lse(const char *row, enum element element) {
    const int64_t first[4] = {0};
    struct call got, wanted;
    run_edge(&got, row, element, QUERY, first, 0, 3000);
    run_edge(&wanted, element == F32 ? row : "cpu_bwd_avx512", element, QUERY, first, 0, 3000);
    expect_same_bits(row, "an lse of thousands", &got, &wanted);
    call_free(&got);
    call_free(&wanted);
}

Test(backward, large_lse) { each_row(check_large_lse); }

/* ---- Nothing ---------------------------------------------------------------------------------- */

/* Tensors in the middle of rooms full of sevens. */
enum { ROOM = 640, MIDDLE = 256, MOST_TENSORS = 11 };
struct rooms {
    float room[MOST_TENSORS][ROOM];
    int64_t shape[MOST_TENSORS][4];
    DLTensor tensor[MOST_TENSORS];
    int count;
};

static DLTensor *add_tensor(struct rooms *r, int32_t axes, int64_t a, int64_t b, int64_t c,
                            int64_t d) {
    const int n = r->count++;
    const int64_t shape[4] = {a, b, c, d};
    memcpy(r->shape[n], shape, sizeof shape);
    for (int i = 0; i < ROOM; i++)
        r->room[n][i] = 7;
    r->tensor[n] = (DLTensor){.data = r->room[n] + MIDDLE,
                              .device = {kDLCPU, 0},
                              .ndim = axes,
                              .dtype = {kDLFloat, 32, 1},
                              .shape = r->shape[n]};
    return &r->tensor[n];
}

/* The gradient is zeros, and what lies around it is as it was. */
static void expect_zeros(const struct rooms *r, const DLTensor *gradient, const char *row,
                         const char *name) {
    const float *const room = r->room[gradient - r->tensor];
    int64_t count = 1;
    for (int axis = 0; axis < gradient->ndim; axis++)
        count *= gradient->shape[axis];
    for (int i = 0; i < ROOM; i++) {
        const bool inside = i >= MIDDLE && i < MIDDLE + count;
        cr_expect(room[i] == (inside ? 0 : 7), "%s: %s: element %d is %g", row, name, i - MIDDLE,
                  (double)room[i]);
    }
}

/* Some extent is 0, so all gradients are, if they have elements at all. */
static void check_nothing(const char *row, int64_t batch, int64_t heads, int64_t len_q,
                          int64_t len_k) {
    enum { HEADS_KV = 2, DIM = 4 };
    struct rooms r = {.count = 0};
#define QUERY add_tensor(&r, 4, batch, heads, len_q, DIM)
#define KEY add_tensor(&r, 4, batch, HEADS_KV, len_k, DIM)
#define BIAS add_tensor(&r, 4, batch, heads, len_q, len_k)
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = QUERY,
                                    .key = KEY,
                                    .value = KEY,
                                    .output = QUERY,
                                    .lse = add_tensor(&r, 3, batch, heads, len_q, 0),
                                    .bias = BIAS};
    const dlattn_gradients gradients = {.struct_size = sizeof gradients,
                                        .d_output = QUERY,
                                        .d_query = QUERY,
                                        .d_key = KEY,
                                        .d_value = KEY,
                                        .d_bias = BIAS};
#undef QUERY
#undef KEY
#undef BIAS
    const dlattn_forward_desc desc = {.struct_size = sizeof desc, .kernel = row, .num_threads = 1};
    run_tensors(&desc, &tensors, &gradients);
    expect_zeros(&r, gradients.d_query, row, "d_query");
    expect_zeros(&r, gradients.d_key, row, "d_key");
    expect_zeros(&r, gradients.d_value, row, "d_value");
    expect_zeros(&r, gradients.d_bias, row, "d_bias");
}

static void check_every_nothing(const char *row, enum element element) {
    if (element != F32)
        return;
    check_nothing(row, 0, 2, 3, 5);
    check_nothing(row, 2, 0, 3, 5);
    check_nothing(row, 2, 2, 0, 5);
    check_nothing(row, 2, 2, 3, 0);
    check_nothing(row, 2, 2, 0, 0);
}

Test(backward, of_nothing) {
    each_row(check_every_nothing);
    check_every_nothing("cpu_bwd_ref", F32);
}
