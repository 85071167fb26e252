// The instances of cuda_bwd_sm80, named after what bwd_tiles.inc says of them.
#include "kernels/cuda/sm80/bwd.cuh"

// Kernels start where the one before them leaves room, and wait for it. Rows need what `stats` has found, which is there when keys have
// started, but not what keys find: they wait at their end, so that what follows finds both done.
__device__ __forceinline__ void start(bool waits) {
    if (waits)
        wait_for_predecessor();
    let_successor_start();
}
__device__ __forceinline__ bool is_beside_keys(const bwd_params &p) {
    return p.flags & BWD_ROWS_BESIDE_KEYS;
}

#define INSTANCE(name, threads, blocks, ...)                                                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                  \
        name(const __grid_constant__ bwd_params p) {                                               \
        start(true);                                                                               \
        __VA_ARGS__(p);                                                                            \
    }
#define INSTANCE_OF_ROWS(name, threads, blocks, ...)                                               \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                  \
        name(const __grid_constant__ bwd_params p) {                                               \
        start(!is_beside_keys(p));                                                                 \
        __VA_ARGS__(p);                                                                            \
        if (is_beside_keys(p))                                                                     \
            wait_for_predecessor();                                                                \
    }
#define BOTH(name, threads, blocks, function, ...)                                                 \
    INSTANCE(cuda_bwd_sm80_f16_##name, threads, blocks, function<__half, __VA_ARGS__>)             \
    INSTANCE(cuda_bwd_sm80_bf16_##name, threads, blocks, function<__nv_bfloat16, __VA_ARGS__>)

#define KEYS(D, WARPS, MT, BM, MINB, EXTRAS)                                                       \
    BOTH(keys_##D##_##WARPS##_##MT##_##BM##_##EXTRAS, WARPS * 32, MINB, bwd_keys, D, WARPS, MT,    \
         BM, EXTRAS)
#define ROWS(D, WARPS, MT, BN, MINB, EXTRAS)                                                       \
    INSTANCE_OF_ROWS(cuda_bwd_sm80_f16_rows_##D##_##WARPS##_##MT##_##BN##_##EXTRAS, WARPS * 32,    \
                     MINB, bwd_rows<__half, D, WARPS, MT, BN, EXTRAS>)                             \
    INSTANCE_OF_ROWS(cuda_bwd_sm80_bf16_rows_##D##_##WARPS##_##MT##_##BN##_##EXTRAS, WARPS * 32,   \
                     MINB, bwd_rows<__nv_bfloat16, D, WARPS, MT, BN, EXTRAS>)
#define SUMS(D, WARPS, MT, BM, MINB, LAG)                                                          \
    BOTH(sums_##D##_##WARPS##_##MT##_##BM##_##LAG, WARPS * 32, MINB, bwd_keys, D, WARPS, MT, BM,   \
         false, true, LAG)                                                                         \
    BOTH(prepare_##D##_##WARPS##_##MT##_##BM##_##LAG, STATS_THREADS, D > 128 ? 4 : 6, bwd_prepare, \
         D)                                                                                        \
    BOTH(finish_##D##_##WARPS##_##MT##_##BM##_##LAG, FINISH_THREADS, 6, bwd_finish, D)
#define STATS(D, EXTRAS) BOTH(stats_##D##_##EXTRAS, STATS_THREADS, 1, bwd_stats, D, EXTRAS)
#define BIAS(D) BOTH(bias_##D, BIAS_THREADS, 1, bwd_bias, D)
#include "kernels/cuda/sm80/bwd_tiles.inc"

INSTANCE(cuda_bwd_sm80_f16_sinks, SUM_THREADS, 1, bwd_sinks<__half>)
INSTANCE(cuda_bwd_sm80_bf16_sinks, SUM_THREADS, 1, bwd_sinks<__nv_bfloat16>)
INSTANCE(cuda_bwd_sm80_slopes, SUM_THREADS, 1, bwd_slopes<float>)
