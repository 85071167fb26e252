/*
 * The truth of backward: every wide dtype, every feature but pages, plain loops in double. First the maximum, the sum and delta of each
 * row, from the inputs alone: the output and the lse of forward are rounded. Then each gradient by itself: of a query row, of a key
 * and its value, of a row of the bias, of a slope, of a sink. Nobody adds to what another worker adds to, so the number of threads
 * changes no bit. Not meant to be fast.
 */
#include "kernels/ref/pair.h"

#include <math.h>
#include <stdatomic.h>

/* Of a query row: its weights are exp(s - top) / total. */
struct stats {
    double top, total, delta;
};

enum { ROW_STATS, QUERY_ROWS, KEYS, BIAS_ROWS, SLOPES, SINKS, PHASES };

struct call {
    const struct problem *p;
    struct stats *stats; /* [batch][heads_q][len_q] */
    double *scratch;     /* of each worker, scratch_doubles */
    size_t scratch_doubles;
    int phase_first, phase_end; /* of PHASES, what is computed now */
    _Atomic int64_t next;
};

/* Axes that a bias has of its own; along the others one number stands for all. */
static bool spans(const struct view *d_bias, int axis) { return d_bias->stride[axis] != 0; }

static int64_t bias_rows(const struct problem *p) {
    return (spans(&p->d_bias, 0) ? p->batch : 1) * (spans(&p->d_bias, 1) ? p->heads_q : 1) *
           (spans(&p->d_bias, 2) ? p->len_q : 1);
}

static int64_t items_of(const struct problem *p, int phase) {
    switch (phase) {
    case ROW_STATS:
        return p->batch * p->heads_q * p->len_q;
    case QUERY_ROWS:
        return p->d_query.data ? p->batch * p->heads_q * p->len_q : 0;
    case KEYS:
        return p->d_key.data || p->d_value.data ? p->batch * p->heads_kv * p->len_k : 0;
    case BIAS_ROWS:
        return p->d_bias.data ? bias_rows(p) : 0;
    case SLOPES:
        return p->d_alibi_slopes.data ? (p->d_alibi_slopes.stride[0] ? p->batch : 1) * p->heads_q
                                      : 0;
    default:
        return p->d_sinks.data ? p->heads_q : 0;
    }
}

static struct stats *stats_of(const struct call *c, const struct query_row *r) {
    return &c->stats[(r->b * c->p->heads_q + r->h) * c->p->len_q + r->i];
}

static double dot_values(const struct query_row *r, int64_t j) {
    const struct problem *p = r->p;
    return dot(&p->d_output, query_at(r, &p->d_output), &p->value, key_at(r, &p->value, j),
               p->dim_v);
}

/* Of key j that the row sees: its weight, and the gradient of its logit. */
struct pair {
    double weight, d_logit, cap_slope;
    bool seen;
};

static struct pair pair_of(const struct call *c, const struct query_row *r, int64_t j) {
    const struct stats *stats = stats_of(c, r);
    struct pair pair = {.seen = false};
    const double s = logit(r, j, &pair.cap_slope), keep = kept(r, j);
    if (s == -INFINITY)
        return pair;
    pair.seen = true;
    pair.weight = exp(s - stats->top) / stats->total;
    pair.d_logit = pair.weight * ((keep == 0 ? 0 : keep * dot_values(r, j)) - stats->delta);
    return pair;
}

/* The row's own keys, and the row. */
static struct query_row row_at(const struct call *c, int64_t b, int64_t h, int64_t i) {
    return (struct query_row){c->p, problem_sequence(c->p, b), b, h, i};
}

static bool in_window(const struct query_row *r, int64_t j) {
    int64_t lo, hi;
    visible_keys(r->p, &r->s, r->i, &lo, &hi);
    return j >= lo && j < hi;
}

/* ---- The items of each phase ----------------------------------------------------------------- */

static void find_stats(const struct call *c, const struct query_row *r) {
    const struct problem *p = c->p;
    struct stats *stats = stats_of(c, r);
    double slope, sum = 0;
    int64_t lo, hi;
    *stats = (struct stats){.top = sink_of(r)};
    visible_keys(p, &r->s, r->i, &lo, &hi);
    for (int64_t j = lo; j < hi; j++)
        stats->top = fmax(stats->top, logit(r, j, &slope));
    stats->total = stats->top == sink_of(r) && isfinite(stats->top) ? 1 : 0;
    if (sink_of(r) != -INFINITY)
        stats->total = exp(sink_of(r) - stats->top);
    for (int64_t j = lo; j < hi; j++) {
        const double s = logit(r, j, &slope), keep = kept(r, j);
        if (s == -INFINITY)
            continue;
        const double weight = exp(s - stats->top);
        stats->total += weight;
        sum += keep == 0 ? 0 : weight * keep * dot_values(r, j);
    }
    stats->delta = stats->total == 0 ? 0 : sum / stats->total;
    if (p->d_lse.data)
        stats->delta -= element(&p->d_lse, query_at(r, &p->d_lse), 0);
}

