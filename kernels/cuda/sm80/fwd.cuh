// Forward attention on the tensor cores of Ampere and later: cp.async, ldmatrix, mma.m16n8k16. See docs/cuda-sm80.md.
//
// A block owns WARPS / SPLIT * MT * 16 query rows of one head and walks over the keys in steps of BN. A warp owns MT * 16
// rows and all of their output; where that is more than its registers hold, SPLIT = 2 warps share the rows: each computes
// the scores of half of the keys, and half of the output's columns from the P of both. Step g of a warp is P V of tile g
// with its exponentials in between, so that the tensor cores and the special function unit work at the same time, then
// Q K^T of tile g + 1, its row maxima and its first exponentials. So a step needs K of tile g + 1 and V of tile g, which
// share a stage of the ring, and step first - 1 only multiplies.
//
// The maximum that exponents are relative to follows the true one only when that has grown by more than 2^8
// (the scheme of FlashAttention 4): P stays below 2^8, sums are in f32, and rescaling the output is rare.
#pragma once

#include "kernels/cuda/common/exact.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/sequence.cuh"
#include "kernels/cuda/common/sixteen_bit.cuh"
#include "kernels/cuda/sm80/params.h"

#include <utility>

// body(0) ... body(N - 1), each with its index as a constant: registers have no addresses, so what indexes them must be.
template <typename Body, int... I>
__device__ __forceinline__ void unrolled(std::integer_sequence<int, I...>, Body &&body) {
    (body(std::integral_constant<int, I>()), ...);
}
template <int N, typename Body>
__device__ __forceinline__ void unrolled(Body &&body) {
    unrolled(std::make_integer_sequence<int, N>(), body);
}

// x in a register from here on: the compiler would work it out again in every step, but repeats no shuffle of what might
// differ between lanes.
template <typename T>
__device__ __forceinline__ T kept(T x) {
    uint32_t lane;
    asm("mov.u32 %0, %laneid;" : "=r"(lane));
    return __shfl_sync(~0u, lane < 32 ? x : T(0), lane);
}

// The same for a number that all lanes have.
__device__ __forceinline__ int kept_by_all(int x) { return __reduce_max_sync(~0u, x); }

// The opposite: x, and what follows from it, is worked out here each time, so that no register holds it meanwhile.
__device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

template <int D, int DV, int WARPS, int MT, int BN, int STAGES, int SPLIT>
struct Tile {
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS / SPLIT * MT * 16;
    static constexpr int Q_BYTES = ROWS * D * 2, K_BYTES = BN * D * 2, V_BYTES = BN * DV * 2;
    static constexpr int STAGE_BYTES = K_BYTES + V_BYTES, P_BYTES = SPLIT > 1 ? ROWS *BN * 2 : 0;
    static constexpr int SHARED_BYTES = Q_BYTES + STAGES * STAGE_BYTES + P_BYTES;
    static_assert(DV <= D, "the output is staged where the queries were");
};

// Loads COUNT rows of COLS elements into shared memory, with zeros past `dim` elements of a row.
template <typename E, int THREADS, int COUNT, int COLS>
struct Loader {
    // A panel is as many chunks of a row as change places among themselves. Threads lie on WIDTH chunks of STEP rows, so
    // one keeps its column and its place in the permutation wherever it copies.
    static constexpr int CHUNKS = COLS / 8, WIDTH = Chunks<COLS>::GROUP * 2, STEP = THREADS / WIDTH;
    static_assert(CHUNKS % WIDTH == 0 && STEP % 8 == 0, "");

    // Where this thread's first chunk is, in the tile and in the tensor.
    __device__ __forceinline__ static uint32_t place() {
        return Chunks<COLS>::at(threadIdx.x / WIDTH, threadIdx.x % WIDTH);
    }
    __device__ __forceinline__ static const char *start(const E *from, int64_t stride) {
        return (const char *)(from + threadIdx.x / WIDTH * stride + threadIdx.x % WIDTH * 8);
    }

    // How many columns exist from this thread's first on.
    __device__ __forceinline__ static int columns(int dim) { return dim - threadIdx.x % WIDTH * 8; }

