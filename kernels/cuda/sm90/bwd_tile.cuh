// Which rows and keys a block of cuda_bwd_sm90 works on, and where their numbers are in the workspace.
#pragma once

#include "kernels/cuda/common/fixed_point.cuh"
#include "kernels/cuda/sm90/bwd_params.h"
#include "kernels/cuda/sm90/ptx.cuh"

constexpr int TILE_Q = SM90_BWD_TILE_Q, TILE_K = SM90_BWD_TILE_K, ERRAND = SM90_BWD_ERRAND;
static_assert(ERRAND == TILE_Q, "the rows of an errand are those of a tile");

// One sequence of the batch; row i meets key i + diagonal. Whatever the integer tensors hold, nothing outside the tensors is
// touched.
struct Sequence {
    int q_start, k_start; // first row in packed tensors, else 0
    int q_rows, k_rows;   // that are its own: their gradients are written
    int q_len, k_len;     // that take part
    int diagonal;

    static __device__ __forceinline__ void packed(const int32_t *cu_seqlens, int64_t stride, int b,
                                                  int total, int most, int &start, int &rows) {
        if (!cu_seqlens)
            return;
        start = min(max(__ldg(cu_seqlens + b * stride), 0), total);
        rows = min(max(min(__ldg(cu_seqlens + (b + 1) * stride), total) - start, 0), most);
    }

    __device__ __forceinline__ Sequence(const sm90_bwd_params &p, int b)
        : q_start(0), k_start(0), q_rows(p.len_q), k_rows(p.len_k) {
        packed(p.cu_seqlens_q, p.cu_seqlens_q_stride, b, p.total_q, p.len_q, q_start, q_rows);
        packed(p.cu_seqlens_k, p.cu_seqlens_k_stride, b, p.total_k, p.len_k, k_start, k_rows);
        q_len = k_len = INT32_MAX;
        if (p.query_lengths)
            q_len = max(__ldg(p.query_lengths + b * p.query_lengths_stride), 0);
        if (p.key_lengths)
            k_len = max(__ldg(p.key_lengths + b * p.key_lengths_stride), 0);
        q_len = min(q_len, q_rows);
        k_len = min(k_len, k_rows);
        diagonal = p.bottom_right ? k_len - q_len : 0;
    }

    // Keys [low, high) that row i sees.
    __device__ __forceinline__ int low_key(const sm90_bwd_params &p, int i) const {
        return max(i + diagonal - p.window_left, 0);
    }
    __device__ __forceinline__ int high_key(const sm90_bwd_params &p, int i) const {
        return i < q_len ? min(i + diagonal + p.window_right + 1, k_len) : 0;
    }
    __device__ __forceinline__ bool sees(const sm90_bwd_params &p, int i) const {
        return low_key(p, i) < high_key(p, i);
    }
};

// Tiles of rows of one head are numbered through all sequences; packed ones share none.
__device__ __forceinline__ int first_tile(const sm90_bwd_params &p, const Sequence &s, int b) {
    return p.cu_seqlens_q ? s.q_start / TILE_Q + b : b * p.row_tiles;
}

__device__ __forceinline__ char *rows_of(const sm90_bwd_params &p, int head, int tile) {
    return p.rows + (static_cast<int64_t>(head) * p.tiles + tile) * SM90_BWD_ROW_BYTES;
}
__device__ __forceinline__ float *stats_of(const sm90_bwd_params &p, int head, int tile) {
    return reinterpret_cast<float *>(rows_of(p, head, tile));
}
constexpr int STATS_BYTES = SM90_BWD_STATS * TILE_Q * 4, TERM_BYTES = SM90_BWD_TERM_BYTES;

// Number of the first tile of sums of a head of a unit.
__device__ __forceinline__ int first_sums(const sm90_bwd_params &p, int unit, int head_in_group) {
    return (unit % p.slots * p.group + head_in_group) * p.row_tiles;
}
template <int D>
__device__ __forceinline__ int32_t *sums_of(const sm90_bwd_params &p, int tile) {
    return p.sums + static_cast<int64_t>(tile) * (TILE_Q * D);
}

template <int D>
__device__ __forceinline__ uint32_t *facts_of(const sm90_bwd_params &p, int unit) {
    return p.facts + unit * static_cast<int64_t>(SM90_BWD_KEYS + D);
}
template <int D>
__device__ __forceinline__ uint32_t *facts_of(const sm90_bwd_params &p, int b, int kv_head) {
    return p.facts + (b * p.heads_kv + kv_head) * static_cast<int64_t>(SM90_BWD_KEYS + D);
}

template <typename T>
__device__ __forceinline__ T *row_of(T *data, const sm90_strides &s, int b, int head, int row) {
    return data + b * s.batch + head * s.head + row * s.row;
}

// ---- Fixed point ---------------------------------------------------------------------------------------------------

// What the factors of all columns have in common.
__device__ __forceinline__ int value_exponent(const sm90_bwd_params &p, const uint32_t *facts) {
    return exponent_above(sqrtf(__uint_as_float(__ldcg(facts + SM90_BWD_VALUE))) +
                          (p.d_lse ? 1 : 0));
}
__device__ __forceinline__ float column_factor(const uint32_t *facts, int value_exponent,
                                               int column) {
    return power_of_two(-value_exponent -
                        exponent_above(__uint_as_float(__ldcg(facts + SM90_BWD_KEYS + column))));
}

