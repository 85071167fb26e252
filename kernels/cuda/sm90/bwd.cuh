// The gradients of attention on Hopper: five products for each tile of 128 keys and 64 rows. docs/cuda-backward.md draws the
// schedule.
//
// One block per SM claims tiles of keys. A producer warp brings K and V once, then Q and dO of every tile of rows that sees them; each
// of two consumer warpgroups owns 64 keys and keeps their dK and dV in registers, over all query heads of a group:
//     S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q      with P^T and dS^T straight from registers
//     dQ = dS K      half of the columns in each warpgroup, from the dS of both in shared memory
// dQ is added to the workspace in fixed point, so its bits do not depend on which block comes first.
#pragma once

#include "kernels/cuda/sm90/bwd_finish.cuh"
#include "kernels/cuda/sm90/bwd_prepare.cuh"
#include "kernels/cuda/sm90/pipeline.cuh"

template <typename E, int D, bool Softcap>
struct BwdConfig {
    using Element = E;
    static constexpr int DIM = D, COLUMNS = D / 64;
    static constexpr int QUERY_STAGES = SM90_BWD_QUERY_STAGES, STAGES = SM90_BWD_STAGES;
    static constexpr bool HAS_SOFTCAP = Softcap;
    // K and V are A operands of S and dP: out of registers where there are enough, which spares shared memory.
    static constexpr bool KEYS_IN_REGISTERS = D == 64;
    // dK and dV are stored before the last additions to dQ, behind which they would wait.
    static constexpr bool STORES_FIRST = D == 64;
    // A warp claims tasks and brings their K and V this many tiles of rows before they are needed, 0: the producer does when it has brought
    // the last rows of the task before. To claim one, to wait for its unit and to read what is known of that are reads of memory one after
    // the other, each behind the additions to dQ; earlier ones would leave blocks with unequal work.
    static constexpr int LEAD = D == 64 ? 3 : 0;
    static constexpr bool CLAIMS_AHEAD = LEAD > 0;
    static constexpr int THREADS = 384, PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

    // Tiles in shared memory: columns of 64 elements, swizzled by TMA.
    static constexpr int ROW_COLUMN = TILE_Q * 128, KEY_COLUMN = TILE_K * 128;
    static constexpr int ROW_BYTES = ROW_COLUMN * COLUMNS, KEY_BYTES = KEY_COLUMN * COLUMNS;
    static constexpr int SCORE_BYTES = TILE_K * 128; // dS^T: keys x rows
    // Of a tile of rows: the terms of S and of dP, 16 x 64 elements each with three rows that are not 0, and a tile that has ones there;
    // factors, and -lse for softcap.
    static constexpr int TERM_TILE = 16 * 128, STATS_BYTES = 2 * TILE_Q * 4;
    static constexpr int KEY = 0, VALUE = KEY + KEY_BYTES, QUERY = VALUE + KEY_BYTES;
    static constexpr int D_OUTPUT = QUERY + QUERY_STAGES * ROW_BYTES,
                         D_SCORE = D_OUTPUT + STAGES * ROW_BYTES;
    static constexpr int SCALED_KEY = D_SCORE + 2 * SCORE_BYTES; // for dQ: times column_factor()
    static constexpr int TERMS = SCALED_KEY + KEY_BYTES,
                         ONES = TERMS + QUERY_STAGES * 2 * TERM_TILE, STATS = ONES + TERM_TILE;
    static constexpr int FACTORS = STATS + QUERY_STAGES * STATS_BYTES; // of columns
    static constexpr int TASKS = FACTORS + D * 4, BARRIERS = TASKS + 2 * 64;
    static constexpr int SHARED_BYTES = SM90_BWD_SHARED_BYTES(D);
    static_assert(SM90_BWD_MAIN_BYTES(D) >= SHARED_BYTES &&
                      SM90_BWD_MAIN_BYTES(D) >= THREADS / 32 * ERRAND_BYTES<D> + 1024,
                  "errands have the same shared memory");
    static_assert(SHARED_BYTES == BARRIERS + 8 * (13 + 2 * QUERY_STAGES + 2 * STAGES) + 1024,
                  "1024 to align");
    static_assert(SM90_BWD_MAIN_BYTES(D) + 16 <= 227 * 1024 && D % 64 == 0, "");
};

template <class C>
struct BwdShared {
    uint32_t base;
    char *memory; // the same place

