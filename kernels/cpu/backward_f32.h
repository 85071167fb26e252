/*
 * The operands and products of the cpu_bwd rows whose arithmetic is f32: all five products are that of product.h. Query and
 * d_output are packed [d][lane] and in panels of LANES columns, [panel][lane][column].
 */
#include "kernels/cpu/backward.h"
#include "kernels/cpu/product.h"
#include "kernels/ref/ref.h"

#define STAND_IN(function) cpu_bwd_ref_##function
enum { STEP_D = 16, TERMS = 1, FINITE_ONLY = false };

static void enter(void) {}
static void leave(void) {}

/* ---- Operands ------------------------------------------------------------------------------- */

/* n is a multiple of a vector, or padded to one. */
VEC_FN static bool finite_floats(const float *x, int64_t n) {
    vec zeros = vec_set(0); /* 0 * x is NaN for NaN and infinity */
    for (int64_t d = 0; d < n; d += VEC_LANES)
        zeros = vec_fma(vec_load_f32(x + d, at_most(n - d, VEC_LANES)), vec_set(0), zeros);
    return !vec_mask_bits(vec_is_nan(zeros));
}

VEC_FN static bool finite_rows(const struct operand *rows, int32_t n, int64_t dim) {
    bool finite = true;
    for (int32_t r = 0; r < n; r++)
        finite &= finite_floats(rows->words + r * rows->stride, dim);
    return finite;
}

VEC_FN static bool pack(const struct block *b, float *transposed, float *panels,
                        const char *const *rows, int64_t dim, enum dtype dtype, float *scratch) {
    const int64_t stride = padded(dim, 16), lanes = b->vectors * VEC_LANES;
    memset(scratch, 0, (size_t)(lanes * stride * 4));
    for (int32_t r = 0; r < b->rows; r++)
        if (rows[r])
            widen(scratch + r * stride, rows[r], dim, dtype);
    transpose_in(transposed, scratch, stride, stride, lanes);
    for (int64_t first = 0; first < dim; first += LANES, panels += LANES * LANES)
        for (int32_t r = 0; r < b->rows; r++) {
            const int64_t n = at_most(stride - first, LANES);
            memcpy(panels + r * LANES, scratch + r * stride + first, (size_t)(n * 4));
            memset(panels + r * LANES + n, 0, (size_t)((LANES - n) * 4));
        }
    return finite_floats(scratch, b->rows * stride);
}

static struct operand load_key(float *to, const struct rows *rows, int32_t n, int64_t dim,
                               enum dtype dtype) {
    return load_floats(to, rows, n, dim, dtype);
}

static struct operand load_value(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                 enum dtype dtype) {
    return load_floats(to, rows, n, dim, dtype);
}

/* ---- Scores --------------------------------------------------------------------------------- */

static const struct fetch no_fetch;

/* to[key][lane] = sum over d of rows[key][d] * columns[d][lane], all lanes of b. */
VEC_INLINE void score_of(float *to, const struct operand *rows, const float *columns,
                         const struct backward_tile *t, int64_t dim, int vectors) {
    struct fetch none = no_fetch;
    product(to, rows->words, rows->stride, 1, columns, dim, t->n, vectors, false, &none);
}

VEC_FN static void score(float *to, const struct operand *rows, const float *columns,
                         const struct backward_tile *t, int64_t dim, const struct block *b) {
    FOR_VECTORS(b, score_of, to, rows, columns, t, dim);
}

/* ---- Sums ----------------------------------------------------------------------------------- */

/* What is used next: the tile before, as far as it is kept beside this one. Addresses that are none do no harm. */
static struct fetch tile_before(const float *sums, const float *weights) {
    enum { TILE = TILE_K * LANES, ROW = TILE / 8 };
    return (struct fetch){.keys = {.data = (const char *)sums, .stride = ROW * 4},
                          .values = {.data = (const char *)(weights - TILE), .stride = ROW * 4},
                          .key_bytes = ROW * 4,
                          .value_bytes = ROW * 4,
                          .end = TILE / ROW};
}

