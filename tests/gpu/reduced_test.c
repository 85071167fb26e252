/*
 * Every row of the GPU, each with few small cases, in one process: what compute-sanitizer can run in a minute, and what
 * tells which rows a machine has.
 *   reduced_test          all cases
 *   reduced_test few ROW  one of five cases of this row
 *   reduced_test wild     lengths, cu_seqlens and block tables that point anywhere: memcheck must see nothing
 *   reduced_test rows     only the names of the rows that a machine has
 *   reduced_test wrong    one call whose key ends before its extents say: memcheck must see it
 */
#include "tests/gpu/cuda.h"
#include "tests/support/check.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Keys and rows that end inside tiles (a bias of 72 keys is one for the copy engine), groups, decoding, keys in two splits, each width of tile, head dims that fill none.
 */
static const struct shape shapes[] = {
    {2, 4, 2, 37, 72, 64, 64},   {1, 2, 1, 130, 140, 128, 128}, {3, 4, 1, 1, 90, 64, 64},
    {2, 8, 2, 3, 300, 128, 128}, {1, 1, 1, 70, 70, 256, 256},   {1, 2, 2, 33, 40, 96, 96},
    {2, 2, 1, 13, 6, 20, 12},    {1, 1, 1, 40, 200, 192, 128},
};
static const char *const features[] = {
    "causal_bottom_right", "lse",
    "window_bottom_right", "softcap_causal",
    "lengths_causal",      "mask_bias_causal",
    "bias_element",        "alibi_causal",
    "sinks_window",        "varlen_causal",
    "paged_causal",        "sliced",
    "odd_causal_lengths",  "nan_key",
    "cache_scales",        "cache_paged_window",
    "offset_window_alibi", "query_e4m3",
    "query_softcap",       "query_varlen",
    "query_paged_e5m2",    "query_nan_value",
    "query_odd",           "query_bias_element",
    "query_mask",          "query_paged_any",
};
/* The latent cache of MLA, shared by more packed rows than a tile has. */
static const struct shape latent = {2, 36, 1, 3, 150, 576, 512};
static const char *const latent_features[] = {"view", "view_causal", "view_pages",
                                              "view_pages_causal"};
enum {
    SHAPES = sizeof shapes / sizeof shapes[0],
    FEATURES = sizeof features / sizeof features[0],
    LATENT = sizeof latent_features / sizeof latent_features[0],
    CASES = 2 * SHAPES + FEATURES + LATENT,
};

/* Case `i`: all shapes with the first two features, all features with the first shape, the latent cache with its own. */
static struct test_case numbered_case(int i, enum element e) {
    const int feature = i - 2 * SHAPES;
    if (feature >= FEATURES)
        return (struct test_case){latent, *features_named(latent_features[feature - FEATURES]), e,
                                  (uint64_t)i};
    return (struct test_case){shapes[feature < 0 ? i / 2 : 0],
                              *features_named(features[feature < 0 ? i % 2 : feature]), e,
                              (uint64_t)i};
}

/* Whether a case failed, of one in five for `few`; those of the latent cache are few. */
static bool row_fails(const dlattn_api *api, const dlattn_kernel_info *row, enum element e,
                      bool few) {
    const char *const kernel = row->name;
    const struct subject subject = {.api = api, .place = &place_gpu, .kernel = kernel};
    int outcomes[3] = {0};
    for (int i = 0; i < CASES; i++) {
        struct test_case c = numbered_case(i, e);
        struct verdict v;
        if (few && i % 5 != 2 && i < CASES - LATENT)
            continue;
        c.features.backward = strcmp(row->operation, "backward") == 0;
        if (c.features.backward && features_are_forward_only(&c.features))
            continue;
        check_case(&v, &subject, &c);
        outcomes[v.outcome]++;
        if (v.outcome == FAILED)
            fprintf(stderr, "%s: %s\n", kernel, v.text);
    }
    printf("%s %s: %d cases passed, %d failed, %d declined\n", kernel, element_name(e),
           outcomes[PASSED], outcomes[FAILED], outcomes[DECLINED]);
    fflush(stdout);
    return outcomes[FAILED] > 0 || outcomes[PASSED] == 0;
}

/* Row `i` of the table, if it is the GPU's and runs here. */
static bool row_here(const dlattn_api *api, int32_t i, dlattn_kernel_info *row) {
    *row = (dlattn_kernel_info){.struct_size = sizeof *row};
    return api->kernel_info(i, row) == DLATTN_OK && strcmp(row->backend, "cuda") == 0 &&
           (strcmp(row->operation, "forward") == 0 || strcmp(row->operation, "backward") == 0) &&
           row->available;
}

