/*
 * Where tensors lie: strides that no 32-bit number holds, and data that is less aligned than what a plan was made for. Each
 * row of the CPU gives the bits that it gives for compact tensors.
 */
#define _GNU_SOURCE
#include "tests/support/cpu_rows.h"

#include <sys/mman.h>

/* Calls visit(row, element) for each row of the CPU. */
static void each_cpu_row(void (*visit)(const char *row, enum element e)) {
    struct cpu_rows rows;
    find_every_cpu_row(&rows);
    for (int n = 0; n < rows.count; n++)
        visit(rows.info[n].name, shortest_element(&rows.info[n]));
}

static void run(const char *row, struct call *c) {
    dlattn_sku sku;
    c->desc.num_threads = 2;
    cr_assert(run_call(c, row, &sku), "%s: %s", row, test_api()->last_error());
}

static bool same_elements(const struct tensor *a, const struct tensor *b) {
    int64_t index[4] = {0};
    for (int64_t n = tensor_count(a); n > 0; n--, tensor_next(a, index)) {
        const double x = tensor_get(a, index), y = tensor_get(b, index);
        if (memcmp(&x, &y, sizeof x) != 0)
            return false;
    }
    return true;
}

/* ---- Strides past 2^31 elements --------------------------------------------------------------------------- */

/* The same elements with `axis` so far apart, in memory of which the pages that are touched alone exist. */
static bool spread(struct tensor *t, int axis) {
    struct tensor far = *t;
    int64_t index[4] = {0};
    far.stride[axis] = (INT64_C(1) << 31) + 16;
    far.first = 0;
    far.bytes =
        (size_t)((t->shape[axis] - 1) * far.stride[axis]) * element_bytes(t->element) + t->bytes;
    far.image = mmap(NULL, far.bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (far.image == MAP_FAILED)
        return false;
    for (int64_t n = tensor_count(t); n > 0; n--, tensor_next(t, index))
        tensor_set(&far, index, tensor_get(t, index));
    free(t->image);
    *t = far;
    t->dl.shape = t->shape;
    t->dl.strides = t->stride;
    t->dl.data = t->image;
    return true;
}

static void expect_far(const char *row, enum element e, const struct features *features,
                       enum slot slot, int axis) {
    const struct test_case from = {{2, 4, 2, 2, 40, 32, 32}, *features, e, 9};
    struct call near, far;
    call_make(&near, &from);
    call_make(&far, &from);
    call_use_images(&near);
    call_use_images(&far);
    if (!spread(&far.tensor[slot], axis)) {
        cr_log_warn("skipped: no room of addresses for %s", slot_name(slot));
        call_free(&near);
        call_free(&far);
        return;
    }
    run(row, &near);
    run(row, &far);
    for (int out = OUTPUT; out <= LSE; out++)
        cr_expect(same_elements(&near.tensor[out], &far.tensor[out]), "%s: %s, axis %d of %s", row,
                  features->name, axis, slot_name(slot));
    munmap(far.tensor[slot].image, far.tensor[slot].bytes);
    far.tensor[slot].image = NULL;
    call_free(&near);
    call_free(&far);
}

static void visit_far(const char *row, enum element e) {
    static const struct features dense = {.name = "dense",
                                          .bias = EVERY_AXIS,
                                          .mask = EVERY_AXIS,
                                          .causal = true,
                                          .bottom_right = true,
                                          .lse = LSE_F32},
                                 packed = {.name = "packed",
                                           .varlen_q = true,
                                           .varlen_k = true,
                                           .lse = LSE_F32},
                                 paged = {.name = "paged", .page_size = 8, .lse = LSE_F32};
    for (int slot = QUERY; slot <= MASK; slot++) {
        const int axes = slot == BIAS || slot == MASK ? 4 : 3;
        for (int axis = 0; axis < axes; axis++)
            expect_far(row, e, &dense, (enum slot)slot, axis);
    }
    for (int slot = QUERY; slot <= OUTPUT; slot++)
        expect_far(row, e, &packed, (enum slot)slot, 0);
    for (int slot = KEY; slot <= VALUE; slot++)
        expect_far(row, e, &paged, (enum slot)slot, 0);
}

Test(addresses, strides_past_two_to_the_31) { each_cpu_row(visit_far); }

/* ---- A plan for aligned tensors --------------------------------------------------------------------------- */

/* Data moves one element on, in every tensor. */
static void visit_unaligned(const char *row, enum element e) {
    const dlattn_api *api = test_api();
    const struct test_case aligned = {
        {2, 4, 2, 2, 40, 32, 32}, {.name = "lse", .lse = LSE_F32}, e, 9};
    struct test_case shifted = aligned;
    struct call near, far;
    dlattn_plan *plan = NULL;
    dlattn_sku sku = {.struct_size = sizeof sku};
    shifted.features.layout = SHIFTED;
    call_make(&near, &aligned);
    call_make(&far, &shifted);
    call_use_images(&near);
    call_use_images(&far);
    near.desc.kernel = row;
    const dlattn_tensors planned = call_tensors(&near), tensors = call_tensors(&far);
    cr_assert(eq(int, api->plan_create(&near.desc, &planned, &plan), DLATTN_OK));
    cr_assert(eq(int, api->plan_sku(plan, &sku), DLATTN_OK));
    void *workspace = aligned_alloc(64, (sku.workspace_bytes + 127) / 64 * 64);
    const dlattn_exec exec = {
        .struct_size = sizeof exec, .workspace = workspace, .workspace_bytes = sku.workspace_bytes};
    run(row, &near);
    cr_expect(eq(int, api->plan_can_run(plan, &tensors), DLATTN_OK), "%s: %s", row,
              api->last_error());
    cr_expect(eq(int, api->plan_run(plan, &tensors, &exec), DLATTN_OK), "%s: %s", row,
              api->last_error());
    for (int out = OUTPUT; out <= LSE; out++)
        cr_expect(same_elements(&near.tensor[out], &far.tensor[out]), "%s", row);
    api->plan_destroy(plan);
    free(workspace);
    call_free(&near);
    call_free(&far);
}

Test(addresses, plan_for_aligned_tensors_runs_with_others) { each_cpu_row(visit_unaligned); }
