// The order in which blocks claim tiles where sequences differ: by one small block, from lengths that only the device knows.
#pragma once

#include "kernels/cuda/sm90/tile.cuh"

// Tiles and keys of a sequence.
struct Listed {
    int tiles, keys;
};

__device__ __forceinline__ Listed listed(const sm90_params &p, int sequence) {
    int start, rows, keys;
    sequence_rows(p.packed_q, sequence, p.len_q, start, rows);
    sequence_rows(p.packed_k, sequence, p.len_k, start, keys);
    keys = sequence_length(p.key_lengths, p.key_lengths_stride, sequence, keys);
    return {
        static_cast<int>(((static_cast<int64_t>(rows) << p.pack_log2) + p.tile_q - 1) / p.tile_q),
        keys};
}

// Sequences whose numbers of keys have the exponent and the first two bits of their fraction in common are of one class.
constexpr int CLASSES = 128;
__device__ __forceinline__ int class_of(int keys) {
    return CLASSES - 1 - ((__float_as_int(keys + 1.f) >> 21) - (127 << 2));
}

// Sequences with the most keys first, within a class in any order: it decides which block does what when, and no result.
__device__ __forceinline__ void list_tiles(const sm90_params &p) {
    // Sequences that overlap have more tiles than the list, and more than an int counts.
    extern __shared__ char raw[];
    auto *const count = reinterpret_cast<unsigned long long *>(raw), *const first = count + CLASSES;
    static_assert(2 * CLASSES * sizeof *count == SM90_LIST_BYTES, "");
    const unsigned long long capacity = p.list_capacity;
    const int thread = threadIdx.x, lane = thread % 32;
    for (int i = thread; i < CLASSES; i += blockDim.x)
        count[i] = 0;
    __syncthreads();
    for (int b = thread; b < p.batch; b += blockDim.x) {
        const Listed s = listed(p, b);
        atomicAdd(&count[class_of(s.keys)], static_cast<unsigned long long>(s.tiles));
    }
    __syncthreads();
    for (int i = thread; i < CLASSES; i += blockDim.x) {
        unsigned long long before = 0;
        for (int j = 0; j < i; j++)
            before += count[j];
        first[i] = before;
        if (i == CLASSES - 1) {
            p.list->next = 0;
            p.list->tiles = static_cast<int>(min(before + count[i], capacity));
        }
    }
    __syncthreads();
    for (int base = thread - lane; base < p.batch; base += blockDim.x) {
        const bool any = base + lane < p.batch;
        const Listed s = any ? listed(p, base + lane) : Listed{0, 0};
        unsigned long long at = capacity;
        if (any)
            at = atomicAdd(&first[class_of(s.keys)], static_cast<unsigned long long>(s.tiles));
        const int begin_here = static_cast<int>(min(at, capacity));
        for (int i = 0; i < min(32, p.batch - base); i++) {
            const int begin = __shfl_sync(~0u, begin_here, i),
                      tiles = min(__shfl_sync(~0u, s.tiles, i), p.list_capacity - begin);
            for (int k = lane; k < tiles; k += 32)
                p.list->of[begin + k] = {base + i, begin};
        }
    }
}
