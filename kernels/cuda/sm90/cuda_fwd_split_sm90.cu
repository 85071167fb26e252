// The instances of cuda_fwd_split_sm90 for the head dim SM90_D, named after what tiles.inc says of them.
#include "kernels/cuda/sm90/pair.cuh"
#include "kernels/cuda/sm90/split.cuh"

#define PARTS(name, FORWARD, WARPGROUPS, ...)                                                      \
    extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)                        \
        name(const __grid_constant__ sm90_params p) {                                              \
        FORWARD<__VA_ARGS__>(p);                                                                   \
    }
#define MERGED(name, FORWARD, DV, WARPGROUPS, ...)                                                 \
    PARTS(name, FORWARD, WARPGROUPS, __VA_ARGS__)                                                  \
    extern "C" __global__ void __launch_bounds__(4 * (DV), 1024 / (4 * (DV)))                      \
        name##_merge(const __grid_constant__ sm90_params p) {                                      \
        merge_parts<__VA_ARGS__>(p);                                                               \
    }
#define WIDE(name, E, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)                               \
    MERGED(name, forward, DV, WARPGROUPS,                                                          \
           Config<E, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, SPLIT>)
/* Of pages of few keys; what merges them is the same. */
#define BY_ROWS(name, E, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)                            \
    PARTS(name, forward, WARPGROUPS,                                                               \
          Config<E, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, SPLIT_ROWS>)
/* Half as many rows, which two warpgroups share. */
#define PAIR(name, E, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)                               \
    MERGED(                                                                                        \
        name, forward_pair, DV, WARPGROUPS,                                                        \
        Config<E, D, DV, KEYS, WARPGROUPS, SM90_PAIR_STAGES(STAGES), QUERY_STAGES, SPLIT_PAIRED>)
#define INSTANCES_MANY_ROWS(name, ...)
#define INSTANCES_ALONE(name, ...)
/* Pairs, too, where rows are whole columns. */
#define INSTANCES_BIAS(name, D, ...)                                                               \
    INSTANCES_ANY(name, D, __VA_ARGS__)                                                            \
    BY_ROWS(name##_f16_rows, __half, D, __VA_ARGS__)                                               \
    BY_ROWS(name##_bf16_rows, __nv_bfloat16, D, __VA_ARGS__)                                       \
    PAIRS_##D(name, D, __VA_ARGS__)
#define PAIRS_64 PAIRS
#define PAIRS_96(...)
#define PAIRS_128 PAIRS
#define PAIRS(name, ...)                                                                           \
    PAIR(name##_f16_pair, __half, __VA_ARGS__) PAIR(name##_bf16_pair, __nv_bfloat16, __VA_ARGS__)
#define INSTANCES_ANY(name, ...)                                                                   \
    WIDE(name##_f16, __half, __VA_ARGS__) WIDE(name##_bf16, __nv_bfloat16, __VA_ARGS__)
#define TILE(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                                   \
    INSTANCES_##USE(cuda_fwd_split_sm90_##D##_##DV##_##KEYS##_##WARPGROUPS, D, DV, KEYS,           \
                    WARPGROUPS, STAGES, QUERY_STAGES)
#include "kernels/cuda/sm90/tiles.inc"
