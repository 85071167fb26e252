// The shape of a compiled tile, and what a tile of the problem is: its rows, the keys that they see, and the order in
// which blocks take tiles.
#pragma once

#include "kernels/cuda/sm90/params.h"
#include "kernels/cuda/sm90/ptx.cuh"

#include <type_traits>

// What a kernel is compiled for. All take sinks. ALONE is PLAIN where a block has one tile. All behind PAIRED also take rows and keys that lie anywhere: pages and, where
// registers suffice for it, packed sequences. BIAS and BIAS_F32 are for a bias of the element type or f32 that TMA can copy, ANY_BIAS is for others, and
// beside all other options. ROWS is PLACED, and SPLIT_ROWS SPLIT, for pages of few keys. PAIRED and those with SPLIT are for other rows: see
// pair.cuh and split.cuh.
enum Variant {
    PLAIN,
    ALONE,
    PAIRED,
    PLACED,
    SOFTCAP,
    ALIBI,
    ANY,
    ANY_BIAS,
    BIAS,
    BIAS_F32,
    ROWS,
    SPLIT,
    SPLIT_PAIRED,
    SPLIT_ROWS
};

template <typename E, int DimQk, int DimV, int TileK, int Warpgroups, int Stages, int QueryStages,
          Variant Of>
struct Config {
    using Element = E;
    using Query = E;
    using Cached = E; // of keys and values
    static constexpr bool IS_FLOAT8 = false;
    static constexpr int COLUMN_ELEMENTS = 64;         // 128 bytes
    static constexpr int DIM_QK = DimQk, DIM_V = DimV; // narrower tensors are zero filled
    static constexpr int TILE_K = TileK, WARPGROUPS = Warpgroups;
    static constexpr int STAGES = Stages, QUERY_STAGES = QueryStages;
    static constexpr bool SHARES_ROWS = Of == PAIRED || Of == SPLIT_PAIRED;
    static constexpr bool IS_ALONE = Of == ALONE, IS_PLACED = Of > PAIRED,
                          IS_SPLIT = Of == SPLIT || Of == SPLIT_PAIRED || Of == SPLIT_ROWS,
                          IS_PACKED = IS_PLACED && (IS_SPLIT || WARPGROUPS < 3),
                          HAS_SOFTCAP = Of == SOFTCAP, HAS_ALIBI = Of == ALIBI,
                          IS_ANY = Of == ANY || Of == ANY_BIAS, LOADS_BIAS = Of == ANY_BIAS,
                          COPIES_BIAS = Of == BIAS || Of == BIAS_F32,
                          COPIES_ROWS = Of == ROWS || Of == SPLIT_ROWS; // see copy_rows()
    // Scores are exponents of 2 before their maximum is looked for, which moves in every tile.
    static constexpr bool HAS_EXPONENTS = IS_ANY || COPIES_BIAS;
    static constexpr bool SHAPES_SCORES =
        HAS_EXPONENTS || HAS_ALIBI || HAS_SOFTCAP; // not just hides some

    // First rows of the warpgroups; who reads a key tile.
    static constexpr int ROWS_APART = SHARES_ROWS ? 0 : 64,
                         KEY_READERS = SHARES_ROWS ? 1 : WARPGROUPS;
    static constexpr int TILE_Q = 64 + ROWS_APART * (WARPGROUPS - 1);
    static constexpr int THREADS = 128 * (WARPGROUPS + 1);
    // Together no more than the block starts with: 65536 / THREADS, rounded down to 8, each.
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 3 ? 32 : COPIES_ROWS ? 40 : 24;
    static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 3 ? 160 : COPIES_ROWS ? 232 : 240;
    static_assert(WARPGROUPS == 2 || WARPGROUPS == 3, "");
    // Has each kind of step a loop of its own? A branch to far code costs a step some 15 cycles, but registers for more loops are spilled.
    // At D 128 that took 4 % off the time; at D 256, and plain at D 64, where tiles are short, it added up to 2 and 10 %.
    static constexpr bool HAS_LOOPS = DIM_QK < 256 && (DIM_QK > 64 || Of != PLAIN);
    // Is the loop of whole key tiles left where weights are too large, so that it has no branch over code that is hardly ever run? At D 96
    // that takes 5 % off the time.
    static constexpr bool SHRINKS_OUTSIDE =
        HAS_LOOPS && (WARPGROUPS == 2 || HAS_ALIBI) && !SHARES_ROWS;

