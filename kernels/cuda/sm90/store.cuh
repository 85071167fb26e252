/*
 * From the registers of a warpgroup to output and lse.
 */
#ifndef DLATTN_SM90_STORE_CUH_
#define DLATTN_SM90_STORE_CUH_

#include "kernels/cuda/sm90/tile.cuh"

namespace sm90 {

template <typename E>
__device__ __forceinline__ float to_float(E x);
template <>
__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <typename E>
__device__ __forceinline__ E from_float(float x);
template <>
__device__ __forceinline__ __half from_float(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
    return __float2bfloat16_rn(x);
}

__device__ __forceinline__ int64_t row_offset(const sm90_params &p, const sm90_strides &strides,
                                              const Tile &t, int row) {
    const int head = (t.head << p.pack_log2) + (row & ((1 << p.pack_log2) - 1));
    return t.batch * strides.batch + head * strides.head + (row >> p.pack_log2) * strides.row;
}

template <typename E>
__device__ __forceinline__ void store_lse(const sm90_params &p, const Tile &t, int row, float x) {
    if (!p.lse)
        return;
    const int64_t at = row_offset(p, p.lse_strides, t, row);
    if (p.lse_is_element)
        static_cast<E *>(p.lse)[at] = from_float<E>(x);
    else
        static_cast<float *>(p.lse)[at] = x;
}

/* 4 x 4 transposition over the four threads of a row: register i of thread q becomes register q of thread i. */
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    uint32_t a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1),
             b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
    (odd ? w[0] : w[1]) = a;
    (odd ? w[2] : w[3]) = b;
    a = __shfl_xor_sync(~0u, upper ? w[0] : w[2], 2);
    b = __shfl_xor_sync(~0u, upper ? w[1] : w[3], 2);
    (upper ? w[0] : w[2]) = a;
    (upper ? w[1] : w[3]) = b;
}

/* One row by one warp, key by key, reading only the keys that it sees. A NaN or Inf in the value of a hidden key
 * spoils a tile's products (0 * NaN), so rows that came out non-finite are computed here
 * again; so are those whose weights overflowed. */
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
                score += to_float(query[32 * i + lane]) *
                         to_float(key[j * p.key_strides.row + 32 * i + lane]);
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
                            weight * to_float(value[j * p.value_strides.row + 32 * i + lane]);
        maximum = m;
    }
    E *out = static_cast<E *>(p.output) + row_offset(p, p.output_strides, t, row);
    for (int i = 0; i < kV; i++)
        if (32 * i + lane < p.dim_v)
            out[32 * i + lane] = from_float<E>(sum == 0 ? 0.f : output[i] / sum);
    if (lane == 0)
        store_lse<E>(p, t, row,
                     sum == 0 ? p.empty_lse
                              : (maximum * p.scale_log2 + log2f(sum)) * 0.69314718055994531f);
}

/* Normalises and stores the 64 rows of a warpgroup, and their lse. Registers are laid out as in Consumer. */
template <class C>
__device__ __forceinline__ void store_rows(const sm90_params &p, const Tile &t, int wg,
                                           const float (&output)[C::kDimV / 2],
                                           const float (&shift)[2], const float (&sum)[2]) {
    using E = typename C::Element;
    constexpr int kOutputs = C::kDimV / 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    uint32_t spoilt_threads[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = t.first_row + 64 * wg + 16 * warp + 8 * half + lane / 4;
        int low, high;
        row_bounds(p, t, row, low, high);
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const bool inside = row >> p.pack_log2 < p.len_q;
        const bool empty = low >= high;
        const float normalise = 1.f / total;
        uint32_t poison = 0; /* +0 or -0 in both halves while all is finite */
        uint32_t packed[kOutputs / 4];
#pragma unroll
        for (int i = 0; i < kOutputs / 4; i++) {
            packed[i] = pack<E>(output[4 * i + 2 * half] * normalise,
                                output[4 * i + 2 * half + 1] * normalise);
            poison = multiply_add_zero<E>(packed[i], poison);
            if (empty)
                packed[i] = 0;
        }
        spoilt_threads[half] = __ballot_sync(
            ~0u, inside && !empty &&
                     (poison & 0x7fff7fff || !(total < INFINITY) || shift[half] == -INFINITY));
        const bool spoilt = spoilt_threads[half] >> (lane & ~3) & 15;
        E *out = static_cast<E *>(p.output) + row_offset(p, p.output_strides, t, row);
#pragma unroll
        for (int i = 0; i < kOutputs / 16; i++) {
            uint32_t w[4] = {packed[4 * i], packed[4 * i + 1], packed[4 * i + 2],
                             packed[4 * i + 3]};
            transpose_quad(w);
            const int column = 32 * i + 8 * (lane & 3);
            if (inside && !spoilt && column < p.dim_v)
                *reinterpret_cast<uint4 *>(out + column) = make_uint4(w[0], w[1], w[2], w[3]);
        }
        if (inside && !spoilt && (lane & 3) == 0)
            store_lse<E>(p, t, row,
                         empty ? p.empty_lse : (shift[half] + log2f(total)) * 0.69314718055994531f);
    }
    if (spoilt_threads[0] | spoilt_threads[1])
        for (int i = 0; i < 16; i++)
            if ((i < 8 ? spoilt_threads[0] : spoilt_threads[1]) >> (4 * (i & 7)) & 15)
                exact_row<C>(p, t, t.first_row + 64 * wg + 16 * warp + i);
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

#endif /* DLATTN_SM90_STORE_CUH_ */
