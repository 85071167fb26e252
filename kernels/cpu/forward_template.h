/*
 * What the bodies of all cpu_fwd rows share, over the vectors of vec_*.h. A row's file defines
 *     VECTORS    vectors of a block: VECTORS * VEC_LANES query rows
 *     TILE_K     keys of a tile
 *     PAIRS      1: an operand word is two bf16 (needs vec_bf16.h), 0: one f32
 * and includes, after this file, forward_f32.h or forward_pairs.h (operands), forward_products.h and forward_row.h.
 */
#include "kernels/cpu/forward.h"
#include "kernels/cpu/vec_extra.h"
#include "kernels/cpu/vec_math.h"
#include "src/philox.h"

#include <math.h>

enum { LANES = VECTORS * VEC_LANES };

/* FUNCTION(..., vectors) with the vectors of the block as a constant. */
#define FOR_VECTORS(b, FUNCTION, ...)                                                              \
    do {                                                                                           \
        if ((b)->vectors == 1)                                                                     \
            FUNCTION(__VA_ARGS__, 1);                                                              \
        else if ((b)->vectors == 2 && VECTORS > 2)                                                 \
            FUNCTION(__VA_ARGS__, 2);                                                              \
        else                                                                                       \
            FUNCTION(__VA_ARGS__, VECTORS);                                                        \
    } while (0)

/* to[column][row] of from[row][column], a block's lanes of rows; columns are padded to whole vectors. */
VEC_FN static void transpose_in(float *to, const float *from, int64_t stride, int64_t columns,
                                int64_t rows) {
    for (int64_t c = 0; c < columns; c += VEC_LANES)
        for (int64_t r = 0; r < rows; r += VEC_LANES)
            vec_transpose(to + c * LANES + r, LANES, from + r * stride + c, stride);
}

/* Rows as f32, in `to`. */
VEC_FN static inline struct operand widen_rows(float *to, const struct rows *rows, int32_t n,
                                               int64_t dim, enum dtype dtype) {
    const int64_t stride = padded(dim, 16);
    for (int32_t r = 0; r < n; r++)
        widen(to + r * stride, row_at(rows, r), dim, dtype);
    return (struct operand){to, stride};
}

/* The same in place where they are that and lie evenly. */
VEC_FN static inline struct operand load_floats(float *to, const struct rows *rows, int32_t n,
                                                int64_t dim, enum dtype dtype) {
    if (dtype == DTYPE_F32 && !rows->rows && rows->stride % 4 == 0)
        return (struct operand){(const float *)(const void *)rows->data, rows->stride / 4};
    return widen_rows(to, rows, n, dim, dtype);
}

/* ---- Logits ----------------------------------------------------------------------------------------------------- */

VEC_FN static void load_bias_and_mask(float *extra, const struct extra_row *rows,
                                      const struct extra_layout *layout, const struct block *b,
                                      int64_t first_key, int32_t n, float *scratch) {
    const int64_t stride = padded(n, VEC_LANES), lanes = b->vectors * VEC_LANES;
    bool shared = true; /* by all rows, as when keys are padding */
    for (int32_t r = 1; r < b->rows; r++)
        shared &= rows[r].bias == rows[0].bias && rows[r].mask == rows[0].mask;
    for (int32_t r = 0; r < (shared ? 1 : b->rows); r++)
        load_extra_row(scratch + r * stride, &rows[r], layout, first_key, n);
    if (shared) {
        for (int32_t j = 0; j < n; j++)
            for (int32_t v = 0; v < b->vectors; v++)
                vec_store(extra + j * LANES + v * VEC_LANES, vec_set(scratch[j]));
    } else {
        memset(scratch + b->rows * stride, 0, (size_t)((lanes - b->rows) * stride * 4));
        transpose_in(extra, scratch, stride, stride, lanes);
    }
}

/* cap_slopes, as the scores lie: the derivatives of the cap, or NULL. */
VEC_FN static void apply_rule(float *s, const struct logit_rule *rule, const struct block *b,
                              int64_t first_key, int32_t n, float *cap_slopes) {
    for (int32_t v = 0; v < b->vectors; v++) {
        const vec position = vec_load(b->position + v * VEC_LANES),
                  slope = vec_load(b->slope + v * VEC_LANES),
                  row_scale =
                      rule->query_scale ? vec_load(rule->query_scale + v * VEC_LANES) : vec_set(1);
        for (int32_t j = 0; j < n; j++) {
            const int64_t at = j * LANES + v * VEC_LANES;
            const vec distance = vec_abs(vec_sub(position, vec_set((float)(first_key + j))));
            vec cap_slope, score = vec_load(s + at);
            if (rule->query_scale || rule->key_scale)
                score = vec_mul(
                    score, vec_mul(row_scale, vec_set(rule->key_scale ? rule->key_scale[j] : 1)));
            vec_store(s + at,
                      logit_of(score, rule, slope, distance,
                               rule->extra ? vec_load(rule->extra + at) : vec_set(0), &cap_slope));
            if (cap_slopes)
                vec_store(cap_slopes + at, cap_slope);
        }
    }
}