    // Where ptxas would keep what a step takes from the scores of a thread's two rows in two even registers, or two odd ones, and mark none of
    // them for reuse: each instruction then waits for an operand. Elsewhere it costs what it takes. docs/tried.md
    static constexpr bool MAKES_NEIGHBOURS =
        Of == PLAIN    ? DIM_QK == 96 || (DIM_QK == 192 && DIM_V == 128)
        : Of == PLACED ? WARPGROUPS == 2 && (DIM_QK == 64 || DIM_QK == 128)
        : Of == ROWS   ? DIM_QK == 96
                       : Of == ALIBI && WARPGROUPS == 3;

    // Tiles in shared memory: columns of 64 elements, swizzled by TMA.
    static constexpr int COLUMNS_QK = (DIM_QK + 63) / 64, COLUMNS_V = (DIM_V + 63) / 64;
    static constexpr int QUERY_BYTES = 64 * 128 * COLUMNS_QK; // of one warpgroup
    static constexpr int KEY_COLUMN = TILE_K * 128;
    static constexpr int KEY_BYTES = KEY_COLUMN * COLUMNS_QK, VALUE_BYTES = KEY_COLUMN * COLUMNS_V;
    static constexpr int QUERY = 0, KEY = QUERY + QUERY_STAGES * WARPGROUPS * QUERY_BYTES;
    static constexpr int VALUE = KEY + STAGES * KEY_BYTES;
    // Of ALiBi: see write_distances(). A product reads each of its bytes twice; memcheck expects twice as many, which are there.
    static constexpr bool MULTIPLIES_DISTANCES =
        HAS_ALIBI && SM90_DISTANCE_BYTES(DIM_QK, TILE_K) > 0;
    static constexpr int DISTANCES = VALUE + STAGES * VALUE_BYTES,
                         OUTPUT = DISTANCES + SM90_DISTANCE_BYTES(DIM_QK, TILE_K);
    // On its way out a warp's output takes slots of 16 rows x 64 columns.
    static constexpr int OUTPUT_SLOTS = COLUMNS_V < 2 ? COLUMNS_V : 2, SLOT_BYTES = 16 * 128;
    // A bias comes as the 64 rows of a warpgroup and 64 keys: one box of 128 bytes a row, swizzled as well, or two.
    using Bias = std::conditional_t<Of == BIAS_F32, float, E>;
    static constexpr int BIAS_KEYS = 64, BIAS_BOXES = sizeof(Bias) / 2, BIAS_BOX = 64 * 128;
    static constexpr int BIAS_STAGES = SM90_BIAS_BOXES(DIM_QK) / BIAS_BOXES;
    static constexpr int BIASES = OUTPUT + WARPGROUPS * 4 * OUTPUT_SLOTS * SLOT_BYTES;
    static constexpr int TILES =
        BIASES + COPIES_BIAS * WARPGROUPS * BIAS_STAGES * BIAS_BOXES * BIAS_BOX;
    static constexpr int TILE_BYTES = IS_PACKED ? 128 : 64, TILE_SLOTS = QUERY_STAGES;
    static constexpr int CLAIMED_TILES = IS_PACKED ? 2 : 0; // by one producer, for the others
    static constexpr int CLAIM_READERS = COPIES_BIAS || COPIES_ROWS ? 3 : 2;
    // COPIES_ROWS: of a tile's keys, and values, one producer brings those before HELPED, another one those behind. So three have much the same to do.
    static constexpr int HELPED = TILE_K / 4 * 3;
    static constexpr int KEY_WRITERS = COPIES_ROWS ? 64 : 1, VALUE_WRITERS = KEY_WRITERS;
    static constexpr bool HAS_TURNS = !SHARES_ROWS; // see wait_turn()
    static constexpr int BARRIERS = TILES + TILE_BYTES * (TILE_SLOTS * WARPGROUPS + CLAIMED_TILES);
    static constexpr int SHARED_BYTES =
        BARRIERS +
        8 * (2 * (QUERY_STAGES + COPIES_BIAS * BIAS_STAGES * BIAS_BOXES) * WARPGROUPS + 4 * STAGES +
             2 * CLAIMED_TILES) +
        1024; // 1024 to align

    static_assert(TILE_K % 16 == 0 && TILE_K <= 128 && DIM_QK % 16 == 0 && DIM_V % 32 == 0, "");
    static_assert(SHARED_BYTES <= 227 * 1024, "");
};

