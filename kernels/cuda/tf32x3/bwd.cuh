// Gradients of attention in f32 on the tensor cores of Ampere and later: five products, each by three of tf32. See
// docs/cuda-backward.md.
//
//   scan    of each kv head the largest numbers among its keys and values
//   stats   of each row delta, what its weights are relative to, and the exponent of its sums
//   sums    a block owns keys of one kv head, and walks over the rows of all query heads of the group: d_key and d_value, and a
//           part of d_query, which it adds to sums of integers
//   finish  d_query from its sums
// and what cuda_bwd_simt has for the rest: keys and rows of odd heads, rows for d_alibi_slopes, too; bias, sinks, slopes.
#pragma once

#include "kernels/cuda/common/bwd_pairs.cuh"
#include "kernels/cuda/common/fixed_point.cuh"
#include "kernels/cuda/simt/bwd.cuh"
#include "kernels/cuda/tf32x3/bwd_sizes.h"
#include "kernels/cuda/tf32x3/tile.cuh"

// ---- Sums of queries, in fixed point ------------------------------------------------------------------------------------

// The workspace behind the statistics: facts of each kv head, then the sums.
enum { FACT_KEY = 0, FACT_VALUE = 1, FACT_ODD = 2 };

__device__ __forceinline__ uint32_t *facts_of(const bwd_params &p, int b, int kv_head) {
    return (uint32_t *)p.stats + TF32X3_BWD_PLANES * stats_plane(p) +
           ((int64_t)b * p.heads_kv + kv_head) * SCAN_FACTS;
}

// The tile of SUM_ROWS x SUM_COLUMNS from row `row` on, in the order of mma's accumulators.
template <int D>
__device__ __forceinline__ int64_t *sums_at(const bwd_params &p, const BwdSequence &seq, int h,
                                            int row, int column) {
    return (int64_t *)facts_of(p, p.f.batch, 0) + (h * p.stats_rows + seq.stats + row) * D +
           column * SUM_ROWS;
}

// Whether d_query is summed here. A walk over rows that slopes need has it, too.
__device__ __forceinline__ bool has_sums(const bwd_params &p) {
    return p.d_query.data && !p.d_alibi_slopes.data;
}

// A head is odd, and cuda_bwd_simt's, if something of it is not finite, since 0 times that is NaN; if a key or a value is large, since
// one exponent for all would leave the others few bits; or if a logit is so large that truncated sums move its weight.
constexpr float LARGEST_FACT = 0x1p12f, LARGEST_QUERY = 0x1p32f, LARGEST_LSE = 0x1p10f;

__device__ __forceinline__ bool is_odd(const uint32_t *facts) {
    return facts[FACT_ODD] || !(__uint_as_float(facts[FACT_KEY]) < LARGEST_FACT) ||
           !(__uint_as_float(facts[FACT_VALUE]) < LARGEST_FACT);
}

// A partial sum of d_query_i[d] is at most scale (keep |d_output_i| max_j |value_j| + |delta_i|) max_jd |key_j[d]|, because the
// weights of a row add up to 1. With 58 bits for that, five more are left for what is rounded.
__device__ __forceinline__ int sum_exponent(const bwd_params &p, const uint32_t *facts, float norm,
                                            float delta) {
    const float value = __uint_as_float(facts[FACT_VALUE]) * sqrtf((float)p.f.dim_v),
                bound = fmaf(p.pair.keep * norm, value, fabsf(delta));
    return 58 - exponent_above(bound) - exponent_above(__uint_as_float(facts[FACT_KEY]));
}

// A power of two that float may not have.
__device__ __forceinline__ double wide_power_of_two(int exponent) {
    return __hiloint2double((1023 + exponent) << 20, 0);
}