    __device__ __forceinline__ uint32_t query(int stage) const {
        return base + C::QUERY + stage * C::ROW_BYTES;
    }
    __device__ __forceinline__ uint32_t d_output(int stage) const {
        return base + C::D_OUTPUT + stage * C::ROW_BYTES;
    }
    __device__ __forceinline__ uint32_t d_score(int stage) const {
        return base + C::D_SCORE + stage * C::SCORE_BYTES;
    }
    __device__ __forceinline__ uint32_t terms(int stage, int which) const {
        return base + C::TERMS + (2 * stage + which) * C::TERM_TILE;
    }
    __device__ __forceinline__ const float *stats(int stage) const {
        return reinterpret_cast<const float *>(memory + C::STATS + stage * C::STATS_BYTES);
    }
    __device__ __forceinline__ float *factors() const {
        return reinterpret_cast<float *>(memory + C::FACTORS);
    }
    __device__ __forceinline__ Task *task(int n) const {
        return reinterpret_cast<Task *>(memory + C::TASKS) + (C::CLAIMS_AHEAD ? n % 2 : 0);
    }
    __device__ __forceinline__ uint32_t barrier(int i) const { return base + C::BARRIERS + 8 * i; }
    __device__ __forceinline__ Ring<1> task_ring() const { return {barrier(0), barrier(1)}; }
    __device__ __forceinline__ Ring<2> d_score_ring() const { return {barrier(2), barrier(4)}; }
    __device__ __forceinline__ Ring<C::QUERY_STAGES> query_ring() const {
        return {barrier(6), barrier(6 + C::QUERY_STAGES)};
    }
    __device__ __forceinline__ Ring<C::STAGES> d_output_ring() const {
        return {barrier(6 + 2 * C::QUERY_STAGES), barrier(6 + 2 * C::QUERY_STAGES + C::STAGES)};
    }
    // The consumers have added all of a task's dQ.
    __device__ __forceinline__ uint32_t summed_barrier(int task) const {
        return barrier(6 + 2 * C::QUERY_STAGES + 2 * C::STAGES + task % 2);
    }
    // CLAIMS_AHEAD: tasks that are known, though their K and V may not be there; and that the rows of one will soon have come.
    __device__ __forceinline__ Ring<2> claim_ring() const {
        const int first = 8 + 2 * C::QUERY_STAGES + 2 * C::STAGES;
        return {barrier(first), barrier(first + 2)};
    }
    __device__ __forceinline__ uint32_t soon_barrier() const { return claim_ring().empty + 16; }
    // By each warp that reads a task.
    __device__ __forceinline__ Task take(int n) const {
        const Task t = *task(n);
        if (C::CLAIMS_AHEAD) {
            __syncwarp();
            release(claim_ring().empty + 8 * (n % 2));
        }
        return t;
    }
};

template <class C>
__device__ __forceinline__ void init_bwd_barriers(const BwdShared<C> &s) {
    constexpr int CONSUMER_WARPS = 8;
    mbarrier_init(s.task_ring().full, 2);                          // keys and values; and factors
    mbarrier_init(s.task_ring().empty, 32 * (CONSUMER_WARPS + 1)); // each thread reads the task
    mbarrier_init(s.soon_barrier(), 1);
    for (int i = 0; i < 2; i++) {
        mbarrier_init(s.claim_ring().full + 8 * i, 1);
        mbarrier_init(s.claim_ring().empty + 8 * i,
                      CONSUMER_WARPS + 2); // of those that produce and report
        mbarrier_init(s.summed_barrier(i), CONSUMER_WARPS);
        mbarrier_init(s.d_score_ring().full + 8 * i, CONSUMER_WARPS);
        mbarrier_init(s.d_score_ring().empty + 8 * i, CONSUMER_WARPS);
    }
    for (int i = 0; i < C::QUERY_STAGES; i++) {
        mbarrier_init(s.query_ring().full + 8 * i, 1);
        mbarrier_init(s.query_ring().empty + 8 * i, CONSUMER_WARPS);
    }
    for (int i = 0; i < C::STAGES; i++) {
        mbarrier_init(s.d_output_ring().full + 8 * i, 1);
        mbarrier_init(s.d_output_ring().empty + 8 * i, CONSUMER_WARPS);
    }
    mbarrier_init_fence();
}

// ---- Producers: a warp for rows, which may leave tasks to another -----------------------------------------------------------------------------------------

// Rows [row, row + box) of a sequence that takes part with `length` rows from `start` on: zeros behind its end.
template <int COLUMNS, int COLUMN_BYTES>
__device__ __forceinline__ void load_rows(const cuda_tensor_map &map, uint32_t dst,
                                          uint32_t barrier, int row, int start, int length,
                                          int extent, int head, int batch) {
    for (int c = 0; c < COLUMNS; c++)
        tma_load_5d(dst + c * COLUMN_BYTES, &map, barrier, evict_last(), 64 * c,
                    extent - length + row, start + length, head, batch);
}

// The K and V of a task, when those of the one before have been read. They need not wait for its unit.
template <class C>
__device__ __forceinline__ void bring_keys(const sm90_bwd_params &p, const BwdShared<C> &s,
                                           const Ring<1> &tasks, const Task &t) {
    const int batch = p.cu_seqlens_k ? 0 : t.batch;
    mbarrier_wait(tasks.empty_barrier(), tasks.phase ^ 1);
    if (threadIdx.x % 32 != 0)
        return;
    if (!t.has_rows()) {
        mbarrier_arrive(tasks.full_barrier());
        return;
    }
    mbarrier_expect_bytes(tasks.full_barrier(), 2 * C::KEY_BYTES);
    load_rows<C::COLUMNS, C::KEY_COLUMN>(p.key_map, s.base + C::KEY, tasks.full_barrier(),
                                         t.first_key(), t.s.k_start, t.s.k_len, p.len_k, t.kv_head,
                                         batch);
    load_rows<C::COLUMNS, C::KEY_COLUMN>(p.value_map, s.base + C::VALUE, tasks.full_barrier(),
                                         t.first_key(), t.s.k_start, t.s.k_len, p.len_k, t.kv_head,
                                         batch);
}

