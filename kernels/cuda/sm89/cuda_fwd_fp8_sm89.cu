// The instances of cuda_fwd_fp8_sm89, named after what tiles.inc says of them.
#include "kernels/cuda/sm89/fwd.cuh"

#define INSTANCE(name, E5M2, D, WARPS, MT, BN, MINB, EXTRAS)                                       \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, MINB)                                 \
        name(const __grid_constant__ sm89_params p) {                                              \
        cuda_fwd_fp8_sm89<E5M2, Float8Tile<D, WARPS, MT, BN>, EXTRAS>(p);                          \
    }
#define TILE(D, WARPS, MT, BN, MINB, EXTRAS)                                                       \
    static_assert(Float8Tile<D, WARPS, MT, BN>::SHARED_BYTES ==                                    \
                  SM89_SHARED_BYTES(D, WARPS, MT, BN));                                            \
    INSTANCE(cuda_fwd_fp8_sm89_e4m3_##D##_##EXTRAS, false, D, WARPS, MT, BN, MINB, EXTRAS)         \
    INSTANCE(cuda_fwd_fp8_sm89_e5m2_##D##_##EXTRAS, true, D, WARPS, MT, BN, MINB, EXTRAS)
#include "kernels/cuda/sm89/tiles.inc"
