/*
 * The driver of the cpu_fwd_f64 rows. A task is (batch, kv head, run of query rows of the head's group), row i * group + g
 * for query row i of head g; within it each key tile is brought in once for all blocks. How rows fall into blocks and
 * keys into tiles depends on the shape alone, so no bit depends on the number of threads or on the size of a task.
 */
#include "kernels/cpu/f64.h"
#include "kernels/ref/ref.h"
#include "src/element.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

struct call {
    const struct f64_body *body;
    const struct plan *plan;
    const struct problem *p;
    char *workspace;
    size_t worker_bytes;
    int64_t group, lanes; /* query heads of a kv head; query rows of a block */
    int64_t runs, tasks;  /* tasks of one kv head of one batch; of all */
    _Atomic int64_t next_task;
};

/* One worker's share of the workspace. */
struct scratch {
    struct f64_block *blocks;
    double *scores, *extra; /* [key][lane] */
    double *key, *value;    /* of a tile that cannot be used in place */
    double *rows; /* [lane][row_stride]: one block on the way in or out, or its bias and mask */
    const char **pointers[2]; /* of this tile's keys and values, and of the next one's */
    double *exact;
};

/* Lanes are laid out for the widest block of the body. */
static int64_t lane_stride(const struct f64_body *body) {
    return body->vectors * body->vector_lanes;
}

static int64_t row_stride(const struct problem *p) {
    return round_up(most(most(p->dim_qk, p->dim_v), F64_TILE_K), 8);
}

/* Query rows of a block: fewer than there is room for only where that makes more tasks out of few. */
static int64_t block_lanes(const struct f64_body *body, const struct problem *p) {
    enum { TASKS = 16 };
    const int64_t rows = p->len_q * group_of(p), heads = p->batch * p->heads_kv;
    int64_t vectors = body->vectors;
    while (vectors > 1 && heads * ((rows - 1) / (vectors * body->vector_lanes) + 1) < TASKS)
        vectors /= 2;
    return vectors * body->vector_lanes;
}

/* Lays a worker's scratch out from `base` (NULL to measure) and returns its bytes. */
static size_t lay_out(struct scratch *w, char *base, const struct f64_body *body,
                      const struct plan *plan, const struct problem *p) {
    enum { BYTES = sizeof(double) };
    const int64_t lanes = lane_stride(body), blocks = plan->tile_q / block_lanes(body, p);
    const bool extra = p->features & (DLATTN_FEATURE_BIAS | DLATTN_FEATURE_MASK),
               copies = p->features & (DLATTN_FEATURE_PAGED | DLATTN_FEATURE_INNER_STRIDE);
    uintptr_t at = (uintptr_t)base;
    w->blocks = carve(&at, blocks * (int64_t)sizeof *w->blocks);
    w->scores = carve(&at, F64_TILE_K * lanes * BYTES);
    w->extra = carve(&at, extra ? F64_TILE_K * lanes * BYTES : 0);
    w->key = carve(&at, copies ? F64_TILE_K * p->dim_qk * BYTES : 0);
    w->value = carve(&at, copies ? F64_TILE_K * p->dim_v * BYTES : 0);
    w->rows = carve(&at, lanes * row_stride(p) * BYTES);
    for (int n = 0; n < 2; n++)
        w->pointers[n] = carve(&at, 2 * F64_TILE_K * (int64_t)sizeof **w->pointers);
    w->exact = carve(&at, (int64_t)cpu_fwd_ref_row_bytes(p));
    for (int64_t n = 0; n < blocks; n++) {
        double *query = carve(&at, round_up(p->dim_qk, 4) * lanes * BYTES),
               *output = carve(&at, round_up(p->dim_v, 4) * lanes * BYTES);
        if (base) {
            w->blocks[n].query = query;
            w->blocks[n].output = output;
        }
    }
    return at - (uintptr_t)base;
}

struct task {
    const struct call *call;
    const struct problem *p;
    struct sequence s;
    int64_t b, kv_head;
    int64_t first_row, rows;
};

/* Query row i of head h. */
struct query_row {
    int64_t i, h;
};

static struct query_row query_row_at(const struct task *t, int64_t row) {
    const int64_t group = t->call->group;
    return (struct query_row){row / group, t->kv_head * group + row % group};
}

/* ---- Copies ----------------------------------------------------------------------------------------------------- */

