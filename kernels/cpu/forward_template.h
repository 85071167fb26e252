/*
 * The body of a cpu_fwd row, over the vectors of vec_*.h. The including file defines
 *     VECTORS    vectors of a block: VECTORS * VEC_LANES query rows
 *     TILE_K     keys of a tile
 *     PAIRS      1: an operand word is two bf16 (needs dot_pairs and pack_pairs), 0: one f32
 *     NAME       the row
 * and, with its own matrix unit, OWN_PRODUCTS and the functions named there.
 */
#include "kernels/cpu/forward.h"

#include <math.h>

enum { LANES = VECTORS * VEC_LANES, ROW_TILE = 6 };

/* ---- Rows of any dtype ------------------------------------------------------------------------------------------ */

VEC_INLINE vec load_some(const void *p, enum dtype dtype, int64_t n) {
    return dtype == DTYPE_F32   ? vec_load_f32(p, n)
           : dtype == DTYPE_F16 ? vec_load_f16(p, n)
                                : vec_load_bf16(p, n);
}

VEC_INLINE void store_some(void *p, vec x, enum dtype dtype, int64_t n) {
    if (dtype == DTYPE_F32)
        vec_store_f32(p, x, n);
    else if (dtype == DTYPE_F16)
        vec_store_f16(p, x, n);
    else
        vec_store_bf16(p, x, n);
}

VEC_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

/* to[0 .. padded) = from[0 .. n) as f32, then zeros; padded is n rounded up to whole vectors. */
VEC_INLINE void widen_as(float *to, const char *from, int64_t n, enum dtype dtype, int64_t bytes) {
    for (int64_t d = 0; d < n; d += VEC_LANES)
        vec_store(to + d, load_some(from + d * bytes, dtype, at_most(n - d, VEC_LANES)));
}

VEC_FN static void widen(float *to, const char *from, int64_t n, enum dtype dtype) {
    if (dtype == DTYPE_F32)
        widen_as(to, from, n, DTYPE_F32, 4);
    else if (dtype == DTYPE_F16)
        widen_as(to, from, n, DTYPE_F16, 2);
    else
        widen_as(to, from, n, DTYPE_BF16, 2);
}

VEC_FN static void narrow(char *to, const float *from, int64_t n, enum dtype dtype) {
    for (int64_t d = 0; d < n; d += VEC_LANES)
        store_some(to + d * dtype_bytes(dtype), vec_load(from + d), dtype,
                   at_most(n - d, VEC_LANES));
}

static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* ---- Operands --------------------------------------------------------------------------------------------------- */

/* to[column][row] of from[row][column], a block's lanes of rows; columns are padded to whole vectors. */
VEC_FN static void transpose_in(float *to, const float *from, int64_t stride, int64_t columns,
                                int64_t rows) {
    for (int64_t c = 0; c < columns; c += VEC_LANES)
        for (int64_t r = 0; r < rows; r += VEC_LANES)
            vec_transpose(to + c * LANES + r, LANES, from + r * stride + c, stride);
}

#if PAIRS
#ifndef WORD_STEP
#define WORD_STEP 1
#define KEY_STEP 2
#endif

/* One row of bf16, its words padded with zeros to whole vectors. */
static void copy_pairs(float *to, const void *from, int64_t dim) {
    const int64_t words = padded((dim + 1) / 2, 16);
    memset((char *)to + dim * 2, 0, (size_t)(words * 4 - dim * 2));
    memcpy(to, from, (size_t)dim * 2);
}

VEC_FN static void pack_query(float *to, const char *const *rows, int32_t count, int64_t dim,
                              enum dtype dtype, float *scratch) {
    (void)dtype;
    const int64_t stride = padded((dim + 1) / 2, 16), lanes = padded(count, VEC_LANES);
    memset(scratch, 0, (size_t)(lanes * stride * 4));
    for (int32_t r = 0; r < count; r++)
        copy_pairs(scratch + r * stride, rows[r], dim);
    transpose_in(to, scratch, stride, stride, lanes);
}

static struct operand load_key(float *to, const struct rows *rows, int32_t n, int64_t dim,
                               enum dtype dtype) {
    (void)dtype;
    if (!rows->rows && dim % (2 * WORD_STEP) == 0 && rows->stride % 4 == 0 && n % KEY_ROWS == 0)
        return (struct operand){(const float *)(const void *)rows->data, rows->stride / 4};
    const int64_t stride = padded((dim + 1) / 2, 16);
    for (int32_t r = 0; r < n; r++)
        copy_pairs(to + r * stride, row_at(rows, r), dim);
    memset(to + n * stride, 0, (size_t)((padded(n, KEY_ROWS) - n) * stride * 4));
    return (struct operand){to, stride};
}
#else
#define WORD_STEP 1
#define KEY_STEP 1

VEC_FN static void pack_query(float *to, const char *const *rows, int32_t count, int64_t dim,
                              enum dtype dtype, float *scratch) {
    const int64_t stride = padded(dim, 16), lanes = padded(count, VEC_LANES);
    memset(scratch, 0, (size_t)(lanes * stride * 4));
    for (int32_t r = 0; r < count; r++)
        widen(scratch + r * stride, rows[r], dim, dtype);
    transpose_in(to, scratch, stride, stride, lanes);
}

