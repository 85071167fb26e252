// Between the producer, which brings tiles to shared memory by TMA, and the consumers: buffers, barriers and turns.
#pragma once

#include "kernels/cuda/sm90/tile.cuh"

// ---- Buffers and their barriers ----

// A ring of STAGES buffers with a "full" and an "empty" barrier each.
template <int STAGES>
struct Ring {
    uint32_t full, empty; // addresses of the first barriers
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ uint32_t full_barrier() const { return full + 8 * stage; }
    __device__ __forceinline__ uint32_t empty_barrier() const { return empty + 8 * stage; }
    // At the n-th buffer of all that pass.
    __device__ __forceinline__ Ring at(uint32_t n) const {
        return {full, empty, static_cast<int>(n % STAGES), n / STAGES % 2};
    }
    // No branch: wgmmas are in flight, and ptxas waits for them where paths meet.
    __device__ __forceinline__ void advance(bool really = true) {
        const int next = stage + really;
        phase ^= next == STAGES;
        stage = next == STAGES ? 0 : next;
    }
    __device__ __forceinline__ void retreat() {
        phase ^= stage == 0;
        stage = stage == 0 ? STAGES - 1 : stage - 1;
    }
};

template <class C>
struct Shared {
    uint32_t base;
    Tile<C> *tiles; // what the producer tells the consumers
    // Of the queries at which a ring stands. With two slots for the one stage of queries a tile is still there when it ends.
    __device__ __forceinline__ Tile<C> *tile(const Ring<C::QUERY_STAGES> &queries, int wg) const {
        const int slot = C::TILE_SLOTS > C::QUERY_STAGES ? queries.phase : queries.stage;
        return tiles + slot * C::WARPGROUPS + wg;
    }
    __device__ __forceinline__ Tile<C> *claimed_tile(int stage) const {
        return tiles + C::TILE_SLOTS * C::WARPGROUPS + stage;
    }
    __device__ __forceinline__ uint32_t query(int stage, int wg) const {
        return base + C::QUERY + (stage * C::WARPGROUPS + wg) * C::QUERY_BYTES;
    }
    __device__ __forceinline__ uint32_t key(int stage) const {
        return base + C::KEY + stage * C::KEY_BYTES;
    }
    __device__ __forceinline__ uint32_t value(int stage) const {
        return base + C::VALUE + stage * C::VALUE_BYTES;
    }
    __device__ __forceinline__ uint32_t output(int wg, int warp) const {
        return base + C::OUTPUT + (4 * wg + warp) * C::OUTPUT_SLOTS * C::SLOT_BYTES;
    }
    __device__ __forceinline__ Ring<C::QUERY_STAGES> query_ring(int wg) const {
        return {base + C::BARRIERS + 16 * C::QUERY_STAGES * wg,
                base + C::BARRIERS + 8 * C::QUERY_STAGES * (2 * wg + 1)};
    }
    __device__ __forceinline__ uint32_t rings() const { return query_ring(C::WARPGROUPS).full; }
    __device__ __forceinline__ Ring<C::STAGES> key_ring() const {
        return {rings(), rings() + 8 * C::STAGES};
    }
    __device__ __forceinline__ Ring<C::STAGES> value_ring() const {
        return {rings() + 16 * C::STAGES, rings() + 24 * C::STAGES};
    }
    __device__ __forceinline__ Ring<C::CLAIMED_TILES> claimed_ring() const {
        return {rings() + 32 * C::STAGES, rings() + 32 * C::STAGES + 8 * C::CLAIMED_TILES};
    }
    // The n-th 64 keys of a warpgroup's bias, counted over all tiles.
    __device__ __forceinline__ uint32_t bias(uint32_t n, int wg) const {
        return base + C::BIASES +
               (n % C::BIAS_STAGES * C::WARPGROUPS + wg) * C::BIAS_BOXES * C::BIAS_BOX;
    }
    __device__ __forceinline__ uint32_t bias_full(uint32_t n, int wg) const {
        return rings() + 32 * C::STAGES + 16 * C::CLAIMED_TILES +
               8 * (2 * C::BIAS_STAGES * wg + n % C::BIAS_STAGES);
    }
    __device__ __forceinline__ uint32_t bias_empty(uint32_t n, int wg) const {
        return bias_full(n, wg) + 8 * C::BIAS_STAGES;
    }
    static __device__ __forceinline__ uint32_t bias_phase(uint32_t n) {
        return n / C::BIAS_STAGES & 1;
    }
};

