/*
 * Elements as sums of bf16 terms, largest first: bf16 itself of one, f16 of two, f32 of three. Each term rounds what
 * the ones before it have left, so that two hold the 11 bits of f16 and three the 24 of f32. Included after
 * vec_avx512.h, vec_bf16.h and vec_math.h.
 *
 * A term of infinity or NaN leaves NaN to the next ones. Terms below 2^-126 count as 0.
 */
#ifndef DLATTN_VEC_TERMS_H_
#define DLATTN_VEC_TERMS_H_

/* Takes the next term out of x: rounded to bf16, in the upper half of each lane. The last one is what is left. */
VEC_INLINE __m512i next_term(vec *x, bool last) {
    const __m512i bits = _mm512_castps_si512(*x);
    if (last)
        return bits;
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)),
                  upper = _mm512_set1_epi32((int)0xffff0000);
    *x = vec_sub(*x, _mm512_castsi512_ps(_mm512_and_si512(rounded, upper)));
    return rounded;
}

/* words[term] of (even, odd) in each lane. A weight of one term is rounded. */
VEC_INLINE void pair_terms(vec *words, vec even, vec odd, int terms) {
#pragma clang loop unroll(full)
    for (int t = 0; t < terms; t++) {
        const __m512i low = next_term(&even, terms > 1 && t == terms - 1),
                      high = next_term(&odd, terms > 1 && t == terms - 1);
        words[t] = high_halves(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high));
    }
}

/* words[term] of 32 elements of a row that follow each other. */
VEC_INLINE void row_terms(vec *words, vec first, vec second, int terms) {
    const __m512i upper_halves =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
#pragma clang loop unroll(full)
    for (int t = 0; t < terms; t++) {
        const __m512i low = next_term(&first, terms > 1 && t == terms - 1),
                      high = next_term(&second, terms > 1 && t == terms - 1);
        words[t] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, upper_halves, high));
    }
}

#endif /* DLATTN_VEC_TERMS_H_ */
