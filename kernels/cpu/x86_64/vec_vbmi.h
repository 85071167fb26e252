/* float8 by a table, with AVX512_VBMI: which bf16 each of the 128 codes without a sign is, in units of float8_unit(). A bf16 holds
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
/* Codes from 4 on are normal, from 2^-14 on; below they are multiples of 2^-16. */
#define BF16_OF_E5M2(i)                                                                            \
    ((i) > 124    ? 0x7fc0                                                                         \
     : (i) == 124 ? 0x7f80                                                                         \
     : (i) >= 4   ? ((127 - 15) << 7) + ((i) << 5)                                                 \
     : (i) >= 2   ? ((127 - 15) << 7) + ((i) - 2) * 64                                             \
     : (i) == 1   ? (127 - 16) << 7                                                                \
                  : 0)
#define LOW_BYTE(BF16, i) (uint8_t)(BF16(i) & 255)
#define HIGH_BYTE(BF16, i) (uint8_t)(BF16(i) >> 8)
#define FOUR(BYTE, BF16, i)                                                                        \
    BYTE(BF16, i), BYTE(BF16, (i) + 1), BYTE(BF16, (i) + 2), BYTE(BF16, (i) + 3)
#define SIXTEEN(BYTE, BF16, i)                                                                     \
    FOUR(BYTE, BF16, i), FOUR(BYTE, BF16, (i) + 4), FOUR(BYTE, BF16, (i) + 8),                     \
        FOUR(BYTE, BF16, (i) + 12)
#define SIXTY_FOUR(BYTE, BF16, i)                                                                  \
    SIXTEEN(BYTE, BF16, i), SIXTEEN(BYTE, BF16, (i) + 16), SIXTEEN(BYTE, BF16, (i) + 32),          \
        SIXTEEN(BYTE, BF16, (i) + 48)
#define TABLE(BF16)                                                                                \
    {                                                                                              \
        {SIXTY_FOUR(LOW_BYTE, BF16, 0), SIXTY_FOUR(LOW_BYTE, BF16, 64)},                           \
        {SIXTY_FOUR(HIGH_BYTE, BF16, 0), SIXTY_FOUR(HIGH_BYTE, BF16, 64)},                         \
    }

/* The low bytes of bf16, and the high ones. */
struct float8_table {
    _Alignas(64) uint8_t low[128], high[128];
};
static const struct float8_table e4m3_table = TABLE(BF16_OF_E4M3);

/* A table in registers. */
struct float8_codes {
    __m512i low[2], high[2];
};

VEC_INLINE struct float8_codes vec_load_codes(const struct float8_table *table) {
    return (struct float8_codes){
        {_mm512_load_si512(table->low), _mm512_load_si512(table->low + 64)},
        {_mm512_load_si512(table->high), _mm512_load_si512(table->high + 64)}};
}

/* bf16 of 64 codes: of each lane of 16, the first 8 and the others. The sign of a code is no part of its index. */
VEC_INLINE void vec_bf16_of_codes(__m512i bf16[2], __m512i codes, const struct float8_codes *of) {
    const __m512i signs = _mm512_and_si512(codes, _mm512_set1_epi8(INT8_MIN)),
                  low = _mm512_permutex2var_epi8(of->low[0], codes, of->low[1]),
                  high = _mm512_or_si512(_mm512_permutex2var_epi8(of->high[0], codes, of->high[1]),
                                         signs);
    bf16[0] = _mm512_unpacklo_epi8(low, high);
    bf16[1] = _mm512_unpackhi_epi8(low, high);
}

/* The even and the odd elements of 32 e4m3, and those of the 32 that follow, whose codes go into the upper halves of the lanes. */
VEC_INLINE void vec_load_e4m3_two_pairs(vec x[4], const void *p) {
    const struct float8_codes e4m3 = vec_load_codes(&e4m3_table);
    __m512i bf16[2];
    vec_bf16_of_codes(
        bf16,
        _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), _mm512_loadu_si512(p)),
        &e4m3);
    vec_split_bf16(x, bf16[0]);
    vec_split_bf16(x + 2, bf16[1]);
}

#endif /* DLATTN_VEC_VBMI_H_ */
