// Attention forward for Hopper with float8 queries, keys and values. The walk over tiles, the rings and the masks are those of fwd.cuh;
// docs/fp8.md says what differs:
//
// - wgmma takes 8-bit operands with the summed axis innermost alone, so two warps of the producer transpose V tiles on their way.
// - Weights are rounded to e4m3. A row's largest is 2^8 at first; limit() keeps sums of weights, and so each of them, below 448.
// - The tensor cores' own sums keep some 13 bits. O is added up in f32 from parts of theirs, of SETTLED_TILES key tiles each: up to 128 columns
//   in shared memory; of more columns what e5m2 keeps of them is put there.
#pragma once

#include "kernels/cuda/common/float8.cuh"
#include "kernels/cuda/sm90/fwd.cuh"

#include <cuda_fp8.h>

// ---- Shapes ----

// Queries are e4m3, keys and values of E. Where rows see few keys O need not be settled.
template <typename E, int Dim, int TileK, int Warpgroups, int Stages, int QueryStages, int Blocks,
          bool Settles, Variant Of>
struct Float8Config {
    using Element = void; // of the output: p.output_dtype says
    using Query = __nv_fp8_e4m3;
    using Cached = E;
    static constexpr bool IS_FLOAT8 = true;
    static constexpr int COLUMN_ELEMENTS = 128;
    static constexpr int DIM_QK = Dim, DIM_V = Dim;
    static constexpr int TILE_K = TileK;
    static constexpr int WARPGROUPS = Warpgroups, STAGES = Stages, QUERY_STAGES = QueryStages;
    static constexpr bool IS_PLACED = Of != PLAIN, IS_PACKED = IS_PLACED,
                          HAS_SOFTCAP = Of == SOFTCAP, HAS_ALIBI = false,
                          MULTIPLIES_DISTANCES = false, IS_ANY = false, LOADS_BIAS = false,
                          COPIES_BIAS = false, COPIES_ROWS = false, IS_SPLIT = false,
                          SHARES_ROWS = false, HAS_EXPONENTS = false, SHAPES_SCORES = HAS_SOFTCAP,
                          HAS_LOOPS = true, SHRINKS_OUTSIDE = false;
    static constexpr int ROWS_APART = 64, KEY_READERS = WARPGROUPS;

    static constexpr int TILE_Q = 64 * WARPGROUPS, THREADS = 128 * (WARPGROUPS + 1);
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 3 ? 32 : 24;
    static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 3 ? 160 : Blocks == 2 ? 104 : 240;
    static constexpr int TRANSPOSERS = 2; // warps
    static constexpr int KEY_WRITERS = 1, VALUE_WRITERS = TRANSPOSERS,
                         CLAIM_READERS = 1 + TRANSPOSERS;
    static constexpr bool HAS_TURNS = Dim > 128;
    static constexpr bool SETTLES = Settles;
    static constexpr int SETTLED_TILES = SM90_FLOAT8_SETTLED_KEYS(Dim) / TILE_K;

