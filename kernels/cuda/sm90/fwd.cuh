/*
 * Attention forward for Hopper: O = softmax(scale Q K^T + mask) V, f16 or bf16 in, f32 sums. docs/cuda-sm90.md draws
 * the schedule.
 *
 * One block per SM walks over tiles of 64 * kWarpgroups query rows. A producer warp brings Q, K and V tiles to shared
 * memory by TMA; each consumer warpgroup owns 64 rows, keeps S, P and O in registers, and runs
 *     S' = Q K(n-1)^T and O += P V(n)   on the tensor cores, while
 *     softmax(S')                       runs on the other warpgroup's time (ping-pong) and under its own P V.
 * Key tiles are walked from the last to the first.
 */
#ifndef DLATTN_CUDA_FWD_SM90_CUH_
#define DLATTN_CUDA_FWD_SM90_CUH_

#include "params.h"
#include "ptx.cuh"

namespace sm90 {

template <typename E, int DimQk, int DimV, int TileK, int Warpgroups, int Stages, int QueryStages,
          bool Softcap, bool PingPong, int Early, bool Track = false>
struct Config {
    using Element = E;
    static constexpr int kDimQk = DimQk,
                         kDimV = DimV; /* multiples of 16 and of 32; smaller ones are zero filled */
    static constexpr int kTileK = TileK, kWarpgroups = Warpgroups, kStages = Stages,
                         kQueryStages = QueryStages;
    static constexpr bool kSoftcap = Softcap, kPingPong = PingPong, kTrack = Track;
    static constexpr int kEarly =
        Early; /* eighths of the exponentials that run before P V is complete */

    static constexpr int kTileQ = 64 * kWarpgroups;
    static constexpr int kThreads = 128 * (kWarpgroups + 1);
    static constexpr int kProducerRegisters = kWarpgroups == 1 ? 56 : kWarpgroups == 3 ? 32 : 24;
    static constexpr int kConsumerRegisters = kWarpgroups == 1   ? 256
                                              : kWarpgroups == 2 ? 240
                                              : kWarpgroups == 3 ? 160
                                                                 : 112;

    /* Tiles in shared memory: columns of 64 elements, swizzled by TMA. */
    static constexpr int kColumnsQk = (kDimQk + 63) / 64, kColumnsV = (kDimV + 63) / 64;
    static constexpr int kQueryBytes = 64 * 128 * kColumnsQk; /* of one warpgroup */
    static constexpr int kKeyColumn = kTileK * 128;
    static constexpr int kKeyBytes = kKeyColumn * kColumnsQk, kValueBytes = kKeyColumn * kColumnsV;
    static constexpr int kQuery = 0, kKey = kQuery + kQueryStages * kWarpgroups * kQueryBytes;
    static constexpr int kValue = kKey + kStages * kKeyBytes,
                         kBarriers = kValue + kStages * kValueBytes;
    static constexpr int kSharedBytes =
        kBarriers + 8 * (2 * kQueryStages * kWarpgroups + 4 * kStages) + 1024; /* 1024 to align */

