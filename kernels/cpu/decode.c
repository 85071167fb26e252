/*
 * The driver of every cpu_decode row. The keys of a sequence are cut into parts by the shape alone, each part leaves
 * (output, max, sum) in the workspace, and whoever finishes the last part of a kv head merges them in order: the bits
 * do not depend on how many threads there are or which of them was faster.
 */
#include "kernels/cpu/decode.h"
#include "kernels/ref/ref.h"
#include "src/element.h"

#include <math.h>
#include <stdatomic.h>

struct call {
    const struct decode_body *body;
    const struct plan *plan;
    const struct problem *p;
    int64_t part_keys;
    _Atomic int32_t *parts_done; /* [batch][kv head] */
    char *parts;                 /* [batch][kv head][split], part_bytes each */
    char *workers;               /* worker_bytes each */
    size_t part_bytes, worker_bytes;
    _Atomic int64_t next_task;
};

/* One worker's share of the workspace. */
struct scratch {
    float *query, *scores, *extra;
    struct row_lanes *lanes;
    float *key_scale, *value_scale; /* where pages differ in them */
    const char **pointers[2];       /* of this tile and the next one */
    void *own;                      /* the body's */
    double *exact;
    char *dense_key, *dense_value, *dense_row; /* copies where the inner stride is not 1 */
};

static int64_t heads_of(const struct problem *p) { return p->batch * p->heads_kv; }

/* As a part has them, of so many in use. */
static int64_t padded_rows(const struct decode_body *body, int64_t rows) {
    return rows <= body->least_rows ? body->least_rows : round_up(rows, ROW_GROUP);
}

static int64_t rows_of(const struct decode_body *body, const struct problem *p) {
    return padded_rows(body, p->len_q * group_of(p));
}

static size_t lay_out_part(struct part *part, char *base, const struct problem *p,
                           const struct decode_body *body) {
    uintptr_t at = (uintptr_t)base;
    part->max = carve(&at, MAX_ROWS * 4);
    part->sum = carve(&at, MAX_ROWS * 4);
    part->output =
        carve(&at, round_up(rows_of(body, p), body->output_rows) * padded_dim(p->dim_v) * 4);
    return at - (uintptr_t)base;
}

static size_t lay_out_worker(struct scratch *w, char *base, const struct problem *p,
                             const struct decode_body *body) {
    uintptr_t at = (uintptr_t)base;
    w->query = carve(&at, rows_of(body, p) * padded_dim(p->dim_qk) * 4);
    w->scores = carve(&at, MAX_ROWS * DECODE_TILE_K * 4);
    w->extra = carve(&at, MAX_ROWS * DECODE_TILE_K * 4);
    w->lanes = carve(&at, MAX_ROWS / ROW_GROUP * (int64_t)sizeof *w->lanes);
    for (int side = 0; side < 2; side++)
        w->pointers[side] = carve(&at, 2 * DECODE_TILE_K * (int64_t)sizeof *w->pointers[side]);
    w->own = carve(&at, body->body_bytes ? (int64_t)body->body_bytes(p) : 0);
    w->key_scale = carve(&at, page_scale_bytes(p, &p->key_scale, DECODE_TILE_K));
    w->value_scale = carve(&at, page_scale_bytes(p, &p->value_scale, DECODE_TILE_K));
    w->exact = carve(&at, (int64_t)cpu_fwd_ref_row_bytes(p));
    w->dense_key = carve(&at, copy_bytes(&p->key, DECODE_TILE_K, p->dim_qk));
    w->dense_value = carve(&at, copy_bytes(&p->value, DECODE_TILE_K, p->dim_v));
    w->dense_row =
        carve(&at, most(copy_bytes(&p->query, 1, p->dim_qk), copy_bytes(&p->output, 1, p->dim_v)));
    return at - (uintptr_t)base;
}

struct task {
    const struct problem *p;
    struct sequence s;
    int64_t b, kv_head, group;
    int32_t rows; /* in use */
};

