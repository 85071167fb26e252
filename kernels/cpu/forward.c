/*
 * The driver of every cpu_fwd row: work queue, blocks, key tiles, and what is done once for each row.
 *
 * A task is (batch, kv head, run of query rows of the head's group). Workers take tasks from one counter, last rows
 * first, because causal rows grow heavier. Within a task each key tile is loaded once for all blocks. Tiles start
 * at multiples of tile_k and blocks at multiples of `lanes` rows, so the sums of a row, and with them its bits, depend
 * neither on the number of threads nor on the size of a task.
 *
 * Few rows would leave most threads without a task. Then a task is a part of the keys besides, by the shape alone; its blocks stay in
 * the workspace, and whoever finishes the last part of a run adds them up in order.
 */
#include "kernels/cpu/forward.h"
#include "kernels/ref/ref.h"
#include "src/element.h"

#include <math.h>
#include <stdatomic.h>

struct call {
    const struct forward_body *body;
    const struct plan *plan;
    const struct problem *p;
    char *workspace;
    size_t worker_bytes;
    int64_t group; /* query heads of a kv head */
    int64_t runs;  /* tasks of one kv head of one batch */
    int64_t tasks;
    int64_t part_keys;
    _Atomic int32_t *parts_done; /* [run][batch][kv head] */
    char *blocks; /* of [worker] or [run][batch][kv head][split], blocks_bytes each */
    size_t blocks_bytes;
    _Atomic int64_t next_task;
};

/* One worker's share of the workspace. */
struct scratch {
    struct block *blocks; /* blocks_at() */
    float *query;         /* of a block after the other */
    float *scores;
    float *extra, *keep;
    float *key, *value;
    float *rows; /* one block, row-major: on the way in or out */
    /* Copies of what has an inner stride other than 1; the rows are a block's, of query or output. */
    char *dense_key, *dense_value, *dense_rows;
    const char **pointers[2];       /* of this tile's keys and values, and of the next one's */
    float *key_scale, *value_scale; /* where pages differ in them */
    double *exact;
};

/* Words of a query or key, all terms. */
static int64_t row_words(const struct forward_body *body, int64_t dim) {
    return round_up((dim + body->elements_per_word - 1) / body->elements_per_word, 16) *
           body->terms;
}

/* Lays the blocks of a task out from `base`, where they begin, without their queries. */
static size_t lay_out_blocks(struct block **blocks, char *base, const struct forward_body *body,
                             const struct plan *plan, const struct problem *p) {
    const int64_t count = plan->tile_q / body->lanes;
    uintptr_t at = (uintptr_t)base;
    *blocks = carve(&at, count * (int64_t)sizeof **blocks);
    for (int64_t n = 0; n < count; n++) {
        float *output = carve(&at, round_up(p->dim_v, 16) * body->lanes * 4);
        if (base)
            (*blocks)[n].output = output;
    }
    return at - (uintptr_t)base;
}

/* Lays a worker's scratch out from `base` (NULL to measure) and returns its bytes. */
static size_t lay_out(struct scratch *w, char *base, const struct forward_body *body,
                      const struct plan *plan, const struct problem *p) {
    const int64_t lanes = body->lanes, tile_k = body->tile_k, blocks = plan->tile_q / lanes;
    const int64_t words = row_words(body, p->dim_qk), dim_v = round_up(p->dim_v, 16);
    const bool extra = p->features & (DLATTN_FEATURE_BIAS | DLATTN_FEATURE_MASK |
                                      DLATTN_FEATURE_SEGMENTS | DLATTN_FEATURE_BLOCK_MASK);
    uintptr_t at = (uintptr_t)base;
    w->query = carve(&at, blocks * words * lanes * 4);
    w->scores = carve(&at, body->score_bytes);
    w->extra = carve(&at, extra ? tile_k * lanes * 4 : 0);
    w->keep = carve(&at, p->dropout_probability > 0 ? tile_k * lanes * 4 : 0);
    w->key = carve(&at, tile_k * words * 4);
    w->value = carve(&at, tile_k / body->elements_per_word * dim_v * body->terms * 4);
    w->rows = carve(&at, lanes * most(most(words, dim_v), extra ? tile_k + 16 : 0) * 4);
    for (int n = 0; n < 2; n++)
        w->pointers[n] = carve(&at, 2 * tile_k * (int64_t)sizeof **w->pointers);
    w->key_scale = carve(&at, page_scale_bytes(p, &p->key_scale, tile_k));
    w->value_scale = carve(&at, page_scale_bytes(p, &p->value_scale, tile_k));
    w->exact = carve(&at, (int64_t)cpu_fwd_ref_row_bytes(p));
    w->dense_key = carve(&at, copy_bytes(&p->key, tile_k, p->dim_qk));
    w->dense_value = carve(&at, copy_bytes(&p->value, tile_k, p->dim_v));
    w->dense_rows = carve(&at, most(copy_bytes(&p->query, lanes, p->dim_qk),
                                    copy_bytes(&p->output, lanes, p->dim_v)));
    return at - (uintptr_t)base;
}

