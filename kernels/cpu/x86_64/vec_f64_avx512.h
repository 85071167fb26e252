/* Eight doubles at a time: the vocabulary of f64_template.h, in AVX-512 (F, DQ). */
#ifndef DLATTN_VEC_F64_AVX512_H_
#define DLATTN_VEC_F64_AVX512_H_

#include <immintrin.h>
#include <stdint.h>

#define VEC_TARGET "avx512f,avx512dq,fma"
#define VEC_FN __attribute__((target(VEC_TARGET)))
#define VEC_INLINE __attribute__((target(VEC_TARGET), always_inline)) static inline

#include "kernels/cpu/x86_64/vec_f64_transpose.h"

enum { VEC_LANES = 8 };

typedef double scalar;
typedef __m512d vec;
typedef __mmask8 vec_mask;

VEC_INLINE vec vec_set(double x) { return _mm512_set1_pd(x); }
VEC_INLINE vec vec_load(const double *p) { return _mm512_loadu_pd(p); }
VEC_INLINE void vec_store(double *p, vec x) { _mm512_storeu_pd(p, x); }
VEC_INLINE vec vec_add(vec a, vec b) { return _mm512_add_pd(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm512_sub_pd(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_pd(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm512_div_pd(a, b); }
/* b if one of them is NaN */
VEC_INLINE vec vec_max(vec a, vec b) { return _mm512_max_pd(a, b); }
VEC_INLINE vec vec_min(vec a, vec b) { return _mm512_min_pd(a, b); }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_pd(a, b, c); }
VEC_INLINE vec vec_fnma(vec a, vec b, vec c) { return _mm512_fnmadd_pd(a, b, c); }
VEC_INLINE vec vec_abs(vec x) { return _mm512_abs_pd(x); }
VEC_INLINE vec vec_sign_of(vec magnitude, vec sign) {
    return _mm512_or_pd(magnitude, _mm512_and_pd(sign, _mm512_set1_pd(-0.0)));
}
VEC_INLINE vec_mask vec_greater(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
VEC_INLINE vec_mask vec_equal(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
VEC_INLINE vec_mask vec_is_nan(vec a) { return _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q); }
VEC_INLINE vec_mask vec_and(vec_mask a, vec_mask b) { return a & b; }
VEC_INLINE vec_mask vec_same_bits(vec a, uint64_t bits) {
    return _mm512_cmpeq_epi64_mask(_mm512_castpd_si512(a), _mm512_set1_epi64((int64_t)bits));
}
/* mask ? b : a */
VEC_INLINE vec vec_blend(vec a, vec b, vec_mask mask) { return _mm512_mask_blend_pd(mask, a, b); }
VEC_INLINE uint32_t vec_mask_bits(vec_mask mask) { return mask; }

/* y * 2^n for a whole number n */
VEC_INLINE vec vec_scale(vec y, vec n) { return _mm512_scalef_pd(y, n); }

#endif /* DLATTN_VEC_F64_AVX512_H_ */
