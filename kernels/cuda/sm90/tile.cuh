/*
 * The shape of a compiled tile, and what a tile of the problem is: its rows, the keys that they see, and the order in
 * which blocks take tiles.
 */
#pragma once

#include "kernels/cuda/sm90/params.h"
#include "kernels/cuda/sm90/ptx.cuh"

namespace sm90 {

template <typename E, int DimQk, int DimV, int TileK, int Warpgroups, int Stages, int QueryStages,
          bool Softcap>
struct Config {
    using Element = E;
    static constexpr int kDimQk = DimQk, kDimV = DimV; /* narrower tensors are zero filled */
    static constexpr int kTileK = TileK, kWarpgroups = Warpgroups;
    static constexpr int kStages = Stages, kQueryStages = QueryStages;
    static constexpr bool kSoftcap = Softcap;

    static constexpr int kTileQ = 64 * kWarpgroups;
    static constexpr int kThreads = 128 * (kWarpgroups + 1);
    /* Together no more than the block starts with: 65536 / kThreads, rounded down to 8, each. */
    static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
    static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 240 : 160;
    static_assert(kWarpgroups == 2 || kWarpgroups == 3, "");
    /* Has the first step of a tile that needs no mask code of its own? Where GEMMs hide the mask, code costs more: it
     * comes from device memory. */
    static constexpr bool kFirstUnmasked = kDimQk < 128;

    /* Tiles in shared memory: columns of 64 elements, swizzled by TMA. */
    static constexpr int kColumnsQk = (kDimQk + 63) / 64, kColumnsV = (kDimV + 63) / 64;
    static constexpr int kQueryBytes = 64 * 128 * kColumnsQk; /* of one warpgroup */
    static constexpr int kKeyColumn = kTileK * 128;
    static constexpr int kKeyBytes = kKeyColumn * kColumnsQk, kValueBytes = kKeyColumn * kColumnsV;
    static constexpr int kQuery = 0, kKey = kQuery + kQueryStages * kWarpgroups * kQueryBytes;
    static constexpr int kValue = kKey + kStages * kKeyBytes,
                         kOutput = kValue + kStages * kValueBytes;
    /* On its way out a warp's output takes slots of 16 rows x 64 columns. */
    static constexpr int kOutputSlots = kColumnsV < 2 ? kColumnsV : 2, kSlotBytes = 16 * 128;
    static constexpr int kTiles = kOutput + kWarpgroups * 4 * kOutputSlots * kSlotBytes;
    static constexpr int kBarriers = kTiles + 64 * kQueryStages * kWarpgroups;
    static constexpr int kSharedBytes =
        kBarriers + 8 * (2 * kQueryStages * kWarpgroups + 4 * kStages) + 1024; /* 1024 to align */

    static_assert(kTileK % 16 == 0 && kTileK <= 128 && kDimQk % 16 == 0 && kDimV % 32 == 0, "");
    static_assert(kSharedBytes <= 227 * 1024, "");
};

/* Where the rows of a tile are. */
struct Place {
    int index;     /* in the walk; -1: there are no more */
    int first_row; /* packed */
    int head, batch;
};

struct alignas(64) Tile : Place {
    int kv_head;
    int q_len, k_len, diagonal;
    int first_block, end_block; /* key tiles to visit */
    /* Of one warpgroup, see tile_of(): */
    int skipped;                /* key tiles behind them that other warpgroups visit */
    int first_whole, end_whole; /* those of them that every row sees whole */
    int first_untracked;        /* from here on every row has seen a key */