/* n elements, `stride` apart on either side; the tensor's need not be aligned. */
static void gather(double *to, const char *from, int64_t stride, int64_t n) {
    if (stride == 1) {
        memcpy(to, from, (size_t)n * sizeof *to);
        return;
    }
    for (int64_t d = 0; d < n; d++)
        memcpy(to + d, from + d * stride * (int64_t)sizeof *to, sizeof *to);
}

static void scatter(char *to, const double *from, int64_t stride, int64_t n) {
    if (stride == 1) {
        memcpy(to, from, (size_t)n * sizeof *from);
        return;
    }
    for (int64_t d = 0; d < n; d++)
        memcpy(to + d * stride * (int64_t)sizeof *from, from + d, sizeof *from);
}

/* From element to element of a row; a row of one element has a stride of 0 and lies side by side, too. */
static int64_t inner_stride(const struct view *v, int64_t dim) {
    return dim > 1 ? v->stride[3] : 1;
}

/* A tile's keys or values: in place where their elements lie side by side, else copied along the shorter stride, so that
 * what is read together lies together. */
static struct f64_operand load(double *to, const struct rows *rows, int64_t inner, int64_t n,
                               int64_t dim) {
    enum { BYTES = sizeof(double) };
    if (!rows->rows && inner == 1)
        return (struct f64_operand){(const double *)(const void *)rows->data, rows->stride / BYTES,
                                    1};
    if (!rows->rows && llabs(rows->stride) < llabs(inner * BYTES)) {
        for (int64_t d = 0; d < dim; d++)
            gather(to + d * F64_TILE_K, rows->data + d * inner * BYTES, rows->stride / BYTES, n);
        return (struct f64_operand){to, 1, F64_TILE_K};
    }
    for (int64_t r = 0; r < n; r++)
        gather(to + r * dim, row_at(rows, r), inner, dim);
    return (struct f64_operand){to, dim, 1};
}

/* ---- The beginning of a block ------------------------------------------------------------------------------------ */

static void set_lane(const struct task *t, struct f64_block *b, int64_t lane, struct query_row r) {
    const struct problem *p = t->p;
    int64_t lo, hi;
    visible_keys(p, &t->s, r.i, &lo, &hi);
    b->lo[lane] = lo;
    b->hi[lane] = hi;
    b->position[lane] = (double)(r.i + t->s.diagonal);
    if (p->alibi_slopes.data)
        b->slope[lane] =
            load_element(p->alibi_slopes.data, DTYPE_F32,
                         t->b * p->alibi_slopes.stride[0] + r.h * p->alibi_slopes.stride[1]);
    b->full_first = most(b->full_first, lo);
    b->full_end = least(b->full_end, hi);
    if (lo < hi) {
        b->first = least(b->first, lo);
        b->end = most(b->end, hi);
    }
}

/* Rows [first, first + rows) of the task's group. Lanes out of use compute with a query of 0 and are never stored. */
static void start_block(const struct task *t, struct f64_block *b, int64_t first, int64_t rows,
                        struct scratch *w) {
    const struct problem *p = t->p;
    const struct f64_body *body = t->call->body;
    const int64_t stride = row_stride(p);
    b->rows = (int32_t)rows;
    for (b->vectors = 1; b->vectors * body->vector_lanes < rows;)
        b->vectors *= 2;
    const int64_t lanes = b->vectors * body->vector_lanes;
    b->fresh = true;
    b->first = INT64_MAX;
    b->end = b->full_first = 0;
    b->full_end = INT64_MAX;
    for (int64_t lane = 0; lane < lanes; lane++) {
        b->max[lane] = -INFINITY;
        b->sum[lane] = b->slope[lane] = b->position[lane] = 0;
        b->lo[lane] = 0;
        b->hi[lane] = INT64_MAX;
    }
    memset(w->rows + rows * stride, 0, (size_t)((lanes - rows) * stride) * sizeof *w->rows);
    for (int64_t lane = 0; lane < rows; lane++) {
        const struct query_row r = query_row_at(t, first + lane);
        set_lane(t, b, lane, r);
        gather(w->rows + lane * stride,
               element_at(&p->query, p->dtype, t->b, r.h, t->s.q_start + r.i), p->query.stride[3],
               p->dim_qk);
    }
    body->transpose(b->query, lane_stride(body), w->rows, stride, lanes, round_up(p->dim_qk, 4));
}

/* ---- One tile of one block --------------------------------------------------------------------------------------- */

