/*
 * Where tensors lie: far apart, in memory that moves or that the host shares, not aligned as they were planned; and numbers in
 * device memory that point outside of them, which the host cannot check.
 */
#include "tests/gpu/attention.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Offsets past 2^32 bytes and 2^31 elements ------------------------------------------------------------------ */

enum { EXTENT = 2, DIM = 64 };

/* Query, key, value and output of [2, 2, 2, 64], bias and mask of [2, 2, 2, 2], lse of [2, 2, 2]. */
struct spread {
    struct tensor tensor[7];
    int count;
};

static void make_spread(struct spread *s, const dlattn_kernel_info *row, enum element e) {
    /* Both, which cuda_fwd_sm90 does not take of one call. */
    const bool options = row->features & DLATTN_FEATURE_BIAS &&
                         row->features & DLATTN_FEATURE_MASK &&
                         strcmp(row->name, "cuda_fwd_sm90") != 0;
    const int64_t shape[4] = {EXTENT, EXTENT, EXTENT, DIM},
                  keys[4] = {EXTENT, EXTENT, EXTENT, EXTENT};
    s->count = options ? 7 : 5;
    for (int t = 0; t < 4; t++)
        tensor_make(&s->tensor[t], e, 4, shape, COMPACT, 0, OUTPUT_FILL);
    tensor_make(&s->tensor[4], F32, 3, shape, COMPACT, 0, OUTPUT_FILL);
    if (options) {
        tensor_make(&s->tensor[5], F32, 4, keys, COMPACT, 0, 0);
        tensor_make(&s->tensor[6], U8, 4, keys, COMPACT, 0, 0);
    }
    for (int t = 0; t < s->count; t++) {
        int64_t index[4] = {0};
        uint64_t n = 0;
        for (int64_t left = tensor_count(&s->tensor[t]); left > 0 && t != 3 && t != 4;
             left--, tensor_next(&s->tensor[t], index))
            tensor_set(&s->tensor[t], index,
                       t == 6 ? index[3] <= index[2]
                              : (double)random_below((uint64_t)t, n++, 128) / 32 - 2);
    }
}

static dlattn_tensors tensors_of(const struct spread *s) {
    return (dlattn_tensors){.struct_size = sizeof(dlattn_tensors),
                            .query = &s->tensor[0].dl,
                            .key = &s->tensor[1].dl,
                            .value = &s->tensor[2].dl,
                            .output = &s->tensor[3].dl,
                            .lse = &s->tensor[4].dl,
                            .bias = s->count > 5 ? &s->tensor[5].dl : NULL,
                            .mask = s->count > 5 ? &s->tensor[6].dl : NULL};
}

/* The step of an axis of a compact tensor. */
static int64_t compact(const struct tensor *t, int axis) {
    int64_t step = 1;
    for (int a = t->dl.ndim - 1; a > axis; a--)
        step *= t->shape[a];
    return step;
}

/* Copies between the compact image and device memory where the step of one axis is `far` elements and the rest is compact. */
static void copy_spread(struct tensor *t, unsigned char *memory, int axis, int64_t far, bool back) {
    const size_t bytes = element_bytes(t->element);
    const int inner = t->dl.ndim - 1;
    const size_t run = inner == axis ? 1 : (size_t)t->shape[inner];
    int64_t index[4] = {0};
    for (int64_t left = tensor_count(t); left > 0; left -= (int64_t)run) {
        int64_t from = 0, at = 0;
        for (int a = 0; a <= inner; a++) {
            from += index[a] * compact(t, a);
            at += index[a] * (a == axis ? far : compact(t, a));
        }
        unsigned char *const here = t->image + t->first + (size_t)from * bytes;
        if (back)
            cuda_fetch(here, memory + (size_t)at * bytes, run * bytes);
        else
            cuda_store(memory + (size_t)at * bytes, here, run * bytes);
        for (size_t n = 0; n < run; n++)
            tensor_next(t, index);
    }
}