// What is known of the unit of a task, once it is prepared: whether it is skipped, and the factors of its columns, of a lane those 32 apart.
template <class C>
struct Prepared {
    float factor[C::DIM / 32];

    __device__ __forceinline__ Prepared(const sm90_bwd_params &p, Task &t) {
        if (t.key_tile < 0)
            return;
        const int unit = t.batch * p.heads_kv + t.kv_head;
        const uint32_t *const facts = facts_of<C::DIM>(p, unit);
        wait_for_count(facts + SM90_BWD_PREPARED, Unit(p, unit).errands());
        t.skipped = __ldcg(facts + SM90_BWD_ODD);
        const int exponent = value_exponent(p, facts);
#pragma unroll
        for (int c = 0; c < C::DIM / 32; c++)
            factor[c] = column_factor(facts, exponent, threadIdx.x % 32 + 32 * c);
    }
    // To the consumers, behind bring_keys().
    __device__ __forceinline__ void tell(const BwdShared<C> &s, const Ring<1> &tasks) const {
#pragma unroll
        for (int c = 0; c < C::DIM / 32; c++)
            s.factors()[threadIdx.x % 32 + 32 * c] = factor[c];
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            mbarrier_arrive(tasks.full_barrier());
    }
};

// Whether the phase with this parity has completed.
__device__ __forceinline__ bool mbarrier_has_completed(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}\n"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

// mbarrier_wait() by a warp in no hurry: polling takes issue slots and shared memory from those that multiply.
__device__ __forceinline__ void wait_asleep(uint32_t barrier, uint32_t parity) {
    while (!mbarrier_has_completed(barrier, parity))
        __nanosleep(500);
}

template <class C>
__device__ __forceinline__ void claim_tasks(const sm90_bwd_params &p, const BwdShared<C> &s) {
    Ring<1> tasks = s.task_ring();
    Ring<2> claims = s.claim_ring();
    for (int n = 0;; n++) {
        if (n > 0)
            wait_asleep(s.soon_barrier(), n - 1 & 1);
        Task t = next_task(p);
        bring_keys(p, s, tasks, t);
        const Prepared<C> prepared(p, t);
        mbarrier_wait(claims.empty_barrier(), claims.phase ^ 1);
        if (threadIdx.x % 32 == 0) {
            *s.task(n) = t;
            mbarrier_arrive(claims.full_barrier());
        }
        claims.advance();
        prepared.tell(s, tasks);
        tasks.advance();
        if (t.key_tile < 0)
            return;
    }
}

// Q and dO of the rows of a task, and what rows have besides.
template <class C>
struct RowProducer {
    const sm90_bwd_params &p;
    const BwdShared<C> &s;
    const bool leads = threadIdx.x % 32 == 0;
    Ring<C::QUERY_STAGES> queries;
    Ring<C::STAGES> d_outputs;

    __device__ __forceinline__ RowProducer(const sm90_bwd_params &p, const BwdShared<C> &s)
        : p(p), s(s), queries(s.query_ring()), d_outputs(s.d_output_ring()) {}

    __device__ __forceinline__ void load_query(const Task &t, const Walk &walk) {
        mbarrier_wait(queries.empty_barrier(), queries.phase ^ 1);
        if (leads) {
            mbarrier_expect_bytes(queries.full_barrier(),
                                  C::ROW_BYTES + C::STATS_BYTES + 2 * TERM_BYTES);
            load_rows<C::COLUMNS, C::ROW_COLUMN>(
                p.query_map, s.query(queries.stage), queries.full_barrier(), walk.tile * TILE_Q,
                t.s.q_start, t.s.q_len, p.len_q, walk.head, p.cu_seqlens_q ? 0 : t.batch);
            const char *const rows = rows_of(p, walk.head, t.first_tile + walk.tile);
            bulk_load(s.base + C::STATS + queries.stage * C::STATS_BYTES, rows, C::STATS_BYTES,
                      queries.full_barrier());
            for (int i = 0; i < 2; i++)
                bulk_load(s.terms(queries.stage, i), rows + STATS_BYTES + i * TERM_BYTES,
                          TERM_BYTES, queries.full_barrier());
        }
        queries.advance();
    }
    __device__ __forceinline__ void load_d_output(const Task &t, const Walk &walk) {
        mbarrier_wait(d_outputs.empty_barrier(), d_outputs.phase ^ 1);
        if (leads) {
            mbarrier_expect_bytes(d_outputs.full_barrier(), C::ROW_BYTES);
            load_rows<C::COLUMNS, C::ROW_COLUMN>(p.d_output_map, s.d_output(d_outputs.stage),
                                                 d_outputs.full_barrier(), walk.tile * TILE_Q,
                                                 t.s.q_start, t.s.q_len, p.len_q, walk.head,
                                                 p.cu_seqlens_q ? 0 : t.batch);
        }
        d_outputs.advance();
    }
    // All but the first query, which is on its way.
    __device__ __forceinline__ void load_rows_of(const Task &t, Walk &walk) {
        const int steps = t.steps(p);
        if (C::CLAIMS_AHEAD && leads && steps == 0)
            mbarrier_arrive(s.soon_barrier());
        for (int i = 0; i < steps; i++) {
            if (C::CLAIMS_AHEAD && leads && i == max(steps - C::LEAD, 0))
                mbarrier_arrive(s.soon_barrier());
            load_d_output(t, walk);
            walk.advance();
            if (i + 1 < steps)
                load_query(t, walk);
        }
    }
};