/* Some lane does not see every key of [first_key, first_key + n). */
static bool bounded(const struct block *b, int64_t first_key, int32_t n) {
    return first_key < b->full_first || first_key + n > b->full_end;
}

/* -inf for keys outside [lo, hi) of their lane. */
VEC_FN static void apply_bounds(float *s, const struct block *b, int64_t first_key, int32_t n) {
    for (int32_t v = 0; v < b->vectors; v++) {
        float lo[VEC_LANES], hi[VEC_LANES]; /* in keys of this tile */
        for (int l = 0; l < VEC_LANES; l++) {
            const int64_t low = b->lo[v * VEC_LANES + l] - first_key,
                          high = b->hi[v * VEC_LANES + l] - first_key;
            lo[l] = (float)(low < 0 ? 0 : at_most(low, n)) - 0.5f;
            hi[l] = (float)(high < 0 ? 0 : at_most(high, n)) - 0.5f;
        }
        const vec low = vec_load(lo), high = vec_load(hi), none = vec_set(-INFINITY);
        for (int32_t j = 0; j < n; j++) {
            float *at = s + j * LANES + v * VEC_LANES;
            const vec key = vec_set((float)j);
            vec_store(at, vec_blend(none, vec_load(at),
                                    vec_and(vec_greater(key, low), vec_greater(high, key))));
        }
    }
}

/* ---- Masks and dropout ------------------------------------------------------------------------------------------ */

/* As load_extra_row(), with the states of a block mask: it leaves a key to the mask, shows it or hides it. True if it does not
 * hide all. */
VEC_FN static bool load_blocks_row(float *to, const struct extra_row *row,
                                   const struct extra_layout *layout, const uint8_t *states,
                                   const struct lane_masks *masks, int64_t first_key, int32_t n) {
    const struct extra_row shown = {.bias = row->bias};
    bool seen = false;
    for (int64_t k = first_key, end; k < first_key + n; k = end) {
        const uint8_t state = states[k / masks->block_k * masks->state_stride];
        end = least((k / masks->block_k + 1) * masks->block_k, first_key + n);
        load_extra_row(to + (k - first_key), state == 1 ? row : &shown, layout, k,
                       (int32_t)(end - k));
        for (int64_t j = k; state == 0 && j < end; j++)
            to[j - first_key] = bits_float(HIDDEN_BITS);
        seen |= state != 0;
    }
    return seen;
}

/* True if some lane has the segment of some key. */
VEC_FN static bool hide_segments(float *extra, const struct lane_masks *masks,
                                 const struct block *b, int64_t first_key, int32_t n) {
    float segment[MAX_LANES];
    uint32_t seen = 0;
    memcpy(segment, masks->segment, sizeof segment);
    for (int32_t j = 0; j < n; j++) {
        uint32_t of_key;
        memcpy(&of_key, masks->key_segments + (first_key + j) * masks->key_segment_stride * 4, 4);
        for (int32_t v = 0; v < b->vectors; v++) {
            float *at = extra + j * LANES + v * VEC_LANES;
            const vec_mask same = vec_same_bits(vec_load(segment + v * VEC_LANES), of_key);
            vec_store(at, vec_blend(vec_set(bits_float(HIDDEN_BITS)), vec_load(at), same));
            seen |= vec_mask_bits(same);
        }
    }
    return seen != 0;
}

/* extra[key][lane]; false if segments or blocks hide every key from every lane. */
VEC_FN static bool load_extra(float *extra, const struct extra_row *rows,
                              const struct extra_layout *layout, const struct lane_masks *masks,
                              const struct block *b, int64_t first_key, int32_t n, float *scratch) {
    const int64_t stride = padded(n, VEC_LANES) + VEC_LANES, lanes = b->vectors * VEC_LANES;
    bool seen = true;
    if (masks->blocks) {
        memset(scratch, 0, (size_t)(lanes * stride * 4));
        seen = false;
        for (int32_t r = 0; r < b->rows; r++)
            seen |= load_blocks_row(scratch + r * stride, &rows[r], layout, masks->states[r], masks,
                                    first_key, n);
        transpose_in(extra, scratch, stride, padded(n, VEC_LANES), lanes);
    } else {
        load_bias_and_mask(extra, rows, layout, b, first_key, n, scratch);
    }
    return (!masks->segments || hide_segments(extra, masks, b, first_key, n)) && seen;
}

