/* Sixteen floats at a time: the vocabulary of the templates, in AVX-512 (F, BW, DQ, VL). */
#ifndef DLATTN_VEC_AVX512_H_
#define DLATTN_VEC_AVX512_H_

#include "src/element.h"

#include <immintrin.h>

#ifndef VEC_TARGET
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"
#endif
#define VEC_FN __attribute__((target(VEC_TARGET)))
#define VEC_INLINE __attribute__((target(VEC_TARGET), always_inline)) static inline

enum { VEC_LANES = 16 };

typedef float scalar;
typedef __m512 vec;
typedef __mmask16 vec_mask;

VEC_INLINE vec vec_set(float x) { return _mm512_set1_ps(x); }
VEC_INLINE vec vec_load(const float *p) { return _mm512_loadu_ps(p); }
VEC_INLINE void vec_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
VEC_INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
VEC_INLINE vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
VEC_INLINE vec vec_fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }
VEC_INLINE vec vec_abs(vec x) { return _mm512_abs_ps(x); }
VEC_INLINE vec vec_sign_of(vec magnitude, vec sign) {
    const vec bit = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, bit));
}
VEC_INLINE vec_mask vec_greater(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
VEC_INLINE vec_mask vec_equal(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
VEC_INLINE vec_mask vec_is_nan(vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
VEC_INLINE vec_mask vec_and(vec_mask a, vec_mask b) { return a & b; }
VEC_INLINE vec_mask vec_same_bits(vec a, uint32_t bits) {
    return _mm512_cmpeq_epi32_mask(_mm512_castps_si512(a), _mm512_set1_epi32((int)bits));
}
/* mask ? b : a */
VEC_INLINE vec vec_blend(vec a, vec b, vec_mask mask) { return _mm512_mask_blend_ps(mask, a, b); }
VEC_INLINE uint32_t vec_mask_bits(vec_mask mask) { return mask; }
VEC_INLINE float vec_sum(vec x) { return _mm512_reduce_add_ps(x); }

/* 2^floor(x) * y; x = -inf gives 0. */
VEC_INLINE vec vec_scale_floor(vec y, vec x) { return _mm512_scalef_ps(y, x); }
/* x - floor(x); 0 for -inf, NaN for NaN. */
VEC_INLINE vec vec_fraction(vec x) {
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

/* Elements of another dtype, n of them (1 .. 16); absent ones are 0 and are not read. */
VEC_INLINE vec vec_load_f32(const void *p, int64_t n) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
VEC_INLINE vec vec_load_f16(const void *p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
VEC_INLINE vec vec_load_bf16(const void *p, int64_t n) {
    const __m256i half = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
/* The even elements of 32 bf16 and the odd ones. */
VEC_INLINE void vec_split_bf16(vec halves[2], __m512i words) {
    halves[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    halves[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
}
VEC_INLINE void vec_load_bf16_halves(vec halves[2], const void *p) {
    vec_split_bf16(halves, _mm512_loadu_si512(p));
}
/* float8 in the upper halves of words, in units of float8_unit(). e5m2 is then an f16, and so is e4m3, of 2^-8 its size, once its
 * exponent is where an f16 has it. Its NaN, all ones, carries into the exponent's first bit; where the caller knows that there is
 * none, it is not looked for. */
VEC_INLINE vec vec_of_float8(__m256i words, enum dtype dtype, bool nan) {
    if (dtype == DTYPE_E5M2)
        return _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16((int16_t)0xff00)));
    const __m256i half = _mm256_srai_epi16(words, 1);
    if (!nan)
        return _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16((int16_t)0xbf80)));
    const __m256i next = _mm256_srai_epi16(_mm256_add_epi16(words, _mm256_set1_epi16(0x100)), 1),
                  bit = _mm256_and_si256(next, _mm256_set1_epi16(0x4000));
    return _mm512_cvtph_ps(
        _mm256_and_si256(_mm256_xor_si256(half, bit), _mm256_set1_epi16((int16_t)0xff80)));
}
VEC_INLINE vec vec_load_float8(const void *p, int64_t n, enum dtype dtype) {
    const __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p);
    return vec_of_float8(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), dtype, true);
}
/* The even elements of 32 float8 and the odd ones. */
VEC_INLINE void vec_split_float8(vec halves[2], __m256i bytes, enum dtype dtype, bool nan) {
    halves[0] = vec_of_float8(_mm256_slli_epi16(bytes, 8), dtype, nan);
    halves[1] = vec_of_float8(bytes, dtype, nan);
}
VEC_INLINE void vec_load_float8_halves(vec halves[2], const void *p, enum dtype dtype, bool nan) {
    vec_split_float8(halves, _mm256_loadu_si256(p), dtype, nan);
}
/* Some of 32 e4m3 is NaN. */
VEC_INLINE bool vec_has_e4m3_nan(const void *p) {
    const __m256i bytes = _mm256_or_si256(_mm256_loadu_si256(p), _mm256_set1_epi8(INT8_MIN));
    return _mm256_cmpeq_epi8_mask(bytes, _mm256_set1_epi8(-1)) != 0;
}
/* The lanes whose byte is not 0, of n. */
VEC_INLINE vec_mask vec_load_flags(const uint8_t *p, int64_t n) {
    const __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p);
    return _mm_test_epi8_mask(bytes, bytes);
}
VEC_INLINE void vec_store_f32(void *p, vec x, int64_t n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x);
}
VEC_INLINE void vec_store_f16(void *p, vec x, int64_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1),
                             _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* The upper halves are x as bf16, rounded to nearest even; not so for NaN. */
