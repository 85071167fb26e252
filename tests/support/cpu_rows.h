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

static inline bool lists(const char *dtypes, enum element e) {
    char all[128], wanted[16];
    snprintf(all, sizeof all, " %s ", dtypes);
    snprintf(wanted, sizeof wanted, " %s ", element_name(e));
    return strstr(all, wanted) != NULL;
}

static inline void find_cpu_rows(struct cpu_rows *rows, enum element element) {
    const dlattn_api *api = test_api();
    *rows = (struct cpu_rows){.count = 0};
    for (int32_t row = 0; row < api->kernel_count(); row++) {
        dlattn_kernel_info info = {.struct_size = sizeof info};
        cr_assert(eq(int, api->kernel_info(row, &info), DLATTN_OK));
        if (strcmp(info.backend, "cpu") != 0 || strcmp(info.operation, "forward") != 0 ||
            !lists(info.dtypes, element))
            continue;
        if (info.available)
            rows->info[rows->count++] = info;
        else
            fprintf(stderr, "%s is skipped: it needs %s\n", info.name, info.arch);
    }
}

/* Every row has taken some call. */
static inline void expect_all_ran(const struct cpu_rows *rows) {
    for (int n = 0; n < rows->count; n++)
        cr_expect(rows->ran[n] > 0, "%s took no call", rows->info[n].name);
}

/* Runs a call by a row, or by the library's choice if it is NULL. False if the row declines. */
static inline bool run_call(struct call *c, const char *kernel, dlattn_sku *sku) {
    const dlattn_api *api = test_api();
    const dlattn_tensors tensors = call_tensors(c);
    *sku = (dlattn_sku){.struct_size = sizeof *sku};
    c->desc.kernel = kernel;
    if (api->forward_query(&c->desc, &tensors, sku) == DLATTN_UNSUPPORTED)
        return false;
    const size_t bytes = (sku->workspace_bytes + 64) / 64 * 64;
    void *workspace = aligned_alloc(64, bytes);
    const dlattn_exec exec = {
        .struct_size = sizeof exec, .workspace = workspace, .workspace_bytes = bytes};
    cr_assert(eq(int, api->forward(&c->desc, &tensors, &exec), DLATTN_OK), "%s", api->last_error());
    free(workspace);
    return true;
}

#endif /* DLATTN_TESTS_CPU_ROWS_H_ */