static void store_all(const struct view *v, int64_t first, const double *from, int64_t n) {
    for (int64_t d = 0; d < n; d++)
        store_element(v->data, v->dtype, first + d * v->stride[3], from[d]);
}

static void find_d_query(const struct call *c, const struct query_row *r, double *sum) {
    const struct problem *p = c->p;
    int64_t lo, hi;
    for (int64_t d = 0; d < p->dim_qk; d++)
        sum[d] = 0;
    visible_keys(p, &r->s, r->i, &lo, &hi);
    for (int64_t j = lo; j < hi; j++) {
        const struct pair pair = pair_of(c, r, j);
        if (pair.seen)
            add_row(sum, p->scale * pair.d_logit * pair.cap_slope, &p->key, key_at(r, &p->key, j),
                    p->dim_qk);
    }
    store_all(&p->d_query, query_at(r, &p->d_query), sum, p->dim_qk);
}

static void add_row_to_key(const struct call *c, const struct query_row *r, int64_t j,
                           double *d_key, double *d_value) {
    const struct problem *p = c->p;
    const struct pair pair = pair_of(c, r, j);
    const double keep = kept(r, j);
    if (!pair.seen)
        return;
    add_row(d_key, p->scale * pair.d_logit * pair.cap_slope, &p->query, query_at(r, &p->query),
            p->dim_qk);
    if (keep != 0)
        add_row(d_value, pair.weight * keep, &p->d_output, query_at(r, &p->d_output), p->dim_v);
}

static void find_d_key(const struct call *c, int64_t b, int64_t g, int64_t j, double *scratch) {
    const struct problem *p = c->p;
    const int64_t group = p->heads_q / p->heads_kv;
    const struct sequence s = problem_sequence(p, b);
    double *d_key = scratch, *d_value = scratch + p->dim_qk;
    if (j >= s.k_rows)
        return;
    for (int64_t d = 0; d < p->dim_qk + p->dim_v; d++)
        scratch[d] = 0;
    for (int64_t n = 0; n < group * s.q_len; n++) {
        const struct query_row r = {p, s, b, g * group + n / s.q_len, n % s.q_len};
        if (in_window(&r, j))
            add_row_to_key(c, &r, j, d_key, d_value);
    }
    if (p->d_key.data)
        store_all(&p->d_key, row_of(&p->d_key, b, g, s.k_start + j), d_key, p->dim_qk);
    if (p->d_value.data)
        store_all(&p->d_value, row_of(&p->d_value, b, g, s.k_start + j), d_value, p->dim_v);
}

/* The sum of the logits' gradients of a row over key j, or every key if it is -1. */
static double sum_of_row(const struct call *c, const struct query_row *r, int64_t j,
                         bool by_distance) {
    double sum = 0;
    int64_t lo, hi;
    visible_keys(c->p, &r->s, r->i, &lo, &hi);
    if (j >= 0) {
        hi = lo <= j && j < hi ? j + 1 : j;
        lo = j;
    }
    for (int64_t k = lo; k < hi; k++) {
        const struct pair pair = pair_of(c, r, k);
        if (pair.seen)
            sum += by_distance ? -pair.d_logit * distance(r, k) : pair.d_logit;
    }
    return sum;
}

/* From index to the one behind it, or if it is -1, over all that an axis has. */
struct range {
    int64_t first, end;
};
static struct range range_of(int64_t index, int64_t extent) {
    return index < 0 ? (struct range){0, extent} : (struct range){index, index + 1};
}

/* The same of all rows with batch b, head h and row i; -1: any. */
static double sum_d_logits(const struct call *c, int64_t b, int64_t h, int64_t i, int64_t j,
                           bool by_distance) {
    const struct range batch = range_of(b, c->p->batch), heads = range_of(h, c->p->heads_q),
                       rows = range_of(i, c->p->len_q);
    double sum = 0;
    for (b = batch.first; b < batch.end; b++) {
        for (h = heads.first; h < heads.end; h++) {
            for (i = rows.first; i < rows.end; i++) {
                const struct query_row r = row_at(c, b, h, i);
                sum += sum_of_row(c, &r, j, by_distance);
            }
        }
    }
    return sum;
}

