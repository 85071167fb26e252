// Before the products of cuda_bwd_sm90: what is known of a unit's keys and values, and of each row.
#pragma once

#include "kernels/cuda/sm90/bwd_tile.cuh"

// A row lies in the registers of LANES neighbouring threads, eight elements in each.
template <int D>
struct Lanes {
    static constexpr int THREADS = SM90_BWD_SMALL_THREADS, LANES = D / 8, ROWS = THREADS / LANES;
    int row, column;
    __device__ __forceinline__ Lanes()
        : row(threadIdx.x / LANES), column(threadIdx.x % LANES * 8) {}
    template <typename T>
    static __device__ __forceinline__ T sum(T x) {
#pragma unroll
        for (int step = LANES / 2; step; step /= 2)
            x += __shfl_xor_sync(~0u, x, step);
        return x;
    }
};

template <typename E>
struct Eight {
    float x[8];
    __device__ __forceinline__ explicit Eight(uint4 raw) {
        const E *const e = reinterpret_cast<const E *>(&raw);
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = float(e[i]);
    }
    __device__ __forceinline__ Eight(const E *from, bool exists)
        : Eight(exists ? __ldg(reinterpret_cast<const uint4 *>(from)) : make_uint4(0, 0, 0, 0)) {}
    __device__ __forceinline__ float dot(const Eight &y) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum = fmaf(x[i], y.x[i], sum);
        return sum;
    }
};

// Exponents relative to an lse beyond this have lost bits that gradients need; in units of q k, what f16 holds.
constexpr float LARGEST_LSE = 4096, LARGEST_TERM = 60000;

// x as a sum of elements, in row r of a tile's terms; false if that is out of range.
template <typename E>
__device__ __forceinline__ bool store_terms(char *terms, int r, float x) {
#pragma unroll
    for (int n = 0; n < SM90_BWD_TERMS; n++) {
        const E term = E(x);
        *reinterpret_cast<E *>(terms + n * TILE_Q * 2 + ((r / 8 ^ n) << 4) + r % 8 * 2) = term;
        x = x == -INFINITY ? 0 : x - float(term);
    }
    return fabsf(x) < LARGEST_TERM; // NaN if the first one overflowed
}

// ---- Errands: 64 rows or keys, by one warp ---------------------------------------------------------------------------

// What errands read passes through two buffers of the warp in shared memory, 16 times 16 bytes for each lane, which reads what it has
// copied itself: so two batches are on their way while a third is in registers.
constexpr int VECTORS = 16, BUFFER_BYTES = VECTORS * 32 * 16;
// Behind the buffers the factor of each column, and of two tiles of rows.
template <int D>
constexpr int ERRAND_BYTES = 2 * BUFFER_BYTES + 4 * D + 2 * 4 * TILE_Q;

struct Buffers {
    uint32_t address;
    char *memory; // the same place

    // issue(n, copy) copies vectors of batch n by copy(vector, from, exists), take(n, vectors) has them.
    template <typename Issue, typename Take>
    __device__ __forceinline__ void run(int batches, Issue issue, Take take) const {
        const int lane = threadIdx.x % 32 * 16;
        const auto start = [&](int n) {
            if (n < batches)
                issue(n, [&](int i, const void *from, bool exists) {
                    copy_async(address + n % 2 * BUFFER_BYTES + i * 512 + lane, from, exists);
                });
            copy_commit();
        };
        start(0);
        start(1);
#pragma unroll 1
        for (int n = 0; n < batches; n++) {
            copy_wait<1>();
            uint4 x[VECTORS];
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
                x[i] = *reinterpret_cast<const uint4 *>(memory + n % 2 * BUFFER_BYTES + i * 512 +
                                                        lane);
            start(n + 2);
            take(n, x);
        }
    }
};

// Octets of rows, of which a lane has eight columns of every 32: row lane / 4, columns from 8 (lane % 4) on. Read so, they are operands
// of mma with their columns in another order, and a row's product with itself is on the diagonal. A batch has ROWS rows of two tensors.
template <typename E, int D>
struct Octets {
    static constexpr int BLOCKS = D / 32, COUNT = 8 / BLOCKS, ROWS = 8 * COUNT,
                         BATCHES = ERRAND / ROWS;

    static __device__ __forceinline__ int row() { return threadIdx.x % 32 / 4; }
    static __device__ __forceinline__ int column() { return threadIdx.x % 4 * 8; }

