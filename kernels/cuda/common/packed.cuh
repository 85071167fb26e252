// Rows of a kv head packed into tiles, so that keys and values are read once for all query heads of a group, and parts of their keys, which
// are merged in their order.
#pragma once

#include "kernels/cuda/common/exact.cuh"
#include "kernels/cuda/common/float8.cuh"
#include "kernels/cuda/common/packed_params.h"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/sequence.cuh"
#include "kernels/cuda/common/sixteen_bit.cuh"

// A tile of packed rows.
struct Rows {
    int b, kv_head, first, group;
    divisor by_group;
    __device__ __forceinline__ Rows(const packed_params &p, int tile, int rows)
        : group(p.fwd.group), by_group(p.by_group) {
        const int head = divide(tile, p.by_row_blocks);
        first = (tile - head * p.fwd.row_blocks) * rows;
        b = divide(head, p.by_heads_kv);
        kv_head = head - b * p.heads_kv;
    }
    __device__ __forceinline__ int query(int r) const { return divide(first + r, by_group); }
    __device__ __forceinline__ int head(int r) const {
        return kv_head * group + first + r - query(r) * group;
    }
};

// Blocks of a head from its last rows to its first, if those see the most.
__device__ __forceinline__ int longest_first(const packed_params &p, int tile) {
    const int from_first = tile - divide(tile, p.by_row_blocks) * p.fwd.row_blocks;
    return p.fwd.flags & FWD_LONGEST_FIRST ? tile + p.fwd.row_blocks - 1 - 2 * from_first : tile;
}

// The keys of a tile, in steps of so many, of which a split has a part. `count` rows of the tile exist.
struct Part {
    int first_key, end_key;     // that a row sees
    int clean_first, clean_end; // that all see
    int first, end;             // steps of this split, from first_key on
    __device__ __forceinline__ Part(const packed_params &p, const Sequence &seq, const Rows &rows,
                                    int count, int split, int keys) {
        const int top_row = rows.query(0), bottom_row = min(rows.query(count - 1), seq.q_len - 1);
        first_key = seq.first_key(p.fwd, top_row);
        end_key = bottom_row < top_row ? 0 : seq.end_key(p.fwd, bottom_row);
        clean_first = seq.first_key(p.fwd, rows.query(p.tile_rows - 1));
        clean_end = seq.end_key(p.fwd, top_row);
        const int steps = max(0, (end_key - first_key + keys - 1) / keys);
        const int each = divide(steps, p.by_splits), more = steps - each * p.splits;
        first = split * each + min(split, more);
        end = first + each + (split < more);
    }
};

// A row whose keys are all added up: log2 of the scale of sum and output, -inf if it saw no key; columns
// lane * 4 + n * 128 of the output and the next three.
template <int COLUMNS>
struct Merged {
    float top, total;
    float4 out[COLUMNS];
};

// The weight of a part whose scale is 2^top in a sum whose scale is 2^most; a part that saw no key has none.
__device__ __forceinline__ float weight_of(float top, float most) {
    return top == NEG_INF ? 0 : exp2_approx(top - most);
}

__device__ __forceinline__ void add(float4 &to, float weight, const float4 &x) {
    to.x = fmaf(weight, x.x, to.x);
    to.y = fmaf(weight, x.y, to.y);
    to.z = fmaf(weight, x.z, to.z);
    to.w = fmaf(weight, x.w, to.w);
}

// The parts first, first + step ... of a row, added up by a warp in this order, four at a time: `sums` gives what
// packed_params.sums has of a part, `outputs` four columns of its output.
template <int COLUMNS, typename Sums, typename Outputs>
__device__ __forceinline__ Merged<COLUMNS> merged(int first, int step, int parts, int dim_v,
                                                  Sums sums, Outputs outputs) {
    const int lane = threadIdx.x % 32;
    Merged<COLUMNS> row = {NEG_INF, 0, {}};
#pragma unroll 1
    for (; first < parts; first += 4 * step) {
        float2 sum[4];
        float4 out[4][COLUMNS];
        float most = row.top;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int part = first + i * step;
            sum[i] = part < parts ? sums(part) : make_float2(NEG_INF, 0);
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
                out[i][n] = part < parts && lane * 4 + n * 128 < dim_v
                                ? outputs(part, lane * 4 + n * 128)
                                : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            most = fmaxf(most, sum[i].x);
        const float shrink = weight_of(row.top, most);
        row.top = most;
        row.total *= shrink;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
            row.out[n] = {row.out[n].x * shrink, row.out[n].y * shrink, row.out[n].z * shrink,
                          row.out[n].w * shrink};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float weight = weight_of(sum[i].x, most);
            row.total = fmaf(weight, sum[i].y, row.total);
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
                add(row.out[n], weight, out[i][n]);
        }
    }
    return row;
}

