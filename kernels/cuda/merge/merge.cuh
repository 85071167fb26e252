// Results over parts of the keys into one. A block first finds out for its rows where each part lies and what it weighs, which
// takes divisions, products of strides and exponentials for each row. Then its threads go over the columns of all rows, which
// takes next to nothing but to read and to write: each element once, 16 bytes at a time where the layout permits.
#pragma once

#include "kernels/cuda/common/sequence.cuh"
#include "kernels/cuda/merge/params.h"

#include <cfloat>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename Sum>
__device__ __forceinline__ Sum load(const void *data, int dtype, int64_t at) {
    switch (dtype) {
    case MERGE_F64:
        return ((const double *)data)[at];
    case MERGE_F32:
        return ((const float *)data)[at];
    case MERGE_F16:
        return (float)((const __half *)data)[at];
    default:
        return (float)((const __nv_bfloat16 *)data)[at];
    }
}

template <typename Sum>
__device__ __forceinline__ void store(void *data, int dtype, int64_t at, Sum x) {
    switch (dtype) {
    case MERGE_F64:
        ((double *)data)[at] = x;
        return;
    case MERGE_F32:
        ((float *)data)[at] = x;
        return;
    case MERGE_F16:
        ((__half *)data)[at] = __half(x);
        return;
    default:
        ((__nv_bfloat16 *)data)[at] = __nv_bfloat16(x);
    }
}

// A row of a part, as a block knows it.
template <typename Sum>
struct Slot {
    const void *output; // NULL: has no weight
    Sum weight;         // first the log-sum-exp
    int dtype;
};

struct Result {
    void *output, *lse; // of a row; no lse: NULL
};

// A column is one element, whatever its layout and its type.
template <typename S>
struct Elements {
    using Sum = S;
    static constexpr int WIDTH = 1;
    using Raw = Sum;

    __device__ __forceinline__ static Raw read(const Slot<Sum> &slot, const merge_part &part,
                                               int column) {
        return load<Sum>(slot.output, slot.dtype, column * part.output_stride[3]);
    }
    __device__ __forceinline__ static void widen(const Raw &raw, int, Sum *x) { *x = raw; }
    __device__ __forceinline__ static void write(void *row, const merge_part &to, int column,
                                                 const Sum *x) {
        store(row, to.output_dtype, column * to.output_stride[3], *x);
    }
};

// A column is what 16 bytes hold of E; the tensors are of E or of float32.
template <typename E>
struct Vectors {
    using Sum = float;
    static constexpr int WIDTH = 16 / sizeof(E), WORDS = sizeof(float) / sizeof(E);
    struct Raw {
        uint4 words[WORDS]; // E has the first
    };

    __device__ __forceinline__ static bool is_wide(int dtype) {
        return WORDS > 1 && dtype == MERGE_F32;
    }
    __device__ __forceinline__ static Raw read(const Slot<Sum> &slot, const merge_part &,
                                               int column) {
        Raw raw;
        const int words = is_wide(slot.dtype) ? WORDS : 1;
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            if (i < words)
                raw.words[i] = ((const uint4 *)slot.output)[column * words + i];
        return raw;
    }
    __device__ __forceinline__ static void widen(const Raw &raw, int dtype, Sum *x) {
        const bool wide = is_wide(dtype);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            x[i] = wide ? ((const float *)raw.words)[i] : (float)((const E *)raw.words)[i];
    }
    __device__ __forceinline__ static void write(void *row, const merge_part &to, int column,
                                                 const Sum *x) {
        if (is_wide(to.output_dtype)) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i)
                ((float4 *)row)[column * WORDS + i] =
                    make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
            return;
        }
        uint4 words;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            ((E *)&words)[i] = E(x[i]);
        ((uint4 *)row)[column] = words;
    }
};

// exp(lse - of_all), 0 of a part that saw no key. Of all others it stays above 0, which would make NaN of an infinity.
__device__ __forceinline__ float weight_of(float lse, float of_all) {
    const float weight = expf(lse - of_all);
    return lse == -INFINITY ? 0 : weight < FLT_MIN ? FLT_MIN : weight;
}
__device__ __forceinline__ double weight_of(double lse, double of_all) {
    return lse == -INFINITY ? 0 : exp(lse - of_all);
}

__device__ __forceinline__ const merge_part &part_of(const merge_params &p, int n) {
    return p.table ? p.table[n] : p.parts[n];
}

struct Row {
    int64_t b, h, l;

