// After the products of cuda_bwd_sm90: dQ from its sums in fixed point, the gradient of the sinks, and the rare heads with something
// that is not finite, or too large, by plain loops that touch only what rows see.
#pragma once

#include "kernels/cuda/sm90/bwd_prepare.cuh"

constexpr int FINISH_THREADS = SM90_BWD_SMALL_THREADS, FINISH_WARPS = FINISH_THREADS / 32;

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

// ---- Odd heads -------------------------------------------------------------------------------------------------------

// What a row's weights are relative to: its largest logit, the sum of exp(logit - top), and -delta. In the place of the row's
// stats.
enum { EXACT_TOP, EXACT_TOTAL, EXACT_DELTA = SM90_BWD_DELTA };

// A row i of head `head` of batch b and its pairs with keys; a lane has a pair by itself.
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
    // The logit, and its derivative by scale q k.
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
        return stats_of(p, head, first_tile(p, s, b) + i / TILE_Q) + i % TILE_Q;
    }
    // P of a pair that is visible, and in *d_score dS times the slope.
    __device__ float weight(int i, int j, float &d_score) const {
        const float *const of_row = stats(i);
        float slope;
        const float x = logit(i, j, slope);
        d_score = 0;
        if (x == -INFINITY)
            return 0;
        const float w = expf(x - of_row[EXACT_TOP * TILE_Q]) / of_row[EXACT_TOTAL * TILE_Q];
        d_score = w * (d_weight(i, j) + of_row[EXACT_DELTA * TILE_Q]) * slope;
        return w;
    }
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// sums[c] += weight of lane n times element lane + 32 c of rows(n), over the lanes in `active`.
template <int COLUMNS, typename E, typename Rows>
__device__ __forceinline__ void add_rows(float (&sums)[COLUMNS], float weight, unsigned active,
                                         int dim, Rows rows) {
    for (; active; active &= active - 1) {
        const int n = __ffs(active) - 1;
        const float w = __shfl_sync(~0u, weight, n);
        const E *const row = rows(n);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int column = threadIdx.x % 32 + 32 * c;
            if (column < dim)
                sums[c] = fmaf(w, float(row[column]), sums[c]);
        }
    }
}

