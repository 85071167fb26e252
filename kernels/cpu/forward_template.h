/*
 * What the bodies of all cpu_fwd rows share, over the vectors of vec_*.h. A row's file defines
 *     VECTORS    vectors of a block: VECTORS * VEC_LANES query rows
 *     TILE_K     keys of a tile
 *     PAIRS      1: an operand word is two bf16 (needs vec_bf16.h), 0: one f32
 *     WORD_STEP, KEY_STEP   see struct forward_body
 * and includes, after this file, forward_f32.h or forward_pairs.h (operands), forward_products.h or its own products,
 * and forward_row.h.
 */
#include "kernels/cpu/forward.h"
#include "kernels/cpu/vec_math.h"

#include <math.h>

enum { LANES = VECTORS * VEC_LANES };

/* to[column][row] of from[row][column], a block's lanes of rows; columns are padded to whole vectors. */
VEC_FN static void transpose_in(float *to, const float *from, int64_t stride, int64_t columns,
                                int64_t rows) {
    for (int64_t c = 0; c < columns; c += VEC_LANES)
        for (int64_t r = 0; r < rows; r += VEC_LANES)
            vec_transpose(to + c * LANES + r, LANES, from + r * stride + c, stride);
}

/* ---- Logits ----------------------------------------------------------------------------------------------------- */

VEC_INLINE vec load_strided(const char *p, enum dtype dtype, int64_t stride, int64_t n) {
    if (stride == 1)
        return load_some(p, dtype, n);
    float part[VEC_LANES] = {0};
    for (int64_t j = 0; j < n; j++)
        part[j] = (float)load_element(p, dtype, j * stride);
    return vec_load(part);
}

VEC_INLINE vec hide(vec x, const uint8_t *mask, int64_t stride, int64_t n) {
    float part[VEC_LANES];
    vec_store(part, x);
    for (int64_t j = 0; j < n; j++)
        part[j] = mask[j * stride] ? part[j] : bits_float(HIDDEN_BITS);
    return vec_load(part);
}

VEC_FN static void load_extra(float *extra, const struct extra_row *rows,
                              const struct extra_layout *layout, const struct block *b,
                              int64_t first_key, int32_t n, float *scratch) {
    const int64_t stride = padded(n, VEC_LANES), lanes = b->vectors * VEC_LANES;
    const int64_t bytes = dtype_bytes(layout->bias_dtype);
    memset(scratch + b->rows * stride, 0, (size_t)((lanes - b->rows) * stride * 4));
    for (int32_t r = 0; r < b->rows; r++) {
        for (int64_t j = 0; j < n; j += VEC_LANES) {
            const int64_t some = at_most(n - j, VEC_LANES), k = first_key + j;
            vec x = vec_set(0);
            if (rows[r].bias)
                x = load_strided(rows[r].bias + k * layout->bias_stride * bytes, layout->bias_dtype,
                                 layout->bias_stride, some);
            if (rows[r].mask)
                x = hide(x, rows[r].mask + k * layout->mask_stride, layout->mask_stride, some);
            vec_store(scratch + r * stride + j, x);
        }
    }
    transpose_in(extra, scratch, stride, stride, lanes);
}

VEC_FN static void apply_rule(float *s, const struct logit_rule *rule, const struct block *b,
                              int64_t first_key, int32_t n) {
    for (int32_t v = 0; v < b->vectors; v++) {
        const vec position = vec_load(b->position + v * VEC_LANES),
                  slope = vec_load(b->slope + v * VEC_LANES);
        for (int32_t j = 0; j < n; j++) {
            const int64_t at = j * LANES + v * VEC_LANES;
            const vec distance = vec_abs(vec_sub(position, vec_set((float)(first_key + j))));
            vec_store(s + at, logit_of(vec_load(s + at), rule, slope, distance,
                                       rule->extra ? vec_load(rule->extra + at) : vec_set(0)));
        }
    }
}

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

/* Raises the maxima to those of the tile. Weights up to 2^8 do no harm, so while no lane's maximum has grown by more,
 * the old ones serve and the output needs no rescaling. */
