/* Words of two bf16, for the rows that multiply them as they are. Included after vec_avx512.h. */
#ifndef DLATTN_VEC_BF16_H_
#define DLATTN_VEC_BF16_H_

#include "kernels/cpu/common.h"

/* acc + words[0] * x[0] + words[1] * x[1] in each lane. */
VEC_INLINE vec dot_pairs(vec acc, vec words, vec x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)words);
}

/* Words of the lower halves of two words, and of the upper halves. */
VEC_INLINE vec join_halves(__m512i low, __m512i high) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000); /* 0xca: upper ? high : low */
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(upper, high, low, 0xca));
}
VEC_INLINE vec low_halves(vec even, vec odd) {
    return join_halves(_mm512_castps_si512(even), _mm512_slli_epi32(_mm512_castps_si512(odd), 16));
}
VEC_INLINE vec high_halves(vec even, vec odd) {
    return join_halves(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
}

/* Each lane (even, odd) as one word, rounded to nearest, ties up, by integers: Intel's vcvtne2ps2bf16 alone takes longer
 * and leaves the halves apart. Weights are never negative; a NaN stays one. */
VEC_INLINE vec pack_pairs(vec even, vec odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), half),
                  high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return high_halves(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high));
}

/* Words of (even, odd) without the halves whose factor is 0. */
VEC_INLINE vec drop_halves(vec words, vec even, vec odd) {
    const vec zero = vec_set(0);
    const __m512i kept =
        _mm512_or_si512(_mm512_maskz_set1_epi32(vec_greater(even, zero), 0xffff),
                        _mm512_maskz_set1_epi32(vec_greater(odd, zero), (int)0xffff0000));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(words), kept));
}

/* Words of two float8 that follow each other, of n <= 32; absent ones are 0. */
VEC_INLINE vec pairs_of_float8(const char *p, int64_t n, enum dtype dtype) {
    vec halves[2];
    vec_split_float8(halves, _mm256_maskz_loadu_epi8((__mmask32)((UINT64_C(1) << n) - 1), p), dtype,
                     true);
    for (int h = 0; h < 2; h++)
        halves[h] = vec_mul(halves[h], vec_set(float8_unit(dtype)));
    return high_halves(halves[0], halves[1]);
}

/* Words (even[d], odd[d]) of n <= 16 columns of two rows; odd may be NULL: zeros. */
VEC_INLINE vec pair_words(const uint16_t *even, const uint16_t *odd, int64_t n) {
    const __mmask16 some = (__mmask16)((1u << n) - 1);
    __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, even));
    if (odd) {
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, odd));
        words = _mm512_or_si512(words, _mm512_slli_epi32(high, 16));
    }
    return _mm512_castsi512_ps(words);
}

#endif /* DLATTN_VEC_BF16_H_ */
