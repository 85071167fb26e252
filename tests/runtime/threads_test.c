/*
 * Callers beside each other, with the library's threads and with the host's.
 */
#include "tests/runtime/ready.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
