// Attention over a latent cache on Hopper, as in the decoding of MLA: value is the first columns of key. docs/cuda-wide.md
//
// A block owns 64 packed rows of one kv head and walks over its split of the keys in tiles of 64. Two warpgroups take the tiles in turn:
//
//     S = Q K^T    the last 64 columns of Q are in registers, since shared memory is full
//     P            stays in registers, and goes to the other warpgroup through shared memory
//     O += P V     by both, 256 columns each
//
// So one's products run while the other looks for maxima and takes exponentials.
#pragma once

#include "kernels/cuda/common/packed.cuh"
#include "kernels/cuda/sm90/latent_params.h"
#include "kernels/cuda/sm90/ptx.cuh"

// Shared memory of a block.
struct LatentShared {
    static constexpr int COLUMN = LATENT_COLUMN_BYTES, QUERY_COLUMNS = LATENT_DV / 64,
                         KEY_COLUMNS = LATENT_D / 64, TILE = KEY_COLUMNS * COLUMN;
    // What tiles of keys come in, and become free in: the columns that are no values, then half of the others each.
    static constexpr int PIECES = 3;
    static constexpr int WEIGHTS = QUERY_COLUMNS * COLUMN, KEYS = WEIGHTS + 2 * COLUMN,
                         STATS = KEYS + 2 * TILE, BARRIERS = STATS + 3 * LATENT_ROWS * 4;
    static_assert(BARRIERS + 32 * PIECES + 64 + 1024 == LATENT_SHARED_BYTES, "");
    // For store_rows(). OUT_PITCH: floats of a row where the output takes the place of queries and keys.
    static constexpr int ROWS = LATENT_ROWS, PARTS = 2, WARPS = 8;
    static constexpr int OUT_PITCH = LATENT_DV + 8;
    static_assert(LATENT_ROWS * OUT_PITCH * 4 <= STATS, "");

    // 64 rows of 64 elements, swizzled as by TMA.
    using Column = Chunks<64>;

    uint32_t base;
    char *memory; // of `base`

    __device__ __forceinline__ uint32_t key(int tile) const { return base + KEYS + tile * TILE; }
    // Columns of 64 of the queries, the last of which is where weights will be.
    __device__ __forceinline__ uint32_t query(int column) const { return base + column * COLUMN; }
    // Of a warpgroup's tiles.
    __device__ __forceinline__ uint32_t weights(int wg) const {
        return base + WEIGHTS + wg * COLUMN;
    }
    __device__ __forceinline__ uint32_t full(int tile, int piece) const {
        return base + BARRIERS + 8 * (PIECES * tile + piece);
    }
    __device__ __forceinline__ uint32_t empty(int tile, int piece) const {
        return full(tile, piece) + 16 * PIECES;
    }
    // Weights of a warp's rows and of a tile of the warpgroup's are there.
    __device__ __forceinline__ uint32_t weighed(int wg, int warp) const {
        return base + BARRIERS + 32 * PIECES + 32 * wg + 8 * warp;
    }
    static __device__ __forceinline__ int first_column(int piece) {
        return piece == 0 ? QUERY_COLUMNS : (piece - 1) * (QUERY_COLUMNS / 2);
    }
    static __device__ __forceinline__ int columns(int piece) {
        return piece == 0 ? KEY_COLUMNS - QUERY_COLUMNS : QUERY_COLUMNS / 2;
    }
    // Of the rows: in the end their sums, as a warpgroup has them, and what these and the output are relative to. Until then, in the place of its
    // sums, what exponents may become before they are brought back, as a warpgroup has found it.
    __device__ __forceinline__ float *stats(int wg) const {
        return reinterpret_cast<float *>(memory + STATS) + wg * LATENT_ROWS;
    }
    __device__ __forceinline__ float *tops() const { return stats(2); }
    __device__ __forceinline__ float *limits(int wg) const { return stats(wg); }
};