/* kept[key][lane]: see docs/numerics.md. Four keys share the words of a counter. */
VEC_FN static void draw(float *kept, const struct dropout *dropout, const struct block *b,
                        int64_t first_key, int32_t n) {
    const int64_t lanes = b->vectors * VEC_LANES;
    for (int32_t j = 0; j < n; j += 4) {
        uint32_t words[4][MAX_LANES];
        for (int64_t l = 0; l < lanes; l++) {
            uint32_t x[4] = {(uint32_t)((first_key + j) / 4), dropout->row[l], dropout->head[l],
                             dropout->stream};
            philox(x, dropout->key[0], dropout->key[1]);
            for (int w = 0; w < 4; w++)
                words[w][l] = x[w];
        }
        for (int w = 0; w < at_most(4, n - j); w++)
            for (int64_t l = 0; l < lanes; l++)
                kept[(j + w) * LANES + l] = words[w][l] < dropout->threshold ? 0 : dropout->factor;
    }
}

/* ---- Softmax ---------------------------------------------------------------------------------------------------- */

VEC_INLINE void column_max(vec *max, const float *s, int32_t n, int vectors) {
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        max[v] = vec_set(-INFINITY);
    for (int32_t j = 0; j < n; j++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            max[v] = vec_max(vec_load(s + j * LANES + v * VEC_LANES), max[v]);
}

VEC_INLINE void rescale(struct block *b, const vec *factor, int64_t dim_v, int vectors) {
    for (int64_t d = 0; d < dim_v; d++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            float *at = b->output + d * LANES + v * VEC_LANES;
            vec_store(at, vec_mul(vec_load(at), factor[v]));
        }
}

/* Sums and outputs of f32 bear weights that add up to this. */
#define HUGE_SUM 0x1p24f

/* Weights up to 2^8 do no harm, so while no lane's maximum has grown by more, the old ones serve and the output needs no
 * rescaling. */
VEC_INLINE bool max_grows(const struct block *b, const vec *tile_max, vec scale, int vectors) {
    uint32_t grown = 0;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        grown |= vec_mask_bits(vec_greater(
            vec_mul(vec_sub(tile_max[v], vec_load(b->max + v * VEC_LANES)), scale), vec_set(8)));
    return grown;
}

/* origin_of() for the lanes of a vector. */
VEC_INLINE void origin_of_each(vec *top, vec *minus, vec max, vec scale) {
    const vec bits = vec_mul(max, scale), zero = vec_set(0);
    const vec_mask vast = vec_greater(vec_abs(bits), vec_set(VAST_LOGIT)),
                   seen = vec_greater(max, vec_set(-INFINITY));
    *top = vec_blend(zero, max, vec_and(vast, seen));
    *minus = vec_blend(vec_sub(zero, bits), zero, vast);
}

/* rescaling() for the lanes of a vector, whose origins are known. */
VEC_INLINE vec rescaling_of_each(vec before, vec top, vec minus, vec after, vec new_top,
                                 vec new_minus, vec scale) {
    const vec none = vec_set(-INFINITY);
    vec drop = vec_fma(vec_sub(top, new_top), scale, vec_sub(new_minus, minus));
    drop = vec_blend(drop, none, vec_equal(before, none));
    return exp2_of(vec_blend(drop, vec_set(0), vec_equal(before, after)));
}

/* Raises the maximum of a vector's lanes to that of a tile, and returns what sum and output are to be multiplied by. */
VEC_INLINE vec raise_lanes(struct block *b, int v, vec tile_max, vec scale) {
    float *max = b->max + v * VEC_LANES, *top = b->top + v * VEC_LANES,
          *minus = b->minus + v * VEC_LANES;
    const vec none = vec_set(-INFINITY), before = vec_load(max), after = vec_max(tile_max, before);
    vec new_top, new_minus;
    origin_of_each(&new_top, &new_minus, after, scale);
    const vec factor =
        rescaling_of_each(before, vec_load(top), vec_load(minus), after, new_top, new_minus, scale);
    vec_store(max, after);
    vec_store(top, new_top);
    vec_store(minus, new_minus);
    b->unseen |= vec_mask_bits(vec_equal(after, none)) != 0;
    b->vast |= vec_mask_bits(vec_greater(vec_abs(new_top), vec_set(0))) != 0;
    return factor;
}

/* Raises the maxima to those of the tile; sum and output follow. */
VEC_INLINE void raise_max(struct block *b, const vec *tile_max, vec scale, int64_t dim_v,
                          int vectors) {
    vec factor[VECTORS];
    b->unseen = b->vast = false;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        float *sum = b->sum + v * VEC_LANES;
        factor[v] = raise_lanes(b, v, tile_max[v], scale);
        vec_store(sum, vec_mul(vec_load(sum), factor[v]));
    }
    if (!b->fresh)
        rescale(b, factor, dim_v, vectors);
}

