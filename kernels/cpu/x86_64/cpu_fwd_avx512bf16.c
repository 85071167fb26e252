/*
 * bf16 by vdpbf16ps, which sums two products for each f32 lane: twice the work of an f32 FMA for each instruction
 * where the two run equally often (AMD's cores). Intel's run vdpbf16ps at a quarter of the rate of FMA, so that
 * widening to f32 (cpu_fwd_avx512) is faster there.
 */
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"
#include "kernels/cpu/x86_64/vec_avx512.h"
#include "kernels/cpu/x86_64/vec_bf16.h"

#define VECTORS 4
#define TILE_K 128
#define PAIRS 1
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/forward_pairs.h"
#include "kernels/cpu/forward_products.h"

/* Elements d and on of value r, n of them, times its scale; an absent value is 0. */
VEC_INLINE vec value_elements(const struct rows *rows, int32_t r, int32_t end, int64_t d, int64_t n,
                              enum dtype dtype) {
    if (r == end)
        return vec_set(0);
    const vec x = load_some((const char *)row_at(rows, r) + d * dtype_bytes(dtype), dtype, n);
    return rows->scale ? vec_mul(x, vec_set(rows->scale[r])) : x;
}

/* Words (value[2 j][d], value[2 j + 1][d]); an absent last key is 0. */
VEC_FN static struct operand load_value(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                        enum dtype dtype) {
    const int64_t stride = padded(dim, 16);
    for (int32_t r = 0; r < n; r += 2)
        for (int64_t d = 0; d < dim; d += VEC_LANES) {
            const int64_t some = at_most(dim - d, VEC_LANES);
            float *at = to + r / 2 * stride + d;
            if (dtype == DTYPE_BF16 && !rows->scale)
                vec_store(at,
                          pair_words((const uint16_t *)row_at(rows, r) + d,
                                     r + 1 < n ? (const uint16_t *)row_at(rows, r + 1) + d : NULL,
                                     some));
            else
                vec_store(at, pack_pairs(value_elements(rows, r, n, d, some, dtype),
                                         value_elements(rows, r + 1, n, d, some, dtype)));
        }
    return (struct operand){to, stride};
}

#include "kernels/cpu/forward_row.h"

ROW_FUNCTIONS(cpu_fwd_avx512bf16);

bool cpu_fwd_avx512bf16_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    if (!p->kernel && !(caps->cpu & CPU_FAST_AVX512BF16))
        return false;
    return forward_plan(plan, p, &body);
}

int32_t cpu_fwd_avx512bf16_launch(const struct plan *plan, const struct problem *p,
                                  const struct exec *exec) {
    return forward_launch(plan, p, exec, &body);
}