    static_assert(kTileK % 16 == 0 && kTileK <= 256 && kDimQk % 16 == 0 && kDimV % 32 == 0, "");
    static_assert(kSharedBytes <= 227 * 1024, "");
};

/* ---- What a tile sees ---- */

struct Tile {
    int first_row; /* packed */
    int head, kv_head, batch;
    int q_len, k_len, diagonal;
    int first_block, end_block; /* key tiles to visit */
    int first_whole, end_whole; /* those of them that every row sees whole */
};

/* Length of one sequence: the tensor's value, kept inside the extent. */
__device__ __forceinline__ int sequence_length(const int32_t *lengths, int64_t stride, int batch,
                                               int extent) {
    return lengths ? min(max(__ldg(lengths + batch * stride), 0), extent) : extent;
}

/* x / d for 0 <= x < 2^31. */
__device__ __forceinline__ int divide(int x, const sm90_divisor &d) {
    return static_cast<int>(__umulhi(static_cast<uint32_t>(x), d.multiplier) >> d.shift) +
           (d.multiplier ? 0 : x);
}

/* Tile `index` of the walk. Heads come in groups whose keys and values fit into L2 together; the tiles of a group are
 * ordered by row, downwards and upwards in turn so that equally heavy causal tiles meet where groups do, and the last
 * group ends with its lightest. Blocks that take every gridDim-th tile then get equal work within a percent or so. */
template <class C>
__device__ __forceinline__ Tile tile_at(const sm90_params &p, int index) {
    Tile t;
    const int group = divide(index, p.by_group_tiles);
    const int in_group = index - group * p.heads_per_group * p.tiles_per_head;
    const int group_heads = min(p.heads_per_group, p.heads_total - group * p.heads_per_group);
    const int step =
                  divide(in_group, group < p.groups - 1 ? p.by_group_heads : p.by_last_group_heads),
              head = group * p.heads_per_group + in_group - step * group_heads;
    const bool upwards = (p.groups - group & 1) == 0;
    t.first_row = (upwards ? step : p.tiles_per_head - 1 - step) * C::kTileQ;
    t.batch = divide(head, p.by_heads);
    t.head = head - t.batch * p.heads;
    t.kv_head = divide(t.head, p.by_heads_per_kv);
    t.q_len = sequence_length(p.query_lengths, p.query_lengths_stride, t.batch, p.len_q);
    t.k_len = sequence_length(p.key_lengths, p.key_lengths_stride, t.batch, p.len_k);
    t.diagonal = p.bottom_right ? t.k_len - t.q_len : 0;

    const int first = t.first_row >> p.pack_log2;
    const int last = min((t.first_row + C::kTileQ - 1) >> p.pack_log2, t.q_len - 1);
    const int lowest = max(first + t.diagonal - p.window_left, 0);
    const int highest = min(last + t.diagonal + p.window_right + 1, t.k_len);
    const bool any = first < t.q_len && lowest < highest;
    t.first_block = lowest / C::kTileK;
    t.end_block = any ? (highest + C::kTileK - 1) / C::kTileK : t.first_block;
    const int all_lowest = max(last + t.diagonal - p.window_left, 0);
    const int all_highest = max(min(first + t.diagonal + p.window_right + 1, t.k_len), 0);
    t.first_whole = (all_lowest + C::kTileK - 1) / C::kTileK;
    t.end_whole = all_highest / C::kTileK;
    return t;
}

/* End of the key tiles that some row of a warpgroup sees; at least one is left. */
template <class C>
__device__ __forceinline__ int end_block_of(const sm90_params &p, const Tile &t, int wg) {
    const int last = min((t.first_row + 64 * wg + 63) >> p.pack_log2, t.q_len - 1);
    const int highest = min(last + t.diagonal + p.window_right + 1, t.k_len);
    return max((highest + C::kTileK - 1) / C::kTileK, t.first_block + 1);
}

/* Keys [low, high) that a packed row sees. */
__device__ __forceinline__ void row_bounds(const sm90_params &p, const Tile &t, int row, int &low,
                                           int &high) {
    const int i = row >> p.pack_log2;
    low = max(i + t.diagonal - p.window_left, 0);
    high = i < t.q_len ? min(i + t.diagonal + p.window_right + 1, t.k_len) : 0;
}

/* ---- Pipeline ---- */

/* A ring of kStages buffers with a "full" and an "empty" barrier each. */
template <int kStages>
struct Ring {
    uint32_t full, empty; /* addresses of the first barriers */
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ uint32_t full_barrier() const { return full + 8 * stage; }
    __device__ __forceinline__ uint32_t empty_barrier() const { return empty + 8 * stage; }
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

template <class C>
struct Shared {
    uint32_t base;
    __device__ __forceinline__ uint32_t query(int stage, int wg) const {
        return base + C::kQuery + (stage * C::kWarpgroups + wg) * C::kQueryBytes;
    }
    __device__ __forceinline__ uint32_t key(int stage) const {
        return base + C::kKey + stage * C::kKeyBytes;
    }
    __device__ __forceinline__ uint32_t value(int stage) const {
        return base + C::kValue + stage * C::kValueBytes;
    }
    __device__ __forceinline__ Ring<C::kQueryStages> query_ring(int wg) const {
        return {base + C::kBarriers + 16 * C::kQueryStages * wg,
                base + C::kBarriers + 8 * C::kQueryStages * (2 * wg + 1)};
    }
    __device__ __forceinline__ uint32_t rings() const { return query_ring(C::kWarpgroups).full; }
    __device__ __forceinline__ Ring<C::kStages> key_ring() const {
        return {rings(), rings() + 8 * C::kStages};
    }
    __device__ __forceinline__ Ring<C::kStages> value_ring() const {
        return {rings() + 16 * C::kStages, rings() + 24 * C::kStages};
    }
};

template <class C>
__device__ __forceinline__ void init_barriers(const Shared<C> &s) {
    constexpr int kWarps = 4 * C::kWarpgroups;
    for (int wg = 0; wg < C::kWarpgroups; wg++)
        for (int i = 0; i < C::kQueryStages; i++) {
            mbarrier_init(s.query_ring(wg).full + 8 * i, 1);
            mbarrier_init(s.query_ring(wg).empty + 8 * i, 4);
        }
    for (int i = 0; i < C::kStages; i++) {
        mbarrier_init(s.key_ring().full + 8 * i, 1);
        mbarrier_init(s.key_ring().empty + 8 * i, kWarps);
        mbarrier_init(s.value_ring().full + 8 * i, 1);
        mbarrier_init(s.value_ring().empty + 8 * i, kWarps);
    }
    mbarrier_init_fence();
}

/* ---- Producer: one thread ---- */

template <class C>
__device__ __forceinline__ void load_query(const sm90_params &p, const Shared<C> &s,
                                           Ring<C::kQueryStages> ring, const Tile &t, int wg) {
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    mbarrier_expect_bytes(ring.full_barrier(), C::kQueryBytes);
    for (int c = 0; c < C::kColumnsQk; c++)
        tma_load_5d(s.query(ring.stage, wg) + c * 64 * 128, &p.query_map, ring.full_barrier(),
                    64 * c, 0, (t.first_row + 64 * wg) >> p.pack_log2, t.head, t.batch);
}

/* K or V tile `block` into the next free buffer of the ring. */
template <class C, int kColumns>
__device__ __forceinline__ void load_block(const sm90_tensor_map &map, uint32_t dst,
                                           Ring<C::kStages> &ring, const Tile &t, int block) {
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    mbarrier_expect_bytes(ring.full_barrier(), kColumns * C::kKeyColumn);
    for (int c = 0; c < kColumns; c++)
        tma_load_4d(dst + c * C::kKeyColumn, &map, ring.full_barrier(), 64 * c, block * C::kTileK,
                    t.kv_head, t.batch);
    ring.advance();
}

/* The next tile of this block that sees a key, from `index` on; false if there is none. */
template <class C>
__device__ __forceinline__ bool next_tile(const sm90_params &p, int &index, Tile &t) {
    for (; index < p.tiles; index += gridDim.x) {
        t = tile_at<C>(p, index);
        if (t.first_block < t.end_block)
            return true;
    }
    return false;
}

/* Loads in the order in which buffers become free and are needed, across tiles: each V one K later, and Q of the next
 * tile as soon as there is room for it. */
template <class C>
__device__ __forceinline__ void produce(const sm90_params &p, const Shared<C> &s) {
    Ring<C::kStages> keys = s.key_ring(), values = s.value_ring();
    Ring<C::kQueryStages> queries = s.query_ring(0);
    Tile t, next;
    int index = blockIdx.x;
    const auto load_queries = [&](const Tile &of) {
        for (int wg = 0; wg < C::kWarpgroups; wg++) {
            Ring<C::kQueryStages> ring = s.query_ring(wg);
            ring.stage = queries.stage;
            ring.phase = queries.phase;
            load_query<C>(p, s, ring, of, wg);
        }
        queries.advance();
    };
    const auto load_key = [&](const Tile &of, int n) {
        load_block<C, C::kColumnsQk>(p.key_map, s.key(keys.stage), keys, of, n);
    };
    const auto load_value = [&](const Tile &of, int n) {
        load_block<C, C::kColumnsV>(p.value_map, s.value(values.stage), values, of, n);
    };
    bool more = next_tile<C>(p, index, t);
    if (more) {
        load_queries(t);
        load_key(t, t.end_block - 1);
    }
    while (more) {
        index += gridDim.x;
        more = next_tile<C>(p, index, next);
        if (more && C::kQueryStages > 1)
            load_queries(next);
        for (int n = t.end_block - 1; n > t.first_block; n--) {
            load_key(t, n - 1);
            load_value(t, n);
        }
        if (more)
            load_key(next, next.end_block - 1);
        load_value(t, t.first_block);
        if (more && C::kQueryStages == 1)
            load_queries(next);
        t = next;
    }
}

/* ---- Consumer ---- */

/* A warp tells the producer that it has read a buffer. */
__device__ __forceinline__ void release(uint32_t barrier) {
    if ((threadIdx.x & 31) == 0)
        mbarrier_arrive(barrier);
}

/* Ping-pong: the warpgroups issue their GEMMs in turn, so that one's softmax runs under the others' GEMMs. */
template <class C>
__device__ __forceinline__ void wait_turn(int wg) {
    if (C::kPingPong && C::kWarpgroups > 1)
        named_barrier_sync(1 + wg, 256);
}

template <class C>
__device__ __forceinline__ void pass_turn(int wg) {
    if (C::kPingPong && C::kWarpgroups > 1)
        named_barrier_arrive(1 + (wg + 1 == C::kWarpgroups ? 0 : wg + 1), 256);
}

/* Where a warpgroup stands in the rings. */
template <class C>
struct Pipeline {
    int wg;
    Ring<C::kQueryStages> queries;
    Ring<C::kStages> keys, values;
    int unwanted = 0; /* value tiles to pass over before the next one wanted */

