// Gradients of attention on the tensor cores of Ampere and later: cp.async, ldmatrix, mma.m16n8k16. See docs/cuda-backward.md.
//
// Four kernels, none of which adds to what another block adds to, so the bits of a gradient are those of its one block:
//   stats   of each row delta, and what its weights are relative to
//   keys    a block owns keys of one kv head, and walks over the rows of all query heads of the group: d_key and d_value
//   rows    a block owns query rows, and walks over the keys: d_query, and of each block a sum for d_alibi_slopes
//   bias    a block owns a part of d_bias, and walks over all that it is broadcast to
// and two that only add up, slopes and sinks.
#pragma once

#include "kernels/cuda/common/bwd_pairs.cuh"
#include "kernels/cuda/sm80/bwd_sizes.h"
#include "kernels/cuda/sm80/bwd_sums.cuh"
#include "kernels/cuda/sm80/fwd.cuh"

#include <type_traits>

// ---- The two products --------------------------------------------------------------------------------------------------

// Where a lane's part of ldmatrix begins: of a tile as the left operand, as the right one, and as the right one transposed.
template <int D>
__device__ __forceinline__ uint32_t left_at(int lane) {
    return Chunks<D>::at(lane % 16, lane / 16);
}
template <int D>
__device__ __forceinline__ uint32_t right_at(int lane) {
    return Chunks<D>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
template <int D>
__device__ __forceinline__ uint32_t transposed_at(int lane) {
    return Chunks<D>::at(lane % 16, lane / 16);
}

// What runs between two products so that the tensor cores do not wait for it: nothing, or share `item` of `items` of some words.
struct Nothing {
    template <typename Item>
    __device__ __forceinline__ void operator()(Item) const {}
};
template <int WORDS, int ITEMS, int ITEM, typename Body>
__device__ __forceinline__ void share(Body body) {
    constexpr int FIRST = WORDS * ITEM / ITEMS, END = WORDS * (ITEM + 1) / ITEMS;
    unrolled<END - FIRST>(
        [&](auto n) { body(std::integral_constant<int, FIRST + decltype(n)::value>()); });
}

// MT * 16 rows as the left operand, 16 columns after the other; or HELD in registers from the first product on.
template <int D, int MT, bool HELD = false>
struct LeftRows {
    uint32_t from, a[HELD ? D / 16 : 2][MT][4];

    __device__ __forceinline__ void load_step(int step) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
            load_matrices(a[HELD ? step : step % 2][mt],
                          Chunks<D>::after(from, step) + mt * 16 * D * 2);
    }
    __device__ __forceinline__ void hold() {
#pragma unroll
        for (int step = 0; step < D / 16; ++step)
            load_step(step);
    }
    __device__ __forceinline__ void load(int step) {
        if (!HELD)
            load_step(step);
    }
    __device__ __forceinline__ const uint32_t (&of(int step, int mt) const)[4] {
        return a[HELD ? step : step % 2][mt];
    }
};

// score = MT * 16 rows at `left` times N rows at `right`, in ITEMS steps. Matrices are loaded two products early.
template <int D, int N>
constexpr int ITEMS_OF = D / 16 * (N / 16);
template <typename E, int D, int MT, int N, typename Left, typename Between>
__device__ __forceinline__ void multiply_rows(float (&score)[MT][N / 8][4], Left &left,
                                              uint32_t right, Between between) {
    constexpr int PARTS = N / 16, STEPS = D / 16, ITEMS = ITEMS_OF<D, N>;
    uint32_t b[3][4];
    const auto load_right = [&](int i) {
        load_matrices(b[i % 3], Chunks<D>::after(right, i / PARTS) + i % PARTS * 16 * D * 2);
    };
    left.load(0);
    load_right(0);
    load_right(1);
    clear(score);
    unrolled<ITEMS>([&](auto item) {
        constexpr int i = decltype(item)::value, step = i / PARTS, n = i % PARTS * 2;
        if (i + 2 < ITEMS)
            load_right(i + 2);
        if ((i + 1) % PARTS == 0 && step + 1 < STEPS)
            left.load(step + 1);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            Element<E>::mma(score[mt][n], left.of(step, mt), b[i % 3][0], b[i % 3][1]);
            Element<E>::mma(score[mt][n + 1], left.of(step, mt), b[i % 3][2], b[i % 3][3]);
        }
        between(item);
    });
}
template <typename E, int D, int MT, int N, typename Between>
__device__ __forceinline__ void multiply_rows(float (&score)[MT][N / 8][4], uint32_t left,
                                              uint32_t right, Between between) {
    LeftRows<D, MT> rows{left};
    multiply_rows<E, D, MT, N>(score, rows, right, between);
}

// sum += the tile whose packed pairs are `left`, MT * 16 by N, times the N rows at `right`. make(mt, step, word) gives a word of
// `left`: those of 16 columns while the 16 before are multiplied; made(step) follows the last of them.
template <typename E, int D, int MT, int N, typename Make, typename Made>
__device__ __forceinline__ void add_products(float (&sum)[MT][D / 8][4], uint32_t right, Make make,
                                             Made made) {
    constexpr int PARTS = D / 16, STEPS = N / 16, ITEMS = STEPS * PARTS, WORDS = MT * 4;
    uint32_t left[2][MT][4], b[3][4];
    const auto load_right = [&](int i) {
        load_matrices_transposed(b[i % 3],
                                 Chunks<D>::after(right, i % PARTS) + i / PARTS * 16 * D * 2);
    };
    // Neighbouring words are of the same columns.
    const auto make_word = [&](int step, int k) {
        const int mt = k / 2 % MT, word = k / (2 * MT) * 2 + k % 2;
        left[step % 2][mt][word] = make(mt, step, word);
    };
    load_right(0);
    load_right(1);
#pragma unroll
    for (int k = 0; k < WORDS; ++k)
        make_word(0, k);
    made(0, left[0]);
    unrolled<ITEMS>([&](auto item) {
        constexpr int i = decltype(item)::value, step = i / PARTS, part = i % PARTS, n = part * 2;
        if (i + 2 < ITEMS)
            load_right(i + 2);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            Element<E>::mma(sum[mt][n], left[step % 2][mt], b[i % 3][0], b[i % 3][1]);
            Element<E>::mma(sum[mt][n + 1], left[step % 2][mt], b[i % 3][2], b[i % 3][3]);
        }
        if constexpr (step + 1 < STEPS) {
            share<WORDS, PARTS, part>([&](auto k) { make_word(step + 1, decltype(k)::value); });
            if (part == PARTS - 1)
                made(step + 1, left[(step + 1) % 2]);
        }
    });
}

// ---- Between global and shared memory ----------------------------------------------------------------------------------

// COUNT rows of any layout, of E or of floats, from `data` on; `rows` exist, with `dim` elements each. A call: many kernels have it
// in many places, and none in a hurry.
template <typename E, int THREADS, int COUNT, int D>
__device__ __noinline__ void load_slowly(uint32_t to, const void *data, int64_t stride,
                                         int64_t inner, int rows, int dim, bool f32) {
#pragma unroll 1
    for (int x = threadIdx.x; x < COUNT * (D / 8); x += THREADS) {
        const int r = x / (D / 8), c = x % (D / 8) * 8;
        const auto at = [&](int d) {
            return r < rows && d < dim ? load_number<E>(data, r * stride + d * inner, f32) : 0.0f;
        };
        uint32_t pairs[4];
#pragma unroll
        for (int e = 0; e < 8; e += 2)
            pairs[e / 2] = pack<E>(at(c + e), at(c + e + 1));
        store_chunk(to + Chunks<D>::at(r, c / 8), pairs);
    }
}

// The same of a tensor from its element `from` on.
template <typename E, int THREADS, int COUNT, int D>
__device__ __forceinline__ void load_tile(uint32_t to, const void *data, int64_t from,
                                          const fwd_view &v, int rows, int dim, bool aligned,
                                          bool f32) {
    using Load = Loader<E, THREADS, COUNT, D>;
    const int64_t stride = v.stride[2];
    if (aligned) {
        const char *next = Load::start((const E *)data + from, stride);
        Load::template aligned<false>(to + Load::place(), next, stride, rows, Load::columns(dim));
    } else {
        load_slowly<E, THREADS, COUNT, D>(to, (const char *)data + from * (f32 ? 4 : sizeof(E)),
                                          stride, v.stride[3], rows, dim, f32);
    }
}

