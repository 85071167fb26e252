// Forward attention for heads wider than 256, on the tensor cores of Ampere and later: docs/cuda-wide.md.
//
// A block owns ROWS packed rows of one kv head and walks over its split of the keys in steps of BN. The output of so many columns fits
// the registers of a whole block only, so each warp adds up some columns of it for all rows. For the scores warps lie on rows and keys,
// WM by WN, and two share a tile: each sums up half of Q K^T, gives the other one half of the keys and gets its own half. Probabilities
// pass through shared memory to all warps.
//
// Where value is a view of key (VIEW), as in the latent cache of MLA, the tile of keys is that of values, too.
#pragma once

#include "kernels/cuda/common/packed.cuh"

template <int D, int DV, int ROWS_, int BN_, int WM_, int WN_, int STAGES_, bool VIEW_>
struct Tile {
    static constexpr int ROWS = ROWS_, BN = BN_, WM = WM_, WN = WN_, STAGES = STAGES_;
    static constexpr bool VIEW = VIEW_;
    // A stage has keys and values of a step; with one stage keys of the next step are on their way while values of this one are used.
    static constexpr bool ALTERNATE = STAGES == 1;
    static constexpr int WARPS = WM * WN * 2, THREADS = WARPS * 32;
    static constexpr int PARTS = WN * 2; // warps that have scores of the same row
    using Keys = Chunks<D>;
    using Values = Chunks<VIEW ? D : DV>;
    using Probs = Chunks<(BN < 32 ? 32 : BN)>;
    static constexpr int Q_BYTES = ROWS * D * 2, K_BYTES = BN * D * 2,
                         V_BYTES = VIEW ? 0 : BN * DV * 2, STAGE_BYTES = K_BYTES + V_BYTES;
    static constexpr int RING_BYTES = STAGES * STAGE_BYTES, P_BYTES = ROWS * Probs::PITCH;
    static constexpr int SHARED_BYTES = Q_BYTES + RING_BYTES + P_BYTES + ROWS * (PARTS + 3) * 4;
    static constexpr int OUT_PITCH =
        DV + 8; // floats of a row, where the output takes the place of queries and ring
    static_assert(ROWS * OUT_PITCH * 4 <= Q_BYTES + RING_BYTES && !(VIEW && ALTERNATE) && DV <= D,
                  "");
};

// What warps tell each other of rows.
template <typename T>
struct Stats {
    float *const parts; // [PARTS][ROWS]: maxima of a tile, in the end sums
    float *const top, *const limit, *const shrink;
    __device__ __forceinline__ explicit Stats(float *memory)
        : parts(memory), top(memory + T::PARTS * T::ROWS), limit(top + T::ROWS),
          shrink(limit + T::ROWS) {}
};

// Loads COUNT rows of a tile into shared memory by all threads, with zeros past `dim` elements of a row and past `count` rows.
template <typename Row, int COUNT, int THREADS>
struct Loader {
    static constexpr int CHUNKS = Row::PITCH / 16, STEP = THREADS / 8, REPEAT = COUNT / STEP;
    static_assert(COUNT % STEP == 0 && CHUNKS % 8 == 0, "");

    // The n-th row that this thread copies a part of.
    __device__ __forceinline__ static int row(int n) { return n * STEP + threadIdx.x / 8; }

    // 16-byte aligned rows; start(n): where row(n) begins.
    template <typename Start>
    __device__ __forceinline__ static void aligned(uint32_t tile, int count, int dim, Start start) {
        const int column = threadIdx.x % 8 * 8;
#pragma unroll
        for (int n = 0; n < REPEAT; ++n) {
            const uint16_t *const from = (const uint16_t *)start(n) + column;
            const uint32_t to = tile + Row::at(row(n), threadIdx.x % 8);
            const int columns = row(n) < count ? dim - column : 0;
#pragma unroll
            for (int c = 0; c < CHUNKS; c += 8)
                copy_async(to + c * 16, from + c * 8, c * 8 < columns);
        }
    }

    // Any layout, element by element; start(r): where row r begins.
    template <typename Start>
    __device__ static void any(uint32_t tile, int count, int dim, int64_t inner, Start start) {
#pragma unroll 1
        for (int x = threadIdx.x; x < COUNT * CHUNKS; x += THREADS) {
            const int r = x / CHUNKS, c = x % CHUNKS * 8;
            const uint16_t *const from = (const uint16_t *)start(min(r, count - 1));
            uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (r < count && c + e < dim)
                    pairs[e / 2] |= (uint32_t)from[(c + e) * inner] << e % 2 * 16;
            store_chunk(tile + Row::at(r, c / 8), pairs);
        }
    }
};

