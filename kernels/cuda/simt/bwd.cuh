// Gradients of attention in f32 on the CUDA cores: products and sums in the element type. See docs/cuda-backward.md.
//
// As in cuda_bwd_sm80 no block adds to what another block adds to, so the bits of a gradient are those of its one block:
//   stats   of each row delta, and what its weights are relative to
//   keys    a block owns keys of one kv head, and walks over the rows of all query heads of the group: d_key and d_value
//   rows    a block owns query rows, and walks over the keys: d_query, and of each block a sum for d_alibi_slopes
//   bias    a block owns a part of d_bias, and walks over all that it is broadcast to
// and two that only add up, slopes and sinks.
#pragma once

#include "kernels/cuda/common/bwd_head.cuh"
#include "kernels/cuda/simt/bwd_sizes.h"
#include "kernels/cuda/simt/tile.cuh"

// A query head. A score is the bare product q k, or with BWD_LOGITS the logit; a weight is `exponential` of (score - top) * slope, over
// the sum of them, whose logarithm is kept.
template <typename T>
using SimtHead = BwdHead<T>;

template <typename T>
struct RowStat {
    T top, inverse, delta;

    __device__ __forceinline__ RowStat(const bwd_params &p, const BwdSequence &seq, int h, int i)
        : top(0), inverse(0), delta(0) {
        if (i < seq.q_len) {
            const T *const stats = stats_of<T>(p, seq, h) + i;
            top = stats[0];
            inverse = exponential(-stats[stats_plane(p)]);
            delta = stats[2 * stats_plane(p)];
        }
    }
};

// A thread's R x C pairs of a row and a key. OWN_KEYS: its R are keys, and its C rows, 16 apart; else the other way round. The options
// go over all pairs one after the other, so that a call without them runs through little code.
template <typename T, int R, int C, bool OWN_KEYS>
struct SimtPairs {
    const SimtHead<T> &head;
    int own, step; // the first of either

    __device__ __forceinline__ int row(int i, int c) const {
        return OWN_KEYS ? step + 16 * c : own + i;
    }
    __device__ __forceinline__ int key(int i, int c) const {
        return OWN_KEYS ? own + i : step + 16 * c;
    }

    template <typename Body>
    __device__ __forceinline__ void each(Body body) const {
#pragma unroll
        for (int n = 0; n < R * C; ++n) // neighbours are of one query row
            if (OWN_KEYS)
                body(n % R, n / R);
            else
                body(n / C, n % C);
    }

    // -inf where the row, or the key, does not exist or the window hides one from the other.
    __device__ __forceinline__ void hide(T (&score)[R][C]) const {
        each([&](int i, int c) {
            if (row(i, c) >= head.seq.q_len || !head.in_window(row(i, c), key(i, c)))
                score[i][c] = -CUDART_INF;
        });
    }

    // Products to scores, and the derivatives of what is capped.
    __device__ __forceinline__ void options(T (&score)[R][C], T (&derivative)[R][C]) const {
        const bwd_params &p = head.p;
        const T scale = (T)p.f.scale, cap = (T)p.f.softcap;
        each([&](int i, int c) { score[i][c] *= scale; });
        if (cap > 0)
            each([&](int i, int c) {
                const T e = exponential(-2 * PER_LOGIT<T> * fabs(score[i][c]) / cap),
                        r = 1 / (1 + e);
                derivative[i][c] = 4 * e * r * r;
                score[i][c] = cap * tanh(score[i][c] / cap);
            });
        // Rows and keys that do not exist have neither bias nor mask; they are hidden already.
        const auto seen = [&](int i, int c) { return score[i][c] != -CUDART_INF; };
        hide(score);
        if (p.f.bias.data)
            each([&](int i, int c) {
                if (seen(i, c))
                    score[i][c] += head.bias(row(i, c), key(i, c));
            });
        if (p.f.alibi_slopes.data) {
            const T slope = head.alibi_slope();
            each([&](int i, int c) { score[i][c] -= slope * head.distance(row(i, c), key(i, c)); });
        }
        if (p.pair.query_segments.data)
            each([&](int i, int c) {
                if (seen(i, c) && !head.options().same_segment(row(i, c), key(i, c)))
                    score[i][c] = -CUDART_INF;
            });
        if (p.f.mask.data || p.pair.block_mask.data)
            each([&](int i, int c) {
                if (seen(i, c) && !head.options().unmasked(row(i, c), key(i, c)))
                    score[i][c] = -CUDART_INF;
            });
    }

