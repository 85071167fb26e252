/*
 * After the products of cuda_bwd_sm90: dQ from its sums in fixed point, the gradient of the sinks, and the rare heads with something
 * that is not finite, or too large, by plain loops that touch only what rows see.
 */
#ifndef DLATTN_SM90_BWD_FINISH_CUH_
#define DLATTN_SM90_BWD_FINISH_CUH_

#include "kernels/cuda/sm90/bwd_tile.cuh"

namespace sm90 {

constexpr int kFinishThreads = SM90_BWD_SMALL_THREADS, kFinishWarps = kFinishThreads / 32;

template <typename E>
__device__ __forceinline__ void store_gradient(const sm90_gradient &gradient, int b, int head,
                                               int row, int column, float x) {
    if (gradient.is_float)
        row_of(static_cast<float *>(gradient.data), gradient.strides, b, head, row)[column] = x;
    else
        row_of(static_cast<E *>(gradient.data), gradient.strides, b, head, row)[column] = E(x);
}

template <typename E>
__device__ __forceinline__ void store_eight(const sm90_gradient &gradient, int b, int head, int row,
                                            int column, const float (&x)[8]) {
    if (gradient.is_float) {
        float4 *const to = reinterpret_cast<float4 *>(
            row_of(static_cast<float *>(gradient.data), gradient.strides, b, head, row) + column);
        to[0] = make_float4(x[0], x[1], x[2], x[3]);
        to[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
        *reinterpret_cast<uint4 *>(
            row_of(static_cast<E *>(gradient.data), gradient.strides, b, head, row) + column) =
            make_uint4(pack<E>(x[0], x[1]), pack<E>(x[2], x[3]), pack<E>(x[4], x[5]),
                       pack<E>(x[6], x[7]));
    }
}

/* ---- Odd heads ------------------------------------------------------------------------------------------------------- */

/* What a row's weights are relative to: its largest logit, the sum of exp(logit - largest), and -delta. In the place of the row's
 * stats. */
enum { EXACT_LARGEST, EXACT_TOTAL, EXACT_DELTA = SM90_BWD_DELTA };

/* A row i of head `head` of batch b and its pairs with keys; a lane has a pair by itself. */
template <typename E, bool Softcap>
struct ExactPairs {
    const sm90_bwd_params &p;
    const Sequence &s;
    int b, head;

    template <typename T>
    __device__ static float dot(const T *x, const T *y, int dim) {
        float sum = 0;
        for (int d = 0; d < dim; d++)
            sum = fmaf(float(x[d]), float(y[d]), sum);
        return sum;
    }
    __device__ const E *query_row(const void *data, const sm90_strides &strides, int i) const {
        return row_of(static_cast<const E *>(data), strides, p.cu_seqlens_q ? 0 : b, head,
                      s.q_start + i);
    }
    __device__ const E *key_row(const void *data, const sm90_strides &strides, int j) const {
        return row_of(static_cast<const E *>(data), strides, p.cu_seqlens_k ? 0 : b, head / p.group,
                      s.k_start + j);
    }
    /* The logit, and its derivative by scale q k. */
    __device__ float logit(int i, int j, float &slope) const {
        const float x = p.scale * dot(query_row(p.query, p.query_strides, i),
                                      key_row(p.key, p.key_strides, j), p.dim_qk);
        slope = 1;
        if (!Softcap)
            return x;
        const float t = tanhf(x / p.softcap);
        slope = 1 - t * t;
        return p.softcap * t;
    }
    __device__ float d_weight(int i, int j) const {
        return dot(query_row(p.d_output, p.d_output_strides, i),
                   key_row(p.value, p.value_strides, j), p.dim_v);
    }
    __device__ float *stats(int i) const {
        return stats_of(p, head, first_tile(p, s, b) + i / kTileQ) + i % kTileQ;
    }
    /* P of a pair that is visible, and in *d_score dS times the slope. */
    __device__ float weight(int i, int j, float &d_score) const {
        const float *const of_row = stats(i);
        float slope;
        const float x = logit(i, j, slope);
        d_score = 0;
        if (x == -INFINITY)
            return 0;
        const float w = expf(x - of_row[EXACT_LARGEST * kTileQ]) / of_row[EXACT_TOTAL * kTileQ];
        d_score = w * (d_weight(i, j) + of_row[EXACT_DELTA * kTileQ]) * slope;
        return w;
    }
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* sums[c] += weight of lane n times element lane + 32 c of rows(n), over the lanes in `active`. */
template <int kColumns, typename E, typename Rows>
__device__ __forceinline__ void add_rows(float (&sums)[kColumns], float weight, unsigned active,
                                         int dim, Rows rows) {
    for (; active; active &= active - 1) {
        const int n = __ffs(active) - 1;
        const float w = __shfl_sync(~0u, weight, n);
        const E *const row = rows(n);
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
            const int column = threadIdx.x % 32 + 32 * c;
            if (column < dim)
                sums[c] = fmaf(w, float(row[column]), sums[c]);
        }
    }
}

/* One row by one warp: its stats and d_query. */
template <typename E, int D, bool Softcap>
__device__ void exact_row(const ExactPairs<E, Softcap> &pairs, int i) {
    const sm90_bwd_params &p = pairs.p;
    const int lane = threadIdx.x % 32, low = pairs.s.low_key(p, i), high = pairs.s.high_key(p, i);
    const float sink = p.sinks ? p.sinks[pairs.head * p.sinks_stride] : -INFINITY;
    float largest = sink, total = 0, sum = 0, slope;
    bool nan = false;
    for (int j = low + lane; j < high; j += 32) {
        const float x = pairs.logit(i, j, slope);
        nan |= isnan(x);
        largest = fmaxf(largest, x);
    }
    for (int step = 16; step; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (__any_sync(~0u, nan))
        largest = NAN;
    for (int j = low + lane; j < high; j += 32) {
        const float x = pairs.logit(i, j, slope);
        if (x == -INFINITY)
            continue;
        const float w = expf(x - largest);
        total += w;
        sum += w * pairs.d_weight(i, j);
    }
    total = warp_sum(total) + (sink == -INFINITY ? 0 : expf(sink - largest));
    sum = warp_sum(sum);
    float *const stats = pairs.stats(i);
    if (lane == 0) {
        const int batch = p.cu_seqlens_q ? 0 : pairs.b;
        const float d_lse =
            p.d_lse ? *row_of(p.d_lse, p.d_lse_strides, batch, pairs.head, pairs.s.q_start + i) : 0;
        stats[EXACT_LARGEST * kTileQ] = largest;
        stats[EXACT_TOTAL * kTileQ] = total;
        stats[EXACT_DELTA * kTileQ] = d_lse - (total == 0 ? 0 : sum / total);
    }
    __syncwarp();
    float d_query[D / 32] = {};
    for (int first = low; first < high; first += 32) {
        const int j = first + lane;
        float d_score = 0;
        const float w = j < high ? pairs.weight(i, j, d_score) : 0;
        const bool active = j < high && (w != 0 || d_score != 0);
        add_rows<D / 32, E>(d_query, d_score, __ballot_sync(~0u, active), p.dim_qk,
                            [&](int n) { return pairs.key_row(p.key, p.key_strides, first + n); });
    }
    for (int c = 0; c < D / 32; c++)
        if (p.d_query.data && lane + 32 * c < p.dim_qk)
            store_gradient<E>(p.d_query, p.cu_seqlens_q ? 0 : pairs.b, pairs.head,
                              pairs.s.q_start + i, lane + 32 * c, d_query[c] * p.scale);
}

/* One key by one warp, whose rows have their stats. */
template <typename E, int D, bool Softcap>
__device__ void exact_key(const sm90_bwd_params &p, const Sequence &s, int b, int kv_head, int j) {
    const int lane = threadIdx.x % 32;
    float d_key[D / 32] = {}, d_value[D / 32] = {};
    for (int head = kv_head * p.group; head < (kv_head + 1) * p.group; head++) {
        const ExactPairs<E, Softcap> pairs{p, s, b, head};
        for (int first = 0; first < s.q_len; first += 32) {
            const int i = first + lane;
            const bool visible = i < s.q_len && s.low_key(p, i) <= j && j < s.high_key(p, i);
            float d_score = 0;
            const float w = visible ? pairs.weight(i, j, d_score) : 0;
            const unsigned active = __ballot_sync(~0u, visible && (w != 0 || d_score != 0));
            add_rows<D / 32, E>(d_key, d_score, active, p.dim_qk, [&](int n) {
                return pairs.query_row(p.query, p.query_strides, first + n);
            });
            add_rows<D / 32, E>(d_value, w, active, p.dim_v, [&](int n) {
                return pairs.query_row(p.d_output, p.d_output_strides, first + n);
            });
        }
    }
    const int batch = p.cu_seqlens_k ? 0 : b, row = s.k_start + j;
    for (int c = 0; c < D / 32; c++) {
        const int column = lane + 32 * c;
        if (p.d_key.data && column < p.dim_qk)
            store_gradient<E>(p.d_key, batch, kv_head, row, column, d_key[c] * p.scale);
        if (p.d_value.data && column < p.dim_v)
            store_gradient<E>(p.d_value, batch, kv_head, row, column, d_value[c]);
    }
}

/* ---- The kernels ------------------------------------------------------------------------------------------------------ */

/* dQ of one tile of rows, if it is in sums; of an odd head its stats, too. */
template <typename E, int D, bool Softcap, bool kSums = true>
__device__ __forceinline__ void finish_rows(const sm90_bwd_params &p) {
    const int head = blockIdx.x / p.row_tiles / p.batch, b = blockIdx.x / p.row_tiles % p.batch,
              tile = blockIdx.x % p.row_tiles, kv_head = head / p.group;
    const Sequence s(p, b);
    const int first = tile * kTileQ, rows = min(s.q_rows - first, kTileQ),
              in_head = first_tile(p, s, b) + tile;
    const uint32_t *const facts = facts_of<D>(p, b, kv_head);
    wait_for_predecessor();
    if (rows <= 0)
        return;
    if (facts[SM90_BWD_ODD]) {
        const ExactPairs<E, Softcap> pairs{p, s, b, head};
        for (int r = threadIdx.x / 32; r < rows; r += kFinishWarps)
            exact_row<E, D>(pairs, first + r);
        return;
    }
    if (!kSums || !p.d_query.data)
        return;
    float *const columns = shared_numbers<float>(); /* what takes fixed point and scale out */
    for (int c = threadIdx.x; c < D; c += kFinishThreads)
        columns[c] = inverse(column_factor(p, facts, c)) * p.scale;
    __syncthreads();
    const int32_t *const sums = sums_of<D>(p, head, in_head);
    const float *const factors = stats_of(p, head, in_head) + SM90_BWD_FACTOR * kTileQ;
    const int batch = p.cu_seqlens_q ? 0 : b;
#pragma unroll
    for (int n = threadIdx.x; n < kTileQ * D / 8; n += kFinishThreads) {
        /* Eight columns of a row: two elements of each of four neighbouring threads of the block that summed. */
        const int row = n / (D / 8), column = n % (D / 8) * 8, half = row / 8 % 2;
        const int wg = column / (D / 2), i = column % (D / 2) / 8 * 4 + 2 * half;
        const int32_t *const from =
            sums + wg * (kTileQ * D / 2) + i * 128 + row / 16 * 32 + row % 8 * 4;
        if (row >= rows || column >= p.dim_qk)
            continue;
        const int4 even = *reinterpret_cast<const int4 *>(from),
                   odd = *reinterpret_cast<const int4 *>(from + 128);
        const float factor = inverse(factors[row]);
        const int x[8] = {even.x, odd.x, even.y, odd.y, even.z, odd.z, even.w, odd.w};
        float y[8];
#pragma unroll
        for (int c = 0; c < 8; c++)
            y[c] = x[c] * factor * columns[column + c];
        store_eight<E>(p.d_query, batch, head, s.q_start + first + row, column, y);
    }
}

/* d_sink = - sum of exp(sink - lse) delta over the rows of a head, in an order that depends on nothing but their number. */
template <int D>
__device__ __forceinline__ void finish_sink(const sm90_bwd_params &p, int head) {
    float *const parts = shared_numbers<float>();
    const float sink = p.sinks[head * p.sinks_stride];
    float sum = 0;
    for (int b = 0; b < p.batch; b++) {
        const Sequence s(p, b);
        const bool odd = facts_of<D>(p, b, head / p.group)[SM90_BWD_ODD];
        for (int i = threadIdx.x; i < s.q_rows; i += kFinishThreads) {
            const float *const stats =
                stats_of(p, head, first_tile(p, s, b) + i / kTileQ) + i % kTileQ;
            const float lse =
                *row_of(p.lse, p.lse_strides, p.cu_seqlens_q ? 0 : b, head, s.q_start + i);
            const float weight =
                odd ? expf(sink - stats[EXACT_LARGEST * kTileQ]) / stats[EXACT_TOTAL * kTileQ]
                    : expf(sink - lse);
            sum += sink == -INFINITY ? 0 : weight * stats[EXACT_DELTA * kTileQ];
        }
    }
    parts[threadIdx.x] = sum;
    for (int step = kFinishThreads / 2; step; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step)
            parts[threadIdx.x] += parts[threadIdx.x + step];
    }
    if (threadIdx.x == 0)
        p.d_sinks[head * p.d_sinks_stride] = parts[0];
}

/* Keys of an odd head; then one block for each sink. */
template <typename E, int D, bool Softcap>
__device__ __forceinline__ void finish_keys(const sm90_bwd_params &p) {
    wait_for_predecessor();
    const int head = blockIdx.x / p.key_tiles;
    if (head >= p.batch * p.heads_kv) {
        finish_sink<D>(p, blockIdx.x - p.batch * p.heads_kv * p.key_tiles);
        return;
    }
    const int b = head / p.heads_kv, kv_head = head % p.heads_kv;
    if (!facts_of<D>(p, b, kv_head)[SM90_BWD_ODD])
        return;
    const Sequence s(p, b);
    const int first = blockIdx.x % p.key_tiles * kTileK, end = min(first + kTileK, s.k_rows);
    for (int j = first + threadIdx.x / 32; j < end; j += kFinishWarps)
        exact_key<E, D, Softcap>(p, s, b, kv_head, j);
}

} // namespace sm90

#endif /* DLATTN_SM90_BWD_FINISH_CUH_ */