/* Places all tensors in `memory`, runs, and leaves output and lse in their images. */
static void run_spread(const dlattn_api *api, const char *kernel, struct spread *s,
                       unsigned char *memory, int axis, int64_t far) {
    const dlattn_forward_desc desc = {.struct_size = sizeof desc, .kernel = kernel};
    dlattn_sku sku;
    for (int t = 0; t < s->count; t++) {
        struct tensor *const x = &s->tensor[t];
        unsigned char *const at = memory + t * 65536;
        copy_spread(x, at, axis, far, false);
        x->dl.data = at;
        x->dl.byte_offset = 0;
        x->dl.device = (DLDevice){kDLCUDA, 0};
        x->stride[axis] = far;
    }
    const dlattn_tensors tensors = tensors_of(s);
    MUST(run_call(api, &desc, &tensors, &sku));
    for (int t = 3; t <= 4; t++)
        copy_spread(&s->tensor[t], memory + t * 65536, axis, far, true);
}

/* Each axis in turn, of every tensor that has it. */
Test(gpu_memory, strides_past_two_to_the_31_in_every_row) {
    const dlattn_api *api = gpu_api();
    const size_t reach = (size_t)17 << 30;
    unsigned char *const memory = cuda_take(reach + (8 << 20));
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        for (enum element e = F64; e <= BF16; e++) {
            if (!row_takes(&rows[row], e))
                continue;
            /* 2^31 elements or more, and in f16 and f32 2^32: what an int or an unsigned cannot hold */
            const int64_t far = e == F64 ? (INT64_C(1) << 31) + 4096 : (INT64_C(1) << 32) + 4096;
            for (int axis = 0; axis < 3; axis++) {
                struct spread near, apart;
                make_spread(&near, &rows[row], e);
                make_spread(&apart, &rows[row], e);
                run_spread(api, rows[row].name, &near, memory, axis,
                           compact(&near.tensor[0], axis));
                run_spread(api, rows[row].name, &apart, memory, axis, far);
                for (int t = 3; t < 5; t++)
                    cr_expect(memcmp(near.tensor[t].image, apart.tensor[t].image,
                                     near.tensor[t].bytes) == 0,
                              "%s %s, axis %d, %s", rows[row].name, element_name(e), axis,
                              t == 3 ? "output" : "lse");
                for (int t = 0; t < near.count; t++) {
                    tensor_free(&near.tensor[t]);
                    tensor_free(&apart.tensor[t]);
                }
            }
        }
    }
    cuda_give(memory);
}

/* Two parts and their result, outputs before log-sum-exps. */
enum { PARTS = 2, MERGE_TENSORS = 2 * PARTS + 2 };

static void make_parts(struct tensor *t, enum element e) {
    const int64_t shape[4] = {EXTENT, EXTENT, EXTENT, DIM};
    for (int n = 0; n < MERGE_TENSORS; n++) {
        int64_t index[4] = {0};
        tensor_make(&t[n], n < PARTS + 1 ? e : F32, n < PARTS + 1 ? 4 : 3, shape, COMPACT, 0,
                    OUTPUT_FILL);
        for (int64_t i = 0, count = tensor_count(&t[n]); i < count; i++, tensor_next(&t[n], index))
            tensor_set(&t[n], index, (double)random_below((uint64_t)n, (uint64_t)i, 128) / 32 - 2);
    }
}

static void merge_spread(const dlattn_api *api, struct tensor *t, unsigned char *memory, int axis,
                         int64_t far) {
    const DLTensor *dl[MERGE_TENSORS];
    for (int n = 0; n < MERGE_TENSORS; n++) {
        unsigned char *const at = memory + n * 65536;
        copy_spread(&t[n], at, axis, far, false);
        t[n].dl.data = at;
        t[n].dl.byte_offset = 0;
        t[n].dl.device = (DLDevice){kDLCUDA, 0};
        t[n].stride[axis] = far;
        dl[n] = &t[n].dl;
    }
    const dlattn_partials partials = {.struct_size = sizeof partials,
                                      .count = PARTS,
                                      .outputs = dl,
                                      .lses = dl + PARTS + 1,
                                      .output = dl[PARTS],
                                      .lse = dl[2 * PARTS + 1]};
    const dlattn_exec exec = {.struct_size = sizeof exec};
    MUST(api->merge(&partials, &exec));
    cuda_wait();
    for (int n = PARTS; n < MERGE_TENSORS; n += PARTS + 1)
        copy_spread(&t[n], memory + n * 65536, axis, far, true);
}

