// Forward attention with queries of e4m3, and keys and values of e4m3 or e5m2, by mma.m16n8k32. The shares of blocks and warps, the ring,
// the options and the steps are those of cuda_fwd_sm80; docs/fp8.md says what differs:
//
// - mma.sync wants both operands with the summed axis innermost. Values are turned on their way to registers, by ldmatrix with
//   transposition, which moves pairs of bytes, and permutations of bytes. Keys and columns are left in the order that comes out.
// - Weights are rounded to e4m3 after multiplication by 2^8, below the maximum of the row so far, which is followed at every step.
// - The tensor cores' own sums of float8 may keep some 13 bits. Each tile's P V starts from zero and is added to the output in f32.
#pragma once

#include "kernels/cuda/common/exact.cuh"
#include "kernels/cuda/common/float8.cuh"
#include "kernels/cuda/common/ring.cuh"
#include "kernels/cuda/common/scores.cuh"
#include "kernels/cuda/common/share.cuh"
#include "kernels/cuda/sm89/params.h"

#include <type_traits>

template <int D_, int WARPS, int MT_, int BN>
struct Float8Tile {
    static constexpr int D = D_, DV = D_, MT = MT_, KEYS = BN, STAGES = 2;
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS * MT * 16;
    static constexpr int Q_BYTES = ROWS * D, K_BYTES = BN * D, STAGE_BYTES = 2 * K_BYTES;
    static constexpr int SHARED_BYTES = Q_BYTES + STAGES * STAGE_BYTES;
};

// c[16, 8] += a[16, 32] b[32, 8], a being e4m3.
template <bool E5M2>
struct Float8Product;

#define FLOAT8_PRODUCT(e5m2, name)                                                                 \
    template <>                                                                                    \
    struct Float8Product<e5m2> {                                                                   \
        __device__ __forceinline__ static void mma(float (&c)[4], const uint32_t (&a)[4],          \
                                                   uint32_t b0, uint32_t b1) {                     \
            asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3." name                        \
                         ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"              \
                         : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                          \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));          \
        }                                                                                          \
    };
FLOAT8_PRODUCT(false, "e4m3")
FLOAT8_PRODUCT(true, "e5m2")

// One warp's share. Of 16 columns of the output, out[mt][2 n] are the even ones and out[mt][2 n + 1] the odd ones: a thread has four
// neighbours of a row.
template <typename Product, int D, int MT, int BN>
struct Float8Warp : Scores<MT, BN> {
    using Base = Scores<MT, BN>;
    using Base::NT, Base::score;
    static constexpr int VS = BN / 32, VN = D / 16;
    static constexpr float WEIGHT_LOG2 = 8; // of the largest weight: e4m3 ends with 448

    float out[MT][D / 8][4];
    uint32_t prob[MT][VS][4]; // P of the current tile as operand of the next product
    float
        top[MT]
           [2]; // the exponent of 2 that those of a row are relative to, -inf before its first key
    float shrink[MT][2]; // what `out` is multiplied by before P V is added
    float sum[MT][2];
    float slope; // exponent of 2 per unit of score; 1 if extras() has applied it