// Queries into shared memory by the threads that multiply, with zeros past `count` rows and past the head dim.
template <typename E>
__device__ __forceinline__ void load_latent_queries(const fwd_params &p, const LatentShared &s,
                                                    const Sequence &seq, const Rows &rows,
                                                    int count) {
    constexpr int CHUNKS = LATENT_D / 8;
    for (int x = threadIdx.x - 128; x < LATENT_ROWS * CHUNKS; x += LATENT_THREADS - 128) {
        const int r = x / CHUNKS, chunk = x % CHUNKS, at = min(r, count - 1);
        const E *const from = (const E *)p.query.data + rows.b * p.query.stride[0] +
                              rows.head(at) * p.query.stride[1] +
                              (seq.q_start + rows.query(at)) * p.query.stride[2];
        copy_async(s.query(chunk / 8) + LatentShared::Column::at(r, chunk % 8), from + chunk * 8,
                   r < count && chunk * 8 < p.dim_qk);
    }
    copy_commit();
    copy_wait<0>();
    async_proxy_fence();
}

// Tiles of keys of the part, by one warp. Of pages each lane brings a box; past the last key it is behind its page, so that zeros arrive.
__device__ __forceinline__ void produce_latent(const latent_params &p, const LatentShared &s,
                                               const Rows &rows, const Part &part) {
    const fwd_params &fwd = p.packed.fwd;
    const int lane = threadIdx.x % 32, tiles = part.end - part.first;
    const int first = part.first_key + LATENT_KEYS * part.first + lane * p.box_keys;
    const auto page_of = [&](int key) {
        const fwd_view &table = fwd.block_table;
        return key < part.end_key && lane < p.boxes
                   ? clamped(((const int *)table.data)[rows.b * table.stride[0] +
                                                       key / fwd.page_size * table.stride[1]],
                             0, fwd.pages - 1)
                   : 0;
    };
    int page = fwd.page_size ? page_of(first) : rows.b;
    for (int n = 0; n < tiles; n++) {
        const int key = first + n * LATENT_KEYS, tile = n % 2, here = page;
        if (fwd.page_size)
            page = page_of(key + LATENT_KEYS);
        const int row = !fwd.page_size       ? key
                        : key < part.end_key ? key % fwd.page_size
                                             : fwd.page_size;
        for (int piece = 0; piece < LatentShared::PIECES; piece++) {
            mbarrier_wait(s.empty(tile, piece), n / 2 & 1 ^ 1);
            const int begin = LatentShared::first_column(piece),
                      end = begin + LatentShared::columns(piece);
            if (lane == 0)
                mbarrier_expect_bytes(s.full(tile, piece), (end - begin) * LatentShared::COLUMN);
            __syncwarp();
            if (lane < p.boxes)
                for (int c = begin; c < end; c++)
                    tma_load_4d(s.key(tile) + c * LatentShared::COLUMN + lane * p.box_keys * 128,
                                &p.key_map, s.full(tile, piece), evict_last(), 64 * c, row,
                                rows.kv_head, here);
        }
    }
}

// A warpgroup: 256 columns of the output, and every other tile's scores. A thread has two rows, `half` 0 and 1, eight apart, as in Consumer of
// fwd.cuh.
template <typename E>
struct LatentConsumer {
    static constexpr int SCORES = LATENT_KEYS / 2, OUTPUTS = LATENT_DV / 4;
    using S = LatentShared;

    const latent_params &p;
    const LatentShared &s;
    const int wg, row; // `row`: the first of the thread
    float output[OUTPUTS], score[SCORES];
    uint32_t weight[SCORES / 2]; // of whichever warpgroup's tile is multiplied next
    uint32_t query[16];          // the last 64 columns, of the warp's rows
    // What exponents are relative to, and what they may become until that moves: LAZY more, -inf before the row's first key.
    float top[2], limit[2], sum[2];