template <class C>
__device__ __forceinline__ void produce(const sm90_bwd_params &p, const BwdShared<C> &s) {
    RowProducer<C> rows(p, s);
    if constexpr (C::CLAIMS_AHEAD) {
        Ring<2> claims = s.claim_ring();
        for (int n = 0;; n++) {
            mbarrier_wait(claims.full_barrier(), claims.phase);
            claims.advance();
            const Task t = s.take(n);
            if (t.key_tile < 0)
                return;
            global_proxy_fence(); // what rows have besides was not written by copies
            Walk walk(p, t);
            if (t.steps(p) > 0)
                rows.load_query(t, walk);
            rows.load_rows_of(t, walk);
        }
    } else {
        Ring<1> tasks = s.task_ring();
        for (;;) {
            Task t = next_task(p);
            const Prepared<C> prepared(p, t);
            Walk walk(p, t);
            global_proxy_fence();
            if (t.key_tile >= 0 && t.steps(p) > 0)
                rows.load_query(t, walk);
            bring_keys(p, s, tasks, t);
            if (threadIdx.x % 32 == 0)
                *s.task(0) = t;
            prepared.tell(s, tasks);
            tasks.advance();
            if (t.key_tile < 0)
                return;
            rows.load_rows_of(t, walk);
        }
    }
}

// ---- Another warp tells those who run errands what is summed ---------------------------------------------------------

// So that consumers need not wait, as a fence does, for all that they have written. They are at most two tasks ahead, for a task is
// released only here: no barrier is passed twice before this warp has looked.
template <class C>
__device__ __forceinline__ void report(const sm90_bwd_params &p, const BwdShared<C> &s) {
    const Ring<1> tasks = s.task_ring();
    for (int n = 0;; n++) {
        mbarrier_wait(tasks.full, n & 1);
        const Task t = s.take(n);
        const bool any = t.key_tile >= 0;
        uint32_t *const facts = facts_of<C::DIM>(p, t.batch, t.kv_head);
        __syncwarp();
        mbarrier_arrive(tasks.empty);
        if (!any)
            return;
        wait_asleep(s.summed_barrier(n), n >> 1 & 1);
        if (threadIdx.x % 32 == 0)
            count_release(facts + SM90_BWD_SUMMED);
    }
}

// ---- Consumers ------------------------------------------------------------------------------------------------------

// 64 keys of a warpgroup. A thread holds two keys, `half` 0 and 1, eight apart, and of every eight rows two: element
// 4 * (row / 8) + 2 * half + (row & 1) of its arrays.
template <class C>
struct Keys {
    using E = typename C::Element;
    static constexpr int SCORES = TILE_Q / 2, SUMS = C::DIM / 2, QUERY_SUMS = C::DIM / 4,
                         OPERAND = C::KEYS_IN_REGISTERS ? C::DIM / 4 : 4;

    float score[SCORES];    // S, then P, then P times the derivative of the cap
    float d_weight[SCORES]; // dP, then dS
    float d_key[SUMS], d_value[SUMS];
    uint32_t weight[SCORES / 2], d_score[SCORES / 2]; // P and dS as the A operand of dV and dK

    uint32_t key_operand[OPERAND], value_operand[OPERAND];

    const BwdShared<C> &s;
    int wg;
    Ring<C::QUERY_STAGES> queries;
    Ring<C::STAGES> d_outputs;
    Ring<2> d_scores;
    // dQ of the tile before, whose dS are in shared memory: its place in the workspace, and the factors of the thread's rows.
    int32_t *sums;
    float factor[2];

    __device__ __forceinline__ Keys(const BwdShared<C> &s, int wg)
        : s(s), wg(wg), queries(s.query_ring()), d_outputs(s.d_output_ring()),
          d_scores(s.d_score_ring()) {}

    template <int COUNT>
    static __device__ __forceinline__ void clear(float (&x)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            x[i] = 0;
    }

    // The keys or values of this warp as A operand.
    __device__ __forceinline__ void load_operand(uint32_t (&operand)[OPERAND],
                                                 uint32_t keys) const {
        const int lane = threadIdx.x & 31,
                  key = 64 * wg + threadIdx.x % 128 / 32 * 16 + (lane & 15);
#pragma unroll
        for (int k = 0; k < OPERAND / 4; k++) {
            uint32_t w[4];
            load_matrices(w, (keys + 128 * key + ((lane >> 4 ^ (lane & 7)) << 4)) ^ k << 5);
#pragma unroll
            for (int i = 0; i < 4; i++)
                operand[4 * k + i] = w[i];
        }
    }

