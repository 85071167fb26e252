/*
 * The driver of every cpu_bwd row.
 *
 * A task is (batch, kv head, run): rows of the head's group go over the keys a few blocks at a time, and each run has every
 * second such set of blocks, or third, so that causal runs are alike. A task owns the gradient of its rows, and sums of the
 * gradients of all keys and values; who finishes the last run of a head adds those of its runs up, in their order. Runs, blocks
 * and tiles depend on the shape alone, and so do the bits. Gradients of a bias, whose axes may be summed over in any way, are
 * tasks of a second pass: each owns a part of the bias and makes the gradients of its logits again, from what the first pass
 * has found out about each row.
 */
#include "kernels/cpu/backward.h"
#include "src/element.h"

#include <math.h>
#include <stdatomic.h>

enum {
    TASKS = 16,       /* to be shared by threads, where there are rows for so many */
    LEAST_SETS = 2,   /* of blocks of a task */
    KEPT_TILES = 256, /* whose weights a worker keeps; those of further ones are computed twice */
    BIAS_TILES = 8,   /* of a task of the second pass */
    MOST_TILE_K = 64,
    FETCH_BYTES = 1024, /* that are asked for at a time */
    FETCHED_KEYS = 512, /* whose gradients are asked for beforehand */
};
#define LARGEST_LSE                                                                                \
    0x1p10f /* that rounding leaves accurate enough for one walk: to 2^-14 of the weights */
#define MOST_SUM_BYTES (INT64_C(128) << 20) /* of runs beyond the first of each head */

/* What a row's weights are relative to, maximum or, with one walk, lse, and what its logits' gradients need besides: for the
 * second pass. */
struct row_stats {
    float base, inverse, delta;
};

/* Of the rows of one task and one head. */
struct head_sums {
    double distances, sinks;
};

struct call {
    const struct backward_body *body;
    const struct problem *p;
    char *workspace; /* of the workers */
    size_t worker_bytes;
    int64_t runs; /* of blocks of a kv head of one batch */
    int64_t tasks;
    float *sums; /* [batch][kv head][run] of run_sums, where there are several runs */
    bool *touched;
    struct head_sums *of_heads; /* [batch][head][run] */
    struct row_stats *stats;    /* [batch][head][row]; NULL without a second pass */
    _Atomic int32_t *finished;  /* [batch][kv head] runs */
    _Atomic int64_t next_task;
    _Atomic bool refused; /* another row has to compute the call */
};

/* Gradients of the keys and values of a head, so far: of each tile panels of keys, then of values. A tile that was not touched
 * holds nothing yet. */
struct run_sums {
    float *sums;
    bool *touched;
};

/* One worker's share of the workspace. */
struct scratch {
    struct backward_block *blocks;                 /* of a set */
    float *weights, *d_weights, *cap_slopes, *max; /* of the tiles that are kept, and of one more */
    float *keep, *extra;
    float *packed;                 /* weights or their gradients on their way into a product */
    float *key, *value;            /* the keys of a head as operands */
    char *dense_key, *dense_value; /* copies of what has an inner stride other than 1 */
    bool *finite;                  /* of each tile of keys */
    float *sums;                   /* of a task, where it is the only run of its head */
    bool *touched;
    float *rows; /* one block, row-major: on the way in or out */
    char *dense_rows;
    float *bias;       /* sums of a task of the second pass, [key][lane] */
    char **d_query;    /* the rows of a set */
    struct fetch next; /* gradients that are written soon */
};

/* ---- Layout of the workspace ------------------------------------------------------------------- */

static int64_t panels(const struct backward_body *body, int64_t dim) {
    return (dim + body->lanes - 1) / body->lanes;
}

static int64_t tiles_of(const struct backward_body *body, const struct problem *p) {
    return (p->len_k + body->tile_k - 1) / body->tile_k;
}

/* Floats of a tile of run_sums. */
static int64_t tile_sums(const struct backward_body *body, const struct problem *p) {
    return (panels(body, p->dim_qk) + panels(body, p->dim_v)) * body->tile_k * body->lanes;
}

static int64_t sum_floats(const struct backward_body *body, const struct problem *p) {
    return tiles_of(body, p) * tile_sums(body, p);
}

static int64_t kept_tiles(const struct backward_body *body, const struct problem *p) {
    return body->one_walk ? 0 : least(KEPT_TILES, tiles_of(body, p));
}

/* More runs than one for a head cost memory and time. */
static int64_t count_runs(const struct backward_body *body, const struct problem *p) {
    const int64_t heads = most(1, p->batch * p->heads_kv), set = body->blocks * body->lanes,
                  sets = (p->len_q * group_of(p) + set - 1) / set,
                  bytes = most(1, heads * sum_floats(body, p) * 4);
    const int64_t runs = least((TASKS + heads - 1) / heads, MOST_SUM_BYTES / bytes);
    return most(1, least(runs, sets / LEAST_SETS));
}

/* `b` NULL: only measures. */
static void lay_out_block(struct backward_block *b, uintptr_t *at, const struct backward_body *body,
                          const struct problem *p) {
    const int64_t lanes = body->lanes, row = lanes * 4;
    float *query = carve(at, round_up(p->dim_qk, body->step) * row * body->terms),
          *d_query = carve(at, round_up(p->dim_qk, 16) * row),
          *d_output = carve(at, round_up(p->dim_v, body->step) * row * body->terms),
          *query_rows = carve(at, panels(body, p->dim_qk) * lanes * row * body->terms),
          *d_output_rows = carve(at, panels(body, p->dim_v) * lanes * row * body->terms);
    if (!b)
        return;
    b->rows.query = query;
    b->rows.output = d_query;
    b->d_output = d_output;
    b->query_rows = query_rows;
    b->d_output_rows = d_output_rows;
}

