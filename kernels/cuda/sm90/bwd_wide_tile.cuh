// What the two kernels for wide heads share: which rows and keys a block works on, what rows have besides, and the way from registers
// to the gradients. docs/cuda-backward.md draws how they work together.
#pragma once

#include "kernels/cuda/common/sixteen_bit.cuh"
#include "kernels/cuda/sm90/bwd.cuh"

// Rows or keys of a tile, and the bytes of 64 columns of it.
constexpr int WIDE_TILE = SM90_BWD_WIDE_TILE, WIDE_COLUMN = WIDE_TILE * 128;
// Rows of a block that computes dQ.
constexpr int WIDE_ROWS = SM90_BWD_WIDE_ROWS;
// Of a tile of rows: -lse log2(e), -inf where the row sees nothing, and -delta.
constexpr int WIDE_STATS_BYTES = 2 * WIDE_TILE * 4;

// ---- Tasks -------------------------------------------------------------------------------------------------------

// Keys of a kv head and the tiles of rows that see them, or rows of a query head and the tiles of keys that they see.
struct alignas(64) WideTask {
    int own; // the first key, or row; -1: there are no more tasks
    int batch, head;
    int first, end; // tiles to walk over
    int first_tile; // of rows, in the sequence
    int skipped; // the head is odd, or nothing of this is the sequence's own: nothing is written here
    Sequence s;
};

// Shared memory of a block whose layout C says; the first ring brings its task.
template <class C>
struct WideShared {
    uint32_t base;
    char *memory; // the same place

    __device__ __forceinline__ WideTask *task() const {
        return reinterpret_cast<WideTask *>(memory + C::TASK);
    }
    __device__ __forceinline__ uint32_t barrier(int i) const { return base + C::BARRIERS + 8 * i; }
    __device__ __forceinline__ Ring<1> task_ring() const { return {barrier(0), barrier(1)}; }
};

// What rows have of the tile, -lse first.
__device__ __forceinline__ const float *wide_stats(const sm90_bwd_params &p, int head, int tile) {
    return stats_of(p, head, tile) + SM90_BWD_LSE * WIDE_TILE;
}

// Task `index` of a tensor of `length` keys or rows in tiles of `tile`, the last ones first or the first ones; `group` heads share a
// kv head.
template <int D>
__device__ __forceinline__ WideTask wide_task(const sm90_bwd_params &p, int index, int length,
                                              int group, int tile, bool last_first) {
    const int heads = p.heads_kv * group, tiles = (length + tile - 1) / tile;
    const int all_heads = index / tiles, b = all_heads / heads, in_head = index % tiles;
    WideTask t{-1, b, all_heads % heads, 0, 0, 0, 0, Sequence(p, min(b, p.batch - 1))};
    if (b >= p.batch)
        return t;
    t.own = (last_first ? tiles - 1 - in_head : in_head) * tile;
    t.first_tile = first_tile(p, t.s, b);
    t.skipped = facts_of<D>(p, b, t.head / group)[SM90_BWD_ODD];
    return t;
}

// Tiles of keys: behind a causal mask the first ones have most rows.
template <int D>
__device__ __forceinline__ WideTask key_task(const sm90_bwd_params &p, int index) {
    WideTask t = wide_task<D>(p, index, p.len_k, 1, WIDE_TILE, false);
    if (t.own < 0)
        return t;
    t.skipped |= t.own >= t.s.k_rows;
    const int end_key = min(t.own + WIDE_TILE, t.s.k_len),
              low = max(t.own - t.s.diagonal - p.window_right, 0),
              high = min(end_key - t.s.diagonal + p.window_left, t.s.q_len);
    if (t.skipped || t.own >= end_key || low >= high)
        return t;
    t.first = low / WIDE_TILE;
    t.end = (high + WIDE_TILE - 1) / WIDE_TILE;
    return t;
}

// Tiles of keys that rows [first_row, first_row + count) see.
__device__ __forceinline__ void find_keys(const sm90_bwd_params &p, const Sequence &s,
                                          int first_row, int count, int &first, int &end) {
    const int last = min(first_row + count, s.q_len) - 1;
    const int low = s.low_key(p, first_row), high = s.high_key(p, last);
    const bool any = first_row <= last && low < high;
    first = any ? low / WIDE_TILE : 0;
    end = any ? (high + WIDE_TILE - 1) / WIDE_TILE : 0;
}

// Tiles of rows: behind a causal mask the last ones see most keys.
template <int D>
__device__ __forceinline__ WideTask row_task(const sm90_bwd_params &p, int index) {
    WideTask t = wide_task<D>(p, index, p.len_q, p.group, WIDE_ROWS, true);
    if (t.own < 0)
        return t;
    t.skipped |= t.own >= t.s.q_rows;
    if (!t.skipped)
        find_keys(p, t.s, t.own, WIDE_ROWS, t.first, t.end);
    return t;
}

// A thread holds two of every eight columns of a product. Of these, those before column `count`: counted from its first one on.
__device__ __forceinline__ int elements_before(int count) {
    const int inside = min(max(count, 0), WIDE_TILE);
    return inside / 8 * 2 + min(inside % 8, 2);
}
// A bit for each of the thread's elements of a row whose column is in [low, high); columns count from the thread's first one.
__device__ __forceinline__ uint32_t elements_between(int low, int high) {
    const int begin = elements_before(low);
    return ones(begin, max(elements_before(high) - begin, 0));
}