    // result^T = keys rows^T, from K and Q, or from V and dO; plus what rows have.
    template <bool TERMS = true>
    __device__ __forceinline__ void multiply(float (&result)[SCORES],
                                             const uint32_t (&operand)[OPERAND], uint32_t keys,
                                             uint32_t rows, uint32_t terms) {
        const Descriptor a(keys + wg * 64 * 128, 16, 1024), b(rows, 16, 1024);
        if (TERMS)
            Wgmma<E, TILE_Q>::ss_transposed(result, Descriptor(s.base + C::ONES, 16, 1024).at(0),
                                            Descriptor(terms, 16, 1024).at(0), false);
#pragma unroll
        for (int k = 0; k < C::DIM / 16; k++) {
            const uint64_t b_at = b.at(k / 4 * C::ROW_COLUMN + 32 * (k % 4));
            if constexpr (C::KEYS_IN_REGISTERS)
                Wgmma<E, TILE_Q>::template rs<0>(result, operand[4 * k], operand[4 * k + 1],
                                                 operand[4 * k + 2], operand[4 * k + 3], b_at,
                                                 TERMS || k > 0);
            else
                Wgmma<E, TILE_Q>::ss(result, a.at(k / 4 * C::KEY_COLUMN + 32 * (k % 4)), b_at,
                                     TERMS || k > 0);
        }
        wgmma_commit();
    }

    // S of the tile at a stage, less lse
    __device__ __forceinline__ void start_scores(int stage) {
        wgmma_fence();
        multiply<!C::HAS_SOFTCAP>(score, key_operand, s.base + C::KEY, s.query(stage),
                                  s.terms(stage, 0));
    }

    // dP of this tile, less delta
    __device__ __forceinline__ void start_d_weights() {
        wgmma_fence();
        multiply(d_weight, value_operand, s.base + C::VALUE, s.d_output(d_outputs.stage),
                 s.terms(queries.stage, 1));
    }

