/*
 * One case of the one loop: the reference computes it in double from the same inputs, the kernel under test computes it
 * twice, and everything that numerics.md promises is compared.
 */
#ifndef DLATTN_TESTS_CHECK_H_
#define DLATTN_TESTS_CHECK_H_

#include "tests/support/call.h"
#include "tests/support/place.h"

/* The plugin, through the loader; prints why and exits if it is not found. */
const dlattn_api *test_api(void);

/* What is tested: a row of the table, or NULL for whichever the library chooses. */
struct subject {
    const dlattn_api *api;
    const struct place *place;
    const char *kernel;
    /* Stands in for api->forward, to test the checker; NULL: api->forward, and a plan on the second run. */
    int32_t (*forward)(const dlattn_forward_desc *, const dlattn_tensors *, const dlattn_exec *);
};

enum outcome { PASSED, DECLINED, FAILED };

struct verdict {
    enum outcome outcome;
    dlattn_sku sku; /* unless FAILED before a kernel was chosen */
    char text[768]; /* why, with the case, the worst index and both values */
};

void check_case(struct verdict *v, const struct subject *subject, const struct test_case *which);

/* A plain attention in the element type, each step rounded to it (the softmax to f32) as a framework without a fused kernel
 * does: the yardstick of the error bounds. `wide` is an upcast call; its OUTPUT and LSE receive the result. */
void naive_forward(struct call *wide, enum element e);

#endif /* DLATTN_TESTS_CHECK_H_ */