VEC_INLINE __m512i vec_rounded_bf16(vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
/* NaN stays a quiet NaN. */
VEC_INLINE void vec_store_bf16(void *p, vec x, int64_t n) {
    const __m512i words = _mm512_mask_mov_epi32(_mm512_srli_epi32(vec_rounded_bf16(x), 16),
                                                vec_is_nan(x), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), _mm512_cvtepi32_epi16(words));
}

/* Two vectors that follow each other, neither with a NaN. */
VEC_INLINE void vec_store_bf16_pair(void *p, vec first, vec second) {
    const __m512i upper_halves =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(vec_rounded_bf16(first), upper_halves,
                                                     vec_rounded_bf16(second)));
}

/* Lane n is the sum of the lanes of x[n]. */
VEC_INLINE vec vec_sums(const vec x[16]) {
    vec half[8], quarter[4], pair[2];
#pragma clang loop unroll(full)
    for (int n = 0; n < 8; n++)
        half[n] = _mm512_add_ps(_mm512_shuffle_f32x4(x[n], x[n + 8], 0x44),
                                _mm512_shuffle_f32x4(x[n], x[n + 8], 0xee));
#pragma clang loop unroll(full)
    for (int n = 0; n < 4; n++)
        quarter[n] = _mm512_add_ps(_mm512_shuffle_f32x4(half[n], half[n + 4], 0x88),
                                   _mm512_shuffle_f32x4(half[n], half[n + 4], 0xdd));
    /* 128-bit lanes of quarter[n]: four parts each of x[n], x[n + 4] x[n + 8], x[n + 12] */
#pragma clang loop unroll(full)
    for (int n = 0; n < 2; n++)
        pair[n] = _mm512_add_ps(_mm512_unpacklo_ps(quarter[2 * n], quarter[2 * n + 1]),
                                _mm512_unpackhi_ps(quarter[2 * n], quarter[2 * n + 1]));
    const vec sums = _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x44),
                                   _mm512_shuffle_ps(pair[0], pair[1], 0xee));
    return _mm512_shuffle_f32x4(sums, sums, 0xd8);
}

/* Four words each from `at`, at + step, at + 2 * step and at + 3 * step on, put together as they are loaded, which either port for
 * vectors can do; only one of them shuffles. */
VEC_INLINE vec vec_load_quarters(const float *at, int64_t step) {
    vec x = _mm512_castps128_ps512(_mm_loadu_ps(at));
#define INSERT(quarter)                                                                            \
    x = _mm512_insertf32x4(x, _mm_loadu_ps(at + (quarter) * step), quarter);                       \
    __asm__("" : "+v"(x)) /* or two and two are put together and shuffled */
    INSERT(1);
    INSERT(2);
    INSERT(3);
#undef INSERT
    return x;
}

/* columns[c][r] = from[r][c], four columns of 16 rows, stride in words. */
VEC_INLINE void vec_columns(vec columns[4], const float *from, int64_t stride) {
    __m512 a[4], b[4];
#pragma clang loop unroll(full)
    for (int r = 0; r < 4; r++)
        a[r] = vec_load_quarters(from + r * stride, 4 * stride);
#pragma clang loop unroll(full)
    for (int r = 0; r < 4; r += 2) {
        b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
    columns[0] = _mm512_shuffle_ps(b[0], b[2], 0x44);
    columns[1] = _mm512_shuffle_ps(b[0], b[2], 0xee);
    columns[2] = _mm512_shuffle_ps(b[1], b[3], 0x44);
    columns[3] = _mm512_shuffle_ps(b[1], b[3], 0xee);
}

/* 16 x 16 words: to[c][r] = from[r][c], strides in words. */
VEC_INLINE void vec_transpose(float *to, int64_t to_stride, const float *from,
                              int64_t from_stride) {
#pragma clang loop unroll(full)
    for (int c = 0; c < 16; c += 4) {
        vec columns[4];
        vec_columns(columns, from + c, from_stride);
#pragma clang loop unroll(full)
        for (int n = 0; n < 4; n++)
            vec_store(to + (c + n) * to_stride, columns[n]);
    }
}

#endif /* DLATTN_VEC_AVX512_H_ */
