// dK and dV of wide heads: a block owns 64 keys of one kv head and walks over the tiles of 64 rows that see them, for all query heads of
// the group. Its two warpgroups have the same keys:
//     one        S^T = K Q^T,   P = 2^S                  dV += P^T dO
//     the other  dP^T = V dO^T, dS = P (dP - delta)      dK += dS^T Q
// P goes from one to the other through shared memory, 16 bits an element, in the order of the registers.
#pragma once

#include "kernels/cuda/sm90/bwd_wide_tile.cuh"

template <typename E, int Dqk, int Dv, bool Softcap>
struct WideKeysConfig {
    using Element = E;
    static constexpr int DIM_QK = Dqk, DIM_V = Dv;
    static constexpr bool HAS_SOFTCAP = Softcap;
    static constexpr int STAGES = SM90_BWD_WIDE_STAGES(Dqk), WEIGHT_STAGES = 2;

    static constexpr int QK_BYTES = WIDE_COLUMN * Dqk / 64, V_BYTES = WIDE_COLUMN * Dv / 64;
    static constexpr int WEIGHT_BYTES = WIDE_TILE * WIDE_TILE * 2;
    static constexpr int KEY = 0, VALUE = KEY + QK_BYTES, QUERY = VALUE + V_BYTES,
                         D_OUTPUT = QUERY + STAGES * QK_BYTES,
                         WEIGHTS = D_OUTPUT + STAGES * V_BYTES,
                         STATS = WEIGHTS + WEIGHT_STAGES * WEIGHT_BYTES,
                         TASK = STATS + STAGES * WIDE_STATS_BYTES, BARRIERS = TASK + 64;
    static constexpr int SHARED_BYTES = SM90_BWD_WIDE_KEYS_BYTES(Dqk, Dv);
    static_assert(SHARED_BYTES == BARRIERS + 8 * 2 * (1 + 2 * STAGES) + 1024, "1024 to align");
    static_assert(SHARED_BYTES <= 227 * 1024 && Dqk % 64 == 0 && Dv % 64 == 0, "");
};

template <class C>
struct WideKeysShared : WideShared<C> {
    using WideShared<C>::base, WideShared<C>::memory, WideShared<C>::barrier;

    __device__ __forceinline__ uint32_t query(int stage) const {
        return base + C::QUERY + stage * C::QK_BYTES;
    }
    __device__ __forceinline__ uint32_t d_output(int stage) const {
        return base + C::D_OUTPUT + stage * C::V_BYTES;
    }
    // P of a warp, 16 bytes of a thread beside those of the next one.
    __device__ __forceinline__ uint4 *weights(int stage) const {
        return reinterpret_cast<uint4 *>(memory + C::WEIGHTS + stage * C::WEIGHT_BYTES) +
               threadIdx.x % 128 / 32 * 128 + threadIdx.x % 32;
    }
    // Of the thread's two rows in every eight: `which` 0 for lse, 1 for delta.
    __device__ __forceinline__ const float2 *stats(int stage, int which) const {
        return reinterpret_cast<const float2 *>(memory + C::STATS + stage * WIDE_STATS_BYTES) +
               which * WIDE_TILE / 2 + threadIdx.x % 4;
    }
    __device__ __forceinline__ Ring<C::STAGES> query_ring() const {
        return {barrier(2), barrier(2 + C::STAGES)};
    }
    __device__ __forceinline__ Ring<C::STAGES> d_output_ring() const {
        const Ring<C::STAGES> queries = query_ring();
        return {queries.full + 16 * C::STAGES, queries.empty + 16 * C::STAGES};
    }
};

// Named barriers of a stage of weights: that they are there, and that they have been read.
__device__ __forceinline__ int weights_full(int stage) { return 1 + stage; }
__device__ __forceinline__ int weights_empty(int stage) { return 3 + stage; }

template <int STAGES>
__device__ __forceinline__ void init_ring(const Ring<STAGES> &ring, int full, int empty) {
    for (int i = 0; i < STAGES; i++) {
        mbarrier_init(ring.full + 8 * i, full);
        mbarrier_init(ring.empty + 8 * i, empty);
    }
}