// threadIdx.x of a consumer. With float8 no register is left for it through a step.
template <class C>
__device__ __forceinline__ unsigned thread() {
    if constexpr (C::IS_FLOAT8)
        return thread_anew();
    else
        return threadIdx.x;
}

// Where the rows of a tile are.
struct DensePlace {
    int index;     // in the walk; -1: there are no more
    int first_row; // packed
    int head, batch;
};

struct AnyPlace : DensePlace {
    int q_start,
        q_rows; // of the sequence: its first row in a packed tensor, and its rows; all are written
    int k_start;
    int seen; // its row of p.seen
};

struct SplitPlace : AnyPlace {
    int part; // of the tile's keys; `index` counts parts
};

template <class C>
using Place = std::conditional_t<C::IS_SPLIT, SplitPlace,
                                 std::conditional_t<C::IS_PACKED, AnyPlace, DensePlace>>;

template <class C>
struct TileWords : Place<C> {
    int kv_head;
    int q_len, k_len, diagonal;
    int first_block, end_block; // key tiles to visit
    // Of one warpgroup, see tile_of():
    int skipped;                // key tiles behind them that other warpgroups visit
    int first_whole, end_whole; // those of them that every row sees whole
    int first_untracked;        // from here on every row has seen a key

    __device__ __forceinline__ bool sees_keys() const { return first_block < end_block; }
};

template <class C>
struct alignas(64) Tile : TileWords<C> {};

// Length of one sequence: the tensor's value, kept inside the extent.
__device__ __forceinline__ int sequence_length(const int32_t *lengths, int64_t stride, int batch,
                                               int extent) {
    return lengths ? min(max(__ldg(lengths + batch * stride), 0), extent) : extent;
}

// Where a sequence begins in a packed tensor and how many rows it has there, `most` at most; all of one that is not packed. Whatever
// the tensor of integers holds, the rows are inside.
__device__ __forceinline__ void sequence_rows(const sm90_packing &p, int batch, int most,
                                              int &start, int &rows) {
    start = 0;
    rows = most;
    if (!p.cu_seqlens)
        return;
    const int32_t *const ends = p.cu_seqlens + batch * p.stride;
    start = min(max(__ldg(ends), 0), p.total);
    rows = min(max(min(__ldg(ends + p.stride), p.total), start) - start, most);
}

// One sequence of the batch.
struct Span {
    int q_start, k_start; // first row in packed tensors, else 0
    int q_rows;           // that are its own
    int q_len, k_len;     // that take part

    __device__ __forceinline__ Span(const sm90_params &p, int batch) {
        int k_rows;
        sequence_rows(p.packed_q, batch, p.len_q, q_start, q_rows);
        sequence_rows(p.packed_k, batch, p.len_k, k_start, k_rows);
        q_len = sequence_length(p.query_lengths, p.query_lengths_stride, batch, q_rows);
        k_len = sequence_length(p.key_lengths, p.key_lengths_stride, batch, k_rows);
    }
};

// ---- ANY: which key tiles a tile of rows sees something of, or all -------------------------------------------------
// Two bitmaps for each tile of rows, found from mask and segments beforehand: see find_seen().

__device__ __forceinline__ const uint32_t *seen_some(const sm90_params &p, int seen) {
    return p.seen + static_cast<int64_t>(seen) * 2 * p.seen_words;
}
__device__ __forceinline__ bool sees_all(const sm90_params &p, int seen, int n) {
    return seen_some(p, seen)[p.seen_words + n / 32] >> n % 32 & 1;
}

// The row of p.seen of a tile of rows: packed sequences share none.
__device__ __forceinline__ int seen_row(const sm90_params &p, const Span &s, int batch, int head,
                                        int first_row) {
    const int64_t start = static_cast<int64_t>(s.q_start) << p.pack_log2;
    const int first = p.packed_q.cu_seqlens ? static_cast<int>(start / p.tile_q) + batch
                      : p.seen_by_batch     ? batch * p.seen_tiles
                                            : 0;
    return (p.seen_by_head ? head * p.seen_rows : 0) + first + first_row / p.tile_q;
}

// The first key tile from n on, or `end`.
__device__ __forceinline__ int next_seen(const uint32_t *some, int n, int end) {
    while (n < end) {
        const uint32_t word = some[n / 32] >> n % 32;
        if (word)
            return min(n + __ffs(word) - 1, end);
        n = (n | 31) + 1;
    }
    return end;
}

