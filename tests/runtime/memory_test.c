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
static dlattn_gradients gradients;
static dlattn_exec exec;
static _Alignas(64) unsigned char workspace[1 << 22];

static bool is_backward(void) { return call.made_from.features.backward; }

static int32_t query(const dlattn_api *api, dlattn_sku *sku) {
    return is_backward() ? api->backward_query(&call.desc, &tensors, &gradients, sku)
                         : api->forward_query(&call.desc, &tensors, sku);
}

static int32_t run(const dlattn_api *api) {
    return is_backward() ? api->backward(&call.desc, &tensors, &gradients, &exec)
                         : api->forward(&call.desc, &tensors, &exec);
}

static int32_t create(const dlattn_api *api, dlattn_plan **plan) {
    return is_backward() ? api->backward_plan_create(&call.desc, &tensors, &gradients, plan)
                         : api->plan_create(&call.desc, &tensors, plan);
}

static int32_t can_run(const dlattn_api *api, const dlattn_plan *plan) {
    return is_backward() ? api->backward_plan_can_run(plan, &tensors, &gradients)
                         : api->plan_can_run(plan, &tensors);
}

static int32_t run_planned(const dlattn_api *api, const dlattn_plan *plan) {
    return is_backward() ? api->backward_plan_run(plan, &tensors, &gradients, &exec)
                         : api->plan_run(plan, &tensors, &exec);
}

static void prepare_for(const dlattn_api *api, int32_t threads, const char *kernel,
                        const struct test_case *from) {
    dlattn_sku sku = {.struct_size = sizeof sku};
    call_make(&call, from);
    call_use_images(&call);
    call.desc.kernel = kernel;
    call.desc.num_threads = threads;
    tensors = call_tensors(&call);
    gradients = call_gradients(&call);
    cr_assert(eq(int, query(api, &sku), DLATTN_OK), "%s", api->last_error());
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

/* Every entry of a call that is prepared; `refusing`, with a malloc that has nothing. How often it was called. */
static int count_allocations(const dlattn_api *api, const char *row, const dlattn_plan *plan,
                             bool refusing) {
    dlattn_sku sku = {.struct_size = sizeof sku};
    const int before = allocated;
    refuse = refusing;
    const int32_t statuses[] = {query(api, &sku), run(api), can_run(api, plan),
                                run_planned(api, plan)};
    refuse = false;
    const int after = allocated;
    for (int i = 0; i < 4; i++)
        cr_expect(eq(int, statuses[i], DLATTN_OK), "%s, call %d", row, i);
    return after - before;
}

/* A row that allocates would not survive a malloc that refuses: it is told apart before. */
static void expect_no_allocation(const dlattn_api *api, const char *row) {
    dlattn_plan *plan = NULL;
    cr_assert(eq(int, run(api), DLATTN_OK));
    cr_assert(eq(int, create(api, &plan), DLATTN_OK));
    const int counted = count_allocations(api, row, plan, false);
    cr_expect(eq(int, counted, 0), "%s allocates in a call", row);
    if (counted == 0)
        cr_expect(eq(int, count_allocations(api, row, plan, true), 0), "%s", row);
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
    for (int32_t row = 0; row < api->kernel_count(); row++) {
        dlattn_kernel_info info = {.struct_size = sizeof info};
        cr_assert(eq(int, api->kernel_info(row, &info), DLATTN_OK));
        const bool forward = strcmp(info.operation, "forward") == 0,
                   backward = strcmp(info.operation, "backward") == 0;
        if (strcmp(info.backend, "cpu") != 0 || !info.available || !(forward || backward))
            continue;
        /* Few query rows, which rows for decoding take, too. */
        const struct test_case from = {
            {2, 4, 2, 2, 50, 32, 32},
            {.name = "causal", .causal = true, .lse = LSE_F32, .backward = backward},
            shortest_element(&info),
            4};
        prepare_for(api, 2, info.name, &from);
        expect_no_allocation(api, info.name);
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