    // sums += weights^T rows, with P and dO, or with dS and Q
    __device__ __forceinline__ void add(float (&sums)[SUMS], const uint32_t (&weights)[SCORES / 2],
                                        uint32_t rows) {
        const Descriptor b(rows, C::ROW_COLUMN, 1024);
#pragma unroll
        for (int k = 0; k < TILE_Q / 16; k++)
            Wgmma<E, C::DIM>::rs(sums, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2],
                                 weights[4 * k + 3], b.at(k * 16 * 128), true);
        wgmma_commit();
    }

    // The K of this warpgroup times the factor of each column, for dQ: a power of two, so that nothing is rounded but what is 2^-24
    // of the column's largest.
    __device__ __forceinline__ void scale_keys() const {
        constexpr int CHUNKS = C::DIM / 8;
        named_barrier_sync(1, 256); // both warpgroups are done with those of the last task
        for (int i = threadIdx.x % 128; i < 64 * CHUNKS; i += 128) {
            const int key = 64 * wg + i / CHUNKS, chunk = i % CHUNKS;
            const int place = chunk / 8 * C::KEY_COLUMN + key * 128 + ((chunk % 8 ^ key % 8) << 4);
            const float *const factor = s.factors() + 8 * chunk;
            uint4 raw = *reinterpret_cast<const uint4 *>(s.memory + C::KEY + place);
            E *const e = reinterpret_cast<E *>(&raw);
#pragma unroll
            for (int c = 0; c < 8; c++)
                e[c] = E(float(e[c]) * factor[c]);
            *reinterpret_cast<uint4 *>(s.memory + C::SCALED_KEY + place) = raw;
        }
        async_proxy_fence(); // the other warpgroup reads them after the first dS of this one
    }

    // dQ = dS K of the tile before, the warpgroup's half of the columns
    __device__ __forceinline__ void start_d_query(float (&d_query)[QUERY_SUMS],
                                                  const Ring<2> &before) {
        mbarrier_wait(before.full_barrier(), before.phase);
        wgmma_fence();
        const uint32_t column = wg * (C::DIM / 2) / 64 * C::KEY_COLUMN + wg * (C::DIM / 2) % 64 * 2;
        const Descriptor a(s.d_score(before.stage), 16, 1024),
            b(s.base + C::SCALED_KEY + column, C::KEY_COLUMN, 1024);
#pragma unroll
        for (int k = 0; k < TILE_K / 16; k++)
            Wgmma<E, C::DIM / 2>::ss_transposed(d_query, a.at(k * 16 * 128), b.at(k * 16 * 128),
                                                k > 0);
        wgmma_commit();
    }

    // Rows of this thread, two of every eight, among the first `count` from its first one on.
    static __device__ __forceinline__ int rows_before(int count) {
        const int inside = min(max(count, 0), TILE_Q);
        return inside / 8 * 2 + min(inside % 8, 2);
    }

    // Which rows of the tile see the thread's keys by the windows: a bit for each.
    __device__ __forceinline__ void find_visible(const sm90_bwd_params &p, const Task &t, int tile,
                                                 uint32_t (&visible)[2]) const {
        const int row = tile * TILE_Q + threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = t.first_key() + 64 * wg + fragment_row(threadIdx.x % 128, 2 * half);
            const int low = key - t.s.diagonal - p.window_right - row,
                      high = key < t.s.k_len ? key - t.s.diagonal + p.window_left + 1 - row : 0;
            const int begin = rows_before(low);
            visible[half] = ones(begin, max(rows_before(high) - begin, 0));
        }
    }

    // Two numbers of `stats` for the rows of the thread in each group of eight.
    static __device__ __forceinline__ float2 of_rows(const float *stats, int which, int n) {
        return *reinterpret_cast<const float2 *>(stats + which * TILE_Q + 8 * n +
                                                 threadIdx.x % 4 * 2);
    }

    // S -> P = 2^(scale_log2 S) of what rows see, and P rounded for the product.
    template <bool MASKED>
    __device__ __forceinline__ void exponentials(const sm90_bwd_params &p, const float *stats,
                                                 const uint32_t (&visible)[2]) {
#pragma unroll
        for (int n = 0; n < TILE_Q / 8; n++) {
            const float2 lse = C::HAS_SOFTCAP ? of_rows(stats, SM90_BWD_LSE, n) : make_float2(0, 0);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float *const x = score + 4 * n + 2 * half;
                float slope[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    slope[i] = C::HAS_SOFTCAP ? cap(p, x[i]) : 1;
                    x[i] = exp2_approx(fmaf(x[i], p.scale_log2, i ? lse.y : lse.x));
                    if (MASKED)
                        x[i] = visible[half] >> (2 * n + i) & 1 ? x[i] : 0;
                }
                weight[2 * n + half] = pack<E>(x[0], x[1]);
                x[0] *= slope[0];
                x[1] *= slope[1];
            }
        }
    }

    // x -> softcap tanh(scale x / softcap); gives the derivative by scale x. tanh(y) = 1 - 2 / (exp(2 y) + 1)
    static __device__ __forceinline__ float cap(const sm90_bwd_params &p, float &x) {
        const float twice = 2 * LOG2E * p.scale / p.softcap;
        const float tanh = 1 - 2 * reciprocal_approx(exp2_approx(x * twice) + 1);
        x = p.softcap * tanh;
        return 1 - tanh * tanh;
    }

    // dS = P (dP - delta), rounded for the products.
    __device__ __forceinline__ void find_d_scores() {
#pragma unroll
        for (int i = 0; i < SCORES / 2; i++)
            d_score[i] =
                pack<E>(score[2 * i] * d_weight[2 * i], score[2 * i + 1] * d_weight[2 * i + 1]);
    }

    // The dS of this warp, where both warpgroups read them once they have those of the tile before the last.
    __device__ __forceinline__ void share_d_scores() {
        mbarrier_wait(d_scores.empty_barrier(), d_scores.phase ^ 1);
        const int lane = threadIdx.x & 31,
                  key = 64 * wg + threadIdx.x % 128 / 32 * 16 + (lane & 15);
        const uint32_t place =
            s.d_score(d_scores.stage) + 128 * key + ((lane >> 4 ^ (lane & 7)) << 4);
#pragma unroll
        for (int k = 0; k < TILE_Q / 16; k++) {
            const uint32_t w[4] = {d_score[4 * k], d_score[4 * k + 1], d_score[4 * k + 2],
                                   d_score[4 * k + 3]};
            store_matrices(place ^ k << 5, w);
        }
        async_proxy_fence();
        __syncwarp();
        release(d_scores.full_barrier());
    }

    // Where the dQ of this tile goes.
    __device__ __forceinline__ void find_sums(const sm90_bwd_params &p, const Task &t,
                                              const Walk &walk, const float *stats) {
        const int thread = threadIdx.x % 128;
#pragma unroll
        for (int half = 0; half < 2; half++)
            factor[half] = stats[SM90_BWD_FACTOR * TILE_Q + fragment_row(thread, 2 * half)];
        const int head = walk.head - t.kv_head * p.group;
        sums = sums_of<C::DIM>(p, t.first_sums + head * p.row_tiles + walk.tile) +
               wg * (TILE_Q * C::DIM / 2) + thread;
    }

    // x times a power of two as an integer, below 2^30: in two parts that land in the last bits of sums, which are chosen so that
    // what these begin with cancels modulo 2^32. Conversions share a unit with exponentials; half of them this way balances it.
    static __device__ __forceinline__ int32_t round_by_adding(float x, float factor) {
        const float coarse = __int_as_float(159 << 23 | 0x5a6000), fine = 0x1.8p23f;
        const float high = fmaf(x, factor, coarse);
        const float low = fmaf(x, factor, -(high - coarse)) + fine;
        return (__float_as_int(high) << 9) + __float_as_int(low);
    }

    // Adds dQ to the sums of its rows, in fixed point.
    __device__ __forceinline__ void add_d_query(const float (&d_query)[QUERY_SUMS]) const {
#pragma unroll
        for (int i = 0; i < QUERY_SUMS; i++)
            add_relaxed(sums + i * 128, i % 2 ? round_by_adding(d_query[i], factor[i / 2 % 2])
                                              : __float2int_rn(d_query[i] * factor[i / 2 % 2]));
    }

    template <bool MASKED, bool FIRST, bool LAST>
    __device__ __forceinline__ void step(const sm90_bwd_params &p, const Task &t, const Walk &walk);
    __device__ __forceinline__ void run(const sm90_bwd_params &p, const Task &t);
    __device__ __forceinline__ void store_gradients(const sm90_bwd_params &p, const Task &t);
    template <int COUNT>
    __device__ __forceinline__ void store(const sm90_gradient &gradient, const Task &t, int start,
                                          int batch, int dim, float scale, float (&sums)[COUNT]);
};

