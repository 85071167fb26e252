// Forward attention in f32 and f64 on the CUDA cores: products and sums in the element type, no reduced precision.
//
// A block of 8 x 16 threads owns 8 * R query rows of one head. Thread (y, x) has rows y * R + i; of a tile of keys it has
// x + 16 * c, and of the output the columns x * VEC + 16 * VEC * w + e. The 16 threads of a row are half a warp, so rows
// are reduced by shuffles and probabilities change hands in shared memory under a warp barrier. Keys and values share one
// tile in turn; other blocks of the multiprocessor compute while one waits for its copies.
#pragma once

#include "kernels/cuda/common/pairs.cuh"
#include "kernels/cuda/simt/tile.cuh"

template <typename T, int D, int R, int C>
struct Simt : SimtTile<T, D, R, C> {
    using Tile = SimtTile<T, D, R, C>;
    using V = Vec<T>;
    static constexpr int ROWS = Tile::OWN, KEYS = Tile::STEP, VEC = Tile::VEC, W = Tile::W,
                         PITCH = Tile::PITCH, P_PITCH = Tile::WEIGHTS_PITCH;
    static constexpr size_t SHARED_BYTES =
        (size_t)((ROWS + KEYS) * PITCH + ROWS * P_PITCH) * sizeof(T);

    T out[R][W][VEC], s[R][C], top[R], sum[R];
    T unit; // logit per unit of score: the scale, or 1 if logits() has applied it with the other options
    T slope; // exponent per unit of score

