// Forward attention on the tensor cores of Ampere and later: cp.async, ldmatrix, mma.m16n8k16. See docs/cuda-sm80.md.
//
// A block owns WARPS * MT * 16 query rows of one head and walks over the keys in steps of BN. A warp owns MT * 16 rows
// and all of their output, so warps meet only to share the tiles of K and V. In step g a warp
//   1. multiplies its queries with key tile g + 1 while the exponentials of tile g run in between: the tensor cores and
//      the special function unit are busy at the same time,
//   2. adds P V of tile g while the row maxima of tile g + 1 are taken in between.
// So tile pairs (K of g + 1, V of g) share a stage of the ring, and step first - 1 only multiplies.
//
// The maximum that exponents are relative to follows the true one only when that has grown by more than 2^8
// (the scheme of FlashAttention 4): P stays below 2^8, sums are in f32, and rescaling the output is rare.
#pragma once

#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/sequence.cuh"

#define NEG_INF __int_as_float(0xff800000)
#define POS_INF __int_as_float(0x7f800000)

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float LAZY = 8; // log2 of the largest P

template <int D, int DV, int WARPS, int MT, int BN, int STAGES>
struct Tile {
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS * MT * 16;
    // Bytes from row to row: 16 past a multiple of 64, so that the eight rows of a matrix lie in different banks.
    static constexpr int K_PITCH = D * 2 + 16, V_PITCH = DV * 2 + 16;
    static constexpr int Q_BYTES = ROWS * K_PITCH, K_BYTES = BN * K_PITCH, V_BYTES = BN * V_PITCH;
    static constexpr int STAGE_BYTES = K_BYTES + V_BYTES,
                         SHARED_BYTES = Q_BYTES + STAGES * STAGE_BYTES;
    static_assert(DV <= D, "the output is staged where the queries were");
};

// Rows of a tensor as a block loads them into shared memory: `dim` elements each, zero past them and past `rows`.
template <typename E, int THREADS, int ROWS, int COLS, int PITCH>
struct Loader {
    static constexpr int CHUNKS = COLS / 8, TOTAL = ROWS * CHUNKS;

    // One 16-byte chunk by cp.async.
    __device__ __forceinline__ static void chunk(uint32_t to, const E *row, int col, int dim,
                                                 bool exists) {
        copy_async(to, row + col, exists ? max(0, min(16, (dim - col) * 2)) : 0);
    }

    // 16-byte aligned rows at a fixed distance.
    __device__ __forceinline__ static void aligned(uint32_t to, const E *from, int64_t stride,
                                                   int rows, int dim) {
#pragma unroll
        for (int i = 0; i < (TOTAL + THREADS - 1) / THREADS; ++i) {
            const int x = threadIdx.x + i * THREADS, r = x / CHUNKS, c = x % CHUNKS;
            if (TOTAL % THREADS == 0 || x < TOTAL)
                chunk(to + r * PITCH + c * 16, from + r * stride + c * 8, 0, dim - c * 8, r < rows);
        }
    }

    // The same, where a thread stays in its column.
    __device__ __forceinline__ static void aligned_columns(uint32_t to, const E *from,
                                                           int64_t stride, int rows, int dim) {
        const int c = threadIdx.x % CHUNKS, bytes = max(0, min(16, (dim - c * 8) * 2));
        int r = threadIdx.x / CHUNKS;
        from += r * stride + c * 8;
        to += r * PITCH + c * 16;
#pragma unroll
        for (int i = 0; i < TOTAL / THREADS; ++i) {
            copy_async(to, from, r < rows ? bytes : 0);
            from += THREADS / CHUNKS * stride;
            to += THREADS / CHUNKS * PITCH;
            r += THREADS / CHUNKS;
        }
    }