    __device__ __forceinline__ LatentConsumer(const latent_params &p, const LatentShared &s, int wg)
        : p(p), s(s), wg(wg), row(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) {
#pragma unroll
        for (float &x : output)
            x = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            limit[half] = NEG_INF;
            top[half] = sum[half] = 0;
        }
    }

    // Both warpgroups; one.
    static __device__ __forceinline__ void meet() { named_barrier_sync(1, 256); }
    __device__ __forceinline__ void meet_own() const { named_barrier_sync(2 + wg, 128); }

    // Chunk of the warp's 16 rows of a tile of 64 columns that this lane has for ldmatrix and stmatrix, for 16 columns from 16 k on.
    static __device__ __forceinline__ uint32_t chunk_of_lane(int k) {
        const int lane = threadIdx.x % 32;
        return S::Column::at(threadIdx.x % 128 / 32 * 16 + lane % 16, 2 * k + lane / 16);
    }

    // A operands of the warp's rows and 64 columns.
    static __device__ __forceinline__ void load_rows(uint32_t (&to)[16], uint32_t column) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t words[4];
            load_matrices(words, column + chunk_of_lane(k));
#pragma unroll
            for (int i = 0; i < 4; i++)
                to[4 * k + i] = words[i];
        }
    }

    // As soon as all have brought theirs; then their place is free.
    __device__ __forceinline__ void keep_last_queries() {
        meet();
        load_rows(query, s.query(S::QUERY_COLUMNS));
        meet();
    }

    static __device__ __forceinline__ uint32_t phase(int n) { return n >> 1 & 1; }

    // S of tile n, as its pieces arrive.
    __device__ __forceinline__ void start_scores(int n) {
        const int tile = n & 1;
        const Descriptor a(s.query(0), 16, 1024), b(s.key(tile), 16, 1024),
            last(s.key(tile) + S::QUERY_COLUMNS * S::COLUMN, 16, 1024);
        mbarrier_wait(s.full(tile, 0), phase(n));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            Wgmma<E, LATENT_KEYS>::template rs<0>(score, query[4 * k], query[4 * k + 1],
                                                  query[4 * k + 2], query[4 * k + 3],
                                                  last.at(32 * k), k > 0);
#pragma unroll
        for (int piece = 1; piece < S::PIECES; piece++) {
            mbarrier_wait(s.full(tile, piece), phase(n));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < S::QUERY_COLUMNS * 2; k++) {
                const int at = (S::first_column(piece) + k / 4) * S::COLUMN + 32 * (k % 4);
                Wgmma<E, LATENT_KEYS>::ss(score, a.at(at), b.at(at), 1);
            }
        }
        wgmma_commit();
    }

    // O += P V of tile n and this warpgroup's columns.
    __device__ __forceinline__ void start_outputs(int n) {
        pin(output);
        pin(weight);
        wgmma_fence();
        const Descriptor b(s.key(n & 1) + wg * (OUTPUTS / 32) * S::COLUMN, S::COLUMN, 1024);
#pragma unroll
        for (int k = 0; k < LATENT_KEYS / 16; k++)
            Wgmma<E, 2 * OUTPUTS>::rs(output, weight[4 * k], weight[4 * k + 1], weight[4 * k + 2],
                                      weight[4 * k + 3], b.at(k * 16 * 128), 1);
        wgmma_commit();
    }

    // The next tile may take the place of a piece of tile n.
    __device__ __forceinline__ void release(int n, int piece) {
        if (threadIdx.x % 32 == 0)
            mbarrier_arrive(s.empty(n & 1, piece));
    }

    // Hides what a row does not see of the keys of the tile from `key` on.
    __device__ __forceinline__ void mask(const Sequence &seq, const Rows &rows, int key) {
        const fwd_params &fwd = p.packed.fwd;
        key += threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int end = seq.end_key(fwd, rows.query(row + 8 * half)) - key;
#pragma unroll
            for (int n = 0; n < SCORES / 2; n++) {
                float &x = score[n / 2 * 4 + 2 * half + n % 2];
                x = n / 2 * 8 + n % 2 < end ? x : NEG_INF;
            }
        }
    }

    // Exponents become relative to what `to` is the limit for.
    __device__ __forceinline__ void move_tops(const float (&to)[2]) {
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float before = top[half];
            top[half] = to[half] == NEG_INF ? 0 : to[half] - LAZY;
            shrink[half] = limit[half] == NEG_INF ? 0 : exp2_approx(before - top[half]);
            limit[half] = to[half];
            sum[half] *= shrink[half];
        }
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++)
            output[i] *= shrink[i / 2 % 2];
    }

    // Moves the tops to the maxima of the tile, if a row has outgrown its limit.
    __device__ __forceinline__ void follow_maxima() {
        float most[2];
        bool grown = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m[2] = {NEG_INF, NEG_INF};
#pragma unroll
            for (int n = 0; n < SCORES / 2; n++)
                m[n % 2] = fmaxf(m[n % 2], score[n / 2 * 4 + 2 * half + n % 2]);
            most[half] = fmaxf(m[0], m[1]) * p.packed.fwd.exponent_scale;
            grown |= most[half] > limit[half];
        }
        if (!__any_sync(~0u, grown))
            return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 1));
            most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 2));
            most[half] = fmaxf(most[half] + LAZY, limit[half]);
        }
        move_tops(most);
    }

    // Zeros in place of the tile's keys from `end` on, which may be NaN.
    __device__ __forceinline__ void clear_keys(int tile, int end) {
        constexpr int CHUNKS = S::QUERY_COLUMNS * 8;
        meet_own(); // nobody reads them any more
        for (int x = threadIdx.x % 128; x < (LATENT_KEYS - end) * CHUNKS; x += 128) {
            const int r = end + x / CHUNKS, chunk = x % CHUNKS;
            const uint32_t zeros[4] = {0, 0, 0, 0};
            store_chunk(s.key(tile) + chunk / 8 * S::COLUMN + S::Column::at(r, chunk % 8), zeros);
        }
        async_proxy_fence();
        meet_own();
    }

    // From scores of the part's tile n to weights that the other warpgroup gets, too.
    __device__ __forceinline__ void weigh(const Sequence &seq, const Rows &rows, const Part &part,
                                          int n) {
        const float scale = p.packed.fwd.exponent_scale;
        const int key = part.first_key + (part.first + n) * LATENT_KEYS;
        if (key + LATENT_KEYS > part.clean_end)
            mask(seq, rows, key);
        follow_maxima();
#pragma unroll
        for (int i = 0; i < SCORES; i++) {
            score[i] = exp2_approx(fmaf(score[i], scale, -top[i / 2 % 2]));
            sum[i / 2 % 2] += score[i];
        }
#pragma unroll
        for (int i = 0; i < SCORES / 2; i++)
            weight[i] = pack<E>(score[2 * i], score[2 * i + 1]);
        if (key + LATENT_KEYS > part.end_key)
            clear_keys(n & 1, max(part.end_key - key, 0));
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t words[4] = {weight[4 * k], weight[4 * k + 1], weight[4 * k + 2],
                                       weight[4 * k + 3]};
            store_matrices(s.weights(wg) + chunk_of_lane(k), words);
        }
        if (threadIdx.x % 4 == 0) {
#pragma unroll
            for (int half = 0; half < 2; half++)
                s.limits(wg)[row + 8 * half] = limit[half];
        }
        mbarrier_arrive(s.weighed(wg, threadIdx.x / 32 % 4));
    }

    // Weights of tile n, of the other warpgroup, and what they are relative to.
    __device__ __forceinline__ void receive_weights(int n) {
        mbarrier_wait(s.weighed(wg ^ 1, threadIdx.x / 32 % 4), phase(n));
        load_rows(weight, s.weights(wg ^ 1));
        const float *const limits = s.limits(wg ^ 1);
        const float to[2] = {limits[row], limits[row + 8]};
        if (__any_sync(~0u, to[0] != limit[0] || to[1] != limit[1]))
            move_tops(to);
    }

    __device__ __forceinline__ void walk(const Sequence &seq, const Rows &rows, const Part &part);
};

