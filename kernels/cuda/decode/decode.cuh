// Forward attention for few query rows and many keys, bound by reading the keys: docs/cuda-decode.md.
//
// A tile has ROWS packed rows of one kv head: row r is query row r / group of head r % group, so keys and values are read
// once for all query heads of the group. A block has one tile and one split of its keys; each of its warps streams its own
// keys through a ring of its own, without a barrier, and has all rows of the tile. Products are taken transposed, with 16
// keys, or 16 columns of the output, as the M of mma.m16n8k16 and eight rows as its N: decoding rarely has more.
// At the end the warps of a block, and then the splits, are merged in their order.
#pragma once

#include "kernels/cuda/common/exact.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/sequence.cuh"
#include "kernels/cuda/common/sixteen_bit.cuh"
#include "kernels/cuda/decode/params.h"

#include <type_traits>

// The transpose of an 8x8 matrix of 16-bit elements that lies in the registers of a warp.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
    return r;
}

template <int D, int DV, int NT, int MT, int WARPS, int STAGES>
struct Tile {
    static constexpr int ROWS = NT * 8, KEYS = MT * 16, THREADS = WARPS * 32;
    static constexpr int K_BYTES = KEYS * D * 2, STAGE_BYTES = K_BYTES + KEYS * DV * 2;
    static constexpr int PITCH = DV + 4; // floats of a row of a warp's output
    static constexpr int Q_BYTES = ROWS * D * 2, OUT_BYTES = ROWS * PITCH * 4;
    static constexpr int RING_BYTES =
        STAGES * STAGE_BYTES > OUT_BYTES ? STAGES *STAGE_BYTES : OUT_BYTES;
    static constexpr int SUM_BYTES = ROWS * WARPS * 8;
    static constexpr int SHARED_BYTES = Q_BYTES + WARPS * RING_BYTES + SUM_BYTES;
};

// A tile of packed rows.
struct Rows {
    int b, kv_head, first, group;
    divisor by_group;
    __device__ __forceinline__ Rows(const decode_params &p, int tile, int rows)
        : group(p.fwd.group), by_group(p.by_group) {
        const int head = divide(tile, p.by_row_blocks);
        first = (tile - head * p.fwd.row_blocks) * rows;
        b = divide(head, p.by_heads_kv);
        kv_head = head - b * p.heads_kv;
    }
    __device__ __forceinline__ int query(int r) const { return divide(first + r, by_group); }
    __device__ __forceinline__ int head(int r) const {
        return kv_head * group + first + r - query(r) * group;
    }
};

// A row whose keys are all added up: log2 of the scale of sum and output, -inf if it saw no key; columns
// lane * 4 + n * 128 of the output and the next three.
template <int COLUMNS>
struct Merged {
    float top, total;
    float4 out[COLUMNS];
};

// The weight of a part whose scale is 2^top in a sum whose scale is 2^most; a part that saw no key has none.
__device__ __forceinline__ float weight_of(float top, float most) {
    return top == NEG_INF ? 0 : exp2_approx(top - most);
}

__device__ __forceinline__ void add(float4 &to, float weight, const float4 &x) {
    to.x = fmaf(weight, x.x, to.x);
    to.y = fmaf(weight, x.y, to.y);
    to.z = fmaf(weight, x.z, to.z);
    to.w = fmaf(weight, x.w, to.w);
}

// The parts first, first + step ... of a row, added up by a warp in this order, four at a time: `sums` gives what
// decode_params.sums has of a part, `outputs` four columns of its output.
template <int COLUMNS, typename Sums, typename Outputs>
__device__ __forceinline__ Merged<COLUMNS> merged(int first, int step, int parts, int dim_v,
                                                  Sums sums, Outputs outputs) {
    const int lane = threadIdx.x % 32;
    Merged<COLUMNS> row = {NEG_INF, 0, {}};
#pragma unroll 1
    for (; first < parts; first += 4 * step) {
        float2 sum[4];
        float4 out[4][COLUMNS];
        float most = row.top;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int part = first + i * step;
            sum[i] = part < parts ? sums(part) : make_float2(NEG_INF, 0);
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
                out[i][n] = part < parts && lane * 4 + n * 128 < dim_v
                                ? outputs(part, lane * 4 + n * 128)
                                : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            most = fmaxf(most, sum[i].x);
        const float shrink = weight_of(row.top, most);
        row.top = most;
        row.total *= shrink;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
            row.out[n] = {row.out[n].x * shrink, row.out[n].y * shrink, row.out[n].z * shrink,
                          row.out[n].w * shrink};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float weight = weight_of(sum[i].x, most);
            row.total = fmaf(weight, sum[i].y, row.total);
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
                add(row.out[n], weight, out[i][n]);
        }
    }
    return row;
}

