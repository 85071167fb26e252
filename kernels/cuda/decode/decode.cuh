// Forward attention for few query rows and many keys, bound by reading the keys: docs/cuda-decode.md.
//
// A tile has ROWS packed rows of one kv head: row r is query row r / group of head r % group, so keys and values are read
// once for all query heads of the group. A block has one tile and one split of its keys; each of its warps streams its own
// keys through a ring of its own, without a barrier, and has all rows of the tile. Products are taken transposed, with 16
// keys, or 16 columns of the output, as the M of mma.m16n8k16 and eight rows as its N: decoding rarely has more.
// At the end the warps of a block, and then the splits, are merged in their order.
//
// Keys and values may be float8 beside a 16-bit query: they are widened to f16 on their way from shared memory to the products,
// a query of bf16 is brought into the range of f16 row by row, and scales and that range meet in the slope of a row's exponents.
#pragma once

#include "kernels/cuda/common/float8.cuh"
#include "kernels/cuda/common/packed.cuh"
#include "kernels/cuda/common/ptx.cuh"

#include <type_traits>

// The transpose of an 8x8 matrix of 16-bit elements that lies in the registers of a warp.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
    return r;
}

// BYTES: of an element of keys and values.
template <int BYTES, int D, int DV, int NT, int MT, int WARPS, int STAGES>
struct Tile {
    static constexpr int ROWS = NT * 8, KEYS = MT * 16, THREADS = WARPS * 32;
    static constexpr int K_BYTES = KEYS * D * BYTES, STAGE_BYTES = K_BYTES + KEYS * DV * BYTES;
    static constexpr int PITCH = DV + 4; // floats of a row of a warp's output
    static constexpr int Q_BYTES = ROWS * D * 2, OUT_BYTES = ROWS * PITCH * 4;
    static constexpr int RING_BYTES =
        STAGES * STAGE_BYTES > OUT_BYTES ? STAGES *STAGE_BYTES : OUT_BYTES;
    static constexpr int SUM_BYTES = ROWS * WARPS * 8;
    static constexpr int SLOPE_BYTES = BYTES == 1 ? ROWS * 4 : 0;
    static constexpr int SHARED_BYTES = Q_BYTES + WARPS * RING_BYTES + SUM_BYTES + SLOPE_BYTES;
};

template <typename E, typename C, int D, int DV, int NT, int MT, int WARPS, int STAGES>
struct Warp {
    using T = Tile<sizeof(C), D, DV, NT, MT, WARPS, STAGES>;
    using M = std::conditional_t<is_float8<C>, __half, E>; // what is multiplied
    using Keys = Chunks<D * sizeof(C) / 2>;
    using Values = Chunks<DV * sizeof(C) / 2>;
    static constexpr int VN = DV / 16;

    // Element [n][nt][e]: column n * 16 + column(e / 2) of row nt * 8 + lane % 4 * 2 + e % 2.
    float out[VN][NT][4];
    float score[MT][NT][4]; // likewise, with keys for columns; exponents of 2
    float top[NT][2], limit[NT][2], sum[NT][2];