    static constexpr int COLUMNS_QK = (Dim + 127) / 128, COLUMNS_V = COLUMNS_QK;
    static constexpr int QUERY_BYTES = 64 * 128 * COLUMNS_QK, KEY_COLUMN = TILE_K * 128;
    static constexpr int KEY_BYTES = KEY_COLUMN * COLUMNS_QK;
    static constexpr int LOADED_BYTES = KEY_COLUMN; // values are loaded by 128 columns
    static constexpr int VALUE_BYTES = Dim * 128;   // transposed: DIM_V rows of TILE_K keys
    static constexpr int QUERY = 0, KEY = QUERY + QUERY_STAGES * WARPGROUPS * QUERY_BYTES;
    static constexpr int LOADED = KEY + STAGES * KEY_BYTES, VALUE = LOADED + STAGES * LOADED_BYTES;
    static constexpr int SETTLED = VALUE + STAGES * VALUE_BYTES,
                         SETTLED_BYTES = Settles * 16 * Dim * (Dim <= 128 ? 4 : 1); // of a warp
    static constexpr int TILES = SETTLED + WARPGROUPS * 4 * SETTLED_BYTES;
    static constexpr bool COUNTS_BUFFERS = Dim > 128;
    static constexpr int TILE_BYTES = 128, CLAIMED_TILES = 2,
                         TILE_SLOTS = (Dim > 128 ? 2 : 1) * QUERY_STAGES;
    static constexpr int BARRIERS = TILES + TILE_BYTES * (TILE_SLOTS * WARPGROUPS + CLAIMED_TILES);
    static constexpr int SHARED_BYTES =
        BARRIERS + 8 * (2 * QUERY_STAGES * WARPGROUPS + 6 * STAGES + 2 * CLAIMED_TILES) + 1024;
    static_assert(IS_PLACED && Dim % 32 == 0 && Dim <= 256 && TILE_K % 64 == 0 && TILE_K <= 128,
                  "");
    static_assert(SHARED_BYTES <= 227 * 1024, "");
    static_assert(TILE_SLOTS == QUERY_STAGES || QUERY_STAGES == 1, "the phase says which of two");
};

// ---- wgmma ----

// D[64, N] (f32) = or += A[64, 32] B[32, N], A being e4m3, and both with the summed axis innermost.
template <typename B, int N>
struct Float8Wgmma;

#define SM90_FLOAT8_WGMMA(B, name, N, R, i0, i1, i2, i3, i4, i5)                                   \
    template <>                                                                                    \
    struct Float8Wgmma<B, N> {                                                                     \
        static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b,           \
                                                  int accumulate) {                                \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3." name               \
                         " {" SM90_R##R "}, %" #i0 ", %" #i1 ", p, 1, 1;\n}\n"                     \
                         : SM90_D##R                                                               \
                         : "l"(a), "l"(b), "r"(accumulate));                                       \
        }                                                                                          \
        static __device__ __forceinline__ void rs(float (&d)[R], const uint32_t *a, uint64_t b,    \
                                                  int accumulate) {                                \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3." name               \
                         " {" SM90_R##R "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4       \
                                        ", p, 1, 1;\n}\n"                                          \
                         : SM90_D##R                                                               \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));   \
        }                                                                                          \
    };
#define SM90_FLOAT8_WGMMA_BOTH(N, R, ...)                                                          \
    SM90_FLOAT8_WGMMA(__nv_fp8_e4m3, "e4m3", N, R, __VA_ARGS__)                                    \
    SM90_FLOAT8_WGMMA(__nv_fp8_e5m2, "e5m2", N, R, __VA_ARGS__)
SM90_FLOAT8_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
SM90_FLOAT8_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
SM90_FLOAT8_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133)

// ---- Producers ----

// Values as they are loaded; in the ring of Shared they stand transposed.
template <class C>
__device__ __forceinline__ Ring<C::STAGES> loaded_ring(const Shared<C> &s) {
    const uint32_t first = s.claimed_ring().empty + 8 * C::CLAIMED_TILES;
    return {first, first + 8 * C::STAGES};
}

