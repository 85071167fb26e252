// The instances of cuda_fwd_sm80, named after what tiles.inc says of them.
#include "kernels/cuda/sm80/fwd.cuh"

#define INSTANCE(name, E, D, DV, WARPS, MT, BN, STAGES, SPLIT, MINB, EXTRAS)                       \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, MINB)                                 \
        name(const __grid_constant__ fwd_pair_params p) {                                          \
        cuda_fwd_sm80<E, D, DV, WARPS, MT, BN, STAGES, SPLIT, EXTRAS>(p.fwd, p.pair);              \
    }
#define TILE(D, DV, WARPS, MT, BN, STAGES, SPLIT, MINB, EXTRAS)                                    \
    static_assert(Tile<D, DV, WARPS, MT, BN, STAGES, SPLIT>::SHARED_BYTES ==                       \
                  TILE_SHARED_BYTES(D, DV, WARPS, MT, BN, STAGES, SPLIT));                         \
    INSTANCE(cuda_fwd_sm80_f16_##D##_##DV##_##WARPS##_##MT##_##BN##_##STAGES##_##EXTRAS, __half,   \
             D, DV, WARPS, MT, BN, STAGES, SPLIT, MINB, EXTRAS)                                    \
    INSTANCE(cuda_fwd_sm80_bf16_##D##_##DV##_##WARPS##_##MT##_##BN##_##STAGES##_##EXTRAS,          \
             __nv_bfloat16, D, DV, WARPS, MT, BN, STAGES, SPLIT, MINB, EXTRAS)
#include "kernels/cuda/sm80/tiles.inc"
