/* e4m3 by a table, with AVX512_VBMI: which bf16 each of the 128 codes without a sign is, in units of float8_unit(). A bf16 holds
 * them all, denormals too, and a NaN is one in the table, so that nobody looks for it. */
#ifndef DLATTN_VEC_VBMI_H_
#define DLATTN_VEC_VBMI_H_

#include "kernels/cpu/x86_64/vec_avx512.h"

#define VEC_HAS_E4M3_TABLE

/* Codes from 8 on are normal, from 2^-6 on, which is 2^-14 in these units; i << 4 adds an exponent of 1 for the first. Below 8 they are
 * multiples of 2^-9. */
#define BF16_OF_E4M3(i)                                                                            \
    ((i) == 127 ? 0x7fc0                                                                           \
     : (i) >= 8 ? ((127 - 15) << 7) + ((i) << 4)                                                   \
     : (i) >= 4 ? ((127 - 15) << 7) + ((i) - 4) * 32                                               \
     : (i) >= 2 ? ((127 - 16) << 7) + ((i) - 2) * 64                                               \
     : (i) == 1 ? (127 - 17) << 7                                                                  \
                : 0)
#define LOW_BYTE(i) (uint8_t)(BF16_OF_E4M3(i) & 255)
#define HIGH_BYTE(i) (uint8_t)(BF16_OF_E4M3(i) >> 8)
#define FOUR(BYTE, i) BYTE(i), BYTE((i) + 1), BYTE((i) + 2), BYTE((i) + 3)
#define SIXTEEN(BYTE, i)                                                                           \
    FOUR(BYTE, i), FOUR(BYTE, (i) + 4), FOUR(BYTE, (i) + 8), FOUR(BYTE, (i) + 12)
#define SIXTY_FOUR(BYTE, i)                                                                        \
    SIXTEEN(BYTE, i), SIXTEEN(BYTE, (i) + 16), SIXTEEN(BYTE, (i) + 32), SIXTEEN(BYTE, (i) + 48)

_Alignas(64) static const uint8_t e4m3_low[128] = {SIXTY_FOUR(LOW_BYTE, 0),
                                                   SIXTY_FOUR(LOW_BYTE, 64)};
_Alignas(64) static const uint8_t e4m3_high[128] = {SIXTY_FOUR(HIGH_BYTE, 0),
                                                    SIXTY_FOUR(HIGH_BYTE, 64)};

/* The sign of a code is no part of its index. */
VEC_INLINE __m512i vec_look_up(const uint8_t table[128], __m512i codes) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
}

/* The even and the odd elements of 32 e4m3, and those of the 32 that follow. Bytes are joined within lanes of 16, so the first
 * half of the codes goes into the lower halves of the lanes. */
VEC_INLINE void vec_load_e4m3_two_pairs(vec x[4], const void *p) {
    const __m512i codes = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0),
                                                   _mm512_loadu_si512(p)),
                  signs = _mm512_and_si512(codes, _mm512_set1_epi8(INT8_MIN)),
                  low = vec_look_up(e4m3_low, codes),
                  high = _mm512_or_si512(vec_look_up(e4m3_high, codes), signs);
    vec_split_bf16(x, _mm512_unpacklo_epi8(low, high));
    vec_split_bf16(x + 2, _mm512_unpackhi_epi8(low, high));
}

#endif /* DLATTN_VEC_VBMI_H_ */