// A warp's MT * 16 rows of sums times `factor` to a gradient whose first row begins at `to`. `rows` exist; those from `len` on
// are 0. `aligned`: as FWD_ALIGNED_QUERY; else elements go one by one, by way of the warp's `staging` for 8 rows of floats.
template <typename E, int D, int MT>
__device__ __forceinline__ void store_gradient(const float (&sum)[MT][D / 8][4], float factor,
                                               const fwd_view &v, int64_t to, int rows, int len,
                                               int dim, bool f32, bool aligned, float *staging) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int first = mt * 16 + half * 8, r = first + lane / 4;
            const auto at = [&](int n, int e) {
                return r < len ? sum[mt][n][2 * half + e] * factor : 0;
            };
            if (aligned && !f32) {
                const int64_t row = to + r * v.stride[2];
#pragma unroll
                for (int n = 0; n < D / 8; n += 4) {
                    uint32_t words[4];
#pragma unroll
                    for (int w = 0; w < 4; ++w)
                        words[w] = pack<E>(at(n + w, 0), at(n + w, 1));
                    transpose_words(words);
                    const int d = (n + lane % 4) * 8;
                    if (r < rows && d < dim)
                        *(uint4 *)((E *)v.data + row + d) = {words[0], words[1], words[2],
                                                             words[3]};
                }
                continue;
            }
            __syncwarp();
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                *(float2 *)(staging + lane / 4 * D + n * 8 + lane % 4 * 2) = {at(n, 0), at(n, 1)};
            __syncwarp();
#pragma unroll 1
            for (int x = lane; x < 8 * D; x += 32)
                if (first + x / D < rows && x % D < dim)
                    store_number<E>(v.data,
                                    to + (first + x / D) * v.stride[2] + x % D * v.stride[3], f32,
                                    staging[x]);
        }
}

// ---- Rows and keys by plain loops ---------------------------------------------------------------------------------------

// For sums that came out as NaN or infinity: what is hidden may hold those, and 0 times either is NaN. Here hidden pairs are left
// out, and products stay in f32.
template <typename E, bool EXTRAS>
struct ExactPair {
    float weight, gradient; // of the value, and that of the product q k
    bool seen, kept;

    __device__ ExactPair(const Head<E, EXTRAS> &head, int i, int j)
        : weight(0), gradient(0), seen(false), kept(false) {
        const bwd_params &p = head.p;
        if (i >= head.seq.q_len || !head.in_window(i, j) ||
            (p.pair.query_segments.data && !head.options().same_segment(i, j)) ||
            !head.options().unmasked(i, j))
            return;
        const int64_t q = head.row(p.f.query, i), k = head.key(p.f.key, j),
                      o = head.row(p.d_output, i), v = head.key(p.f.value, j);
        float score = 0, d_weight = 0, cap = 1;
        for (int d = 0; d < p.f.dim_qk; ++d)
            score = fmaf(load_number<E>(p.f.query.data, q + d * p.f.query.stride[3], false),
                         load_number<E>(p.f.key.data, k + d * p.f.key.stride[3], false), score);
        if (EXTRAS) {
            score = head.capped(score, cap);
            if (p.f.bias.data)
                score += head.bias(i, j);
            if (p.f.alibi_slopes.data)
                score = fmaf(-head.alibi_slope(), head.distance(i, j), score);
        }
        if (score == NEG_INF)
            return;
        seen = true;
        const float *const stats = stats_of(p, head.seq, head.h) + i;
        const float probability = head.weight(score, stats[0], stats[stats_plane(p)]);
        kept = !(EXTRAS && p.pair.dropout && head.options().dropped(i, j));
        for (int d = 0; d < p.f.dim_v && kept; ++d)
            d_weight =
                fmaf(load_number<E>(p.d_output.data, o + d * p.d_output.stride[3],
                                    p.flags & BWD_D_OUTPUT_F32),
                     load_number<E>(p.f.value.data, v + d * p.f.value.stride[3], false), d_weight);
        weight = kept ? probability * p.pair.keep : 0;
        gradient = probability * (d_weight * p.pair.keep - stats[2 * stats_plane(p)]) * cap *
                   (float)p.f.scale;
    }
};

// out[c] += factor * element lane + 32 c of a row, for the pairs of the warp's lanes that count, one after the other.
template <typename E, typename RowOf>
__device__ __forceinline__ void add_rows(float (&out)[8], float factor, bool counts,
                                         const fwd_view &v, int dim, bool f32, RowOf row_of) {
    const int lane = threadIdx.x % 32;
    for (unsigned left = __ballot_sync(~0u, counts); left; left &= left - 1) {
        const int who = __ffs(left) - 1;
        const float x = __shfl_sync(~0u, factor, who);
        const int64_t row = row_of(who);
#pragma unroll
        for (int c = 0; c < 8; ++c)
            if (lane + 32 * c < dim)
                out[c] = fmaf(x, load_number<E>(v.data, row + (lane + 32 * c) * v.stride[3], f32),
                              out[c]);
    }
}

// Whether no further term changes these sums.
__device__ __forceinline__ bool all_nan(const float (&out)[8], int dim) {
    bool all = true;
#pragma unroll
    for (int c = 0; c < 8; ++c)
        all &= (int)threadIdx.x % 32 + 32 * c >= dim || isnan(out[c]);
    return __all_sync(~0u, all);
}

template <typename E>
__device__ __forceinline__ void store_columns(const float (&out)[8], const fwd_view &v, int64_t row,
                                              int dim, bool f32) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < 8; ++c)
        if (lane + 32 * c < dim)
            store_number<E>(v.data, row + (lane + 32 * c) * v.stride[3], f32, out[c]);
}

// Rows [row, end) of d_query, by one warp, over what it has written before.
template <typename E, bool EXTRAS>
__device__ __noinline__ void write_query_exactly(const bwd_params &p, int b, int h, int row,
                                                 int end) {
    const BwdSequence seq(p, b);
    const Head<E, EXTRAS> head{p, seq, b, h};
    const int lane = threadIdx.x % 32;
    __syncwarp();
    for (int i = row; i < min(end, seq.q_len); ++i) {
        float out[8] = {};
        for (int j = seq.first_key(p.f, i); j < seq.end_key(p.f, i) && !all_nan(out, p.f.dim_qk);
             j += 32) {
            const ExactPair<E, EXTRAS> pair(head, i, j + lane);
            add_rows<E>(out, pair.gradient, pair.seen, p.f.key, p.f.dim_qk, false,
                        [&](int who) { return head.key(p.f.key, j + who); });
        }
        store_columns<E>(out, p.d_query, head.row(p.d_query, i), p.f.dim_qk,
                         p.flags & BWD_D_QUERY_F32);
    }
}

// Keys [key, end) of d_value, or of d_key.
template <typename E, bool EXTRAS>
__device__ __noinline__ void write_keys_exactly(const bwd_params &p, int b, int kv_head, int key,
                                                int end, bool values) {
    const BwdSequence seq(p, b);
    const int lane = threadIdx.x % 32;
    const fwd_view &from = values ? p.d_output : p.f.query, &to = values ? p.d_value : p.d_key;
    const int dim = values ? p.f.dim_v : p.f.dim_qk;
    __syncwarp();
    for (int j = key; j < min(end, seq.k_len); ++j) {
        float out[8] = {};
        for (int n = 0; n < p.f.group; ++n) {
            const Head<E, EXTRAS> head{p, seq, b, kv_head * p.f.group + n};
            for (int i = seq.first_row(p, j); i < seq.end_row(p, j, j + 1) && !all_nan(out, dim);
                 i += 32) {
                const ExactPair<E, EXTRAS> pair(head, i + lane, j);
                add_rows<E>(out, values ? pair.weight : pair.gradient,
                            values ? pair.kept : pair.seen, from, dim,
                            values && p.flags & BWD_D_OUTPUT_F32,
                            [&](int who) { return head.row(from, i + who); });
            }
        }
        const int64_t row =
            b * to.stride[0] + kv_head * to.stride[1] + (seq.k_start + j) * to.stride[2];
        store_columns<E>(out, to, row, dim, p.flags & (values ? BWD_D_VALUE_F32 : BWD_D_KEY_F32));
    }
}

// ---- Statistics of rows -------------------------------------------------------------------------------------------------

// From here on the rounding of a log-sum-exp in f32 is worth a look at the scores themselves.
constexpr float FAR_FROM = 1024;
// From here on rounding what exponents are relative to costs more than rounding weights to f16.
constexpr float LARGEST_EXPONENT = 4096;

template <int D>
struct StatsTile {
    static constexpr int THREADS = STATS_THREADS, ROWS = BWD_STATS_ROWS, KEYS = STATS_KEYS;
};

// The product of output and its gradient, of which an output of 0 has none: it is that of a row that sees nothing, whatever stands in
// the gradient.
__device__ __forceinline__ float add_delta(float sum, float x, float d_x) {
    return x == 0 ? sum : fmaf(x, d_x, sum);
}

// Over 8 columns of a row of any layout.
template <typename E>
__device__ __forceinline__ float delta_of(const bwd_params &p, int64_t o, int64_t d_o, int column) {
    const bool f32 = p.flags & BWD_D_OUTPUT_F32;
    float sum = 0;
    if (column >= p.f.dim_v)
        return 0;
    if (p.f.flags & FWD_ALIGNED_OUTPUT && p.flags & BWD_ALIGNED_D_OUTPUT) {
        const uint4 x = __ldg((const uint4 *)((const E *)p.f.output.data + o + column)),
                    d_x = __ldg((const uint4 *)((const E *)p.d_output.data + d_o + column));
        const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, d_xs[4] = {d_x.x, d_x.y, d_x.z, d_x.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const float2 a = widen_pair<E>(xs[n]), b = widen_pair<E>(d_xs[n]);
            sum = add_delta(add_delta(sum, a.x, b.x), a.y, b.y);
        }
        return sum;
    }
    for (int d = column; d < min(column + 8, p.f.dim_v); ++d) {
        const float d_x = load_number<E>(p.d_output.data, d_o + d * p.d_output.stride[3], f32);
        sum = add_delta(sum, load_number<E>(p.f.output.data, o + d * p.f.output.stride[3], false),
                        Element<E>::widen((uint16_t)pack<E>(d_x, 0))); // as the tensor cores see it
    }
    return sum;
}

