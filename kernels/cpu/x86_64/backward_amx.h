/*
 * The cpu_bwd rows by AMX, with TERMS bf16 to an element of ELEMENT, all packed in tiles (amx.h).
 * Three of the five products sum over d or keys as those of forward do; the other two over lanes, 32 at a time:
 *
 *     weights, d_weights   keys, values as they lie      query, d_output, tiles of 32 d x 16 lanes
 *     d_query              keys, tiles of 16 d x 32 keys d_weights, tiles of 32 keys x 16 lanes
 *     d_value, d_key       weights, d_weights, tiles of  d_output, query, tiles of 32 lanes x 16 d
 *                          16 keys x 32 lanes
 *
 * A word is two elements 16 lanes or keys apart, so that no vector is shuffled.
 */
#include "kernels/cpu/x86_64/amx.h"

#define EXP2_EACH(x, count) exp2_for_terms(x, count, TERMS)
#include "kernels/cpu/x86_64/backward_one_walk.h"

enum { STEP_D = STEP };
enum { PACKED = TILE_K * LANES / 2 * TERMS, PACKED_BYTES = 3 * PACKED * 4 };
enum { KEY_STEPS = TILE_K / STEP, LANE_STEPS = LANES / STEP };

/* Words from the tiles of 16 keys, or of 16 lanes, to the next along d. */
static int64_t row_words(int64_t dim) { return padded(dim, STEP) / STEP * TERMS * TILE; }

/* Words of a tile of keys: as they lie, then transposed; values are only the former. */
static int64_t key_words(int64_t dim) { return row_words(dim) * (TILE_K / ROWS); }

/* ---- Operands ------------------------------------------------------------------------------- */

static struct rows rows_from(const struct rows *rows, int64_t first) {
    return (struct rows){.data = rows->data + first * rows->stride,
                         .stride = rows->stride,
                         .rows = rows->rows ? rows->rows + first : NULL};
}

VEC_INLINE struct operand load_tiles(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                     bool both_ways) {
    const int64_t words = key_words(dim) * (both_ways ? 2 : 1);
    for (int32_t j = 0; j < n; j += TILE_K) {
        const struct rows some = rows_from(rows, j);
        float *const tile = to + j / TILE_K * words;
        const int32_t keys = (int32_t)at_most(n - j, TILE_K);
        load_key_terms(tile, &some, keys, dim, ELEMENT, TERMS);
        if (both_ways)
            load_value_terms(tile + key_words(dim), &some, keys, dim, ELEMENT, TERMS, TILE_K);
    }
    return (struct operand){to, words / TILE_K};
}

VEC_FN static struct operand load_key(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                      enum dtype dtype) {
    (void)dtype;
    return load_tiles(to, rows, n, dim, true);
}

VEC_FN static struct operand load_value(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                        enum dtype dtype) {
    (void)dtype;
    return load_tiles(to, rows, n, dim, false);
}

static bool finite_rows(const struct operand *rows, int32_t n, int64_t dim) {
    return finite_words(rows->words, padded(n, ROWS) / ROWS * row_words(dim));
}

/* Tiles of 32 lanes x 16 d: of each 16 columns the steps along the lanes. */
VEC_INLINE void pack_columns(float *to, const char *const *rows, int64_t dim, enum dtype dtype) {
    for (int64_t d = 0; d < dim; d += ROWS)
        for (int l = 0; l < LANES; l += STEP, to += TERMS * TILE)
            for (int r = 0; r < PAIRS; r++) {
                vec words[3];
                load_pair(words, rows[l + r], rows[l + r + PAIRS], d, at_most(dim - d, VEC_LANES),
                          dtype, TERMS);
                for (int t = 0; t < TERMS; t++)
                    vec_store(to + t * TILE + r * ROWS, words[t]);
            }
}

VEC_FN static bool pack(const struct block *b, float *transposed, float *columns,
                        const char *const *rows, int64_t dim, enum dtype dtype, float *scratch) {
    const char *every[MAX_LANES];
    memset(scratch, 0, (size_t)(dim * 4));
    for (int32_t lane = 0; lane < LANES; lane++)
        every[lane] = lane < b->rows && rows[lane] ? rows[lane] : (const char *)scratch;
    if (dtype == ELEMENT) {
        pack_query_terms(transposed, b, every, dim, ELEMENT, TERMS);
        pack_columns(columns, every, dim, ELEMENT);
    } else {
        pack_query_terms(transposed, b, every, dim, DTYPE_F32, TERMS);
        pack_columns(columns, every, dim, DTYPE_F32);
    }
    return finite_words(transposed, b->vectors * row_words(dim));
}

