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
#include "kernels/cuda/common/pairs.cuh"
#include "kernels/cuda/common/ring.cuh"
#include "kernels/cuda/common/scores.cuh"
#include "kernels/cuda/common/share.cuh"

template <int D_, int DV_, int WARPS, int MT, int BN, int STAGES_, int SPLIT>
struct Tile {
    static constexpr int D = D_, DV = DV_, KEYS = BN, STAGES = STAGES_;
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS / SPLIT * MT * 16;
    static constexpr int Q_BYTES = ROWS * D * 2, K_BYTES = BN * D * 2, V_BYTES = BN * DV * 2;
    static constexpr int STAGE_BYTES = K_BYTES + V_BYTES, P_BYTES = SPLIT > 1 ? ROWS *BN * 2 : 0;
    static constexpr int SHARED_BYTES = Q_BYTES + STAGES * STAGE_BYTES + P_BYTES;
    static_assert(DV <= D, "the output is staged where the queries were");
};

// One warp's share: MT * 16 rows, or with SPLIT = 2 the scores of half of the keys and half of the output's columns of
// twice as many.
template <typename E, int D, int DV, int MT, int BN, int SPLIT>
struct Warp : Scores<MT, BN / SPLIT> {
    using Base = Scores<MT, BN / SPLIT>;
    using Base::NT, Base::score;
    static constexpr int KEYS = BN / SPLIT, COLUMNS = DV / SPLIT;
    static constexpr int VS = BN / 16, VN = COLUMNS / 16, PAIRS = MT * NT * 2;
    static_assert(SPLIT == 1 || (DV % 32 == 0 && (NT & (NT - 1)) == 0),
                  "warps share columns by 16, and keys of P by XOR of the chunk");

    float out[MT][COLUMNS / 8][4];
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

