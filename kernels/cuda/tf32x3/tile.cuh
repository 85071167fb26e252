// Tiles of f32 in shared memory, and their products on tensor cores: what cuda_fwd_tf32x3 and cuda_bwd_tf32x3 share.
//
// Operands lie in shared memory as they came, and are split in registers. The products of a step of 8 have an order of
// their own, the same for both operands, so that a thread reads 16 bytes at a time.
#pragma once

#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/registers.cuh"

// A tile of rows of COLS floats. The 16-byte chunks of a row are permuted so that the four chunks that a quarter of a warp
// reads in each of two neighbouring rows (K, Q), or the two in each of four rows two apart (V), lie in different banks.
template <int COLS>
struct Rows {
    static constexpr int PITCH = COLS * 4, CHUNKS = COLS / 4;
    __device__ __forceinline__ static int permuted(int row, int chunk) {
        return chunk ^ (row & 6) ^ (row & 1) << 2;
    }
    __device__ __forceinline__ static uint32_t at(int row, int chunk) {
        return row * PITCH + permuted(row, chunk) * 16;
    }
};

// Loads COUNT rows into shared memory: `dim` elements each, zeros past them and past `rows`.
template <int THREADS, int COUNT, int COLS>
struct Loader {
    static constexpr int CHUNKS = COLS / 4, STEP = THREADS / CHUNKS;
    static_assert(COUNT % STEP == 0, "a thread stays in its column");

    // 16-byte aligned rows at a fixed distance.
    __device__ __forceinline__ static void aligned(uint32_t to, const float *from, int64_t stride,
                                                   int rows, int dim) {
        const int c = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
        const float *at = from + first * stride + c * 4;
        const int end = c * 4 < dim ? rows : 0;
#pragma unroll
        for (int r = first, i = 0; i < COUNT / STEP; ++i, r += STEP, at += STEP * stride)
            copy_async(to + Rows<COLS>::at(r, c), at, r < end);
    }

    // Any layout: row_of(r) says where a row starts.
    template <typename RowOf>
    __device__ __forceinline__ static void any(uint32_t to, RowOf row_of, int64_t inner, int rows,
                                               int dim, bool chunks) {
        const int c = threadIdx.x % CHUNKS * 4;
#pragma unroll 1
        for (int r = threadIdx.x / CHUNKS; r < COUNT; r += STEP) {
            const float *const row = row_of(r < rows ? r : 0);
            const uint32_t at = to + Rows<COLS>::at(r, c / 4);
            if (chunks) {
                copy_async(at, row + c, r < rows && c < dim);
                continue;
            }
            uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (r < rows && c + e < dim)
                    words[e] = __float_as_uint(row[(c + e) * inner]);
            store_chunk(at, words);
        }
    }
};

// x = high + low, each of 11 significant bits; what is lost is at most 2^-23 of x. Inf, NaN and what rounds to Inf give NaN.
// Tensor cores do not look at the last 13 bits, so `high` and `low` may hold any there.
struct Split {
    uint32_t high, low;
    __device__ __forceinline__ void operator=(float x) {
        high = __float_as_uint(x) + 0x1000; // to nearest
        low = __float_as_uint(x - __uint_as_float(high & 0xffffe000));
    }
};

__device__ __forceinline__ void split(Split (&s)[2], float x0, float x1) {
    s[0] = x0;
    s[1] = x1;
}
__device__ __forceinline__ void split(Split (&s)[4], float x0, float x1, float x2, float x3) {
    s[0] = x0;
    s[1] = x1;
    s[2] = x2;
    s[3] = x3;
}

// c[16, 8] += a[16, 8] b[8, 8]
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two of the three products that make one of f32, and the third: low times low is below the last bit. For MT tiles of A and N of B.
template <int MT, int N>
__device__ __forceinline__ void add_small(float (&c)[MT][N][4], const Split (&a)[MT][4],
                                          const Split (&b)[N][2]) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int n = 0; n < N; ++n)
            mma(c[mt][n], a[mt][0].low, a[mt][1].low, a[mt][2].low, a[mt][3].low, b[n][0].high,
                b[n][1].high);
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int n = 0; n < N; ++n)
            mma(c[mt][n], a[mt][0].high, a[mt][1].high, a[mt][2].high, a[mt][3].high, b[n][0].low,
                b[n][1].low);
}
template <int MT, int N>
__device__ __forceinline__ void add_large(float (&c)[MT][N][4], const Split (&a)[MT][4],
                                          const Split (&b)[N][2]) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int n = 0; n < N; ++n)
            mma(c[mt][n], a[mt][0].high, a[mt][1].high, a[mt][2].high, a[mt][3].high, b[n][0].high,
                b[n][1].high);
}

// score = MT * 16 rows at `a` times NT * 8 rows at `b`, in `steps` of 32 columns. In a step of 16 columns thread lane % 4 = t of a group
// has columns 4 t + {0, 1} as k = t and t + 4 of the first product, and 4 t + {2, 3} of the second. AT_A_TIME: sums of `b` under way.
template <int D, int AT_A_TIME, int MT, int NT>
__device__ __forceinline__ void multiply_tiles(float (&score)[MT][NT][4], uint32_t a, uint32_t b,
                                               int steps) {
    constexpr int PITCH = Rows<D>::PITCH, GROUP = NT < AT_A_TIME ? NT : AT_A_TIME;
    clear(score);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, a += 128, b += 128) {
        Split left[4][MT][4];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                const uint32_t at = (a ^ half * 64) + mt * 16 * PITCH;
                const float4 x = load_floats(at), y = load_floats(at + 8 * PITCH);
                split(left[half * 2][mt], x.x, y.x, x.y, y.y);
                split(left[half * 2 + 1][mt], x.z, y.z, x.w, y.w);
            }
#pragma unroll
        for (int n = 0; n < NT; n += GROUP) {
            Split right[4][GROUP][2];
            float s[MT][GROUP][4] = {};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int m = 0; m < GROUP; ++m) {
                    const float4 x = load_floats((b ^ half * 64) + (n + m) * 8 * PITCH);
                    split(right[half * 2][m], x.x, x.y);
                    split(right[half * 2 + 1][m], x.z, x.w);
                }
                add_small(s, left[half * 2], right[half * 2]);
                add_small(s, left[half * 2 + 1], right[half * 2 + 1]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                add_large(s, left[i], right[i]);
#pragma unroll
            for (int m = 0; m < GROUP; ++m)
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        score[mt][n + m][e] += s[mt][m][e];
        }
    }
}