static void find_d_bias(const struct call *c, int64_t item) {
    const struct problem *p = c->p;
    const struct view *v = &p->d_bias;
    const int64_t rows = spans(v, 2) ? p->len_q : 1, heads = spans(v, 1) ? p->heads_q : 1;
    const int64_t i = item % rows, h = item / rows % heads, b = item / rows / heads;
    for (int64_t j = 0; j < (spans(v, 3) ? p->len_k : 1); j++)
        store_element(v->data, v->dtype, row_of(v, b, h, i) + j * v->stride[3],
                      sum_d_logits(c, spans(v, 0) ? b : -1, spans(v, 1) ? h : -1,
                                   spans(v, 2) ? i : -1, spans(v, 3) ? j : -1, false));
}

static void find_d_slope(const struct call *c, int64_t b, int64_t h) {
    const struct view *v = &c->p->d_alibi_slopes;
    store_element(v->data, v->dtype, b * v->stride[0] + h * v->stride[1],
                  sum_d_logits(c, v->stride[0] ? b : -1, h, -1, -1, true));
}

static void find_d_sink(const struct call *c, int64_t h) {
    const struct problem *p = c->p;
    double sum = 0;
    for (int64_t n = 0; n < p->batch * p->len_q; n++) {
        const struct query_row r = row_at(c, n / p->len_q, h, n % p->len_q);
        const struct stats *stats = stats_of(c, &r);
        if (r.i < r.s.q_rows && sink_of(&r) != -INFINITY)
            sum -= exp(sink_of(&r) - stats->top) / stats->total * stats->delta;
    }
    store_element(p->d_sinks.data, p->d_sinks.dtype, h * p->d_sinks.stride[1], sum);
}

/* ---- The call -------------------------------------------------------------------------------- */

static void run_item(const struct call *c, int phase, int64_t n, double *scratch) {
    const struct problem *p = c->p;
    if (phase == ROW_STATS || phase == QUERY_ROWS) {
        const struct query_row r =
            row_at(c, n / p->len_q / p->heads_q, n / p->len_q % p->heads_q, n % p->len_q);
        if (r.i >= r.s.q_rows)
            return;
        if (phase == ROW_STATS)
            find_stats(c, &r);
        else
            find_d_query(c, &r, scratch);
    } else if (phase == KEYS) {
        find_d_key(c, n / p->len_k / p->heads_kv, n / p->len_k % p->heads_kv, n % p->len_k,
                   scratch);
    } else if (phase == BIAS_ROWS) {
        find_d_bias(c, n);
    } else if (phase == SLOPES) {
        find_d_slope(c, n / p->heads_q, n % p->heads_q);
    } else {
        find_d_sink(c, n);
    }
}

static void worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    double *scratch = c->scratch + (size_t)index * c->scratch_doubles;
    for (;;) {
        int64_t n = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed);
        int phase = c->phase_first;
        while (phase < c->phase_end && n >= items_of(c->p, phase))
            n -= items_of(c->p, phase++);
        if (phase == c->phase_end)
            return;
        run_item(c, phase, n, scratch);
    }
}

static size_t stats_bytes(const struct problem *p) {
    return ((size_t)(p->batch * p->heads_q * p->len_q) * sizeof(struct stats) + 63) / 64 * 64;
}

static size_t scratch_doubles(const struct problem *p) {
    return ((size_t)(p->dim_qk + p->dim_v) + 7) / 8 * 8;
}

ROW_FUNCTIONS(cpu_bwd_ref);

bool cpu_bwd_ref_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    plan->workspace_bytes =
        stats_bytes(p) + scratch_doubles(p) * sizeof(double) * (size_t)plan->threads;
    return true;
}

int32_t cpu_bwd_ref_launch(const struct plan *plan, const struct problem *p,
                           const struct exec *exec) {
    struct call c = {
        .p = p,
        .stats = exec->workspace,
        .scratch = (double *)(void *)((char *)exec->workspace + stats_bytes(p)),
        .scratch_doubles = scratch_doubles(p),
    };
    const int ends[] = {ROW_STATS + 1, PHASES};
    for (int n = 0; n < 2; n++) {
        c.phase_first = n == 0 ? ROW_STATS : ends[0];
        c.phase_end = ends[n];
        atomic_store(&c.next, 0);
        threads_run(exec, plan->threads, worker, &c);
    }
    return DLATTN_OK;
}
