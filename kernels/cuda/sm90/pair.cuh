// Few tiles, or parts of them: a block has one of 64 rows, whose key tiles its two warpgroups take in turn, and one of them adds up what both have. So
// twice as many multiprocessors have work, and half of the steps are behind each other. docs/cuda-sm90.md
#pragma once

#include "kernels/cuda/sm90/fwd.cuh"

// To the other warpgroup, where a second tile's queries and the outputs of this one would be.
template <class C>
__device__ __forceinline__ void lend(const Consumer<C> &rows, const Shared<C> &s) {
    constexpr int OUTPUTS = Consumer<C>::OUTPUTS;
    static_assert(C::QUERY_STAGES > 1 && C::WARPGROUPS * C::QUERY_BYTES >= 512 * OUTPUTS, "");
    const uint32_t at = 16 * (threadIdx.x % 128);
    store_floats(s.output(1, 0) + at,
                 make_float4(rows.top[0], rows.top[1], rows.sum[0], rows.sum[1]));
#pragma unroll
    for (int i = 0; i < OUTPUTS; i += 4)
        store_floats(s.query(1, 0) + 512 * i + at,
                     make_float4(rows.output[i], rows.output[i + 1], rows.output[i + 2],
                                 rows.output[i + 3]));
}

// Adds what the other warpgroup has lent.
template <class C>
__device__ __forceinline__ void join(Consumer<C> &rows, const Shared<C> &s) {
    const uint32_t at = 16 * (threadIdx.x % 128);
    const float4 lent = load_floats(s.output(1, 0) + at);
    const float other_top[2] = {lent.x, lent.y}, other_sum[2] = {lent.z, lent.w};
    float own[2], others[2]; // what sums and outputs are multiplied by
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float top = fmaxf(rows.top[half], other_top[half]);
        own[half] = rows.top[half] == top ? 1 : exp2_approx(rows.top[half] - top);
        others[half] = other_top[half] == top ? 1 : exp2_approx(other_top[half] - top);
        rows.top[half] = top;
        rows.sum[half] = fmaf(other_sum[half], others[half], rows.sum[half] * own[half]);
    }
#pragma unroll
    for (int i = 0; i < Consumer<C>::OUTPUTS; i += 4) {
        const float4 other = load_floats(s.query(1, 0) + 512 * i + at);
        float *const output = rows.output + i;
        output[0] = fmaf(other.x, others[0], output[0] * own[0]);
        output[1] = fmaf(other.y, others[0], output[1] * own[0]);
        output[2] = fmaf(other.z, others[1], output[2] * own[1]);
        output[3] = fmaf(other.w, others[1], output[3] * own[1]);
    }
}

// O of every other key tile, from number `n` on.
template <class C>
__device__ __forceinline__ void every_other_tile(Consumer<C> &rows, const sm90_params &p,
                                                 const Shared<C> &s, const Tile<C> &t, int n,
                                                 Pipeline<C> &pipe) {
    // A barrier tells its phases apart by their parity alone: who has not waited for one of a buffer's tiles may take the next one to
    // be there before either is. So each buffer is one warpgroup's.
    static_assert(C::STAGES % C::WARPGROUPS == 0 && !C::SHRINKS_OUTSIDE, "");
    rows.first(p, s, t, n, pipe);
    pipe.keys.advance();
    for (n += 2; n < t.end_block; n += 2) {
        if (n <= t.first_untracked) // of the tiles before n, half are the other's
            rows.template step<true, false, true>(p, s, t, n, pipe, t);
        else if (n < t.end_whole)
            rows.template step<false, false, false>(p, s, t, n, pipe, t);
        else
            rows.template step<true, false, false>(p, s, t, n, pipe, t);
        pipe.keys.advance();
        pipe.values.advance();
    }
    rows.finish_outputs(s, pipe);
}

template <class C>
__device__ __forceinline__ void consume_pair(const sm90_params &p, const Shared<C> &s, int wg) {
    Pipeline<C> pipe(s, wg);
    Consumer<C> rows;
    mbarrier_wait(pipe.queries.full_barrier(), pipe.queries.phase);
    const Tile<C> t = *s.tile(pipe.queries, wg);
    if (C::IS_SPLIT && t.index < 0)
        return;
    if (!t.sees_keys()) {
        if (wg == 0)
            store_empty<C>(p, t, 0);
        return;
    }
    rows.clear_output();
    rows.clear_sums();
    pipe.keys.advance(wg > 0);
    pipe.values.advance(wg > 0);
    if (t.first_block + wg < t.end_block)
        every_other_tile<C>(rows, p, s, t, t.first_block + wg, pipe);
    if (wg > 0)
        lend<C>(rows, s);
    named_barrier_sync(1, 256);
    if (wg > 0)
        return;
    join<C>(rows, s);
    store_rows<C>(p, s, 0, t, rows.output, rows.top, rows.sum);
    if (threadIdx.x % 32 == 0)
        bulk_wait_read<0>(); // buffers live as long as the block
}

template <class C>
__device__ __forceinline__ void forward_pair(const sm90_params &p) {
    forward<C>(p, [&](const Shared<C> &s, int wg) { consume_pair<C>(p, s, wg); });
}
