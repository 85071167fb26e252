/*
 * The body of a cpu_decode row, over the vectors of vec_*.h. A row's file defines
 *     VALUE_PAIRS   pairs of vectors of d_v whose sums are kept in registers for one row; half as many for four
 */
#include "kernels/cpu/decode_softmax.h"

/* ---- The order of elements --------------------------------------------------------------------------------------
 * bf16 is widened two vectors at a time, the even elements by a shift and the odd ones by a mask, which takes fewer
 * instructions than spreading them out in order, and so is float8. So queries hold even and odd elements apart beside such keys, and
 * outputs beside such values, in each PAIR of vectors; what is left of a row behind its last whole pair is in order. */

enum { PAIR = 2 * VEC_LANES };

VEC_INLINE bool in_halves(enum dtype dtype) {
    return dtype == DTYPE_BF16 || dtype_is_float8(dtype);
}

/* In units of float8_unit(). `nan`: NaN of e4m3 is looked for. */
VEC_INLINE void load_pair(vec x[2], const char *p, enum dtype dtype, bool nan) {
    if (dtype == DTYPE_BF16) {
        vec_load_bf16_halves(x, p);
    } else if (dtype_is_float8(dtype)) {
        vec_load_float8_halves(x, p, dtype, nan);
    } else {
        x[0] = load_some(p, dtype, VEC_LANES);
        x[1] = load_some(p + VEC_LANES * dtype_bytes(dtype), dtype, VEC_LANES);
    }
}

/* Whether pairs come two at a time, with what is NaN: by the table of vec_vbmi.h. */
VEC_INLINE bool in_two_pairs(enum dtype dtype) {
#ifdef VEC_HAS_E4M3_TABLE
    return dtype == DTYPE_E4M3;
#else
    (void)dtype;
    return false;
#endif
}

VEC_INLINE void load_pairs(vec *x, const char *p, int pairs, enum dtype dtype, bool nan) {
    int i = 0;
#ifdef VEC_HAS_E4M3_TABLE
#pragma clang loop unroll(full)
    for (; in_two_pairs(dtype) && i + 2 <= pairs; i += 2)
        vec_load_e4m3_two_pairs(x + 2 * i, p + i * PAIR);
#endif
#pragma clang loop unroll(full)
    for (; i < pairs; i++)
        load_pair(x + 2 * i, p + i * PAIR * dtype_bytes(dtype), dtype, nan || in_two_pairs(dtype));
}

/* The rest of a row, in the same units. */
VEC_INLINE vec load_rest(const char *p, enum dtype dtype, int64_t n) {
    return dtype_is_float8(dtype) ? vec_load_float8(p, n, dtype) : load_some(p, dtype, n);
}

/* Some row has a NaN in its pairs, which must be looked for. */
VEC_FN static bool has_e4m3_nan(const struct rows *rows, int32_t n, int64_t dim) {
    if (in_two_pairs(DTYPE_E4M3))
        return false;
    for (int32_t j = 0; j < n; j++) {
        const char *row = row_at(rows, j);
        bool nan = false;
        for (int64_t d = 0; d + PAIR <= dim; d += PAIR)
            nan |= vec_has_e4m3_nan(row + d);
        if (nan)
            return true;
    }
    return false;
}

/* A pair in order, as halves. */
static void part_halves(float *pair) {
    float in_order[PAIR];
    memcpy(in_order, pair, sizeof in_order);
    for (int l = 0; l < VEC_LANES; l++) {
        pair[l] = in_order[2 * l];
        pair[VEC_LANES + l] = in_order[2 * l + 1];
    }
}

VEC_FN static void widen_query(float *to, const char *from, int64_t n, enum dtype dtype,
                               enum dtype key) {
    const int64_t pairs = in_halves(key) || !in_halves(dtype) ? n / PAIR * PAIR : 0;
    const vec unit = vec_set(float8_unit(dtype));
    vec x[2];
    for (int64_t d = 0; d < pairs; d += PAIR) {
        load_pair(x, from + d * dtype_bytes(dtype), dtype, true);
        vec_store(to + d, vec_mul(x[0], unit));
        vec_store(to + d + VEC_LANES, vec_mul(x[1], unit));
        if (in_halves(key) && !in_halves(dtype))
            part_halves(to + d);
    }
    widen(to + pairs, from + pairs * dtype_bytes(dtype), n - pairs, dtype);
}

