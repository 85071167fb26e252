/* What this machine can do at best, measured by small loops of one kind of instruction. */
#ifndef DLATTN_BENCH_CPU_LIMITS_H_
#define DLATTN_BENCH_CPU_LIMITS_H_

enum limit { LIMIT_FMA, LIMIT_BF16_DOT, LIMIT_READ, LIMIT_COUNT };

/* GFLOP/s of f32 FMA (AVX-512, or AVX2 where there is no more) or of vdpbf16ps, or GB/s read from memory, of `threads`
 * threads together in a sample of a few milliseconds; 0 if the machine has no such instruction. Not thread-safe. */
double limit_sample(enum limit which, int threads);

/* GFLOP/s of one OpenBLAS sgemm, 2048^3. */
double sgemm_sample(int threads);

/* Seconds of a monotonic clock. */
double seconds(void);

#endif /* DLATTN_BENCH_CPU_LIMITS_H_ */