// A warp's part of up to 128 columns of a V tile, from [key][column] to [column][key], both in rows of 128 bytes and swizzled. Of 16 columns the
// even ones come before the odd ones; of 16 keys, 4 i, 4 i + 1 .. are those that a thread i of four has weights of: 2 i, 2 i + 1, 2 i + 8,
// 2 i + 9. Either is what ldmatrix and a byte permutation give. Addresses are constants apart, or an exclusive or
// where they are swizzled: instructions of these warps hold up the consumers on their schedulers, and a wgmma waits for the slowest of four.
// Shared memory is busy and answers late, so two pieces are on their way while one is turned; registers for a third would be spilled.
template <class C>
__device__ __forceinline__ void transpose_values(uint32_t from, uint32_t to, int warp) {
    constexpr int COLUMNS = C::DIM_V < 128 ? C::DIM_V : 128, ASKED_FOR = 3;
    constexpr int PARTS = C::TILE_K / 32, PIECES = COLUMNS / 16 / C::TRANSPOSERS * PARTS;
    const int lane = threadIdx.x % 32, row = lane % 8;
    const uint32_t load = from + 128 * lane + ((row ^ warp) << 4),
                   store = to + 128 * (16 * warp + lane % 16) + ((lane / 16 ^ row) << 4);
    uint32_t pieces[ASKED_FOR][4];
#pragma unroll
    for (int i = 0; i < PIECES + ASKED_FOR - 1; i++) {
        if (i < PIECES)
            load_matrices_transposed(pieces[i % ASKED_FOR],
                                     (load ^ i / PARTS * C::TRANSPOSERS << 4) +
                                         i % PARTS * 32 * 128);
        const int j = i - (ASKED_FOR - 1);
        if (j < 0)
            continue;
        const uint32_t(&w)[4] = pieces[j % ASKED_FOR];
        const uint32_t turned[4] = {
            __byte_perm(w[0], w[1], 0x6420), __byte_perm(w[0], w[1], 0x7531),
            __byte_perm(w[2], w[3], 0x6420), __byte_perm(w[2], w[3], 0x7531)};
        store_matrices((store ^ j % PARTS << 5) + j / PARTS * C::TRANSPOSERS * 16 * 128, turned);
    }
}

// One warp for both: transposers that also brought values had no registers for it, and spilled. COUNTS_BUFFERS: two places in rings are
// too many for theirs as well, and follow from the number of the key tile.
template <class C>
__device__ __forceinline__ void produce_keys_and_values(const sm90_params &p, const Shared<C> &s) {
    Ring<C::STAGES> keys = s.key_ring(), values = loaded_ring<C>(s);
    Ring<C::CLAIMED_TILES> claims = s.claimed_ring();
    uint32_t number = 0;
    for (Tile<C> t = receive_claim<C>(s, claims); t.index >= 0; t = receive_claim<C>(s, claims)) {
        for (int n = t.first_block; n < t.end_block; n++, number++) {
            const Block block = block_of<C>(p, t, n);
            if (C::COUNTS_BUFFERS)
                keys = keys.at(number);
            load_block<C, C::COLUMNS_QK>(p, p.key_map, s.key(keys.stage), keys, block);
#pragma unroll 1
            for (int c = 0; c < C::COLUMNS_V; c++) {
                if (C::COUNTS_BUFFERS)
                    values = values.at(number * C::COLUMNS_V + c);
                load_block<C, 1>(p, p.value_map,
                                 s.base + C::LOADED + values.stage * C::LOADED_BYTES, values, block,
                                 c);
            }
        }
    }
}

// Values as they are loaded to values as P V takes them.
template <class C>
__device__ __forceinline__ void produce_transposed_values(const Shared<C> &s, int warp) {
    Ring<C::STAGES> loaded = loaded_ring<C>(s), values = s.value_ring();
    Ring<C::CLAIMED_TILES> claims = s.claimed_ring();
    uint32_t number = 0;
    for (Tile<C> t = receive_claim<C>(s, claims); t.index >= 0; t = receive_claim<C>(s, claims)) {
#pragma unroll 1
        for (int n = t.end_block - t.first_block; n > 0; n--, number++) {
            if (C::COUNTS_BUFFERS)
                values = values.at(number);
            mbarrier_wait(values.empty_barrier(), values.phase ^ 1);
#pragma unroll 1
            for (int c = 0; c < C::COLUMNS_V; c++) {
                if (C::COUNTS_BUFFERS)
                    loaded = loaded.at(number * C::COLUMNS_V + c);
                mbarrier_wait(loaded.full_barrier(), loaded.phase);
                transpose_values<C>(s.base + C::LOADED + loaded.stage * C::LOADED_BYTES,
                                    s.value(values.stage) + c * 128 * 128, warp);
                __syncwarp();
                release<C>(loaded.empty_barrier());
                loaded.advance();
            }
            async_proxy_fence();
            __syncwarp();
            release<C>(values.full_barrier());
            values.advance();
        }
    }
}