template <typename E>
__device__ __forceinline__ void LatentConsumer<E>::walk(const Sequence &seq, const Rows &rows,
                                                        const Part &part) {
    const int tiles = part.end - part.first;
    keep_last_queries();
    if (tiles == 0)
        return;
    int n = 1;
    if (wg == 0) {
        start_scores(0);
        wgmma_wait<0>();
        pin(score);
        release(0, 0);
        weigh(seq, rows, part, 0);
        start_outputs(0);
        wgmma_wait<0>();
        pin(output);
        release(0, 1);
        n = 2;
    }
#pragma unroll 1
    for (; n < tiles; n += 2) {
        receive_weights(n - 1);
        start_outputs(n - 1);
        start_scores(n);
        wgmma_wait<1>();
        pin(output);
        release(n - 1, 1 + wg);
        wgmma_wait<0>();
        pin(score);
        release(n, 0);
        weigh(seq, rows, part, n);
        start_outputs(n);
        wgmma_wait<0>();
        pin(output);
        release(n, 1 + wg);
    }
    if (n == tiles) {
        receive_weights(n - 1);
        start_outputs(n - 1);
        wgmma_wait<0>();
        pin(output);
    }
}

// Output, sums and what they are relative to into shared memory, where nothing is needed any more.
template <typename E>
__device__ __forceinline__ void leave_latent(const LatentShared &s, const LatentConsumer<E> &own) {
    const int lane = threadIdx.x % 32;
    own.meet();
    float *const to = reinterpret_cast<float *>(s.memory) + own.wg * (LATENT_DV / 2) + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = own.row + 8 * half;
        float total = own.sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (lane % 4 == 0) {
            s.stats(own.wg)[r] = total;
            s.tops()[r] = own.top[half];
        }
#pragma unroll
        for (int n = 0; n < LATENT_DV / 16; n++)
            *reinterpret_cast<float2 *>(to + r * LatentShared::OUT_PITCH + n * 8) =
                make_float2(own.output[4 * n + 2 * half], own.output[4 * n + 2 * half + 1]);
    }
    own.meet();
}