    // Scores from products; what is hidden has -inf.
    __device__ __forceinline__ void scores(T (&score)[R][C], T (&derivative)[R][C]) const {
        each([&](int i, int c) { derivative[i][c] = 1; });
        if (head.p.flags & BWD_LOGITS)
            options(score, derivative);
        else
            hide(score);
    }
};

template <typename T, int D, int R, int C>
struct SimtBwd : SimtTile<T, D, R, C> {
    using Tile = SimtTile<T, D, R, C>;
    static constexpr int OWN = Tile::OWN, STEP = Tile::STEP, VEC = Tile::VEC, W = Tile::W,
                         PITCH = Tile::PITCH;
    static_assert(BWD_SHARED_BYTES(T, D, R, C) ==
                      (2 * (OWN + STEP) * PITCH + OWN * Tile::WEIGHTS_PITCH) * sizeof(T),
                  "");

    // This thread's first row of the block's, and first row of a step.
    __device__ __forceinline__ static int y() { return threadIdx.x / 16 * R; }
    __device__ __forceinline__ static int x() { return threadIdx.x % 16; }

    // Rows of a tensor from element `at` on.
    __device__ static void load(T *to, const fwd_view &v, int64_t at, int tile_rows, int count,
                                int dim, bool chunks) {
        const int64_t row = v.stride[2], inner = v.stride[3];
        Tile::load(
            to, [&](int r) { return (const T *)v.data + at + r * row; }, inner, tile_rows, count,
            dim, chunks);
    }

    using Head = SimtHead<T>;
    __device__ static void load_queries(T *to, const Head &head, int row, int rows) {
        const fwd_params &f = head.p.f;
        load(to, f.query, head.row(f.query, row), rows, head.seq.q_len - row, f.dim_qk,
             f.flags & FWD_ALIGNED_QUERY);
    }
    __device__ static void load_d_output(T *to, const Head &head, int row, int rows) {
        const bwd_params &p = head.p;
        load(to, p.d_output, head.row(p.d_output, row), rows, head.seq.q_len - row, p.f.dim_v,
             p.flags & BWD_ALIGNED_D_OUTPUT);
    }
    __device__ static void load_keys(T *to, const Head &head, int key, int keys) {
        const fwd_params &f = head.p.f;
        load(to, f.key, head.key(f.key, key), keys, head.seq.k_len - key, f.dim_qk,
             f.flags & FWD_ALIGNED_KEY);
    }
    __device__ static void load_values(T *to, const Head &head, int key, int keys) {
        const fwd_params &f = head.p.f;
        load(to, f.value, head.key(f.value, key), keys, head.seq.k_len - key, f.dim_v,
             f.flags & FWD_ALIGNED_VALUE);
    }
    __device__ __forceinline__ static void loaded() {
        copy_wait<0>();
        __syncthreads();
    }

    // From the products of query and key, and of d_output and value. OWN_KEYS: the weights of values, and the gradients of products.
    // Else the derivatives of logits, and the gradients of logits. What is hidden has -0, see is_masked(). True if something is.
    template <bool OWN_KEYS>
    __device__ __forceinline__ static bool gradients(const SimtPairs<T, R, C, OWN_KEYS> &pairs,
                                                     T (&score)[R][C], T (&d)[R][C]) {
        const Head &head = pairs.head;
        const bwd_params &p = head.p;
        const T slope = exponent_per_score<T>(p), keep = T(1 / (1 - p.pair.dropout_probability));
        T derivative[R][C];
        pairs.scores(score, derivative);
        uint32_t dropped = 0; // a bit for each pair
        if (p.pair.dropout)
            pairs.each([&](int i, int c) {
                if (head.options().dropped(pairs.row(i, c), pairs.key(i, c)))
                    dropped |= 1u << (i * C + c);
            });
        bool hidden = dropped != 0;
        pairs.each([&](int i, int c) {
            const RowStat<T> stat(p, head.seq, head.h, pairs.row(i, c));
            const bool seen = score[i][c] != -CUDART_INF, kept = !(dropped >> (i * C + c) & 1);
            const T weight = exponential((score[i][c] - stat.top) * slope) * stat.inverse;
            const T gradient = weight * ((kept ? d[i][c] * keep : 0) - stat.delta);
            d[i][c] = seen ? (OWN_KEYS ? gradient * derivative[i][c] : gradient) + 0 : -T(0);
            score[i][c] = !OWN_KEYS      ? (seen ? derivative[i][c] : T(1))
                          : seen && kept ? weight * keep + 0
                                         : -T(0);
            hidden |= !seen;
        });
        return hidden;
    }

