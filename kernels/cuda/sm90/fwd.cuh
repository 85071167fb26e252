// Attention forward for Hopper: O = softmax(scale Q K^T + mask) V, f16 or bf16 in, f32 sums. docs/cuda-sm90.md draws
// the schedule.
//
// One block per SM walks over tiles of 64 * WARPGROUPS query rows. Two producer warps bring Q, K and V tiles to shared
// memory by TMA; each consumer warpgroup owns 64 rows, keeps S, P and O in registers, and runs
//     S' = Q K(n+1)^T and O += P V(n)   on the tensor cores, while
//     softmax(S')                       runs on the other warpgroup's time (ping-pong) and under its own P V.
// Key tiles are walked from the first to the last, so that tiles of one head read the same ones at the same time.
#pragma once

#include "kernels/cuda/sm90/distances.cuh"

// The 64 query rows of a warpgroup in registers. A thread holds two rows, `half` 0 and 1, eight apart, and of every
// eight columns two: element 4 * (column / 8) + 2 * half + (column & 1) of its array. (PTX ISA, wgmma D fragment)
template <class C>
struct Consumer {
    using E = typename C::Element;
    static constexpr int SCORES = C::TILE_K / 2, OUTPUTS = C::DIM_V / 2;
    // Are the rows of a tile stored before the next one begins? Else in its first step: values meet their weights one step later. ALONE never
    // begins another one, so last() need not give its values back.
    static constexpr bool ENDS_TILES = C::IS_ALONE;

    float score[SCORES];
    float output[OUTPUTS];
    uint32_t weight[SCORES / 2]; // exp of the scores as pairs of E: the A operand of P V
    // What is subtracted from the exponents of 2: a maximum of the row, -inf before its first key.
    float top[2];
    float sum[2];                   // of the weights, this thread's part
    bool fresh;                     // O holds nothing of this tile yet
    Distances<C> distances;         // ALIBI
    uint32_t early[SCORES / 4 + 4]; // ANY: of the mask, see fetch()
    bool cut;                       // HAS_EXPONENTS: something of the tile is hidden, see look()
    float part[2];                  // of the sum, of the step's key tile

    // S = Q K^T, plus what keys lose: see write_distances().
    __device__ __forceinline__ void start_scores(const Shared<C> &s, const Pipeline<C> &pipe) {
        const Descriptor a(s.query(pipe.queries.stage, pipe.wg), 16, 1024),
            b(s.key(pipe.keys.stage), 16, 1024);
        if constexpr (C::MULTIPLIES_DISTANCES)
            Wgmma<__nv_bfloat16, C::TILE_K>::template rs<0>(
                score, distances.parts[0], distances.parts[1], 0, 0,
                plain_descriptor(s.base + C::DISTANCES, 128), false);
#pragma unroll
        for (int k = 0; k < C::DIM_QK / 16; k++)
            Wgmma<E, C::TILE_K>::ss(score, a.at(k / 4 * 64 * 128 + 32 * (k % 4)),
                                    b.at(k / 4 * C::KEY_COLUMN + 32 * (k % 4)),
                                    C::MULTIPLIES_DISTANCES || k > 0);
        wgmma_commit();
    }

    // O += P V, or O = P V for the first key tile.
    __device__ __forceinline__ void start_outputs(uint32_t value) {
        const Descriptor b(value, C::KEY_COLUMN, 1024);
#pragma unroll
        for (int k = 0; k < C::TILE_K / 16; k++)
            Wgmma<E, C::DIM_V>::rs(output, weight[4 * k], weight[4 * k + 1], weight[4 * k + 2],
                                   weight[4 * k + 3], b.at(k * 16 * 128), k > 0 || !fresh);
        wgmma_commit();
    }

    // Keys of this thread, two of every eight, among the first `count` from its first one on.
    static __device__ __forceinline__ int keys_before(int count) {
        const int inside = min(max(count, 0), C::TILE_K);
        return inside / 8 * 2 + min(inside % 8, 2);
    }

    // One bit for each key of this thread in [low, high); `column` = its first key.
    static __device__ __forceinline__ uint32_t keys_between(int column, int low, int high) {
        const int begin = keys_before(low - column), end = keys_before(high - column);
        return ones(begin, max(end - begin, 0));
    }