template <typename E>
__device__ __forceinline__ void attend_latent(const latent_params &p) {
    extern __shared__ char raw[];
    const packed_params &dp = p.packed;
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    const LatentShared s{base, raw + (base - shared_address(raw))};
    const int of_splits = divide(blockIdx.x, dp.by_splits),
              split = blockIdx.x - of_splits * dp.splits, tile = longest_first(dp, of_splits);
    const Rows rows(dp, tile, LATENT_ROWS);
    Sequence seq(dp.fwd, rows.b);
    seq.diagonal += dp.diagonal_offset;
    const int count = min(LATENT_ROWS, seq.q_rows * rows.group - rows.first);
    if (count <= 0)
        return;
    const Part part(dp, seq, rows, count, split, LATENT_KEYS);
    if (threadIdx.x == 0) {
        tma_prefetch_map(&p.key_map);
        for (int i = 0; i < 2; i++) {
            for (int piece = 0; piece < LatentShared::PIECES; piece++) {
                mbarrier_init(s.full(i, piece), 1);
                mbarrier_init(s.empty(i, piece), 4);
            }
            for (int warp = 0; warp < 4; warp++)
                mbarrier_init(s.weighed(i, warp), 32);
        }
        mbarrier_init_fence();
    }
    let_successor_start();
    __syncthreads();
    const int warp = uniform(threadIdx.x / 32);
    if (warp < 4) {
        registers_decrease<24>();
        if (warp == 0)
            produce_latent(p, s, rows, part);
        return;
    }
    registers_increase<240>();
    load_latent_queries<E>(dp.fwd, s, seq, rows, count);
    LatentConsumer<E> own(p, s, warp / 4 - 1);
    own.walk(seq, rows, part);
    leave_latent(s, own);
    store_rows<E, LATENT_DV, LatentShared>(
        dp, seq, rows, count, (tile * (int64_t)dp.splits + split) * LATENT_ROWS,
        reinterpret_cast<const float *>(s.memory), s.stats(0), s.tops(), threadIdx.x / 32 - 4);
}
