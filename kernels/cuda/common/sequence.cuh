// Which rows and keys a block works on. Integer tensors are clamped to the extents: whatever they hold, nothing outside
// the tensors is touched.
#pragma once

#include "kernels/cuda/common/params.h"

__device__ __forceinline__ int divide(unsigned x, const divisor &d) {
    return (uint64_t)x * d.multiplier >> d.shift;
}

__device__ __forceinline__ int clamped(int64_t x, int64_t least, int64_t most) {
    return (int)(x < least ? least : x > most ? most : x);
}

__device__ __forceinline__ int int_at(const fwd_view &v, int64_t i) {
    return ((const int *)v.data)[i * v.stride[0]];
}

// One sequence of the batch; row i meets key i + diagonal.
struct Sequence {
    int64_t q_start, k_start; // first row in packed tensors, else 0
    int q_rows;               // rows of query and output that are its own: all are written
    int q_len, k_len;         // rows and keys that take part
    int diagonal;

    __device__ __forceinline__ Sequence(const fwd_params &p, int b)
        : q_start(0), k_start(0), q_rows(p.len_q), k_len(p.len_k) {
        if (p.cu_seqlens_q.data) {
            const int64_t begin = int_at(p.cu_seqlens_q, b), end = int_at(p.cu_seqlens_q, b + 1);
            q_start = begin < 0 ? 0 : begin > p.total_q ? p.total_q : begin;
            q_rows = clamped((end < p.total_q ? end : p.total_q) - q_start, 0, p.len_q);
        }
        if (p.cu_seqlens_k.data) {
            const int64_t begin = int_at(p.cu_seqlens_k, b), end = int_at(p.cu_seqlens_k, b + 1);
            k_start = begin < 0 ? 0 : begin > p.total_k ? p.total_k : begin;
            k_len = clamped((end < p.total_k ? end : p.total_k) - k_start, 0, p.len_k);
        }
        q_len = p.query_lengths.data ? clamped(int_at(p.query_lengths, b), 0, q_rows) : q_rows;
        if (p.key_lengths.data)
            k_len = clamped(int_at(p.key_lengths, b), 0, k_len);
        diagonal = p.flags & FWD_BOTTOM_RIGHT ? k_len - q_len : 0;
    }

    // Keys [first, end) that the window leaves to row i.
    __device__ __forceinline__ int first_key(const fwd_params &p, int i) const {
        return max(0, i + diagonal - p.window_left);
    }
    __device__ __forceinline__ int end_key(const fwd_params &p, int i) const {
        return max(0, min(k_len, i + diagonal + p.window_right + 1));
    }
};

// Where key j of sequence b lies in a paged tensor: elements from its head in page 0.
__device__ __forceinline__ int64_t paged_row(const fwd_params &p, const fwd_view &v, int b, int j) {
    const fwd_view &table = p.block_table;
    const int page =
        ((const int *)table.data)[b * table.stride[0] + j / p.page_size * table.stride[1]];
    return clamped(page, 0, p.pages - 1) * v.stride[0] + j % p.page_size * v.stride[2];
}

// The head and the block of rows that this thread block computes.
struct Work {
    int b, h, row_block;

    __device__ __forceinline__ Work(const fwd_params &p) {
        const unsigned head = blockIdx.x / p.row_blocks;
        row_block = blockIdx.x % p.row_blocks;
        if (p.flags & FWD_LONGEST_FIRST)
            row_block = p.row_blocks - 1 - row_block;
        b = head / p.heads_q;
        h = head % p.heads_q;
    }
};