/* The rows of a block's query, where their elements follow each other. */
static void point_at_query(const char **rows, const struct task *t, int64_t first, int32_t count,
                           struct scratch *w) {
    const struct problem *p = t->p;
    char *strided[MAX_LANES];
    point_at_rows(strided, &p->query, t, first, count);
    const struct rows query = {.rows = (const char *const *)strided},
                      dense = dense_rows(&query, count, p->dim_qk, &p->query, p->query.dtype,
                                         w->dense_rows);
    for (int32_t r = 0; r < count; r++)
        rows[r] = row_at(&dense, r);
}

/* The block of rows [first, first + count) of the task's group. */
static void pack_block(const struct call *c, const struct task *t, struct block *b, int64_t first,
                       int32_t count, struct scratch *w) {
    const struct problem *p = t->p;
    const struct forward_body *body = c->body;
    const char *rows[MAX_LANES];
    start_block(b, t, first, count, body->vector_lanes);
    if (b->first >= b->end)
        return;
    point_at_query(rows, t, first, count, w);
    body->pack_query(b, rows, p->dim_qk, p->query.dtype, w->rows);
}

/* False if the block sees none of these keys; *extra is NULL where there is nothing extra. */
static bool load_extra(const float **extra, const struct call *c, const struct task *t,
                       int64_t first_row, const struct block *b, int64_t first_key, int32_t n,
                       struct scratch *w) {
    struct extra_row rows[MAX_LANES];
    struct lane_masks masks;
    *extra = NULL;
    if (!t->p->bias.data && !has_mask(t->p))
        return true;
    find_masks(&masks, t, b, first_row);
    const struct extra_layout layout = find_extra(rows, t, b, first_row);
    *extra = w->extra;
    return c->body->load_extra(w->extra, rows, &layout, &masks, b, first_key, n, w->rows);
}

/* Which weights dropout leaves; NULL: all. Their factor is the output's. */
static const float *draw(const struct call *c, const struct task *t, int64_t first_row,
                         const struct block *b, int64_t first_key, int32_t n, struct scratch *w) {
    struct dropout dropout;
    if (t->p->dropout_probability == 0)
        return NULL;
    find_dropout(&dropout, t, b, first_row, 1);
    c->body->draw(w->keep, &dropout, b, first_key, n);
    return w->keep;
}

/* Scales of a block's rows where they differ, in to[MAX_LANES], else NULL. */
static const float *load_query_scale(const struct task *t, int64_t first_row, const struct block *b,
                                     float *to) {
    const struct view *scale = &t->p->query_scale;
    struct query_row row = query_row_at(t, first_row);
    if (!scale->data)
        return NULL;
    memset(to, 0, MAX_LANES * sizeof *to);
    for (int32_t lane = 0; lane < b->rows; lane++, next_query_row(t, &row))
        to[lane] = scale_at(scale, t->b, row.h);
    return to;
}

/* One key tile of one block: keys [first_key, first_key + n). */
static void attend(const struct call *c, const struct task *t, struct block *b, int64_t first_row,
                   const struct operand *key, const struct operand *value, int64_t first_key,
                   int32_t n, struct fetch *next, struct scratch *w) {
    const struct problem *p = t->p;
    struct logit_rule rule;
    float query_scale[MAX_LANES];
    const float *extra;
    struct key_tile tile = {
        .key = *key,
        .value = *value,
        .first_key = first_key,
        .n = n,
        .dim_qk = p->dim_qk,
        .dim_v = p->dim_v,
        .scale = score_scale(p),
        .next = next,
    };
    if (!load_extra(&extra, c, t, first_row, b, first_key, n, w))
        return;
    if (needs_rule(p)) {
        rule = (struct logit_rule){
            .scale = (float)p->scale,
            .softcap = (float)p->softcap,
            .alibi = p->alibi_slopes.data != NULL,
            .extra = extra,
            .query_scale = load_query_scale(t, first_row, b, query_scale),
            .key_scale = page_scales(p, &p->key_scale, t->b, t->first_head / t->heads, first_key, n,
                                     w->key_scale),
        };
        tile.rule = &rule;
    }
    tile.keep = draw(c, t, first_row, b, first_key, n, w);
    c->body->attend(b, &tile, w->scores);
}

