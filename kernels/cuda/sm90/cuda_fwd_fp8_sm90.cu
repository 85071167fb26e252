// The instances of cuda_fwd_fp8_sm90 for the head dim SM90_D, named after what fp8_tiles.inc says of them.
#include "kernels/cuda/sm90/fwd_fp8.cuh"
#include "kernels/cuda/sm90/list.cuh"

#define INSTANCE(name, E, VARIANT, D, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, BLOCKS, USE)         \
    extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), BLOCKS)                   \
        name(const __grid_constant__ sm90_params p) {                                              \
        using Config = Float8Config<E, D, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, BLOCKS,          \
                                    SM90_FLOAT8_SETTLES_##USE, VARIANT>;                           \
        static_assert(Config::SHARED_BYTES == SM90_FLOAT8_SHARED_BYTES(D, KEYS, WARPGROUPS,        \
                                                                       STAGES, QUERY_STAGES,       \
                                                                       BLOCKS, USE),               \
                      "");                                                                         \
        forward_float8<Config>(p);                                                                 \
    }
#define INSTANCES_SHORT(D, ...)                                                                    \
    INSTANCE(cuda_fwd_fp8_sm90_##D##_short_e4m3, __nv_fp8_e4m3, PLACED, D, __VA_ARGS__, SHORT)     \
    INSTANCE(cuda_fwd_fp8_sm90_##D##_short_e5m2, __nv_fp8_e5m2, PLACED, D, __VA_ARGS__, SHORT)
#define INSTANCES_ANY(D, ...)                                                                      \
    INSTANCE(cuda_fwd_fp8_sm90_##D##_e4m3, __nv_fp8_e4m3, PLACED, D, __VA_ARGS__, ANY)             \
    INSTANCE(cuda_fwd_fp8_sm90_##D##_e5m2, __nv_fp8_e5m2, PLACED, D, __VA_ARGS__, ANY)             \
    INSTANCE(cuda_fwd_fp8_sm90_##D##_e4m3_softcap, __nv_fp8_e4m3, SOFTCAP, D, __VA_ARGS__, ANY)    \
    INSTANCE(cuda_fwd_fp8_sm90_##D##_e5m2_softcap, __nv_fp8_e5m2, SOFTCAP, D, __VA_ARGS__, ANY)
#define TILE(D, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, BLOCKS, USE)                               \
    INSTANCES_##USE(D, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, BLOCKS)
#include "kernels/cuda/sm90/fp8_tiles.inc"

#define LIST(D) LIST_(D)
#define LIST_(D)                                                                                   \
    extern "C" __global__ void __launch_bounds__(SM90_LIST_THREADS)                                \
        cuda_fwd_fp8_sm90_list_##D(const __grid_constant__ sm90_params p) {                        \
        list_tiles(p);                                                                             \
    }
LIST(SM90_D)
