/*
 * Few query rows by AMX tiles: keys and values of bf16, and of float8 that become bf16 on their way. All rows of a task share one tile,
 * so up to sixteen take no longer than one.
 *
 *     products[key][row]  += key[key][d]       * query[d][row]      keys as they lie, 16 rows of 32 elements
 *     output[row][d_v]    += weight[row][key]  * value[key][d_v]    values in words of two keys
 *
 * A piece is 32 keys or values x 64 elements, four tiles of bf16 in memory. While one is multiplied the next is loaded, into one
 * of two places: a tile register filled with what has just been stored waits for the stores, and more places would not stay in the
 * first-level cache. The rows of the next tile of keys are asked for beside all that, a few at a time.
 *
 * Weights are sums of two bf16 terms (vec_terms.h), queries that have scales of their own of three: what AMX loses is lost in sums.
 */
#define VEC_TARGET                                                                                 \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma,f16c,amx-tile,amx-bf16"
#include "kernels/cpu/x86_64/vec_avx512.h"

#include "kernels/cpu/x86_64/amx_tiles.h"
#include "kernels/cpu/x86_64/vec_bf16.h"
#include "kernels/cpu/x86_64/vec_terms.h"
#include "kernels/cpu/x86_64/vec_vbmi.h"

#include "kernels/cpu/decode_softmax.h"

enum {
    WIDTH = 64, /* elements of a piece's rows */
    PIECE = 4 * TILE,
    STEPS = DECODE_TILE_K / STEP,
    WEIGHT_TERMS = 2,
    WEIGHTS = STEPS * WEIGHT_TERMS * TILE, /* words */
    MOST_TERMS = 3,                        /* of a query */
    POINTS = 8                             /* of a piece's work, at which rows are asked for */
};

/* part->own. */
struct own {
    float *pieces;   /* two */
    float *products; /* [key of the tile][16 rows] */
    float *weights;  /* [step][term], tiles of 16 rows x 32 keys */
    float *query;    /* [half of a piece][term], tiles of 32 d x 16 rows */
};

static size_t lay_out(struct own *own, void *base, int64_t dim_qk) {
    uintptr_t at = (uintptr_t)base;
    own->pieces = carve(&at, 2 * PIECE * 4);
    own->products = carve(&at, DECODE_TILE_K * ROWS * 4);
    own->weights = carve(&at, WEIGHTS * 4);
    own->query = carve(&at, padded_dim(dim_qk) / STEP * MOST_TERMS * TILE * 4);
    return at - (uintptr_t)base;
}

static struct own own_of(const struct part *part) {
    struct own own;
    lay_out(&own, part->own, part->dim_qk);
    return own;
}

static size_t body_bytes(const struct problem *p) {
    struct own own;
    return lay_out(&own, NULL, p->dim_qk);
}

static int query_terms(const struct part *part) { return part->query_is_bf16 ? 1 : MOST_TERMS; }

/* Of so many keys, the last one perhaps not whole. */
static int32_t steps_of(int32_t keys) { return (keys + STEP - 1) / STEP; }

/* ---- Pieces ----------------------------------------------------------------------------------------------------- */

/* What is asked for of the next tile, so many groups at each point. */
struct fetching {
    struct fetch_groups keys, values;
    int32_t share;
};

static struct fetching start_fetching(const struct part *part, const struct part_tile *tile) {
    const int64_t dims = padded_dim(part->dim_qk) + padded_dim(part->dim_v);
    const int32_t points = POINTS * steps_of(tile->n) * (int32_t)(dims / WIDTH);
    return (struct fetching){tile->keys, tile->values,
                             ((int32_t)most(tile->keys.groups, tile->values.groups) + points - 1) /
                                 points};
}

VEC_INLINE void fetch_share(struct fetching *f) {
#pragma clang loop unroll(disable)
    for (int32_t i = 0; i < f->share; i++) {
        fetch_next(&f->keys);
        fetch_next(&f->values);
    }
}

/* Rows of a tile that has n; the last one stands in for those past the end, whose weights are 0. */
struct tile_rows {
    struct rows rows;
    int32_t n;
};