/* The number of types for which rows fail; `only`: one row, or NULL for all. */
static int check_rows(const dlattn_api *api, bool few, const char *only) {
    int failed = 0;
    for (int32_t i = 0; i < api->kernel_count(); i++) {
        dlattn_kernel_info row;
        if (!row_here(api, i, &row) || (only && strcmp(row.name, only) != 0))
            continue;
        for (enum element e = F64; e <= BF16; e++)
            failed += element_is_listed(row.dtypes, e) && row_fails(api, &row, e, few);
    }
    return failed;
}

static int print_rows(const dlattn_api *api) {
    dlattn_kernel_info row;
    for (int32_t i = 0; i < api->kernel_count(); i++) {
        if (row_here(api, i, &row))
            puts(row.name);
    }
    return 0;
}

static void make_wild(const DLTensor *t) {
    static const int32_t wild[] = {-7, 40, INT_MAX, 3, INT_MIN, 1000000, -1, 20, 0};
    enum { WILD = sizeof wild / sizeof wild[0] };
    int32_t values[1024];
    size_t count = 1;
    for (int axis = 0; t && axis < t->ndim; axis++)
        count *= (size_t)t->shape[axis];
    if (!t || count > sizeof values / sizeof values[0])
        return;
    for (size_t i = 0; i < count; i++)
        values[i] = wild[i * 5 % WILD];
    cuda_store((unsigned char *)t->data + t->byte_offset, values, count * sizeof values[0]);
}

static void make_integers_wild(const dlattn_tensors *tensors) {
    const DLTensor *const integers[] = {tensors->query_lengths, tensors->key_lengths,
                                        tensors->cu_seqlens_q, tensors->cu_seqlens_k,
                                        tensors->block_table};
    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++)
        make_wild(integers[i]);
}

/* In place of api->forward and api->backward. What comes out is anybody's guess. */
static int32_t forward_wild(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                            const dlattn_exec *exec) {
    make_integers_wild(tensors);
    return test_api()->forward(desc, tensors, exec);
}

static int32_t backward_wild(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                             const dlattn_gradients *gradients, const dlattn_exec *exec) {
    make_integers_wild(tensors);
    return test_api()->backward(desc, tensors, gradients, exec);
}

/* Every row with each kind of integer tensor. */
static int call_wild(const dlattn_api *api) {
    static const char *const wild_features[] = {
        "lengths_causal",   "varlen_causal",      "varlen_lengths", "paged_causal",
        "paged_everything", "cache_paged_window", "query_lengths",  "query_paged"};
    for (int32_t i = 0; i < api->kernel_count(); i++) {
        dlattn_kernel_info row;
        for (int n = 0; row_here(api, i, &row) && n < 8; n++) {
            const struct subject subject = {.api = api,
                                            .place = &place_gpu,
                                            .kernel = row.name,
                                            .forward = forward_wild,
                                            .backward = backward_wild};
            struct test_case c = {{4, 4, 2, 37, 75, 64, 64},
                                  *features_named(wild_features[n]),
                                  element_is_listed(row.dtypes, F16) ? F16 : F32,
                                  (uint64_t)n};
            struct verdict v;
            c.features.backward = strcmp(row.operation, "backward") == 0;
            check_case(&v, &subject, &c);
        }
    }
    return 0;
}

/* 64 keys, of which the last 48 are in nobody's memory. */
static int call_wrongly(const dlattn_api *api) {
    enum { DIM = 64, KEYS = 64, THERE = 16 };
    int64_t shape[4] = {1, 1, KEYS, DIM};
    unsigned char zeros[KEYS * DIM * 4] = {0};
    DLTensor tensor[4];
    for (int n = 0; n < 4; n++) { /* the key last, so that nothing else is where it ends */
        const int t = (n + 2) % 4;
        const size_t bytes = (t == 1 ? THERE : KEYS) * DIM * 4;
        tensor[t] = (DLTensor){.data = cuda_take(bytes),
                               .device = {kDLCUDA, 0},
                               .ndim = 4,
                               .dtype = {kDLFloat, 32, 1},
                               .shape = shape};
        cuda_store(tensor[t].data, zeros, bytes);
    }
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = &tensor[0],
                                    .key = &tensor[1],
                                    .value = &tensor[2],
                                    .output = &tensor[3]};
    const dlattn_forward_desc desc = {.struct_size = sizeof desc};
    const dlattn_exec exec = {.struct_size = sizeof exec};
    const int32_t status = api->forward(&desc, &tensors, &exec);
    cuda_wait();
    return status;
}

int main(int argc, char **argv) {
    const dlattn_api *const api = test_api();
    if (cuda_open() == 0) {
        puts("[SKIP] no NVIDIA device");
        return 0;
    }
    const char *const what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "rows") == 0)
        return print_rows(api);
    if (strcmp(what, "wild") == 0)
        return call_wild(api);
    if (strcmp(what, "wrong") == 0)
        return call_wrongly(api);
    const bool few = strcmp(what, "few") == 0;
    return check_rows(api, few, few && argc > 2 ? argv[2] : NULL) != 0;
}