// Bits of NaN and infinity are above those of all numbers, and the largest does not depend on the order.
__device__ __forceinline__ void bwd_scan(const bwd_params &p) {
    const int blocks = (p.f.len_k + SCAN_KEYS - 1) / SCAN_KEYS;
    const int kv_head = blockIdx.x / blocks % p.heads_kv, b = blockIdx.x / blocks / p.heads_kv,
              first = blockIdx.x % blocks * SCAN_KEYS, lane = threadIdx.x % 32;
    const BwdSequence seq(p, b);
    const BwdHead<float> head{p, seq, b, kv_head * p.f.group};
    const auto largest = [&](const fwd_view &v, int dim) {
        uint32_t most = 0;
        for (int j = first + threadIdx.x / 32; j < min(first + SCAN_KEYS, seq.k_len);
             j += SCAN_THREADS / 32) {
            const uint32_t *const row = (const uint32_t *)v.data + head.key(v, j);
            for (int d = lane; d < dim; d += 32)
                most = max(most, row[d * v.stride[3]] & 0x7fffffff);
        }
        return __reduce_max_sync(~0u, most);
    };
    const uint32_t key = largest(p.f.key, p.f.dim_qk), value = largest(p.f.value, p.f.dim_v);
    if (lane == 0) {
        uint32_t *const facts = facts_of(p, b, kv_head);
        atomicMax(facts + FACT_KEY, key);
        atomicMax(facts + FACT_VALUE, value);
    }
}

// ---- Statistics of rows -------------------------------------------------------------------------------------------------

// Up to here lse's rounding, and what truncated sums move all scores of a row by, are below what the gradient's bound says of lse.
// Beyond, weights are relative to what the scores say themselves.
constexpr float FAR_FROM = 32;

// Of row i. By a warp, all of which have it.
struct RowFacts {
    float delta = 0, square = 0; // of the norm of d_output
    uint32_t query = 0;          // bits of the largest

    __device__ __forceinline__ RowFacts(const BwdHead<float> &head, int i) {
        const bwd_params &p = head.p;
        const int lane = threadIdx.x % 32;
        const float *const output = (const float *)p.f.output.data + head.row(p.f.output, i),
                           *const d_output =
                               (const float *)p.d_output.data + head.row(p.d_output, i);
        for (int d = lane; d < p.f.dim_v; d += 32) {
            const float x = output[d * p.f.output.stride[3]],
                        d_x = d_output[d * p.d_output.stride[3]];
            delta = x == 0 ? delta : fmaf(x, d_x, delta);
            square = fmaf(d_x, d_x, square);
        }
        const uint32_t *const q = (const uint32_t *)p.f.query.data + head.row(p.f.query, i);
        for (int d = lane; d < p.f.dim_qk; d += 32)
            query = max(query, q[d * p.f.query.stride[3]] & 0x7fffffff);
        query = __reduce_max_sync(~0u, query);
#pragma unroll
        for (int step = 16; step; step /= 2) {
            delta += __shfl_xor_sync(~0u, delta, step);
            square += __shfl_xor_sync(~0u, square, step);
        }
        if (p.d_lse.data)
            delta -= ((const float *)p.d_lse.data)[head.row(p.d_lse, i)];
    }

    __device__ __forceinline__ bool is_odd() const {
        return !(fabsf(delta) < LARGEST_QUERY * LARGEST_QUERY) ||
               !(square < LARGEST_QUERY * LARGEST_QUERY) ||
               !(__uint_as_float(query) < LARGEST_QUERY);
    }
};

// By lse where that will do, or else by the scores, in blocks of cuda_bwd_simt.
template <int D, int R, int C>
__device__ __forceinline__ void bwd_near_stats(const bwd_params &p) {
    using S = SimtBwd<float, D, R, C>;
    extern __shared__ __align__(16) char shared[];
    const Work work(p.f);
    const BwdSequence seq(p, work.b);
    const BwdHead<float> head{p, seq, work.b, work.h};
    const int block_row = work.row_block * S::OWN, end = min(block_row + S::OWN, seq.q_len);
    if (block_row >= end)
        return;
    float *const stats = (float *)stats_of(p, seq, work.h);
    const int64_t plane = stats_plane(p);
    uint32_t *const facts = facts_of(p, work.b, work.h / p.f.group);
    bool far = false, odd = false;
    for (int i = block_row + threadIdx.x / 32; i < end; i += S::THREADS / 32) {
        const float lse = ((const float *)p.f.lse.data)[head.row(p.f.lse, i)];
        const RowFacts row(head, i);
        far |= !(fabsf(lse) < FAR_FROM);
        odd |= row.is_odd();
        if (threadIdx.x % 32 == 0) {
            stats[i] = 0;
            stats[plane + i] = lse * LOG2E;
            stats[2 * plane + i] = row.delta;
            stats[3 * plane + i] =
                __int_as_float(sum_exponent(p, facts, sqrtf(row.square), row.delta));
        }
    }
    if (__syncthreads_or(far)) {
        find_stats<float, D, R, C>(head, block_row, (float *)shared);
        __syncthreads();
        const float slope = exponent_per_score<float>(p) * LN2;
        for (int i = block_row + threadIdx.x; i < end; i += S::THREADS)
            odd |= !(fabsf(stats[i]) * slope < LARGEST_LSE) || isnan(stats[plane + i]);
    }
    if (odd)
        facts[FACT_ODD] = 1;
}

