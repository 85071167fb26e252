// The instances of cuda_decode_sm80, named after what tiles.inc says of them.
#include "kernels/cuda/decode/decode.cuh"

#define INSTANCE(name, E, C, D, NT, MT, WARPS, STAGES)                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                                    \
        name(const __grid_constant__ packed_params p) {                                            \
        static_assert(Tile<sizeof(C), D, D, NT, MT, WARPS, STAGES>::SHARED_BYTES ==                \
                      TILE_SHARED_BYTES(sizeof(C), D, NT, MT, WARPS, STAGES));                     \
        cuda_decode_sm80<E, C, D, D, NT, MT, WARPS, STAGES, MERGE_WARPS>(p);                       \
    }
#define TILE(D, NT, MT, WARPS, STAGES)                                                             \
    INSTANCE(cuda_decode_sm80_f16_##D##_##NT##_##WARPS, __half, __half, D, NT, MT, WARPS, STAGES)  \
    INSTANCE(cuda_decode_sm80_bf16_##D##_##NT##_##WARPS, __nv_bfloat16, __nv_bfloat16, D, NT, MT,  \
             WARPS, STAGES)
#define FLOAT8_TILE(D, NT, MT, WARPS, STAGES)                                                      \
    INSTANCE(cuda_decode_sm80_f16_float8_##D##_##NT##_##WARPS, __half, Float8, D, NT, MT, WARPS,   \
             STAGES)                                                                               \
    INSTANCE(cuda_decode_sm80_bf16_float8_##D##_##NT##_##WARPS, __nv_bfloat16, Float8, D, NT, MT,  \
             WARPS, STAGES)
#include "kernels/cuda/decode/tiles.inc"

#define MERGE(name, E, C)                                                                          \
    extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32)                                 \
        name(const __grid_constant__ packed_params p) {                                            \
        merge_splits<E, C, 2, MERGE_WARPS>(p);                                                     \
    }
MERGE(cuda_decode_sm80_merge_f16, __half, __half)
MERGE(cuda_decode_sm80_merge_bf16, __nv_bfloat16, __nv_bfloat16)
MERGE(cuda_decode_sm80_merge_f16_float8, __half, Float8)
MERGE(cuda_decode_sm80_merge_bf16_float8, __nv_bfloat16, Float8)