// One tile of rows, whose S is there; finds that of the next one, and dQ of the one before. So the
// warpgroups need not keep step. No product is under way when it returns: ptxas would wait for each, if paths met meanwhile.
template <class C>
template <bool MASKED, bool FIRST, bool LAST>
__device__ __forceinline__ void Keys<C>::step(const sm90_bwd_params &p, const Task &t,
                                              const Walk &walk) {
    const float *const stats = s.stats(queries.stage);
    mbarrier_wait(d_outputs.full_barrier(), d_outputs.phase);
    start_d_weights();
    uint32_t visible[2];
    if (MASKED)
        find_visible(p, t, walk.tile, visible);
    exponentials<MASKED>(p, stats, visible);
    wgmma_fence();
    add(d_value, weight, s.d_output(d_outputs.stage));
    wgmma_wait<1>(); // dP
    pin(d_weight);
    if (LAST && !C::KEYS_IN_REGISTERS)
        mbarrier_arrive(s.task_ring().empty); // the next K and V may come
    find_d_scores();
    Ring<2> before = d_scores;
    share_d_scores();
    d_scores.advance();
    before.retreat();
    float d_query[QUERY_SUMS];
    if (!FIRST)
        start_d_query(d_query, before);
    wgmma_wait<FIRST ? 0 : 1>(); // dV: its weights leave their registers to others
    release(d_outputs.empty_barrier());
    wgmma_fence();
    add(d_key, d_score, s.query(queries.stage));
    if (!FIRST) {
        wgmma_wait<1>(); // dQ
        pin(d_query);
        release(before.empty_barrier());
    }
    Ring<C::QUERY_STAGES> next = queries;
    next.advance();
    if (!LAST) {
        mbarrier_wait(next.full_barrier(), next.phase);
        start_scores(next.stage);
    }
    if (!FIRST)
        add_d_query(d_query);
    find_sums(p, t, walk, stats);
    wgmma_wait<LAST ? 0 : 1>(); // dK
    __syncwarp();
    release(queries.empty_barrier());
    queries = next;
    d_outputs.advance();
    if (LAST)
        return;
    wgmma_wait<0>();
    pin(score);
}

// A task whose K and V are there.
template <class C>
__device__ __forceinline__ void Keys<C>::run(const sm90_bwd_params &p, const Task &t) {
    Walk walk(p, t);
    int left = t.steps(p);
    scale_keys();
    if (C::KEYS_IN_REGISTERS) {
        load_operand(key_operand, s.base + C::KEY);
        load_operand(value_operand, s.base + C::VALUE);
        __syncwarp();
        mbarrier_arrive(s.task_ring().empty); // the next K and V may come
    }
    mbarrier_wait(queries.full_barrier(), queries.phase);
    start_scores(queries.stage);
    wgmma_wait<0>();
    pin(score);
    if (left == 1) {
        step<true, true, true>(p, t, walk);
    } else {
        step<true, true, false>(p, t, walk);
        walk.advance();
#pragma unroll 1
        for (; left > 2; left--) {
            if (t.is_masked(p, walk.tile, wg))
                step<true, false, false>(p, t, walk);
            else
                step<false, false, false>(p, t, walk);
            walk.advance();
        }
        step<true, false, true>(p, t, walk);
    }
    Ring<2> before = d_scores;
    before.retreat();
    float d_query[QUERY_SUMS];
    start_d_query(d_query, before);
    pin(d_key);
    pin(d_value);
    if (C::STORES_FIRST)
        store_gradients(p, t);
    wgmma_wait<0>();
    pin(d_query);
    release(before.empty_barrier());
    add_d_query(d_query);
}

template <class C>
__device__ __forceinline__ void Keys<C>::store_gradients(const sm90_bwd_params &p, const Task &t) {
    const int batch = p.cu_seqlens_k ? 0 : t.batch;
    store(p.d_value, t, t.s.k_start, batch, p.dim_v, 1, d_value);
    store(p.d_key, t, t.s.k_start, batch, p.dim_qk, p.scale, d_key);
}