// ---- Products of tiles --------------------------------------------------------------------------------------------------

// sum += a tile of pairs times the rows at `b`, COUNT of them and NC * 32 columns. In a step of 8 rows thread lane % 4 = t has rows
// 2 t and 2 t + 1 as k = t and t + 4; lane / 4 = g has columns 4 g + i of 32 in product i. load(left, step) gives the pairs of a step.
template <int D, int COUNT, int MT, int NC, typename Load>
__device__ __forceinline__ void add_tiles(float (&sum)[NC][MT][4][4], Load load, uint32_t b) {
    constexpr int PITCH = Rows<D>::PITCH;
    const uint32_t odd = (b ^ 64) + PITCH; // the row after is permuted otherwise
#pragma unroll 1
    for (int step = 0; step < COUNT / 8; step += 2) {
        Split left[2][MT][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
            load(left[m], step + m);
#pragma unroll
        for (int c = 0; c < NC; ++c) {
            Split right[2][4][2];
            float s[MT][4][4] = {};
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const uint32_t at = (step + m) * 8 * PITCH + c * 128;
                const float4 x = load_floats(b + at), y = load_floats(odd + at);
                split(right[m][0], x.x, y.x);
                split(right[m][1], x.y, y.y);
                split(right[m][2], x.z, y.z);
                split(right[m][3], x.w, y.w);
                add_small(s, left[m], right[m]);
            }
            add_large(s, left[0], right[0]);
            add_large(s, left[1], right[1]);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        sum[c][mt][i][e] += s[mt][i][e];
        }
    }
}

__device__ __forceinline__ float2 read_two(uint32_t from) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from));
    return x;
}
__device__ __forceinline__ void write_two(uint32_t to, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}

// Four neighbouring numbers of a gradient's row at `row`.
__device__ __forceinline__ void store_four(const fwd_view &v, int64_t row, int column, int dim,
                                           bool aligned, const float (&x)[4]) {
    float *const to = (float *)v.data + row;
    if (aligned && column + 4 <= dim)
        *(float4 *)(to + column) = make_float4(x[0], x[1], x[2], x[3]);
    else
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (column + i < dim)
                to[(column + i) * v.stride[3]] = x[i];
}

// ---- Five products ------------------------------------------------------------------------------------------------------

