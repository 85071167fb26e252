/*
 * The body of the cpu_fwd_f64 rows, over the vectors of vec_f64_*.h. A row's file defines VECTORS, the vectors of a block:
 * VECTORS * VEC_LANES query rows.
 */
#include "kernels/cpu/f64.h"

#include <math.h>
#include <string.h>

enum { LANES = VECTORS * VEC_LANES };
_Static_assert(LANES <= F64_MAX_LANES, "struct f64_block has room for a block's lanes");
enum {
    SIDE_BY_SIDE = 4
}; /* vectors that go through a polynomial together, because each step waits for the one before */

#define PAIRS 0
#include "kernels/cpu/product.h"

/* ---- exp and tanh ----------------------------------------------------------------------------------------------- */

/* x = n ln 2 + r with a whole n and |r| <= ln 2 / 2: returns r. The first product has all bits of its sum (FMA). */
VEC_INLINE vec reduce(vec x, vec *n) {
    const vec whole = vec_set(0x1.8p52); /* doubles of this size have no fraction */
    *n = vec_sub(vec_fma(x, vec_set(0x1.71547652b82fep0), whole), whole);
    const vec r = vec_fnma(*n, vec_set(0x1.62e42fefa39efp-1), x);
    return vec_fnma(*n, vec_set(0x1.abc9e3b39803fp-56), r);
}

/* r[i] -> (e^r - 1) / r for |r| <= ln 2 / 2: 1 + r / 2 + ..., a minimax polynomial to 4e-18 of e^r. */
VEC_INLINE void growth_each(vec *r, int count) {
    static const double factors[] = {
        0x1.ad7f6f0799ee2p-26,
        0x1.28ad72cc30daap-22,
        0x1.71df2552390c2p-19,
        0x1.a0199a0c677acp-16,
        0x1.a01a012a57b51p-13,
        0x1.6c16c1842a11dp-10,
        0x1.1111111127be5p-7,
        0x1.555555555087cp-5,
        0x1.55555555554fap-3,
        0x1.000000000000ap-1,
        1,
    };
    enum { TERMS = sizeof factors / sizeof factors[0] };
    vec y[SIDE_BY_SIDE];
#pragma clang loop unroll(full)
    for (int i = 0; i < count; i++)
        y[i] = vec_set(factors[0]);
#pragma clang loop unroll(full)
    for (int t = 1; t < TERMS; t++)
#pragma clang loop unroll(full)
        for (int i = 0; i < count; i++)
            y[i] = vec_fma(y[i], r[i], vec_set(factors[t]));
#pragma clang loop unroll(full)
    for (int i = 0; i < count; i++)
        r[i] = y[i];
}

/* e^x to 1 ulp for x <= 0, at most SIDE_BY_SIDE of them; 0 for -inf and far below the least double, NaN for NaN. */
VEC_INLINE void exp_each(vec *x, int count) {
    vec n[SIDE_BY_SIDE], r[SIDE_BY_SIDE], growth[SIDE_BY_SIDE];
#pragma clang loop unroll(full)
    for (int i = 0; i < count; i++)
        growth[i] = r[i] = reduce(vec_max(vec_set(-800), x[i]), &n[i]);
    growth_each(growth, count);
#pragma clang loop unroll(full)
    for (int i = 0; i < count; i++)
        x[i] = vec_scale(vec_fma(growth[i], r[i], vec_set(1)), n[i]);
}

/* tanh |x| = m / (m + 2) with m = e^2|x| - 1 = 2^n (e^r - 1) + (2^n - 1), where nothing cancels. */
VEC_INLINE vec tanh_of(vec x) {
    vec n;
    const vec r = reduce(vec_min(vec_set(40), vec_add(vec_abs(x), vec_abs(x))), &n);
    vec growth = r;
    growth_each(&growth, 1);
    const vec power = vec_scale(vec_set(1), n),
              m = vec_fma(power, vec_mul(growth, r), vec_sub(power, vec_set(1)));
    return vec_sign_of(vec_div(m, vec_add(m, vec_set(2))), x);
}

/* ---- Logits ----------------------------------------------------------------------------------------------------- */

