/*
 * bf16, f16 and f32 by AMX tiles of bf16. An element is the sum of one, two or three bf16 terms (vec_terms.h), and a
 * product of two elements the sum of the products of their terms, without those below the last bit: one product for
 * bf16, four (scores) or three (values) for f16, six for f32, of exact factors and with sums in f32.
 *
 * Tiles and vectors are units of their own, which work side by side if their instructions alternate, few of each at a
 * time: the softmax of some keys runs beside the products of the next ones' scores.
 *
 * Operands are packed in tiles of 16 rows x 16 words, 1 KiB each, in the order in which products take them: rows of
 * tiles, of each the steps along the summed axis, of each step the terms. Tile registers cannot be moved to vectors,
 * so scores and outputs go through memory: scores a few keys at a time, which stay in the first-level cache.
 */
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16"
#include "kernels/cpu/x86_64/vec_avx512.h"
#include "kernels/cpu/x86_64/vec_bf16.h"

#define VECTORS 4
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/x86_64/vec_terms.h"

enum {
    ROWS = 16, /* of a tile */
    STEP = 32, /* elements of a tile along the summed axis */
    PAIRS = STEP / 2,
    TILE = ROWS * PAIRS /* words */
};

#define VAST 0x1p60f /* of f32: see load_step() */
#define TILE_K(terms) ((terms) == 3 ? 128 : 512)

/* Every tile 16 rows of 64 bytes (Intel SDM, LDTILECFG). */
VEC_FN static void enter(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = ROWS;
    }
    _tile_loadconfig(&config);
}

VEC_FN static void leave(void) { _tile_release(); }

/* ---- Softmax ---------------------------------------------------------------------------------------------------- */

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
    if (terms == 3)
        exp2_each(x, keys * vectors);
    else if (terms == 2)
        exp2_short_each(x, keys * vectors);
    else
        exp2_rough_each(x, keys * vectors);
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

/* Relative to the maxima that the block has. */
VEC_INLINE void start_weighing(struct weighing *w, const struct block *b, int vectors) {
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        w->minus[v] = vec_load(b->minus + v * VEC_LANES);
        w->sum[v] = vec_set(0);
    }
    if (b->vast)
        subtract_tops(w->scores, b, w->n, vectors);
    w->pair = 0;
}

