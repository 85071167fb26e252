// Scores of a warp as mma.sync leaves them, and what the options of the forward pass make of them.
#pragma once

#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/registers.cuh"
#include "kernels/cuda/common/sequence.cuh"
#include "kernels/cuda/common/sixteen_bit.cuh"

// Of MT * 16 rows and KEYS keys. Element [mt][n][e] is row mt * 16 + lane / 4 + e / 2 * 8 and column n * 8 + lane % 4 * 2 + e % 2: the layout
// of accumulators.
template <int MT, int KEYS>
struct Scores {
    static constexpr int NT = KEYS / 8;

    float score[MT][NT][4];

    // The largest of each row, so far as this thread has it.
    __device__ __forceinline__ void find_maxima(float (&most)[MT][2]) const {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                most[mt][half] = NEG_INF;
#pragma unroll
                for (int n = 0; n < NT; ++n)
                    most[mt][half] = fmaxf(
                        most[mt][half], fmaxf(score[mt][n][2 * half], score[mt][n][2 * half + 1]));
            }
    }

    // Scores of the next tile, Q K^T, of rows of PITCH bytes. Matrices are loaded two products early.
    template <typename Product, int PITCH>
    __device__ __forceinline__ void multiply(uint32_t q, uint32_t k) {
        using At = Chunks<PITCH / 2>;
        constexpr int KS = PITCH / 32, PARTS = NT / 2, ITEMS = KS * PARTS;
        uint32_t a[2][MT][4], b[3][4];
        const auto load_q = [&](int step) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrices(a[step % 2][mt], At::after(q, step) + mt * 16 * PITCH);
        };
        const auto load_k = [&](int i) {
            load_matrices(b[i % 3], At::after(k, i / PARTS) + i % PARTS * 16 * PITCH);
        };
        load_q(0);
        load_k(0);
        load_k(1);
        clear(score);
        unrolled<ITEMS>([&](auto item) {
            constexpr int i = decltype(item)::value, step = i / PARTS, n = i % PARTS * 2;
            if (i + 2 < ITEMS)
                load_k(i + 2);
            if ((i + 1) % PARTS == 0 && step + 1 < KS)
                load_q(step + 1);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                Product::mma(score[mt][n], a[step % 2][mt], b[i % 3][0], b[i % 3][1]);
                Product::mma(score[mt][n + 1], a[step % 2][mt], b[i % 3][2], b[i % 3][3]);
            }
        });
    }

    // Hides the keys of the next tile from the window's end on, or before its beginning. `row`, `key`: the first of this
    // thread's rows and of the warp's keys.
    template <bool END>
    __device__ __forceinline__ void mask(const fwd_params &p, const Sequence &seq, int row,
                                         int key) {
        const int column = key + threadIdx.x % 4 * 2;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = row + mt * 16 + half * 8;
                const int edge = (END ? seq.end_key(p, i) : seq.first_key(p, i)) - column;
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (END ? n * 8 + e >= edge : n * 8 + e < edge)
                            score[mt][n][2 * half + e] = NEG_INF;
            }
    }

    // Each score x becomes change(x, mt, half, n, e).
    template <typename Change>
    __device__ __forceinline__ void change_scores(Change change) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float &x = score[mt][n][2 * half + e];
                        x = change(x, mt, half, n, e);
                    }
    }

    // Each score x becomes change(x, y), y: the element of `tensor`, [B, H, Lq, Lk] of T, for its row and key. Where these do
    // not exist y is anything: mask() hides those keys, and nobody sees those rows. `row` as in mask(); `key`: the first of
    // this thread's; `pairs`: all keys of the tile exist, and two neighbours can be read at once.
    template <typename T, typename Change>
    __device__ __forceinline__ void combine_scores(const fwd_view &tensor, const Sequence &seq,
                                                   int b, int h, int row, int key, bool pairs,
                                                   Change change) {
        struct alignas(2 * sizeof(T)) Two {
            T x, y;
        };
        const T *const head = (const T *)tensor.data + b * tensor.stride[0] + h * tensor.stride[1];
        const auto combine = [&](auto two_of) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int i = min(row + mt * 16 + half * 8, seq.q_len - 1), j = anew(key);
                    const T *const from = head + i * tensor.stride[2];
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        const Two y = two_of(from, j + n * 8);
                        float(&x)[4] = score[mt][n];
                        x[2 * half] = change(x[2 * half], y.x);
                        x[2 * half + 1] = change(x[2 * half + 1], y.y);
                    }
                }
        };
        const auto at = [&](const T *from, int j) {
            return __any_sync(~0u, j < seq.k_len) ? from[min(j, seq.k_len - 1) * tensor.stride[3]]
                                                  : T(0);
        };
        if (pairs)
            combine([](const T *from, int j) { return *(const Two *)(from + j); });
        else
            combine([&](const T *from, int j) { return Two{at(from, j), at(from, j + 1)}; });
    }

    // The options of the forward pass, one after the other; leaves logits times log2(e). `exponent_scale`: what a score adds to that;
    // widen(bits): an element of a bias that is not f32; hide() hides what options beside the mask hide, and says whether the
    // mask has something left to do; `row`, `key` as in mask(). All in one go: what they have in common is worked out once, and
    // kept no longer.
    template <typename Widen, typename Hide>
    __device__ __forceinline__ void extras(const fwd_params &p, const Sequence &seq, int b, int h,
                                           int row, int key, float exponent_scale, Widen widen,
                                           Hide hide) {
        b = anew(b);
        h = anew(h);
        row = anew(row);
        const int column = key + threadIdx.x % 4 * 2;
        const bool whole = key + KEYS <= seq.k_len;
        cap_or_scale(p, exponent_scale, [&](auto change) {
            change_scores([&](float x, int, int, int, int) { return change(x); });
        });
        const bool bias_pairs = whole && p.flags & FWD_PAIRED_BIAS;
        if (p.bias.data && p.flags & FWD_BIAS_F32)
            combine_scores<float>(p.bias, seq, b, h, row, column, bias_pairs,
                                  [](float x, float y) { return __fmaf_rz(y, LOG2E, x); });
        else if (p.bias.data)
            combine_scores<uint16_t>(
                p.bias, seq, b, h, row, column, bias_pairs,
                [&](float x, uint16_t y) { return __fmaf_rz(widen(y), LOG2E, x); });
        if (p.alibi_slopes.data) {
            const fwd_view &v = p.alibi_slopes;
            const float alibi = ((const float *)v.data)[b * v.stride[0] + h * v.stride[1]] * LOG2E;
            const float distance = row + seq.diagonal - column;
            change_scores([&](float x, int mt, int half, int n, int e) {
                return __fmaf_rz(-alibi, fabsf(distance + (mt * 16 + half * 8 - n * 8 - e)), x);
            });
        }
        if (hide() && p.mask.data)
            combine_scores<uint8_t>(p.mask, seq, b, h, row, column,
                                    whole && p.flags & FWD_PAIRED_MASK,
                                    [](float x, uint8_t y) { return y ? x : NEG_INF; });
    }
};