// Deltas of the rows of a block, and squares of the norms of their d_output, of aligned tensors.
template <typename E, int D, int ROWS>
__device__ __forceinline__ void find_deltas(const BwdHead<E> &head, int first, float *deltas,
                                            float *squares) {
    using R = Rows<E, D>;
    static_assert(ROWS % R::COUNT == 0, "");
    const bwd_params &p = head.p;
#pragma unroll 1
    for (int r = 0; r < ROWS; r += R::COUNT) {
        const int i = first + r;
        R output, d_output;
        output.load(p.f.output, head.row(p.f.output, i), head.seq.q_len - i, p.f.dim_v);
        d_output.load(p.d_output, head.row(p.d_output, i), head.seq.q_len - i, p.f.dim_v);
#pragma unroll
        for (int n = 0; n < R::TIMES; ++n) {
            float delta = 0, square = 0;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float2 x = widen_pair<E>(output.words[n][w]),
                             d_x = widen_pair<E>(d_output.words[n][w]);
                delta = add_delta(add_delta(delta, x.x, d_x.x), x.y, d_x.y);
                square = fmaf(d_x.y, d_x.y, fmaf(d_x.x, d_x.x, square));
            }
            delta = R::sum(delta);
            square = R::sum(square);
            if (R::column() == 0) {
                deltas[r + R::row(n)] = delta;
                squares[r + R::row(n)] = square;
            }
        }
    }
}