// Element i of a thread's part of d_query: of the rows of a warp, and of the columns of a warpgroup. (PTX ISA, wgmma D fragment)
__device__ __forceinline__ int fragment_row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
__device__ __forceinline__ int fragment_column(int thread, int i) {
    return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// Waits until `counter`, which others count up, has reached `count`.
__device__ __forceinline__ void wait_for_count(const uint32_t *counter, int count) {
    while (static_cast<int>(load_acquire(counter)) < count)
        __nanosleep(100);
}

// The next number of a counter, the same for all lanes of the warp.
__device__ __forceinline__ int claim(const sm90_bwd_params &p, int counter) {
    return uniform(threadIdx.x % 32 == 0 ? atomicAdd(p.next + counter, 1) : 0);
}

// Numbers below `next` have nothing for anybody: nobody need claim them.
__device__ __forceinline__ void pass_over(const sm90_bwd_params &p, int counter, int next) {
    if (threadIdx.x % 32 == 0)
        atomicMax(p.next + counter, next);
}

// A block's shared memory, SM90_BWD_SMALL_BYTES of it.
template <typename T>
__device__ __forceinline__ T *shared_numbers() {
    extern __shared__ char raw[];
    return reinterpret_cast<T *>(raw);
}

// The keys and values of one head of one sequence, and the rows of its query heads.
struct Unit {
    int index, b, kv_head;
    Sequence s;

    __device__ __forceinline__ Unit(const sm90_bwd_params &p, int index)
        : index(index), b(index / p.heads_kv), kv_head(index % p.heads_kv), s(p, b) {}
    __device__ __forceinline__ int key_tiles() const { return (s.k_rows + TILE_K - 1) / TILE_K; }
    __device__ __forceinline__ int row_errands() const { return (s.q_rows + ERRAND - 1) / ERRAND; }
    __device__ __forceinline__ int errands() const {
        return max(row_errands(), (s.k_rows + ERRAND - 1) / ERRAND);
    }
};

// ---- Tasks: tiles of keys ------------------------------------------------------------------------------------------

// Keys of one head, and the rows that see one of them.
struct alignas(64) Task {
    int key_tile; // -1: there are no more
    int batch, kv_head;
    int first, end, start; // tiles of rows; the walk begins at `start` and goes round
    int first_tile;        // of the sequence
    int first_sums;        // of the unit
    int skipped;           // the head is odd: nothing is written here
    Sequence s;

    __device__ __forceinline__ int first_key() const { return key_tile * TILE_K; }
    __device__ __forceinline__ int steps(const sm90_bwd_params &p) const {
        return skipped ? 0 : (end - first) * p.group;
    }
    __device__ __forceinline__ bool has_rows() const { return key_tile >= 0 && end > first; }
    // Whether some row of the tile does not see some key of the warpgroup.
    __device__ __forceinline__ bool is_masked(const sm90_bwd_params &p, int tile, int wg) const {
        const int row = tile * TILE_Q, key = first_key() + 64 * wg;
        return key + 64 > s.k_len || key + 63 - s.diagonal - p.window_right > row ||
               key - s.diagonal + p.window_left < row + TILE_Q - 1;
    }
};

// The next tile of keys, whose unit may not be prepared. Blocks that work on one head at the same time begin at different rows, so that their
// sums do not meet. Behind a mask they do anyway.
__device__ __forceinline__ Task next_task(const sm90_bwd_params &p) {
    Task t{-1, 0, 0, 0, 0, 0, 0, 0, 0, Sequence(p, 0)};
    int number;
    do {
        const int index = claim(p, SM90_BWD_NEXT_TASK);
        number = index / p.key_tiles;
        t.key_tile = number < p.units ? index % p.key_tiles : -1;
        if (t.key_tile < 0)
            return t;
    } while (t.key_tile >= Unit(p, number).key_tiles());
    const Unit unit(p, number);
    t.batch = unit.b;
    t.kv_head = unit.kv_head;
    t.s = unit.s;
    t.first_tile = first_tile(p, t.s, t.batch);
    t.first_sums = first_sums(p, number, 0);
    const int key = t.first_key(), end_key = min(key + TILE_K, t.s.k_len);
    const int low = max(key - t.s.diagonal - p.window_right, 0),
              high = min(end_key - t.s.diagonal + p.window_left, t.s.q_len);
    if (key >= end_key || low >= high)
        return t;
    const bool bounded = p.window_left != SM90_UNBOUNDED || p.window_right != SM90_UNBOUNDED;
    t.first = low / TILE_Q;
    t.end = (high + TILE_Q - 1) / TILE_Q;
    t.start = bounded ? t.first : t.first + key / TILE_Q % (t.end - t.first);
    return t;
}

// The steps of a task: head by head of the group, tile by tile.
struct Walk {
    int head, tile, first, end, start;

    __device__ __forceinline__ Walk(const sm90_bwd_params &p, const Task &t)
        : head(t.kv_head * p.group), tile(t.start), first(t.first), end(t.end), start(t.start) {}
    __device__ __forceinline__ void advance() {
        tile = tile + 1 == end ? first : tile + 1;
        head += tile == start;
    }
};
