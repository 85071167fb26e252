/*
 * A host that links nothing but libc: opens the plugin with the loader and calls what ABI 1.0 has. It is built from three
 * headers, the frozen one, today's, and today's with something appended to every struct (DLATTN_FUTURE), and run with three
 * libraries made the same way.
 */
#define _GNU_SOURCE
#ifndef CLIENT_HEADER
#define CLIENT_HEADER "abi/dlattn.h"
#endif
#include CLIENT_HEADER

#include "abi/dlattn_loader.h"

#include <math.h>

/* ---- The layout of 1.0 ------------------------------------------------------------------------------------ */

#if DLATTN_ABI_MINOR == 0
#define GROWN(now, then) ((now) == (then))
#else
#define GROWN(now, then) ((now) >= (then))
#endif
#define SIZE(type, bytes) _Static_assert(GROWN(sizeof(type), bytes), "size of " #type);
#define FIELD(type, name, offset, bytes)                                                           \
    _Static_assert(offsetof(type, name) == (offset) && sizeof(((type *)0)->name) == (bytes),       \
                   #type "." #name);
#define VALUE(name, number) _Static_assert((name) == (number), #name);
#include "tests/abi/layout_v1_0.inc"

/* ---- The calls of 1.0 ------------------------------------------------------------------------------------- */

static int failed;

static void check(int good, const char *what, const dlattn_api *api) {
    if (!good) {
        printf("FAILED: %s (%s)\n", what, api->last_error());
        failed = 1;
    }
}

/* Two rows, three keys, head_dim 2: small enough for a formula. */
enum { ROWS = 2, KEYS = 3, DIM = 2 };
static float query[ROWS * DIM] = {1, -2, 0.5f, 3}, key[KEYS * DIM] = {1, 0, 0, 1, -1, 2},
                          value[KEYS * DIM] = {1, 2, 3, 4, 5, 6};
static float output[ROWS * DIM];

static int right(void) {
    for (int i = 0; i < ROWS; i++) {
        double total = 0, sum[DIM] = {0};
        for (int j = 0; j < KEYS; j++) {
            const double dot =
                (double)query[2 * i] * key[2 * j] + (double)query[2 * i + 1] * key[2 * j + 1];
            const double weight = exp(dot / sqrt(2));
            total += weight;
            for (int d = 0; d < DIM; d++)
                sum[d] += weight * value[2 * j + d];
        }
        for (int d = 0; d < DIM; d++) {
            if (!(fabs(output[2 * i + d] - sum[d] / total) < 1e-5))
                return 0;
        }
    }
    return 1;
}

static DLTensor tensor(float *data, int64_t *shape) {
    return (DLTensor){
        .data = data, .device = {kDLCPU, 0}, .ndim = 4, .dtype = {kDLFloat, 32, 1}, .shape = shape};
}

#ifdef DLATTN_FUTURE
/* What was appended to a struct, set: an older library refuses it, and the same call without it was accepted. */
#define EXPECT_TAIL(struct_, value, call) EXPECT_TAIL_AS(DLATTN_OK, struct_, value, call)
/* The same where a library that knows the tail has another answer: a plan was made without it. */
#define EXPECT_TAIL_AS(known, struct_, value, call)                                                \
    do {                                                                                           \
        (struct_).future = (value);                                                                \
        const int32_t status = (call);                                                             \
        check(status == (knows ? (known) : DLATTN_UNSUPPORTED), "a tail of " #struct_, api);       \
        check(knows || strstr(api->last_error(), stub ? "stub" : "is not zero") != NULL,           \
              "a message for a tail of " #struct_, api);                                           \
        (struct_).future = 0;                                                                      \
    } while (0)
#else
#define EXPECT_TAIL(struct_, value, call) (void)knows
#define EXPECT_TAIL_AS(known, struct_, value, call) (void)knows
#endif

static void call_all(const dlattn_api *api) {
    int64_t q_shape[] = {1, 1, ROWS, DIM}, k_shape[] = {1, 1, KEYS, DIM};
    DLTensor q = tensor(query, q_shape), k = tensor(key, k_shape), v = tensor(value, k_shape),
             y = tensor(output, q_shape);
    DLManagedTensor mq = {.dl_tensor = q}, mk = {.dl_tensor = k}, mv = {.dl_tensor = v},
                    my = {.dl_tensor = y};
    DLManagedTensorVersioned vq = {.version = {1, 0}, .dl_tensor = q},
                             vk = {.version = {1, 0}, .dl_tensor = k},
                             vv = {.version = {1, 0}, .dl_tensor = v},
                             vy = {.version = {1, 0}, .dl_tensor = y};
    const int stub = strcmp(api->version(), "stub") == 0,
              knows = api->abi_minor >= DLATTN_ABI_MINOR;
    static _Alignas(64) unsigned char workspace[1 << 20];
    dlattn_forward_desc desc = {.struct_size = sizeof desc, .num_threads = 2};
    dlattn_tensors tensors = {
        .struct_size = sizeof tensors, .query = &q, .key = &k, .value = &v, .output = &y};
    dlattn_managed_tensors managed = {
        .struct_size = sizeof managed, .query = &mq, .key = &mk, .value = &mv, .output = &my};
    dlattn_versioned_tensors versioned = {
        .struct_size = sizeof versioned, .query = &vq, .key = &vk, .value = &vv, .output = &vy};
    dlattn_exec exec = {
        .struct_size = sizeof exec, .workspace = workspace, .workspace_bytes = sizeof workspace};
    dlattn_sku sku = {.struct_size = sizeof sku};
    dlattn_kernel_info kernel = {.struct_size = sizeof kernel};
    dlattn_device_info device = {.struct_size = sizeof device};
    dlattn_plan *plan = NULL;

    check(api->abi_major == 1 && api->struct_size >= 144, "the table", api);
    check(strcmp(api->status_name(DLATTN_OK), "ok") == 0, "status_name", api);
    check(api->forward_query(&desc, &tensors, &sku) == DLATTN_OK, "forward_query", api);
    check(sku.struct_size == sizeof sku && sku.kernel && sku.workspace_bytes <= sizeof workspace,
          "the sku", api);
    EXPECT_TAIL(desc, 1, api->forward_query(&desc, &tensors, &sku));
    EXPECT_TAIL(tensors, &q, api->forward_query(&desc, &tensors, &sku));
#ifdef DLATTN_FUTURE
    check(knows || sku.future == 0, "an older library must leave what it does not know", api);
#endif
    if (stub)
        return;
    EXPECT_TAIL(desc, 1, api->forward(&desc, &tensors, &exec));
    EXPECT_TAIL(tensors, &q, api->forward(&desc, &tensors, &exec));
    EXPECT_TAIL(exec, 1, api->forward(&desc, &tensors, &exec));
    EXPECT_TAIL(managed, &mq, api->forward_managed(&desc, &managed, &exec));
    EXPECT_TAIL(exec, 1, api->forward_managed(&desc, &managed, &exec));
    EXPECT_TAIL(versioned, &vq, api->forward_versioned(&desc, &versioned, &exec));
    EXPECT_TAIL(exec, 1, api->forward_versioned(&desc, &versioned, &exec));
    EXPECT_TAIL(tensors, &q, api->plan_create(&desc, &tensors, &plan));
    api->plan_destroy(plan);
    plan = NULL;
    memset(output, 0, sizeof output);
    check(api->forward(&desc, &tensors, &exec) == DLATTN_OK && right(), "forward", api);
    memset(output, 0, sizeof output);
    check(api->forward_managed(&desc, &managed, &exec) == DLATTN_OK && right(), "forward_managed",
          api);
    memset(output, 0, sizeof output);
    check(api->forward_versioned(&desc, &versioned, &exec) == DLATTN_OK && right(),
          "forward_versioned", api);
    memset(output, 0, sizeof output);
    check(api->plan_create(&desc, &tensors, &plan) == DLATTN_OK, "plan_create", api);
    EXPECT_TAIL_AS(DLATTN_INVALID_ARGUMENT, tensors, &q, api->plan_can_run(plan, &tensors));
    EXPECT_TAIL_AS(DLATTN_INVALID_ARGUMENT, tensors, &q, api->plan_run(plan, &tensors, &exec));
    EXPECT_TAIL(exec, 1, api->plan_run(plan, &tensors, &exec));
    memset(output, 0, sizeof output);
    check(api->plan_can_run(plan, &tensors) == DLATTN_OK, "plan_can_run", api);
    check(api->plan_sku(plan, &sku) == DLATTN_OK, "plan_sku", api);
    check(api->plan_run(plan, &tensors, &exec) == DLATTN_OK && right(), "plan_run", api);
    api->plan_destroy(plan);
    check(api->kernel_count() >= 1 && api->kernel_info(0, &kernel) == DLATTN_OK && kernel.name,
          "kernel_info", api);
    check(api->device_count() >= 1 && api->device_info(0, &device) == DLATTN_OK &&
              device.device_type == kDLCPU,
          "device_info", api);
#ifdef DLATTN_FUTURE
    check(knows || (kernel.future == 0 && device.future == 0),
          "an older library must leave what it does not know", api);
#endif
}

int main(void) {
    char why[4096];
    const dlattn_api *api = dlattn_open(why, sizeof why);
    if (!api) {
        printf("%s", why);
        return 2;
    }
    call_all(api);
    printf("%s %s\n", failed ? "failed" : "ok", api->version());
    return failed;
}