    __device__ __forceinline__ Pipeline(const Shared<C> &s, int wg)
        : wg(wg), queries(s.query_ring(wg)), keys(s.key_ring()), values(s.value_ring()) {}
    /* S is complete; `tile_done`: it was the last of its tile. */
    __device__ __forceinline__ void key_read(bool tile_done) {
        release(keys.empty_barrier());
        keys.advance();
        if (tile_done) {
            release(queries.empty_barrier());
            queries.advance();
        }
    }
    __device__ __forceinline__ void value_read() {
        release(values.empty_barrier());
        values.advance();
    }
    /* Passes over `count` key tiles that only rows of other warpgroups see, with the turns for their GEMMs. */
    __device__ __forceinline__ void skip_keys(int count) {
        for (; count > 0; count--) {
            mbarrier_wait(keys.full_barrier(), keys.phase);
            wait_turn<C>(wg);
            pass_turn<C>(wg);
            release(keys.empty_barrier());
            keys.advance();
        }
    }
    __device__ __forceinline__ void skip_values() {
        for (; unwanted > 0; unwanted--) {
            mbarrier_wait(values.full_barrier(), values.phase);
            value_read();
        }
    }
};

/* The 64 query rows of a warpgroup in registers. A thread holds two rows, `half` 0 and 1, eight apart, and of every
 * eight columns two: element 4 * (column / 8) + 2 * half + (column & 1) of its array. (PTX ISA, wgmma D fragment) */
template <class C>
struct Consumer {
    using E = typename C::Element;
    static constexpr int kScores = C::kTileK / 2, kOutputs = C::kDimV / 2;

