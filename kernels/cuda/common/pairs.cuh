// The options that came with ABI 1.1: which keys segments and block mask hide from a row, which weights dropout drops, and which tiles
// of keys need no work. Forward and backward ask the same.
#pragma once

#include "kernels/cuda/common/registers.cuh"
#include "kernels/cuda/common/sequence.cuh"
#include "src/philox.h"

// Of one query head of one sequence. Row i and key j count from the sequence's first.
struct PairOptions {
    const fwd_params &f;
    const pair_params &p;
    const Sequence &seq;
    const int b, h;

    // The same, of which nothing is kept from one step of a loop to the next.
    __device__ __forceinline__ PairOptions for_once() const {
        return {f, p, seq, anew(b), anew(h)};
    }

    __device__ __forceinline__ int query_segment(int i) const {
        const fwd_view &v = p.query_segments;
        return ((const int *)v.data)[b * v.stride[0] + (seq.q_start + i) * v.stride[2]];
    }
    __device__ __forceinline__ int key_segment(int j) const {
        const fwd_view &v = p.key_segments;
        return ((const int *)v.data)[b * v.stride[0] + (seq.k_start + j) * v.stride[2]];
    }
    __device__ __forceinline__ bool same_segment(int i, int j) const {
        return query_segment(i) == key_segment(j);
    }

    __device__ __forceinline__ uint8_t byte_at(const fwd_view &v, int i, int j) const {
        return ((const uint8_t *)
                    v.data)[b * v.stride[0] + h * v.stride[1] + i * v.stride[2] + j * v.stride[3]];
    }
    // What the block mask says of a block of rows and keys: 0: it is hidden, 1: the mask decides, else it is seen.
    __device__ __forceinline__ uint8_t block_state(int block_row, int block_key) const {
        return byte_at(p.block_mask, block_row, block_key);
    }
    // The same of rows [i, last_i] and keys [j, last_j]; -1: they lie in several blocks.
    __device__ __forceinline__ int state_of(int i, int last_i, int j, int last_j) const {
        const int row = divide(i, p.block_q), key = divide(j, p.block_k);
        return row == divide(last_i, p.block_q) && key == divide(last_j, p.block_k)
                   ? block_state(row, key)
                   : -1;
    }
    // By block mask and mask.
    __device__ __forceinline__ bool unmasked(int i, int j) const {
        if (p.block_mask.data) {
            const uint8_t state = block_state(divide(i, p.block_q), divide(j, p.block_k));
            if (state != 1)
                return state != 0;
        }
        return !f.mask.data || byte_at(f.mask, i, j);
    }
    // By all that hides a key but the window.
    __device__ __forceinline__ bool visible(int i, int j) const {
        return (!p.query_segments.data || same_segment(i, j)) && unmasked(i, j);
    }

    __device__ __forceinline__ void random(int i, int j, uint32_t (&x)[4], uint32_t seed0,
                                           uint32_t seed1) const {
        x[0] = j / 4;
        x[1] = i;
        x[2] = b * f.heads_q + h;
        x[3] = p.offset;
        philox(x, seed0, seed1);
    }
    // The random words of keys j / 4 * 4 to j / 4 * 4 + 3.
    __device__ __forceinline__ void random(int i, int j, uint32_t (&x)[4]) const {
        random(i, j, x, p.seed[0], p.seed[1]);
    }
    __device__ __forceinline__ bool dropped(int i, int j) const {
        uint32_t x[4];
        random(i, j, x);
        const uint32_t low = j & 1 ? x[1] : x[0], high = j & 1 ? x[3] : x[2];
        return (j & 2 ? high : low) <= p.dropped_upto;
    }
    // Of a tile of accumulators in the layout of mma, bits n * 4 + e of rows i and i + 8: whether keys j + n * 8 + e are dropped, e being
    // 0 or 1. Random words are of four keys of a row, and a lane needs those of two: it finds those of one row for itself and
    // for its neighbour, and gets those of the other.
    template <int NT>
    __device__ __forceinline__ void dropped_in_tile(int i, int j, uint32_t (&of_half)[2]) const {
        static_assert(NT * 4 <= 32, "a bit for each");
        const int odd = threadIdx.x % 2;
        const uint32_t seed0 = anew(p.seed[0]), seed1 = anew(p.seed[1]);
        uint32_t own = 0;
#pragma unroll 2
        for (int n = 0; n < NT; ++n) {
            uint32_t x[4];
            random(i + odd * 8, j + n * 8, x, seed0, seed1);
#pragma unroll
            for (int word = 0; word < 4; ++word)
                own |= (uint32_t)(x[word] <= p.dropped_upto) << (n * 4 + word);
        }
        const uint32_t other = __shfl_xor_sync(~0u, own, 1);
        of_half[0] = (odd ? other : own) >> 2 * odd;
        of_half[1] = (odd ? own : other) >> 2 * odd;
    }
};

