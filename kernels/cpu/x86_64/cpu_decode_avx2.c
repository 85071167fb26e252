/* Few query rows: f32, and f16 and bf16 widened to f32 on the way from memory. */
#include "kernels/cpu/x86_64/vec_avx2.h"

#define VALUE_PAIRS 2
#include "kernels/cpu/decode_template.h"

ROW_FUNCTIONS(cpu_decode_avx2);

bool cpu_decode_avx2_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    return decode_plan(plan, p, caps, &body);
}

int32_t cpu_decode_avx2_launch(const struct plan *plan, const struct problem *p,
                               const struct exec *exec) {
    return decode_launch(plan, p, exec, &body);
}