    float score[kScores];
    float output[kOutputs];
    uint32_t weight[kScores / 2]; /* exp of the scores as pairs of E: the A operand of P V */
    float shift
        [2]; /* what is subtracted from the exponents of 2: a maximum of the row, -inf before its first key */
    float sum[2]; /* of the weights, this thread's part */

    /* S = Q K^T */
    __device__ __forceinline__ void start_scores(uint32_t query, uint32_t key) {
        const Descriptor a(query, 16, 1024), b(key, 16, 1024);
#pragma unroll
        for (int k = 0; k < C::kDimQk / 16; k++)
            Wgmma<E, C::kTileK>::ss(score, a.at(k / 4 * 64 * 128 + 32 * (k % 4)),
                                    b.at(k / 4 * C::kKeyColumn + 32 * (k % 4)), k > 0);
        wgmma_commit();
    }

    /* O += P V */
    __device__ __forceinline__ void start_outputs(uint32_t value) {
        const Descriptor b(value, C::kKeyColumn, 1024);
#pragma unroll
        for (int k = 0; k < C::kTileK / 16; k++)
            Wgmma<E, C::kDimV>::rs(output, weight[4 * k], weight[4 * k + 1], weight[4 * k + 2],
                                   weight[4 * k + 3], b.at(k * 16 * 128));
        wgmma_commit();
    }

    /* Hides keys outside [low, high); `column` = first key of this thread. */
    __device__ __forceinline__ void mask(int column, const int (&low)[2], const int (&high)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int end = high[half] - column, begin = low[half] - column;
#pragma unroll
            for (int i = 0; i < kScores / 2; i++) {
                const int offset = 8 * (i / 2) + i % 2;
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = offset < end && offset >= begin ? s : -INFINITY;
            }
        }
    }

    /* x -> cap * tanh(scale * x / cap), exact to the last bits of f32: tanh(y) = 1 - 2 / (exp(2 y) + 1). */
    __device__ __forceinline__ void cap(float scale, float cap) {
        const float twice = 2.8853900817779268f * scale / cap;
#pragma unroll
        for (int i = 0; i < kScores; i++)
            score[i] = cap - 2 * cap * reciprocal_approx(exp2_approx(score[i] * twice) + 1);
    }

