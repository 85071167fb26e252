/* bf16 by vdpbf16ps, where it runs as often as FMA: see cpu_fwd_avx512bf16.c. */
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"
#include "kernels/cpu/x86_64/vec_avx512.h"
#include "kernels/cpu/x86_64/vec_bf16.h"

#define VECTORS 4
#define TILE_K 64
#define PAIRS 1
#define BLOCKS 4
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/backward_template.h"

#include "kernels/cpu/x86_64/backward_pairs.h"

#include "kernels/cpu/backward_row.h"

ROW_FUNCTIONS(cpu_bwd_avx512bf16);

bool cpu_bwd_avx512bf16_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    if (!p->kernel && !(caps->cpu & CPU_FAST_AVX512BF16))
        return false;
    return backward_plan(plan, p, &body);
}

int32_t cpu_bwd_avx512bf16_launch(const struct plan *plan, const struct problem *p,
                                  const struct exec *exec) {
    return backward_launch(plan, p, exec, &body);
}