/* Takes the tops out of n scores. */
VEC_INLINE void subtract_tops(float *s, const struct block *b, int32_t n, int vectors) {
    for (int32_t j = 0; j < n; j++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            float *at = s + j * LANES + v * VEC_LANES;
            vec_store(at, vec_sub(vec_load(at), vec_load(b->top + v * VEC_LANES)));
        }
}

/* ---- The end of a block ----------------------------------------------------------------------------------------- */

/* to[0 .. n) = from * factor; false, and nothing that counts, if some of it is not finite. */
VEC_INLINE bool store_finite(char *to, const float *from, vec factor, int64_t n, enum dtype dtype) {
    vec zeros = vec_set(0); /* 0 * x is NaN for NaN and infinity */
    int64_t d = 0;
    for (; d + 2 * VEC_LANES <= n; d += 2 * VEC_LANES) {
        const vec x = vec_mul(vec_load(from + d), factor),
                  y = vec_mul(vec_load(from + d + VEC_LANES), factor);
        zeros = vec_fma(x, vec_set(0), vec_fma(y, vec_set(0), zeros));
        if (dtype == DTYPE_BF16) {
            vec_store_bf16_pair(to + d * 2, x, y);
        } else {
            store_some(to + d * dtype_bytes(dtype), x, dtype, VEC_LANES);
            store_some(to + (d + VEC_LANES) * dtype_bytes(dtype), y, dtype, VEC_LANES);
        }
    }
    for (; d < n; d += VEC_LANES) {
        const vec x = vec_mul(vec_load(from + d), factor);
        zeros = vec_fma(x, vec_set(0), zeros);
        store_some(to + d * dtype_bytes(dtype), x, dtype, at_most(n - d, VEC_LANES));
    }
    return !vec_mask_bits(vec_is_nan(zeros));
}

/* The same for any numbers. `from` has zeros up to whole vectors. */
VEC_INLINE bool store_row_as(char *to, const float *from, float factor, int64_t n,
                             enum dtype dtype) {
    const vec factors = vec_set(factor);
    if (store_finite(to, from, factors, n, dtype))
        return true;
    for (int64_t d = 0; d < n; d += VEC_LANES)
        store_some(to + d * dtype_bytes(dtype), vec_mul(vec_load(from + d), factors), dtype,
                   at_most(n - d, VEC_LANES));
    return false;
}

VEC_INLINE bool store_row(char *to, const float *from, float factor, int64_t n, enum dtype dtype) {
    return dtype == DTYPE_F32   ? store_row_as(to, from, factor, n, DTYPE_F32)
           : dtype == DTYPE_F16 ? store_row_as(to, from, factor, n, DTYPE_F16)
                                : store_row_as(to, from, factor, n, DTYPE_BF16);
}

VEC_FN static void store(const struct block *b, const float *factor, char *const *rows,
                         int64_t dim_v, enum dtype dtype, float *scratch, bool *not_finite) {
    const int64_t stride = padded(dim_v, 16);
    for (int32_t first = 0; first < b->rows; first += VEC_LANES) {
        float *output = b->output + first;
        for (int64_t d = dim_v; d < padded(dim_v, VEC_LANES); d++)
            vec_store(output + d * LANES, vec_set(0));
        for (int64_t d = 0; d < dim_v; d += VEC_LANES)
            vec_transpose(scratch + d, stride, output + d * LANES, LANES);
        for (int32_t r = 0; r < at_most(b->rows - first, VEC_LANES); r++)
            not_finite[first + r] =
                !store_row(rows[first + r], scratch + r * stride, factor[first + r], dim_v, dtype);
    }
}
