/*
 * Attention forward for Hopper: O = softmax(scale Q K^T + mask) V, f16 or bf16 in, f32 sums. docs/cuda-sm90.md draws
 * the schedule.
 *
 * One block per SM walks over tiles of 64 * kWarpgroups query rows. Two producer warps bring Q, K and V tiles to shared
 * memory by TMA; each consumer warpgroup owns 64 rows, keeps S, P and O in registers, and runs
 *     S' = Q K(n+1)^T and O += P V(n)   on the tensor cores, while
 *     softmax(S')                       runs on the other warpgroup's time (ping-pong) and under its own P V.
 * Key tiles are walked from the first to the last, so that tiles of one head read the same ones at the same time.
 */
#pragma once

#include "kernels/cuda/sm90/store.cuh"

namespace sm90 {

/* The 64 query rows of a warpgroup in registers. A thread holds two rows, `half` 0 and 1, eight apart, and of every
 * eight columns two: element 4 * (column / 8) + 2 * half + (column & 1) of its array. (PTX ISA, wgmma D fragment) */
template <class C>
struct Consumer {
    using E = typename C::Element;
    static constexpr int kScores = C::kTileK / 2, kOutputs = C::kDimV / 2;

    float score[kScores];
    float output[kOutputs];
    uint32_t weight[kScores / 2]; /* exp of the scores as pairs of E: the A operand of P V */
    float shift
        [2]; /* what is subtracted from the exponents of 2: a maximum of the row, -inf before its first key */
    float sum[2]; /* of the weights, this thread's part */
    bool fresh;   /* O holds nothing of this tile yet */

    /* S = Q K^T */
    __device__ __forceinline__ void start_scores(uint32_t query, uint32_t key) {
        const Descriptor a(query, 16, 1024), b(key, 16, 1024);
#pragma unroll
        for (int k = 0; k < C::kDimQk / 16; k++)
            Wgmma<E, C::kTileK>::ss(score, a.at(k / 4 * 64 * 128 + 32 * (k % 4)),
                                    b.at(k / 4 * C::kKeyColumn + 32 * (k % 4)), k > 0);
        wgmma_commit();
    }

    /* O += P V, or O = P V for the first key tile. */
    __device__ __forceinline__ void start_outputs(uint32_t value) {
        const Descriptor b(value, C::kKeyColumn, 1024);
#pragma unroll
        for (int k = 0; k < C::kTileK / 16; k++)
            Wgmma<E, C::kDimV>::rs(output, weight[4 * k], weight[4 * k + 1], weight[4 * k + 2],
                                   weight[4 * k + 3], b.at(k * 16 * 128), k > 0 || !fresh);
        wgmma_commit();
    }

    /* Keys of this thread, two of every eight, among the first `count` from its first one on. */
    static __device__ __forceinline__ int keys_before(int count) {
        const int inside = min(max(count, 0), C::kTileK);
        return inside / 8 * 2 + min(inside % 8, 2);
    }

    /* Hides keys outside [low, high); `column` = first key of this thread. */
    __device__ __forceinline__ void mask(int column, const int (&low)[2], const int (&high)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int begin = keys_before(low[half] - column),
                      end = keys_before(high[half] - column);
            const uint32_t visible = ones(begin, max(end - begin, 0));
#pragma unroll
            for (int i = 0; i < kScores / 2; i++) {
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = visible >> i & 1 ? s : -INFINITY;
            }
        }
    }

    /* x -> cap * tanh(scale * x / cap), exact to the last bits of f32: tanh(y) = 1 - 2 / (exp(2 y) + 1). */
    __device__ __forceinline__ void cap(float scale, float cap) {
        const float twice = 2.8853900817779268f * scale / cap;
#pragma unroll
        for (int i = 0; i < kScores; i++)
            score[i] = cap - 2 * cap * reciprocal_approx(exp2_approx(score[i] * twice) + 1);
    }

    /* Moves the shift to the maximum of S where that grew by more than 2^8; `factor` is what older results scale by.
     * No branch: wgmmas are in flight, and ptxas waits for them where paths meet. */
    __device__ __forceinline__ void track_maximum(float scale_log2, float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            /* Four maxima side by side: one would be a chain of kScores / 2 instructions. */
            float m4[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
            for (int i = 0; i < kScores / 2; i++)
                m4[i % 4] = fmaxf(m4[i % 4], score[4 * (i / 2) + 2 * half + i % 2]);
            float m = fmaxf(fmaxf(m4[0], m4[1]), fmaxf(m4[2], m4[3]));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            const float growth = m * scale_log2 - shift[half];
            const bool grown = growth > 8.f;
            factor[half] = grown ? exp2_approx(-growth) : 1.f;
            shift[half] = grown ? m * scale_log2 : shift[half];
            sum[half] *= factor[half];
        }
    }

