/* f32, and f16 and bf16 widened to f32: 6 x 4 vectors of sums in 24 of the 32 registers. */
#include "kernels/cpu/vec_avx512.h"

#define NAME cpu_fwd_avx512
#define VECTORS 4
#define TILE_K 64
#define PAIRS 0
#include "kernels/cpu/forward_template.h"