VEC_INLINE void raise_max(struct block *b, const vec *tile_max, vec scale, int64_t dim_v,
                          int vectors) {
    vec factor[VECTORS];
    uint32_t grown = 0;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        grown |= vec_mask_bits(vec_greater(vec_mul(tile_max[v], scale),
                                           vec_add(vec_load(b->max + v * VEC_LANES), vec_set(8))));
    if (!grown)
        return;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        float *max = b->max + v * VEC_LANES, *sum = b->sum + v * VEC_LANES;
        const vec before = vec_load(max), after = vec_max(vec_mul(tile_max[v], scale), before);
        const vec drop = vec_blend(vec_sub(before, after), vec_set(0), vec_equal(before, after));
        factor[v] = exp2_of(drop);
        vec_store(max, after);
        vec_store(sum, vec_mul(vec_load(sum), factor[v]));
    }
    if (!b->fresh)
        rescale(b, factor, dim_v, vectors);
    b->fresh = false;
}

VEC_INLINE void softmax_of(float *s, struct block *b, vec scale, int32_t n, int64_t dim_v,
                           int vectors) {
    vec tile_max[VECTORS], minus_max[VECTORS], sum[VECTORS];
    column_max(tile_max, s, n, vectors);
    raise_max(b, tile_max, scale, dim_v, vectors);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        const vec max = vec_load(b->max + v * VEC_LANES);
        /* A lane that has seen no key keeps -inf; its scores are all -inf, and -inf - 0 gives weight 0. */
        minus_max[v] =
            vec_sub(vec_set(0), vec_blend(max, vec_set(0), vec_equal(max, vec_set(-INFINITY))));
        sum[v] = vec_set(0);
    }
#if PAIRS
    for (int32_t j = 0; j < padded(n, KEY_STEP); j += 2)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            const float *at = s + j * LANES + v * VEC_LANES;
            vec even = vec_set(0), odd = even;
            if (j < n)
                even = exp2_short(vec_fma(vec_load(at), scale, minus_max[v]));
            if (j + 1 < n)
                odd = exp2_short(vec_fma(vec_load(at + LANES), scale, minus_max[v]));
            sum[v] = vec_add(sum[v], vec_add(even, odd));
            vec_store(s + j / 2 * LANES + v * VEC_LANES, pack_pairs(even, odd));
        }
#else
    for (int32_t j = 0; j < n; j++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            float *at = s + j * LANES + v * VEC_LANES;
            const vec weight = exp2_of(vec_fma(vec_load(at), scale, minus_max[v]));
            sum[v] = vec_add(sum[v], weight);
            vec_store(at, weight);
        }
#endif
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        vec_store(b->sum + v * VEC_LANES, vec_add(vec_load(b->sum + v * VEC_LANES), sum[v]));
}

VEC_FN static void softmax(float *s, struct block *b, float scale, int32_t n, int64_t dim_v) {
    if (b->vectors == 1)
        softmax_of(s, b, vec_set(scale), n, dim_v, 1);
    else if (b->vectors == 2 && VECTORS > 2)
        softmax_of(s, b, vec_set(scale), n, dim_v, 2);
    else
        softmax_of(s, b, vec_set(scale), n, dim_v, VECTORS);
}

/* ---- The end of a block ----------------------------------------------------------------------------------------- */

VEC_FN static void store(const struct block *b, const float *factor, char *const *rows,
                         int64_t dim_v, enum dtype dtype, float *scratch, bool *not_finite) {
    const int64_t stride = padded(dim_v, 16);
    for (int32_t v = 0; v * VEC_LANES < b->rows; v++) {
        const int32_t first = v * VEC_LANES, count = (int32_t)at_most(b->rows - first, VEC_LANES);
        float *output = b->output + first, part[VEC_LANES] = {0};
        memcpy(part, factor + first, (size_t)count * sizeof part[0]);
        const vec f = vec_load(part);
        vec zeros = vec_set(0); /* 0 * x is NaN for NaN and infinity */
        for (int64_t d = 0; d < dim_v; d++) {
            const vec x = vec_mul(vec_load(output + d * LANES), f);
            zeros = vec_fma(x, vec_set(0), zeros);
            vec_store(output + d * LANES, x);
        }
        const uint32_t bad = vec_mask_bits(vec_is_nan(zeros));
        for (int64_t d = 0; d < dim_v; d += VEC_LANES)
            vec_transpose(scratch + d, stride, output + d * LANES, LANES);
        for (int32_t r = 0; r < count; r++) {
            narrow(rows[first + r], scratch + r * stride, dim_v, dtype);
            not_finite[first + r] = bad >> r & 1;
        }
    }
}
