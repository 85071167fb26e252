// ALiBi: how many keys on either side of the nearest that they see the rows of a tile have to look at. docs/cuda-sm90.md
//
// A key loses slope * distance, and no score is beyond scale * |query| * |key| (Cauchy and Schwarz). So relative to the nearest key's
// weight that of a key `d` farther is at most 2^(log2(e) * (2 * scale * |query| * |key| - slope * d)). Keys all of whose weights together, times the
// largest of all values over the largest of those where they are smallest, are below 2^-32 need not be looked at. What is not finite is
// looked at: a NaN or infinite norm makes the reach infinite.
#pragma once

#include "kernels/cuda/sm90/tile.cuh"

// Each row of [first, end), as many at once as the block has lanes for, eight elements to a lane; row_at(i) is where row i begins. What lanes
// without elements take is 0.
template <typename E, typename RowAt, typename Take>
__device__ __forceinline__ void each_row(int dim, int first, int end, RowAt row_at, Take take) {
    const int lanes = 1 << (32 - __clz(dim / 8 - 1)), column = threadIdx.x % lanes * 8,
              rows = blockDim.x / lanes;
#pragma unroll 4
    for (int i = first; i < end; i += rows) {
        const int row = i + threadIdx.x / lanes;
        uint4 x = {0, 0, 0, 0};
        if (row < end && column < dim)
            x = __ldg(reinterpret_cast<const uint4 *>(row_at(row) + column));
        take(x, lanes);
    }
}

// Positive floats are in the order of their bits, and NaN is above all of them.
__device__ __forceinline__ uint32_t largest_of_block(uint32_t bits, uint32_t &shared) {
    if (threadIdx.x == 0)
        shared = 0;
    __syncthreads();
    bits = __reduce_max_sync(~0u, bits);
    if (threadIdx.x % 32 == 0)
        atomicMax(&shared, bits);
    __syncthreads();
    return shared;
}

// The largest |x|^2 of the rows. One too small for f32's products to sum up counts as 2^-100.
template <typename E, typename RowAt>
__device__ __forceinline__ float largest_square(int dim, int first, int end, RowAt row_at,
                                                uint32_t &shared) {
    uint32_t most = __float_as_uint(0x1p-100f);
    each_row<E>(dim, first, end, row_at, [&](const uint4 &x, int lanes) {
        float square = 0;
        for (const uint32_t pair : {x.x, x.y, x.z, x.w}) {
            const float2 two = widen_pair<E>(pair);
            square = fmaf(two.x, two.x, fmaf(two.y, two.y, square));
        }
        for (int lane = lanes / 2; lane > 0; lane /= 2)
            square += __shfl_xor_sync(~0u, square, lane);
        most = max(most, __float_as_uint(fabsf(square)));
    });
    return __uint_as_float(largest_of_block(most, shared));
}

// The largest |x| of the rows' elements.
template <typename E, typename RowAt>
__device__ __forceinline__ float largest_element(int dim, int first, int end, RowAt row_at,
                                                 uint32_t &shared) {
    uint32_t most = 0;
    each_row<E>(dim, first, end, row_at, [&](const uint4 &x, int) {
        for (const uint32_t pair : {x.x, x.y, x.z, x.w})
            most = __vmaxu2(most, pair & 0x7fff7fff);
    });
    return Element<E>::widen(
        static_cast<uint16_t>(largest_of_block(max(most & 0xffff, most >> 16), shared)));
}

__device__ __forceinline__ int heads_kv(const sm90_params &p) { return p.heads / p.heads_per_kv; }

// The exponent of 2 that a key has to lose to be passed over, beside what scores and values take.
__device__ __forceinline__ float least_exponents(const sm90_params &p) {
    return 32 + log2f(p.len_k);
}

// Whether to find out: with this slope keys may reach less than half as far as there are any.
__device__ __forceinline__ bool is_worth_it(const sm90_params &p, float slope) {
    return LOG2E * slope * p.len_k > 2 * least_exponents(p);
}

// Of `count` query heads from `head` on, by a warp. One that is not above 0 is 0.
struct Slopes {
    float least, most;
};
__device__ __forceinline__ Slopes slopes_of(const sm90_params &p, int batch, int head, int count) {
    const float *const slopes = p.alibi_slopes + batch * p.alibi_batch_stride;
    Slopes s{INFINITY, 0};
    for (int i = threadIdx.x % 32; i < count; i += 32) {
        const float slope = fmaxf(__ldg(slopes + (head + i) * p.alibi_head_stride), 0.f);
        s.least = fminf(s.least, slope);
        s.most = fmaxf(s.most, slope);
    }
    return {__uint_as_float(__reduce_min_sync(~0u, __float_as_uint(s.least))),
            __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(s.most)))};
}

