// ALiBi: a key loses slope * distance from the key that a row meets. docs/cuda-sm90.md
//
// Scores grow towards that key, by 2^100 in a tile, but by how much is known beforehand. Weights are relative to what a key at the distance
// `near` would lose, so that the top of a row stands still here, too. `near` moves to the nearest key of a tile, and sums shrink with it,
// before weights would come out more than 2^LAG too large. Slopes below 0 are relative to no distance.
//
// On one side of the key that is met what keys lose is a line in their number. What rows have in common of it is an exponent, `shift`. The
// rest, from the tile's origin on, changes scores: a product adds it where there is room for its operand, see write_distances().
#pragma once

#include "kernels/cuda/sm90/store.cuh"

// For each key four columns of how far it is from the last of its tile, below 0, and four of how far from the first, for keys before those
// that rows meet and behind them. Of four columns a product uses three.
template <class C>
__device__ __forceinline__ void write_distances(char *memory) {
    if (threadIdx.x >= C::TILE_K)
        return;
    const int first = threadIdx.x, last = first - (C::TILE_K - 1);
    const uint32_t behind = pack<__nv_bfloat16>(first, first),
                   before = pack<__nv_bfloat16>(last, last);
    reinterpret_cast<uint4 *>(memory + C::DISTANCES)[threadIdx.x] = {before, before, behind,
                                                                     behind};
    async_proxy_fence();
}

// Whether rows see keys behind the one that they meet.
__device__ __forceinline__ bool sees_behind(const sm90_params &p) { return p.window_right > 0; }

// The first key tile behind the keys that a warpgroup's rows meet, and the end of those that all of its rows see.
template <class C>
__device__ __forceinline__ int first_behind(const sm90_params &p, const Tile<C> &t, int wg) {
    const int last = min((t.first_row + C::ROWS_APART * wg + 63) >> p.pack_log2, t.q_len - 1);
    return (max(last + t.diagonal, 0) + C::TILE_K - 1) / C::TILE_K;
}
template <class C>
__device__ __forceinline__ int end_behind(const sm90_params &p, const Tile<C> &t, int wg) {
    const int first = (t.first_row + C::ROWS_APART * wg) >> p.pack_log2;
    return max(min(first + t.diagonal + p.window_right + 1, t.k_len), 0) / C::TILE_K;
}

// a / b, without the call that a division may end in: products are under way.
__device__ __forceinline__ float quotient(float a, float b) {
    const float r = reciprocal_approx(b);
    return fmaf(fmaf(-b, a * r, a), r, a * r);
}

// Those of a thread's two rows from the keys of the tile that its warpgroup is at.
template <class C>
struct Distances {
    // bf16 and f32 have the same range, so that half of it is for weights that are too large, and for sums of them.
    static constexpr int LAG = std::is_same_v<typename C::Element, __nv_bfloat16> ? 64 : 5;

    float slope
        [2]; // of scores, which are still to be scaled; behind the keys that rows meet its negative
    float lead[2]; // from the origin to a key at the distance `near`
    int steps_between; // moves of `near`; below 0 behind the keys that rows meet, where it does not move
    uint32_t parts[2]; // of the slope, for the product; 0: it is to add nothing
    bool
        is_steep; // a tile's line, added from its first key on, would leave its last ones too few bits of f32
    bool bends; // so it is, or the tiles in which rows meet a key are more than one line

    // The key whose number in a tile counts as 0 in the line.
    __device__ __forceinline__ int origin() const {
        return !C::MULTIPLIES_DISTANCES ? threadIdx.x % 4 * 2
               : steps_between > 0      ? C::TILE_K - 1
                                        : 0;
    }

    // From the origin of tile n to the key that a row meets.
    __device__ __forceinline__ int distance(const sm90_params &p, const Tile<C> &t, int wg, int n,
                                            int half) const {
        return met_key<C>(p, t, first_row_of_thread<C>(t, wg) + 8 * half) - n * C::TILE_K -
               origin();
    }

    // No visible key of tile n is nearer to key `met`, nor one of a tile before it.
    static __device__ __forceinline__ int nearest(const Tile<C> &t, int met, int n) {
        const int last = min((n + 1) * C::TILE_K, t.k_len) - 1;
        return max(max(met - last, t.first_block * C::TILE_K - met), 0);
    }

    __device__ __forceinline__ void move_near(const sm90_params &p, const Tile<C> &t, int wg,
                                              int n) {
        const int row = first_row_of_thread<C>(t, wg);
#pragma unroll
        for (int half = 0; half < 2; half++)
            lead[half] = distance(p, t, wg, n, half) -
                         (slope[half] > 0 ? nearest(t, met_key<C>(p, t, row + 8 * half), n) : 0);
    }

