/* f32, and f16 (F16C) and bf16 widened to f32: 6 x 2 vectors of sums in 12 of the 16 registers. */
#include "kernels/cpu/x86_64/vec_avx2.h"

#define VECTORS 2
#define TILE_K 64
#define PAIRS 0
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/forward_f32.h"
#include "kernels/cpu/forward_products.h"
#include "kernels/cpu/forward_row.h"

ROW_FUNCTIONS(cpu_fwd_avx2);

bool cpu_fwd_avx2_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return forward_plan(plan, p, &body);
}

int32_t cpu_fwd_avx2_launch(const struct plan *plan, const struct problem *p,
                            const struct exec *exec) {
    return forward_launch(plan, p, exec, &body);
}
