/*
 * Before the products of cuda_bwd_sm90: what is known of each head of keys, and of each row.
 */
#pragma once

#include "kernels/cuda/sm90/bwd_tile.cuh"

namespace sm90 {

/* Blocks of kThreads. A row lies in the registers of kLanes neighbouring threads, eight elements in each. */
template <int D>
struct Lanes {
    static constexpr int kThreads = SM90_BWD_SMALL_THREADS, kLanes = D / 8,
                         kRows = kThreads / kLanes;
    int row, column;
    __device__ __forceinline__ Lanes()
        : row(threadIdx.x / kLanes), column(threadIdx.x % kLanes * 8) {}
    template <typename T>
    static __device__ __forceinline__ T sum(T x) {
#pragma unroll
        for (int step = kLanes / 2; step; step /= 2)
            x += __shfl_xor_sync(~0u, x, step);
        return x;
    }
};

template <typename E>
struct Eight {
    float x[8];
    __device__ __forceinline__ Eight(const E *from, bool exists) {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (exists)
            raw = __ldg(reinterpret_cast<const uint4 *>(from));
        const E *const e = reinterpret_cast<const E *>(&raw);
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = float(e[i]);
    }
    __device__ __forceinline__ float dot(const Eight &y) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum = fmaf(x[i], y.x[i], sum);
        return sum;
    }
};

/* Not finite, or too large: also true of NaN. */
__device__ __forceinline__ bool beyond(float x) { return !(fabsf(x) < kLargest); }

/* The largest keys of each column, and the largest value, of tile `block` of all keys. Bits of NaN and infinity are above those of all numbers,
 * and the largest does not depend on the order. */
template <typename E, int D>
__device__ __forceinline__ void scan_keys(const sm90_bwd_params &p, int block) {
    using L = Lanes<D>;
    uint32_t *const most = shared_numbers<uint32_t>();
    const int head = block / p.key_tiles, b = head / p.heads_kv, kv_head = head % p.heads_kv;
    const Sequence s(p, b);
    const int first = block % p.key_tiles * kTileK, end = min(first + kTileK, s.k_len);
    if (first >= end)
        return;
    for (int i = threadIdx.x; i < SM90_BWD_KEYS + D; i += L::kThreads)
        most[i] = 0;
    __syncthreads();
    const int batch = p.cu_seqlens_k ? 0 : b;
    const L lanes;
    float keys[8] = {}, values = 0;
    bool odd = false;
    for (int j = first + lanes.row; j < first + kTileK; j += L::kRows) {
        const auto load = [&](const void *data, const sm90_strides &strides, int dim) {
            return Eight<E>(
                row_of(static_cast<const E *>(data), strides, batch, kv_head, s.k_start + j) +
                    lanes.column,
                j < end && lanes.column < dim);
        };
        const Eight<E> key = load(p.key, p.key_strides, p.dim_qk),
                       value = load(p.value, p.value_strides, p.dim_v);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            odd |= beyond(key.x[i]);
            keys[i] = fmaxf(keys[i], fabsf(key.x[i]));
        }
        values = fmaxf(values, L::sum(value.dot(value)));
        odd |= beyond(value.dot(value)); /* maxima drop NaN */
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        atomicMax(most + SM90_BWD_KEYS + lanes.column + i, __float_as_uint(keys[i]));
    atomicMax(most + SM90_BWD_VALUE, __float_as_uint(values));
    if (odd)
        most[SM90_BWD_ODD] = 1;
    __syncthreads();
    uint32_t *const facts = facts_of<D>(p, b, kv_head);
    for (int i = threadIdx.x; i < SM90_BWD_KEYS + D; i += L::kThreads)
        atomicMax(facts + i, most[i]);
}

/* Exponents relative to an lse beyond this have lost bits that gradients need; in units of q k, what f16 holds. */
constexpr float kLargestLse = 4096, kLargestTerm = 60000;

