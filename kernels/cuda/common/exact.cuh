// A row of the output and its lse by plain loops over global memory, slowly, whatever the layout: for the rare rows that tensor
// cores get wrong. Some have a NaN or an Inf in a value behind a mask, since P = 0 times those is NaN. For f32 others see
// an Inf, or a number next to it, which has no two parts.
#pragma once

#include "kernels/cuda/common/float8.cuh"
#include "kernels/cuda/common/pairs.cuh"
#include "kernels/cuda/common/sequence.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// E: elements of the output, and of the tensors that follow it; Sum: what products and sums are computed in; C: elements of keys and
// values, of which float8 may have scales; DV: most columns of the output; Q: elements of queries, float8 being e4m3; PAIRS: with the
// options of pair_params.
template <typename E, typename Sum, typename C = E, int DV = 256, typename Q = E,
          bool PAIRS = false>
struct ExactRow {
    const fwd_params &p;
    const Sequence &seq;
    const int b, h, i;
    const pair_params *pair = nullptr; // PAIRS

    template <typename T = E>
    __device__ static Sum load(const void *data, int64_t at) {
        return (float)((const T *)data)[at];
    }

    __device__ static Sum load_query(const void *data, int64_t at) {
        if constexpr (is_float8<Q>)
            return float8_at(data, at, false);
        else
            return load<Q>(data, at);
    }

    // An element of keys or values.
    __device__ static Sum load_cached(const fwd_view &v, int64_t at, bool e5m2) {
        if constexpr (is_float8<C>)
            return float8_at(v.data, at, e5m2);
        else
            return load<C>(v.data, at);
    }

    __device__ int64_t key_row(const fwd_view &v, int j) const {
        const int64_t head = h / p.group * v.stride[1];
        if (!p.page_size)
            return b * v.stride[0] + head + (seq.k_start + j) * v.stride[2];
        return head + paged_row(p, v, b, j);
    }

    __device__ PairOptions options() const { return {p, *pair, seq, b, h}; }

    // -inf for a key that the row does not see.
    __device__ Sum logit(int j) const {
        if (j < seq.first_key(p, i) || j >= seq.end_key(p, i))
            return -INFINITY;
        const auto at = [&](const fwd_view &v) {
            return b * v.stride[0] + h * v.stride[1] + i * v.stride[2] + j * v.stride[3];
        };
        if constexpr (PAIRS) {
            if (!options().visible(i, j))
                return -INFINITY;
        } else if (p.mask.data && !((const uint8_t *)p.mask.data)[at(p.mask)]) {
            return -INFINITY;
        }
        const int64_t q =
            b * p.query.stride[0] + h * p.query.stride[1] + (seq.q_start + i) * p.query.stride[2];
        const int64_t k = key_row(p.key, j);
        Sum x = 0;
        for (int d = 0; d < p.dim_qk; ++d)
            x = fma(load_query(p.query.data, q + d * p.query.stride[3]),
                    load_cached(p.key, k + d * p.key.stride[3], p.flags & FWD_KEY_E5M2), x);
        x *= (Sum)p.scale;
        if constexpr (is_float8<C>)
            x *= (Sum)scale_at(p.query_scale, b, h) * (Sum)scale_at(p.key_scale, b, h / p.group);
        if (p.softcap > 0)
            x = (Sum)p.softcap * tanh(x / (Sum)p.softcap);
        if (p.bias.data)
            x += p.flags & FWD_BIAS_F32 ? load<float>(p.bias.data, at(p.bias))
                                        : load(p.bias.data, at(p.bias));
        if (p.alibi_slopes.data)
            x -= load<float>(p.alibi_slopes.data,
                             b * p.alibi_slopes.stride[0] + h * p.alibi_slopes.stride[1]) *
                 (Sum)abs(i + seq.diagonal - j);
        return x;
    }