VEC_FN static void narrow_output(char *to, const float *from, int64_t n, enum dtype dtype,
                                 enum dtype value) {
    const int64_t pairs = in_halves(value) ? n / PAIR * PAIR : 0;
    float part[PAIR];
    for (int64_t d = 0; d < pairs; d += PAIR) {
        for (int l = 0; l < VEC_LANES; l++) {
            part[2 * l] = from[d + l];
            part[2 * l + 1] = from[d + VEC_LANES + l];
        }
        narrow(to + d * dtype_bytes(dtype), part, PAIR, dtype);
    }
    narrow(to + pairs * dtype_bytes(dtype), from + pairs, n - pairs, dtype);
}

/* ---- Scores and values ------------------------------------------------------------------------------------------ */

/* sums[key][row] += key * query[row] in each lane's own place. */
VEC_INLINE void add_products(vec *sum, vec key, const float *query, int64_t query_stride,
                             int rows) {
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
        sum[r] = vec_fma(key, vec_load(query + r * query_stride), sum[r]);
}

/* add_products() of `pairs` pairs of vectors from column d on, for a vector's keys. */
VEC_INLINE void score_pairs(vec *sums, const char *const *keys, const float *query,
                            int64_t query_stride, int64_t d, int pairs, int rows, enum dtype dtype,
                            bool nan) {
#pragma clang loop unroll(full)
    for (int k = 0; k < KEYS(rows); k++) {
        vec key[4];
        load_pairs(key, keys[k] + d * dtype_bytes(dtype), pairs, dtype, nan);
#pragma clang loop unroll(full)
        for (int v = 0; v < 2 * pairs; v++)
            add_products(sums + k * rows, key[v], query + d + v * VEC_LANES, query_stride, rows);
    }
}

/* to[key][row] = dot product, for a vector's keys. */
VEC_INLINE void score_keys(float *to, const char *const *keys, const float *query,
                           int64_t query_stride, int64_t dim, int rows, enum dtype dtype,
                           bool nan) {
    const int64_t bytes = dtype_bytes(dtype);
    vec sums[VEC_LANES];
#pragma clang loop unroll(full)
    for (int n = 0; n < VEC_LANES; n++)
        sums[n] = vec_set(0);
    int64_t d = 0;
    for (; in_two_pairs(dtype) && d + 2 * PAIR <= dim; d += 2 * PAIR)
        score_pairs(sums, keys, query, query_stride, d, 2, rows, dtype, nan);
    for (; d + PAIR <= dim; d += PAIR)
        score_pairs(sums, keys, query, query_stride, d, 1, rows, dtype, nan);
    for (; d < dim; d += VEC_LANES)
#pragma clang loop unroll(full)
        for (int k = 0; k < KEYS(rows); k++)
            add_products(sums + k * rows,
                         load_rest(keys[k] + d * bytes, dtype, at_most(dim - d, VEC_LANES)),
                         query + d, query_stride, rows);
    vec_store(to, vec_sums(sums));
}

/* Scores of a tile, and its values fetched meanwhile; a tile whose keys do not fill the last vector repeats its last key there. */
VEC_INLINE void score_tile(float *to, struct part_tile *tile, const float *query,
                           int64_t query_stride, int64_t dim, int rows, enum dtype dtype,
                           bool nan) {
    for (int32_t j = 0; j < tile->n; j += KEYS(rows)) {
        const char *keys[KEYS(1)];
#pragma clang loop unroll(full)
        for (int k = 0; k < KEYS(rows); k++) {
            fetch_next(&tile->values);
            keys[k] = row_at(&tile->key, j + k < tile->n ? j + k : tile->n - 1);
        }
        score_keys(to + j * rows, keys, query, query_stride, dim, rows, dtype, nan);
    }
}

/* output[row][d] += weights[key][row] * value[key][d] for `pairs` pairs of vectors of d, or for n <= VEC_LANES elements if it is 0.
 * Each `passes` keys fetch one of the next tile's. */