// Output and lse of a row, by a warp. C: elements of keys and values.
template <typename E, typename C, int COLUMNS>
__device__ __forceinline__ void finish_row(const packed_params &dp, const Sequence &seq,
                                           const Rows &rows, int r, const Merged<COLUMNS> &row) {
    const fwd_params &p = dp.fwd;
    const int i = rows.query(r), h = rows.head(r), lane = threadIdx.x % 32;
    const bool empty = i >= seq.q_len || row.total == 0;
    const float sink = sink_of(p, h);
    float top = empty ? NEG_INF : row.top, total = empty ? 0 : row.total;
    float factor = end_row(sink, top, total);
    if constexpr (is_float8<C>)
        factor *= scale_at(p.value_scale, rows.b, rows.kv_head);
    if (lane == 0 && p.lse.data)
        store_lse<E>(p, rows.b, h, seq.q_start + i, sink, top, total);
    E *const to = (E *)p.output.data + rows.b * p.output.stride[0] + h * p.output.stride[1] +
                  (seq.q_start + i) * p.output.stride[2];
    uint32_t odd = 0; // not 0: the output has a NaN or Inf
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
        const int c = lane * 4 + n * 128;
        const float4 x = row.out[n];
        uint2 pairs = {pack<E>(x.x * factor, x.y * factor), pack<E>(x.z * factor, x.w * factor)};
        if (empty)
            pairs = {0, 0};
        if (c >= p.dim_v)
            continue;
        odd = multiply_add_zero<E>(pairs.y, multiply_add_zero<E>(pairs.x, odd));
        if (p.flags & FWD_ALIGNED_OUTPUT) {
            *(uint2 *)(to + c) = pairs;
            continue;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (c + e < p.dim_v)
                *(uint16_t *)(to + (c + e) * p.output.stride[3]) =
                    (uint16_t)((e < 2 ? pairs.x : pairs.y) >> e % 2 * 16);
    }
    if (__any_sync(~0u, odd != 0) || fabsf(row.top) == FLT_MAX)
        write_rows_exactly<E, float, C, COLUMNS * 128>(p, rows.b, h, i, i + 1, dp.diagonal_offset);
}

// A row of a part to its place in the workspace.
template <int COLUMNS>
__device__ __forceinline__ void leave_row(const packed_params &dp, int64_t place,
                                          const Merged<COLUMNS> &row) {
    const int lane = threadIdx.x % 32;
    if (lane == 0)
        ((float2 *)dp.sums)[place] = make_float2(row.top, row.total);
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
        if (lane * 4 + n * 128 < dp.fwd.dim_v)
            *(float4 *)(dp.outputs + place * dp.columns + lane * 4 + n * 128) = row.out[n];
}

// Rows of a block, which lie in shared memory, to the output or, of one split of several, to the workspace, by this warp of T::WARPS.
// `output` has T::OUT_PITCH floats of each of T::ROWS, `sums` their sums in T::PARTS parts, `tops` what they are relative to.
template <typename E, int DV, typename T>
__device__ __forceinline__ void
store_rows(const packed_params &dp, const Sequence &seq, const Rows &rows, int count, int64_t place,
           const float *output, const float *sums, const float *tops, int warp) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int r = warp; r < count; r += T::WARPS) {
        Merged<DV / 128> row = {NEG_INF, 0, {}};
#pragma unroll
        for (int i = 0; i < T::PARTS; ++i)
            row.total += sums[i * T::ROWS + r];
        if (row.total != 0)
            row.top = tops[r];
#pragma unroll
        for (int n = 0; n < DV / 128; ++n)
            row.out[n] = *(const float4 *)(output + r * T::OUT_PITCH + lane * 4 + n * 128);
        if (dp.splits == 1)
            finish_row<E, E>(dp, seq, rows, r, row);
        else
            leave_row(dp, place + r, row);
    }
}

// How the parts of a row are merged, whoever does it: in each group g the parts g, g + GROUPS ..., then the groups. COLUMNS: as many times
// 128 of the output.
template <int COLUMNS, int GROUPS>
struct Groups {
    float4 (*outputs)[COLUMNS][32]; // [group][column / 128][lane]
    float2 *sums;

