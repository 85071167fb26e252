/*
 * The built-in pool: how many threads it has, how they wait, and what the child of a fork does without them.
 */
#define _GNU_SOURCE
#include "tests/runtime/ready.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

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

Test(pool, number_from_environment) {
    const int before = threads_of_process();
    setenv("DLATTN_NUM_THREADS", "3", 1);
    cr_expect(eq(int, default_threads(), 3));
    cr_expect(eq(int, threads_of_process(), before + 2), "the caller's thread is one of the three");
}

Test(pool, number_from_affinity) {
    cpu_set_t one;
    unsetenv("DLATTN_NUM_THREADS");
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    cr_assert(eq(int, sched_setaffinity(0, sizeof one, &one), 0));
    const int before = threads_of_process();
    cr_expect(eq(int, default_threads(), 1));
    cr_expect(eq(int, threads_of_process(), before), "one core needs no other thread");
}

Test(pool, little_work_wakes_no_thread) {
    const dlattn_api *api = test_api();
    setenv("DLATTN_NUM_THREADS", "3", 1);
    for (int32_t asked = 0; asked <= 2; asked += 2) {
        struct ready r;
        prepare(api, &r, (struct shape){1, 4, 4, 16, 16, 64, 64}, 1, asked);
        cr_expect(eq(int, r.sku.num_threads, asked == 0 ? 1 : asked));
        discard(&r);
    }
}

Test(pool, number_that_is_none) {
    setenv("DLATTN_NUM_THREADS", "many", 1);
    cr_expect(default_threads() >= 1);
}

static double cpu_seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Four threads on one core: three have nothing to do but to wait for the caller, who does the work. Processor time, of which other
 * processes take none. */
Test(pool, waiting_threads_leave_a_taken_core) {
    const dlattn_api *api = test_api();
    cpu_set_t one;
    struct ready r;
    setenv("DLATTN_NUM_THREADS", "4", 1);
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    cr_assert(eq(int, sched_setaffinity(0, sizeof one, &one), 0));
    prepare(api, &r, (struct shape){1, 8, 8, 64, 64, 64, 64}, 1, 4);
    cr_assert(eq(int, run(api, &r), DLATTN_OK));
    const double all = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID),
                 own = cpu_seconds(CLOCK_THREAD_CPUTIME_ID);
    for (int n = 0; n < 3000; n++)
        cr_assert(eq(int, run(api, &r), DLATTN_OK));
    const double ratio = (cpu_seconds(CLOCK_PROCESS_CPUTIME_ID) - all) /
                         (cpu_seconds(CLOCK_THREAD_CPUTIME_ID) - own);
    cr_expect(ratio < 1.5, "all threads took %.2f times the caller's time", ratio);
    discard(&r);
}

/* A child has none of its parent's threads, and may have been forked while they worked. */
Test(pool, child_computes) {
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
            _exit(!good ? 1 : threads_of_process() != 4 ? 2 : 0);
        }
        cr_assert(child > 0);
        cr_expect(eq(int, run(api, &r), DLATTN_OK), "the parent goes on");
        cr_assert(eq(int, waitpid(child, &status, 0), child));
        cr_expect(eq(int, status, 0),
                  "the child: 1 is a wrong result, 2 that it has no threads of its own");
    }
    discard(&r);
    discard(&again);
}
