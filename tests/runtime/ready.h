/* A causal f32 call in host memory, ready to run. */
#ifndef DLATTN_TESTS_READY_H_
#define DLATTN_TESTS_READY_H_

#include "tests/support/check.h"

struct ready {
    struct call call;
    dlattn_tensors tensors;
    dlattn_exec exec;
    dlattn_sku sku;
};

void prepare(const dlattn_api *api, struct ready *r, struct shape shape, uint64_t seed,
             int32_t threads);
void discard(struct ready *r);
int32_t run(const dlattn_api *api, struct ready *r);
bool same_output(const struct ready *a, const struct ready *b);

#endif /* DLATTN_TESTS_READY_H_ */
