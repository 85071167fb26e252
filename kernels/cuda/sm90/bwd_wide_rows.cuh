// dQ of wide heads: a block owns 128 rows of a query head, 64 in each of two warpgroups, and walks over the tiles of 64 keys that they
// see, as forward does:
//     S = Q K^T,  P = 2^S,  dP = dO V^T,  dS = P (dP - delta),  dQ += dS K
#pragma once

#include "kernels/cuda/sm90/bwd_wide_keys.cuh"

template <typename E, int Dqk, int Dv, bool Softcap>
struct WideRowsConfig {
    using Element = E;
    static constexpr int DIM_QK = Dqk, DIM_V = Dv;
    static constexpr bool HAS_SOFTCAP = Softcap;
    static constexpr int KEY_STAGES = 2, VALUE_STAGES = SM90_BWD_WIDE_VALUE_STAGES(Dqk);

    // Of a warpgroup's rows, or of a tile of keys.
    static constexpr int QK_BYTES = WIDE_COLUMN * Dqk / 64, V_BYTES = WIDE_COLUMN * Dv / 64;
    static constexpr int QUERY = 0, D_OUTPUT = QUERY + 2 * QK_BYTES, KEY = D_OUTPUT + 2 * V_BYTES,
                         VALUE = KEY + KEY_STAGES * QK_BYTES, TASK = VALUE + VALUE_STAGES * V_BYTES,
                         BARRIERS = TASK + 64;
    static constexpr int SHARED_BYTES = SM90_BWD_WIDE_ROWS_BYTES(Dqk, Dv);
    static_assert(SHARED_BYTES == BARRIERS + 8 * 2 * (3 + KEY_STAGES + VALUE_STAGES) + 1024,
                  "1024 to align");
    static_assert(SHARED_BYTES <= 227 * 1024 && Dqk % 64 == 0 && Dv % 64 == 0, "");
};

template <class C>
struct WideRowsShared : WideShared<C> {
    using WideShared<C>::base, WideShared<C>::barrier;

    __device__ __forceinline__ uint32_t query(int wg) const {
        return base + C::QUERY + wg * C::QK_BYTES;
    }
    __device__ __forceinline__ uint32_t d_output(int wg) const {
        return base + C::D_OUTPUT + wg * C::V_BYTES;
    }
    __device__ __forceinline__ uint32_t key(int stage) const {
        return base + C::KEY + stage * C::QK_BYTES;
    }
    __device__ __forceinline__ uint32_t value(int stage) const {
        return base + C::VALUE + stage * C::V_BYTES;
    }
    __device__ __forceinline__ Ring<1> query_ring() const { return {barrier(2), barrier(3)}; }
    __device__ __forceinline__ Ring<1> d_output_ring() const { return {barrier(4), barrier(5)}; }
    __device__ __forceinline__ Ring<C::KEY_STAGES> key_ring() const {
        return {barrier(6), barrier(6 + C::KEY_STAGES)};
    }
    __device__ __forceinline__ Ring<C::VALUE_STAGES> value_ring() const {
        return {barrier(6 + 2 * C::KEY_STAGES), barrier(6 + 2 * C::KEY_STAGES + C::VALUE_STAGES)};
    }
};

// ---- The producer: one warp -----------------------------------------------------------------------------------------

template <class C>
struct WideRowsProducer {
    const sm90_bwd_params &p;
    const WideRowsShared<C> &s;
    Ring<1> tasks, queries, d_outputs;
    Ring<C::KEY_STAGES> keys;
    Ring<C::VALUE_STAGES> values;
    bool leads;

    __device__ __forceinline__ WideRowsProducer(const sm90_bwd_params &p,
                                                const WideRowsShared<C> &s)
        : p(p), s(s), tasks(s.task_ring()), queries(s.query_ring()), d_outputs(s.d_output_ring()),
          keys(s.key_ring()), values(s.value_ring()), leads(threadIdx.x % 32 == 0) {}

