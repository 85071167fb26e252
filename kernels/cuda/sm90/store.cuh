// From the registers of a warpgroup to output and lse.
#pragma once

#include "kernels/cuda/common/sixteen_bit.cuh"
#include "kernels/cuda/sm90/pipeline.cuh"

#include <float.h>

// With ALiBi, where top is a guess: rows whose sum is below this are computed by exact_row().
constexpr float ALIBI_LOST = 0x1p-80f;

// Whether the exponents of a row are of no use, its weights being relative to 2^top. Those of HAS_EXPONENTS lose nothing, up to the end of
// the range. A top of -inf is that of a row that sees nothing, which is known of its bounds alone, or of one whose logits have no exponent
// in f32 (below -2.4e38). Masks and biases may hide all keys of many rows, and then the second is given up: to look again costs a walk
// over all keys.
template <class C>
__device__ __forceinline__ bool is_far(const sm90_params &p, float top) {
    if (C::IS_PLACED && top == -INFINITY)
        return !(C::IS_ANY || C::COPIES_BIAS || C::LOADS_BIAS);
    const bool loses = C::IS_ANY ? p.exponent_scale != 1 : !C::HAS_EXPONENTS;
    return !(fabsf(top) < (loses ? EXACT_FROM : FLT_MAX));
}

template <class C>
__device__ __forceinline__ int64_t row_offset(const sm90_params &p, const sm90_strides &strides,
                                              const Place<C> &t, int row) {
    const int head = (t.head << p.pack_log2) + (row & ((1 << p.pack_log2) - 1));
    int64_t of_tensor = row >> p.pack_log2;
    if constexpr (C::IS_PACKED)
        of_tensor += t.q_start;
    return t.batch * strides.batch + head * strides.head + of_tensor * strides.row;
}

// Whether row `row` of the tile is one of the output's.
template <class C>
__device__ __forceinline__ bool is_row(const sm90_params &p, const Place<C> &t, int row) {
    if constexpr (C::IS_PACKED)
        return row >> p.pack_log2 < t.q_rows;
    return row >> p.pack_log2 < p.len_q;
}

// Element `at` of a tensor of the output's dtype.
template <class C>
__device__ __forceinline__ void store_element(const sm90_params &p, void *tensor, int64_t at,
                                              float x) {
    if constexpr (!C::IS_FLOAT8)
        static_cast<typename C::Element *>(tensor)[at] = typename C::Element(x);
    else if (p.output_dtype == SM90_F32)
        static_cast<float *>(tensor)[at] = x;
    else if (p.output_dtype == SM90_F16)
        static_cast<__half *>(tensor)[at] = __half(x);
    else
        static_cast<__nv_bfloat16 *>(tensor)[at] = __nv_bfloat16(x);
}

template <class C>
__device__ __forceinline__ void store_lse(const sm90_params &p, const Place<C> &t, int row,
                                          float x) {
    if (!p.lse)
        return;
    const int64_t at = row_offset<C>(p, p.lse_strides, t, row);
    if (p.lse_is_element)
        store_element<C>(p, p.lse, at, x);
    else
        static_cast<float *>(p.lse)[at] = x;
}

// -inf: none.
template <class C>
__device__ __forceinline__ float sink_of(const sm90_params &p, const Place<C> &t, int row) {
    if (!p.sinks)
        return -INFINITY;
    const int head = (t.head << p.pack_log2) + (row & ((1 << p.pack_log2) - 1));
    return __ldg(p.sinks + head * p.sinks_stride);
}

template <class C>
__device__ __forceinline__ float slope_of(const sm90_params &p, const Place<C> &t, int row) {
    const int head = (t.head << p.pack_log2) + (row & ((1 << p.pack_log2) - 1));
    return __ldg(p.alibi_slopes + t.batch * p.alibi_batch_stride + head * p.alibi_head_stride);
}

// Where the rows of one tensor of keys are that a tile sees.
template <class C>
struct KeyRows {
    using E = typename C::Cached;
    const E *head;
    int64_t stride;

