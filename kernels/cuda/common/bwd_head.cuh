// What the kernels of gradients share: one sequence and head, the options that a pair of a row and a key has, and sums that no
// product is needed for.
#pragma once

#include "kernels/cuda/common/bwd_params.h"
#include "kernels/cuda/common/exponential.cuh"
#include "kernels/cuda/common/pairs.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/sequence.cuh"

#include <math_constants.h>
#include <type_traits>

// What elements of type E are computed in.
template <typename E>
using Number = std::conditional_t<std::is_same<E, double>::value, double, float>;

// Element `at` of a tensor of floats or of E.
template <typename E>
__device__ __forceinline__ Number<E> load_number(const void *data, int64_t at, bool f32) {
    if (f32)
        return ((const float *)data)[at];
    if constexpr (sizeof(E) == 2)
        return Element<E>::widen(((const uint16_t *)data)[at]);
    else
        return ((const E *)data)[at];
}
template <typename E>
__device__ __forceinline__ void store_number(void *data, int64_t at, bool f32, Number<E> x) {
    if (f32)
        ((float *)data)[at] = (float)x;
    else if constexpr (sizeof(E) == 2)
        ((uint16_t *)data)[at] = (uint16_t)pack<E>(x, 0);
    else
        ((E *)data)[at] = x;
}

// One sequence of the batch, and where the statistics of its rows begin among those of a head.
struct BwdSequence : Sequence {
    int k_rows; // keys that are its own: the gradients of all are written
    int64_t stats;

    __device__ __forceinline__ BwdSequence(const bwd_params &p, int b)
        : Sequence(p.f, b), k_rows(p.f.len_k) {
        if (p.f.cu_seqlens_k.data) {
            const int64_t end = int_at(p.f.cu_seqlens_k, b + 1);
            k_rows = clamped((end < p.f.total_k ? end : p.f.total_k) - k_start, 0, p.f.len_k);
        }
        const int64_t padded = (p.f.len_q + BWD_STATS_ROWS - 1) / BWD_STATS_ROWS * BWD_STATS_ROWS;
        stats =
            p.f.cu_seqlens_q.data ? (q_start / BWD_STATS_ROWS + b) * BWD_STATS_ROWS : b * padded;
        diagonal += p.pair.diagonal_offset;
    }

    // Rows [first, end) to which the window leaves one of the keys [key, key_end).
    __device__ __forceinline__ int first_row(const bwd_params &p, int key) const {
        return max(0, key - diagonal - p.f.window_right);
    }
    __device__ __forceinline__ int end_row(const bwd_params &p, int key, int key_end) const {
        return key < k_len ? min(q_len, min(key_end, k_len) - diagonal + p.f.window_left) : 0;
    }
};

// The statistics of row i of head h: top, log and delta are planes.
template <typename N = float>
__device__ __forceinline__ const N *stats_of(const bwd_params &p, const BwdSequence &seq, int h) {
    return (const N *)p.stats + h * p.stats_rows + seq.stats;
}
__device__ __forceinline__ int64_t stats_plane(const bwd_params &p) {
    return p.f.heads_q * p.stats_rows;
}

// What a score of 1 adds to the exponent of a weight.
template <typename N>
__device__ __forceinline__ N exponent_per_score(const bwd_params &p) {
    if (p.flags & BWD_LOGITS)
        return PER_LOGIT<N>;
    return sizeof(N) == sizeof(float) ? (N)p.f.exponent_scale : (N)p.f.scale;
}

// One query head of one sequence. Row i and key j count from the sequence's first.
template <typename E>
struct BwdHead {
    using N = Number<E>;
    const bwd_params &p;
    const BwdSequence &seq;
    const int b, h;

    __device__ __forceinline__ int64_t at(const fwd_view &v, int i, int j) const {
        return b * v.stride[0] + h * v.stride[1] + i * v.stride[2] + j * v.stride[3];
    }
    __device__ __forceinline__ N bias(int i, int j) const {
        return load_number<E>(p.f.bias.data, at(p.f.bias, i, j), p.f.flags & FWD_BIAS_F32);
    }
    __device__ __forceinline__ float alibi_slope() const {
        const fwd_view &v = p.f.alibi_slopes;
        return v.data ? ((const float *)v.data)[b * v.stride[0] + h * v.stride[1]] : 0;
    }
    __device__ __forceinline__ N distance(int i, int j) const {
        return (N)abs(i + seq.diagonal - j);
    }

