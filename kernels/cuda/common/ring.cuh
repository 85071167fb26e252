// Queries, keys and values on their way to shared memory, whatever their layout; elements of 16 or 8 bits.
#pragma once

#include "kernels/cuda/common/pairs.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/registers.cuh"
#include "kernels/cuda/common/sequence.cuh"
#include "kernels/cuda/common/sixteen_bit.cuh"

#include <type_traits>

// Loads COUNT rows of COLS elements into shared memory, with zeros past `dim` elements of a row.
template <typename E, int THREADS, int COUNT, int COLS>
struct Loader {
    // A panel is as many chunks of a row as change places among themselves. Threads lie on WIDTH chunks of STEP rows, so
    // one keeps its column and its place in the permutation wherever it copies.
    static constexpr int BYTES = sizeof(E), PER_CHUNK = 16 / BYTES, PER_WORD = 4 / BYTES;
    using At = Chunks<COLS * BYTES / 2>;
    using Bits = std::conditional_t<BYTES == 1, uint8_t, uint16_t>;
    static constexpr int CHUNKS = COLS / PER_CHUNK, WIDTH = At::GROUP * 2, STEP = THREADS / WIDTH;
    static_assert(CHUNKS % WIDTH == 0 && STEP % 8 == 0, "");

    // Where this thread's first chunk is, in the tile and in the tensor.
    __device__ __forceinline__ static uint32_t place() {
        return At::at(threadIdx.x / WIDTH, threadIdx.x % WIDTH);
    }
    __device__ __forceinline__ static const char *start(const E *from, int64_t stride) {
        return (const char *)(from + threadIdx.x / WIDTH * stride +
                              threadIdx.x % WIDTH * PER_CHUNK);
    }

    // How many columns exist from this thread's first on.
    __device__ __forceinline__ static int columns(int dim) {
        return dim - threadIdx.x % WIDTH * PER_CHUNK;
    }

    // 16-byte aligned rows: `rows` exist, or ALL. `to`, `from` and `columns` are of this thread; `from` moves on by COUNT
    // rows.
    template <bool ALL>
    __device__ __forceinline__ static void aligned(uint32_t to, const char *&from, int64_t stride,
                                                   int rows, int columns) {
        const int row = threadIdx.x / WIDTH;
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c += WIDTH)
                if (COUNT % STEP == 0 || i + row < COUNT)
                    copy_async(to + i * COLS * BYTES + c * 16, from + c * 16,
                               c * PER_CHUNK < columns && (ALL || i + row < rows));
            from += (i + STEP <= COUNT ? STEP : COUNT % STEP) * BYTES * stride;
        }
    }

    // Any layout, element by element: row_of(r) says where a row starts.
    template <typename RowOf>
    __device__ static void any(uint32_t to, RowOf row_of, int64_t inner, int rows, int dim) {
#pragma unroll 1
        for (int x = threadIdx.x; x < COUNT * CHUNKS; x += THREADS) {
            const int r = x / CHUNKS, c = x % CHUNKS * PER_CHUNK;
            const Bits *const row = (const Bits *)row_of(r < rows ? r : 0);
            uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < PER_CHUNK; ++e)
                if (r < rows && c + e < dim)
                    words[e / PER_WORD] |= (uint32_t)row[(c + e) * inner]
                                           << e % PER_WORD * (8 * BYTES);
            store_chunk(to + At::at(r, c / PER_CHUNK), words);
        }
    }

    // 16-byte aligned rows that lie anywhere, in pages; the addresses of two rows are looked up at a time.
    template <typename RowOf>
    __device__ static void paged(uint32_t to, RowOf row_of, int rows, int dim) {
        const int row = threadIdx.x / WIDTH, here = columns(dim);
        to += place();
#pragma unroll 2
        for (int i = 0; i < COUNT; i += STEP) {
            const int r = i + row;
            const E *const from = row_of(r < rows ? r : 0) + threadIdx.x % WIDTH * PER_CHUNK;
#pragma unroll
            for (int c = 0; c < CHUNKS; c += WIDTH)
                if (COUNT % STEP == 0 || r < COUNT)
                    copy_async(to + i * COLS * BYTES + c * 16, from + c * PER_CHUNK,
                               r < rows && c * PER_CHUNK < here);
        }
    }
};