    __device__ __forceinline__ void init() {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                limit[nt][e] = NEG_INF;
                top[nt][e] = sum[nt][e] = 0;
            }
#pragma unroll
            for (int n = 0; n < VN; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    out[n][nt][e] = 0;
        }
    }

    // Two neighbouring float8 are in one 16-bit element of the matrices that are transposed.
    __device__ __forceinline__ static int column(int half) {
        const int lane = threadIdx.x % 32;
        return is_float8<C> ? lane / 4 * 2 + half : half * 8 + lane / 4;
    }

    // Keys of 32 columns from pair `chunk` of chunks on, as the first operand of two products. With float8 a thread has four
    // columns in a row where a product has two and two: those of the queries are permuted alike.
    __device__ __forceinline__ static void load_keys(uint32_t (&a)[2][4], uint32_t k, int step,
                                                     bool e5m2) {
        if constexpr (is_float8<C>) {
            uint32_t words[4];
            load_matrices(words, Keys::after(k, step));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                widen_float8(a[i / 2][i % 2], a[i / 2][i % 2 + 2], words[i], e5m2);
        } else {
            load_matrices(a[0], Keys::after(k, 2 * step));
            load_matrices(a[1], Keys::after(k, 2 * step + 1));
        }
    }

    // Values of 32 columns, likewise; a float8's neighbour in a product is in another row.
    __device__ __forceinline__ static void load_values(uint32_t (&a)[2][4], uint32_t v, int step,
                                                       bool e5m2) {
        if constexpr (is_float8<C>) {
            uint32_t words[4];
            load_matrices_transposed(words, Values::after(v, step));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                widen_float8(a[i % 2][i / 2 * 2], a[i % 2][i / 2 * 2 + 1],
                             __byte_perm(words[i], 0, 0x3120), e5m2);
        } else {
            load_matrices_transposed(a[0], Values::after(v, 2 * step));
            load_matrices_transposed(a[1], Values::after(v, 2 * step + 1));
        }
    }

    __device__ __forceinline__ void multiply_keys(uint32_t q, uint32_t k, bool e5m2) {
        constexpr int CHAINS = MT * NT == 1 ? 2 : 1; // of products that wait for each other
        float chain[CHAINS][MT][NT][4] = {};
#pragma unroll
        for (int step = 0; step < D / 32; ++step) {
            uint32_t a[MT][2][4], b[NT][4];
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
                load_matrices(b[nt], Chunks<D>::after(q, 2 * step) + nt * 8 * D * 2);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_keys(a[mt], k + mt * 16 * Keys::PITCH, step, e5m2);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt)
                        Element<M>::mma(chain[half % CHAINS][mt][nt], a[mt][half], b[nt][2 * half],
                                        b[nt][2 * half + 1]);
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    score[mt][nt][e] = CHAINS == 1
                                           ? chain[0][mt][nt][e]
                                           : chain[0][mt][nt][e] + chain[CHAINS - 1][mt][nt][e];
    }

    // Scores to exponents of 2; with a cap (0: none) of which a score's slope times `inner` is in the exponent of its exp.
    template <typename Slope>
    __device__ __forceinline__ void scale(Slope slope, float cap, float inner) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float &x = score[mt][nt][e];
                    if (cap > 0) // tanh(x) = 1 - 2 / (exp(2 x) + 1)
                        x = cap -
                            2 * cap *
                                reciprocal_approx(exp2_approx(x * (slope(nt, e % 2) * inner)) + 1);
                    else
                        x = to_exponent(x, slope(nt, e % 2));
                }
    }

    // Hides the keys of the tile from `key` on that a row does not see.
    __device__ __forceinline__ void mask(const fwd_params &p, const Sequence &seq, const Rows &rows,
                                         int key) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int i = rows.query(nt * 8 + lane % 4 * 2 + e);
                const int first = seq.first_key(p, i) - key - lane / 4,
                          end = seq.end_key(p, i) - key - lane / 4;
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int j = mt * 16 + half * 8;
                        if (j < first || j >= end)
                            score[mt][nt][half * 2 + e] = NEG_INF;
                    }
            }
    }

    // The largest or the sum of what the eight lanes of a row have.
    template <typename Op>
    __device__ __forceinline__ static float over_lanes(float x, Op op) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2)
            x = op(x, __shfl_xor_sync(~0u, x, step));
        return x;
    }

    // Makes the maxima of the tile the reference of the exponents if a row has outgrown it.
    __device__ __forceinline__ void follow_maxima() {
        float most[NT][2];
        bool grown = false;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                most[nt][e] = NEG_INF;
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
                    most[nt][e] = fmaxf(most[nt][e], fmaxf(score[mt][nt][e], score[mt][nt][2 + e]));
                grown |= most[nt][e] > limit[nt][e];
            }
        if (!__any_sync(~0u, grown))
            return;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool fresh = limit[nt][e] == NEG_INF;
                float x = over_lanes(most[nt][e], [](float a, float b) { return fmaxf(a, b); });
                if (!fresh)
                    x = fmaxf(x, top[nt][e]);
                limit[nt][e] = x + LAZY;
                x = x == NEG_INF ? 0.0f : x;
                const float shrink = fresh ? 0.0f : exp2_approx(top[nt][e] - x);
                top[nt][e] = x;
                sum[nt][e] *= shrink;