// One warp's share. Element [mt][n][e] of a tile of accumulators is row mt * 16 + lane / 4 + e / 2 * 8 and column n * 8 + lane % 4 * 2 +
// e % 2 of it: the layout of mma.m16n8k16.
template <typename E, typename T, int DV>
struct Warp {
    static constexpr int MT = T::ROWS / 16, COLUMNS = DV / T::WARPS, VN = COLUMNS / 16,
                         VS = T::BN / 16;                                     // of the output
    static constexpr int ST = MT / T::WM, NT = T::BN / T::WN / 8, H = NT / 2; // of the scores
    static_assert(COLUMNS % 64 == 0 && (NT == 2 || NT == 4), "");

    const int lane, warp, half_of, column, row; // half_of: the two that share scores
    float out[MT][COLUMNS / 8][4];
    float score[ST][NT][4]; // the first H tiles are this warp's own
    float top[ST][2], limit[ST][2], sum[ST][2];

    __device__ __forceinline__ explicit Warp(int warp)
        : lane(threadIdx.x % 32), warp(warp), half_of(warp % 2),
          column((warp / 2 % T::WN * 2 + warp % 2) * H * 8), row(warp / 2 / T::WN * ST * 16) {
#pragma unroll
        for (int mt = 0; mt < ST; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                limit[mt][half] = NEG_INF;
                top[mt][half] = sum[mt][half] = 0;
            }
        clear(out);
    }

    // Row of the tile of a score, and the first of a thread's two keys of a step.
    __device__ __forceinline__ int row_of(int mt, int half) const {
        return row + mt * 16 + half * 8 + lane / 4;
    }
    __device__ __forceinline__ int key_of(int n) const { return column + n * 8 + lane % 4 * 2; }

    // Where this thread's part of an operand is, for ldmatrix. Of 32 columns of Q and K each of the two takes 16.
    __device__ __forceinline__ uint32_t queries_at(uint32_t tile) const {
        return tile + row * T::Keys::PITCH + T::Keys::at(lane % 16, lane / 16 + half_of * 2);
    }
    // Two tiles of keys from 2 n on; it has its own ones first, then those that it gives away.
    __device__ __forceinline__ uint32_t keys_at(uint32_t tile, int n) const {
        const int own = 2 * n + lane / 16, there = (own / H ^ half_of) * H + own % H;
        return tile + T::Keys::at((warp / 2 % T::WN * NT + there) * 8 + lane % 8,
                                  lane / 8 % 2 + half_of * 2);
    }
    __device__ __forceinline__ uint32_t values_at(uint32_t tile) const {
        return tile + T::Values::at(lane % 16, lane / 16 + warp * (COLUMNS / 8));
    }
    __device__ __forceinline__ static uint32_t probs_at(uint32_t tile) {
        return tile + T::Probs::at(threadIdx.x % 16, threadIdx.x % 32 / 16);
    }
    // The pair that this thread writes.
    __device__ __forceinline__ uint32_t prob_to(uint32_t tile) const {
        return tile + T::Probs::at(row + lane / 4, column / 8) + lane % 4 * 4;
    }

    // Its half of Q K^T, which ends after `groups` times 64 columns. Matrices are loaded one step early, at the end for naught.
    __device__ __forceinline__ void multiply_keys(uint32_t q, const uint32_t (&k)[H], int groups) {
        uint32_t a[2][ST][4], b[2][H][4];
        const auto load = [&](int to, uint32_t flip, uint32_t offset) {
#pragma unroll
            for (int mt = 0; mt < ST; ++mt)
                load_matrices(a[to][mt], (q ^ flip) + offset + mt * 16 * T::Keys::PITCH);
#pragma unroll
            for (int n = 0; n < H; ++n)
                load_matrices(b[to][n], (k[n] ^ flip) + offset);
        };
        const auto multiply = [&](int from) {
#pragma unroll
            for (int n = 0; n < H; ++n)
#pragma unroll
                for (int mt = 0; mt < ST; ++mt) {
                    Element<E>::mma(score[mt][2 * n], a[from][mt], b[from][n][0], b[from][n][1]);
                    Element<E>::mma(score[mt][2 * n + 1], a[from][mt], b[from][n][2],
                                    b[from][n][3]);
                }
        };
        clear(score);
        load(0, 0, 0);
#pragma unroll 1
        for (int group = 1; group <= groups; ++group) {
            load(1, 64, (group - 1) * 128);
            multiply(0);
            load(0, 0, group * 128);
            multiply(1);
        }
    }

