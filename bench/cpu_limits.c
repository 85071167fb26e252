#define _GNU_SOURCE
#include "bench/cpu_limits.h"

#include <dlfcn.h>
#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_THREADS = 1024, SUMS = 24, LOOPS = 100000 };

/* Larger than any last-level cache share that could serve it again. */
static const size_t read_bytes = (size_t)512 << 20;

double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Independent sums enough to hide any latency; the empty asm keeps the compiler from computing them. */
#define SUM_LOOP(vector, zero, add)                                                                \
    vector sums[SUMS];                                                                             \
    _Pragma("clang loop unroll(full)") for (int i = 0; i < SUMS; i++) sums[i] = zero;              \
    for (int n = 0; n < LOOPS; n++) {                                                              \
        _Pragma("clang loop unroll(full)") for (int i = 0; i < SUMS; i++) {                        \
            sums[i] = add;                                                                         \
            __asm__("" : "+v"(sums[i]));                                                           \
        }                                                                                          \
    }

__attribute__((target("avx512f"))) static double fma512(void) {
    const __m512 x = _mm512_set1_ps(0.5f), y = _mm512_set1_ps(0.25f);
    SUM_LOOP(__m512, _mm512_setzero_ps(), _mm512_fmadd_ps(x, y, sums[i]))
    return 2.0 * 16 * SUMS * LOOPS;
}

__attribute__((target("avx512f,avx512bf16"))) static double dot512(void) {
    const __m512bh x = (__m512bh)_mm512_set1_ps(0.5f), y = (__m512bh)_mm512_set1_ps(0.25f);
    SUM_LOOP(__m512, _mm512_setzero_ps(), _mm512_dpbf16_ps(sums[i], x, y))
    return 4.0 * 16 * SUMS * LOOPS;
}

/* Sixteen registers hold twelve sums; the other twelve of the loop go over the same ones. */
__attribute__((target("avx2,fma"))) static double fma256(void) {
    const __m256 x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(0.25f);
    __m256 sums[SUMS / 2];
#pragma clang loop unroll(full)
    for (int i = 0; i < SUMS / 2; i++)
        sums[i] = _mm256_setzero_ps();
    for (int n = 0; n < 2 * LOOPS; n++) {
#pragma clang loop unroll(full)
        for (int i = 0; i < SUMS / 2; i++) {
            sums[i] = _mm256_fmadd_ps(x, y, sums[i]);
            __asm__("" : "+x"(sums[i]));
        }
    }
    return 2.0 * 8 * SUMS * LOOPS;
}

struct sample {
    enum limit which;
    const char *memory;
    size_t bytes;
    double per_second;
};

__attribute__((target("avx2"))) static double read_all(const char *memory, size_t bytes) {
    __m256i mix[8];
    memset(mix, 0, sizeof mix);
    for (size_t at = 0; at + sizeof mix <= bytes; at += sizeof mix)
        for (size_t i = 0; i < 8; i++)
            mix[i] =
                _mm256_xor_si256(mix[i], _mm256_loadu_si256((const void *)(memory + at + 32 * i)));
    __asm__ volatile("" : : "m"(mix));
    return (double)bytes;
}

static void *run_sample(void *ctx) {
    struct sample *s = ctx;
    double done = 0;
    const double start = seconds();
    if (s->which == LIMIT_READ)
        done = read_all(s->memory, s->bytes);
    else if (s->which == LIMIT_BF16_DOT)
        done = __builtin_cpu_supports("avx512bf16") ? dot512() : 0;
    else if (__builtin_cpu_supports("avx512f"))
        done = fma512();
    else
        done = __builtin_cpu_supports("avx2") ? fma256() : 0;
    s->per_second = done / (seconds() - start);
    return NULL;
}

double limit_sample(enum limit which, int threads) {
    static char *memory;
    struct sample samples[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    double sum = 0;
    if (which == LIMIT_READ && !memory) {
        memory = malloc(read_bytes);
        memset(memory, 1, read_bytes);
    }
    for (int n = 0; n < threads; n++) {
        const size_t share = read_bytes / (size_t)threads;
        samples[n] = (struct sample){.which = which, .bytes = share};
        if (memory)
            samples[n].memory = memory + share * (size_t)n;
        pthread_create(&ids[n], NULL, run_sample, &samples[n]);
    }
    for (int n = 0; n < threads; n++) {
        pthread_join(ids[n], NULL);
        sum += samples[n].per_second;
    }
    return sum * 1e-9;
}

/* What is used of OpenBLAS, as its cblas.h declares it. It is opened at run time, so that building needs none. */
enum { CBLAS_ROW_MAJOR = 101, CBLAS_NO_TRANS = 111 };

static struct {
    void (*set_num_threads)(int threads);
    void (*sgemm)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                  const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
} blas;

static void open_blas(void) {
    void *const library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "no OpenBLAS, which ./dev bench installs: %s\n", dlerror());
        exit(1);
    }
    *(void **)&blas.set_num_threads = dlsym(library, "openblas_set_num_threads");
    *(void **)&blas.sgemm = dlsym(library, "cblas_sgemm");
}

double sgemm_sample(int threads) {
    enum { N = 2048 };
    static float *a, *b, *c;
    if (!a) {
        open_blas();
        a = malloc(sizeof(float) * N * N);
        b = malloc(sizeof(float) * N * N);
        c = malloc(sizeof(float) * N * N);
        for (int i = 0; i < N * N; i++)
            a[i] = b[i] = (float)(i % 101) * 0.01f;
    }
    blas.set_num_threads(threads);
    const double start = seconds();
    blas.sgemm(CBLAS_ROW_MAJOR, CBLAS_NO_TRANS, CBLAS_NO_TRANS, N, N, N, 1, a, N, b, N, 0, c, N);
    return 2.0 * N * N * N / (seconds() - start) * 1e-9;
}