    __device__ __forceinline__ KeyRows(const sm90_params &p, const void *tensor,
                                       const sm90_strides &strides, const Tile<C> &t)
        : head(static_cast<const E *>(tensor) + t.batch * strides.batch + t.kv_head * strides.head),
          stride(strides.row) {
        if (C::IS_PLACED && p.block_table)
            head -= t.batch * strides.batch;
        if constexpr (C::IS_PACKED) {
            if (!p.block_table)
                head += t.k_start * stride;
        }
    }
    __device__ __forceinline__ const E *row(const sm90_params &p, const sm90_strides &strides,
                                            const Tile<C> &t, int j) const {
        if constexpr (C::IS_PLACED) {
            if (p.block_table) {
                const PageRow at = page_row(p, t.batch, j);
                return head + at.page * strides.batch + at.row * stride;
            }
        }
        return head + j * stride;
    }
};

template <class C>
__device__ __forceinline__ float empty_lse(const sm90_params &p, const Place<C> &t, int row) {
    const float sink = sink_of<C>(p, t, row);
    return sink > -INFINITY ? sink : p.empty_lse;
}

template <class C>
__device__ __forceinline__ int query_segment(const sm90_params &p, const Tile<C> &t, int row) {
    const int i = min(row >> p.pack_log2, t.q_rows - 1) + t.q_start;
    return __ldg(p.query_segments + t.batch * p.query_segments_strides.batch +
                 i * p.query_segments_strides.row);
}
template <class C>
__device__ __forceinline__ int key_segment(const sm90_params &p, const Tile<C> &t, int j) {
    return __ldg(p.key_segments + t.batch * p.key_segments_strides.batch +
                 (t.k_start + j) * p.key_segments_strides.row);
}

// Of row `row` and key j of a tile, both inside the tensor. Where rows have a bias or a mask, heads share no tile.
template <class C>
__device__ __forceinline__ float bias_of(const sm90_params &p, const Place<C> &t, int row, int j) {
    const int64_t at = t.batch * p.bias.batch + t.head * p.bias.head + row * p.bias.row +
                       static_cast<int64_t>(j) * p.bias.key;
    if (p.bias_is_f32)
        return __ldg(static_cast<const float *>(p.bias.data) + at);
    return float(__ldg(static_cast<const typename C::Element *>(p.bias.data) + at));
}

// What the options make of a scaled score.
template <class C>
__device__ __forceinline__ float logit(const sm90_params &p, const Tile<C> &t, int row, int j,
                                       float score) {
    const int64_t batch = t.batch, head = t.head;
    if (C::IS_ANY && p.mask.data &&
        !static_cast<const uint8_t *>(p.mask.data)[batch * p.mask.batch + head * p.mask.head +
                                                   row * p.mask.row + j * p.mask.key])
        return -INFINITY;
    if constexpr (C::IS_ANY) {
        if (p.query_segments && query_segment(p, t, row) != key_segment(p, t, j))
            return -INFINITY;
    }
    if ((C::IS_ANY || C::HAS_SOFTCAP) && p.softcap > 0)
        score = p.softcap * tanhf(score / p.softcap);
    if constexpr (C::COPIES_BIAS || C::LOADS_BIAS)
        score += bias_of<C>(p, t, row, j);
    if ((C::IS_ANY || C::HAS_ALIBI) && p.alibi_slopes)
        score -= slope_of<C>(p, t, row) * abs((row >> p.pack_log2) + t.diagonal - j);
    return score;
}