// ---- Consumers ----

// Four neighbouring columns, if they are `inside`: no branch, of which the epilogue would have dozens. All blocks store at one time, and L2 keeps
// keys and values rather than these. What comes of `poison` is a zero of either sign, or two, unless one of them is not finite.
__device__ __forceinline__ uint32_t store_four_if(bool inside, float *to, const float (&x)[4],
                                                  uint32_t poison) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
        "@p st.global.cs.v4.f32 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(static_cast<int>(inside)),
        "l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
        : "memory");
    return __float_as_uint(fmaf(
        x[0], 0.f, fmaf(x[1], 0.f, fmaf(x[2], 0.f, fmaf(x[3], 0.f, __uint_as_float(poison))))));
}
template <typename E> // of 16 bits
__device__ __forceinline__ uint32_t store_four_if(bool inside, E *to, const float (&x)[4],
                                                  uint32_t poison) {
    const uint32_t low = pack<E>(x[0], x[1]), high = pack<E>(x[2], x[3]);
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
                 "@p st.global.cs.v2.b32 [%1], {%2, %3};\n}\n" ::"r"(static_cast<int>(inside)),
                 "l"(to), "r"(low), "r"(high)
                 : "memory");
    return multiply_add_zero<E>(high, multiply_add_zero<E>(low, poison));
}

// Where a thread's two rows of the output begin, and how many of its columns from there on are inside: known before the first store, since what is
// read behind stores waits for them.
template <class C>
struct OutputRows {
    int64_t offset[2]; // elements
    int columns[2];

    __device__ __forceinline__ OutputRows(const sm90_params &p, const Place<C> &t, int first_row) {
        const int first = thread<C>() % 4 * 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + 8 * half + thread<C>() % 32 / 4;
            columns[half] = is_row<C>(p, t, row) ? p.dim_v - first : 0;
            offset[half] = row_offset<C>(p, p.output_strides, t, row) + first;
            asm volatile("" : "+r"(columns[half]), "+l"(offset[half]));
        }
    }
};

// The 16 rows of a warp, in E, straight from registers; a thread has columns 4 i .. 4 i + 3 of 16, where transpose_values() put them.
template <class C, typename E>
__device__ __forceinline__ void
store_outputs(const sm90_params &p, const OutputRows<C> &rows, const float (&normalise)[2],
              const float (&output)[C::DIM_V / 2], uint32_t (&poison)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        poison[half] = 0;
        E *const to = static_cast<E *>(p.output) + rows.offset[half];
#pragma unroll
        for (int i = 0; i < C::DIM_V / 16; i++) {
            float x[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                x[j] = output[8 * i + 4 * (j % 2) + 2 * half + j / 2] * normalise[half];
            poison[half] = store_four_if(16 * i < rows.columns[half], to + 16 * i, x, poison[half]);
        }
    }
}

