/*
 * A small pool for hosts that bring no threads of their own.
 *
 * One job runs at a time; a second caller finds the pool taken and does its own work alone, so
 * callers never wait for each other. A job is claimed index by index through one atomic word,
 * (generation, next index): a thread that wakes late sees another generation or no index left, and
 * goes back to sleep. Threads spin a little before they sleep on a futex, because the layers of a
 * model call in quick succession.
 */
#define _GNU_SOURCE
#include "src/threads.h"
#include "src/cpu.h"
#include "src/kernel.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_NANOSECONDS = 30000 };

static struct {
    atomic_bool taken;       /* a job is being run */
    _Atomic uint64_t claim;  /* generation << 32 | next index */
    _Atomic uint32_t posted; /* futex: generation of the newest job */
    _Atomic uint32_t done;   /* futex: indices finished */
    _Atomic(dlattn_parallel_body) body;
    _Atomic(void *) ctx;
    _Atomic uint32_t count;
    int32_t threads; /* started, the caller's own not counted; guarded by `taken` */
} pool;

static int32_t count_threads(void) {
    const char *wish = getenv("DLATTN_NUM_THREADS");
    long n = wish ? strtol(wish, NULL, 10) : 0;
    cpu_set_t set;
    if (n <= 0)
        n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                        : sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : (int32_t)n;
}

static int32_t most_threads;
static pthread_once_t most_threads_once = PTHREAD_ONCE_INIT;
static void find_most_threads(void) { most_threads = count_threads(); }

int32_t threads_default(void) {
    pthread_once(&most_threads_once, find_most_threads);
    return most_threads;
}

static void futex_wait(_Atomic uint32_t *word, uint32_t while_value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, while_value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Returns once *word != value: spins first, then sleeps. Between its looks it offers the core to whoever waits for it, and
 * sleeps at once if somebody took it for long. */
static void wait_change(_Atomic uint32_t *word, uint32_t value) {
    const int64_t until = nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value)
                return;
            cpu_pause();
        }
        sched_yield();
    } while (nanoseconds() < until);
    while (atomic_load_explicit(word, memory_order_acquire) == value)
        futex_wait(word, value);
}

/* Runs indices of the current job until none is left. */
static void work(void) {
    uint64_t claim = atomic_load_explicit(&pool.claim, memory_order_acquire);
    for (;;) {
        /* The claim word is closed before a job's fields change, so if the exchange below succeeds,
         * what was read here belongs to the job of that claim. */
        const dlattn_parallel_body body = atomic_load_explicit(&pool.body, memory_order_acquire);
        void *ctx = atomic_load_explicit(&pool.ctx, memory_order_acquire);
        const uint32_t count = atomic_load_explicit(&pool.count, memory_order_acquire);
        const uint32_t index = (uint32_t)claim;
        if (index >= count)
            return;
        if (!atomic_compare_exchange_weak_explicit(&pool.claim, &claim, claim + 1,
                                                   memory_order_acq_rel, memory_order_acquire))
            continue;
        body(ctx, index);
        if (atomic_fetch_add_explicit(&pool.done, 1, memory_order_acq_rel) + 1 == count)
            futex_wake(&pool.done);
        claim = atomic_load_explicit(&pool.claim, memory_order_acquire);
    }
}

static void *thread_main(void *unused) {
    (void)unused;
    uint32_t seen = atomic_load_explicit(&pool.posted, memory_order_acquire);
    for (;;) {
        work();
        wait_change(&pool.posted, seen);
        seen = atomic_load_explicit(&pool.posted, memory_order_acquire);
    }
    return NULL;
}

/* The child of a fork has none of the threads and may have been forked in the middle of a job. */
static void forget_threads(void) {
    pool.threads = 0;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.count, 0);
    atomic_store(&pool.taken, false);
}

static void start_threads(int32_t wanted) {
    static atomic_bool watching_fork;
    if (!atomic_exchange(&watching_fork, true))
        pthread_atfork(NULL, NULL, forget_threads);

    sigset_t every, before;
    sigfillset(&every); /* the host's signals are the host's business */
    pthread_sigmask(SIG_SETMASK, &every, &before);
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (pool.threads < wanted && pthread_create(&thread, &attr, thread_main, NULL) == 0)
        pool.threads++;
    pthread_attr_destroy(&attr);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void run_pooled(int32_t workers, dlattn_parallel_body body, void *ctx) {
    const int32_t wanted = (workers < threads_default() ? workers : threads_default()) - 1;
    if (pool.threads < wanted)
        start_threads(wanted);
    const uint32_t count = (uint32_t)workers;
    const uint32_t generation =
        (uint32_t)(atomic_load_explicit(&pool.claim, memory_order_relaxed) >> 32) + 1;
    atomic_store_explicit(&pool.claim, (uint64_t)generation << 32 | UINT32_MAX,
                          memory_order_relaxed); /* closed */
    atomic_store_explicit(&pool.done, 0, memory_order_release);
    atomic_store_explicit(&pool.body, body, memory_order_release);
    atomic_store_explicit(&pool.ctx, ctx, memory_order_release);
    atomic_store_explicit(&pool.count, count, memory_order_release);
    atomic_store_explicit(&pool.claim, (uint64_t)generation << 32, memory_order_release);
    atomic_store_explicit(&pool.posted, generation, memory_order_release);
    futex_wake(&pool.posted);

    work();
    for (uint32_t done; (done = atomic_load_explicit(&pool.done, memory_order_acquire)) < count;)
        wait_change(&pool.done, done);
}

void threads_run(const struct exec *exec, int32_t workers, dlattn_parallel_body body, void *ctx) {
    if (exec->parallel_for && workers > 1) {
        exec->parallel_for(exec->parallel_ctx, workers, body, ctx);
        return;
    }
    if (workers > 1 && !atomic_exchange_explicit(&pool.taken, true, memory_order_acquire)) {
        run_pooled(workers, body, ctx);
        atomic_store_explicit(&pool.taken, false, memory_order_release);
        return;
    }
    for (int32_t worker = 0; worker < workers; worker++)
        body(ctx, worker);
}
