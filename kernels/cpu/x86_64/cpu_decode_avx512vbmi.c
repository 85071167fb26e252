/* Few query rows over keys or values of e4m3: cpu_decode_avx512, which looks up what they are. */
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma,f16c"
#include "kernels/cpu/x86_64/vec_avx512.h"

#include "kernels/cpu/x86_64/vec_vbmi.h"

#define VALUE_PAIRS 4
#include "kernels/cpu/decode_template.h"

ROW_FUNCTIONS(cpu_decode_avx512vbmi);

/* By itself it leaves all else to that row, whose code it has for it. */
bool cpu_decode_avx512vbmi_plan(struct plan *plan, const struct problem *p,
                                const struct caps *caps) {
    return (p->kernel || p->key.dtype == DTYPE_E4M3 || p->value.dtype == DTYPE_E4M3) &&
           decode_plan(plan, p, caps, &body);
}

int32_t cpu_decode_avx512vbmi_launch(const struct plan *plan, const struct problem *p,
                                     const struct exec *exec) {
    return decode_launch(plan, p, exec, &body);
}