template <class C>
__device__ __forceinline__ void init_barriers(const Shared<C> &s) {
    constexpr int WARPS = 4 * C::KEY_READERS;
    for (int wg = 0; wg < C::WARPGROUPS; wg++)
        for (int i = 0; i < C::QUERY_STAGES; i++) {
            mbarrier_init(s.query_ring(wg).full + 8 * i, 1);
            mbarrier_init(s.query_ring(wg).empty + 8 * i, 128); // each thread reads the tile
        }
    for (int i = 0; i < C::STAGES; i++) {
        mbarrier_init(s.key_ring().full + 8 * i, C::KEY_WRITERS);
        mbarrier_init(s.key_ring().empty + 8 * i, WARPS);
        mbarrier_init(s.value_ring().full + 8 * i, C::VALUE_WRITERS);
        mbarrier_init(s.value_ring().empty + 8 * i, WARPS);
    }
    for (int i = 0; i < C::CLAIMED_TILES; i++) {
        mbarrier_init(s.claimed_ring().full + 8 * i, 1);
        mbarrier_init(s.claimed_ring().empty + 8 * i, 32 * C::CLAIM_READERS);
    }
    if constexpr (C::COPIES_BIAS) {
        for (int wg = 0; wg < C::WARPGROUPS; wg++)
            for (int i = 0; i < C::BIAS_STAGES; i++) {
                mbarrier_init(s.bias_full(i, wg), 1);
                mbarrier_init(s.bias_empty(i, wg), 4);
            }
    }
    mbarrier_init_fence();
}

// Waits for keys or values. What threads have copied, not TMA, wgmma reads only behind a fence.
template <class C>
__device__ __forceinline__ void wait_full(const Ring<C::STAGES> &ring) {
    mbarrier_wait(ring.full_barrier(), ring.phase);
    if constexpr (C::COPIES_ROWS)
        async_proxy_fence();
}

// ---- Producers: two to four warps, whose first lane does what is done once ----

// Row `row` of a packed sequence that has `rows` from row `start` on is (length - rows + row, start + rows): both axes have the
// stride of a row, the origin lies `length` rows before the tensor's, and behind the sequence the first coordinate is past its
// extent, so that zeros arrive and nothing is written, whatever the tensor holds there. A box must not begin there: one
// that lies wholly outside faults where the origin is nobody's memory.
struct PackedRow {
    int inner, outer;
};
__device__ __forceinline__ PackedRow packed_row(int length, int start, int rows, int row) {
    return {length - rows + row, start + rows};
}

// Coordinates 2 to 4 of a row in the maps of query and output.
struct RowCoordinates {
    int c2, c3, c4;
};
template <class C>
__device__ __forceinline__ RowCoordinates row_coordinates(const sm90_params &p, const Place<C> &t,
                                                          int row) {
    row >>= p.pack_log2;
    if constexpr (C::IS_PACKED) {
        const PackedRow r = packed_row(p.len_q, t.q_start, t.q_rows, min(row, t.q_rows - 1));
        if (p.packed_q.cu_seqlens)
            return {r.inner, r.outer, t.head};
    }
    return {row, t.head, t.batch};
}

// By one thread, word by word: the compiler would store bytes, or vectors, for which producers have no registers.
template <class C>
__device__ __forceinline__ void store_tile(Tile<C> *to, const Tile<C> &t) {
    constexpr int WORDS = sizeof(TileWords<C>) / 4;
    uint32_t words[WORDS];
    memcpy(words, &t, sizeof words);
#pragma unroll
    for (int i = 0; i < WORDS; i++)
        store_word(shared_address(to) + 4 * i, words[i]);
}