    // Any layout: row_of(r) says where a row starts. Chunks if these are aligned, else single elements.
    template <typename RowOf>
    __device__ static void any(uint32_t to, RowOf row_of, int64_t inner, int rows, int dim,
                               bool chunks) {
#pragma unroll 1
        for (int x = threadIdx.x; x < TOTAL; x += THREADS) {
            const int r = x / CHUNKS, c = x % CHUNKS * 8;
            const E *row = row_of(r < rows ? r : 0);
            if (chunks) {
                chunk(to + r * PITCH + c * 2, row, c, dim, r < rows);
                continue;
            }
            uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (r < rows && c + e < dim)
                    pairs[e / 2] |= (uint32_t)((const uint16_t *)row)[(c + e) * inner]
                                    << e % 2 * 16;
            asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to + r * PITCH + c * 2),
                         "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                         : "memory");
        }
    }

    __device__ __forceinline__ static void strided(uint32_t to, const E *from, const fwd_view &v,
                                                   int rows, int dim, bool fast) {
        if (!fast)
            any(to, [=](int r) { return from + r * v.stride[2]; }, v.stride[3], rows, dim, false);
        else if constexpr (THREADS % CHUNKS == 0 && TOTAL % THREADS == 0)
            aligned_columns(to, from, v.stride[2], rows, dim);
        else
            aligned(to, from, v.stride[2], rows, dim);
    }
};

// One warp's share. Element [mt][n][e] of a tile of accumulators is row mt * 16 + lane / 4 + e / 2 * 8 of the warp and
// column n * 8 + lane % 4 * 2 + e % 2: the layout of mma.m16n8k16.
template <typename E, int D, int DV, int MT, int BN, int K_PITCH, int V_PITCH, bool EXTRAS>
struct Warp {
    static constexpr int KS = D / 16, NT = BN / 8, VS = BN / 16, VN = DV / 16, PAIRS = MT * NT * 2;

    float out[MT][DV / 8][4];
    float s[MT][NT][4];    // scores of the current tile
    float next[MT][NT][4]; // and of the next one
    uint32_t prob[MT][VS][4];
    uint32_t seen
        [MT]; // which scores of the current tile are not masked, one bit each; of masked tiles only
    uint32_t seen_next[MT];
    float most[MT][2]; // row maxima as exponents are relative to them; raw scores
    float bias[MT][2]; // most * slope
    float tile_most[MT][2];
    float sum[MT][2];
    float slope; // exponent per unit of score: scale * log2(e), or 1 if `extras` has applied it

    __device__ __forceinline__ void init(float slope_) {
        slope = slope_;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                most[mt][half] = NEG_INF;
                bias[mt][half] = sum[mt][half] = 0;
            }
#pragma unroll
            for (int n = 0; n < DV / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    out[mt][n][e] = 0;
        }
    }

    // Pair i: two neighbouring keys of a row, in the order in which P V needs them.
    struct Pair {
        int step, mt, word, n, half;
        __device__ __forceinline__ constexpr Pair(int i)
            : step(i / (MT * 4)), mt(i / 4 % MT), word(i % 4), n(step * 2 + word / 2),
              half(word % 2) {}
    };

    // Exponentials of pairs [from, to) of the current tile.
    __device__ __forceinline__ void exponentials(int from, int to) {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            if (i < from || i >= to)
                continue;
            const Pair p(i);
            const float a = exp2_fast(fmaf(s[p.mt][p.n][2 * p.half], slope, -bias[p.mt][p.half]));
            const float b =
                exp2_fast(fmaf(s[p.mt][p.n][2 * p.half + 1], slope, -bias[p.mt][p.half]));
            sum[p.mt][p.half] += a;
            sum[p.mt][p.half] += b;
            prob[p.mt][p.step][p.word] = Element<E>::pack(a, b);
        }
    }

    __device__ __forceinline__ void maxima(int from, int to) {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            if (i < from || i >= to)
                continue;
            const Pair p(i);
            tile_most[p.mt][p.half] =
                fmaxf(tile_most[p.mt][p.half],
                      fmaxf(next[p.mt][p.n][2 * p.half], next[p.mt][p.n][2 * p.half + 1]));
        }
    }

    // next = Q K^T, and if EXP the exponentials of the current tile in between.
    template <bool EXP>
    __device__ __forceinline__ void multiply_keys(uint32_t q, uint32_t k) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    next[mt][n][e] = 0;