// Output and lse of a row, by a warp.
template <typename E, int COLUMNS>
__device__ __forceinline__ void finish_row(const fwd_params &p, const Sequence &seq,
                                           const Rows &rows, int r, const Merged<COLUMNS> &row) {
    const int i = rows.query(r), h = rows.head(r), lane = threadIdx.x % 32;
    const bool empty = i >= seq.q_len || row.total == 0;
    const float sink = sink_of(p, h);
    float top = empty ? NEG_INF : row.top, total = empty ? 0 : row.total;
    const float factor = end_row(sink, top, total);
    if (lane == 0 && p.lse.data)
        store_lse<E>(p, rows.b, h, seq.q_start + i, sink, top, total);
    E *const to = (E *)p.output.data + rows.b * p.output.stride[0] + h * p.output.stride[1] +
                  (seq.q_start + i) * p.output.stride[2];
    uint32_t odd = 0; // not 0: the output has a NaN or Inf
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
        const int c = lane * 4 + n * 128;
        const float4 x = row.out[n];
        uint2 pairs = {pack<E>(x.x * factor, x.y * factor), pack<E>(x.z * factor, x.w * factor)};
        if (empty)
            pairs = {0, 0};
        if (c < p.dim_v) {
            *(uint2 *)(to + c) = pairs;
            odd = multiply_add_zero<E>(pairs.y, multiply_add_zero<E>(pairs.x, odd));
        }
    }
    if (__any_sync(~0u, odd != 0) || fabsf(row.top) == FLT_MAX)
        write_rows_exactly<E, float>(p, rows.b, h, i, i + 1);
}

template <typename E, int D, int DV, int NT, int MT, int WARPS, int STAGES>
struct Warp {
    using T = Tile<D, DV, NT, MT, WARPS, STAGES>;
    static constexpr int VN = DV / 16;

    // Element [n][nt][e]: column n * 16 + lane / 4 + e / 2 * 8 of row nt * 8 + lane % 4 * 2 + e % 2.
    float out[VN][NT][4];
    float score[MT][NT][4]; // likewise, with keys for columns; exponents of 2
    float top[NT][2], limit[NT][2], sum[NT][2];

