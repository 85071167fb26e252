// Forward attention for f32 on the tensor cores of Ampere and later: mma.m16n8k8 on tf32, three products for one of f32.
// See docs/cuda-tf32x3.md.
//
// A block owns WARPS * 16 query rows of one head and walks over the keys in steps of BN. A warp owns 16 rows and
// all of their output. K and V have one tile each: V of a step is copied while Q K^T is computed, K of the next step while
// the softmax and P V are.
//
// Operands lie in shared memory as they came, and are split in registers. The products of a step of 8 have an order of
// their own, the same for both operands, so that a thread reads 16 bytes at a time: see multiply_tiles() and add_values().
#pragma once

#include "kernels/cuda/common/exact.cuh"
#include "kernels/cuda/common/pairs.cuh"
#include "kernels/cuda/common/sequence.cuh"
#include "kernels/cuda/tf32x3/tile.cuh"

template <int D, int WARPS, int BN>
struct Tile {
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS * 16;
    static constexpr int Q_BYTES = ROWS * D * 4, KV_BYTES = BN * D * 4,
                         SHARED_BYTES = Q_BYTES + 2 * KV_BYTES;
};

// One warp's share. Element [n][e] of the scores is row lane / 4 + e / 2 * 8 of the warp and key n * 8 + lane % 4 * 2 + e % 2;
// out[c][i][e] is the same row and column c * 32 + lane % 4 * 8 + e % 2 * 4 + i.
//
// Tensor cores truncate their sums, by up to a unit in the last place each time. So a sum starts anew after 32 head dims or
// 16 keys, takes the small products before the large ones, and is added in f32.
template <int D, int BN>
struct Warp {
    static constexpr int NT = BN / 8, PITCH = Rows<D>::PITCH;

    float out[D / 32][4][4];
    float score[NT][4];
    float top[2], sum[2]; // `top`: the largest score so far, to which weights are relative
    float slope;          // exponent of 2 per unit of score
    float unit;           // logit per unit of score: the scale, or 1 if logits() has applied it

    // Scores of a tile, in `steps` of 32 head dims.
    __device__ __forceinline__ void multiply_keys(uint32_t q, uint32_t k, int steps) {
        multiply_tiles<D, 4>(reinterpret_cast<float(&)[1][NT][4]>(score), q, k, steps);
    }