/* found[i], i < count: byte `offset` of row first + i * step. Where rows lie a stride apart no address goes through memory. */
VEC_INLINE void find_rows(const char **found, const struct tile_rows *of, int32_t first, int step,
                          int count, int64_t offset) {
    const struct rows *rows = &of->rows;
    if (__builtin_expect(rows->rows != NULL || first + step * (count - 1) >= of->n, false)) {
        for (int i = 0; i < count; i++)
            found[i] = (const char *)row_at(rows, at_most(first + i * step, of->n - 1)) + offset;
        return;
    }
    const char *const at = rows->data + first * rows->stride + offset;
#pragma clang loop unroll(full)
    for (int i = 0; i < count; i++)
        found[i] = at + i * step * rows->stride;
}

/* Those of elements [d, d + WIDTH) that a row of dim has. */
static inline uint64_t present(int64_t d, int64_t dim) {
    const int64_t n = most(dim - d, 0);
    return n >= WIDTH ? UINT64_MAX : (UINT64_C(1) << n) - 1;
}

/* Elements d and on of 32 keys: tiles [16 keys][half]. Of float8, with a table, the halves are what vec_bf16_of_codes() makes. */
VEC_INLINE void load_keys(float *piece, const struct tile_rows *keys, int32_t first, int64_t d,
                          uint64_t some, const struct float8_codes *codes, struct fetching *f) {
#pragma clang loop unroll(disable)
    for (int r = 0; r < STEP; r += 8) {
        float *line = piece + r / ROWS * 2 * TILE + r % ROWS * PAIRS;
        const char *key[8];
        find_rows(key, keys, first + r, 1, 8, codes ? d : d * 2);
#pragma clang loop unroll(full)
        for (int i = 0; i < 8; i++) {
            __m512i words[2];
            if (codes) {
                vec_bf16_of_codes(words, _mm512_maskz_loadu_epi8(some, key[i]), codes);
            } else {
                words[0] = _mm512_maskz_loadu_epi16((__mmask32)some, key[i]);
                words[1] = _mm512_maskz_loadu_epi16((__mmask32)(some >> 32), key[i] + 64);
            }
            _mm512_storeu_si512(line + i * PAIRS, words[0]);
            _mm512_storeu_si512(line + i * PAIRS + TILE, words[1]);
        }
        fetch_share(f);
    }
}

/* Column of the output at which value element d stands: of each 16 bytes of a row, a tile has four elements. */
static inline int64_t column_of(int64_t d, enum dtype dtype) {
    const int64_t lane = dtype == DTYPE_BF16 ? 8 : 16, block = 4 * lane;
    return d / block * block + d % lane / 4 * 16 + d % block / lane * 4 + d % 4;
}

/* The same of values: tiles of 16 columns in the order of column_of(). Word i is of key i % 4 * 4 + i / 4
 * and the one 16 keys on, which is how turn() leaves weights. */
VEC_INLINE void load_values(float *piece, const struct tile_rows *values, int32_t first, int64_t d,
                            uint64_t some, const struct float8_codes *codes, struct fetching *f) {
#pragma clang loop unroll(disable)
    for (int i = 0; i < PAIRS; i += 4) {
        const char *found[8];
        find_rows(found, values, first + i / 4, 4, 8, codes ? d : d * 2);
#pragma clang loop unroll(full)
        for (int n = 0; n < 4; n++) {
            const char *even = found[n], *odd = found[n + 4];
            __m512i words[4];
            if (codes) {
                const __m512i a = _mm512_maskz_loadu_epi8(some, even),
                              b = _mm512_maskz_loadu_epi8(some, odd);
                vec_bf16_of_codes(words, _mm512_unpacklo_epi8(a, b), codes);
                vec_bf16_of_codes(words + 2, _mm512_unpackhi_epi8(a, b), codes);
            } else {
#pragma clang loop unroll(full)
                for (int h = 0; h < 2; h++) {
                    const __mmask32 half = (__mmask32)(some >> 32 * h);
                    const __m512i a = _mm512_maskz_loadu_epi16(half, even + h * 64),
                                  b = _mm512_maskz_loadu_epi16(half, odd + h * 64);
                    words[2 * h] = _mm512_unpacklo_epi16(a, b);
                    words[2 * h + 1] = _mm512_unpackhi_epi16(a, b);
                }
            }
#pragma clang loop unroll(full)
            for (int t = 0; t < 4; t++)
                _mm512_storeu_si512(piece + t * TILE + (i + n) * PAIRS, words[t]);
        }
        fetch_share(f);
    }
}