    // Q or dO of both warpgroups. No box begins behind the rows (see packed_row()); what the second then has, nobody uses.
    template <int DIM>
    __device__ __forceinline__ void load_own(const cuda_tensor_map &map, Ring<1> &ring,
                                             uint32_t dst, const WideTask &t) {
        constexpr int BYTES = WIDE_COLUMN * DIM / 64;
        mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
        if (leads) {
            mbarrier_expect_bytes(ring.full_barrier(), 2 * BYTES);
            for (int wg = 0; wg < 2; wg++)
                load_rows<DIM / 64, WIDE_COLUMN>(map, dst + wg * BYTES, ring.full_barrier(),
                                                 min(t.own + wg * WIDE_TILE, t.s.q_len - 1),
                                                 t.s.q_start, t.s.q_len, p.len_q, t.head,
                                                 p.cu_seqlens_q ? 0 : t.batch);
        }
        ring.advance();
    }

    // K or V of a tile.
    template <int DIM, int STAGES>
    __device__ __forceinline__ void load_tile(const cuda_tensor_map &map, Ring<STAGES> &ring,
                                              uint32_t dst, const WideTask &t, int tile) {
        mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
        if (leads) {
            mbarrier_expect_bytes(ring.full_barrier(), WIDE_COLUMN * DIM / 64);
            load_rows<DIM / 64, WIDE_COLUMN>(map, dst, ring.full_barrier(), tile * WIDE_TILE,
                                             t.s.k_start, t.s.k_len, p.len_k, t.head / p.group,
                                             p.cu_seqlens_k ? 0 : t.batch);
        }
        ring.advance();
    }

    __device__ __forceinline__ void load_key(const WideTask &t, int tile) {
        load_tile<C::DIM_QK>(p.key_map, keys, s.key(keys.stage), t, tile);
    }
    __device__ __forceinline__ void load_value(const WideTask &t, int tile) {
        load_tile<C::DIM_V>(p.value_map, values, s.value(values.stage), t, tile);
    }

    __device__ __forceinline__ void run() {
        for (;;) {
            const int index = uniform(leads ? atomicAdd(p.next + SM90_BWD_NEXT_ROWS, 1) : 0);
            mbarrier_wait(tasks.empty_barrier(), tasks.phase ^ 1);
            const WideTask found = row_task<C::DIM_QK>(p, index);
            const bool none = found.own < 0 || !p.d_query.data;
            const int first = found.first, end = found.end;
            if (leads) {
                *s.task() = found;
                if (none)
                    s.task()->own = -1;
                mbarrier_arrive(tasks.full_barrier());
            }
            tasks.advance();
            if (none)
                return;
            const WideTask &t = *s.task(); // for the thread that wrote it: registers are few
            for (int tile = first; tile < end; tile++) {
                load_key(t, tile);
                if (tile == first) {
                    load_own<C::DIM_QK>(p.query_map, queries, s.query(0), t);
                    load_own<C::DIM_V>(p.d_output_map, d_outputs, s.d_output(0), t);
                }
                load_value(t, tile);
            }
        }
    }
};

// ---- Consumers ------------------------------------------------------------------------------------------------------

// 64 rows of a warpgroup. A thread holds two rows, eight apart, and of every eight keys two.
template <class C>
struct WideRows {
    using E = typename C::Element;
    float score[WIDE_TILE / 2];    // S, then P times the derivative of the softcap
    float d_weight[WIDE_TILE / 2]; // dP
    float sums[C::DIM_QK / 2];
    uint32_t d_score[WIDE_TILE / 4]; // dS, the A operand of dQ
    float least[2], delta[2];        // -lse and -delta of the thread's rows

    const WideRowsShared<C> &s;
    int wg;
    Ring<1> queries, d_outputs;
    Ring<C::KEY_STAGES> keys;
    Ring<C::VALUE_STAGES> values;

    __device__ __forceinline__ WideRows(const WideRowsShared<C> &s, int wg)
        : s(s), wg(wg), queries(s.query_ring()), d_outputs(s.d_output_ring()), keys(s.key_ring()),
          values(s.value_ring()) {}

