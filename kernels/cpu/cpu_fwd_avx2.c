/* f32, and f16 (F16C) and bf16 widened to f32: 6 x 2 vectors of sums in 12 of the 16 registers. */
#include "kernels/cpu/vec_avx2.h"

#define NAME cpu_fwd_avx2
#define VECTORS 2
#define TILE_K 64
#define PAIRS 0
#include "kernels/cpu/forward_template.h"
