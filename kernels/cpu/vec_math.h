/* What the templates need of any vectors: rows of any dtype, 2^x and tanh. Included after vec_*.h. */
#ifndef DLATTN_VEC_MATH_H_
#define DLATTN_VEC_MATH_H_

#include "kernels/cpu/common.h"

#include <math.h>

VEC_INLINE vec load_some(const void *p, enum dtype dtype, int64_t n) {
    return dtype == DTYPE_F32    ? vec_load_f32(p, n)
           : dtype == DTYPE_F16  ? vec_load_f16(p, n)
           : dtype == DTYPE_BF16 ? vec_load_bf16(p, n)
           : dtype == DTYPE_E5M2
               ? vec_load_float8(p, n, DTYPE_E5M2)
               : vec_mul(vec_load_float8(p, n, DTYPE_E4M3), vec_set(float8_unit(DTYPE_E4M3)));
}

VEC_INLINE void store_some(void *p, vec x, enum dtype dtype, int64_t n) {
    if (dtype == DTYPE_F32)
        vec_store_f32(p, x, n);
    else if (dtype == DTYPE_F16)
        vec_store_f16(p, x, n);
    else
        vec_store_bf16(p, x, n);
}

VEC_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

/* to[0 .. padded) = from[0 .. n) as f32, then zeros; padded is n rounded up to whole vectors. */
VEC_INLINE void widen_as(float *to, const char *from, int64_t n, enum dtype dtype, int64_t bytes) {
    int64_t d = 0;
    for (; d + VEC_LANES <= n; d += VEC_LANES)
        vec_store(to + d, load_some(from + d * bytes, dtype, VEC_LANES));
    if (d < n)
        vec_store(to + d, load_some(from + d * bytes, dtype, n - d));
}

VEC_FN static inline void widen(float *to, const char *from, int64_t n, enum dtype dtype) {
    if (dtype == DTYPE_F32)
        widen_as(to, from, n, DTYPE_F32, 4);
    else if (dtype == DTYPE_F16)
        widen_as(to, from, n, DTYPE_F16, 2);
    else if (dtype == DTYPE_BF16)
        widen_as(to, from, n, DTYPE_BF16, 2);
    else if (dtype == DTYPE_E4M3)
        widen_as(to, from, n, DTYPE_E4M3, 1);
    else
        widen_as(to, from, n, DTYPE_E5M2, 1);
}

VEC_FN static inline void narrow(char *to, const float *from, int64_t n, enum dtype dtype) {
    for (int64_t d = 0; d < n; d += VEC_LANES)
        store_some(to + d * dtype_bytes(dtype), vec_load(from + d), dtype,
                   at_most(n - d, VEC_LANES));
}

static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* x[i] -> 2^x[i] by a minimax polynomial on [0, 1), highest power first. Four side by side, as far as registers go,
 * because each step waits for the one before. */
VEC_INLINE void exp2_polynomial(vec *x, int count, const float *factors, int terms) {
#pragma clang loop unroll(full)
    for (int first = 0; first < count; first += 4) {
        vec f[4], y[4];
        const int some = count - first < 4 ? count - first : 4;
#pragma clang loop unroll(full)
        for (int i = 0; i < some; i++) {
            f[i] = vec_fraction(x[first + i]);
            y[i] = vec_set(factors[0]);
        }
#pragma clang loop unroll(full)
        for (int t = 1; t < terms; t++)
#pragma clang loop unroll(full)
            for (int i = 0; i < some; i++)
                y[i] = vec_fma(y[i], f[i], vec_set(factors[t]));
#pragma clang loop unroll(full)
        for (int i = 0; i < some; i++)
            x[first + i] = vec_scale_floor(y[i], x[first + i]);
    }
}

/* To 1 ulp of f32; to 1.5e-7 with one step less, for weights that become bf16 or two bf16 terms; to 2.6e-6 with two, for
 * weights that become one term beside tile products. */
VEC_INLINE void exp2_each(vec *x, int count) {
    static const float factors[] = {0.000217022534f,
                                    0.00124396884f,
                                    0.00967884064f,
                                    0.0554833412f,
                                    0.24022983f,
                                    0.693147004f,
                                    1};
    exp2_polynomial(x, count, factors, 7);
}
VEC_INLINE void exp2_short_each(vec *x, int count) {
    static const float factors[] = {0.00187757646f, 0.00898934063f, 0.0558263175f,
                                    0.240153611f,   0.693153083f,   0.99999994f};
    exp2_polynomial(x, count, factors, 6);
}
VEC_INLINE void exp2_rough_each(vec *x, int count) {
    static const float factors[] = {0.0135341682f, 0.0520114603f, 0.241442757f, 0.693003834f,
                                    1.00000259f};
    exp2_polynomial(x, count, factors, 5);
}
VEC_INLINE vec exp2_of(vec x) {
    exp2_each(&x, 1);
    return x;
}

/* tanh: the Taylor series below 1/4, where 1 - e would cancel; else (1 - e) / (1 + e) with e = exp(-2 |x|). */
VEC_INLINE vec tanh_of(vec x) {
    const vec square = vec_mul(x, x), size = vec_abs(x);
    vec y = vec_fma(vec_set(-1382.0f / 155925), square, vec_set(62.0f / 2835));
    y = vec_fma(y, square, vec_set(-17.0f / 315));
    y = vec_fma(y, square, vec_set(2.0f / 15));
    y = vec_fma(y, square, vec_set(-1.0f / 3));
    y = vec_fma(vec_mul(y, square), x, x);
    const vec e = exp2_of(vec_mul(size, vec_set(-2.8853900818f)));
    const vec big = vec_div(vec_sub(vec_set(1), e), vec_add(vec_set(1), e));
    return vec_blend(y, vec_sign_of(big, x), vec_greater(size, vec_set(0.25f)));
}

/* The rule's logit, and in *cap_slope the derivative of its cap. */
VEC_INLINE vec logit_of(vec score, const struct logit_rule *rule, vec slope, vec distance,
                        vec extra, vec *cap_slope) {
    const vec none = vec_set(-INFINITY);
    vec x = vec_mul(score, vec_set(rule->scale));
    *cap_slope = vec_set(1);
    if (rule->softcap > 0) {
        const vec t = tanh_of(vec_mul(x, vec_set(1 / rule->softcap)));
        x = vec_mul(vec_set(rule->softcap), t);
        *cap_slope = vec_fnma(t, t, vec_set(1));
    }
    if (rule->alibi)
        x = vec_fnma(slope, distance, x);
    return vec_blend(vec_add(x, extra), none, vec_same_bits(extra, HIDDEN_BITS));
}

#endif /* DLATTN_VEC_MATH_H_ */