    // Hides the keys whose bit is 0.
    __device__ __forceinline__ void mask(const uint32_t (&visible)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < SCORES / 2; i++) {
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = visible[half] >> i & 1 ? s : -INFINITY;
            }
        }
    }

    // ---- Softcap: by parts of the scores, as there are no registers for the polynomials of all ----

    static constexpr int PARTS = 4, PART = SCORES / PARTS;

    // The largest square of a part's scores; floats that are not negative are in the order of their bits, three of which are compared at once.
    __device__ __forceinline__ int find_squares(int part, float (&square)[PART]) const {
        int most[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < PART; i++)
            square[i] = score[PART * part + i] * score[PART * part + i];
#pragma unroll
        for (int i = 0; i < PART; i += 2)
            most[i / 2 % 2] = __vimax3_s32(most[i / 2 % 2], __float_as_int(square[i]),
                                           __float_as_int(square[i + 1]));
        return max(most[0], most[1]);
    }
    static __device__ __forceinline__ bool are_within(int most, float limit) {
        return !__any_sync(~0u, most > __float_as_int(limit));
    }

    // By what a score is to be multiplied to be capped, as a power of 2, and a capped one beyond the polynomial: tanh(y) = 1 - 2 / (exp(2 y) + 1)
    // is exact to the last bits of f32, but takes two more results of the special function unit.
    static __device__ __forceinline__ float cap_factor(const sm90_cap &cap, float x) {
        const float square = x * x;
        float y = cap.polynomial[3];
#pragma unroll
        for (int k = 2; k >= 0; k--)
            y = fmaf(y, square, cap.polynomial[k]);
        return y;
    }
    static __device__ __forceinline__ float capped(float x, float twice, float most) {
        return most - 2 * most * reciprocal_approx(exp2_approx(x * twice) + 1);
    }

    // x -> cap * tanh(scale * x / cap), as exponents of 2.
    __device__ __forceinline__ void cap(const sm90_params &p) {
        bool within[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            float most[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < PART; i++)
                most[i % 2] = fmaxf(most[i % 2], fabsf(score[PART * part + i]));
            const float of_part = fmaxf(most[0], most[1]);
            within[part] = !__any_sync(~0u, of_part * of_part > p.cap.polynomial_limit);
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (__builtin_expect(!within[part], false)) {
                // A division may end in a call. Without one ptxas loads a bias up here, and has no registers for that.
                const float twice = 2 * LOG2E * p.scale / p.softcap;
#pragma unroll
                for (int i = PART * part; i < PART * (part + 1); i++)
                    score[i] = capped(score[i], twice, p.cap.most);
                continue;
            }
#pragma unroll
            for (int i = PART * part; i < PART * (part + 1); i++)
                score[i] *= cap_factor(p.cap, score[i]);
        }
    }

    // The same with exponentials(), where scores are mostly small: see sm90_cap. The exponentials of one part stand in one block of code with
    // the squares of the second next, since one waits for other units than the other.
    __device__ __forceinline__ void
    capped_exponentials(const sm90_params &p, const float (&offset)[2], float (&sums)[2]) {
        // From a shuffle, as constants would be loaded anew for each part.
        const float line[2] = {__shfl_sync(~0u, p.cap.line[0], 0),
                               __shfl_sync(~0u, p.cap.line[1], 0)};
        const auto take = [&](int i, float x, float y) {
            score[i] = fmaf(x, y, -offset[i / 2 % 2]);
        };
        float square[2][PART];
        int most[2];
        bool is_small[2];
        const auto look = [&](int part) {
            most[part % 2] = find_squares(part, square[part % 2]);
            is_small[part % 2] = are_within(most[part % 2], p.cap.line_limit);
        };
        const auto weigh = [&](int part) {
#pragma unroll
            for (int i = PART * part; i < PART * (part + 1); i++) {
                score[i] = exp2_approx(score[i]);
                sums[i / 2 % 2] += score[i];
            }
        };
        look(0);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (part + 1 < PARTS)
                look(part + 1);
            if (part > 0)
                weigh(part - 1);
            if (__builtin_expect(!is_small[part % 2], false)) {
                const bool within = are_within(most[part % 2], p.cap.polynomial_limit);
#pragma unroll
                for (int i = PART * part; i < PART * (part + 1) && within; i++)
                    take(i, score[i], cap_factor(p.cap, score[i]));
#pragma unroll
                for (int i = PART * part; i < PART * (part + 1) && !within; i++)
                    take(i, capped(score[i], p.cap.twice, p.cap.most), 1);
                continue;
            }
#pragma unroll
            for (int i = 0; i < PART; i++)
                take(PART * part + i, score[PART * part + i],
                     fmaf(square[part % 2][i], line[1], line[0]));
        }
        weigh(PARTS - 1);
    }

    // The largest score of a row that this thread has. Four maxima side by side: one would be a chain of SCORES / 2 instructions.
    __device__ __forceinline__ float maximum(int half) const {
        float m4[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < SCORES / 2; i++)
            m4[i % 4] = fmaxf(m4[i % 4], score[4 * (i / 2) + 2 * half + i % 2]);
        return fmaxf(fmaxf(m4[0], m4[1]), fmaxf(m4[2], m4[3]));
    }

    // The largest of the four threads of a row.
    static __device__ __forceinline__ float largest(float x) {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
    }

    // Moves the top to the maximum of S where that grew by more than 2^8; `factor` is what older results scale by.
    // No branch: wgmmas are in flight, and ptxas waits for them where paths meet.
    // `shift`: what a score has not lost yet, as an exponent of 2.
    __device__ __forceinline__ void track_maximum(float scale_log2, const float (&shift)[2],
                                                  float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float own = maximum(half);
            const float m = largest(C::HAS_ALIBI ? own * scale_log2 - shift[half] : own),
                        scale = C::HAS_ALIBI ? 1 : scale_log2;
            const float growth = m * scale - top[half];
            const bool grown = growth > 8.f;
            factor[half] = grown ? exp2_approx(-growth) : 1.f;
            top[half] = grown ? m * scale : top[half];
            sum[half] *= factor[half];
        }
    }

    // S -> 2^(scale_log2 S - offset), and their sums in `part`.
    __device__ __forceinline__ void exponentials(float scale_log2, const float (&offset)[2],
                                                 float (&part)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < SCORES / 2; i++) {
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = exp2_approx(fmaf(s, scale_log2, -offset[half]));
                part[half] += s;
            }
        }
    }

    // What a thread's sum of a key tile's weights may come to, and the exponent that one beyond it is brought back to. No float8 weight
    // exceeds the sum that it is in, so that none saturates.
    static constexpr bool LAGS = C::HAS_ALIBI && Distances<C>::LAG > 14;
    static constexpr float LIMIT = C::IS_FLOAT8 ? 448.f : LAGS ? 0x1p78f : 0x1p14f;
    // With ALiBi, where top is a guess, sums below this are brought back as well.
    static constexpr float LEAST = LAGS ? 0x1p-60f : 0x1p-12f;
    static constexpr int LIMITED_LOG2 = C::IS_FLOAT8 ? 6 : 0;

    template <bool SHRINKS = C::HAS_ALIBI>
    __device__ __forceinline__ bool is_outside(const float (&part)[2]) const {
        bool outside = part[0] > LIMIT || part[1] > LIMIT;
        if (SHRINKS)
            outside |= sum[0] + part[0] < LEAST || sum[1] + part[1] < LEAST;
        return outside;
    }

    // Weights that came out above the range of E are brought back, and the top with them. Rare: scores that exceed
    // their row's first ones by 2^14. A weight that overflowed f32 stays infinite; store_rows() sees to it.
    __device__ __forceinline__ void limit(float (&part)[2], float (&factor)[2]) {
        factor[0] = factor[1] = 1.f;
        if (__builtin_expect(!__any_sync(~0u, is_outside(part)), true))
            return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = largest(part[half]);
            bool moves = most > LIMIT && most < INFINITY;
            if constexpr (C::HAS_ALIBI) {
                const float all = largest(sum[half] + part[half]);
                if (all < LEAST && all > ALIBI_LOST) {
                    most = all;
                    moves = true;
                }
            }
            if (moves) {
                const int exponent = min((__float_as_int(most) >> 23) - 127, 126) - LIMITED_LOG2;
                factor[half] = __int_as_float((127 - exponent) << 23);
                top[half] += exponent;
                sum[half] *= factor[half];
                part[half] *= factor[half];
            }
        }
