/* f16 by AMX tiles, each element two bf16 terms. */
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16"
#include "kernels/cpu/x86_64/vec_avx512.h"
#include "kernels/cpu/x86_64/vec_bf16.h"

#define VECTORS 4
#define TILE_K 64
#define BLOCKS 4
#define ELEMENT DTYPE_F16
#define TERMS 2
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/backward_template.h"

#include "kernels/cpu/x86_64/backward_amx.h"

#include "kernels/cpu/backward_row.h"

ROW_FUNCTIONS(cpu_bwd_amx_f16);

bool cpu_bwd_amx_f16_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return backward_plan(plan, p, &body);
}

int32_t cpu_bwd_amx_f16_launch(const struct plan *plan, const struct problem *p,
                               const struct exec *exec) {
    return backward_launch(plan, p, exec, &body);
}
