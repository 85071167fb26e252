/*
 * What a planned call on a GPU asks of the driver: whose memory each tensor is, which context is current, once, and then its
 * launches. Run with a driver that only counts.
 */
#include <dlattn_loader.h>

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

static const dlattn_api *api;
static int (*calls)(const char *name);
static void (*reset)(void);

static void open_all(void) {
    char why[1024];
    void *const driver = dlopen(getenv("H100_DRIVER"), RTLD_NOW | RTLD_GLOBAL);
    cr_assert(driver != NULL, "%s", dlerror());
    void *symbol = dlsym(driver, "h100_calls");
    memcpy(&calls, &symbol, sizeof calls);
    symbol = dlsym(driver, "h100_reset");
    memcpy(&reset, &symbol, sizeof reset);
    api = dlattn_open(why, sizeof why);
    cr_assert(api != NULL, "%s", why);
}

static _Alignas(256) char memory[2 << 20];
enum { HEADS = 2, LENGTH = 300, DIM = 64, PITCH = HEADS * LENGTH * DIM * 4 };

static const int64_t rows[] = {1, HEADS, LENGTH, DIM}, row[] = {1, HEADS, LENGTH};

static DLTensor tensor(const int64_t *shape, int ndim, DLDataType dtype, int place) {
    return (DLTensor){.data = memory + place * PITCH,
                      .device = {kDLCUDA, 0},
                      .ndim = ndim,
                      .dtype = dtype,
                      .shape = (int64_t *)(uintptr_t)shape};
}

static const DLDataType f16 = {kDLFloat, 16, 1}, f32 = {kDLFloat, 32, 1};

/* Runs a plan twice; what is counted is the second run. */
static void planned_call(const char *kernel, bool backward, DLDataType dtype, uint64_t flags) {
    DLTensor x[4], y[4], lse = tensor(row, 3, f32, 8);
    for (int i = 0; i < 4; i++) {
        x[i] = tensor(rows, 4, dtype, i);
        y[i] = tensor(rows, 4, dtype, 4 + i);
    }
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = &x[0],
                                    .key = &x[1],
                                    .value = &x[2],
                                    .output = &x[3],
                                    .lse = &lse};
    const dlattn_gradients gradients = {.struct_size = sizeof gradients,
                                        .d_output = &y[0],
                                        .d_query = &y[1],
                                        .d_key = &y[2],
                                        .d_value = &y[3]};
    const dlattn_forward_desc desc = {.struct_size = sizeof desc, .kernel = kernel};
    const dlattn_exec exec = {.struct_size = sizeof exec,
                              .flags = flags,
                              .workspace = memory,
                              .workspace_bytes = sizeof memory};
    dlattn_plan *plan;
    const int32_t created = backward ? api->backward_plan_create(&desc, &tensors, &gradients, &plan)
                                     : api->plan_create(&desc, &tensors, &plan);
    cr_assert(eq(int, created, DLATTN_OK), "%s: %s", kernel, api->last_error());
    for (int i = 0; i < 2; i++) {
        reset();
        const int32_t ran = backward ? api->backward_plan_run(plan, &tensors, &gradients, &exec)
                                     : api->plan_run(plan, &tensors, &exec);
        cr_assert(eq(int, ran, DLATTN_OK), "%s: %s", kernel, api->last_error());
    }
    api->plan_destroy(plan);
}

Test(calls, a_planned_call_asks_for_nothing_but_its_launches, .init = open_all) {
    const struct {
        const char *kernel;
        bool backward;
        DLDataType dtype;
        int launches, maps, clears;
    } cases[] = {
        {"cuda_fwd_sm90", false, f16, 1, 4, 0},      {"cuda_fwd_sm80", false, f16, 1, 0, 0},
        {"cuda_fwd_tf32x3", false, f32, 1, 0, 0},    {"cuda_fwd_simt", false, f32, 1, 0, 0},
        {"cuda_decode_sm80", false, f16, 2, 0, 0},   {"cuda_fwd_split_sm90", false, f16, 2, 4, 0},
        {"cuda_fwd_pair_sm90", false, f16, 1, 4, 0}, {"cuda_bwd_sm90", true, f16, 3, 4, 1},
        {"cuda_bwd_sm80", true, f16, 3, 0, 0},       {"cuda_bwd_simt", true, f32, 3, 0, 0},
        {"cuda_bwd_tf32x3", true, f32, 6, 0, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *const kernel = cases[i].kernel;
        planned_call(kernel, cases[i].backward, cases[i].dtype, 0);
        const int pointers = calls("cuPointerGetAttributes");
        cr_expect(eq(int, calls("cuLaunchKernelEx"), cases[i].launches), "%s", kernel);
        cr_expect(eq(int, calls("cuTensorMapEncodeTiled"), cases[i].maps), "%s", kernel);
        cr_expect(eq(int, calls("cuMemsetD8Async"), cases[i].clears), "%s", kernel);
        cr_expect(eq(int, calls("cuCtxGetCurrent"), 1), "%s", kernel);
        cr_expect(eq(int, calls("cuCtxGetDevice"), 1), "%s", kernel);
        cr_expect(le(int, pointers, cases[i].backward ? 10 : 6), "%s", kernel); /* a workspace */
        cr_expect(eq(int, calls(NULL),
                     pointers + 2 + cases[i].launches + cases[i].maps + cases[i].clears),
                  "%s", kernel);
    }
}

/* Over zeros decoding is one launch; what other rows leave is cleared behind them. */
Test(calls, over_zeros, .init = open_all) {
    planned_call("cuda_decode_sm80", false, f16, DLATTN_WORKSPACE_IS_ZERO);
    cr_expect(eq(int, calls("cuLaunchKernelEx"), 1));
    cr_expect(eq(int, calls("cuMemsetD8Async"), 0));
    planned_call("cuda_fwd_split_sm90", false, f16, DLATTN_WORKSPACE_IS_ZERO);
    cr_expect(eq(int, calls("cuLaunchKernelEx"), 2));
    cr_expect(eq(int, calls("cuMemsetD8Async"), 1));
}