Test(gpu_memory, merge_of_strides_past_two_to_the_31) {
    const dlattn_api *api = gpu_api();
    unsigned char *const memory = cuda_take(((size_t)17 << 30) + (8 << 20));
    for (enum element e = F32; e <= BF16; e++) {
        for (int axis = 0; axis < 3; axis++) {
            struct tensor near[MERGE_TENSORS], apart[MERGE_TENSORS];
            make_parts(near, e);
            make_parts(apart, e);
            merge_spread(api, near, memory, axis, compact(&near[0], axis));
            merge_spread(api, apart, memory, axis, (INT64_C(1) << 32) + 4096);
            for (int n = 0; n < MERGE_TENSORS; n++) {
                cr_expect(memcmp(near[n].image, apart[n].image, near[n].bytes) == 0,
                          "%s, axis %d, tensor %d", element_name(e), axis, n);
                tensor_free(&near[n]);
                tensor_free(&apart[n]);
            }
        }
    }
    cuda_give(memory);
}

/* ---- Integers in device memory ----------------------------------------------------------------------------------- */

static DLTensor device_ints(const int32_t *values, int64_t *shape, int32_t axes) {
    size_t count = 1;
    for (int a = 0; a < axes; a++)
        count *= (size_t)shape[a];
    DLTensor t = {.data = cuda_take(count * sizeof *values),
                  .device = {kDLCUDA, 0},
                  .ndim = axes,
                  .dtype = {kDLInt, 32, 1},
                  .shape = shape};
    cuda_store(t.data, values, count * sizeof *values);
    return t;
}

/* Tensors of random numbers, the output between borders of which no byte may change. */
struct guarded {
    struct attention attention;
    unsigned char *block;
    size_t border;
};

static void make_guarded(struct guarded *g, const dlattn_kernel_info *row, const int64_t shape[4]) {
    make_on(&g->attention, 0, dtype_of(row), shape, 21);
    g->border = 1 << 20;
    g->block = cuda_take(g->attention.bytes + 2 * g->border);
    unsigned char *const image = malloc(g->attention.bytes + 2 * g->border);
    cr_assert(image != NULL);
    memset(image, 0xa5, g->attention.bytes + 2 * g->border);
    cuda_store(g->block, image, g->attention.bytes + 2 * g->border);
    free(image);
    cuda_give(g->attention.tensor[3].data);
    g->attention.tensor[3].data = g->block + g->border;
    g->attention.desc.kernel = row->name;
}

static void expect_borders(const struct guarded *g, const char *what) {
    const size_t bytes = g->attention.bytes + 2 * g->border;
    unsigned char *const image = malloc(bytes);
    size_t changed = 0;
    cr_assert(image != NULL);
    cuda_wait();
    cuda_fetch(image, g->block, bytes);
    for (size_t i = 0; i < bytes; i++)
        changed += (i < g->border || i >= bytes - g->border) && image[i] != 0xa5;
    cr_expect(eq(sz, changed, 0), "%s, %s", g->attention.desc.kernel, what);
    free(image);
}

static void drop_guarded(struct guarded *g) {
    g->attention.tensor[3].data = g->block;
    drop(&g->attention);
}

enum { SEQUENCES = 6, TOTAL = 100 };

/* Packed tensors of [100, 2, 64]. */
static int32_t run_packed(const dlattn_api *api, struct guarded *g, const int32_t *cu_q,
                          const int32_t *cu_k) {
    int64_t shape[3] = {TOTAL, 2, 64}, entries = SEQUENCES + 1;
    DLTensor q = device_ints(cu_q, &entries, 1), k = device_ints(cu_k, &entries, 1);
    struct attention *const a = &g->attention;
    for (int t = 0; t < 4; t++) {
        a->tensor[t].ndim = 3;
        a->tensor[t].shape = shape;
    }
    a->tensors.cu_seqlens_q = &q;
    a->tensors.cu_seqlens_k = &k;
    a->desc.alignment = DLATTN_ALIGN_BOTTOM_RIGHT;
    const int32_t status = forward(api, a, NULL);
    cuda_wait();
    for (int t = 0; t < 4; t++) {
        a->tensor[t].ndim = 4;
        a->tensor[t].shape = a->shape;
    }
    a->tensors.cu_seqlens_q = a->tensors.cu_seqlens_k = NULL;
    cuda_give(q.data);
    cuda_give(k.data);
    return status;
}