// What weights of 64 rows are relative to, from the scores: 16 rows of a warp.
template <typename E, int D, bool EXTRAS>
__device__ __forceinline__ void sweep(const bwd_params &p, const BwdSequence &seq, int b, int h,
                                      int block_row, uint32_t shared, float *stats) {
    using T = StatsTile<D>;
    using Tile = Pairs<false, 1, T::KEYS>;
    const Head<E, EXTRAS> head{p, seq, b, h};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16 + lane / 4;
    const int last = min(block_row + T::ROWS, seq.q_len) - 1;
    const uint32_t keys = shared + T::ROWS * D * 2;
    float top[2] = {NEG_INF, NEG_INF}, total[2] = {0, 0};
    load_tile<E, T::THREADS, T::ROWS, D>(shared, p.f.query.data, head.row(p.f.query, block_row),
                                         p.f.query, seq.q_len - block_row, p.f.dim_qk,
                                         p.f.flags & FWD_ALIGNED_QUERY, false);
    for (int key = seq.first_key(p.f, block_row) / T::KEYS * T::KEYS; key < seq.end_key(p.f, last);
         key += T::KEYS) {
        load_tile<E, T::THREADS, T::KEYS, D>(keys, p.f.key.data, head.key(p.f.key, key), p.f.key,
                                             seq.k_len - key, p.f.dim_qk,
                                             p.f.flags & FWD_ALIGNED_KEY, false);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        float score[1][T::KEYS / 8][4], cap[1][T::KEYS / 8][4];
        multiply_rows<E, D, 1, T::KEYS>(score, shared + warp * 16 * D * 2 + left_at<D>(lane),
                                        keys + right_at<D>(lane), Nothing());
        if (EXTRAS)
            Tile::options(head, block_row + row, key + lane % 4 * 2, score, cap);
        Tile::hide(p, seq, block_row + row, key + lane % 4 * 2, score);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = top[half];
#pragma unroll
            for (int n = 0; n < T::KEYS / 8; ++n)
                highest = fmaxf(highest, fmaxf(score[0][n][2 * half], score[0][n][2 * half + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const float base = highest == NEG_INF ? 0 : highest;
            total[half] *= head.weight(top[half], base, 0);
            top[half] = highest;
#pragma unroll
            for (int n = 0; n < T::KEYS / 8; ++n)
                total[half] += head.weight(score[0][n][2 * half], base, 0) +
                               head.weight(score[0][n][2 * half + 1], base, 0);
        }
        __syncthreads();
    }
    copy_wait<0>();
    const float sink = sink_of(p.f, h) * LOG2E / head.slope();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        total[half] += __shfl_xor_sync(~0u, total[half], 1);
        total[half] += __shfl_xor_sync(~0u, total[half], 2);
        if (sink > NEG_INF) {
            const float higher = fmaxf(top[half], sink);
            total[half] =
                total[half] * head.weight(top[half], higher, 0) + head.weight(sink, higher, 0);
            top[half] = higher;
        }
        const int r = row + half * 8;
        const bool empty = block_row + r >= seq.q_len || total[half] == 0;
        if (lane % 4 == 0) {
            stats[r] = empty ? 0 : top[half];
            stats[stats_plane(p) + r] = empty ? POS_INF : log2f(total[half]);
            if (empty)
                stats[2 * stats_plane(p) + r] = 0;
        }
    }
}

template <typename E, int D, bool EXTRAS, bool SUMS>
__device__ __forceinline__ void find_stats(const bwd_params &p, int block) {
    using T = StatsTile<D>;
    constexpr int LANES = D / 8, STEP = T::THREADS / LANES;
    extern __shared__ __align__(16) char shared[];
    const int blocks = (p.f.len_q + T::ROWS - 1) / T::ROWS;
    const int h = block / blocks % p.f.heads_q, b = block / blocks / p.f.heads_q,
              block_row = block % blocks * T::ROWS;
    const BwdSequence seq(p, b);
    if (block_row >= seq.q_rows)
        return;
    const Head<E, EXTRAS> head{p, seq, b, h};
    float *const stats = (float *)stats_of(p, seq, h) + block_row;
    float *const deltas = (float *)shared, *const squares = deltas + T::ROWS;
    if constexpr (SUMS) {
        uint4 *const sums = (uint4 *)sums_at<D>(p, seq, h, block_row);
        for (int i = threadIdx.x; i < T::ROWS * D / 4; i += T::THREADS)
            sums[i] = {0, 0, 0, 0};
        find_deltas<E, D, T::ROWS>({p, seq, b, h}, block_row, deltas, squares);
    } else {
#pragma unroll 4
        for (int r = threadIdx.x / LANES; r < T::ROWS; r += STEP) {
            const int i = block_row + r;
            float delta = 0;
            if (i < seq.q_len)
                delta = delta_of<E>(p, head.row(p.f.output, i), head.row(p.d_output, i),
                                    threadIdx.x % LANES * 8);
#pragma unroll
            for (int step = LANES / 2; step; step /= 2)
                delta += __shfl_xor_sync(~0u, delta, step);
            if (threadIdx.x % LANES == 0)
                deltas[r] = delta;
        }
    }
    __syncthreads();
    bool far = false, odd = false;
    uint32_t most = 0;
    if (threadIdx.x < T::ROWS) {
        const int r = threadIdx.x, i = block_row + r;
        const bool exists = i < seq.q_len;
        float log = POS_INF, d_lse = 0;
        if (exists) {
            log =
                load_number<E>(p.f.lse.data, head.row(p.f.lse, i), p.f.flags & FWD_LSE_F32) * LOG2E;
            if (p.d_lse.data)
                d_lse = load_number<E>(p.d_lse.data, head.row(p.d_lse, i), p.flags & BWD_D_LSE_F32);
            far = !(p.f.flags & FWD_LSE_F32) || (fabsf(log) >= FAR_FROM && fabsf(log) < POS_INF);
        }
        const float delta = deltas[r] - d_lse;
        const bool empty = !exists || (fabsf(log) == POS_INF && p.f.flags & FWD_LSE_F32);
        stats[r] = 0;
        stats[stats_plane(p) + r] = empty ? POS_INF : log;
        stats[2 * stats_plane(p) + r] = empty ? 0 : delta;
        if (SUMS) {
            const bool sees = exists && seq.first_key(p.f, i) < seq.end_key(p.f, i);
            const float bound = sees ? 2 * sqrtf(squares[r]) + fabsf(d_lse) : 0;
            stats[3 * stats_plane(p) + r] = row_factor(bound);
            stats[4 * stats_plane(p) + r] = empty ? POS_INF : log - WeightScale<E>::LOG;
            most = __float_as_uint(bound);
            odd = sees &&
                  (beyond(squares[r]) || beyond(delta) || beyond(d_lse) || !(fabsf(log) < POS_INF));
        }
    }
    if (named_barrier_any(0, T::THREADS, far)) {
        sweep<E, D, EXTRAS>(p, seq, b, h, block_row, shared_address(shared), stats);
        if (SUMS) {
            __syncthreads();
            const int r = threadIdx.x % T::ROWS;
            const float exponent = fmaf(stats[r], p.f.exponent_scale, stats[stats_plane(p) + r]);
            stats[4 * stats_plane(p) + r] = exponent - WeightScale<E>::LOG;
            odd |= exponent != POS_INF && !(fabsf(exponent) < LARGEST_EXPONENT);
        }
    }
    if (SUMS) {
        uint32_t *const facts = facts_of(p, b, h / p.f.group);
        most = __reduce_max_sync(~0u, most);
        if (threadIdx.x % 32 == 0)
            atomicMax(facts + FACT_ROW, most);
        if (odd)
            facts[FACT_ODD] = 1;
    }
}

template <typename E, int D, bool EXTRAS>
__device__ __forceinline__ void bwd_stats(const bwd_params &p) {
    find_stats<E, D, EXTRAS, false>(p, blockIdx.x);
}

// The same with a factor of each row for fixed point and zeros for its sums, and what the factors need to know of keys and values.
template <typename E, int D>
__device__ __forceinline__ void bwd_prepare(const bwd_params &p) {
    extern __shared__ __align__(16) char shared[];
    const int scans = (p.f.len_k + SUM_KEYS - 1) / SUM_KEYS * p.heads_kv * p.f.batch;
    if ((int)blockIdx.x < scans)
        scan_keys<E, D>(p, blockIdx.x, (uint32_t *)shared);
    else
        find_stats<E, D, false, true>(p, blockIdx.x - scans);
}

// ---- Gradients of keys and values ---------------------------------------------------------------------------------------

// Two warps share MT * 16 keys. The first has S^T = K Q^T, the weights P^T, and d_value += P^T dO; the second has dP^T = V dO^T,
// from P^T that the first left for it dS^T, and d_key += dS^T Q, one step later. So what is no product runs between products, and
// one barrier a step is all that either waits for.
//
// With SUMS all warps also have dQ = dS K of the step before the last, each 32 columns of some rows, and add it to sums of
// integers: dS passes through shared memory, key by key.
template <int D, int WARPS, int MT, int BM, bool SUMS, bool LAGS>
struct KeysTile {
    static constexpr int THREADS = WARPS * 32, PAIRS = WARPS / 2, KEYS = PAIRS * MT * 16;
    static constexpr int OWN_BYTES = KEYS * D * 2, STEP_BYTES = BM * D * 2;
    // The second warp is a step behind the first, or waits for its weights; what comes after both is SUMS steps behind that.
    static constexpr int LAG = LAGS ? 1 : 0, LAST = LAG + (SUMS ? 1 : 0);
    static constexpr int QUERY_STAGES = 2 + LAG, STATS_STAGES = 2 + LAST, WEIGHT_STAGES = 1 + LAG;
    static constexpr int STATS_BYTES = 3 * BM * 4, WEIGHTS_BYTES = MT * BM * 32;
    // Keys, values, three stages of queries, two of d_output, some of statistics, two of weights. With SUMS two of dS, and the factors
    // of columns.
    static constexpr int QUERY_AT = 2 * OWN_BYTES,
                         D_OUTPUT_AT = QUERY_AT + QUERY_STAGES * STEP_BYTES,
                         STATS_AT = D_OUTPUT_AT + 2 * STEP_BYTES,
                         WEIGHTS_AT = STATS_AT + STATS_STAGES * STATS_BYTES,
                         D_SCORE_AT = WEIGHTS_AT + WEIGHT_STAGES * PAIRS * WEIGHTS_BYTES;
    static constexpr int D_SCORE_BYTES = KEYS * BM * 2, FACTORS_AT = D_SCORE_AT + 2 * D_SCORE_BYTES;
    static_assert(SUMS ? FACTORS_AT + D * 4 == SUMS_SHARED_BYTES(D, WARPS, MT, BM, LAG)
                       : D_SCORE_AT == KEYS_SHARED_BYTES(D, WARPS, MT, BM),
                  "");
    // Keys and values stay in registers where there are enough, which spares shared memory.
    static constexpr bool HELD = SUMS && D == 64 && BM == 64;
    // A warp's part of dQ.
    static constexpr int COLUMNS = D / SUM_COLUMNS, QUERY_ROWS = BM * COLUMNS / WARPS;
    static_assert(!SUMS || (QUERY_ROWS % SUM_ROWS == 0 && BWD_STATS_ROWS % BM == 0), "");
};

// Where this thread's part of the rows of a query head begins.
struct OwnRows {
    int head = -1;
    const char *rows = nullptr;
};

// What the two warps of a pair have in common. A step is tile `tile` of BM rows of a query head.
template <typename E, int D, int WARPS, int MT, int BM, bool EXTRAS, bool SUMS, bool LAGS>
struct KeysBlock {
    using T = KeysTile<D, WARPS, MT, BM, SUMS, LAGS>;
    using Tile = Pairs<true, MT, BM>;
    const bwd_params &p;
    const BwdSequence &seq;
    int b, kv_head, block_key, key; // `key`: the pair's first
    int first_tile, tiles, steps;
    divisor by_tiles;
    int start;              // the tile that the walk over a head begins with, before it goes round
    int first_row, end_row; // that see keys of this pair
    char *shared;
    uint32_t base, weights; // `weights`: where this lane's are

    __device__ __forceinline__ int head(int step) const {
        return kv_head * p.f.group + divide(step, by_tiles);
    }
    __device__ __forceinline__ int row(int step) const {
        int tile = step - divide(step, by_tiles) * tiles;
        if (SUMS) {
            tile += start;
            tile -= tile < tiles ? 0 : tiles;
        }
        return (first_tile + tile) * BM;
    }
    __device__ __forceinline__ bool sees(int step) const {
        return row(step) < end_row && row(step) + BM > first_row;
    }
    __device__ __forceinline__ uint32_t query(int step) const {
        return base + T::QUERY_AT + (unsigned)step % T::QUERY_STAGES * T::STEP_BYTES;
    }
    __device__ __forceinline__ uint32_t d_output(int step) const {
        return base + T::D_OUTPUT_AT + (unsigned)step % 2 * T::STEP_BYTES;
    }
    // Of this lane's columns, in three planes of BM: top, log, delta; or delta, factor, exponent.
    __device__ __forceinline__ const float *stats(int step) const {
        return (const float *)(shared + T::STATS_AT +
                               (unsigned)step % T::STATS_STAGES * T::STATS_BYTES) +
               threadIdx.x % 4 * 2;
    }
    __device__ __forceinline__ uint32_t weights_at(int step, int mt, int part) const {
        return weights + (unsigned)step % T::WEIGHT_STAGES * T::PAIRS * T::WEIGHTS_BYTES +
               (mt * (BM / 16) + part) * 512;
    }

    __device__ __forceinline__ void load_keys() const {
        const Head<E, EXTRAS> head{p, seq, b, kv_head * p.f.group};
        if constexpr (SUMS) {
            load_aligned_keys(base, p.f.key, head.key(p.f.key, block_key), p.f.dim_qk);
            load_aligned_keys(base + T::OWN_BYTES, p.f.value, head.key(p.f.value, block_key),
                              p.f.dim_v);
            return;
        }
        load_tile<E, T::THREADS, T::KEYS, D>(base, p.f.key.data, head.key(p.f.key, block_key),
                                             p.f.key, seq.k_len - block_key, p.f.dim_qk,
                                             p.f.flags & FWD_ALIGNED_KEY, false);
        load_tile<E, T::THREADS, T::KEYS, D>(
            base + T::OWN_BYTES, p.f.value.data, head.key(p.f.value, block_key), p.f.value,
            seq.k_len - block_key, p.f.dim_v, p.f.flags & FWD_ALIGNED_VALUE, false);
    }

    __device__ __forceinline__ void load_aligned_keys(uint32_t to, const fwd_view &v, int64_t from,
                                                      int dim) const {
        using Load = Loader<E, T::THREADS, T::KEYS, D>;
        const char *next = Load::start((const E *)v.data + from, v.stride[2]);
        Load::template aligned<false>(to + Load::place(), next, v.stride[2], seq.k_len - block_key,
                                      Load::columns(dim));
    }

    __device__ __forceinline__ void load_stats(int step, int h, int i) const {
        if (threadIdx.x < 3 * BM / 4) {
            const int plane = threadIdx.x / (BM / 4) + (SUMS ? 2 : 0),
                      at = threadIdx.x % (BM / 4) * 4;
            copy_async(base + T::STATS_AT + (unsigned)step % T::STATS_STAGES * T::STATS_BYTES +
                           threadIdx.x * 16,
                       stats_of(p, seq, h) + plane * stats_plane(p) + i + at, true);
        }
    }

    // With SUMS, whose tensors are aligned, each half of the warps loads one of them: so few instructions of a step are not products.
    template <bool FIRST>
    __device__ __forceinline__ void load_own(int step) const {
        OwnRows own;
        load_own<FIRST>(step, own);
    }
    template <bool FIRST>
    __device__ __forceinline__ void load_own(int step, OwnRows &own) const {
        constexpr int HALF = T::THREADS / 2, ROWS = HALF / 8;
        static_assert(ROWS % 8 == 0 && D % 64 == 0 && 3 * BM / 4 <= HALF, "");
        if (step < steps) {
            const fwd_view &v = FIRST ? p.f.query : p.d_output;
            const unsigned thread = (unsigned)anew(threadIdx.x) % HALF;
            const int h = head(step), i = row(step),
                      columns = (FIRST ? p.f.dim_qk : p.f.dim_v) - (int)(thread % 8 * 8),
                      rows = seq.q_len - i - (int)(thread / 8);
            if (!T::HELD || h != own.head) {
                const Head<E, EXTRAS> head{p, seq, b, h};
                own.head = h;
                own.rows =
                    (const char *)((const E *)v.data + head.row(v, thread / 8) + thread % 8 * 8);
            }
            const char *from = own.rows + i * v.stride[2] * 2;
            const uint32_t to =
                (FIRST ? query(step) : d_output(step)) + Chunks<D>::at(thread / 8, thread % 8);
#pragma unroll
            for (int r = 0; r < BM; r += ROWS) {
#pragma unroll
                for (int c = 0; c < D / 8; c += 8)
                    if (BM % ROWS == 0 || r + (int)thread / 8 < BM)
                        copy_async(to + r * D * 2 + c * 16, from + c * 16,
                                   c * 8 < columns && r < rows);
                from += ROWS * 2 * v.stride[2];
            }
            if (FIRST)
                load_stats(step, h, i);
        }
        copy_commit();
    }

    __device__ __forceinline__ void load(int step) const {
        if (step < steps) {
            const int h = head(step), i = row(step);
            const Head<E, EXTRAS> head{p, seq, b, h};
            load_tile<E, T::THREADS, BM, D>(query(step), p.f.query.data, head.row(p.f.query, i),
                                            p.f.query, seq.q_len - i, p.f.dim_qk,
                                            p.f.flags & FWD_ALIGNED_QUERY, false);
            load_tile<E, T::THREADS, BM, D>(
                d_output(step), p.d_output.data, head.row(p.d_output, i), p.d_output, seq.q_len - i,
                p.f.dim_v, p.flags & BWD_ALIGNED_D_OUTPUT, p.flags & BWD_D_OUTPUT_F32);
            load_stats(step, h, i);
        }
        copy_commit();
    }

    // What was copied for `step` is there, and so are the weights of the step before; nobody reads what the next copies overwrite.
    __device__ __forceinline__ void begin(int step) const {
        copy_wait<0>();
        named_barrier_sync(0, T::THREADS);
        if (!SUMS)
            load(step + 1);
    }

    // The first warp: sums of d_value.
    __device__ __forceinline__ void add_values(float (&sum)[MT][D / 8][4], uint32_t keys) const {
        const int lane = threadIdx.x % 32;
        LeftRows<D, MT, T::HELD> left{keys};
        if (T::HELD)
            left.hold();
        float score[MT][BM / 8][4];
        OwnRows own;
#pragma unroll 1
        for (int step = 0; step < steps + (SUMS ? T::LAST : 0); ++step) {
            begin(step);
            if (SUMS && step >= T::LAST)
                add_queries(step - T::LAST);
            if constexpr (SUMS)
                load_own<true>(step + 1, own);
            if ((SUMS && step >= steps) || !sees(step))
                continue;
            const Head<E, EXTRAS> h{p, seq, b, head(step)};
            const int i = row(step) + lane % 4 * 2, j = key + lane / 4;
            const float *const tops = stats(step);
            multiply_rows<E, D, MT, BM>(score, left, query(step) + right_at<D>(lane), Nothing());
            float cap[MT][BM / 8][4];
            if (EXTRAS)
                Tile::options(h, j, i, score, cap);
            if (key < seq.first_key(p.f, row(step) + BM - 1) ||
                key + MT * 16 > seq.end_key(p.f, row(step)) ||
                (EXTRAS && row(step) + BM > seq.q_len))
                Tile::hide(p, seq, j, i, score);
            uint32_t others[2][MT][4];
            float2 top, log;
            add_products<E, D, MT, BM>(
                sum, d_output(step) + transposed_at<D>(lane),
                [&](int mt, int part, int word) {
                    const int n = part * 2 + word / 2, half = word % 2;
                    if (SUMS) {
                        if (mt == 0 && half == 0)
                            log = *(const float2 *)(tops + 2 * BM + n * 8);
                        return pack<E>(h.weight(score[mt][n][2 * half], log.x),
                                       h.weight(score[mt][n][2 * half + 1], log.y));
                    }
                    if (mt == 0 && half == 0) {
                        top = *(const float2 *)(tops + n * 8);
                        log = *(const float2 *)(tops + BM + n * 8);
                        log = {log.x - WeightScale<E>::LOG, log.y - WeightScale<E>::LOG};
                    }
                    float x = h.weight(score[mt][n][2 * half], top.x, log.x),
                          y = h.weight(score[mt][n][2 * half + 1], top.y, log.y);
                    if (EXTRAS)
                        others[part % 2][mt][word] = with_options(
                            h, i + n * 8, j + mt * 16 + half * 8, &cap[mt][n][2 * half], x, y);
                    return pack<E>(x, y);
                },
                [&](int part, const uint32_t(&left)[MT][4]) {
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt)
                        if (EXTRAS)
                            store_chunk(weights_at(step, mt, part), others[part % 2][mt]);
                        else
                            store_chunk(weights_at(step, mt, part), left[mt]);
                    if (!T::LAG && part + 1 == BM / 16)
                        named_barrier_arrive(1 + threadIdx.x / 32 % T::PAIRS, 64);
                });
        }
        if (SUMS)
            return;
        copy_wait<0>();
        named_barrier_sync(0, T::THREADS);
    }

    // The weights of rows i and i + 1 as the other warp gets them: times the derivative of the cap, and negative if dropped. x and y
    // become 0 if they are.
    __device__ __forceinline__ uint32_t with_options(const Head<E, EXTRAS> &h, int i, int j,
                                                     const float *cap, float &x, float &y) const {
        const bool dropout = p.pair.dropout, drop_x = dropout && h.options().dropped(i, j),
                   drop_y = dropout && h.options().dropped(i + 1, j);
        const float a = x * cap[0], b = y * cap[1];
        x = drop_x ? 0 : x;
        y = drop_y ? 0 : y;
        return pack<E>(drop_x ? -a : a, drop_y ? -b : b);
    }

    // The second warp: sums of d_key, of each step when the next has begun.
    __device__ __forceinline__ void add_keys(float (&sum)[MT][D / 8][4], uint32_t values) const {
        const int lane = threadIdx.x % 32;
        LeftRows<D, MT, T::HELD> left{values};
        if (T::HELD)
            left.hold();
        float score[MT][BM / 8][4];
        OwnRows own;
#pragma unroll 1
        for (int step = 0; step < steps + T::LAST; ++step) {
            begin(step);
            const int done = step - T::LAG; // of which there are weights
            const auto multiply = [&] {
                if (step < steps && sees(step))
                    multiply_rows<E, D, MT, BM>(score, left, d_output(step) + right_at<D>(lane),
                                                Nothing());
            };
            if (!T::LAG) {
                if (step >= T::LAST)
                    add_queries(step - T::LAST);
                if constexpr (SUMS)
                    load_own<false>(step + 1, own);
                multiply();
            }
            const bool adds = done >= 0 && done < steps && sees(done);
            if (SUMS && done >= 0 && done < steps && !adds)
                hide_d_scores(done);
            if (adds) {
                if (!T::LAG)
                    named_barrier_sync(1 + threadIdx.x / 32 % T::PAIRS, 64);
                const float *const deltas = stats(done) + (SUMS ? 0 : 2 * BM);
                uint32_t weight[2][MT][4];
                const auto load_weights = [&](int part) {
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt)
                        load_chunk(weight[part % 2][mt], weights_at(done, mt, part));
                };
                float2 delta;
                load_weights(0);
                add_products<E, D, MT, BM>(
                    sum, query(done) + transposed_at<D>(lane),
                    [&](int mt, int part, int word) {
                        const int n = part * 2 + word / 2, half = word % 2;
                        if (mt == 0 && half == 0)
                            delta = *(const float2 *)(deltas + n * 8);
                        const float2 w = widen_pair<E>(weight[part % 2][mt][word]);
                        return pack<E>(gradient(w.x, score[mt][n][2 * half], delta.x),
                                       gradient(w.y, score[mt][n][2 * half + 1], delta.y));
                    },
                    [&](int part, const uint32_t(&left)[MT][4]) {
                        if (SUMS)
                            store_d_scores(done, part, left);
                        if (part + 1 < BM / 16)
                            load_weights(part + 1);
                    });
            }
            if (T::LAG) {
                if constexpr (SUMS)
                    load_own<false>(step + 1, own);
                if (SUMS && step >= T::LAST)
                    add_queries(step - T::LAST);
                multiply();
            }
        }
    }

    // Where dS of this lane's pairs of rows lie, those of its first key and rows.
    __device__ __forceinline__ uint32_t d_scores(int step) const {
        const int lane = threadIdx.x % 32;
        return base + T::D_SCORE_AT + (unsigned)step % 2 * T::D_SCORE_BYTES +
               Chunks<BM>::at(key - block_key + lane / 4, 0) + lane % 4 * 4;
    }
    __device__ __forceinline__ void store_d_scores(int step, int part,
                                                   const uint32_t (&words)[MT][4]) const {
        const uint32_t to = d_scores(step);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int word = 0; word < 4; ++word)
                store_word((to ^ (part * 2 + word / 2) * 16) + (mt * 16 + word % 2 * 8) * BM * 2,
                           words[mt][word]);
    }
    __device__ __forceinline__ void hide_d_scores(int step) const {
        const uint32_t nothing[MT][4] = {};
#pragma unroll
        for (int part = 0; part < BM / 16; ++part)
            store_d_scores(step, part, nothing);
    }

    // dQ = dS K of a step, the warp's part, to the sums of its rows; 32 rows at a time.
    __device__ __forceinline__ void add_queries(int step) const {
        constexpr int ROWS = T::QUERY_ROWS < 32 ? T::QUERY_ROWS : 32;
        const unsigned warp = (unsigned)anew(threadIdx.x) / 32;
#pragma unroll
        for (int first = 0; first < T::QUERY_ROWS; first += ROWS)
            add_query_rows<ROWS / 16>(step, warp / T::COLUMNS * T::QUERY_ROWS + first,
                                      warp % T::COLUMNS);
    }
    template <int MQ>
    __device__ __forceinline__ void add_query_rows(int step, int first, int column) const {
        constexpr int PARTS = SUM_COLUMNS / 16, STEPS = T::KEYS / 16;
        const int lane = (unsigned)anew(threadIdx.x) % 32;
        const uint32_t d_score = Chunks<BM>::after(base + T::D_SCORE_AT +
                                                       (unsigned)step % 2 * T::D_SCORE_BYTES +
                                                       right_at<BM>(lane),
                                                   first / 16),
                       keys = Chunks<D>::after(base + transposed_at<D>(lane), column * PARTS);
        float sum[MQ][SUM_COLUMNS / 8][4];
        constexpr int AHEAD = MQ == 1 ? 2 : 1,
                      HELD = AHEAD + 1; // steps that matrices are loaded early
        uint32_t a[HELD][MQ][4], b[HELD][PARTS][4];
        const auto load = [&](int k) {
#pragma unroll
            for (int mt = 0; mt < MQ; ++mt)
                load_matrices_transposed(a[k % HELD][mt],
                                         Chunks<BM>::after(d_score, mt) + k * 16 * BM * 2);
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                load_matrices_transposed(b[k % HELD][part],
                                         Chunks<D>::after(keys, part) + k * 16 * D * 2);
        };
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            load(k);
        clear(sum);
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            if (k + AHEAD < STEPS)
                load(k + AHEAD);
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int mt = 0; mt < MQ; ++mt) {
                    const uint32_t(&right)[4] = b[k % HELD][part];
                    Element<E>::mma(sum[mt][2 * part], a[k % HELD][mt], right[0], right[1]);
                    Element<E>::mma(sum[mt][2 * part + 1], a[k % HELD][mt], right[2], right[3]);
                }
        }
        const float *const rows = stats(step) - lane % 4 * 2 + BM + first + lane / 4,
                           *const columns = (const float *)(shared + T::FACTORS_AT) +
                                            column * SUM_COLUMNS + lane % 4 * 2;
        int32_t *const to =
            sums_at<D>(p, seq, head(step), row(step) + first) + column * (SUM_ROWS * SUM_COLUMNS);