    // Completes its own scores by what the other warp has of them. `memory`: of the block, free until all warps meet; half of what
    // there is to trade has room at a time.
    __device__ __forceinline__ void trade(char *memory) {
        constexpr int BYTES = ST * H * 32 * 8;
        static_assert(BYTES * T::WARPS <= T::P_BYTES, "");
        float2 *const mine = (float2 *)(memory + warp * BYTES) + lane;
        const float2 *const other = (const float2 *)(memory + (warp ^ 1) * BYTES) + lane;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half > 0)
                named_barrier_sync(1 + warp / 2, 64);
#pragma unroll
            for (int mt = 0; mt < ST; ++mt)
#pragma unroll
                for (int n = 0; n < H; ++n)
                    mine[(mt * H + n) * 32] =
                        make_float2(score[mt][H + n][2 * half], score[mt][H + n][2 * half + 1]);
            named_barrier_sync(1 + warp / 2, 64);
#pragma unroll
            for (int mt = 0; mt < ST; ++mt)
#pragma unroll
                for (int n = 0; n < H; ++n) {
                    const float2 x = other[(mt * H + n) * 32];
                    score[mt][n][2 * half] += x.x;
                    score[mt][n][2 * half + 1] += x.y;
                }
        }
    }

    // Each of its own scores x becomes change(x, row of the tile, key of the step).
    template <typename Change>
    __device__ __forceinline__ void change_scores(Change change) {
#pragma unroll
        for (int mt = 0; mt < ST; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < H; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float &x = score[mt][n][2 * half + e];
                        x = change(x, row_of(mt, half), key_of(n) + e);
                    }
    }

    // Scores to exponents of 2.
    __device__ __forceinline__ void to_exponents(const fwd_params &p) {
        cap_or_scale(p, p.exponent_scale, [&](auto change) {
            change_scores([&](float x, int, int) { return change(x); });
        });
    }

    // Bias, ALiBi and mask. What lies past the rows and keys that exist is read at the last ones: mask() hides those keys, and nobody
    // sees those rows.
    __device__ __noinline__ static float option(const fwd_params &p, const Sequence &seq, int b,
                                                int h, int i, int j, float x) {
        const auto at = [&](const fwd_view &v) {
            return b * v.stride[0] + h * v.stride[1] + i * v.stride[2] + j * v.stride[3];
        };
        if (p.bias.data) {
            const int64_t place = at(p.bias);
            const float y = p.flags & FWD_BIAS_F32
                                ? ((const float *)p.bias.data)[place]
                                : Element<E>::widen(((const uint16_t *)p.bias.data)[place]);
            x = __fmaf_rz(y, LOG2E, x);
        }
        if (p.alibi_slopes.data) {
            const fwd_view &v = p.alibi_slopes;
            const float slope = ((const float *)v.data)[b * v.stride[0] + h * v.stride[1]] * LOG2E;
            x = __fmaf_rz(-slope, fabsf((float)(i + seq.diagonal - j)), x);
        }
        if (p.mask.data && !((const uint8_t *)p.mask.data)[at(p.mask)])
            x = NEG_INF;
        return x;
    }
    __device__ __forceinline__ void options(const fwd_params &p, const Sequence &seq,
                                            const Rows &rows, int count, int key) {
        change_scores([&](float x, int r, int j) {
            r = min(r, count - 1);
            return option(p, seq, rows.b, rows.head(r), min(rows.query(r), seq.q_len - 1),
                          min(key + j, seq.k_len - 1), x);
        });
    }

    // Hides the keys that a row does not see.
    __device__ __forceinline__ void mask(const fwd_params &p, const Sequence &seq, const Rows &rows,
                                         int key) {
#pragma unroll
        for (int mt = 0; mt < ST; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = rows.query(row_of(mt, half));
                const int first = seq.first_key(p, i) - key, end = seq.end_key(p, i) - key;
#pragma unroll
                for (int n = 0; n < H; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (key_of(n) + e < first || key_of(n) + e >= end)
                            score[mt][n][2 * half + e] = NEG_INF;
            }
    }

    // Makes the maxima of the step the reference of the exponents if a row of the block has outgrown it. All warps meet here.
    __device__ __forceinline__ void follow_maxima(const Stats<T> &stats) {
        float most[ST][2];
        bool grown = false;
#pragma unroll
        for (int mt = 0; mt < ST; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                most[mt][half] = NEG_INF;
#pragma unroll
                for (int n = 0; n < H; ++n)
                    most[mt][half] = fmaxf(
                        most[mt][half], fmaxf(score[mt][n][2 * half], score[mt][n][2 * half + 1]));
                grown |= most[mt][half] > limit[mt][half];
            }
        if (!__syncthreads_or(grown))
            return;
#pragma unroll
        for (int mt = 0; mt < ST; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = most[mt][half];
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                if (lane % 4 == 0)
                    stats.parts[part() * T::ROWS + row_of(mt, half)] = x;
            }
        __syncthreads();
        if (threadIdx.x < T::ROWS) {
            const int r = threadIdx.x;
            const float before = stats.top[r];
            const bool fresh = stats.limit[r] == NEG_INF;
            float x = fresh ? NEG_INF : before;
#pragma unroll
            for (int i = 0; i < T::PARTS; ++i)
                x = fmaxf(x, stats.parts[i * T::ROWS + r]);
            stats.limit[r] = x + LAZY;
            x = x == NEG_INF ? 0.0f : x;
            stats.shrink[r] = fresh ? 0.0f : exp2_approx(before - x);
            stats.top[r] = x;
        }
        __syncthreads();
#pragma unroll
        for (int mt = 0; mt < ST; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = row_of(mt, half);
                top[mt][half] = stats.top[r];
                limit[mt][half] = stats.limit[r];
                sum[mt][half] *= stats.shrink[r];
            }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shrink = stats.shrink[mt * 16 + half * 8 + lane / 4];
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; ++n) {
                    out[mt][n][2 * half] *= shrink;
                    out[mt][n][2 * half + 1] *= shrink;
                }
            }
    }

    __device__ __forceinline__ void exponentials(uint32_t to) {
#pragma unroll
        for (int mt = 0; mt < ST; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < H; ++n) {
                    const float a = exp2_approx(score[mt][n][2 * half] - top[mt][half]);
                    const float b = exp2_approx(score[mt][n][2 * half + 1] - top[mt][half]);
                    sum[mt][half] += a + b;
                    store_word((to ^ n * 16) + (mt * 16 + half * 8) * T::Probs::PITCH,
                               pack<E>(a, b));
                }
    }

    // out += P V. Matrices are loaded one product early.
    __device__ __forceinline__ void add_values(uint32_t p, uint32_t v) {
        uint32_t a[2][MT][4], b[2][4];
        const auto load_p = [&](int step) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrices(a[step % 2][mt],
                              T::Probs::after(p, step) + mt * 16 * T::Probs::PITCH);
        };
        const auto load_v = [&](int i) {
            load_matrices_transposed(b[i % 2],
                                     T::Values::after(v, i % VN) + i / VN * 16 * T::Values::PITCH);
        };
        load_p(0);
        load_v(0);