    // Where the product adds the line it does so with three parts of the slope, in the columns of its side.
    __device__ __forceinline__ void lean(bool leans) {
        if constexpr (C::MULTIPLIES_DISTANCES) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float x = leans ? slope[half] : 0,
                            high = __bfloat162float(__float2bfloat16_rn(x)),
                            middle = __bfloat162float(__float2bfloat16_rn(x - high));
                const uint32_t pair = threadIdx.x % 2 ? pack<__nv_bfloat16>(x - high - middle, 0)
                                                      : pack<__nv_bfloat16>(high, middle);
                parts[half] = threadIdx.x % 4 / 2 == (steps_between < 0) ? pair : 0;
            }
        }
    }

    // Where rows of several heads share a tile `near` moves in every step.
    __device__ __forceinline__ void start(const sm90_params &p, const Tile<C> &t, int wg) {
        constexpr float MOST_OF_LINE = 16; // exponents of 2 in a tile
        const int row = first_row_of_thread<C>(t, wg);
#pragma unroll
        for (int half = 0; half < 2; half++)
            slope[half] = quotient(slope_of<C>(p, t, row + 8 * half), p.scale);
        const float of_tile = p.scale_log2 * C::TILE_K,
                    steepest = fmaxf(fabsf(slope[0]), fabsf(slope[1])) * of_tile;
        steps_between =
            p.pack_log2 > 0
                ? 1
                : uniform(1 + min(int(LAG / (fmaxf(slope[0], 0.f) * of_tile)), p.len_k));
        move_near(p, t, wg, t.first_block);
        is_steep = __any_sync(~0u, steepest > MOST_OF_LINE);
        bends = sees_behind(p) || is_steep;
        lean(!bends);
    }

    // The same to a tile all of whose keys are before those that rows meet: the nearest one is its last.
    __device__ __forceinline__ void move_near_last() {
        const float last = C::TILE_K - 1 - origin();
#pragma unroll
        for (int half = 0; half < 2; half++)
            lead[half] = slope[half] > 0 ? last : lead[half];
    }

    // To tile n, from the one before it; `factor`: of sums, where `near` MOVES. The keys of a WHOLE tile are on one side.
    template <bool MOVES, bool WHOLE>
    __device__ __forceinline__ void approach(const sm90_params &p, const Tile<C> &t, int wg, int n,
                                             float (&factor)[2]) {
        lead[0] -= C::TILE_K;
        lead[1] -= C::TILE_K;
        if constexpr (MOVES) {
            const float before[2] = {lead[0], lead[1]};
            if constexpr (WHOLE)
                move_near_last();
            else
                move_near(p, t, wg, n);
#pragma unroll
            for (int half = 0; half < 2; half++)
                factor[half] =
                    exp2_approx(p.scale_log2 * slope[half] * (before[half] - lead[half]));
        }
    }

    // From keys before those that rows meet to keys behind them, or back; tile n is the first. Behind them keys lose the more the later
    // they are.
    __device__ __forceinline__ void turn(const sm90_params &p, const Tile<C> &t, int wg, int n) {
        const int before[2] = {distance(p, t, wg, n - 1, 0), distance(p, t, wg, n - 1, 1)};
        steps_between = -steps_between;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            slope[half] = -slope[half];
            lead[half] = before[half] - int(lead[half]) + distance(p, t, wg, n - 1, half);
        }
    }

    // The end of the tiles that are one line: of a steep one that is added here the last keys, which lose least, are too far from where it begins.
    __device__ __forceinline__ int end_of_line(int end_whole) const {
        return end_whole - (is_steep && !C::MULTIPLIES_DISTANCES);
    }

    // Takes from the scores what keys on one side lose, unless the product has.
    template <int SCORES>
    __device__ __forceinline__ void lose_line(const sm90_params &p, float (&score)[SCORES],
                                              float (&shift)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            shift[half] = p.scale_log2 * slope[half] * lead[half];
#pragma unroll
            for (int i = 0; i < SCORES / 2 && !C::MULTIPLIES_DISTANCES; i++) {
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = fmaf(slope[half], i / 2 * 8 + i % 2, s);
            }
        }
    }

    // The same of a tile with keys on both sides, or where sums would lose too much of a line.
    template <int SCORES>
    __device__ __forceinline__ void lose(const sm90_params &p, const Tile<C> &t, int wg, int n,
                                         float (&score)[SCORES], float (&shift)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int from_origin = distance(p, t, wg, n, half);
            const float from_first = from_origin + origin() - int(threadIdx.x % 4 * 2);
            shift[half] = p.scale_log2 * slope[half] * (int(lead[half]) - from_origin);
#pragma unroll
            for (int i = 0; i < SCORES / 2; i++) {
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = fmaf(-slope[half], fabsf(from_first - (i / 2 * 8 + i % 2)), s);
            }
        }
    }

    // Makes the top of rows whose last tile is done one relative to no distance.
    __device__ __forceinline__ void arrive(const sm90_params &p, const Tile<C> &t, int wg,
                                           float (&top)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; half++)
            top[half] -= p.scale_log2 * slope[half] *
                         (distance(p, t, wg, t.end_block - 1, half) - int(lead[half]));
    }
};
