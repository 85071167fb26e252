/* Words of two bf16, for the rows that multiply them as they are. Included after vec_avx512.h. */
#ifndef DLATTN_VEC_BF16_H_
#define DLATTN_VEC_BF16_H_

/* acc + words[0] * x[0] + words[1] * x[1] in each lane. */
VEC_INLINE vec dot_pairs(vec acc, vec words, vec x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)words);
}

/* Each lane (even, odd) as one word, rounded to nearest even. */
VEC_INLINE vec pack_pairs(vec even, vec odd) {
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, halves));
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
