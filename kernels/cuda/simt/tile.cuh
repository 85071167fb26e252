// What cuda_fwd_simt and cuda_bwd_simt do with tiles of rows in shared memory.
//
// A block of 8 x 16 threads owns 8 * R rows: queries, or keys in a part of the backward. Thread (y, x) has rows y * R + i; of a
// step of 16 * C rows it has x + 16 * c, and of D columns those from (x + 16 * w) * VEC on. The 16 threads of a row are half a
// warp, so rows are reduced by shuffles and weights change hands in shared memory under a warp barrier.
#pragma once

#include "kernels/cuda/common/exponential.cuh"
#include "kernels/cuda/common/sequence.cuh"

#include <math_constants.h>

template <typename T>
struct alignas(16) Vec {
    static constexpr int N = 16 / sizeof(T);
    T e[N];
};

__device__ __forceinline__ bool is_masked(float p) { return __float_as_uint(p) == 0x80000000u; }
__device__ __forceinline__ bool is_masked(double p) {
    return (uint64_t)__double_as_longlong(p) == 0x8000000000000000u;
}

template <typename T, int D, int R, int C>
struct SimtTile {
    static constexpr int THREADS = 128, OWN = 8 * R, STEP = 16 * C, VEC = Vec<T>::N,
                         W = D / (16 * VEC);
    static constexpr int PITCH = D + VEC, WEIGHTS_PITCH = STEP + VEC; // in elements

    // `count` rows of `dim` elements into shared memory, zeros after them. row_of(r) says where a row starts; `chunks`: it is
    // aligned, as FWD_ALIGNED_QUERY says.
    template <typename RowOf>
    __device__ static void load(T *to, RowOf row_of, int64_t inner, int tile_rows, int count,
                                int dim, bool chunks) {
        for (int x = threadIdx.x; x < tile_rows * (D / VEC); x += THREADS) {
            const int r = x / (D / VEC), c = x % (D / VEC) * VEC;
            const T *const row = row_of(r < count ? r : 0);
            T *const at = to + r * PITCH + c;
            if (chunks) {
                copy_async(shared_address(at), row + c, r < count && c < dim);
            } else {
#pragma unroll
                for (int e = 0; e < VEC; ++e)
                    at[e] = r < count && c + e < dim ? row[(c + e) * inner] : T(0);
            }
        }
        copy_commit();
    }

    __device__ __forceinline__ static Vec<T> read(const T *from) { return *(const Vec<T> *)from; }

    // Products of this thread's rows at `own` with those of a step.
    __device__ __forceinline__ static void multiply(T (&s)[R][C], const T *own, const T *step) {
        const int x = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int c = 0; c < C; ++c)
                s[i][c] = 0;
#pragma unroll 2
        for (int d = 0; d < D; d += VEC) {
            Vec<T> a[R];
#pragma unroll
            for (int i = 0; i < R; ++i)
                a[i] = read(own + i * PITCH + d);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const Vec<T> b = read(step + (x + 16 * c) * PITCH + d);
#pragma unroll
                for (int i = 0; i < R; ++i)
#pragma unroll
                    for (int e = 0; e < VEC; ++e)
                        s[i][c] = fma(a[i].e[e], b.e[e], s[i][c]);
            }
        }
    }

    // sum += weights times the rows of a step. MASKED: rows whose weight is -0 do not count, even if they hold NaN or Inf.
    template <bool MASKED>
    __device__ __forceinline__ static void add(T (&sum)[R][W][VEC], const T *weights,
                                               const T *step) {
        const int x = threadIdx.x % 16;
#pragma unroll 1
        for (int j = 0; j < STEP; j += VEC) {
            Vec<T> a[R];
#pragma unroll
            for (int i = 0; i < R; ++i)
                a[i] = read(weights + i * WEIGHTS_PITCH + j);
#pragma unroll
            for (int e = 0; e < VEC; ++e)
#pragma unroll
                for (int w = 0; w < W; ++w) {
                    const Vec<T> b = read(step + (j + e) * PITCH + (x + 16 * w) * VEC);
#pragma unroll
                    for (int i = 0; i < R; ++i)
#pragma unroll
                        for (int f = 0; f < VEC; ++f)
                            if (!MASKED || !is_masked(a[i].e[e]))
                                sum[i][w][f] = fma(a[i].e[e], b.e[f], sum[i][w][f]);
                }
        }
    }
};
