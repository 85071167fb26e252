/* Eight floats at a time: the vocabulary of the templates, in AVX2 with FMA and F16C. */
#ifndef DLATTN_VEC_AVX2_H_
#define DLATTN_VEC_AVX2_H_

#include "src/element.h"

#include <immintrin.h>

#define VEC_TARGET "avx2,fma,f16c"
#define VEC_FN __attribute__((target(VEC_TARGET)))
#define VEC_INLINE __attribute__((target(VEC_TARGET), always_inline)) static inline

enum { VEC_LANES = 8 };

typedef float scalar;
typedef __m256 vec;
typedef __m256 vec_mask; /* all bits of a lane, or none */

VEC_INLINE vec vec_set(float x) { return _mm256_set1_ps(x); }
VEC_INLINE vec vec_load(const float *p) { return _mm256_loadu_ps(p); }
VEC_INLINE void vec_store(float *p, vec x) { _mm256_storeu_ps(p, x); }
VEC_INLINE vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm256_div_ps(a, b); }
VEC_INLINE vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
VEC_INLINE vec vec_fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
VEC_INLINE vec vec_abs(vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
VEC_INLINE vec vec_sign_of(vec magnitude, vec sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
VEC_INLINE vec_mask vec_greater(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
VEC_INLINE vec_mask vec_equal(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
VEC_INLINE vec_mask vec_is_nan(vec a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
VEC_INLINE vec_mask vec_and(vec_mask a, vec_mask b) { return _mm256_and_ps(a, b); }
VEC_INLINE vec_mask vec_same_bits(vec a, uint32_t bits) {
    return _mm256_castsi256_ps(
        _mm256_cmpeq_epi32(_mm256_castps_si256(a), _mm256_set1_epi32((int)bits)));
}
/* mask ? b : a */
VEC_INLINE vec vec_blend(vec a, vec b, vec_mask mask) { return _mm256_blendv_ps(a, b, mask); }
VEC_INLINE uint32_t vec_mask_bits(vec_mask mask) { return (uint32_t)_mm256_movemask_ps(mask); }
VEC_INLINE float vec_sum(vec x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* x where 2^floor(x) has a biased exponent: 0 at -127, infinity at 128. NaN is the second operand, so it stays. */
VEC_INLINE vec vec_bounded(vec x) {
    return _mm256_min_ps(_mm256_set1_ps(128), _mm256_max_ps(_mm256_set1_ps(-127), x));
}
/* 2^floor(x) * y; 0 below x = -126, infinity from 128 on. */
VEC_INLINE vec vec_scale_floor(vec y, vec x) {
    const __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(vec_bounded(x)));
    const __m256i biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
/* x - floor(x) where 2^floor(x) is finite and not 0, else 0; NaN for NaN. */
VEC_INLINE vec vec_fraction(vec x) {
    return _mm256_sub_ps(vec_bounded(x), _mm256_floor_ps(vec_bounded(x)));
}

/* Elements of another dtype, n of them (1 .. 8); absent ones are 0 and are not read. */
VEC_INLINE __m128i vec_load_halves(const void *p, int64_t n) {
    if (n == VEC_LANES)
        return _mm_loadu_si128(p);
    uint16_t part[VEC_LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof part[0]);
    return _mm_loadu_si128((const __m128i *)part);
}
VEC_INLINE void vec_store_halves(void *p, __m128i x, int64_t n) {
    uint16_t part[VEC_LANES];
    _mm_storeu_si128((__m128i *)part, x);
    memcpy(p, part, (size_t)n * sizeof part[0]);
}
VEC_INLINE __m256i vec_first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
VEC_INLINE vec vec_load_f32(const void *p, int64_t n) {
    return n == VEC_LANES ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, vec_first(n));
}
VEC_INLINE vec vec_load_f16(const void *p, int64_t n) {
    return _mm256_cvtph_ps(vec_load_halves(p, n));
}
VEC_INLINE vec vec_load_bf16(const void *p, int64_t n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(vec_load_halves(p, n)), 16));
}
/* The even elements of 16 bf16 and the odd ones. */
VEC_INLINE void vec_load_bf16_halves(vec halves[2], const void *p) {
    const __m256i words = _mm256_loadu_si256(p);
    halves[0] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    halves[1] = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
}
/* float8 in the upper halves of words, in units of float8_unit(). e5m2 is then an f16, and so is e4m3, of 2^-8 its size, once its
 * exponent is where an f16 has it. Its NaN, all ones, carries into the exponent's first bit; where the caller knows that there is
 * none, it is not looked for. */
VEC_INLINE vec vec_of_float8(__m128i words, enum dtype dtype, bool nan) {
    if (dtype == DTYPE_E5M2)
        return _mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16((int16_t)0xff00)));
    const __m128i half = _mm_srai_epi16(words, 1);
    if (!nan)
        return _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16((int16_t)0xbf80)));
    const __m128i next = _mm_srai_epi16(_mm_add_epi16(words, _mm_set1_epi16(0x100)), 1),
                  bit = _mm_and_si128(next, _mm_set1_epi16(0x4000));
    return _mm256_cvtph_ps(
        _mm_and_si128(_mm_xor_si128(half, bit), _mm_set1_epi16((int16_t)0xff80)));
}
VEC_INLINE vec vec_load_float8(const void *p, int64_t n, enum dtype dtype) {
    uint64_t bytes = 0;
    memcpy(&bytes, p, (size_t)n);
    const __m128i low = _mm_cvtsi64_si128((long long)bytes);
    return vec_of_float8(_mm_unpacklo_epi8(_mm_setzero_si128(), low), dtype, true);
}
/* The even elements of 16 float8 and the odd ones. */
VEC_INLINE void vec_load_float8_halves(vec halves[2], const void *p, enum dtype dtype, bool nan) {
    const __m128i bytes = _mm_loadu_si128(p);
    halves[0] = vec_of_float8(_mm_slli_epi16(bytes, 8), dtype, nan);
    halves[1] = vec_of_float8(bytes, dtype, nan);
}
/* Some of 16 e4m3 is NaN. */
VEC_INLINE bool vec_has_e4m3_nan(const void *p) {
    const __m128i bytes = _mm_or_si128(_mm_loadu_si128(p), _mm_set1_epi8(INT8_MIN));
    return _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(-1))) != 0;
}
/* The lanes whose byte is not 0, of n. */
VEC_INLINE vec_mask vec_load_flags(const uint8_t *p, int64_t n) {
    uint64_t bytes = 0;
    memcpy(&bytes, p, (size_t)n);
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
}
VEC_INLINE void vec_store_f32(void *p, vec x, int64_t n) {
    _mm256_maskstore_ps(p, vec_first(n), x);
}
VEC_INLINE void vec_store_f16(void *p, vec x, int64_t n) {
    vec_store_halves(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
/* Round to nearest even; NaN stays a quiet NaN. */
VEC_INLINE void vec_store_bf16(void *p, vec x, int64_t n) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i words = _mm256_castps_si256(
        vec_blend(_mm256_castsi256_ps(_mm256_srli_epi32(up, 16)),
                  _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0)), vec_is_nan(x)));
    vec_store_halves(
        p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)), n);
}

