/*
 * bf16, f16 and f32, and float8 beside them, by AMX tiles of bf16 (amx.h).
 *
 * Tiles and vectors are units of their own, which work side by side if their instructions alternate, few of each at a
 * time: the softmax of some keys runs beside the products of the next ones' scores. Scores are made a few keys at a time, so
 * that they stay in the first-level cache.
 */
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16"
#include "kernels/cpu/x86_64/vec_avx512.h"
#include "kernels/cpu/x86_64/vec_bf16.h"

#define VECTORS 4
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/x86_64/amx.h"

#define TILE_K(terms) ((terms) == 3 ? 128 : 512)

/* ---- Weights --------------------------------------------------------------------------------------------------- */

/* Relative to the maxima that the block has. */
VEC_INLINE void start_weighing(struct weighing *w, const struct block *b, int vectors) {
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        w->minus[v] = vec_load(b->minus + v * VEC_LANES);
        w->sum[v] = vec_set(0);
    }
    if (b->vast)
        subtract_tops(w->scores, b, w->n, vectors);
    w->pair = 0;
}

/* False, and no sums, if some lane's maximum has grown so far that its weights are too large. */
VEC_INLINE bool end_weighing(const struct weighing *w, struct block *b, int vectors) {
    uint32_t huge = 0;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        huge |= vec_mask_bits(vec_greater(w->sum[v], vec_set(HUGE_SUM)));
    if (huge)
        return false;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++)
        vec_store(b->sum + v * VEC_LANES, vec_add(vec_load(b->sum + v * VEC_LANES), w->sum[v]));
    return true;
}

/* ---- A block and a tile of keys --------------------------------------------------------------------------------- */

/* Products of n keys from key j of the tile on become scores. */
static void finish_scores(float *s, const struct block *b, const struct key_tile *t, int32_t j,
                          int32_t n) {
    if (t->rule) {
        struct logit_rule rule = *t->rule;
        rule.extra = rule.extra ? rule.extra + j * LANES : NULL;
        rule.key_scale = rule.key_scale ? rule.key_scale + j : NULL;
        apply_rule(s, &rule, b, t->first_key + j, n, NULL);
    }
    if (bounded(b, t->first_key + j, n))
        apply_bounds(s, b, t->first_key + j, n);
}

/* A tile of keys, a few at a time. */
struct attending {
    struct block *b;
    const struct key_tile *t;
    float *scores[2]; /* STEP x LANES each: weighed now, and next */
    float *weights;   /* tiles of 32 keys x 16 lanes */
    int64_t weight_row;
    int32_t from; /* the first key that is not yet in the output */
};

/* The weights of a step that dropout takes become 0. */
VEC_INLINE void drop_step(const struct attending *a, int64_t step, int vectors, int terms) {
    for (int64_t pair = 0; pair < PAIRS; pair++)
        for (int v = 0; v < vectors; v++) {
            const int64_t key = step * STEP + pair;
            const float *kept = a->t->keep + key * LANES + v * VEC_LANES;
            float *words = a->weights + step * terms * TILE + pair * ROWS + v * a->weight_row;
            const vec even = key < a->t->n ? vec_load(kept) : vec_set(1),
                      odd = key + PAIRS < a->t->n ? vec_load(kept + PAIRS * LANES) : vec_set(1);
            for (int t = 0; t < terms; t++)
                vec_store(words + t * TILE, drop_halves(vec_load(words + t * TILE), even, odd));
        }
}

/* Values of keys [from, to). */
VEC_INLINE void accumulate(struct attending *a, int32_t to, int vectors, int terms) {
    const struct key_tile *t = a->t;
    const int64_t first = a->from / STEP, steps = padded(to, STEP) / STEP - first;
    if (steps > 0) {
        for (int64_t step = first; t->keep && step < first + steps; step++)
            drop_step(a, step, vectors, terms);
        product(a->b->output,
                (struct tiles){t->value.words + first * terms * TILE, t->value.stride},
                (struct tiles){a->weights + first * terms * TILE, a->weight_row}, steps,
                padded(t->dim_v, ROWS), vectors, terms, false, !a->b->fresh);
        a->b->fresh = false;
    }
    a->from = to;
}