/* Panels of keys += weights[key][lane] * rows[lane][column] */
VEC_FN static void add_rows(float *to, const struct backward_sums *sums, const float *weights,
                            const float *rows, const struct backward_block *b, int32_t n,
                            int64_t dim) {
    for (; dim > 0; dim -= LANES, to += sums->stride, rows += LANES * LANES) {
        struct fetch next = tile_before(to - sums->tile, weights);
        if (dim <= VEC_LANES)
            product(to, weights, LANES, 1, rows, b->rows.rows, n, 1, true, &next);
        else if (dim <= 2 * VEC_LANES && VECTORS > 2)
            product(to, weights, LANES, 1, rows, b->rows.rows, n, 2, true, &next);
        else
            product(to, weights, LANES, 1, rows, b->rows.rows, n, VECTORS, true, &next);
    }
}

/* The same where rows are not finite: only lanes of the mask count, for 0 * NaN is NaN. */
VEC_FN static void add_seen_rows(float *to, int64_t stride, const float *weights, const float *rows,
                                 const uint64_t *lanes, int32_t n, int64_t dim) {
    for (; dim > 0; dim -= LANES, to += stride, rows += LANES * LANES)
        for (int32_t j = 0; j < n; j++)
            for (uint64_t left = lanes[j]; left; left &= left - 1) {
                const int lane = __builtin_ctzll(left);
                const vec weight = vec_set(weights[j * LANES + lane]);
                for (int v = 0; v < VECTORS; v++) {
                    float *at = to + j * LANES + v * VEC_LANES;
                    vec_store(at, vec_fma(weight, vec_load(rows + lane * LANES + v * VEC_LANES),
                                          vec_load(at)));
                }
            }
}

VEC_INLINE void add_keys_of(struct backward_block *b, const struct backward_tile *t, int vectors) {
    struct fetch none = no_fetch;
    product(b->rows.output, t->key.words, 1, t->key.stride, t->d_weights, t->n, t->dim_qk, vectors,
            !b->rows.fresh, &none);
}

VEC_FN static void add_keys(struct backward_block *b, const struct backward_tile *t) {
    FOR_VECTORS(&b->rows, add_keys_of, b, t);
}

/* The same where keys are not finite. */
VEC_FN static void add_seen_keys(struct backward_block *b, const struct backward_tile *t,
                                 const uint64_t *seen) {
    if (b->rows.fresh)
        memset(b->rows.output, 0, (size_t)(t->dim_qk * LANES * 4));
    for (int32_t j = 0; j < t->n; j++)
        for (uint64_t left = seen[j]; left; left &= left - 1) {
            const int lane = __builtin_ctzll(left);
            const float d_logit = t->d_weights[j * LANES + lane];
            for (int64_t d = 0; d < t->dim_qk; d++)
                b->rows.output[d * LANES + lane] += d_logit * t->key.words[j * t->key.stride + d];
        }
}

/* Adds what a tile has to the gradients. */
static void add_products(struct backward_block *b, const struct backward_tile *t,
                         const struct backward_sums *sums, const uint64_t *seen,
                         const uint64_t *kept) {
    if (sums->d_value && b->finite)
        add_rows(sums->d_value, sums, t->weights, b->d_output_rows, b, t->n, t->dim_v);
    else if (sums->d_value)
        add_seen_rows(sums->d_value, sums->stride, t->weights, b->d_output_rows, kept, t->n,
                      t->dim_v);
    if (sums->d_key && b->finite)
        add_rows(sums->d_key, sums, t->d_weights, b->query_rows, b, t->n, t->dim_qk);
    else if (sums->d_key)
        add_seen_rows(sums->d_key, sums->stride, t->d_weights, b->query_rows, seen, t->n,
                      t->dim_qk);
    if (sums->d_query && t->finite)
        add_keys(b, t);
    else if (sums->d_query)
        add_seen_keys(b, t, seen);
}

