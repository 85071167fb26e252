/*
 * The cpu_bwd rows whose arithmetic is f32. All five products are that of product.h; query and d_output are packed [d][lane] and
 * in panels of LANES columns, [panel][lane][column]. Weights are made in two walks over the keys, so that neither lse nor output
 * is trusted, which are rounded.
 */
#include "kernels/cpu/product.h"
#include "kernels/ref/ref.h"

#define STAND_IN(function) cpu_bwd_ref_##function
enum { STEP_D = 16, TERMS = 1, FINITE_ONLY = false, ONE_WALK = false, PACKED_BYTES = 0 };

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

/* One row after the other into the panels, and what these hold into columns while it is in the nearest cache. */
VEC_INLINE bool pack_as(const struct block *b, float *transposed, float *panels,
                        const char *const *rows, int64_t dim, enum dtype dtype, int64_t bytes) {
    const int64_t lanes = b->vectors * VEC_LANES;
    vec zeros = vec_set(0); /* 0 * x is NaN for NaN and infinity */
    for (int64_t first = 0; first < dim; first += LANES) {
        const int64_t columns = at_most(dim - first, LANES);
        for (int64_t r = 0; r < lanes; r++)
            for (int64_t d = 0; d < LANES; d += VEC_LANES) {
                vec x = vec_set(0);
                if (r < b->rows && rows[r] && d < columns)
                    x = load_some(rows[r] + (first + d) * bytes, dtype,
                                  at_most(columns - d, VEC_LANES));
                zeros = vec_fma(x, vec_set(0), zeros);
                vec_store(panels + r * LANES + d, x);
            }
        transpose_in(transposed, panels, LANES, columns, lanes);
        panels += LANES * LANES;
        transposed += LANES * LANES;
    }
    return !vec_mask_bits(vec_is_nan(zeros));
}

VEC_FN static bool pack(const struct block *b, float *transposed, float *panels,
                        const char *const *rows, int64_t dim, enum dtype dtype, float *scratch) {
    (void)scratch;
    return dtype == DTYPE_F32   ? pack_as(b, transposed, panels, rows, dim, DTYPE_F32, 4)
           : dtype == DTYPE_F16 ? pack_as(b, transposed, panels, rows, dim, DTYPE_F16, 2)
                                : pack_as(b, transposed, panels, rows, dim, DTYPE_BF16, 2);
}

/* Rows that lie apart are copied as others are widened: each is read once for every block of queries, and with the rows of many
 * heads between them they share few places of the first-level cache. */
VEC_FN static struct operand load_key(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                      enum dtype dtype) {
    if (dtype == DTYPE_F32 && rows->stride == dim * 4)
        return (struct operand){(const float *)(const void *)rows->data, dim};
    return widen_rows(to, rows, n, dim, dtype);
}

static struct operand load_value(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                 enum dtype dtype) {
    return load_key(to, rows, n, dim, dtype);
}

/* ---- Scores --------------------------------------------------------------------------------- */

/* to[key][lane] = sum over d of rows[key][d] * columns[d][lane], all lanes of b. */
VEC_INLINE void score_of(float *to, const struct operand *rows, const float *columns,
                         const struct backward_tile *t, int64_t dim, int vectors) {
    product(to, rows->words, rows->stride, 1, columns, dim, t->n, vectors, false, t->next);
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
                          .end = TILE / ROW,
                          .pace = 1};
}