/* The scores of up to STEP keys from key j on; of so many, and of all vectors, if pairs are weighed beside them. */
VEC_INLINE void score(const struct attending *a, float *s, int32_t j, struct weighing *beside,
                      int vectors, int terms) {
    const struct key_tile *t = a->t;
    const int32_t n = (int32_t)at_most(t->n - j, STEP);
    const int64_t steps = padded(t->dim_qk, STEP) / STEP, row = steps * terms * TILE;
    const struct tiles keys = {t->key.words + j / ROWS * t->key.stride, t->key.stride},
                       queries = {a->b->query, row};
    fetch_rows(t->next, 8);
    if (beside) {
        beside->share = (int32_t)((PAIRS << 16) / (steps * 4 * products_of(terms, true)));
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v += 2) {
            const struct tiles right = {queries.words + v * row, row};
            beside->pair = 0;
            product_tile(s + v * 16, keys, right, steps, terms, true, true, true, false, beside, v);
            weigh_rest(beside, v, v + 2, terms);
        }
    } else {
        product(s, keys, queries, steps, padded(n, ROWS), vectors, terms, true, false);
    }
    finish_scores(s, a->b, t, j, n);
}

/* Brings the maxima up to the scores from key j on, and the output up to key j: its weights belong to the old maxima. */
VEC_INLINE void raise(struct attending *a, const struct weighing *w, int32_t j, int vectors,
                      int terms) {
    vec tile_max[VECTORS];
    column_max(tile_max, w->scores, w->n, vectors);
    if (!max_grows(a->b, tile_max, w->scale, vectors))
        return;
    accumulate(a, j, vectors, terms);
    raise_max(a->b, tile_max, w->scale, a->t->dim_v, vectors);
}

/* The weights of keys from j on; beside them the scores of the next keys, if there are as many. */
VEC_INLINE void weigh(struct attending *a, int32_t j, bool last, int vectors, int terms) {
    struct weighing w = {
        .scores = a->scores[0],
        .weights = a->weights + j / STEP * terms * TILE,
        .row = a->weight_row,
        .n = (int32_t)at_most(a->t->n - j, STEP),
        .scale = vec_set(a->t->scale),
    };
    if (a->b->unseen || a->b->vast) /* without its top a score is no good for a second try */
        raise(a, &w, j, vectors, terms);
    start_weighing(&w, a->b, vectors);
    if (vectors == VECTORS && a->t->n - j >= 2 * STEP) {
        score(a, a->scores[1], j + STEP, &w, vectors, terms);
    } else {
        weigh_rest(&w, 0, vectors, terms);
        if (!last)
            score(a, a->scores[1], j + STEP, NULL, vectors, terms);
    }
    if (end_weighing(&w, a->b, vectors))
        return;
    raise(a, &w, j, vectors, terms);
    start_weighing(&w, a->b, vectors);
    weigh_rest(&w, 0, vectors, terms);
    end_weighing(&w, a->b, vectors);
}

/* Scores and weights of all keys, then all their values at once. */
VEC_INLINE void attend_vectors(struct block *b, const struct key_tile *t, float *scratch,
                               int vectors, int terms) {
    struct attending a = {.b = b,
                          .t = t,
                          .scores = {scratch, scratch + STEP * LANES},
                          .weights = scratch + 2 * STEP * LANES,
                          .weight_row = TILE_K(terms) / STEP * terms * TILE};
    while (t->first_key + a.from + STEP <= b->first)
        a.from += STEP;
    score(&a, a.scores[0], a.from, NULL, vectors, terms);
    for (int32_t j = a.from; j < t->n; j += STEP) {
        weigh(&a, j, j + STEP >= t->n, vectors, terms);
        float *const now = a.scores[0];
        a.scores[0] = a.scores[1];
        a.scores[1] = now;
    }
    accumulate(&a, t->n, vectors, terms);
}

VEC_INLINE void attend_terms(struct block *b, const struct key_tile *t, float *scratch, int terms) {
    if (b->vectors == 1)
        attend_vectors(b, t, scratch, 1, terms);
    else if (b->vectors == 2)
        attend_vectors(b, t, scratch, 2, terms);
    else
        attend_vectors(b, t, scratch, VECTORS, terms);
}