#pragma unroll
        for (int ks = 0; ks < KS; ++ks) {
            uint32_t a[MT][4];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrix(a[mt], q + mt * 16 * K_PITCH + ks * 32);
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                uint32_t b[4];
                load_matrix(b, k + n * 8 * K_PITCH + ks * 32);
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                    Element<E>::mma(next[mt][n], a[mt], b[0], b[1]);
                    Element<E>::mma(next[mt][n + 1], a[mt], b[2], b[3]);
                }
            }
            if (EXP)
                exponentials(PAIRS * ks / KS, PAIRS * (ks + 1) / KS);
        }
    }

    // out += P V, and the maxima of `next` in between.
    __device__ __forceinline__ void add_values(uint32_t v) {
#pragma unroll
        for (int step = 0; step < VS; ++step)
#pragma unroll
            for (int n = 0; n < VN; ++n) {
                uint32_t b[4];
                load_matrix_transposed(b, v + step * 16 * V_PITCH + n * 32);
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                    Element<E>::mma(out[mt][2 * n], prob[mt][step], b[0], b[1]);
                    Element<E>::mma(out[mt][2 * n + 1], prob[mt][step], b[2], b[3]);
                }
                const int at = step * VN + n;
                maxima(PAIRS * at / (VS * VN), PAIRS * (at + 1) / (VS * VN));
            }
    }

    // The same for a tile with masked keys, whose values must not count even if they are NaN or Inf: such elements are
    // taken as 0 first and, if there were any, put back for the rows that see them.
    __device__ __forceinline__ void add_masked_values(uint32_t v) {
        uint32_t odd = 0;
#pragma unroll
        for (int step = 0; step < VS; ++step)
#pragma unroll
            for (int n = 0; n < VN; ++n) {
                uint32_t b[4];
                load_matrix_transposed(b, v + step * 16 * V_PITCH + n * 32);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t bad = not_finite<E>(b[i]);
                    odd |= bad;
                    b[i] &= ~bad;
                }
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                    Element<E>::mma(out[mt][2 * n], prob[mt][step], b[0], b[1]);
                    Element<E>::mma(out[mt][2 * n + 1], prob[mt][step], b[2], b[3]);
                }
            }
        if (__any_sync(~0u, odd != 0))
            add_odd_values(v);
    }

    // 1 in each half of a pair that is NaN or the infinity of that sign.
    __device__ __forceinline__ static uint32_t odd_ones(uint32_t pair, float sign) {
        const float low = sign * Element<E>::widen(pair & 0xffff),
                    high = sign * Element<E>::widen(pair >> 16);
        return (low < POS_INF ? 0 : Element<E>::one) | (high < POS_INF ? 0 : Element<E>::one << 16);
    }

    // Counts, for each element of the output, the visible +Inf and -Inf of its column (NaN counts as both) with one more
    // product, visibility times oddness, and adds Inf where there is one.
    __device__ __forceinline__ void add_odd_values(uint32_t v) {
#pragma unroll
        for (int n = 0; n < VN; ++n)
#pragma unroll
            for (int sign = 0; sign < 2; ++sign) {
                float count[MT][2][4] = {};
#pragma unroll
                for (int step = 0; step < VS; ++step) {
                    uint32_t b[4];
                    load_matrix_transposed(b, v + step * 16 * V_PITCH + n * 32);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        b[i] = odd_ones(b[i], sign ? -1.0f : 1.0f);
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt) {
                        uint32_t a[4];
#pragma unroll
                        for (int w = 0; w < 4; ++w) {
                            const uint32_t two =
                                seen[mt] >> ((step * 2 + w / 2) * 4 + w % 2 * 2) & 3;
                            a[w] =
                                (two & 1) * Element<E>::one | (two >> 1) * (Element<E>::one << 16);
                        }
                        Element<E>::mma(count[mt][0], a, b[0], b[1]);
                        Element<E>::mma(count[mt][1], a, b[2], b[3]);
                    }
                }
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                    for (int t = 0; t < 2; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            out[mt][2 * n + t][e] +=
                                count[mt][t][e] > 0 ? (sign ? NEG_INF : POS_INF) : 0.0f;
            }
    }

    // Makes the maxima of the next tile the reference if a row of the warp has outgrown it.
    __device__ __forceinline__ void follow_maxima() {
        const float enough = LAZY / slope;
        bool grown = false;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                grown |= tile_most[mt][half] > most[mt][half] + enough;
        if (!__any_sync(~0u, grown))
            return;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = tile_most[mt][half];
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                x = fmaxf(x, most[mt][half]);
                const float shrink = x == NEG_INF ? 1.0f : exp2_fast((most[mt][half] - x) * slope);
                most[mt][half] = x;
                bias[mt][half] = x == NEG_INF ? 0.0f : x * slope;
                sum[mt][half] *= shrink;
#pragma unroll
                for (int n = 0; n < DV / 8; ++n) {
                    out[mt][n][2 * half] *= shrink;
                    out[mt][n][2 * half + 1] *= shrink;
                }
            }
    }

    // Hides the keys of `next` outside the window and notes what is left. `row`, `key`: the first ones of this thread and
    // of the tile.
    __device__ __forceinline__ void mask(const fwd_params &p, const Sequence &seq, int row,
                                         int key) {
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            seen_next[mt] = 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = row + mt * 16 + half * 8;
                const int first = seq.first_key(p, i) - key - column,
                          end = seq.end_key(p, i) - key - column;
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float &x = next[mt][n][2 * half + e];
                        if (n * 8 + e < first || n * 8 + e >= end)
                            x = NEG_INF;
                        seen_next[mt] |= (uint32_t)(x != NEG_INF) << (n * 4 + half * 2 + e);
                    }
            }
        }
    }

    // The options of the forward pass, one after the other; leaves logits times log2(e). Rows and keys outside the
    // tensors give anything: mask() hides them.
    __device__ __forceinline__ void extras(const fwd_params &p, const Sequence &seq, int b, int h,
                                           int row, int key) {
        const float scale = (float)p.scale, cap = (float)p.softcap;
        const float alibi =
            p.alibi_slopes.data
                ? ((const float *)p.alibi_slopes
                       .data)[b * p.alibi_slopes.stride[0] + h * p.alibi_slopes.stride[1]]
                : 0.0f;
        const char *const bias_head = (const char *)p.bias.data;
        const int64_t bias_offset = b * p.bias.stride[0] + h * p.bias.stride[1];
        const uint8_t *const mask_head =
            (const uint8_t *)p.mask.data + b * p.mask.stride[0] + h * p.mask.stride[1];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = row + mt * 16 + half * 8;
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int j = key + n * 8 + threadIdx.x % 4 * 2 + e;
                        const bool exists = i < seq.q_len && j < seq.k_len;
                        float x = next[mt][n][2 * half + e] * scale;
                        if (cap > 0) // tanh(x) = 1 - 2 / (exp(2 x) + 1)
                            x = cap - 2 * cap / (exp2_fast(2 * LOG2E * x / cap) + 1);
                        if (bias_head && exists) {
                            const int64_t at =
                                bias_offset + i * p.bias.stride[2] + j * p.bias.stride[3];
                            x += p.flags & FWD_BIAS_F32
                                     ? ((const float *)bias_head)[at]
                                     : Element<E>::widen(((const uint16_t *)bias_head)[at]);
                        }
                        x = (x - alibi * abs(i + seq.diagonal - j)) * LOG2E;
                        if (p.mask.data && exists &&
                            !mask_head[i * p.mask.stride[2] + j * p.mask.stride[3]])
                            x = NEG_INF;
                        next[mt][n][2 * half + e] = x;
                    }
            }
    }

    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            seen[mt] = seen_next[mt];
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    s[mt][n][e] = next[mt][n][e];
        }
    }
};