// Warps share the pairs of keys and rows, then the columns of each gradient. Of the pairs a warp has MT * 16 keys and NT * 8 rows; of
// d_key and d_value 32 keys, and NC * 32 columns; of d_query 32 rows, and QC * 32 columns.
template <int D, int WARPS, int KEYS, int ROWS>
struct SumsTile {
    static constexpr int THREADS = WARPS * 32;
    static constexpr int MT = KEYS * ROWS / WARPS >= 512 ? 2 : 1, ACROSS = WARPS * MT * 16 / KEYS,
                         NT = ROWS / ACROSS / 8;
    static constexpr int KEY_COLUMNS = WARPS * 32 / KEYS, NC = D / 32 / KEY_COLUMNS;
    static constexpr int QUERY_COLUMNS = WARPS * 32 / ROWS, QC = D / 32 / QUERY_COLUMNS;
    static_assert(NT * 8 * ACROSS == ROWS && NC * 32 * KEY_COLUMNS == D &&
                      QC * 32 * QUERY_COLUMNS == D && BWD_STATS_ROWS % ROWS == 0,
                  "");
    static constexpr int OWN_BYTES = KEYS * D * 4, STEP_BYTES = ROWS * D * 4,
                         PAIRS_BYTES = KEYS * ROWS * 4, STATS_BYTES = TF32X3_BWD_PLANES * ROWS * 4;
    static constexpr int VALUE_AT = OWN_BYTES, QUERY_AT = 2 * OWN_BYTES,
                         D_OUTPUT_AT = QUERY_AT + STEP_BYTES, WEIGHT_AT = D_OUTPUT_AT + STEP_BYTES,
                         D_SCORE_AT = WEIGHT_AT + PAIRS_BYTES, STATS_AT = D_SCORE_AT + PAIRS_BYTES;
    static_assert(STATS_AT + 2 * STATS_BYTES == TF32X3_BWD_SHARED_BYTES(D, KEYS, ROWS), "");
};

template <int D, int WARPS, int KEYS, int ROWS, bool EXTRAS>
struct SumsBlock {
    using T = SumsTile<D, WARPS, KEYS, ROWS>;
    using Tile = Pairs<true, T::MT, T::NT * 8>;
    using InRows = Rows<ROWS>; // where pairs lie, key by key
    const bwd_params &p;
    const BwdSequence &seq;
    int b, kv_head, key;
    char *shared;
    uint32_t base;

    template <int COUNT>
    __device__ __forceinline__ void load(uint32_t to, const fwd_view &v, int64_t at, int rows,
                                         int dim, bool aligned) const {
        using L = Loader<T::THREADS, COUNT, D>;
        const float *const from = (const float *)v.data + at;
        if (aligned)
            L::aligned(to, from, v.stride[2], rows, dim);
        else
            L::any(
                to, [&](int r) { return from + r * v.stride[2]; }, v.stride[3], rows, dim, false);
    }

    __device__ __forceinline__ void load_keys() const {
        const BwdHead<float> head{p, seq, b, kv_head * p.f.group};
        load<KEYS>(base, p.f.key, head.key(p.f.key, key), seq.k_len - key, p.f.dim_qk,
                   p.f.flags & FWD_ALIGNED_KEY);
        load<KEYS>(base + T::VALUE_AT, p.f.value, head.key(p.f.value, key), seq.k_len - key,
                   p.f.dim_v, p.f.flags & FWD_ALIGNED_VALUE);
    }

    __device__ __forceinline__ float *stats(int stage) const {
        return (float *)(shared + T::STATS_AT + stage * T::STATS_BYTES);
    }

    // Queries, d_output and statistics of the rows from `row` on. Rows that do not take part have weights of 0.
    __device__ __forceinline__ void load_rows(int h, int row, int stage) const {
        const BwdHead<float> head{p, seq, b, h};
        load<ROWS>(base + T::QUERY_AT, p.f.query, head.row(p.f.query, row), seq.q_len - row,
                   p.f.dim_qk, p.f.flags & FWD_ALIGNED_QUERY);
        load<ROWS>(base + T::D_OUTPUT_AT, p.d_output, head.row(p.d_output, row), seq.q_len - row,
                   p.f.dim_v, p.flags & BWD_ALIGNED_D_OUTPUT);
        copy_commit();
        const float *const from = stats_of(p, seq, h) + row;
        for (int x = threadIdx.x; x < TF32X3_BWD_PLANES * ROWS; x += T::THREADS) {
            const int plane = x / ROWS, r = x % ROWS;
            const bool read = row + r < seq.q_len;
            stats(stage)[x] = read ? from[plane * stats_plane(p) + r] : plane == 1 ? POS_INF : 0;
        }
    }