#pragma unroll
        for (int i = 0; i < VS * VN; ++i) {
            const int step = i / VN, n = i % VN;
            if (i + 1 < VS * VN)
                load_v(i + 1);
            if (n == VN / 2 && step + 1 < VS)
                load_p(step + 1);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                Element<E>::mma(out[mt][2 * n], a[step % 2][mt], b[i % 2][0], b[i % 2][1]);
                Element<E>::mma(out[mt][2 * n + 1], a[step % 2][mt], b[i % 2][2], b[i % 2][3]);
            }
        }
    }

    // Of the warps that have scores of the same row.
    __device__ __forceinline__ int part() const { return warp / 2 % T::WN * 2 + half_of; }

    // Output and sums to shared memory: [row][OUT_PITCH] and [part][row].
    __device__ __forceinline__ void leave(float *output, float *sums) {
#pragma unroll
        for (int mt = 0; mt < ST; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = sum[mt][half];
                x += __shfl_xor_sync(~0u, x, 1);
                x += __shfl_xor_sync(~0u, x, 2);
                if (lane % 4 == 0)
                    sums[part() * T::ROWS + row_of(mt, half)] = x;
            }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; ++n)
                    *(float2 *)(output + (mt * 16 + half * 8 + lane / 4) * T::OUT_PITCH +
                                warp * COLUMNS + n * 8 + lane % 4 * 2) =
                        make_float2(out[mt][n][2 * half], out[mt][n][2 * half + 1]);
    }
};