    __device__ __forceinline__ void init(float exponent_slope) {
        slope = exponent_slope;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[mt][half] = NEG_INF;
                sum[mt][half] = 0;
            }
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    out[mt][n][e] = 0;
        }
    }

    // Moves `top` to the maxima of all tiles up to the next, less WEIGHT_LOG2; where that is no number of f32, to the one above.
    __device__ __forceinline__ void follow_maxima() {
        float most[MT][2];
        this->find_maxima(most);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = most[mt][half];
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                x = fmaxf(top[mt][half], __fadd_ru(to_exponent(x, slope), -WEIGHT_LOG2));
                shrink[mt][half] = exp2_approx(top[mt][half] - (x == NEG_INF ? 0 : x));
                top[mt][half] = x;
                sum[mt][half] *= shrink[mt][half];
            }
    }

    // Exponentials of the next tile. Of 32 keys, 4 i to 4 i + 3 of the operand's first 16 are those that thread i of four has scores of:
    // 2 i, 2 i + 1, 2 i + 8, 2 i + 9. The other 16 alike.
    __device__ __forceinline__ void exponentials() {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int word = 0; word < VS * 4; ++word) {
                const int half = word % 2, n = word / 2 * 2;
                const float from = top[mt][half] == NEG_INF ? 0 : top[mt][half];
                float w[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    w[i] = exp2_approx(fmaf(score[mt][n + i / 2][2 * half + i % 2], slope, -from));
                    sum[mt][half] += w[i];
                }
                prob[mt][word / 4][word % 4] = pack_e4m3(w[0], w[1], w[2], w[3]);
            }
    }

    // out = out * shrink + P V, 16 columns after the other, or 32 where a warp has 16 rows: four sums are under way at a time.
    // ldmatrix gives thread 4 c + i the keys 2 i and 2 i + 1 of eight, of columns 2 c and 2 c + 1.
    __device__ __forceinline__ void add_values(uint32_t v) {
        constexpr int PARTS = 2 / MT, ITEMS = VS * VN;
        uint32_t b[3][4];
        float product[MT][PARTS][2][4];
        const auto column = [](int i) { return i / (VS * PARTS) * PARTS + i % PARTS; };
        const auto load_v = [&](int i) {
            load_matrices_transposed(b[i % 3], Chunks<D / 2>::chunks_after(v, column(i)) +
                                                   i / PARTS % VS * 32 * D);
        };
        load_v(0);
        load_v(1);
        unrolled<ITEMS>([&](auto item) {
            constexpr int i = decltype(item)::value, step = i / PARTS % VS, part = i % PARTS;
            const uint32_t(&w)[4] = b[i % 3];
            const uint32_t even[2] = {__byte_perm(w[0], w[1], 0x6420),
                                      __byte_perm(w[2], w[3], 0x6420)},
                           odd[2] = {__byte_perm(w[0], w[1], 0x7531),
                                     __byte_perm(w[2], w[3], 0x7531)};
            if (i + 2 < ITEMS)
                load_v(i + 2);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                float(&sums)[2][4] = product[mt][part];
#pragma unroll
                for (int e = 0; e < 8 && step == 0; ++e)
                    sums[e / 4][e % 4] = 0;
                Product::mma(sums[0], prob[mt][step], even[0], even[1]);
                Product::mma(sums[1], prob[mt][step], odd[0], odd[1]);
#pragma unroll
                for (int e = 0; e < 8 && step == VS - 1; ++e) {
                    float &x = out[mt][2 * column(i) + e / 4][e % 4];
                    x = fmaf(x, shrink[mt][e / 2 % 2], sums[e / 4][e % 4]);
                }
            }
        });
    }

    // One of a thread's four neighbouring columns of 16.
    __device__ __forceinline__ float element(int mt, int half, int n, int i) const {
        return out[mt][2 * n + i % 2][2 * half + i / 2];
    }
};

// A row's columns that this thread has, times `factor`, to the output's row `to`. Times 0 they are 0, whatever an empty row has.
template <typename E, typename W>
__device__ __forceinline__ void store_columns(const fwd_params &p, E *to, const W &w, int mt,
                                              int half, float factor) {
    const int first = threadIdx.x % 4 * 4;
#pragma unroll
    for (int n = 0; n < W::VN; ++n) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            x[i] = factor == 0 ? 0 : w.element(mt, half, n, i) * factor;
        const int column = n * 16 + first;
        if (p.flags & FWD_ALIGNED_OUTPUT) {
            if (column < p.dim_v)
                store_four(to + column, x);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (column + i < p.dim_v)
                to[(column + i) * p.output.stride[3]] = E(x[i]);
    }
}