/* A row that is not finite although its sum is has met 0 * NaN or 0 * infinity: maybe from a masked key, whose value must
 * not count. The reference finds out, value by value. So it does where elements are sums of terms, infinity being none, and
 * where scores outgrew f32. */
static bool needs_reference(const struct call *c, const struct task *t, const struct block *b,
                            int32_t lane, int64_t i, bool not_finite) {
    return (not_finite && (c->body->terms > 1 || !isnan(b->sum[lane]))) ||
           row_overflowed(t->p, &t->s, i, b->max[lane], b->sum[lane]);
}

/* Output rows of a block times their factors. */
static void store_rows(const struct call *c, const struct task *t, const struct block *b,
                       int64_t first_row, const float *factor, bool *not_finite,
                       struct scratch *w) {
    const struct problem *p = t->p;
    const bool dense = is_dense(&p->output, p->dim_v);
    char *rows[MAX_LANES], *copies[MAX_LANES];
    point_at_rows(rows, &p->output, t, first_row, b->rows);
    for (int32_t lane = 0; lane < b->rows; lane++)
        copies[lane] = w->dense_rows + lane * p->dim_v * dtype_bytes(p->output.dtype);
    c->body->store(b, factor, dense ? rows : copies, p->dim_v, p->output.dtype, w->rows,
                   not_finite);
    if (!dense)
        copy_elements(rows, p->output.stride[3], (const char *const *)copies, 1, b->rows, p->dim_v,
                      p->output.dtype);
}

/* Divides and stores. */
static void finish_block(const struct call *c, const struct task *t, struct block *b,
                         int64_t first_row, struct scratch *w) {
    const struct problem *p = t->p;
    float factor[MAX_LANES];
    bool not_finite[MAX_LANES];
    struct query_row row = query_row_at(t, first_row);
    for (int32_t lane = 0; lane < b->rows; lane++, next_query_row(t, &row))
        factor[lane] =
            kept_factor(p) * end_row(p, &t->s, t->b, row.h, row.i, b->max[lane], b->sum[lane]);
    if (b->fresh)
        memset(b->output, 0, (size_t)(round_up(p->dim_v, 16) * c->body->lanes * 4));
    store_rows(c, t, b, first_row, factor, not_finite, w);
    row = query_row_at(t, first_row);
    for (int32_t lane = 0; lane < b->rows; lane++, next_query_row(t, &row)) {
        if (needs_reference(c, t, b, lane, row.i, not_finite[lane]))
            cpu_fwd_ref_row(p, &t->s, t->b, row.h, row.i, w->exact);
    }
}

/* Beside the last tile: output rows [first, first + count), which are written next. */
static struct fetch fetch_output(const struct task *t, int64_t first, int32_t count, char **rows) {
    const struct view *v = &t->p->output;
    const int64_t dim = t->p->dim_v;
    if (!is_dense(v, dim) || !outgrows_caches(t->p, v, dim))
        return (struct fetch){.end = 0};
    point_at_rows(rows, v, t, first, count);
    return (struct fetch){.keys = {.rows = (const char *const *)rows},
                          .key_bytes = dim * dtype_bytes(v->dtype),
                          .end = count,
                          .pace = 4};
}

