/* f64: 6 x 4 vectors of sums in 24 of the 32 registers. */
#include "kernels/cpu/x86_64/vec_f64_avx512.h"

#define VECTORS 4
#include "kernels/cpu/f64_template.h"

ROW_FUNCTIONS(cpu_fwd_f64_avx512);

bool cpu_fwd_f64_avx512_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return f64_plan(plan, p, &body);
}

int32_t cpu_fwd_f64_avx512_launch(const struct plan *plan, const struct problem *p,
                                  const struct exec *exec) {
    return f64_launch(plan, p, exec, &body);
}
