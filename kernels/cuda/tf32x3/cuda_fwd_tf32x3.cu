// The instances of cuda_fwd_tf32x3, named after what tiles.inc says of them.
#include "kernels/cuda/tf32x3/fwd.cuh"

#define TILE(D, WARPS, BN, MINB, EXTRAS)                                                           \
    static_assert(Tile<D, WARPS, BN>::SHARED_BYTES == TILE_SHARED_BYTES(D, WARPS, BN));            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, MINB)                                 \
        cuda_fwd_tf32x3_##D##_##BN##_##EXTRAS(const __grid_constant__ fwd_pair_params p) {         \
        cuda_fwd_tf32x3<D, WARPS, BN, EXTRAS>(p.fwd, p.pair);                                      \
    }
#include "kernels/cuda/tf32x3/tiles.inc"
