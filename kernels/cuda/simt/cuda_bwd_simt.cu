// The instances of cuda_bwd_simt, named after what bwd_tiles.inc says of them.
#include "kernels/cuda/simt/bwd.cuh"

#define INSTANCE(name, threads, blocks, ...)                                                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                  \
        cuda_bwd_simt_##name(const __grid_constant__ bwd_params p) {                               \
        __VA_ARGS__(p);                                                                            \
    }
#define TILE(D, R, C)                                                                              \
    INSTANCE(stats_##D, 128, 2, bwd_stats<float, D, R, C>)                                         \
    INSTANCE(keys_##D, 128, 2, bwd_keys<float, D, R, C>)                                           \
    INSTANCE(rows_##D, 128, 2, bwd_rows<float, D, R, C>)                                           \
    INSTANCE(bias_##D, 128, 2, bwd_bias<float, D, R, C>)
#include "kernels/cuda/simt/bwd_tiles.inc"

INSTANCE(sinks, SUM_THREADS, 1, bwd_sinks<float>)
INSTANCE(slopes, SUM_THREADS, 1, bwd_slopes<float>)