/* Whether a body may want its own copy of rows of keys or values. */
static bool is_packed(const struct view *v, int64_t dim) {
    return v->dtype != DTYPE_F32 || (is_dense(v, dim) && v->stride[2] != dim);
}

/* Lays a worker's scratch out from `base` (NULL to measure) and returns its bytes. */
static size_t lay_out(struct scratch *w, char *base, const struct backward_body *body,
                      const struct problem *p, bool own_sums) {
    const int64_t lanes = body->lanes, tile = body->tile_k * lanes * 4,
                  tiles = (kept_tiles(body, p) + 1) * body->blocks, keys = p->len_k,
                  key_row = round_up(keys, body->tile_k) * 4 * body->terms;
    const int64_t dim_qk = round_up(p->dim_qk, 16), dim_v = round_up(p->dim_v, 16);
    const bool extra = p->features & (DLATTN_FEATURE_BIAS | DLATTN_FEATURE_MASK |
                                      DLATTN_FEATURE_SEGMENTS | DLATTN_FEATURE_BLOCK_MASK);
    uintptr_t at = (uintptr_t)base;
    w->blocks = carve(&at, body->blocks * (int64_t)sizeof *w->blocks);
    w->weights = carve(&at, tiles * tile);
    w->d_weights = carve(&at, tiles * tile);
    w->cap_slopes = carve(&at, p->softcap > 0 ? tiles * tile : 0);
    w->max = carve(&at, tiles * lanes * 4);
    w->keep = carve(&at, p->dropout_probability > 0 ? tile : 0);
    w->extra = carve(&at, extra ? tile : 0);
    w->packed = carve(&at, body->packed_bytes);
    w->key =
        carve(&at, is_packed(&p->key, p->dim_qk) ? key_row * round_up(p->dim_qk, body->step) : 0);
    w->value =
        carve(&at, is_packed(&p->value, p->dim_v) ? key_row * round_up(p->dim_v, body->step) : 0);
    w->dense_key = carve(&at, copy_bytes(&p->key, keys, p->dim_qk));
    w->dense_value = carve(&at, copy_bytes(&p->value, keys, p->dim_v));
    w->finite = carve(&at, tiles_of(body, p));
    w->sums = carve(&at, own_sums ? sum_floats(body, p) * 4 : 0);
    w->touched = carve(&at, own_sums ? tiles_of(body, p) : 0);
    w->rows = carve(&at, lanes * most(most(dim_qk, dim_v), body->tile_k + 16) * 4);
    w->dense_rows = carve(&at, lanes * most(p->dim_qk, p->dim_v) * 4);
    w->bias = carve(&at, p->features & DLATTN_FEATURE_BIAS ? BIAS_TILES * tile : 0);
    w->d_query = carve(&at, body->blocks * lanes * (int64_t)sizeof *w->d_query);
    w->next = (struct fetch){.end = 0};
    for (int32_t n = 0; n < body->blocks; n++)
        lay_out_block(base ? &w->blocks[n] : NULL, &at, body, p);
    return at - (uintptr_t)base;
}

/* Lays out what all workers share, and returns its bytes. */
static size_t lay_out_call(struct call *c, char *base) {
    const struct problem *p = c->p;
    const int64_t heads = p->batch * p->heads_q, kv_heads = p->batch * p->heads_kv;
    uintptr_t at = (uintptr_t)base;
    c->runs = count_runs(c->body, p);
    c->tasks = kv_heads * c->runs;
    c->finished = carve(&at, kv_heads * (int64_t)sizeof *c->finished);
    c->of_heads = carve(&at, heads * c->runs * (int64_t)sizeof *c->of_heads);
    c->stats = carve(
        &at, p->features & DLATTN_FEATURE_BIAS ? heads * p->len_q * (int64_t)sizeof *c->stats : 0);
    c->sums = carve(&at, c->runs > 1 ? c->tasks * sum_floats(c->body, p) * 4 : 0);
    c->touched = carve(&at, c->runs > 1 ? c->tasks * tiles_of(c->body, p) : 0);
    return at - (uintptr_t)base;
}

/* ---- Blocks ------------------------------------------------------------------------------------ */

/* Keys and values of one head as operands, from key `first` on. */
struct keys {
    struct operand key, value;
    int64_t first;
    bool finite;
};

static struct rows rows_of(const struct call *c, const struct view *v, const struct task *t,
                           int64_t first, int32_t n, int64_t dim, char *dense) {
    const struct problem *p = c->p;
    const int64_t kv_head = t->first_head / group_of(p);
    const struct rows rows = kv_rows(p, v, &t->s, t->b, kv_head, first, n, NULL);
    return dense_rows(&rows, n, dim, v, p->dtype, dense);
}

/* Keys [first, first + n) of the task's kv head. */
static struct keys load_keys(const struct call *c, const struct task *t, int64_t first, int32_t n,
                             struct scratch *w) {
    const struct problem *p = c->p;
    const int32_t tile_k = c->body->tile_k;
    struct keys k = {.first = first, .finite = true};
    if (n <= 0)
        return k;
    const struct rows key = rows_of(c, &p->key, t, first, n, p->dim_qk, w->dense_key),
                      value = rows_of(c, &p->value, t, first, n, p->dim_v, w->dense_value);
    k.key = c->body->load_key(w->key, &key, n, p->dim_qk, p->dtype);
    k.value = c->body->load_value(w->value, &value, n, p->dim_v, p->dtype);
    for (int32_t at = 0; at < n; at += tile_k) {
        const struct operand some = {k.key.words + at * k.key.stride, k.key.stride};
        w->finite[at / tile_k] = c->body->finite(&some, (int32_t)least(tile_k, n - at), p->dim_qk);
        k.finite &= w->finite[at / tile_k];
    }
    return k;
}