static struct operand load_rows(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                enum dtype dtype) {
    if (dtype == DTYPE_F32 && !rows->rows && rows->stride % 4 == 0)
        return (struct operand){(const float *)(const void *)rows->data, rows->stride / 4};
    const int64_t stride = padded(dim, 16);
    for (int32_t r = 0; r < n; r++)
        widen(to + r * stride, row_at(rows, r), dim, dtype);
    return (struct operand){to, stride};
}
#endif

/* ---- Products --------------------------------------------------------------------------------------------------- */

#ifndef OWN_PRODUCTS

/* acc + word * x: the word of an operand, broadcast, which need not be aligned. */
VEC_INLINE vec dot(vec acc, const float *word, vec x) {
    float w;
    memcpy(&w, word, sizeof w);
#if PAIRS
    return dot_pairs(acc, vec_set(w), x);
#else
    return vec_fma(vec_set(w), x, acc);
#endif
}

/* c[row][lane] (+)= sum over steps of a[row * row_stride + step * step_stride] * b[step][lane].
 * With `rows` and `vectors` constant the sums stay in rows * vectors registers. */
VEC_INLINE void product_tile(float *c, const float *a, int64_t row_stride, int64_t step_stride,
                             const float *b, int64_t steps, int rows, int vectors, bool add) {
    vec acc[ROW_TILE][VECTORS];
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            acc[r][v] = add ? vec_load(c + r * LANES + v * VEC_LANES) : vec_set(0);
    for (int64_t s = 0; s < steps; s++) {
        vec x[VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            x[v] = vec_load(b + s * LANES + v * VEC_LANES);
#pragma clang loop unroll(full)
        for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++)
                acc[r][v] = dot(acc[r][v], a + r * row_stride + s * step_stride, x[v]);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            vec_store(c + r * LANES + v * VEC_LANES, acc[r][v]);
}

VEC_INLINE void product_rows(float *c, const float *a, int64_t row_stride, int64_t step_stride,
                             const float *b, int64_t steps, int rows, int vectors, bool add) {
#define CASE(n)                                                                                    \
    case n:                                                                                        \
        product_tile(c, a, row_stride, step_stride, b, steps, n, vectors, add);                    \
        break
    switch (rows) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
    }
#undef CASE
}

/* All rows: tiles of six, and the last seven to eleven shared by two, so that no tile is too small to hide the
 * latency of its sums. */
VEC_INLINE void product(float *c, const float *a, int64_t row_stride, int64_t step_stride,
                        const float *b, int64_t steps, int64_t rows, int vectors, bool add) {
    while (rows > 0) {
        const int n = rows >= 2 * ROW_TILE ? ROW_TILE
                      : rows > ROW_TILE    ? (int)(rows + 1) / 2
                                           : (int)rows;
        product_rows(c, a, row_stride, step_stride, b, steps, n, vectors, add);
        c += n * LANES;
        a += n * row_stride;
        rows -= n;
    }
}

VEC_INLINE void scores_of(float *s, const struct operand *key, const float *query, int64_t words,
                          int64_t n, int vectors) {
    product(s, key->words, key->stride, 1, query, words, n, vectors, false);
}

VEC_INLINE void accumulate_of(float *o, const struct operand *value, const float *weights,
                              int64_t steps, int64_t dim_v, int vectors) {
    product(o, value->words, 1, value->stride, weights, steps, dim_v, vectors, true);
}

VEC_FN static void scores(float *s, const struct operand *key, const struct block *b, int32_t n,
                          int64_t dim) {
    const int64_t words = PAIRS ? (dim + 1) / 2 : dim;
    if (b->vectors == 1)
        scores_of(s, key, b->query, words, n, 1);
    else if (b->vectors == 2 && VECTORS > 2)
        scores_of(s, key, b->query, words, n, 2);
    else
        scores_of(s, key, b->query, words, n, VECTORS);
}

VEC_FN static void accumulate(const struct block *b, const struct operand *value,
                              const float *weights, int32_t n, int64_t dim_v) {
    const int64_t steps = PAIRS ? (n + 1) / 2 : n;
    if (b->vectors == 1)
        accumulate_of(b->output, value, weights, steps, dim_v, 1);
    else if (b->vectors == 2 && VECTORS > 2)
        accumulate_of(b->output, value, weights, steps, dim_v, 2);
    else
        accumulate_of(b->output, value, weights, steps, dim_v, VECTORS);
}

#if PAIRS
/* Words (value[2 j][d], value[2 j + 1][d]); an absent last key is 0. */
VEC_FN static struct operand load_value(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                        enum dtype dtype) {
    (void)dtype;
    const int64_t stride = padded(dim, 16);
    for (int32_t r = 0; r < n; r += 2)
        pair_rows(to + r / 2 * stride, row_at(rows, r), r + 1 < n ? row_at(rows, r + 1) : NULL,
                  dim);
    return (struct operand){to, stride};
}
#endif