#pragma unroll
        for (int i = 0; i < SCORES; i++)
            score[i] *= factor[i / 2 % 2];
    }

    __device__ __forceinline__ void rescale_output(const float (&factor)[2]) {
        if (__builtin_expect(!__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f), true))
            return;
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++)
            output[i] *= factor[i / 2 % 2];
    }

    // Element pairs of S are already in the order of the A fragment.
    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < SCORES / 2; i++)
            weight[i] = pack<E>(score[2 * i], score[2 * i + 1]);
    }

    __device__ __forceinline__ void clear_output() {
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++)
            output[i] = 0;
        fresh = true;
    }

    // From a score, as shape_scores() leaves it, to an exponent of 2.
    static __device__ __forceinline__ float exponent_scale(const sm90_params &p) {
        return C::IS_ANY                            ? p.exponent_scale
               : C::HAS_EXPONENTS || C::HAS_SOFTCAP ? 1.f
                                                    : p.scale_log2;
    }

    __device__ __forceinline__ void finite_top(const float (&shift)[2], float (&offset)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            offset[half] = top[half] == -INFINITY ? 0.f : top[half];
            if (C::HAS_ALIBI)
                offset[half] += shift[half];
        }
    }

    __device__ __forceinline__ void clear_sums() {
        top[0] = top[1] = -INFINITY;
        sum[0] = sum[1] = 0;
    }

    // ---- HAS_EXPONENTS: options that change scores one by one ----

    // Whether tile n is cut, before anything of it is fetched: also where rows are behind the sequence's last.
    __device__ __forceinline__ void look(const sm90_params &p, const Tile<C> &t, int wg, int n) {
        cut = (t.first_row + 64 * wg + 63) >> p.pack_log2 >= t.q_len;
        if constexpr (C::IS_ANY)
            cut |= p.seen && !sees_all(p, t.seen, n);
    }

    // The mask of tile n, asked for before the tensor cores begin with its scores. The four threads of a row read its chunks of eight
    // keys in turn; keys behind the tensor's end are hidden, and get those of its last ones.
    static constexpr int CHUNKS = (C::TILE_K / 8 + 3) / 4;
    __device__ __forceinline__ void fetch(const sm90_params &p, const Tile<C> &t, int wg, int n) {
        if (!p.mask.data || !cut)
            return;
        const int row = first_row_of_thread<C>(t, wg), column = n * C::TILE_K + threadIdx.x % 4 * 8,
                  last = p.len_k - 1;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint8_t *const from = static_cast<const uint8_t *>(p.mask.data) +
                                        t.batch * p.mask.batch + t.head * p.mask.head +
                                        min(row + 8 * half, p.len_q - 1) * p.mask.row;
            uint32_t *const to = early + 2 * CHUNKS * half;
            if (p.mask.is_wide) {
#pragma unroll
                for (int m = 0; m < CHUNKS; m++) {
                    const uint2 w = __ldg(
                        reinterpret_cast<const uint2 *>(from + min(column + 32 * m, last - 7)));
                    to[2 * m] = w.x;
                    to[2 * m + 1] = w.y;
                }
            } else {
#pragma unroll
                for (int m = 0; m < 2 * CHUNKS; m++) {
                    to[m] = 0;
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        to[m] |= __ldg(from +
                                       min(column + m / 2 * 32 + m % 2 * 4 + i, last) * p.mask.key)
                                 << 8 * i;
                }
            }
        }
    }

    // Of four bytes those that are not 0, as four bits.
    static __device__ __forceinline__ uint32_t bits_of(uint32_t bytes) {
        const uint32_t high = ((bytes & 0x7f7f7f7f) + 0x7f7f7f7f) | bytes;
        return (high >> 7 & 0x01010101) * 0x10204080u >> 28;
    }

    // Bits of this thread's keys from the chunks that the four threads of its row have read.
    static __device__ __forceinline__ uint32_t gather(const uint32_t *words) {
        uint32_t chunks = 0, visible = 0;
#pragma unroll
        for (int m = 0; m < CHUNKS; m++)
            chunks |= (bits_of(words[2 * m]) | bits_of(words[2 * m + 1]) << 4) << 8 * m;
#pragma unroll
        for (int lane = 0; lane < 4; lane++) {
            const uint32_t of_lane = __shfl_sync(~0u, chunks, (threadIdx.x & 28) + lane);
            visible |= (of_lane >> threadIdx.x % 4 * 2 & 0x03030303) << 2 * lane;
        }
        return visible;
    }

    // Keeps the bits of keys that mask and segments leave to rows `row` and `row` + 8.
    __device__ __forceinline__ void hide(const sm90_params &p, const Tile<C> &t, int row, int n,
                                         uint32_t (&visible)[2]) {
        if (p.mask.data) {
            visible[0] &= gather(early);
            visible[1] &= gather(early + 2 * CHUNKS);
        }
        if (p.query_segments) {
            const int first = query_segment(p, t, row), second = query_segment(p, t, row + 8);
            uint32_t same[2] = {0, 0};
#pragma unroll 4
            for (int i = 0; i < SCORES / 2; i++) {
                const int j = n * C::TILE_K + threadIdx.x % 4 * 2 + i / 2 * 8 + i % 2;
                const int segment = key_segment(p, t, min(j, t.k_len - 1));
                same[0] |= static_cast<uint32_t>(segment == first) << i;
                same[1] |= static_cast<uint32_t>(segment == second) << i;
            }
            visible[0] &= same[0];
            visible[1] &= same[1];
        }
    }

    // Each score x becomes change(x, half, i): of key i of the thread, counted as bits are.
    template <typename Change>
    __device__ __forceinline__ void each_score(Change change) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < SCORES / 2; i++) {
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = change(s, half, i);
            }
    }

    // Adds a bias element by element. Rows and keys behind the tensor's end, which are hidden, get those of its last ones.
    template <typename B>
    __device__ __forceinline__ void load_bias(const sm90_params &p, const Tile<C> &t, int row,
                                              int n) {
        const B *const head =
            static_cast<const B *>(p.bias.data) + t.batch * p.bias.batch + t.head * p.bias.head;
        const B *const rows[2] = {head + min(row, p.len_q - 1) * p.bias.row,
                                  head + min(row + 8, p.len_q - 1) * p.bias.row};
        const int column = n * C::TILE_K + threadIdx.x % 4 * 2;
        each_score([&](float x, int half, int i) {
            const int64_t at = min(column + i / 2 * 8 + i % 2, p.len_k - 1) * p.bias.key;
            return __fmaf_rz(float(__ldg(rows[half] + at)), LOG2E, x);
        });
    }

    // The options one after the other. Leaves exponents of 2, rounded towards zero: they end at FLT_MAX, as -inf hides a key. Without
    // options of these they stay scores, see exponent_scale().
    __device__ __forceinline__ void change_scores(const sm90_params &p, const Tile<C> &t, int row,
                                                  int n) {
        if (p.softcap > 0)
            cap(p);
        else if (C::LOADS_BIAS || p.alibi_slopes)
            each_score([&](float x, int, int) { return __fmul_rz(x, p.scale_log2); });
        if constexpr (C::LOADS_BIAS) {
            if (p.bias_is_f32)
                load_bias<float>(p, t, row, n);
            else
                load_bias<E>(p, t, row, n);
        }
        if (p.alibi_slopes) {
            const int met = met_key<C>(p, t, row) - n * C::TILE_K - threadIdx.x % 4 * 2;
            const float distance[2] = {
                static_cast<float>(met),
                static_cast<float>(met + met_key<C>(p, t, row + 8) - met_key<C>(p, t, row))};
            const float slopes[2] = {slope_of<C>(p, t, row) * LOG2E,
                                     slope_of<C>(p, t, row + 8) * LOG2E};
            each_score([&](float x, int half, int i) {
                return __fmaf_rz(-slopes[half], fabsf(distance[half] - (i / 2 * 8 + i % 2)), x);
            });
        }
    }

    // ---- BIAS, BIAS_F32 ----

    // change_scores() where a bias is all that does. Its boxes hold the rows as the tensor does, or one that all have in common.
    __device__ __forceinline__ void add_bias(const sm90_params &p, const Shared<C> &s,
                                             Pipeline<C> &pipe) {
        constexpr int PART = C::BIAS_KEYS / 2; // scores of a thread
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        each_score([&](float x, int, int) { return __fmul_rz(x, p.scale_log2); });
#pragma unroll
        for (int first = 0; first < SCORES; first += PART) {
            mbarrier_wait(s.bias_full(pipe.biases, pipe.wg), s.bias_phase(pipe.biases));
            const uint32_t box = s.bias(pipe.biases, pipe.wg);
            if constexpr (sizeof(typename C::Bias) == 2) {
                const int row = p.bias.row ? 16 * warp + lane % 16 : 0;
                const uint32_t of_lane = box + row * 128 + ((lane / 16 ^ row % 8) << 4);
#pragma unroll
                for (int i = 0; i < PART; i += 8) {
                    uint32_t pairs[4];
                    load_matrices(pairs, of_lane ^ i / 8 << 5);
#pragma unroll
                    for (int k = 0; k < 8; k += 2) {
                        const float2 b = widen_pair<E>(pairs[k / 2]);
                        add_bias(first + i + k, b);
                    }
                }
            } else {
                const int row = p.bias.row ? 16 * warp + lane / 4 : 0,
                          next = p.bias.row ? 8 * 128 : 0;
                const uint32_t of_lane =
                    box + row * 128 + ((lane / 2 % 2 ^ row % 8) << 4) + lane % 2 * 8;
#pragma unroll
                for (int i = 0; i < PART; i += 4) {
                    const uint32_t at = (of_lane ^ i / 4 % 4 << 5) + i / 16 * C::BIAS_BOX;
                    add_bias(first + i, load_pair(at));
                    add_bias(first + i + 2, load_pair(at + next));
                }
            }
            __syncwarp();
            release(s.bias_empty(pipe.biases++, pipe.wg));
        }
    }
    __device__ __forceinline__ void add_bias(int i, float2 bias) {
        score[i] = __fmaf_rz(bias.x, LOG2E, score[i]);
        score[i + 1] = __fmaf_rz(bias.y, LOG2E, score[i + 1]);
    }

    // Whether the first scores of a tile, those of key tile n, need it. Most rows see all of their first key tile; a branch costs less than code of its
    // own for those that do not, which comes from device memory.
    static __device__ __forceinline__ bool is_shaped(const Tile<C> &t, int n) {
        return C::SHAPES_SCORES || n < t.first_whole || n >= t.end_whole;
    }

    template <bool MASKED, bool TRACK>
    __device__ __forceinline__ void shape_scores(const sm90_params &p, const Shared<C> &s,
                                                 const Tile<C> &t, int block, Pipeline<C> &pipe,
                                                 float (&shift)[2]) {
        const int wg = pipe.wg, row = first_row_of_thread<C>(t, wg);
        if (C::HAS_SOFTCAP && (MASKED || TRACK))
            cap(p); // else capped_exponentials() does
        if constexpr (C::HAS_ALIBI) {
            if (MASKED && distances.bends)
                distances.lose(p, t, wg, block, score, shift);
            else
                distances.lose_line(p, score, shift);
        }
        if constexpr (C::IS_ANY) {
            change_scores(p, t, row, block);
        }
        if constexpr (C::COPIES_BIAS)
            add_bias(p, s, pipe);
        if constexpr (C::HAS_EXPONENTS) {
            if (block >= t.first_whole && block < t.end_whole && !cut)
                return;
        }
        if constexpr (MASKED) {
            uint32_t visible[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = block * C::TILE_K + threadIdx.x % 4 * 2;
                int low, high;
                row_bounds(p, t, row + 8 * half, low, high);
                visible[half] = keys_between(column, low, high);
            }
            if constexpr (C::IS_ANY) {
                if (cut)
                    hide(p, t, row, block, visible);
            }
            mask(visible);
        }
    }

    __device__ __forceinline__ void first(const sm90_params &p, const Shared<C> &s,
                                          const Tile<C> &t, int n, Pipeline<C> &pipe);
    template <bool MASKED, bool NEW_TILE, bool TRACK, bool MOVES = true>
    __device__ __forceinline__ bool step(const sm90_params &p, const Shared<C> &s, const Tile<C> &t,
                                         int n, Pipeline<C> &pipe, const Place<C> &finished);
    __device__ __forceinline__ void shrink();
    __device__ __forceinline__ void finish_outputs(const Shared<C> &s, const Pipeline<C> &pipe);
    __device__ __forceinline__ void last(const sm90_params &p, const Shared<C> &s,
                                         const Place<C> &t, const Pipeline<C> &pipe);
};