// Which tiles come after tile g: all of them, one after the other. The first step of a block has no tile, g is first - 1.
template <int BN, int STAGES, bool PAIRS>
struct Steps {
    Steps() = default;
    __device__ __forceinline__ Steps(const PairOptions &, int, int, int, int) {}
    __device__ __forceinline__ static int after(int g, int n) { return g + n; }
    __device__ __forceinline__ static int skipped(int, int) { return 0; }
    __device__ __forceinline__ static int turn(int g) { return g + 1; }
};
// Those of which segments and block mask leave something.
template <int BN, int STAGES>
struct Steps<BN, STAGES, true> {
    SeenTiles<BN, true> seen;
    int next[STAGES];

    __device__ __forceinline__ Steps(const PairOptions &options, int row, int end_row, int first,
                                     int end)
        : seen(options, row, end_row, first, end) {
        for (int &tile : next)
            tile = seen.begin() - 1;
#pragma unroll 1
        for (int n = 0; n < STAGES; ++n)
            turn(0);
    }
    __device__ __forceinline__ int after(int g, int n) const { return n == 0 ? g : next[n - 1]; }
    // Tiles between after(g, n) and the one before it.
    __device__ __forceinline__ int skipped(int g, int n) const {
        return after(g, n) - after(g, n - 1) - 1;
    }
    __device__ __forceinline__ int turn(int) {
        const int g = next[0];
#pragma unroll
        for (int n = 1; n < STAGES; ++n)
            next[n - 1] = next[n];
        next[STAGES - 1] = kept_by_all(seen.next(next[STAGES - 1] + 1));
        return g;
    }
};

// The keys and values of a block on their way into the ring, tile by tile.
// T: THREADS, KEYS of a tile, the head dims D and DV, STAGES, and the bytes of keys, K_BYTES, and of both, STAGE_BYTES.
template <typename E, typename T>
struct Ring {
    static constexpr int D = T::D, DV = T::DV, BN = T::KEYS, STAGES = T::STAGES;
    using LoadK = Loader<E, T::THREADS, BN, D>;
    using LoadV = Loader<E, T::THREADS, BN, DV>;
    static constexpr int BYTES = STAGES * T::STAGE_BYTES;

    const fwd_params &p;
    const Sequence &seq;
    const int b;
    const bool pages;
    const E *const k, *const v; // the first key of the sequence, or of the pages
    const uint32_t stage;       // the first one
    const int first, end;
    const int aligned;                 // tiles before this one are simply aligned rows
    const char *next_key, *next_value; // of this thread, in the tile that comes next
    const uint32_t key_to, value_to;   // of this thread, in the first stage
    const int key_columns, value_columns;

    __device__ __forceinline__ static const E *start(const fwd_view &view, const Work &work,
                                                     int kv_head, int64_t k_start, bool pages) {
        return (const E *)view.data + (pages ? 0 : work.b * view.stride[0]) +
               kv_head * view.stride[1] + k_start * view.stride[2];
    }

    __device__ __forceinline__ static int aligned_tiles(const fwd_params &p, const Sequence &seq,
                                                        bool pages, int end) {
        const int both = FWD_ALIGNED_KEY | FWD_ALIGNED_VALUE;
        return kept_by_all(pages || (p.flags & both) != both ? 0 : min(end, seq.k_len / BN));
    }

    __device__ __forceinline__ Ring(const fwd_params &p, const Work &work, const Sequence &seq,
                                    const E *k, const E *v, bool pages, uint32_t stage, int first,
                                    int end)
        : p(p), seq(seq), b(work.b), pages(pages), k(k), v(v), stage(stage), first(first), end(end),
          aligned(aligned_tiles(p, seq, pages, end)),
          next_key(LoadK::start(k + (int64_t)first * BN * p.key.stride[2], p.key.stride[2])),
          next_value(LoadV::start(v + (int64_t)first * BN * p.value.stride[2], p.value.stride[2])),
          key_to(kept(stage + LoadK::place())),
          value_to(D == DV ? key_to + T::K_BYTES : kept(stage + T::K_BYTES + LoadV::place())),
          key_columns(kept(LoadK::columns(p.dim_qk))),
          value_columns(kept(LoadV::columns(p.dim_v))) {}

    // `rows` rows from `row` on of a tile that is not simply aligned rows.
    template <typename Load>
    __device__ __forceinline__ void load_slowly(uint32_t to, const E *base, const fwd_view &view,
                                                int row, int rows, int dim, bool chunks) const {
        const auto in_rows = [&](int r) { return base + (row + r) * view.stride[2]; };
        const auto in_pages = [&](int r) { return base + paged_row(p, view, b, row + r); };
        if (!pages)
            Load::any(to, in_rows, view.stride[3], rows, dim);
        else if (chunks)
            Load::paged(to, in_pages, rows, dim);
        else
            Load::any(to, in_pages, view.stride[3], rows, dim);
    }