    __device__ __forceinline__ void init() {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                limit[nt][e] = NEG_INF;
                top[nt][e] = sum[nt][e] = 0;
            }
#pragma unroll
            for (int n = 0; n < VN; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    out[n][nt][e] = 0;
        }
    }

    __device__ __forceinline__ void multiply_keys(uint32_t q, uint32_t k) {
        constexpr int CHAINS = MT * NT == 1 ? 2 : 1; // of products that wait for each other
        float chain[CHAINS][MT][NT][4] = {};
#pragma unroll
        for (int step = 0; step < D / 32; ++step) {
            uint32_t a[MT][2][4], b[NT][4];
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
                load_matrices(b[nt], Chunks<D>::after(q, 2 * step) + nt * 8 * D * 2);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    load_matrices(a[mt][half],
                                  Chunks<D>::after(k, 2 * step + half) + mt * 16 * D * 2);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt)
                        Element<E>::mma(chain[half % CHAINS][mt][nt], a[mt][half], b[nt][2 * half],
                                        b[nt][2 * half + 1]);
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    score[mt][nt][e] = CHAINS == 1
                                           ? chain[0][mt][nt][e]
                                           : chain[0][mt][nt][e] + chain[CHAINS - 1][mt][nt][e];
    }

    // Scores to exponents of 2; with a cap (0: none) of slope `inner` in the exponent of its exp.
    __device__ __forceinline__ void scale(float slope, float cap, float inner) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float &x = score[mt][nt][e];
                    if (cap > 0) // tanh(x) = 1 - 2 / (exp(2 x) + 1)
                        x = cap - 2 * cap * reciprocal_approx(exp2_approx(x * inner) + 1);
                    else
                        x = to_exponent(x, slope);
                }
    }

    // Hides the keys of the tile from `key` on that a row does not see.
    __device__ __forceinline__ void mask(const fwd_params &p, const Sequence &seq, const Rows &rows,
                                         int key) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int i = rows.query(nt * 8 + lane % 4 * 2 + e);
                const int first = seq.first_key(p, i) - key - lane / 4,
                          end = seq.end_key(p, i) - key - lane / 4;
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int j = mt * 16 + half * 8;
                        if (j < first || j >= end)
                            score[mt][nt][half * 2 + e] = NEG_INF;
                    }
            }
    }

    // The largest or the sum of what the eight lanes of a row have.
    template <typename Op>
    __device__ __forceinline__ static float over_lanes(float x, Op op) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2)
            x = op(x, __shfl_xor_sync(~0u, x, step));
        return x;
    }

    // Makes the maxima of the tile the reference of the exponents if a row has outgrown it.
    __device__ __forceinline__ void follow_maxima() {
        float most[NT][2];
        bool grown = false;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                most[nt][e] = NEG_INF;
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
                    most[nt][e] = fmaxf(most[nt][e], fmaxf(score[mt][nt][e], score[mt][nt][2 + e]));
                grown |= most[nt][e] > limit[nt][e];
            }
        if (!__any_sync(~0u, grown))
            return;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool fresh = limit[nt][e] == NEG_INF;
                float x = over_lanes(most[nt][e], [](float a, float b) { return fmaxf(a, b); });
                if (!fresh)
                    x = fmaxf(x, top[nt][e]);
                limit[nt][e] = x + LAZY;
                x = x == NEG_INF ? 0.0f : x;
                const float shrink = fresh ? 0.0f : exp2_approx(top[nt][e] - x);
                top[nt][e] = x;
                sum[nt][e] *= shrink;
#pragma unroll
                for (int n = 0; n < VN; ++n) {
                    out[n][nt][e] *= shrink;
                    out[n][nt][2 + e] *= shrink;
                }
            }
    }

    __device__ __forceinline__ void add_values(uint32_t v) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            uint32_t b[NT][2];
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        x[e] = exp2_approx(score[mt][nt][2 * half + e] - top[nt][e]);
                        sum[nt][e] += x[e];
                    }
                    b[nt][half] = transposed(pack<E>(x[0], x[1]));
                }
#pragma unroll
            for (int n = 0; n < VN; ++n) {
                uint32_t a[4];
                load_matrices_transposed(a, Chunks<DV>::after(v, n) + mt * 16 * DV * 2);
#pragma unroll
                for (int nt = 0; nt < NT; ++nt)
                    Element<E>::mma(out[n][nt], a, b[nt][0], b[nt][1]);
            }
        }
    }

    // Output, maxima and sums to shared memory, where other threads find them: [row][PITCH] and [row][2].
    __device__ __forceinline__ void leave(float *output, float2 *sums) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = nt * 8 + lane % 4 * 2 + e;
                const float total = over_lanes(sum[nt][e], [](float a, float b) { return a + b; });
                if (lane < 4)
                    sums[row] = make_float2(total == 0 ? NEG_INF : top[nt][e], total);
#pragma unroll
                for (int n = 0; n < VN; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        output[row * T::PITCH + n * 16 + half * 8 + lane / 4] =
                            out[n][nt][half * 2 + e];
            }
    }
};