    // sum += the weights of this half warp times the rows of a step, by way of its memory for them.
    __device__ __forceinline__ static void add(T (&sum)[R][W][VEC], const T (&weight)[R][C],
                                               T *memory, const T *step, bool hidden) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int c = 0; c < C; ++c)
                memory[i * Tile::WEIGHTS_PITCH + x() + 16 * c] = weight[i][c];
        __syncwarp();
        if (__any_sync(~0u, hidden))
            Tile::template add<true>(sum, memory, step);
        else
            Tile::template add<false>(sum, memory, step);
    }

    __device__ __forceinline__ static void clear(T (&sum)[R][W][VEC]) {
#pragma unroll
        for (int n = 0; n < R * W * VEC; ++n)
            sum[n / VEC / W][n / VEC % W][n % VEC] = 0;
    }

    // This thread's part of `rows` rows of a gradient from element `to` on; those from `len` on are 0.
    __device__ static void store(const T (&sum)[R][W][VEC], T factor, const fwd_view &v, int64_t to,
                                 int rows, int len, int dim, bool f32, bool chunks) {
#pragma unroll
        for (int i = 0; i < R; ++i) {
            if (y() + i >= rows)
                continue;
            const int64_t row = to + (y() + i) * v.stride[2];
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const int column = (x() + 16 * w) * VEC;
                Vec<T> out;
#pragma unroll
                for (int e = 0; e < VEC; ++e)
                    out.e[e] = y() + i < len ? sum[i][w][e] * factor : T(0);
                if (chunks && f32 == (sizeof(T) == 4) && column + VEC <= dim)
                    *(Vec<T> *)((T *)v.data + row + column) = out;
                else
#pragma unroll
                    for (int e = 0; e < VEC; ++e)
                        if (column + e < dim)
                            store_number<T>(v.data, row + (column + e) * v.stride[3], f32,
                                            out.e[e]);
            }
        }
    }

    // This thread's sums of a part of d_bias: those over keys go to its first column, those over rows to its first row.
    __device__ static void store_bias(T (&sum)[R][C], const bwd_params &p, const BiasPart &part,
                                      T *shared);
};

template <typename T, int D, int R, int C>
__device__ __forceinline__ void SimtBwd<T, D, R, C>::store_bias(T (&sum)[R][C], const bwd_params &p,
                                                                const BiasPart &part, T *shared) {
    const fwd_view &to = p.d_bias;
    if (!to.stride[3])
#pragma unroll
        for (int i = 0; i < R; ++i) {
#pragma unroll
            for (int c = 1; c < C; ++c)
                sum[i][0] += sum[i][c];
            for (int lane = 1; lane < 16; lane *= 2)
                sum[i][0] += __shfl_xor_sync(~0u, sum[i][0], lane);
        }
    if (!to.stride[2]) {
        T *const column = shared + x();
#pragma unroll
        for (int c = 0; c < C; ++c) {
            T total = sum[0][c];
#pragma unroll
            for (int i = 1; i < R; ++i)
                total += sum[i][c];
            column[y() / R * STEP + 16 * c] = total;
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < C; ++c) {
            sum[0][c] = 0;
            for (int half_warp = 0; half_warp < OWN / R; ++half_warp)
                sum[0][c] += column[half_warp * STEP + 16 * c];
        }
    }
    const int rows = to.stride[2] ? p.f.len_q : 1, columns = to.stride[3] ? p.f.len_k : 1;
    const int row = to.stride[2] ? part.rows.first * OWN + y() : y(),
              column = to.stride[3] ? part.keys.first * STEP + x() : x();
#pragma unroll
    for (int n = 0; n < R * C; ++n) {
        const int i = row + n / C, j = column + n % C * 16;
        if (i < rows && j < columns)
            store_number<T>(to.data,
                            part.batch.first * to.stride[0] + part.heads.first * to.stride[1] +
                                i * to.stride[2] + j * to.stride[3],
                            p.flags & BWD_D_BIAS_F32, sum[n / C][n % C]);
    }
}

// ---- Statistics of rows -------------------------------------------------------------------------------------------------