    // Vectors from `vector` on, from the row and column of this lane on; `exists` tells of a row of the batch.
    template <typename Copy, typename Exists>
    static __device__ __forceinline__ void issue(Copy copy, int vector, const E *from,
                                                 int64_t pitch, int dim, Exists exists) {
#pragma unroll
        for (int o = 0; o < COUNT; o++) {
            const bool here = exists(8 * o + row());
#pragma unroll
            for (int c = 0; c < BLOCKS; c++)
                copy(vector + o * BLOCKS + c, from + 32 * c, here && column() + 32 * c < dim);
            from += 8 * pitch;
        }
    }
    // <a, b> and <c, b> of row lane % 8 of an octet.
    static __device__ __forceinline__ float2 dots(const uint4 *a, const uint4 *c, const uint4 *b) {
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            Element<E>::mma(sums, {a[i].x, c[i].x, a[i].y, c[i].y}, b[i].x, b[i].y);
            Element<E>::mma(sums, {a[i].z, c[i].z, a[i].w, c[i].w}, b[i].z, b[i].w);
        }
        const bool second = row() % 2;
        const int lane = threadIdx.x % 8 * 4 + threadIdx.x % 8 / 2;
        return make_float2(__shfl_sync(~0u, second ? sums[1] : sums[0], lane),
                           __shfl_sync(~0u, second ? sums[3] : sums[2], lane));
    }
};

// The largest of each pair of 16-bit words over the rows of octets. Word i ends up where first_word() says.
template <int COUNT>
__device__ __forceinline__ void find_most(uint32_t (&most)[COUNT]) {
#pragma unroll
    for (int step = 4, count = COUNT / 2; step <= 16; step *= 2, count /= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < count; i++) {
            const uint32_t sent = upper ? most[i] : most[i + count];
            most[i] = __vmaxu2(upper ? most[i + count] : most[i], __shfl_xor_sync(~0u, sent, step));
        }
    }
}
// The first of COUNT / 8 words that this lane has.
template <int COUNT>
__device__ __forceinline__ int first_word() {
    return (__brev(threadIdx.x % 32 / 4) >> 29) * (COUNT / 8);
}

// The largest keys of each column, and the largest value. Bits of NaN and infinity are above those of all numbers, and the largest does
// not depend on the order.
template <typename E, int D>
__device__ __forceinline__ void scan_keys(const sm90_bwd_params &p, const Unit &unit, int first,
                                          const Buffers &buffers) {
    using O = Octets<E, D>;
    constexpr int WORDS = 4 * O::BLOCKS;
    const Sequence &s = unit.s;
    uint32_t most[WORDS] = {}, norm = 0;
    const auto issue = [&](int n, auto copy) {
        const int j = first + n * O::ROWS;
        const auto from = [&](const void *data, const sm90_strides &strides) {
            return row_of(static_cast<const E *>(data), strides, p.cu_seqlens_k ? 0 : unit.b,
                          unit.kv_head, s.k_start + j + O::row()) +
                   O::column();
        };
        const auto exists = [&](int row) { return j + row < s.k_len; };
        O::issue(copy, 0, from(p.key, p.key_strides), p.key_strides.row, p.dim_qk, exists);
        O::issue(copy, 8, from(p.value, p.value_strides), p.value_strides.row, p.dim_v, exists);
    };
    const auto take = [&](int, const uint4(&x)[VECTORS]) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
            for (int w = 0; w < 4; w++) {
                uint32_t &m = most[i % O::BLOCKS * 4 + w];
                m = __vmaxu2(m, words[w] & 0x7fff7fff);
            }
        }
#pragma unroll
        for (int o = 0; o < O::COUNT; o++) {
            const uint4 *const values = x + 8 + o * O::BLOCKS;
            norm = max(norm, __float_as_uint(O::dots(values, values, values).x));
        }
    };
    buffers.run(min(O::BATCHES, (s.k_len - first + O::ROWS - 1) / O::ROWS), issue, take);
    norm = __reduce_max_sync(~0u, norm);
    uint32_t *const facts = facts_of<D>(p, unit.index);
    bool odd = beyond(__uint_as_float(norm));
    if (threadIdx.x % 32 == 0)
        atomicMax(facts + SM90_BWD_VALUE, norm);
    find_most(most);
#pragma unroll
    for (int i = 0; i < WORDS / 8; i++) {
        const int word = first_word<WORDS>() + i,
                  column = word / 4 * 32 + O::column() + word % 4 * 2;
        const E *const e = reinterpret_cast<const E *>(most + i);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float key = float(e[c]);
            odd |= beyond(key);
            atomicMax(facts + SM90_BWD_KEYS + column + c, __float_as_uint(key));
        }
    }
    if (odd)
        facts[SM90_BWD_ODD] = 1;
}

// What row i of a query head has, from |d_output|^2 and <d_output, output>.
template <typename E, int D>
__device__ __forceinline__ void store_row(const sm90_bwd_params &p, const Unit &unit, int head,
                                          int i, float norm, float dot, float lse, float d_lse) {
    const Sequence &s = unit.s;
    const int tile = first_tile(p, s, unit.b) + i / TILE_Q, r = i % TILE_Q;
    const bool sees = s.sees(p, i);
    norm = sqrtf(norm);
    const float from_lse = sees ? d_lse : 0, delta = d_lse - dot;
    const float least = -lse * (p.softcap > 0 ? LOG2E : 1 / p.scale);
    float *const stats = stats_of(p, head, tile) + r;
    stats[SM90_BWD_FACTOR * TILE_Q] = row_factor(2 * norm + fabsf(from_lse));
    stats[SM90_BWD_LSE * TILE_Q] = least;
    stats[SM90_BWD_DELTA * TILE_Q] = delta;
    char *const terms = rows_of(p, head, tile) + STATS_BYTES;
    const bool fits =
        store_terms<E>(terms, r, least) & store_terms<E>(terms + TERM_BYTES, r, sees ? delta : 0);
    if (beyond(norm) || beyond(from_lse) || beyond(dot) || !fits ||
        (sees && !(fabsf(lse) < LARGEST_LSE)))
        facts_of<D>(p, unit.index)[SM90_BWD_ODD] = 1;
}