// The rows of a task, head by head, tile by tile.
struct WideWalk {
    int head, tile, left, first, end;
    __device__ __forceinline__ WideWalk(const sm90_bwd_params &p, const WideTask &t)
        : head(t.head * p.group), tile(t.first), left((t.end - t.first) * p.group), first(t.first),
          end(t.end) {}
    __device__ __forceinline__ void advance() {
        left--;
        tile++;
        head += tile == end;
        tile = tile == end ? first : tile;
    }
};

// ---- The producer: one warp -----------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void produce_rows(const sm90_bwd_params &p, const WideKeysShared<C> &s) {
    const bool leads = threadIdx.x % 32 == 0, wanted = p.d_key.data || p.d_value.data;
    Ring<1> tasks = s.task_ring();
    Ring<C::STAGES> queries = s.query_ring(), d_outputs = s.d_output_ring();
    for (;;) {
        const int index = uniform(leads ? atomicAdd(p.next + SM90_BWD_NEXT_KEYS, 1) : 0);
        WideTask t = key_task<C::DIM_QK>(p, index);
        if (!wanted)
            t.own = -1, t.end = t.first;
        const int batch_q = p.cu_seqlens_q ? 0 : t.batch, batch_k = p.cu_seqlens_k ? 0 : t.batch;
        WideWalk walk(p, t);
        const auto load_step = [&] {
            mbarrier_wait(queries.empty_barrier(), queries.phase ^ 1);
            if (leads) {
                mbarrier_expect_bytes(queries.full_barrier(), C::QK_BYTES + WIDE_STATS_BYTES);
                load_rows<C::DIM_QK / 64, WIDE_COLUMN>(
                    p.query_map, s.query(queries.stage), queries.full_barrier(),
                    walk.tile * WIDE_TILE, t.s.q_start, t.s.q_len, p.len_q, walk.head, batch_q);
                bulk_load(s.base + C::STATS + queries.stage * WIDE_STATS_BYTES,
                          wide_stats(p, walk.head, t.first_tile + walk.tile), WIDE_STATS_BYTES,
                          queries.full_barrier());
            }
            queries.advance();
            mbarrier_wait(d_outputs.empty_barrier(), d_outputs.phase ^ 1);
            if (leads) {
                mbarrier_expect_bytes(d_outputs.full_barrier(), C::V_BYTES);
                load_rows<C::DIM_V / 64, WIDE_COLUMN>(
                    p.d_output_map, s.d_output(d_outputs.stage), d_outputs.full_barrier(),
                    walk.tile * WIDE_TILE, t.s.q_start, t.s.q_len, p.len_q, walk.head, batch_q);
            }
            d_outputs.advance();
        };
        if (walk.left > 0) // there is room before there is any for keys
            load_step();
        mbarrier_wait(tasks.empty_barrier(), tasks.phase ^ 1);
        if (leads) {
            const uint32_t full = tasks.full_barrier();
            *s.task() = t;
            mbarrier_expect_bytes(full, walk.left > 0 ? C::QK_BYTES + C::V_BYTES : 0);
            if (walk.left > 0) {
                load_rows<C::DIM_QK / 64, WIDE_COLUMN>(p.key_map, s.base + C::KEY, full, t.own,
                                                       t.s.k_start, t.s.k_len, p.len_k, t.head,
                                                       batch_k);
                load_rows<C::DIM_V / 64, WIDE_COLUMN>(p.value_map, s.base + C::VALUE, full, t.own,
                                                      t.s.k_start, t.s.k_len, p.len_k, t.head,
                                                      batch_k);
            }
        }
        __syncwarp();
        tasks.advance();
        if (t.own < 0)
            return;
        for (int left = walk.left; left > 1; left--) {
            walk.advance();
            load_step();
        }
    }
}

// ---- Consumers ------------------------------------------------------------------------------------------------------

// A warpgroup that multiplies its keys, or values, of DEPTH columns with rows and has sums of WIDTH columns. A thread holds two keys,
// eight apart, and of every eight rows two.
template <class C, int DEPTH, int WIDTH>
struct WideSums {
    using E = typename C::Element;
    // Of the A operand of S or dP, as many columns as registers have room for: the rest comes from shared memory, which is what
    // bounds this kernel.
    static constexpr int STEPS = DEPTH / 16, ROOM = (208 - 48 - WIDTH / 2) / 4,
                         HELD = ROOM < STEPS ? ROOM : STEPS;