// Sums of the warp's 16 keys to the tensor, 64 columns at a time through shared memory, where its next dS will be.
template <class C>
template <int COUNT>
__device__ __forceinline__ void Keys<C>::store(const sm90_gradient &gradient, const Task &t,
                                               int start, int batch, int dim, float scale,
                                               float (&sums)[COUNT]) {
    if (!gradient.data)
        return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x % 128 / 32;
    const int first = t.first_key() + 64 * wg + 16 * warp, rows = t.s.k_rows - first;
    const int64_t pitch = gradient.strides.row;
    if (gradient.is_float) {
        float *const out = row_of(static_cast<float *>(gradient.data), gradient.strides, batch,
                                  t.kv_head, start + first);
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            const int row = fragment_row(lane, i), column = fragment_column(lane, i);
            if (row < rows && column < dim)
                *reinterpret_cast<float2 *>(out + row * pitch + column) =
                    make_float2(sums[i] * scale, sums[i + 1] * scale);
        }
        return;
    }
    E *const out =
        row_of(static_cast<E *>(gradient.data), gradient.strides, batch, t.kv_head, start + first);
    mbarrier_wait(d_scores.empty_barrier(), d_scores.phase ^ 1);
    const int slot = C::D_SCORE + d_scores.stage * C::SCORE_BYTES + (4 * wg + warp) * 16 * 128;
    const uint32_t row_of_lane =
        s.base + slot + 128 * (lane & 15) + ((lane >> 4 ^ (lane & 7)) << 4);
#pragma unroll
    for (int column = 0; column < C::COLUMNS; column++) {
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float *const x = sums + 32 * column + 8 * k;
            const uint32_t w[4] = {
                pack<E>(x[0] * scale, x[1] * scale), pack<E>(x[2] * scale, x[3] * scale),
                pack<E>(x[4] * scale, x[5] * scale), pack<E>(x[6] * scale, x[7] * scale)};
            store_matrices(row_of_lane ^ k << 5, w);
        }
        __syncwarp();
        const int chunk = lane % 8;
#pragma unroll
        for (int row = lane / 8; row < 16; row += 4)
            if (row < rows && 64 * column + 8 * chunk < dim)
                *reinterpret_cast<uint4 *>(out + row * pitch + 64 * column + 8 * chunk) =
                    *reinterpret_cast<const uint4 *>(s.memory + slot + 128 * row +
                                                     ((chunk ^ (row & 7)) << 4));
    }
}

template <class C>
__device__ __forceinline__ void consume_tasks(const sm90_bwd_params &p, const BwdShared<C> &s,
                                              int wg) {
    Keys<C> keys(s, wg);
    const Ring<1> tasks = s.task_ring();
    for (int n = 0;; n++) {
        mbarrier_wait(tasks.full, n & 1);
        const Task t = s.take(n);
        if (t.key_tile < 0)
            return;
        keys.clear(keys.d_key);
        keys.clear(keys.d_value);
        const bool has_steps = t.steps(p) > 0;
        if (has_steps)
            keys.run(p, t);
        __syncwarp();
        if (!has_steps)
            mbarrier_arrive(tasks.empty);
        release(s.summed_barrier(n));
        if (!t.skipped && !(C::STORES_FIRST && has_steps))
            keys.store_gradients(p, t);
    }
}

template <class C>
__device__ __forceinline__ void init_shared(const sm90_bwd_params &p, const BwdShared<C> &s) {
    if (threadIdx.x == 0) {
        tma_prefetch_map(&p.query_map);
        tma_prefetch_map(&p.d_output_map);
        tma_prefetch_map(&p.key_map);
        tma_prefetch_map(&p.value_map);
        init_bwd_barriers<C>(s);
    }
    for (int i = threadIdx.x; i < (C::STATS - C::TERMS) / 4; i += C::THREADS) {
        const int in_ones = i - (C::ONES - C::TERMS) / 4;
        reinterpret_cast<uint32_t *>(s.memory + C::TERMS)[i] =
            in_ones >= 0 && in_ones < TERM_BYTES / 4 ? pack<typename C::Element>(1, 1) : 0;
    }
    async_proxy_fence();
}

template <class C>
__device__ __forceinline__ void backward(const sm90_bwd_params &p) {
    using E = typename C::Element;
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    const BwdShared<C> s{base, raw + (base - shared_address(raw))};
    const int warp = uniform(threadIdx.x / 32), warpgroup = warp / 4;
    const auto buffers = [&](int n) {
        return Buffers{base + n * ERRAND_BYTES<C::DIM>, s.memory + n * ERRAND_BYTES<C::DIM>};
    };
    wait_for_predecessor();
    // Of the blocks that have come so far at least one, and the right share, run errands; once there are two, one multiplies.
    const bool runs_errands =
        threadIdx.x == 0 &&
        atomicAdd(p.next + SM90_BWD_NEXT_BLOCK, 1) * p.errand_blocks % gridDim.x < p.errand_blocks;
    run_first_errands<E, C::DIM>(p, buffers(warp));
    if (__syncthreads_or(runs_errands)) {
        run_errands<E, C::DIM>(p, buffers(warp));
        return;
    }
    init_shared<C>(p, s);
    __syncthreads();
    if (warpgroup == 0) {
        registers_decrease<C::PRODUCER_REGISTERS>();
        if (warp == 0)
            produce<C>(p, s);
        else if (warp == 1)
            report<C>(p, s);
        else if (C::CLAIMS_AHEAD && warp == 2)
            claim_tasks<C>(p, s);
    } else {
        registers_increase<C::CONSUMER_REGISTERS>();
        consume_tasks<C>(p, s, warpgroup - 1);
        named_barrier_sync(1, 256); // what is in shared memory has been read
        run_errands<E, C::DIM>(p, buffers(warp - 4));
    }
}