/* Keys of part `split`, of all blocks. */
static void run_part(const struct call *c, const struct task *t, int64_t split, struct scratch *w) {
    const struct forward_body *body = c->body;
    const struct problem *p = t->p;
    const int32_t lanes = body->lanes, tile_k = body->tile_k;
    const int64_t blocks = (t->rows + lanes - 1) / lanes;
    int64_t first = INT64_MAX, end = 0;
    for (int64_t n = 0; n < blocks; n++) {
        struct block *b = &w->blocks[n];
        b->query = w->query + n * row_words(body, p->dim_qk) * lanes;
        pack_block(c, t, b, t->first_row + n * lanes, (int32_t)least(lanes, t->rows - n * lanes),
                   w);
        first = least(first, b->first);
        end = most(end, b->end);
    }
    /* A hidden value that is not finite spoils what its step adds. Whole steps are read, as far as there are keys, so that a
     * block meets it, and leaves its rows to the reference, whatever other blocks are in the task. */
    end = least(least(round_up(end, body->step_k), t->s.k_len), (split + 1) * c->part_keys);
    first = most(first, split * c->part_keys);
    if (first >= end)
        return;
    struct kv_tile tile = kv_tile_at(p, &t->s, t->b, t->first_head / t->heads,
                                     first / tile_k * tile_k, end, tile_k, w->pointers[0]);
    for (int parity = 1; tile.n > 0; parity ^= 1) {
        const struct rows keys =
            dense_rows(&tile.keys, tile.n, p->dim_qk, &p->key, p->key.dtype, w->dense_key);
        struct rows values =
            dense_rows(&tile.values, tile.n, p->dim_v, &p->value, p->value.dtype, w->dense_value);
        values.scale = page_scales(p, &p->value_scale, t->b, t->first_head / t->heads, tile.first,
                                   tile.n, w->value_scale);
        const struct operand key = body->load_key(w->key, &keys, tile.n, p->dim_qk, p->key.dtype);
        const struct operand value =
            body->load_value(w->value, &values, tile.n, p->dim_v, p->value.dtype);
        const struct kv_tile next =
            kv_tile_at(p, &t->s, t->b, t->first_head / t->heads, tile.first + tile.n, end, tile_k,
                       w->pointers[parity]);
        for (int64_t n = 0; n < blocks; n++) {
            struct block *b = &w->blocks[n];
            char *output[MAX_LANES];
            struct fetch share = next.n > 0
                                     ? kv_tile_share(p, &next, n, blocks)
                                     : fetch_output(t, t->first_row + n * lanes, b->rows, output);
            if (tile.first + tile_k > b->first && tile.first < b->end)
                attend(c, t, b, t->first_row + n * lanes, &key, &value, tile.first,
                       (int32_t)least(tile.n, b->end - tile.first), &share, w);
            fetch_rows(&share, share.end);
        }
        tile = next;
    }
}

/* Brings a block's parts to their common maxima and adds them up in the first, `all`. */
static void merge_block(struct block *all, struct block *const *parts, int32_t splits,
                        int64_t dim_v, int32_t lanes, float scale) {
    float max[MAX_LANES], sum[MAX_LANES] = {0}, factor[MAX_LANES];
    bool fresh = true;
    for (int32_t lane = 0; lane < MAX_LANES; lane++)
        max[lane] = -INFINITY;
    for (int32_t n = 0; n < splits; n++)
        for (int32_t lane = 0; lane < all->rows; lane++)
            max[lane] = parts[n]->max[lane] > max[lane] ? parts[n]->max[lane] : max[lane];
    for (int32_t n = 0; n < splits; n++) {
        const struct block *b = parts[n];
        for (int32_t lane = 0; lane < all->rows; lane++) {
            factor[lane] = rescaling(b->max[lane], max[lane], scale);
            sum[lane] += b->sum[lane] * factor[lane];
        }
        for (int64_t d = 0; !b->fresh && d < dim_v; d++) {
            float *total = all->output + d * lanes;
            const float *output = b->output + d * lanes;
            for (int32_t lane = 0; lane < all->rows; lane++)
                total[lane] = (fresh ? 0 : total[lane]) + output[lane] * factor[lane];
        }
        fresh &= b->fresh;
    }
    memcpy(all->max, max, sizeof max);
    memcpy(all->sum, sum, sizeof sum);
    all->fresh = fresh;
}

/* Those of a worker, or of a task that is one of several parts. */
static void *blocks_at(const struct call *c, int64_t index) {
    return c->blocks + (size_t)index * c->blocks_bytes;
}