    __device__ __forceinline__ void begin(const sm90_bwd_params &p, const WideTask &t,
                                          int first_row) {
#pragma unroll
        for (int i = 0; i < C::DIM_QK / 2; i++)
            sums[i] = 0;
        if (first_row >= t.s.q_len)
            return;
        const float *const stats = wide_stats(p, t.head, t.first_tile + first_row / WIDE_TILE) +
                                   fragment_row(threadIdx.x % 128, 0);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            least[half] = stats[8 * half];
            delta[half] = stats[WIDE_TILE + 8 * half];
        }
    }

    // product = rows keys^T, from Q and K, or from dO and V
    template <int DIM>
    __device__ __forceinline__ void multiply(float (&product)[WIDE_TILE / 2], uint32_t rows,
                                             uint32_t keys) {
        const Descriptor a(rows, 16, 1024), b(keys, 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            const uint32_t at = k / 4 * WIDE_COLUMN + 32 * (k % 4);
            Wgmma<E, WIDE_TILE>::ss(product, a.at(at), b.at(at), k > 0);
        }
        wgmma_commit();
    }

    // dQ += dS K
    __device__ __forceinline__ void add(uint32_t keys) {
        const Descriptor b(keys, WIDE_COLUMN, 1024);
        pin(d_score);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < WIDE_TILE / 16; k++)
            Wgmma<E, C::DIM_QK>::rs(sums, d_score[4 * k], d_score[4 * k + 1], d_score[4 * k + 2],
                                    d_score[4 * k + 3], b.at(k * 16 * 128), true);
        wgmma_commit();
    }

    // Which keys of the tile the thread's rows see.
    __device__ __forceinline__ void find_visible(const sm90_bwd_params &p, const WideTask &t,
                                                 int first_row, int tile,
                                                 uint32_t (&visible)[2]) const {
        const int key = tile * WIDE_TILE + threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + fragment_row(threadIdx.x % 128, 2 * half);
            visible[half] = elements_between(t.s.low_key(p, row) - key, t.s.high_key(p, row) - key);
        }
    }

    template <bool MASKED>
    __device__ __forceinline__ void exponentials(const sm90_bwd_params &p,
                                                 const uint32_t (&visible)[2]) {
#pragma unroll
        for (int i = 0; i < WIDE_TILE / 2; i++) {
            const int half = i / 2 % 2;
            float slope;
            const float x = weight_of<C::HAS_SOFTCAP>(p, score[i], least[half], slope) * slope;
            score[i] = !MASKED || visible[half] >> (i / 4 * 2 + i % 2) & 1 ? x : 0;
        }
    }

    // dS = P (dP - delta), and 0 where P is: behind a mask dP may be NaN.
    template <bool MASKED>
    __device__ __forceinline__ void find_d_scores() {
#pragma unroll
        for (int i = 0; i < WIDE_TILE / 2; i += 2) {
            float x[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float d = score[i + j] * (d_weight[i + j] + delta[i / 2 % 2]);
                x[j] = MASKED && score[i + j] == 0 ? 0 : d;
            }
            d_score[i / 2] = pack<E>(x[0], x[1]);
        }
    }

    template <bool MASKED>
    __device__ __forceinline__ void step(const sm90_bwd_params &p, const WideTask &t, int first_row,
                                         int tile, bool last) {
        mbarrier_wait(keys.full_barrier(), keys.phase);
        multiply<C::DIM_QK>(score, s.query(wg), s.key(keys.stage));
        mbarrier_wait(d_outputs.full_barrier(), d_outputs.phase);
        mbarrier_wait(values.full_barrier(), values.phase);
        multiply<C::DIM_V>(d_weight, s.d_output(wg), s.value(values.stage));
        uint32_t visible[2];
        if (MASKED)
            find_visible(p, t, first_row, tile, visible);
        wgmma_wait<1>(); // S
        pin(score);
        if (last)
            release(queries.empty_barrier());
        exponentials<MASKED>(p, visible);
        wgmma_wait<0>();
        pin(d_weight);
        if (last)
            release(d_outputs.empty_barrier());
        release(values.empty_barrier());
        values.advance();
        find_d_scores<MASKED>();
        add(s.key(keys.stage));
        wgmma_wait<0>();
        release(keys.empty_barrier());
        keys.advance();
    }

    // A tile of keys that only rows of the other warpgroup see.
    __device__ __forceinline__ void pass() {
        mbarrier_wait(keys.full_barrier(), keys.phase);
        release(keys.empty_barrier());
        keys.advance();
        mbarrier_wait(values.full_barrier(), values.phase);
        release(values.empty_barrier());
        values.advance();
    }

    __device__ __forceinline__ void run(const sm90_bwd_params &p, const WideTask &t,
                                        int first_row) {
        int first, end;
        find_keys(p, t.s, first_row, WIDE_TILE, first, end);
        // Keys that all rows see; past the last row there are zeros, which need no mask.
        const int low = t.s.low_key(p, first_row + WIDE_TILE - 1),
                  high = t.s.high_key(p, first_row);
        mbarrier_wait(queries.full_barrier(), queries.phase);
        if (first == end) {
            mbarrier_wait(d_outputs.full_barrier(), d_outputs.phase);
            release(queries.empty_barrier());
            release(d_outputs.empty_barrier());
        }
#pragma unroll 1
        for (int tile = t.first; tile < t.end; tile++) {
            const int key = tile * WIDE_TILE;
            if (tile < first || tile >= end)
                pass();
            else if (key < low || key + WIDE_TILE > high)
                step<true>(p, t, first_row, tile, tile == end - 1);
            else
                step<false>(p, t, first_row, tile, tile == end - 1);
        }
        queries.advance();
        d_outputs.advance();
    }

    // Marks the head if some sum is not finite: perhaps only a hidden key is to blame.
    __device__ __forceinline__ void finish(const sm90_bwd_params &p, const WideTask &t,
                                           int first_row) {
        const int row = first_row + threadIdx.x % 128 / 32 * 16;
        float poison = 0;
        pin(sums);
#pragma unroll
        for (int i = 0; i < C::DIM_QK / 2; i++)
            poison = fmaf(sums[i], 0.f, poison);
        if (poison != 0)
            facts_of<C::DIM_QK>(p, t.batch, t.head / p.group)[SM90_BWD_ODD] = 1;
        store_sums<E>(p.d_query, p.cu_seqlens_q ? 0 : t.batch, t.head, t.s.q_start + row,
                      t.s.q_rows - row, p.dim_qk, p.scale, sums);
    }
};