template <typename E, int D, int DV, int WARPS, int MT, int BN, int STAGES, bool EXTRAS>
__device__ __forceinline__ void cuda_fwd_sm80(const fwd_params &p) {
    using T = Tile<D, DV, WARPS, MT, BN, STAGES>;
    using W = Warp<E, D, DV, MT, BN, T::K_PITCH, T::V_PITCH, EXTRAS>;
    using LoadQ = Loader<E, T::THREADS, T::ROWS, D, T::K_PITCH>;
    using LoadK = Loader<E, T::THREADS, BN, D, T::K_PITCH>;
    using LoadV = Loader<E, T::THREADS, BN, DV, T::V_PITCH>;
    extern __shared__ __align__(16) char shared[];
    const uint32_t q_tile = (uint32_t)__cvta_generic_to_shared(shared), ring = q_tile + T::Q_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const Work work(p);
    const Sequence seq(p, work.b);
    const int block_row = work.row_block * T::ROWS, rows = min(T::ROWS, seq.q_rows - block_row);
    if (rows <= 0)
        return;
    const int kv_head = work.h / p.group, first_row = block_row + warp * MT * 16;
    const E *const q = (const E *)p.query.data + work.b * p.query.stride[0] +
                       work.h * p.query.stride[1] + (seq.q_start + block_row) * p.query.stride[2];
    const E *const k = (const E *)p.key.data +
                       (EXTRAS && p.page_size ? 0 : work.b * p.key.stride[0]) +
                       kv_head * p.key.stride[1] + seq.k_start * p.key.stride[2];
    const E *const v = (const E *)p.value.data +
                       (EXTRAS && p.page_size ? 0 : work.b * p.value.stride[0]) +
                       kv_head * p.value.stride[1] + seq.k_start * p.value.stride[2];

    // Tiles [first, end) of the block and of this warp; keys [clean_first, clean_end) are seen by all rows of the warp.
    const auto tiles = [&](int from, int count, int &first, int &end) {
        const int most = min(from + count, seq.q_len) - 1;
        first = seq.first_key(p, from) / BN;
        end = most < from ? 0 : (seq.end_key(p, most) + BN - 1) / BN;
    };
    int first, end, warp_first, warp_end;
    tiles(block_row, T::ROWS, first, end);
    tiles(first_row, MT * 16, warp_first, warp_end);
    const int clean_first = seq.first_key(p, first_row + MT * 16 - 1),
              clean_end = seq.end_key(p, first_row);

    // Tiles K of g + 1 and V of g.
    const auto load_pair = [&](int g, int slot) {
        const uint32_t to = ring + slot * T::STAGE_BYTES;
        const int k0 = (g + 1) * BN, v0 = g * BN;
        if (EXTRAS && p.page_size) {
            const auto page_row = [&](const E *base, const fwd_view &view, int j) {
                const int page =
                    ((const int *)p.block_table.data)[work.b * p.block_table.stride[0] +
                                                      j / p.page_size * p.block_table.stride[1]];
                return base + clamped(page, 0, p.pages - 1) * view.stride[0] +
                       j % p.page_size * view.stride[2];
            };
            if (g + 1 < end)
                LoadK::any(
                    to, [&](int r) { return page_row(k, p.key, k0 + r); }, p.key.stride[3],
                    seq.k_len - k0, p.dim_qk, p.flags & FWD_ALIGNED_KEY);
            if (g >= first && g < end)
                LoadV::any(
                    to + T::K_BYTES, [&](int r) { return page_row(v, p.value, v0 + r); },
                    p.value.stride[3], seq.k_len - v0, p.dim_v, p.flags & FWD_ALIGNED_VALUE);
        } else {
            if (g + 1 < end)
                LoadK::strided(to, k + k0 * p.key.stride[2], p.key, seq.k_len - k0, p.dim_qk,
                               p.flags & FWD_ALIGNED_KEY);
            if (g >= first && g < end)
                LoadV::strided(to + T::K_BYTES, v + v0 * p.value.stride[2], p.value, seq.k_len - v0,
                               p.dim_v, p.flags & FWD_ALIGNED_VALUE);
        }
        copy_commit();
    };

    W w;
    w.init(EXTRAS ? 1.0f : (float)p.scale * LOG2E);
    LoadQ::strided(q_tile, q, p.query, rows, p.dim_qk, p.flags & FWD_ALIGNED_QUERY);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i)
        load_pair(first - 1 + i, i);

    const uint32_t q_at = q_tile + (warp * MT * 16 + lane % 16) * T::K_PITCH + lane / 16 * 16;
    const uint32_t k_at = ring + (lane % 8 + lane / 16 * 8) * T::K_PITCH + lane / 8 % 2 * 16;
    const uint32_t v_at = ring + T::K_BYTES + lane % 16 * T::V_PITCH + lane / 16 * 16;
    int slot = 0;
    bool masked = false;