// How many of [n, end).
__device__ __forceinline__ int count_seen(const uint32_t *some, int n, int end) {
    int count = 0;
    for (n = next_seen(some, n, end); n < end; n = next_seen(some, n + 1, end))
        count++;
    return count;
}

// Behind the last of [first, end), or `first`.
__device__ __forceinline__ int end_seen(const uint32_t *some, int first, int end) {
    while (end > first && !(some[(end - 1) / 32] >> (end - 1) % 32 & 1))
        end--;
    return end;
}

// The key tile that follows n.
template <class C>
__device__ __forceinline__ int next_block(const sm90_params &p, const Tile<C> &t, int n) {
    if constexpr (C::IS_ANY) {
        if (p.seen)
            return next_seen(seen_some(p, t.seen), n + 1, t.end_block);
    }
    return n + 1;
}

// x / d for 0 <= x < 2^31.
__device__ __forceinline__ int divide(int x, const sm90_divisor &d) {
    return static_cast<int>(__umulhi(static_cast<uint32_t>(x), d.multiplier) >> d.shift) +
           (d.multiplier ? 0 : x);
}

// Where key j of a sequence is: always a page that exists, whatever the table holds.
struct PageRow {
    int page, row;
};
__device__ __forceinline__ const int32_t *page_entry(const sm90_params &p, int batch, int column) {
    return p.block_table + batch * p.table_batch_stride + column * p.table_page_stride;
}
__device__ __forceinline__ PageRow page_row(const sm90_params &p, int batch, int j) {
    const int column = divide(j, p.by_page_size), page = __ldg(page_entry(p, batch, column));
    return {min(max(page, 0), p.pages - 1), j - column * p.page_size};
}

// The first tile of a block, which then takes every gridDim-th. Neighbours among the blocks, which are near each other
// on the device, get the tiles of one head, which place() puts heads_per_group apart.
__device__ __forceinline__ int first_tile(const sm90_params &p) {
    const int block = blockIdx.x;
    const int head = divide(block, p.by_neighbours), step = block - head * p.neighbours;
    return head < p.heads_per_group ? step * p.heads_per_group + head : block;
}

// Where tile `wanted` of the walk is, or none if that is past the end. Heads come in groups whose keys and values fit into L2
// together; the tiles of a group are ordered by row, downwards and upwards in turn so that equally heavy causal tiles
// meet where groups do, and the last group ends with its lightest. Blocks that take every gridDim-th tile then get equal work within a percent or so.
template <class C>
__device__ __forceinline__ void place(const sm90_params &p, int wanted, Tile<C> &t) {
    const int index = min(wanted, p.tiles - 1);
    const int group = divide(index, p.by_group_tiles);
    const int in_group = index - group * p.heads_per_group * p.tiles_per_head;
    const int group_heads = min(p.heads_per_group, p.heads_total - group * p.heads_per_group);
    const int step =
                  divide(in_group, group < p.groups - 1 ? p.by_group_heads : p.by_last_group_heads),
              head = group * p.heads_per_group + in_group - step * group_heads;
    const bool upwards = (p.groups - group & 1) == 0;
    t.index = wanted < p.tiles ? wanted : -1;
    t.first_row = (upwards ? step : p.tiles_per_head - 1 - step) * C::TILE_Q;
    if (C::COPIES_BIAS && p.batch_inside) {
        t.head = divide(head, p.by_batch);
        t.batch = head - t.head * p.batch;
        return;
    }
    t.batch = divide(head, p.by_heads);
    t.head = head - t.batch * p.heads;
}

// The same where sequences differ: one after the other as list_tiles() has put them, of each one head after the other, of each head
// the last rows first.
template <class C>
__device__ __forceinline__ void place_listed(const sm90_params &p, int wanted, Tile<C> &t) {
    const sm90_list &list = *p.list;
    const bool any = wanted < list.tiles * p.heads;
    const sm90_listed at = any ? list.of[divide(wanted, p.by_heads)] : sm90_listed{0, 0};
    int start, rows;
    sequence_rows(p.packed_q, at.sequence, p.len_q, start, rows);
    const int tiles = max(((rows << p.pack_log2) + C::TILE_Q - 1) / C::TILE_Q, 1);
    const int in_sequence = any ? wanted - at.first * p.heads : 0;
    t.index = any ? wanted : -1;
    t.head = in_sequence / tiles;
    t.first_row = (tiles - 1 - (in_sequence - t.head * tiles)) * C::TILE_Q;
    t.batch = at.sequence;
}