    /* S -> 2^(scale_log2 S - offset), and their sums in `part`. */
    __device__ __forceinline__ void exponentials(float scale_log2, const float (&offset)[2],
                                                 float (&part)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < kScores / 2; i++) {
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = exp2_approx(fmaf(s, scale_log2, -offset[half]));
                part[half] += s;
            }
        }
    }

    /* Weights that came out above the range of E are brought back, and the shift with them. Rare: scores that exceed
     * their row's first ones by 2^14. A weight that overflowed f32 stays infinite; store_rows() sees to it. */
    __device__ __forceinline__ void limit(float (&part)[2], float (&factor)[2]) {
        constexpr float kLimit = 16384.f;
        factor[0] = factor[1] = 1.f;
        if (__builtin_expect(!__any_sync(~0u, part[0] > kLimit || part[1] > kLimit), true))
            return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = fmaxf(part[half], __shfl_xor_sync(~0u, part[half], 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            if (most > kLimit && most < INFINITY) {
                const int exponent = min((__float_as_int(most) >> 23) - 127, 126);
                factor[half] = __int_as_float((127 - exponent) << 23);
                shift[half] += exponent;
                sum[half] *= factor[half];
                part[half] *= factor[half];
            }
        }
#pragma unroll
        for (int i = 0; i < kScores; i++)
            score[i] *= factor[i / 2 % 2];
    }

    __device__ __forceinline__ void rescale_output(const float (&factor)[2]) {
        if (__builtin_expect(!__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f), true))
            return;
#pragma unroll
        for (int i = 0; i < kOutputs; i++)
            output[i] *= factor[i / 2 % 2];
    }

    /* Element pairs of S are already in the order of the A fragment. */
    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < kScores / 2; i++)
            weight[i] = pack<E>(score[2 * i], score[2 * i + 1]);
    }

    __device__ __forceinline__ void clear_output() {
#pragma unroll
        for (int i = 0; i < kOutputs; i++)
            output[i] = 0;
        fresh = true;
    }

    __device__ __forceinline__ void finite_shift(float (&offset)[2]) const {
        offset[0] = shift[0] == -INFINITY ? 0.f : shift[0];
        offset[1] = shift[1] == -INFINITY ? 0.f : shift[1];
    }

    __device__ __forceinline__ void clear_sums() {
        shift[0] = shift[1] = -INFINITY;
        sum[0] = sum[1] = 0;
    }

    template <bool kMasked>
    __device__ __forceinline__ void shape_scores(const sm90_params &p, const Tile &t, int wg,
                                                 int block) {
        if (C::kSoftcap)
            cap(p.scale, p.softcap);
        if (!kMasked)
            return;
        const int row = t.first_row + 64 * wg + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        int low[2], high[2];
        row_bounds(p, t, row, low[0], high[0]);
        row_bounds(p, t, row + 8, low[1], high[1]);
        mask(block * C::kTileK + threadIdx.x % 4 * 2, low, high);
    }

    __device__ __forceinline__ void first(const sm90_params &p, const Shared<C> &s, const Tile &t,
                                          int n, Pipeline<C> &pipe);
    template <bool kMasked, bool kNewTile, bool kTrack>
    __device__ __forceinline__ void step(const sm90_params &p, const Shared<C> &s, const Tile &t,
                                         int n, Pipeline<C> &pipe, const Place &finished);
    __device__ __forceinline__ void last(const sm90_params &p, const Shared<C> &s, const Place &t,
                                         Pipeline<C> &pipe);
};

/* S and weights of the first key tile of all, n. */
template <class C>
__device__ __forceinline__ void Consumer<C>::first(const sm90_params &p, const Shared<C> &s,
                                                   const Tile &t, int n, Pipeline<C> &pipe) {
    clear_output();
    clear_sums();
    mbarrier_wait(pipe.keys.full_barrier(), pipe.keys.phase);
    wgmma_fence();
    start_scores(s.query(pipe.queries.stage, pipe.wg), s.key(pipe.keys.stage));
    wgmma_wait<0>();
    pin(score);
    pipe.key_read(n == t.end_block - 1);
    shape_scores<true>(p, t, pipe.wg, n);
    float factor[2], offset[2];
    track_maximum(p.scale_log2, factor);
    finite_shift(offset);
    exponentials(p.scale_log2, offset, sum);
    round_weights();
}

/* S of key tile n of tile t, and O of the key tile before, whose weights are ready. If t is new, that one
 * belongs to the tile `finished`, whose rows are stored then. */