    // Logits from raw products; -inf for keys that row i does not see. True if there is one.
    template <bool EXTRAS>
    __device__ __forceinline__ bool logits(const fwd_params &p, const PairOptions &pairs,
                                           const Sequence &seq, int b, int h, int row, int key) {
        const T scale = unit == (T)p.scale ? T(1) : (T)p.scale, cap = (T)p.softcap;
        const T alibi =
            p.alibi_slopes.data
                ? ((const float *)p.alibi_slopes
                       .data)[b * p.alibi_slopes.stride[0] + h * p.alibi_slopes.stride[1]]
                : 0.0f;
        const int64_t bias_head = b * p.bias.stride[0] + h * p.bias.stride[1];
        const uint8_t *const mask =
            (const uint8_t *)p.mask.data + b * p.mask.stride[0] + h * p.mask.stride[1];
        bool masked = false;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const int q = row + i, first = seq.first_key(p, q), end = seq.end_key(p, q);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int j = key + threadIdx.x % 16 + 16 * c;
                T x = s[i][c] * scale;
                if (j < first || j >= end || q >= seq.q_len) {
                    x = -CUDART_INF;
                } else {
                    if (cap > 0)
                        x = cap * tanh(x / cap);
                    if (p.bias.data) {
                        const int64_t at = bias_head + q * p.bias.stride[2] + j * p.bias.stride[3];
                        x += p.flags & FWD_BIAS_F32 ? (T)((const float *)p.bias.data)[at]
                                                    : ((const T *)p.bias.data)[at];
                    }
                    x -= alibi * abs(q + seq.diagonal - j);
                    if (EXTRAS ? !pairs.visible(q, j)
                               : p.mask.data && !mask[q * p.mask.stride[2] + j * p.mask.stride[3]])
                        x = -CUDART_INF;
                }
                masked |= x == -CUDART_INF;
                s[i][c] = x;
            }
        }
        return masked;
    }

    __device__ __forceinline__ static T row_max(T x) {
#pragma unroll
        for (int lane = 1; lane < 16; lane *= 2)
            x = fmax(x, __shfl_xor_sync(~0u, x, lane));
        return x;
    }

    // Probabilities relative to the new row maxima, and everything so far brought to them. The largest score of a row has a
    // probability of exactly 1, and one that is masked -0: see is_masked(). `dropped`: bits of those that are in the sum, but masked
    // for the output, number i * C + c.
    __device__ __forceinline__ void softmax(T *prob, uint32_t dropped) {
#pragma unroll
        for (int i = 0; i < R; ++i) {
            T highest = s[i][0];
#pragma unroll
            for (int c = 1; c < C; ++c)
                highest = fmax(highest, s[i][c]);
            highest = fmax(row_max(highest), top[i]);
            const T base = highest == -CUDART_INF ? T(0) : highest;
            const T shrink = exponential((top[i] - base) * slope);
            sum[i] *= shrink;
#pragma unroll
            for (int w = 0; w < W; ++w)
#pragma unroll
                for (int e = 0; e < VEC; ++e)
                    out[i][w][e] *= shrink;
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const T x = s[i][c] == -CUDART_INF ? -T(0) : exponential((s[i][c] - base) * slope);
                sum[i] += x;
                prob[i * P_PITCH + threadIdx.x % 16 + 16 * c] =
                    dropped >> (i * C + c) & 1 ? -T(0) : x;
            }
            top[i] = highest;
        }
    }

    // Those of this thread that dropout drops.
    __device__ __forceinline__ static uint32_t dropped(const PairOptions &pairs, int row, int key) {
        static_assert(R * C <= 32, "a bit for each");
        uint32_t bits = 0;
#pragma unroll 2
        for (int n = 0; n < R * C; ++n)
            bits |= (uint32_t)pairs.dropped(row + n / C, key + threadIdx.x % 16 + n % C * 16) << n;
        return bits;
    }

    // `keep`: what dropout multiplies weights by.
    __device__ __forceinline__ void finish(const fwd_params &p, const Sequence &seq,
                                           const Work &work, int row, T keep) {
        const T sink = p.sinks.data ? (T)((const float *)p.sinks.data)[work.h * p.sinks.stride[1]]
                                    : -CUDART_INF;
        T *const o = (T *)p.output.data + work.b * p.output.stride[0] + work.h * p.output.stride[1];
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const int q = row + i;
            T total = sum[i];
#pragma unroll
            for (int lane = 1; lane < 16; lane *= 2)
                total += __shfl_xor_sync(~0u, total, lane);
            const bool empty = total == 0;
            T top = empty ? -CUDART_INF : this->top[i] * unit, factor = 1;
            if (sink > -CUDART_INF) {
                const T higher = fmax(top, sink);
                factor = exponential((top - higher) * PER_LOGIT<T>);
                total = total * factor + exponential((sink - higher) * PER_LOGIT<T>);
                top = higher;
            }
            factor *= keep;
            if (q >= seq.q_rows)
                continue;
            if (p.lse.data && threadIdx.x % 16 == 0) {
                const T none = p.flags & FWD_EMPTY_LSE_INF ? CUDART_INF : -CUDART_INF;
                const T lse = total == 0 ? none : top + log(total);
                const int64_t at = work.b * p.lse.stride[0] + work.h * p.lse.stride[1] +
                                   (seq.q_start + q) * p.lse.stride[2];
                if (p.flags & FWD_LSE_F32)
                    ((float *)p.lse.data)[at] = (float)lse;
                else
                    ((T *)p.lse.data)[at] = lse;
            }
            T *const to = o + (seq.q_start + q) * p.output.stride[2];
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const int column = (threadIdx.x % 16 + 16 * w) * VEC;
                V x;
#pragma unroll
                for (int e = 0; e < VEC; ++e)
                    x.e[e] = empty ? T(0) : out[i][w][e] * factor / total;
                if (p.flags & FWD_ALIGNED_OUTPUT && column + VEC <= p.dim_v)
                    *(V *)(to + column) = x;
                else
#pragma unroll
                    for (int e = 0; e < VEC; ++e)
                        if (column + e < p.dim_v)
                            to[(column + e) * p.output.stride[3]] = x.e[e];
            }
        }
    }
};