    // Weights, and gradients of products, of the pairs of this step.
    __device__ __forceinline__ void make_pairs(int h, int row, int stage) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const int first_key = warp / T::ACROSS * T::MT * 16,
                  first_row = warp % T::ACROSS * T::NT * 8;
        float score[T::MT][T::NT][4], d[T::MT][T::NT][4], cap[T::MT][T::NT][4];
        const uint32_t own = base + first_key * D * 4 + Rows<D>::at(g, t),
                       step = base + T::QUERY_AT + first_row * D * 4 + Rows<D>::at(g, t);
        multiply_tiles<D, 2>(score, own, step, (p.f.dim_qk + 31) / 32);
        multiply_tiles<D, 2>(d, own + T::VALUE_AT, step + T::D_OUTPUT_AT - T::QUERY_AT,
                             (p.f.dim_v + 31) / 32);
        const Head<float, EXTRAS> head{p, seq, b, h};
        const int j = key + first_key + g, i = row + first_row + t * 2;
        if (EXTRAS)
            Tile::options(head, j, i, score, cap);
        if (key + first_key < seq.first_key(p.f, row + first_row + T::NT * 8 - 1) ||
            key + first_key + T::MT * 16 > seq.end_key(p.f, row + first_row) ||
            (EXTRAS && row + first_row + T::NT * 8 > seq.q_len))
            Tile::hide(p, seq, j, i, score);
        const float *const of_rows = stats(stage) + first_row + t * 2;
        const uint32_t to = base + T::WEIGHT_AT + (first_key + g) * InRows::PITCH + t % 2 * 8;
#pragma unroll
        for (int n = 0; n < T::NT; ++n) {
            const float2 top = *(const float2 *)(of_rows + n * 8),
                         log = *(const float2 *)(of_rows + ROWS + n * 8),
                         delta = *(const float2 *)(of_rows + 2 * ROWS + n * 8);
            const int chunk = InRows::permuted(g, first_row / 4 + n * 2 + t / 2) * 16;
#pragma unroll
            for (int mt = 0; mt < T::MT; ++mt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float weight[2], gradient[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float x = score[mt][n][2 * half + e];
                        const bool seen = x != NEG_INF,
                                   kept = !(EXTRAS && p.pair.dropout &&
                                            head.options().dropped(i + n * 8 + e,
                                                                   j + mt * 16 + half * 8));
                        const float w = head.weight(x, e ? top.y : top.x, e ? log.y : log.x);
                        float d_weight = d[mt][n][2 * half + e];
                        if (EXTRAS)
                            d_weight = kept ? d_weight * p.pair.keep : 0;
                        float dx = w * (d_weight - (e ? delta.y : delta.x));
                        if (EXTRAS)
                            dx *= cap[mt][n][2 * half + e];
                        weight[e] = seen && kept ? w : 0;
                        gradient[e] = seen ? dx : 0;
                    }
                    const uint32_t at = to + (mt * 16 + half * 8) * InRows::PITCH + chunk;
                    write_two(at, weight[0], weight[1]);
                    write_two(at + T::PAIRS_BYTES, gradient[0], gradient[1]);
                }
        }
    }

    // sum += the pairs at `pairs`, this warp's keys, times its columns of the rows at `rows`.
    __device__ __forceinline__ void add_to_keys(float (&sum)[T::NC][2][4][4], int pairs,
                                                int rows) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const uint32_t a = base + pairs + warp / T::KEY_COLUMNS * 32 * InRows::PITCH +
                           InRows::at(g, t / 2) + t % 2 * 8;
        const auto left = [&](Split(&split_pairs)[2][4], int step) {
            const uint32_t at = (a ^ step % 4 * 32) + step / 4 * 128;
#pragma unroll
            for (int mt = 0; mt < 2; ++mt) {
                const float2 x = read_two(at + mt * 16 * InRows::PITCH),
                             y = read_two(at + (mt * 16 + 8) * InRows::PITCH);
                split(split_pairs[mt], x.x, y.x, x.y, y.y);
            }
        };
        add_tiles<D, ROWS, 2, T::NC>(
            sum, left, base + rows + warp % T::KEY_COLUMNS * T::NC * 128 + Rows<D>::at(2 * t, g));
    }

    // Of this step's part of d_query this warp's rows and columns, to the sums. Row 4 g + i of the 32 is row g + i % 2 * 8 of tile
    // i / 2 of mma: so are the pairs of four rows and a key read at once.
    __device__ __forceinline__ void add_queries(int h, int row, int stage) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const int first_row = warp / T::QUERY_COLUMNS * 32,
                  column = warp % T::QUERY_COLUMNS * T::QC * 32;
        const uint32_t a = base + T::D_SCORE_AT + InRows::at(2 * t, first_row / 4 + g),
                       odd = (a ^ 64) + InRows::PITCH;
        const auto left = [&](Split(&split_pairs)[2][4], int step) {
            const float4 x = load_floats(a + step * 8 * InRows::PITCH),
                         y = load_floats(odd + step * 8 * InRows::PITCH);
            split(split_pairs[0], x.x, x.y, y.x, y.y);
            split(split_pairs[1], x.z, x.w, y.z, y.w);
        };
        float sum[T::QC][2][4][4] = {};
        add_tiles<D, KEYS, 2, T::QC>(sum, left, base + column * 4 + Rows<D>::at(2 * t, g));
        const float4 exponents =
            *(const float4 *)(stats(stage) + 3 * ROWS + first_row + lane / 4 * 4);
        const double factor[4] = {wide_power_of_two(__float_as_int(exponents.x)),
                                  wide_power_of_two(__float_as_int(exponents.y)),
                                  wide_power_of_two(__float_as_int(exponents.z)),
                                  wide_power_of_two(__float_as_int(exponents.w))};
        int64_t *const to = sums_at<D>(p, seq, h, row + first_row, column) + lane;
