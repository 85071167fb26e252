/*
 * What lies in memory another way is computed the same way: each row of the CPU gives the bits of the compact call where
 * elements lie apart, keys lie along the head dimension's axis, or axes run backwards. And what a thread's workspace may take.
 */
#include "tests/support/cpu_rows.h"

/* Axis `axis` of a tensor runs backwards in memory. Its elements are to be set again. */
static void turn(struct tensor *t, int axis) {
    if (t->shape[axis] < 2)
        return;
    t->first += (size_t)((t->shape[axis] - 1) * t->stride[axis]) * element_bytes(t->element);
    t->stride[axis] = -t->stride[axis];
}

static void copy_elements(struct tensor *to, const struct tensor *from) {
    int64_t index[4] = {0};
    for (int64_t n = tensor_count(to); n > 0; n--, tensor_next(to, index))
        tensor_set(to, index, tensor_get(from, index));
}

enum { NO_AXIS, ALL_AXES = 0xf };

/* The call `like` in another layout, axes turned whose bits are set in `backwards`. */
static void make_alike(struct call *c, const struct call *like, enum layout layout,
                       unsigned backwards) {
    struct test_case from = like->made_from;
    from.features.layout = layout;
    call_make(c, &from);
    for (int slot = QUERY; slot <= MASK; slot++) {
        struct tensor *t = &c->tensor[slot];
        for (int axis = 0; c->has[slot] && axis < t->dl.ndim; axis++) {
            if (backwards >> axis & 1)
                turn(t, axis);
        }
        if (c->has[slot] && slot != OUTPUT && slot != LSE)
            copy_elements(t, &like->tensor[slot]);
    }
    call_use_images(c);
}

static int64_t differing(const struct tensor *a, const struct tensor *b) {
    int64_t index[4] = {0}, n = 0;
    for (int64_t left = tensor_count(a); left > 0; left--, tensor_next(a, index)) {
        const double x = tensor_get(a, index), y = tensor_get(b, index);
        n += memcmp(&x, &y, sizeof x) != 0;
    }
    return n;
}

static const struct {
    enum layout layout;
    unsigned backwards;
} layouts[] = {
    {INNER_2, NO_AXIS}, {INNER_LAST, NO_AXIS}, {MIXED, NO_AXIS},        {COMPACT, 4},
    {COMPACT, 8},       {COMPACT, ALL_AXES},   {HEADS_INNER, ALL_AXES}, {INNER_LAST, ALL_AXES},
    {ODD, ALL_AXES}};

static void check(struct cpu_rows *rows, const struct test_case *from) {
    struct call compact, other;
    dlattn_sku sku;
    call_make(&compact, from);
    call_use_images(&compact);
    for (int n = 0; n < rows->count; n++) {
        const char *name = rows->info[n].name;
        if (!run_call(&compact, name, &sku))
            continue;
        rows->ran[n]++;
        for (size_t l = 0; l < sizeof layouts / sizeof layouts[0]; l++) {
            make_alike(&other, &compact, layouts[l].layout, layouts[l].backwards);
            cr_assert(run_call(&other, name, &sku), "%s declines another layout: %s", name,
                      test_api()->last_error());
            char text[256];
            case_print(&other.made_from, text, sizeof text);
            cr_expect(eq(i64, differing(&other.tensor[OUTPUT], &compact.tensor[OUTPUT]), 0),
                      "%s: %s, axes 0x%x backwards: output", name, text, layouts[l].backwards);
            cr_expect(eq(i64, differing(&other.tensor[LSE], &compact.tensor[LSE]), 0),
                      "%s: %s, axes 0x%x backwards: lse", name, text, layouts[l].backwards);
            call_free(&other);
        }
    }
    call_free(&compact);
}

