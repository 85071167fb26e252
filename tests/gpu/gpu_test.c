/*
 * What only a GPU has: streams, graphs, contexts, devices of pointers, and races that show in one run of a thousand.
 */
#include "tests/gpu/cuda.h"
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* ---- A problem on the device ------------------------------------------------------------------ */

/* Self-attention of [B, H, L, D]: query, key, value and output in that order, compact. */
struct attention {
    int64_t shape[4];
    size_t bytes; /* of one tensor */
    DLTensor tensor[4];
    dlattn_tensors tensors;
    dlattn_forward_desc desc;
};

static void make(struct attention *a, int64_t batch, int64_t heads, int64_t length, int64_t dim,
                 uint64_t seed) {
    *a = (struct attention){.shape = {batch, heads, length, dim},
                            .bytes = (size_t)(batch * heads * length * dim) * 2,
                            .tensors = {.struct_size = sizeof a->tensors},
                            .desc = {.struct_size = sizeof a->desc, .causal = 1}};
    uint16_t *const image = malloc(a->bytes);
    cr_assert(image && cuda_open() > 0);
    for (int t = 0; t < 4; t++) {
        for (size_t i = 0; i < a->bytes / 2; i++) /* f16 from -2 to 2 */
            image[i] = (uint16_t)(0x3000 + random_below(seed + (uint64_t)t, i, 0x1000) +
                                  0x8000 * random_below(seed, i, 2));
        a->tensor[t] = (DLTensor){.data = cuda_take(a->bytes),
                                  .device = {kDLCUDA, 0},
                                  .ndim = 4,
                                  .dtype = {kDLFloat, 16, 1},
                                  .shape = a->shape};
        cuda_store(a->tensor[t].data, image, a->bytes);
    }
    a->tensors.query = &a->tensor[0];
    a->tensors.key = &a->tensor[1];
    a->tensors.value = &a->tensor[2];
    a->tensors.output = &a->tensor[3];
    free(image);
}

static void drop(struct attention *a) {
    for (int t = 0; t < 4; t++)
        cuda_give(a->tensor[t].data);
}

static int32_t forward(const dlattn_api *api, const struct attention *a, void *stream) {
    const dlattn_exec exec = {.struct_size = sizeof exec, .stream = stream};
    return api->forward(&a->desc, &a->tensors, &exec);
}

/* The output, freshly allocated. */
static unsigned char *result(const struct attention *a) {
    unsigned char *const image = malloc(a->bytes);
    cr_assert(image != NULL);
    cuda_wait();
    cuda_fetch(image, a->tensor[3].data, a->bytes);
    return image;
}

static void poison(const struct attention *a) {
    unsigned char *const image = malloc(a->bytes);
    cr_assert(image != NULL);
    memset(image, 0xff, a->bytes);
    cuda_store(a->tensor[3].data, image, a->bytes);
    free(image);
}

static const dlattn_api *gpu_api(void) {
    if (cuda_open() == 0)
        cr_skip_test("no NVIDIA device");
    return test_api();
}

#define MUST(call) cr_assert(eq(int, (call), DLATTN_OK), "%s", api->last_error())

/* ---- Tests ------------------------------------------------------------------------------------ */

/* Unaligned tails, two steps in flight and more blocks than multiprocessors: where a missing barrier would show. */
Test(gpu, same_bits_a_thousand_times) {
    const dlattn_api *api = gpu_api();
    static const int64_t dims[] = {64, 96, 128, 192, 256};
    static const char *const kernels[] = {"cuda_fwd_sm80", NULL};
    for (size_t n = 0; n < 2 * sizeof dims / sizeof dims[0]; n++) {
        struct attention a;
        make(&a, 3, 16, 333, dims[n / 2], n);
        a.desc.kernel = kernels[n % 2];
        MUST(forward(api, &a, NULL));
        unsigned char *const first = result(&a);
        for (int run = 1; run < 1000; run++) {
            MUST(forward(api, &a, NULL));
            if (run % 20)
                continue;
            unsigned char *const again = result(&a);
            cr_assert(memcmp(first, again, a.bytes) == 0, "head dim %d, run %d", (int)dims[n / 2],
                      run);
            free(again);
            poison(&a);
        }
        free(first);
        drop(&a);
    }
}