template <typename E, int D, int DV, int NT, int MT, int WARPS, int STAGES>
__device__ __forceinline__ void cuda_decode_sm80(const decode_params &dp) {
    using T = Tile<D, DV, NT, MT, WARPS, STAGES>;
    using W = Warp<E, D, DV, NT, MT, WARPS, STAGES>;
    extern __shared__ __align__(128) char shared[];
    constexpr int COLUMNS = (DV + 127) / 128;
    const fwd_params &p = dp.fwd;
    // Known to be the same for all lanes.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const uint32_t q_tile = shared_address(shared);
    char *const my_ring = shared + T::Q_BYTES + warp * T::RING_BYTES;
    const uint32_t ring = shared_address(my_ring);

    const int tile = divide(blockIdx.x, dp.by_splits), split = blockIdx.x - tile * dp.splits;
    const Rows rows(dp, tile, T::ROWS);
    const Sequence seq(p, rows.b);
    const int count = min(T::ROWS, seq.q_rows * rows.group - rows.first);
    if (count <= 0)
        return;

    // Keys that rows of the tile see, this split's part of them, and what all of them see.
    const int top_row = rows.query(0), bottom_row = min(rows.query(count - 1), seq.q_len - 1);
    const int first_key = seq.first_key(p, top_row),
              end_key = bottom_row < top_row ? 0 : seq.end_key(p, bottom_row);
    const int clean_first = seq.first_key(p, rows.query(T::ROWS - 1)),
              clean_end = seq.end_key(p, top_row);
    const int steps = max(0, (end_key - first_key + T::KEYS - 1) / T::KEYS);
    const int each = divide(steps, dp.by_splits), more = steps - each * dp.splits;
    const int first = split * each + min(split, more), end = first + each + (split < more);

    // One step's keys and values by one warp: lane l knows where key l begins and tells the others. Lanes lie on eight
    // chunks of four rows.
    const int64_t start_k = (p.page_size ? 0 : rows.b * p.key.stride[0]) +
                            rows.kv_head * p.key.stride[1] + seq.k_start * p.key.stride[2],
                  start_v = (p.page_size ? 0 : rows.b * p.value.stride[0]) +
                            rows.kv_head * p.value.stride[1] + seq.k_start * p.value.stride[2];
    const E *const k = (const E *)p.key.data + start_k + lane % 8 * 8;
    const E *const v = (const E *)p.value.data + start_v + lane % 8 * 8;
    const auto copy = [&](auto cols, uint32_t to, const E *from, int64_t row_start, int left,
                          int columns) {
        constexpr int COLS = decltype(cols)::value;
#pragma unroll
        for (int r = 0; r < T::KEYS; r += 4) {
            const int row = r + lane / 8;
            const E *const source = from + __shfl_sync(~0u, row_start, row);
            const uint32_t place = to + Chunks<COLS>::at(row, lane % 8);
#pragma unroll
            for (int c = 0; c < COLS; c += 64)
                copy_async(place + c * 2, source + c, row < left && c < columns);
        }
    };
    int page = 0, next_step = first + warp;
    const auto look_up = [&]() {
        const int key = min(first_key + next_step * T::KEYS + lane % T::KEYS, end_key - 1);
        if (p.page_size && next_step < end)
            page = ((const int *)p.block_table
                        .data)[rows.b * p.block_table.stride[0] +
                               (unsigned)key / (unsigned)p.page_size * p.block_table.stride[1]];
    };
    const auto load = [&](uint32_t offset) {
        if (next_step < end) {
            const int key = first_key + next_step * T::KEYS + lane % T::KEYS;
            int64_t key_start, value_start;
            if (p.page_size) {
                const int64_t which = clamped(page, 0, p.pages - 1),
                              place = (unsigned)key % (unsigned)p.page_size;
                key_start = which * p.key.stride[0] + place * p.key.stride[2];
                value_start = which * p.value.stride[0] + place * p.value.stride[2];
            } else {
                key_start = key * p.key.stride[2];
                value_start = key * p.value.stride[2];
            }
            const int left = end_key - first_key - next_step * T::KEYS;
            copy(std::integral_constant<int, D>(), ring + offset, k, key_start, left,
                 p.dim_qk - lane % 8 * 8);
            copy(std::integral_constant<int, DV>(), ring + offset + T::K_BYTES, v, value_start,
                 left, p.dim_v - lane % 8 * 8);
        }
        next_step += WARPS;
        look_up();
    };

    W w;
    w.init();
    const uint32_t q_at = q_tile + Chunks<D>::at(lane % 8, lane / 8);
    const uint32_t k_at = ring + Chunks<D>::at(lane % 16, lane / 16);
    const uint32_t v_at =
        ring + T::K_BYTES + Chunks<DV>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const float cap = (float)p.softcap * LOG2E,
                inner = 2 * p.exponent_scale * reciprocal_approx((float)p.softcap);
    look_up();
    uint32_t offset = 0;
    int step = first + warp;
#pragma unroll 1
    for (int n = 0;; ++n) {
        if (n >= STAGES) {
            copy_wait<STAGES - 1>();
            if (n == STAGES)
                __syncthreads(); // the queries are there
            else
                __syncwarp();
            if (step >= end)
                break;
            const int key = first_key + step * T::KEYS;
            w.multiply_keys(q_at, k_at + offset);
            w.scale(p.exponent_scale, cap, inner);
            if (key < clean_first || key + T::KEYS > clean_end)
                w.mask(p, seq, rows, key);
            w.follow_maxima();
            w.add_values(v_at + offset);
            __syncwarp();
            step += WARPS;
        }
        load(offset);
        if (n == 0) {
#pragma unroll 1
            for (int x = threadIdx.x; x < T::ROWS * (D / 8); x += T::THREADS) {
                const int r = x / (D / 8), c = x % (D / 8);
                copy_async(q_tile + Chunks<D>::at(r, c),
                           (const E *)p.query.data + rows.b * p.query.stride[0] +
                               rows.head(r) * p.query.stride[1] +
                               (seq.q_start + rows.query(r)) * p.query.stride[2] + c * 8,
                           r < count && c * 8 < p.dim_qk);
            }
#if __CUDA_ARCH__ >= 900
            asm volatile("griddepcontrol.launch_dependents;");
#endif
        }
        copy_commit();
        offset = offset + T::STAGE_BYTES == STAGES * T::STAGE_BYTES ? 0 : offset + T::STAGE_BYTES;
    }
    copy_wait<0>();
    __syncwarp();

    float2 *const sums = (float2 *)(shared + T::Q_BYTES + WARPS * T::RING_BYTES);
    w.leave((float *)my_ring, sums + warp * T::ROWS);
    __syncthreads();
    const int64_t place = (tile * (int64_t)dp.splits + split) * T::ROWS;
#pragma unroll 1
    for (int r = warp; r < count; r += WARPS) {
        const Merged<COLUMNS> row = merged<COLUMNS>(
            0, 1, WARPS, p.dim_v, [&](int i) { return sums[i * T::ROWS + r]; },
            [&](int i, int c) {
                return *(const float4 *)(shared + T::Q_BYTES + i * T::RING_BYTES +
                                         (r * T::PITCH + c) * 4);
            });
        if (dp.splits == 1) {
            finish_row<E>(p, seq, rows, r, row);
            continue;
        }
        if (lane == 0)
            ((float2 *)dp.sums)[place + r] = make_float2(row.top, row.total);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
            if (lane * 4 + n * 128 < p.dim_v)
                *(float4 *)(dp.outputs + (place + r) * p.dim_v + lane * 4 + n * 128) = row.out[n];
    }
}