template <class C>
template <bool kMasked, bool kNewTile, bool kTrack>
__device__ __forceinline__ void Consumer<C>::step(const sm90_params &p, const Shared<C> &s,
                                                  const Tile &t, int n, Pipeline<C> &pipe,
                                                  const Place &finished) {
    mbarrier_wait(pipe.keys.full_barrier(), pipe.keys.phase);
    wait_turn<C>(pipe.wg);
    pin(output);
    pin(weight);
    wgmma_fence();
    start_scores(s.query(pipe.queries.stage, pipe.wg), s.key(pipe.keys.stage));
    mbarrier_wait(pipe.values.full_barrier(), pipe.values.phase);
    wgmma_fence();
    start_outputs(s.value(pipe.values.stage));
    fresh = kNewTile;
    pass_turn<C>(pipe.wg);
    wgmma_wait<1>();
    pin(score);
    pipe.key_read(n == t.end_block - 1);
    const float finished_shift[2] = {shift[0], shift[1]}, finished_sum[2] = {sum[0], sum[1]};
    if (kNewTile)
        clear_sums();
    shape_scores<kMasked>(p, t, pipe.wg, n);
    float factor[2], offset[2], part[2] = {0, 0};
    if (kTrack)
        track_maximum(p.scale_log2, factor);
    finite_shift(offset);
    exponentials(p.scale_log2, offset, part);
    pin(score);
    hold(s.base, (sum[0] + part[0]) + (sum[1] + part[1]));
    wgmma_wait<0>();
    pin(output);
    pin(weight);
    pipe.value_read();
    if (!kTrack)
        limit(part, factor);
    sum[0] += part[0];
    sum[1] += part[1];
    if (!kNewTile)
        rescale_output(factor);
    round_weights();
    if (kNewTile)
        store_rows<C>(p, s, pipe.wg, finished, output, finished_shift, finished_sum);
}

/* O of the last key tile of all. */
template <class C>
__device__ __forceinline__ void Consumer<C>::last(const sm90_params &p, const Shared<C> &s,
                                                  const Place &t, Pipeline<C> &pipe) {
    mbarrier_wait(pipe.values.full_barrier(), pipe.values.phase);
    pin(output);
    pin(weight);
    wgmma_fence();
    start_outputs(s.value(pipe.values.stage));
    wgmma_wait<0>();
    pin(output);
    store_rows<C>(p, s, pipe.wg, t, output, shift, sum);
}

template <class C>
__device__ __forceinline__ void consume(const sm90_params &p, const Shared<C> &s, int wg) {
    Pipeline<C> pipe(s, wg);
    Consumer<C> rows;
    Place previous; /* the tile whose output is unfinished */
    previous.index = -1;
    int skipped = 0; /* key tiles behind its own, whose values are still to pass over */
    if (wg == C::kWarpgroups - 1)
        pass_turn<C>(wg);
    for (;;) {
        mbarrier_wait(pipe.queries.full_barrier(), pipe.queries.phase);
        const Tile t = *s.tile(pipe.queries.stage, wg);
        if (t.index < 0)
            break;
        if (!t.sees_keys()) {
            store_empty<C>(p, t, wg);
            pipe.query_read();
            continue;
        }
        int n = t.first_block;
        if (previous.index < 0)
            rows.first(p, s, t, n, pipe);
        else if (C::kFirstUnmasked && n >= t.first_whole && n < t.end_whole)
            rows.template step<false, true, true>(p, s, t, n, pipe, previous);
        else
            rows.template step<true, true, true>(p, s, t, n, pipe, previous);
        pipe.skip_values(skipped);
        for (n++; n < t.end_block; n++) {
            if (n < t.first_untracked)
                rows.template step<true, false, true>(p, s, t, n, pipe, t);
            else if (n < t.end_whole)
                rows.template step<false, false, false>(p, s, t, n, pipe, t);
            else
                rows.template step<true, false, false>(p, s, t, n, pipe, t);
        }
        skipped = t.skipped;
        pipe.skip_keys(skipped);
        previous = t;
    }
    if (previous.index >= 0)
        rows.last(p, s, previous, pipe);
    if (threadIdx.x % 32 == 0)
        bulk_wait_read<0>(); /* buffers live as long as the block */
}

template <class C>
__device__ __forceinline__ void forward(const sm90_params &p) {
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    const Shared<C> s{base,
                      reinterpret_cast<Tile *>(raw + (base - shared_address(raw) + C::kTiles))};
    const int warpgroup = uniform(threadIdx.x / 128);
    if (threadIdx.x == 0) {
        tma_prefetch_map(&p.query_map);
        tma_prefetch_map(&p.key_map);
        tma_prefetch_map(&p.value_map);
        tma_prefetch_map(&p.output_map);
        init_barriers<C>(s);
    }
    __syncthreads();
    if (warpgroup == 0) {
        registers_decrease<C::kProducerRegisters>();
        const int warp = uniform(threadIdx.x / 32);
        if (warp == 0)
            produce_keys<C>(p, s);
        else if (warp == 1)
            produce_queries<C>(p, s);
    } else {
        registers_increase<C::kConsumerRegisters>();
        consume<C>(p, s, warpgroup - 1);
    }
}

} // namespace sm90