// One row by one warp, key by key, reading only the keys that it sees. A NaN or Inf in the value of a hidden key
// spoils a tile's products (0 * NaN), so rows that came out non-finite are computed here
// again; so are those whose weights overflowed, those whose top is past EXACT_FROM, and those that see no key.
template <class C>
__device__ __forceinline__ void exact_row(const sm90_params &p, const Tile<C> &t, int row) {
    using Query = typename C::Query;
    using Cached = typename C::Cached;
    constexpr int QK_WORDS = (C::DIM_QK + 31) / 32, V_WORDS = (C::DIM_V + 31) / 32;
    const int lane = thread<C>() & 31;
    const Scales scales = scales_of<C>(p, t, row);
    // Sinks and what options make of scores are no products.
    const bool is_scaled = C::IS_PLACED || p.sinks;
    const float scale_log2 = is_scaled ? LOG2E : p.scale_log2, scale = is_scaled ? 1 : p.scale;
    int low, high;
    row_bounds(p, t, row, low, high);
    const Query *query =
        static_cast<const Query *>(p.query) + row_offset<C>(p, p.query_strides, t, row);
    const KeyRows<C> keys(p, p.key, p.key_strides, t), values(p, p.value, p.value_strides, t);
    float top = sink_of<C>(p, t, row), sum = top > -INFINITY, output[V_WORDS] = {};
    for (int j = low; j < high; j++) {
        const Cached *const key = keys.row(p, p.key_strides, t, j), *const value = values.row(
                                                                        p, p.value_strides, t, j);
        float score = 0;
        for (int i = 0; i < QK_WORDS; i++)
            if (32 * i + lane < p.dim_qk)
                score += float(query[32 * i + lane]) * float(key[32 * i + lane]);
        for (int i = 16; i > 0; i /= 2)
            score += __shfl_xor_sync(~0u, score, i);
        if constexpr (C::IS_PLACED)
            score = logit(p, t, row, j, score * scales.score);
        else if (is_scaled)
            score *= scales.score;
        if (score == -INFINITY)
            continue;
        const float m = fmaxf(top, score);
        const float factor = exp2f((top - m) * scale_log2),
                    weight = exp2f((score - m) * scale_log2);
        sum = sum * factor + weight;
        for (int i = 0; i < V_WORDS; i++)
            if (32 * i + lane < p.dim_v)
                output[i] = output[i] * factor + weight * float(value[32 * i + lane]);
        top = m;
    }
    const int64_t out = row_offset<C>(p, p.output_strides, t, row);
    for (int i = 0; i < V_WORDS; i++)
        if (32 * i + lane < p.dim_v)
            store_element<C>(p, p.output, out + 32 * i + lane,
                             sum == 0 ? 0.f : output[i] / sum * scales.value);
    if (lane == 0)
        store_lse<C>(p, t, row, sum == 0 ? p.empty_lse : top * scale + logf(sum));
}

// Adds a row's sink to the sum of its weights, which are relative to 2^top; what the output is to be multiplied by.
__device__ __forceinline__ float add_sink(float sink, float &top, float &total) {
    const float exponent = sink * LOG2E, higher = fmaxf(top, exponent);
    if (!(exponent > -INFINITY))
        return reciprocal_approx(total);
    const float factor = exp2_approx(top - higher);
    total = total * factor + exp2_approx(exponent - higher);
    top = higher;
    return factor * reciprocal_approx(total);
}

// SPLIT: the 64 rows of a warpgroup as they are in registers, not normalised, and what they are relative to.
template <class C>
__device__ __forceinline__ void store_part(const sm90_params &p, int wg, const Place<C> &t,
                                           const float (&output)[C::DIM_V / 2],
                                           const float (&top)[2], const float (&sum)[2]) {
    const int lane = threadIdx.x & 31, strip = 4 * wg + threadIdx.x / 32 % 4;
    const int64_t at = static_cast<int64_t>(t.index) * (C::TILE_Q / 16) + strip;
    float4 *const to =
        reinterpret_cast<float4 *>(p.split.outputs) + at * (C::DIM_V / 8) * 32 + lane;
#pragma unroll
    for (int i = 0; i < C::DIM_V / 8; i++)
        to[32 * i] =
            make_float4(output[4 * i], output[4 * i + 1], output[4 * i + 2], output[4 * i + 3]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if ((lane & 3) == 0)
            reinterpret_cast<float2 *>(p.split.sums)[16 * at + 8 * half + lane / 4] =
                make_float2(top[half], total);
    }
}

// Normalises and stores the 64 rows of a warpgroup, and their lse. Registers are laid out as in Consumer. Each warp
// writes its 16 rows to shared memory, 64 columns at a time and swizzled by 16 bytes as TMA reads them.
template <class C>
__device__ __forceinline__ void store_rows(const sm90_params &p, const Shared<C> &s, int wg,
                                           const Place<C> &t, const float (&output)[C::DIM_V / 2],
                                           const float (&row_top)[2], const float (&sum)[2]) {
    if constexpr (C::IS_SPLIT) {
        store_part<C>(p, wg, t, output, row_top, sum);
        return;
    }
    using E = typename C::Element;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    const int first_row = t.first_row + 64 * wg + 16 * warp;
    float total[2], normalise[2], top[2] = {row_top[0], row_top[1]};
    uint32_t poison[2] = {0, 0}; // +0 or -0 in both halves while all is finite
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = sum[half];
        total[half] += __shfl_xor_sync(~0u, total[half], 1);
        total[half] += __shfl_xor_sync(~0u, total[half], 2);
        if (C::HAS_ALIBI && total[half] < ALIBI_LOST && top[half] > -INFINITY)
            total[half] = NAN;
        normalise[half] = reciprocal_approx(total[half]);
        if (C::IS_PLACED && total[half] == 0)
            normalise[half] = 0;
        if (p.sinks)
            normalise[half] =
                add_sink(sink_of<C>(p, t, first_row + 8 * half + lane / 4), top[half], total[half]);
    }
    const uint32_t row_of_lane =
        s.output(wg, warp) + 128 * (lane & 15) + ((lane >> 4 ^ (lane & 7)) << 4);
