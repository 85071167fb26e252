// The instances of cuda_bwd_tf32x3, named after what the tiles say of them.
#include "kernels/cuda/tf32x3/bwd.cuh"

#define INSTANCE(name, threads, blocks, ...)                                                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                  \
        cuda_bwd_tf32x3_##name(const __grid_constant__ bwd_params p) {                             \
        __VA_ARGS__(p);                                                                            \
    }

#define TILE(D, WARPS, KEYS, ROWS, MINB)                                                           \
    INSTANCE(sums_##D##_##KEYS##_0, WARPS * 32, MINB, bwd_sums<D, WARPS, KEYS, ROWS, false>)       \
    INSTANCE(sums_##D##_##KEYS##_1, WARPS * 32, MINB, bwd_sums<D, WARPS, KEYS, ROWS, true>)
#include "kernels/cuda/tf32x3/bwd_tiles.inc"
#undef TILE

#define TILE(D, R, C)                                                                              \
    INSTANCE(stats_##D, 128, 2, bwd_near_stats<D, R, C>)                                           \
    INSTANCE(keys_##D, 128, 2, bwd_odd_keys<D, R, C>)                                              \
    INSTANCE(rows_##D, 128, 2, bwd_odd_rows<D, R, C>)                                              \
    INSTANCE(bias_##D, 128, 2, bwd_bias<float, D, R, C>)                                           \
    INSTANCE(finish_##D, FINISH_THREADS, 1, bwd_finish<D>)
#include "kernels/cuda/simt/bwd_tiles.inc"

INSTANCE(scan, SCAN_THREADS, 1, bwd_scan)
INSTANCE(sinks, SUM_THREADS, 1, bwd_sinks<float>)
INSTANCE(slopes, SUM_THREADS, 1, bwd_slopes<float>)