static void enter(void) {}
static void leave(void) {}

#endif /* OWN_PRODUCTS */

/* ---- Logits ----------------------------------------------------------------------------------------------------- */

/* 2^x to 1 ulp of f32, minimax on [0, 1). */
VEC_INLINE vec exp2_of(vec x) {
    const vec f = vec_fraction(x);
    vec y = vec_fma(vec_set(0.000217022534f), f, vec_set(0.00124396884f));
    y = vec_fma(y, f, vec_set(0.00967884064f));
    y = vec_fma(y, f, vec_set(0.0554833412f));
    y = vec_fma(y, f, vec_set(0.24022983f));
    y = vec_fma(y, f, vec_set(0.693147004f));
    y = vec_fma(y, f, vec_set(1));
    return vec_scale_floor(y, x);
}

/* tanh: the Taylor series below 1/4, where 1 - e would cancel; else (1 - e) / (1 + e) with e = exp(-2 |x|). */
VEC_INLINE vec tanh_of(vec x) {
    const vec square = vec_mul(x, x), size = vec_abs(x);
    vec y = vec_fma(vec_set(-1382.0f / 155925), square, vec_set(62.0f / 2835));
    y = vec_fma(y, square, vec_set(-17.0f / 315));
    y = vec_fma(y, square, vec_set(2.0f / 15));
    y = vec_fma(y, square, vec_set(-1.0f / 3));
    y = vec_fma(vec_mul(y, square), x, x);
    const vec e = exp2_of(vec_mul(size, vec_set(-2.8853900818f)));
    const vec big = vec_div(vec_sub(vec_set(1), e), vec_add(vec_set(1), e));
    return vec_blend(y, vec_sign_of(big, x), vec_greater(size, vec_set(0.25f)));
}

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
                              const struct extra_layout *layout, int32_t count, int64_t first_key,
                              int32_t n, float *scratch) {
    const int64_t stride = padded(n, VEC_LANES), lanes = padded(count, VEC_LANES);
    const int64_t bytes = dtype_bytes(layout->bias_dtype);
    memset(scratch + count * stride, 0, (size_t)((lanes - count) * stride * 4));
    for (int32_t r = 0; r < count; r++) {
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
    const vec scale = vec_set(rule->scale), cap = vec_set(rule->softcap), none = vec_set(-INFINITY),
              least = vec_set(-3.4e38f),
              per_cap = vec_set(rule->softcap > 0 ? 1 / rule->softcap : 0);
    for (int32_t v = 0; v < b->vectors; v++) {
        const vec position = vec_load(b->position + v * VEC_LANES),
                  slope = vec_load(b->slope + v * VEC_LANES);
        for (int32_t j = 0; j < n; j++) {
            const int64_t at = j * LANES + v * VEC_LANES;
            vec x = vec_mul(vec_load(s + at), scale);
            if (rule->softcap > 0)
                x = vec_mul(cap, tanh_of(vec_mul(x, per_cap)));
            if (rule->alibi) {
                const vec distance = vec_abs(vec_sub(position, vec_set((float)(first_key + j))));
                x = vec_fnma(slope, distance, x);
            }
            const vec extra = rule->extra ? vec_load(rule->extra + at) : vec_set(0);
            x = vec_add(x, extra);
            /* The most negative finite biases must not become -inf, which hides a key. */
            const vec bits = vec_mul(x, vec_set(1.4426950409f));
            x = vec_blend(bits, least, vec_and(vec_equal(bits, none), vec_greater(x, none)));
            vec_store(s + at, vec_blend(x, none, vec_same_bits(extra, HIDDEN_BITS)));
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
                even = exp2_of(vec_fma(vec_load(at), scale, minus_max[v]));
            if (j + 1 < n)
                odd = exp2_of(vec_fma(vec_load(at + LANES), scale, minus_max[v]));
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

#if PAIRS
#define PAIRS_OR(a, b) a
#else
#define PAIRS_OR(a, b) b
#endif

/* ---- The row ---------------------------------------------------------------------------------------------------- */

static const struct forward_body body = {
    .lanes = LANES,
    .vector_lanes = VEC_LANES,
    .tile_k = TILE_K,
    .elements_per_word = PAIRS ? 2 : 1,
    .word_step = WORD_STEP,
    .key_step = KEY_STEP,
    .enter = enter,
    .leave = leave,
    .pack_query = pack_query,
    .load_key = PAIRS_OR(load_key, load_rows),
    .load_value = PAIRS_OR(load_value, load_rows),
    .scores = scores,
    .load_extra = load_extra,
    .apply_rule = apply_rule,
    .apply_bounds = apply_bounds,
    .softmax = softmax,
    .accumulate = accumulate,
    .store = store,
};

#define PASTE(a, b) a##b
#define FUNCTION(row, suffix) PASTE(row, suffix)

bool FUNCTION(NAME, _plan)(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return forward_plan(plan, p, &body);
}

int32_t FUNCTION(NAME, _launch)(const struct plan *plan, const struct problem *p,
                                const struct exec *exec) {
    return forward_launch(plan, p, exec, &body);
}
