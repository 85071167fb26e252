/*
 * What only a GPU has: streams, graphs, contexts, devices of pointers, and races that show in one run of a thousand.
 */
#include "tests/gpu/attention.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Tests ------------------------------------------------------------------------------------ */

/* Unaligned tails, two steps in flight and more blocks than multiprocessors, or keys in several splits: where a missing
 * barrier would show. */
Test(gpu, same_bits_a_thousand_times) {
    const dlattn_api *api = gpu_api();
    static const int64_t dims[] = {64, 96, 128, 192, 256};
    static const struct {
        const char *kernel;
        const DLDataType *dtype;
        int64_t batch, heads, max_head_dim;
    } rows[] = {{"cuda_fwd_sm80", &f16, 3, 16, 256},
                {"cuda_decode_sm80", &f16, 1, 2, 256},
                {"cuda_fwd_split_sm90", &f16, 1, 2, 256},
                {"cuda_fwd_pair_sm90", &f16, 1, 2, 128},
                {NULL, &f16, 3, 16, 256},
                {NULL, &f32, 3, 16, 256}};
    enum { ROWS = sizeof rows / sizeof rows[0] };
    for (size_t n = 0; n < ROWS * sizeof dims / sizeof dims[0]; n++) {
        struct attention a;
        if (dims[n / ROWS] > rows[n % ROWS].max_head_dim)
            continue;
        make_on(&a, 0, *rows[n % ROWS].dtype,
                (const int64_t[]){rows[n % ROWS].batch, rows[n % ROWS].heads, 333, dims[n / ROWS]},
                n);
        a.desc.kernel = rows[n % ROWS].kernel;
        MUST(forward(api, &a, NULL));
        unsigned char *const first = result(&a);
        for (int run = 1; run < 1000; run++) {
            MUST(forward(api, &a, NULL));
            if (run % 20)
                continue;
            unsigned char *const again = result(&a);
            cr_assert(memcmp(first, again, a.bytes) == 0, "head dim %d, run %d",
                      (int)dims[n / ROWS], run);
            free(again);
            poison(&a);
        }
        free(first);
        drop(&a);
    }
}

static bool is_zero(const unsigned char *device, size_t bytes) {
    unsigned char *const image = malloc(bytes), any = 0;
    cr_assert(image != NULL);
    cuda_fetch(image, device, bytes);
    for (size_t i = 0; i < bytes; i++)
        any |= image[i];
    free(image);
    return any == 0;
}

/* Runs twice over a workspace that is cleared once, and once over one of ones: the same bits, and zeros where there were zeros. */
static void check_over_zeros(const dlattn_api *api, struct attention *a) {
    unsigned char *const workspace = a->workspace, *const zeros = cuda_take(WORKSPACE_BYTES);
    unsigned char *const image = calloc(1, WORKSPACE_BYTES);
    cr_assert(image != NULL);
    cuda_store(zeros, image, WORKSPACE_BYTES);
    memset(image, 0xff, WORKSPACE_BYTES);
    cuda_store(workspace, image, WORKSPACE_BYTES);
    free(image);
    poison(a);
    MUST(forward(api, a, NULL));
    unsigned char *const wanted = result(a);
    for (int run = 0; run < 2; run++) {
        const dlattn_exec exec = {.struct_size = sizeof exec,
                                  .flags = DLATTN_WORKSPACE_IS_ZERO,
                                  .workspace = zeros,
                                  .workspace_bytes = WORKSPACE_BYTES};
        poison(a);
        MUST(api->forward(&a->desc, &a->tensors, &exec));
        unsigned char *const got = result(a);
        cr_expect(memcmp(wanted, got, a->bytes) == 0, "run %d", run);
        cr_expect(is_zero(zeros, WORKSPACE_BYTES), "run %d", run);
        free(got);
    }
    free(wanted);
    cuda_give(zeros);
}

/* Keys in splits, which the last block of a tile merges where the workspace is known to be zero, or a second kernel where they have many
 * rows; splits that end behind the last key. */