// Adds up the splits of one packed row, first those of each warp.
template <typename E, int WARPS>
__device__ __forceinline__ void cuda_decode_sm80_merge(const decode_params &dp) {
    extern __shared__ __align__(128) char shared[];
    float4(*const outputs)[2][32] = (float4(*)[2][32])shared; // [warp][column / 128][lane]
    float2 *const sums = (float2 *)(outputs + WARPS);
    const fwd_params &p = dp.fwd;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // blockIdx.x is (head, query, place in its group), and so is the packed row of a head.
    const int queries = divide(blockIdx.x, dp.by_group), head = queries / p.len_q,
              packed = blockIdx.x - head * p.len_q * p.group;
    const int row_block = packed / dp.tile_rows, tile = head * p.row_blocks + row_block,
              r = packed - row_block * dp.tile_rows;
    const Rows rows(dp, tile, dp.tile_rows);
    const Sequence seq(p, rows.b);
#if __CUDA_ARCH__ >= 900
    // All of it may start before the other kernel has ended, and none of it may end before.
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (rows.query(r) >= seq.q_rows)
        return;
    const int64_t first = tile * (int64_t)dp.splits * dp.tile_rows + r;
    const Merged<2> own = merged<2>(
        warp, WARPS, dp.splits, p.dim_v,
        [&](int s) { return ((const float2 *)dp.sums)[first + s * dp.tile_rows]; },
        [&](int s, int c) {
            return *(const float4 *)(dp.outputs + (first + s * dp.tile_rows) * p.dim_v + c);
        });
    sums[warp] = make_float2(own.top, own.total);
    outputs[warp][0][lane] = own.out[0];
    outputs[warp][1][lane] = own.out[1];
    __syncthreads();
    if (warp == 0)
        finish_row<E>(p, seq, rows, r,
                      merged<2>(
                          0, 1, WARPS, p.dim_v, [&](int i) { return sums[i]; },
                          [&](int i, int c) { return outputs[i][c / 128][lane]; }));
}
