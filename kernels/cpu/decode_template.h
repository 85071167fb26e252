/*
 * The body of a cpu_decode row, over the vectors of vec_*.h. A row's file defines
 *     VALUE_VECTORS   vectors of d_v whose sums for four rows are kept in registers
 */
#include "kernels/cpu/decode.h"
#include "kernels/cpu/vec_extra.h"
#include "kernels/cpu/vec_math.h"

#include <math.h>

enum { KEYS = VEC_LANES / ROW_GROUP }; /* whose scores with four rows fill a vector */

/* sums[key][row] += key[d ..] * query[d ..], n <= VEC_LANES products in each lane's own place. */
VEC_INLINE void add_products(vec *sums, const char *const *keys, const float *query,
                             int64_t query_stride, int64_t d, int64_t n, enum dtype dtype) {
    const int64_t bytes = dtype == DTYPE_F32 ? 4 : 2;
    vec q[ROW_GROUP];
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_GROUP; r++)
        q[r] = vec_load(query + r * query_stride + d);
#pragma clang loop unroll(full)
    for (int k = 0; k < KEYS; k++) {
        const vec key = load_some(keys[k] + d * bytes, dtype, n);
#pragma clang loop unroll(full)
        for (int r = 0; r < ROW_GROUP; r++)
            sums[k * ROW_GROUP + r] = vec_fma(key, q[r], sums[k * ROW_GROUP + r]);
    }
}

/* to[key][row] = dot product, for KEYS keys and four rows. */
VEC_INLINE void score_keys(float *to, const char *const *keys, const float *query,
                           int64_t query_stride, int64_t dim, enum dtype dtype) {
    vec sums[KEYS * ROW_GROUP];
#pragma clang loop unroll(full)
    for (int n = 0; n < KEYS * ROW_GROUP; n++)
        sums[n] = vec_set(0);
    int64_t d = 0;
    for (; d + VEC_LANES <= dim; d += VEC_LANES)
        add_products(sums, keys, query, query_stride, d, VEC_LANES, dtype);
    if (d < dim)
        add_products(sums, keys, query, query_stride, d, dim - d, dtype);
    vec_store(to, vec_sums(sums));
}

/* Four rows of scores, and the tile's values fetched meanwhile; a tile whose keys do not fill the last vector repeats its last key there. */
VEC_INLINE void score_tile(float *to, const struct part_tile *tile, const float *query,
                           int64_t query_stride, int64_t dim, int64_t value_bytes,
                           enum dtype dtype) {
    for (int32_t j = 0; j < tile->n; j += KEYS) {
        const char *keys[KEYS];
        prefetch_rows(&tile->value, j, least(j + KEYS, tile->n), value_bytes);
#pragma clang loop unroll(full)
        for (int k = 0; k < KEYS; k++)
            keys[k] = row_at(&tile->key, j + k < tile->n ? j + k : tile->n - 1);
        score_keys(to + j * ROW_GROUP, keys, query, query_stride, dim, dtype);
    }
}

/* output[row][d] += weights[key][row] * value[key][d] for four rows and `vectors` vectors of d. The first of them fetches the
 * next tile's keys. */
