/* Few query rows: f32, and f16 and bf16 widened to f32 on the way from memory. */
#include "kernels/cpu/x86_64/vec_avx512.h"

#define VALUE_PAIRS 4
#include "kernels/cpu/decode_template.h"

ROW_FUNCTIONS(cpu_decode_avx512);

bool cpu_decode_avx512_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    return decode_plan(plan, p, caps, &body);
}

int32_t cpu_decode_avx512_launch(const struct plan *plan, const struct problem *p,
                                 const struct exec *exec) {
    return decode_launch(plan, p, exec, &body);
}