/* Entries are clamped to the tensors: the same result as from clamped ones, whatever else they say. */
Test(gpu_memory, wild_cu_seqlens) {
    static const int32_t wild[] = {-7, 40, INT_MAX, INT_MIN, INT_MIN, -1, INT_MIN},
                         clean[] = {0, 40, 100, 100, 100, 100, 100},
                         overlapping[] = {90, 30, 60, 1000000, 50, INT_MIN, INT_MAX};
    const dlattn_api *api = gpu_api();
    const int64_t shape[4] = {1, 2, TOTAL, 64};
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        struct guarded g[2];
        if (!(rows[row].features & DLATTN_FEATURE_VARLEN))
            continue;
        for (int i = 0; i < 2; i++) {
            make_guarded(&g[i], &rows[row], shape);
            MUST(run_packed(api, &g[i], i ? clean : wild, i ? clean : wild));
            expect_borders(&g[i], i ? "clean" : "wild");
        }
        cr_expect(same_result(&g[0].attention, &g[1].attention), "%s", rows[row].name);
        MUST(run_packed(api, &g[0], clean, overlapping));
        MUST(run_packed(api, &g[0], overlapping, wild));
        MUST(run_packed(api, &g[0], overlapping, overlapping));
        expect_borders(&g[0], "overlapping");
        drop_guarded(&g[0]);
        drop_guarded(&g[1]);
    }
}

enum { PAGES = 6, PAGE = 16, COLUMNS = 4 };

struct paged {
    const int32_t *table, *lengths;
    int64_t pages, window_left;
};

/* Queries [3, 2, 2, 64] over a cache of [pages, 2, 16, 64]; what the last two rows of a sequence see. */
static int32_t run_paged(const dlattn_api *api, struct guarded *g, struct paged what) {
    int64_t cache[4] = {what.pages, 2, PAGE, 64}, batch = 3, table_shape[2] = {3, COLUMNS};
    int64_t query[4] = {3, 2, 2, 64};
    DLTensor table = device_ints(what.table, table_shape, 2),
             lengths = device_ints(what.lengths, &batch, 1);
    struct attention *const a = &g->attention;
    a->tensor[0].shape = a->tensor[3].shape = query;
    a->tensor[1].shape = a->tensor[2].shape = cache;
    void *const key = a->tensor[1].data, *const value = a->tensor[2].data;
    if (what.pages == 0)
        a->tensor[1].data = a->tensor[2].data = NULL;
    a->tensors.block_table = &table;
    a->tensors.key_lengths = &lengths;
    a->desc.alignment = DLATTN_ALIGN_BOTTOM_RIGHT;
    a->desc.flags = DLATTN_WINDOW;
    a->desc.window_left = what.window_left;
    a->desc.window_right = 0;
    const int32_t status = forward(api, a, NULL);
    cuda_wait();
    a->tensor[1].data = key;
    a->tensor[2].data = value;
    for (int t = 0; t < 4; t++)
        a->tensor[t].shape = a->shape;
    a->tensors.block_table = a->tensors.key_lengths = NULL;
    cuda_give(table.data);
    cuda_give(lengths.data);
    return status;
}

/* How much of the output run_paged() writes. */
static size_t paged_bytes(const struct guarded *g) {
    return g->attention.bytes / (PAGES * PAGE) * (3 * 2);
}

Test(gpu_memory, wild_block_tables) {
    /* Of 60 keys with a window of 10 the first three pages are not needed, nor what is past the length. */
    static const int32_t lengths[] = {60, 17, 0};
    static const int32_t clean[] = {0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0};
    static const int32_t needless[] = {-1, INT_MAX, INT_MIN, 3,       4,       5,
                                       -1, 77,      -1,      INT_MAX, INT_MIN, 6};
    static const int32_t wild[] = {-1, INT_MAX, 6, INT_MIN, 1000000, -5, 5, 5, 5, 5, 5, 5};
    static const int32_t too_long[] = {INT_MAX, 65, -1};
    const dlattn_api *api = gpu_api();
    const int64_t shape[4] = {PAGES, 2, PAGE, 64};
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        struct guarded g;
        if (!(rows[row].features & DLATTN_FEATURE_PAGED))
            continue;
        make_guarded(&g, &rows[row], shape);
        MUST(run_paged(api, &g, (struct paged){clean, lengths, PAGES, 10}));
        unsigned char *const want = result(&g.attention);
        poison(&g.attention);
        MUST(run_paged(api, &g, (struct paged){needless, lengths, PAGES, 10}));
        unsigned char *const got = result(&g.attention);
        cr_expect(memcmp(want, got, paged_bytes(&g)) == 0, "%s: entries that no key needs",
                  rows[row].name);
        MUST(run_paged(api, &g, (struct paged){wild, lengths, PAGES, -1}));
        MUST(run_paged(api, &g, (struct paged){wild, too_long, PAGES, -1}));
        expect_borders(&g, "wild pages");
        free(want);
        free(got);
        drop_guarded(&g);
    }
}

