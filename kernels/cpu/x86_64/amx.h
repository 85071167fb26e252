/*
 * Products by AMX tiles of bf16, and their operands, for the rows of forward and backward. An element is the sum of one, two or
 * three bf16 terms (vec_terms.h), and a product of two elements the sum of the products of their terms, without those below the
 * last bit: one product for bf16, four (scores) or three (values) for f16, six for f32, of exact factors and with sums in f32.
 *
 * Operands are packed in tiles of 16 rows x 16 words, 1 KiB each, in the order in which products take them: rows of tiles, of
 * each the steps along the summed axis, of each step the terms. Tile registers cannot be moved to vectors, so sums go through
 * memory.
 *
 * Included after forward_template.h, over the vectors of vec_avx512.h and vec_bf16.h.
 */
#ifndef DLATTN_CPU_AMX_H_
#define DLATTN_CPU_AMX_H_

#include "kernels/cpu/x86_64/amx_tiles.h"
#include "kernels/cpu/x86_64/vec_terms.h"

#define VAST 0x1p60f /* of f32: see load_step() */

/* ---- Weights ---------------------------------------------------------------------------------------------------- */

/* As accurate as weights of so many terms are. */
VEC_INLINE void exp2_for_terms(vec *x, int count, int terms) {
    if (terms == 3)
        exp2_each(x, count);
    else if (terms == 2)
        exp2_short_each(x, count);
    else
        exp2_rough_each(x, count);
}

/* Weights in the making: of n <= STEP keys' scores. A word of the product is a pair of keys, k and k + PAIRS. */
struct weighing {
    float *scores;
    float *weights; /* tiles of STEP keys x 16 lanes */
    int64_t row;    /* words from the tiles of one vector to those of the next */
    int32_t n;
    int32_t pair;  /* the next one */
    int32_t share; /* pairs to be weighed beside a tile product, in units of 2^-16 */
    vec scale, minus[VECTORS], sum[VECTORS];
};

/* The next pair for vectors [first, end), `keys` of it present (0 .. 2); absent ones weigh 0. */
VEC_INLINE void weigh_pair(struct weighing *w, int first, int end, int keys, int terms) {
    const int vectors = end - first;
    const float *s = w->scores + w->pair * LANES + first * VEC_LANES;
    float *to = w->weights + w->pair++ * ROWS;
    vec x[2 * VECTORS]; /* even keys of all vectors, odd ones */
#pragma clang loop unroll(full)
    for (int i = 0; i < keys * vectors; i++)
        x[i] = vec_fma(vec_load(s + i / vectors * PAIRS * LANES + i % vectors * VEC_LANES),
                       w->scale, w->minus[first + i % vectors]);
    exp2_for_terms(x, keys * vectors, terms);
#pragma clang loop unroll(full)
    for (int i = 0; i < vectors; i++) {
        vec words[3];
        const int v = first + i;
        const vec even = keys > 0 ? x[i] : vec_set(0), odd = keys > 1 ? x[vectors + i] : vec_set(0);
        w->sum[v] = vec_add(w->sum[v], vec_add(even, odd));
        pair_terms(words, even, odd, terms);
#pragma clang loop unroll(full)
        for (int t = 0; t < terms; t++)
            vec_store(to + v * w->row + t * TILE, words[t]);
    }
}

/* All pairs that are left, up to a whole step. */
VEC_INLINE void weigh_rest(struct weighing *w, int first, int end, int terms) {
    while (w->pair < w->n - PAIRS)
        weigh_pair(w, first, end, 2, terms);
    while (w->pair < PAIRS && w->pair < w->n)
        weigh_pair(w, first, end, 1, terms);
    while (w->pair < PAIRS)
        weigh_pair(w, first, end, 0, terms);
}

/* ---- Products --------------------------------------------------------------------------------------------------- */

/* One row of tiles of an operand begins `row` words after the one before. */
struct tiles {
    const float *words;
    int64_t row;
};

/* Products of tiles for each step, scores or values. f16 scores take all four: their logits may be large. */
VEC_INLINE int products_of(int terms, bool scores) {
    return terms == 3 ? 6 : terms == 2 ? 3 + scores : 1;
}

