/* Elements of every dtype as bits, one at a time: for reference code and the edges of fast code. */
#ifndef DLATTN_ELEMENT_H_
#define DLATTN_ELEMENT_H_

#include "src/dtype.h"

#include <math.h>
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

/* The float8 formats of Micikevicius et al., arXiv:2209.05433. e5m2 is the upper half of an f16; e4m3fn has no infinity, its
 * NaN is all ones. */
static inline float e5m2_to_float(uint8_t bits) { return half_to_float((uint16_t)(bits << 8)); }

static inline float e4m3_to_float(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float size = (bits & 0x7f) == 0x7f ? NAN
                       : exponent == 0
                           ? (float)mantissa * 0x1p-9f
                           : bits_float((uint32_t)(bits & 0x7f) * (1u << 20) + (120u << 23));
    return bits & 0x80 ? -size : size;
}

/* To nearest even, what is beyond `largest` to that, NaN to NaN: a float8 whose mantissa has `mantissa` bits, whose smallest
 * normal number is 2^least, and whose NaN is `nan`. A carry out of the mantissa goes into the exponent by itself. */
static inline uint8_t to_float8(double x, int mantissa, int least, double largest, uint8_t nan) {
    const uint8_t sign = signbit(x) ? 0x80 : 0;
    const int dropped = 52 - mantissa;
    double size = fabs(x);
    uint64_t bits;
    if (isnan(x))
        return nan | sign;
    size = size > largest ? largest : size;
    if (size * (1 << -least) < 1) /* in units of the last place */
        return (uint8_t)(sign | (int)rint(size * (1 << (mantissa - least))));
    memcpy(&bits, &size, sizeof bits);
    bits += (UINT64_C(1) << (dropped - 1)) - 1 + (bits >> dropped & 1);
    return (uint8_t)(sign | ((bits >> dropped) - ((uint64_t)(1022 + least) << mantissa)));
}

static inline uint8_t double_to_e4m3(double x) { return to_float8(x, 3, -6, 448, 0x7f); }
static inline uint8_t double_to_e5m2(double x) { return to_float8(x, 2, -14, 57344, 0x7e); }

/* Element `offset` of an array of `dtype`; no alignment assumed. */
static inline double load_element(const void *data, enum dtype dtype, int64_t offset) {
    const char *at = (const char *)data + offset * dtype_bytes(dtype);
    double wide = 0;
    float single;
    uint16_t half;
    uint8_t byte;
    switch (dtype) {
    case DTYPE_F64:
        memcpy(&wide, at, sizeof wide);
        break;
    case DTYPE_F32:
        memcpy(&single, at, sizeof single);
        wide = (double)single;
        break;
    case DTYPE_F16:
        memcpy(&half, at, sizeof half);
        wide = (double)half_to_float(half);
        break;
    case DTYPE_BF16:
        memcpy(&half, at, sizeof half);
        wide = (double)bf16_to_float(half);
        break;
    case DTYPE_E4M3:
        memcpy(&byte, at, sizeof byte);
        wide = (double)e4m3_to_float(byte);
        break;
    case DTYPE_E5M2:
        memcpy(&byte, at, sizeof byte);
        wide = (double)e5m2_to_float(byte);
        break;
    case DTYPE_COUNT:
        break;
    }
    return wide;
}

/* To float so that rounding once more, to fewer bits, gives what value itself rounds to: where bits are lost, the last one is set. */
static inline float float_to_be_rounded(double value) {
    const float single = (float)value;
    if ((double)single == value || isnan(value))
        return single;
    return bits_float((float_bits(single) - (fabs((double)single) > fabs(value))) | 1);
}

static inline void store_element(void *data, enum dtype dtype, int64_t offset, double value) {
    char *at = (char *)data + offset * dtype_bytes(dtype);
    const float single = (float)value;
    uint16_t half;
    uint8_t byte;
    switch (dtype) {
    case DTYPE_F64:
        memcpy(at, &value, sizeof value);
        break;
    case DTYPE_F32:
        memcpy(at, &single, sizeof single);
        break;
    case DTYPE_F16:
        half = float_to_half(float_to_be_rounded(value));
        memcpy(at, &half, sizeof half);
        break;
    case DTYPE_BF16:
        half = float_to_bf16(float_to_be_rounded(value));
        memcpy(at, &half, sizeof half);
        break;
    case DTYPE_E4M3:
        byte = double_to_e4m3(value);
        memcpy(at, &byte, sizeof byte);
        break;
    case DTYPE_E5M2:
        byte = double_to_e5m2(value);
        memcpy(at, &byte, sizeof byte);
        break;
    case DTYPE_COUNT:
        break;
    }
}

#endif /* DLATTN_ELEMENT_H_ */
