/* Included by vec_f64_*.h: 256 bits in both. */
#ifndef DLATTN_VEC_F64_TRANSPOSE_H_
#define DLATTN_VEC_F64_TRANSPOSE_H_

VEC_INLINE void transpose_4x4(double *to, int64_t to_stride, const double *from,
                              int64_t from_stride) {
    const __m256d x0 = _mm256_loadu_pd(from), x1 = _mm256_loadu_pd(from + from_stride),
                  x2 = _mm256_loadu_pd(from + 2 * from_stride),
                  x3 = _mm256_loadu_pd(from + 3 * from_stride), even01 = _mm256_unpacklo_pd(x0, x1),
                  odd01 = _mm256_unpackhi_pd(x0, x1), even23 = _mm256_unpacklo_pd(x2, x3),
                  odd23 = _mm256_unpackhi_pd(x2, x3);
    _mm256_storeu_pd(to, _mm256_permute2f128_pd(even01, even23, 0x20));
    _mm256_storeu_pd(to + to_stride, _mm256_permute2f128_pd(odd01, odd23, 0x20));
    _mm256_storeu_pd(to + 2 * to_stride, _mm256_permute2f128_pd(even01, even23, 0x31));
    _mm256_storeu_pd(to + 3 * to_stride, _mm256_permute2f128_pd(odd01, odd23, 0x31));
}

#endif /* DLATTN_VEC_F64_TRANSPOSE_H_ */