/* Packs the rows of a tensor that is shaped as query or output, for those rows that see a key. */
static bool pack_rows(const struct call *c, const struct task *t, const struct view *v, int64_t dim,
                      const struct backward_block *block, float *transposed, float *in_panels,
                      struct scratch *w) {
    const struct block *b = &block->rows;
    char *strided[MAX_LANES];
    const char *rows[MAX_LANES];
    point_at_rows(strided, v, t, block->first_row, b->rows);
    const struct rows all = {.rows = (const char *const *)strided},
                      dense = dense_rows(&all, b->rows, dim, v, v->dtype, w->dense_rows);
    for (int32_t lane = 0; lane < b->rows; lane++)
        rows[lane] = b->lo[lane] < b->hi[lane] ? row_at(&dense, lane) : NULL;
    return c->body->pack(b, transposed, in_panels, rows, dim, v->dtype, w->rows);
}

/* The block of rows [first_row, first_row + count) of the task. */
static void pack_block(const struct call *c, const struct task *t, struct backward_block *b,
                       int64_t first_row, int32_t count, struct scratch *w) {
    const struct problem *p = c->p;
    start_block(&b->rows, t, first_row, count, c->body->vector_lanes);
    b->first_row = first_row;
    b->finite = true;
    for (int32_t lane = 0; lane < c->body->lanes; lane++)
        b->delta[lane] = b->inverse[lane] = b->distances[lane] = 0;
    if (b->rows.first >= b->rows.end)
        return;
    b->finite = pack_rows(c, t, &p->query, p->dim_qk, b, b->rows.query, b->query_rows, w);
    b->finite &= pack_rows(c, t, &p->d_output, p->dim_v, b, b->d_output, b->d_output_rows, w);
}

/* ---- Tiles ------------------------------------------------------------------------------------- */

static const float *load_extra(const struct call *c, const struct task *t,
                               const struct backward_block *b, const struct backward_tile *tile,
                               struct scratch *w) {
    struct extra_row rows[MAX_LANES];
    struct lane_masks masks;
    if (!tile->hides)
        return NULL;
    find_masks(&masks, t, &b->rows, b->first_row);
    const struct extra_layout layout = find_extra(rows, t, &b->rows, b->first_row);
    c->body->load_extra(w->extra, rows, &layout, &masks, &b->rows, tile->first_key, tile->n,
                        w->rows);
    return w->extra;
}

static const float *draw(const struct call *c, const struct task *t, const struct backward_block *b,
                         const struct backward_tile *tile, struct scratch *w) {
    struct dropout dropout;
    if (!tile->drops)
        return NULL;
    find_dropout(&dropout, t, &b->rows, b->first_row, tile->factor);
    c->body->draw(w->keep, &dropout, &b->rows, tile->first_key, tile->n);
    return w->keep;
}

/* The tile of keys from first_key on, in slot `slot` of what is kept. */
static struct backward_tile tile_at(const struct call *c, const struct keys *k, int64_t first_key,
                                    int64_t end, int64_t slot, struct scratch *w) {
    const struct problem *p = c->p;
    const int32_t lanes = c->body->lanes, tile_k = c->body->tile_k;
    const int64_t at = first_key - k->first, words = slot * tile_k * lanes;
    return (struct backward_tile){
        .key = {k->key.words + at * k->key.stride, k->key.stride},
        .value = {k->value.words + at * k->value.stride, k->value.stride},
        .first_key = first_key,
        .n = (int32_t)least(tile_k, end - first_key),
        .dim_qk = p->dim_qk,
        .dim_v = p->dim_v,
        .scale = score_scale(p),
        .factor = kept_factor(p),
        .hides = p->bias.data || has_mask(p),
        .drops = p->dropout_probability > 0,
        .d_logits = p->d_alibi_slopes.data || p->d_bias.data,
        .finite = w->finite[at / tile_k],
        .weights = w->weights + words,
        .d_weights = w->d_weights + words,
        .max = w->max + slot * lanes,
        .cap_slopes = p->softcap > 0 ? w->cap_slopes + words : NULL,
        .packed = w->packed,
        .next = &w->next,
    };
}

static void weigh(const struct call *c, const struct task *t, struct backward_block *b,
                  struct backward_tile *tile, struct scratch *w) {
    const struct problem *p = c->p;
    struct logit_rule rule;
    if (needs_rule(p)) {
        rule = (struct logit_rule){
            .scale = (float)p->scale,
            .softcap = (float)p->softcap,
            .alibi = p->alibi_slopes.data != NULL,
            .extra = load_extra(c, t, b, tile, w),
        };
        tile->rule = &rule;
    }
    tile->keep = draw(c, t, b, tile, w);
    c->body->weigh(b, tile);
    tile->rule = NULL;
}

/* The same once the statistics of the rows are known. */
static void weigh_again(const struct call *c, const struct task *t, struct backward_block *b,
                        struct backward_tile *tile, struct scratch *w) {
    float delta[MAX_LANES];
    memcpy(delta, b->delta, sizeof delta);
    weigh(c, t, b, tile, w);
    memcpy(b->delta, delta, sizeof delta);
}

