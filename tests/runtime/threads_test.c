/*
 * Threads: callers beside each other, the host's parallel_for, the built-in pool and its size, fork.
 */
#define _GNU_SOURCE
#include "tests/support/check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* One call in host memory, ready to run. */
struct ready {
    struct call call;
    dlattn_tensors tensors;
    dlattn_exec exec;
    dlattn_sku sku;
};

static void prepare(const dlattn_api *api, struct ready *r, struct shape shape, uint64_t seed,
                    int32_t threads) {
    const struct test_case from = {
        shape, {.name = "causal", .causal = true, .bottom_right = true, .lse = LSE_F32}, F32, seed};
    memset(&r->exec, 0, sizeof r->exec);
    call_make(&r->call, &from);
    call_use_images(&r->call);
    r->call.desc.num_threads = threads;
    r->tensors = call_tensors(&r->call);
    r->sku = (dlattn_sku){.struct_size = sizeof r->sku};
    cr_assert(eq(int, api->forward_query(&r->call.desc, &r->tensors, &r->sku), DLATTN_OK), "%s",
              api->last_error());
    r->exec.struct_size = sizeof r->exec;
    r->exec.workspace_bytes = r->sku.workspace_bytes;
    r->exec.workspace = aligned_alloc(64, (r->sku.workspace_bytes + 127) / 64 * 64);
}

static void discard(struct ready *r) {
    free(r->exec.workspace);
    call_free(&r->call);
}

static int32_t run(const dlattn_api *api, struct ready *r) {
    return api->forward(&r->call.desc, &r->tensors, &r->exec);
}

static bool same_output(const struct ready *a, const struct ready *b) {
    const struct tensor *x = &a->call.tensor[OUTPUT], *y = &b->call.tensor[OUTPUT];
    return memcmp(x->image, y->image, x->bytes) == 0;
}

/* ---- Callers beside each other ---------------------------------------------------------------------------- */

enum { CALLERS = 6, CALLS = 12 };

struct caller {
    const dlattn_api *api;
    struct ready ready;
    unsigned char *expected;
    const dlattn_plan *plan; /* shared by all */
    int wrong;
};

static void *call_often(void *argument) {
    struct caller *c = argument;
    struct tensor *output = &c->ready.call.tensor[OUTPUT];
    for (int n = 0; n < CALLS; n++) {
        memset(output->image, OUTPUT_FILL, output->bytes);
        const int32_t status = c->plan
                                   ? c->api->plan_run(c->plan, &c->ready.tensors, &c->ready.exec)
                                   : run(c->api, &c->ready);
        c->wrong += status != DLATTN_OK || memcmp(output->image, c->expected, output->bytes) != 0;
    }
    return NULL;
}

static void call_beside_each_other(struct caller callers[CALLERS]) {
    pthread_t threads[CALLERS];
    for (int n = 0; n < CALLERS; n++) {
        const struct tensor *output = &callers[n].ready.call.tensor[OUTPUT];
        cr_assert(eq(int, run(callers[n].api, &callers[n].ready), DLATTN_OK));
        callers[n].expected = malloc(output->bytes);
        memcpy(callers[n].expected, output->image, output->bytes);
    }
    for (int n = 0; n < CALLERS; n++)
        cr_assert(eq(int, pthread_create(&threads[n], NULL, call_often, &callers[n]), 0));
    for (int n = 0; n < CALLERS; n++) {
        pthread_join(threads[n], NULL);
        cr_expect(eq(int, callers[n].wrong, 0), "caller %d", n);
        free(callers[n].expected);
        discard(&callers[n].ready);
    }
}

Test(threads, different_shapes_at_once) {
    static struct caller callers[CALLERS];
    for (int n = 0; n < CALLERS; n++) {
        callers[n].api = test_api();
        prepare(callers[n].api, &callers[n].ready,
                (struct shape){1 + n % 2, 4, 2, 3 + 13 * n, 40 + 9 * n, 32, 32}, (uint64_t)n,
                1 + n % 4);
    }
    call_beside_each_other(callers);
}

Test(threads, one_plan_for_all) {
    static struct caller callers[CALLERS];
    const dlattn_api *api = test_api();
    dlattn_plan *plan = NULL;
    for (int n = 0; n < CALLERS; n++) {
        callers[n].api = api;
        prepare(api, &callers[n].ready, (struct shape){2, 4, 2, 30, 60, 32, 32}, (uint64_t)n, 3);
    }
    cr_assert(eq(int,
                 api->plan_create(&callers[0].ready.call.desc, &callers[0].ready.tensors, &plan),
                 DLATTN_OK));
    for (int n = 0; n < CALLERS; n++)
        callers[n].plan = plan;
    call_beside_each_other(callers);
    api->plan_destroy(plan);
}

static void *fail_differently(void *argument) {
    struct caller *c = argument;
    char wanted[64];
    const int32_t number = 100 + (int32_t)c->ready.call.made_from.seed;
    c->ready.call.desc.causal = number;
    snprintf(wanted, sizeof wanted, "causal: is %d", number);
    for (int n = 0; n < 200; n++)
        c->wrong += run(c->api, &c->ready) != DLATTN_INVALID_ARGUMENT ||
                    !strstr(c->api->last_error(), wanted);
    return NULL;
}