    // Hides keys of another segment. `row` as in mask(); `column`: the first of this thread's keys.
    __device__ __forceinline__ void hide_segments(const PairOptions &options, int row, int column) {
        const int last_row = options.seq.q_len - 1, last_key = options.seq.k_len - 1;
        int own[MT][2];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                own[mt][half] = options.query_segment(min(row + mt * 16 + half * 8, last_row));
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int segment = options.key_segment(min(column + n * 8 + e, last_key));
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        if (segment != own[mt][half])
                            score[mt][n][2 * half + e] = NEG_INF;
            }
    }

    // Hides what block mask and mask hide, key by key: for tiles that lie in several blocks.
    __device__ __forceinline__ void hide_masked_pairs(const PairOptions &options, int row,
                                                      int column) {
        const int last_row = options.seq.q_len - 1, last_key = options.seq.k_len - 1;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = min(row + mt * 16 + half * 8, last_row);
                uint32_t seen = 0; // a bit for each key
#pragma unroll 2
                for (int key = 0; key < 2 * NT; ++key)
                    seen |=
                        (uint32_t)options.unmasked(i, min(column + key / 2 * 8 + key % 2, last_key))
                        << key;
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (!(seen >> (n * 2 + e) & 1))
                            score[mt][n][2 * half + e] = NEG_INF;
            }
    }

    // Hides what segments and block mask hide. False: there is nothing left for the mask to do.
    __device__ __forceinline__ bool hide_pairs(const PairOptions &options, int row, int column) {
        const pair_params &pair = options.p;
        if (pair.query_segments.data)
            hide_segments(options, row, column);
        if (!pair.block_mask.data)
            return true;
        const int last_row = options.seq.q_len - 1, last_key = options.seq.k_len - 1,
                  first_row = row - threadIdx.x % 32 / 4, first_key = column - threadIdx.x % 4 * 2;
        const int state =
            options.state_of(min(first_row, last_row), min(first_row + MT * 16 - 1, last_row),
                             min(first_key, last_key), min(first_key + KEYS - 1, last_key));
        if (state < 0)
            hide_masked_pairs(options, row, column);
        else if (state == 0)
            this->change_scores([](float, int, int, int, int) { return NEG_INF; });
        return state == 1;
    }

    // Adds weights of the next tile that dropout drops to the sum, and hides their keys. `row` and `column` as in
    // hide_segments().
    __device__ __forceinline__ void drop(const PairOptions &options, int row, int column) {
        row = anew(row);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            uint32_t of_half[2];
            options.template dropped_in_tile<NT>(row + mt * 16, column, of_half);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (of_half[half] >> (n * 4 + e) & 1) {
                            float &x = score[mt][n][2 * half + e];
                            sum[mt][half] += exp2_approx(fmaf(x, slope, -top[mt][half]));
                            x = NEG_INF;
                        }
        }
    }

    // Scores::extras() and what hides keys; arguments as there.
    template <bool PAIRS>
    __device__ __forceinline__ void extras(const fwd_params &p, const pair_params &pair,
                                           const Sequence &seq, int b, int h, int row, int key) {
        Base::extras(p, seq, b, h, row, key, p.exponent_scale, Element<E>::widen, [&] {
            if constexpr (PAIRS)
                return hide_pairs(PairOptions{p, pair, seq, anew(b), anew(h)}, anew(row),
                                  key + threadIdx.x % 4 * 2);
            else
                return true;
        });
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
template <typename E, int D, int DV, int MT, int BN, int SPLIT, int EXTRAS, typename Share>
__device__ __forceinline__ void finish(const fwd_params &p, const Work &work, const Sequence &seq,
                                       const Share &share, Warp<E, D, DV, MT, BN, SPLIT> &w,
                                       char *shared, uint32_t p_tile, const pair_params &pair) {
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
            float factor = end_row(sink, top, total);
            if (EXTRAS == 2)
                factor *= pair.keep;
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
    const int row = share.block_row + mine;
    if constexpr (EXTRAS == 2)
        write_rows_exactly<E, float>(p, pair, work.b, work.h, row, row + ROWS);
    else // parameters that nothing but this would read are registers that the loop misses
        write_rows_exactly<E, float>(p, work.b, work.h, row, row + ROWS,
                                     EXTRAS ? pair.diagonal_offset : 0);
}

template <typename E, int D, int DV, int WARPS, int MT, int BN, int STAGES, int SPLIT, int EXTRAS>
__device__ __forceinline__ void cuda_fwd_sm80(const fwd_params &p, const pair_params &pair) {
    using T = Tile<D, DV, WARPS, MT, BN, STAGES, SPLIT>;
    using W = Warp<E, D, DV, MT, BN, SPLIT>;
    using R = Ring<E, T>;
    constexpr bool PAIRS = EXTRAS == 2;
    extern __shared__ __align__(16) char shared[];
    const uint32_t q_tile = shared_address(shared), k_tile = q_tile + T::Q_BYTES;
    const int lane = threadIdx.x % 32, warps = kept_by_all(threadIdx.x / 32);

    const Work work(p);
    Sequence seq(p, work.b);
    if (EXTRAS)
        seq.diagonal += pair.diagonal_offset;
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
    const PairOptions options{p, pair, seq, work.b, work.h};
    Steps<BN, STAGES, PAIRS> steps(options, share.block_row,
                                   min(share.block_row + T::ROWS, seq.q_len), share.first,
                                   share.end);
    R ring(p, work, seq, k, v, pages, k_tile, share.first, share.end);
    load_queries<Loader<E, T::THREADS, T::ROWS, D>>(p, q_tile, q, share.rows);
    if (STAGES > 1)
        ring.fill(steps);

    W w;
    w.init(EXTRAS ? 1.0f : p.exponent_scale);
    const uint32_t p_tile = T::Q_BYTES + R::BYTES + share.warp * MT * 16 * BN * 2;
    const Operands<D, DV, MT, BN, SPLIT> at(q_tile, k_tile, k_tile + T::K_BYTES, q_tile + p_tile,
                                            share.warp, share.part);
    uint32_t offset = 0;
#pragma unroll 1
    for (int g = share.first - 1; g < share.end; g = steps.turn(g)) {
        const bool current = g >= share.warp_first && g < share.warp_end,
                   next = (PAIRS ? steps.after(g, 1) : g + 1) >= share.warp_first &&
                          (PAIRS ? steps.after(g, 1) : g + 1) < share.warp_end;
        if (STAGES == 1)
            ring.turn_to_value(g, steps);
        else
            ring.turn(g, steps, offset);
        if (current)
            w.add_values(at.v + offset, at.p, at.p_to);
        if (STAGES == 1)
            ring.turn_to_key(g, steps);
        if (next) {
            const int key = (PAIRS ? steps.after(g, 1) : g + 1) * BN + share.part * W::KEYS;
            w.template multiply<Element<E>, D * 2>(at.q, at.k + offset);
            if (EXTRAS)
                w.template extras<PAIRS>(p, pair, seq, work.b, work.h, share.first_row + lane / 4,
                                         key);
            if ((PAIRS ? steps.after(g, 1) : g + 1) < share.whole_first)
                w.template mask<false>(p, seq, share.first_row + lane / 4, key);
            if ((PAIRS ? steps.after(g, 1) : g + 1) >= share.whole_end)
                w.template mask<true>(p, seq, share.first_row + lane / 4, key);
            w.find_maxima(w.tile_most);
            w.follow_maxima(shared + p_tile);
            if (PAIRS && pair.dropout)
                w.drop(options.for_once(), share.first_row + lane / 4, key + lane % 4 * 2);
            w.template exponentials<0, W::PART * W::AHEAD>(at.p_to);
        }
        offset = offset + T::STAGE_BYTES == R::BYTES ? 0 : offset + T::STAGE_BYTES;
    }
    copy_wait<0>();
    if (share.first >= share.end)
        __syncthreads(); // no step has waited for the queries; their tile is about to be reused
    finish<E, D, DV, MT, BN, SPLIT, EXTRAS>(p, work, seq, share, w, shared, p_tile, pair);
}