// The end of the 64 rows of a warpgroup: output and lse.
template <class C>
__device__ __forceinline__ void store_float8_rows(const sm90_params &p, int wg, const Place<C> &t,
                                                  const float (&output)[C::DIM_V / 2],
                                                  const float (&row_top)[2],
                                                  const float (&sum)[2]) {
    const int lane = thread<C>() & 31,
              first_row = t.first_row + 64 * wg + thread<C>() / 32 % 4 * 16;
    float total[2], top[2] = {row_top[0], row_top[1]}, normalise[2];
    uint32_t spoilt[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half + lane / 4;
        total[half] = sum[half];
        total[half] += __shfl_xor_sync(~0u, total[half], 1);
        total[half] += __shfl_xor_sync(~0u, total[half], 2);
        normalise[half] = total[half] == 0 ? 0 : reciprocal_approx(total[half]);
        if (p.sinks)
            normalise[half] = add_sink(sink_of<C>(p, t, row), top[half], total[half]);
        normalise[half] *= scales_of<C>(p, t, row).value;
    }
    const OutputRows<C> rows(p, t, first_row);
    uint32_t poison[2];
    if (p.output_dtype == SM90_F32)
        store_outputs<C, float>(p, rows, normalise, output, poison);
    else if (p.output_dtype == SM90_F16)
        store_outputs<C, __half>(p, rows, normalise, output, poison);
    else
        store_outputs<C, __nv_bfloat16>(p, rows, normalise, output, poison);
#pragma unroll
    for (int half = 0; half < 2; half++)
        spoilt[half] = __ballot_sync(~0u, rows.columns[half] > 0 && (poison[half] & 0x7fff7fff ||
                                                                     !(total[half] < INFINITY) ||
                                                                     is_far<C>(p, top[half])));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half + lane / 4;
        if (is_row<C>(p, t, row) && p.lse && lane % 4 == 0 && !(spoilt[half] >> lane & 15))
            store_lse<C>(p, t, row,
                         total[half] == 0 ? p.empty_lse
                                          : (top[half] + log2_approx(total[half])) * LN2);
    }
    if (__builtin_expect(spoilt[0] | spoilt[1], 0)) {
        const Tile<C> tile = tile_at<C>(p, t.index);
        __syncwarp();
        for (int i = 0; i < 16; i++)
            if (spoilt[i / 8] >> (4 * (i & 7)) & 15)
                exact_row<C>(p, tile, first_row + i);
    }
}

__device__ __forceinline__ float4 widen_four_e5m2(uint32_t word) {
    uint32_t low, high;
    widen_float8(low, high, word, true);
    const float2 x = widen_pair<__half>(low), y = widen_pair<__half>(high);
    return make_float4(x.x, x.y, y.x, y.y);
}

// The rows of a warpgroup, as Consumer has them.
template <class C>
struct Float8Consumer : Consumer<C> {
    using Base = Consumer<C>;
    using Base::clear_sums, Base::fresh, Base::output, Base::score, Base::sum, Base::top;
    static constexpr int SCORES = Base::SCORES;
    // A tile ends before the next one begins: no registers are left for two, and the store is what queries are on their way beside.
    static constexpr bool ENDS_TILES = C::DIM_V > 128;
    static constexpr float WEIGHT_LOG2 = 8; // of a row's first largest weight: e4m3 ends with 448

    uint32_t weight[SCORES / 4]; // the A operand of P V
    float scale[2]; // from scores to exponents of 2; with softcap to what scores are without scales

    // O is `output`, unless that is fresh, and what was settled before, to be multiplied: by numbers below 0, -0 too, if nothing was. It is settled
    // before a key tile whose number modulo SETTLED_TILES is `due`.
    int due;
    float settled_factor[2];

    __device__ __forceinline__ void start_scores(const Shared<C> &s, const Pipeline<C> &pipe) {
        const Descriptor a(s.query(pipe.queries.stage, pipe.wg), 16, 1024),
            b(s.key(pipe.keys.stage), 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < C::DIM_QK / 32; k++)
            Float8Wgmma<typename C::Cached, C::TILE_K>::ss(
                score, a.at(k / 4 * 64 * 128 + 32 * (k % 4)),
                b.at(k / 4 * C::KEY_COLUMN + 32 * (k % 4)), k > 0);
        wgmma_commit();
    }

    __device__ __forceinline__ void start_output(const Shared<C> &s, const Pipeline<C> &pipe) {
        const Descriptor b(s.value(pipe.values.stage), 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < C::TILE_K / 32; k++)
            Float8Wgmma<typename C::Cached, C::DIM_V>::rs(output, weight + 4 * k, b.at(32 * k),
                                                          k > 0 || ENDS_TILES || !fresh);
        wgmma_commit();
        fresh = false;
    }