// S and weights of the first key tile of all, n.
template <class C>
__device__ __forceinline__ void Consumer<C>::first(const sm90_params &p, const Shared<C> &s,
                                                   const Tile<C> &t, int n, Pipeline<C> &pipe) {
    clear_output();
    clear_sums();
    if constexpr (C::IS_ANY)
        fetch(p, t, pipe.wg, n);
    wait_full<C>(pipe.keys);
    wgmma_fence();
    start_scores(s, pipe);
    wgmma_wait<0>();
    pin(score);
    pipe.key_read(n == t.end_block - 1);
    float shift[2] = {0, 0};
    if (is_shaped(t, n))
        shape_scores<true, true>(p, s, t, n, pipe, shift);
    float factor[2], offset[2];
    track_maximum(exponent_scale(p), shift, factor);
    finite_top(shift, offset);
    exponentials(exponent_scale(p), offset, sum);
    round_weights();
}

// S of key tile n of tile t, and O of the key tile before, whose weights are ready. If t is new, that one
// belongs to the tile `finished`, whose rows are stored then. Whether shrink() is to end the step, see SHRINKS_OUTSIDE.
template <class C>
template <bool MASKED, bool NEW_TILE, bool TRACK, bool MOVES>
__device__ __forceinline__ bool Consumer<C>::step(const sm90_params &p, const Shared<C> &s,
                                                  const Tile<C> &t, int n, Pipeline<C> &pipe,
                                                  const Place<C> &finished) {
    if constexpr (C::IS_ANY)
        fetch(p, t, pipe.wg, n);
    wait_full<C>(pipe.keys);
    wait_turn<C>(pipe.wg);
    pin(output);
    pin(weight);
    wgmma_fence();
    start_scores(s, pipe);
    wait_full<C>(pipe.values);
    wgmma_fence();
    start_outputs(s.value(pipe.values.stage));
    fresh = NEW_TILE;
    pass_turn<C>(pipe.wg);
    wgmma_wait<1>();
    pin(score);
    pipe.key_read(n == t.end_block - 1);
    const float finished_top[2] = {top[0], top[1]}, finished_sum[2] = {sum[0], sum[1]};
    if (NEW_TILE)
        clear_sums();
    float factor[2], offset[2], nearer[2];
    if constexpr (C::HAS_ALIBI && !NEW_TILE) {
        distances.template approach<MOVES, !MASKED>(p, t, pipe.wg, n, nearer);
        if (MOVES) {
            sum[0] *= nearer[0];
            sum[1] *= nearer[1];
        }
    }
    float shift[2] = {0, 0};
    if (!NEW_TILE || is_shaped(t, n))
        shape_scores<MASKED, TRACK>(p, s, t, n, pipe, shift);
    part[0] = part[1] = 0;
    if (TRACK)
        track_maximum(exponent_scale(p), shift, factor);
    finite_top(shift, offset);
    if (C::MAKES_NEIGHBOURS && !MASKED && !TRACK)
        make_neighbours(offset);
    if constexpr (C::HAS_SOFTCAP && !MASKED && !TRACK)
        capped_exponentials(p, offset, part);
    else
        exponentials(exponent_scale(p), offset, part);
    pin(score);
    hold(s.base, (sum[0] + part[0]) + (sum[1] + part[1]));
    wgmma_wait<0>();
    pin(output);
    pin(weight);
    pipe.value_read();
    if (C::HAS_ALIBI && !NEW_TILE && MOVES)
        rescale_output(nearer);
    constexpr bool LEAVES_OUT = C::SHRINKS_OUTSIDE && !MASKED && !TRACK;
    constexpr bool SHRINKS = C::HAS_ALIBI && MOVES;
    if (LEAVES_OUT && __any_sync(~0u, is_outside<SHRINKS>(part)))
        return true;
    if (!TRACK && !LEAVES_OUT)
        limit(part, factor);
    sum[0] += part[0];
    sum[1] += part[1];
    if (!NEW_TILE && !LEAVES_OUT)
        rescale_output(factor);
    round_weights();
    if (NEW_TILE)
        store_rows<C>(p, s, pipe.wg, finished, output, finished_top, finished_sum);
    return false;
}

