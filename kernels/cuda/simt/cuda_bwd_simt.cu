// The instances of cuda_bwd_simt, named after what bwd_tiles.inc says of them.
#include "kernels/cuda/simt/bwd.cuh"

#define INSTANCE(name, threads, blocks, ...)                                                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                  \
        cuda_bwd_simt_##name(const __grid_constant__ bwd_params p) {                               \
        __VA_ARGS__(p);                                                                            \
    }
#define TILE(TYPE, CTYPE, D, R, C)                                                                 \
    INSTANCE(TYPE##_stats_##D, 128, 2, bwd_stats<CTYPE, D, R, C>)                                  \
    INSTANCE(TYPE##_keys_##D, 128, 2, bwd_keys<CTYPE, D, R, C>)                                    \
    INSTANCE(TYPE##_rows_##D, 128, 2, bwd_rows<CTYPE, D, R, C>)                                    \
    INSTANCE(TYPE##_bias_##D, 128, 2, bwd_bias<CTYPE, D, R, C>)
#define F32(D, R, C) TILE(f32, float, D, R, C)
#define F64(D, R, C) TILE(f64, double, D, R, C)
#include "kernels/cuda/simt/bwd_tiles.inc"

INSTANCE(f32_sinks, SUM_THREADS, 1, bwd_sinks<float>)
INSTANCE(f64_sinks, SUM_THREADS, 1, bwd_sinks<double>)
INSTANCE(f32_slopes, SUM_THREADS, 1, bwd_slopes<float>)
INSTANCE(f64_slopes, SUM_THREADS, 1, bwd_slopes<double>)