// Whether the row of a query is not finite. It matters where it sees nothing: 0 times NaN would reach gradients.
template <typename E>
__device__ __forceinline__ bool is_odd(const E *query, int dim) {
    float sum = 0;
    for (int column = 0; column < dim; column += 8) {
        const Eight<E> x(query + column, true);
        sum += x.dot(x);
    }
    return beyond(sum);
}

// What rows have, and zeros for their sums.
template <typename E, int D>
__device__ __forceinline__ void prepare_rows(const sm90_bwd_params &p, const Unit &unit, int first,
                                             int head, const Buffers &buffers) {
    using O = Octets<E, D>;
    const Sequence &s = unit.s;
    const int b = p.cu_seqlens_q ? 0 : unit.b, lane = threadIdx.x % 32;
    const auto row = [&](const void *data, const sm90_strides &strides, int i) {
        return row_of(static_cast<const E *>(data), strides, b, head, s.q_start + i);
    };
    float norm = 0, dot = 0, lse[2], d_lse[2]; // of rows lane and lane + 32
    for (int half = 0; half < 2; half++) {
        const int i = first + 32 * half + lane;
        lse[half] = s.sees(p, i) ? *row_of(p.lse, p.lse_strides, b, head, s.q_start + i) : INFINITY;
        d_lse[half] =
            p.d_lse && i < s.q_rows ? *row_of(p.d_lse, p.d_lse_strides, b, head, s.q_start + i) : 0;
    }
    const auto issue = [&](int n, auto copy) {
        const int i = first + n * O::ROWS;
        O::issue(copy, 0, row(p.d_output, p.d_output_strides, i + O::row()) + O::column(),
                 p.d_output_strides.row, p.dim_v, [&](int r) { return i + r < s.q_len; });
        O::issue(copy, 8, row(p.output, p.output_strides, i + O::row()) + O::column(),
                 p.output_strides.row, p.dim_v, [&](int r) { return s.sees(p, i + r); });
    };
    const auto take = [&](int n, const uint4(&x)[VECTORS]) {
#pragma unroll
        for (int o = 0; o < O::COUNT; o++) {
            const uint4 *const d_output = x + o * O::BLOCKS;
            const float2 found = O::dots(d_output, d_output + 8, d_output);
            const bool is_own = lane / 8 == n * O::COUNT % 4 + o;
            norm = is_own ? found.x : norm;
            dot = is_own ? found.y : dot;
        }
        const int half = n * O::ROWS / 32, own = first + 32 * half + lane;
        if ((n + 1) * O::ROWS % 32 != 0)
            return;
        if (own < s.q_len && !s.sees(p, own) &&
            is_odd(row(p.query, p.query_strides, own), p.dim_qk))
            norm = NAN;
        store_row<E, D>(p, unit, head, own, norm, dot, half ? lse[1] : lse[0],
                        half ? d_lse[1] : d_lse[0]);
    };
    buffers.run(O::BATCHES, issue, take);
    int4 *const sums = reinterpret_cast<int4 *>(
        sums_of<D>(p, first_sums(p, unit.index, head - unit.kv_head * p.group) + first / TILE_Q));
#pragma unroll 8
    for (int i = lane; i < TILE_Q * D / 4; i += 32)
        sums[i] = make_int4(0, 0, 0, 0);
}

template <typename E, int D>
__device__ __forceinline__ void prepare(const sm90_bwd_params &p, const Unit &unit, int first,
                                        const Buffers &buffers) {
    if (first < unit.s.k_len)
        scan_keys<E, D>(p, unit, first, buffers);
    if (first < unit.s.q_rows)
        for (int h = 0; h < p.group; h++)
            prepare_rows<E, D>(p, unit, first, unit.kv_head * p.group + h, buffers);
    global_proxy_fence();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        count_release(facts_of<D>(p, unit.index) + SM90_BWD_PREPARED);
}

// Those of the first `ahead` units.
template <typename E, int D>
__device__ __forceinline__ void run_first_errands(const sm90_bwd_params &p,
                                                  const Buffers &buffers) {
    for (;;) {
        const int index = claim(p, SM90_BWD_NEXT_FIRST);
        if (index >= p.ahead * p.errands)
            return;
        const Unit unit(p, index / p.errands);
        const int errand = index % p.errands;
        if (errand < unit.errands())
            prepare<E, D>(p, unit, errand * ERRAND, buffers);
        else
            pass_over(p, SM90_BWD_NEXT_FIRST, index - errand + p.errands);
    }
}