    /* Moves the shift to the maximum of S where that grew by more than 2^8; `factor` is what older results scale by.
     * No branch: wgmmas are in flight, and ptxas waits for them where paths meet. */
    __device__ __forceinline__ void track_maximum(float scale_log2, float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = score[2 * half];
#pragma unroll
            for (int i = 1; i < kScores / 2; i++)
                m = fmaxf(m, score[4 * (i / 2) + 2 * half + i % 2]);
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            const float growth = m * scale_log2 - shift[half];
            const bool grown = growth > 8.f;
            factor[half] = grown ? exp2_approx(-growth) : 1.f;
            shift[half] = grown ? m * scale_log2 : shift[half];
            sum[half] *= factor[half];
        }
    }

    /* S -> 2^(scale_log2 S - shift) for elements [kBegin, kEnd) of the thread; adds them up in `part`. */
    template <int kBegin, int kEnd>
    __device__ __forceinline__ void exponentials(float scale_log2, const float (&offset)[2],
                                                 float (&part)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = kBegin / 2; i < kEnd / 2; i++) {
                float &s = score[4 * (i / 2) + 2 * half + i % 2];
                s = exp2_approx(fmaf(s, scale_log2, -offset[half]));
                part[half] += s;
            }
        }
    }

    /* Weights that came out above the range of E are brought back, and the shift with them. Rare: scores that exceed
     * their row's first ones by 2^14. A weight that overflowed f32 stays infinite; store() sees to its row. */
    __device__ __forceinline__ void limit(float (&part)[2], float (&factor)[2]) {
        constexpr float kLimit = 16384.f;
        factor[0] = factor[1] = 1.f;
        if (!__any_sync(~0u, part[0] > kLimit || part[1] > kLimit))
            return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = fmaxf(part[half], __shfl_xor_sync(~0u, part[half], 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            if (most > kLimit && most < INFINITY) {
                const int exponent = min((__float_as_int(most) >> 23) - 127, 126);
                factor[half] = __int_as_float((127 - exponent) << 23);
                shift[half] += exponent;
                sum[half] *= factor[half];
                part[half] *= factor[half];
            }
        }
#pragma unroll
        for (int i = 0; i < kScores; i++)
            score[i] *= factor[i / 2 % 2];
    }

    __device__ __forceinline__ void rescale_output(const float (&factor)[2]) {
        if (!__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f))
            return;
#pragma unroll
        for (int i = 0; i < kOutputs; i++)
            output[i] *= factor[i / 2 % 2];
    }

    /* Element pairs of S are already in the order of the A fragment. */
    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < kScores / 2; i++)
            weight[i] = pack<E>(score[2 * i], score[2 * i + 1]);
    }

    __device__ __forceinline__ void clear_output() {
#pragma unroll
        for (int i = 0; i < kOutputs; i++)
            output[i] = 0;
    }

    __device__ __forceinline__ void finite_shift(float (&offset)[2]) const {
        offset[0] = shift[0] == -INFINITY ? 0.f : shift[0];
        offset[1] = shift[1] == -INFINITY ? 0.f : shift[1];
    }

    __device__ __forceinline__ void clear_sums() {
        shift[0] = shift[1] = -INFINITY;
        sum[0] = sum[1] = 0;
    }

    template <bool kMasked>
    __device__ __forceinline__ void shape_scores(const sm90_params &p, const Tile &t, int wg,
                                                 int block) {
        if (C::kSoftcap)
            cap(p.scale, p.softcap);
        if (!kMasked)
            return;
        const int row = t.first_row + 64 * wg + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        int low[2], high[2];
        row_bounds(p, t, row, low[0], high[0]);
        row_bounds(p, t, row + 8, low[1], high[1]);
        mask(block * C::kTileK + threadIdx.x % 4 * 2, low, high);
    }

    __device__ __forceinline__ void first(const sm90_params &p, const Shared<C> &s, const Tile &t,
                                          int n, Pipeline<C> &pipe);
    template <bool kMasked, bool kNewTile>
    __device__ __forceinline__ void step(const sm90_params &p, const Shared<C> &s, const Tile &t,
                                         int n, Pipeline<C> &pipe, int finished);
    __device__ __forceinline__ void last(const sm90_params &p, const Shared<C> &s, const Tile &t,
                                         Pipeline<C> &pipe);
    __device__ __forceinline__ void store(const sm90_params &p, const Tile &t, int wg,
                                          const float (&shift)[2], const float (&sum)[2]);
};

