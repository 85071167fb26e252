/*
 * DLPack's managed tensors, legacy and versioned: what is refused, and that each deleter runs exactly once on every path
 * when the caller gives its tensors away, and never otherwise.
 */
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdlib.h>
#include <string.h>

enum { TENSORS = 5 }; /* query, key, value, output, lse */

static int deleted[TENSORS];

static void count_legacy(DLManagedTensor *m) { deleted[(intptr_t)m->manager_ctx]++; }

static void count_versioned(struct DLManagedTensorVersioned *m) {
    deleted[(intptr_t)m->manager_ctx]++;
}

/* One call with both kinds of tensors over the same memory. */
struct managed_call {
    struct call call;
    DLManagedTensor legacy[TENSORS];
    struct DLManagedTensorVersioned versioned[TENSORS];
    dlattn_managed_tensors legacy_slots;
    dlattn_versioned_tensors versioned_slots;
    dlattn_exec exec;
};

static void prepare(struct managed_call *m, uint64_t flags) {
    const struct test_case from = {{1, 2, 2, 5, 7, 8, 8}, {.name = "lse", .lse = LSE_F32}, F32, 9};
    memset(m, 0, sizeof *m);
    memset(deleted, 0, sizeof deleted);
    call_make(&m->call, &from);
    call_use_images(&m->call);
    for (int slot = 0; slot < TENSORS; slot++) {
        m->legacy[slot] =
            (DLManagedTensor){m->call.tensor[slot].dl, (void *)(intptr_t)slot, count_legacy};
        m->versioned[slot] = (struct DLManagedTensorVersioned){
            .version = {DLPACK_MAJOR_VERSION, 99},
            .manager_ctx = (void *)(intptr_t)slot,
            .deleter = count_versioned,
            .dl_tensor = m->call.tensor[slot].dl,
        };
    }
    m->legacy_slots = (dlattn_managed_tensors){.struct_size = sizeof m->legacy_slots,
                                               .query = &m->legacy[QUERY],
                                               .key = &m->legacy[KEY],
                                               .value = &m->legacy[VALUE],
                                               .output = &m->legacy[OUTPUT],
                                               .lse = &m->legacy[LSE]};
    m->versioned_slots = (dlattn_versioned_tensors){.struct_size = sizeof m->versioned_slots,
                                                    .query = &m->versioned[QUERY],
                                                    .key = &m->versioned[KEY],
                                                    .value = &m->versioned[VALUE],
                                                    .output = &m->versioned[OUTPUT],
                                                    .lse = &m->versioned[LSE]};
    m->exec = (dlattn_exec){.struct_size = sizeof m->exec,
                            .flags = flags,
                            .workspace = aligned_alloc(64, 1 << 20),
                            .workspace_bytes = 1 << 20};
}

static void discard(struct managed_call *m) {
    free(m->exec.workspace);
    call_free(&m->call);
}

static int32_t run_legacy(const dlattn_api *api, struct managed_call *m) {
    return api->forward_managed(&m->call.desc, &m->legacy_slots, &m->exec);
}

static int32_t run_versioned(const dlattn_api *api, struct managed_call *m) {
    return api->forward_versioned(&m->call.desc, &m->versioned_slots, &m->exec);
}

static bool untouched(const struct managed_call *m) {
    const struct tensor *t = &m->call.tensor[OUTPUT];
    for (size_t i = 0; i < t->bytes; i++) {
        if (t->image[i] != OUTPUT_FILL)
            return false;
    }
    return true;
}

static void expect_deleted(int times, const char *where) {
    for (int slot = 0; slot < TENSORS; slot++)
        cr_expect(eq(int, deleted[slot], times), "%s: the deleter of %s", where,
                  slot_name((enum slot)slot));
}

typedef int32_t (*runner)(const dlattn_api *, struct managed_call *);
static const runner runners[] = {run_legacy, run_versioned};

Test(managed, same_result_as_plain) {
    const dlattn_api *api = test_api();
    for (int kind = 0; kind < 2; kind++) {
        struct managed_call m, plain;
        prepare(&m, 0);
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_OK), "%s", api->last_error());
        expect_deleted(0, "borrowed");
        prepare(&plain, 0);
        const dlattn_tensors tensors = call_tensors(&plain.call);
        cr_expect(eq(int, api->forward(&plain.call.desc, &tensors, &plain.exec), DLATTN_OK));
        for (int slot = OUTPUT; slot <= LSE; slot++)
            cr_expect(memcmp(m.call.tensor[slot].image, plain.call.tensor[slot].image,
                             plain.call.tensor[slot].bytes) == 0);
        discard(&m);
        discard(&plain);
    }
}