    // 16-byte aligned rows: `rows` exist, or ALL. `to`, `from` and `columns` are of this thread; `from` moves on by COUNT
    // rows.
    template <bool ALL>
    __device__ __forceinline__ static void aligned(uint32_t to, const char *&from, int64_t stride,
                                                   int rows, int columns) {
        const int row = threadIdx.x / WIDTH;
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c += WIDTH)
                if (COUNT % STEP == 0 || i + row < COUNT)
                    copy_async(to + i * COLS * 2 + c * 16, from + c * 16,
                               c * 8 < columns && (ALL || i + row < rows));
            from += (i + STEP <= COUNT ? STEP : COUNT % STEP) * 2 * stride;
        }
    }

    // Any layout, element by element: row_of(r) says where a row starts.
    template <typename RowOf>
    __device__ static void any(uint32_t to, RowOf row_of, int64_t inner, int rows, int dim) {
#pragma unroll 1
        for (int x = threadIdx.x; x < COUNT * CHUNKS; x += THREADS) {
            const int r = x / CHUNKS, c = x % CHUNKS * 8;
            const uint16_t *const row = (const uint16_t *)row_of(r < rows ? r : 0);
            uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (r < rows && c + e < dim)
                    pairs[e / 2] |= (uint32_t)row[(c + e) * inner] << e % 2 * 16;
            store_chunk(to + Chunks<COLS>::at(r, c / 8), pairs);
        }
    }

    // 16-byte aligned rows that lie anywhere, in pages; the addresses of two rows are looked up at a time.
    template <typename RowOf>
    __device__ static void paged(uint32_t to, RowOf row_of, int rows, int dim) {
        const int row = threadIdx.x / WIDTH, here = columns(dim);
        to += place();
#pragma unroll 2
        for (int i = 0; i < COUNT; i += STEP) {
            const int r = i + row;
            const E *const from = row_of(r < rows ? r : 0) + threadIdx.x % WIDTH * 8;
#pragma unroll
            for (int c = 0; c < CHUNKS; c += WIDTH)
                if (COUNT % STEP == 0 || r < COUNT)
                    copy_async(to + i * COLS * 2 + c * 16, from + c * 8, r < rows && c * 8 < here);
        }
    }
};

// One warp's share: MT * 16 rows, or with SPLIT = 2 the scores of half of the keys and half of the output's columns of
// twice as many. Element [mt][n][e] of a tile of accumulators is row mt * 16 + lane / 4 + e / 2 * 8 and column
// n * 8 + lane % 4 * 2 + e % 2 of it: the layout of mma.m16n8k16.
template <typename E, int D, int DV, int MT, int BN, int SPLIT>
struct Warp {
    static constexpr int KEYS = BN / SPLIT, COLUMNS = DV / SPLIT;
    static constexpr int KS = D / 16, NT = KEYS / 8, VS = BN / 16, VN = COLUMNS / 16,
                         PAIRS = MT * NT * 2;
    static_assert(SPLIT == 1 || (DV % 32 == 0 && (NT & (NT - 1)) == 0),
                  "warps share columns by 16, and keys of P by XOR of the chunk");

    float out[MT][COLUMNS / 8][4];
    float score[MT][NT][4];
    uint32_t prob[MT][SPLIT > 1 ? 1 : VS]
                 [4]; // P of the current tile as operand of the next product
    float top[MT]
             [2]; // the exponent of 2 that those of a row are relative to, 0 before its first key
    float limit[MT][2]; // the score above which top moves, -inf before the first key of a row
    float tile_most[MT][2];
    float sum[MT][2];
    float slope; // exponent of 2 per unit of score; 1 if extras() has applied it