static int64_t query_index(const struct task *t, int64_t row) { return row / t->group; }
static int64_t query_head(const struct task *t, int64_t row) {
    return t->kv_head * t->group + row % t->group;
}

static struct task task_of(const struct call *c, int64_t head, struct problem *own) {
    const struct problem *p = c->p;
    struct task t = {.b = head / p->heads_kv, .kv_head = head % p->heads_kv};
    t.p = problem_of_head(p, t.b, t.kv_head, own);
    t.group = group_of(p);
    t.s = problem_sequence(p, t.b);
    t.rows = (int32_t)(t.s.q_rows * t.group);
    return t;
}

/* Row r of the query in f32, times its scale where rows differ in it. */
static void load_query(const struct call *c, const struct task *t, int32_t r, float *to,
                       struct scratch *w) {
    const struct problem *p = t->p;
    const enum dtype dtype = p->query.dtype;
    const struct rows row = {.data = element_at(&p->query, dtype, t->b, query_head(t, r),
                                                t->s.q_start + query_index(t, r))},
                      dense = dense_rows(&row, 1, p->dim_qk, &p->query, dtype, w->dense_row);
    c->body->widen(to, dense.data, p->dim_qk, dtype, p->key.dtype);
    const float factor =
        float8_unit(p->key.dtype) * scale_at(&p->query_scale, t->b, query_head(t, r));
    for (int64_t d = 0; factor != 1 && d < p->dim_qk; d++)
        to[d] *= factor;
}

static void start_part(const struct call *c, const struct task *t, struct part *part,
                       struct scratch *w) {
    const struct problem *p = t->p;
    const int64_t stride = padded_dim(p->dim_qk);
    memset(part->query, 0, (size_t)(part->rows * stride * 4));
    memset(part->output, 0,
           (size_t)(round_up(part->rows, c->body->output_rows) * padded_dim(p->dim_v) * 4));
    for (int32_t r = 0; r < part->rows; r++) {
        part->max[r] = -INFINITY;
        part->sum[r] = part->slope[r] = part->position[r] = 0;
        part->lo[r] = part->hi[r] = 0;
        if (r >= t->rows)
            continue;
        const int64_t i = query_index(t, r), h = query_head(t, r);
        visible_keys(p, &t->s, i, &part->lo[r], &part->hi[r]);
        part->position[r] = (float)(i + t->s.diagonal);
        if (p->alibi_slopes.data)
            part->slope[r] = (float)load_element(p->alibi_slopes.data, DTYPE_F32,
                                                 t->b * p->alibi_slopes.stride[0] +
                                                     h * p->alibi_slopes.stride[1]);
        load_query(c, t, r, part->query + r * stride, w);
    }
    memset(part->lanes, 0, MAX_ROWS / ROW_GROUP * sizeof *part->lanes);
    for (int32_t g = 0; g < MAX_ROWS / ROW_GROUP; g++)
        for (int32_t l = 0; l < c->body->lanes; l++)
            part->lanes[g].max[l] = -INFINITY;
    if (c->body->start)
        c->body->start(part);
}

/* Bias and mask of a tile, in the order of the scores. */
static const float *load_extra(const struct call *c, const struct task *t,
                               const struct part_tile *tile, float *extra) {
    const struct problem *p = t->p;
    const int32_t rows = (int32_t)padded_rows(c->body, t->rows);
    const struct extra_layout layout = {p->bias.dtype, p->bias.stride[3], p->mask.stride[3]};
    float line[DECODE_TILE_K];
    if (!p->bias.data && !p->mask.data)
        return NULL;
    memset(extra, 0, MAX_ROWS * DECODE_TILE_K * 4);
    for (int32_t r = 0; r < t->rows; r++) {
        const struct extra_row row = extra_row_at(p, t->b, query_head(t, r), query_index(t, r));
        c->body->load_extra_row(line, &row, &layout, tile->first_key, tile->n);
        for (int32_t j = 0; j < tile->n; j++)
            extra[score_index(r, j, rows)] = line[j];
    }
    return extra;
}

