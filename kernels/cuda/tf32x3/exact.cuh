// A row of the output and its lse by plain loops in double over global memory, slowly, whatever the layout: for the rare rows
// that tensor cores get wrong. These see an Inf, or a number next to it, which has no two parts, or have a NaN or an Inf in a
// value behind a mask, since P = 0 times those is NaN.
#pragma once

#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/sequence.cuh"

struct ExactRow {
    const fwd_params &p;
    const Sequence &seq;
    const int b, h, i;

    __device__ static float load(const void *data, int64_t at) { return ((const float *)data)[at]; }

    __device__ int64_t key_row(const fwd_view &v, int j) const {
        const int64_t head = h / p.group * v.stride[1];
        if (!p.page_size)
            return b * v.stride[0] + head + (seq.k_start + j) * v.stride[2];
        return head + paged_row(p, v, b, j);
    }

    // -inf for a key that the row does not see.
    __device__ double logit(int j) const {
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
        double x = 0;
        for (int d = 0; d < p.dim_qk; ++d)
            x = fma((double)load(p.query.data, q + d * p.query.stride[3]),
                    (double)load(p.key.data, k + d * p.key.stride[3]), x);
        x *= p.scale;
        if (p.softcap > 0)
            x = p.softcap * tanh(x / p.softcap);
        if (p.bias.data)
            x += load(p.bias.data, at(p.bias));
        if (p.alibi_slopes.data)
            x -= (double)((const float *)p.alibi_slopes
                              .data)[b * p.alibi_slopes.stride[0] + h * p.alibi_slopes.stride[1]] *
                 abs(i + seq.diagonal - j);
        return x;
    }

    // A NaN among the logits makes the whole row NaN, which is found before more work is done.
    __device__ void write() const {
        const int lane = threadIdx.x % 32, first = seq.first_key(p, i), end = seq.end_key(p, i);
        const double sink =
            p.sinks.data ? ((const float *)p.sinks.data)[h * p.sinks.stride[1]] : -INFINITY;
        double top = sink;
        bool nan = false;
        for (int base = first; base < end && !nan; base += 32) {
            const double x = base + lane < end ? logit(base + lane) : -INFINITY;
            nan = __any_sync(~0u, isnan(x));
            top = fmax(top, x);
        }
        for (int step = 16; step; step /= 2)
            top = fmax(top, __shfl_xor_sync(~0u, top, step));
        double total = 0, out[8] = {}; // columns lane + 32 * c
        for (int base = first; base < end && !nan; base += 32) {
            const double x = base + lane < end ? logit(base + lane) : -INFINITY;
            const double weight = x == -INFINITY ? 0 : exp(x - top);
            total += weight;
            for (unsigned left = __ballot_sync(~0u, x != -INFINITY); left; left &= left - 1) {
                const int who = __ffs(left) - 1;
                const double w = __shfl_sync(~0u, weight, who);
                const int64_t v = key_row(p.value, base + who);
#pragma unroll
                for (int c = 0; c < 8; ++c)
                    if (lane + 32 * c < p.dim_v)
                        out[c] = fma(
                            w, (double)load(p.value.data, v + (lane + 32 * c) * p.value.stride[3]),
                            out[c]);
            }
        }
        for (int step = 16; step; step /= 2)
            total += __shfl_xor_sync(~0u, total, step);
        const bool empty = total == 0 && !nan;
        total = nan ? NAN : sink > -INFINITY ? total + exp(sink - top) : total;
        const int64_t row = seq.q_start + i;
        float *const to = (float *)p.output.data + b * p.output.stride[0] + h * p.output.stride[1] +
                          row * p.output.stride[2];
#pragma unroll
        for (int c = 0; c < 8; ++c)
            if (lane + 32 * c < p.dim_v)
                to[(lane + 32 * c) * p.output.stride[3]] = empty ? 0.0f : (float)(out[c] / total);
        if (!p.lse.data || lane != 0)
            return;
        const double none = p.flags & FWD_EMPTY_LSE_INF ? INFINITY : -INFINITY;
        ((float *)p.lse.data)[b * p.lse.stride[0] + h * p.lse.stride[1] + row * p.lse.stride[2]] =
            (float)(total == 0 ? none : top + log(total));
    }
};

// Row i of a head, by one warp, over what it has written before.
__device__ __noinline__ void write_row_exactly(const fwd_params &p, int b, int h, int i) {
    const Sequence seq(p, b);
    __syncwarp();
    if (i < seq.q_len)
        ExactRow{p, seq, b, h, i}.write();
}