/* The very first call of the process is recorded: loading the code must be legal while a stream is captured. */
Test(gpu, first_call_in_a_graph) {
    const dlattn_api *api = gpu_api();
    struct attention a;
    make(&a, 1, 4, 200, 64, 1);
    void *const stream = cuda_stream();
    poison(&a);
    cuda_record_begin(stream);
    const int32_t status = forward(api, &a, stream);
    void *const graph = cuda_record_end(stream);
    MUST(status);
    cuda_replay(graph, stream);
    unsigned char *const replayed = result(&a);
    poison(&a);
    cuda_replay(graph, stream);
    unsigned char *const again = result(&a);
    poison(&a);
    MUST(forward(api, &a, NULL));
    unsigned char *const direct = result(&a);
    cr_expect(memcmp(replayed, direct, a.bytes) == 0);
    cr_expect(memcmp(again, direct, a.bytes) == 0);
}

/* The caller's special streams: legacy default, per-thread default, and one of its own. */
Test(gpu, streams) {
    const dlattn_api *api = gpu_api();
    struct attention a;
    make(&a, 1, 2, 130, 128, 2);
    MUST(forward(api, &a, NULL));
    unsigned char *const want = result(&a);
    void *const streams[] = {(void *)1, (void *)2, cuda_stream()};
    for (int i = 0; i < 3; i++) {
        poison(&a);
        MUST(forward(api, &a, streams[i]));
        unsigned char *const got = result(&a);
        cr_expect(memcmp(got, want, a.bytes) == 0, "stream %d", i);
        free(got);
    }
}

/* A thread without a context gets the device's primary one, and has none afterwards. */
Test(gpu, no_context) {
    const dlattn_api *api = gpu_api();
    struct attention a;
    make(&a, 1, 2, 130, 64, 3);
    MUST(forward(api, &a, NULL));
    unsigned char *const want = result(&a);
    poison(&a);
    cuda_wait();
    cuda_make_current(false);
    MUST(forward(api, &a, NULL));
    cuda_make_current(true);
    unsigned char *const got = result(&a);
    cr_expect(memcmp(got, want, a.bytes) == 0);
}

/* ---- Threads with different head dims at once: shared memory limits must not race ------------- */

struct worker {
    const dlattn_api *api;
    struct attention attention;
    int32_t status;
};

static void *call_often(void *ctx) {
    struct worker *const w = ctx;
    void *stream;
    cuda_make_current(true);
    stream = cuda_stream();
    for (int i = 0; i < 50 && w->status == DLATTN_OK; i++)
        w->status = forward(w->api, &w->attention, stream);
    return NULL;
}

Test(gpu, threads) {
    enum { WORKERS = 8 };
    static const int64_t dims[WORKERS] = {32, 64, 96, 128, 160, 192, 224, 256};
    const dlattn_api *api = gpu_api();
    struct worker workers[WORKERS];
    pthread_t threads[WORKERS];
    for (int i = 0; i < WORKERS; i++) {
        workers[i] = (struct worker){.api = api};
        make(&workers[i].attention, 1, 4, 257, dims[i], (uint64_t)i);
        cr_assert(pthread_create(&threads[i], NULL, call_often, &workers[i]) == 0);
    }
    for (int i = 0; i < WORKERS; i++) {
        pthread_join(threads[i], NULL);
        cr_expect(eq(int, workers[i].status, DLATTN_OK), "head dim %d", (int)dims[i]);
    }
    for (int i = 0; i < WORKERS; i++) {
        unsigned char *const got = result(&workers[i].attention);
        poison(&workers[i].attention);
        MUST(forward(api, &workers[i].attention, NULL));
        unsigned char *const want = result(&workers[i].attention);
        cr_expect(memcmp(got, want, workers[i].attention.bytes) == 0, "head dim %d", (int)dims[i]);
    }
}

