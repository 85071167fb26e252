/*
 * Every row of the GPU, each with few small cases, in one process: what compute-sanitizer can run in a minute, and what
 * tells which rows a machine has. With the argument `few` one of four cases; with `wrong` one call instead, whose
 * key ends before its extents say: memcheck must see it.
 */
#include "tests/gpu/cuda.h"
#include "tests/support/check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Keys and rows that end inside tiles, groups, decoding, each width of tile, head dims that fill none. */
static const struct shape shapes[] = {
    {2, 4, 2, 37, 75, 64, 64},    {1, 2, 1, 130, 140, 128, 128}, {3, 4, 1, 1, 90, 64, 64},
    {1, 1, 1, 70, 70, 256, 256},  {1, 2, 2, 33, 40, 96, 96},     {2, 2, 1, 13, 6, 20, 12},
    {1, 1, 1, 40, 200, 192, 128},
};
static const char *const features[] = {
    "causal_bottom_right", "lse",           "window_bottom_right", "softcap_causal",
    "lengths_causal",      "bias_element",  "mask_bias_causal",    "alibi_causal",
    "sinks_window",        "varlen_causal", "paged_causal",        "sliced",
    "odd_causal_lengths",  "nan_key",
};
enum { SHAPES = sizeof shapes / sizeof shapes[0], FEATURES = sizeof features / sizeof features[0] };

static const struct features *features_named(const char *name) {
    for (int i = 0; i < feature_set_count; i++) {
        if (strcmp(feature_sets[i].name, name) == 0)
            return &feature_sets[i];
    }
    abort();
}

static bool lists(const char *dtypes, enum element e) {
    const char *const name = element_name(e);
    const size_t length = strlen(name);
    for (const char *at = dtypes; (at = strstr(at, name)) != NULL; at += length) {
        if ((at == dtypes || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0))
            return true;
    }
    return false;
}

/* Whether one of `every` cases failed: all shapes with the first two features, all features with the first shape. */
static bool row_fails(const dlattn_api *api, const char *kernel, enum element e, int every) {
    const struct subject subject = {.api = api, .place = &place_gpu, .kernel = kernel};
    int outcomes[3] = {0};
    for (int i = 0; i < 2 * SHAPES + FEATURES; i += every) {
        const struct shape *const shape = &shapes[i < 2 * SHAPES ? i / 2 : 0];
        const char *const name = features[i < 2 * SHAPES ? i % 2 : i - 2 * SHAPES];
        const struct test_case c = {*shape, *features_named(name), e, (uint64_t)i};
        struct verdict v;
        check_case(&v, &subject, &c);
        outcomes[v.outcome]++;
        if (v.outcome == FAILED)
            fprintf(stderr, "%s: %s\n", kernel, v.text);
    }
    printf("%s %s: %d cases passed, %d failed, %d declined\n", kernel, element_name(e),
           outcomes[PASSED], outcomes[FAILED], outcomes[DECLINED]);
    return outcomes[FAILED] > 0 || outcomes[PASSED] == 0;
}

/* The number of rows that fail. */
static int check_rows(const dlattn_api *api, int every) {
    int failed = 0;
    for (int32_t i = 0; i < api->kernel_count(); i++) {
        dlattn_kernel_info row = {.struct_size = sizeof row};
        api->kernel_info(i, &row);
        if (strcmp(row.backend, "cuda") != 0)
            continue;
        if (!row.available)
            printf("%s: needs %s\n", row.name, row.arch);
        for (enum element e = F64; row.available && e <= BF16; e++)
            failed += lists(row.dtypes, e) && row_fails(api, row.name, e, every);
    }
    return failed;
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
    if (strcmp(what, "wrong") == 0)
        return call_wrongly(api);
    return check_rows(api, strcmp(what, "few") == 0 ? 4 : 1) != 0;
}
