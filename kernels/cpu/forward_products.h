/* attend() by products of a broadcast scalar and vectors. */

/* Rows of sums that are kept in registers; a single vector of each needs more of them to hide the latency of its sums. */
enum { ROW_TILE = 6, MOST_ROWS = 2 * ROW_TILE };
#define ROWS(vectors) ((vectors) == 1 ? MOST_ROWS : ROW_TILE)

enum { KEYS = PAIRS || VECTORS < 4 ? 2 : 1 }; /* of softmax at a time */

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
    vec acc[MOST_ROWS][VECTORS];
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
    __asm__("" : "+r"(c)); /* or each of its offsets gets a register, and those are spilled */
    if (add)
#pragma clang loop unroll(full)
        for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++)
                acc[r][v] = vec_add(acc[r][v], vec_load(c + r * LANES + v * VEC_LANES));
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
        if (n <= ROWS(vectors))                                                                    \
            product_tile(c, a, row_stride, step_stride, b, steps, n, vectors, add);                \
        break
    switch (rows) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
        CASE(9);
        CASE(10);
        CASE(11);
        CASE(12);
    }
#undef CASE
}

/* All rows: whole tiles, and what is left after the last but one shared by two, so that none is too small to hide the
 * latency of its sums. With each goes a row of the next keys and values. */
VEC_INLINE void product(float *c, const float *a, int64_t row_stride, int64_t step_stride,
                        const float *b, int64_t steps, int64_t rows, int vectors, bool add,
                        struct fetch *next) {
    const int most_rows = ROWS(vectors);
    while (rows > 0) {
        fetch_rows(next, 1);
        const int n = rows >= 2 * most_rows ? most_rows
                      : rows > most_rows    ? (int)(rows + 1) / 2
                                            : (int)rows;
        product_rows(c, a, row_stride, step_stride, b, steps, n, vectors, add);
        c += n * LANES;
        a += n * row_stride;
        rows -= n;
    }
}

VEC_INLINE void scores_of(float *s, const struct block *b, const struct key_tile *t, int vectors) {
    const int64_t words = PAIRS ? (t->dim_qk + 1) / 2 : t->dim_qk;
    product(s, t->key.words, t->key.stride, 1, b->query, words, t->n, vectors, false, t->next);
}

VEC_FN static void scores(float *s, const struct block *b, const struct key_tile *t) {
    if (b->vectors == 1)
        scores_of(s, b, t, 1);
    else if (b->vectors == 2 && VECTORS > 2)
        scores_of(s, b, t, 2);
    else
        scores_of(s, b, t, VECTORS);
}

VEC_INLINE void accumulate_of(const struct block *b, const struct key_tile *t, const float *weights,
                              bool add, int vectors) {
    const int64_t steps = PAIRS ? (t->n + 1) / 2 : t->n;
    product(b->output, t->value.words, 1, t->value.stride, weights, steps, t->dim_v, vectors, add,
            t->next);
}

VEC_FN static void accumulate(const struct block *b, const struct key_tile *t, const float *weights,
                              bool add) {
    if (b->vectors == 1)
        accumulate_of(b, t, weights, add, 1);
    else if (b->vectors == 2 && VECTORS > 2)
        accumulate_of(b, t, weights, add, 2);
    else
        accumulate_of(b, t, weights, add, VECTORS);
}

/* ---- Softmax ---------------------------------------------------------------------------------------------------- */

/* Scores of `keys` keys, at most KEYS, -> weights; with PAIRS they become one row of words. */
VEC_INLINE void weigh(float *to, const float *s, int keys, vec scale, const vec *minus, vec *sum,
                      int vectors) {
    vec w[KEYS * VECTORS];
#pragma clang loop unroll(full)
    for (int i = 0; i < keys * vectors; i++)
        w[i] = vec_fma(vec_load(s + i / vectors * LANES + i % vectors * VEC_LANES), scale,
                       minus[i % vectors]);
    if (PAIRS)
        exp2_short_each(w, keys * vectors);
    else
        exp2_each(w, keys * vectors);
#pragma clang loop unroll(full)
    for (int i = 0; i < keys * vectors; i++)
        sum[i % vectors] = vec_add(sum[i % vectors], w[i]);
#if PAIRS
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        vec_store(to + v * VEC_LANES, pack_pairs(w[v], keys > 1 ? w[vectors + v] : vec_set(0)));
#else
#pragma clang loop unroll(full)
    for (int i = 0; i < keys * vectors; i++)
        vec_store(to + i / vectors * LANES + i % vectors * VEC_LANES, w[i]);
#endif
}

/* Scores -> weights relative to the maxima. Those of the tile are looked up only where a lane has none yet, or where
 * `raise` says so: the sum of the weights tells whether that would have been needed. Then this returns false, and no
 * weights. */
VEC_INLINE bool softmax_of(float *s, struct block *b, const struct key_tile *t, bool raise,
                           int vectors) {
    const vec scale = vec_set(t->scale);
    const int32_t n = t->n;
    vec minus[VECTORS], sum[VECTORS];
    uint32_t unseen = 0, huge = 0;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        unseen |= vec_mask_bits(vec_equal(vec_load(b->max + v * VEC_LANES), vec_set(-INFINITY)));
    if (unseen || raise) {
        vec tile_max[VECTORS];
        column_max(tile_max, s, n, vectors);
        if (max_grows(b, tile_max, scale, vectors))
            raise_max(b, tile_max, scale, t->dim_v, vectors);
    }
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        minus[v] = minus_max(b, v);
        sum[v] = vec_set(0);
    }
    int32_t j = 0;
    for (; j + KEYS <= n; j += KEYS)
        weigh(s + j / (PAIRS + 1) * LANES, s + j * LANES, KEYS, scale, minus, sum, vectors);
    if (j < n)
        weigh(s + j / (PAIRS + 1) * LANES, s + j * LANES, 1, scale, minus, sum, vectors);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        huge |= vec_mask_bits(vec_greater(sum[v], vec_set(HUGE_SUM)));
    if (huge && !raise && !unseen)
        return false;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        vec_store(b->sum + v * VEC_LANES, vec_add(vec_load(b->sum + v * VEC_LANES), sum[v]));
    return true;
}

VEC_FN static bool softmax(float *s, struct block *b, const struct key_tile *t, bool raise) {
    if (b->vectors == 1)
        return softmax_of(s, b, t, raise, 1);
    if (b->vectors == 2 && VECTORS > 2)
        return softmax_of(s, b, t, raise, 2);
    return softmax_of(s, b, t, raise, VECTORS);
}

static void make_scores(float *s, const struct block *b, const struct key_tile *t) {
    scores(s, b, t);
    if (t->rule)
        apply_rule(s, t->rule, b, t->first_key, t->n);
    if (bounded(b, t->first_key, t->n))
        apply_bounds(s, b, t->first_key, t->n);
}

static void attend(struct block *b, const struct key_tile *t, float *s) {
    make_scores(s, b, t);
    if (!softmax(s, b, t, false)) {
        make_scores(s, b, t);
        softmax(s, b, t, true);
    }
    accumulate(b, t, s, !b->fresh);
    b->fresh = false;
}

static void enter(void) {}
static void leave(void) {}
