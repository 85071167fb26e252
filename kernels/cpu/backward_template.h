/*
 * What the bodies of all cpu_bwd rows share, over the vectors of vec_*.h. A row's file defines VECTORS, TILE_K and PAIRS as
 * those of forward do, and BLOCKS, the blocks that go over the keys together. It includes, after forward_template.h and this
 * file, backward_f32.h, backward_amx.h or backward_pairs.h (operands, products and weights), and backward_row.h.
 */
#include "kernels/cpu/backward.h"

/* Every lane sees every key of the tile and drops none, and no 0 meets NaN or infinity. */
static bool is_plain(const struct backward_block *b, const struct backward_tile *t) {
    return t->finite && b->finite && !t->drops && !t->hides &&
           !bounded(&b->rows, t->first_key, t->n);
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