static void refuse(struct call *c) {
    atomic_store_explicit(&c->refused, true, memory_order_relaxed);
}

/* ---- The first pass ---------------------------------------------------------------------------- */

static int64_t head_index(const struct problem *p, int64_t b, int64_t h) {
    return b * p->heads_q + h;
}

/* Of lse or d_lse; 0 without it. */
static float of_row(const struct view *v, const struct task *t, const struct query_row *row) {
    if (!v->data)
        return 0;
    return (float)load_element(v->data, v->dtype,
                               t->b * v->stride[0] + row->h * v->stride[1] +
                                   (t->s.q_start + row->i) * v->stride[2]);
}

static void add_sink(struct call *c, const struct task *t, const struct query_row *row, int64_t run,
                     double weight, float delta) {
    c->of_heads[head_index(c->p, t->b, row->h) * c->runs + run].sinks -= weight * (double)delta;
}

static void keep_stats(struct call *c, const struct task *t, const struct query_row *row,
                       float base, float inverse, float delta) {
    if (c->stats)
        c->stats[head_index(c->p, t->b, row->h) * c->p->len_q + row->i] =
            (struct row_stats){base, inverse, delta};
}

/* The weights of a block's rows have added up: their sums with the sink, and delta. */
static void end_rows(struct call *c, const struct task *t, struct backward_block *b, int64_t run) {
    const struct problem *p = c->p;
    struct query_row row = query_row_at(t, b->first_row);
    for (int32_t lane = 0; lane < b->rows.rows; lane++, next_query_row(t, &row)) {
        const struct row_total total = row_total_of(p, row.h, b->rows.max[lane], b->rows.sum[lane]);
        if (row_overflowed(p, &t->s, row.i, b->rows.max[lane], b->rows.sum[lane]))
            refuse(c);
        b->inverse[lane] = total.sum == 0 ? 0 : total.shrink / total.sum;
        b->delta[lane] = b->delta[lane] * b->inverse[lane] - of_row(&p->d_lse, t, &row);
        if (total.sink != 0)
            add_sink(c, t, &row, run, (double)total.sink / (double)total.sum, b->delta[lane]);
        keep_stats(c, t, &row, b->rows.max[lane], b->inverse[lane], b->delta[lane]);
    }
}

static float dot_of(const struct call *c, const char *x, const struct view *of_x, const char *y,
                    const struct view *of_y, int64_t n) {
    if (is_dense(of_x, n) && is_dense(of_y, n))
        return c->body->dot(x, of_x->dtype, y, of_y->dtype, n);
    double sum = 0;
    for (int64_t d = 0; d < n; d++)
        sum += load_element(x, of_x->dtype, d * of_x->stride[3]) *
               load_element(y, of_y->dtype, d * of_y->stride[3]);
    return (float)sum;
}

/* The same from lse and output, before the only walk. */
static void start_rows(struct call *c, const struct task *t, struct backward_block *b,
                       int64_t run) {
    const struct problem *p = c->p;
    char *output[MAX_LANES], *d_output[MAX_LANES];
    point_at_rows(output, &p->output, t, b->first_row, b->rows.rows);
    point_at_rows(d_output, &p->d_output, t, b->first_row, b->rows.rows);
    struct query_row row = query_row_at(t, b->first_row);
    for (int32_t lane = 0; lane < b->rows.rows; lane++, next_query_row(t, &row)) {
        const bool sees = b->rows.lo[lane] < b->rows.hi[lane];
        const float lse = of_row(&p->lse, t, &row);
        const bool empty = lse == -INFINITY && !row_overflowed(p, &t->s, row.i, lse, 0);
        if (sees && !empty && !(fabsf(lse) < LARGEST_LSE))
            refuse(c);
        b->rows.minus[lane] = empty ? lse : (float)(-(double)lse * LOG2_E);
        b->delta[lane] = -of_row(&p->d_lse, t, &row);
        if (sees && !empty)
            b->delta[lane] +=
                dot_of(c, output[lane], &p->output, d_output[lane], &p->d_output, p->dim_v);
        if (p->sinks.data && !empty)
            add_sink(c, t, &row, run,
                     exp(load_element(p->sinks.data, DTYPE_F32, row.h * p->sinks.stride[1]) -
                         (double)lse),
                     b->delta[lane]);
        keep_stats(c, t, &row, b->rows.minus[lane], 1, b->delta[lane]);
    }
}

/* Rows of f32 to where they belong, rounded. */
static void store_d_query(const struct call *c, const struct task *t,
                          const struct backward_block *block, struct scratch *w) {
    const struct problem *p = c->p;
    const struct block *b = &block->rows;
    const struct view *v = &p->d_query;
    const bool dense = is_dense(v, p->dim_qk);
    char *rows[MAX_LANES], *copies[MAX_LANES];
    float factor[MAX_LANES];
    bool not_finite[MAX_LANES];
    point_at_rows(rows, v, t, block->first_row, b->rows);
    for (int32_t lane = 0; lane < b->rows; lane++) {
        copies[lane] = w->dense_rows + lane * p->dim_qk * dtype_bytes(v->dtype);
        factor[lane] = (float)p->scale;
    }
    if (b->fresh)
        memset(b->output, 0, (size_t)(round_up(p->dim_qk, 16) * c->body->lanes * 4));
    c->body->store(b, factor, dense ? rows : copies, p->dim_qk, v->dtype, w->rows, not_finite);
    if (!dense)
        copy_elements(rows, v->stride[3], (const char *const *)copies, 1, b->rows, p->dim_qk,
                      v->dtype);
}