Test(threads, errors_stay_in_their_thread) {
    static struct caller callers[CALLERS];
    pthread_t threads[CALLERS];
    for (int n = 0; n < CALLERS; n++) {
        callers[n].api = test_api();
        prepare(callers[n].api, &callers[n].ready, (struct shape){1, 1, 1, 2, 2, 8, 8}, (uint64_t)n,
                1);
        cr_assert(eq(int, pthread_create(&threads[n], NULL, fail_differently, &callers[n]), 0));
    }
    for (int n = 0; n < CALLERS; n++) {
        pthread_join(threads[n], NULL);
        cr_expect(eq(int, callers[n].wrong, 0));
        discard(&callers[n].ready);
    }
    cr_expect(eq(str, (char *)(uintptr_t)test_api()->last_error(), ""));
}

/* ---- The host's threads ----------------------------------------------------------------------------------- */

struct host {
    int calls;
    int64_t count;
};

struct share {
    dlattn_parallel_body body;
    void *body_ctx;
    int64_t index;
};

static void *run_share(void *argument) {
    struct share *s = argument;
    s->body(s->body_ctx, s->index);
    return NULL;
}

/* Each index in a thread of its own, the last first. */
static void host_parallel_for(void *ctx, int64_t count, dlattn_parallel_body body, void *body_ctx) {
    struct host *host = ctx;
    pthread_t threads[16];
    struct share shares[16];
    host->calls++;
    host->count = count;
    cr_assert(count <= 16);
    for (int64_t i = count - 1; i >= 0; i--) {
        shares[i] = (struct share){body, body_ctx, i};
        cr_assert(eq(int, pthread_create(&threads[i], NULL, run_share, &shares[i]), 0));
    }
    for (int64_t i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
}

/* All in the calling thread, backwards: parallel_for promises no more. */
static void serial_parallel_for(void *ctx, int64_t count, dlattn_parallel_body body,
                                void *body_ctx) {
    ((struct host *)ctx)->calls++;
    for (int64_t i = count - 1; i >= 0; i--)
        body(body_ctx, i);
}

Test(threads, hosts_parallel_for) {
    const dlattn_api *api = test_api();
    static const dlattn_parallel_for fors[] = {host_parallel_for, serial_parallel_for};
    struct ready own, hosted;
    prepare(api, &own, (struct shape){2, 4, 2, 70, 90, 32, 32}, 5, 1);
    cr_assert(eq(int, run(api, &own), DLATTN_OK));
    for (int kind = 0; kind < 2; kind++) {
        struct host host = {0};
        prepare(api, &hosted, (struct shape){2, 4, 2, 70, 90, 32, 32}, 5, 4);
        hosted.exec.parallel_for = fors[kind];
        hosted.exec.parallel_ctx = &host;
        cr_expect(eq(int, run(api, &hosted), DLATTN_OK));
        cr_expect(host.calls >= 1, "the host's threads were not used");
        cr_expect(host.count <= 4, "%lld workers were asked for, 4 were planned",
                  (long long)host.count);
        cr_expect(same_output(&own, &hosted));
        discard(&hosted);
    }
    discard(&own);
}

/* ---- The built-in pool ------------------------------------------------------------------------------------ */

static int32_t default_threads(void) {
    const dlattn_api *api = test_api();
    struct ready r;
    prepare(api, &r, (struct shape){4, 8, 2, 200, 200, 32, 32}, 1, 0);
    const int32_t threads = r.sku.num_threads;
    cr_expect(eq(int, run(api, &r), DLATTN_OK));
    discard(&r);
    return threads;
}

static int threads_of_process(void) {
    char line[256];
    int count = 0;
    FILE *status = fopen("/proc/self/status", "r");
    cr_assert(ne(ptr, status, NULL));
    while (fgets(line, sizeof line, status))
        sscanf(line, "Threads: %d", &count);
    fclose(status);
    return count;
}

Test(threads, number_from_environment) {
    const int before = threads_of_process();
    setenv("DLATTN_NUM_THREADS", "3", 1);
    cr_expect(eq(int, default_threads(), 3));
    cr_expect(eq(int, threads_of_process(), before + 2), "the caller's thread is one of the three");
}

Test(threads, number_from_affinity) {
    cpu_set_t one;
    unsetenv("DLATTN_NUM_THREADS");
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    cr_assert(eq(int, sched_setaffinity(0, sizeof one, &one), 0));
    const int before = threads_of_process();
    cr_expect(eq(int, default_threads(), 1));
    cr_expect(eq(int, threads_of_process(), before), "one core needs no other thread");
}

Test(threads, number_that_is_none) {
    setenv("DLATTN_NUM_THREADS", "many", 1);
    cr_expect(default_threads() >= 1);
}

/* A child has none of its parent's threads, and may have been forked while they worked. */
Test(threads, child_computes) {
    const dlattn_api *api = test_api();
    struct ready r, again;
    setenv("DLATTN_NUM_THREADS", "4", 1);
    prepare(api, &r, (struct shape){2, 4, 2, 90, 120, 32, 32}, 8, 0);
    prepare(api, &again, (struct shape){2, 4, 2, 90, 120, 32, 32}, 8, 0);
    cr_assert(eq(int, run(api, &r), DLATTN_OK));
    for (int n = 0; n < 5; n++) {
        int status = -1;
        fflush(NULL);
        const pid_t child = fork();
        if (child == 0) {
            alarm(20); /* a child that waits for its parent's threads would wait for ever */
            bool good = true;
            for (int i = 0; i < 3; i++)
                good &= run(api, &again) == DLATTN_OK && same_output(&r, &again);
            _exit(good ? 0 : 1);
        }
        cr_assert(child > 0);
        cr_expect(eq(int, run(api, &r), DLATTN_OK), "the parent goes on");
        cr_assert(eq(int, waitpid(child, &status, 0), child));
        cr_expect(eq(int, status, 0), "how the child ended");
    }
    discard(&r);
    discard(&again);
}
