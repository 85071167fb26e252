/*
 * The cpu_bwd row by vdpbf16ps. All five products are that of product.h, whose operands are words of two bf16 that follow each
 * other along the summed axis:
 *
 *     weights, d_weights   keys, values [key][d / 2]     query, d_output [d / 2][lane]
 *     d_query              keys [key / 2][d]             d_weights [key / 2][lane]
 *     d_value, d_key       weights, d_weights            d_output, query in panels of LANES columns,
 *                          [key][lane / 2]               [panel][lane / 2][column]
 */
#include "kernels/cpu/product.h"
#include "kernels/cpu/x86_64/vec_terms.h"

#define EXP2_EACH(x, count) exp2_rough_each(x, count)
#include "kernels/cpu/x86_64/backward_one_walk.h"

enum {
    STEP_D = 2 * VEC_LANES,
    TERMS = 1,
    PACKED = TILE_K * LANES / 2,
    PACKED_BYTES = 3 * PACKED * 4
};

static void enter(void) {}
static void leave(void) {}

/* Words of a row. */
static int64_t row_words(int64_t dim) { return padded(dim, STEP_D) / 2; }

/* ---- Operands ------------------------------------------------------------------------------- */

/* Words of 32 elements from element d of a row on, 0 past its end. */
VEC_INLINE vec load_words(const char *row, int64_t d, int64_t dim, enum dtype dtype) {
    if (dtype == DTYPE_BF16)
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(
            (__mmask32)((UINT64_C(1) << at_most(dim - d, STEP_D)) - 1), row + d * 2));
    vec half[2], words[1];
    for (int h = 0; h < 2; h++, d += VEC_LANES)
        half[h] = d < dim
                      ? load_some(row + d * dtype_bytes(dtype), dtype, at_most(dim - d, VEC_LANES))
                      : vec_set(0);
    row_terms(words, half[0], half[1], 1);
    return words[0];
}

/* Words (even[d], odd[d]) of up to VEC_LANES elements of two rows, from element d on. */
VEC_INLINE vec load_two(const char *even, const char *odd, int64_t d, int64_t dim,
                        enum dtype dtype) {
    const int64_t n = at_most(dim - d, VEC_LANES), at = d * dtype_bytes(dtype);
    if (dtype == DTYPE_BF16)
        return pair_words((const uint16_t *)(const void *)(even + at),
                          (const uint16_t *)(const void *)(odd + at), n);
    return pack_pairs(load_some(even + at, dtype, n), load_some(odd + at, dtype, n));
}

VEC_FN static void copy_rows(float *to, const struct rows *rows, int64_t first, int32_t n,
                             int64_t dim) {
    const int64_t stride = row_words(dim);
    for (int32_t j = 0; j < n; j++)
        for (int64_t d = 0; d < dim; d += STEP_D)
            vec_store(to + j * stride + d / 2,
                      load_words(row_at(rows, first + j), d, dim, DTYPE_BF16));
}

/* Of a tile of keys words along d, then words of two keys. */
VEC_FN static struct operand load_key(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                      enum dtype dtype) {
    const int64_t stride = 2 * row_words(dim);
    (void)dtype;
    for (int32_t first = 0; first < n; first += TILE_K) {
        float *const tile = to + first * stride, *const pairs = tile + TILE_K * row_words(dim);
        const int32_t keys = (int32_t)at_most(n - first, TILE_K);
        copy_rows(tile, rows, first, keys, dim);
        for (int32_t j = 0; j < keys; j += 2)
            for (int64_t d = 0; d < dim; d += VEC_LANES)
                vec_store(pairs + j / 2 * stride + d,
                          pair_words((const uint16_t *)row_at(rows, first + j) + d,
                                     j + 1 < keys
                                         ? (const uint16_t *)row_at(rows, first + j + 1) + d
                                         : NULL,
                                     at_most(dim - d, VEC_LANES)));
    }
    return (struct operand){to, stride};
}

VEC_FN static struct operand load_value(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                        enum dtype dtype) {
    (void)dtype;
    copy_rows(to, rows, 0, n, dim);
    return (struct operand){to, row_words(dim)};
}

static bool finite_rows(const struct operand *rows, int32_t n, int64_t dim) {
    return finite_words(rows->words, n * row_words(dim));
}

VEC_INLINE bool pack_as(const struct block *b, float *transposed, float *panels,
                        const char *const *rows, int64_t dim, enum dtype dtype, float *scratch) {
    const int64_t stride = row_words(dim), lanes = b->vectors * VEC_LANES;
    for (int64_t r = 0; r < lanes; r++)
        for (int64_t d = 0; d < dim; d += STEP_D)
            vec_store(scratch + r * stride + d / 2, load_words(rows[r], d, dim, dtype));
    transpose_in(transposed, scratch, stride, stride, lanes);
    for (int64_t first = 0; first < dim; first += LANES, panels += LANES / 2 * LANES)
        for (int64_t r = 0; r < lanes; r += 2)
            for (int64_t d = 0; d < LANES; d += VEC_LANES)
                vec_store(panels + r / 2 * LANES + d,
                          first + d < dim ? load_two(rows[r], rows[r + 1], first + d, dim, dtype)
                                          : vec_set(0));
    return finite_words(scratch, lanes * stride);
}