/* S and weights of the first key tile of all, n. */
template <class C>
__device__ __forceinline__ void Consumer<C>::first(const sm90_params &p, const Shared<C> &s,
                                                   const Tile &t, int n, Pipeline<C> &pipe) {
    clear_output();
    clear_sums();
    mbarrier_wait(pipe.queries.full_barrier(), pipe.queries.phase);
    mbarrier_wait(pipe.keys.full_barrier(), pipe.keys.phase);
    wgmma_fence();
    start_scores(s.query(pipe.queries.stage, pipe.wg), s.key(pipe.keys.stage));
    wgmma_wait<0>();
    pin(score);
    pipe.key_read(n == t.first_block);
    shape_scores<true>(p, t, pipe.wg, n);
    float factor[2], offset[2];
    track_maximum(p.scale_log2, factor);
    finite_shift(offset);
    exponentials<0, kScores>(p.scale_log2, offset, sum);
    round_weights();
}

/* S of key tile n of tile t, and O of the key tile before, whose weights are ready. If t is new, that one
 * belongs to the tile of index `finished`, whose rows are stored then. */
template <class C>
template <bool kMasked, bool kNewTile>
__device__ __forceinline__ void Consumer<C>::step(const sm90_params &p, const Shared<C> &s,
                                                  const Tile &t, int n, Pipeline<C> &pipe,
                                                  int finished) {
    pipe.skip_values();
    if (kNewTile)
        mbarrier_wait(pipe.queries.full_barrier(), pipe.queries.phase);
    mbarrier_wait(pipe.keys.full_barrier(), pipe.keys.phase);
    wait_turn<C>(pipe.wg);
    pin(output);
    pin(weight);
    wgmma_fence();
    start_scores(s.query(pipe.queries.stage, pipe.wg), s.key(pipe.keys.stage));
    mbarrier_wait(pipe.values.full_barrier(), pipe.values.phase);
    wgmma_fence();
    start_outputs(s.value(pipe.values.stage));
    pass_turn<C>(pipe.wg);
    wgmma_wait<1>();
    pin(score);
    pipe.key_read(n == t.first_block);
    const float finished_shift[2] = {shift[0], shift[1]}, finished_sum[2] = {sum[0], sum[1]};
    if (kNewTile)
        clear_sums();
    shape_scores<kMasked>(p, t, pipe.wg, n);
    constexpr bool kTrack = kMasked || kNewTile || C::kTrack;
    constexpr int kEarly = kScores / 32 * C::kEarly * 4;
    float factor[2], offset[2], part[2] = {0, 0};
    if (kTrack)
        track_maximum(p.scale_log2, factor);
    finite_shift(offset);
    exponentials<0, kEarly>(p.scale_log2, offset, part);
    if (C::kEarly) {
        pin(score);
        hold(s.base, part[0], part[1]);
    }
    wgmma_wait<0>();
    pin(output);
    pin(weight);
    pipe.value_read();
    exponentials<kEarly, kScores>(p.scale_log2, offset, part);
    if (!kTrack)
        limit(part, factor);
    sum[0] += part[0];
    sum[1] += part[1];
    if (!kNewTile)
        rescale_output(factor);
    round_weights();
    if (kNewTile) {
        store(p, tile_at<C>(p, finished), pipe.wg, finished_shift, finished_sum);
        clear_output();
    }
}

/* O of the last key tile of all. */
template <class C>
__device__ __forceinline__ void Consumer<C>::last(const sm90_params &p, const Shared<C> &s,
                                                  const Tile &t, Pipeline<C> &pipe) {
    pipe.skip_values();
    mbarrier_wait(pipe.values.full_barrier(), pipe.values.phase);
    pin(output);
    pin(weight);
    wgmma_fence();
    start_outputs(s.value(pipe.values.stage));
    wgmma_wait<0>();
    pin(output);
    store(p, t, pipe.wg, shift, sum);
}

/* ---- Results ---- */

template <typename E>
__device__ __forceinline__ float to_float(E x);
template <>
__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <typename E>
__device__ __forceinline__ E from_float(float x);
template <>
__device__ __forceinline__ __half from_float(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
    return __float2bfloat16_rn(x);
}

__device__ __forceinline__ int64_t row_offset(const sm90_params &p, const sm90_strides &strides,
                                              const Tile &t, int row) {
    const int head = (t.head << p.pack_log2) + (row & ((1 << p.pack_log2) - 1));
    return t.batch * strides.batch + head * strides.head + (row >> p.pack_log2) * strides.row;
}