// The end of a step whose weights came out too large.
template <class C>
__device__ __forceinline__ void Consumer<C>::shrink() {
    float factor[2];
    limit(part, factor);
    sum[0] += part[0];
    sum[1] += part[1];
    rescale_output(factor);
    round_weights();
}

// O of the last key tile of all.
template <class C>
__device__ __forceinline__ void Consumer<C>::finish_outputs(const Shared<C> &s,
                                                            const Pipeline<C> &pipe) {
    wait_full<C>(pipe.values);
    pin(output);
    pin(weight);
    wgmma_fence();
    start_outputs(s.value(pipe.values.stage));
    wgmma_wait<0>();
    pin(output);
}
template <class C>
__device__ __forceinline__ void Consumer<C>::last(const sm90_params &p, const Shared<C> &s,
                                                  const Place<C> &t, const Pipeline<C> &pipe) {
    finish_outputs(s, pipe);
    store_rows<C>(p, s, pipe.wg, t, output, top, sum);
}

// Key tiles from n on, before `end`, all of them whole.
template <class C, class Rows>
__device__ __forceinline__ void whole_steps(Rows &rows, const sm90_params &p, const Shared<C> &s,
                                            const Tile<C> &t, int &n, int end, Pipeline<C> &pipe) {
    if constexpr (C::SHRINKS_OUTSIDE) {
        for (bool large = true; large;) {
            large = false;
            if constexpr (C::HAS_ALIBI) {
                while (n < end && !large) {
                    const int between = rows.distances.steps_between;
                    if (between > 0)
                        large = rows.template step<false, false, false>(p, s, t, n++, pipe, t);
                    const int end_near = between > 0 ? min(n + between - 1, end) : end;
#pragma unroll 1
                    for (; n < end_near && !large; n++)
                        large = rows.template step<false, false, false, false>(p, s, t, n, pipe, t);
                }
            } else {
#pragma unroll 1
                for (; n < end && !large; n++)
                    large = rows.template step<false, false, false>(p, s, t, n, pipe, t);
            }
            if (large)
                rows.shrink();
        }
    } else {
#pragma unroll 1
        for (; n < end; n++)
            rows.template step<false, false, false>(p, s, t, n, pipe, t);
    }
}