    __device__ __forceinline__ void init(float exponent_slope) {
        slope = exponent_slope;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                limit[mt][half] = NEG_INF;
                top[mt][half] = sum[mt][half] = 0;
            }
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    out[mt][n][e] = 0;
        }
    }

    __device__ __forceinline__ uint32_t exponential(int mt, int n, int half) {
        const float x = score[mt][n][2 * half], y = score[mt][n][2 * half + 1];
        const float a = exp2_approx(fmaf(x, slope, -top[mt][half]));
        const float b = exp2_approx(fmaf(y, slope, -top[mt][half]));
        sum[mt][half] += a;
        sum[mt][half] += b;
        return pack<E>(a, b);
    }

    // Exponentials of pairs [FROM, TO) of the current tile, two neighbouring keys of a row each, in the order in which P V
    // needs them: for the product, or with SPLIT = 2 to `place`, where this thread's part begins in the tile that two warps
    // share.
    template <int FROM, int TO>
    __device__ __forceinline__ void exponentials(uint32_t place) {
#pragma unroll
        for (int i = FROM; i < TO; ++i) {
            if constexpr (SPLIT == 1) {
                const int step = i / (MT * 4), mt = i / 4 % MT, word = i % 4;
                prob[mt][step][word] = exponential(mt, step * 2 + word / 2, word % 2);
            } else {
                const int n = i / (MT * 2), mt = i / 2 % MT, half = i % 2;
                store_word((place ^ n * 16) + (mt * 16 + half * 8) * BN * 2,
                           exponential(mt, n, half));
            }
        }
    }

    __device__ __forceinline__ void find_maxima() {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                tile_most[mt][half] = NEG_INF;
#pragma unroll
                for (int n = 0; n < NT; ++n)
                    tile_most[mt][half] =
                        fmaxf(tile_most[mt][half],
                              fmaxf(score[mt][n][2 * half], score[mt][n][2 * half + 1]));
            }
    }

    // Scores of the next tile, Q K^T. Matrices are loaded two products early.
    __device__ __forceinline__ void multiply_keys(uint32_t q, uint32_t k) {
        constexpr int PARTS = NT / 2, ITEMS = KS * PARTS;
        uint32_t a[2][MT][4], b[3][4];
        const auto load_q = [&](int step) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrices(a[step % 2][mt], Chunks<D>::after(q, step) + mt * 16 * D * 2);
        };
        const auto load_k = [&](int i) {
            load_matrices(b[i % 3], Chunks<D>::after(k, i / PARTS) + i % PARTS * 16 * D * 2);
        };
        load_q(0);
        load_k(0);
        load_k(1);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    score[mt][n][e] = 0;
        unrolled<ITEMS>([&](auto item) {
            constexpr int i = decltype(item)::value, step = i / PARTS, n = i % PARTS * 2;
            if (i + 2 < ITEMS)
                load_k(i + 2);
            if ((i + 1) % PARTS == 0 && step + 1 < KS)
                load_q(step + 1);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                Element<E>::mma(score[mt][n], a[step % 2][mt], b[i % 3][0], b[i % 3][1]);
                Element<E>::mma(score[mt][n + 1], a[step % 2][mt], b[i % 3][2], b[i % 3][3]);
            }
        });
    }

    // out += P V, and in between the exponentials of all steps but the first AHEAD, which are there. With SPLIT = 2 step s
    // multiplies keys 8 s to 8 s + 7 of both warps, so that both make the first half of P before they meet, and the other
    // one while they multiply the first; `p_at`: P for ldmatrix, `place` as in exponentials().
    static constexpr int AHEAD = SPLIT > 1 ? VS / 2 : 1, PART = PAIRS / VS;
    __device__ __forceinline__ void add_values(uint32_t v, uint32_t p_at, uint32_t place) {
        constexpr int ITEMS = VS * VN, LAST = VN - 1;
        uint32_t a[2][MT][4], b[3][4];
        const auto load_p = [&](int step) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrices(a[step % 2][mt], (p_at ^ step * 16) + mt * 16 * BN * 2);
        };
        const auto load_v = [&](int i) {
            load_matrices_transposed(b[i % 3], Chunks<DV>::after(v, i % VN * SPLIT) +
                                                   i / VN * (16 / SPLIT) * DV * 2);
        };
        if (SPLIT > 1)
            load_p(0);
        load_v(0);
        load_v(1);
        unrolled<ITEMS>([&](auto item) {
            constexpr int i = decltype(item)::value, step = i / VN, n = i % VN;
            if (i + 2 < ITEMS)
                load_v(i + 2);
            constexpr bool meet = step + 1 == AHEAD;
            if (SPLIT > 1 && step + 1 < VS && n == (meet ? LAST : VN / 2)) {
                if (meet)
                    named_barrier_sync(1 + threadIdx.x / 64, 64);
                load_p(step + 1);
            }
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                const uint32_t(&p)[4] =
                    SPLIT > 1 ? a[step % 2][mt] : prob[mt][SPLIT > 1 ? 0 : step];
                Element<E>::mma(out[mt][2 * n], p, b[i % 3][0], b[i % 3][1]);
                Element<E>::mma(out[mt][2 * n + 1], p, b[i % 3][2], b[i % 3][3]);
            }
            constexpr int SPAN = SPLIT > 1 ? LAST : VN, from = n < SPAN ? n : SPAN,
                          to = n + 1 < SPAN ? n + 1 : SPAN, first = PART * (step + AHEAD);
            if constexpr (step + AHEAD < VS)
                exponentials<first + PART * from / SPAN, first + PART * to / SPAN>(place);
        });
    }

    // Any warp of those that share rows, or any lane of one.
    __device__ __forceinline__ static bool any(bool x) {
        return SPLIT > 1 ? named_barrier_any(1 + threadIdx.x / 64, 64, x) : __any_sync(~0u, x);
    }

    // What the other warp of the same rows has as x; `memory` is free for that.
    __device__ __forceinline__ static void trade(float (&x)[MT][2], float *memory) {
        const int pair = 1 + threadIdx.x / 64, own = threadIdx.x / 32 % 2, lane = threadIdx.x % 32;
        named_barrier_sync(pair, 64);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (lane % 4 == 0)
                    memory[own * MT * 16 + mt * 16 + half * 8 + lane / 4] = x[mt][half];
        named_barrier_sync(pair, 64);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                x[mt][half] = memory[(1 - own) * MT * 16 + mt * 16 + half * 8 + lane / 4];
        named_barrier_sync(pair, 64);
    }

    // Sums of rows from sums of threads.
    __device__ __forceinline__ void add_up_sums(float *memory) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[mt][half] += __shfl_xor_sync(~0u, sum[mt][half], 1);
                sum[mt][half] += __shfl_xor_sync(~0u, sum[mt][half], 2);
            }
        if constexpr (SPLIT > 1) {
            float other[MT][2];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    other[mt][half] = sum[mt][half];
            trade(other, memory);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    sum[mt][half] += other[mt][half];
        }
    }

    // Moves `top` to the maxima of the next tile if a row of the warp has outgrown it.
    __device__ __forceinline__ void follow_maxima(char *memory) {
        bool grown = false;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                grown |= tile_most[mt][half] > limit[mt][half];
        if (!any(grown))
            return;
        float most[MT][2], other[MT][2];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = tile_most[mt][half];
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                most[mt][half] = other[mt][half] = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
            }
        if (SPLIT > 1)
            trade(other, (float *)memory);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const bool fresh = limit[mt][half] == NEG_INF;
                float x = to_exponent(fmaxf(most[mt][half], other[mt][half]), slope);
                if (!fresh)
                    x = fmaxf(x, top[mt][half]);
                limit[mt][half] = (x + LAZY) * reciprocal_approx(slope);
                x = x == NEG_INF ? 0.0f : x;
                const float shrink = fresh ? 0.0f : exp2_approx(top[mt][half] - x);
                top[mt][half] = x;
                sum[mt][half] *= shrink;
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; ++n) {
                    out[mt][n][2 * half] *= shrink;
                    out[mt][n][2 * half + 1] *= shrink;
                }
            }
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

    // The options of the forward pass, one after the other; leaves logits times log2(e). `row`, `key` as in mask().
    __device__ __forceinline__ void extras(const fwd_params &p, const Sequence &seq, int b, int h,
                                           int row, int key) {
        b = anew(b);
        h = anew(h);
        row = anew(row);
        const int column = key + threadIdx.x % 4 * 2;
        const bool whole = key + KEYS <= seq.k_len;
        if (p.softcap > 0) { // tanh(x) = 1 - 2 / (exp(2 x) + 1)
            const float cap = (float)p.softcap * LOG2E,
                        inner = 2 * p.exponent_scale * reciprocal_approx((float)p.softcap);
            change_scores([&](float x, int, int, int, int) {
                return cap - 2 * cap * reciprocal_approx(exp2_approx(x * inner) + 1);
            });
        } else {
            change_scores(
                [&](float x, int, int, int, int) { return to_exponent(x, p.exponent_scale); });
        }
        const bool bias_pairs = whole && p.flags & FWD_PAIRED_BIAS;
        if (p.bias.data && p.flags & FWD_BIAS_F32)
            combine_scores<float>(p.bias, seq, b, h, row, column, bias_pairs,
                                  [](float x, float y) { return __fmaf_rz(y, LOG2E, x); });
        else if (p.bias.data)
            combine_scores<uint16_t>(
                p.bias, seq, b, h, row, column, bias_pairs,
                [](float x, uint16_t y) { return __fmaf_rz(Element<E>::widen(y), LOG2E, x); });
        if (p.alibi_slopes.data) {
            const fwd_view &v = p.alibi_slopes;
            const float alibi = ((const float *)v.data)[b * v.stride[0] + h * v.stride[1]] * LOG2E;
            const float distance = row + seq.diagonal - column;
            change_scores([&](float x, int mt, int half, int n, int e) {
                return __fmaf_rz(-alibi, fabsf(distance + (mt * 16 + half * 8 - n * 8 - e)), x);
            });
        }
        if (p.mask.data)
            combine_scores<uint8_t>(p.mask, seq, b, h, row, column,
                                    whole && p.flags & FWD_PAIRED_MASK,
                                    [](float x, uint8_t y) { return y ? x : NEG_INF; });
    }
};

