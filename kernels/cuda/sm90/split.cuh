// Few query rows over many keys: the keys of each tile are split among blocks, which leave parts of rows in the workspace, and a second
// kernel merges these in their order. What a part is: place_split(). docs/cuda-sm90.md
#pragma once

#include "kernels/cuda/sm90/fwd.cuh"

// What the warps of a block that merges tell each other of its 16 rows.
struct MergeShared {
    float top[16], total[16];
    uint32_t spoilt;                   // a bit for each row that comes out non-finite
    float weight[SM90_MOST_PARTS][16]; // of a part in the sum
};
static_assert(sizeof(MergeShared) == SM90_MERGE_BYTES, "");

// Top and sum of a row, of all its parts, and the weight of each, by one warp. A part that saw no key has none. `step`: rows from a
// part to the next.
__device__ __forceinline__ void weigh_parts(MergeShared &s, const float2 *sums, int64_t step,
                                            int parts, int row) {
    const int lane = threadIdx.x % 32;
    float top = -INFINITY, total = 0;
    for (int i = lane; i < parts; i += 32)
        top = fmaxf(top, sums[i * step + row].x);
    for (int i = 16; i > 0; i /= 2)
        top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    for (int i = lane; i < parts; i += 32) {
        const float2 part = sums[i * step + row];
        const float weight = part.x == -INFINITY ? 0 : exp2_approx(part.x - top);
        s.weight[i][row] = weight;
        total = fmaf(weight, part.y, total);
    }
    for (int i = 16; i > 0; i /= 2)
        total += __shfl_xor_sync(~0u, total, i);
    s.top[row] = top;
    s.total[row] = total;
}

// Eight columns of two rows of each part, as store_part() leaves them, on their way to a warp: AT_A_TIME of them.
struct ComingParts {
    static constexpr int AT_A_TIME = 8;
    float4 part[AT_A_TIME];

    __device__ __forceinline__ void load(const float4 *first, int64_t step, int count) {
#pragma unroll
        for (int i = 0; i < AT_A_TIME; i++)
            part[i] = i < count ? first[i * step] : make_float4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void add(const float (*weight)[16], int count,
                                        float (&output)[4]) const {
        const int row = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < AT_A_TIME; i++) {
            if (i < count) {
                const float first = weight[i][row], second = weight[i][row + 8];
                output[0] = fmaf(first, part[i].x, output[0]);
                output[1] = fmaf(first, part[i].y, output[1]);
                output[2] = fmaf(second, part[i].z, output[2]);
                output[3] = fmaf(second, part[i].w, output[3]);
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
    extern __shared__ char raw[];
    MergeShared &s = *reinterpret_cast<MergeShared *>(raw);
    constexpr int STRIPS = C::TILE_Q / 16, WARPS = C::DIM_V / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = blockIdx.x / STRIPS;
    const Tile<C> t = tile_at<C, true>(p, tile);
    const int first_row = t.first_row + blockIdx.x % STRIPS * 16,
              blocks = t.end_block - t.first_block;
    const int parts = blocks > 0 ? (blocks - 1) / blocks_per_part(p, blocks) + 1 : 0;
    const int64_t step = p.split.team_tiles * STRIPS, // from a part of these rows to the next
        first = divide(tile, p.split.by_team_tiles) * (p.split.parts - 1) * step + blockIdx.x;
    const float4 *const outputs =
        reinterpret_cast<const float4 *>(p.split.outputs) + (first * WARPS + warp) * 32 + lane;
    ComingParts coming;
    float output[4] = {0, 0, 0, 0};
    s.spoilt = 0;
    wait_for_predecessor();
    if (!is_row<C>(p, t, first_row))
        return;
    coming.load(outputs, step * WARPS * 32, parts);
    for (int row = warp; row < 16; row += WARPS)
        weigh_parts(s, reinterpret_cast<const float2 *>(p.split.sums) + first * 16, step * 16,
                    parts, row);
    __syncthreads();
    for (int i = 0;;) {
        coming.add(s.weight + i, parts - i, output);
        i += ComingParts::AT_A_TIME;
        if (i >= parts)
            break;
        coming.load(outputs + i * step * WARPS * 32, step * WARPS * 32, parts - i);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = 8 * half + lane / 4;
        if (is_row<C>(p, t, first_row + row) &&
            store_merged<C>(p, t, first_row + row, 8 * warp + lane % 4 * 2, s.top[row],
                            s.total[row], output[2 * half], output[2 * half + 1]))
            atomicOr(&s.spoilt, 1u << row);
    }
    __syncthreads();
    for (int row = warp; row < 16; row += WARPS)
        if (s.spoilt >> row & 1)
            exact_row<C>(p, t, first_row + row);
}
