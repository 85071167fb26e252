// The instances of cuda_fwd_sm90 for the head dim SM90_D, named after what tiles.inc says of them.
#include "kernels/cuda/sm90/fwd.cuh"
#include "kernels/cuda/sm90/list.cuh"
#include "kernels/cuda/sm90/reach.cuh"
#include "kernels/cuda/sm90/seen.cuh"

#define INSTANCE(name, E, VARIANT, PACKED, ...)                                                    \
    INSTANCE_OF(name, E, VARIANT, SM90_SHARED_BYTES(__VA_ARGS__, PACKED), __VA_ARGS__)
#define INSTANCE_OF(name, E, VARIANT, BYTES, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)        \
    extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)                        \
        name(const __grid_constant__ sm90_params p) {                                              \
        using Config = Config<E, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, VARIANT>;          \
        static_assert(Config::SHARED_BYTES == BYTES, "");                                          \
        forward<Config>(p);                                                                        \
    }
/* Three warpgroups have no registers for what other options need. */
#define INSTANCES_MANY_ROWS(name, E, ...)                                                          \
    INSTANCE(name, E, PLAIN, 0, __VA_ARGS__)                                                       \
    INSTANCE(name##_placed, E, PLACED, 0, __VA_ARGS__)                                             \
    INSTANCE(name##_alibi, E, ALIBI, 0, __VA_ARGS__)
#define INSTANCES_ALONE(name, E, ...) INSTANCE(name##_alone, E, ALONE, 0, __VA_ARGS__)
#define INSTANCES_ANY(name, E, ...)                                                                \
    INSTANCE(name, E, PLAIN, 0, __VA_ARGS__)                                                       \
    INSTANCE(name##_placed, E, PLACED, 1, __VA_ARGS__)                                             \
    INSTANCE(name##_alibi, E, ALIBI, 1, __VA_ARGS__)                                               \
    INSTANCE(name##_softcap, E, SOFTCAP, 1, __VA_ARGS__)                                           \
    INSTANCE(name##_any, E, ANY, 1, __VA_ARGS__)                                                   \
    INSTANCE(name##_any_bias, E, ANY_BIAS, 1, __VA_ARGS__)
#define INSTANCES_BIAS(name, E, ...)                                                               \
    INSTANCES_ANY(name, E, __VA_ARGS__)                                                            \
    INSTANCE(name##_rows, E, ROWS, 1, __VA_ARGS__)                                                 \
    INSTANCE_BIAS(name##_bias, E, BIAS, __VA_ARGS__)                                               \
    INSTANCE_BIAS(name##_bias_f32, E, BIAS_F32, __VA_ARGS__)
#define INSTANCE_BIAS(name, E, VARIANT, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)             \
    INSTANCE_OF(name, E, VARIANT,                                                                  \
                SM90_BIAS_SHARED_BYTES(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES), D, DV,      \
                KEYS, WARPGROUPS, STAGES, SM90_BIAS_QUERY_STAGES(D, QUERY_STAGES))
#define TILE(D, DV, KEYS, WARPGROUPS, ...)                                                         \
    TILE_(cuda_fwd_sm90_##D##_##DV##_##KEYS##_##WARPGROUPS, D, DV, KEYS, WARPGROUPS, __VA_ARGS__)
#define TILE_(name, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                            \
    INSTANCES_##USE(name##_f16, __half, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)             \
        INSTANCES_##USE(name##_bf16, __nv_bfloat16, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)
#include "kernels/cuda/sm90/tiles.inc"

#define BEFORE(D) BEFORE_(D)
#define BEFORE_(D)                                                                                 \
    extern "C" __global__ void __launch_bounds__(SM90_LIST_THREADS)                                \
        cuda_fwd_sm90_list_##D(const __grid_constant__ sm90_params p) {                            \
        list_tiles(p);                                                                             \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(SM90_SEEN_THREADS)                                \
        cuda_fwd_sm90_seen_##D(const __grid_constant__ sm90_params p) {                            \
        find_seen(p);                                                                              \
    }                                                                                              \
    FIND(norms, D, f16, __half)                                                                    \
    FIND(norms, D, bf16, __nv_bfloat16)                                                            \
    FIND(reach, D, f16, __half)                                                                    \
    FIND(reach, D, bf16, __nv_bfloat16)
#define FIND(WHAT, D, TYPE, E)                                                                     \
    extern "C" __global__ void __launch_bounds__(SM90_REACH_THREADS)                               \
        cuda_fwd_sm90_##WHAT##_##D##_##TYPE(const __grid_constant__ sm90_params p) {               \
        find_##WHAT<E>(p);                                                                         \
    }
BEFORE(SM90_D)
