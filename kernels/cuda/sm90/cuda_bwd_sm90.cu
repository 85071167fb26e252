// The kernels of cuda_bwd_sm90 for the head dim SM90_D.
#include "kernels/cuda/sm90/bwd_wide_rows.cuh"

#define KERNEL(name, threads, ...)                                                                 \
    extern "C" __global__ void __launch_bounds__(threads)                                          \
        name(const __grid_constant__ sm90_bwd_params p) {                                          \
        __VA_ARGS__(p);                                                                            \
    }
#define MAIN(name, ...)                                                                            \
    extern "C" __global__ void __launch_bounds__(384, 1)                                           \
        name(const __grid_constant__ sm90_bwd_params p) {                                          \
        __VA_ARGS__(p);                                                                            \
    }
#define INSTANCES(E, type, D)                                                                      \
    MAIN(cuda_bwd_sm90_##D##_##type, backward<BwdConfig<E, D, false>>)                             \
    MAIN(cuda_bwd_sm90_##D##_##type##_softcap, backward<BwdConfig<E, D, true>>)                    \
    KERNEL(cuda_bwd_sm90_rows_##D##_##type, SM90_BWD_SMALL_THREADS, finish_rows<E, D, false>)      \
    KERNEL(cuda_bwd_sm90_rows_##D##_##type##_softcap, SM90_BWD_SMALL_THREADS,                      \
           finish_rows<E, D, true>)                                                                \
    KERNEL(cuda_bwd_sm90_keys_##D##_##type, SM90_BWD_SMALL_THREADS, finish_keys<E, D, false>)      \
    KERNEL(cuda_bwd_sm90_keys_##D##_##type##_softcap, SM90_BWD_SMALL_THREADS,                      \
           finish_keys<E, D, true>)
#define WIDE(E, type, D, DV, SOFTCAP)                                                              \
    MAIN(cuda_bwd_sm90_wide_keys_##D##_##DV##_##type,                                              \
         wide_keys<WideKeysConfig<E, D, DV, SOFTCAP>>)                                             \
    MAIN(cuda_bwd_sm90_wide_rows_##D##_##DV##_##type,                                              \
         wide_rows<WideRowsConfig<E, D, DV, SOFTCAP>>)                                             \
    KERNEL(cuda_bwd_sm90_odd_rows_##D##_##DV##_##type, SM90_BWD_SMALL_THREADS,                     \
           finish_rows<E, D, SOFTCAP>)                                                             \
    KERNEL(cuda_bwd_sm90_odd_keys_##D##_##DV##_##type, SM90_BWD_SMALL_THREADS,                     \
           finish_keys<E, D, SOFTCAP>)
#define WIDE_TILE(D, DV)                                                                           \
    KERNEL(cuda_bwd_sm90_prepare_##D##_##DV##_f16, SM90_BWD_SMALL_THREADS,                         \
           prepare_wide<__half, D>)                                                                \
    KERNEL(cuda_bwd_sm90_prepare_##D##_##DV##_bf16, SM90_BWD_SMALL_THREADS,                        \
           prepare_wide<__nv_bfloat16, D>)                                                         \
    WIDE(__half, f16, D, DV, false)                                                                \
    WIDE(__half, f16_softcap, D, DV, true)                                                         \
    WIDE(__nv_bfloat16, bf16, D, DV, false)                                                        \
    WIDE(__nv_bfloat16, bf16_softcap, D, DV, true)
#define TILE(D)                                                                                    \
    INSTANCES(__half, f16, D)                                                                      \
    INSTANCES(__nv_bfloat16, bf16, D)
#include "kernels/cuda/sm90/bwd_tiles.inc"
