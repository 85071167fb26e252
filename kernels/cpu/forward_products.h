/* attend() by products of a broadcast scalar and vectors. */

enum { ROW_TILE = 6 };

/* acc + word * x: the word of an operand, broadcast, which need not be aligned. */
VEC_INLINE vec dot(vec acc, const void *word, vec x) {
    float w;
    memcpy(&w, word, sizeof w);
#if PAIRS
    return dot_pairs(acc, vec_set(w), x);
#else
    return vec_fma(vec_set(w), x, acc);
#endif
}

/* c[row][lane] (+)= sum over steps of a[row * row_stride + step * step_stride] * b[step][lane].
 * With `rows` and `vectors` constant the sums stay in rows * vectors registers. They start from 0 and c is added at the
 * end: sums that start from loads wait for the stores of the tile before. Four steps at a time, because a core whose
 * other thread is busy decodes only three operations a clock, and addresses and the loop's end are operations too. */
VEC_INLINE void product_tile(float *c, const float *a, int64_t row_stride, int64_t step_stride,
                             const float *b, int64_t steps, int rows, int vectors, bool add) {
    vec acc[ROW_TILE][VECTORS];
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            acc[r][v] = vec_set(0);
#pragma clang loop unroll_count(4)
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
        for (int v = 0; v < vectors; v++) {
            float *to = c + r * LANES + v * VEC_LANES;
            vec_store(to, add ? vec_add(acc[r][v], vec_load(to)) : acc[r][v]);
        }
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

VEC_INLINE void softmax_of(float *s, struct block *b, vec scale, int32_t n, int64_t dim_v,
                           int vectors) {
    vec tile_max[VECTORS], minus[VECTORS], sum[VECTORS];
    column_max(tile_max, s, n, vectors);
    if (max_grows(b, tile_max, scale, vectors))
        raise_max(b, tile_max, scale, dim_v, vectors);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        minus[v] = minus_max(b, v);
        sum[v] = vec_set(0);
    }
#if PAIRS
    for (int32_t j = 0; j < n; j += 2)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            const float *at = s + j * LANES + v * VEC_LANES;
            vec even = vec_set(0), odd = even;
            if (j < n)
                even = exp2_short(vec_fma(vec_load(at), scale, minus[v]));
            if (j + 1 < n)
                odd = exp2_short(vec_fma(vec_load(at + LANES), scale, minus[v]));
            sum[v] = vec_add(sum[v], vec_add(even, odd));
            vec_store(s + j / 2 * LANES + v * VEC_LANES, pack_pairs(even, odd));
        }
#else
    for (int32_t j = 0; j < n; j++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            float *at = s + j * LANES + v * VEC_LANES;
            const vec weight = exp2_of(vec_fma(vec_load(at), scale, minus[v]));
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

static void attend(struct block *b, const struct key_tile *t, float *s) {
    scores(s, &t->key, b, t->n, t->dim_qk);
    if (t->rule)
        apply_rule(s, t->rule, b, t->first_key, t->n);
    if (bounded(b, t->first_key, t->n))
        apply_bounds(s, b, t->first_key, t->n);
    softmax(s, b, t->scale, t->n, t->dim_v);
    accumulate(b, &t->value, s, t->n, t->dim_v);
}

static void enter(void) {}
static void leave(void) {}