// The largest score of each row, and the sum of the weights relative to it.
template <typename T, int D, int R, int C>
__device__ __forceinline__ void sweep(const SimtHead<T> &head, int block_row, T *shared,
                                      T (&top)[R], T (&total)[R]) {
    using S = SimtBwd<T, D, R, C>;
    const bwd_params &p = head.p;
    const T slope = exponent_per_score<T>(p);
    T *const keys = shared + S::OWN * S::PITCH;
    const int last = min(block_row + S::OWN, head.seq.q_len) - 1,
              first = head.seq.first_key(p.f, block_row) / S::STEP * S::STEP,
              end = last < block_row ? 0 : head.seq.end_key(p.f, last);
    S::load_queries(shared, head, block_row, S::OWN);
    for (int key = first; key < end; key += S::STEP) {
        S::load_keys(keys, head, key, S::STEP);
        S::loaded();
        T s[R][C], derivative[R][C];
        S::multiply(s, shared + S::y() * S::PITCH, keys);
        SimtPairs<T, R, C, false>{head, block_row + S::y(), key + S::x()}.scores(s, derivative);
#pragma unroll
        for (int i = 0; i < R; ++i) {
            T highest = top[i];
#pragma unroll
            for (int c = 0; c < C; ++c)
                highest = fmax(highest, s[i][c]);
            const T base = highest == -CUDART_INF ? T(0) : highest;
            total[i] *= exponential((top[i] - base) * slope);
#pragma unroll
            for (int c = 0; c < C; ++c)
                total[i] += exponential((s[i][c] - base) * slope);
            top[i] = highest;
        }
        __syncthreads();
    }
    copy_wait<0>();
}

// Output times its gradient, of columns x, x + LANES, ... of a row. An output of 0 counts as 0: it is that of a row that sees
// nothing, whatever stands in the gradient.
template <int LANES, typename T>
__device__ __forceinline__ T part_of_delta(const SimtHead<T> &head, int i, int x) {
    const bwd_params &p = head.p;
    const int64_t o = head.row(p.f.output, i), d_o = head.row(p.d_output, i);
    T sum = 0;
    for (int d = x; d < p.f.dim_v; d += LANES) {
        const T out = ((const T *)p.f.output.data)[o + d * p.f.output.stride[3]];
        if (out != 0)
            sum = fma(out,
                      load_number<T>(p.d_output.data, d_o + d * p.d_output.stride[3],
                                     p.flags & BWD_D_OUTPUT_F32),
                      sum);
    }
    return sum;
}

// The statistics of a block's rows.
template <typename T, int D, int R, int C>
__device__ __forceinline__ void find_stats(const SimtHead<T> &head, int block_row, T *shared) {
    using S = SimtBwd<T, D, R, C>;
    const bwd_params &p = head.p;
    const BwdSequence &seq = head.seq;
    T top[R], total[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
        top[i] = -CUDART_INF;
        total[i] = 0;
    }
    sweep<T, D, R, C>(head, block_row, shared, top, total);
    const T slope = exponent_per_score<T>(p),
            sink = p.f.sinks.data ? (T)((const float *)p.f.sinks.data)[head.h * p.f.sinks.stride[1]]
                                  : -CUDART_INF;
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const int row = block_row + S::y() + i;
        T highest = top[i], delta = row < seq.q_len ? part_of_delta<16>(head, row, S::x()) : 0;
#pragma unroll
        for (int lane = 1; lane < 16; lane *= 2) {
            highest = fmax(highest, __shfl_xor_sync(~0u, highest, lane));
            delta += __shfl_xor_sync(~0u, delta, lane);
        }
        highest = highest == -CUDART_INF ? T(0) : highest;
        T sum = top[i] == -CUDART_INF && total[i] == 0
                    ? T(0)
                    : total[i] * exponential((top[i] - highest) * slope);
#pragma unroll
        for (int lane = 1; lane < 16; lane *= 2)
            sum += __shfl_xor_sync(~0u, sum, lane);
        T log = logarithm(sum); // -inf: no key is seen
        if (sink > -CUDART_INF) {
            const T by_sink = sink * PER_LOGIT<T> - highest * slope, higher = fmax(log, by_sink);
            log = higher + logarithm(exponential(log - higher) + exponential(by_sink - higher));
        }
        const bool empty = log == -CUDART_INF;
        if (S::x() == 0 && row < seq.q_len) {
            T *const stats = (T *)stats_of<T>(p, seq, head.h) + row;
            if (p.d_lse.data)
                delta -=
                    load_number<T>(p.d_lse.data, head.row(p.d_lse, row), p.flags & BWD_D_LSE_F32);
            stats[0] = highest;
            stats[stats_plane(p)] = empty ? CUDART_INF : log;
            stats[2 * stats_plane(p)] = empty ? 0 : delta;
        }
    }
}