/* Scores -> logits, -inf for keys that the mask hides. */
VEC_FN static void apply_rule(double *s, const struct f64_tile *t, const struct f64_block *b) {
    const vec none = vec_set(-INFINITY);
    for (int32_t v = 0; v < b->vectors; v++) {
        const vec position = vec_load(b->position + v * VEC_LANES),
                  slope = vec_load(b->slope + v * VEC_LANES);
        for (int32_t j = 0; j < t->n; j++) {
            const int64_t at = j * LANES + v * VEC_LANES;
            vec x = vec_mul(vec_load(s + at), vec_set(t->scale));
            if (t->softcap > 0)
                x = vec_mul(vec_set(t->softcap), tanh_of(vec_div(x, vec_set(t->softcap))));
            if (t->extra)
                x = vec_add(x, vec_load(t->extra + at));
            if (t->alibi)
                x = vec_fnma(slope, vec_abs(vec_sub(position, vec_set((double)(t->first_key + j)))),
                             x);
            if (t->extra)
                x = vec_blend(x, none, vec_same_bits(vec_load(t->extra + at), F64_HIDDEN_BITS));
            vec_store(s + at, x);
        }
    }
}

/* Some lane does not see every key of the tile. */
static bool bounded(const struct f64_block *b, const struct f64_tile *t) {
    return t->first_key < b->full_first || t->first_key + t->n > b->full_end;
}

/* -inf for keys outside [lo, hi) of their lane. */
VEC_FN static void apply_bounds(double *s, const struct f64_tile *t, const struct f64_block *b) {
    for (int32_t v = 0; v < b->vectors; v++) {
        double lo[VEC_LANES], hi[VEC_LANES]; /* in keys of this tile */
        for (int l = 0; l < VEC_LANES; l++) {
            const int64_t low = b->lo[v * VEC_LANES + l] - t->first_key,
                          high = b->hi[v * VEC_LANES + l] - t->first_key;
            lo[l] = (double)least(most(low, 0), t->n) - 0.5;
            hi[l] = (double)least(most(high, 0), t->n) - 0.5;
        }
        const vec low = vec_load(lo), high = vec_load(hi), none = vec_set(-INFINITY);
        for (int32_t j = 0; j < t->n; j++) {
            double *at = s + j * LANES + v * VEC_LANES;
            const vec key = vec_set(j);
            vec_store(at, vec_blend(none, vec_load(at),
                                    vec_and(vec_greater(key, low), vec_greater(high, key))));
        }
    }
}

/* ---- Softmax ---------------------------------------------------------------------------------------------------- */

VEC_INLINE void rescale(struct f64_block *b, const vec *factor, int64_t dim_v, int vectors) {
    for (int64_t d = 0; d < dim_v; d++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            double *at = b->output + d * LANES + v * VEC_LANES;
            vec_store(at, vec_mul(vec_load(at), factor[v]));
        }
}

/* Raises the maxima to those of the tile; sum and output follow. NaN raises none. */
VEC_INLINE void raise_max(struct f64_block *b, const double *s, vec scale, int32_t n, int64_t dim_v,
                          int vectors) {
    vec max[VECTORS], factor[VECTORS];
    uint32_t grown = 0;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        max[v] = vec_set(-INFINITY);
    for (int32_t j = 0; j < n; j++)
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            max[v] = vec_max(vec_load(s + j * LANES + v * VEC_LANES), max[v]);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        const vec before = vec_load(b->max + v * VEC_LANES),
                  after = vec_max(vec_mul(max[v], scale), before);
        factor[v] = vec_blend(vec_sub(before, after), vec_set(0), vec_equal(before, after));
        grown |= vec_mask_bits(vec_greater(after, before));
        vec_store(b->max + v * VEC_LANES, after);
    }
    if (!grown)
        return;
    exp_each(factor, vectors);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        double *sum = b->sum + v * VEC_LANES;
        vec_store(sum, vec_mul(vec_load(sum), factor[v]));
    }
    if (!b->fresh)
        rescale(b, factor, dim_v, vectors);
}

/* Scores of `keys` keys -> weights. A logit is rounded before the maximum is taken from it, as the maximum was: one FMA
 * would leave that rounding, which is large where logits are, in the difference. */
