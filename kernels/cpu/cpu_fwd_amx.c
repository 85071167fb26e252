/*
 * bf16, f16 and f32 by AMX tiles of bf16. An element is the sum of one, two or three bf16 terms (vec_terms.h), and a
 * product of two elements the sum of the products of their terms, without those below the last bit: one product for
 * bf16, four (scores) or three (values) for f16, six for f32, of exact factors and with sums in f32.
 *
 * Operands are packed in tiles of 16 rows x 16 words, 1 KiB each, in the order in which products take them: rows of
 * tiles, of each the steps along the summed axis, of each step the terms. Tile registers cannot be moved to vectors,
 * so scores and outputs go through memory: scores a few keys at a time, which stay in the first-level cache, and
 * outputs once for all keys of a tile.
 */
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16"
#include "kernels/cpu/vec_avx512.h"

#define VECTORS 4
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/vec_terms.h"

enum {
    ROWS = 16,              /* of a tile */
    STEP = 32,              /* elements of a tile along the summed axis */
    TILE = ROWS * STEP / 2, /* words */
    SCORE_KEYS = 64,        /* whose scores are held at a time */
    WEIGHT_KEYS = 256       /* times terms: whose weights are */
};

#define TILE_K(terms) (WEIGHT_KEYS / (terms) / SCORE_KEYS * SCORE_KEYS)

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

/* ---- Products --------------------------------------------------------------------------------------------------- */

/* One row of tiles of an operand begins `row` words after the one before. */
struct tiles {
    const float *words;
    int64_t row;
};

/* c[row][lane] += sum over `steps` of a . b for 2 x 2 tiles of sums (0-3), or as many as there are rows and columns; c
 * starts from 0 unless `add`. Two tiles of a (4, 5) and two of b (6, 7): four products for four loads at most. */