/* A cache of no pages has no keys, whatever lengths and tables say: rows that see none are zero. */
Test(gpu_memory, no_pages) {
    static const int32_t lengths[] = {60, 17, 1}, table[3 * COLUMNS] = {0, 1, 2, 3, -1, 5};
    const dlattn_api *api = gpu_api();
    const int64_t shape[4] = {PAGES, 2, PAGE, 64};
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        struct guarded g;
        if (!(rows[row].features & DLATTN_FEATURE_PAGED))
            continue;
        make_guarded(&g, &rows[row], shape);
        MUST(run_paged(api, &g, (struct paged){table, lengths, 0, -1}));
        unsigned char *const got = result(&g.attention);
        size_t not_zero = 0;
        for (size_t i = 0; i < paged_bytes(&g); i++)
            not_zero += got[i] != 0;
        cr_expect(eq(sz, not_zero, 0), "%s", rows[row].name);
        expect_borders(&g, "no pages");
        free(got);
        drop_guarded(&g);
    }
}

/* ---- Memory that is not a device's ------------------------------------------------------------------------------- */

/* Moves tensors 0 to 3 of `a` whose bit is in `which` to managed memory, as device `id`. */
static void make_managed(struct attention *a, unsigned which, int32_t id) {
    unsigned char *const image = malloc(a->bytes);
    cr_assert(image != NULL);
    for (int t = 0; t < 4; t++) {
        if (!(which >> t & 1))
            continue;
        cuda_fetch(image, a->tensor[t].data, a->bytes);
        cuda_give(a->tensor[t].data);
        a->tensor[t].data = cuda_take_managed(a->bytes);
        cuda_store(a->tensor[t].data, image, a->bytes);
        a->tensor[t].device = (DLDevice){kDLCUDAManaged, id};
    }
    free(image);
}

Test(gpu_memory, managed) {
    const dlattn_api *api = gpu_api();
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        static const unsigned parts[] = {15, 1, 8, 6}; /* all, query, output, key and value */
        struct attention device;
        make_on(&device, 0, dtype_of(&rows[row]), (const int64_t[]){2, 2, 130, 64}, 31);
        device.desc.kernel = rows[row].name;
        MUST(forward(api, &device, NULL));
        for (int n = 0; n < 4; n++) {
            struct attention managed;
            make_on(&managed, 0, dtype_of(&rows[row]), (const int64_t[]){2, 2, 130, 64}, 31);
            managed.desc.kernel = rows[row].name;
            make_managed(&managed, parts[n], 0);
            poison(&managed);
            MUST(forward(api, &managed, NULL));
            cr_expect(same_result(&device, &managed), "%s, part %d", rows[row].name, n);
            drop(&managed);
        }
        drop(&device);
    }
}

/* A stream belongs to a device: what is all in managed memory runs on the device that its query names, on streams of that one
 * alone. A tensor that lies on a device says more. */
Test(gpu_memory, managed_on_the_second_device) {
    const dlattn_api *api = api_of_two();
    for (unsigned which = 7; which <= 15; which += 8) { /* output on device 1, or managed, too */
        struct attention want, a;
        make_on(&want, 1, f16, (const int64_t[]){1, 2, 130, 64}, 32);
        make_on(&a, 1, f16, (const int64_t[]){1, 2, 130, 64}, 32);
        make_managed(&a, which, which == 15);
        poison(&a);
        void *const stream = cuda_stream();
        MUST(forward(api, &want, stream));
        MUST(forward(api, &a, stream));
        cr_expect(same_result(&want, &a), "managed: %u", which);
    }
}

