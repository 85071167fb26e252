/* Four doubles at a time: the vocabulary of f64_template.h, in AVX2 with FMA. */
#ifndef DLATTN_VEC_F64_AVX2_H_
#define DLATTN_VEC_F64_AVX2_H_

#include <immintrin.h>
#include <stdint.h>

#define VEC_TARGET "avx2,fma"
#define VEC_FN __attribute__((target(VEC_TARGET)))
#define VEC_INLINE __attribute__((target(VEC_TARGET), always_inline)) static inline

#include "kernels/cpu/x86_64/vec_f64_transpose.h"

enum { VEC_LANES = 4 };

typedef double scalar;
typedef __m256d vec;
typedef __m256d vec_mask; /* all bits of a lane, or none */

VEC_INLINE vec vec_set(double x) { return _mm256_set1_pd(x); }
VEC_INLINE vec vec_load(const double *p) { return _mm256_loadu_pd(p); }
VEC_INLINE void vec_store(double *p, vec x) { _mm256_storeu_pd(p, x); }
VEC_INLINE vec vec_add(vec a, vec b) { return _mm256_add_pd(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm256_sub_pd(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_pd(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm256_div_pd(a, b); }
/* b if one of them is NaN */
VEC_INLINE vec vec_max(vec a, vec b) { return _mm256_max_pd(a, b); }
VEC_INLINE vec vec_min(vec a, vec b) { return _mm256_min_pd(a, b); }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_pd(a, b, c); }
VEC_INLINE vec vec_fnma(vec a, vec b, vec c) { return _mm256_fnmadd_pd(a, b, c); }
VEC_INLINE vec vec_abs(vec x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
VEC_INLINE vec vec_sign_of(vec magnitude, vec sign) {
    return _mm256_or_pd(magnitude, _mm256_and_pd(sign, _mm256_set1_pd(-0.0)));
}
VEC_INLINE vec_mask vec_greater(vec a, vec b) { return _mm256_cmp_pd(a, b, _CMP_GT_OQ); }
VEC_INLINE vec_mask vec_equal(vec a, vec b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
VEC_INLINE vec_mask vec_is_nan(vec a) { return _mm256_cmp_pd(a, a, _CMP_UNORD_Q); }
VEC_INLINE vec_mask vec_and(vec_mask a, vec_mask b) { return _mm256_and_pd(a, b); }
VEC_INLINE vec_mask vec_same_bits(vec a, uint64_t bits) {
    return _mm256_castsi256_pd(
        _mm256_cmpeq_epi64(_mm256_castpd_si256(a), _mm256_set1_epi64x((int64_t)bits)));
}
/* mask ? b : a */
VEC_INLINE vec vec_blend(vec a, vec b, vec_mask mask) { return _mm256_blendv_pd(a, b, mask); }
VEC_INLINE uint32_t vec_mask_bits(vec_mask mask) { return (uint32_t)_mm256_movemask_pd(mask); }

/* y * 2^n for a whole number n below 1024; 0 from n = -1023 on down. The sum's last bits are n's biased exponent. */
VEC_INLINE vec vec_scale(vec y, vec n) {
    const vec biased =
        _mm256_add_pd(_mm256_max_pd(_mm256_set1_pd(-1023), n), _mm256_set1_pd(0x1.8p52 + 1023));
    return _mm256_mul_pd(y,
                         _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased), 52)));
}

#endif /* DLATTN_VEC_F64_AVX2_H_ */