// Tells a warpgroup of a tile, with its queries, which are asked for before it is known what the warpgroup sees.
template <class C>
__device__ __forceinline__ void announce(const sm90_params &p, const Shared<C> &s,
                                         const Ring<C::QUERY_STAGES> &ring, const Tile<C> &t,
                                         int wg) {
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    if (threadIdx.x % 32 != 0)
        return;
    const bool any = t.sees_keys();
    if (any) {
        const RowCoordinates at = row_coordinates<C>(p, t, t.first_row + C::ROWS_APART * wg);
        for (int c = 0; c < C::COLUMNS_QK; c++)
            tma_load_5d(s.query(ring.stage, wg) + c * 64 * 128, &p.query_map, ring.full_barrier(),
                        evict_first(), C::COLUMN_ELEMENTS * c, 0, at.c2, at.c3, at.c4);
    }
    store_tile<C>(s.tile(ring, wg), tile_of<C>(p, t, wg));
    mbarrier_expect_bytes(ring.full_barrier(), any ? C::QUERY_BYTES : 0);
}

// SPLIT: the next part with keys. Parts become smaller from the first to the last; blocks take them to and fro, so that those
// with the largest ones get the smallest ones, too.
template <class C>
__device__ __forceinline__ Tile<C> next_part(const sm90_params &p, int index, bool first) {
    const int blocks = gridDim.x;
    for (int round = first ? 0 : index / blocks + 1;; round++) {
        const Tile<C> t =
            tile_at<C>(p, round * blocks + (round & 1 ? blocks - 1 - blockIdx.x : blockIdx.x));
        if (t.index < 0 || t.sees_keys())
            return t;
    }
}

// The tile of this block that follows the one with this index, or its first: claimed where sequences differ, whose order depends on
// the lengths; else every gridDim-th.
template <class C>
__device__ __forceinline__ Tile<C> next_tile(const sm90_params &p, int index, bool first) {
    if constexpr (C::IS_SPLIT)
        return next_part<C>(p, index, first);
    if constexpr (C::IS_PACKED) {
        if (p.list)
            return tile_at<C>(p, uniform(threadIdx.x % 32 == 0 ? atomicAdd(&p.list->next, 1) : 0));
    }
    return tile_at<C>(p, first ? first_tile(p) : index + gridDim.x);
}

// Tells the other producers of a tile.
template <class C>
__device__ __forceinline__ void share_claim(const Shared<C> &s, Ring<C::CLAIMED_TILES> &ring,
                                            const Tile<C> &t) {
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
        store_tile<C>(s.claimed_tile(ring.stage), t);
        mbarrier_arrive(ring.full_barrier());
    }
    ring.advance();
}

// The tile that the producer of queries has claimed.
template <class C>
__device__ __forceinline__ Tile<C> receive_claim(const Shared<C> &s, Ring<C::CLAIMED_TILES> &ring) {
    mbarrier_wait(ring.full_barrier(), ring.phase);
    const Tile<C> t = *s.claimed_tile(ring.stage);
    mbarrier_arrive(ring.empty_barrier());
    ring.advance();
    return t;
}

template <class C>
__device__ __forceinline__ void announce(const sm90_params &p, const Shared<C> &s,
                                         const Ring<C::QUERY_STAGES> &queries, const Tile<C> &t) {
#pragma unroll 1
    for (int wg = 0; wg < C::WARPGROUPS; wg++) {
        Ring<C::QUERY_STAGES> ring = s.query_ring(wg);
        ring.stage = queries.stage;
        ring.phase = queries.phase;
        announce<C>(p, s, ring, t, wg);
    }
}

// Tells the warpgroups of the tiles of this block, each as soon as there is room for its queries, and that there are
// no more. Where tiles are claimed, the other producers hear of one before its queries wait. One place finds tiles, the first one, too:
// instructions that were not run before take some 30 cycles each, and all of the block waits for the first queries.
template <class C>
__device__ __forceinline__ void produce_queries(const sm90_params &p, const Shared<C> &s) {
    Ring<C::QUERY_STAGES> queries = s.query_ring(0);
    Ring<C::CLAIMED_TILES> claims = s.claimed_ring();
    int index = 0;
#pragma unroll 1
    for (bool first = true;; first = false) {
        const Tile<C> t = next_tile<C>(p, index, first);
        if constexpr (C::IS_PACKED)
            share_claim<C>(s, claims, t);
        announce<C>(p, s, queries, t);
        index = t.index;
        if (index < 0)
            return;
        queries.advance();
    }
}

// A key tile of a head, or what this lane brings of it: rows from `row` on at coordinates 2 and 3 of the maps.
struct Block {
    int row, c2, c3; // row -1: none
};