/* Pinned memory is the host's: the CPU computes it, at once. */
Test(gpu_memory, pinned) {
    const dlattn_api *api = gpu_api();
    enum { COUNT = 2 * 20 * 64 };
    int64_t shape[4] = {1, 2, 20, 64};
    float *const plain = malloc(4 * COUNT * sizeof *plain), *const pinned =
                                                                (float *)cuda_take_pinned(
                                                                    4 * COUNT * sizeof *pinned);
    for (int i = 0; i < 4 * COUNT; i++)
        pinned[i] = plain[i] = (float)random_normal(33, (uint64_t)i);
    for (int place = 0; place < 2; place++) {
        DLTensor tensor[4];
        for (int t = 0; t < 4; t++)
            tensor[t] = (DLTensor){.data = (place ? pinned : plain) + t * COUNT,
                                   .device = {place ? kDLCUDAHost : kDLCPU, 0},
                                   .ndim = 4,
                                   .dtype = f32,
                                   .shape = shape};
        const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                        .query = &tensor[0],
                                        .key = &tensor[1],
                                        .value = &tensor[2],
                                        .output = &tensor[3]};
        const dlattn_forward_desc desc = {.struct_size = sizeof desc, .causal = 1};
        dlattn_sku sku = {.struct_size = sizeof sku};
        MUST(api->forward_query(&desc, &tensors, &sku));
        cr_expect(strcmp(sku.backend, "cpu") == 0, "%s", sku.kernel);
        const size_t bytes = (sku.workspace_bytes + 63) / 64 * 64 + 64;
        const dlattn_exec exec = {.struct_size = sizeof exec,
                                  .workspace = aligned_alloc(64, bytes),
                                  .workspace_bytes = bytes};
        MUST(api->forward(&desc, &tensors, &exec));
        free(exec.workspace);
    }
    cr_expect(memcmp(plain + 3 * COUNT, pinned + 3 * COUNT, COUNT * sizeof *plain) == 0);
    free(plain);
    cuda_give_pinned((unsigned char *)pinned);
}

/* ---- Another alignment than planned ------------------------------------------------------------------------------ */

/* A plan for aligned tensors, whose row may take no others, runs others all the same: by a row that does. */
Test(gpu_memory, plan_for_aligned_tensors_runs_others) {
    const dlattn_api *api = gpu_api();
    static const int64_t lengths[] = {600, 20}; /* on an H100 cuda_fwd_sm90 and cuda_decode_sm80 */
    for (int n = 0; n < 2; n++) {
        struct attention a, shifted;
        dlattn_plan *plan;
        dlattn_sku sku = {.struct_size = sizeof sku};
        make(&a, 2, 32, lengths[n], 64, 41);
        make(&shifted, 2, 32, lengths[n], 64, 41);
        MUST(api->plan_create(&a.desc, &a.tensors, &plan));
        MUST(api->plan_sku(plan, &sku));
        for (int t = 0; t < 4; t++) { /* one element further, in a block with room for that */
            unsigned char *const image = malloc(a.bytes), *const block = cuda_take(a.bytes + 16);
            cr_assert(image != NULL);
            cuda_fetch(image, shifted.tensor[t].data, a.bytes);
            cuda_store(block + 2, image, a.bytes);
            free(image);
            cuda_give(shifted.tensor[t].data);
            shifted.tensor[t].data = block + 2;
        }
        const dlattn_exec exec = {.struct_size = sizeof exec,
                                  .workspace = a.workspace,
                                  .workspace_bytes = WORKSPACE_BYTES};
        MUST(api->plan_can_run(plan, &shifted.tensors));
        for (int turn = 0; turn < 2; turn++) {
            MUST(api->plan_run(plan, &shifted.tensors, &exec));
            unsigned char *const got = result(&shifted);
            poison(&shifted);
            MUST(forward(api, &shifted, NULL));
            unsigned char *const want = result(&shifted);
            cr_expect(memcmp(got, want, a.bytes) == 0, "%s, shifted", sku.kernel);
            free(got);
            free(want);
            MUST(api->plan_run(plan, &a.tensors, &exec));
            unsigned char *const aligned = result(&a);
            poison(&a);
            MUST(forward(api, &a, NULL));
            unsigned char *const again = result(&a);
            cr_expect(memcmp(aligned, again, a.bytes) == 0, "%s, aligned", sku.kernel);
            free(aligned);
            free(again);
        }
        api->plan_destroy(plan);
    }
}
