/*
 * From the registers of a warpgroup to output and lse.
 */
#pragma once

#include "kernels/cuda/sm90/pipeline.cuh"

namespace sm90 {

/* A shift is a maximum times scale_log2 and rounded. What it lost, all weights of the row have in common, so it cancels while
 * they stay in range. From here on it has no fraction left, and exact_row() computes the row. */
constexpr float kExactFrom = 1 << 24;

__device__ __forceinline__ int64_t row_offset(const sm90_params &p, const sm90_strides &strides,
                                              const Place &t, int row) {
    const int head = (t.head << p.pack_log2) + (row & ((1 << p.pack_log2) - 1));
    return t.batch * strides.batch + head * strides.head + (row >> p.pack_log2) * strides.row;
}

template <typename E>
__device__ __forceinline__ void store_lse(const sm90_params &p, const Place &t, int row, float x) {
    if (!p.lse)
        return;
    const int64_t at = row_offset(p, p.lse_strides, t, row);
    if (p.lse_is_element)
        static_cast<E *>(p.lse)[at] = E(x);
    else
        static_cast<float *>(p.lse)[at] = x;
}

/* One row by one warp, key by key, reading only the keys that it sees. A NaN or Inf in the value of a hidden key
 * spoils a tile's products (0 * NaN), so rows that came out non-finite are computed here
 * again; so are those whose weights overflowed, those whose shift is past kExactFrom, and those that see no key. */
template <class C>
__device__ __forceinline__ void exact_row(const sm90_params &p, const Tile &t, int row) {
    using E = typename C::Element;
    constexpr int kQk = (C::kDimQk + 31) / 32, kV = (C::kDimV + 31) / 32;
    const int lane = threadIdx.x & 31;
    int low, high;
    row_bounds(p, t, row, low, high);
    const E *query = static_cast<const E *>(p.query) + row_offset(p, p.query_strides, t, row);
    const E *key = static_cast<const E *>(p.key) + t.batch * p.key_strides.batch +
                   t.kv_head * p.key_strides.head;
    const E *value = static_cast<const E *>(p.value) + t.batch * p.value_strides.batch +
                     t.kv_head * p.value_strides.head;
    float maximum = -INFINITY, sum = 0, output[kV] = {};
    for (int j = low; j < high; j++) {
        float score = 0;
        for (int i = 0; i < kQk; i++)
            if (32 * i + lane < p.dim_qk)
                score +=
                    float(query[32 * i + lane]) * float(key[j * p.key_strides.row + 32 * i + lane]);
        for (int i = 16; i > 0; i /= 2)
            score += __shfl_xor_sync(~0u, score, i);
        if (C::kSoftcap)
            score = p.softcap * tanhf(score * p.scale / p.softcap);
        if (score == -INFINITY)
            continue;
        const float m = fmaxf(maximum, score);
        const float factor = exp2f((maximum - m) * p.scale_log2),
                    weight = exp2f((score - m) * p.scale_log2);
        sum = sum * factor + weight;
        for (int i = 0; i < kV; i++)
            if (32 * i + lane < p.dim_v)
                output[i] = output[i] * factor +
                            weight * float(value[j * p.value_strides.row + 32 * i + lane]);
        maximum = m;
    }
    E *out = static_cast<E *>(p.output) + row_offset(p, p.output_strides, t, row);
    for (int i = 0; i < kV; i++)
        if (32 * i + lane < p.dim_v)
            out[32 * i + lane] = E(sum == 0 ? 0.f : output[i] / sum);
    if (lane == 0)
        store_lse<E>(p, t, row,
                     sum == 0 ? p.empty_lse : maximum * (C::kSoftcap ? 1 : p.scale) + logf(sum));
}

/* Normalises and stores the 64 rows of a warpgroup, and their lse. Registers are laid out as in Consumer. Each warp
 * writes its 16 rows to shared memory, 64 columns at a time and swizzled by 16 bytes as TMA reads them. */
template <class C>
__device__ __forceinline__ void store_rows(const sm90_params &p, const Shared<C> &s, int wg,
                                           const Place &t, const float (&output)[C::kDimV / 2],
                                           const float (&shift)[2], const float (&sum)[2]) {
    using E = typename C::Element;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    const int first_row = t.first_row + 64 * wg + 16 * warp;
    float total[2], normalise[2];
    uint32_t poison[2] = {0, 0}; /* +0 or -0 in both halves while all is finite */
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = sum[half];
        total[half] += __shfl_xor_sync(~0u, total[half], 1);
        total[half] += __shfl_xor_sync(~0u, total[half], 2);
        normalise[half] = reciprocal_approx(total[half]);
    }
    const uint32_t row_of_lane =
        s.output(wg, warp) + 128 * (lane & 15) + ((lane >> 4 ^ (lane & 7)) << 4);
#pragma unroll
    for (int column = 0; column < C::kColumnsV; column++) {
        const uint32_t slot = column % C::kOutputSlots * C::kSlotBytes;
        if (lane == 0)
            bulk_wait_read<C::kOutputSlots - 1>();
        __syncwarp();
#pragma unroll
        for (int i = 4 * column; i < 4 * column + 4 && 16 * i < C::kDimV; i++) {
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
        if (lane == 0) {
            tma_store_5d(&p.output_map, s.output(wg, warp) + slot, 64 * column,
                         first_row & ((1 << p.pack_log2) - 1), first_row >> p.pack_log2, t.head,
                         t.batch);
            bulk_commit();
        }
    }
    uint32_t spoilt_threads[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half + lane / 4;
        const bool inside = row >> p.pack_log2 < p.len_q;
        /* Rows that see no key, or whose scores are all -inf, have no shift: -inf. */
        spoilt_threads[half] =
            __ballot_sync(~0u, inside && (poison[half] & 0x7fff7fff || !(total[half] < INFINITY) ||
                                          !(fabsf(shift[half]) < kExactFrom)));
    }
    if (p.lse && (lane & 2) == 0) {
        const int half = lane & 1, row = first_row + 8 * half + lane / 4;
        const bool spoilt = (half ? spoilt_threads[1] : spoilt_threads[0]) >> (lane & ~3) & 15;
        if (row >> p.pack_log2 < p.len_q && !spoilt)
            store_lse<E>(p, t, row,
                         ((half ? shift[1] : shift[0]) + log2_approx(half ? total[1] : total[0])) *
                             0.69314718055994531f);
    }
    if (__builtin_expect(spoilt_threads[0] | spoilt_threads[1], 0)) {
        const Tile tile = tile_at<C>(p, t.index);
        if (lane == 0)
            bulk_wait_written();
        __syncwarp();
        for (int i = 0; i < 16; i++)
            if ((i < 8 ? spoilt_threads[0] : spoilt_threads[1]) >> (4 * (i & 7)) & 15)
                exact_row<C>(p, tile, first_row + i);
    }
}

/* Rows of a tile that sees no key. */
template <class C>
__device__ __forceinline__ void store_empty(const sm90_params &p, const Tile &t, int wg) {
    using E = typename C::Element;
    for (int i = threadIdx.x / 16 % 8; i < 64; i += 8) {
        const int row = t.first_row + 64 * wg + i;
        if (row >> p.pack_log2 >= p.len_q)
            break;
        E *out = static_cast<E *>(p.output) + row_offset(p, p.output_strides, t, row);
        for (int column = 8 * (threadIdx.x % 16); column < p.dim_v; column += 128)
            *reinterpret_cast<uint4 *>(out + column) = make_uint4(0, 0, 0, 0);
        if (threadIdx.x % 16 == 0)
            store_lse<E>(p, t, row, p.empty_lse);
    }
}

} // namespace sm90