#pragma unroll 1
    for (int g = first - 1; g < end; ++g) {
        copy_wait<STAGES - 2>();
        __syncthreads(); // the pair of this step is there, and all warps are done with the one before it
        load_pair(g + STAGES - 1, slot == 0 ? STAGES - 1 : slot - 1);
        const uint32_t offset = slot * T::STAGE_BYTES;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        const bool current = g >= warp_first && g < warp_end,
                   next = g + 1 >= warp_first && g + 1 < warp_end;
        if (!current && !next)
            continue;
        if (next && current)
            w.template multiply_keys<true>(q_at, k_at + offset);
        else if (next)
            w.template multiply_keys<false>(q_at, k_at + offset);
        else
            w.exponentials(0, W::PAIRS);

        const bool was_masked = masked;
        masked = next && ((g + 1) * BN < clean_first || (g + 2) * BN > clean_end);
        if (EXTRAS && next) {
            w.extras(p, seq, work.b, work.h, first_row + lane / 4, (g + 1) * BN);
            masked |= p.mask.data || p.bias.data;
        }
        if (masked)
            w.mask(p, seq, first_row + lane / 4, (g + 1) * BN);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
            w.tile_most[mt][0] = w.tile_most[mt][1] = NEG_INF;
        if (current && !was_masked) {
            w.add_values(v_at + offset);
        } else {
            w.maxima(0, W::PAIRS);
            if (current)
                w.add_masked_values(v_at + offset);
        }
        if (next)
            w.follow_maxima();
        w.advance();
    }
    copy_wait<0>();
    if (first >= end)
        __syncthreads(); // no step has waited for the queries; their tile is about to be reused

    // The output of a warp takes the place of its own queries on its way to whole 16-byte writes.
    const float sink =
        p.sinks.data ? ((const float *)p.sinks.data)[work.h * p.sinks.stride[1]] * LOG2E : NEG_INF;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int local = warp * MT * 16 + mt * 16 + half * 8 + lane / 4, i = block_row + local;
            float total = w.sum[mt][half], top = w.most[mt][half] * w.slope;
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const bool empty = i >= seq.q_len || total == 0;
            if (empty) {
                total = 0;
                top = NEG_INF;
            }
            if (sink > NEG_INF) {
                const float higher = fmaxf(top, sink);
                const float shrink = exp2_fast(top - higher);
                total = total * shrink + exp2_fast(sink - higher);
                w.sum[mt][half] = shrink / total;
                top = higher;
            } else {
                w.sum[mt][half] = 1 / total;
            }
            if (p.lse.data && lane % 4 == 0 && local < rows) {
                const float none = p.flags & FWD_EMPTY_LSE_INF ? POS_INF : NEG_INF;
                const float lse = total == 0 ? none : (top + log2f(total)) * LN2;
                const int64_t at = work.b * p.lse.stride[0] + work.h * p.lse.stride[1] +
                                   (seq.q_start + i) * p.lse.stride[2];
                if (p.flags & FWD_LSE_F32)
                    ((float *)p.lse.data)[at] = lse;
                else
                    ((uint16_t *)p.lse.data)[at] = (uint16_t)Element<E>::pack(lse, 0);
            }