    // ---- What is settled: in shared memory, where a thread finds what it has put there ----
    // Of wide heads not O itself but what e5m2 keeps of it, for which there is room; the rest, an eighth at most, goes on in the sums.
    static constexpr bool SETTLES_ALL = C::DIM_V <= 128;
    static constexpr float TO_E5M2 = 0x1p-12f; // O is up to 2^28 and beyond, where more is left

    static __device__ __forceinline__ uint32_t settled(const Shared<C> &s, int wg) {
        return s.base + C::SETTLED + (4 * wg + thread<C>() / 32 % 4) * C::SETTLED_BYTES +
               thread<C>() % 32 * 16;
    }

    // O += factor of its row * x, of four registers from `first` on.
    __device__ __forceinline__ void add(int first, float4 x, const float (&factor)[2]) {
        output[first] = fmaf(x.x, factor[0], output[first]);
        output[first + 1] = fmaf(x.y, factor[0], output[first + 1]);
        output[first + 2] = fmaf(x.z, factor[1], output[first + 2]);
        output[first + 3] = fmaf(x.w, factor[1], output[first + 3]);
    }

    __device__ __forceinline__ void add_settled(const Shared<C> &s, int wg) {
        if (__float_as_int(settled_factor[0]) < 0)
            return;
        const uint32_t from = settled(s, wg);
        if constexpr (SETTLES_ALL) {
#pragma unroll
            for (int i = 0; i < C::DIM_V / 8; i++)
                add(4 * i, load_floats(from + 512 * i), settled_factor);
        } else {
            const float factor[2] = {settled_factor[0] / TO_E5M2, settled_factor[1] / TO_E5M2};
#pragma unroll
            for (int i = 0; i < C::DIM_V / 32; i++) {
                uint32_t w[4];
                load_chunk(w, from + 512 * i);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    add(16 * i + 4 * j, widen_four_e5m2(w[j]), factor);
            }
        }
    }

    __device__ __forceinline__ void settle(const Shared<C> &s, int wg) {
        add_settled(s, wg);
        const uint32_t to = settled(s, wg);
        if constexpr (SETTLES_ALL) {
#pragma unroll
            for (int i = 0; i < C::DIM_V / 8; i++)
                store_floats(to + 512 * i, make_float4(output[4 * i], output[4 * i + 1],
                                                       output[4 * i + 2], output[4 * i + 3]));
            fresh = true;
        } else {
            constexpr float BACK[2] = {-1 / TO_E5M2, -1 / TO_E5M2};
#pragma unroll
            for (int i = 0; i < C::DIM_V / 32; i++) {
                uint32_t w[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float *const o = output + 16 * i + 4 * j;
                    w[j] = join(pack_two_e5m2(o[0] * TO_E5M2, o[1] * TO_E5M2),
                                pack_two_e5m2(o[2] * TO_E5M2, o[3] * TO_E5M2));
                    add(16 * i + 4 * j, widen_four_e5m2(w[j]), BACK);
                }
                store_chunk(to + 512 * i, w);
            }
        }
        settled_factor[0] = settled_factor[1] = 1;
    }

    // The first of many key tiles may have weights beside which others vanish, an attention sink: it is settled alone.
    __device__ __forceinline__ void start_sums(const Tile<C> &t) {
        const bool settles = t.end_block - t.first_block > C::SETTLED_TILES;
        due = settles ? (t.first_block + 2) % C::SETTLED_TILES : -1;
        fresh = true;
        settled_factor[0] = settled_factor[1] = -1;
    }

    // ---- Weights ----