Test(gpu, decoding_over_zeros) {
    const dlattn_api *api = gpu_api();
    static const int64_t dims[] = {64, 128, 256};
    static const struct {
        int64_t keys, rows;
    } shapes[] = {{1100, 3}, {2000, 12}, {600, 600}, {2000, 300}};
    enum { SHAPES = sizeof shapes / sizeof shapes[0] };
    static const int32_t lengths[] = {2000, 130};
    int64_t batch = 2;
    const DLTensor key_lengths = {.data = cuda_take(sizeof lengths),
                                  .device = {kDLCUDA, 0},
                                  .ndim = 1,
                                  .dtype = {kDLInt, 32, 1},
                                  .shape = &batch};
    cuda_store(key_lengths.data, lengths, sizeof lengths);
    for (size_t n = 0; n < SHAPES * sizeof dims / sizeof dims[0]; n++) {
        struct attention a;
        int64_t few[4] = {batch, 2, shapes[n % SHAPES].rows, dims[n / SHAPES]};
        make_on(&a, 0, f16, (const int64_t[]){batch, 2, shapes[n % SHAPES].keys, few[3]}, n);
        a.tensor[0].shape = a.tensor[3].shape = few;
        a.desc.kernel = "cuda_decode_sm80";
        a.desc.causal = few[2] > 12;
        check_over_zeros(api, &a);
        a.tensors.key_lengths = &key_lengths;
        check_over_zeros(api, &a);
        drop(&a);
    }
}

/* Self-attention, its gradients, and what they are made from besides. */
struct training {
    struct attention a, other; /* other: d_output, d_query, d_key, d_value */
    DLTensor lse;
    dlattn_gradients gradients;
    dlattn_exec exec;
};

static void make_training(const dlattn_api *api, struct training *t, const dlattn_kernel_info *row,
                          const int64_t shape[4]) {
    make_on(&t->a, 0, dtype_of(row), shape, 21);
    make_on(&t->other, 0, dtype_of(row), shape, 22);
    t->lse = (DLTensor){.data = cuda_take((size_t)(shape[0] * shape[1] * shape[2]) * sizeof(float)),
                        .device = {kDLCUDA, 0},
                        .ndim = 3,
                        .dtype = f32,
                        .shape = t->a.shape};
    t->a.tensors.lse = &t->lse;
    MUST(forward(api, &t->a, NULL));
    t->gradients = (dlattn_gradients){.struct_size = sizeof t->gradients,
                                      .d_output = &t->other.tensor[0],
                                      .d_query = &t->other.tensor[1],
                                      .d_key = &t->other.tensor[2],
                                      .d_value = &t->other.tensor[3]};
    t->a.desc.kernel = row->name;
    dlattn_sku sku = {.struct_size = sizeof sku};
    MUST(api->backward_query(&t->a.desc, &t->a.tensors, &t->gradients, &sku));
    t->exec = (dlattn_exec){.struct_size = sizeof t->exec,
                            .workspace = cuda_take(sku.workspace_bytes),
                            .workspace_bytes = sku.workspace_bytes};
}

static void drop_training(struct training *t) {
    cuda_give(t->exec.workspace);
    cuda_give(t->lse.data);
    drop(&t->a);
    drop(&t->other);
}

/* d_query, d_key and d_value one after the other, freshly allocated. */
static unsigned char *gradients_of(const struct training *t) {
    unsigned char *const image = malloc(3 * t->a.bytes);
    cr_assert(image != NULL);
    cuda_wait();
    for (int i = 0; i < 3; i++)
        cuda_fetch(image + (size_t)i * t->a.bytes, t->other.tensor[1 + i].data, t->a.bytes);
    return image;
}

static void poison_gradients(const struct training *t) {
    unsigned char *const image = malloc(t->a.bytes);
    cr_assert(image != NULL);
    memset(image, 0xff, t->a.bytes);
    for (int i = 1; i < 4; i++)
        cuda_store(t->other.tensor[i].data, image, t->a.bytes);
    free(image);
}