/* ---- Scores ----------------------------------------------------------------------------------------------------- */

/* Of a piece's 32 keys; `query` has its two halves. Sums begin with the first piece of the keys and are stored after the last. */
VEC_INLINE void multiply_keys(float *products, const float *piece, const float *query, int terms,
                              bool first, bool last, struct fetching *f) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int half = 0; half < 2; half++) {
        _tile_loadd(2, piece + half * TILE, 64);
        _tile_loadd(3, piece + (2 + half) * TILE, 64);
        for (int t = 0; t < terms; t++, query += TILE) {
            _tile_loadd(4, query, 64);
            _tile_dpbf16ps(0, 2, 4);
            _tile_dpbf16ps(1, 3, 4);
        }
        fetch_share(f);
        fetch_share(f);
    }
    if (last) {
        _tile_stored(0, products, 64);
        _tile_stored(1, products + ROWS * ROWS, 64);
    }
}

VEC_INLINE void multiply_tile(const struct part *part, const struct part_tile *tile,
                              struct fetching *f, const struct float8_codes *codes, int terms) {
    const struct own own = own_of(part);
    const struct tile_rows keys = {tile->key, tile->n};
    const int32_t widths = (int32_t)(padded_dim(part->dim_qk) / WIDTH),
                  pieces = steps_of(tile->n) * widths;
    for (int32_t i = 0; i <= pieces; i++) {
        if (i < pieces) {
            const int64_t d = i % widths * WIDTH;
            load_keys(own.pieces + i % 2 * PIECE, &keys, i / widths * STEP, d,
                      present(d, part->dim_qk), codes, f);
        }
        if (i > 0) {
            const int32_t step = (i - 1) / widths, w = (i - 1) % widths;
            multiply_keys(own.products + step * STEP * ROWS, own.pieces + (i - 1) % 2 * PIECE,
                          own.query + w * 2 * terms * TILE, terms, w == 0, w == widths - 1, f);
        }
    }
}

/* Products in the order of scores. */
VEC_FN static void spread_products(const struct part *part, int32_t n) {
    const float *products = own_of(part).products;
    for (int32_t row = 0; row < part->rows; row += ROW_GROUP)
        for (int32_t j = 0; j < n; j += KEYS(ROW_GROUP))
            vec_store(part->scores + score_index(row, j, part->rows),
                      vec_load_quarters(products + j * ROWS + row, ROWS));
}

/* ---- Values ----------------------------------------------------------------------------------------------------- */

/* to[row] = that row's of 16 keys' weights, [key][row]: key i % 4 * 4 + i / 4 in lane i. */
VEC_INLINE void turn(vec to[ROW_GROUP], const float *from) {
    const __m512 a = vec_load(from), b = vec_load(from + 16), c = vec_load(from + 32),
                 d = vec_load(from + 48);
    const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
                  low2 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
                  high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)),
                  high2 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    to[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low2));
    to[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low2));
    to[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high2));
    to[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, high2));
}

/* Weights of ROW_GROUP rows from `row` on, n keys, as tiles. */
VEC_INLINE void turn_weights(const struct part *part, int32_t row, int32_t n) {
    float *s = part->scores + score_index(row, 0, part->rows);
    float *to = own_of(part).weights + row * PAIRS;
    for (int32_t j = (int32_t)round_up(n, ROW_GROUP); j < DECODE_TILE_K; j += ROW_GROUP)
        vec_store(s + j * ROW_GROUP, vec_set(0));
    for (int32_t j = 0; j < n; j += STEP, to += WEIGHT_TERMS * TILE) {
        vec even[ROW_GROUP], odd[ROW_GROUP], words[WEIGHT_TERMS];
        turn(even, s + j * ROW_GROUP);
        turn(odd, s + (j + PAIRS) * ROW_GROUP);
#pragma clang loop unroll(full)
        for (int r = 0; r < ROW_GROUP; r++) {
            pair_terms(words, even[r], odd[r], WEIGHT_TERMS);
            vec_store(to + r * PAIRS, words[0]);
            vec_store(to + TILE + r * PAIRS, words[1]);
        }
    }
}