template <typename T, int D, int R, int C>
__device__ __forceinline__ void bwd_stats(const bwd_params &p) {
    extern __shared__ __align__(16) char shared[];
    const Work work(p.f);
    const BwdSequence seq(p, work.b);
    const int block_row = work.row_block * SimtBwd<T, D, R, C>::OWN;
    if (block_row < seq.q_len)
        find_stats<T, D, R, C>({p, seq, work.b, work.h}, block_row, (T *)shared);
}

// ---- The two walks --------------------------------------------------------------------------------------------------------

template <typename T, int D, int R, int C>
__device__ __forceinline__ void bwd_keys(const bwd_params &p) {
    using S = SimtBwd<T, D, R, C>;
    extern __shared__ __align__(16) char shared[];
    T *const keys = (T *)shared, *const values = keys + S::OWN * S::PITCH,
             *const queries = values + S::OWN * S::PITCH,
             *const d_output = queries + S::STEP * S::PITCH,
             *const weights = d_output + S::STEP * S::PITCH + S::y() * S::WEIGHTS_PITCH;
    const int b = blockIdx.x / p.key_blocks / p.heads_kv,
              kv_head = blockIdx.x / p.key_blocks % p.heads_kv,
              key = blockIdx.x % p.key_blocks * S::OWN;
    const BwdSequence seq(p, b);
    if (key >= seq.k_rows)
        return;
    const int first = seq.first_row(p, key) / S::STEP * S::STEP,
              end = seq.end_row(p, key, key + S::OWN), first_head = kv_head * p.f.group;
    T d_key[R][S::W][S::VEC], d_value[R][S::W][S::VEC];
    S::clear(d_key);
    S::clear(d_value);
    S::load_keys(keys, SimtHead<T>{p, seq, b, first_head}, key, S::OWN);
    S::load_values(values, SimtHead<T>{p, seq, b, first_head}, key, S::OWN);
#pragma unroll 1
    for (int h = first_head; h < first_head + p.f.group; ++h) {
        const SimtHead<T> head{p, seq, b, h};
#pragma unroll 1
        for (int row = first; row < end; row += S::STEP) {
            S::load_queries(queries, head, row, S::STEP);
            S::load_d_output(d_output, head, row, S::STEP);
            S::loaded();
            T s[R][C], d[R][C];
            S::multiply(s, keys + S::y() * S::PITCH, queries);
            S::multiply(d, values + S::y() * S::PITCH, d_output);
            const bool hidden =
                S::template gradients<true>({head, key + S::y(), row + S::x()}, s, d);
            S::add(d_value, s, weights, d_output, hidden);
            S::add(d_key, d, weights, queries, hidden);
            __syncthreads();
        }
    }
    copy_wait<0>();
    const auto to = [&](const fwd_view &v) {
        return b * v.stride[0] + kv_head * v.stride[1] + (seq.k_start + key) * v.stride[2];
    };
    const int rows = seq.k_rows - key, len = seq.k_len - key;
    if (p.d_key.data)
        S::store(d_key, (T)p.f.scale, p.d_key, to(p.d_key), rows, len, p.f.dim_qk,
                 p.flags & BWD_D_KEY_F32, p.flags & BWD_ALIGNED_D_KEY);
    if (p.d_value.data)
        S::store(d_value, 1, p.d_value, to(p.d_value), rows, len, p.f.dim_v,
                 p.flags & BWD_D_VALUE_F32, p.flags & BWD_ALIGNED_D_VALUE);
}

