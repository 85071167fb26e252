// What the rows for 16-bit elements share: their tiles in shared memory, their exponents, and how a row of theirs ends.
#pragma once

#include "kernels/cuda/common/params.h"
#include "kernels/cuda/common/ptx.cuh"

#include <float.h>
#include <type_traits>

constexpr float LAZY = 8; // log2 of the largest P

// Exponents s * slope - m, m being a maximum times slope and rounded, have the part that m lost in common. It cancels between
// output and sum, and in lse, while weights stay in range; from here on, where m has no fraction left, ExactRow computes the row.
constexpr float EXACT_FROM = 1 << 24;

// x times `factor`, an exponent of 2, at most FLT_MAX: -inf would look like a key that is not seen. ExactRow, whose logits have
// no factor of log2(e) to take them out of range, computes the rows whose maximum came out as FLT_MAX or -FLT_MAX.
__device__ __forceinline__ float to_exponent(float x, float factor) { return __fmul_rz(x, factor); }

// Weights are at most 1. f16 has 14 powers of 2 below that before it loses digits, and 15 above: where gradients keep weights in 16
// bits, those of f16 are 2^15 times as large as they should be.
template <typename E>
struct WeightScale {
    static constexpr float LOG = std::is_same<E, __half>::value ? 15 : 0,
                           TIMES = std::is_same<E, __half>::value ? 1 << 15 : 1, UNDO = 1 / TIMES;
};

// What pack() made of two floats, the lower half first.
template <typename E>
__device__ __forceinline__ float2 widen_pair(uint32_t pair) {
    return {Element<E>::widen((uint16_t)pair), Element<E>::widen((uint16_t)(pair >> 16))};
}

// Of four lanes that are neighbours, lane n gets word n of each, in their order.
__device__ __forceinline__ void transpose_words(uint32_t (&words)[4]) {
    const int lane = threadIdx.x;
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int n = 0; n < 4; ++n)
            if (!(n & step)) {
                const bool upper = lane & step;
                const uint32_t other =
                    __shfl_xor_sync(~0u, upper ? words[n] : words[n + step], step);
                words[n] = upper ? other : words[n];
                words[n + step] = upper ? words[n + step] : other;
            }
}

// A tile of rows of COLS 16-bit elements in shared memory. The 16-byte chunks of a row are permuted, so that the eight
// rows of a matrix lie in different banks, and a 128-byte line of global memory stays one line.
template <int COLS>
struct Chunks {
    static constexpr int PITCH = COLS * 2,
                         GROUP = COLS % 64 == 0 ? 4 : 2; // pairs of chunks that change places
    __device__ __forceinline__ static uint32_t at(int row, int chunk) {
        return row * PITCH + ((chunk ^ (GROUP == 4 ? row & 7 : row >> 1 & 3)) << 4);
    }
    // The address `pairs` pairs of chunks after one that at() gave, or `chunks` chunks after one of an even chunk.
    __device__ __forceinline__ static uint32_t after(uint32_t address, int pairs) {
        return (address ^ pairs % GROUP * 32) + pairs / GROUP * GROUP * 32;
    }
    __device__ __forceinline__ static uint32_t chunks_after(uint32_t address, int chunks) {
        return after(address ^ chunks % 2 * 16, chunks / 2);
    }
};

// Scores to exponents of 2: changes all of them by change_all(change), by softcap or by their scale, a reference, so that it is read where
// it is needed.
template <typename ChangeAll>
__device__ __forceinline__ void cap_or_scale(const fwd_params &p, const float &exponent_scale,
                                             ChangeAll change_all) {
    if (p.softcap > 0) { // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        const float cap = (float)p.softcap * LOG2E,
                    inner = 2 * exponent_scale * reciprocal_approx((float)p.softcap);
        change_all(
            [&](float x) { return cap - 2 * cap * reciprocal_approx(exp2_approx(x * inner) + 1); });
    } else {
        change_all([&](float x) { return to_exponent(x, exponent_scale); });
    }
}

// The sink of a head, -inf if there is none.
__device__ __forceinline__ float sink_of(const fwd_params &p, int h) {
    return p.sinks.data ? ((const float *)p.sinks.data)[h * p.sinks.stride[1]] : NEG_INF;
}

// A row of which `total` is the sum of the weights relative to 2^top: both with the sink, and what the output is multiplied
// by.
__device__ __forceinline__ float end_row(float sink, float &top, float &total) {
    float factor = reciprocal_approx(total);
    if (sink > NEG_INF) {
        const float exponent = to_exponent(sink, LOG2E), higher = fmaxf(top, exponent),
                    shrink = exp2_approx(top - higher);
        total = total * shrink + exp2_approx(exponent - higher);
        factor = shrink * reciprocal_approx(total);
        top = higher;
    }
    return factor;
}

// The log-sum-exp of such a row to that row of the tensor. Where `top` is at the end of the range it is the sink's exponent.
template <typename E>
__device__ __forceinline__ void store_lse(const fwd_params &p, int b, int h, int64_t row,
                                          float sink, float top, float total) {
    const float none = p.flags & FWD_EMPTY_LSE_INF ? POS_INF : NEG_INF;
    const float lse = total == 0 ? none : fabsf(top) == FLT_MAX ? sink : (top + log2f(total)) * LN2;
    const int64_t at = b * p.lse.stride[0] + h * p.lse.stride[1] + row * p.lse.stride[2];
    if (p.flags & FWD_LSE_F32)
        ((float *)p.lse.data)[at] = lse;
    else
        ((uint16_t *)p.lse.data)[at] = (uint16_t)pack<E>(lse, 0);
}