    __device__ __forceinline__ PairOptions options() const { return {p.f, p.pair, seq, b, h}; }
    __device__ __forceinline__ bool in_window(int i, int j) const {
        return j >= seq.first_key(p.f, i) && j < seq.end_key(p.f, i);
    }

    // First elements of row i of query and output, and of key j and its value.
    __device__ __forceinline__ int64_t row(const fwd_view &v, int i) const {
        return b * v.stride[0] + h * v.stride[1] + (seq.q_start + i) * v.stride[2];
    }
    __device__ __forceinline__ int64_t key(const fwd_view &v, int j) const {
        return b * v.stride[0] + h / p.f.group * v.stride[1] + (seq.k_start + j) * v.stride[2];
    }
};

// The part of d_bias that a block owns: of each axis the tiles, heads or sequences [first, end), all where the bias has but one.
struct BiasPart {
    struct Range {
        int first, end;
    } keys, rows, heads, batch;

    __device__ __forceinline__ BiasPart(const bwd_params &p, int tile_rows, int tile_keys) {
        int64_t block = blockIdx.x;
        const auto part = [&](int axis, int count) {
            if (!p.d_bias.stride[axis])
                return Range{0, count};
            const int at = block % count;
            block /= count;
            return Range{at, at + 1};
        };
        keys = part(3, (p.f.len_k + tile_keys - 1) / tile_keys);
        rows = part(2, (p.f.len_q + tile_rows - 1) / tile_rows);
        heads = part(1, p.f.heads_q);
        batch = part(0, p.f.batch);
    }
};

// The sum of x over a block of THREADS, in one order always; thread 0 has it. `memory` is free for that.
template <int THREADS, typename N>
__device__ __forceinline__ N block_sum(N x, N *memory) {
#pragma unroll
    for (int step = 16; step; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        memory[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int n = 0; n < THREADS / 32 && threadIdx.x == 0; ++n)
        x += memory[n];
    return x;
}

// One slope: over the blocks of rows of its head, and over the batch where it has one for all.
template <typename N>
__device__ __forceinline__ void bwd_slopes(const bwd_params &p) {
    extern __shared__ __align__(16) char shared[];
    const fwd_view &to = p.d_alibi_slopes;
    const int h = blockIdx.x % p.f.heads_q, b = blockIdx.x / p.f.heads_q;
    const int64_t count = (to.stride[0] ? 1 : p.f.batch) * (int64_t)p.f.row_blocks;
    N sum = 0;
    for (int64_t n = threadIdx.x; n < count; n += SUM_THREADS)
        sum += ((const N *)
                    p.slope_sums)[((b + n / p.f.row_blocks) * p.f.heads_q + h) * p.f.row_blocks +
                                  n % p.f.row_blocks];
    sum = block_sum<SUM_THREADS>(sum, (N *)shared);
    if (threadIdx.x == 0)
        ((float *)to.data)[b * to.stride[0] + h * to.stride[1]] = (float)sum;
}

// One sink, by the statistics of the rows of its head. Rows that do not take part see nothing but the sink.
template <typename E>
__device__ __forceinline__ void bwd_sinks(const bwd_params &p) {
    using N = Number<E>;
    extern __shared__ __align__(16) char shared[];
    const int h = blockIdx.x;
    const N sink = ((const float *)p.f.sinks.data)[h * p.f.sinks.stride[1]],
            slope = exponent_per_score<N>(p);
    N sum = 0;
    for (int b = 0; b < p.f.batch && sink > -CUDART_INF; ++b) {
        const BwdSequence seq(p, b);
        const N *const stats = stats_of<N>(p, seq, h);
        for (int i = threadIdx.x; i < seq.q_rows; i += SUM_THREADS) {
            N weight = 1, delta = 0;
            if (i < seq.q_len) {
                weight = exponential(fma(-stats[i], slope, sink * PER_LOGIT<N>) -
                                     stats[stats_plane(p) + i]);
                delta = stats[2 * stats_plane(p) + i];
            } else if (p.d_lse.data) {
                delta = -load_number<E>(p.d_lse.data,
                                        b * p.d_lse.stride[0] + h * p.d_lse.stride[1] +
                                            (seq.q_start + i) * p.d_lse.stride[2],
                                        p.flags & BWD_D_LSE_F32);
            }
            sum = fma(-weight, delta, sum);
        }
    }
    sum = block_sum<SUM_THREADS>(sum, (N *)shared);
    if (threadIdx.x == 0)
        ((float *)p.d_sinks.data)[h * p.d_sinks.stride[1]] = (float)sum;
}