/* Panels of keys += weights[key][lane] * rows[lane][column] */
VEC_FN static void add_rows(float *to, const struct backward_sums *sums, const float *weights,
                            const float *rows, const struct backward_block *b, int32_t n,
                            int64_t dim) {
    for (; dim > 0; dim -= LANES, to += sums->stride, rows += LANES * LANES) {
        struct fetch next = tile_before(to - sums->tile, weights);
        if (dim <= VEC_LANES)
            product(to, weights, LANES, 1, rows, b->rows.rows, n, 1, !sums->fresh, &next);
        else if (dim <= 2 * VEC_LANES && VECTORS > 2)
            product(to, weights, LANES, 1, rows, b->rows.rows, n, 2, !sums->fresh, &next);
        else
            product(to, weights, LANES, 1, rows, b->rows.rows, n, VECTORS, !sums->fresh, &next);
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
    product(b->rows.output, t->key.words, 1, t->key.stride, t->d_weights, t->n, t->dim_qk, vectors,
            !b->rows.fresh, t->next);
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
            for (int64_t d = 0; d < t->dim_qk; d++) {
                float key; /* at any address */
                memcpy(&key, t->key.words + j * t->key.stride + d, sizeof key);
                b->rows.output[d * LANES + lane] += d_logit * key;
            }
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

/* ---- Weights -------------------------------------------------------------------------------- */

/* Brings the maxima up to those of the tile; sum and delta follow. */
VEC_INLINE void raise_rows(struct backward_block *b, const struct backward_tile *t, int vectors) {
    vec tile_max[VECTORS];
    column_max(tile_max, t->weights, t->n, vectors);
    b->rows.unseen = b->rows.vast = false;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        float *sum = b->rows.sum + v * VEC_LANES, *delta = b->delta + v * VEC_LANES;
        const vec factor = raise_lanes(&b->rows, v, tile_max[v], vec_set(t->scale));
        vec_store(sum, vec_mul(vec_load(sum), factor));
        vec_store(delta, vec_mul(vec_load(delta), factor));
        vec_store(t->max + v * VEC_LANES, vec_load(b->rows.max + v * VEC_LANES));
    }
}

/* What a hidden or dropped key makes of a weight and its gradient: the weight of a hidden one is HIDDEN, of a dropped one
 * negative, and neither has a gradient. */
VEC_INLINE void mark(vec *marked, vec *d_weight, vec weight, vec_mask hidden, const float *kept) {
    const vec zero = vec_set(0);
    *marked = weight;
    if (kept) {
        const vec keep = vec_load(kept);
        const vec_mask dropped = vec_equal(keep, zero);
        *d_weight = vec_blend(vec_mul(*d_weight, keep), zero, dropped);
        *marked = vec_blend(vec_abs(weight), vec_sign_of(weight, vec_set(-0.0f)), dropped);
    }
    *d_weight = vec_blend(*d_weight, zero, hidden);
    *marked = vec_blend(*marked, vec_set(bits_float(HIDDEN_BITS)), hidden);
}

VEC_INLINE void softmax_of(struct backward_block *b, const struct backward_tile *t, bool plain,
                           int vectors) {
    const vec scale = vec_set(t->scale), none = vec_set(-INFINITY);
    vec minus[VECTORS], sum[VECTORS], delta[VECTORS];
    raise_rows(b, t, vectors);
    if (b->rows.vast)
        subtract_tops(t->weights, &b->rows, t->n, vectors);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        minus[v] = vec_load(b->rows.minus + v * VEC_LANES);
        sum[v] = vec_load(b->rows.sum + v * VEC_LANES);
        delta[v] = vec_load(b->delta + v * VEC_LANES);
    }
    for (int32_t j = 0; j < t->n; j++) {
        vec w[VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            w[v] = vec_fma(vec_load(t->weights + j * LANES + v * VEC_LANES), scale, minus[v]);
        exp2_each(w, vectors);
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            const int64_t at = j * LANES + v * VEC_LANES;
            vec d_weight = vec_load(t->d_weights + at), marked = w[v];
            if (!plain) {
                const vec_mask hidden = vec_equal(vec_load(t->weights + at), none);
                mark(&marked, &d_weight, w[v], hidden, t->drops ? t->keep + at : NULL);
                w[v] = vec_blend(w[v], vec_set(0), hidden);
                vec_store(t->d_weights + at, d_weight);
                if (t->cap_slopes) /* that of a hidden NaN is NaN */
                    vec_store(t->cap_slopes + at,
                              vec_blend(vec_load(t->cap_slopes + at), vec_set(0), hidden));
            }
            sum[v] = vec_add(sum[v], w[v]);
            delta[v] = vec_fma(w[v], d_weight, delta[v]);
            vec_store(t->weights + at, marked);
        }
    }
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        vec_store(b->rows.sum + v * VEC_LANES, sum[v]);
        vec_store(b->delta + v * VEC_LANES, delta[v]);
    }
}

