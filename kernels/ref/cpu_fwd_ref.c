/*
 * The truth: every dtype, every feature, plain loops in double. A query row takes its visible keys a few at a time, all their logits
 * first, then the weighted sum of their values, which is brought to the new maximum where that grew. Not meant to be fast.
 */
#include "kernels/ref/pair.h"
#include "kernels/ref/ref.h"

#include <math.h>
#include <stdatomic.h>

enum { CHUNK = 256 }; /* keys */

struct call {
    const struct problem *p;
    char *workspace;
    size_t scratch_bytes;
    _Atomic int64_t next_row;
};

/* What a row has gathered. */
struct sums {
    double top, total;
    double *values; /* [dim_v] */
    bool empty;     /* no key seen */
};

static void raise_top(struct sums *sums, double top, int64_t dim_v) {
    if (!(top > sums->top)) /* NaN stays out */
        return;
    const double factor = sums->top == -INFINITY ? 0 : exp(sums->top - top);
    sums->top = top;
    sums->total *= factor;
    for (int64_t d = 0; d < dim_v; d++)
        sums->values[d] *= factor;
}

/* A key whose logit is -inf, by mask or by bias, is as invisible as one outside the window: its value is never read into the
 * sum. NaN in a visible key is kept, so that the caller sees it. */
static void add_keys(const struct query_row *r, struct sums *sums, double *scores, int64_t first,
                     int64_t end) {
    const struct problem *p = r->p;
    double top = -INFINITY, slope;
    for (int64_t j = first; j < end; j++) {
        scores[j - first] = logit(r, j, &slope);
        top = fmax(top, scores[j - first]);
    }
    raise_top(sums, top, p->dim_v);
    for (int64_t j = first; j < end; j++) {
        if (scores[j - first] == -INFINITY)
            continue;
        const double weight = exp(scores[j - first] - sums->top), keep = kept(r, j);
        const double factor = weight * keep * key_scale_at(r, &p->value_scale, j);
        sums->empty = false;
        sums->total += weight;
        if (keep != 0)
            add_row(sums->values, factor, &p->value, key_at(r, &p->value, j), p->dim_v);
    }
}

static void store_row(const struct query_row *r, const struct sums *sums) {
    const struct problem *p = r->p;
    const int64_t o = query_at(r, &p->output);
    for (int64_t d = 0; d < p->dim_v; d++)
        store_element(p->output.data, p->output.dtype, o + d * p->output.stride[3],
                      sums->empty ? 0 : sums->values[d] / sums->total);
    if (p->lse.data) {
        const double none = p->empty_lse_inf ? INFINITY : -INFINITY;
        const double lse = sums->total == 0 ? none : sums->top + log(sums->total);
        store_element(p->lse.data, p->lse.dtype, query_at(r, &p->lse), lse);
    }
}

void cpu_fwd_ref_row(const struct problem *p, const struct sequence *s, int64_t b, int64_t h,
                     int64_t i, double *scratch) {
    const struct query_row r = {p, *s, b, h, i};
    const double sink = sink_of(&r);
    struct sums sums = {sink, sink == -INFINITY ? 0 : 1, scratch + CHUNK, true};
    int64_t lo, hi;
    for (int64_t d = 0; d < p->dim_v; d++)
        sums.values[d] = 0;
    visible_keys(p, s, i, &lo, &hi);
    for (int64_t j = lo; j < hi; j += CHUNK)
        add_keys(&r, &sums, scratch, j, j + CHUNK < hi ? j + CHUNK : hi);
    store_row(&r, &sums);
}

static void worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    const struct problem *p = c->p;
    double *scratch = (double *)(c->workspace + (size_t)index * c->scratch_bytes);
    const int64_t rows = p->batch * p->heads_q * p->len_q;
    for (int64_t n;
         (n = atomic_fetch_add_explicit(&c->next_row, 1, memory_order_relaxed)) < rows;) {
        const int64_t i = n % p->len_q, h = n / p->len_q % p->heads_q,
                      b = n / p->len_q / p->heads_q;
        const struct sequence s = problem_sequence(p, b);
        if (i < s.q_rows)
            cpu_fwd_ref_row(p, &s, b, h, i, scratch);
    }
}

size_t cpu_fwd_ref_row_bytes(const struct problem *p) {
    return ((size_t)(CHUNK + p->dim_v) * sizeof(double) + 63) / 64 * 64;
}

ROW_FUNCTIONS(cpu_fwd_ref);

bool cpu_fwd_ref_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)caps;
    plan->workspace_bytes = cpu_fwd_ref_row_bytes(p) * (size_t)plan->threads;
    return true;
}

int32_t cpu_fwd_ref_launch(const struct plan *plan, const struct problem *p,
                           const struct exec *exec) {
    struct call c = {
        .p = p, .workspace = exec->workspace, .scratch_bytes = cpu_fwd_ref_row_bytes(p)};
    threads_run(exec, plan->threads, worker, &c);
    return DLATTN_OK;
}