// ROWS rows of a tile, from `first` on, by one warp to their places in `out`; `rows` of the tile exist.
template <typename E, int COLS, int DV, int ROWS>
__device__ __forceinline__ void store_rows(const fwd_params &p, const char *tile, int first,
                                           int rows, E *out) {
    constexpr int CHUNKS = DV / 8,
                  WIDTH = CHUNKS > 16  ? 32
                          : CHUNKS > 8 ? 16
                                       : 8,
                  STEP = 32 / WIDTH; // a thread keeps its column
    const int lane = threadIdx.x % 32;
    if (p.flags & FWD_ALIGNED_OUTPUT) {
        const int r = first + lane / WIDTH, c = lane % WIDTH, left = c * 8 < p.dim_v ? rows - r : 0;
        E *to = out + r * p.output.stride[2] + c * 8;
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP, to += STEP * p.output.stride[2])
            if (i < left)
                *(uint4 *)to = *(const uint4 *)(tile + Chunks<COLS>::at(r + i, c));
        return;
    }
#pragma unroll 1
    for (int x = lane; x < ROWS * DV; x += 32) {
        const int r = first + x / DV, c = x % DV;
        if (r < rows && c < p.dim_v)
            out[r * p.output.stride[2] + c * p.output.stride[3]] =
                *(const E *)(tile + Chunks<COLS>::at(r, c / 8) + c % 8 * 2);
    }
}