    float product[WIDE_TILE / 2]; // S or dP
    float sums[WIDTH / 2];
    uint32_t weight[WIDE_TILE / 4]; // P or dS, the A operand of the sums
    uint32_t operand[4 * HELD];

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++)
            sums[i] = 0;
    }

    __device__ __forceinline__ void load_operand(uint32_t keys) {
        const int lane = threadIdx.x & 31, key = threadIdx.x % 128 / 32 * 16 + (lane & 15);
        const uint32_t of_lane = keys + 128 * key + ((lane >> 4 ^ (lane & 7)) << 4);
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            uint32_t w[4];
            load_matrices(w, (of_lane ^ k % 4 << 5) + k / 4 * WIDE_COLUMN);
#pragma unroll
            for (int i = 0; i < 4; i++)
                operand[4 * k + i] = w[i];
        }
    }

    // product^T = keys rows^T
    __device__ __forceinline__ void multiply(uint32_t keys, uint32_t rows) {
        const Descriptor a(keys, 16, 1024), b(rows, 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            const uint32_t at = k / 4 * WIDE_COLUMN + 32 * (k % 4);
            if (k < HELD)
                Wgmma<E, WIDE_TILE>::template rs<0>(
                    product, operand[4 * k % (4 * HELD)], operand[(4 * k + 1) % (4 * HELD)],
                    operand[(4 * k + 2) % (4 * HELD)], operand[(4 * k + 3) % (4 * HELD)], b.at(at),
                    k > 0);
            else
                Wgmma<E, WIDE_TILE>::ss(product, a.at(at), b.at(at), k > 0);
        }
        wgmma_commit();
    }

    // sums += weight^T rows
    __device__ __forceinline__ void add(uint32_t rows) {
        const Descriptor b(rows, WIDE_COLUMN, 1024);
        pin(weight);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < WIDE_TILE / 16; k++)
            Wgmma<E, WIDTH>::rs(sums, weight[4 * k], weight[4 * k + 1], weight[4 * k + 2],
                                weight[4 * k + 3], b.at(k * 16 * 128), true);
        wgmma_commit();
    }

    __device__ __forceinline__ void store(const sm90_bwd_params &p, const sm90_gradient &gradient,
                                          const WideTask &t, int dim, float scale) {
        if (!gradient.data || t.skipped)
            return;
        const int in_tile = threadIdx.x % 128 / 32 * 16;
        pin(sums);
        store_sums<E>(gradient, p.cu_seqlens_k ? 0 : t.batch, t.head, t.s.k_start + t.own + in_tile,
                      t.s.k_rows - t.own - in_tile, dim, scale, sums);
    }
};

// Whether some row of the tile does not see some key.
__device__ __forceinline__ bool is_masked(const sm90_bwd_params &p, const WideTask &t, int tile) {
    const int row = tile * WIDE_TILE, key = t.own, last = WIDE_TILE - 1;
    return key + last >= t.s.k_len || row + last >= t.s.q_len ||
           key + last - t.s.diagonal - p.window_right > row ||
           key - t.s.diagonal + p.window_left < row + last;
}

// Makes the weights and owns dV.
template <class C>
struct WideWeights : WideSums<C, C::DIM_QK, C::DIM_V> {
    using E = typename C::Element;
    const WideKeysShared<C> &s;
    Ring<C::STAGES> queries, d_outputs;
    int weights = 0; // their stage

    __device__ __forceinline__ explicit WideWeights(const WideKeysShared<C> &s)
        : s(s), queries(s.query_ring()), d_outputs(s.d_output_ring()) {}