#pragma unroll
                for (int n = 0; n < VN; ++n) {
                    out[n][nt][e] *= shrink;
                    out[n][nt][2 + e] *= shrink;
                }
            }
    }

    __device__ __forceinline__ void add_values(uint32_t v, bool e5m2) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            uint32_t b[NT][2];
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        x[e] = exp2_approx(score[mt][nt][2 * half + e] - top[nt][e]);
                        sum[nt][e] += x[e];
                    }
                    b[nt][half] = transposed(pack<M>(x[0], x[1]));
                }
#pragma unroll
            for (int n = 0; n < VN; n += 2) {
                uint32_t a[2][4];
                load_values(a, v + mt * 16 * Values::PITCH, n / 2, e5m2);
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt)
                        Element<M>::mma(out[n + half][nt], a[half], b[nt][0], b[nt][1]);
            }
        }
    }

    // Output, maxima and sums to shared memory, where other threads find them: [row][PITCH] and [row][2].
    __device__ __forceinline__ void leave(float *output, float2 *sums) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = nt * 8 + lane % 4 * 2 + e;
                const float total = over_lanes(sum[nt][e], [](float a, float b) { return a + b; });
                if (lane < 4)
                    sums[row] = make_float2(total == 0 ? NEG_INF : top[nt][e], total);
#pragma unroll
                for (int n = 0; n < VN; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        output[row * T::PITCH + n * 16 + column(half)] = out[n][nt][half * 2 + e];
            }
    }
};

// Makes f16 of the queries in shared memory and `slopes` of what their scores are multiplied by. Rows of bf16 are shifted
// until their largest element is near f16's largest, so that what f16 cannot hold is 2^-31 of it or less.
template <typename E, int D, int ROWS, int WARPS>
__device__ __forceinline__ void prepare_queries(const packed_params &dp, const Rows &rows,
                                                int count, char *queries, float *slopes) {
    const fwd_params &p = dp.fwd;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float key_scale = scale_at(p.key_scale, rows.b, rows.kv_head);
#pragma unroll 1
    for (int r = warp; r < ROWS; r += WARPS) {
        float slope = p.exponent_scale * key_scale;
        if constexpr (std::is_same_v<E, __nv_bfloat16>) {
            uint32_t *const words = (uint32_t *)(queries + r * D * 2) + lane;
            uint32_t most = 0; // a bf16 without its sign, in the upper half
#pragma unroll
            for (int n = 0; n < D / 64; ++n) {
                const uint32_t pair = words[n * 32] & 0x7fff7fff;
                most = max(most, max(pair & 0xffff0000, pair << 16));
            }
            most = __reduce_max_sync(~0u, most);
            const int shift = min(142 - (int)(most >> 23), 126);
            const float factor = __int_as_float((shift + 127) << 23);
#pragma unroll
            for (int n = 0; n < D / 64; ++n) {
                const uint32_t pair = words[n * 32];
                words[n * 32] = pack<__half>(__uint_as_float(pair << 16) * factor,
                                             __uint_as_float(pair & 0xffff0000) * factor);
            }
            slope *= __int_as_float((127 - shift) << 23);
        }
        if (lane == 0)
            slopes[r] = slope * (p.query_scale.data && r < count ? slopes[r] : 1);
    }
}

// MERGE_GROUPS: of the parts of a row, see Groups.
template <typename E, typename C, int D, int DV, int NT, int MT, int WARPS, int STAGES,
          int MERGE_GROUPS>
