/*
 * What the cpu_bwd rows share whose operands are words of two bf16. There is one walk over the keys: such products are so fast
 * that keeping a tile's weights costs more than what lse and output, as they were rounded, take from their accuracy, which is
 * less than the rounding of the elements does. Sums over lanes take all of them, whoever sees the key: numbers that are not
 * finite are left to the row that stands in.
 *
 * Who includes it says how weights are made: EXP2_EACH(vectors, count).
 */
#ifndef DLATTN_CPU_BACKWARD_ONE_WALK_H_
#define DLATTN_CPU_BACKWARD_ONE_WALK_H_

ROW_FUNCTIONS(cpu_bwd_avx512);

#define STAND_IN(function) cpu_bwd_avx512_##function
enum { FINITE_ONLY = true, ONE_WALK = true };

/* Whether no half of a word is NaN or infinity. */
VEC_FN static bool finite_words(const float *words, int64_t n) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 found = 0;
    for (int64_t i = 0; i < n; i += VEC_LANES) {
        const __m512i x = _mm512_and_si512(_mm512_loadu_si512(words + i), exponent);
        found |= _mm512_cmpeq_epi16_mask(x, exponent);
    }
    return !found;
}

/* ---- Weights -------------------------------------------------------------------------------- */

static void end_weights(struct backward_block *b, const struct backward_tile *t) {
    (void)b, (void)t; /* they stay scores until they are P */
}

VEC_INLINE void differentiate_of(const struct backward_block *b, const struct backward_tile *t,
                                 bool plain, int vectors) {
    const vec scale = vec_set(t->scale), zero = vec_set(0), none = vec_set(-INFINITY);
    vec minus[VECTORS], delta[VECTORS];
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        minus[v] = vec_load(b->rows.minus + v * VEC_LANES);
        delta[v] = vec_load(b->delta + v * VEC_LANES);
    }
    for (int32_t j = 0; j < t->n; j++) {
        vec w[VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++)
            w[v] = vec_fma(vec_load(t->weights + j * LANES + v * VEC_LANES), scale, minus[v]);
        EXP2_EACH(w, vectors);
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            const int64_t at = j * LANES + v * VEC_LANES;
            vec weight = w[v], d_weight = vec_load(t->d_weights + at);
            if (!plain && t->drops) {
                const vec keep = vec_load(t->keep + at);
                d_weight = vec_blend(vec_mul(d_weight, keep), zero, vec_equal(keep, zero));
                weight = vec_mul(weight, keep);
            }
            vec d_logit = vec_mul(w[v], vec_sub(d_weight, delta[v]));
            if (!plain) {
                const vec_mask hidden = vec_equal(vec_load(t->weights + at), none);
                weight = vec_blend(weight, zero, hidden);
                d_logit = vec_blend(d_logit, zero, hidden);
                if (t->cap_slopes) /* that of a hidden NaN is NaN */
                    vec_store(t->cap_slopes + at,
                              vec_blend(vec_load(t->cap_slopes + at), zero, hidden));
            }
            vec_store(t->weights + at, weight);
            vec_store(t->d_weights + at, d_logit);
        }
    }
}

#endif /* DLATTN_CPU_BACKWARD_ONE_WALK_H_ */