template <typename E>
__device__ __forceinline__ void store_lse(const sm90_params &p, const Tile &t, int row, float x) {
    if (!p.lse)
        return;
    const int64_t at = row_offset(p, p.lse_strides, t, row);
    if (p.lse_is_element)
        static_cast<E *>(p.lse)[at] = from_float<E>(x);
    else
        static_cast<float *>(p.lse)[at] = x;
}

/* 4 x 4 transposition over the four threads of a row: register i of thread q becomes register q of thread i. */
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    uint32_t a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1),
             b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
    (odd ? w[0] : w[1]) = a;
    (odd ? w[2] : w[3]) = b;
    a = __shfl_xor_sync(~0u, upper ? w[0] : w[2], 2);
    b = __shfl_xor_sync(~0u, upper ? w[1] : w[3], 2);
    (upper ? w[0] : w[2]) = a;
    (upper ? w[1] : w[3]) = b;
}

/* One row by one warp, key by key, reading only the keys that it sees. A NaN or Inf in the value of a hidden key
 * spoils a tile's products (0 * NaN), so rows that came out non-finite are computed here
 * again; so are those whose weights overflowed. */
template <class C>
__device__ __forceinline__ void exact_row(const sm90_params &p, const Tile &t, int row) {
    using E = typename C::Element;
    constexpr int kQk = (C::kDimQk + 31) / 32, kV = (C::kDimV + 31) / 32;
    const int lane = threadIdx.x & 31;
    int low, high;
    row_bounds(p, t, row, low, high);
    const E *query = static_cast<const E *>(p.query) + row_offset(p, p.query_strides, t, row);
    const E *key = static_cast<const E *>(p.key) + t.batch * p.key_strides.batch +
                   t.kv_head * p.key_strides.head;
    const E *value = static_cast<const E *>(p.value) + t.batch * p.value_strides.batch +
                     t.kv_head * p.value_strides.head;
    float maximum = -INFINITY, sum = 0, output[kV] = {};
    for (int j = low; j < high; j++) {
        float score = 0;
        for (int i = 0; i < kQk; i++)
            if (32 * i + lane < p.dim_qk)
                score += to_float(query[32 * i + lane]) *
                         to_float(key[j * p.key_strides.row + 32 * i + lane]);
        for (int i = 16; i > 0; i /= 2)
            score += __shfl_xor_sync(~0u, score, i);
        if (C::kSoftcap)
            score = p.softcap * tanhf(score * p.scale / p.softcap);
        if (score == -INFINITY)
            continue;
        const float m = fmaxf(maximum, score);
        const float factor = exp2f((maximum - m) * p.scale_log2),
                    weight = exp2f((score - m) * p.scale_log2);
        sum = sum * factor + weight;
        for (int i = 0; i < kV; i++)
            if (32 * i + lane < p.dim_v)
                output[i] = output[i] * factor +
                            weight * to_float(value[j * p.value_strides.row + 32 * i + lane]);
        maximum = m;
    }
    E *out = static_cast<E *>(p.output) + row_offset(p, p.output_strides, t, row);
    for (int i = 0; i < kV; i++)
        if (32 * i + lane < p.dim_v)
            out[32 * i + lane] = from_float<E>(sum == 0 ? 0.f : output[i] / sum);
    if (lane == 0)
        store_lse<E>(p, t, row,
                     sum == 0 ? p.empty_lse
                              : (maximum * p.scale_log2 + log2f(sum)) * 0.69314718055994531f);
}