/* c[row][lane] += sum over `steps` of a . b for 2 x 2 tiles of sums (0-3), or as many as there are rows and columns; c
 * starts from 0 unless `add`. Two tiles of a (4, 5) and two of b (6, 7): four products for four loads at most. After
 * each of them some whole pairs are weighed for two vectors from `first` on, unless `beside` is NULL: tiles and vectors work
 * side by side only if little of either comes at a time. */
VEC_INLINE void product_tile(float *c, struct tiles a, struct tiles b, int64_t steps, int terms,
                             bool two_rows, bool two_columns, bool scores, bool add,
                             struct weighing *beside, int first) {
    const size_t lanes = LANES * 4;
    float *c1 = c + ROWS * LANES;
    int32_t due = 0;
#define LOAD(tile, operand, term, there)                                                           \
    if ((term) >= 0 && (there))                                                                    \
    _tile_loadd(tile, (operand).words + ((tile) % 2 ? (operand).row : 0) + (term) * TILE, 64)
#define PRODUCT(sum, left, right, there)                                                           \
    do {                                                                                           \
        if (there)                                                                                 \
            _tile_dpbf16ps(sum, left, right);                                                      \
        if (beside)                                                                                \
            for (due += beside->share; due >= 1 << 16; due -= 1 << 16)                             \
                weigh_pair(beside, first, first + 2, 2, terms);                                    \
    } while (0)
/* The four products of a term of a and a term of b; -1 is the term that is loaded already. */
#define MULTIPLY(term_a, term_b)                                                                   \
    do {                                                                                           \
        LOAD(4, a, term_a, true);                                                                  \
        LOAD(6, b, term_b, true);                                                                  \
        PRODUCT(0, 4, 6, true);                                                                    \
        LOAD(7, b, term_b, two_columns);                                                           \
        PRODUCT(1, 4, 7, two_columns);                                                             \
        LOAD(5, a, term_a, two_rows);                                                              \
        PRODUCT(2, 5, 6, two_rows);                                                                \
        PRODUCT(3, 5, 7, (two_rows && two_columns));                                               \
    } while (0)
    if (add) {
        _tile_loadd(0, c, lanes);
        if (two_columns)
            _tile_loadd(1, c + 16, lanes);
        if (two_rows)
            _tile_loadd(2, c1, lanes);
        if (two_rows && two_columns)
            _tile_loadd(3, c1 + 16, lanes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++) {
        /* One operand changes from product to product. */
        if (terms == 3) {
            MULTIPLY(2, 0);
            MULTIPLY(1, -1);
            MULTIPLY(-1, 1);
            MULTIPLY(0, -1);
            MULTIPLY(-1, 2);
            MULTIPLY(-1, 0);
        } else if (terms == 2) {
            if (scores) {
                MULTIPLY(1, 1);
                MULTIPLY(-1, 0);
            } else {
                MULTIPLY(1, 0);
            }
            MULTIPLY(0, -1);
            MULTIPLY(-1, 1);
        } else {
            MULTIPLY(0, 0);
        }
        a.words += terms * TILE;
        b.words += terms * TILE;
    }
    _tile_stored(0, c, lanes);
    if (two_columns)
        _tile_stored(1, c + 16, lanes);
    if (two_rows)
        _tile_stored(2, c1, lanes);
    if (two_rows && two_columns)
        _tile_stored(3, c1 + 16, lanes);
#undef LOAD
#undef PRODUCT
#undef MULTIPLY
}

/* All rows (a multiple of 16) of c for the block's vectors. */
VEC_INLINE void product(float *c, struct tiles a, struct tiles b, int64_t steps, int64_t rows,
                        int vectors, int terms, bool scores, bool add) {
    for (int64_t r = 0; r < rows; r += 2 * ROWS)
        for (int v = 0; v < vectors; v += 2) {
            float *to = c + r * LANES + v * 16;
            const struct tiles left = {a.words + r / ROWS * a.row, a.row},
                               right = {b.words + v * b.row, b.row};
            const bool two_rows = r + ROWS < rows, two_columns = v + 1 < vectors;
            if (two_rows && two_columns)
                product_tile(to, left, right, steps, terms, true, true, scores, add, NULL, 0);
            else
                product_tile(to, left, right, steps, terms, two_rows, two_columns, scores, add,
                             NULL, 0);
        }
}

/* ---- Operands --------------------------------------------------------------------------------------------------- */

/* The terms of 32 elements from element d of a row on, 0 past its end; of f32 as many as there are to be. Terms below 2^-126 are lost to the products: f32 keys
 * and queries of 2^60 and more, which could tell, are made NaN, and the reference row computes what meets them. */
VEC_INLINE void load_step(vec *words, const char *row, int64_t d, int64_t dim, enum dtype dtype,
                          int terms) {
    if (dtype == DTYPE_BF16 && d + STEP <= dim) {
        words[0] = vec_load((const float *)(const void *)(row + d * 2));
        return;
    }
    if (dtype == DTYPE_BF16) {
        words[0] = _mm512_castsi512_ps(
            _mm512_maskz_loadu_epi16((__mmask32)((UINT64_C(1) << (dim - d)) - 1), row + d * 2));
        return;
    }
    if (dtype_is_float8(dtype) && terms == 1) {
        words[0] = pairs_of_float8(row + d, at_most(dim - d, STEP), dtype);
        return;
    }
    vec half[2];
    for (int h = 0; h < 2; h++, d += VEC_LANES) {
        const int64_t n = at_most(dim - d, VEC_LANES);
        half[h] = n > 0 ? load_some(row + d * dtype_bytes(dtype), dtype, n) : vec_set(0);
        if (dtype == DTYPE_F32)
            half[h] =
                vec_blend(vec_set(NAN), half[h], vec_greater(vec_set(VAST), vec_abs(half[h])));
    }
    row_terms(words, half[0], half[1], terms);
}

/* Tiles of 16 rows x 32 d. */
VEC_INLINE struct operand load_key_terms(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                         enum dtype dtype, int terms) {
    const int64_t row = padded(dim, STEP) / STEP * terms * TILE;
    for (int32_t j = 0; j < padded(n, ROWS); j++) {
        const char *from = j < n ? row_at(rows, j) : NULL;
        float *tile = to + j / ROWS * row + j % ROWS * (STEP / 2);
        for (int64_t d = 0; d < dim; d += STEP, tile += terms * TILE) {
            vec words[3] = {vec_set(0), vec_set(0), vec_set(0)};
            if (from)
                load_step(words, from, d, dim, dtype, terms);
            for (int t = 0; t < terms; t++)
                vec_store(tile + t * TILE, words[t]);
        }
    }
    return (struct operand){to, row};
}

/* The terms of elements d and on of two rows, in pairs; an absent row is 0. */
VEC_INLINE void load_pair(vec *words, const char *even, const char *odd, int64_t d, int64_t n,
                          enum dtype dtype, int terms) {
    if (dtype == DTYPE_BF16) {
        words[0] =
            even ? pair_words((const uint16_t *)even + d, odd ? (const uint16_t *)odd + d : NULL, n)
                 : vec_set(0);
        return;
    }
    const int64_t at = d * dtype_bytes(dtype);
    pair_terms(words, even ? load_some(even + at, dtype, n) : vec_set(0),
               odd ? load_some(odd + at, dtype, n) : vec_set(0), terms);
}

/* The same of rows[0] and rows[PAIRS] times their scales. */
VEC_INLINE void load_scaled_pair(vec *words, const char *const *rows, const float *scale, int64_t d,
                                 int64_t n, enum dtype dtype, int terms) {
    vec x[2] = {vec_set(0), vec_set(0)};
    for (int i = 0; i < 2; i++)
        if (rows[i * PAIRS])
            x[i] = vec_mul(load_some(rows[i * PAIRS] + d * dtype_bytes(dtype), dtype, n),
                           vec_set(scale[i * PAIRS]));
    pair_terms(words, x[0], x[1], terms);
}

/* Two tiles of 16 d_v x 32 keys, of 32 bf16 of 32 keys: words of two d_v are transposed, then their halves are put
 * beside those of the other key of the pair. */
VEC_INLINE void transpose_bf16(float *to, int64_t row, const char *from, int64_t stride) {
    const float *words = (const float *)(const void *)from;
    for (int d = 0; d < STEP / 2; d += 4) {
        vec even[4], odd[4];
        vec_columns(even, words + d, stride / 4);
        vec_columns(odd, words + d + PAIRS * (stride / 4), stride / 4);
#pragma clang loop unroll(full)
        for (int i = 0; i < 4; i++) {
            float *line = to + (d + i) / (ROWS / 2) * row + (d + i) % (ROWS / 2) * STEP;
            vec_store(line, low_halves(even[i], odd[i]));
            vec_store(line + PAIRS, high_halves(even[i], odd[i]));
        }
    }
}

/* The same of elements d and on of 32 float8 rows. */
VEC_INLINE void transpose_float8(float *to, int64_t row, const char *const *keys, int64_t d,
                                 enum dtype dtype) {
    float words[STEP * PAIRS];
    for (int k = 0; k < STEP; k++)
        vec_store(words + k * PAIRS, pairs_of_float8(keys[k] + d, STEP, dtype));
    transpose_bf16(to, row, (const char *)words, PAIRS * 4);
}

/* Tiles of 16 d_v x 32 keys, 0 past the last key and the last d_v; a row of tiles has the steps of tile_k keys. */
VEC_INLINE struct operand load_value_terms(float *to, const struct rows *rows, int32_t n,
                                           int64_t dim, enum dtype dtype, int terms,
                                           int64_t tile_k) {
    const int64_t row = tile_k / STEP * terms * TILE;
    const bool even = dtype == DTYPE_BF16 && !rows->scale && !rows->rows && rows->stride % 4 == 0,
               float8 = dtype_is_float8(dtype) && terms == 1 && !rows->scale;
    for (int32_t j = 0; j < n; j += STEP) {
        float *step = to + j / STEP * terms * TILE;
        int64_t d = 0;
        if (even && j + STEP <= n)
            for (; d + STEP <= dim; d += STEP)
                transpose_bf16(step + d / ROWS * row, row, rows->data + j * rows->stride + d * 2,
                               rows->stride);
        const char *keys[STEP];
        for (int32_t k = 0; d < dim && k < STEP; k++)
            keys[k] = j + k < n ? row_at(rows, j + k) : NULL;
        for (; float8 && j + STEP <= n && d + STEP <= dim; d += STEP)
            transpose_float8(step + d / ROWS * row, row, keys, d, dtype);
        for (; d < dim; d += ROWS) {
            float words[3][TILE];
            const int64_t some = at_most(dim - d, VEC_LANES);
            for (int32_t k = 0; k < PAIRS; k++) {
                vec pair[3];
                if (rows->scale)
                    load_scaled_pair(pair, keys + k, rows->scale + j + k, d, some, dtype, terms);
                else
                    load_pair(pair, keys[k], keys[k + PAIRS], d, some, dtype, terms);
                for (int t = 0; t < terms; t++)
                    vec_store(words[t] + k * ROWS, pair[t]);
            }
            for (int t = 0; t < terms; t++)
                vec_transpose(step + d / ROWS * row + t * TILE, PAIRS, words[t], ROWS);
        }
    }
    return (struct operand){to, row};
}

/* Tiles of 32 d x 16 lanes. */
VEC_INLINE void pack_query_terms(float *to, const struct block *b, const char *const *rows,
                                 int64_t dim, enum dtype dtype, int terms) {
    const int64_t row = padded(dim, STEP) / STEP * terms * TILE;
    for (int32_t v = 0; v < b->vectors; v++)
        for (int64_t d = 0; d < dim; d += STEP) {
            float words[3][TILE];
            for (int32_t r = 0; r < VEC_LANES; r++) {
                vec lane[3] = {vec_set(0), vec_set(0), vec_set(0)};
                if (v * VEC_LANES + r < b->rows)
                    load_step(lane, rows[v * VEC_LANES + r], d, dim, dtype, terms);
                for (int t = 0; t < terms; t++)
                    vec_store(words[t] + r * PAIRS, lane[t]);
            }
            for (int t = 0; t < terms; t++)
                vec_transpose(to + v * row + (d / STEP * terms + t) * TILE, PAIRS, words[t], PAIRS);
        }
}

#endif /* DLATTN_CPU_AMX_H_ */
