// The output of a few rows by plain loops over global memory, for rows whose masked keys have values that are NaN or Inf:
// the one case that a product with P = 0 gets wrong. A warp does a row at a time, slowly, whatever the layout.
#pragma once

#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/sequence.cuh"

template <typename E>
struct ExactRow {
    const fwd_params &p;
    const Sequence &seq;
    const int b, h, i;

    __device__ static float load(const void *data, int64_t at) {
        return Element<E>::widen(((const uint16_t *)data)[at]);
    }

    __device__ int64_t key_row(const fwd_view &v, int j) const {
        const int64_t head = h / p.group * v.stride[1];
        if (!p.page_size)
            return b * v.stride[0] + head + (seq.k_start + j) * v.stride[2];
        return head + paged_row(p, v, b, j);
    }

    // -inf for a key that the row does not see.
    __device__ float logit(int j) const {
        if (j < seq.first_key(p, i) || j >= seq.end_key(p, i))
            return -INFINITY;
        const auto at = [&](const fwd_view &v) {
            return b * v.stride[0] + h * v.stride[1] + i * v.stride[2] + j * v.stride[3];
        };
        if (p.mask.data && !((const uint8_t *)p.mask.data)[at(p.mask)])
            return -INFINITY;
        const int64_t q =
            b * p.query.stride[0] + h * p.query.stride[1] + (seq.q_start + i) * p.query.stride[2];
        const int64_t k = key_row(p.key, j);
        float x = 0;
        for (int d = 0; d < p.dim_qk; ++d)
            x = fmaf(load(p.query.data, q + d * p.query.stride[3]),
                     load(p.key.data, k + d * p.key.stride[3]), x);
        x *= (float)p.scale;
        if (p.softcap > 0)
            x = (float)p.softcap * tanhf(x / (float)p.softcap);
        if (p.bias.data)
            x += p.flags & FWD_BIAS_F32 ? ((const float *)p.bias.data)[at(p.bias)]
                                        : load(p.bias.data, at(p.bias));
        if (p.alibi_slopes.data)
            x -= ((const float *)p.alibi_slopes
                      .data)[b * p.alibi_slopes.stride[0] + h * p.alibi_slopes.stride[1]] *
                 abs(i + seq.diagonal - j);
        return x;
    }

    __device__ void write() const {
        const int lane = threadIdx.x % 32, first = seq.first_key(p, i), end = seq.end_key(p, i);
        float top = -INFINITY;
        for (int j = first + lane; j < end; j += 32)
            top = fmaxf(top, logit(j));
        for (int step = 16; step; step /= 2)
            top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        if (p.sinks.data)
            top = fmaxf(top, ((const float *)p.sinks.data)[h * p.sinks.stride[1]]);
        float total = 0, out[8] = {}; // columns lane + 32 * c
        for (int base = first; base < end; base += 32) {
            const float x = base + lane < end ? logit(base + lane) : -INFINITY;
            const float weight = x == -INFINITY ? 0 : __expf(x - top);
            total += weight;
            for (unsigned left = __ballot_sync(~0u, x != -INFINITY); left; left &= left - 1) {
                const int who = __ffs(left) - 1;
                const float w = __shfl_sync(~0u, weight, who);
                const int64_t v = key_row(p.value, base + who);
#pragma unroll
                for (int c = 0; c < 8; ++c)
                    if (lane + 32 * c < p.dim_v)
                        out[c] = fmaf(
                            w, load(p.value.data, v + (lane + 32 * c) * p.value.stride[3]), out[c]);
            }
        }
        for (int step = 16; step; step /= 2)
            total += __shfl_xor_sync(~0u, total, step);
        if (total == 0)
            return; // zeros are there already
        if (p.sinks.data)
            total += __expf(((const float *)p.sinks.data)[h * p.sinks.stride[1]] - top);
        uint16_t *const to = (uint16_t *)p.output.data + b * p.output.stride[0] +
                             h * p.output.stride[1] + (seq.q_start + i) * p.output.stride[2];
#pragma unroll
        for (int c = 0; c < 8; ++c)
            if (lane + 32 * c < p.dim_v)
                to[(lane + 32 * c) * p.output.stride[3]] =
                    (uint16_t)Element<E>::pack(out[c] / total, 0);
    }
};

// Rows [row, end) of a head, by one warp, over what it has written before.
template <typename E>
__device__ __noinline__ void write_rows_exactly(const fwd_params &p, int b, int h, int row,
                                                int end) {
    const Sequence seq(p, b);
    for (int i = row; i < min(end, seq.q_len); ++i)
        ExactRow<E>{p, seq, b, h, i}.write();
}