/* 64 columns of the output += weights of a step x a piece of its values. */
VEC_INLINE void multiply_values(float *output, int64_t stride, const float *weights,
                                const float *piece, bool first, bool last, struct fetching *f) {
    const size_t bytes = (size_t)stride * 4;
    if (first) {
        _tile_loadd(0, output, bytes);
        _tile_loadd(1, output + 16, bytes);
        _tile_loadd(2, output + 32, bytes);
        _tile_loadd(3, output + 48, bytes);
    }
    _tile_loadd(4, weights, 64);
    _tile_loadd(5, weights + TILE, 64);
#define MULTIPLY(sum, value)                                                                       \
    _tile_loadd(value, piece + (sum) * TILE, 64);                                                  \
    _tile_dpbf16ps(sum, 4, value);                                                                 \
    _tile_dpbf16ps(sum, 5, value);                                                                 \
    fetch_share(f)
    MULTIPLY(0, 6);
    MULTIPLY(1, 7);
    MULTIPLY(2, 6);
    MULTIPLY(3, 7);
#undef MULTIPLY
    if (last) {
        _tile_stored(0, output, bytes);
        _tile_stored(1, output + 16, bytes);
        _tile_stored(2, output + 32, bytes);
        _tile_stored(3, output + 48, bytes);
    }
}

/* Softmax waits for the last products of keys; this does not. */
VEC_INLINE void load_first_values(const struct part *part, const struct part_tile *tile,
                                  struct fetching *f, const struct float8_codes *codes) {
    const struct tile_rows values = {tile->value, tile->n};
    load_values(own_of(part).pieces, &values, 0, 0, present(0, part->dim_v), codes, f);
}

VEC_INLINE void add_tile(const struct part *part, const struct part_tile *tile, struct fetching *f,
                         const struct float8_codes *codes) {
    const struct own own = own_of(part);
    const struct tile_rows values = {tile->value, tile->n};
    const int32_t steps = steps_of(tile->n),
                  pieces = (int32_t)(padded_dim(part->dim_v) / WIDTH) * steps;
    for (int32_t i = 1; i <= pieces; i++) {
        if (i < pieces) {
            const int64_t d = i / steps * WIDTH;
            load_values(own.pieces + i % 2 * PIECE, &values, i % steps * STEP, d,
                        present(d, part->dim_v), codes, f);
        }
        const int32_t step = (i - 1) % steps;
        multiply_values(part->output + (i - 1) / steps * WIDTH, padded_dim(part->dim_v),
                        own.weights + step * WEIGHT_TERMS * TILE, own.pieces + (i - 1) % 2 * PIECE,
                        step == 0, step == steps - 1, f);
    }
}

/* ---- A part and a tile of keys ---------------------------------------------------------------------------------- */

static const struct float8_table e5m2_table = TABLE(BF16_OF_E5M2);

/* FUNCTION(..., codes) of a dtype that is bf16 or float8. */
#define WITH_CODES(dtype, FUNCTION, ...)                                                           \
    do {                                                                                           \
        if ((dtype) == DTYPE_BF16) {                                                               \
            FUNCTION(__VA_ARGS__, NULL);                                                           \
        } else {                                                                                   \
            const struct float8_codes codes =                                                      \
                vec_load_codes((dtype) == DTYPE_E4M3 ? &e4m3_table : &e5m2_table);                 \
            FUNCTION(__VA_ARGS__, &codes);                                                         \
        }                                                                                          \
    } while (0)

VEC_INLINE void multiply_terms(const struct part *part, const struct part_tile *tile,
                               struct fetching *f, const struct float8_codes *codes) {
    if (query_terms(part) == 1)
        multiply_tile(part, tile, f, codes, 1);
    else
        multiply_tile(part, tile, f, codes, MOST_TERMS);
}

VEC_FN static void attend(const struct part *part, struct part_tile *tile) {
    const int64_t stride = padded_dim(part->dim_v);
    struct fetching f = start_fetching(part, tile);
    WITH_CODES(part->key_dtype, multiply_terms, part, tile, &f);
    WITH_CODES(part->value_dtype, load_first_values, part, tile, &f);
    spread_products(part, tile->n);
    for (int32_t row = 0; row < part->rows; row += ROW_GROUP) {
        weigh_rows(part, row, part->output + row * stride, stride, tile, ROW_GROUP);
        turn_weights(part, row, tile->n);
    }
    WITH_CODES(part->value_dtype, add_tile, part, tile, &f);
}