/* x as a sum of elements, in row r of a tile's terms; false if that is out of range. */
template <typename E>
__device__ __forceinline__ bool store_terms(char *terms, int r, float x) {
#pragma unroll
    for (int n = 0; n < SM90_BWD_TERMS; n++) {
        const E term = E(x);
        *reinterpret_cast<E *>(terms + n * kTileQ * 2 + ((r / 8 ^ n) << 4) + r % 8 * 2) = term;
        x = x == -INFINITY ? 0 : x - float(term);
    }
    return fabsf(x) < kLargestTerm; /* NaN if the first one overflowed */
}

/* What the rows of tile `block` have, and zeros for their sums. */
template <typename E, int D>
__device__ __forceinline__ void prepare_rows(const sm90_bwd_params &p, int block) {
    using L = Lanes<D>;
    const int head = block / p.row_tiles / p.batch, b = block / p.row_tiles % p.batch,
              tile = block % p.row_tiles;
    const Sequence s(p, b);
    if (tile * kTileQ >= s.q_rows)
        return;
    const int in_head = first_tile(p, s, b) + tile, batch = p.cu_seqlens_q ? 0 : b;
    int4 *const sums = reinterpret_cast<int4 *>(sums_of<D>(p, head, in_head));
#pragma unroll
    for (int i = threadIdx.x; i < kTileQ * D / 4; i += L::kThreads)
        sums[i] = make_int4(0, 0, 0, 0);
    char *const rows = rows_of(p, head, in_head);
    float *const stats = stats_of(p, head, in_head);
    const L lanes;
#pragma unroll
    for (int r = lanes.row; r < kTileQ; r += L::kRows) {
        const int i = tile * kTileQ + r, row = s.q_start + i;
        const auto load = [&](const void *data, const sm90_strides &strides, int dim, bool exists) {
            return Eight<E>(row_of(static_cast<const E *>(data), strides, batch, head, row) +
                                lanes.column,
                            exists && lanes.column < dim);
        };
        const bool sees = s.sees(p, i), blind = !sees && i < s.q_len;
        const Eight<E> d_output = load(p.d_output, p.d_output_strides, p.dim_v, sees || blind),
                       output = load(p.output, p.output_strides, p.dim_v, sees),
                       query = load(p.query, p.query_strides, p.dim_qk, blind);
        const float norm = sqrtf(L::sum(d_output.dot(d_output)));
        const float dot = L::sum(d_output.dot(output)), queries = L::sum(query.dot(query));
        if (lanes.column != 0)
            continue;
        const float lse = sees ? *row_of(p.lse, p.lse_strides, batch, head, row) : INFINITY;
        const float d_lse =
            p.d_lse && i < s.q_rows ? *row_of(p.d_lse, p.d_lse_strides, batch, head, row) : 0;
        const float from_lse = sees ? d_lse : 0, delta = d_lse - dot;
        const float least = -lse * (p.softcap > 0 ? 1.4426950408889634f : 1 / p.scale);
        stats[SM90_BWD_FACTOR * kTileQ + r] = row_factor(norm, from_lse);
        stats[SM90_BWD_LSE * kTileQ + r] = least;
        stats[SM90_BWD_DELTA * kTileQ + r] = delta;
        const bool fits = store_terms<E>(rows + kStatsBytes, r, least) &
                          store_terms<E>(rows + kStatsBytes + kTermBytes, r, sees ? delta : 0);
        if (beyond(norm) || beyond(queries) || beyond(from_lse) || beyond(dot) || !fits ||
            (sees && !(fabsf(lse) < kLargestLse)))
            facts_of<D>(p, b, head / p.group)[SM90_BWD_ODD] = 1;
    }
}

/* Blocks of rows, then of keys. */
template <typename E, int D>
__device__ __forceinline__ void prepare(const sm90_bwd_params &p) {
    const int row_blocks = p.batch * p.heads_q * p.row_tiles, block = blockIdx.x;
    wait_for_predecessor();
    if (block < row_blocks)
        prepare_rows<E, D>(p, block);
    else
        scan_keys<E, D>(p, block - row_blocks);
}

} // namespace sm90
