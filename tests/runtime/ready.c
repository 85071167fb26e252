#include "tests/runtime/ready.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdlib.h>
#include <string.h>

void prepare(const dlattn_api *api, struct ready *r, struct shape shape, uint64_t seed,
             int32_t threads) {
    const struct test_case from = {
        shape, {.name = "causal", .causal = true, .bottom_right = true, .lse = LSE_F32}, F32, seed};
    memset(&r->exec, 0, sizeof r->exec);
    call_make(&r->call, &from);
    call_use_images(&r->call);
    r->call.desc.num_threads = threads;
    r->tensors = call_tensors(&r->call);
    r->sku = (dlattn_sku){.struct_size = sizeof r->sku};
    cr_assert(eq(int, api->forward_query(&r->call.desc, &r->tensors, &r->sku), DLATTN_OK), "%s",
              api->last_error());
    r->exec.struct_size = sizeof r->exec;
    r->exec.workspace_bytes = r->sku.workspace_bytes;
    r->exec.workspace = aligned_alloc(64, (r->sku.workspace_bytes + 127) / 64 * 64);
}

void discard(struct ready *r) {
    free(r->exec.workspace);
    call_free(&r->call);
}

int32_t run(const dlattn_api *api, struct ready *r) {
    return api->forward(&r->call.desc, &r->tensors, &r->exec);
}

bool same_output(const struct ready *a, const struct ready *b) {
    const struct tensor *x = &a->call.tensor[OUTPUT], *y = &b->call.tensor[OUTPUT];
    return memcmp(x->image, y->image, x->bytes) == 0;
}