#pragma unroll
    for (int column = 0; column < C::COLUMNS_V; column++) {
        const uint32_t slot = column % C::OUTPUT_SLOTS * C::SLOT_BYTES;
        if (lane == 0)
            bulk_wait_read<C::OUTPUT_SLOTS - 1>();
        __syncwarp();
#pragma unroll
        for (int i = 4 * column; i < 4 * column + 4 && 16 * i < C::DIM_V; i++) {
            uint32_t w[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int half = j & 1;
                w[j] = pack<E>(output[8 * i + 2 * j] * normalise[half],
                               output[8 * i + 2 * j + 1] * normalise[half]);
                poison[half] = multiply_add_zero<E>(w[j], poison[half]);
            }
            store_matrices((row_of_lane + slot) ^ i % 4 << 5, w);
        }
        async_proxy_fence();
        __syncwarp();
        if (lane == 0 && (!C::IS_PLACED || is_row<C>(p, t, first_row))) {
            const RowCoordinates at = row_coordinates<C>(p, t, first_row);
            tma_store_5d(&p.output_map, s.output(wg, warp) + slot, 64 * column,
                         first_row & ((1 << p.pack_log2) - 1), at.c2, at.c3, at.c4);
            bulk_commit();
        }
    }
    uint32_t spoilt_threads[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half + lane / 4;
        const bool inside = is_row<C>(p, t, row);
        // Rows that see no key, or whose scores are all -inf, have a top of -inf.
        spoilt_threads[half] =
            __ballot_sync(~0u, inside && (poison[half] & 0x7fff7fff || !(total[half] < INFINITY) ||
                                          is_far<C>(p, top[half])));
    }
    if (p.lse && (lane & 2) == 0) {
        const int half = lane & 1, row = first_row + 8 * half + lane / 4;
        const bool spoilt = (half ? spoilt_threads[1] : spoilt_threads[0]) >> (lane & ~3) & 15;
        const bool empty = C::IS_PLACED && (half ? total[1] : total[0]) == 0;
        if (is_row<C>(p, t, row) && !spoilt)
            store_lse<C>(
                p, t, row,
                empty ? p.empty_lse
                      : ((half ? top[1] : top[0]) + log2_approx(half ? total[1] : total[0])) * LN2);
    }
    if (__builtin_expect(spoilt_threads[0] | spoilt_threads[1], 0)) {
        const Tile<C> tile = tile_at<C>(p, t.index);
        if (lane == 0)
            bulk_wait_written();
        __syncwarp();
        for (int i = 0; i < 16; i++)
            if ((i < 8 ? spoilt_threads[0] : spoilt_threads[1]) >> (4 * (i & 7)) & 15)
                exact_row<C>(p, tile, first_row + i);
    }
}

// Rows of a tile that sees no key.
template <class C>
__device__ __forceinline__ void store_empty(const sm90_params &p, const Tile<C> &t, int wg) {
    for (int i = thread<C>() / 16 % 8; i < 64; i += 8) {
        const int row = t.first_row + 64 * wg + i;
        if (!is_row<C>(p, t, row))
            break;
        const int64_t at = row_offset<C>(p, p.output_strides, t, row);
        if constexpr (C::IS_FLOAT8) {
            for (int column = thread<C>() % 16; column < p.dim_v; column += 16)
                store_element<C>(p, p.output, at + column, 0);
        } else {
            auto *const out = static_cast<typename C::Element *>(p.output) + at;
            for (int column = 8 * (thread<C>() % 16); column < p.dim_v; column += 128)
                *reinterpret_cast<uint4 *>(out + column) = make_uint4(0, 0, 0, 0);
        }
        if (thread<C>() % 16 == 0)
            store_lse<C>(p, t, row, empty_lse<C>(p, t, row));
    }
}
