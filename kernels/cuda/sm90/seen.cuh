// Which key tiles mask and segments leave to a tile of rows: found before the tiles are computed, so that those that see nothing of
// each other cost nothing, and those that see all of each other no mask.
#pragma once

#include "kernels/cuda/sm90/tile.cuh"

struct Range {
    int low, high; // inclusive; low > high: empty
};

// Of x over the lanes of a warp that have one.
__device__ __forceinline__ Range range_of(const int32_t *data, int64_t stride, int begin, int end) {
    Range r{INT32_MAX, INT32_MIN};
    for (int i = begin + threadIdx.x % 32; i < end; i += 32) {
        const int x = __ldg(data + i * stride);
        r.low = min(r.low, x);
        r.high = max(r.high, x);
    }
    return {__reduce_min_sync(~0u, r.low), __reduce_max_sync(~0u, r.high)};
}

// Whether some, and whether all of rows [row, end_row) and keys [key, end_key) are visible.
struct Sight {
    bool some, all;
};

__device__ __forceinline__ Sight look_at_segments(const Range &rows, const Range &keys) {
    return {rows.low <= keys.high && keys.low <= rows.high,
            rows.low == rows.high && keys.low == keys.high && rows.low == keys.low};
}

// By one warp, as far as is needed to know.
__device__ __forceinline__ Sight look_at_mask(const sm90_params &p, const uint8_t *head, int row,
                                              int end_row, int key, int end_key) {
    constexpr int ROWS = 8;
    Sight sight{false, true};
    if (p.mask.row == 0)
        end_row = row + 1;
    for (; row < end_row && !(sight.some && !sight.all); row += ROWS) {
        bool some = false, all = true;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *const from = head + min(row + r, end_row - 1) * p.mask.row;
            for (int j = key + threadIdx.x % 32; j < end_key; j += 32) {
                const bool visible = __ldg(from + j * p.mask.key) != 0;
                some |= visible;
                all &= visible;
            }
        }
        sight.some |= __any_sync(~0u, some) != 0;
        sight.all &= __all_sync(~0u, all) != 0;
    }
    return sight;
}

// One block for each tile of rows and 32 tiles of keys.
__device__ __forceinline__ void find_seen(const sm90_params &p) {
    extern __shared__ char raw[];
    uint32_t &some = reinterpret_cast<uint32_t *>(raw)[0],
             &all = reinterpret_cast<uint32_t *>(raw)[1];
    if (p.list)
        wait_for_predecessor();
    const int word = blockIdx.x % p.seen_words, rest = blockIdx.x / p.seen_words,
              entries = p.list ? p.list_capacity : p.seen_rows;
    const int head = rest / entries, entry = rest - head * entries, warp = threadIdx.x / 32;
    if (p.list && entry >= p.list->tiles)
        return;
    const sm90_listed at =
        p.list ? p.list->of[entry]
               : sm90_listed{entry / p.seen_tiles, entry / p.seen_tiles * p.seen_tiles};
    const Span s(p, at.sequence);
    const int first_row = (entry - at.first) * p.tile_q,
              diagonal = p.bottom_right ? s.k_len - s.q_len : 0;
    const int row = first_row >> p.pack_log2,
              end_row = min((first_row + p.tile_q - 1 >> p.pack_log2) + 1, s.q_len);
    if (threadIdx.x == 0)
        some = all = 0;
    __syncthreads();
    Range rows{0, 0};
    if (p.query_segments && row < end_row)
        rows = range_of(p.query_segments + at.sequence * p.query_segments_strides.batch,
                        p.query_segments_strides.row, s.q_start + row, s.q_start + end_row);
    for (int i = warp; i < 32; i += blockDim.x / 32) {
        const int key = (word * 32 + i) * p.tile_k, end_key = min(key + p.tile_k, s.k_len);
        Sight sight{row < end_row && key < end_key &&
                        key <= end_row - 1 + diagonal + p.window_right &&
                        end_key - 1 >= row + diagonal - p.window_left,
                    true};
        if (sight.some && p.query_segments) {
            const Range keys =
                range_of(p.key_segments + at.sequence * p.key_segments_strides.batch,
                         p.key_segments_strides.row, s.k_start + key, s.k_start + end_key);
            sight = look_at_segments(rows, keys);
        }
        if (sight.some && p.mask.data) {
            const Sight by_mask = look_at_mask(p,
                                               static_cast<const uint8_t *>(p.mask.data) +
                                                   at.sequence * p.mask.batch + head * p.mask.head,
                                               row, end_row, key, end_key);
            sight.some &= by_mask.some;
            sight.all &= by_mask.all;
        }
        if (threadIdx.x % 32 == 0) {
            atomicOr(&some, static_cast<uint32_t>(sight.some) << i);
            atomicOr(&all, static_cast<uint32_t>(sight.some && sight.all) << i);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *const to =
            p.seen +
            static_cast<int64_t>(seen_row(p, s, at.sequence, head, first_row)) * 2 * p.seen_words;
        to[word] = some;
        to[p.seen_words + word] = all;
    }
}
