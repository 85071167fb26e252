/* The CPU's rows that this machine can run, one after the other on a call whose tensors lie in its own images. */
#ifndef DLATTN_TESTS_CPU_ROWS_H_
#define DLATTN_TESTS_CPU_ROWS_H_

#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct cpu_rows {
    dlattn_kernel_info info[32];
    int count, ran[32]; /* calls that a row took */
};

/* Of them those that take one of the elements, a set of bits: 1 << F32; that of DLATTN_TEST_ROW alone where it is set. */
static inline void find_cpu_rows_of(struct cpu_rows *rows, unsigned elements) {
    const dlattn_api *api = test_api();
    const char *const only = getenv("DLATTN_TEST_ROW");
    *rows = (struct cpu_rows){.count = 0};
    for (int32_t row = 0; row < api->kernel_count(); row++) {
        dlattn_kernel_info info = {.struct_size = sizeof info};
        bool taken = false;
        cr_assert(eq(int, api->kernel_info(row, &info), DLATTN_OK));
        for (enum element e = F64; e <= BF16; e++)
            taken |= elements >> e & 1 && element_is_listed(info.dtypes, e);
        if (!taken || strcmp(info.backend, "cpu") != 0 || strcmp(info.operation, "forward") != 0)
            continue;
        if (only && only[0] && strcmp(info.name, only) != 0)
            continue;
        if (info.available)
            rows->info[rows->count++] = info;
        else
            fprintf(stderr, "%s is skipped: it needs %s\n", info.name, info.arch);
    }
}

static inline void find_cpu_rows(struct cpu_rows *rows, enum element element) {
    find_cpu_rows_of(rows, 1u << element);
}

static inline void find_every_cpu_row(struct cpu_rows *rows) { find_cpu_rows_of(rows, ~0u); }

/* What a row takes: bf16 if it can, else f16, else f32, else f64. */
static inline enum element shortest_element(const dlattn_kernel_info *row) {
    return element_is_listed(row->dtypes, BF16)  ? BF16
           : element_is_listed(row->dtypes, F16) ? F16
           : element_is_listed(row->dtypes, F32) ? F32
                                                 : F64;
}

/* Every row has taken some call. */
static inline void expect_all_ran(const struct cpu_rows *rows) {
    for (int n = 0; n < rows->count; n++)
        cr_expect(rows->ran[n] > 0, "%s took no call", rows->info[n].name);
}

/* Runs a call with a workspace of its own. False if no row takes it, or not the one that it names. */
static inline bool run_tensors(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                               dlattn_sku *sku) {
    const dlattn_api *api = test_api();
    *sku = (dlattn_sku){.struct_size = sizeof *sku};
    const int32_t status = api->forward_query(desc, tensors, sku);
    if (status == DLATTN_UNSUPPORTED)
        return false;
    cr_assert(eq(int, status, DLATTN_OK), "%s", api->last_error());
    void *workspace = aligned_alloc(64, (sku->workspace_bytes + 64) / 64 * 64);
    const dlattn_exec exec = {.struct_size = sizeof exec,
                              .workspace = workspace,
                              .workspace_bytes = sku->workspace_bytes};
    cr_assert(eq(int, api->forward(desc, tensors, &exec), DLATTN_OK), "%s", api->last_error());
    free(workspace);
    return true;
}

/* Of a call: by a row, or by the library's choice if it is NULL. */
static inline bool run_call(struct call *c, const char *kernel, dlattn_sku *sku) {
    const dlattn_tensors tensors = call_tensors(c);
    c->desc.kernel = kernel;
    return run_tensors(&c->desc, &tensors, sku);
}

#endif /* DLATTN_TESTS_CPU_ROWS_H_ */
