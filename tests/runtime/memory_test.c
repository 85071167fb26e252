/*
 * Memory: what a call may allocate (nothing), what happens when there is none, and what is left afterwards. The malloc of
 * this program stands in front of libc's for the plugin too.
 */
#define _GNU_SOURCE
#include "tests/support/cpu_rows.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void __libc_free(void *);

static atomic_bool refuse;
static atomic_int allocated, freed;

#define EXPORTED __attribute__((visibility("default")))

/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name) */
EXPORTED void *malloc(size_t bytes) {
    atomic_fetch_add(&allocated, 1);
    return refuse ? NULL : __libc_malloc(bytes);
}

EXPORTED void *calloc(size_t count, size_t bytes) {
    atomic_fetch_add(&allocated, 1);
    return refuse ? NULL : __libc_calloc(count, bytes);
}

EXPORTED void *realloc(void *old, size_t bytes) {
    atomic_fetch_add(&allocated, 1);
    return refuse ? NULL : __libc_realloc(old, bytes);
}

EXPORTED void free(void *memory) {
    atomic_fetch_add(&freed, memory != NULL);
    __libc_free(memory);
}

static int refused_threads;

EXPORTED int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*body)(void *),
                            void *argument) {
    int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    void *symbol = dlsym(RTLD_NEXT, "pthread_create");
    memcpy(&next, &symbol, sizeof next);
    refused_threads += refuse;
    return refuse ? EAGAIN : next(thread, attr, body, argument);
}

/* NOLINTEND(readability-inconsistent-declaration-parameter-name) */

/* ---- A call ----------------------------------------------------------------------------------------------- */

static struct call call;
static dlattn_tensors tensors;
static dlattn_exec exec;
static _Alignas(64) unsigned char workspace[1 << 22];

static void prepare_for(const dlattn_api *api, int32_t threads, const char *kernel,
                        const struct test_case *from) {
    dlattn_sku sku = {.struct_size = sizeof sku};
    call_make(&call, from);
    call_use_images(&call);
    call.desc.kernel = kernel;
    call.desc.num_threads = threads;
    tensors = call_tensors(&call);
    cr_assert(eq(int, api->forward_query(&call.desc, &tensors, &sku), DLATTN_OK));
    cr_assert(sku.workspace_bytes <= sizeof workspace);
    exec = (dlattn_exec){
        .struct_size = sizeof exec, .workspace = workspace, .workspace_bytes = sizeof workspace};
}

static void prepare(const dlattn_api *api, int32_t threads) {
    const struct test_case from = {
        {2, 4, 2, 20, 50, 32, 32}, {.name = "lse", .lse = LSE_F32}, F32, 4};
    prepare_for(api, threads, NULL, &from);
}

/* The interposition itself, or the tests below would say nothing. */
Test(memory, is_watched) {
    const int before = allocated;
    void *volatile memory = malloc(10);
    free(memory);
    cr_expect(eq(int, allocated, before + 1));
}

Test(memory, plan_without_memory) {
    const dlattn_api *api = test_api();
    dlattn_plan *plan = (dlattn_plan *)0x10;
    prepare(api, 1);
    (void)api
        ->last_error(); /* glibc gives a thread its room for messages now, and aborts if it cannot */
    refuse = true;
    const int32_t status = api->plan_create(&call.desc, &tensors, &plan);
    refuse = false;
    cr_expect(eq(int, status, DLATTN_OUT_OF_MEMORY));
    cr_expect(plan == (dlattn_plan *)0x10);
    cr_expect(strstr(api->last_error(), "no memory for") != NULL, "%s", api->last_error());
    call_free(&call);
}

/* Every entry of a call that is prepared, with a malloc that refuses. */
static void expect_no_allocation(const dlattn_api *api, const char *row) {
    dlattn_plan *plan = NULL;
    dlattn_sku sku = {.struct_size = sizeof sku};
    cr_assert(eq(int, api->forward(&call.desc, &tensors, &exec), DLATTN_OK));
    cr_assert(eq(int, api->plan_create(&call.desc, &tensors, &plan), DLATTN_OK));
    const int before = allocated;
    refuse = true;
    const int32_t statuses[] = {
        api->forward_query(&call.desc, &tensors, &sku),
        api->forward(&call.desc, &tensors, &exec),
        api->plan_can_run(plan, &tensors),
        api->plan_run(plan, &tensors, &exec),
    };
    refuse = false;
    const int after = allocated;
    for (int i = 0; i < 4; i++)
        cr_expect(eq(int, statuses[i], DLATTN_OK), "%s, call %d", row, i);
    cr_expect(eq(int, after, before), "%s", row);
    api->plan_destroy(plan);
}

/* forward() and plan_run() allocate nothing once the pool's threads are there, so they cannot fail for want of memory. */
Test(memory, calls_allocate_nothing) {
    const dlattn_api *api = test_api();
    prepare(api, 2);
    expect_no_allocation(api, "the library's choice");
    call_free(&call);
}

Test(memory, no_row_allocates) {
    const dlattn_api *api = test_api();
    struct cpu_rows rows;
    find_every_cpu_row(&rows);
    for (int n = 0; n < rows.count; n++) {
        const char *const row = rows.info[n].name;
        /* Few query rows, which rows for decoding take, too. */
        const struct test_case from = {{2, 4, 2, 2, 50, 32, 32},
                                       {.name = "causal", .causal = true, .lse = LSE_F32},
                                       shortest_element(&rows.info[n]),
                                       4};
        prepare_for(api, 2, row, &from);
        expect_no_allocation(api, row);
        call_free(&call);
    }
}

/* Where no thread can be started the caller's own does the work. */
Test(memory, first_call_without_threads) {
    const dlattn_api *api = test_api();
    setenv("DLATTN_NUM_THREADS", "4", 1);
    prepare(api, 4);
    refuse = true;
    const int32_t status = api->forward(&call.desc, &tensors, &exec);
    refuse = false;
    cr_expect(eq(int, status, DLATTN_OK));
    cr_expect(refused_threads > 0, "no thread was asked for");
    call_free(&call);
}

Test(memory, plans_leave_nothing) {
    const dlattn_api *api = test_api();
    prepare(api, 2);
    dlattn_plan *plan = NULL;
    cr_assert(eq(int, api->plan_create(&call.desc, &tensors, &plan), DLATTN_OK));
    api->plan_destroy(plan);
    const int kept = allocated - freed;
    for (int n = 0; n < 100; n++) {
        cr_assert(eq(int, api->plan_create(&call.desc, &tensors, &plan), DLATTN_OK));
        api->plan_destroy(plan);
    }
    const int now = allocated - freed;
    cr_expect(eq(int, now, kept));
    call_free(&call);
}