Test(managed, taken_on_success) {
    const dlattn_api *api = test_api();
    for (int kind = 0; kind < 2; kind++) {
        struct managed_call m;
        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_OK), "%s", api->last_error());
        expect_deleted(1, "success");
        cr_expect(not(untouched(&m)));
        discard(&m);
    }
}

Test(managed, taken_on_refusal) {
    const dlattn_api *api = test_api();
    for (int kind = 0; kind < 2; kind++) {
        struct managed_call m;
        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        m.call.desc.causal = 7;
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_INVALID_ARGUMENT));
        expect_deleted(1, "bad option");
        discard(&m);

        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        m.legacy[KEY].dl_tensor.ndim = m.versioned[KEY].dl_tensor.ndim = 2;
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_INVALID_ARGUMENT));
        expect_deleted(1, "bad tensor");
        discard(&m);

        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        m.call.desc.struct_size = 1;
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_INVALID_ARGUMENT));
        expect_deleted(1, "bad desc");
        discard(&m);

        prepare(&m, DLATTN_TAKE_OWNERSHIP | 64);
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_UNSUPPORTED));
        expect_deleted(1, "unknown exec flag");
        cr_expect(untouched(&m));
        discard(&m);
    }
}

/* Structs that cannot be read say nothing about ownership: everything stays the caller's. */
Test(managed, kept_when_unreadable) {
    const dlattn_api *api = test_api();
    for (int kind = 0; kind < 2; kind++) {
        struct managed_call m;
        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        m.exec.struct_size = 8;
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_INVALID_ARGUMENT));
        expect_deleted(0, "small exec");
        discard(&m);

        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        m.legacy_slots.struct_size = m.versioned_slots.struct_size = 16;
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_INVALID_ARGUMENT));
        expect_deleted(0, "small tensors");
        cr_expect(untouched(&m));
        discard(&m);
    }
}

Test(managed, one_tensor_in_two_slots) {
    const dlattn_api *api = test_api();
    for (int kind = 0; kind < 2; kind++) {
        struct managed_call m;
        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        m.legacy_slots.value = m.legacy_slots.key;
        m.versioned_slots.value = m.versioned_slots.key;
        cr_expect(eq(int, runners[kind](api, &m), DLATTN_OK), "%s", api->last_error());
        deleted[VALUE] = 1; /* it was not given away */
        expect_deleted(1, "two slots");
        discard(&m);
    }
}

Test(managed, no_deleter) {
    const dlattn_api *api = test_api();
    struct managed_call m;
    prepare(&m, DLATTN_TAKE_OWNERSHIP);
    for (int slot = 0; slot < TENSORS; slot++) {
        m.legacy[slot].deleter = NULL;
        m.versioned[slot].deleter = NULL;
    }
    cr_expect(eq(int, run_legacy(api, &m), DLATTN_OK));
    cr_expect(eq(int, run_versioned(api, &m), DLATTN_OK));
    discard(&m);
}

Test(managed, major_version) {
    const dlattn_api *api = test_api();
    for (int slot = 0; slot < TENSORS; slot++) {
        struct managed_call m;
        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        m.versioned[slot].version.major = 2;
        /* Nothing past the flags may be read then. */
        memset(&m.versioned[slot].dl_tensor, 0xff, sizeof m.versioned[slot].dl_tensor);
        cr_expect(eq(int, run_versioned(api, &m), DLATTN_VERSION_MISMATCH));
        cr_expect(strstr(api->last_error(), slot_name((enum slot)slot)) != NULL, "%s",
                  api->last_error());
        cr_expect(strstr(api->last_error(), "is 2") && strstr(api->last_error(), "reads 1"), "%s",
                  api->last_error());
        expect_deleted(1, "major version");
        cr_expect(untouched(&m));
        discard(&m);
    }
}

Test(managed, read_only) {
    const dlattn_api *api = test_api();
    for (int slot = 0; slot < TENSORS; slot++) {
        struct managed_call m;
        const bool output = slot == OUTPUT || slot == LSE;
        prepare(&m, DLATTN_TAKE_OWNERSHIP);
        m.versioned[slot].flags = DLPACK_FLAG_BITMASK_READ_ONLY;
        cr_expect(eq(int, run_versioned(api, &m), output ? DLATTN_INVALID_ARGUMENT : DLATTN_OK),
                  "%s", slot_name((enum slot)slot));
        expect_deleted(1, "read only");
        cr_expect(eq(int, untouched(&m), output));
        if (output)
            cr_expect(strstr(api->last_error(), slot_name((enum slot)slot)) &&
                          strstr(api->last_error(), "READ_ONLY"),
                      "%s", api->last_error());
        discard(&m);
    }
}