// Which rows and tiles a warp of this block works on.
template <int ROWS, int WARP_ROWS, int BN, int SPLIT>
struct Share {
    const int warp, part;       // of the warps that share rows, `part` says which
    const int block_row, rows;  // of the block; as many rows of its tile exist
    const int first_row;        // of the warp
    int first, end;             // tiles that the block sees
    int warp_first, warp_end;   // that this warp sees
    int whole_first, whole_end; // that all rows of the warp see whole

    __device__ __forceinline__ Share(const Work &work, const Sequence &seq, int warps)
        : warp(warps / SPLIT), part(warps % SPLIT), block_row(work.row_block * ROWS),
          rows(min(ROWS, seq.q_rows - block_row)), first_row(block_row + warp * WARP_ROWS) {}

    __device__ __forceinline__ static void tiles(const fwd_params &p, const Sequence &seq, int row,
                                                 int count, int &first, int &end) {
        const int last = min(row + count, seq.q_len) - 1;
        first = seq.first_key(p, row) / BN;
        end = last < row ? 0 : (seq.end_key(p, last) + BN - 1) / BN;
    }

    __device__ __forceinline__ void find_tiles(const fwd_params &p, const Sequence &seq) {
        tiles(p, seq, block_row, ROWS, first, end);
        end = kept_by_all(end);
        warp_first = first;
        warp_end = end; // pairs of warps all take the same steps, with the same barriers
        if (SPLIT == 1)
            tiles(p, seq, first_row, WARP_ROWS, warp_first, warp_end);
        warp_first = kept_by_all(warp_first);
        warp_end = kept_by_all(warp_end);
        whole_first = kept_by_all((seq.first_key(p, first_row + WARP_ROWS - 1) + BN - 1) / BN);
        whole_end = kept_by_all(seq.end_key(p, first_row) / BN);
    }
};

// The keys and values of a block on their way into the ring, tile by tile.
template <typename E, int D, int DV, int WARPS, int MT, int BN, int STAGES, int SPLIT>
struct Ring {
    using T = Tile<D, DV, WARPS, MT, BN, STAGES, SPLIT>;
    using LoadK = Loader<E, T::THREADS, BN, D>;
    using LoadV = Loader<E, T::THREADS, BN, DV>;
    static constexpr int BYTES = STAGES * T::STAGE_BYTES;

    const fwd_params &p;
    const Sequence &seq;
    const int b;
    const bool pages;
    const E *const k, *const v; // the first key of the sequence, or of the pages
    const uint32_t stage;       // the first one
    const int first, end;
    const int aligned;                 // tiles before this one are simply aligned rows
    const char *next_key, *next_value; // of this thread, in the tile that comes next
    const uint32_t key_to, value_to;   // of this thread, in the first stage
    const int key_columns, value_columns;

    __device__ __forceinline__ static const E *start(const fwd_view &view, const Work &work,
                                                     int kv_head, int64_t k_start, bool pages) {
        return (const E *)view.data + (pages ? 0 : work.b * view.stride[0]) +
               kv_head * view.stride[1] + k_start * view.stride[2];
    }

    __device__ __forceinline__ static int aligned_tiles(const fwd_params &p, const Sequence &seq,
                                                        bool pages, int end) {
        const int both = FWD_ALIGNED_KEY | FWD_ALIGNED_VALUE;
        return kept_by_all(pages || (p.flags & both) != both ? 0 : min(end, seq.k_len / BN));
    }