/* to[j] = bias of key first_key + j, or HIDDEN. */
static void load_extra_row(double *to, const struct problem *p, const struct extra_row *row,
                           int64_t first_key, int32_t n) {
    const uint64_t hidden = F64_HIDDEN_BITS;
    for (int64_t j = 0; j < n; j++)
        to[j] = 0;
    for (int64_t j = 0; j < n && row->bias; j++)
        to[j] = load_element(row->bias, p->bias.dtype, (first_key + j) * p->bias.stride[3]);
    for (int64_t j = 0; j < n && row->mask; j++)
        if (!row->mask[(first_key + j) * p->mask.stride[3]])
            memcpy(to + j, &hidden, sizeof hidden);
}

/* extra[key][lane]. A row that all lanes share, as when keys are padding, is read once. */
static const double *load_extra(const struct task *t, const struct f64_block *b, int64_t first_row,
                                int64_t first_key, int32_t n, struct scratch *w) {
    const struct problem *p = t->p;
    const struct f64_body *body = t->call->body;
    const int64_t stride = row_stride(p), lanes = b->vectors * body->vector_lanes;
    struct extra_row row[F64_MAX_LANES];
    bool shared = true;
    if (!p->bias.data && !p->mask.data)
        return NULL;
    for (int64_t lane = 0; lane < b->rows; lane++) {
        const struct query_row r = query_row_at(t, first_row + lane);
        row[lane] = extra_row_at(p, t->b, r.h, r.i);
        shared &= row[lane].bias == row[0].bias && row[lane].mask == row[0].mask;
    }
    for (int64_t lane = 0; lane < lanes; lane++) {
        double *to = w->rows + lane * stride;
        if (lane >= b->rows)
            memset(to, 0, (size_t)n * sizeof *to);
        else if (lane > 0 && shared)
            memcpy(to, w->rows, (size_t)n * sizeof *to);
        else
            load_extra_row(to, p, &row[lane], first_key, n);
    }
    body->transpose(w->extra, lane_stride(body), w->rows, stride, lanes, round_up(n, 4));
    return w->extra;
}

/* ---- The end of a row -------------------------------------------------------------------------------------------- */

/* Counts the sink, writes lse, and returns the factor that the output still needs. */
static double end_lane(const struct task *t, struct query_row r, double max, double sum) {
    const struct problem *p = t->p;
    double shrink = 1;
    if (p->sinks.data) {
        const double sink = load_element(p->sinks.data, DTYPE_F32, r.h * p->sinks.stride[1]),
                     before = max;
        max = fmax(before, sink);
        shrink = before == -INFINITY ? 0 : exp(before - max);
        sum = sum * shrink + (sink == -INFINITY ? 0 : exp(sink - max));
    }
    if (p->lse.data) {
        const double none = p->empty_lse_inf ? INFINITY : -INFINITY;
        store_element(p->lse.data, p->lse.dtype,
                      t->b * p->lse.stride[0] + r.h * p->lse.stride[1] +
                          (t->s.q_start + r.i) * p->lse.stride[2],
                      sum == 0 ? none : max + log(sum));
    }
    return sum == 0 ? 0 : shrink / sum;
}

/* A row that is not finite although its sum is has met 0 * NaN or 0 * infinity: maybe from a masked key, whose value must
 * not count. The reference finds out, value by value. */
static void finish_block(const struct task *t, struct f64_block *b, int64_t first,
                         struct scratch *w) {
    const struct problem *p = t->p;
    const struct f64_body *body = t->call->body;
    const int64_t lanes = b->vectors * body->vector_lanes, stride = row_stride(p);
    double factor[F64_MAX_LANES] = {0};
    bool finite[F64_MAX_LANES];
    for (int64_t lane = 0; lane < b->rows; lane++)
        factor[lane] = end_lane(t, query_row_at(t, first + lane), b->max[lane], b->sum[lane]);
    if (b->fresh)
        memset(b->output, 0, (size_t)(p->dim_v * lane_stride(body)) * sizeof *b->output);
    body->scale_output(b, factor, p->dim_v, finite);
    body->transpose(w->rows, stride, b->output, lane_stride(body), round_up(p->dim_v, 4), lanes);
    for (int64_t lane = 0; lane < b->rows; lane++) {
        const struct query_row r = query_row_at(t, first + lane);
        scatter(element_at(&p->output, p->dtype, t->b, r.h, t->s.q_start + r.i),
                w->rows + lane * stride, p->output.stride[3], p->dim_v);
        if (!finite[lane] && !isnan(b->sum[lane]))
            cpu_fwd_ref_row(p, &t->s, t->b, r.h, r.i, w->exact);
    }
}

