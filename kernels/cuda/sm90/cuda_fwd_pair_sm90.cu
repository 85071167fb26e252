// The instances of cuda_fwd_pair_sm90 for the head dim SM90_D, named after what tiles.inc says of them.
#include "kernels/cuda/sm90/pair.cuh"

#define INSTANCE(name, E, ...)                                                                     \
    extern "C" __global__ void __launch_bounds__(384, 1)                                           \
        name(const __grid_constant__ sm90_params p) {                                              \
        forward_pair<Config<E, __VA_ARGS__, PAIRED>>(p);                                           \
    }
#define INSTANCES_MANY_ROWS(name, ...)
#define INSTANCES_ALONE(name, ...)
#define INSTANCES_ANY(name, ...)
#define INSTANCES_BIAS(name, ...)                                                                  \
    INSTANCE(name##_f16, __half, __VA_ARGS__) INSTANCE(name##_bf16, __nv_bfloat16, __VA_ARGS__)
#define TILE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                                   \
    INSTANCES_##USE(cuda_fwd_pair_sm90_##D##_##DV##_##KEYS, D, DV, KEYS, WARPGROUPS,               \
                    SM90_PAIR_STAGES(STAGES), QUERY_STAGES)
#include "kernels/cuda/sm90/tiles.inc"