VEC_INLINE void weigh(double *s, int keys, vec scale, const vec *max, vec *sum, int vectors) {
    vec w[SIDE_BY_SIDE];
#pragma clang loop unroll(full)
    for (int i = 0; i < keys * vectors; i++) {
        const vec x = vec_load(s + i / vectors * LANES + i % vectors * VEC_LANES);
        w[i] = vec_sub(vec_mul(x, scale), max[i % vectors]);
    }
    exp_each(w, keys * vectors);
#pragma clang loop unroll(full)
    for (int i = 0; i < keys * vectors; i++) {
        sum[i % vectors] = vec_add(sum[i % vectors], w[i]);
        vec_store(s + i / vectors * LANES + i % vectors * VEC_LANES, w[i]);
    }
}

/* Scores -> weights relative to the maxima. A lane that has seen no key has a maximum of -inf and scores of -inf, whose
 * weights are 0 relative to 0. */
VEC_INLINE void softmax(double *s, struct f64_block *b, const struct f64_tile *t, int vectors) {
    const vec scale = vec_set(t->rule ? 1 : t->scale);
    const int keys = SIDE_BY_SIDE / vectors;
    vec max[VECTORS], sum[VECTORS];
    raise_max(b, s, scale, t->n, t->dim_v, vectors);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        const vec own = vec_load(b->max + v * VEC_LANES);
        max[v] = vec_blend(own, vec_set(0), vec_equal(own, vec_set(-INFINITY)));
        sum[v] = vec_load(b->sum + v * VEC_LANES);
    }
    int32_t j = 0;
    for (; j + keys <= t->n; j += keys)
        weigh(s + j * LANES, keys, scale, max, sum, vectors);
    for (; j < t->n; j++)
        weigh(s + j * LANES, 1, scale, max, sum, vectors);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        vec_store(b->sum + v * VEC_LANES, sum[v]);
}

VEC_INLINE void attend_of(struct f64_block *b, const struct f64_tile *t, double *s, int vectors) {
    product(s, t->key.data, t->key.row_stride, t->key.element_stride, b->query, t->dim_qk, t->n,
            vectors, false, t->next);
    if (t->rule)
        apply_rule(s, t, b);
    if (bounded(b, t))
        apply_bounds(s, t, b);
    softmax(s, b, t, vectors);
    product(b->output, t->value.data, t->value.element_stride, t->value.row_stride, s, t->n,
            t->dim_v, vectors, !b->fresh, t->next);
    b->fresh = false;
}

VEC_FN static void attend(struct f64_block *b, const struct f64_tile *t, double *s) {
    if (b->vectors == 1)
        attend_of(b, t, s, 1);
    else if (b->vectors == 2 && VECTORS > 2)
        attend_of(b, t, s, 2);
    else
        attend_of(b, t, s, VECTORS);
}

/* ---- In and out ------------------------------------------------------------------------------------------------- */

VEC_FN static void transpose(double *to, int64_t to_stride, const double *from, int64_t from_stride,
                             int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r += 4)
        for (int64_t c = 0; c < columns; c += 4)
            transpose_4x4(to + c * to_stride + r, to_stride, from + r * from_stride + c,
                          from_stride);
}

VEC_FN static void scale_output(const struct f64_block *b, const double *factor, int64_t dim_v,
                                bool *finite) {
    for (int32_t first = 0; first < b->rows; first += VEC_LANES) {
        const vec factors = vec_load(factor + first);
        vec zeros = vec_set(0); /* 0 * x is NaN for NaN and infinity */
        for (int64_t d = 0; d < dim_v; d++) {
            double *at = b->output + d * LANES + first;
            const vec x = vec_mul(vec_load(at), factors);
            zeros = vec_fma(x, vec_set(0), zeros);
            vec_store(at, x);
        }
        const uint32_t bad = vec_mask_bits(vec_is_nan(zeros));
        for (int l = 0; l < VEC_LANES; l++)
            finite[first + l] = !(bad >> l & 1);
    }
}

static const struct f64_body body = {
    .vector_lanes = VEC_LANES,
    .vectors = VECTORS,
    .transpose = transpose,
    .attend = attend,
    .scale_output = scale_output,
};