// SPLIT: where tile `wanted` is, or part `wanted`. Tiles that read the same keys stand together, and the last rows, which see the most
// keys, first: see sm90_split.
template <class C, bool WHOLE>
__device__ __forceinline__ void place_split(const sm90_params &p, int wanted, Tile<C> &t) {
    const sm90_split &s = p.split;
    const int tiles = WHOLE ? p.tiles : p.tiles * s.parts, index = min(wanted, tiles - 1);
    int team = divide(index, s.by_team_tiles);
    const int in_team = index - team * s.team_tiles;
    t.part = 0;
    if (!WHOLE) {
        const int parts_of = divide(team, s.by_parts);
        t.part = team - parts_of * s.parts;
        team = parts_of;
    }
    const int outer_row = divide(team, s.by_key_heads), key_head = team - outer_row * s.key_heads;
    const int inner_row = divide(in_team, p.by_heads_per_kv),
              row = outer_row * s.team_rows + inner_row;
    t.index = wanted < tiles ? wanted : -1;
    t.batch = divide(key_head, s.by_heads_kv);
    t.head =
        (key_head - t.batch * s.heads_kv) * p.heads_per_kv + in_team - inner_row * p.heads_per_kv;
    t.first_row = (p.tiles_per_head - 1 - row) * C::TILE_Q;
}

// Key tiles of a part of a tile that visits `blocks` of them: the last part may have fewer, and some parts none.
__device__ __forceinline__ int blocks_per_part(const sm90_params &p, int blocks) {
    return divide(blocks + p.split.parts - 1, p.split.by_parts);
}

// Of those that row i sees, or, if it sees none, of those there are.
template <class C>
__device__ __forceinline__ int nearest_key(const Tile<C> &t, int i) {
    return min(max(i + t.diagonal, 0), t.k_len - 1);
}

// Tile `wanted` of the walk; SPLIT: part `wanted` of all tiles, or the WHOLE of a tile.
template <class C, bool WHOLE = false>
__device__ __forceinline__ Tile<C> tile_at(const sm90_params &p, int wanted) {
    Tile<C> t;
    if constexpr (C::IS_PACKED) {
        if constexpr (C::IS_SPLIT)
            place_split<C, WHOLE>(p, wanted, t);
        else if (p.list)
            place_listed<C>(p, wanted, t);
        else
            place<C>(p, wanted, t);
        const Span s(p, t.batch);
        t.q_start = s.q_start;
        t.k_start = s.k_start;
        t.q_rows = s.q_rows;
        t.q_len = s.q_len;
        t.k_len = s.k_len;
        if (C::IS_ANY && p.seen)
            t.seen = seen_row(p, s, t.batch, t.head, t.first_row);
    } else {
        place<C>(p, wanted, t);
        t.q_len = sequence_length(p.query_lengths, p.query_lengths_stride, t.batch, p.len_q);
        t.k_len = sequence_length(p.key_lengths, p.key_lengths_stride, t.batch, p.len_k);
    }
    t.kv_head = divide(t.head, p.by_heads_per_kv);
    t.diagonal = p.bottom_right ? t.k_len - t.q_len : 0;

    const int first = t.first_row >> p.pack_log2;
    const int last = min((t.first_row + C::TILE_Q - 1) >> p.pack_log2, t.q_len - 1);
    int lowest = max(first + t.diagonal - p.window_left, 0);
    int highest = min(last + t.diagonal + p.window_right + 1, t.k_len);
    if (C::HAS_ALIBI && p.reach) {
        const int tile = t.first_row / C::TILE_Q,
                  reach = p.reach[(t.batch * p.heads + t.head) * p.tiles_per_head + tile];
        lowest = max(lowest, nearest_key(t, first) - reach);
        highest = min(highest, nearest_key(t, last) + reach + 1);
    }
    const bool any = t.index >= 0 && first < t.q_len && lowest < highest;
    t.first_block = lowest / C::TILE_K;
    t.end_block = any ? (highest + C::TILE_K - 1) / C::TILE_K : t.first_block;
    if constexpr (C::IS_ANY) {
        if (p.seen && any) {
            const uint32_t *const some = seen_some(p, t.seen);
            t.first_block = next_seen(some, t.first_block, t.end_block);
            t.end_block = end_seen(some, t.first_block, t.end_block);
        }
    }
    if constexpr (C::IS_SPLIT && !WHOLE) {
        const int part = blocks_per_part(p, t.end_block - t.first_block);
        t.first_block = min(t.first_block + t.part * part, t.end_block);
        t.end_block = min(t.first_block + part, t.end_block);
    }
    return t;
}