/* The blocks of all parts of a run into its rows. */
static void finish_run(const struct call *c, const struct task *t, int64_t run, struct scratch *w) {
    const int32_t lanes = c->body->lanes, splits = c->plan->splits;
    struct block *parts[MAX_SPLITS];
    for (int64_t n = 0; n * lanes < t->rows; n++) {
        struct block *b = &w->blocks[n];
        if (splits != 1) {
            b = (struct block *)blocks_at(c, run * splits) + n;
            for (int32_t split = 0; split < splits; split++)
                parts[split] = (struct block *)blocks_at(c, run * splits + split) + n;
            merge_block(b, parts, splits, t->p->dim_v, lanes, score_scale(t->p));
        }
        finish_block(c, t, b, t->first_row + n * lanes, w);
    }
}

static void worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    const struct problem *p = c->p;
    struct problem own;
    struct scratch w;
    lay_out(&w, c->workspace + (size_t)index * c->worker_bytes, c->body, c->plan, p);
    c->body->enter();
    for (int64_t n;
         (n = atomic_fetch_add_explicit(&c->next_task, 1, memory_order_relaxed)) < c->tasks;) {
        const int64_t heads = p->batch * p->heads_kv, splits = c->plan->splits, run = n / splits;
        struct task t = {.b = run % heads / p->heads_kv,
                         .first_head = run % p->heads_kv * c->group,
                         .heads = c->group,
                         .first_row = (c->runs - 1 - run / heads) * c->plan->tile_q};
        t.p = problem_of_head(p, t.b, run % p->heads_kv, &own);
        t.s = problem_sequence(p, t.b);
        t.rows = least(c->plan->tile_q, t.s.q_rows * t.heads - t.first_row);
        if (t.rows <= 0)
            continue;
        lay_out_blocks(&w.blocks, blocks_at(c, splits == 1 ? index : n), c->body, c->plan, p);
        run_part(c, &t, n % splits, &w);
        if (splits == 1 || count_done(&c->parts_done[run], splits))
            finish_run(c, &t, run, &w);
    }
    c->body->leave();
}

/* Parts of the keys: for few blocks, and none of them short, for each begins by looking for maxima. By the shape alone, so that no bit
 * depends on threads. */
static int32_t splits_of(const struct problem *p, const struct forward_body *body) {
    enum { LEAST_KEYS = 4096 };
    const int64_t blocks = p->batch * p->heads_kv * runs_of(p, body->lanes);
    return (int32_t)most(1, least(MAX_SPLITS / most(1, blocks), p->len_k / LEAST_KEYS));
}

/* What stands before the scratch of workers: how many parts of a run are done, and blocks. */
static size_t done_bytes(const struct plan *plan, int64_t runs) {
    return plan->splits == 1 ? 0 : counters_bytes(runs);
}
static int64_t blocks_count(const struct plan *plan, int64_t runs) {
    return plan->splits == 1 ? plan->threads : runs * plan->splits;
}

bool forward_plan(struct plan *plan, const struct problem *p, const struct forward_body *body) {
    if (!options_fit_f32(p))
        return false;
    plan->tile_k = body->tile_k;
    plan->splits = splits_of(p, body);
    plan_tasks(plan, p, body->lanes);
    struct scratch w;
    struct block *blocks;
    const int64_t runs = runs_of(p, plan->tile_q) * p->batch * p->heads_kv;
    plan->workspace_bytes =
        done_bytes(plan, runs) +
        lay_out_blocks(&blocks, NULL, body, plan, p) * (size_t)blocks_count(plan, runs) +
        lay_out(&w, NULL, body, plan, p) * (size_t)plan->threads;
    return true;
}

int32_t forward_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                       const struct forward_body *body) {
    struct scratch w;
    struct block *blocks;
    struct call c = {
        .body = body,
        .plan = plan,
        .p = p,
        .worker_bytes = lay_out(&w, NULL, body, plan, p),
        .group = group_of(p),
        .runs = runs_of(p, plan->tile_q),
        .blocks_bytes = lay_out_blocks(&blocks, NULL, body, plan, p),
        .part_keys = round_up((p->len_k + plan->splits - 1) / plan->splits, body->tile_k),
        .parts_done = exec->workspace,
    };
    const int64_t runs = c.runs * p->batch * p->heads_kv;
    c.tasks = runs * plan->splits;
    c.blocks = (char *)exec->workspace + done_bytes(plan, runs);
    c.workspace = c.blocks + c.blocks_bytes * (size_t)blocks_count(plan, runs);
    memset(exec->workspace, 0, done_bytes(plan, runs));
    threads_run(exec, plan->threads, worker, &c);
    return DLATTN_OK;
}
