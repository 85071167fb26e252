// The instances of cuda_fwd_wide_sm80, named after what tiles.inc says of them.
#include "kernels/cuda/wide/fwd.cuh"

#define INSTANCE(name, E, ROWS, BN, WM, WN, STAGES, VIEW)                                          \
    extern "C" __global__ void __launch_bounds__(WM *WN * 64, 1)                                   \
        name(const __grid_constant__ packed_params p) {                                            \
        cuda_fwd_wide_sm80<E, WIDE_D, WIDE_DV, ROWS, BN, WM, WN, STAGES, VIEW>(p);                 \
    }
#define TILE(ROWS, BN, WM, WN, STAGES, VIEW_STAGES)                                                \
    static_assert(Tile<WIDE_D, WIDE_DV, ROWS, BN, WM, WN, STAGES, false>::SHARED_BYTES ==          \
                      WIDE_TILE_BYTES(ROWS, BN, WN, (STAGES) * (BN) * (WIDE_D + WIDE_DV) * 2) &&   \
                  Tile<WIDE_D, WIDE_DV, ROWS, BN, WM, WN, VIEW_STAGES, true>::SHARED_BYTES ==      \
                      WIDE_TILE_BYTES(ROWS, BN, WN, (VIEW_STAGES) * (BN) * WIDE_D * 2));           \
    INSTANCE(cuda_fwd_wide_sm80_f16_##ROWS##_##BN##_##STAGES, __half, ROWS, BN, WM, WN, STAGES,    \
             false)                                                                                \
    INSTANCE(cuda_fwd_wide_sm80_bf16_##ROWS##_##BN##_##STAGES, __nv_bfloat16, ROWS, BN, WM, WN,    \
             STAGES, false)                                                                        \
    INSTANCE(cuda_fwd_wide_sm80_f16_view_##ROWS##_##BN##_##STAGES, __half, ROWS, BN, WM, WN,       \
             VIEW_STAGES, true)                                                                    \
    INSTANCE(cuda_fwd_wide_sm80_bf16_view_##ROWS##_##BN##_##STAGES, __nv_bfloat16, ROWS, BN, WM,   \
             WN, VIEW_STAGES, true)
#include "kernels/cuda/wide/tiles.inc"

#define MERGE(name, E)                                                                             \
    extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32)                                 \
        name(const __grid_constant__ packed_params p) {                                            \
        merge_splits<E, E, WIDE_DV / 128, MERGE_WARPS>(p);                                         \
    }
MERGE(cuda_fwd_wide_sm80_merge_f16, __half)
MERGE(cuda_fwd_wide_sm80_merge_bf16, __nv_bfloat16)