    __device__ __forceinline__ Ring(const fwd_params &p, const Work &work, const Sequence &seq,
                                    const E *k, const E *v, bool pages, uint32_t stage, int first,
                                    int end)
        : p(p), seq(seq), b(work.b), pages(pages), k(k), v(v), stage(stage), first(first), end(end),
          aligned(aligned_tiles(p, seq, pages, end)),
          next_key(LoadK::start(k + (int64_t)first * BN * p.key.stride[2], p.key.stride[2])),
          next_value(LoadV::start(v + (int64_t)first * BN * p.value.stride[2], p.value.stride[2])),
          key_to(kept(stage + LoadK::place())),
          value_to(D == DV ? key_to + T::K_BYTES : kept(stage + T::K_BYTES + LoadV::place())),
          key_columns(kept(LoadK::columns(p.dim_qk))),
          value_columns(kept(LoadV::columns(p.dim_v))) {}

    // `rows` rows from `row` on of a tile that is not simply aligned rows.
    template <typename Load>
    __device__ __forceinline__ void load_slowly(uint32_t to, const E *base, const fwd_view &view,
                                                int row, int rows, int dim, bool chunks) const {
        const auto in_rows = [&](int r) { return base + (row + r) * view.stride[2]; };
        const auto in_pages = [&](int r) { return base + paged_row(p, view, b, row + r); };
        if (!pages)
            Load::any(to, in_rows, view.stride[3], rows, dim);
        else if (chunks)
            Load::paged(to, in_pages, rows, dim);
        else
            Load::any(to, in_pages, view.stride[3], rows, dim);
    }

    // Tiles one after the other from `first` on, into the stage at `offset`.
    __device__ __forceinline__ void load_key(int tile, uint32_t offset) {
        const int left = seq.k_len - tile * BN;
        if (tile < aligned)
            LoadK::template aligned<true>(key_to + offset, next_key, p.key.stride[2], left,
                                          key_columns);
        else if (tile < end && !pages && p.flags & FWD_ALIGNED_KEY)
            LoadK::template aligned<false>(key_to + offset, next_key, p.key.stride[2], left,
                                           key_columns);
        else if (tile < end)
            load_slowly<LoadK>(stage + offset, k, p.key, tile * BN, left, p.dim_qk,
                               p.flags & FWD_ALIGNED_KEY);
    }
    __device__ __forceinline__ void load_value(int tile, uint32_t offset) {
        const int left = seq.k_len - tile * BN;
        if (tile < aligned)
            LoadV::template aligned<true>(value_to + offset, next_value, p.value.stride[2], left,
                                          value_columns);
        else if (tile < end && !pages && p.flags & FWD_ALIGNED_VALUE)
            LoadV::template aligned<false>(value_to + offset, next_value, p.value.stride[2], left,
                                           value_columns);
        else if (tile < end)
            load_slowly<LoadV>(stage + T::K_BYTES + offset, v, p.value, tile * BN, left, p.dim_v,
                               p.flags & FWD_ALIGNED_VALUE);
    }

    // All pairs of the ring but the last, which follows in the first step.
    __device__ __forceinline__ void fill() {
        load_key(first, 0);
        copy_commit();
#pragma unroll
        for (int i = 1; i < STAGES; ++i) {
            load_key(first + i, i * T::STAGE_BYTES);
            load_value(first + i - 1, i * T::STAGE_BYTES);
            copy_commit();
        }
    }

    // Waits for the pair of step g, which is at `offset`, and has the one STAGES steps later take the place of the last.
    __device__ __forceinline__ void turn(int g, uint32_t offset) {
        if (g < first)
            copy_wait<STAGES - 1>();
        else
            copy_wait<STAGES - 2>();
        __syncthreads(); // the pair of this step is there, and all warps are done with the step before
        if (g >= first) {
            const uint32_t free =
                offset == 0 ? (STAGES - 1) * T::STAGE_BYTES : offset - T::STAGE_BYTES;
            load_key(g + STAGES, free);
            load_value(g + STAGES - 1, free);
            copy_commit();
        }
    }

    // With one stage K of the next tile is on its way while V of this one is used, and the other way round.
    __device__ __forceinline__ void turn_to_value(int g) {
        if (g >= first) {
            copy_wait<0>();
            __syncthreads();
        }
        load_key(g + 1, 0);
        copy_commit();
    }
    __device__ __forceinline__ void turn_to_key(int g) {
        copy_wait<0>();
        __syncthreads();
        load_value(g + 1, 0);
        copy_commit();
    }
};

