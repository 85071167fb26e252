// Gradients by plain loops over global memory, slowly, whatever the layout: for the rare rows and keys that tensor cores get wrong.
#pragma once

#include "kernels/cuda/common/bwd_pairs.cuh"

// For sums that came out as NaN or infinity: what is hidden may hold those, and 0 times either is NaN. Here hidden pairs are left
// out, and products stay in f32.
template <typename E, bool EXTRAS>
struct ExactPair {
    float weight, gradient; // of the value, and that of the product q k
    bool seen, kept;

    __device__ ExactPair(const Head<E, EXTRAS> &head, int i, int j)
        : weight(0), gradient(0), seen(false), kept(false) {
        const bwd_params &p = head.p;
        if (i >= head.seq.q_len || !head.in_window(i, j) ||
            (p.query_segments.data && !head.same_segment(i, j)) || !head.unmasked(i, j))
            return;
        const int64_t q = head.row(p.f.query, i), k = head.key(p.f.key, j),
                      o = head.row(p.d_output, i), v = head.key(p.f.value, j);
        float score = 0, d_weight = 0, cap = 1;
        for (int d = 0; d < p.f.dim_qk; ++d)
            score = fmaf(load_number<E>(p.f.query.data, q + d * p.f.query.stride[3], false),
                         load_number<E>(p.f.key.data, k + d * p.f.key.stride[3], false), score);
        if (EXTRAS) {
            score = head.capped(score, cap);
            if (p.f.bias.data)
                score += head.bias(i, j);
            if (p.f.alibi_slopes.data)
                score = fmaf(-head.alibi_slope(), head.distance(i, j), score);
        }
        if (score == NEG_INF)
            return;
        seen = true;
        const float *const stats = stats_of(p, head.seq, head.h) + i;
        const float probability = head.weight(score, stats[0], stats[stats_plane(p)]);
        kept = !(EXTRAS && p.flags & BWD_DROPOUT && head.dropped(i, j));
        for (int d = 0; d < p.f.dim_v && kept; ++d)
            d_weight =
                fmaf(load_number<E>(p.d_output.data, o + d * p.d_output.stride[3],
                                    p.flags & BWD_D_OUTPUT_F32),
                     load_number<E>(p.f.value.data, v + d * p.f.value.stride[3], false), d_weight);
        weight = kept ? probability * p.keep : 0;
        gradient =
            probability * (d_weight * p.keep - stats[2 * stats_plane(p)]) * cap * (float)p.f.scale;
    }
};

// out[c] += factor * element lane + 32 c of a row, for the pairs of the warp's lanes that count, one after the other.
template <typename E, typename RowOf>
__device__ __forceinline__ void add_rows(float (&out)[8], float factor, bool counts,
                                         const fwd_view &v, int dim, bool f32, RowOf row_of) {
    const int lane = threadIdx.x % 32;
    for (unsigned left = __ballot_sync(~0u, counts); left; left &= left - 1) {
        const int who = __ffs(left) - 1;
        const float x = __shfl_sync(~0u, factor, who);
        const int64_t row = row_of(who);
#pragma unroll
        for (int c = 0; c < 8; ++c)
            if (lane + 32 * c < dim)
                out[c] = fmaf(x, load_number<E>(v.data, row + (lane + 32 * c) * v.stride[3], f32),
                              out[c]);
    }
}

// Whether no further term changes these sums.
__device__ __forceinline__ bool all_nan(const float (&out)[8], int dim) {
    bool all = true;
#pragma unroll
    for (int c = 0; c < 8; ++c)
        all &= (int)threadIdx.x % 32 + 32 * c >= dim || isnan(out[c]);
    return __all_sync(~0u, all);
}

template <typename E>
__device__ __forceinline__ void store_columns(const float (&out)[8], const fwd_view &v, int64_t row,
                                              int dim, bool f32) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < 8; ++c)
        if (lane + 32 * c < dim)
            store_number<E>(v.data, row + (lane + 32 * c) * v.stride[3], f32, out[c]);
}

// Rows [row, end) of d_query, by one warp, over what it has written before.
template <typename E, bool EXTRAS>
__device__ __noinline__ void write_query_exactly(const bwd_params &p, int b, int h, int row,
                                                 int end) {
    const BwdSequence seq(p, b);
    const Head<E, EXTRAS> head{p, seq, b, h};
    const int lane = threadIdx.x % 32;
    __syncwarp();
    for (int i = row; i < min(end, seq.q_len); ++i) {
        float out[8] = {};
        for (int j = seq.first_key(p.f, i); j < seq.end_key(p.f, i) && !all_nan(out, p.f.dim_qk);
             j += 32) {
            const ExactPair<E, EXTRAS> pair(head, i, j + lane);
            add_rows<E>(out, pair.gradient, pair.seen, p.f.key, p.f.dim_qk, false,
                        [&](int who) { return head.key(p.f.key, j + who); });
        }
        store_columns<E>(out, p.d_query, head.row(p.d_query, i), p.f.dim_qk,
                         p.flags & BWD_D_QUERY_F32);
    }
}

// Keys [key, end) of d_value, or of d_key.
template <typename E, bool EXTRAS>
__device__ __noinline__ void write_keys_exactly(const bwd_params &p, int b, int kv_head, int key,
                                                int end, bool values) {
    const BwdSequence seq(p, b);
    const int lane = threadIdx.x % 32;
    const fwd_view &from = values ? p.d_output : p.f.query, &to = values ? p.d_value : p.d_key;
    const int dim = values ? p.f.dim_v : p.f.dim_qk;
    __syncwarp();
    for (int j = key; j < min(end, seq.k_len); ++j) {
        float out[8] = {};
        for (int n = 0; n < p.f.group; ++n) {
            const Head<E, EXTRAS> head{p, seq, b, kv_head * p.f.group + n};
            for (int i = seq.first_row(p, j); i < seq.end_row(p, j, j + 1) && !all_nan(out, dim);
                 i += 32) {
                const ExactPair<E, EXTRAS> pair(head, i + lane, j);
                add_rows<E>(out, values ? pair.weight : pair.gradient,
                            values ? pair.kept : pair.seen, from, dim,
                            values && p.flags & BWD_D_OUTPUT_F32,
                            [&](int who) { return head.row(from, i + who); });
            }
        }
        const int64_t row =
            b * to.stride[0] + kv_head * to.stride[1] + (seq.k_start + j) * to.stride[2];
        store_columns<E>(out, to, row, dim, p.flags & (values ? BWD_D_VALUE_F32 : BWD_D_KEY_F32));
    }
}