// One row by one warp: its stats and d_query.
template <typename E, int D, bool Softcap>
__device__ void exact_row(const ExactPairs<E, Softcap> &pairs, int i) {
    const sm90_bwd_params &p = pairs.p;
    const int lane = threadIdx.x % 32, low = pairs.s.low_key(p, i), high = pairs.s.high_key(p, i);
    const float sink = p.sinks ? p.sinks[pairs.head * p.sinks_stride] : -INFINITY;
    float top = sink, total = 0, sum = 0, slope;
    bool nan = false;
    for (int j = low + lane; j < high; j += 32) {
        const float x = pairs.logit(i, j, slope);
        nan |= isnan(x);
        top = fmaxf(top, x);
    }
    for (int step = 16; step; step /= 2)
        top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    if (__any_sync(~0u, nan))
        top = NAN;
    for (int j = low + lane; j < high; j += 32) {
        const float x = pairs.logit(i, j, slope);
        if (x == -INFINITY)
            continue;
        const float w = expf(x - top);
        total += w;
        sum += w * pairs.d_weight(i, j);
    }
    total = warp_sum(total) + (sink == -INFINITY ? 0 : expf(sink - top));
    sum = warp_sum(sum);
    float *const stats = pairs.stats(i);
    if (lane == 0) {
        const int batch = p.cu_seqlens_q ? 0 : pairs.b;
        const float d_lse =
            p.d_lse ? *row_of(p.d_lse, p.d_lse_strides, batch, pairs.head, pairs.s.q_start + i) : 0;
        stats[EXACT_TOP * TILE_Q] = top;
        stats[EXACT_TOTAL * TILE_Q] = total;
        stats[EXACT_DELTA * TILE_Q] = d_lse - (total == 0 ? 0 : sum / total);
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

// One key by one warp, whose rows have their stats.
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

// ---- dQ from its sums ------------------------------------------------------------------------------------------------

// The tile of rows of an errand, of each query head. The lanes have their places of Octets: eight columns are, in the sums, two elements
// of each of four neighbouring threads of the block that summed.
template <typename E, int D>
__device__ __forceinline__ void convert_rows(const sm90_bwd_params &p, const Unit &unit, int first,
                                             const Buffers &buffers) {
    using O = Octets<E, D>;
    const Sequence &s = unit.s;
    const int tile = first / TILE_Q, first_head = unit.kv_head * p.group;
    // What takes fixed point out, and for columns the scale in; of rows, of two heads, what brought it in.
    constexpr int COLUMNS = 2 * BUFFER_BYTES, ROWS = COLUMNS + 4 * D;
    float *const columns = reinterpret_cast<float *>(buffers.memory + COLUMNS);
    float rows[8];
    const auto issue = [&](int n, auto copy) {
        const int column = n % O::BLOCKS * 32 + O::column();
        const int32_t *const from = sums_of<D>(p, first_sums(p, unit.index, n / O::BLOCKS) + tile) +
                                    column / (D / 2) * (TILE_Q * D / 2) +
                                    column % (D / 2) / 8 * 512 + O::row() * 4;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) // octet i / 2
            copy(i, from + i / 2 % 2 * 256 + i / 4 * 32 + i % 2 * 128, true);
        const int head = n / O::BLOCKS, lane = threadIdx.x % 32;
        if (n % O::BLOCKS == 0 && lane < TILE_Q / 4)
            copy_async(buffers.address + ROWS + head % 2 * 4 * TILE_Q + 16 * lane,
                       stats_of(p, first_head + head, first_tile(p, s, unit.b) + tile) +
                           SM90_BWD_FACTOR * TILE_Q + 4 * lane,
                       true);
        if (n == 0) {
            const uint32_t *const facts = facts_of<D>(p, unit.index);
            const int exponent = value_exponent(p, facts);
            for (int c = threadIdx.x % 32; c < D; c += 32)
                columns[c] = inverse(column_factor(facts, exponent, c)) * p.scale;
            __syncwarp();
        }
    };
    const auto take = [&](int n, const uint4(&x)[VECTORS]) {
        const int head = first_head + n / O::BLOCKS, column = n % O::BLOCKS * 32 + O::column();
        if (n % O::BLOCKS == 0) {
            __syncwarp(); // others have copied them
            const float *const factors = reinterpret_cast<const float *>(
                buffers.memory + ROWS + n / O::BLOCKS % 2 * 4 * TILE_Q);
#pragma unroll
            for (int o = 0; o < 8; o++)
                rows[o] = inverse(factors[8 * o + O::row()]);
            __syncwarp(); // the next but one head's may come
        }
        const float4 low = *reinterpret_cast<const float4 *>(columns + column),
                     high = *reinterpret_cast<const float4 *>(columns + column + 4);
        const float factor[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int o = 0; o < 8; o++) {
            const int i = first + 8 * o + O::row();
            const uint4 even = x[2 * o], odd = x[2 * o + 1];
            const uint32_t sums[8] = {even.x, odd.x, even.y, odd.y, even.z, odd.z, even.w, odd.w};
            float y[8];
#pragma unroll
            for (int c = 0; c < 8; c++)
                y[c] = static_cast<int32_t>(sums[c]) * rows[o] * factor[c];
            if (i < s.q_rows && column < p.dim_qk)
                store_eight<E>(p.d_query, p.cu_seqlens_q ? 0 : unit.b, head, s.q_start + i, column,
                               y);
        }
    };
    buffers.run(p.group * O::BLOCKS, issue, take);
    __syncwarp(); // `columns` may change, and factors of rows
}

// ---- Errands -----------------------------------------------------------------------------------------------------------

template <typename E, int D>
__device__ __forceinline__ void finish(const sm90_bwd_params &p, const Unit &unit, int first,
                                       const Buffers &buffers) {
    if (p.d_query.data) // of an odd head anything: `rows` writes it again
        convert_rows<E, D>(p, unit, first, buffers);
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        count_release(facts_of<D>(p, unit.index) + SM90_BWD_FINISHED);
}

// Tasks begin when their unit is prepared; a sequence without keys has none.
template <int D>
__device__ __forceinline__ void wait_until_summed(const sm90_bwd_params &p, const Unit &unit) {
    const uint32_t *const facts = facts_of<D>(p, unit.index);
    if (unit.key_tiles() > 0)
        wait_for_count(facts + SM90_BWD_SUMMED, unit.key_tiles());
    else
        wait_for_count(facts + SM90_BWD_PREPARED, unit.errands());
}

// Warps claim errands in this order: round by round, those that prepare unit `round`, then those that finish unit round - behind. One
// waits for earlier ones, and for tasks whose unit earlier ones prepare, so somebody can always go on.
template <typename E, int D>
__device__ __forceinline__ void run_errands(const sm90_bwd_params &p, const Buffers &buffers) {
    int summed = -1, free = -1; // the last units of which that is known
    int next = claim(p, SM90_BWD_NEXT_ERRAND);
    for (;;) {
        const int index = uniform(next), in_round = index % (2 * p.errands),
                  round = p.ahead + index / (2 * p.errands), errand = in_round % p.errands;
        const bool finishes = in_round >= p.errands;
        const int number = finishes ? round - p.behind : round;
        if (round >= p.units + p.behind)
            return;
        if (threadIdx.x % 32 == 0) // long before it is needed
            next = atomicAdd(p.next + SM90_BWD_NEXT_ERRAND, 1);
        const Unit unit(p, min(max(number, 0), p.units - 1));
        if (unit.index != number || errand >= (finishes ? unit.row_errands() : unit.errands())) {
            pass_over(p, SM90_BWD_NEXT_ERRAND, index - errand + p.errands);
        } else if (finishes) {
            if (summed != number)
                wait_until_summed<D>(p, unit);
            summed = number;
            finish<E, D>(p, unit, errand * ERRAND, buffers);
        } else {
            const int before = number - p.slots; // in the slot
            if (before >= 0 && free != before)
                wait_for_count(facts_of<D>(p, before) + SM90_BWD_FINISHED,
                               Unit(p, before).row_errands());
            free = before;
            prepare<E, D>(p, unit, errand * ERRAND, buffers);
        }
    }
}

// ---- The kernels ------------------------------------------------------------------------------------------------------

// Whether any head is odd, asked by a whole block.
template <int D>
__device__ __forceinline__ bool any_odd(const sm90_bwd_params &p) {
    bool odd = false;
    for (int unit = threadIdx.x; unit < p.batch * p.heads_kv; unit += FINISH_THREADS)
        odd |= facts_of<D>(p, unit)[SM90_BWD_ODD] != 0;
    return __syncthreads_or(odd);
}

// d_query and stats of the rows of odd heads.
template <typename E, int D, bool Softcap>
__device__ __forceinline__ void finish_rows(const sm90_bwd_params &p) {
    wait_for_predecessor();
    if (!any_odd<D>(p))
        return;
    for (int i = blockIdx.x; i < p.heads_q * p.batch * p.row_tiles; i += gridDim.x) {
        const int head = i / p.row_tiles / p.batch, b = i / p.row_tiles % p.batch;
        if (!facts_of<D>(p, b, head / p.group)[SM90_BWD_ODD])
            continue;
        const Sequence s(p, b);
        const ExactPairs<E, Softcap> pairs{p, s, b, head};
        const int first = i % p.row_tiles * TILE_Q, end = min(first + TILE_Q, s.q_rows);
        for (int row = first + threadIdx.x / 32; row < end; row += FINISH_WARPS)
            exact_row<E, D>(pairs, row);
    }
}

// d_sink = - sum of exp(sink - lse) delta over the rows of a head, in an order that depends on nothing but their number.
template <int D>
__device__ __forceinline__ void finish_sink(const sm90_bwd_params &p, int head) {
    float *const parts = shared_numbers<float>();
    const float sink = p.sinks[head * p.sinks_stride];
    float sum = 0;
    for (int b = 0; b < p.batch; b++) {
        const Sequence s(p, b);
        const bool odd = facts_of<D>(p, b, head / p.group)[SM90_BWD_ODD];
        for (int i = threadIdx.x; i < s.q_rows; i += FINISH_THREADS) {
            const float *const stats =
                stats_of(p, head, first_tile(p, s, b) + i / TILE_Q) + i % TILE_Q;
            const float lse =
                *row_of(p.lse, p.lse_strides, p.cu_seqlens_q ? 0 : b, head, s.q_start + i);
            const float weight =
                odd ? expf(sink - stats[EXACT_TOP * TILE_Q]) / stats[EXACT_TOTAL * TILE_Q]
                    : expf(sink - lse);
            sum += sink == -INFINITY ? 0 : weight * stats[EXACT_DELTA * TILE_Q];
        }
    }
    parts[threadIdx.x] = sum;
    for (int step = FINISH_THREADS / 2; step; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step)
            parts[threadIdx.x] += parts[threadIdx.x + step];
    }
    if (threadIdx.x == 0)
        p.d_sinks[head * p.d_sinks_stride] = parts[0];
}

// One block for each sink; then the keys of odd heads.
template <typename E, int D, bool Softcap>
__device__ __forceinline__ void finish_keys(const sm90_bwd_params &p) {
    const int sinks = p.d_sinks ? p.heads_q : 0;
    wait_for_predecessor();
    if (blockIdx.x < sinks) {
        finish_sink<D>(p, blockIdx.x);
        return;
    }
    if (!any_odd<D>(p))
        return;
    for (int i = blockIdx.x - sinks; i < p.batch * p.heads_kv * p.key_tiles;
         i += gridDim.x - sinks) {
        const int b = i / p.key_tiles / p.heads_kv, kv_head = i / p.key_tiles % p.heads_kv;
        if (!facts_of<D>(p, b, kv_head)[SM90_BWD_ODD])
            continue;
        const Sequence s(p, b);
        const int first = i % p.key_tiles * TILE_K, end = min(first + TILE_K, s.k_rows);
        for (int j = first + threadIdx.x / 32; j < end; j += FINISH_WARPS)
            exact_key<E, D, Softcap>(p, s, b, kv_head, j);
    }
}
