// The instances of cuda_fwd_latent_sm90.
#include "kernels/cuda/sm90/latent.cuh"

#define INSTANCES(type, E)                                                                         \
    extern "C" __global__ void __launch_bounds__(LATENT_THREADS, 1)                                \
        cuda_fwd_latent_sm90_##type(const __grid_constant__ latent_params p) {                     \
        attend_latent<E>(p);                                                                       \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(LATENT_MERGE_WARPS * 32)                          \
        cuda_fwd_latent_sm90_merge_##type(const __grid_constant__ packed_params p) {               \
        merge_splits<E, E, LATENT_DV / 128, LATENT_MERGE_WARPS>(p);                                \
    }
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)