VEC_FN static bool pack(const struct block *b, float *transposed, float *panels,
                        const char *const *rows, int64_t dim, enum dtype dtype, float *scratch) {
    const char *every[MAX_LANES];
    char *const zeros = (char *)(scratch + LANES * row_words(dim));
    memset(zeros, 0, (size_t)(dim * 4));
    for (int32_t lane = 0; lane < LANES; lane++)
        every[lane] = lane < b->rows && rows[lane] ? rows[lane] : zeros;
    return dtype == DTYPE_BF16 ? pack_as(b, transposed, panels, every, dim, DTYPE_BF16, scratch)
                               : pack_as(b, transposed, panels, every, dim, DTYPE_F32, scratch);
}

/* ---- Products ------------------------------------------------------------------------------- */

VEC_INLINE void score_of(float *to, const struct operand *rows, const float *columns,
                         const struct backward_tile *t, int64_t dim, int vectors) {
    product(to, rows->words, row_words(dim), 1, columns, (dim + 1) / 2, t->n, vectors, false,
            t->next);
}

/* to[key][lane] = sum over d of rows[key][d] * columns[d][lane], all lanes of b. */
VEC_FN static void score(float *to, const struct operand *rows, const float *columns,
                         const struct backward_tile *t, int64_t dim, const struct block *b) {
    FOR_VECTORS(b, score_of, to, rows, columns, t, dim);
}

/* Words of two lanes, from [key][lane]. Lanes out of use are 0: a hidden NaN of a value may have met them. */
VEC_FN static void words_of_lanes(float *to, const float *from, int32_t n, const struct block *b) {
    for (int32_t j = 0; j < n; j++)
        for (int v = 0; v * VEC_LANES < b->rows; v += 2) {
            vec half[2], words[1];
            for (int h = 0; h < 2; h++)
                half[h] = _mm512_maskz_loadu_ps((__mmask16)(lanes_in_use(b) >> (v + h) * VEC_LANES),
                                                from + j * LANES + (v + h) * VEC_LANES);
            row_terms(words, half[0], half[1], 1);
            vec_store(to + j * (LANES / 2) + v / 2 * VEC_LANES, words[0]);
        }
}

/* Words of two keys. */
VEC_FN static void words_of_keys(float *to, const float *from, int32_t n, int vectors) {
    for (int32_t j = 0; j < n; j += 2)
        for (int v = 0; v < vectors; v++) {
            const float *at = from + j * LANES + v * VEC_LANES;
            vec_store(to + j / 2 * LANES + v * VEC_LANES,
                      pack_pairs(vec_load(at), j + 1 < n ? vec_load(at + LANES) : vec_set(0)));
        }
}

/* Panels of keys += weights times the rows of the lanes, dim long. */
VEC_FN static void add_lanes(float *to, const struct backward_sums *sums, const float *weights,
                             const float *rows, const struct backward_block *b, int32_t n,
                             int64_t dim) {
    struct fetch none = {.end = 0};
    const int64_t steps = (b->rows.rows + 1) / 2;
    for (; dim > 0; dim -= LANES, to += sums->stride, rows += LANES / 2 * LANES) {
        if (dim <= VEC_LANES)
            product(to, weights, LANES / 2, 1, rows, steps, n, 1, !sums->fresh, &none);
        else if (dim <= 2 * VEC_LANES)
            product(to, weights, LANES / 2, 1, rows, steps, n, 2, !sums->fresh, &none);
        else
            product(to, weights, LANES / 2, 1, rows, steps, n, VECTORS, !sums->fresh, &none);
    }
}

VEC_INLINE void add_keys_of(struct backward_block *b, const struct backward_tile *t,
                            const float *d_weights, int vectors) {
    const int64_t stride = 2 * row_words(t->dim_qk);
    product(b->rows.output, t->key.words + TILE_K * row_words(t->dim_qk), 1, stride, d_weights,
            (t->n + 1) / 2, t->dim_qk, vectors, !b->rows.fresh, t->next);
}

VEC_FN static void add_products(struct backward_block *b, const struct backward_tile *t,
                                const struct backward_sums *sums, const uint64_t *seen,
                                const uint64_t *kept) {
    float *const weights = t->packed, *const of_lanes = weights + PACKED,
                 *const of_keys = of_lanes + PACKED;
    (void)seen, (void)kept;
    if (sums->d_value) {
        words_of_lanes(weights, t->weights, t->n, &b->rows);
        add_lanes(sums->d_value, sums, weights, b->d_output_rows, b, t->n, t->dim_v);
    }
    if (sums->d_key) {
        words_of_lanes(of_lanes, t->d_weights, t->n, &b->rows);
        add_lanes(sums->d_key, sums, of_lanes, b->query_rows, b, t->n, t->dim_qk);
    }
    if (sums->d_query) {
        words_of_keys(of_keys, t->d_weights, t->n, b->rows.vectors);
        FOR_VECTORS(&b->rows, add_keys_of, b, t, of_keys);
    }
}

VEC_FN static void differentiate(struct backward_block *b, const struct backward_tile *t,
                                 uint64_t *seen, uint64_t *kept) {
    (void)seen, (void)kept;
    if (is_plain(b, t))
        FOR_VECTORS(&b->rows, differentiate_of, b, t, true);
    else
        FOR_VECTORS(&b->rows, differentiate_of, b, t, false);
}