// The keys and values of a block on their way into the ring, step by step.
template <typename E, typename T>
struct Ring {
    using LoadK = Loader<typename T::Keys, T::BN, T::THREADS>;
    using LoadV = Loader<typename T::Values, T::BN, T::THREADS>;

    const fwd_params &p;
    const Part &part;
    const int b;
    const E *const k, *const v; // the first key of the sequence, or of the pages
    int page[LoadK::REPEAT];    // of this thread's keys of a step

    __device__ __forceinline__ static const E *start(const fwd_params &p, const fwd_view &view,
                                                     const Sequence &seq, const Rows &rows) {
        return (const E *)view.data + (p.page_size ? 0 : rows.b * view.stride[0]) +
               rows.kv_head * view.stride[1] + seq.k_start * view.stride[2];
    }

    __device__ __forceinline__ Ring(const fwd_params &p, const Part &part, const Sequence &seq,
                                    const Rows &rows)
        : p(p), part(part), b(rows.b), k(start(p, p.key, seq, rows)),
          v(start(p, p.value, seq, rows)) {}

    __device__ __forceinline__ int first_key(int step) const {
        return part.first_key + step * T::BN;
    }

    // Long before the addresses are needed.
    __device__ __forceinline__ void look_up(int step) {
        if (!p.page_size || step >= part.end)
            return;
#pragma unroll
        for (int n = 0; n < LoadK::REPEAT; ++n) {
            const unsigned key = min(first_key(step) + LoadK::row(n), part.end_key - 1);
            page[n] =
                ((const int *)
                     p.block_table.data)[b * p.block_table.stride[0] +
                                         key / (unsigned)p.page_size * p.block_table.stride[1]];
        }
    }

    template <typename Load>
    __device__ __forceinline__ void load(uint32_t to, const E *base, const fwd_view &view, int step,
                                         int dim, bool aligned) const {
        const int first = first_key(step), left = part.end_key - first;
        const auto in_rows = [&](int n) {
            const unsigned key = first + Load::row(n);
            return base + (p.page_size ? clamped(page[n], 0, p.pages - 1) * view.stride[0] +
                                             key % (unsigned)p.page_size * view.stride[2]
                                       : key * view.stride[2]);
        };
        const auto anywhere = [&](int r) {
            return base +
                   (p.page_size ? paged_row(p, view, b, first + r) : (first + r) * view.stride[2]);
        };
        if (aligned)
            Load::aligned(to, left, dim, in_rows);
        else
            Load::any(to, left, dim, view.stride[3], anywhere);
    }
    __device__ __forceinline__ void load_keys(int step, uint32_t stage) const {
        if (step < part.end)
            load<LoadK>(stage, k, p.key, step, p.dim_qk, p.flags & FWD_ALIGNED_KEY);
    }
    __device__ __forceinline__ void load_values(int step, uint32_t stage) const {
        if (step < part.end)
            load<LoadV>(stage + T::K_BYTES, v, p.value, step, p.dim_v, p.flags & FWD_ALIGNED_VALUE);
    }
    // A step's stage; steps one after the other.
    __device__ __forceinline__ void load_stage(int step, uint32_t stage) {
        load_keys(step, stage);
        if (!T::VIEW)
            load_values(step, stage);
        look_up(step + 1);
        copy_commit();
    }
};

template <typename E, typename T>
__device__ __forceinline__ void load_queries(const fwd_params &p, const Sequence &seq,
                                             const Rows &rows, int count, uint32_t tile) {
    using Load = Loader<typename T::Keys, T::ROWS, T::THREADS>;
    const auto start = [&](int r) {
        r = min(r, count - 1);
        return (const E *)p.query.data + rows.b * p.query.stride[0] +
               rows.head(r) * p.query.stride[1] + (seq.q_start + rows.query(r)) * p.query.stride[2];
    };
    if (p.flags & FWD_ALIGNED_QUERY)
        Load::aligned(tile, count, p.dim_qk, [&](int n) { return start(Load::row(n)); });
    else
        Load::any(tile, count, p.dim_qk, p.query.stride[3], start);
}

