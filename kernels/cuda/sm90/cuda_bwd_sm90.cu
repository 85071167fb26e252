// The kernels of cuda_bwd_sm90 for the head dim SM90_D.
#include "kernels/cuda/sm90/bwd.cuh"

#define KERNEL(name, threads, ...)                                                                 \
    extern "C" __global__ void __launch_bounds__(threads)                                          \
        name(const __grid_constant__ sm90_bwd_params p) {                                          \
        __VA_ARGS__(p);                                                                            \
    }
#define MAIN(name, E, D, SOFTCAP)                                                                  \
    extern "C" __global__ void __launch_bounds__(384, 1)                                           \
        name(const __grid_constant__ sm90_bwd_params p) {                                          \
        sm90::backward<sm90::BwdConfig<E, D, SOFTCAP>>(p);                                         \
    }
#define INSTANCES(E, type, D)                                                                      \
    MAIN(cuda_bwd_sm90_##D##_##type, E, D, false)                                                  \
    MAIN(cuda_bwd_sm90_##D##_##type##_softcap, E, D, true)                                         \
    KERNEL(cuda_bwd_sm90_rows_##D##_##type, SM90_BWD_SMALL_THREADS,                                \
           sm90::finish_rows<E, D, false>)                                                         \
    KERNEL(cuda_bwd_sm90_rows_##D##_##type##_softcap, SM90_BWD_SMALL_THREADS,                      \
           sm90::finish_rows<E, D, true>)                                                          \
    KERNEL(cuda_bwd_sm90_keys_##D##_##type, SM90_BWD_SMALL_THREADS,                                \
           sm90::finish_keys<E, D, false>)                                                         \
    KERNEL(cuda_bwd_sm90_keys_##D##_##type##_softcap, SM90_BWD_SMALL_THREADS,                      \
           sm90::finish_keys<E, D, true>)
#define TILE(D)                                                                                    \
    INSTANCES(__half, f16, D)                                                                      \
    INSTANCES(__nv_bfloat16, bf16, D)
#include "kernels/cuda/sm90/bwd_tiles.inc"
