// The instances of cuda_fwd_simt, named after what tiles.inc says of them.
#include "kernels/cuda/simt/fwd.cuh"

#define TILE(TYPE, CTYPE, D, R, C, EXTRAS)                                                         \
    static_assert(Simt<CTYPE, D, R, C>::SHARED_BYTES == TILE_SHARED_BYTES(CTYPE, D, R, C));        \
    extern "C" __global__ void __launch_bounds__(128, 2)                                           \
        cuda_fwd_simt_##TYPE##_##D##_##EXTRAS(const __grid_constant__ fwd_pair_params p) {         \
        cuda_fwd_simt<CTYPE, D, R, C, EXTRAS>(p.fwd, p.pair);                                      \
    }
#define F32(D, R, C, EXTRAS) TILE(f32, float, D, R, C, EXTRAS)
#define F64(D, R, C, EXTRAS) TILE(f64, double, D, R, C, EXTRAS)
#include "kernels/cuda/simt/tiles.inc"
