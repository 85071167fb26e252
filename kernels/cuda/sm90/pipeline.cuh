/*
 * Between the producer, which brings tiles to shared memory by TMA, and the consumers: buffers, barriers and turns.
 */
#pragma once

#include "kernels/cuda/sm90/tile.cuh"

namespace sm90 {

/* ---- Buffers and their barriers ---- */

/* A ring of kStages buffers with a "full" and an "empty" barrier each. */
template <int kStages>
struct Ring {
    uint32_t full, empty; /* addresses of the first barriers */
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ uint32_t full_barrier() const { return full + 8 * stage; }
    __device__ __forceinline__ uint32_t empty_barrier() const { return empty + 8 * stage; }
    /* No branch: wgmmas are in flight, and ptxas waits for them where paths meet. */
    __device__ __forceinline__ void advance(bool really = true) {
        const int next = stage + really;
        phase ^= next == kStages;
        stage = next == kStages ? 0 : next;
    }
    __device__ __forceinline__ void retreat() {
        phase ^= stage == 0;
        stage = stage == 0 ? kStages - 1 : stage - 1;
    }
};

template <class C>
struct Shared {
    uint32_t base;
    Tile *tiles; /* what the producer tells the consumers */
    __device__ __forceinline__ Tile *tile(int stage, int wg) const {
        return tiles + stage * C::kWarpgroups + wg;
    }
    __device__ __forceinline__ uint32_t query(int stage, int wg) const {
        return base + C::kQuery + (stage * C::kWarpgroups + wg) * C::kQueryBytes;
    }
    __device__ __forceinline__ uint32_t key(int stage) const {
        return base + C::kKey + stage * C::kKeyBytes;
    }
    __device__ __forceinline__ uint32_t value(int stage) const {
        return base + C::kValue + stage * C::kValueBytes;
    }
    __device__ __forceinline__ uint32_t output(int wg, int warp) const {
        return base + C::kOutput + (4 * wg + warp) * C::kOutputSlots * C::kSlotBytes;
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
            mbarrier_init(s.query_ring(wg).empty + 8 * i, 128); /* each thread reads the tile */
        }
    for (int i = 0; i < C::kStages; i++) {
        mbarrier_init(s.key_ring().full + 8 * i, 1);
        mbarrier_init(s.key_ring().empty + 8 * i, kWarps);
        mbarrier_init(s.value_ring().full + 8 * i, 1);
        mbarrier_init(s.value_ring().empty + 8 * i, kWarps);
    }
    mbarrier_init_fence();
}

/* ---- Producers: two warps, whose first lane does what is done once ---- */

/* Tells a warpgroup of a tile, with its queries. */
template <class C>
__device__ __forceinline__ void announce(const sm90_params &p, const Shared<C> &s,
                                         const Ring<C::kQueryStages> &ring, const Tile &t, int wg) {
    const Tile of_warpgroup = tile_of<C>(p, t, wg);
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    if (threadIdx.x % 32 != 0)
        return;
    *s.tile(ring.stage, wg) = of_warpgroup;
    if (!t.sees_keys()) {
        mbarrier_arrive(ring.full_barrier());
        return;
    }
    mbarrier_expect_bytes(ring.full_barrier(), C::kQueryBytes);
    for (int c = 0; c < C::kColumnsQk; c++)
        tma_load_5d(s.query(ring.stage, wg) + c * 64 * 128, &p.query_map, ring.full_barrier(),
                    evict_first(), 64 * c, 0, (t.first_row + 64 * wg) >> p.pack_log2, t.head,
                    t.batch);
}

/* Tells the warpgroups of the tiles of this block, each as soon as there is room for its queries, and that there are
 * no more. */
template <class C>
__device__ __forceinline__ void produce_queries(const sm90_params &p, const Shared<C> &s) {
    Ring<C::kQueryStages> queries = s.query_ring(0);
    for (Tile t = tile_at<C>(p, first_tile(p));; t = tile_at<C>(p, t.index + gridDim.x)) {
#pragma unroll 1
        for (int wg = 0; wg < C::kWarpgroups; wg++) {
            Ring<C::kQueryStages> ring = s.query_ring(wg);
            ring.stage = queries.stage;
            ring.phase = queries.phase;
            announce<C>(p, s, ring, t, wg);
        }
        if (t.index < 0)
            return;
        queries.advance();
    }
}

/* A key tile of a head. */
struct Block {
    int head, batch, index; /* index -1: none */
};

/* K or V of a key tile into the next free buffer of the ring. */
template <class C, int kColumns>
__device__ __forceinline__ void load_block(const cuda_tensor_map &map, uint32_t dst,
                                           Ring<C::kStages> &ring, const Block &block) {
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
        mbarrier_expect_bytes(ring.full_barrier(), kColumns * C::kKeyColumn);
        for (int c = 0; c < kColumns; c++)
            tma_load_4d(dst + c * C::kKeyColumn, &map, ring.full_barrier(), evict_last(), 64 * c,
                        block.index * C::kTileK, block.head, block.batch);
    }
    ring.advance();
}

