// Pairs of a row and a key in the accumulators of mma: what an option makes of their products, and what hides them.
#pragma once

#include "kernels/cuda/common/bwd_head.cuh"

// ---- One head --------------------------------------------------------------------------------------------------------

// From products to scores. Without EXTRAS a score is the bare product q k; with them it is the logit. A weight is 2 to the power
// of (score - top) * slope - log.
template <typename E, bool EXTRAS>
struct Head : BwdHead<E> {
    __device__ __forceinline__ float slope() const {
        return EXTRAS ? LOG2E : this->p.f.exponent_scale;
    }

    __device__ __forceinline__ float weight(float score, float top, float log) const {
        return exp2_approx(fmaf(score - top, slope(), -log));
    }
    __device__ __forceinline__ float weight(float score, float exponent) const {
        return exp2_approx(fmaf(score, slope(), -exponent));
    }

    // The capped product, and the derivative of the cap.
    __device__ __forceinline__ float capped(float dot, float &derivative) const {
        const float x = dot * (float)this->p.f.scale, cap = (float)this->p.f.softcap;
        derivative = 1;
        if (!(cap > 0))
            return x;
        const float e = exp2_approx(-2 * LOG2E * fabsf(x) / cap), r = 1 / (1 + e);
        derivative = 4 * e * r * r;
        return sizeof(E) == 4 ? cap * tanhf(x / cap) : copysignf(cap * (1 - e) * r, x);
    }
};

// ---- Tiles of pairs of a row and a key ---------------------------------------------------------------------------------

// A warp's tile of MT * 16 by N elements, in the layout of mma.m16n8k16. Its rows are query rows and its columns keys, or
// TRANSPOSED the other way round.
template <bool TRANSPOSED, int MT, int N>
struct Pairs {
    // body(mt, n, e, i, j) for each element of this thread: [mt][n][e] is of query row i and key j. `row` and `column`: this
    // thread's first.
    template <typename Body>
    __device__ __forceinline__ static void each(int row, int column, Body body) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int r = row + mt * 16 + e / 2 * 8, c = column + n * 8 + e % 2;
                    body(mt, n, e, TRANSPOSED ? c : r, TRANSPOSED ? r : c);
                }
    }

    // Hides what the window, or the end of the rows and keys, cuts off.
    __device__ __forceinline__ static void hide(const bwd_params &p, const BwdSequence &seq,
                                                int row, int column, float (&score)[MT][N / 8][4]) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = row + mt * 16 + half * 8;
                const int first = TRANSPOSED ? seq.first_row(p, r) : seq.first_key(p.f, r),
                          end = TRANSPOSED      ? seq.end_row(p, r, r + 1)
                                : r < seq.q_len ? seq.end_key(p.f, r)
                                                : 0;
#pragma unroll
                for (int n = 0; n < N / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int c = column + n * 8 + e;
                        if (c < first || c >= end)
                            score[mt][n][2 * half + e] = NEG_INF;
                    }
            }
    }

    // The options, one after the other: from products to logits, and the derivatives of the cap.
    template <typename H>
    __device__ __forceinline__ static void options(const H &head, int row, int column,
                                                   float (&score)[MT][N / 8][4],
                                                   float (&cap)[MT][N / 8][4]) {
        const bwd_params &p = head.p;
        const int last_row = head.seq.q_len - 1, last_key = head.seq.k_len - 1;
        each(row, column, [&](int mt, int n, int e, int, int) {
            score[mt][n][e] = head.capped(score[mt][n][e], cap[mt][n][e]);
        });
        if (p.f.bias.data)
            each(row, column, [&](int mt, int n, int e, int i, int j) {
                score[mt][n][e] += head.bias(min(i, last_row), min(j, last_key));
            });
        if (p.f.alibi_slopes.data) {
            const float slope = head.alibi_slope();
            each(row, column, [&](int mt, int n, int e, int i, int j) {
                score[mt][n][e] = fmaf(-slope, head.distance(i, j), score[mt][n][e]);
            });
        }
        if (p.pair.query_segments.data)
            each(row, column, [&](int mt, int n, int e, int i, int j) {
                if (!head.options().same_segment(min(i, last_row), min(j, last_key)))
                    score[mt][n][e] = NEG_INF;
            });
        if (p.f.mask.data || p.pair.block_mask.data)
            each(row, column, [&](int mt, int n, int e, int i, int j) {
                if (!head.options().unmasked(min(i, last_row), min(j, last_key)))
                    score[mt][n][e] = NEG_INF;
            });
    }
};

template <int MT, int N>
__device__ __forceinline__ bool is_finite(const float (&x)[MT][N][4]) {
    float odd = 0;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                odd = fmaf(x[mt][n][e], 0, odd);
    return odd == 0;
}