VEC_INLINE void add_values(float *output, int64_t stride, const float *weights,
                           const struct part_tile *tile, int64_t d, int64_t n, int vectors,
                           int64_t key_bytes, enum dtype dtype) {
    const int64_t bytes = dtype == DTYPE_F32 ? 4 : 2;
    vec sums[ROW_GROUP][VALUE_VECTORS];
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_GROUP; r++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = vec_load(output + r * stride + d + v * VEC_LANES);
    for (int32_t j = 0; j < tile->n; j++) {
        const char *value = (const char *)row_at(&tile->value, j) + d * bytes;
        if (d == 0 && j < tile->n_next)
            prefetch_rows(&tile->key, tile->n + j, tile->n + j + 1, key_bytes);
        vec x[VALUE_VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            x[v] = load_some(value + v * VEC_LANES * bytes, dtype, n);
#pragma clang loop unroll(full)
        for (int r = 0; r < ROW_GROUP; r++) {
            const vec weight = vec_set(weights[j * ROW_GROUP + r]);
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++)
                sums[r][v] = vec_fma(weight, x[v], sums[r][v]);
        }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROW_GROUP; r++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            vec_store(output + r * stride + d + v * VEC_LANES, sums[r][v]);
}

VEC_INLINE void value_tile(float *output, int64_t stride, const float *weights,
                           const struct part_tile *tile, int64_t dim, int64_t key_bytes,
                           enum dtype dtype) {
    int64_t d = 0;
    for (; d + VALUE_VECTORS * VEC_LANES <= dim; d += VALUE_VECTORS * VEC_LANES)
        add_values(output, stride, weights, tile, d, VEC_LANES, VALUE_VECTORS, key_bytes, dtype);
    for (; d < dim; d += VEC_LANES)
        add_values(output, stride, weights, tile, d, at_most(dim - d, VEC_LANES), 1, key_bytes,
                   dtype);
}

/* The four values of a row group, once for each key of a vector. */
VEC_INLINE vec repeat_rows(const float *rows) {
    float lanes[VEC_LANES];
#pragma clang loop unroll(full)
    for (int k = 0; k < KEYS; k++)
        memcpy(lanes + k * ROW_GROUP, rows, sizeof(float) * ROW_GROUP);
    return vec_load(lanes);
}

/* Key index of each lane, from `first` on. */
VEC_INLINE vec key_lanes(float first) {
    float lanes[VEC_LANES];
#pragma clang loop unroll(full)
    for (int n = 0; n < VEC_LANES; n++) {
        const int key = n / ROW_GROUP;
        lanes[n] = first + (float)key;
    }
    return vec_load(lanes);
}

VEC_INLINE void rule_tile(float *s, const float *extra, const struct part *part, int32_t row,
                          const struct part_tile *tile) {
    const vec position = repeat_rows(part->position + row), slope = repeat_rows(part->slope + row);
    for (int32_t j = 0; j < tile->n; j += KEYS) {
        const vec key = key_lanes((float)(tile->first_key + j));
        vec_store(s + j * ROW_GROUP,
                  logit_of(vec_load(s + j * ROW_GROUP), tile->rule, slope,
                           vec_abs(vec_sub(position, key)),
                           extra ? vec_load(extra + j * ROW_GROUP) : vec_set(0)));
    }
}

/* -inf where a row does not see the key, and past the last key. */
VEC_INLINE void bound_tile(float *s, const struct part *part, int32_t row,
                           const struct part_tile *tile) {
    float lo[ROW_GROUP], hi[ROW_GROUP]; /* in keys of this tile */
    for (int r = 0; r < ROW_GROUP; r++) {
        const int64_t low = part->lo[row + r] - tile->first_key,
                      high = part->hi[row + r] - tile->first_key;
        lo[r] = (float)(low < 0 ? 0 : at_most(low, tile->n)) - 0.5f;
        hi[r] = (float)(high < 0 ? 0 : at_most(high, tile->n)) - 0.5f;
    }
    const vec low = repeat_rows(lo), high = repeat_rows(hi);
    for (int32_t j = 0; j < tile->n; j += KEYS) {
        const vec key = key_lanes((float)j), x = vec_load(s + j * ROW_GROUP);
        vec_store(s + j * ROW_GROUP,
                  vec_blend(vec_set(-INFINITY), x,
                            vec_and(vec_greater(key, low), vec_greater(high, key))));
    }
}

/* Raises the maxima of four rows to those of the tile; output and sum follow. */
VEC_INLINE void raise_max(const struct part *part, int32_t row, const float *s,
                          const struct part_tile *tile, float *output, int64_t stride) {
    float lanes[VEC_LANES];
    vec tile_max = vec_set(-INFINITY);
    for (int32_t j = 0; j < tile->n; j += KEYS)
        tile_max = vec_max(vec_load(s + j * ROW_GROUP), tile_max);
    vec_store(lanes, tile_max);
    for (int r = 0; r < ROW_GROUP; r++) {
        float most_of_row = -INFINITY;
        for (int k = 0; k < KEYS; k++)
            most_of_row =
                lanes[k * ROW_GROUP + r] > most_of_row ? lanes[k * ROW_GROUP + r] : most_of_row;
        most_of_row *= tile->scale;
        const float before = part->max[row + r];
        if (!(most_of_row > before + 8)) /* weights up to 2^8 do no harm */
            continue;
        part->max[row + r] = most_of_row;
        if (before == -INFINITY)
            continue; /* sum and output are still 0 */
        const float factor = exp2f(before - most_of_row);
        part->sum[row + r] *= factor;
        for (int64_t d = 0; d < part->dim_v; d++)
            output[r * stride + d] *= factor;
    }
}

/* Scores become weights. A row that has seen no key has scores -inf: weight 0 relative to 2^0. */
VEC_INLINE void weigh_tile(const struct part *part, int32_t row, float *s,
                           const struct part_tile *tile) {
    float minus_max[ROW_GROUP], lanes[VEC_LANES];
    for (int r = 0; r < ROW_GROUP; r++)
        minus_max[r] = part->max[row + r] == -INFINITY ? 0 : -part->max[row + r];
    const vec minus = repeat_rows(minus_max), scale = vec_set(tile->scale);
    vec sum = vec_set(0);
    for (int32_t j = 0; j < tile->n; j += KEYS) {
        const vec weight = exp2_of(vec_fma(vec_load(s + j * ROW_GROUP), scale, minus));
        sum = vec_add(sum, weight);
        vec_store(s + j * ROW_GROUP, weight);
    }
    vec_store(lanes, sum);
    for (int n = 0; n < VEC_LANES; n++)
        part->sum[row + n % ROW_GROUP] += lanes[n];
}

VEC_INLINE void attend_as(const struct part *part, const struct part_tile *tile, enum dtype dtype) {
    const int64_t query_stride = padded(part->dim_qk, 16), stride = padded(part->dim_v, 16),
                  bytes = dtype == DTYPE_F32 ? 4 : 2;
    for (int32_t row = 0; row < part->rows; row += ROW_GROUP) {
        float *s = part->scores + score_index(row, 0), *output = part->output + row * stride;
        score_tile(s, tile, part->query + row * query_stride, query_stride, part->dim_qk,
                   row == 0 ? part->dim_v * bytes : 0, dtype);
        if (tile->rule)
            rule_tile(s, tile->rule->extra ? tile->rule->extra + score_index(row, 0) : NULL, part,
                      row, tile);
        if (tile->bounded || tile->n % KEYS != 0)
            bound_tile(s, part, row, tile);
        raise_max(part, row, s, tile, output, stride);
        weigh_tile(part, row, s, tile);
        value_tile(output, stride, s, tile, part->dim_v, row == 0 ? part->dim_qk * bytes : 0,
                   dtype);
    }
}

VEC_FN static void attend(const struct part *part, const struct part_tile *tile) {
    if (part->dtype == DTYPE_F32)
        attend_as(part, tile, DTYPE_F32);
    else if (part->dtype == DTYPE_F16)
        attend_as(part, tile, DTYPE_F16);
    else
        attend_as(part, tile, DTYPE_BF16);
}

static const struct decode_body body = {
    .widen = widen, .narrow = narrow, .load_extra_row = load_extra_row, .attend = attend};