/* Variants of a plan: how rows are fetched, and, in order, where to. */
enum { PAGE_BY_PAGE, TO_L2_IN_ORDER };

static struct fetch_groups rows_to_fetch(const struct call *c, const struct rows *rows, int32_t n,
                                         int64_t bytes) {
    enum { LINE = 64 };
    struct fetch_groups f = {.at = (uintptr_t)rows->data,
                             .stride = rows->stride,
                             .rows = rows->rows,
                             .step = bytes <= LINE ? 0 : LINE,
                             .lines = (int32_t)most(2, (bytes + LINE - 1) / LINE),
                             .groups = n,
                             .to_l2 = c->plan->variant == TO_L2_IN_ORDER || c->body->fetches_tiles};
    if (c->plan->variant == PAGE_BY_PAGE && !rows->rows && rows->stride == bytes) {
        f.stride = LINE;
        f.step = round_up((n * bytes + f.lines - 1) / f.lines, LINE);
        f.groups = (int32_t)(f.step / LINE);
    }
    return f;
}

static void attend_tile(const struct call *c, const struct task *t, const struct part *part,
                        const struct kv_tile *now, const struct kv_tile *next, struct scratch *w) {
    const struct problem *p = t->p;
    const struct kv_tile *const values = c->body->fetches_tiles ? next : now;
    const int64_t first_key = now->first;
    const int32_t n = now->n;
    struct logit_rule rule;
    struct part_tile tile = {
        .key = dense_rows(&now->keys, n, p->dim_qk, &p->key, p->key.dtype, w->dense_key),
        .value = dense_rows(&now->values, n, p->dim_v, &p->value, p->value.dtype, w->dense_value),
        .first_key = first_key,
        .n = n,
        .scale = score_scale(p),
    };
    tile.value.scale =
        page_scales(p, &p->value_scale, t->b, t->kv_head, first_key, n, w->value_scale);
    if (is_dense(&p->value, p->dim_v)) /* a copy is in the cache */
        tile.values =
            rows_to_fetch(c, &values->values, values->n, p->dim_v * dtype_bytes(p->value.dtype));
    if (is_dense(&p->key, p->dim_qk))
        tile.keys = rows_to_fetch(c, &next->keys, next->n, p->dim_qk * dtype_bytes(p->key.dtype));
    for (int32_t r = 0; r < t->rows; r++)
        tile.bounded |= part->lo[r] > first_key || part->hi[r] < first_key + n;
    if (needs_rule(p)) {
        rule = (struct logit_rule){.scale = (float)p->scale,
                                   .softcap = (float)p->softcap,
                                   .alibi = p->alibi_slopes.data != NULL,
                                   .extra = load_extra(c, t, &tile, w->extra),
                                   .key_scale = page_scales(p, &p->key_scale, t->b, t->kv_head,
                                                            first_key, n, w->key_scale)};
        tile.rule = &rule;
    }
    c->body->attend(part, &tile);
}

static struct part part_at(const struct call *c, const struct task *t, int64_t head,
                           int64_t split) {
    const struct problem *p = t->p;
    struct part part = {.key_dtype = p->key.dtype,
                        .value_dtype = p->value.dtype,
                        .query_is_bf16 = p->query.dtype == DTYPE_BF16 && !p->query_scale.data,
                        .rows = (int32_t)padded_rows(c->body, t->rows),
                        .dim_qk = p->dim_qk,
                        .dim_v = p->dim_v};
    lay_out_part(&part, c->parts + (size_t)(head * c->plan->splits + split) * c->part_bytes, p,
                 c->body);
    return part;
}