    // out = out * shrink + P V. In a step of 8 keys thread lane % 4 = t has keys 2 t and 2 t + 1 as k = t and t + 4, as
    // the scores have them; lane / 4 = g has columns 4 g + i of 32 in product i.
    __device__ __forceinline__ void add_values(uint32_t v, int dim, const float (&shrink)[2]) {
        constexpr int WIDE = D <= 128 ? 2 : 1,
                      GROUP = 4 * WIDE; // sums at a time, as registers allow
        const uint32_t odd = v ^ 64;    // the row of the odd key is permuted otherwise
        Split p[NT][1][4];
#pragma unroll
        for (int n = 0; n < NT; ++n)
            split(p[n][0], score[n][0], score[n][2], score[n][1], score[n][3]);
#pragma unroll
        for (int c = 0; c < D / 32; c += WIDE) {
            if (c * 32 >= dim)
                break;
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                Split b[2][GROUP][2];
                float s[1][GROUP][4] = {};
#pragma unroll
                for (int m = 0; m < 2; ++m) {
#pragma unroll
                    for (int w = 0; w < WIDE; ++w) {
                        const uint32_t at = (n + m) * 8 * PITCH + (c + w) * 128;
                        const float4 x = load_floats(v + at), y = load_floats(odd + at + PITCH);
                        split(b[m][w * 4], x.x, y.x);
                        split(b[m][w * 4 + 1], x.y, y.y);
                        split(b[m][w * 4 + 2], x.z, y.z);
                        split(b[m][w * 4 + 3], x.w, y.w);
                    }
                    add_small(s, p[n + m], b[m]);
                }
                add_large(s, p[n], b[0]);
                add_large(s, p[n + 1], b[1]);
#pragma unroll
                for (int i = 0; i < GROUP; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float &x = out[c + i / 4][i % 4][e];
                        x = n == 0 ? fmaf(x, shrink[e / 2], s[0][i][e]) : x + s[0][i][e];
                    }
            }
        }
    }

    // Hides the keys that lie outside the window. `row`, `key`: the first of this thread and of the tile.
    __device__ __forceinline__ void mask(const fwd_params &p, const Sequence &seq, int row,
                                         int key) {
        const int column = key + threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = row + half * 8;
            const int first = seq.first_key(p, i) - column, end = seq.end_key(p, i) - column;
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (n * 8 + e < first || n * 8 + e >= end)
                        score[n][2 * half + e] = -INFINITY;
        }
    }

    // Logits: the options of the forward pass, one after the other. Rows and keys outside the tensors give anything: mask()
    // hides them.
    template <bool EXTRAS>
    __device__ __forceinline__ void logits(const fwd_params &p, const pair_params &pair,
                                           const Sequence &seq, int b, int h, int row, int key) {
        const float scale = (float)p.scale, cap = (float)p.softcap;
        const float alibi =
            p.alibi_slopes.data
                ? ((const float *)p.alibi_slopes
                       .data)[b * p.alibi_slopes.stride[0] + h * p.alibi_slopes.stride[1]]
                : 0.0f;
        const float *const bias =
            (const float *)p.bias.data + b * p.bias.stride[0] + h * p.bias.stride[1];
        const uint8_t *const mask =
            (const uint8_t *)p.mask.data + b * p.mask.stride[0] + h * p.mask.stride[1];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = row + half * 8;
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int j = key + n * 8 + threadIdx.x % 4 * 2 + e;
                    const bool exists = i < seq.q_len && j < seq.k_len;
                    float x = score[n][half * 2 + e] * scale;
                    if (cap > 0)
                        x = cap * tanhf(x / cap);
                    if (p.bias.data && exists)
                        x += bias[i * p.bias.stride[2] + j * p.bias.stride[3]];
                    x -= alibi * abs(i + seq.diagonal - j);
                    if (p.mask.data && !(EXTRAS && pair.block_mask.data) && exists &&
                        !mask[i * p.mask.stride[2] + j * p.mask.stride[3]])
                        x = -INFINITY;
                    score[n][half * 2 + e] = x;
                }
        }
    }

    // Hides what segments, block mask and mask hide. `row`, `key` as in mask().
    __device__ __forceinline__ void hide(const PairOptions &options, int row, int key) {
        const int last_row = options.seq.q_len - 1, last_key = options.seq.k_len - 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = min(row + half * 8, last_row);
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int j = min(key + n * 8 + (int)threadIdx.x % 4 * 2 + e, last_key);
                    if (!options.visible(i, j))
                        score[n][half * 2 + e] = -INFINITY;
                }
        }
    }

    // Probabilities that dropout drops become 0: they are in the sum. `row`, `key` as in mask().
    __device__ __forceinline__ void drop(const PairOptions &options, int row, int key) {
        uint32_t of_half[2];
        options.template dropped_in_tile<NT>(row, key + (int)threadIdx.x % 4 * 2, of_half);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (of_half[half] >> (n * 4 + e) & 1)
                        score[n][half * 2 + e] = 0;
    }

    // Probabilities relative to the new row maxima; shrink: what brings everything before to them. The largest score of a
    // row has a probability of exactly 1.
    __device__ __forceinline__ void softmax(float (&shrink)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = top[half];
#pragma unroll
            for (int n = 0; n < NT; ++n)
                highest = fmaxf(highest, fmaxf(score[n][half * 2], score[n][half * 2 + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const float base = highest == -INFINITY ? 0.0f : highest;
            shrink[half] = exp2_approx((top[half] - base) * slope);
            top[half] = highest;
            float total = 0;
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float &x = score[n][half * 2 + e];
                    x = exp2_approx((x - base) * slope);
                    total += x;
                }
            sum[half] = fmaf(sum[half], shrink[half], total);
        }
    }
};

