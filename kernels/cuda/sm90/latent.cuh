// Attention over a latent cache on Hopper, as in the decoding of MLA: value is the first columns of key. docs/cuda-wide.md
//
// A block owns 64 packed rows of one kv head and walks over its split of the keys in tiles of 64. Two warpgroups share each:
//
//     S = Q K^T    half of the columns each; then each gives the other what it has of half of the keys. The last 64 columns of Q are
//                  in registers, since shared memory is full
//     P            of half of the keys each, through shared memory to both
//     O += P V     256 columns each, while the next tile is on its way
#pragma once

#include "kernels/cuda/common/packed.cuh"
#include "kernels/cuda/sm90/latent_params.h"
#include "kernels/cuda/sm90/ptx.cuh"

// Shared memory of a block.
struct LatentShared {
    static constexpr int COLUMN = LATENT_COLUMN_BYTES, QUERY_COLUMNS = LATENT_DV / 64,
                         KEY_COLUMNS = LATENT_D / 64, TILE = KEY_COLUMNS * COLUMN;
    static constexpr int WEIGHTS = QUERY_COLUMNS * COLUMN, KEYS = WEIGHTS + 2 * COLUMN,
                         STATS = KEYS + 2 * TILE, BARRIERS = STATS + 3 * LATENT_ROWS * 4;
    static_assert(BARRIERS + 32 + 1024 == LATENT_SHARED_BYTES, "");
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
    __device__ __forceinline__ uint32_t weights() const { return base + WEIGHTS; }
    // What a warp has of the other warpgroup's scores, chunks of 16 bytes of each lane side by side: where weights of its rows come later.
    __device__ __forceinline__ float4 *given_by(int wg) const {
        return reinterpret_cast<float4 *>(memory + WEIGHTS + wg * COLUMN) +
               threadIdx.x % 128 / 32 * 128 + threadIdx.x % 32;
    }
    __device__ __forceinline__ uint32_t full(int tile) const { return base + BARRIERS + 8 * tile; }
    __device__ __forceinline__ uint32_t empty(int tile) const { return full(tile) + 16; }
    // Of the rows, as a warpgroup has them: maxima of a step, in the end sums; and in the end what they are relative to.
    __device__ __forceinline__ float *stats(int wg) const {
        return reinterpret_cast<float *>(memory + STATS) + wg * LATENT_ROWS;
    }
    __device__ __forceinline__ float *tops() const { return stats(2); }
};

// Queries into shared memory, with zeros past `count` rows and past the head dim.
template <typename E>
__device__ __forceinline__ void load_latent_queries(const fwd_params &p, const LatentShared &s,
                                                    const Sequence &seq, const Rows &rows,
                                                    int count) {
    constexpr int CHUNKS = LATENT_D / 8;
    for (int x = threadIdx.x; x < LATENT_ROWS * CHUNKS; x += LATENT_THREADS) {
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
        mbarrier_wait(s.empty(tile), n / 2 & 1 ^ 1);
        if (lane == 0)
            mbarrier_expect_bytes(s.full(tile), LatentShared::TILE);
        __syncwarp();
        if (lane < p.boxes)
            for (int c = 0; c < LatentShared::KEY_COLUMNS; c++)
                tma_load_4d(s.key(tile) + c * LatentShared::COLUMN + lane * p.box_keys * 128,
                            &p.key_map, s.full(tile), evict_last(), 64 * c, row, rows.kv_head,
                            here);
    }
}

// A warpgroup. A thread has two rows, `half` 0 and 1, eight apart, as in Consumer of fwd.cuh, and 8 keys of each in a tile.
template <typename E>
struct LatentConsumer {
    static constexpr int SCORES = LATENT_KEYS / 2, OWN = SCORES / 2, OUTPUTS = LATENT_DV / 4;
    using S = LatentShared;

    const latent_params &p;
    const LatentShared &s;
    const int wg, row; // `row`: the first of the thread
    float output[OUTPUTS], score[SCORES], own[OWN];
    uint32_t query[8]; // half of the last 64 columns, of the warp's rows
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

    // Both warpgroups; or the two warps that have the same rows.
    static __device__ __forceinline__ void meet() { named_barrier_sync(1, 256); }
    static __device__ __forceinline__ int barrier_of_rows() { return 2 + threadIdx.x / 32 % 4; }
    static __device__ __forceinline__ void meet_of_rows() {
        named_barrier_sync(barrier_of_rows(), 64);
    }