    __device__ __forceinline__ Row(const merge_params &p, int64_t number) {
        const int64_t head = number / p.length;
        l = number - head * p.length;
        b = head / p.heads;
        h = head - b * p.heads;
    }
    __device__ __forceinline__ int64_t in(const int64_t *stride) const {
        return b * stride[0] + h * stride[1] + l * stride[2];
    }
};

__device__ __forceinline__ void *address(void *data, int dtype, int64_t at) {
    return (char *)data + at * (dtype == MERGE_F64 ? 8 : dtype == MERGE_F32 ? 4 : 2);
}

// A: Elements or Vectors.
template <typename A>
struct Block {
    using Sum = typename A::Sum;
    static_assert(sizeof(Slot<Sum>) == MERGE_SLOT_BYTES(sizeof(Sum)));

    const merge_params &p;
    Slot<Sum> *const slots; // [part][row]
    Result *const results;  // [row]
    const int64_t first;
    const int rows;

    __device__ __forceinline__ Block(const merge_params &p, char *shared)
        : p(p), slots((Slot<Sum> *)shared), results((Result *)(slots + MERGE_SLOTS)),
          first((int64_t)blockIdx.x * p.block_rows),
          rows((int)min((int64_t)p.block_rows, p.rows - first)) {}

    __device__ __forceinline__ void find_rows() const {
        for (int i = threadIdx.x; i < (p.count + 1) * rows; i += MERGE_THREADS) {
            const int n = i / rows, r = i - n * rows;
            const Row row(p, first + r);
            if (n == p.count)
                find_result(r, row);
            else if (p.table)
                find_part(slots[i], p.table[n], row);
            else
                find_part(slots[i], p.parts[n], row);
        }
    }
    __device__ __forceinline__ void find_part(Slot<Sum> &slot, const merge_part &part,
                                              const Row &row) const {
        slot.output = address(part.output, part.output_dtype, row.in(part.output_stride));
        slot.weight = load<Sum>(part.lse, part.lse_dtype, row.in(part.lse_stride));
        slot.dtype = part.output_dtype;
    }
    __device__ __forceinline__ void find_result(int r, const Row &row) const {
        const merge_part &to = p.result;
        results[r].output = address(to.output, to.output_dtype, row.in(to.output_stride));
        results[r].lse = to.lse ? address(to.lse, to.lse_dtype, row.in(to.lse_stride)) : nullptr;
    }

    __device__ __forceinline__ void weigh_parts(int r) const {
        Sum top = -INFINITY, total = 0;
        for (int n = 0; n < p.count; ++n)
            top = fmax(top, slots[n * rows + r].weight);
        for (int n = 0; n < p.count; ++n)
            total += weight_of(slots[n * rows + r].weight, top);
        const Sum lse = total == 0 ? (Sum)-INFINITY : top + log(total);
        for (int n = 0; n < p.count; ++n) {
            Slot<Sum> &slot = slots[n * rows + r];
            if (slot.weight == -INFINITY)
                slot.output = nullptr;
            slot.weight = weight_of(slot.weight, lse);
        }
        if (results[r].lse)
            store(results[r].lse, p.result.lse_dtype, 0, lse);
    }

    __device__ __forceinline__ void merge(int r, int column) const {
        constexpr int AT_ONCE = 2; // parts
        Sum sum[A::WIDTH] = {};
        for (int n = 0; n < p.count; n += AT_ONCE) {
            typename A::Raw raw[AT_ONCE];
            Slot<Sum> slot[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                slot[i] = n + i < p.count ? slots[(n + i) * rows + r] : Slot<Sum>{};
                if (slot[i].output)
                    raw[i] = A::read(slot[i], part_of(p, n + i), column);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                Sum x[A::WIDTH];
                if (!slot[i].output)
                    continue;
                A::widen(raw[i], slot[i].dtype, x);
#pragma unroll
                for (int c = 0; c < A::WIDTH; ++c)
                    sum[c] = fma(slot[i].weight, x[c], sum[c]);
            }
        }
        A::write(results[r].output, p.result, column, sum);
    }
};

template <typename A>
__device__ __forceinline__ void cuda_merge_simt(const merge_params &p) {
    extern __shared__ __align__(16) char shared[];
    const Block<A> block(p, shared);
    block.find_rows();
    __syncthreads();
    for (int r = threadIdx.x; r < block.rows; r += MERGE_THREADS)
        block.weigh_parts(r);
    __syncthreads();
    for (int i = threadIdx.x; i < block.rows * p.columns; i += MERGE_THREADS) {
        const int r = divide(i, p.by_columns);
        block.merge(r, i - r * p.columns);
    }
}
