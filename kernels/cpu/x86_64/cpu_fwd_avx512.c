/* f32, and f16 and bf16 widened to f32: 6 x 4 vectors of sums in 24 of the 32 registers. */
#include "kernels/cpu/x86_64/vec_avx512.h"

#define VECTORS 4
#define TILE_K 64
#define PAIRS 0
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/forward_f32.h"
#include "kernels/cpu/forward_products.h"
#include "kernels/cpu/forward_row.h"

ROW_FUNCTIONS(cpu_fwd_avx512);

bool cpu_fwd_avx512_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return forward_plan(plan, p, &body);
}

int32_t cpu_fwd_avx512_launch(const struct plan *plan, const struct problem *p,
                              const struct exec *exec) {
    return forward_launch(plan, p, exec, &body);
}