__device__ __forceinline__ void cuda_decode_sm80(const packed_params &dp) {
    using T = Tile<sizeof(C), D, DV, NT, MT, WARPS, STAGES>;
    using W = Warp<E, C, D, DV, NT, MT, WARPS, STAGES>;
    extern __shared__ __align__(128) char shared[];
    constexpr int COLUMNS = (DV + 127) / 128;
    const fwd_params &p = dp.fwd;
    // Known to be the same for all lanes.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const uint32_t q_tile = shared_address(shared);
    char *const my_ring = shared + T::Q_BYTES + warp * T::RING_BYTES;
    const uint32_t ring = shared_address(my_ring);

    const int tile = divide(blockIdx.x, dp.by_splits), split = blockIdx.x - tile * dp.splits;
    const Rows rows(dp, tile, T::ROWS);
    const Sequence seq(p, rows.b);
    const int count = min(T::ROWS, seq.q_rows * rows.group - rows.first);
    if (count <= 0)
        return;

    const Part part(dp, seq, rows, count, split, T::KEYS);
    const int first_key = part.first_key, end_key = part.end_key, end = part.end;

    // One step's keys and values by one warp: lane l knows where key l begins and tells the others. Lanes lie on eight
    // chunks of four rows, or four of eight where a row has no more.
    const int64_t start_k = (p.page_size ? 0 : rows.b * p.key.stride[0]) +
                            rows.kv_head * p.key.stride[1] + seq.k_start * p.key.stride[2],
                  start_v = (p.page_size ? 0 : rows.b * p.value.stride[0]) +
                            rows.kv_head * p.value.stride[1] + seq.k_start * p.value.stride[2];
    const C *const k = (const C *)p.key.data + start_k;
    const C *const v = (const C *)p.value.data + start_v;
    const auto copy = [&](auto chunks, uint32_t to, const C *from, int64_t row_start, int left,
                          int columns) {
        using Rows = decltype(chunks);
        constexpr int ACROSS = Rows::PITCH < 128 ? Rows::PITCH / 16 : 8, CHUNK = 16 / sizeof(C);
        const int first_column = lane % ACROSS * CHUNK;
#pragma unroll
        for (int r = 0; r < T::KEYS; r += 32 / ACROSS) {
            const int row = r + lane / ACROSS;
            const C *const source = from + first_column + __shfl_sync(~0u, row_start, row);
            const uint32_t place = to + Rows::at(row, lane % ACROSS);
#pragma unroll
            for (int c = 0; c < Rows::PITCH / 16 * CHUNK; c += ACROSS * CHUNK)
                copy_async(place + c * (int)sizeof(C), source + c,
                           row < left && c < columns - first_column);
        }
    };
    int page = 0, next_step = part.first + warp;
    const auto look_up = [&]() {
        const int key = min(first_key + next_step * T::KEYS + lane % T::KEYS, end_key - 1);
        if (p.page_size && next_step < end)
            page = ((const int *)p.block_table
                        .data)[rows.b * p.block_table.stride[0] +
                               (unsigned)key / (unsigned)p.page_size * p.block_table.stride[1]];
    };
    const auto load = [&](uint32_t offset) {
        if (next_step < end) {
            const int key = first_key + next_step * T::KEYS + lane % T::KEYS;
            int64_t key_start, value_start;
            if (p.page_size) {
                const int64_t which = clamped(page, 0, p.pages - 1),
                              place = (unsigned)key % (unsigned)p.page_size;
                key_start = which * p.key.stride[0] + place * p.key.stride[2];
                value_start = which * p.value.stride[0] + place * p.value.stride[2];
            } else {
                key_start = key * p.key.stride[2];
                value_start = key * p.value.stride[2];
            }
            const int left = end_key - first_key - next_step * T::KEYS;
            copy(typename W::Keys(), ring + offset, k, key_start, left, p.dim_qk);
            copy(typename W::Values(), ring + offset + T::K_BYTES, v, value_start, left, p.dim_v);
        }
        next_step += WARPS;
        look_up();
    };

    W w;
    w.init();
    const uint32_t q_at = q_tile + Chunks<D>::at(lane % 8, lane / 8);
    const uint32_t k_at = ring + W::Keys::at(lane % 16, lane / 16);
    const uint32_t v_at = ring + T::K_BYTES + W::Values::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const float cap = (float)p.softcap * LOG2E, inner = 2 * reciprocal_approx((float)p.softcap);
    float2 *const sums = (float2 *)(shared + T::Q_BYTES + WARPS * T::RING_BYTES);
    float *const slopes = (float *)(sums + WARPS * T::ROWS);
    float own_slopes[NT][2] = {};
    const auto slope = [&](int nt, int e) {
        return is_float8<C> ? own_slopes[nt][e] : p.exponent_scale;
    };
    const bool key_e5m2 = p.flags & FWD_KEY_E5M2, value_e5m2 = p.flags & FWD_VALUE_E5M2;
    look_up();
    uint32_t offset = 0;
    int step = part.first + warp;
#pragma unroll 1
    for (int n = 0;; ++n) {
        if (n >= STAGES) {
            copy_wait<STAGES - 1>();
            if (n == STAGES) {
                __syncthreads(); // the queries are there
                if constexpr (is_float8<C>) {
                    prepare_queries<E, D, T::ROWS, WARPS>(dp, rows, count, shared, slopes);
                    __syncthreads();
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            own_slopes[nt][e] = slopes[nt * 8 + lane % 4 * 2 + e];
                }
            } else {
                __syncwarp();
            }
            if (step >= end)
                break;
            const int key = first_key + step * T::KEYS;
            w.multiply_keys(q_at, k_at + offset, key_e5m2);
            w.scale(slope, cap, inner);
            if (key < part.clean_first || key + T::KEYS > part.clean_end)
                w.mask(p, seq, rows, key);
            w.follow_maxima();
            w.add_values(v_at + offset, value_e5m2);
            __syncwarp();
            step += WARPS;
        }
        load(offset);
        if (n == 0) {
            constexpr int PART = is_float8<C> ? 2 : 8; // elements of a copy
#pragma unroll 1
            for (int x = threadIdx.x; x < T::ROWS * (D / PART); x += T::THREADS) {
                const int r = x / (D / PART), c = x % (D / PART) * PART;
                const E *const from = (const E *)p.query.data + rows.b * p.query.stride[0] +
                                      rows.head(r) * p.query.stride[1] +
                                      (seq.q_start + rows.query(r)) * p.query.stride[2] + c;
                const bool exists = r < count && c < p.dim_qk;
                // Of 16 columns, pairs 0, 2, 4, 6 and then 1, 3, 5, 7: see load_keys().
                if constexpr (is_float8<C>)
                    copy_async_word(q_tile + Chunks<D>::at(r, c / 16 * 2 + c / 2 % 2) +
                                        c / 4 % 4 * 4,
                                    from, exists);
                else
                    copy_async(q_tile + Chunks<D>::at(r, c / 8), from, exists);
            }
            if (is_float8<C> && p.query_scale.data && threadIdx.x < count)
                copy_async_word((uint32_t)__cvta_generic_to_shared(slopes + threadIdx.x),
                                (const float *)p.query_scale.data +
                                    rows.b * p.query_scale.stride[0] +
                                    rows.head(threadIdx.x) * p.query_scale.stride[1],
                                true);
            let_successor_start();
        }
        copy_commit();
        offset = offset + T::STAGE_BYTES == STAGES * T::STAGE_BYTES ? 0 : offset + T::STAGE_BYTES;
    }
    copy_wait<0>();
    __syncwarp();

    w.leave((float *)my_ring, sums + warp * T::ROWS);
    __syncthreads();
    const int64_t place = (tile * (int64_t)dp.splits + split) * T::ROWS;
#pragma unroll 1
    for (int r = warp; r < count; r += WARPS) {
        const Merged<COLUMNS> row = merged<COLUMNS>(
            0, 1, WARPS, p.dim_v, [&](int i) { return sums[i * T::ROWS + r]; },
            [&](int i, int c) {
                return *(const float4 *)(shared + T::Q_BYTES + i * T::RING_BYTES +
                                         (r * T::PITCH + c) * 4);
            });
        if (dp.splits == 1) {
            finish_row<E, C>(dp, seq, rows, r, row);
            continue;
        }
        leave_row(dp, place + r, row);
    }
    static_assert(T::ROWS * MERGE_GROUPS * (COLUMNS * 512 + 8) <= T::SHARED_BYTES,
                  "for merge_tile()");
    if (dp.arrived && is_last_split(dp, tile))
        merge_tile<E, C, COLUMNS, WARPS, MERGE_GROUPS>(dp, seq, rows, count, tile, shared);
}