    // Which rows see the thread's keys.
    __device__ __forceinline__ void find_visible(const sm90_bwd_params &p, const WideTask &t,
                                                 int tile, uint32_t (&visible)[2]) const {
        const int row = tile * WIDE_TILE + threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = t.own + fragment_row(threadIdx.x % 128, 2 * half);
            const int high = min(key - t.s.diagonal + p.window_left + 1, t.s.q_len);
            visible[half] = elements_between(key - t.s.diagonal - p.window_right - row,
                                             key < t.s.k_len ? high - row : 0);
        }
    }

    // S -> P, and P times the derivative of the softcap for the other warpgroup.
    template <bool MASKED>
    __device__ __forceinline__ void
    exponentials(const sm90_bwd_params &p, const float2 (&least)[WIDE_TILE / 8],
                 const uint32_t (&visible)[2], uint32_t (&shared)[WIDE_TILE / 4]) {
#pragma unroll
        for (int n = 0; n < WIDE_TILE / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x[2], slope[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    x[i] = weight_of<C::HAS_SOFTCAP>(p, this->product[4 * n + 2 * half + i],
                                                     i ? least[n].y : least[n].x, slope[i]) *
                           WeightScale<E>::TIMES;
                    if (MASKED)
                        x[i] = visible[half] >> (2 * n + i) & 1 ? x[i] : 0;
                }
                this->weight[2 * n + half] = pack<E>(x[0], x[1]);
                shared[2 * n + half] = C::HAS_SOFTCAP ? pack<E>(x[0] * slope[0], x[1] * slope[1])
                                                      : this->weight[2 * n + half];
            }
    }

    template <bool MASKED>
    __device__ __forceinline__ void step(const sm90_bwd_params &p, const WideTask &t, int tile,
                                         bool last) {
        mbarrier_wait(queries.full_barrier(), queries.phase);
        this->multiply(s.base + C::KEY, s.query(queries.stage));
        float2 least[WIDE_TILE / 8];
#pragma unroll
        for (int n = 0; n < WIDE_TILE / 8; n++)
            least[n] = s.stats(queries.stage, 0)[4 * n];
        uint32_t visible[2], shared[WIDE_TILE / 4];
        if (MASKED)
            find_visible(p, t, tile, visible);
        wgmma_wait<0>();
        pin(this->product);
        release(queries.empty_barrier());
        queries.advance();
        if (last)
            mbarrier_arrive(s.task_ring().empty); // the next K may come
        exponentials<MASKED>(p, least, visible, shared);
        mbarrier_wait(d_outputs.full_barrier(), d_outputs.phase);
        this->add(s.d_output(d_outputs.stage));
        named_barrier_sync(weights_empty(weights), 256);
#pragma unroll
        for (int k = 0; k < WIDE_TILE / 16; k++)
            s.weights(weights)[32 * k] =
                make_uint4(shared[4 * k], shared[4 * k + 1], shared[4 * k + 2], shared[4 * k + 3]);
        named_barrier_arrive(weights_full(weights), 256);
        weights ^= 1;
        wgmma_wait<0>();
        release(d_outputs.empty_barrier());
        d_outputs.advance();
    }

    __device__ __forceinline__ void run(const sm90_bwd_params &p, const WideTask &t) {
        this->load_operand(s.base + C::KEY);
#pragma unroll 1
        for (WideWalk walk(p, t); walk.left > 0; walk.advance())
            if (is_masked(p, t, walk.tile))
                step<true>(p, t, walk.tile, walk.left == 1);
            else
                step<false>(p, t, walk.tile, walk.left == 1);
    }
    __device__ __forceinline__ void finish(const sm90_bwd_params &p, const WideTask &t) {
        this->store(p, p.d_value, t, p.dim_v, WeightScale<E>::UNDO);
    }
};

// Makes the gradients of the scores and owns dK.
template <class C>
struct WideScores : WideSums<C, C::DIM_V, C::DIM_QK> {
    using E = typename C::Element;
    const WideKeysShared<C> &s;
    Ring<C::STAGES> queries, d_outputs;
    int weights = 0; // their stage

    __device__ __forceinline__ explicit WideScores(const WideKeysShared<C> &s)
        : s(s), queries(s.query_ring()), d_outputs(s.d_output_ring()) {
        for (int stage = 0; stage < C::WEIGHT_STAGES; stage++)
            named_barrier_arrive(weights_empty(stage), 256);
    }