    template <bool MASKED>
    __device__ __forceinline__ void shape(const sm90_params &p, const Shared<C> &s,
                                          const Tile<C> &t, int n, Pipeline<C> &pipe) {
        if constexpr (C::HAS_SOFTCAP) {
#pragma unroll
            for (int i = 0; i < SCORES; i++)
                score[i] *= scale[i / 2 % 2];
        }
        float shift[2];
        this->template shape_scores<MASKED, true>(p, s, t, n, pipe, shift);
    }

    __device__ __forceinline__ float exponent(int half) const {
        return C::HAS_SOFTCAP ? 1.f : scale[half];
    }

    // The top to the row's maximum so far, less WEIGHT_LOG2; older results are to be multiplied by `factor`.
    __device__ __forceinline__ void follow_maximum(float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float next =
                fmaxf(top[half], this->largest(this->maximum(half)) * exponent(half) - WEIGHT_LOG2);
            factor[half] = exp2_approx(top[half] - (next == -INFINITY ? 0.f : next));
            top[half] = next;
            sum[half] *= factor[half];
        }
    }

    // Shaped S -> 2^(S - top), and their sums in `part`.
    template <bool TRACK>
    __device__ __forceinline__ void weigh(float (&factor)[2], float (&part)[2]) {
        factor[0] = factor[1] = 1;
        if (TRACK)
            follow_maximum(factor);
        const float shift[2] = {0, 0};
        float offset[2];
        this->finite_top(shift, offset);
        part[0] = part[1] = 0;
#pragma unroll
        for (int i = 0; i < SCORES; i++) {
            const int half = i / 2 % 2;
            score[i] = exp2_approx(fmaf(score[i], exponent(half), -offset[half]));
            part[half] += score[i];
        }
    }

    // limit(), whose factor joins those that are in `factor`.
    __device__ __forceinline__ void limit_further(float (&part)[2], float (&factor)[2]) {
        float further[2];
        this->limit(part, further);
        factor[0] *= further[0];
        factor[1] *= further[1];
    }

    __device__ __forceinline__ void add_sums(const float (&part)[2]) {
        sum[0] += part[0];
        sum[1] += part[1];
    }

    // Two weights of a row, half of what a register of the A fragment has, are neighbours; transpose_values() orders the keys for it.
    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < SCORES / 4; i++) {
            const int at = i / 2 * 8 + i % 2 * 2;
            weight[i] = pack_e4m3(score[at], score[at + 1], score[at + 4], score[at + 5]);
        }
    }

    // ---- Steps ----

    __device__ __forceinline__ void begin_tile(const sm90_params &p, const Tile<C> &t, int wg) {
        const int row = first_row_of_thread<C>(t, wg);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Scales scales = scales_of<C>(p, t, row + 8 * half);
            scale[half] = C::HAS_SOFTCAP ? scales.score / p.scale : scales.score_log2;
        }
        clear_sums();
    }

    __device__ __forceinline__ void finish(const sm90_params &p, const Shared<C> &s, int wg,
                                           const Place<C> &t, const float (&row_top)[2],
                                           const float (&row_sum)[2]) {
        if constexpr (C::SETTLES)
            add_settled(s, wg);
        store_float8_rows<C>(p, wg, t, output, row_top, row_sum);
    }

    // The weights of a block's first key tile n, or a tile's, with nothing else under way.
    __device__ __forceinline__ void first(const sm90_params &p, const Shared<C> &s,
                                          const Tile<C> &t, int n, Pipeline<C> &pipe) {
        mbarrier_wait(pipe.keys.full_barrier(), pipe.keys.phase);
        start_scores(s, pipe);
        this->clear_output();
        start_sums(t);
        begin_tile(p, t, pipe.wg);
        wgmma_wait<0>();
        pin(score);
        pipe.key_read(n == t.end_block - 1);
        if (this->is_shaped(t, n))
            shape<true>(p, s, t, n, pipe);
        float factor[2], part[2];
        weigh<true>(factor, part);
        limit_further(part, factor);
        add_sums(part);
        round_weights();
    }

    // As that of Consumer.
    template <bool MASKED, bool NEW_TILE, bool TRACK>
    __device__ __forceinline__ void step(const sm90_params &p, const Shared<C> &s, const Tile<C> &t,
                                         int n, Pipeline<C> &pipe, const Place<C> &finished) {
        if (C::SETTLES && !MASKED && !NEW_TILE && n % C::SETTLED_TILES == due)
            settle(s, pipe.wg);
        mbarrier_wait(pipe.keys.full_barrier(), pipe.keys.phase);
        pin(output);
        pin(weight);
        wait_turn<C>(pipe.wg);
        start_scores(s, pipe);
        mbarrier_wait(pipe.values.full_barrier(), pipe.values.phase);
        start_output(s, pipe);
        pass_turn<C>(pipe.wg);
        wgmma_wait<1>();
        pin(score);
        pipe.key_read(n == t.end_block - 1);
        const float finished_top[2] = {top[0], top[1]}, finished_sum[2] = {sum[0], sum[1]};
        if (NEW_TILE)
            begin_tile(p, t, pipe.wg);
        float factor[2], part[2];
        if (!NEW_TILE || this->is_shaped(t, n))
            shape<MASKED>(p, s, t, n, pipe);
        weigh<TRACK>(factor, part);
        pin(score);
        hold(s.base, (sum[0] + part[0]) + (sum[1] + part[1]));
        wgmma_wait<0>();
        pin(output);
        pin(weight);
        pipe.value_read();
        if (NEW_TILE) {
            finish(p, s, pipe.wg, finished, finished_top, finished_sum);
            start_sums(t);
            limit_further(part, factor);
        } else {
            keep_range<TRACK>(factor, part);
        }
        add_sums(part);
        round_weights();
    }

    // Brings weights and O back into range, which seldom is needed.
    template <bool ALWAYS>
    __device__ __forceinline__ void keep_range(float (&factor)[2], float (&part)[2]) {
        if (!ALWAYS && __builtin_expect(!__any_sync(~0u, this->is_outside(part)), true))
            return;
        limit_further(part, factor);
        settled_factor[0] *= factor[0];
        settled_factor[1] *= factor[1];
        this->rescale_output(factor);
    }

    __device__ __forceinline__ void last(const sm90_params &p, const Shared<C> &s,
                                         const Place<C> &t, Pipeline<C> &pipe) {
        mbarrier_wait(pipe.values.full_barrier(), pipe.values.phase);
        pin(output);
        pin(weight);
        start_output(s, pipe);
        wgmma_wait<0>();
        pin(output);
        pipe.value_read();
        finish(p, s, pipe.wg, t, top, sum);
    }
};

