// The instances of cuda_fwd_sm90 for the head dim SM90_D, named after what tiles.inc says of them.
#include "kernels/cuda/sm90/fwd.cuh"

#define INSTANCE(name, E, SOFTCAP, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)                  \
    extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)                        \
        name(const __grid_constant__ sm90_params p) {                                              \
        using Tile = sm90::Config<E, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, SOFTCAP>;      \
        static_assert(Tile::kSharedBytes ==                                                        \
                          SM90_SHARED_BYTES(D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES),        \
                      "");                                                                         \
        sm90::forward<Tile>(p);                                                                    \
    }
#define TILE(D, DV, KEYS, WARPGROUPS, ...)                                                         \
    TILE_(cuda_fwd_sm90_##D##_##DV##_##KEYS##_##WARPGROUPS, D, DV, KEYS, WARPGROUPS, __VA_ARGS__)
#define TILE_(name, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES, USE)                            \
    INSTANCE(name##_f16, __half, false, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)             \
    INSTANCE(name##_bf16, __nv_bfloat16, false, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)     \
    INSTANCE(name##_f16_softcap, __half, true, D, DV, KEYS, WARPGROUPS, STAGES, QUERY_STAGES)      \
    INSTANCE(name##_bf16_softcap, __nv_bfloat16, true, D, DV, KEYS, WARPGROUPS, STAGES,            \
             QUERY_STAGES)
#include "kernels/cuda/sm90/tiles.inc"
