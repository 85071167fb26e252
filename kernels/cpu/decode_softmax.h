/*
 * Softmax of a part's rows, `rows` of them side by side: scores of a tile become weights. For every body of decoding, over the vectors
 * of vec_*.h.
 */
#ifndef DLATTN_CPU_DECODE_SOFTMAX_H_
#define DLATTN_CPU_DECODE_SOFTMAX_H_

#include "kernels/cpu/decode.h"
#include "kernels/cpu/vec_extra.h"
#include "kernels/cpu/vec_math.h"

#include <math.h>

/* `rows` is 1 or ROW_GROUP; so many keys' scores with these rows fill a vector. */
#define KEYS(rows) (VEC_LANES / (rows))

/* The values of the rows, once for each key of a vector. */
VEC_INLINE vec repeat_rows(const float *of_row, int rows) {
    float lanes[VEC_LANES];
#pragma clang loop unroll(full)
    for (int l = 0; l < VEC_LANES; l++)
        lanes[l] = of_row[l % rows];
    return vec_load(lanes);
}

/* Key index of each lane, from `first` on. */
VEC_INLINE vec key_lanes(float first, int rows) {
    float lanes[VEC_LANES];
#pragma clang loop unroll(full)
    for (int n = 0; n < VEC_LANES; n++) {
        const int key = n / rows;
        lanes[n] = first + (float)key;
    }
    return vec_load(lanes);
}

VEC_INLINE void rule_tile(float *s, const float *extra, const struct part *part, int32_t row,
                          const struct part_tile *tile, int rows) {
    const vec position = repeat_rows(part->position + row, rows),
              slope = repeat_rows(part->slope + row, rows);
    for (int32_t j = 0; j < tile->n; j += KEYS(rows)) {
        const vec key = key_lanes((float)(tile->first_key + j), rows);
        vec cap_slope;
        vec_store(s + j * rows,
                  logit_of(vec_load(s + j * rows), tile->rule, slope,
                           vec_abs(vec_sub(position, key)),
                           extra ? vec_load(extra + j * rows) : vec_set(0), &cap_slope));
    }
}

/* Scores or weights of a tile, times the scales of its keys. */
VEC_INLINE void scale_tile(float *s, const float *scale, int32_t n, int rows) {
    for (int32_t j = 0; j < n; j++)
        for (int r = 0; r < rows; r++)
            s[j * rows + r] *= scale[j];
}

/* -inf where a row does not see the key, and past the last key. */
VEC_INLINE void bound_tile(float *s, const struct part *part, int32_t row,
                           const struct part_tile *tile, int rows) {
    float lo[ROW_GROUP], hi[ROW_GROUP]; /* in keys of this tile */
    for (int r = 0; r < rows; r++) {
        const int64_t low = part->lo[row + r] - tile->first_key,
                      high = part->hi[row + r] - tile->first_key;
        lo[r] = (float)(low < 0 ? 0 : at_most(low, tile->n)) - 0.5f;
        hi[r] = (float)(high < 0 ? 0 : at_most(high, tile->n)) - 0.5f;
    }
    const vec low = repeat_rows(lo, rows), high = repeat_rows(hi, rows);
    for (int32_t j = 0; j < tile->n; j += KEYS(rows)) {
        const vec key = key_lanes((float)j, rows), x = vec_load(s + j * rows);
        vec_store(s + j * rows, vec_blend(vec_set(-INFINITY), x,
                                          vec_and(vec_greater(key, low), vec_greater(high, key))));
    }
}

/* The maximum of each lane. */
VEC_INLINE vec lane_max(const float *s, int32_t n, int rows) {
    const vec none = vec_set(-INFINITY);
    vec most[4] = {none, none, none, none}; /* one waits for itself */
    for (int32_t j = 0; j < n; j += 4 * KEYS(rows))
#pragma clang loop unroll(full)
        for (int i = 0; i < 4; i++)
            if (j + i * KEYS(rows) < n)
                most[i] = vec_max(vec_load(s + (j + i * KEYS(rows)) * rows), most[i]);
    return vec_max(vec_max(most[0], most[1]), vec_max(most[2], most[3]));
}