// Tile t as a warpgroup sees it: it visits at least one key tile, and passes over the last ones, which only rows of
// others see.
template <class C>
__device__ __forceinline__ Tile<C> tile_of(const sm90_params &p, Tile<C> t, int wg) {
    if (!t.sees_keys())
        return t;
    const int first_row = t.first_row + C::ROWS_APART * wg, first = first_row >> p.pack_log2;
    const int last = min((first_row + 63) >> p.pack_log2, t.q_len - 1);
    const int highest = min(last + t.diagonal + p.window_right + 1, t.k_len);
    int end_block = max((highest + C::TILE_K - 1) / C::TILE_K, t.first_block + 1);
    if constexpr (C::IS_SPLIT || C::HAS_ALIBI)
        end_block = min(end_block, t.end_block);
    if constexpr (C::IS_ANY) {
        if (p.seen)
            end_block = end_seen(seen_some(p, t.seen), t.first_block + 1, end_block);
    }
    t.skipped = t.end_block - end_block;
    if constexpr (C::IS_ANY) {
        if (p.seen)
            t.skipped = count_seen(seen_some(p, t.seen), end_block, t.end_block);
    }
    t.end_block = end_block;
    const int all_lowest = max(last + t.diagonal - p.window_left, 0);
    // With ALiBi keys after the one that a row meets have code of their own, that of masked ones.
    const int right = C::HAS_ALIBI ? min(p.window_right, 0) : p.window_right;
    const int all_highest = max(min(first + t.diagonal + right + 1, t.k_len), 0);
    t.first_whole = (all_lowest + C::TILE_K - 1) / C::TILE_K;
    // Rows behind the last one see nothing, which a first step with a mask leaves as their top; where rows are shared either warpgroup has
    // a first step.
    if ((first_row + 63) >> p.pack_log2 >= t.q_len)
        t.first_whole = max(t.first_whole, t.first_block + (C::SHARES_ROWS ? 2 : 1));
    t.end_whole = all_highest / C::TILE_K;
    t.first_untracked = all_lowest / C::TILE_K + 1;
    return t;
}

// Of float8: what a packed row's products are multiplied by, also as exponents of 2, and its output.
struct Scales {
    float score, score_log2, value;
};

__device__ __forceinline__ float scale_at(const sm90_scale &scale, int batch, int head) {
    return scale.data ? __ldg(scale.data + batch * scale.batch + head * scale.head) : 1.f;
}

template <class C>
__device__ __forceinline__ Scales scales_of(const sm90_params &p, const Place<C> &t, int row) {
    if (!C::IS_FLOAT8)
        return {p.scale, p.scale_log2, 1};
    const int head = (t.head << p.pack_log2) + (row & ((1 << p.pack_log2) - 1)),
              kv_head = divide(t.head, p.by_heads_per_kv);
    const float product =
        scale_at(p.query_scale, t.batch, head) * scale_at(p.key_scale, t.batch, kv_head);
    return {p.scale * product, p.scale_log2 * product, scale_at(p.value_scale, t.batch, kv_head)};
}

// Keys [low, high) that a packed row sees.
template <class C>
__device__ __forceinline__ void row_bounds(const sm90_params &p, const Tile<C> &t, int row,
                                           int &low, int &high) {
    const int i = row >> p.pack_log2;
    low = max(i + t.diagonal - p.window_left, 0);
    high = i < t.q_len ? min(i + t.diagonal + p.window_right + 1, t.k_len) : 0;
}

// The first of a thread's two rows; the second is eight on.
template <class C>
__device__ __forceinline__ int first_row_of_thread(const Tile<C> &t, int wg) {
    return t.first_row + C::ROWS_APART * wg + thread<C>() / 32 % 4 * 16 + thread<C>() % 32 / 4;
}

// The key that a packed row meets: its position in the sequence of keys.
template <class C>
__device__ __forceinline__ int met_key(const sm90_params &p, const Tile<C> &t, int row) {
    return (row >> p.pack_log2) + t.diagonal;
}