/* The sums of the rows, from those of lanes. */
static void add_lanes(struct part *part, int32_t lanes) {
    const int32_t group = part->rows == 1 ? 1 : ROW_GROUP;
    for (int32_t row = 0; row < part->rows; row += group)
        for (int32_t l = 0; l < lanes; l++)
            part->sum[row + l % group] += part->lanes[row / ROW_GROUP].sum[l];
}

static void run_part(const struct call *c, const struct task *t, int64_t head, int64_t split,
                     struct scratch *w) {
    struct part part = part_at(c, t, head, split);
    part.query = w->query;
    part.scores = w->scores;
    part.own = w->own;
    part.lanes = w->lanes;
    start_part(c, t, &part, w);
    int64_t first = INT64_MAX, end = 0;
    for (int32_t r = 0; r < t->rows; r++) {
        if (part.lo[r] < part.hi[r]) {
            first = least(first, part.lo[r]);
            end = most(end, part.hi[r]);
        }
    }
    first = most(first / DECODE_TILE_K * DECODE_TILE_K, split * c->part_keys);
    end = least(end, (split + 1) * c->part_keys);
    struct kv_tile now = kv_tile_at(c->p, &t->s, t->b, t->kv_head, first, end, DECODE_TILE_K,
                                    w->pointers[0]),
                   next;
    for (int side = 1; now.n > 0; now = next, side ^= 1) {
        next = kv_tile_at(c->p, &t->s, t->b, t->kv_head, first += DECODE_TILE_K, end, DECODE_TILE_K,
                          w->pointers[side]);
        attend_tile(c, t, &part, &now, &next, w);
    }
    add_lanes(&part, c->body->lanes);
}

/* Brings all parts of a row to their common maximum and adds them up in the first. */
static void merge_row(struct part *parts, int32_t splits, int32_t r, int64_t dim_v, float scale) {
    const int64_t stride = padded_dim(dim_v);
    float max = -INFINITY, sum = 0;
    for (int32_t n = 0; n < splits; n++)
        max = parts[n].max[r] > max ? parts[n].max[r] : max;
    float *total = parts[0].output + r * stride;
    for (int32_t n = 0; n < splits; n++) {
        const float factor = rescaling(parts[n].max[r], max, scale);
        const float *output = parts[n].output + r * stride;
        sum += parts[n].sum[r] * factor;
        for (int64_t d = 0; d < stride; d++)
            total[d] = n == 0 ? output[d] * factor : total[d] + output[d] * factor;
    }
    parts[0].max[r] = max;
    parts[0].sum[r] = sum;
}

/* A row of the output, in the order of values, to `to`. */
static void store_row(const struct call *c, char *to, const float *output, const struct problem *p,
                      struct scratch *w) {
    const bool dense = is_dense(&p->output, p->dim_v);
    const char *const copy = w->dense_row;
    c->body->narrow(dense ? to : w->dense_row, output, p->dim_v, p->output.dtype, p->value.dtype);
    if (!dense)
        copy_elements(&to, p->output.stride[3], &copy, 1, 1, p->dim_v, p->output.dtype);
}

/* A query times its scale or the unit of keys may be more than f32 holds where no logit is, and is a sum of terms by AMX, infinity
 * being none: a sum that is NaN need not be the row's own. */
static bool makes_nan(const struct problem *p) {
    return p->query_scale.data || float8_unit(p->key.dtype) != 1;
}