    // dS = P (dP - delta), and 0 where P is: behind a mask dP may be NaN. What scales P scales delta already.
    template <bool MASKED>
    __device__ __forceinline__ void find_d_scores(const float2 (&delta)[WIDE_TILE / 8]) {
        constexpr float SCALE = WeightScale<E>::UNDO;
        const uint4 *const from = s.weights(weights);
#pragma unroll
        for (int k = 0; k < WIDE_TILE / 16; k++) {
            const uint4 four = from[32 * k];
            const uint32_t raw[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 w = unpack<E>(raw[j]), d = delta[2 * k + j / 2];
                const float *const x = this->product + 8 * k + 2 * j;
                const float low = w.x * fmaf(x[0], SCALE, d.x), high = w.y * fmaf(x[1], SCALE, d.y);
                this->weight[4 * k + j] =
                    MASKED ? pack<E>(w.x == 0 ? 0 : low, w.y == 0 ? 0 : high) : pack<E>(low, high);
            }
        }
    }

    template <bool MASKED>
    __device__ __forceinline__ void step(bool last) {
        mbarrier_wait(d_outputs.full_barrier(), d_outputs.phase);
        this->multiply(s.base + C::VALUE, s.d_output(d_outputs.stage));
        mbarrier_wait(queries.full_barrier(), queries.phase);
        float2 delta[WIDE_TILE / 8];
#pragma unroll
        for (int n = 0; n < WIDE_TILE / 8; n++) {
            const float2 d = s.stats(queries.stage, 1)[4 * n];
            delta[n] = make_float2(d.x * WeightScale<E>::UNDO, d.y * WeightScale<E>::UNDO);
        }
        wgmma_wait<0>();
        pin(this->product);
        release(d_outputs.empty_barrier());
        d_outputs.advance();
        if (last)
            mbarrier_arrive(s.task_ring().empty); // the next V may come
        named_barrier_sync(weights_full(weights), 256);
        find_d_scores<MASKED>(delta);
        named_barrier_arrive(weights_empty(weights), 256);
        weights ^= 1;
        this->add(s.query(queries.stage));
        wgmma_wait<0>();
        release(queries.empty_barrier());
        queries.advance();
    }

    __device__ __forceinline__ void run(const sm90_bwd_params &p, const WideTask &t) {
        this->load_operand(s.base + C::VALUE);
#pragma unroll 1
        for (WideWalk walk(p, t); walk.left > 0; walk.advance())
            if (is_masked(p, t, walk.tile))
                step<true>(walk.left == 1);
            else
                step<false>(walk.left == 1);
    }
    __device__ __forceinline__ void finish(const sm90_bwd_params &p, const WideTask &t) {
        this->store(p, p.d_key, t, p.dim_qk, p.scale);
    }
};

template <class Warpgroup, class C>
__device__ __forceinline__ void consume_keys(const sm90_bwd_params &p, const WideKeysShared<C> &s) {
    Warpgroup warpgroup(s);
    for (Ring<1> tasks = s.task_ring();; tasks.advance()) {
        mbarrier_wait(tasks.full_barrier(), tasks.phase);
        const WideTask t = *s.task();
        if (t.own < 0)
            return;
        warpgroup.begin();
        if (t.first < t.end)
            warpgroup.run(p, t);
        else
            mbarrier_arrive(tasks.empty_barrier());
        warpgroup.finish(p, t);
    }
}

template <class C>
__device__ __forceinline__ void wide_keys(const sm90_bwd_params &p) {
    constexpr int WARPS = 4; // of a warpgroup
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    const WideKeysShared<C> s{base, raw + (base - shared_address(raw))};
    if (threadIdx.x == 0) {
        init_ring(s.task_ring(), 1, 2 * 32 * WARPS); // each thread reads the task
        init_ring(s.query_ring(), 1, 2 * WARPS);
        init_ring(s.d_output_ring(), 1, 2 * WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();
    wait_for_predecessor();
    let_successor_start();
    const int role = uniform(threadIdx.x / 128);
    if (role == 0) {
        registers_decrease<SM90_BWD_WIDE_PRODUCER_REGISTERS>();
        if (uniform(threadIdx.x / 32) == 0)
            produce_rows<C>(p, s);
    } else if (role == 1) {
        registers_increase<SM90_BWD_WIDE_CONSUMER_REGISTERS>();
        consume_keys<WideWeights<C>>(p, s);
    } else {
        registers_increase<SM90_BWD_WIDE_CONSUMER_REGISTERS>();
        consume_keys<WideScores<C>>(p, s);
    }
}