#pragma unroll
        for (int c = 0; c < T::QC; ++c)
#pragma unroll
            for (int mt = 0; mt < 2; ++mt)
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        add_relaxed(to + (((c * 2 + mt) * 4 + i) * 4 + e) * 32,
                                    __double2ll_rn(sum[c][mt][i][e] * factor[mt * 2 + e / 2]));
    }

    __device__ __forceinline__ void store(const float (&sum)[T::NC][2][4][4], float factor,
                                          const fwd_view &v, int dim, bool aligned) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int first = warp / T::KEY_COLUMNS * 32 + lane / 4,
                  column = warp % T::KEY_COLUMNS * T::NC * 32 + lane % 4 * 8;
        const int64_t to =
            b * v.stride[0] + kv_head * v.stride[1] + (seq.k_start + key) * v.stride[2];
#pragma unroll
        for (int c = 0; c < T::NC; ++c)
#pragma unroll
            for (int mt = 0; mt < 2; ++mt)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int r = first + mt * 16 + half * 8;
                        float x[4];
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            x[i] = key + r < seq.k_len ? sum[c][mt][i][half * 2 + e] * factor : 0;
                        if (key + r < seq.k_rows)
                            store_four(v, to + r * v.stride[2], column + c * 32 + e * 4, dim,
                                       aligned, x);
                    }
    }
};

template <int D, int WARPS, int KEYS, int ROWS, bool EXTRAS>
__device__ __forceinline__ void bwd_sums(const bwd_params &p) {
    using T = SumsTile<D, WARPS, KEYS, ROWS>;
    extern __shared__ __align__(16) char shared[];
    const int blocks = (p.f.len_k + KEYS - 1) / KEYS, b = blockIdx.x / blocks / p.heads_kv,
              kv_head = blockIdx.x / blocks % p.heads_kv, key = blockIdx.x % blocks * KEYS;
    const BwdSequence seq(p, b);
    if (key >= seq.k_rows || is_odd(facts_of(p, b, kv_head)))
        return;
    const SumsBlock<D, WARPS, KEYS, ROWS, EXTRAS> block{
        p, seq, b, kv_head, key, shared, shared_address(shared)};
    const int first = seq.first_row(p, key) / ROWS * ROWS, end = seq.end_row(p, key, key + KEYS),
              first_head = kv_head * p.f.group;
    float d_key[T::NC][2][4][4] = {}, d_value[T::NC][2][4][4] = {};
    if (first < end) {
        block.load_keys();
        block.load_rows(first_head, first, 0);
    }
    int h = first < end ? first_head : first_head + p.f.group, row = first, stage = 0;
#pragma unroll 1
    while (h < first_head + p.f.group) {
        copy_wait<0>();
        __syncthreads(); // the rows are there, and all warps are done with the pairs of the step before
        block.make_pairs(h, row, stage);
        __syncthreads();
        if (p.d_value.data)
            block.add_to_keys(d_value, T::WEIGHT_AT, T::D_OUTPUT_AT);
        if (p.d_key.data)
            block.add_to_keys(d_key, T::D_SCORE_AT, T::QUERY_AT);
        __syncthreads(); // all warps are done with the rows
        const bool same = row + ROWS < end;
        const int next_h = same ? h : h + 1, next_row = same ? row + ROWS : first;
        if (next_h < first_head + p.f.group)
            block.load_rows(next_h, next_row, stage ^ 1);
        if (has_sums(p))
            block.add_queries(h, row, stage);
        h = next_h;
        row = next_row;
        stage ^= 1;
    }
    if (p.d_key.data)
        block.store(d_key, (float)p.f.scale, p.d_key, p.f.dim_qk, p.flags & BWD_ALIGNED_D_KEY);
    if (p.d_value.data)
        block.store(d_value, p.pair.keep, p.d_value, p.f.dim_v, p.flags & BWD_ALIGNED_D_VALUE);
}