static void check_element(enum element element) {
    static const struct shape shapes[] = {
        {1, 4, 2, 70, 150, 64, 40}, {2, 4, 1, 1, 300, 32, 32}, {1, 1, 1, 40, 530, 33, 70}};
    static const struct features features[] = {
        {.name = "lse", .lse = LSE_F32},
        {.name = "causal", .causal = true, .lse = LSE_F32},
        {.name = "bias and mask", .bias = EVERY_AXIS, .mask = EVERY_AXIS, .lse = LSE_F32},
        {.name = "packed", .varlen_q = true, .varlen_k = true, .lse = LSE_F32},
        {.name = "pages", .page_size = 16, .lse = LSE_F32},
        {.name = "values that are not finite", .nan = NAN_VALUE, .causal = true, .lse = LSE_F32}};
    struct cpu_rows rows;
    find_cpu_rows(&rows, element);
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
        for (size_t f = 0; f < sizeof features / sizeof features[0]; f++)
            check(&rows, &(struct test_case){shapes[s], features[f], element, 7});
    expect_all_ran(&rows);
}

Test(strides, f64) { check_element(F64); }
Test(strides, f32) { check_element(F32); }
Test(strides, f16) { check_element(F16); }
Test(strides, bf16) { check_element(BF16); }

/* More than 2 MiB, whose places are asked for before they are written, unless their elements lie apart. */
Test(strides, large_outputs) {
    const struct features lse = {.name = "lse", .lse = LSE_F32};
    struct cpu_rows rows;
    find_cpu_rows(&rows, F32);
    check(&rows, &(struct test_case){{2, 32, 16, 300, 40, 32, 32}, lse, F32, 7});
    for (int n = 0; n < rows.count; n++)
        cr_expect(rows.ran[n] > 0 || rows.info[n].flags & DLATTN_KERNEL_DECODE, "%s took no call",
                  rows.info[n].name);
}

/* Bytes of workspace that a row asks for; 0 if it declines. */
static size_t workspace_bytes(const char *kernel, const DLTensor *query, const DLTensor *key,
                              int32_t threads) {
    dlattn_sku sku = {.struct_size = sizeof sku};
    const dlattn_tensors tensors = {
        .struct_size = sizeof tensors, .query = query, .key = key, .value = key, .output = query};
    const dlattn_forward_desc desc = {
        .struct_size = sizeof desc, .kernel = kernel, .num_threads = threads};
    return test_api()->forward_query(&desc, &tensors, &sku) == DLATTN_OK ? sku.workspace_bytes : 0;
}

/* A thread's workspace does not grow with the keys, and tiles are what the row uses. */
Test(workspace, of_a_million_keys) {
    enum { THREADS = 64, SHORT = 8192, MILLION = 1 << 20 };
    for (int64_t rows = 1; rows <= 4096; rows += 4095) {
        int64_t queries[] = {1, 64, rows, 128}, few[] = {1, 64, SHORT, 128},
                many[] = {1, 64, MILLION, 128};
        DLTensor query = {
            .device = {kDLCPU, 0}, .ndim = 4, .dtype = {kDLFloat, 32, 1}, .shape = queries};
        DLTensor shorter = query, longer = query;
        shorter.shape = few, longer.shape = many;
        struct cpu_rows subjects;
        find_cpu_rows(&subjects, F32);
        for (int n = 0; n < subjects.count; n++) {
            const char *name = subjects.info[n].name;
            const size_t bytes = workspace_bytes(name, &query, &longer, THREADS);
            cr_expect(eq(sz, bytes, workspace_bytes(name, &query, &shorter, THREADS)), "%s", name);
            cr_expect(bytes <= (size_t)THREADS * 4 << 20, "%s: %zu bytes a thread", name,
                      bytes / THREADS);
        }
    }
}

Test(plan, tile_of_each_element) {
    static const struct {
        enum element element;
        int32_t tile_k;
    } tiles[] = {{F32, 128}, {F16, 512}, {BF16, 512}};
    for (size_t n = 0; n < sizeof tiles / sizeof tiles[0]; n++) {
        struct call c;
        dlattn_sku sku;
        const struct test_case from = {
            {1, 1, 1, 40, 40, 16, 16}, {.name = "plain"}, tiles[n].element, 1};
        call_make(&c, &from);
        call_use_images(&c);
        if (!run_call(&c, "cpu_fwd_amx", &sku))
            cr_skip_test("cpu_fwd_amx does not run here");
        cr_expect(eq(i32, sku.tile_k, tiles[n].tile_k), "%s", element_name(tiles[n].element));
        call_free(&c);
    }
}