/* ---- Products ------------------------------------------------------------------------------- */

VEC_INLINE void score_tiles(float *to, const struct operand *rows, const float *columns, int32_t n,
                            int64_t dim, int vectors, bool scores) {
    const int64_t row = row_words(dim);
    product(to, (struct tiles){rows->words, row}, (struct tiles){columns, row},
            padded(dim, STEP) / STEP, padded(n, ROWS), vectors, TERMS, scores, false);
}

/* Scores, or what d_output makes of the values, which nothing cancels. */
VEC_FN static void score(float *to, const struct operand *rows, const float *columns,
                         const struct backward_tile *t, int64_t dim, const struct block *b) {
    score_tiles(to, rows, columns, t->n, dim, b->vectors, true);
}

/* The line of key j and of vectors v and v + 1 in tiles of 16 keys x 32 lanes. */
VEC_INLINE void store_lanes(float *to, int32_t j, int v, vec even, vec odd) {
    vec words[3];
    pair_terms(words, even, odd, TERMS);
#pragma clang loop unroll(full)
    for (int t = 0; t < TERMS; t++)
        vec_store(to + ((j / ROWS * LANE_STEPS + v / 2) * TERMS + t) * TILE + j % ROWS * PAIRS,
                  words[t]);
}

/* The line of keys j and j + PAIRS and of vector v in tiles of 32 keys x 16 lanes. */
VEC_INLINE void store_keys(float *to, int32_t j, int v, vec even, vec odd) {
    vec words[3];
    pair_terms(words, even, odd, TERMS);
#pragma clang loop unroll(full)
    for (int t = 0; t < TERMS; t++)
        vec_store(to + ((v * KEY_STEPS + j / STEP) * TERMS + t) * TILE + j % STEP * ROWS, words[t]);
}

/* From [key][lane]. Lanes out of use are 0: a hidden NaN of a value may have met them. */
VEC_INLINE void tiles_of_lanes(float *to, const float *from, int32_t n, const struct block *b) {
    for (int32_t j = 0; j < padded(n, ROWS); j++)
        for (int v = 0; v * VEC_LANES < b->rows; v += 2) {
            vec half[2];
            for (int h = 0; h < 2; h++)
                half[h] = _mm512_maskz_loadu_ps(
                    (__mmask16)(j < n ? lanes_in_use(b) >> (v + h) * VEC_LANES : 0),
                    from + j * LANES + (v + h) * VEC_LANES);
            store_lanes(to, j, v, half[0], half[1]);
        }
}

VEC_INLINE void tiles_of_keys(float *to, const float *from, int32_t n, int vectors) {
    for (int32_t first = 0; first < n; first += STEP)
        for (int32_t j = first; j < first + PAIRS; j++)
            for (int v = 0; v < vectors; v++) {
                const float *at = from + j * LANES + v * VEC_LANES;
                store_keys(to, j, v, j < n ? vec_load(at) : vec_set(0),
                           j + PAIRS < n ? vec_load(at + PAIRS * LANES) : vec_set(0));
            }
}

/* Panels of keys += tiles of 16 keys x 32 lanes times the rows of the lanes, dim long. */
VEC_INLINE void add_lanes(float *to, const struct backward_sums *sums, const float *weights,
                          const float *columns, const struct backward_block *b, int32_t n,
                          int64_t dim) {
    const int64_t row = LANE_STEPS * TERMS * TILE;
    for (; dim > 0; dim -= LANES, to += sums->stride, columns += VECTORS * row)
        product(to, (struct tiles){weights, row}, (struct tiles){columns, row},
                padded(b->rows.rows, STEP) / STEP, padded(n, ROWS),
                (int)(padded(at_most(dim, LANES), ROWS) / ROWS), TERMS, false, !sums->fresh);
}