#pragma unroll
            for (int n = 0; n < DV / 8; ++n) {
                const float a = empty ? 0 : w.out[mt][n][2 * half] * w.sum[mt][half];
                const float b = empty ? 0 : w.out[mt][n][2 * half + 1] * w.sum[mt][half];
                *(uint32_t *)(shared + local * T::K_PITCH + n * 16 + lane % 4 * 4) =
                    Element<E>::pack(a, b);
            }
        }
    __syncwarp();
    E *const out = (E *)p.output.data + work.b * p.output.stride[0] + work.h * p.output.stride[1] +
                   (seq.q_start + block_row) * p.output.stride[2];
    const bool wide = p.flags & FWD_ALIGNED_OUTPUT;
#pragma unroll 1
    for (int x = lane; x < MT * 16 * (DV / 8); x += 32) {
        const int local = warp * MT * 16 + x / (DV / 8), c = x % (DV / 8) * 8;
        const E *const from = (const E *)(shared + local * T::K_PITCH) + c;
        E *const to = out + local * p.output.stride[2];
        if (local >= rows)
            break;
        if (wide && c + 8 <= p.dim_v)
            *(uint4 *)(to + c) = *(const uint4 *)from;
        else
            for (int e = 0; e < 8 && c + e < p.dim_v; ++e)
                to[(c + e) * p.output.stride[3]] = from[e];
    }
}