VEC_INLINE void product_tile(float *c, struct tiles a, struct tiles b, int64_t steps, int terms,
                             bool two_rows, bool two_columns, bool add) {
    const size_t lanes = LANES * 4;
    float *c1 = c + ROWS * LANES;
#define LOAD_A(term)                                                                               \
    do {                                                                                           \
        _tile_loadd(4, a.words + (term) * TILE, 64);                                               \
        if (two_rows)                                                                              \
            _tile_loadd(5, a.words + a.row + (term) * TILE, 64);                                   \
    } while (0)
#define LOAD_B(term)                                                                               \
    do {                                                                                           \
        _tile_loadd(6, b.words + (term) * TILE, 64);                                               \
        if (two_columns)                                                                           \
            _tile_loadd(7, b.words + b.row + (term) * TILE, 64);                                   \
    } while (0)
#define MULTIPLY                                                                                   \
    do {                                                                                           \
        _tile_dpbf16ps(0, 4, 6);                                                                   \
        if (two_columns)                                                                           \
            _tile_dpbf16ps(1, 4, 7);                                                               \
        if (two_rows)                                                                              \
            _tile_dpbf16ps(2, 5, 6);                                                               \
        if (two_rows && two_columns)                                                               \
            _tile_dpbf16ps(3, 5, 7);                                                               \
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
            LOAD_A(2);
            LOAD_B(0);
            MULTIPLY;
            LOAD_A(1);
            MULTIPLY;
            LOAD_B(1);
            MULTIPLY;
            LOAD_A(0);
            MULTIPLY;
            LOAD_B(2);
        } else if (terms == 2) {
            LOAD_A(1);
            if (!add) { /* f16 scores are exact: their logits may be large */
                LOAD_B(1);
                MULTIPLY;
            }
            LOAD_B(0);
            MULTIPLY;
            LOAD_A(0);
            MULTIPLY;
            LOAD_B(1);
        } else {
            LOAD_A(0);
            LOAD_B(0);
        }
        MULTIPLY;
        if (terms == 3) {
            LOAD_B(0);
            MULTIPLY;
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
#undef LOAD_A
#undef LOAD_B
#undef MULTIPLY
}

/* All rows (a multiple of 16) of c for the block's vectors. */
VEC_INLINE void product(float *c, struct tiles a, struct tiles b, int64_t steps, int64_t rows,
                        int vectors, int terms, bool add) {
    for (int64_t r = 0; r < rows; r += 2 * ROWS)
        for (int v = 0; v < vectors; v += 2) {
            float *to = c + r * LANES + v * 16;
            const struct tiles left = {a.words + r / ROWS * a.row, a.row},
                               right = {b.words + v * b.row, b.row};
            const bool two_rows = r + ROWS < rows, two_columns = v + 1 < vectors;
            if (two_rows && two_columns)
                product_tile(to, left, right, steps, terms, true, true, add);
            else
                product_tile(to, left, right, steps, terms, two_rows, two_columns, add);
        }
}

/* ---- Operands --------------------------------------------------------------------------------------------------- */

/* The terms of 32 elements from element d of a row on, 0 past its end. Scores are sums of products of terms, down to 2^-126:
 * keys and queries beyond 2^60 are made NaN, so that the smallest terms of the others cannot count. */
VEC_INLINE void load_step(vec *words, const char *row, int64_t d, int64_t dim, enum dtype dtype,
                          int terms) {
    if (terms == 1) {
        const int64_t n = at_most(dim - d, STEP);
        words[0] = _mm512_castsi512_ps(
            _mm512_maskz_loadu_epi16((__mmask32)((UINT64_C(1) << n) - 1), row + d * 2));
        return;
    }
    vec half[2];
    for (int h = 0; h < 2; h++, d += VEC_LANES) {
        const int64_t n = at_most(dim - d, VEC_LANES);
        half[h] = n > 0 ? load_some(row + d * dtype_bytes(dtype), dtype, n) : vec_set(0);
        if (dtype == DTYPE_F32)
            half[h] =
                vec_blend(vec_set(NAN), half[h], vec_greater(vec_set(0x1p60f), vec_abs(half[h])));
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

/* Tiles of 16 d_v x 32 keys, 0 past the last key and the last d_v. */
VEC_INLINE struct operand load_value_terms(float *to, const struct rows *rows, int32_t n,
                                           int64_t dim, enum dtype dtype, int terms) {
    const int64_t row = TILE_K(terms) / STEP * terms * TILE;
    for (int32_t j = 0; j < n; j += STEP)
        for (int64_t d = 0; d < dim; d += ROWS) {
            float words[3][TILE];
            const int64_t some = at_most(dim - d, VEC_LANES);
            for (int32_t r = 0; r < VEC_LANES; r++) {
                vec pair[3], key[2];
                for (int k = 0; k < 2; k++)
                    key[k] = j + 2 * r + k < n
                                 ? load_some((const char *)row_at(rows, j + 2 * r + k) +
                                                 d * dtype_bytes(dtype),
                                             dtype, some)
                                 : vec_set(0);
                pair_terms(pair, key[0], key[1], terms);
                for (int t = 0; t < terms; t++)
                    vec_store(words[t] + r * (STEP / 2), pair[t]);
            }
            for (int t = 0; t < terms; t++)
                vec_transpose(to + d / ROWS * row + (j / STEP * terms + t) * TILE, STEP / 2,
                              words[t], STEP / 2);
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
                    vec_store(words[t] + r * (STEP / 2), lane[t]);
            }
            for (int t = 0; t < terms; t++)
                vec_transpose(b->query + v * row + (d / STEP * terms + t) * TILE, STEP / 2,
                              words[t], STEP / 2);
        }
}

/* ---- Softmax ---------------------------------------------------------------------------------------------------- */

/* Two keys' weights as words of the product; past the last key they are 0. */
VEC_INLINE vec weigh_pair(float *to, const float *s, int32_t left, vec scale, vec minus,
                          int terms) {
    vec even = vec_set(0), odd = even, words[3];
    if (left > 0) {
        even = vec_fma(vec_load(s), scale, minus);
        even = terms == 3 ? exp2_of(even) : exp2_rough(even);
    }
    if (left > 1) {
        odd = vec_fma(vec_load(s + LANES), scale, minus);
        odd = terms == 3 ? exp2_of(odd) : exp2_rough(odd);
    }
    pair_terms(words, even, odd, terms);
#pragma clang loop unroll(full)
    for (int t = 0; t < terms; t++)
        vec_store(to + t * TILE, words[t]);
    return vec_add(even, odd);
}

/* Scores of n keys become weights: tiles of 32 keys x 16 lanes, rows of tiles `row` words apart. */
VEC_INLINE void weigh(float *weights, int64_t row, const float *s, struct block *b, vec scale,
                      int32_t n, int vectors, int terms) {
    for (int v = 0; v < vectors; v++) {
        const vec minus = minus_max(b, v);
        vec sum = vec_load(b->sum + v * VEC_LANES);
        for (int32_t j = 0; j < n; j += STEP) {
            const float *from = s + j * LANES + v * VEC_LANES;
            float *to = weights + v * row + j / STEP * terms * TILE;
            if (n - j >= STEP)
                for (int32_t k = 0; k < STEP; k += 2)
                    sum = vec_add(sum, weigh_pair(to + k * (ROWS / 2), from + k * LANES, 2, scale,
                                                  minus, terms));
            else
                for (int32_t k = 0; k < STEP; k += 2)
                    sum = vec_add(sum, weigh_pair(to + k * (ROWS / 2), from + k * LANES, n - j - k,
                                                  scale, minus, terms));
        }
        vec_store(b->sum + v * VEC_LANES, sum);
    }
}

/* ---- A block and a tile of keys --------------------------------------------------------------------------------- */

VEC_INLINE void accumulate(const struct block *b, const struct key_tile *t, struct tiles weights,
                           int32_t from, int32_t to, int vectors, int terms) {
    const int64_t first = from / STEP, steps = padded(to, STEP) / STEP - first;
    if (steps <= 0)
        return;
    weights.words += first * terms * TILE;
    const struct tiles value = {t->value.words + first * terms * TILE, t->value.stride};
    product(b->output, value, weights, steps, padded(t->dim_v, ROWS), vectors, terms, true);
}

/* Scores and weights, a few keys at a time; then all their values at once, unless a maximum grows on the way: the
 * weights so far belong to the old one. */
VEC_INLINE void attend_vectors(struct block *b, const struct key_tile *t, float *scratch,
                               int vectors, int terms) {
    float *s = scratch, *weights = scratch + SCORE_KEYS * LANES;
    const int64_t weight_row = TILE_K(terms) / STEP * terms * TILE,
                  steps = padded(t->dim_qk, STEP) / STEP;
    const struct tiles query = {b->query, steps * terms * TILE};
    const vec scale = vec_set(t->scale);
    int32_t from = 0; /* the first key that is not yet in the output */
    for (int32_t j = 0; j < t->n; j += SCORE_KEYS) {
        const int64_t first_key = t->first_key + j;
        const int32_t n = (int32_t)at_most(t->n - j, SCORE_KEYS);
        vec tile_max[VECTORS];
        if (from == j && first_key + n <= b->first) {
            from += SCORE_KEYS;
            continue;
        }
        product(s, (struct tiles){t->key.words + j / ROWS * t->key.stride, t->key.stride}, query,
                steps, padded(n, ROWS), vectors, terms, false);
        if (t->rule) {
            struct logit_rule rule = *t->rule;
            rule.extra = rule.extra ? rule.extra + j * LANES : NULL;
            apply_rule(s, &rule, b, first_key, n);
        }
        if (bounded(b, first_key, n))
            apply_bounds(s, b, first_key, n);
        column_max(tile_max, s, n, vectors);
        if (max_grows(b, tile_max, scale, vectors)) {
            accumulate(b, t, (struct tiles){weights, weight_row}, from, j, vectors, terms);
            from = j;
            raise_max(b, tile_max, scale, t->dim_v, vectors);
        }
        weigh(weights + j / STEP * terms * TILE, weight_row, s, b, scale, n, vectors, terms);
    }
    accumulate(b, t, (struct tiles){weights, weight_row}, from, t->n, vectors, terms);
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
        .elements_per_word = 2,                                                                    \
        .terms = count,                                                                            \
        .score_bytes = (SCORE_KEYS + TILE_K(count) * count / 2) * LANES * 4,                       \
        .adds = true,                                                                              \
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

bool cpu_fwd_amx_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return forward_plan(plan, p, body_of(p));
}

int32_t cpu_fwd_amx_launch(const struct plan *plan, const struct problem *p,
                           const struct exec *exec) {
    return forward_launch(plan, p, exec, body_of(p));
}
