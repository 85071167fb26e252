/*
 * What the bodies of all cpu_bwd rows share, over the vectors of vec_*.h. A row's file defines VECTORS, TILE_K and PAIRS (0) as
 * those of forward do, and BLOCKS, the blocks that go over the keys together. It includes forward_template.h, then backward_f32.h
 * or backward_amx.h (operands and products), then this file.
 */
#include "src/philox.h"

/* ---- Masks ---------------------------------------------------------------------------------- */

/* As load_extra_row(), with the states of a block mask: it leaves a key to the mask, shows it or hides it. */
VEC_FN static void load_blocks_row(float *to, const struct extra_row *row,
                                   const struct extra_layout *layout, const uint8_t *states,
                                   const struct lane_masks *masks, int64_t first_key, int32_t n) {
    const struct extra_row shown = {.bias = row->bias};
    for (int64_t k = first_key, end; k < first_key + n; k = end) {
        const uint8_t state = states[k / masks->block_k * masks->state_stride];
        end = least((k / masks->block_k + 1) * masks->block_k, first_key + n);
        load_extra_row(to + (k - first_key), state == 1 ? row : &shown, layout, k,
                       (int32_t)(end - k));
        for (int64_t j = k; state == 0 && j < end; j++)
            to[j - first_key] = bits_float(HIDDEN_BITS);
    }
}

VEC_FN static void hide_segments(float *extra, const struct lane_masks *masks,
                                 const struct block *b, int64_t first_key, int32_t n) {
    float segment[MAX_LANES];
    memcpy(segment, masks->segment, sizeof segment);
    for (int32_t j = 0; j < n; j++) {
        uint32_t of_key;
        memcpy(&of_key, masks->key_segments + (first_key + j) * masks->key_segment_stride * 4, 4);
        for (int32_t v = 0; v < b->vectors; v++) {
            float *at = extra + j * LANES + v * VEC_LANES;
            const vec_mask same = vec_same_bits(vec_load(segment + v * VEC_LANES), of_key);
            vec_store(at, vec_blend(vec_set(bits_float(HIDDEN_BITS)), vec_load(at), same));
        }
    }
}

VEC_FN static void load_masked_extra(float *extra, const struct extra_row *rows,
                                     const struct extra_layout *layout,
                                     const struct lane_masks *masks, const struct block *b,
                                     int64_t first_key, int32_t n, float *scratch) {
    const int64_t stride = padded(n, VEC_LANES) + VEC_LANES, lanes = b->vectors * VEC_LANES;
    if (masks->blocks) {
        memset(scratch, 0, (size_t)(lanes * stride * 4));
        for (int32_t r = 0; r < b->rows; r++)
            load_blocks_row(scratch + r * stride, &rows[r], layout, masks->states[r], masks,
                            first_key, n);
        transpose_in(extra, scratch, stride, padded(n, VEC_LANES), lanes);
    } else {
        load_extra(extra, rows, layout, b, first_key, n, scratch);
    }
    if (masks->segments)
        hide_segments(extra, masks, b, first_key, n);
}

/* kept[key][lane]: see docs/numerics.md. Four keys share the words of a counter. */
VEC_FN static void draw(float *kept, const struct dropout *dropout, const struct block *b,
                        int64_t first_key, int32_t n) {
    const int64_t lanes = b->vectors * VEC_LANES;
    for (int32_t j = 0; j < n; j += 4) {
        uint32_t words[4][MAX_LANES];
        for (int64_t l = 0; l < lanes; l++) {
            uint32_t x[4] = {(uint32_t)((first_key + j) / 4), dropout->row[l], dropout->head[l],
                             dropout->stream};
            philox(x, dropout->key[0], dropout->key[1]);
            for (int w = 0; w < 4; w++)
                words[w][l] = x[w];
        }
        for (int w = 0; w < at_most(4, n - j); w++)
            for (int64_t l = 0; l < lanes; l++)
                kept[(j + w) * LANES + l] = words[w][l] < dropout->threshold ? 0 : dropout->factor;
    }
}

/* ---- Weights -------------------------------------------------------------------------------- */

/* Every lane sees every key of the tile and drops none, and no 0 meets NaN or infinity. */
static bool is_plain(const struct backward_block *b, const struct backward_tile *t) {
    return t->finite && b->finite && !t->drops && !t->hides &&
           !bounded(&b->rows, t->first_key, t->n);
}

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

static void weigh(struct backward_block *b, const struct backward_tile *t) {
    score(t->weights, &t->key, b->rows.query, t, t->dim_qk, &b->rows);
    score(t->d_weights, &t->value, b->d_output, t, t->dim_v, &b->rows);
    if (t->rule)
        apply_rule(t->weights, t->rule, &b->rows, t->first_key, t->n, t->cap_slopes);
    if (bounded(&b->rows, t->first_key, t->n))
        apply_bounds(t->weights, &b->rows, t->first_key, t->n);
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

/* ---- Gradients ------------------------------------------------------------------------------ */

VEC_FN static void add_distances(struct backward_block *b, const struct backward_tile *t) {
    for (int32_t v = 0; v < b->rows.vectors; v++) {
        float *sum = b->distances + v * VEC_LANES;
        const vec position = vec_load(b->rows.position + v * VEC_LANES);
        for (int32_t j = 0; j < t->n; j++) {
            const vec distance = vec_abs(vec_sub(position, vec_set((float)(t->first_key + j))));
            vec_store(sum, vec_fma(vec_load(t->d_weights + j * LANES + v * VEC_LANES), distance,
                                   vec_load(sum)));
        }
    }
}

VEC_FN static void apply_cap_slopes(const struct backward_block *b, const struct backward_tile *t) {
    for (int32_t j = 0; j < t->n; j++)
        for (int32_t v = 0; v < b->rows.vectors; v++) {
            const int64_t at = j * LANES + v * VEC_LANES;
            vec_store(t->d_weights + at,
                      vec_mul(vec_load(t->d_weights + at), vec_load(t->cap_slopes + at)));
        }
}

static void accumulate(struct backward_block *b, const struct backward_tile *t,
                       const struct backward_sums *sums, const uint64_t *seen,
                       const uint64_t *kept) {
    if (sums->distances)
        add_distances(b, t);
    if (t->cap_slopes)
        apply_cap_slopes(b, t);
    add_products(b, t, sums, seen, kept);
    b->rows.fresh = false;
}

VEC_FN static void store_float_row(char *to, const float *from, float factor, int64_t n,
                                   enum dtype dtype) {
    store_row(to, from, factor, n, dtype);
}

static const struct backward_body body = {
    .blocks = BLOCKS,
    .lanes = LANES,
    .vector_lanes = VEC_LANES,
    .tile_k = TILE_K,
    .step = STEP_D,
    .terms = TERMS,
    .finite_only = FINITE_ONLY,
    .stand_in_plan = STAND_IN(plan),
    .stand_in_launch = STAND_IN(launch),
    .enter = enter,
    .leave = leave,
    .pack = pack,
    .load_key = load_key,
    .load_value = load_value,
    .finite = finite_rows,
    .load_extra = load_masked_extra,
    .draw = draw,
    .weigh = weigh,
    .differentiate = differentiate,
    .accumulate = accumulate,
    .store = store,
    .store_row = store_float_row,
};