static void repeat_gradients(const dlattn_api *api, const dlattn_kernel_info *row, int64_t dim,
                             const struct attention *meanwhile, void *stream) {
    struct training t;
    fprintf(stderr, "%s, head dim %d\n", row->name, (int)dim);
    make_training(api, &t, row, (const int64_t[]){3, 8, 333, dim});
    unsigned char *first = NULL;
    for (int run = 0; run < 1000; run++) {
        if (run % 3 == 0)
            MUST(forward(api, meanwhile, stream));
        MUST(api->backward(&t.a.desc, &t.a.tensors, &t.gradients, &t.exec));
        if (run % 20)
            continue;
        unsigned char *const again = gradients_of(&t);
        if (!first) {
            first = again;
            continue;
        }
        cr_assert(memcmp(first, again, 3 * t.a.bytes) == 0, "%s, head dim %d, run %d", row->name,
                  (int)dim, run);
        free(again);
        poison_gradients(&t);
    }
    free(first);
    drop_training(&t);
}

/* The next of the GPU's backward rows that run here, from number *i on. */
static bool next_backward(const dlattn_api *api, int32_t *i, dlattn_kernel_info *row) {
    for (; *i < api->kernel_count(); ++*i) {
        *row = (dlattn_kernel_info){.struct_size = sizeof *row};
        MUST(api->kernel_info(*i, row));
        if (strcmp(row->backend, "cuda") == 0 && strcmp(row->operation, "backward") == 0 &&
            row->available)
            return true;
    }
    return false;
}

/* Sums of many blocks come in another order each time, above all while other work holds multiprocessors. */
Test(gpu, same_gradients_a_thousand_times) {
    const dlattn_api *api = gpu_api();
    struct attention meanwhile;
    make(&meanwhile, 1, 4, 700, 64, 23);
    meanwhile.desc.kernel = row_if_here(api, "cuda_fwd_pair_sm90");
    void *const stream = cuda_stream();
    dlattn_kernel_info row;
    for (int32_t i = 0; next_backward(api, &i, &row); i++)
        for (int64_t dim = 64; dim <= 256; dim += 64)
            repeat_gradients(api, &row, dim, &meanwhile, stream);
    cuda_wait();
    drop(&meanwhile);
}