static void add_distances(struct call *c, const struct task *t, const struct backward_block *b,
                          int64_t run) {
    struct query_row row = query_row_at(t, b->first_row);
    for (int32_t lane = 0; lane < b->rows.rows; lane++, next_query_row(t, &row))
        c->of_heads[head_index(c->p, t->b, row.h) * c->runs + run].distances -=
            (double)b->distances[lane];
}

/* Where the gradients of a tile are added to. What the block does not add to is 0. */
static struct backward_sums sums_at(const struct call *c, const struct task *t,
                                    const struct run_sums *run, const struct backward_block *b,
                                    const struct backward_tile *of) {
    const struct problem *p = c->p;
    const struct backward_body *body = c->body;
    const int64_t tile = of->first_key / body->tile_k, stride = body->tile_k * body->lanes;
    const bool whole = b->finite && of->n == least(body->tile_k, t->s.k_rows - of->first_key),
               fresh = !run->touched[tile];
    float *const sums = run->sums + tile * tile_sums(body, p);
    if (fresh && !whole)
        memset(sums, 0, (size_t)(tile_sums(body, p) * 4));
    run->touched[tile] = true;
    return (struct backward_sums){
        .d_key = p->d_key.data ? sums : NULL,
        .d_value = p->d_value.data ? sums + panels(body, p->dim_qk) * stride : NULL,
        .stride = stride,
        .tile = tile_sums(body, p),
        .fresh = fresh && whole,
        .d_query = p->d_query.data != NULL,
        .distances = p->d_alibi_slopes.data != NULL};
}

/* A set of blocks on its way over the keys. */
struct set {
    const struct task *t;
    const struct keys *k;
    const struct run_sums *sums;
    int64_t run;
    bool last; /* of the task */
    int32_t blocks;
    int64_t first, tiles; /* of the keys that some row sees */
};

/* Tile i of block n; false if the block sees nothing of it. */
static bool find_tile(struct backward_tile *tile, const struct call *c, const struct set *set,
                      int64_t i, int32_t n, struct scratch *w) {
    const struct block *b = &w->blocks[n].rows;
    const int64_t first_key = set->first + i * c->body->tile_k,
                  slot = c->body->one_walk
                             ? 0
                             : least(i, kept_tiles(c->body, c->p)) * c->body->blocks + n;
    if (first_key + c->body->tile_k <= b->first || first_key >= b->end)
        return false;
    *tile = tile_at(c, set->k, first_key, b->end, slot, w);
    return true;
}

static void start_set(struct call *c, struct set *set, int64_t first_row, struct scratch *w) {
    const int64_t lanes = c->body->lanes, tile_k = c->body->tile_k, rows = set->t->rows - first_row;
    int64_t first = INT64_MAX, end = 0;
    set->blocks = (int32_t)least(c->body->blocks, (rows + lanes - 1) / lanes);
    for (int32_t n = 0; n < set->blocks; n++) {
        struct backward_block *b = &w->blocks[n];
        pack_block(c, set->t, b, first_row + n * lanes, (int32_t)least(lanes, rows - n * lanes), w);
        first = least(first, b->rows.first);
        end = most(end, b->rows.end);
        if (c->body->finite_only && !b->finite)
            refuse(c);
    }
    set->first = least(first, end) / tile_k * tile_k;
    set->tiles = (end - set->first + tile_k - 1) / tile_k;
}

/* The gradients of tile i of block n. */
static void add_tile(const struct call *c, const struct set *set, int64_t i, int32_t n,
                     struct scratch *w) {
    uint64_t seen[MOST_TILE_K], kept[MOST_TILE_K];
    struct backward_block *b = &w->blocks[n];
    struct backward_tile tile;
    if (!find_tile(&tile, c, set, i, n, w))
        return;
    const struct backward_sums to = sums_at(c, set->t, set->sums, b, &tile);
    if (i >= kept_tiles(c->body, c->p))
        weigh_again(c, set->t, b, &tile, w);
    c->body->differentiate(b, &tile, seen, kept);
    c->body->accumulate(b, &tile, &to, seen, kept);
}

static int64_t pace_of(int64_t row_bytes) { return most(1, FETCH_BYTES / most(1, row_bytes)); }

/* The task's rows of a gradient of keys or values, and their bytes; 0 if there is none whose elements follow each other. */
static int64_t find_rows(struct rows *rows, const struct view *v, const struct task *t,
                         int64_t dim) {
    const int64_t bytes = dtype_bytes(v->dtype);
    if (!v->data || !is_dense(v, dim))
        return 0;
    *rows =
        (struct rows){.data = element_at(v, v->dtype, t->b, t->first_head / t->heads, t->s.k_start),
                      .stride = v->stride[2] * bytes};
    return dim * bytes;
}

/* Gradients of keys and values, which the task writes after its last set: what is not in a cache by then is waited for. */
static struct fetch fetch_d_keys(const struct call *c, const struct set *set) {
    const struct problem *p = c->p;
    struct fetch f = {.end = 0};
    if (!set->last || c->runs > 1 || !outgrows_caches(p, &p->query, p->dim_qk))
        return f;
    f.end = least(set->t->s.k_rows, FETCHED_KEYS);
    f.key_bytes = find_rows(&f.keys, &p->d_key, set->t, p->dim_qk);
    f.value_bytes = find_rows(&f.values, &p->d_value, set->t, p->dim_v);
    f.pace = pace_of(f.key_bytes + f.value_bytes);
    return f;
}