// One block for each part of the keys of a head.
template <typename E>
__device__ __forceinline__ void find_norms(const sm90_params &p) {
    extern __shared__ uint32_t shared[];
    const int part = blockIdx.x % SM90_REACH_PARTS, of_all = blockIdx.x / SM90_REACH_PARTS,
              heads = heads_kv(p), batch = of_all / heads, head = of_all - batch * heads;
    const int sharers = p.heads_per_kv << p.pack_log2; // query heads
    if (!is_worth_it(p, slopes_of(p, batch, head * sharers, sharers).most))
        return;
    const int64_t keys = sequence_length(p.key_lengths, p.key_lengths_stride, batch, p.len_k);
    const int first = keys * part / SM90_REACH_PARTS, end = keys * (part + 1) / SM90_REACH_PARTS;
    const auto rows_of = [&](const void *data, const sm90_strides &s) {
        const E *const of_head = static_cast<const E *>(data) + batch * s.batch + head * s.head;
        return [=](int row) { return of_head + row * s.row; };
    };
    const float square = largest_square<E>(p.dim_qk, first, end, rows_of(p.key, p.key_strides),
                                           shared[0]),
                value = largest_element<E>(p.dim_v, first, end, rows_of(p.value, p.value_strides),
                                           shared[1]);
    if (threadIdx.x == 0)
        p.norms[blockIdx.x] = {square, value};
}

// By one warp: a tile's reach from the least slope, and the largest |query|^2, of its rows.
__device__ __forceinline__ int reach_of(const sm90_params &p, int batch, int head, float slope,
                                        float square) {
    const int lane = threadIdx.x % 32, kv_head = head / p.heads_per_kv;
    const sm90_norms part = p.norms[(batch * heads_kv(p) + kv_head) * SM90_REACH_PARTS + lane];
    const uint32_t value = __float_as_uint(part.value);
    const float key_square =
                    __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(part.key_square))),
                most = __uint_as_float(__reduce_max_sync(~0u, value)),
                least = __uint_as_float(__reduce_min_sync(~0u, value));
    const float score = 1.01f * p.scale * sqrtf(square) * sqrtf(key_square),
                exponents = 2 * LOG2E * score + least_exponents(p) + log2f(most / least),
                reach = exponents / (LOG2E * slope);
    return reach < SM90_UNBOUNDED ? static_cast<int>(reach) + 1 : SM90_UNBOUNDED;
}

// One block for each tile of rows.
template <typename E>
__device__ __forceinline__ void find_reach(const sm90_params &p) {
    extern __shared__ uint32_t shared[];
    const int of_all = blockIdx.x / p.tiles_per_head, batch = of_all / p.heads,
              head = of_all - batch * p.heads,
              first = (blockIdx.x - of_all * p.tiles_per_head) * p.tile_q,
              length = sequence_length(p.query_lengths, p.query_lengths_stride, batch, p.len_q),
              end = min(first + p.tile_q, length << p.pack_log2);
    const float slope = slopes_of(p, batch, head << p.pack_log2, 1 << p.pack_log2).least;
    if (!is_worth_it(p, slope)) {
        wait_for_predecessor(); // so that nobody behind runs before it has ended
        if (threadIdx.x == 0)
            p.reach[blockIdx.x] = SM90_UNBOUNDED;
        return;
    }
    const sm90_strides &s = p.query_strides;
    const E *const of_head = static_cast<const E *>(p.query) + batch * s.batch +
                             (static_cast<int64_t>(head) << p.pack_log2) * s.head;
    const float square = largest_square<E>(
        p.dim_qk, first, end,
        [&](int row) {
            return of_head + (row & ((1 << p.pack_log2) - 1)) * s.head +
                   (row >> p.pack_log2) * s.row;
        },
        shared[0]);
    wait_for_predecessor();
    if (threadIdx.x < 32) {
        const int reach = reach_of(p, batch, head, slope, square);
        if (threadIdx.x == 0)
            p.reach[blockIdx.x] = reach;
    }
}