template <class C, class Rows = Consumer<C>>
__device__ __forceinline__ void consume(const sm90_params &p, const Shared<C> &s, int wg) {
    Pipeline<C> pipe(s, wg);
    Rows rows;
    Place<C> previous; // the tile whose output is unfinished
    previous.index = -1;
    int skipped = 0; // key tiles behind its own, whose values are still to pass over
    if (wg == C::WARPGROUPS - 1)
        pass_turn<C>(wg);
    for (;;) {
        mbarrier_wait(pipe.queries.full_barrier(), pipe.queries.phase);
        const Tile<C> t = *s.tile(pipe.queries, wg);
        if (t.index < 0)
            break;
        if (!t.sees_keys()) {
            store_empty<C>(p, t, wg);
            pipe.query_read();
            continue;
        }
        int n = t.first_block;
        if constexpr (C::HAS_ALIBI)
            rows.distances.start(p, t, wg);
        if constexpr (C::HAS_EXPONENTS)
            rows.look(p, t, wg, n);
        if (Rows::ENDS_TILES || previous.index < 0)
            rows.first(p, s, t, n, pipe);
        else
            rows.template step<true, true, true>(p, s, t, n, pipe, previous);
        pipe.skip_values(skipped);
        n = next_block<C>(p, t, n);
        if constexpr (C::HAS_EXPONENTS) {
            for (; n < t.end_block; n = next_block<C>(p, t, n)) {
                rows.look(p, t, wg, n);
                rows.template step<true, false, true>(p, s, t, n, pipe, t);
            }
        } else if constexpr (!C::HAS_LOOPS) {
            int end_whole = t.end_whole;
            if constexpr (C::HAS_ALIBI)
                end_whole = rows.distances.end_of_line(end_whole);
            for (; n < t.end_block; n++) {
                if (n < t.first_untracked)
                    rows.template step<true, false, true>(p, s, t, n, pipe, t);
                else if (n < end_whole)
                    rows.template step<false, false, false>(p, s, t, n, pipe, t);
                else
                    rows.template step<true, false, false>(p, s, t, n, pipe, t);
            }
        } else {
            const bool has_sides = C::HAS_ALIBI && sees_behind(p);
            // All before the first loop: behind it ptxas makes of the same a step that takes 4 % longer at D 128.
            const int end_tracked = min(t.first_untracked, t.end_block);
            int end_whole = min(t.end_whole, t.end_block), end = t.end_block;
            if constexpr (C::HAS_ALIBI)
                end_whole = rows.distances.end_of_line(end_whole);
            if (has_sides)
                end = min(first_behind<C>(p, t, wg), end);
#pragma unroll 1
            for (; n < end_tracked; n++)
                rows.template step<true, false, true>(p, s, t, n, pipe, t);
#pragma unroll 1
            for (bool behind = false;; behind = true) {
                if (C::HAS_ALIBI && rows.distances.bends)
                    rows.distances.lean(true);
                whole_steps<C>(rows, p, s, t, n, end_whole, pipe);
                if (C::HAS_ALIBI && rows.distances.bends)
                    rows.distances.lean(false);
                if (behind)
                    rows.distances.turn(p, t, wg, n);
#pragma unroll 1
                for (; n < end; n++)
                    rows.template step<true, false, false>(p, s, t, n, pipe, t);
                if (!has_sides || behind)
                    break;
                end = t.end_block;
                end_whole = min(end_behind<C>(p, t, wg), end);
                rows.distances.turn(p, t, wg, n);
            }
        }
        if constexpr (C::HAS_ALIBI)
            rows.distances.arrive(p, t, wg, rows.top);
        pipe.skip_keys(t.skipped);
        if constexpr (Rows::ENDS_TILES) {
            // Read once more: to keep it all along takes registers. Its queries are read, so the ring is at the next ones.
            Ring<C::QUERY_STAGES> queries = pipe.queries;
            queries.retreat();
            const Tile<C> finished = *s.tile(queries, wg);
            rows.last(p, s, finished, pipe);
            pipe.skip_values(finished.skipped);
        } else {
            skipped = t.skipped;
            previous = t;
        }
    }
    if (previous.index >= 0)
        rows.last(p, s, previous, pipe);
    if (threadIdx.x % 32 == 0)
        bulk_wait_read<0>(); // buffers live as long as the block
}