    // Tiles one after the other from `first` on but those that are skipped, into the stage at `offset`.
    __device__ __forceinline__ void load_key(int tile, int skipped, uint32_t offset) {
        const int left = seq.k_len - tile * BN;
        next_key += skipped * p.key.stride[2] * (BN * (int)sizeof(E));
        if (tile < aligned)
            LoadK::template aligned<true>(key_to + offset, next_key, p.key.stride[2], left,
                                          key_columns);
        else if (tile < end && !pages && p.flags & FWD_ALIGNED_KEY)
            LoadK::template aligned<false>(key_to + offset, next_key, p.key.stride[2], left,
                                           key_columns);
        else if (tile < end)
            load_slowly<LoadK>(stage + offset, k, p.key, tile * BN, left, p.dim_qk,
                               p.flags & FWD_ALIGNED_KEY);
    }
    __device__ __forceinline__ void load_value(int tile, int skipped, uint32_t offset) {
        const int left = seq.k_len - tile * BN;
        next_value += skipped * p.value.stride[2] * (BN * (int)sizeof(E));
        if (tile < aligned)
            LoadV::template aligned<true>(value_to + offset, next_value, p.value.stride[2], left,
                                          value_columns);
        else if (tile < end && !pages && p.flags & FWD_ALIGNED_VALUE)
            LoadV::template aligned<false>(value_to + offset, next_value, p.value.stride[2], left,
                                           value_columns);
        else if (tile < end)
            load_slowly<LoadV>(stage + T::K_BYTES + offset, v, p.value, tile * BN, left, p.dim_v,
                               p.flags & FWD_ALIGNED_VALUE);
    }

    // All pairs of the ring but the last, which follows in the first step.
    template <typename Steps>
    __device__ __forceinline__ void fill(const Steps &steps) {
        const int g = first - 1;
        load_key(steps.after(g, 1), steps.skipped(g, 1), 0);
        copy_commit();
#pragma unroll
        for (int i = 1; i < STAGES; ++i) {
            load_key(steps.after(g, i + 1), steps.skipped(g, i + 1), i * T::STAGE_BYTES);
            load_value(steps.after(g, i), steps.skipped(g, i), i * T::STAGE_BYTES);
            copy_commit();
        }
    }

    // Waits for the pair of step g, which is at `offset`, and has the one STAGES steps later take the place of the last.
    template <typename Steps>
    __device__ __forceinline__ void turn(int g, const Steps &steps, uint32_t offset) {
        if (g < first)
            copy_wait<STAGES - 1>();
        else
            copy_wait<STAGES - 2>();
        __syncthreads(); // the pair of this step is there, and all warps are done with the step before
        if (g >= first) {
            const uint32_t free =
                offset == 0 ? (STAGES - 1) * T::STAGE_BYTES : offset - T::STAGE_BYTES;
            load_key(steps.after(g, STAGES), steps.skipped(g, STAGES), free);
            load_value(steps.after(g, STAGES - 1), steps.skipped(g, STAGES - 1), free);
            copy_commit();
        }
    }

    // With one stage K of the next tile is on its way while V of this one is used, and the other way round.
    template <typename Steps>
    __device__ __forceinline__ void turn_to_value(int g, const Steps &steps) {
        if (g >= first) {
            copy_wait<0>();
            __syncthreads();
        }
        load_key(steps.after(g, 1), steps.skipped(g, 1), 0);
        copy_commit();
    }
    template <typename Steps>
    __device__ __forceinline__ void turn_to_key(int g, const Steps &steps) {
        copy_wait<0>();
        __syncthreads();
        load_value(steps.after(g, 1), steps.skipped(g, 1), 0);
        copy_commit();
    }
};

// A block's queries to shared memory.
template <typename Load, typename E>
__device__ __forceinline__ void load_queries(const fwd_params &p, uint32_t to, const E *q,
                                             int rows) {
    if (p.flags & FWD_ALIGNED_QUERY) {
        const char *from = Load::start(q, p.query.stride[2]);
        Load::template aligned<false>(to + Load::place(), from, p.query.stride[2], rows,
                                      Load::columns(p.dim_qk));
    } else {
        Load::any(
            to, [&](int r) { return q + r * p.query.stride[2]; }, p.query.stride[3], rows,
            p.dim_qk);
    }
}