#pragma unroll
        for (int mt = 0; mt < MQ; ++mt) {
            const float factor[2] = {rows[mt * 16], rows[mt * 16 + 8]};
#pragma unroll
            for (int n = 0; n < SUM_COLUMNS / 8; ++n) {
                const float2 of_column = *(const float2 *)(columns + n * 8);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    add_relaxed(to + mt * (SUM_ROWS * D) + (n * 4 + e) * 32 + lane,
                                __float2int_rn(sum[mt][n][e] * factor[e / 2] *
                                               (e % 2 ? of_column.y : of_column.x)));
            }
        }
    }

    __device__ __forceinline__ float gradient(float weight, float d_weight, float delta) const {
        if (!EXTRAS)
            return weight * fmaf(d_weight, WeightScale<E>::UNDO, -delta * WeightScale<E>::UNDO);
        return fabsf(weight) * WeightScale<E>::UNDO *
               ((signbit(weight) ? 0 : d_weight * p.pair.keep) - delta);
    }
};

// As of fill.h; all lanes have the same.
__device__ __forceinline__ divisor divisor_of(int d) {
    const int shift = d > 1 ? 63 - __clz(d - 1) : 31;
    return {(uint32_t)kept_by_all((int)((((uint64_t)1 << shift) + d - 1) / max(d, 1))),
            (uint32_t)kept_by_all(shift)};
}