template <class C>
__device__ __forceinline__ void forward_float8(const sm90_params &p) {
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    const Shared<C> s{base,
                      reinterpret_cast<Tile<C> *>(raw + (base - shared_address(raw) + C::TILES))};
    const int warpgroup = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32);
    if (threadIdx.x == 0) {
        tma_prefetch_map(&p.query_map);
        tma_prefetch_map(&p.key_map);
        tma_prefetch_map(&p.value_map);
        init_barriers<C>(s);
        for (int i = 0; i < C::STAGES; i++) {
            mbarrier_init(loaded_ring<C>(s).full + 8 * i, 1);
            mbarrier_init(loaded_ring<C>(s).empty + 8 * i, C::TRANSPOSERS);
        }
        mbarrier_init_fence();
    }
    if (p.list)
        wait_for_predecessor();
    __syncthreads();
    if (warpgroup == 0) {
        registers_decrease<C::PRODUCER_REGISTERS>();
        if (warp == 0)
            produce_keys_and_values<C>(p, s);
        else if (warp == 1)
            produce_queries<C>(p, s);
        else
            produce_transposed_values<C>(s, warp - 2);
    } else {
        registers_increase<C::CONSUMER_REGISTERS>();
        consume<C, Float8Consumer<C>>(p, s, warpgroup - 1);
    }
}
