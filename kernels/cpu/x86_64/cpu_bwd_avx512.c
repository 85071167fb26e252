/* f32, and f16 and bf16 widened to f32. */
#include "kernels/cpu/x86_64/vec_avx512.h"

#define VECTORS 4
#define TILE_K 64
#define PAIRS 0
#define BLOCKS 2
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/backward_template.h"

#include "kernels/cpu/backward_f32.h"

#include "kernels/cpu/backward_row.h"

ROW_FUNCTIONS(cpu_bwd_avx512);

bool cpu_bwd_avx512_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return backward_plan(plan, p, &body);
}

int32_t cpu_bwd_avx512_launch(const struct plan *plan, const struct problem *p,
                              const struct exec *exec) {
    return backward_launch(plan, p, exec, &body);
}