// ---- d_query from its sums ----------------------------------------------------------------------------------------------

// BWD_STATS_ROWS rows of a head, SUM_ROWS and SUM_COLUMNS of a warp at a time.
template <int D>
__device__ __forceinline__ void bwd_finish(const bwd_params &p) {
    constexpr int TILES = BWD_STATS_ROWS / SUM_ROWS;
    const int blocks = (p.f.len_q + BWD_STATS_ROWS - 1) / BWD_STATS_ROWS;
    const int h = blockIdx.x / blocks % p.f.heads_q, b = blockIdx.x / blocks / p.f.heads_q,
              warp = threadIdx.x / 32, lane = threadIdx.x % 32,
              row = blockIdx.x % blocks * BWD_STATS_ROWS + warp % TILES * SUM_ROWS;
    const BwdSequence seq(p, b);
    if (row >= seq.q_rows || is_odd(facts_of(p, b, h / p.f.group)))
        return;
    const BwdHead<float> head{p, seq, b, h};
    const int *const exponents = (const int *)(stats_of(p, seq, h) + 3 * stats_plane(p));
    for (int c = warp / TILES; c < D / SUM_COLUMNS; c += FINISH_THREADS / 32 / TILES) {
        const int64_t *const sums = sums_at<D>(p, seq, h, row, c * SUM_COLUMNS) + lane;
#pragma unroll
        for (int mt = 0; mt < 2; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = row + lane / 4 * 4 + mt * 2 + half;
                const bool takes_part = i < seq.q_len;
                const double factor =
                    takes_part ? wide_power_of_two(-exponents[i]) * (float)p.f.scale : 0;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float x[4];
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const int64_t sum = __ldcs((const long long *)sums +
                                                   ((mt * 4 + n) * 4 + half * 2 + e) * 32);
                        x[n] = (float)((double)sum * factor);
                    }
                    if (i < seq.q_rows)
                        store_four(p.d_query, head.row(p.d_query, i),
                                   c * SUM_COLUMNS + lane % 4 * 8 + e * 4, p.f.dim_qk,
                                   p.flags & BWD_ALIGNED_D_QUERY, x);
                }
            }
    }
}

// ---- What cuda_bwd_simt computes -----------------------------------------------------------------------------------------

template <int D, int R, int C>
__device__ __forceinline__ void bwd_odd_keys(const bwd_params &p) {
    const int head = blockIdx.x / p.key_blocks;
    if (is_odd(facts_of(p, head / p.heads_kv, head % p.heads_kv)))
        bwd_keys<float, D, R, C>(p);
}

// All heads where slopes are wanted.
template <int D, int R, int C>
__device__ __forceinline__ void bwd_odd_rows(const bwd_params &p) {
    const Work work(p.f);
    if (!has_sums(p) || is_odd(facts_of(p, work.b, work.h / p.f.group)))
        bwd_rows<float, D, R, C>(p);
}