// `consume`, of shared memory and a warpgroup: what those do that multiply.
template <class C, class Consume>
__device__ __forceinline__ void forward(const sm90_params &p, const Consume &consume) {
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    const Shared<C> s{base,
                      reinterpret_cast<Tile<C> *>(raw + (base - shared_address(raw) + C::TILES))};
    const int warpgroup = uniform(threadIdx.x / 128);
    if (threadIdx.x == 0) {
        tma_prefetch_map(&p.query_map);
        tma_prefetch_map(&p.key_map);
        tma_prefetch_map(&p.value_map);
        tma_prefetch_map(&p.output_map);
        if (C::COPIES_BIAS)
            tma_prefetch_map(&p.bias_map);
        init_barriers<C>(s);
    }
    if constexpr (C::MULTIPLIES_DISTANCES)
        write_distances<C>(raw + (base - shared_address(raw)));
    if constexpr (C::IS_SPLIT)
        let_successor_start();
    else if (C::IS_PLACED && (p.list || p.seen || p.reach))
        wait_for_predecessor();
    __syncthreads();
    if (warpgroup == 0) {
        registers_decrease<C::PRODUCER_REGISTERS>();
        const int warp = uniform(threadIdx.x / 32);
        if constexpr (C::IS_PACKED) {
            if (warp == 0)
                produce_blocks<C, false>(p, s);
            else if (warp == 2)
                produce_blocks<C, true>(p, s);
            if constexpr (C::COPIES_BIAS) {
                if (warp == 3)
                    produce_bias<C>(p, s);
            }
            if constexpr (C::COPIES_ROWS) {
                if (warp == 3)
                    help_with_rows<C>(p, s);
            }
        } else if (warp == 0) {
            produce_keys<C>(p, s);
        }
        if (warp == 1)
            produce_queries<C>(p, s);
    } else {
        registers_increase<C::CONSUMER_REGISTERS>();
        consume(s, warpgroup - 1);
    }
}

template <class C>
__device__ __forceinline__ void forward(const sm90_params &p) {
    forward<C>(p, [&](const Shared<C> &s, int wg) { consume<C>(p, s, wg); });
}
