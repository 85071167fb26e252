/*
 * One case of the one loop: the reference computes it in double from the same inputs, each kernel under test computes it
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
    /* Stand in for api->forward and backward, to test the checker; NULL: the api's, and a plan on the second run. */
    int32_t (*forward)(const dlattn_forward_desc *, const dlattn_tensors *, const dlattn_exec *);
    int32_t (*backward)(const dlattn_forward_desc *, const dlattn_tensors *,
                        const dlattn_gradients *, const dlattn_exec *);
};

enum outcome { PASSED, DECLINED, FAILED };

struct verdict {
    enum outcome outcome;
    dlattn_sku sku; /* unless FAILED before a kernel was chosen */
    char text[768]; /* why, with the case, the worst index and both values */
};

void check_case(struct verdict *v, const struct subject *subject, const struct test_case *which);

/* The same for several, one after the other, of which only the truth is found once: that takes more time than they do. */
void check_subjects(struct verdict *v, const struct subject *subjects, int count,
                    const struct test_case *which);

/* Attention by plain loops in double, apart from the library's reference. `wide` is an upcast call; its OUTPUT and LSE
 * receive the result, or how far each element of a row of the table may be from it: the bounds of docs/numerics.md for the
 * element type of the case. */
void plain_forward(struct call *wide);
void plain_bounds(struct call *wide);
/* The same where rounding moves no weight, for scores that are alike to the bit or far apart: huge ones, whose terms would
 * make the bounds so large that they said nothing. */
void plain_bounds_of_exact_scores(struct call *wide);
/* The gradients of an upcast call of backward, and how far each element may be from them. */
void plain_gradients(struct call *values, struct call *bounds);

#endif /* DLATTN_TESTS_CHECK_H_ */