/* The same of the set's queries. */
static struct fetch fetch_d_queries(const struct call *c, const struct set *set,
                                    struct scratch *w) {
    const struct view *v = &c->p->d_query;
    const int64_t first = w->blocks[0].first_row, bytes = c->p->dim_qk * dtype_bytes(v->dtype);
    struct fetch f = {.key_bytes = bytes, .pace = pace_of(bytes)};
    if (!v->data || !is_dense(v, c->p->dim_qk) || !outgrows_caches(c->p, v, c->p->dim_qk))
        return f;
    f.end = least(c->body->blocks * c->body->lanes, set->t->rows - first);
    point_at_rows(w->d_query, v, set->t, first, (int32_t)f.end);
    f.keys.rows = (const char *const *)w->d_query;
    return f;
}

/* Forth over the keys for the statistics of the rows, unless those are known, and back, while the latest tiles are in the caches,
 * for the gradients. */
static void run_set(struct call *c, struct set *set, struct scratch *w) {
    const struct problem *p = c->p;
    struct backward_tile tile;
    w->next = fetch_d_keys(c, set);
    for (int64_t i = 0; i < set->tiles && !c->body->one_walk; i++)
        for (int32_t n = 0; n < set->blocks; n++)
            if (find_tile(&tile, c, set, i, n, w))
                weigh(c, set->t, &w->blocks[n], &tile, w);
    for (int32_t n = 0; n < set->blocks; n++)
        (c->body->one_walk ? start_rows : end_rows)(c, set->t, &w->blocks[n], set->run);
    w->next = fetch_d_queries(c, set, w);
    for (int64_t i = set->tiles - 1; i >= 0; i--)
        for (int32_t n = set->blocks - 1; n >= 0; n--)
            add_tile(c, set, i, n, w);
    for (int32_t n = 0; n < set->blocks; n++) {
        if (p->d_query.data)
            store_d_query(c, set->t, &w->blocks[n], w);
        if (p->d_alibi_slopes.data)
            add_distances(c, set->t, &w->blocks[n], set->run);
    }
}

static struct run_sums sums_of_run(const struct call *c, int64_t b, int64_t kv_head, int64_t run,
                                   const struct scratch *w) {
    const int64_t task = (b * c->p->heads_kv + kv_head) * c->runs + run;
    if (c->runs == 1)
        return (struct run_sums){w->sums, w->touched};
    return (struct run_sums){c->sums + task * sum_floats(c->body, c->p),
                             c->touched + task * tiles_of(c->body, c->p)};
}

static void run_task(struct call *c, const struct task *t, int64_t run, struct scratch *w) {
    const struct run_sums sums = sums_of_run(c, t->b, t->first_head / t->heads, run, w);
    const struct keys k = load_keys(c, t, 0, (int32_t)t->s.k_len, w);
    struct set set = {.t = t, .k = &k, .sums = &sums, .run = run};
    const int64_t rows = c->body->blocks * c->body->lanes;
    if (c->body->finite_only && !k.finite)
        refuse(c);
    for (int64_t h = t->first_head; h < t->first_head + t->heads; h++)
        c->of_heads[head_index(c->p, t->b, h) * c->runs + run] = (struct head_sums){0, 0};
    memset(sums.touched, 0, (size_t)tiles_of(c->body, c->p));
    for (int64_t row = run * rows; row < t->rows; row += c->runs * rows) {
        set.last = row + c->runs * rows >= t->rows;
        start_set(c, &set, row, w);
        run_set(c, &set, w);
    }
}

/* What the runs have of a tile, in their order, from a panel on. Returns how many have any. */
static int32_t find_sums(const float **sums, const struct call *c, const struct task *t,
                         int64_t tile, int64_t first_panel, const struct scratch *w) {
    int32_t count = 0;
    for (int64_t n = 0; n < c->runs; n++) {
        const struct run_sums run = sums_of_run(c, t->b, t->first_head / t->heads, n, w);
        if (run.touched[tile])
            sums[count++] = run.sums + tile * tile_sums(c->body, c->p) +
                            first_panel * c->body->tile_k * c->body->lanes;
    }
    return count;
}

/* Gradients of the keys, or the values, of a kv head. */
static void store_keys(const struct call *c, const struct task *t, const struct view *v,
                       int64_t first_panel, int64_t dim, double scale, const struct scratch *w) {
    const int64_t lanes = c->body->lanes, tile_k = c->body->tile_k;
    const float *sums[TASKS];
    int32_t count = 0;
    for (int64_t j = 0; j < t->s.k_rows; j++) {
        char *to = element_at(v, v->dtype, t->b, t->first_head / t->heads, t->s.k_start + j);
        char *const dense = is_dense(v, dim) ? to : w->dense_rows;
        const char *const copy = dense;
        if (j % tile_k == 0)
            count = find_sums(sums, c, t, j / tile_k, first_panel, w);
        c->body->store_sums(dense, sums, count, tile_k * lanes, (float)scale, dim, v->dtype);
        for (int32_t n = 0; n < count; n++)
            sums[n] += lanes;
        if (dense != to)
            copy_elements(&to, v->stride[3], &copy, 1, 1, dim, v->dtype);
    }
}