template <typename T, int D, int R, int C, bool EXTRAS>
__device__ __forceinline__ void cuda_fwd_simt(const fwd_params &p, const pair_params &pair) {
    using S = Simt<T, D, R, C>;
    extern __shared__ __align__(16) char shared[];
    T *const q_tile = (T *)shared, *const kv_tile = q_tile + S::ROWS * S::PITCH;
    const int y = threadIdx.x / 16;
    T *const prob = kv_tile + S::KEYS * S::PITCH + y * R * S::P_PITCH; // the rows of this half warp

    const Work work(p);
    Sequence seq(p, work.b);
    if (EXTRAS)
        seq.diagonal += pair.diagonal_offset;
    const int block_row = work.row_block * S::ROWS, rows = min(S::ROWS, seq.q_rows - block_row),
              row = block_row + y * R;
    if (rows <= 0)
        return;
    const int kv_head = work.h / p.group;
    const T *const q =
        (const T *)p.query.data + work.b * p.query.stride[0] + work.h * p.query.stride[1];
    // Where key or value j of this sequence starts.
    const auto kv_row = [&](const fwd_view &v, int j) {
        const T *const head = (const T *)v.data + kv_head * v.stride[1];
        if (!p.page_size)
            return head + work.b * v.stride[0] + (seq.k_start + j) * v.stride[2];
        return head + paged_row(p, v, work.b, j);
    };
    const auto load_kv = [&](const fwd_view &v, int first, int dim, bool chunks) {
        S::load(
            kv_tile, [&](int r) { return kv_row(v, first + r); }, v.stride[3], S::KEYS,
            seq.k_len - first, dim, chunks);
    };

    S::load(
        q_tile, [&](int r) { return q + (seq.q_start + block_row + r) * p.query.stride[2]; },
        p.query.stride[3], S::ROWS, rows, p.dim_qk, p.flags & FWD_ALIGNED_QUERY);
    S t;
    const bool options = p.softcap > 0 || p.bias.data || p.alibi_slopes.data || !(p.scale > 0);
    t.unit = options ? T(1) : (T)p.scale;
    t.slope = t.unit * PER_LOGIT<T>;
#pragma unroll
    for (int i = 0; i < R; ++i) {
        t.top[i] = -CUDART_INF;
        t.sum[i] = 0;
#pragma unroll
        for (int w = 0; w < S::W; ++w)
#pragma unroll
            for (int e = 0; e < S::VEC; ++e)
                t.out[i][w][e] = 0;
    }
    const int last_row = min(block_row + S::ROWS, seq.q_len) - 1;
    int first = seq.first_key(p, block_row) / S::KEYS * S::KEYS;
    const int end = last_row < block_row ? 0 : seq.end_key(p, last_row);
    const PairOptions pairs{p, pair, seq, work.b, work.h};
    SeenTiles<S::KEYS, EXTRAS> seen(pairs, block_row, last_row + 1, first / S::KEYS,
                                    (end + S::KEYS - 1) / S::KEYS);
    int next = 0; // EXTRAS: the keys of the step after this one
    if (EXTRAS)
        first = seen.next(seen.begin()) * S::KEYS;
    if (first < end)
        load_kv(p.key, first, p.dim_qk, p.flags & FWD_ALIGNED_KEY);
#pragma unroll 1
    for (int key = first; key < end; key = EXTRAS ? next : key + S::KEYS) {
        if (EXTRAS)
            next = seen.next(key / S::KEYS + 1) * S::KEYS;
        copy_wait<0>();
        __syncthreads();
        S::multiply(t.s, q_tile + y * R * S::PITCH, kv_tile);
        __syncthreads();
        load_kv(p.value, key, p.dim_v, p.flags & FWD_ALIGNED_VALUE);
        const bool masked = t.template logits<EXTRAS>(p, EXTRAS ? pairs.for_once() : pairs, seq,
                                                      work.b, work.h, row, key);
        const uint32_t dropped =
            EXTRAS && pair.dropout ? S::dropped(pairs.for_once(), row, key) : 0;
        t.softmax(prob, dropped);
        const bool any_masked =
            __any_sync(~0u, masked || dropped); // and the half warp sees the probabilities
        copy_wait<0>();
        __syncthreads();
        if (any_masked)
            S::template add<true>(t.out, prob, kv_tile);
        else
            S::template add<false>(t.out, prob, kv_tile);
        __syncthreads();
        if ((EXTRAS ? next : key + S::KEYS) < end)
            load_kv(p.key, EXTRAS ? next : key + S::KEYS, p.dim_qk, p.flags & FWD_ALIGNED_KEY);
    }
    copy_wait<0>();
    t.finish(p, seq, work, row, EXTRAS ? T(1 / (1 - pair.dropout_probability)) : T(1));
}
