// Elements of e4m3 and e5m2, widened to f16, which holds every one of them exactly, and what rows of e4m3 weights share.
#pragma once

#include "kernels/cuda/common/params.h"
#include "kernels/cuda/common/ptx.cuh"

#include <cuda_fp16.h>
#include <stdint.h>

// One of the two, as the parameters say for keys and for values.
struct Float8 {
    uint8_t bits;
};

template <typename E>
constexpr bool is_float8 = false;
template <>
constexpr bool is_float8<Float8> = true;

// Two e4m3 to two f16. Before sm_89 no instruction does that: shifted by a bit they are f16 whose exponents are 8 too small, and
// what comes out as 480 is NaN.
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t pair) {
#if __CUDA_ARCH__ >= 890
    uint32_t r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((uint16_t)pair));
    return r;
#else
    const uint32_t spread = __byte_perm(pair, 0, 0x1404),
                   bits = (spread & 0x80008000) | (spread & 0x7f007f00) >> 1;
    uint32_t wide, overflowing;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(wide) : "r"(bits), "r"(0x5c005c00)); // 2^8
    asm("fma.rn.f16x2 %0, %1, %2, %3;" // 128 |x| + 6144: infinity from 464 on
        : "=r"(overflowing)
        : "r"(wide & 0x7fff7fff), "r"(0x58005800), "r"(0x6e006e00));
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(wide) : "r"(overflowing), "r"(0x80008000)); // -0
    return wide;
#endif
}

// Four float8 to f16, bytes 0 and 1 to `low`.
__device__ __forceinline__ void widen_float8(uint32_t &low, uint32_t &high, uint32_t word,
                                             bool e5m2) {
    if (e5m2) { // the upper half of an f16
        low = __byte_perm(word, 0, 0x1404);
        high = __byte_perm(word, 0, 0x3424);
    } else {
        low = widen_e4m3(word & 0xffff);
        high = widen_e4m3(word >> 16);
    }
}

__device__ __forceinline__ float float8_at(const void *data, int64_t at, bool e5m2) {
    uint32_t low, high;
    widen_float8(low, high, ((const uint8_t *)data)[at], e5m2);
    return __half2float(__ushort_as_half((uint16_t)low));
}

// The scale of a batch entry and head; 1 where there is none.
__device__ __forceinline__ float scale_at(const fwd_view &v, int b, int h) {
    return v.data ? ((const float *)v.data)[b * v.stride[0] + h * v.stride[1]] : 1;
}

// Two floats as e4m3, the first in the lower byte; what is beyond the range becomes its end. From sm_89 on.
__device__ __forceinline__ uint16_t pack_two_e4m3(float a, float b) {
    uint16_t r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(r) : "f"(a), "f"(b));
    return r;
}

// The same as e5m2.
__device__ __forceinline__ uint16_t pack_two_e5m2(float a, float b) {
    uint16_t r;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %2, %1;" : "=h"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ uint32_t join(uint16_t low, uint16_t high) {
    uint32_t r;
    asm("mov.b32 %0, {%1, %2};" : "=r"(r) : "h"(low), "h"(high));
    return r;
}

// Four.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
    return join(pack_two_e4m3(a, b), pack_two_e4m3(c, d));
}

// Stores four neighbouring columns.
template <typename E>
__device__ __forceinline__ void store_four(E *to, const float (&x)[4]) {
    *reinterpret_cast<uint2 *>(to) = make_uint2(pack<E>(x[0], x[1]), pack<E>(x[2], x[3]));
}
template <>
__device__ __forceinline__ void store_four<float>(float *to, const float (&x)[4]) {
    *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