// A block's queries to shared memory.
template <typename Load, typename E>
__device__ __forceinline__ void load_queries(const fwd_params &p, uint32_t to, const E *q,
                                             int rows) {
    if (p.flags & FWD_ALIGNED_QUERY) {
        const char *from = Load::start(q, p.query.stride[2]);
        Load::template aligned<false>(to + Load::place(), from, p.query.stride[2], rows,
                                      Load::columns(p.dim_qk));
    } else {
        Load::any(
            to, [&](int r) { return q + r * p.query.stride[2]; }, p.query.stride[3], rows,
            p.dim_qk);
    }
}

// Where this thread's parts of the operands are: for ldmatrix, and in P for what it writes of that. K and V in the first stage.
template <int D, int DV, int MT, int BN, int SPLIT>
struct Operands {
    const uint32_t q, k, v, p, p_to;

    __device__ __forceinline__ static uint32_t in_p(uint32_t tile, int row, int half) {
        return SPLIT > 1 ? kept(tile + Chunks<BN>::at(row, half * (BN / SPLIT / 8))) : 0;
    }

    __device__ __forceinline__ Operands(uint32_t q_tile, uint32_t k_tile, uint32_t v_tile,
                                        uint32_t p_tile, int warp, int part)
        : q(kept(q_tile + warp * MT * 16 * D * 2 + Chunks<D>::at(lane() % 16, lane() / 16))),
          k(kept(k_tile + part * (BN / SPLIT) * D * 2 +
                 Chunks<D>::at(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2))),
          v(kept(v_tile + Chunks<DV>::at(lane() % 8 + lane() / 8 % 2 * (SPLIT > 1 ? BN / SPLIT : 8),
                                         part * 2 + lane() / 16))),
          p(in_p(p_tile, lane() % 16, lane() / 16)),
          p_to(in_p(p_tile, lane() / 4, part) + lane() % 4 * 4) {}

    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
};

// A warp's rows of output and lse. The output takes the place of the warp's own queries on its way to whole 16-byte writes.
template <typename E, int D, int DV, int MT, int BN, int SPLIT, bool EXTRAS, typename Share>
__device__ __forceinline__ void finish(const fwd_params &p, const Work &work, const Sequence &seq,
                                       const Share &share, Warp<E, D, DV, MT, BN, SPLIT> &w,
                                       char *shared, uint32_t p_tile, int diagonal_offset) {
    using W = Warp<E, D, DV, MT, BN, SPLIT>;
    const int lane = threadIdx.x % 32, warp = share.warp, part = share.part;
    const float sink = sink_of(p, work.h);
    w.add_up_sums((float *)(shared + p_tile));
    uint32_t odd = 0; // not 0: the output has a NaN or Inf
    bool far = false; // a row's maximum is so large that its exponents are of no use
    constexpr float far_from = EXTRAS ? FLT_MAX : EXACT_FROM; // exponents of extras() lose nothing
    // Where a bias hides all keys of a row by the least number that there is, they count alike: only lse asks for more.
    const bool hidden_alike = EXTRAS && p.bias.data && !p.lse.data;
    float lse_total = 0,
          lse_top = 0; // of row lane % 4 of those of this thread, with lane / 4 in common
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int local = warp * MT * 16 + mt * 16 + half * 8 + lane / 4;
            float total = w.sum[mt][half], top = w.top[mt][half];
            const bool beyond = share.block_row + local >= seq.q_len, empty = beyond || total == 0;
            far |= !beyond && fabsf(top) >= far_from && !(hidden_alike && top < 0);
            if (empty) {
                total = 0;
                top = NEG_INF;
            }
            const float factor = end_row(sink, top, total);
            if (lane % 4 == mt * 2 + half) {
                lse_total = total;
                lse_top = top;
            }
#pragma unroll
            for (int n = 0; n < W::COLUMNS / 8; ++n) {
                const float a = empty ? 0 : w.out[mt][n][2 * half] * factor;
                const float b = empty ? 0 : w.out[mt][n][2 * half + 1] * factor;
                const uint32_t pair = pack<E>(a, b);
                odd = multiply_add_zero<E>(pair, odd);
                const int chunk = (n / 2 * SPLIT + part) * 2 + n % 2;
                *(uint32_t *)(shared + Chunks<D>::at(local, chunk) + lane % 4 * 4) = pair;
            }
        }
    const int lse_row = warp * MT * 16 + lane % 4 * 8 + lane / 4;
    if (p.lse.data && part == 0 && lane % 4 < MT * 2 && lse_row < share.rows)
        store_lse<E>(p, work.b, work.h, seq.q_start + share.block_row + lse_row, sink, lse_top,
                     lse_total);
    const bool exactly = W::any(odd != 0 || far);
    constexpr int ROWS = MT * 16 / SPLIT; // of those that warps share, each writes some
    const int mine = warp * MT * 16 + part * ROWS;
    __syncwarp();
    store_rows<E, D, DV, ROWS>(p, shared, mine, share.rows,
                               (E *)p.output.data + work.b * p.output.stride[0] +
                                   work.h * p.output.stride[1] +
                                   (seq.q_start + share.block_row) * p.output.stride[2]);
    if (!exactly)
        return;
    write_rows_exactly<E, float>(p, work.b, work.h, share.block_row + mine,
                                 share.block_row + mine + ROWS, diagonal_offset);
}