VEC_FN static void softmax_plain(struct backward_block *b, const struct backward_tile *t) {
    FOR_VECTORS(&b->rows, softmax_of, b, t, true);
}

VEC_FN static void softmax_marked(struct backward_block *b, const struct backward_tile *t) {
    FOR_VECTORS(&b->rows, softmax_of, b, t, false);
}

/* Scores become weights; sum and delta of the rows follow. */
static void end_weights(struct backward_block *b, const struct backward_tile *t) {
    if (is_plain(b, t))
        softmax_plain(b, t);
    else
        softmax_marked(b, t);
}

/* ---- Gradients of logits -------------------------------------------------------------------- */

/* What makes P of the weights of a tile, whose maxima may have been others than the last. */
VEC_INLINE vec share_of(const struct backward_block *b, const struct backward_tile *t, int v) {
    const vec scale = vec_set(t->scale), before = vec_load(t->max + v * VEC_LANES);
    const float *max = b->rows.max + v * VEC_LANES;
    vec top, minus, new_top, new_minus;
    origin_of_each(&top, &minus, before, scale);
    origin_of_each(&new_top, &new_minus, vec_load(max), scale);
    return vec_mul(rescaling_of_each(before, top, minus, vec_load(max), new_top, new_minus, scale),
                   vec_load(b->inverse + v * VEC_LANES));
}

VEC_INLINE void differentiate_of(struct backward_block *b, const struct backward_tile *t,
                                 uint64_t *seen, uint64_t *kept, bool plain, int vectors) {
    const vec zero = vec_set(0);
    vec share[VECTORS], delta[VECTORS];
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        share[v] = share_of(b, t, v);
        delta[v] = vec_load(b->delta + v * VEC_LANES);
    }
    for (int32_t j = 0; j < t->n; j++) {
        if (!plain)
            seen[j] = kept[j] = 0;
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            const int64_t at = j * LANES + v * VEC_LANES;
            const vec marked = vec_load(t->weights + at);
            vec weight = vec_mul(plain ? marked : vec_abs(marked), share[v]),
                d_logit = vec_mul(weight, vec_sub(vec_load(t->d_weights + at), delta[v]));
            if (!plain) {
                const vec_mask hidden = vec_same_bits(marked, HIDDEN_BITS),
                               dropped = vec_greater(zero, vec_sign_of(vec_set(1), marked));
                const uint32_t every = (uint32_t)((UINT64_C(1) << VEC_LANES) - 1),
                               visible = ~vec_mask_bits(hidden) & every;
                seen[j] |= (uint64_t)visible << v * VEC_LANES;
                if (t->drops) {
                    weight = vec_blend(vec_mul(weight, vec_set(t->factor)), zero, dropped);
                    kept[j] |= (uint64_t)(visible & ~vec_mask_bits(dropped)) << v * VEC_LANES;
                }
                weight = vec_blend(weight, zero, hidden);
                d_logit = vec_blend(d_logit, zero, hidden);
            }
            vec_store(t->weights + at, weight);
            vec_store(t->d_weights + at, d_logit);
        }
        if (!plain) {
            seen[j] &= lanes_in_use(&b->rows);
            kept[j] = t->drops ? kept[j] & seen[j] : seen[j];
        }
    }
}

VEC_FN static void differentiate_plain(struct backward_block *b, const struct backward_tile *t) {
    FOR_VECTORS(&b->rows, differentiate_of, b, t, NULL, NULL, true);
}

VEC_FN static void differentiate(struct backward_block *b, const struct backward_tile *t,
                                 uint64_t *seen, uint64_t *kept) {
    if (is_plain(b, t))
        differentiate_plain(b, t);
    else
        FOR_VECTORS(&b->rows, differentiate_of, b, t, seen, kept, false);
}