// Which of tiles [first, end) of KEYS keys segments and block mask leave to rows [row, end_row). Every warp finds out by itself, each
// lane about one tile of 32. Segments are told apart by their ranges: where they are sorted, only tiles with a key that is seen are left.
template <int KEYS, bool EXTRAS>
struct SeenTiles {
    __device__ __forceinline__ SeenTiles(const PairOptions &, int, int, int, int) {}
    __device__ __forceinline__ static int begin() { return 0; }
    __device__ __forceinline__ static int next(int tile) { return tile; }
};
template <int KEYS>
struct SeenTiles<KEYS, true> {
    static constexpr int MOST_BLOCKS = 64; // of a tile: to look at more costs more than it spares

    const PairOptions options;
    const int row, end_row, first, end;
    uint32_t seen; // of 32 tiles, those from a multiple of 32 on

    __device__ __forceinline__ SeenTiles(const PairOptions &options, int row, int end_row,
                                         int first, int end)
        : options(options), row(row), end_row(end_row), first(first), end(end), seen(0) {}

    __device__ __forceinline__ bool any() const {
        return options.p.query_segments.data || options.p.block_mask.data;
    }

    __device__ __forceinline__ static bool by_segments(const PairOptions &options, int row,
                                                       int end_row, int key) {
        const int last_key = options.seq.k_len - 1;
        int low = INT32_MAX, high = INT32_MIN, least = INT32_MAX, most = INT32_MIN;
#pragma unroll 1
        for (int i = row + threadIdx.x % 32; i < end_row; i += 32) {
            const int x = options.query_segment(i);
            low = min(low, x);
            high = max(high, x);
        }
        low = __reduce_min_sync(~0u, low);
        high = __reduce_max_sync(~0u, high);
#pragma unroll 4
        for (int n = 0; n < KEYS; ++n) {
            const int x = options.key_segment(min(key + n, last_key));
            least = min(least, x);
            most = max(most, x);
        }
        return low <= most && least <= high;
    }

    __device__ __forceinline__ static bool by_blocks(const PairOptions &options, int row,
                                                     int end_row, int key) {
        const pair_params &p = options.p;
        const int last_key = min(key + KEYS, options.seq.k_len) - 1;
        const int first_row = divide(row, p.block_q), first_key = divide(key, p.block_k),
                  rows = divide(end_row - 1, p.block_q) - first_row + 1,
                  keys = divide(last_key, p.block_k) - first_key + 1;
        bool some = rows * keys > MOST_BLOCKS;
#pragma unroll 1
        for (int i = 0; i < rows && !some; ++i)
#pragma unroll 1
            for (int j = 0; j < keys && !some; ++j)
                some = options.block_state(first_row + i, first_key + j);
        return some;
    }

    __device__ __forceinline__ void look(int group) {
        const PairOptions here = options.for_once();
        const int from = anew(row), tile = group * 32 + threadIdx.x % 32, key = tile * KEYS;
        bool sees = tile >= first && key < here.seq.k_len;
        if (here.p.query_segments.data)
            sees = by_segments(here, from, end_row, key) && sees;
        if (here.p.block_mask.data && sees)
            sees = by_blocks(here, from, end_row, key);
        seen = __ballot_sync(~0u, sees);
    }

    // Where to begin with next().
    __device__ __forceinline__ int begin() const { return any() ? first / 32 * 32 : first; }

    // The first tile from `tile` on that is left, or `end`. It is asked about one after the other.
    __device__ __forceinline__ int next(int tile) {
        while (any() && tile < end) {
            if (tile % 32 == 0)
                look(tile / 32);
            const uint32_t left = seen >> tile % 32;
            if (left) {
                tile += __ffs(left) - 1;
                break;
            }
            tile = (tile / 32 + 1) * 32;
        }
        return min(tile, end);
    }
};