template <class C>
__device__ __forceinline__ void consume_rows(const sm90_bwd_params &p, const WideRowsShared<C> &s,
                                             int wg) {
    WideRows<C> rows(s, wg);
    for (Ring<1> tasks = s.task_ring();; tasks.advance()) {
        mbarrier_wait(tasks.full_barrier(), tasks.phase);
        const WideTask t = *s.task();
        mbarrier_arrive(tasks.empty_barrier());
        if (t.own < 0)
            return;
        const int first_row = t.own + WIDE_TILE * wg;
        rows.begin(p, t, first_row);
        if (t.first < t.end)
            rows.run(p, t, first_row);
        if (!t.skipped)
            rows.finish(p, t, first_row);
    }
}

template <class C>
__device__ __forceinline__ void wide_rows(const sm90_bwd_params &p) {
    constexpr int WARPS = 8;
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    const WideRowsShared<C> s{base, raw + (base - shared_address(raw))};
    if (threadIdx.x == 0) {
        init_ring(s.task_ring(), 1, 32 * WARPS); // each thread reads the task
        init_ring(s.query_ring(), 1, WARPS);
        init_ring(s.d_output_ring(), 1, WARPS);
        init_ring(s.key_ring(), 1, WARPS);
        init_ring(s.value_ring(), 1, WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();
    const int role = uniform(threadIdx.x / 128);
    if (role == 0) {
        registers_decrease<SM90_BWD_WIDE_PRODUCER_REGISTERS>();
        if (uniform(threadIdx.x / 32) == 0)
            WideRowsProducer<C>(p, s).run();
    } else {
        registers_increase<SM90_BWD_WIDE_CONSUMER_REGISTERS>();
        consume_rows<C>(p, s, role - 1);
    }
    wait_for_predecessor();
}