template <typename E, int D, int DV, int ROWS, int BN, int WM, int WN, int STAGES, bool VIEW>
__device__ __forceinline__ void cuda_fwd_wide_sm80(const packed_params &dp) {
    using T = Tile<D, DV, ROWS, BN, WM, WN, STAGES, VIEW>;
    using W = Warp<E, T, DV>;
    extern __shared__ __align__(128) char shared[];
    const fwd_params &p = dp.fwd;
    const uint32_t q_tile = shared_address(shared), ring_at = q_tile + T::Q_BYTES;
    char *const probs = shared + T::Q_BYTES + T::RING_BYTES;
    const uint32_t p_tile = shared_address(probs);
    const Stats<T> stats((float *)(probs + T::P_BYTES));

    const int of_splits = divide(blockIdx.x, dp.by_splits),
              split = blockIdx.x - of_splits * dp.splits, tile = longest_first(dp, of_splits);
    const Rows rows(dp, tile, ROWS);
    Sequence seq(p, rows.b);
    seq.diagonal += dp.diagonal_offset;
    const int count = min(ROWS, seq.q_rows * rows.group - rows.first);
    if (count <= 0)
        return;
    const Part part(dp, seq, rows, count, split, BN);
    Ring<E, T> ring(p, part, seq, rows);

    if (threadIdx.x < ROWS) {
        stats.limit[threadIdx.x] = NEG_INF;
        stats.top[threadIdx.x] = 0;
    }
    load_queries<E, T>(p, seq, rows, count, q_tile);
    ring.look_up(part.first);
    if (T::ALTERNATE) {
        ring.load_keys(part.first, ring_at);
        copy_commit();
    }
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i)
        ring.load_stage(part.first + i, ring_at + i * T::STAGE_BYTES);
    let_successor_start();

    W w(__shfl_sync(~0u, threadIdx.x / 32, 0)); // known to be the same for all lanes
    const bool options = p.bias.data || p.alibi_slopes.data || p.mask.data;
    const int groups = (p.dim_qk + 63) / 64;
    uint32_t offset = 0;
#pragma unroll 1
    for (int step = part.first; step < part.end; ++step) {
        const int key = ring.first_key(step);
        const uint32_t stage = ring_at + offset;
        copy_wait<(STAGES > 2 ? STAGES - 2 : 0)>();
        __syncthreads(); // keys of this step are there, and all warps are done with the step before
        if (T::ALTERNATE) {
            ring.load_values(step, stage);
            ring.look_up(step + 1);
            copy_commit();
        } else {
            ring.load_stage(step + STAGES - 1, offset == 0
                                                   ? ring_at + T::RING_BYTES - T::STAGE_BYTES
                                                   : stage - T::STAGE_BYTES);
        }
        uint32_t k_at[W::H];
#pragma unroll
        for (int n = 0; n < W::H; ++n)
            k_at[n] = w.keys_at(stage, n);
        w.multiply_keys(w.queries_at(q_tile), k_at, groups);
        w.trade(probs);
        w.to_exponents(p);
        if (options)
            w.options(p, seq, rows, count, key);
        if (key < part.clean_first || key + BN > part.clean_end)
            w.mask(p, seq, rows, key);
        w.follow_maxima(stats);
        w.exponentials(w.prob_to(p_tile));
        if (T::ALTERNATE)
            copy_wait<0>();
        __syncthreads(); // probabilities and values are there, and all warps are done with the keys
        if (T::ALTERNATE) {
            ring.load_keys(step + 1, stage);
            copy_commit();
        }
        w.add_values(W::probs_at(p_tile), w.values_at(stage + (VIEW ? 0 : T::K_BYTES)));
        offset = offset + T::STAGE_BYTES == T::RING_BYTES ? 0 : offset + T::STAGE_BYTES;
    }
    copy_wait<0>();
    __syncthreads(); // the output takes the place of queries and ring
    w.leave((float *)shared, stats.parts);
    __syncthreads();
    store_rows<E, DV, T>(dp, seq, rows, count, (tile * (int64_t)dp.splits + split) * ROWS,
                         (const float *)shared, stats.parts, stats.top, threadIdx.x / 32);
}