/* ---- More heads than a grid has rows, and addresses past 2^31 elements ------------------------ */

/* Every head has the same query, key and value, so every head must have the same output. */
Test(gpu, seventy_thousand_heads) {
    const dlattn_api *api = gpu_api();
    enum { HEADS = 70000, DIM = 64 };
    struct attention a;
    int64_t shape[4] = {1, HEADS, 1, DIM}, shared[4] = {0, 0, DIM, 1};
    make(&a, 1, 1, 1, DIM, 4);
    const size_t bytes = (size_t)HEADS * DIM * 2;
    DLTensor output = a.tensor[3];
    output.data = cuda_take(bytes);
    output.shape = a.tensor[0].shape = a.tensor[1].shape = a.tensor[2].shape = shape;
    a.tensor[0].strides = a.tensor[1].strides = a.tensor[2].strides = shared;
    a.tensors.output = &output;
    MUST(forward(api, &a, NULL));
    cuda_wait();
    unsigned char *const image = malloc(bytes);
    cr_assert(image != NULL);
    cuda_fetch(image, output.data, bytes);
    for (int h = 1; h < HEADS; h++)
        cr_assert(memcmp(image, image + (size_t)h * DIM * 2, DIM * 2) == 0, "head %d", h);
}

Test(gpu, strides_past_two_to_the_31) {
    const dlattn_api *api = gpu_api();
    const int64_t far = INT64_C(3) << 30; /* elements between the two rows: 6 GiB */
    struct attention near, apart;
    int64_t strides[4] = {0, 0, far, 1};
    make(&near, 1, 1, 2, 64, 5);
    near.desc.causal = 0;
    MUST(forward(api, &near, NULL));
    unsigned char *const want = result(&near), *const got = malloc(near.bytes);
    apart = near;
    unsigned char *const memory = cuda_take((size_t)far * 2 + 64 * 2 * 4);
    unsigned char row[2 * 64 * 2];
    for (int t = 0; t < 4; t++) {
        unsigned char *const at = memory + t * 64 * 2;
        cuda_fetch(row, near.tensor[t].data, sizeof row);
        cuda_store(at, row, 64 * 2);
        cuda_store(at + far * 2, row + 64 * 2, 64 * 2);
        apart.tensor[t].data = at;
        apart.tensor[t].strides = strides;
        apart.tensor[t].shape = near.shape;
    }
    apart.tensors.query = &apart.tensor[0];
    apart.tensors.key = &apart.tensor[1];
    apart.tensors.value = &apart.tensor[2];
    apart.tensors.output = &apart.tensor[3];
    MUST(forward(api, &apart, NULL));
    cuda_wait();
    cuda_fetch(got, apart.tensor[3].data, 64 * 2);
    cuda_fetch(got + 64 * 2, (unsigned char *)apart.tensor[3].data + far * 2, 64 * 2);
    cr_expect(memcmp(got, want, near.bytes) == 0);
}

/* ---- Refusals --------------------------------------------------------------------------------- */

Test(gpu, refuses_host_memory) {
    const dlattn_api *api = gpu_api();
    struct attention a;
    make(&a, 1, 1, 16, 64, 6);
    void *const host = malloc(a.bytes);
    a.tensor[1].data = host;
    cr_expect(eq(int, forward(api, &a, NULL), DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "key") != NULL, "%s", api->last_error());
    cr_expect(strstr(api->last_error(), "host") != NULL, "%s", api->last_error());
}

Test(gpu, refuses_absent_device) {
    const dlattn_api *api = gpu_api();
    struct attention a;
    make(&a, 1, 1, 16, 64, 7);
    for (int t = 0; t < 4; t++)
        a.tensor[t].device.device_id = 63;
    cr_expect(eq(int, forward(api, &a, NULL), DLATTN_DEVICE_UNAVAILABLE));
    cr_expect(strstr(api->last_error(), "63") != NULL, "%s", api->last_error());
}
