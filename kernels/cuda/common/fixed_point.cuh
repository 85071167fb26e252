// d_query as sums of integers, which do not depend on their order: what takes numbers into fixed point and out of it. See
// docs/cuda-backward.md.
//
// A partial sum of d_query_i[d] is at most scale (2 |d_output_i| max_j |value_j| + |d_lse_i|) max_j |key_j[d]|, and so at most scale
// (2 |d_output_i| + |d_lse_i|) (max_j |value_j| + 1) max_j |key_j[d]|; the 1 only where there is a d_lse. With a power of two above
// the row's factor and one above the column's taken out, and 30 bits for what is left, no sum of int32 overflows.
#pragma once

__device__ __forceinline__ int exponent_above(float x) { return (__float_as_int(x) >> 23) - 126; }
__device__ __forceinline__ float power_of_two(int exponent) {
    return __int_as_float((min(max(exponent, -126), 120) + 127) << 23);
}
// 1 / x of a power of two.
__device__ __forceinline__ float inverse(float x) {
    return __int_as_float(0x7f000000 - __float_as_int(x));
}

// Of 2 |d_output| + |d_lse|.
__device__ __forceinline__ float row_factor(float bound) {
    return power_of_two(30 - exponent_above(bound));
}

// *to += x, at some time before the kernel ends: nobody who adds asks for what it was.
__device__ __forceinline__ void add_relaxed(int32_t *to, int32_t x) {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void add_relaxed(int64_t *to, int64_t x) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(x) : "memory");
}

// Of norms and keys that integers are made from: products of three stay in the range of f32. Also true of NaN.
__device__ __forceinline__ bool beyond(float x) { return !(fabsf(x) < 0x1p40f); }
