/* f16 and bf16 as bits, one element at a time: for reference code and the edges of fast code. */
#ifndef DLATTN_ELEMENT_H_
#define DLATTN_ELEMENT_H_

#include "src/problem.h"

#include <string.h>

static inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) /* Inf, NaN */
        return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) /* subnormal: rest * 2^-24 is exact in f32 */
        return bits_float(sign | float_bits((float)rest * 0x1p-24f));
    return bits_float(sign | ((rest << 13) + (112u << 23)));
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t float_to_half(float x) {
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* below 2^-14: let the float adder round at 2^-24 */
        return (uint16_t)(sign | (float_bits(bits_float(rest) + 0.5f) - float_bits(0.5f)));
    return (uint16_t)(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

/* Element `offset` of an array of `dtype`; no alignment assumed. */
static inline double load_element(const void *data, enum dtype dtype, int64_t offset) {
    const char *at = (const char *)data + offset * dtype_bytes(dtype);
    double wide;
    float single;
    uint16_t half;
    switch (dtype) {
    case DTYPE_F64:
        memcpy(&wide, at, sizeof wide);
        return wide;
    case DTYPE_F32:
        memcpy(&single, at, sizeof single);
        return single;
    case DTYPE_F16:
        memcpy(&half, at, sizeof half);
        return half_to_float(half);
    default:
        memcpy(&half, at, sizeof half);
        return bf16_to_float(half);
    }
}

static inline void store_element(void *data, enum dtype dtype, int64_t offset, double value) {
    char *at = (char *)data + offset * dtype_bytes(dtype);
    const float single = (float)value;
    uint16_t half;
    switch (dtype) {
    case DTYPE_F64:
        memcpy(at, &value, sizeof value);
        break;
    case DTYPE_F32:
        memcpy(at, &single, sizeof single);
        break;
    case DTYPE_F16:
        half = float_to_half(single);
        memcpy(at, &half, sizeof half);
        break;
    default:
        half = float_to_bf16(single);
        memcpy(at, &half, sizeof half);
        break;
    }
}

#endif /* DLATTN_ELEMENT_H_ */