/* ---- Tasks ------------------------------------------------------------------------------------------------------- */

static void attend_tile(const struct task *t, const struct kv_tile *tile,
                        const struct kv_tile *next, struct scratch *w) {
    const struct problem *p = t->p;
    const int64_t lanes = t->call->lanes, blocks = (t->rows + lanes - 1) / lanes;
    struct f64_tile now = {
        .key = load(w->key, &tile->keys, inner_stride(&p->key, p->dim_qk), tile->n, p->dim_qk),
        .value =
            load(w->value, &tile->values, inner_stride(&p->value, p->dim_v), tile->n, p->dim_v),
        .first_key = tile->first,
        .dim_qk = p->dim_qk,
        .dim_v = p->dim_v,
        .rule = needs_rule(p),
        .scale = p->scale,
        .softcap = p->softcap,
        .alibi = p->alibi_slopes.data != NULL,
    };
    for (int64_t n = 0; n < blocks; n++) {
        struct f64_block *b = &w->blocks[n];
        struct fetch share = kv_tile_share(p, next, n, blocks);
        if (tile->first + F64_TILE_K > b->first && tile->first < b->end) {
            now.n = (int32_t)least(tile->n, b->end - tile->first);
            now.extra = load_extra(t, b, t->first_row + n * lanes, tile->first, now.n, w);
            now.next = &share;
            t->call->body->attend(b, &now, w->scores);
        }
        fetch_rows(&share, share.end);
    }
}

static void run_task(const struct task *t, struct scratch *w) {
    const struct problem *p = t->p;
    const int64_t lanes = t->call->lanes;
    int64_t first = INT64_MAX, end = 0;
    for (int64_t row = 0; row < t->rows; row += lanes) {
        struct f64_block *b = &w->blocks[row / lanes];
        start_block(t, b, t->first_row + row, least(lanes, t->rows - row), w);
        first = least(first, b->first);
        end = most(end, b->end);
    }
    struct kv_tile tile =
        kv_tile_at(p, &t->s, t->b, t->kv_head, least(first, end) / F64_TILE_K * F64_TILE_K, end,
                   F64_TILE_K, w->pointers[0]);
    for (int parity = 1; tile.n > 0; parity ^= 1) {
        const struct kv_tile next = kv_tile_at(p, &t->s, t->b, t->kv_head, tile.first + tile.n, end,
                                               F64_TILE_K, w->pointers[parity]);
        attend_tile(t, &tile, &next, w);
        tile = next;
    }
    for (int64_t row = 0; row < t->rows; row += lanes)
        finish_block(t, &w->blocks[row / lanes], t->first_row + row, w);
}

/* The last rows first, because causal rows grow heavier. */
static void worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    const struct problem *p = c->p;
    const int64_t heads = p->batch * p->heads_kv, tile_q = c->plan->tile_q;
    struct scratch w;
    lay_out(&w, c->workspace + (size_t)index * c->worker_bytes, c->body, c->plan, p);
    for (int64_t n;
         (n = atomic_fetch_add_explicit(&c->next_task, 1, memory_order_relaxed)) < c->tasks;) {
        struct task t = {.call = c,
                         .p = p,
                         .b = n % heads / p->heads_kv,
                         .kv_head = n % p->heads_kv,
                         .first_row = (c->runs - 1 - n / heads) * tile_q};
        t.s = problem_sequence(p, t.b);
        t.rows = least(tile_q, t.s.q_rows * c->group - t.first_row);
        if (t.rows > 0)
            run_task(&t, &w);
    }
}

bool f64_plan(struct plan *plan, const struct problem *p, const struct f64_body *body) {
    plan_tasks(plan, p, block_lanes(body, p));
    struct scratch w;
    plan->workspace_bytes = lay_out(&w, NULL, body, plan, p) * (size_t)plan->threads;
    return true;
}

int32_t f64_launch(const struct plan *plan, const struct problem *p, const struct exec *exec,
                   const struct f64_body *body) {
    struct call c = {
        .body = body,
        .plan = plan,
        .p = p,
        .workspace = exec->workspace,
        .worker_bytes = plan->workspace_bytes / (size_t)plan->threads,
        .group = group_of(p),
        .lanes = block_lanes(body, p),
        .runs = runs_of(p, plan->tile_q),
    };
    c.tasks = c.runs * p->batch * p->heads_kv;
    threads_run(exec, plan->threads, worker, &c);
    return DLATTN_OK;
}