/* False, and no sums, if some lane's maximum has grown so far that its weights are too large. */
VEC_INLINE bool end_weighing(const struct weighing *w, struct block *b, int vectors) {
    uint32_t huge = 0;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        huge |= vec_mask_bits(vec_greater(w->sum[v], vec_set(HUGE_SUM)));
    if (huge)
        return false;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        vec_store(b->sum + v * VEC_LANES, vec_add(vec_load(b->sum + v * VEC_LANES), w->sum[v]));
    return true;
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

/* The terms of 32 elements from element d of a row on, 0 past its end. Terms below 2^-126 are lost to the products: f32 keys
 * and queries of 2^60 and more, which could tell, are made NaN, and the reference row computes what meets them. */
VEC_INLINE void load_step(vec *words, const char *row, int64_t d, int64_t dim, enum dtype dtype,
                          int terms) {
    if (terms == 1 && d + STEP <= dim) {
        words[0] = vec_load((const float *)(const void *)(row + d * 2));
        return;
    }
    if (terms == 1) {
        words[0] = _mm512_castsi512_ps(
            _mm512_maskz_loadu_epi16((__mmask32)((UINT64_C(1) << (dim - d)) - 1), row + d * 2));
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
    if (terms == 1) {
        words[0] =
            even ? pair_words((const uint16_t *)even + d, odd ? (const uint16_t *)odd + d : NULL, n)
                 : vec_set(0);
        return;
    }
    const int64_t at = d * dtype_bytes(dtype);
    pair_terms(words, even ? load_some(even + at, dtype, n) : vec_set(0),
               odd ? load_some(odd + at, dtype, n) : vec_set(0), terms);
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

/* Tiles of 16 d_v x 32 keys, 0 past the last key and the last d_v. */
VEC_INLINE struct operand load_value_terms(float *to, const struct rows *rows, int32_t n,
                                           int64_t dim, enum dtype dtype, int terms) {
    const int64_t row = TILE_K(terms) / STEP * terms * TILE;
    const bool even = terms == 1 && !rows->rows && rows->stride % 4 == 0;
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
        for (; d < dim; d += ROWS) {
            float words[3][TILE];
            const int64_t some = at_most(dim - d, VEC_LANES);
            for (int32_t k = 0; k < PAIRS; k++) {
                vec pair[3];
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
VEC_INLINE void pack_query_terms(const struct block *b, const char *const *rows, int64_t dim,
                                 enum dtype dtype, int terms) {
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
                vec_transpose(b->query + v * row + (d / STEP * terms + t) * TILE, PAIRS, words[t],
                              PAIRS);
        }
}

/* ---- A block and a tile of keys --------------------------------------------------------------------------------- */

/* Products of n keys from key j of the tile on become scores. */
static void finish_scores(float *s, const struct block *b, const struct key_tile *t, int32_t j,
                          int32_t n) {
    if (t->rule) {
        struct logit_rule rule = *t->rule;
        rule.extra = rule.extra ? rule.extra + j * LANES : NULL;
        apply_rule(s, &rule, b, t->first_key + j, n, NULL);
    }
    if (bounded(b, t->first_key + j, n))
        apply_bounds(s, b, t->first_key + j, n);
}

/* A tile of keys, a few at a time. */
struct attending {
    struct block *b;
    const struct key_tile *t;
    float *scores[2]; /* STEP x LANES each: weighed now, and next */
    float *weights;   /* tiles of 32 keys x 16 lanes */
    int64_t weight_row;
    int32_t from; /* the first key that is not yet in the output */
};

/* Values of keys [from, to). */
VEC_INLINE void accumulate(struct attending *a, int32_t to, int vectors, int terms) {
    const struct key_tile *t = a->t;
    const int64_t first = a->from / STEP, steps = padded(to, STEP) / STEP - first;
    if (steps > 0) {
        product(a->b->output,
                (struct tiles){t->value.words + first * terms * TILE, t->value.stride},
                (struct tiles){a->weights + first * terms * TILE, a->weight_row}, steps,
                padded(t->dim_v, ROWS), vectors, terms, false, !a->b->fresh);
        a->b->fresh = false;
    }
    a->from = to;
}

/* The scores of up to STEP keys from key j on; of so many, and of all vectors, if pairs are weighed beside them. */
VEC_INLINE void score(const struct attending *a, float *s, int32_t j, struct weighing *beside,
                      int vectors, int terms) {
    const struct key_tile *t = a->t;
    const int32_t n = (int32_t)at_most(t->n - j, STEP);
    const int64_t steps = padded(t->dim_qk, STEP) / STEP, row = steps * terms * TILE;
    const struct tiles keys = {t->key.words + j / ROWS * t->key.stride, t->key.stride},
                       queries = {a->b->query, row};
    fetch_rows(t->next, 8);
    if (beside) {
        beside->share = (int32_t)((PAIRS << 16) / (steps * 4 * products_of(terms, true)));
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v += 2) {
            const struct tiles right = {queries.words + v * row, row};
            beside->pair = 0;
            product_tile(s + v * 16, keys, right, steps, terms, true, true, true, false, beside, v);
            weigh_rest(beside, v, v + 2, terms);
        }
    } else {
        product(s, keys, queries, steps, padded(n, ROWS), vectors, terms, true, false);
    }
    finish_scores(s, a->b, t, j, n);
}

/* Brings the maxima up to the scores from key j on, and the output up to key j: its weights belong to the old maxima. */
VEC_INLINE void raise(struct attending *a, const struct weighing *w, int32_t j, int vectors,
                      int terms) {
    vec tile_max[VECTORS];
    column_max(tile_max, w->scores, w->n, vectors);
    if (!max_grows(a->b, tile_max, w->scale, vectors))
        return;
    accumulate(a, j, vectors, terms);
    raise_max(a->b, tile_max, w->scale, a->t->dim_v, vectors);
}

/* The weights of keys from j on; beside them the scores of the next keys, if there are as many. */
VEC_INLINE void weigh(struct attending *a, int32_t j, bool last, int vectors, int terms) {
    struct weighing w = {
        .scores = a->scores[0],
        .weights = a->weights + j / STEP * terms * TILE,
        .row = a->weight_row,
        .n = (int32_t)at_most(a->t->n - j, STEP),
        .scale = vec_set(a->t->scale),
    };
    if (a->b->unseen || a->b->vast) /* without its top a score is no good for a second try */
        raise(a, &w, j, vectors, terms);
    start_weighing(&w, a->b, vectors);
    if (vectors == VECTORS && a->t->n - j >= 2 * STEP) {
        score(a, a->scores[1], j + STEP, &w, vectors, terms);
    } else {
        weigh_rest(&w, 0, vectors, terms);
        if (!last)
            score(a, a->scores[1], j + STEP, NULL, vectors, terms);
    }
    if (end_weighing(&w, a->b, vectors))
        return;
    raise(a, &w, j, vectors, terms);
    start_weighing(&w, a->b, vectors);
    weigh_rest(&w, 0, vectors, terms);
    end_weighing(&w, a->b, vectors);
}

/* Scores and weights of all keys, then all their values at once. */
VEC_INLINE void attend_vectors(struct block *b, const struct key_tile *t, float *scratch,
                               int vectors, int terms) {
    struct attending a = {.b = b,
                          .t = t,
                          .scores = {scratch, scratch + STEP * LANES},
                          .weights = scratch + 2 * STEP * LANES,
                          .weight_row = TILE_K(terms) / STEP * terms * TILE};
    while (t->first_key + a.from + STEP <= b->first)
        a.from += STEP;
    score(&a, a.scores[0], a.from, NULL, vectors, terms);
    for (int32_t j = a.from; j < t->n; j += STEP) {
        weigh(&a, j, j + STEP >= t->n, vectors, terms);
        float *const now = a.scores[0];
        a.scores[0] = a.scores[1];
        a.scores[1] = now;
    }
    accumulate(&a, t->n, vectors, terms);
}

VEC_INLINE void attend_terms(struct block *b, const struct key_tile *t, float *scratch, int terms) {
    if (b->vectors == 1)
        attend_vectors(b, t, scratch, 1, terms);
    else if (b->vectors == 2)
        attend_vectors(b, t, scratch, 2, terms);
    else
        attend_vectors(b, t, scratch, VECTORS, terms);
}

/* ---- The row: a body for each dtype ----------------------------------------------------------------------------- */

#define BODY(name, element, count)                                                                 \
    VEC_FN static void pack_query_##name(const struct block *b, const char *const *rows,           \
                                         int64_t dim, enum dtype dtype, float *scratch) {          \
        (void)dtype, (void)scratch;                                                                \
        pack_query_terms(b, rows, dim, element, count);                                            \
    }                                                                                              \
    VEC_FN static struct operand load_key_##name(float *to, const struct rows *rows, int32_t n,    \
                                                 int64_t dim, enum dtype dtype) {                  \
        (void)dtype;                                                                               \
        return load_key_terms(to, rows, n, dim, element, count);                                   \
    }                                                                                              \
    VEC_FN static struct operand load_value_##name(float *to, const struct rows *rows, int32_t n,  \
                                                   int64_t dim, enum dtype dtype) {                \
        (void)dtype;                                                                               \
        return load_value_terms(to, rows, n, dim, element, count);                                 \
    }                                                                                              \
    VEC_FN static void attend_##name(struct block *b, const struct key_tile *t, float *scratch) {  \
        attend_terms(b, t, scratch, count);                                                        \
    }                                                                                              \
    static const struct forward_body body_##name = {                                               \
        .lanes = LANES,                                                                            \
        .vector_lanes = VEC_LANES,                                                                 \
        .tile_k = TILE_K(count),                                                                   \
        .step_k = STEP,                                                                            \
        .elements_per_word = 2,                                                                    \
        .terms = count,                                                                            \
        .score_bytes = (2 * STEP + TILE_K(count) * count / 2) * LANES * 4,                         \
        .enter = enter,                                                                            \
        .leave = leave,                                                                            \
        .pack_query = pack_query_##name,                                                           \
        .load_key = load_key_##name,                                                               \
        .load_value = load_value_##name,                                                           \
        .load_extra = load_extra,                                                                  \
        .attend = attend_##name,                                                                   \
        .store = store,                                                                            \
    };

BODY(bf16, DTYPE_BF16, 1)
BODY(f16, DTYPE_F16, 2)
BODY(f32, DTYPE_F32, 3)

static const struct forward_body *body_of(const struct problem *p) {
    return p->dtype == DTYPE_BF16 ? &body_bf16 : p->dtype == DTYPE_F16 ? &body_f16 : &body_f32;
}

ROW_FUNCTIONS(cpu_fwd_amx);

bool cpu_fwd_amx_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    /* f32 only where it is asked for: 1.4 times as fast as by FMA on a core of its own, 0.75 times on one whose other thread
     * multiplies tiles, too. A vast scale would show what its terms lose, as vast keys would. */
    if (p->dtype == DTYPE_F32 && (!p->kernel || fabs(p->scale) >= VAST))
        return false;
    return forward_plan(plan, p, body_of(p));
}

int32_t cpu_fwd_amx_launch(const struct plan *plan, const struct problem *p,
                           const struct exec *exec) {
    return forward_launch(plan, p, exec, body_of(p));
}