/* d_query += keys times tiles of 32 keys x 16 lanes. */
VEC_INLINE void add_keys(struct backward_block *b, const struct backward_tile *t,
                         const float *d_weights) {
    const int64_t row = KEY_STEPS * TERMS * TILE;
    product(b->rows.output, (struct tiles){t->key.words + key_words(t->dim_qk), row},
            (struct tiles){d_weights, row}, padded(t->n, STEP) / STEP, padded(t->dim_qk, ROWS),
            b->rows.vectors, TERMS, false, !b->rows.fresh);
}

/* A whole tile whose P and dS go into products and nowhere else: they are packed as they are made. */
static bool is_whole(const struct backward_block *b, const struct backward_tile *t) {
    return is_plain(b, t) && t->n == TILE_K && b->rows.rows == LANES && !t->cap_slopes &&
           !t->d_logits;
}

VEC_FN static void add_products(struct backward_block *b, const struct backward_tile *t,
                                const struct backward_sums *sums, const uint64_t *seen,
                                const uint64_t *kept) {
    float *const weights = t->packed, *const of_lanes = weights + PACKED,
                 *const of_keys = of_lanes + PACKED;
    (void)seen, (void)kept;
    if (!is_whole(b, t)) {
        tiles_of_lanes(weights, t->weights, t->n, &b->rows);
        tiles_of_lanes(of_lanes, t->d_weights, t->n, &b->rows);
        tiles_of_keys(of_keys, t->d_weights, t->n, b->rows.vectors);
    }
    if (sums->d_value)
        add_lanes(sums->d_value, sums, weights, b->d_output_rows, b, t->n, t->dim_v);
    if (sums->d_key)
        add_lanes(sums->d_key, sums, of_lanes, b->query_rows, b, t->n, t->dim_qk);
    if (sums->d_query)
        add_keys(b, t, of_keys);
}

/* ---- Weights -------------------------------------------------------------------------------- */

/* Of keys j and j + PAIRS, vectors v and v + 1. */
VEC_INLINE int64_t at_pair(int32_t j, int v, int i) {
    return (j + i / 2 * PAIRS) * LANES + (v + i % 2) * VEC_LANES;
}

/* The same of a whole tile, into what add_products() takes: two keys and two vectors at a time. */
VEC_FN static void differentiate_whole(const struct backward_block *b,
                                       const struct backward_tile *t) {
    const vec scale = vec_set(t->scale);
    float *const weights = t->packed, *const of_lanes = weights + PACKED,
                 *const of_keys = of_lanes + PACKED;
    for (int32_t first = 0; first < TILE_K; first += STEP)
        for (int32_t j = first; j < first + PAIRS; j++)
#pragma clang loop unroll(full)
            for (int v = 0; v < VECTORS; v += 2) {
                vec w[4], d_logit[4];
#pragma clang loop unroll(full)
                for (int i = 0; i < 4; i++)
                    w[i] = vec_fma(vec_load(t->weights + at_pair(j, v, i)), scale,
                                   vec_load(b->rows.minus + (v + i % 2) * VEC_LANES));
                exp2_for_terms(w, 4, TERMS);
#pragma clang loop unroll(full)
                for (int i = 0; i < 4; i++)
                    d_logit[i] =
                        vec_mul(w[i], vec_sub(vec_load(t->d_weights + at_pair(j, v, i)),
                                              vec_load(b->delta + (v + i % 2) * VEC_LANES)));
                store_lanes(weights, j, v, w[0], w[1]);
                store_lanes(weights, j + PAIRS, v, w[2], w[3]);
                store_lanes(of_lanes, j, v, d_logit[0], d_logit[1]);
                store_lanes(of_lanes, j + PAIRS, v, d_logit[2], d_logit[3]);
                store_keys(of_keys, j, v, d_logit[0], d_logit[2]);
                store_keys(of_keys, j, v + 1, d_logit[1], d_logit[3]);
            }
}

VEC_FN static void differentiate(struct backward_block *b, const struct backward_tile *t,
                                 uint64_t *seen, uint64_t *kept) {
    (void)seen, (void)kept;
    if (is_whole(b, t))
        differentiate_whole(b, t);
    else if (is_plain(b, t))
        FOR_VECTORS(&b->rows, differentiate_of, b, t, true);
    else
        FOR_VECTORS(&b->rows, differentiate_of, b, t, false);
}