template <typename E, int D, int DV, int WARPS, int MT, int BN, int STAGES, int SPLIT, bool EXTRAS>
__device__ __forceinline__ void cuda_fwd_sm80(const fwd_params &p, int diagonal_offset) {
    using T = Tile<D, DV, WARPS, MT, BN, STAGES, SPLIT>;
    using W = Warp<E, D, DV, MT, BN, SPLIT>;
    using R = Ring<E, D, DV, WARPS, MT, BN, STAGES, SPLIT>;
    extern __shared__ __align__(16) char shared[];
    const uint32_t q_tile = shared_address(shared), k_tile = q_tile + T::Q_BYTES;
    const int lane = threadIdx.x % 32, warps = kept_by_all(threadIdx.x / 32);

    const Work work(p);
    Sequence seq(p, work.b);
    seq.diagonal += diagonal_offset;
    Share<T::ROWS, MT * 16, BN, SPLIT> share(work, seq, warps);
    if (share.rows <= 0)
        return;
    const int kv_head = work.h / p.group;
    const bool pages = EXTRAS && p.page_size;
    const E *const q = (const E *)p.query.data + work.b * p.query.stride[0] +
                       work.h * p.query.stride[1] +
                       (seq.q_start + share.block_row) * p.query.stride[2];
    const E *const k = R::start(p.key, work, kv_head, seq.k_start, pages);
    const E *const v = R::start(p.value, work, kv_head, seq.k_start, pages);
    share.find_tiles(p, seq);
    R ring(p, work, seq, k, v, pages, k_tile, share.first, share.end);
    load_queries<Loader<E, T::THREADS, T::ROWS, D>>(p, q_tile, q, share.rows);
    if (STAGES > 1)
        ring.fill();

    W w;
    w.init(EXTRAS ? 1.0f : p.exponent_scale);
    const uint32_t p_tile = T::Q_BYTES + R::BYTES + share.warp * MT * 16 * BN * 2;
    const Operands<D, DV, MT, BN, SPLIT> at(q_tile, k_tile, k_tile + T::K_BYTES, q_tile + p_tile,
                                            share.warp, share.part);
    uint32_t offset = 0;
#pragma unroll 1
    for (int g = share.first - 1; g < share.end; ++g) {
        const bool current = g >= share.warp_first && g < share.warp_end,
                   next = g + 1 >= share.warp_first && g + 1 < share.warp_end;
        if (STAGES == 1)
            ring.turn_to_value(g);
        else
            ring.turn(g, offset);
        if (current)
            w.add_values(at.v + offset, at.p, at.p_to);
        if (STAGES == 1)
            ring.turn_to_key(g);
        if (next) {
            const int key = (g + 1) * BN + share.part * W::KEYS;
            w.multiply_keys(at.q, at.k + offset);
            if (EXTRAS)
                w.extras(p, seq, work.b, work.h, share.first_row + lane / 4, key);
            if (g + 1 < share.whole_first)
                w.template mask<false>(p, seq, share.first_row + lane / 4, key);
            if (g + 1 >= share.whole_end)
                w.template mask<true>(p, seq, share.first_row + lane / 4, key);
            w.find_maxima();
            w.follow_maxima(shared + p_tile);
            w.template exponentials<0, W::PART * W::AHEAD>(at.p_to);
        }
        offset = offset + T::STAGE_BYTES == R::BYTES ? 0 : offset + T::STAGE_BYTES;
    }
    copy_wait<0>();
    if (share.first >= share.end)
        __syncthreads(); // no step has waited for the queries; their tile is about to be reused
    finish<E, D, DV, MT, BN, SPLIT, EXTRAS>(p, work, seq, share, w, shared, p_tile,
                                            diagonal_offset);
}