/* Elements [0, 32) of a piece's half, of 64 words in order: as load_keys() leaves them. */
VEC_INLINE vec half_of(vec first, vec second, int half, enum dtype key) {
    if (!dtype_is_float8(key))
        return half ? second : first;
    uint16_t from[STEP];
#pragma clang loop unroll(full)
    for (int w = 0; w < STEP; w++)
        from[w] = (uint16_t)(w / 8 * 16 + half * 8 + w % 8);
    return _mm512_castsi512_ps(_mm512_permutex2var_epi16(
        _mm512_castps_si512(first), _mm512_loadu_si512(from), _mm512_castps_si512(second)));
}

VEC_INLINE void pack_query(const struct part *part, int terms) {
    const int64_t stride = padded_dim(part->dim_qk);
    const struct own own = own_of(part);
    for (int64_t d = 0; d < stride; d += WIDTH)
        for (int half = 0; half < 2; half++) {
            float words[MOST_TERMS][TILE] = {{0}};
            for (int32_t r = 0; r < part->rows; r++) {
                const float *q = part->query + r * stride + d;
                vec first[MOST_TERMS], second[MOST_TERMS];
                row_terms(first, vec_load(q), vec_load(q + 16), terms);
                row_terms(second, vec_load(q + 32), vec_load(q + 48), terms);
                for (int t = 0; t < terms; t++)
                    vec_store(words[t] + r * PAIRS,
                              half_of(first[t], second[t], half, part->key_dtype));
            }
            for (int t = 0; t < terms; t++)
                vec_transpose(own.query + ((d / STEP + half) * terms + t) * TILE, PAIRS, words[t],
                              PAIRS);
        }
}

VEC_FN static void start(const struct part *part) {
    memset(own_of(part).weights, 0, WEIGHTS * sizeof(float));
    if (query_terms(part) == 1)
        pack_query(part, 1);
    else
        pack_query(part, MOST_TERMS);
}

VEC_FN static void widen_query(float *to, const char *from, int64_t n, enum dtype dtype,
                               enum dtype key) {
    (void)key;
    widen(to, from, n, dtype);
}

VEC_FN static void narrow_output(char *to, const float *from, int64_t n, enum dtype dtype,
                                 enum dtype value) {
    for (int64_t d = 0; d < n; d += WIDTH) {
        const int64_t some = at_most(n - d, WIDTH);
        float row[WIDTH];
        for (int64_t i = 0; i < some; i++)
            row[i] = from[column_of(d + i, value)];
        narrow(to + d * dtype_bytes(dtype), row, some, dtype);
    }
}

static const struct decode_body body = {.lanes = VEC_LANES,
                                        .least_rows = ROW_GROUP,
                                        .output_rows = ROWS,
                                        .fetches_tiles = true,
                                        .body_bytes = body_bytes,
                                        .enter = enter,
                                        .leave = leave,
                                        .start = start,
                                        .widen = widen_query,
                                        .narrow = narrow_output,
                                        .load_extra_row = load_extra_row,
                                        .attend = attend};

ROW_FUNCTIONS(cpu_decode_amx);

/* Short calls are as fast by FMA, without the transposition of queries, and so are up to four rows unless there is e4m3 to widen. */
static bool faster_than_fma(const struct problem *p) {
    const int64_t rows = p->len_q * group_of(p);
    return p->len_k >= 1024 &&
           (rows > ROW_GROUP || (rows > 1 && p->dim_qk % WIDTH == 0 && p->dim_v % WIDTH == 0 &&
                                 (p->key.dtype == DTYPE_E4M3 || p->value.dtype == DTYPE_E4M3)));
}

bool cpu_decode_amx_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    return p->query.dtype == DTYPE_BF16 && (p->kernel || faster_than_fma(p)) &&
           decode_plan(plan, p, caps, &body);
}

int32_t cpu_decode_amx_launch(const struct plan *plan, const struct problem *p,
                              const struct exec *exec) {
    return decode_launch(plan, p, exec, &body);
}