template <typename T, int D, int R, int C>
__device__ __forceinline__ void bwd_rows(const bwd_params &p) {
    using S = SimtBwd<T, D, R, C>;
    extern __shared__ __align__(16) char shared[];
    T *const queries = (T *)shared, *const d_output = queries + S::OWN * S::PITCH,
             *const keys = d_output + S::OWN * S::PITCH, *const values = keys + S::STEP * S::PITCH,
             *const weights = values + S::STEP * S::PITCH + S::y() * S::WEIGHTS_PITCH;
    const Work work(p.f);
    const BwdSequence seq(p, work.b);
    const SimtHead<T> head{p, seq, work.b, work.h};
    const int row = work.row_block * S::OWN, last = min(row + S::OWN, seq.q_len) - 1,
              first = seq.first_key(p.f, row) / S::STEP * S::STEP,
              end = last < row ? 0 : seq.end_key(p.f, last);
    T d_query[R][S::W][S::VEC], slope_sum = 0;
    S::clear(d_query);
    S::load_queries(queries, head, row, S::OWN);
    S::load_d_output(d_output, head, row, S::OWN);
#pragma unroll 1
    for (int key = first; key < end; key += S::STEP) {
        S::load_keys(keys, head, key, S::STEP);
        S::load_values(values, head, key, S::STEP);
        S::loaded();
        T s[R][C], d[R][C];
        S::multiply(s, queries + S::y() * S::PITCH, keys);
        S::multiply(d, d_output + S::y() * S::PITCH, values);
        const bool hidden = S::template gradients<false>({head, row + S::y(), key + S::x()}, s, d);
#pragma unroll
        for (int n = 0; n < R * C; ++n) {
            T &gradient = d[n / C][n % C];
            if (p.d_alibi_slopes.data)
                slope_sum =
                    fma(-gradient, head.distance(row + S::y() + n / C, key + S::x() + n % C * 16),
                        slope_sum);
            gradient *= s[n / C][n % C];
        }
        S::add(d_query, d, weights, keys, hidden);
        __syncthreads();
    }
    copy_wait<0>();
    if (p.d_alibi_slopes.data) {
        __syncthreads(); // where no step was, the first tiles may still be on their way
        slope_sum = block_sum<S::THREADS>(slope_sum, (T *)shared);
        if (threadIdx.x == 0)
            ((T *)p.slope_sums)[((int64_t)work.b * p.f.heads_q + work.h) * p.f.row_blocks +
                                work.row_block] = slope_sum;
    }
    if (p.d_query.data)
        S::store(d_query, (T)p.f.scale, p.d_query, head.row(p.d_query, row), seq.q_rows - row,
                 seq.q_len - row, p.f.dim_qk, p.flags & BWD_D_QUERY_F32,
                 p.flags & BWD_ALIGNED_D_QUERY);
}

// ---- Gradients of a bias ------------------------------------------------------------------------------------------------

// Element by element a block adds up what the heads, sequences, rows and keys that they stand for say, one after the other.
template <typename T, int D, int R, int C>
__device__ __forceinline__ void bwd_bias(const bwd_params &p) {
    using S = SimtBwd<T, D, R, C>;
    extern __shared__ __align__(16) char shared[];
    T *const queries = (T *)shared, *const d_output = queries + S::OWN * S::PITCH,
             *const keys = d_output + S::OWN * S::PITCH, *const values = keys + S::STEP * S::PITCH;
    const BiasPart part(p, S::OWN, S::STEP);
    T sum[R][C] = {};
    for (int b = part.batch.first; b < part.batch.end; ++b) {
        const BwdSequence seq(p, b);
        for (int h = part.heads.first; h < part.heads.end; ++h) {
            const SimtHead<T> head{p, seq, b, h};
            for (int row = part.rows.first * S::OWN; row < min(part.rows.end * S::OWN, seq.q_len);
                 row += S::OWN) {
                const int last = min(row + S::OWN, seq.q_len) - 1,
                          first = max(part.keys.first * S::STEP,
                                      seq.first_key(p.f, row) / S::STEP * S::STEP),
                          end = min(part.keys.end * S::STEP, seq.end_key(p.f, last));
                S::load_queries(queries, head, row, S::OWN);
                S::load_d_output(d_output, head, row, S::OWN);
                for (int key = first; key < end; key += S::STEP) {
                    S::load_keys(keys, head, key, S::STEP);
                    S::load_values(values, head, key, S::STEP);
                    S::loaded();
                    T s[R][C], d[R][C];
                    S::multiply(s, queries + S::y() * S::PITCH, keys);
                    S::multiply(d, d_output + S::y() * S::PITCH, values);
                    S::template gradients<false>({head, row + S::y(), key + S::x()}, s, d);
#pragma unroll
                    for (int n = 0; n < R * C; ++n)
                        sum[n / C][n % C] += d[n / C][n % C];
                    __syncthreads();
                }
                S::loaded(); // before the queries that no step has waited for are overwritten
            }
        }
    }
    S::store_bias(sum, p, part, (T *)shared);
}
