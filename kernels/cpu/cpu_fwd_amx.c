/*
 * bf16 by AMX tiles of 16 rows x 16 words. Both products take 2 x 2 tiles of sums (tiles 0-3), two tiles of the left
 * operand (4, 5) and two of the right one (6, 7): four tile products for four tile loads. Keys are tiles of 16 keys x
 * 32 d as they lie in memory; values are transposed once for all blocks of a task, to 16 d_v x 32 keys. Tile
 * registers cannot be moved to vectors, so scores and outputs go through the first-level cache.
 */
#define VEC_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16"
#include "kernels/cpu/vec_avx512.h"
#include "kernels/cpu/vec_bf16.h"

#define VECTORS 4
#define TILE_K 256
#define PAIRS 1
#define WORD_STEP 16
#define KEY_ROWS 16
#define KEY_STEP 32
#include "kernels/cpu/forward_template.h"

#include "kernels/cpu/forward_pairs.h"

enum { TILE_ROWS = 16, TILE_WORDS = 16 };

/* Every tile 16 rows of 64 bytes (Intel SDM, LDTILECFG). */
VEC_FN static void enter(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = TILE_ROWS;
    }
    _tile_loadconfig(&config);
}

VEC_FN static void leave(void) { _tile_release(); }

/* c[row][lane] += sum over `words` of a[row][word] . b[word][lane] for (16 or 32) x (16 or 32); c starts from 0 unless
 * `add`. Strides in words, b and c have LANES. */
VEC_INLINE void product(float *c, const float *a, int64_t a_stride, const float *b, int64_t words,
                        bool two_rows, bool two_columns, bool add) {
    const size_t stride = (size_t)a_stride * 4, lanes = LANES * 4;
    float *c1 = c + TILE_ROWS * LANES;
    if (add) {
        _tile_loadd(0, c, lanes);
        if (two_columns)
            _tile_loadd(1, c + 16, lanes);
        if (two_rows)
            _tile_loadd(2, c1, lanes);
        if (two_rows && two_columns)
            _tile_loadd(3, c1 + 16, lanes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t w = 0; w < words; w += TILE_WORDS) {
        _tile_loadd(4, a + w, stride);
        _tile_loadd(6, b + w * LANES, lanes);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) {
            _tile_loadd(7, b + w * LANES + 16, lanes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows) {
            _tile_loadd(5, a + TILE_ROWS * a_stride + w, stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (two_rows && two_columns)
            _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, lanes);
    if (two_columns)
        _tile_stored(1, c + 16, lanes);
    if (two_rows)
        _tile_stored(2, c1, lanes);
    if (two_rows && two_columns)
        _tile_stored(3, c1 + 16, lanes);
}

/* All rows (a multiple of 16) of c for the block's vectors. */
VEC_INLINE void product_rows(float *c, const float *a, int64_t a_stride, const float *b,
                             int64_t words, int64_t rows, int vectors, bool add) {
    for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS)
        for (int v = 0; v < vectors; v += 2) {
            float *to = c + r * LANES + v * 16;
            const float *left = a + r * a_stride, *right = b + v * 16;
            const bool two_rows = r + TILE_ROWS < rows, two_columns = v + 1 < vectors;
            if (two_rows && two_columns)
                product(to, left, a_stride, right, words, true, true, add);
            else
                product(to, left, a_stride, right, words, two_rows, two_columns, add);
        }
}

VEC_FN static void scores(float *s, const struct operand *key, const struct block *b, int32_t n,
                          int64_t dim) {
    product_rows(s, key->words, key->stride, b->query, padded((dim + 1) / 2, TILE_WORDS),
                 padded(n, TILE_ROWS), b->vectors, false);
}

VEC_FN static void accumulate(const struct block *b, const struct operand *value,
                              const float *weights, int32_t n, int64_t dim_v) {
    product_rows(b->output, value->words, value->stride, weights, padded(n, KEY_STEP) / 2,
                 padded(dim_v, TILE_ROWS), b->vectors, true);
}

/* to[d][j] = (value[2 j][d], value[2 j + 1][d]), zeros past the last key and the last d. */
VEC_FN static struct operand load_value(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                        enum dtype dtype) {
    (void)dtype;
    for (int32_t j = 0; j < n; j += KEY_STEP)
        for (int64_t d = 0; d < dim; d += VEC_LANES) {
            float words[VEC_LANES][VEC_LANES];
            const int64_t some = at_most(dim - d, VEC_LANES);
            for (int32_t r = 0; r < VEC_LANES; r++) {
                const int32_t even = j + 2 * r;
                vec pair = vec_set(0);
                if (even < n)
                    pair = pair_words(
                        (const uint16_t *)row_at(rows, even) + d,
                        even + 1 < n ? (const uint16_t *)row_at(rows, even + 1) + d : NULL, some);
                vec_store(words[r], pair);
            }
            vec_transpose(to + d * (TILE_K / 2) + j / 2, TILE_K / 2, words[0], VEC_LANES);
        }
    return (struct operand){to, TILE_K / 2};
}

#include "kernels/cpu/forward_row.h"

bool cpu_fwd_amx_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    return forward_plan(plan, p, &body);
}

int32_t cpu_fwd_amx_launch(const struct plan *plan, const struct problem *p,
                           const struct exec *exec) {
    return forward_launch(plan, p, exec, &body);
}