    __device__ __forceinline__ bool sees_keys() const { return first_block < end_block; }
};

/* Length of one sequence: the tensor's value, kept inside the extent. */
__device__ __forceinline__ int sequence_length(const int32_t *lengths, int64_t stride, int batch,
                                               int extent) {
    return lengths ? min(max(__ldg(lengths + batch * stride), 0), extent) : extent;
}

/* x / d for 0 <= x < 2^31. */
__device__ __forceinline__ int divide(int x, const sm90_divisor &d) {
    return static_cast<int>(__umulhi(static_cast<uint32_t>(x), d.multiplier) >> d.shift) +
           (d.multiplier ? 0 : x);
}

/* The first tile of a block, which then takes every gridDim-th. Neighbours among the blocks, which are near each other
 * on the device, get the tiles of one head, which tile_at() puts heads_per_group apart. */
__device__ __forceinline__ int first_tile(const sm90_params &p) {
    const int block = blockIdx.x;
    const int head = divide(block, p.by_tiles_per_head), step = block - head * p.tiles_per_head;
    return head < p.heads_per_group ? step * p.heads_per_group + head : block;
}

/* Tile `wanted` of the walk, or none if that is past the end. Heads come in groups whose keys and values fit into L2
 * together; the tiles of a group are ordered by row, downwards and upwards in turn so that equally heavy causal tiles
 * meet where groups do, and the last group ends with its lightest. Blocks that take every gridDim-th tile then get equal work within a percent or so. */
template <class C>
__device__ __forceinline__ Tile tile_at(const sm90_params &p, int wanted) {
    Tile t;
    const int index = min(wanted, p.tiles - 1);
    const int group = divide(index, p.by_group_tiles);
    const int in_group = index - group * p.heads_per_group * p.tiles_per_head;
    const int group_heads = min(p.heads_per_group, p.heads_total - group * p.heads_per_group);
    const int step =
                  divide(in_group, group < p.groups - 1 ? p.by_group_heads : p.by_last_group_heads),
              head = group * p.heads_per_group + in_group - step * group_heads;
    const bool upwards = (p.groups - group & 1) == 0;
    t.index = wanted < p.tiles ? wanted : -1;
    t.first_row = (upwards ? step : p.tiles_per_head - 1 - step) * C::kTileQ;
    t.batch = divide(head, p.by_heads);
    t.head = head - t.batch * p.heads;
    t.kv_head = divide(t.head, p.by_heads_per_kv);
    t.q_len = sequence_length(p.query_lengths, p.query_lengths_stride, t.batch, p.len_q);
    t.k_len = sequence_length(p.key_lengths, p.key_lengths_stride, t.batch, p.len_k);
    t.diagonal = p.bottom_right ? t.k_len - t.q_len : 0;

    const int first = t.first_row >> p.pack_log2;
    const int last = min((t.first_row + C::kTileQ - 1) >> p.pack_log2, t.q_len - 1);
    const int lowest = max(first + t.diagonal - p.window_left, 0);
    const int highest = min(last + t.diagonal + p.window_right + 1, t.k_len);
    const bool any = t.index >= 0 && first < t.q_len && lowest < highest;
    t.first_block = lowest / C::kTileK;
    t.end_block = any ? (highest + C::kTileK - 1) / C::kTileK : t.first_block;
    return t;
}

/* Tile t as a warpgroup sees it: it visits at least one key tile, and passes over the last ones, which only rows of
 * others see. */
template <class C>
__device__ __forceinline__ Tile tile_of(const sm90_params &p, Tile t, int wg) {
    if (!t.sees_keys())
        return t;
    const int first = (t.first_row + 64 * wg) >> p.pack_log2;
    const int last = min((t.first_row + 64 * wg + 63) >> p.pack_log2, t.q_len - 1);
    const int highest = min(last + t.diagonal + p.window_right + 1, t.k_len);
    const int end_block = max((highest + C::kTileK - 1) / C::kTileK, t.first_block + 1);
    t.skipped = t.end_block - end_block;
    t.end_block = end_block;
    const int all_lowest = max(last + t.diagonal - p.window_left, 0);
    const int all_highest = max(min(first + t.diagonal + p.window_right + 1, t.k_len), 0);
    t.first_whole = (all_lowest + C::kTileK - 1) / C::kTileK;
    t.end_whole = all_highest / C::kTileK;
    t.first_untracked = all_lowest / C::kTileK + 1;
    return t;
}

/* Keys [low, high) that a packed row sees. */
__device__ __forceinline__ void row_bounds(const sm90_params &p, const Tile &t, int row, int &low,
                                           int &high) {
    const int i = row >> p.pack_log2;
    low = max(i + t.diagonal - p.window_left, 0);
    high = i < t.q_len ? min(i + t.diagonal + p.window_right + 1, t.k_len) : 0;
}

} // namespace sm90