/* Two vectors that follow each other. */
VEC_INLINE void vec_store_bf16_pair(void *p, vec first, vec second) {
    vec_store_bf16(p, first, VEC_LANES);
    vec_store_bf16((char *)p + VEC_LANES * 2, second, VEC_LANES);
}

/* Lane n is the sum of the lanes of x[n]. */
VEC_INLINE vec vec_sums(const vec x[8]) {
    const vec low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3])),
              high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                         _mm256_permute2f128_ps(low, high, 0x31));
}

/* 8 x 8 words: to[c][r] = from[r][c], strides in words. */
VEC_INLINE void vec_transpose(float *to, int64_t to_stride, const float *from,
                              int64_t from_stride) {
    __m256 a[8], b[8];
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) {
        /* rows i and i + 4 side by side, columns 0-3 and 4-7 */
        const __m256 low = _mm256_loadu_ps(from + i * from_stride),
                     high = _mm256_loadu_ps(from + (i + 4) * from_stride);
        a[i] = _mm256_permute2f128_ps(low, high, 0x20);
        a[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i += 4) {
        _mm256_storeu_ps(to + i * to_stride, _mm256_shuffle_ps(b[i], b[i + 2], 0x44));
        _mm256_storeu_ps(to + (i + 1) * to_stride, _mm256_shuffle_ps(b[i], b[i + 2], 0xee));
        _mm256_storeu_ps(to + (i + 2) * to_stride, _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44));
        _mm256_storeu_ps(to + (i + 3) * to_stride, _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee));
    }
}

#endif /* DLATTN_VEC_AVX2_H_ */