/* A kv head whose runs are finished. */
static void finish_head(const struct call *c, const struct task *t, const struct scratch *w) {
    const struct problem *p = c->p;
    if (p->d_key.data)
        store_keys(c, t, &p->d_key, 0, p->dim_qk, p->scale, w);
    if (p->d_value.data)
        store_keys(c, t, &p->d_value, panels(c->body, p->dim_qk), p->dim_v, 1, w);
}

static void worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    const struct problem *p = c->p;
    const int64_t heads = p->batch * p->heads_kv, group = group_of(p);
    struct scratch w;
    lay_out(&w, c->workspace + (size_t)index * c->worker_bytes, c->body, p, c->runs == 1);
    c->body->enter();
    for (int64_t n;
         (n = atomic_fetch_add_explicit(&c->next_task, 1, memory_order_relaxed)) < c->tasks;) {
        const int64_t head = n % heads;
        struct task t = {.p = p,
                         .b = head / p->heads_kv,
                         .first_head = head % p->heads_kv * group,
                         .heads = group};
        t.s = problem_sequence(p, t.b);
        t.rows = t.s.q_rows * group;
        run_task(c, &t, n / heads, &w);
        if (count_done(&c->finished[head], c->runs))
            finish_head(c, &t, &w);
    }
    c->body->leave();
}

/* ---- Slopes and sinks -------------------------------------------------------------------------- */

static double sum_runs(const struct call *c, int64_t b, int64_t h, bool sinks) {
    const struct head_sums *of = c->of_heads + head_index(c->p, b, h) * c->runs;
    double sum = 0;
    for (int64_t run = 0; run < c->runs; run++)
        sum += sinks ? of[run].sinks : of[run].distances;
    return sum;
}

/* Along the batch, too, unless its entries have gradients of their own. */
static void store_head_sums(const struct call *c, const struct view *v, bool sinks) {
    const struct problem *p = c->p;
    const bool by_batch = !sinks && v->stride[0] != 0;
    for (int64_t b = 0; b < (by_batch ? p->batch : 1); b++)
        for (int64_t h = 0; h < p->heads_q; h++) {
            double sum = 0;
            for (int64_t n = 0; n < (by_batch ? 1 : p->batch); n++)
                sum += sum_runs(c, b + n, h, sinks);
            store_element(v->data, v->dtype, b * v->stride[0] + h * v->stride[1], sum);
        }
}

/* ---- The second pass: the bias ----------------------------------------------------------------- */

/* A range of one axis, and how many there are of it: one of all where the bias has an extent of 1. */
struct span {
    int64_t first, end;
};

static int64_t spans_of(const struct view *d_bias, int axis, int64_t extent, int64_t step) {
    return d_bias->stride[axis] == 0 ? 1 : (extent + step - 1) / step;
}

static struct span span_at(const struct view *d_bias, int axis, int64_t extent, int64_t step,
                           int64_t n) {
    if (d_bias->stride[axis] == 0)
        return (struct span){0, extent};
    return (struct span){n * step, least(extent, (n + 1) * step)};
}

/* What of the bias one task owns. */
struct bias_part {
    struct span batch, heads, rows, keys;
};

static int64_t bias_keys(const struct call *c) { return BIAS_TILES * c->body->tile_k; }

static int64_t bias_parts(const struct call *c) {
    const struct problem *p = c->p;
    const struct view *v = &p->d_bias;
    return spans_of(v, 0, p->batch, 1) * spans_of(v, 1, p->heads_q, 1) *
           spans_of(v, 2, p->len_q, c->body->lanes) * spans_of(v, 3, p->len_k, bias_keys(c));
}

static struct bias_part bias_part_at(const struct call *c, int64_t n) {
    const struct problem *p = c->p;
    const struct view *v = &p->d_bias;
    const int64_t keys = spans_of(v, 3, p->len_k, bias_keys(c)),
                  rows = spans_of(v, 2, p->len_q, c->body->lanes),
                  heads = spans_of(v, 1, p->heads_q, 1);
    return (struct bias_part){
        .batch = span_at(v, 0, p->batch, 1, n / keys / rows / heads),
        .heads = span_at(v, 1, p->heads_q, 1, n / keys / rows % heads),
        .rows = span_at(v, 2, p->len_q, c->body->lanes, n / keys % rows),
        .keys = span_at(v, 3, p->len_k, bias_keys(c), n % keys),
    };
}

/* Adds the gradients of the logits of one block and the part's keys. */
static void add_bias_block(const struct call *c, const struct task *t, const struct keys *k,
                           const struct span *keys, int64_t first_row, int32_t count,
                           struct scratch *w) {
    const int32_t lanes = c->body->lanes, tile_k = c->body->tile_k;
    struct backward_block *b = &w->blocks[0];
    pack_block(c, t, b, first_row, count, w);
    const int64_t end = least(b->rows.end, keys->end);
    for (int32_t lane = 0; lane < count; lane++) {
        const struct row_stats *stats =
            &c->stats[head_index(c->p, t->b, t->first_head) * c->p->len_q + first_row + lane];
        *(c->body->one_walk ? &b->rows.minus[lane] : &b->rows.max[lane]) = stats->base;
        b->inverse[lane] = stats->inverse;
        b->delta[lane] = stats->delta;
    }
    for (int64_t first = most(b->rows.first / tile_k * tile_k, keys->first); first < end;
         first += tile_k) {
        uint64_t seen[MOST_TILE_K], kept[MOST_TILE_K];
        struct backward_tile tile = tile_at(c, k, first, end, 0, w);
        float *sums = w->bias + (first - keys->first) / tile_k % BIAS_TILES * tile_k * lanes;
        weigh_again(c, t, b, &tile, w);
        c->body->differentiate(b, &tile, seen, kept);
        for (int32_t j = 0; j < tile.n; j++)
            for (int32_t lane = 0; lane < count; lane++)
                sums[j * lanes + lane] += tile.d_weights[j * lanes + lane];
    }
}

