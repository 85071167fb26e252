/* attend() by products of a broadcast scalar and vectors. */

#include "kernels/cpu/product.h"

enum { KEYS = PAIRS || VECTORS < 4 ? 2 : 1 }; /* of softmax at a time */

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
    const bool raised = b->unseen || raise;
    uint32_t huge = 0;
    if (raised) {
        vec tile_max[VECTORS];
        column_max(tile_max, s, n, vectors);
        if (max_grows(b, tile_max, scale, vectors))
            raise_max(b, tile_max, scale, t->dim_v, vectors);
    }
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        minus[v] = vec_load(b->minus + v * VEC_LANES);
        sum[v] = vec_set(0);
    }
    if (b->vast)
        subtract_tops(s, b, n, vectors);
    int32_t j = 0;
    for (; j + KEYS <= n; j += KEYS)
        weigh(s + j / (PAIRS + 1) * LANES, s + j * LANES, KEYS, scale, minus, sum, vectors);
    if (j < n)
        weigh(s + j / (PAIRS + 1) * LANES, s + j * LANES, 1, scale, minus, sum, vectors);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        huge |= vec_mask_bits(vec_greater(sum[v], vec_set(HUGE_SUM)));
    if (huge && !raised)
        return false;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        vec_store(b->sum + v * VEC_LANES, vec_add(vec_load(b->sum + v * VEC_LANES), sum[v]));
    return true;
}

/* Where it returns false, the scores are spent. */
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
        apply_rule(s, t->rule, b, t->first_key, t->n, NULL);
    if (bounded(b, t->first_key, t->n))
        apply_bounds(s, b, t->first_key, t->n);
}

/* Weights, or words of two, that dropout takes become 0. */
VEC_FN static void drop(float *weights, const struct block *b, const struct key_tile *t) {
    for (int32_t j = 0; j < t->n; j += PAIRS + 1)
        for (int32_t v = 0; v < b->vectors; v++) {
            float *at = weights + j / (PAIRS + 1) * LANES + v * VEC_LANES;
            const float *kept = t->keep + j * LANES + v * VEC_LANES;
#if PAIRS
            vec_store(at, drop_halves(vec_load(at), vec_load(kept),
                                      j + 1 < t->n ? vec_load(kept + LANES) : vec_set(1)));
#else
            vec_store(at, vec_mul(vec_load(at), vec_load(kept)));
#endif
        }
}

static void attend(struct block *b, const struct key_tile *t, float *s) {
    make_scores(s, b, t);
    if (!softmax(s, b, t, false)) {
        make_scores(s, b, t);
        softmax(s, b, t, true);
    }
    if (t->keep)
        drop(s, b, t);
    accumulate(b, t, s, !b->fresh);
    b->fresh = false;
}

static void enter(void) {}
static void leave(void) {}