// Key tile n; of pages a box of p.box_keys of them for each lane. Past the last key the row is behind its page, so that zeros
// arrive.
template <class C>
__device__ __forceinline__ Block block_of(const sm90_params &p, const Tile<C> &t, int n) {
    const int row = n * C::TILE_K;
    if constexpr (C::IS_PLACED) {
        if (p.block_table) {
            const int key = row + threadIdx.x % 32 * p.box_keys;
            if (key >= t.k_len)
                return {p.page_size, t.kv_head, 0};
            const PageRow at = page_row(p, t.batch, key);
            return {at.row, t.kv_head, at.page};
        }
    }
    if constexpr (C::IS_PACKED) {
        const PackedRow r = packed_row(p.len_k, t.k_start, t.k_len, row);
        if (p.packed_k.cu_seqlens)
            return {r.inner, r.outer, t.kv_head};
    }
    return {row, t.kv_head, t.batch};
}

// COLUMNS of a block from `column` on to `dst`. Boxes of pages are brought one after the other, each by all columns: where every lane brings
// its own the compiler makes a loop of lanes that takes three times as long. Producers of three warpgroups have no registers for that.
template <class C, int COLUMNS>
__device__ __forceinline__ void load_boxes(const sm90_params &p, const cuda_tensor_map &map,
                                           uint32_t dst, uint32_t barrier, const Block &block,
                                           int column) {
    const int lane = threadIdx.x % 32;
    if constexpr (C::IS_PACKED) {
        const int c2 = uniform(block.c2), boxes = p.boxes;
#pragma unroll 2
        for (int i = 0; i < boxes; i++, dst += p.box_keys * 128) {
            const int row = uniform(__shfl_sync(~0u, block.row, i)),
                      c3 = uniform(__shfl_sync(~0u, block.c3, i));
            for (int c = 0; c < COLUMNS; c++)
                tma_load_4d_by_one(dst + c * C::KEY_COLUMN, &map, barrier, evict_last(),
                                   C::COLUMN_ELEMENTS * (column + c), row, c2, c3);
        }
    } else if (lane < (C::IS_PLACED ? p.boxes : 1)) {
        if (C::IS_PLACED)
            dst += lane * p.box_keys * 128;
        for (int c = 0; c < COLUMNS; c++)
            tma_load_4d(dst + c * C::KEY_COLUMN, &map, barrier, evict_last(),
                        C::COLUMN_ELEMENTS * (column + c), block.row, block.c2, block.c3);
    }
}

// K or V of a key tile, or COLUMNS of it from `column` on, into the next free buffer of the ring.
template <class C, int COLUMNS>
__device__ __forceinline__ void load_block(const sm90_params &p, const cuda_tensor_map &map,
                                           uint32_t dst, Ring<C::STAGES> &ring, const Block &block,
                                           int column = 0) {
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    if (threadIdx.x % 32 == 0)
        mbarrier_expect_bytes(ring.full_barrier(), COLUMNS * C::KEY_COLUMN);
    load_boxes<C, COLUMNS>(p, map, dst, ring.full_barrier(), block, column);
    ring.advance();
}

// Keys and values in the order in which buffers become free and are needed, across tiles: each V one K later.
template <class C>
__device__ __forceinline__ void produce_keys(const sm90_params &p, const Shared<C> &s) {
    Ring<C::STAGES> keys = s.key_ring(), values = s.value_ring();
    Block before{-1, 0, 0}; // whose V is still to come
    const auto load_value = [&] {
        if (before.row >= 0)
            load_block<C, C::COLUMNS_V>(p, p.value_map, s.value(values.stage), values, before);
    };
    for (int index = first_tile(p); index < p.tiles; index += gridDim.x) {
        const Tile<C> t = tile_at<C>(p, index);
        for (int n = t.first_block; n < t.end_block; n++) {
            const Block block = block_of<C>(p, t, n);
            load_block<C, C::COLUMNS_QK>(p, p.key_map, s.key(keys.stage), keys, block);
            load_value();
            before = block;
        }
    }
    load_value();
}

// Where the 32 keys from `key` on are, one for each lane, in chunks of 16 bytes; past the last key where that one is.
template <class C>
__device__ __forceinline__ uint32_t chunk_of_lane(const sm90_params &p, const sm90_strides &strides,
                                                  const Tile<C> &t, int key) {
    const PageRow at =
        page_row(p, t.batch, min(key + static_cast<int>(threadIdx.x % 32), t.k_len - 1));
    return at.page * static_cast<uint32_t>(strides.batch / 8) +
           at.row * static_cast<uint32_t>(strides.row / 8);
}