Test(gpu, gradients_in_a_graph) {
    const dlattn_api *api = gpu_api();
    void *const stream = cuda_stream();
    dlattn_kernel_info row;
    for (int32_t i = 0; next_backward(api, &i, &row); i++) {
        struct training t;
        make_training(api, &t, &row, (const int64_t[]){2, 4, 300, 64});
        MUST(api->backward(&t.a.desc, &t.a.tensors, &t.gradients, &t.exec));
        unsigned char *const direct = gradients_of(&t);
        t.exec.stream = stream;
        cuda_record_begin(stream);
        const int32_t status = api->backward(&t.a.desc, &t.a.tensors, &t.gradients, &t.exec);
        void *const graph = cuda_record_end(stream);
        MUST(status);
        for (int replay = 0; replay < 3; replay++) {
            poison_gradients(&t);
            cuda_replay(graph, stream);
            unsigned char *const replayed = gradients_of(&t);
            cr_expect(memcmp(direct, replayed, 3 * t.a.bytes) == 0, "%s, replay %d", row.name,
                      replay);
            free(replayed);
        }
        free(direct);
        drop_training(&t);
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

/* Each row, recorded once and replayed on lengths that change in between. */
Test(gpu, every_row_in_a_graph) {
    const dlattn_api *api = gpu_api();
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        static const int32_t long_lengths[] = {300, 90}, short_lengths[] = {17, 0};
        int64_t batch = 2;
        struct attention recorded, direct;
        make_on(&recorded, 0, dtype_of(&rows[row]), (const int64_t[]){2, 4, 300, 64}, 8);
        make_on(&direct, 0, dtype_of(&rows[row]), (const int64_t[]){2, 4, 300, 64}, 8);
        unsigned char *const lengths = cuda_take(sizeof long_lengths);
        const DLTensor key_lengths = {.data = lengths,
                                      .device = {kDLCUDA, 0},
                                      .ndim = 1,
                                      .dtype = {kDLInt, 32, 1},
                                      .shape = &batch};
        recorded.tensors.key_lengths = direct.tensors.key_lengths = &key_lengths;
        recorded.desc.kernel = direct.desc.kernel = rows[row].name;
        cuda_store(lengths, long_lengths, sizeof long_lengths);
        void *const stream = cuda_stream();
        cuda_record_begin(stream);
        const int32_t status = forward(api, &recorded, stream);
        void *const graph = cuda_record_end(stream);
        MUST(status);
        for (int replay = 0; replay < 3; replay++) {
            cuda_store(lengths, replay == 1 ? short_lengths : long_lengths, sizeof long_lengths);
            poison(&recorded);
            cuda_replay(graph, stream);
            MUST(forward(api, &direct, NULL));
            cr_expect(same_result(&recorded, &direct), "%s, replay %d", rows[row].name, replay);
        }
    }
}

/* Lengths in device memory are not known to the host: the kernel itself must stay inside the tensors. */
Test(gpu, lengths_past_the_extents) {
    static const int32_t wild[] = {100, 101, INT32_MAX, -1, INT32_MIN, 3},
                         clamped[] = {100, 100, 100, 0, 0, 3};
    const dlattn_api *api = gpu_api();
    dlattn_kernel_info rows[MAX_ROWS];
    int64_t batch = 6;
    DLTensor lengths[2];
    for (int i = 0; i < 2; i++) {
        lengths[i] = (DLTensor){.data = cuda_take(sizeof wild),
                                .device = {kDLCUDA, 0},
                                .ndim = 1,
                                .dtype = {kDLInt, 32, 1},
                                .shape = &batch};
        cuda_store(lengths[i].data, i ? clamped : wild, sizeof wild);
    }
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        for (int which = 1; which <= 3; which++) { /* of keys, of queries, of both */
            struct attention a[2];
            for (int i = 0; i < 2; i++) {
                make_on(&a[i], 0, dtype_of(&rows[row]), (const int64_t[]){6, 2, 100, 64}, 9);
                a[i].desc.kernel = rows[row].name;
                a[i].desc.alignment = DLATTN_ALIGN_BOTTOM_RIGHT;
                a[i].tensors.key_lengths = which & 1 ? &lengths[i] : NULL;
                a[i].tensors.query_lengths = which & 2 ? &lengths[i] : NULL;
                poison(&a[i]);
                MUST(forward(api, &a[i], NULL));
            }
            cr_expect(same_result(&a[0], &a[1]), "%s, lengths %d", rows[row].name, which);
            drop(&a[0]);
            drop(&a[1]);
        }
    }
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
    cuda_use(-1);
    MUST(forward(api, &a, NULL));
    cuda_use(0);
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
    cuda_use(w->attention.tensor[0].device.device_id);
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

/* ---- More heads than a grid has rows ---------------------------------------------------------- */

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

/* ---- Numbers that have no two parts ----------------------------------------------------------- */

/* cuda_fwd_tf32x3 splits each number in two, which Inf, and what rounds to it, does not survive. */
Test(gpu, f32_at_the_end_of_its_range) {
    const dlattn_api *api = gpu_api();
    static const double numbers[] = {INFINITY, -INFINITY, FLT_MAX, -FLT_MAX};
    for (uint64_t seed = 0; seed < 24; seed++) {
        struct verdict v;
        const struct subject subject = {.api = api, .place = &place_gpu};
        struct test_case c = {.shape = {2, 2, 1, 70, 90, 64, 40},
                              .features = {.causal = seed % 3, .lse = LSE_F32},
                              .element = F32,
                              .seed = seed};
        c.features.planted = numbers[seed % 4];
        /* q k of FLT_MAX may overflow in any f32 */
        c.features.nan = seed % 4 < 2 && seed % 8 < 4 ? NAN_KEY : NAN_VALUE;
        check_case(&v, &subject, &c);
        cr_expect(eq(int, v.outcome, PASSED), "%g in a %s: %s", c.features.planted,
                  c.features.nan == NAN_KEY ? "key" : "value", v.text);
    }
}

/* ---- Tensors that the caller gives away --------------------------------------------------------- */

/* What the deleters of query, key, value and output see: how often each ran, and the output at that moment. */
static struct {
    int deleted[4];
    unsigned char *data[4], *output;
    size_t bytes;
} given;

/* The stream does not wait for others, nor do they for it: a kernel that still ran would show. */
static void take_away(intptr_t t) {
    if (given.deleted[t]++ == 0 && t == 3)
        cuda_fetch(given.output, given.data[t], given.bytes);
    if (given.deleted[t] == 1)
        cuda_give(given.data[t]);
}
static void delete_managed(DLManagedTensor *m) { take_away((intptr_t)m->manager_ctx); }
static void delete_versioned(struct DLManagedTensorVersioned *m) {
    take_away((intptr_t)m->manager_ctx);
}

static int32_t forward_given(const dlattn_api *api, struct attention *a, bool versioned,
                             const dlattn_exec *exec) {
    DLManagedTensor m[4];
    struct DLManagedTensorVersioned v[4];
    memset(&given, 0, sizeof given);
    given.bytes = a->bytes;
    given.output = malloc(a->bytes);
    cr_assert(given.output != NULL);
    for (int t = 0; t < 4; t++) {
        given.data[t] = a->tensor[t].data;
        m[t] = (DLManagedTensor){a->tensor[t], (void *)(intptr_t)t, delete_managed};
        v[t] = (struct DLManagedTensorVersioned){.version = {DLPACK_MAJOR_VERSION, 0},
                                                 .manager_ctx = (void *)(intptr_t)t,
                                                 .deleter = delete_versioned,
                                                 .dl_tensor = a->tensor[t]};
    }
    const dlattn_managed_tensors managed = {.struct_size = sizeof managed,
                                            .query = &m[0],
                                            .key = &m[1],
                                            .value = &m[2],
                                            .output = &m[3]};
    const dlattn_versioned_tensors newer = {
        .struct_size = sizeof newer, .query = &v[0], .key = &v[1], .value = &v[2], .output = &v[3]};
    return versioned ? api->forward_versioned(&a->desc, &newer, exec)
                     : api->forward_managed(&a->desc, &managed, exec);
}

static void expect_deleted(int times, const char *when) {
    for (int t = 0; t < 4; t++)
        cr_expect(eq(int, given.deleted[t], times), "%s: tensor %d", when, t);
}

/* Their memory is free when the call returns, and the output was there by then. */
Test(gpu, takes_ownership) {
    const dlattn_api *api = gpu_api();
    const int64_t shape[4] = {2, 16, 4096, 64};
    struct attention kept;
    make_on(&kept, 0, f16, shape, 14);
    MUST(forward(api, &kept, NULL));
    unsigned char *const want = result(&kept);
    for (int versioned = 0; versioned < 2; versioned++) {
        struct attention a;
        dlattn_exec exec = {.struct_size = sizeof exec,
                            .stream = cuda_stream(),
                            .workspace = kept.workspace,
                            .workspace_bytes = WORKSPACE_BYTES};
        make_on(&a, 0, f16, shape, 14);
        poison(&a);
        MUST(forward_given(api, &a, versioned, &exec));
        cuda_wait();
        expect_deleted(0, "not given away");
        exec.flags = DLATTN_TAKE_OWNERSHIP;
        poison(&a);
        MUST(forward_given(api, &a, versioned, &exec));
        expect_deleted(1, "given away");
        cr_expect(memcmp(given.output, want, a.bytes) == 0, "versioned %d", versioned);
        make_on(&a, 0, f16, (const int64_t[]){1, 2, 16, 64}, 14);
        a.desc.softcap = -1;
        cr_expect(eq(int, forward_given(api, &a, versioned, &exec), DLATTN_INVALID_ARGUMENT));
        expect_deleted(1, "refused");
    }
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

/* A workspace that this kernel needs not, but which is no memory of its device. */
Test(gpu, refuses_workspace_in_host_memory) {
    const dlattn_api *api = gpu_api();
    struct attention a;
    make(&a, 1, 1, 16, 64, 6);
    dlattn_exec exec = {.struct_size = sizeof exec, .workspace_bytes = 4096};
    exec.workspace = malloc(exec.workspace_bytes);
    cr_expect(eq(int, api->forward(&a.desc, &a.tensors, &exec), DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "workspace") != NULL, "%s", api->last_error());
    cr_expect(strstr(api->last_error(), "host") != NULL, "%s", api->last_error());
}

/* The legacy stream may not be used while one that takes turns with it is recorded: the driver refuses the launch.
 * Its words reach the caller, and the next call finds everything as it was. */
Test(gpu, error_of_the_driver) {
    const dlattn_api *api = gpu_api();
    struct attention a;
    make(&a, 1, 2, 130, 64, 10);
    MUST(forward(api, &a, NULL));
    unsigned char *const want = result(&a);
    void *const stream = cuda_stream_with_default();
    cuda_record_begin(stream);
    const int32_t status = forward(api, &a, NULL);
    char said[256];
    snprintf(said, sizeof said, "%s", api->last_error());
    cuda_record_give_up(stream);
    cr_expect(eq(int, status, DLATTN_DEVICE_ERROR));
    cr_expect(strstr(said, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT") != NULL, "%s", said);
    cr_expect(strstr(said, "cuda_decode") || strstr(said, "cuda_fwd"), "%s", said);
    poison(&a);
    MUST(forward(api, &a, NULL));
    unsigned char *const got = result(&a);
    cr_expect(memcmp(got, want, a.bytes) == 0);
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

/* ---- Two devices ------------------------------------------------------------------------------ */

/* Each row on both, by one thread whose context is one or the other's, and by two threads at once. */
Test(gpu, two_devices) {
    const dlattn_api *api = api_of_two();
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        struct worker workers[2];
        pthread_t threads[2];
        for (int device = 0; device < 2; device++) {
            workers[device] = (struct worker){.api = api};
            make_on(&workers[device].attention, device, dtype_of(&rows[row]),
                    (const int64_t[]){2, 4, 150, 64}, 11);
            workers[device].attention.desc.kernel = rows[row].name;
        }
        for (int current = 0; current < 2; current++) {
            for (int device = 0; device < 2; device++) {
                poison(&workers[device].attention);
                cuda_use(current);
                MUST(forward(api, &workers[device].attention, NULL));
            }
            cr_expect(same_result(&workers[0].attention, &workers[1].attention), "%s, context %d",
                      rows[row].name, current);
        }
        for (int device = 0; device < 2; device++)
            poison(&workers[device].attention);
        for (int device = 0; device < 2; device++)
            cr_assert(pthread_create(&threads[device], NULL, call_often, &workers[device]) == 0);
        for (int device = 0; device < 2; device++) {
            pthread_join(threads[device], NULL);
            cr_expect(eq(int, workers[device].status, DLATTN_OK));
        }
        cr_expect(same_result(&workers[0].attention, &workers[1].attention), "%s, two threads",
                  rows[row].name);
    }
}

/* What lies on another device is refused: by what the tensor says, and by what the driver says of its memory. */
Test(gpu, refuses_tensors_of_two_devices) {
    const dlattn_api *api = api_of_two();
    struct attention here, there;
    make_on(&there, 1, f16, (const int64_t[]){1, 2, 130, 64}, 12);
    make_on(&here, 0, f16, (const int64_t[]){1, 2, 130, 64}, 12);
    here.tensors.key = &there.tensor[1];
    cr_expect(eq(int, forward(api, &here, NULL), DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "key: is on cuda 1") != NULL, "%s", api->last_error());
    there.tensor[1].device.device_id = 0;
    cr_expect(eq(int, forward(api, &here, NULL), DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "memory of CUDA device 1") != NULL, "%s",
              api->last_error());
    here.tensors.key = &here.tensor[1];
    const dlattn_exec exec = {
        .struct_size = sizeof exec, .workspace = there.tensor[0].data, .workspace_bytes = 4096};
    cr_expect(eq(int, api->forward(&here.desc, &here.tensors, &exec), DLATTN_INVALID_ARGUMENT));
    cr_expect(strstr(api->last_error(), "workspace") != NULL, "%s", api->last_error());
    MUST(forward(api, &here, NULL));
    cuda_wait();
}