VEC_INLINE void add_values(float *output, int64_t stride, const float *weights,
                           struct part_tile *tile, int64_t d, int pairs, int64_t n, int64_t passes,
                           int rows, enum dtype dtype, bool nan) {
    const int64_t bytes = dtype_bytes(dtype);
    const int vectors = pairs ? 2 * pairs : 1;
    vec sums[ROW_GROUP][2 * VALUE_PAIRS];
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = vec_load(output + r * stride + d + v * VEC_LANES);
    int64_t wait = 0;
    for (int32_t j = 0; j < tile->n; j++) {
        const char *value = (const char *)row_at(&tile->value, j) + d * bytes;
        if (wait-- == 0) {
            fetch_next(&tile->keys);
            wait = passes - 1;
        }
        vec x[2 * VALUE_PAIRS];
        if (pairs == 0)
            x[0] = load_rest(value, dtype, n);
        load_pairs(x, value, pairs, dtype, nan);
#pragma clang loop unroll(full)
        for (int r = 0; r < rows; r++) {
            const vec weight = vec_set(weights[j * rows + r]);
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++)
                sums[r][v] = vec_fma(weight, x[v], sums[r][v]);
        }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            vec_store(output + r * stride + d + v * VEC_LANES, sums[r][v]);
}

VEC_INLINE void value_tile(float *output, int64_t stride, const float *weights,
                           struct part_tile *tile, int64_t dim, int rows, enum dtype dtype,
                           bool nan) {
    const int pairs = rows == 1 ? VALUE_PAIRS : VALUE_PAIRS / 2;
    const int64_t passes = most(1, dim / (pairs * PAIR));
    int64_t d = 0;
    for (; d + pairs * PAIR <= dim; d += pairs * PAIR)
        add_values(output, stride, weights, tile, d, pairs, 0, passes, rows, dtype, nan);
    for (; d + PAIR <= dim; d += PAIR)
        add_values(output, stride, weights, tile, d, 1, 0, passes, rows, dtype, nan);
    for (; d < dim; d += VEC_LANES)
        add_values(output, stride, weights, tile, d, 0, at_most(dim - d, VEC_LANES), passes, rows,
                   dtype, nan);
}

/* ---- A part and a tile of keys ---------------------------------------------------------------------------------- */

/* FUNCTION(..., dtype, nan) with both as constants. */
#define FOR_DTYPE(dtype, nan, FUNCTION, ...)                                                       \
    do {                                                                                           \
        if ((dtype) == DTYPE_F32)                                                                  \
            FUNCTION(__VA_ARGS__, DTYPE_F32, false);                                               \
        else if ((dtype) == DTYPE_F16)                                                             \
            FUNCTION(__VA_ARGS__, DTYPE_F16, false);                                               \
        else if ((dtype) == DTYPE_BF16)                                                            \
            FUNCTION(__VA_ARGS__, DTYPE_BF16, false);                                              \
        else if ((dtype) == DTYPE_E5M2)                                                            \
            FUNCTION(__VA_ARGS__, DTYPE_E5M2, false);                                              \
        else if (nan)                                                                              \
            FUNCTION(__VA_ARGS__, DTYPE_E4M3, true);                                               \
        else                                                                                       \
            FUNCTION(__VA_ARGS__, DTYPE_E4M3, false);                                              \
    } while (0)

VEC_INLINE void attend_rows(const struct part *part, struct part_tile *tile, int rows) {
    const int64_t query_stride = padded_dim(part->dim_qk), stride = padded_dim(part->dim_v);
    const bool key_nan =
        part->key_dtype == DTYPE_E4M3 && has_e4m3_nan(&tile->key, tile->n, part->dim_qk);
    bool value_nan = false;
    for (int32_t row = 0; row < part->rows; row += rows) {
        const int64_t at = score_index(row, 0, part->rows);
        float *s = part->scores + at, *output = part->output + row * stride;
        const float *query = part->query + row * query_stride;
        FOR_DTYPE(part->key_dtype, key_nan, score_tile, s, tile, query, query_stride, part->dim_qk,
                  rows);
        weigh_rows(part, row, output, stride, tile, rows);
        if (row == 0 && part->value_dtype == DTYPE_E4M3) /* now they have been fetched */
            value_nan = has_e4m3_nan(&tile->value, tile->n, part->dim_v);
        FOR_DTYPE(part->value_dtype, value_nan, value_tile, output, stride, s, tile, part->dim_v,
                  rows);
    }
}

VEC_FN static void attend(const struct part *part, struct part_tile *tile) {
    if (part->rows == 1)
        attend_rows(part, tile, 1);
    else
        attend_rows(part, tile, ROW_GROUP);
}

static const struct decode_body body = {.lanes = VEC_LANES,
                                        .least_rows = 1,
                                        .output_rows = 1,
                                        .widen = widen_query,
                                        .narrow = narrow_output,
                                        .load_extra_row = load_extra_row,
                                        .attend = attend};