template <typename E, int D, int WARPS, int MT, int BM, bool EXTRAS, bool SUMS = false,
          bool LAGS = true>
__device__ __forceinline__ void bwd_keys(const bwd_params &p) {
    using T = KeysTile<D, WARPS, MT, BM, SUMS, LAGS>;
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x % 32, warp = kept_by_all(threadIdx.x / 32), pair = warp % T::PAIRS;
    const int key_blocks = SUMS ? (p.f.len_k + T::KEYS - 1) / T::KEYS : p.key_blocks;
    const int b = blockIdx.x / key_blocks / p.heads_kv;
    const BwdSequence seq(p, b);
    KeysBlock<E, D, WARPS, MT, BM, EXTRAS, SUMS, LAGS> block{p, seq, b};
    block.kv_head = blockIdx.x / key_blocks % p.heads_kv;
    block.block_key = blockIdx.x % key_blocks * T::KEYS;
    const int key = block.key = block.block_key + pair * MT * 16;
    if (block.block_key >= seq.k_rows)
        return;
    block.first_tile = seq.first_row(p, block.block_key) / BM;
    const int end = (seq.end_row(p, block.block_key, block.block_key + T::KEYS) + BM - 1) / BM;
    block.tiles = max(end - block.first_tile, 0);
    block.steps = kept_by_all(block.tiles * p.f.group);
    block.by_tiles = divisor_of(block.tiles);
    // Blocks that work on one head at the same time begin at different rows, so that their sums do not meet. Behind a mask they do
    // anyway.
    const bool bounded = p.f.window_left != FWD_UNBOUNDED || p.f.window_right != FWD_UNBOUNDED;
    block.start = bounded || block.tiles <= 0 ? 0 : block.block_key / BM % block.tiles;
    block.first_row = seq.first_row(p, key);
    block.end_row = seq.end_row(p, key, key + MT * 16);
    block.shared = shared;
    block.base = shared_address(shared);
    block.weights = block.base + T::WEIGHTS_AT + pair * T::WEIGHTS_BYTES + lane * 16;

    const bool first = warp < T::PAIRS;
    float sum[MT][D / 8][4];
    bool odd = false;
    clear(sum);
    if (block.steps > 0) {
        block.load_keys();
        if (!SUMS)
            block.load(0);
        else if (first)
            block.template load_own<true>(0);
        else
            block.template load_own<false>(0);
        if constexpr (SUMS) {
            odd = is_odd<E>(p, facts_of(p, b, block.kv_head));
            load_column_factors<D, T::THREADS>(p, b, block.kv_head,
                                               (float *)(shared + T::FACTORS_AT));
        }
        if (T::HELD || odd) {
            copy_wait<0>();
            named_barrier_sync(0, T::THREADS);
        }
    }
    if (block.steps > 0 && !odd) {
        const uint32_t own =
            block.base + (first ? 0 : T::OWN_BYTES) + pair * MT * 16 * D * 2 + left_at<D>(lane);
        if (first)
            block.add_values(sum, own);
        else
            block.add_keys(sum, own);
        if (SUMS) // the keys' place is about to be reused
            named_barrier_sync(0, T::THREADS);
    }
    const fwd_view &to = first ? p.d_value : p.d_key;
    if (!to.data)
        return;
    const int64_t at =
        b * to.stride[0] + block.kv_head * to.stride[1] + (seq.k_start + key) * to.stride[2];
    store_gradient<E, D, MT>(
        sum, first ? p.pair.keep * WeightScale<E>::UNDO : (float)p.f.scale, to, at,
        seq.k_rows - key, seq.k_len - key, first ? p.f.dim_v : p.f.dim_qk,
        p.flags & (first ? BWD_D_VALUE_F32 : BWD_D_KEY_F32),
        p.flags & (first ? BWD_ALIGNED_D_VALUE : BWD_ALIGNED_D_KEY),
        (float *)(shared + (first ? 0 : T::OWN_BYTES) + pair * MT * 16 * D * 2));
    if (odd || __any_sync(~0u, !is_finite(sum)))
        write_keys_exactly<E, EXTRAS>(p, b, block.kv_head, key, key + MT * 16, first);
}

// ---- Gradients of logits, row by row ------------------------------------------------------------------------------------

template <int MT>
struct RowStats {
    float top[MT][2], log[MT][2], delta[MT][2];