// ---- Arithmetic --------------------------------------------------------------------------------------------------

// As widen_pair(), of which the compiler would make other code here.
template <typename E>
__device__ __forceinline__ float2 unpack(uint32_t x);

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t x) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&x));
}

// 2^(scale_log2 x + least) of a score; with softcap, x becomes the logit first. `slope` is the logit's derivative by scale x.
template <bool HAS_SOFTCAP>
__device__ __forceinline__ float weight_of(const sm90_bwd_params &p, float x, float least,
                                           float &slope) {
    slope = 1;
    if (HAS_SOFTCAP) { // tanh(y) = 1 - 2 / (exp(2 y) + 1)
        const float twice = 2 * LOG2E * p.scale / p.softcap;
        const float tanh = 1 - 2 * reciprocal_approx(exp2_approx(x * twice) + 1);
        x = p.softcap * tanh;
        slope = 1 - tanh * tanh;
    }
    return exp2_approx(fmaf(x, p.scale_log2, least));
}

// ---- Gradients of 16 rows or keys of a warp ----------------------------------------------------------------------

// scale * sums to rows [row, row + count) of a gradient: 64 neighbouring bytes of each row at a time.
template <typename E, int COUNT>
__device__ __forceinline__ void store_sums(const sm90_gradient &gradient, int batch, int head,
                                           int row, int count, int dim, float scale,
                                           const float (&sums)[COUNT]) {
    const int lane = threadIdx.x & 31;
    const int64_t pitch = gradient.strides.row;
    if (gradient.is_float) {
        float *const out =
            row_of(static_cast<float *>(gradient.data), gradient.strides, batch, head, row);
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            const int r = fragment_row(lane, i), column = fragment_column(lane, i);
            if (r < count && column < dim)
                *reinterpret_cast<float2 *>(out + r * pitch + column) =
                    make_float2(sums[i] * scale, sums[i + 1] * scale);
        }
        return;
    }
    E *const out = row_of(static_cast<E *>(gradient.data), gradient.strides, batch, head, row);
#pragma unroll
    for (int i = 0; i < COUNT; i += 16)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = fragment_row(lane, 2 * half), column = 2 * i + lane % 4 * 8;
            uint32_t w[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float *const x = sums + i + 4 * j + 2 * half;
                w[j] = pack<E>(x[0] * scale, x[1] * scale);
            }
            transpose_words(w);
            if (r < count && column < dim)
                *reinterpret_cast<uint4 *>(out + r * pitch + column) =
                    make_uint4(w[0], w[1], w[2], w[3]);
        }
}

// ---- Before the products -----------------------------------------------------------------------------------------

// What the rows of a tile have; whether their head is odd. The keys need no look: one that is not finite reaches its own gradients and,
// as 0 times NaN, the dQ of rows beside those that see it, which are looked at.
template <typename E, int D>
__device__ __forceinline__ void prepare_wide(const sm90_bwd_params &p) {
    constexpr int ROWS = WIDE_TILE / (SM90_BWD_SMALL_THREADS / 32); // of a warp
    const int head = blockIdx.x / p.row_tiles / p.batch, b = blockIdx.x / p.row_tiles % p.batch,
              tile = blockIdx.x % p.row_tiles, lane = threadIdx.x % 32;
    wait_for_predecessor();
    const Sequence s(p, b);
    if (tile * WIDE_TILE >= s.q_rows)
        return;
    const int batch = p.cu_seqlens_q ? 0 : b, first = threadIdx.x / 32 * ROWS;
    float dot = 0; // of row `lane`
    bool odd = false;
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const int i = tile * WIDE_TILE + first + n;
        const auto load = [&](const void *data, const sm90_strides &strides, int dim, bool exists) {
            return Eight<E>(
                row_of(static_cast<const E *>(data), strides, batch, head, s.q_start + i) +
                    8 * lane,
                exists && 8 * lane < dim);
        };
        const bool sees = s.sees(p, i), blind = !sees && i < s.q_len;
        const Eight<E> d_output = load(p.d_output, p.d_output_strides, p.dim_v, sees || blind),
                       output = load(p.output, p.output_strides, p.dim_v, sees),
                       query = load(p.query, p.query_strides, p.dim_qk, blind);
        const float sum = Lanes<256>::sum(d_output.dot(output));
        dot = lane == n ? sum : dot;
        odd |= !isfinite(d_output.dot(d_output)) || !isfinite(query.dot(query));
    }
    if (lane < ROWS) {
        const int r = first + lane, i = tile * WIDE_TILE + r, row = s.q_start + i;
        float *const stats = stats_of(p, head, first_tile(p, s, b) + tile) + r;
        const bool sees = s.sees(p, i);
        const float lse = sees ? *row_of(p.lse, p.lse_strides, batch, head, row) : INFINITY;
        const float d_lse =
            p.d_lse && i < s.q_rows ? *row_of(p.d_lse, p.d_lse_strides, batch, head, row) : 0;
        stats[SM90_BWD_LSE * WIDE_TILE] = -lse * LOG2E;
        stats[SM90_BWD_DELTA * WIDE_TILE] = d_lse - dot;
        odd |= sees && !(fabsf(lse) < LARGEST_LSE && isfinite(d_lse - dot));
    }
    if (odd)
        facts_of<D>(p, b, head / p.group)[SM90_BWD_ODD] = 1;
}