/* ---- The row: a body for each dtype ----------------------------------------------------------------------------- */

/* `element` is the dtype of what is not float8. */
#define BODY(name, element, count)                                                                 \
    VEC_FN static void pack_query_##name(const struct block *b, const char *const *rows,           \
                                         int64_t dim, enum dtype dtype, float *scratch) {          \
        (void)scratch;                                                                             \
        if (dtype == DTYPE_E4M3)                                                                   \
            pack_query_terms(b->query, b, rows, dim, DTYPE_E4M3, count);                           \
        else if (dtype == DTYPE_E5M2)                                                              \
            pack_query_terms(b->query, b, rows, dim, DTYPE_E5M2, count);                           \
        else                                                                                       \
            pack_query_terms(b->query, b, rows, dim, element, count);                              \
    }                                                                                              \
    VEC_FN static struct operand load_key_##name(float *to, const struct rows *rows, int32_t n,    \
                                                 int64_t dim, enum dtype dtype) {                  \
        return dtype == DTYPE_E4M3   ? load_key_terms(to, rows, n, dim, DTYPE_E4M3, count)         \
               : dtype == DTYPE_E5M2 ? load_key_terms(to, rows, n, dim, DTYPE_E5M2, count)         \
                                     : load_key_terms(to, rows, n, dim, element, count);           \
    }                                                                                              \
    VEC_FN static struct operand load_value_##name(float *to, const struct rows *rows, int32_t n,  \
                                                   int64_t dim, enum dtype dtype) {                \
        const int32_t tile_k = TILE_K(count);                                                      \
        return dtype == DTYPE_E4M3 ? load_value_terms(to, rows, n, dim, DTYPE_E4M3, count, tile_k) \
               : dtype == DTYPE_E5M2                                                               \
                   ? load_value_terms(to, rows, n, dim, DTYPE_E5M2, count, tile_k)                 \
                   : load_value_terms(to, rows, n, dim, element, count, tile_k);                   \
    }                                                                                              \
    VEC_FN static void attend_##name(struct block *b, const struct key_tile *t, float *scratch) {  \
        attend_terms(b, t, scratch, count);                                                        \
    }                                                                                              \
    static const struct forward_body body_##name = {                                               \
        .lanes = LANES,                                                                            \
        .vector_lanes = VEC_LANES,                                                                 \
        .tile_k = TILE_K(count),                                                                   \
        .step_k = STEP,                                                                            \
        .elements_per_word = 2,                                                                    \
        .terms = count,                                                                            \
        .score_bytes = (2 * STEP + TILE_K(count) * count / 2) * LANES * 4,                         \
        .enter = enter,                                                                            \
        .leave = leave,                                                                            \
        .pack_query = pack_query_##name,                                                           \
        .load_key = load_key_##name,                                                               \
        .load_value = load_value_##name,                                                           \
        .load_extra = load_extra,                                                                  \
        .draw = draw,                                                                              \
        .attend = attend_##name,                                                                   \
        .store = store,                                                                            \
    };

BODY(bf16, DTYPE_BF16, 1)
BODY(f16, DTYPE_F16, 2)
BODY(f32, DTYPE_F32, 3)

/* An output is never float8, and all tensors that are not are of its dtype. */
static const struct forward_body *body_of(const struct problem *p) {
    const enum dtype dtype = p->output.dtype;
    return dtype == DTYPE_BF16 ? &body_bf16 : dtype == DTYPE_F16 ? &body_f16 : &body_f32;
}

ROW_FUNCTIONS(cpu_fwd_amx);

bool cpu_fwd_amx_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    /* f32 only where it is asked for: 1.4 times as fast as by FMA on a core of its own, 0.75 times on one whose other thread
     * multiplies tiles, too. A vast scale would show what its terms lose, as vast keys would. */
    if (p->output.dtype == DTYPE_F32 && (!p->kernel || fabs(p->scale) >= VAST))
        return false;
    return forward_plan(plan, p, body_of(p));
}

int32_t cpu_fwd_amx_launch(const struct plan *plan, const struct problem *p,
                           const struct exec *exec) {
    return forward_launch(plan, p, exec, body_of(p));
}