    // Of this thread's rows, the first of which is `row`.
    __device__ __forceinline__ void load(const bwd_params &p, const BwdSequence &seq, int h,
                                         int row) {
        const float *const stats = stats_of(p, seq, h);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = row + mt * 16 + half * 8;
                const bool exists = i < seq.q_len;
                top[mt][half] = exists ? stats[i] : 0;
                log[mt][half] = exists ? stats[stats_plane(p) + i] : POS_INF;
                delta[mt][half] = exists ? stats[2 * stats_plane(p) + i] : 0;
            }
    }
};

// From products of queries and keys, and of d_output and values, the gradients of logits in `d`; with options `score` becomes the
// derivative of the cap. `row` and `key`: this thread's first.
template <typename E, int MT, int N, bool EXTRAS>
__device__ __forceinline__ void
logit_gradients(const Head<E, EXTRAS> &head, const RowStats<MT> &stats, int row, int key,
                bool masked, float (&score)[MT][N / 8][4], float (&d)[MT][N / 8][4]) {
    using Tile = Pairs<false, MT, N>;
    float cap[MT][N / 8][4];
    if (EXTRAS)
        Tile::options(head, row, key, score, cap);
    if (masked)
        Tile::hide(head.p, head.seq, row, key, score);
    if (EXTRAS && head.p.pair.dropout) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < N / 8; ++n) {
                    const int j = key + n * 8;
                    uint32_t x[4];
                    head.options().random(row + mt * 16 + half * 8, j, x);
                    float(&y)[4] = d[mt][n];
                    y[2 * half] = (j & 2 ? x[2] : x[0]) <= head.p.pair.dropped_upto
                                      ? 0
                                      : y[2 * half] * head.p.pair.keep;
                    y[2 * half + 1] = (j & 2 ? x[3] : x[1]) <= head.p.pair.dropped_upto
                                          ? 0
                                          : y[2 * half + 1] * head.p.pair.keep;
                }
    }
    Tile::each(row, key, [&](int mt, int n, int e, int, int) {
        const float weight =
            head.weight(score[mt][n][e], stats.top[mt][e / 2], stats.log[mt][e / 2]);
        float &x = d[mt][n][e];
        x = weight * (x - stats.delta[mt][e / 2]);
        if (EXTRAS) {
            x = weight == 0
                    ? 0
                    : x; // what is hidden may be NaN, and slopes and biases have no other guard
            score[mt][n][e] = cap[mt][n][e];
        }
    });
}

template <int D, int WARPS, int MT, int BN>
struct RowsTile {
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS * MT * 16;
    static constexpr int OWN_BYTES = ROWS * D * 2, STEP_BYTES = BN * D * 2;
    static_assert(2 * OWN_BYTES + 4 * STEP_BYTES == ROWS_SHARED_BYTES(D, WARPS, MT, BN), "");
};

template <typename E, int D, int WARPS, int MT, int BN, bool EXTRAS>
__device__ __forceinline__ void bwd_rows(const bwd_params &p) {
    using T = RowsTile<D, WARPS, MT, BN>;
    using Tile = Pairs<false, MT, BN>;
    extern __shared__ __align__(16) char shared[];
    const uint32_t base = shared_address(shared), ring = base + 2 * T::OWN_BYTES;
    const int lane = threadIdx.x % 32, warp = kept_by_all(threadIdx.x / 32);
    const Work work(p.f);
    const BwdSequence seq(p, work.b);
    const Head<E, EXTRAS> head{p, seq, work.b, work.h};
    const int block_row = work.row_block * T::ROWS, row = block_row + warp * MT * 16;
    const bool slopes = EXTRAS && p.d_alibi_slopes.data;
    float *const slope_to = (float *)p.slope_sums +
                            ((int64_t)work.b * p.f.heads_q + work.h) * p.f.row_blocks +
                            work.row_block;
    if (block_row >= seq.q_rows) {
        if (slopes && threadIdx.x == 0)
            *slope_to = 0;
        return;
    }
    const int last = min(block_row + T::ROWS, seq.q_len) - 1,
              warp_last = min(row + MT * 16, seq.q_len) - 1;
    const int first = seq.first_key(p.f, block_row) / BN * BN;
    const int end = kept_by_all(last < block_row ? 0 : seq.end_key(p.f, last));
    const int warp_first = kept_by_all(seq.first_key(p.f, row)),
              warp_end = kept_by_all(warp_last < row ? 0 : seq.end_key(p.f, warp_last));
    // Keys [clean_first, clean_end) are seen by all rows of the warp. With options, rows that do not exist hide them, too: their
    // bias may be NaN.
    const int clean_first = kept_by_all(seq.first_key(p.f, row + MT * 16 - 1)),
              clean_end =
                  kept_by_all(EXTRAS && row + MT * 16 > seq.q_len ? 0 : seq.end_key(p.f, row));

    const auto load = [&](int key, uint32_t to) {
        if (key >= end)
            return;
        load_tile<E, T::THREADS, BN, D>(to, p.f.key.data, head.key(p.f.key, key), p.f.key,
                                        seq.k_len - key, p.f.dim_qk, p.f.flags & FWD_ALIGNED_KEY,
                                        false);
        load_tile<E, T::THREADS, BN, D>(to + T::STEP_BYTES, p.f.value.data,
                                        head.key(p.f.value, key), p.f.value, seq.k_len - key,
                                        p.f.dim_v, p.f.flags & FWD_ALIGNED_VALUE, false);
    };
    load_tile<E, T::THREADS, T::ROWS, D>(base, p.f.query.data, head.row(p.f.query, block_row),
                                         p.f.query, seq.q_len - block_row, p.f.dim_qk,
                                         p.f.flags & FWD_ALIGNED_QUERY, false);
    load_tile<E, T::THREADS, T::ROWS, D>(
        base + T::OWN_BYTES, p.d_output.data, head.row(p.d_output, block_row), p.d_output,
        seq.q_len - block_row, p.f.dim_v, p.flags & BWD_ALIGNED_D_OUTPUT,
        p.flags & BWD_D_OUTPUT_F32);
    load(first, ring);
    copy_commit();

    RowStats<MT> stats;
    stats.load(p, seq, work.h, row + lane / 4);
    float sum[MT][D / 8][4], slope_sum = 0;
    clear(sum);
    const uint32_t query = base + warp * MT * 16 * D * 2 + left_at<D>(lane),
                   d_output = query + T::OWN_BYTES;
    uint32_t stage = 0;
#pragma unroll 1
    for (int key = first; key < end; key += BN) {
        copy_wait<0>();
        __syncthreads();
        const uint32_t keys = ring + stage, values = keys + T::STEP_BYTES;
        stage = 2 * T::STEP_BYTES - stage;
        load(key + BN, ring + stage);
        copy_commit();
        if (key >= warp_end || key + BN <= warp_first)
            continue;
        float score[MT][BN / 8][4], d[MT][BN / 8][4];
        const bool masked = key < clean_first || key + BN > clean_end;
        multiply_rows<E, D, MT, BN>(score, query, keys + right_at<D>(lane), Nothing());
        if (!EXTRAS) {
            if (masked)
                Tile::hide(p, seq, row + lane / 4, key + lane % 4 * 2, score);
            // Scores become weights.
            multiply_rows<E, D, MT, BN>(d, d_output, values + right_at<D>(lane), [&](auto item) {
                share<MT * BN / 2, ITEMS_OF<D, BN>, decltype(item)::value>([&](auto k) {
                    constexpr int mt = decltype(k)::value / (BN / 2),
                                  n = decltype(k)::value / 4 % (BN / 8), e = decltype(k)::value % 4;
                    score[mt][n][e] =
                        head.weight(score[mt][n][e], stats.top[mt][e / 2], stats.log[mt][e / 2]);
                });
            });
        } else {
            multiply_rows<E, D, MT, BN>(d, d_output, values + right_at<D>(lane), Nothing());
            logit_gradients<E, MT, BN, EXTRAS>(head, stats, row + lane / 4, key + lane % 4 * 2,
                                               masked, score, d);
        }
        if (slopes)
            Tile::each(row + lane / 4, key + lane % 4 * 2, [&](int mt, int n, int e, int i, int j) {
                slope_sum = fmaf(-d[mt][n][e], head.distance(i, j), slope_sum);
            });
        add_products<E, D, MT, BN>(
            sum, keys + transposed_at<D>(lane),
            [&](int mt, int part, int word) {
                const int n = part * 2 + word / 2, half = word % 2;
                const float delta = EXTRAS ? 0 : stats.delta[mt][half];
                return pack<E>(score[mt][n][2 * half] * (d[mt][n][2 * half] - delta),
                               score[mt][n][2 * half + 1] * (d[mt][n][2 * half + 1] - delta));
            },
            [](int, const uint32_t(&)[MT][4]) {});
    }
    copy_wait<0>();
    if (first >= end)
        __syncthreads(); // no step has waited for the queries; their tile is about to be reused
    if (slopes) {
        const float total = block_sum<T::THREADS>(slope_sum, (float *)shared);
        if (threadIdx.x == 0)
            *slope_to = total;
    }
    if (!p.d_query.data)
        return;
    store_gradient<E, D, MT>(sum, (float)p.f.scale, p.d_query, head.row(p.d_query, row),
                             seq.q_rows - row, seq.q_len - row, p.f.dim_qk,
                             p.flags & BWD_D_QUERY_F32, p.flags & BWD_ALIGNED_D_QUERY,
                             (float *)(shared + warp * MT * 16 * D * 2));
    if (__any_sync(~0u, !is_finite(sum)))
        write_query_exactly<E, EXTRAS>(p, work.b, work.h, row, row + MT * 16);
}