static void add_bias_head(const struct call *c, const struct bias_part *part, int64_t b, int64_t h,
                          struct scratch *w) {
    struct task t = {
        .p = c->p, .s = problem_sequence(c->p, b), .b = b, .first_head = h, .heads = 1};
    const int64_t lanes = c->body->lanes, rows = least(part->rows.end, t.s.q_len);
    const struct keys k = load_keys(
        c, &t, part->keys.first, (int32_t)(least(part->keys.end, t.s.k_len) - part->keys.first), w);
    for (int64_t row = part->rows.first; row < rows; row += lanes)
        add_bias_block(c, &t, &k, &part->keys, row, (int32_t)least(lanes, rows - row), w);
}

/* The sum over lanes or keys [first, first + n), each or all of them. */
static double bias_sum(const struct call *c, const struct bias_part *part, int64_t i, int64_t j,
                       const float *sums) {
    const struct view *v = &c->p->d_bias;
    const int64_t lanes = c->body->lanes;
    const bool each_row = v->stride[2] != 0, each_key = v->stride[3] != 0;
    const int64_t keys = least(bias_keys(c), part->keys.end - part->keys.first);
    double sum = 0;
    for (int64_t key = each_key ? j : 0; key < (each_key ? j + 1 : keys); key++)
        for (int64_t lane = each_row ? i : 0; lane < (each_row ? i + 1 : lanes); lane++)
            sum += (double)sums[key * lanes + lane];
    return sum;
}

static void run_bias_part(const struct call *c, const struct bias_part *part, struct scratch *w) {
    const struct view *v = &c->p->d_bias;
    const int64_t lanes = c->body->lanes,
                  rows = v->stride[2] == 0 ? 1 : part->rows.end - part->rows.first,
                  keys = v->stride[3] == 0 ? 1 : part->keys.end - part->keys.first;
    memset(w->bias, 0, (size_t)(bias_keys(c) * lanes * 4));
    for (int64_t b = part->batch.first; b < part->batch.end; b++)
        for (int64_t h = part->heads.first; h < part->heads.end; h++)
            add_bias_head(c, part, b, h, w);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < keys; j++)
            store_element(v->data, v->dtype,
                          part->batch.first * v->stride[0] + part->heads.first * v->stride[1] +
                              (part->rows.first + i) * v->stride[2] +
                              (part->keys.first + j) * v->stride[3],
                          bias_sum(c, part, i, j, w->bias));
}

static void bias_worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    struct scratch w;
    const int64_t parts = bias_parts(c);
    lay_out(&w, c->workspace + (size_t)index * c->worker_bytes, c->body, c->p, c->runs == 1);
    c->body->enter();
    for (int64_t n;
         (n = atomic_fetch_add_explicit(&c->next_task, 1, memory_order_relaxed)) < parts;) {
        const struct bias_part part = bias_part_at(c, n);
        run_bias_part(c, &part, &w);
    }
    c->body->leave();
}

/* ---- The call ---------------------------------------------------------------------------------- */

/* In the same workspace. */
static struct plan plan_of_stand_in(const struct plan *plan, const struct problem *p,
                                    const struct backward_body *body) {
    struct plan other = *plan;
    body->stand_in_plan(&other, p, NULL);
    return other;
}

bool backward_plan(struct plan *plan, const struct problem *p, const struct backward_body *body) {
    struct call c = {.body = body, .p = p};
    struct scratch w;
    if (!options_fit_f32(p))
        return false;
    const size_t shared = lay_out_call(&c, NULL),
                 worker_bytes = lay_out(&w, NULL, body, p, c.runs == 1);
    plan->tile_q = body->lanes;
    plan->tile_k = body->tile_k;
    plan->threads = (int32_t)most(1, least(plan->threads, c.tasks));
    plan->workspace_bytes = shared + worker_bytes * (size_t)plan->threads;
    const size_t other = plan_of_stand_in(plan, p, body).workspace_bytes;
    if (plan->workspace_bytes < other)
        plan->workspace_bytes = other;
    return true;
}

int32_t backward_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                        const struct backward_body *body) {
    struct call c = {.body = body, .p = p};
    struct scratch w;
    c.workspace = (char *)exec->workspace + lay_out_call(&c, exec->workspace);
    c.worker_bytes = lay_out(&w, NULL, body, p, c.runs == 1);
    c.stats = p->d_bias.data ? c.stats : NULL;
    for (int64_t head = 0; head < p->batch * p->heads_kv; head++)
        atomic_store_explicit(&c.finished[head], 0, memory_order_relaxed);
    if (body->one_walk && p->lse.dtype != DTYPE_F32)
        refuse(&c);
    else
        threads_run(exec, plan->threads, worker, &c);
    if (atomic_load(&c.refused)) {
        const struct plan other = plan_of_stand_in(plan, p, body);
        return body->stand_in_launch(&other, p, exec);
    }
    if (p->d_alibi_slopes.data)
        store_head_sums(&c, &p->d_alibi_slopes, false);
    if (p->d_sinks.data)
        store_head_sums(&c, &p->d_sinks, true);
    atomic_store(&c.next_task, 0);
    if (p->d_bias.data)
        threads_run(exec, plan->threads, bias_worker, &c);
    return DLATTN_OK;
}