/* See needs_reference() of forward.c for rows that are computed again. */
static void finish_head(const struct call *c, const struct task *t, int64_t head,
                        struct scratch *w) {
    const struct problem *p = t->p;
    struct part parts[MAX_SPLITS];
    for (int32_t n = 0; n < c->plan->splits; n++)
        parts[n] = part_at(c, t, head, n);
    for (int32_t r = 0; r < t->rows; r++) {
        const int64_t i = query_index(t, r), h = query_head(t, r);
        merge_row(parts, c->plan->splits, r, p->dim_v, score_scale(p));
        const float factor = float8_unit(p->value.dtype) *
                             end_row(p, &t->s, t->b, h, i, parts[0].max[r], parts[0].sum[r]);
        float *output = parts[0].output + r * padded_dim(p->dim_v), zeros = 0;
        for (int64_t d = 0; d < padded_dim(p->dim_v); d++) {
            output[d] *= factor;
            zeros += 0 * output[d]; /* NaN for NaN and infinity */
        }
        store_row(c, element_at(&p->output, p->output.dtype, t->b, h, t->s.q_start + i), output, p,
                  w);
        if ((isnan(zeros) && (!isnan(parts[0].sum[r]) || makes_nan(p))) ||
            row_overflowed(p, &t->s, i, parts[0].max[r], parts[0].sum[r]))
            cpu_fwd_ref_row(p, &t->s, t->b, h, i, w->exact);
    }
}

static void worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    const int64_t splits = c->plan->splits, tasks = heads_of(c->p) * splits;
    struct problem own;
    struct scratch w;
    lay_out_worker(&w, c->workers + (size_t)index * c->worker_bytes, c->p, c->body);
    if (c->body->enter)
        c->body->enter();
    for (int64_t n;
         (n = atomic_fetch_add_explicit(&c->next_task, 1, memory_order_relaxed)) < tasks;) {
        const int64_t head = n / splits;
        const struct task t = task_of(c, head, &own);
        if (t.rows == 0)
            continue;
        run_part(c, &t, head, n % splits, &w);
        if (count_done(&c->parts_done[head], splits))
            finish_head(c, &t, head, &w);
    }
    if (c->body->leave)
        c->body->leave();
}

enum { LEAST_KEYS = 256 }; /* of a part */

/* Enough parts for many threads where there are few heads, none shorter than LEAST_KEYS. */
static int64_t part_keys(const struct problem *p) {
    enum { TASKS = 128 };
    const int64_t parts = most(1, least(MAX_SPLITS, TASKS / most(1, heads_of(p))));
    return most(LEAST_KEYS, round_up((p->len_k + parts - 1) / parts, DECODE_TILE_K));
}

bool decode_plan(struct plan *plan, const struct problem *p, const struct caps *caps,
                 const struct decode_body *body) {
    const int64_t rows = p->len_q * group_of(p);
    /* A full vector of rows and few keys: the forward rows do that without parts and merging. */
    if (rows > MAX_ROWS || (rows > MAX_ROWS / 2 && p->len_k <= LEAST_KEYS) || !options_fit_f32(p))
        return false;
    struct part part;
    struct scratch w;
    plan->variant = caps->cpu & CPU_FETCHES_TO_L2 ? TO_L2_IN_ORDER : PAGE_BY_PAGE;
    plan->splits = (int32_t)most(1, (p->len_k + part_keys(p) - 1) / part_keys(p));
    plan->threads = (int32_t)most(1, least(plan->threads, heads_of(p) * plan->splits));
    plan->workspace_bytes =
        counters_bytes(heads_of(p)) +
        lay_out_part(&part, NULL, p, body) * (size_t)(heads_of(p) * plan->splits) +
        lay_out_worker(&w, NULL, p, body) * (size_t)plan->threads;
    return true;
}

int32_t decode_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                      const struct decode_body *body) {
    struct part part;
    struct scratch w;
    struct call c = {
        .body = body,
        .plan = plan,
        .p = p,
        .part_keys = part_keys(p),
        .parts_done = exec->workspace,
        .parts = (char *)exec->workspace + counters_bytes(heads_of(p)),
        .part_bytes = lay_out_part(&part, NULL, p, body),
        .worker_bytes = lay_out_worker(&w, NULL, p, body),
    };
    c.workers = c.parts + c.part_bytes * (size_t)(heads_of(p) * plan->splits);
    memset(exec->workspace, 0, counters_bytes(heads_of(p)));
    threads_run(exec, plan->threads, worker, &c);
    return DLATTN_OK;
}
