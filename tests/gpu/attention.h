/*
 * What the GPU's tests have in common: self-attention on the device, tensors that go there and come back, and the rows of the
 * table that run here. Functions that cannot go on fail the test.
 */
#ifndef DLATTN_TESTS_ATTENTION_H_
#define DLATTN_TESTS_ATTENTION_H_

#include "tests/gpu/cuda.h"
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#define MUST(call) cr_assert(eq(int, (call), DLATTN_OK), "%s", test_api()->last_error())

/* The plugin; the test is skipped where there is no GPU, or where there are fewer than two. */
const dlattn_api *gpu_api(void);
const dlattn_api *api_of_two(void);

/* ---- Self-attention ------------------------------------------------------------------------------------------- */

/* Query, key, value and output in that order, compact [B, H, L, D]. */
struct attention {
    int64_t shape[4];
    size_t bytes; /* of one tensor */
    DLTensor tensor[4];
    dlattn_tensors tensors;
    dlattn_forward_desc desc;
    unsigned char *workspace; /* WORKSPACE_BYTES */
};
enum { WORKSPACE_BYTES = 16 << 20 };

extern const DLDataType f16, f32;

/* Causal, on one of several devices, whose context becomes current; or in f16 on device 0. */
void make_on(struct attention *a, int device, DLDataType dtype, const int64_t shape[4],
             uint64_t seed);
void make(struct attention *a, int64_t batch, int64_t heads, int64_t length, int64_t dim,
          uint64_t seed);
void drop(struct attention *a);

int32_t forward(const dlattn_api *api, const struct attention *a, void *stream);

/* The output, freshly allocated. Names the kernel that computed it, once for each test. */
unsigned char *result(const struct attention *a);
void poison(const struct attention *a);
/* Whether a and b have the same bits in their outputs. */
bool same_result(const struct attention *a, const struct attention *b);

/* ---- Rows of the table ---------------------------------------------------------------------------------------- */

/* The GPU's rows that run here and take tensors of one dtype and any head dim, in the order of the table. */
enum { MAX_ROWS = 16 };
int rows_here(const dlattn_api *api, dlattn_kernel_info rows[MAX_ROWS]);
/* The row of this name, NULL where it does not run. */
const char *row_if_here(const dlattn_api *api, const char *name);
DLDataType dtype_of(const dlattn_kernel_info *row);
bool row_takes(const dlattn_kernel_info *row, enum element e);

/* ---- Tensors of //tests/support on the device ------------------------------------------------------------------ */

/* Device memory with the tensor's image, to which it points from here on; back to the image; an end to both. */
void upload(struct tensor *t);
void download(struct tensor *t);
void discard(struct tensor *t);

/* Runs on device 0 with a workspace of its own and waits; *sku says what ran. */
int32_t run_call(const dlattn_api *api, const dlattn_forward_desc *desc,
                 const dlattn_tensors *tensors, dlattn_sku *sku);

/* ---- A row in double ------------------------------------------------------------------------------------------ */

/* Query row `row` of a head, which sees keys [0, keys) of key head `head_kv`. What keys lose by ALiBi counts from key `met`. */
struct row_in_double {
    const struct tensor *query, *key, *value;
    int64_t batch, head, head_kv, row, keys, met;
    double softcap; /* 0: none */
    double slope;
};
/* Its output, of as many elements as a value has, and its lse, which is returned. */
double attend_in_double(const struct row_in_double *r, double *output);

#endif /* DLATTN_TESTS_ATTENTION_H_ */