// COPIES_ROWS: keys [FIRST, END) of key tile n, or their values, into the next free buffer of the ring, row by row, since a box takes TMA some
// 25 cycles, however small it is. A lane copies 16 bytes: eight have 64 elements of a row, a warp four rows. Past the last key zeros arrive. Each
// lane arrives when its copies have. All rows are looked up before there is room for the first: what is done then, the next step waits for.
template <class C, bool VALUES, int FIRST, int END>
__device__ __forceinline__ void copy_rows(const sm90_params &p, uint32_t dst, Ring<C::STAGES> &ring,
                                          const Tile<C> &t, int n) {
    using E = typename C::Cached;
    constexpr int COLUMNS = VALUES ? C::COLUMNS_V : C::COLUMNS_QK, AT_ONCE = 4,
                  GROUPS = (END - FIRST) / 32;
    static_assert(FIRST % 32 == 0 && END % 32 == 0, "");
    const sm90_strides &strides = VALUES ? p.value_strides : p.key_strides;
    const int lane = threadIdx.x % 32, chunk = lane % 8, dim = VALUES ? p.dim_v : p.dim_qk,
              key = n * C::TILE_K + FIRST, inside = t.k_len - key - lane / 8;
    const E *const head =
        static_cast<const E *>(VALUES ? p.value : p.key) + t.kv_head * strides.head + 8 * chunk;
    uint32_t own[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        own[i] = chunk_of_lane<C>(p, strides, t, key + 32 * i);
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    dst += (FIRST + lane / 8) * 128 + ((chunk ^ lane / 8) << 4);
#pragma unroll
    for (int i = 0; i < 32 * GROUPS; i += 4 * AT_ONCE) {
        const E *row[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            row[j] = chunks_behind(head, __shfl_sync(~0u, own[i / 32], i % 32 + 4 * j + lane / 8));
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                copy_async((dst ^ j % 2 << 6) + 128 * (i + 4 * j) + c * C::KEY_COLUMN,
                           row[j] + 64 * c, i + 4 * j < inside && 64 * c + 8 * chunk < dim);
    }
    copies_arrive(ring.full_barrier());
    ring.advance();
}

// Where tiles are claimed keys have a producer, and values have one: pages may be many boxes, or rows. Each looks up where a block is before
// it waits for a buffer.
template <class C, bool VALUES>
__device__ __forceinline__ void produce_blocks(const sm90_params &p, const Shared<C> &s) {
    constexpr int COLUMNS = VALUES ? C::COLUMNS_V : C::COLUMNS_QK;
    Ring<C::STAGES> ring = VALUES ? s.value_ring() : s.key_ring();
    Ring<C::CLAIMED_TILES> claims = s.claimed_ring();
    for (Tile<C> t = receive_claim<C>(s, claims); t.index >= 0; t = receive_claim<C>(s, claims)) {
#pragma unroll 1
        for (int n = t.first_block; n < t.end_block; n = next_block<C>(p, t, n)) {
            const uint32_t dst = VALUES ? s.value(ring.stage) : s.key(ring.stage);
            if constexpr (C::COPIES_ROWS)
                copy_rows<C, VALUES, 0, C::HELPED>(p, dst, ring, t, n);
            else
                load_block<C, COLUMNS>(p, VALUES ? p.value_map : p.key_map, dst, ring,
                                       block_of<C>(p, t, n));
        }
    }
}

// COPIES_ROWS: the last keys of each tile, and their values.
template <class C>
__device__ __forceinline__ void help_with_rows(const sm90_params &p, const Shared<C> &s) {
    Ring<C::STAGES> keys = s.key_ring(), values = s.value_ring();
    Ring<C::CLAIMED_TILES> claims = s.claimed_ring();
    for (Tile<C> t = receive_claim<C>(s, claims); t.index >= 0; t = receive_claim<C>(s, claims)) {
#pragma unroll 1
        for (int n = t.first_block; n < t.end_block; n = next_block<C>(p, t, n)) {
            copy_rows<C, false, C::HELPED, C::TILE_K>(p, s.key(keys.stage), keys, t, n);
            copy_rows<C, true, C::HELPED, C::TILE_K>(p, s.value(values.stage), values, t, n);
        }
    }
}

// The bias of the key tiles that a warpgroup visits, by a lane for each.
template <class C>
__device__ __forceinline__ void produce_bias(const sm90_params &p, const Shared<C> &s) {
    const int wg = threadIdx.x % 32;
    uint32_t n = 0;
    Ring<C::CLAIMED_TILES> claims = s.claimed_ring();
    for (Tile<C> t = receive_claim<C>(s, claims); t.index >= 0; t = receive_claim<C>(s, claims)) {
        const int row = p.bias.row ? t.first_row + 64 * wg : 0, head = p.bias.head ? t.head : 0,
                  batch = p.bias.batch ? t.batch : 0, begin = t.first_block * C::TILE_K,
                  end = wg < C::WARPGROUPS ? tile_of<C>(p, t, wg).end_block * C::TILE_K : 0;
        for (int key = begin; key < end; key += C::BIAS_KEYS, n++) {
            mbarrier_wait(s.bias_empty(n, wg), s.bias_phase(n) ^ 1);
            mbarrier_expect_bytes(s.bias_full(n, wg), C::BIAS_BOXES * p.bias_box_bytes);
            for (int i = 0; i < C::BIAS_BOXES; i++)
                tma_load_4d(s.bias(n, wg) + i * C::BIAS_BOX, &p.bias_map, s.bias_full(n, wg),
                            evict_first(), key + i * C::BIAS_KEYS / C::BIAS_BOXES, row, head,
                            batch);
        }
        __syncwarp();
    }
}

// ---- Consumers: where a warpgroup stands, and whose turn it is ----

// A warp tells that it has read a buffer, or filled it.
__device__ __forceinline__ void release(uint32_t barrier) {
    if ((threadIdx.x & 31) == 0)
        mbarrier_arrive(barrier);
}

// The same; with float8 by whichever lane, see thread().
template <class C>
__device__ __forceinline__ void release(uint32_t barrier) {
    if constexpr (C::IS_FLOAT8)
        mbarrier_arrive_by_one(barrier);
    else
        release(barrier);
}

// Ping-pong: the warpgroups issue their GEMMs in turn, so that one's softmax runs under the others' GEMMs.
template <class C>
__device__ __forceinline__ void wait_turn(int wg) {
    if (C::HAS_TURNS)
        named_barrier_sync(1 + wg, 256);
}

template <class C>
__device__ __forceinline__ void pass_turn(int wg) {
    if (C::HAS_TURNS)
        named_barrier_arrive(1 + (wg + 1 == C::WARPGROUPS ? 0 : wg + 1), 256);
}

// Where a warpgroup stands in the rings.
template <class C>
struct Pipeline {
    int wg;
    Ring<C::QUERY_STAGES> queries;
    Ring<C::STAGES> keys, values;
    uint32_t biases = 0; // that were read

    __device__ __forceinline__ Pipeline(const Shared<C> &s, int wg)
        : wg(wg), queries(s.query_ring(wg)), keys(s.key_ring()), values(s.value_ring()) {}
    // S is complete; `tile_done`: it was the last of its tile.
    __device__ __forceinline__ void key_read(bool tile_done) {
        release<C>(keys.empty_barrier());
        keys.advance();
        if (tile_done)
            mbarrier_arrive(queries.empty_barrier());
        queries.advance(tile_done);
    }
    __device__ __forceinline__ void query_read() {
        mbarrier_arrive(queries.empty_barrier());
        queries.advance();
    }
    __device__ __forceinline__ void value_read() {
        release<C>(values.empty_barrier());
        values.advance();
    }
    // Passes over `count` key tiles that only rows of other warpgroups see, with the turns for their GEMMs.
    __device__ __forceinline__ void skip_keys(int count) {
#pragma unroll 1
        for (; count > 0; count--) {
            mbarrier_wait(keys.full_barrier(), keys.phase);
            wait_turn<C>(wg);
            pass_turn<C>(wg);
            release<C>(keys.empty_barrier());
            keys.advance();
        }
    }
    __device__ __forceinline__ void skip_values(int count) {
#pragma unroll 1
        for (; count > 0; count--) {
            mbarrier_wait(values.full_barrier(), values.phase);
            value_read();
        }
    }
};