template <class C>
__device__ __forceinline__ void Consumer<C>::store(const sm90_params &p, const Tile &t, int wg,
                                                   const float (&shift)[2], const float (&sum)[2]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    uint32_t spoilt_threads[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = t.first_row + 64 * wg + 16 * warp + 8 * half + lane / 4;
        int low, high;
        row_bounds(p, t, row, low, high);
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const bool inside = row >> p.pack_log2 < p.len_q;
        const bool empty = low >= high;
        const float normalise = 1.f / total;
        uint32_t poison = 0; /* +0 or -0 in both halves while all is finite */
        uint32_t packed[kOutputs / 4];
#pragma unroll
        for (int i = 0; i < kOutputs / 4; i++) {
            packed[i] = pack<E>(output[4 * i + 2 * half] * normalise,
                                output[4 * i + 2 * half + 1] * normalise);
            poison = multiply_add_zero<E>(packed[i], poison);
            if (empty)
                packed[i] = 0;
        }
        spoilt_threads[half] = __ballot_sync(
            ~0u, inside && !empty &&
                     (poison & 0x7fff7fff || !(total < INFINITY) || shift[half] == -INFINITY));
        const bool spoilt = spoilt_threads[half] >> (lane & ~3) & 15;
        E *out = static_cast<E *>(p.output) + row_offset(p, p.output_strides, t, row);
#pragma unroll
        for (int i = 0; i < kOutputs / 16; i++) {
            uint32_t w[4] = {packed[4 * i], packed[4 * i + 1], packed[4 * i + 2],
                             packed[4 * i + 3]};
            transpose_quad(w);
            const int column = 32 * i + 8 * (lane & 3);
            if (inside && !spoilt && column < p.dim_v)
                *reinterpret_cast<uint4 *>(out + column) = make_uint4(w[0], w[1], w[2], w[3]);
        }
        if (inside && !spoilt && (lane & 3) == 0)
            store_lse<E>(p, t, row,
                         empty ? p.empty_lse : (shift[half] + log2f(total)) * 0.69314718055994531f);
    }
    if (spoilt_threads[0] | spoilt_threads[1])
        for (int i = 0; i < 16; i++)
            if ((i < 8 ? spoilt_threads[0] : spoilt_threads[1]) >> (4 * (i & 7)) & 15)
                exact_row<C>(p, t, t.first_row + 64 * wg + 16 * warp + i);
}

/* Rows of a tile that sees no key. */
template <class C>
__device__ __forceinline__ void store_empty(const sm90_params &p, const Tile &t, int wg) {
    using E = typename C::Element;
    for (int i = threadIdx.x / 16 % 8; i < 64; i += 8) {
        const int row = t.first_row + 64 * wg + i;
        if (row >> p.pack_log2 >= p.len_q)
            break;
        E *out = static_cast<E *>(p.output) + row_offset(p, p.output_strides, t, row);
        for (int column = 8 * (threadIdx.x % 16); column < p.dim_v; column += 128)
            *reinterpret_cast<uint4 *>(out + column) = make_uint4(0, 0, 0, 0);
        if (threadIdx.x % 16 == 0)
            store_lse<E>(p, t, row, p.empty_lse);
    }
}

template <class C>
__device__ __forceinline__ void consume(const sm90_params &p, const Shared<C> &s, int wg) {
    Pipeline<C> pipe(s, wg);
    Consumer<C> rows;
    int previous = -1; /* index of the tile whose output is unfinished */
    if (wg == C::kWarpgroups - 1)
        pass_turn<C>(wg);
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const Tile t = tile_at<C>(p, index);
        if (t.first_block >= t.end_block) {
            store_empty<C>(p, t, wg);
            continue;
        }
        int n = end_block_of<C>(p, t, wg) - 1;
        const bool whole = n >= t.first_whole && n < t.end_whole;
        const int skipped = t.end_block - 1 - n;
        pipe.skip_keys(skipped);
        if (previous < 0)
            rows.first(p, s, t, n, pipe);
        else if (whole)
            rows.template step<false, true>(p, s, t, n, pipe, previous);
        else
            rows.template step<true, true>(p, s, t, n, pipe, previous);
        pipe.unwanted = skipped;
        /* Maxima are tracked until every row has seen a key: up to the first whole tile. */
        const int end_untracked = t.end_block > t.end_whole ? t.end_whole - 1 : t.end_whole;
        for (n--; n >= t.first_block; n--) {
            if (n >= t.first_whole && n < end_untracked)
                rows.template step<false, false>(p, s, t, n, pipe, index);
            else
                rows.template step<true, false>(p, s, t, n, pipe, index);
        }
        previous = index;
    }
    if (previous >= 0)
        rows.last(p, s, tile_at<C>(p, previous), pipe);
}

template <class C>
__device__ __forceinline__ void forward(const sm90_params &p) {
    extern __shared__ char raw[];
    const Shared<C> s{(shared_address(raw) + 1023) & ~1023u};
    const int warpgroup = uniform(threadIdx.x / 128);
    if (threadIdx.x == 0) {
        tma_prefetch_map(&p.query_map);
        tma_prefetch_map(&p.key_map);
        tma_prefetch_map(&p.value_map);
        init_barriers<C>(s);
    }
    __syncthreads();
    if (warpgroup == 0) {
        registers_decrease<C::kProducerRegisters>();
        if (threadIdx.x == 0)
            produce<C>(p, s);
    } else {
        registers_increase<C::kConsumerRegisters>();
        consume<C>(p, s, warpgroup - 1);
    }
}

} // namespace sm90

#endif /* DLATTN_CUDA_FWD_SM90_CUH_ */