/* Keys and values in the order in which buffers become free and are needed, across tiles: each V one K later. */
template <class C>
__device__ __forceinline__ void produce_keys(const sm90_params &p, const Shared<C> &s) {
    Ring<C::kStages> keys = s.key_ring(), values = s.value_ring();
    Block before{0, 0, -1}; /* whose V is still to come */
    const auto load_value = [&] {
        if (before.index >= 0)
            load_block<C, C::kColumnsV>(p.value_map, s.value(values.stage), values, before);
    };
    for (int index = first_tile(p); index < p.tiles; index += gridDim.x) {
        const Tile t = tile_at<C>(p, index);
        for (int n = t.first_block; n < t.end_block; n++) {
            const Block block{t.kv_head, t.batch, n};
            load_block<C, C::kColumnsQk>(p.key_map, s.key(keys.stage), keys, block);
            load_value();
            before = block;
        }
    }
    load_value();
}

/* ---- Consumers: where a warpgroup stands, and whose turn it is ---- */

/* A warp tells the producer that it has read a buffer. */
__device__ __forceinline__ void release(uint32_t barrier) {
    if ((threadIdx.x & 31) == 0)
        mbarrier_arrive(barrier);
}

/* Ping-pong: the warpgroups issue their GEMMs in turn, so that one's softmax runs under the others' GEMMs. */
template <class C>
__device__ __forceinline__ void wait_turn(int wg) {
    named_barrier_sync(1 + wg, 256);
}

template <class C>
__device__ __forceinline__ void pass_turn(int wg) {
    named_barrier_arrive(1 + (wg + 1 == C::kWarpgroups ? 0 : wg + 1), 256);
}

/* Where a warpgroup stands in the rings. */
template <class C>
struct Pipeline {
    int wg;
    Ring<C::kQueryStages> queries;
    Ring<C::kStages> keys, values;

    __device__ __forceinline__ Pipeline(const Shared<C> &s, int wg)
        : wg(wg), queries(s.query_ring(wg)), keys(s.key_ring()), values(s.value_ring()) {}
    /* S is complete; `tile_done`: it was the last of its tile. */
    __device__ __forceinline__ void key_read(bool tile_done) {
        release(keys.empty_barrier());
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
        release(values.empty_barrier());
        values.advance();
    }
    /* Passes over `count` key tiles that only rows of other warpgroups see, with the turns for their GEMMs. */
    __device__ __forceinline__ void skip_keys(int count) {
#pragma unroll 1
        for (; count > 0; count--) {
            mbarrier_wait(keys.full_barrier(), keys.phase);
            wait_turn<C>(wg);
            pass_turn<C>(wg);
            release(keys.empty_barrier());
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

} // namespace sm90