    // A NaN among the logits makes the whole row NaN, which is found before more work is done.
    __device__ void write() const {
        const int lane = threadIdx.x % 32, first = seq.first_key(p, i), end = seq.end_key(p, i);
        const Sum sink =
            p.sinks.data ? load<float>(p.sinks.data, h * p.sinks.stride[1]) : (Sum)-INFINITY;
        Sum top = sink;
        bool nan = false;
        for (int base = first; base < end && !nan; base += 32) {
            const Sum x = base + lane < end ? logit(base + lane) : (Sum)-INFINITY;
            nan = __any_sync(~0u, isnan(x));
            top = fmax(top, x);
        }
        for (int step = 16; step; step /= 2)
            top = fmax(top, __shfl_xor_sync(~0u, top, step));
        Sum total = 0, out[DV / 32] = {}; // columns lane + 32 * c
        for (int base = first; base < end && !nan; base += 32) {
            const Sum x = base + lane < end ? logit(base + lane) : (Sum)-INFINITY;
            const Sum weight = x == -INFINITY ? 0 : exp(x - top);
            total += weight;
            bool counts = x != -INFINITY;
            if constexpr (PAIRS)
                counts = counts && !(pair->dropout && options().dropped(i, base + lane));
            for (unsigned left = __ballot_sync(~0u, counts); left; left &= left - 1) {
                const int who = __ffs(left) - 1;
                const Sum w = __shfl_sync(~0u, weight, who);
                const int64_t v = key_row(p.value, base + who);
#pragma unroll
                for (int c = 0; c < DV / 32; ++c)
                    if (lane + 32 * c < p.dim_v)
                        out[c] = fma(w,
                                     load_cached(p.value, v + (lane + 32 * c) * p.value.stride[3],
                                                 p.flags & FWD_VALUE_E5M2),
                                     out[c]);
            }
        }
        for (int step = 16; step; step /= 2)
            total += __shfl_xor_sync(~0u, total, step);
        const bool empty = total == 0 && !nan;
        total = nan ? (Sum)NAN : sink > -INFINITY ? total + exp(sink - top) : total;
        Sum over = total; // what the output is divided by
        if constexpr (is_float8<C>)
            over /= (Sum)scale_at(p.value_scale, b, h / p.group);
        if constexpr (PAIRS)
            over *= (Sum)(1 - pair->dropout_probability);
        const int64_t row = seq.q_start + i;
        E *const to = (E *)p.output.data + b * p.output.stride[0] + h * p.output.stride[1] +
                      row * p.output.stride[2];
#pragma unroll
        for (int c = 0; c < DV / 32; ++c)
            if (lane + 32 * c < p.dim_v)
                to[(lane + 32 * c) * p.output.stride[3]] = E(empty ? 0.0f : (float)(out[c] / over));
        if (!p.lse.data || lane != 0)
            return;
        const Sum none = p.flags & FWD_EMPTY_LSE_INF ? INFINITY : -INFINITY;
        const float lse = total == 0 ? none : top + log(total);
        const int64_t at = b * p.lse.stride[0] + h * p.lse.stride[1] + row * p.lse.stride[2];
        if (p.flags & FWD_LSE_F32)
            ((float *)p.lse.data)[at] = lse;
        else
            ((E *)p.lse.data)[at] = E(lse);
    }
};

// Rows [row, end) of a head, by one warp, over what it has written before.
template <typename E, typename Sum, typename C = E, int DV = 256, typename Q = E>
__device__ __noinline__ void write_rows_exactly(const fwd_params &p, int b, int h, int row, int end,
                                                int diagonal_offset = 0) {
    Sequence seq(p, b);
    seq.diagonal += diagonal_offset;
    __syncwarp();
    for (int i = row; i < min(end, seq.q_len); ++i)
        ExactRow<E, Sum, C, DV, Q>{p, seq, b, h, i}.write();
}

// The same with the options of pair_params.
template <typename E, typename Sum>
__device__ __noinline__ void write_rows_exactly(const fwd_params &p, const pair_params &pair, int b,
                                                int h, int row, int end) {
    Sequence seq(p, b);
    seq.diagonal += pair.diagonal_offset;
    __syncwarp();
    for (int i = row; i < min(end, seq.q_len); ++i)
        ExactRow<E, Sum, E, 256, E, true>{p, seq, b, h, i, &pair}.write();
}
