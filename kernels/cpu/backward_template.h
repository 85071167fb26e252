/*
 * What the bodies of all cpu_bwd rows share, over the vectors of vec_*.h. A row's file defines VECTORS, TILE_K and PAIRS (0) as
 * those of forward do, and BLOCKS, the blocks that go over the keys together. It includes, after forward_template.h and this
 * file, backward_f32.h or backward_amx.h (operands, products and weights), and backward_row.h.
 */
#include "kernels/cpu/backward.h"
#include "src/philox.h"

/* Every lane sees every key of the tile and drops none, and no 0 meets NaN or infinity. */
static bool is_plain(const struct backward_block *b, const struct backward_tile *t) {
    return t->finite && b->finite && !t->drops && !t->hides &&
           !bounded(&b->rows, t->first_key, t->n);
}

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
