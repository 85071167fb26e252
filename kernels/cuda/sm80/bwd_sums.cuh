// d_query as sums of integers: where they are, and what is known of keys and values before the products. See
// docs/cuda-backward.md.
#pragma once

#include "kernels/cuda/common/bwd_head.cuh"
#include "kernels/cuda/common/fixed_point.cuh"
#include "kernels/cuda/common/sixteen_bit.cuh"
#include "kernels/cuda/sm80/bwd_sizes.h"

// ---- The workspace, behind the statistics: of each row its factor and what exponents are relative to; facts; the sums ----

__device__ __forceinline__ uint32_t *facts_of(const bwd_params &p, int b, int kv_head) {
    return (uint32_t *)p.stats + SUM_PLANES * stats_plane(p) +
           ((int64_t)b * p.heads_kv + kv_head) * SUM_FACTS;
}

// Sums lie in tiles of SUM_ROWS x SUM_COLUMNS in the order of mma's accumulators.
template <int D>
__device__ __forceinline__ int32_t *sums_at(const bwd_params &p, const BwdSequence &seq, int h,
                                            int row) {
    return (int32_t *)facts_of(p, p.f.batch, 0) + (h * p.stats_rows + seq.stats + row) * D;
}

// Facts: squares of the largest norm of a value, and bits of the largest factor of a row; whether the head is odd; keys' maxima.
enum { FACT_VALUE = 0, FACT_ROW = 1, FACT_ODD = 2, FACT_KEYS = 4 };

__device__ __forceinline__ float value_bound(const bwd_params &p, const uint32_t *facts) {
    return sqrtf(__uint_as_float(facts[FACT_VALUE])) + (p.d_lse.data ? 1 : 0);
}

__device__ __forceinline__ float column_factor(const bwd_params &p, const uint32_t *facts,
                                               int column) {
    return power_of_two(-exponent_above(value_bound(p, facts)) -
                        exponent_above(__uint_as_float(facts[FACT_KEYS + column])));
}

template <int D, int THREADS>
__device__ __forceinline__ void load_column_factors(const bwd_params &p, int b, int kv_head,
                                                    float *to) {
    const uint32_t *const facts = facts_of(p, b, kv_head);
    for (int c = threadIdx.x; c < D; c += THREADS)
        to[c] = column_factor(p, facts, c);
}

// Whether integers cannot hold the head: something is not finite or too large, or dS might be too large for f16.
template <typename E>
__device__ __forceinline__ bool is_odd(const bwd_params &p, const uint32_t *facts) {
    return facts[FACT_ODD] ||
           (std::is_same<E, __half>::value &&
            !(__uint_as_float(facts[FACT_ROW]) * value_bound(p, facts) < 0x1p15f));
}

// ---- Facts of keys and values ---------------------------------------------------------------------------------------------

// Aligned rows of which neighbouring threads have eight elements each, 0 where there is none: so many are asked for before any is used.
template <typename E, int D>
struct Rows {
    static constexpr int LANES = D / 8, STEP = STATS_THREADS / LANES, TIMES = D > 64 ? 8 : 4,
                         COUNT = TIMES * STEP;
    uint32_t words[TIMES][4];

    static __device__ __forceinline__ int column() { return threadIdx.x % LANES * 8; }
    static __device__ __forceinline__ int row(int n) { return threadIdx.x / LANES + n * STEP; }
    // `from`: the first of `rows` that exist, of `dim` elements each.
    __device__ __forceinline__ void load(const fwd_view &v, int64_t from, int rows, int dim) {
        const E *const data = (const E *)v.data + from + column();
#pragma unroll
        for (int n = 0; n < TIMES; ++n) {
            uint4 x = {0, 0, 0, 0};
            if (row(n) < rows && column() < dim)
                x = __ldg((const uint4 *)(data + row(n) * v.stride[2]));
            words[n][0] = x.x, words[n][1] = x.y, words[n][2] = x.z, words[n][3] = x.w;
        }
    }
    // Over the threads that share a row.
    static __device__ __forceinline__ float sum(float x) {
#pragma unroll
        for (int step = LANES / 2; step; step /= 2)
            x += __shfl_xor_sync(~0u, x, step);
        return x;
    }
};

// Of SUM_KEYS keys of a kv head. Bits of NaN and infinity are above those of all numbers, and the largest does not depend on the
// order.
template <typename E, int D>
__device__ __forceinline__ void scan_keys(const bwd_params &p, int block, uint32_t *shared) {
    using R = Rows<E, D>;
    static_assert(SUM_KEYS % R::COUNT == 0, "");
    const int blocks = (p.f.len_k + SUM_KEYS - 1) / SUM_KEYS;
    const int kv_head = block / blocks % p.heads_kv, b = block / blocks / p.heads_kv,
              first = block % blocks * SUM_KEYS;
    const BwdSequence seq(p, b);
    if (first >= seq.k_len)
        return;
    const BwdHead<E> head{p, seq, b, kv_head * p.f.group};
    for (int c = threadIdx.x; c < D + 1; c += STATS_THREADS)
        shared[c] = 0;
    __syncthreads();
    uint32_t most[4] = {}, norm = 0;
#pragma unroll 1
    for (int j = first; j < first + SUM_KEYS; j += R::COUNT) {
        R keys, values;
        keys.load(p.f.key, head.key(p.f.key, j), seq.k_len - j, p.f.dim_qk);
        values.load(p.f.value, head.key(p.f.value, j), seq.k_len - j, p.f.dim_v);
#pragma unroll
        for (int n = 0; n < R::TIMES; ++n) {
            float square = 0;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                most[w] = __vmaxu2(most[w], keys.words[n][w] & 0x7fff7fff);
                const float2 x = widen_pair<E>(values.words[n][w]);
                square = fmaf(x.x, x.x, fmaf(x.y, x.y, square));
            }
            norm = max(norm, __float_as_uint(R::sum(square)));
        }
    }
    norm = __reduce_max_sync(~0u, norm);
    if (threadIdx.x % 32 == 0)
        atomicMax(shared + D, norm);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const float2 x = widen_pair<E>(most[w]);
        atomicMax(shared + R::column() + 2 * w, __float_as_uint(x.x));
        atomicMax(shared + R::column() + 2 * w + 1, __float_as_uint(x.y));
    }
    __syncthreads();
    uint32_t *const facts = facts_of(p, b, kv_head);
    for (int c = threadIdx.x; c < D + 1; c += STATS_THREADS) {
        atomicMax(facts + (c < D ? FACT_KEYS + c : (int)FACT_VALUE), shared[c]);
        if (beyond(__uint_as_float(shared[c])))
            facts[FACT_ODD] = 1;
    }
}