/* Raises the maxima of rows that have grown to those of the tile's lanes; output and sum follow. */
VEC_FN static void raise_rows(const struct part *part, int32_t row, const float *of_lane,
                              float scale, float *output, int64_t stride, int rows) {
    struct row_lanes *lanes = &part->lanes[row / ROW_GROUP];
    for (int r = 0; r < rows; r++) {
        float most_of_row = -INFINITY;
        for (int l = r; l < VEC_LANES; l += rows)
            most_of_row = of_lane[l] > most_of_row ? of_lane[l] : most_of_row;
        const float before = part->max[row + r];
        if (!((most_of_row - before) * scale > 8)) /* weights up to 2^8 do no harm */
            continue;
        part->max[row + r] = most_of_row;
        const struct origin origin = origin_of(most_of_row, scale);
        /* Of -inf: sum and output are still 0. */
        const float factor = before == -INFINITY ? 1 : rescaling(before, most_of_row, scale);
        for (int l = r; l < VEC_LANES; l += rows) {
            lanes->max[l] = most_of_row;
            lanes->top[l] = origin.top;
            lanes->minus[l] = origin.minus;
            lanes->sum[l] *= factor;
        }
        for (int64_t d = 0; factor != 1 && d < stride; d++)
            output[r * stride + d] *= factor;
    }
}

VEC_INLINE void raise_max(const struct part *part, int32_t row, const float *s,
                          const struct part_tile *tile, float *output, int64_t stride, int rows) {
    float of_lane[VEC_LANES];
    const vec most = lane_max(s, tile->n, rows),
              growth = vec_mul(vec_sub(most, vec_load(part->lanes[row / ROW_GROUP].max)),
                               vec_set(tile->scale));
    if (vec_mask_bits(vec_greater(growth, vec_set(8)))) {
        vec_store(of_lane, most);
        raise_rows(part, row, of_lane, tile->scale, output, stride, rows);
    }
}

/* Scores become weights. A row that has seen no key has scores -inf: weight 0 relative to 2^0. */
VEC_INLINE void weigh_tile(const struct part *part, int32_t row, float *s,
                           const struct part_tile *tile, int rows) {
    struct row_lanes *lanes = &part->lanes[row / ROW_GROUP];
    const vec top = vec_load(lanes->top), minus = vec_load(lanes->minus),
              scale = vec_set(tile->scale);
    vec sum = vec_load(lanes->sum);
    for (int32_t j = 0; j < tile->n; j += KEYS(rows)) {
        const vec weight = exp2_of(vec_fma(vec_sub(vec_load(s + j * rows), top), scale, minus));
        sum = vec_add(sum, weight);
        vec_store(s + j * rows, weight);
    }
    vec_store(lanes->sum, sum);
}

/* Scores of the rows from `row` on, whose output it is, become weights times the scales of values. */
VEC_INLINE void weigh_rows(const struct part *part, int32_t row, float *output, int64_t stride,
                           const struct part_tile *tile, int rows) {
    const int64_t at = score_index(row, 0, part->rows);
    float *s = part->scores + at;
    if (tile->rule && tile->rule->key_scale)
        scale_tile(s, tile->rule->key_scale, tile->n, rows);
    if (tile->rule)
        rule_tile(s, tile->rule->extra ? tile->rule->extra + at : NULL, part, row, tile, rows);
    if (tile->bounded || tile->n % KEYS(rows) != 0)
        bound_tile(s, part, row, tile, rows);
    raise_max(part, row, s, tile, output, stride, rows);
    weigh_tile(part, row, s, tile, rows);
    if (tile->value.scale)
        scale_tile(s, tile->value.scale, tile->n, rows);
}

#endif /* DLATTN_CPU_DECODE_SOFTMAX_H_ */
