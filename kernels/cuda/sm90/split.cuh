// Few query rows over many keys: the keys of each tile are split among blocks, which leave parts of rows in the workspace, and a second
// kernel merges these in their order. What a part is: place_split(). docs/cuda-sm90.md
#pragma once

#include "kernels/cuda/sm90/fwd.cuh"

// Parts of 16 rows on their way to a warp, which merges eight columns: AT_A_TIME of them. A thread has two columns of rows lane / 4 and
// eight more, `half` 0 and 1, as store_part() leaves them; and of every four parts, top and sum of these rows for one.
struct ComingParts {
    static constexpr int AT_A_TIME = 8, OWN = AT_A_TIME / 4;
    float4 output[AT_A_TIME];
    float2 sums[OWN][2];

    // `outputs` and `rows` of the first one, `step` of 16 rows to the next
    __device__ __forceinline__ void load(const float4 *outputs, const float2 *rows, int64_t step,
                                         int warps, int count) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int part = 4 * i + lane % 4;
#pragma unroll
            for (int half = 0; half < 2; half++)
                sums[i][half] = part < count ? __ldcg(rows + part * step * 16 + lane / 4 + 8 * half)
                                             : make_float2(-INFINITY, 0);
        }
#pragma unroll
        for (int i = 0; i < AT_A_TIME; i++)
            if (i < count)
                output[i] = __ldcg(outputs + i * step * warps * 32);
    }
};

// What parts come to: O of a thread's elements, the top of its rows, and its share of their sums.
struct MergedRows {
    float output[4] = {0, 0, 0, 0}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

    // The first `count` of those that came; a part that saw no key has no weight.
    __device__ __forceinline__ void add(const ComingParts &coming, int count) {
        constexpr int OWN = ComingParts::OWN;
        const int lane = threadIdx.x % 32;
        float weight[OWN][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = top[half];
#pragma unroll
            for (int i = 0; i < OWN; i++)
                if (4 * i + lane % 4 < count)
                    most = fmaxf(most, coming.sums[i][half].x);
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float factor = top[half] == most ? 1 : exp2_approx(top[half] - most);
            top[half] = most;
            total[half] *= factor;
            output[2 * half] *= factor;
            output[2 * half + 1] *= factor;
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const float2 part = coming.sums[i][half];
                const bool any = 4 * i + lane % 4 < count && part.x != -INFINITY;
                weight[i][half] = any ? exp2_approx(part.x - most) : 0;
                total[half] = any ? fmaf(weight[i][half], part.y, total[half]) : total[half];
            }
        }
#pragma unroll
        for (int i = 0; i < ComingParts::AT_A_TIME; i++) {
            const float first = __shfl_sync(~0u, weight[i / 4][0], lane & ~3 | i % 4),
                        second = __shfl_sync(~0u, weight[i / 4][1], lane & ~3 | i % 4);
            if (i < count) {
                output[0] = fmaf(first, coming.output[i].x, output[0]);
                output[1] = fmaf(first, coming.output[i].y, output[1]);
                output[2] = fmaf(second, coming.output[i].z, output[2]);
                output[3] = fmaf(second, coming.output[i].w, output[3]);
            }
        }
    }
};

// Normalises and stores what a thread has of a row, and says if the row must be computed again.
template <class C>
__device__ __forceinline__ bool store_merged(const sm90_params &p, const Tile<C> &t, int row,
                                             int column, float top, float total, float x, float y) {
    using E = typename C::Element;
    float normalise = total == 0 ? 0 : reciprocal_approx(total);
    if (p.sinks)
        normalise = add_sink(sink_of<C>(p, t, row), top, total);
    const uint32_t pair = pack<E>(x * normalise, y * normalise);
    if (column < p.dim_v)
        *reinterpret_cast<uint32_t *>(static_cast<E *>(p.output) +
                                      row_offset<C>(p, p.output_strides, t, row) + column) = pair;
    if (column == 0)
        store_lse<C>(p, t, row, total == 0 ? p.empty_lse : (top + log2_approx(total)) * LN2);
    return multiply_add_zero<E>(pair, 0) & 0x7fff7fff || !(total < INFINITY) || is_far<C>(p, top);
}

// Merges the parts of 16 rows of a tile: one block, of which each warp has eight columns.
template <class C>
__device__ __forceinline__ void merge_parts(const sm90_params &p) {
    constexpr int STRIPS = C::TILE_Q / 16, WARPS = C::DIM_V / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = blockIdx.x / STRIPS;
    const int64_t step = p.split.team_tiles * STRIPS, // from a part of these rows to the next
        first = divide(tile, p.split.by_team_tiles) * (p.split.parts - 1) * step + blockIdx.x;
    const float4 *outputs =
        reinterpret_cast<const float4 *>(p.split.outputs) + (first * WARPS + warp) * 32 + lane;
    const float2 *sums = reinterpret_cast<const float2 *>(p.split.sums) + first * 16;
    const Tile<C> t = tile_at<C, true>(p, tile);
    const int first_row = t.first_row + blockIdx.x % STRIPS * 16,
              blocks = t.end_block - t.first_block;
    wait_for_predecessor();
    ComingParts coming;
    if (!is_row<C>(p, t, first_row))
        return;
    int left = blocks > 0 ? (blocks - 1) / blocks_per_part(p, blocks) + 1 : 0;
    coming.load(outputs, sums, step, WARPS, left);
    MergedRows rows;
    for (;;) {
        rows.add(coming, left);
        left -= ComingParts::AT_A_TIME;
        if (left <= 0)
            break;
        outputs += ComingParts::AT_A_TIME * step * WARPS * 32;
        sums += ComingParts::AT_A_TIME * step * 16;
        coming.load(outputs, sums, step, WARPS, left);
    }
    uint32_t spoilt = 0; // a bit for each row that comes out non-finite
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = rows.total[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const int row = 8 * half + lane / 4;
        if (is_row<C>(p, t, first_row + row) &&
            store_merged<C>(p, t, first_row + row, 8 * warp + lane % 4 * 2, rows.top[half], total,
                            rows.output[2 * half], rows.output[2 * half + 1]))
            spoilt |= 1u << row;
    }
    if (!__syncthreads_or(spoilt))
        return;
    for (int row = 0; row < 16; row++)
        if (__syncthreads_or(spoilt >> row & 1) && row % WARPS == warp)
            exact_row<C>(p, t, first_row + row);
}
