// Few query rows over many keys: the keys of each tile are split among blocks, which leave parts of rows in the workspace, and a second
// kernel merges these in their order. What a part is: place_split(). docs/cuda-sm90.md
#pragma once

#include "kernels/cuda/sm90/fwd.cuh"

// Two rows of a thread, eight apart, in eight columns: as store_part() leaves them.
struct MergedRows {
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, output[4] = {0, 0, 0, 0};

    // Adds `count` parts, `from` being the first of them and `step` strips from one to the next.
    __device__ __forceinline__ void add(const float4 *output_of, const float2 *sum_of,
                                        int64_t output_step, int64_t sum_step, int count);
};

// The weight of a part whose scale is 2^top in a sum whose scale is 2^most; a part that saw no key has none.
__device__ __forceinline__ float part_weight(float top, float most) {
    return top == -INFINITY ? 0 : exp2_approx(top - most);
}

constexpr int PARTS_AT_A_TIME = 8;
__device__ __forceinline__ void MergedRows::add(const float4 *output_of, const float2 *sum_of,
                                                int64_t output_step, int64_t sum_step, int count) {
#pragma unroll 1
    for (int first = 0; first < count; first += PARTS_AT_A_TIME) {
        float4 part[PARTS_AT_A_TIME];
        float2 sum[PARTS_AT_A_TIME][2];
#pragma unroll
        for (int i = 0; i < PARTS_AT_A_TIME; i++) {
            const bool any = first + i < count;
            part[i] = any ? output_of[(first + i) * output_step] : make_float4(0, 0, 0, 0);
            for (int half = 0; half < 2; half++)
                sum[i][half] =
                    any ? sum_of[(first + i) * sum_step + 8 * half] : make_float2(-INFINITY, 0);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = top[half];
#pragma unroll
            for (int i = 0; i < PARTS_AT_A_TIME; i++)
                most = fmaxf(most, sum[i][half].x);
            const float shrink = part_weight(top[half], most);
            top[half] = most;
            total[half] *= shrink;
            output[2 * half] *= shrink;
            output[2 * half + 1] *= shrink;
#pragma unroll
            for (int i = 0; i < PARTS_AT_A_TIME; i++) {
                const float weight = part_weight(sum[i][half].x, most);
                total[half] = fmaf(weight, sum[i][half].y, total[half]);
                output[2 * half] = fmaf(weight, half ? part[i].z : part[i].x, output[2 * half]);
                output[2 * half + 1] =
                    fmaf(weight, half ? part[i].w : part[i].y, output[2 * half + 1]);
            }
        }
    }
}

// Merges the parts of 16 rows of a tile: one block, of which each warp has eight columns.
template <class C>
__device__ __forceinline__ void merge_parts(const sm90_params &p) {
    using E = typename C::Element;
    constexpr int STRIPS = C::TILE_Q / 16, GROUPS = C::DIM_V / 8;
    __shared__ uint32_t spoilt; // a bit for each row that comes out non-finite
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32, strip = blockIdx.x % STRIPS;
    const int tile = blockIdx.x / STRIPS, team = divide(tile, p.split.by_team_tiles);
    const Tile<C> t = tile_at<C, true>(p, tile);
    const int first_row = t.first_row + 16 * strip, blocks = t.end_block - t.first_block;
    const int per_part = blocks_per_part(p, blocks);
    if (threadIdx.x == 0)
        spoilt = 0;
    wait_for_workspace();
    if (!is_row<C>(p, t, first_row))
        return;
    MergedRows rows;
    if (blocks > 0) {
        const int64_t team_strips = p.split.team_tiles * STRIPS;
        const int64_t at = (team * (p.split.parts - 1)) * team_strips + blockIdx.x;
        rows.add(reinterpret_cast<const float4 *>(p.split.outputs) + (at * GROUPS + group) * 32 +
                     lane,
                 reinterpret_cast<const float2 *>(p.split.sums) + at * 16 + lane / 4,
                 team_strips * GROUPS * 32, team_strips * 16, (blocks + per_part - 1) / per_part);
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half + lane / 4, column = 8 * group + lane % 4 * 2;
        float top = rows.top[half], total = rows.total[half];
        float normalise = total == 0 ? 0 : reciprocal_approx(total);
        if (p.sinks)
            normalise = add_sink(sink_of<C>(p, t, row), top, total);
        const uint32_t pair =
            pack<E>(rows.output[2 * half] * normalise, rows.output[2 * half + 1] * normalise);
        if (!is_row<C>(p, t, row))
            continue;
        if (column < p.dim_v)
            *reinterpret_cast<uint32_t *>(static_cast<E *>(p.output) +
                                          row_offset<C>(p, p.output_strides, t, row) + column) =
                pair;
        if (multiply_add_zero<E>(pair, 0) & 0x7fff7fff || !(total < INFINITY) ||
            is_far<C>(p, top, total))
            atomicOr(&spoilt, 1u << (8 * half + lane / 4));
        else if (column == 0)
            store_lse<C>(p, t, row, total == 0 ? p.empty_lse : (top + log2_approx(total)) * LN2);
    }
    __syncthreads();
    for (int i = group; i < 16; i += GROUPS)
        if (spoilt >> i & 1)
            exact_row<C>(p, t, first_row + i);
}