template <int D, int WARPS, int BN, bool EXTRAS>
__device__ __forceinline__ void cuda_fwd_tf32x3(const fwd_params &p, const pair_params &pair) {
    using T = Tile<D, WARPS, BN>;
    using LoadQ = Loader<T::THREADS, T::ROWS, D>;
    using LoadKV = Loader<T::THREADS, BN, D>;
    extern __shared__ __align__(128) char shared[];
    const uint32_t q_tile = shared_address(shared), k_tile = q_tile + T::Q_BYTES,
                   v_tile = k_tile + T::KV_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const Work work(p);
    Sequence seq(p, work.b);
    if (EXTRAS)
        seq.diagonal += pair.diagonal_offset;
    const int block_row = work.row_block * T::ROWS, rows = min(T::ROWS, seq.q_rows - block_row);
    if (rows <= 0)
        return;
    const int kv_head = work.h / p.group, warp_row = block_row + warp * 16,
              row = warp_row + lane / 4;
    const float *const q = (const float *)p.query.data + work.b * p.query.stride[0] +
                           work.h * p.query.stride[1] +
                           (seq.q_start + block_row) * p.query.stride[2];
    const auto load = [&](uint32_t to, const fwd_view &v, int key, int dim, bool chunks) {
        const float *const head = (const float *)v.data + kv_head * v.stride[1];
        const int count = seq.k_len - key;
        if (p.page_size) {
            LoadKV::any(
                to, [&](int r) { return head + paged_row(p, v, work.b, key + r); }, v.stride[3],
                count, dim, chunks);
        } else {
            const float *const from =
                head + work.b * v.stride[0] + (seq.k_start + key) * v.stride[2];
            if (chunks)
                LoadKV::aligned(to, from, v.stride[2], count, dim);
            else
                LoadKV::any(
                    to, [&](int r) { return from + r * v.stride[2]; }, v.stride[3], count, dim,
                    false);
        }
        copy_commit();
    };

    Warp<D, BN> w;
    const PairOptions pairs{p, pair, seq, work.b, work.h};
    const bool hidden = EXTRAS && (pair.query_segments.data || pair.block_mask.data);
    const bool options =
        p.softcap > 0 || p.bias.data || p.alibi_slopes.data || p.mask.data || !(p.scale > 0);
    w.unit = options ? 1.0f : (float)p.scale;
    w.slope = w.unit * LOG2E;
    {
        w.top[0] = w.top[1] = -INFINITY;
        w.sum[0] = w.sum[1] = 0;
#pragma unroll
        for (int c = 0; c < D / 32; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    w.out[c][i][e] = 0;
    }

    // Keys [first, end) of the block and of this warp; tiles inside [clean_first, clean_end) are seen whole by the warp.
    const int last_row = min(block_row + T::ROWS, seq.q_len) - 1,
              warp_last = min(warp_row + 16, seq.q_len) - 1;
    int first = seq.first_key(p, block_row) / BN * BN;
    const int end = last_row < block_row ? 0 : seq.end_key(p, last_row);
    SeenTiles<BN, EXTRAS> seen(pairs, block_row, last_row + 1, first / BN, (end + BN - 1) / BN);
    int next = 0; // EXTRAS: the keys of the step after this one
    if (EXTRAS)
        first = seen.next(seen.begin()) * BN;
    const int warp_first = seq.first_key(p, warp_row),
              warp_end = warp_last < warp_row ? 0 : seq.end_key(p, warp_last);
    const int clean_first = seq.first_key(p, warp_row + 16 - 1),
              clean_end =
                  options || hidden || warp_row + 16 > seq.q_len ? 0 : seq.end_key(p, warp_row);
    const int steps = (p.dim_qk + 31) / 32;
    const int g = lane / 4, t = lane % 4;
    const uint32_t q_at = q_tile + warp * 16 * Rows<D>::PITCH + Rows<D>::at(g, t),
                   k_at = k_tile + Rows<D>::at(g, t), v_at = v_tile + Rows<D>::at(2 * t, g);

    if (p.flags & FWD_ALIGNED_QUERY)
        LoadQ::aligned(q_tile, q, p.query.stride[2], rows, p.dim_qk);
    else
        LoadQ::any(
            q_tile, [&](int r) { return q + r * p.query.stride[2]; }, p.query.stride[3], rows,
            p.dim_qk, false);
    if (first < end)
        load(k_tile, p.key, first, p.dim_qk, p.flags & FWD_ALIGNED_KEY);
#pragma unroll 1
    for (int key = first; key < end; key = EXTRAS ? next : key + BN) {
        if (EXTRAS)
            next = seen.next(key / BN + 1) * BN;
        const bool sees = key < warp_end && key + BN > warp_first;
        copy_wait<0>();
        __syncthreads(); // K is there, and all warps are done with V of the step before
        load(v_tile, p.value, key, p.dim_v, p.flags & FWD_ALIGNED_VALUE);
        if (sees)
            w.multiply_keys(q_at, k_at, steps);
        copy_wait<0>();
        __syncthreads(); // V is there, and all warps are done with K
        if ((EXTRAS ? next : key + BN) < end)
            load(k_tile, p.key, EXTRAS ? next : key + BN, p.dim_qk, p.flags & FWD_ALIGNED_KEY);
        if (sees) {
            if (options)
                w.template logits<EXTRAS>(p, pair, seq, work.b, work.h, row, key);
            if (hidden)
                w.hide(pairs.for_once(), anew(row), key);
            if (key < clean_first || key + BN > clean_end)
                w.mask(p, seq, row, key);
            float shrink[2];
            w.softmax(shrink);
            if (EXTRAS && pair.dropout)
                w.drop(pairs.for_once(), anew(row), key);
            w.add_values(v_at, p.dim_v, shrink);
        }
    }
    copy_wait<0>();

    const float sink =
        p.sinks.data ? ((const float *)p.sinks.data)[work.h * p.sinks.stride[1]] : -INFINITY;
    float *const o = (float *)p.output.data + work.b * p.output.stride[0] +
                     work.h * p.output.stride[1] + seq.q_start * p.output.stride[2];
    // Four threads a row: an output is not finite, perhaps only since an Inf was split, or for a value behind a mask.
    uint64_t odd_rows = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = row + half * 8;
        float total = w.sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const bool empty = i >= seq.q_len || total == 0, exists = i < seq.q_rows;
        float top = empty ? -INFINITY : w.top[half] * w.unit, factor = 1;
        if (empty)
            total = 0;
        if (sink > -INFINITY) {
            const float higher = fmaxf(top, sink);
            factor = exp2_approx((top - higher) * LOG2E);
            total = total * factor + exp2_approx((sink - higher) * LOG2E);
            top = higher;
        }
        if (EXTRAS)
            factor *= pair.keep;
        if (p.lse.data && t == 0 && exists) // f32 is also the element type
            ((float *)p.lse.data)[work.b * p.lse.stride[0] + work.h * p.lse.stride[1] +
                                  (seq.q_start + i) * p.lse.stride[2]] =
                total != 0                    ? top + logf(total)
                : p.flags & FWD_EMPTY_LSE_INF ? INFINITY
                                              : -INFINITY;
        bool odd = false;
#pragma unroll
        for (int c = 0; c < D / 32; ++c)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int column = c * 32 + t * 8 + e * 4;
                float x[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    x[k] = empty ? 0.0f : w.out[c][k][half * 2 + e] * factor / total;
                    odd |= !isfinite(x[k]);
                }
                float *const to = o + i * p.output.stride[2];
                if (!exists)
                    continue;
                if (p.flags & FWD_ALIGNED_OUTPUT && column + 4 <= p.dim_v)
                    *(float4 *)(to + column) = make_float4(x[0], x[1], x[2], x[3]);
                else
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        if (column + k < p.dim_v)
                            to[(column + k) * p.output.stride[3]] = x[k];
            }
        odd_rows |= (uint64_t)__ballot_sync(~0u, odd && exists) << 32 * half;
    }
#pragma unroll 1
    for (int r = 0; r < 16 && odd_rows; ++r)
        if (odd_rows >> 4 * r & 15) {
            if constexpr (EXTRAS)
                write_rows_exactly<float, double>(p, pair, work.b, work.h, warp_row + r,
                                                  warp_row + r + 1);
            else
                write_rows_exactly<float, double>(p, work.b, work.h, warp_row + r,
                                                  warp_row + r + 1);
        }
}
