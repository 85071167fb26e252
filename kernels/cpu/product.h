/*
 * The product of both passes of attention, broadcast scalars times vectors. Included where LANES, VECTORS, PAIRS and the
 * vectors of `scalar` are known.
 */

/* Rows of sums that are kept in registers; a single vector of each needs more of them to hide the latency of its sums. */
enum { ROW_TILE = 6, MOST_ROWS = 2 * ROW_TILE };
#define ROWS(vectors) ((vectors) == 1 ? MOST_ROWS : ROW_TILE)

/* acc + word * x: the word of an operand, broadcast, which need not be aligned. */
VEC_INLINE vec dot(vec acc, const void *word, vec x) {
    scalar w;
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
VEC_INLINE void product_tile(scalar *c, const scalar *a, int64_t row_stride, int64_t step_stride,
                             const scalar *b, int64_t steps, int rows, int vectors, bool add) {
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

VEC_INLINE void product_rows(scalar *c, const scalar *a, int64_t row_stride, int64_t step_stride,
                             const scalar *b, int64_t steps, int rows, int vectors, bool add) {
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
 * latency of its sums. With each go some rows of what is next. */
VEC_INLINE void product(scalar *c, const scalar *a, int64_t row_stride, int64_t step_stride,
                        const scalar *b, int64_t steps, int64_t rows, int vectors, bool add,
                        struct fetch *next) {
    const int most_rows = ROWS(vectors);
    while (rows > 0) {
        fetch_rows(next, next->pace);
        const int n = rows >= 2 * most_rows ? most_rows
                      : rows > most_rows    ? (int)(rows + 1) / 2
                                            : (int)rows;
        product_rows(c, a, row_stride, step_stride, b, steps, n, vectors, add);
        c += n * LANES;
        a += n * row_stride;
        rows -= n;
    }
}