    // Chunk of the warp's 16 rows of a tile of 64 columns that this lane has for ldmatrix and stmatrix, for 16 columns from 16 k on.
    static __device__ __forceinline__ uint32_t chunk_of_lane(int k) {
        const int lane = threadIdx.x % 32;
        return S::Column::at(threadIdx.x % 128 / 32 * 16 + lane % 16, 2 * k + lane / 16);
    }

    // Then their place is free.
    __device__ __forceinline__ void keep_last_queries() {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t words[4];
            load_matrices(words, s.query(S::QUERY_COLUMNS) + chunk_of_lane(2 * wg + k));
#pragma unroll
            for (int i = 0; i < 4; i++)
                query[4 * k + i] = words[i];
        }
        meet();
    }

    // S of this warpgroup's columns: products [FIRST, END) of 16 of them.
    static constexpr int PRODUCTS = LATENT_D / 32, EARLY = 2;
    template <int FIRST, int END>
    __device__ __forceinline__ void start_scores(int tile) {
        constexpr int COLUMNS = S::QUERY_COLUMNS / 2;
        const Descriptor a(s.query(COLUMNS * wg), 16, 1024),
            b(s.key(tile) + COLUMNS * wg * S::COLUMN, 16, 1024),
            last(s.key(tile) + S::QUERY_COLUMNS * S::COLUMN + 64 * wg, 16, 1024);
#pragma unroll
        for (int k = FIRST; k < END; k++) {
            const int at = k / 4 * S::COLUMN + 32 * (k % 4), held = k - COLUMNS * 4;
            if (held < 0)
                Wgmma<E, LATENT_KEYS>::ss(score, a.at(at), b.at(at), k > 0);
            else
                Wgmma<E, LATENT_KEYS>::template rs<0>(score, query[4 * held], query[4 * held + 1],
                                                      query[4 * held + 2], query[4 * held + 3],
                                                      last.at(32 * held), 1);
        }
        wgmma_commit();
    }

    // O += P V of this warpgroup's columns.
    __device__ __forceinline__ void start_outputs(int tile) {
        const Descriptor a(s.weights(), 16, 1024),
            b(s.key(tile) + wg * (OUTPUTS / 32) * S::COLUMN, S::COLUMN, 1024);
#pragma unroll
        for (int k = 0; k < LATENT_KEYS / 16; k++)
            Wgmma<E, 2 * OUTPUTS>::template ss<1>(output, a.at(32 * k), b.at(k * 16 * 128), 1);
        wgmma_commit();
    }

    // Scores of this warpgroup's half of the keys, of which the other one has a part.
    __device__ __forceinline__ void trade_scores() {
        float4 *const to = s.given_by(wg);
#pragma unroll
        for (int i = 0; i < OWN; i += 4)
            to[i * 8] = wg ? make_float4(score[i], score[i + 1], score[i + 2], score[i + 3])
                           : make_float4(score[OWN + i], score[OWN + i + 1], score[OWN + i + 2],
                                         score[OWN + i + 3]);
        meet_of_rows();
        const float4 *const from = s.given_by(wg ^ 1);
#pragma unroll
        for (int i = 0; i < OWN; i += 4) {
            const float4 x = from[i * 8];
            own[i] = (wg ? score[OWN + i] : score[i]) + x.x;
            own[i + 1] = (wg ? score[OWN + i + 1] : score[i + 1]) + x.y;
            own[i + 2] = (wg ? score[OWN + i + 2] : score[i + 2]) + x.z;
            own[i + 3] = (wg ? score[OWN + i + 3] : score[i + 3]) + x.w;
        }
    }

    // Hides what a row does not see of the keys of the tile from `key` on.
    __device__ __forceinline__ void mask(const Sequence &seq, const Rows &rows, int key) {
        const fwd_params &fwd = p.packed.fwd;
        key += wg * (LATENT_KEYS / 2) + threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int end = seq.end_key(fwd, rows.query(row + 8 * half)) - key;
#pragma unroll
            for (int n = 0; n < OWN / 2; n++) {
                float &x = own[n / 2 * 4 + 2 * half + n % 2];
                x = n / 2 * 8 + n % 2 < end ? x : NEG_INF;
            }
        }
    }

    // Makes the maxima of the tile what the exponents of both warpgroups are relative to, if a row has outgrown that by 2^8.
    __device__ __forceinline__ void follow_maxima() {
        float most[2];
        bool grown = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = NEG_INF;
#pragma unroll
            for (int n = 0; n < OWN / 2; n++)
                most[half] = fmaxf(most[half], own[n / 2 * 4 + 2 * half + n % 2]);
            most[half] *= p.packed.fwd.exponent_scale;
            grown |= most[half] > limit[half];
        }
        if (!named_barrier_any(barrier_of_rows(), 64, grown))
            return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 1));
            most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 2));
            if (threadIdx.x % 4 == 0)
                s.stats(wg)[row + 8 * half] = most[half];
        }
        meet_of_rows();
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool fresh = limit[half] == NEG_INF;
            float x = fmaxf(most[half], s.stats(wg ^ 1)[row + 8 * half]);
            x = fresh ? x : fmaxf(x, top[half]);
            limit[half] = x + LAZY;
            x = x == NEG_INF ? 0 : x;
            shrink[half] = fresh ? 0 : exp2_approx(top[half] - x);
            top[half] = x;
            sum[half] *= shrink[half];
        }
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++)
            output[i] *= shrink[i / 2 % 2];
    }

    // Weights of this warpgroup's keys, where both find them.
    __device__ __forceinline__ void weigh() {
        const float scale = p.packed.fwd.exponent_scale;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            own[i] = exp2_approx(fmaf(own[i], scale, -top[i / 2 % 2]));
            sum[i / 2 % 2] += own[i];
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float *const x = own + 8 * k;
            const uint32_t words[4] = {pack<E>(x[0], x[1]), pack<E>(x[2], x[3]),
                                       pack<E>(x[4], x[5]), pack<E>(x[6], x[7])};
            store_matrices(s.weights() + chunk_of_lane(2 * wg + k), words);
        }
    }

    // Zeros in place of the tile's keys from `end` on, which may be NaN, by both warpgroups.
    __device__ __forceinline__ void clear_keys(int tile, int end) {
        constexpr int CHUNKS = S::QUERY_COLUMNS * 8;
        for (int x = threadIdx.x - 128; x < (LATENT_KEYS - end) * CHUNKS; x += 256) {
            const int r = end + x / CHUNKS, chunk = x % CHUNKS;
            const uint32_t zeros[4] = {0, 0, 0, 0};
            store_chunk(s.key(tile) + chunk / 8 * S::COLUMN + S::Column::at(r, chunk % 8), zeros);
        }
    }

    // The next tile may take the place of this one.
    __device__ __forceinline__ void release(int tile) {
        if (threadIdx.x % 32 == 0)
            mbarrier_arrive(s.empty(tile));
    }

    // From scores of the part's tile n to weights that both may read.
    __device__ __forceinline__ void weigh_tile(const Sequence &seq, const Rows &rows,
                                               const Part &part, int n) {
        const int key = part.first_key + (part.first + n) * LATENT_KEYS;
        trade_scores();
        if (key + LATENT_KEYS > part.clean_end)
            mask(seq, rows, key);
        follow_maxima();
        weigh();
        if (key + LATENT_KEYS > part.end_key) {
            meet(); // nobody reads the keys any more
            clear_keys(n & 1, max(part.end_key - key, 0));
        }
        async_proxy_fence();
        meet();
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
    mbarrier_wait(s.full(0), 0);
    wgmma_fence();
    start_scores<0, PRODUCTS>(0);
    wgmma_wait<0>();
    pin(score);
    weigh_tile(seq, rows, part, 0);
#pragma unroll 1
    for (int n = 1; n < tiles; n++) {
        const int before = n - 1;
        pin(output);
        wgmma_fence();
        start_outputs(before & 1);
        mbarrier_wait(s.full(n & 1), n >> 1 & 1);
        wgmma_fence();
        start_scores<0, EARLY>(n & 1);
        wgmma_wait<1>();
        pin(output);
        release(before & 1); // before all products have been taken in
        start_scores<EARLY, PRODUCTS>(n & 1);
        meet(); // nobody reads the weights any more
        wgmma_wait<0>();
        pin(score);
        weigh_tile(seq, rows, part, n);
    }
    pin(output);
    wgmma_fence();
    start_outputs(tiles - 1 & 1);
    wgmma_wait<0>();
    pin(output);
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
            mbarrier_init(s.full(i), 1);
            mbarrier_init(s.empty(i), 8);
        }
        mbarrier_init_fence();
    }
    load_latent_queries<E>(dp.fwd, s, seq, rows, count);
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
    LatentConsumer<E> own(p, s, warp / 4 - 1);
    own.walk(seq, rows, part);
    leave_latent(s, own);
    store_rows<E, LATENT_DV, LatentShared>(
        dp, seq, rows, count, (tile * (int64_t)dp.splits + split) * LATENT_ROWS,
        reinterpret_cast<const float *>(s.memory), s.stats(0), s.tops(), threadIdx.x / 32 - 4);
}