    // One group by a warp, of the row whose first part is at `first`.
    __device__ __forceinline__ void merge(const packed_params &dp, int64_t first, int group) const {
        const Merged<COLUMNS> own = merged<COLUMNS>(
            group, GROUPS, dp.splits, dp.fwd.dim_v,
            [&](int s) { return ((const float2 *)dp.sums)[first + s * dp.tile_rows]; },
            [&](int s, int c) {
                return *(const float4 *)(dp.outputs + (first + s * dp.tile_rows) * dp.columns + c);
            });
        sums[group] = make_float2(own.top, own.total);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
            outputs[group][n][threadIdx.x % 32] = own.out[n];
    }
    __device__ __forceinline__ Merged<COLUMNS> all(int dim_v) const {
        const int lane = threadIdx.x % 32;
        return merged<COLUMNS>(
            0, 1, GROUPS, dim_v, [&](int i) { return sums[i]; },
            [&](int i, int c) { return outputs[i][c / 128][lane]; });
    }
};

// By all threads of a block that has left its parts: whether those of all splits of the tile are there.
__device__ __forceinline__ bool is_last_split(const packed_params &dp, int tile) {
    bool is_last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(dp.arrived + tile, 1) == dp.splits - 1;
        __threadfence();
    }
    return __syncthreads_or(is_last);
}

// The rows of a tile from the parts of its splits, of which nothing stays. GROUPS as in merge_splits(), so that bits are the same.
template <typename E, typename C, int COLUMNS, int WARPS, int GROUPS>
__device__ __forceinline__ void merge_tile(const packed_params &dp, const Sequence &seq,
                                           const Rows &rows, int count, int tile, char *shared) {
    const int warp = threadIdx.x / 32;
    const int64_t first = tile * (int64_t)dp.splits * dp.tile_rows;
    const auto groups = [&](int r) {
        float4(*const outputs)[COLUMNS][32] = (float4(*)[COLUMNS][32])shared;
        return Groups<COLUMNS, GROUPS>{outputs + r * GROUPS,
                                       (float2 *)(outputs + count * GROUPS) + r * GROUPS};
    };
#pragma unroll 1
    for (int i = warp; i < count * GROUPS; i += WARPS)
        groups(i / GROUPS).merge(dp, first + i / GROUPS, i % GROUPS);
    __syncthreads();
#pragma unroll 1
    for (int r = warp; r < count; r += WARPS)
        finish_row<E, C>(dp, seq, rows, r, groups(r).all(dp.fwd.dim_v));
    const Merged<COLUMNS> nothing = {0, 0, {}};
#pragma unroll 1
    for (int s = warp; s < dp.splits; s += WARPS)
        for (int r = 0; r < count; ++r)
            leave_row(dp, first + s * dp.tile_rows + r, nothing);
    if (threadIdx.x == 0)
        dp.arrived[tile] = 0;
}

// Adds up the splits of one packed row.
template <typename E, typename C, int COLUMNS, int WARPS>
__device__ __forceinline__ void merge_splits(const packed_params &dp) {
    extern __shared__ __align__(128) char shared[];
    float4(*const outputs)[COLUMNS][32] = (float4(*)[COLUMNS][32])shared;
    const Groups<COLUMNS, WARPS> groups{outputs, (float2 *)(outputs + WARPS)};
    const fwd_params &p = dp.fwd;
    // blockIdx.x is (head, query, place in its group), and so is the packed row of a head.
    const int queries = divide(blockIdx.x, dp.by_group), head = queries / p.len_q,
              packed = blockIdx.x - head * p.len_q * p.group;
    const int row_block = packed / dp.tile_rows, tile = head * p.row_blocks + row_block,
              r = packed - row_block * dp.tile_rows;
    const Rows rows(dp, tile, dp.tile_rows);
    const Sequence seq(p, rows.b);
    wait_for_predecessor(); // all of it may start before the other kernel has ended, and none of it may end before
    if (rows.query(r) >= seq.q_rows)
        return;
    const int64_t first = tile * (int64_t)dp.splits * dp.tile_rows + r;
    groups.merge(dp, first, threadIdx.x / 32);
    __syncthreads();
    if (threadIdx.x < 32)
        finish_row<E, C>(dp, seq, rows, r, groups.all(p.dim_v));
}