// A warp's rows of output and lse, of E.
template <typename E, bool EXTRAS, int WARP_ROWS, typename W, typename S>
__device__ __forceinline__ void finish(const fwd_params &p, const Work &work, const Sequence &seq,
                                       const S &share, W &w) {
    using Lse = std::conditional_t<std::is_same<E, float>::value, __half, E>; // if it is not f32
    const float sink = sink_of(p, work.h),
                scale = scale_at(p.value_scale, work.b, work.h / p.group);
    // A larger maximum is rounded so coarsely that the largest weight may outgrow e4m3; exponents of extras() lose nothing.
    constexpr float far_from = EXTRAS ? FLT_MAX : EXACT_FROM / 4;
    // Where a bias hides all keys of a row by the least number that there is, they count alike: only lse asks for more.
    const bool hidden_alike = EXTRAS && p.bias.data && !p.lse.data;
    bool exactly = false;
#pragma unroll
    for (int mt = 0; mt < WARP_ROWS / 16; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = share.first_row + mt * 16 + half * 8 + threadIdx.x % 32 / 4;
            float total = w.sum[mt][half], top = w.top[mt][half], odd = 0;
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const bool beyond = row >= seq.q_len, empty = beyond || total == 0;
#pragma unroll
            for (int n = 0; n < W::VN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    odd = fmaf(w.element(mt, half, n, i), 0.0f, odd); // NaN of NaN and infinity
            exactly |=
                !beyond && (odd != 0 || !(total < POS_INF) ||
                            (!empty && fabsf(top) >= far_from && !(hidden_alike && top < 0)));
            if (empty) {
                total = 0;
                top = NEG_INF;
            }
            const float factor = end_row(sink, top, total);
            if (row >= seq.q_rows)
                continue;
            E *const to = (E *)p.output.data + work.b * p.output.stride[0] +
                          work.h * p.output.stride[1] + (seq.q_start + row) * p.output.stride[2];
            store_columns(p, to, w, mt, half, empty ? 0 : factor * scale);
            if (p.lse.data && threadIdx.x % 4 == 0)
                store_lse<Lse>(p, work.b, work.h, seq.q_start + row, sink, top, total);
        }
    if (__any_sync(~0u, exactly))
        write_rows_exactly<E, float, Float8, 256, Float8>(p, work.b, work.h, share.first_row,
                                                          share.first_row + WARP_ROWS);
}

template <bool E5M2, typename T, bool EXTRAS>
__device__ __forceinline__ void cuda_fwd_fp8_sm89(const sm89_params &params) {
    using W = Float8Warp<Float8Product<E5M2>, T::D, T::MT, T::KEYS>;
    using R = Ring<Float8, T>;
    using At = Chunks<T::D / 2>;
    constexpr int WARP_ROWS = T::MT * 16;
    extern __shared__ __align__(16) char shared[];
    const fwd_params &p = params.fwd;
    const uint32_t q_tile = shared_address(shared), k_tile = q_tile + T::Q_BYTES;
    const int lane = threadIdx.x % 32, warp = kept_by_all(threadIdx.x / 32);

    const Work work(p);
    const Sequence seq(p, work.b);
    Share<T::ROWS, WARP_ROWS, T::KEYS, 1> share(work, seq, warp);
    if (share.rows <= 0)
        return;
    const int kv_head = work.h / p.group;
    const bool pages = EXTRAS && p.page_size;
    const Float8 *const q = (const Float8 *)p.query.data + work.b * p.query.stride[0] +
                            work.h * p.query.stride[1] +
                            (seq.q_start + share.block_row) * p.query.stride[2];
    const Float8 *const k = R::start(p.key, work, kv_head, seq.k_start, pages);
    const Float8 *const v = R::start(p.value, work, kv_head, seq.k_start, pages);
    share.find_tiles(p, seq);
    R ring(p, work, seq, k, v, pages, k_tile, share.first, share.end);
    load_queries<Loader<Float8, T::THREADS, T::ROWS, T::D>>(p, q_tile, q, share.rows);
    const Steps<T::KEYS, T::STAGES, false> steps;
    ring.fill(steps);

    const float exponent_scale =
        (float)(p.scale * 1.4426950408889634 * scale_at(p.query_scale, work.b, work.h) *
                scale_at(p.key_scale, work.b, kv_head));
    W w;
    w.init(EXTRAS ? 1.0f : exponent_scale);
    const uint32_t at_q = kept(q_tile + warp * WARP_ROWS * T::D + At::at(lane % 16, lane / 16)),
                   at_k = kept(k_tile + At::at(lane % 8 + lane / 16 * 8, lane / 8 % 2)),
                   at_v = kept(k_tile + T::K_BYTES + At::at(lane, 0));
    uint32_t offset = 0;
#pragma unroll 1
    for (int g = share.first - 1; g < share.end; ++g) {
        ring.turn(g, steps, offset);
        if (g >= share.warp_first && g < share.warp_end)
            w.add_values(at_v + offset);
        if (g + 1 >= share.warp_first && g + 1 < share.warp_end) {
            const int row = share.first_row + lane / 4, key = (g + 1) * T::KEYS;
            w.template multiply<Float8Product<E5M2>, T::D>(at_q, at_k + offset);
            if (EXTRAS)
                w.extras(
                    p, seq, work.b, work.h, row, key, exponent_scale,
                    [&](uint16_t bits) {
                        return params.output_dtype == SM89_F16
                                   ? Element<__half>::widen(bits)
                                   : Element<__nv_bfloat16>::widen(bits);
                    },
                    [] { return true; });
            if (g + 1 < share.whole_first)
                w.template mask<false>(p, seq, row, key);
            if (g + 1 >= share.whole_end)
                w.template mask<true>(p, seq, row, key);
            w.follow_maxima();
            w.exponentials();
        }
        offset = offset + T::STAGE_BYTES == R::BYTES ? 0 : offset + T::STAGE_BYTES;
    }
    copy_wait<0>();
    if (params.output_dtype == SM89_F32)
        finish<float, EXTRAS, WARP_ROWS>(p, work, seq, share, w);
    else if (params.output_dtype == SM89_F16)
        finish<__half, EXTRAS, WARP_ROWS>(p, work, seq, share, w);
    else
        finish<__nv_bfloat16, EXTRAS, WARP_ROWS>(p, work, seq, share, w);
}
