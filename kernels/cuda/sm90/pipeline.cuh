/*
 * Between the producer, which brings tiles to shared memory by TMA, and the consumers: buffers, barriers and turns.
 */
#ifndef DLATTN_SM90_PIPELINE_CUH_
#define DLATTN_SM90_PIPELINE_CUH_

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

/* ---- Producer: a warp, whose first lane does what is done once ---- */

/* Tells a warpgroup of a tile, with its queries. */
template <class C>
__device__ __forceinline__ void announce(const sm90_params &p, const Shared<C> &s,
                                         const Ring<C::kQueryStages> &ring, const Tile &t, int wg) {
    mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
    if (threadIdx.x != 0)
        return;
    *s.tile(ring.stage, wg) = t;
    if (!t.sees_keys()) {
        mbarrier_arrive(ring.full_barrier());
        return;
    }
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
    if (threadIdx.x == 0) {
        mbarrier_expect_bytes(ring.full_barrier(), kColumns * C::kKeyColumn);
        for (int c = 0; c < kColumns; c++)
            tma_load_4d(dst + c * C::kKeyColumn, &map, ring.full_barrier(), 64 * c,
                        block * C::kTileK, t.kv_head, t.batch);
    }
    ring.advance();
}

/* Loads in the order in which buffers become free and are needed, across tiles: each V one K later, and Q of the next
 * tile as soon as there is room for it. */
template <class C>
__device__ __forceinline__ void produce(const sm90_params &p, const Shared<C> &s) {
    Ring<C::kStages> keys = s.key_ring(), values = s.value_ring();
    Ring<C::kQueryStages> queries = s.query_ring(0);
    const auto announce_tile = [&](const Tile &of) {
        for (int wg = 0; wg < C::kWarpgroups; wg++) {
            Ring<C::kQueryStages> ring = s.query_ring(wg);
            ring.stage = queries.stage;
            ring.phase = queries.phase;
            announce<C>(p, s, ring, of, wg);
        }
        queries.advance();
    };
    const auto load_key = [&](const Tile &of, int n) {
        load_block<C, C::kColumnsQk>(p.key_map, s.key(keys.stage), keys, of, n);
    };
    const auto load_value = [&](const Tile &of, int n) {
        load_block<C, C::kColumnsV>(p.value_map, s.value(values.stage), values, of, n);
    };
    Tile t = tile_at<C>(p, blockIdx.x);
    announce_tile(t);
    bool begun = false; /* the first K of t is on its way */
    while (t.index >= 0) {
        const Tile next = tile_at<C>(p, t.index + gridDim.x);
        if (C::kQueryStages > 1)
            announce_tile(next);
        if (t.sees_keys()) {
            if (!begun)
                load_key(t, t.end_block - 1);
            for (int n = t.end_block - 1; n > t.first_block; n--) {
                load_key(t, n - 1);
                load_value(t, n);
            }
            begun = next.sees_keys();
            if (begun)
                load_key(next, next.end_block - 1);
            load_value(t, t.first_block);
        }
        if (C::kQueryStages == 1)
            announce_tile(next);
        t = next;
    }
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
    int unwanted = 0; /* value tiles to pass over before the next one wanted */

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
    __device__ __forceinline__ void skip_values() {
#pragma unroll 1
        for (; unwanted > 0; unwanted--) {
            mbarrier_wait(values.full_barrier(), values.phase);
            value_read();
        }
    }
};

} // namespace sm90

#endif /* DLATTN_SM90_PIPELINE_CUH_ */