// ---- d_query from its sums ----------------------------------------------------------------------------------------------

// 64 rows of a head.
template <typename E, int D>
__device__ __forceinline__ void bwd_finish(const bwd_params &p) {
    extern __shared__ __align__(16) char shared[];
    const int blocks = (p.f.len_q + BWD_STATS_ROWS - 1) / BWD_STATS_ROWS;
    const int h = blockIdx.x / blocks % p.f.heads_q, b = blockIdx.x / blocks / p.f.heads_q,
              lane = threadIdx.x % 32, warp = threadIdx.x / 32,
              row = blockIdx.x % blocks * BWD_STATS_ROWS + warp * SUM_ROWS;
    const BwdSequence seq(p, b);
    const uint32_t *const facts = facts_of(p, b, h / p.f.group);
    if (row >= seq.q_rows)
        return;
    const Head<E, false> head{p, seq, b, h};
    const float *const factors = stats_of(p, seq, h) + 3 * stats_plane(p) + row + lane / 4;
    const float of_row[2] = {inverse(factors[0]), inverse(factors[8])};
    const int32_t *const sums = sums_at<D>(p, seq, h, row) + lane;
    constexpr int WORDS = SUM_ROWS * SUM_COLUMNS / 32;
    constexpr int AT_ONCE = 2; // tiles whose sums are asked for together
#pragma unroll 1
    for (int c = 0; c < D / SUM_COLUMNS; c += AT_ONCE) {
        int32_t found[AT_ONCE][WORDS];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
            for (int w = 0; w < WORDS; ++w)
                found[n][w] = __ldcs(sums + ((c + n) * WORDS + w) * 32);
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int column = (c + n) * SUM_COLUMNS;
            float sum[1][SUM_COLUMNS / 8][4];
#pragma unroll
            for (int w = 0; w < WORDS; ++w)
                sum[0][w / 4][w % 4] =
                    (float)found[n][w] * of_row[w % 4 / 2] *
                    inverse(column_factor(p, facts, column + w / 4 * 8 + lane % 4 * 2 + w % 2));
            store_gradient<E, SUM_COLUMNS, 1>(
                sum, (float)p.f.scale, p.d_query,
                head.row(p.d_query, row) + column * p.d_query.stride[3], seq.q_rows - row,
                seq.q_len - row, p.f.dim_qk - column, p.flags & BWD_D_QUERY_F32,
                p.flags & BWD_ALIGNED_D_QUERY, (float *)shared + warp * 8 * SUM_COLUMNS);
        }
    }
    if (is_odd<E>(p, facts))
        write_query_exactly<E, false>(p, b, h, row, row + SUM_ROWS);
}

// ---- Gradients of a bias ------------------------------------------------------------------------------------------------

template <int D>
struct BiasTile {
    static constexpr int THREADS = BIAS_THREADS, WARPS = THREADS / 32, ROWS = BIAS_ROWS,
                         KEYS = BIAS_KEYS;
    static_assert(ROWS == WARPS * 16, "");
};

// A block owns rows and keys of the bias, all of either where it has but one. Element by element it adds up what the heads,
// sequences, rows and keys that they stand for say, one after the other.
template <typename E, int D>
__device__ __forceinline__ void bwd_bias(const bwd_params &p) {
    using T = BiasTile<D>;
    using Tile = Pairs<false, 1, T::KEYS>;
    extern __shared__ __align__(16) char shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const fwd_view &to = p.d_bias;
    const BiasPart part(p, T::ROWS, T::KEYS);
    float sum[1][T::KEYS / 8][4];
    clear(sum);
    for (int b = part.batch.first; b < part.batch.end; ++b) {
        const BwdSequence seq(p, b);
        for (int h = part.heads.first; h < part.heads.end; ++h) {
            const Head<E, true> head{p, seq, b, h};
            for (int tile = part.rows.first; tile < part.rows.end; ++tile) {
                const int block_row = tile * T::ROWS, row = block_row + warp * 16 + lane / 4;
                const int last = min(block_row + T::ROWS, seq.q_len) - 1;
                const int first_key = max(part.keys.first * T::KEYS,
                                          seq.first_key(p.f, block_row) / T::KEYS * T::KEYS),
                          end_key = last < block_row
                                        ? 0
                                        : min(part.keys.end * T::KEYS, seq.end_key(p.f, last));
                if (first_key >= end_key)
                    continue;
                RowStats<1> stats;
                stats.load(p, seq, h, row);
                const uint32_t d_output = base + T::ROWS * D * 2, keys = d_output + T::ROWS * D * 2,
                               values = keys + T::KEYS * D * 2;
                load_tile<E, T::THREADS, T::ROWS, D>(
                    base, p.f.query.data, head.row(p.f.query, block_row), p.f.query,
                    seq.q_len - block_row, p.f.dim_qk, p.f.flags & FWD_ALIGNED_QUERY, false);
                load_tile<E, T::THREADS, T::ROWS, D>(
                    d_output, p.d_output.data, head.row(p.d_output, block_row), p.d_output,
                    seq.q_len - block_row, p.f.dim_v, p.flags & BWD_ALIGNED_D_OUTPUT,
                    p.flags & BWD_D_OUTPUT_F32);
                for (int key = first_key; key < end_key; key += T::KEYS) {
                    load_tile<E, T::THREADS, T::KEYS, D>(keys, p.f.key.data, head.key(p.f.key, key),
                                                         p.f.key, seq.k_len - key, p.f.dim_qk,
                                                         p.f.flags & FWD_ALIGNED_KEY, false);
                    load_tile<E, T::THREADS, T::KEYS, D>(
                        values, p.f.value.data, head.key(p.f.value, key), p.f.value,
                        seq.k_len - key, p.f.dim_v, p.f.flags & FWD_ALIGNED_VALUE, false);
                    copy_commit();
                    copy_wait<0>();
                    __syncthreads();
                    float score[1][T::KEYS / 8][4], d[1][T::KEYS / 8][4];
                    const uint32_t left = warp * 16 * D * 2 + left_at<D>(lane);
                    multiply_rows<E, D, 1, T::KEYS>(score, base + left, keys + right_at<D>(lane),
                                                    Nothing());
                    multiply_rows<E, D, 1, T::KEYS>(d, d_output + left, values + right_at<D>(lane),
                                                    Nothing());
                    logit_gradients<E, 1, T::KEYS, true>(head, stats, row, key + lane % 4 * 2, true,
                                                         score, d);
                    Tile::each(0, 0, [&](int mt, int n, int e, int, int) {
                        sum[mt][n][e] += d[mt][n][e];
                    });
                    __syncthreads();
                }
            }
        }
    }
    // Sums over keys stay in the first column of a row of the tile, those over rows in its first row.
    float *const column_sums = (float *)shared; // [WARPS][KEYS]
    if (!to.stride[3]) {
        float by_row[2] = {0, 0};
        Tile::each(0, 0, [&](int mt, int n, int e, int, int) { by_row[e / 2] += sum[mt][n][e]; });
        clear(sum);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            by_row[half] += __shfl_xor_sync(~0u, by_row[half], 1);
            by_row[half] += __shfl_xor_sync(~0u, by_row[half], 2);
            sum[0][0][2 * half] = by_row[half];
        }
    }
    if (!to.stride[2]) {
#pragma unroll
        for (int n = 0; n < T::KEYS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float x = sum[0][n][e] + sum[0][n][e + 2];
                for (int step = 4; step < 32; step *= 2)
                    x += __shfl_xor_sync(~0u, x, step);
                if (lane < 4)
                    column_sums[warp * T::KEYS + n * 8 + lane * 2 + e] = x;
            }
        __syncthreads();
        Tile::each(0, lane % 4 * 2, [&](int mt, int n, int e, int, int j) {
            float x = 0;
            for (int w = 0; w < T::WARPS; ++w)
                x += column_sums[w * T::KEYS + j];
            sum[mt][n][e] = x;
        });
    }
    const int rows = to.stride[2] ? p.f.len_q : 1, columns = to.stride[3] ? p.f.len_k : 1;
    const int first_row = to.stride[2] ? part.rows.first * T::ROWS : 0,
              first_column = to.stride[3] ? part.keys.first * T::KEYS : 0;
    Tile::each(first_row + warp * 16 + lane / 4, first_column + lane % 4 * 2,
               [&](int mt, int n, int e, int i, int j) {
                   if (i < rows && j < columns)
                       store_number<E>(to.data,
                                       part.batch.first * to.stride[0] +
                                           part.heads.first * to.stride[1] + i * to.stride[2] +
                                           j * to.stride[3],
                                       p.flags & BWD_D_BIAS_F32, sum[mt][n][e]);
               });
}
