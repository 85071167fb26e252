/*
 * The truth: every dtype, every feature, plain loops in double. Each query row is two passes over
 * its visible keys: the largest logit, then softmax and the weighted sum of values. Logits lie in
 * the worker's scratch, CHUNK of them at most; of longer rows they are computed in both passes. Not
 * meant to be fast.
 */
#include "kernels/element.h"
#include "kernels/kernel.h"
#include "kernels/ref/ref.h"

#include <math.h>
#include <stdatomic.h>

enum { CHUNK = 4096 };

struct call {
    const struct problem *p;
    char *workspace;
    size_t scratch_bytes;
    _Atomic int64_t next_row;
};

/* First element of row l of head h of batch b. */
static int64_t row(const struct view *v, int64_t b, int64_t h, int64_t l) {
    return b * v->stride[0] + h * v->stride[1] + l * v->stride[2];
}

/* First element of key or value j of a sequence, through the block table if there is one. */
static int64_t key_row(const struct problem *p, const struct view *v, const struct sequence *s,
                       int64_t b, int64_t h, int64_t j) {
    if (!(p->features & DLATTN_FEATURE_PAGED))
        return row(v, b, h, s->k_start + j);
    return row(v, problem_page(p, b, j), h, j % p->page_size);
}

static bool masked(const struct problem *p, int64_t b, int64_t h, int64_t i, int64_t j) {
    return p->mask.data &&
           !((const uint8_t *)p->mask.data)[row(&p->mask, b, h, i) + j * p->mask.stride[3]];
}

/* s_j of the public header. */
static double logit(const struct problem *p, const struct sequence *s, int64_t b, int64_t h,
                    int64_t i, int64_t j) {
    const int64_t q = row(&p->query, b, h, s->q_start + i);
    const int64_t k = key_row(p, &p->key, s, b, h / (p->heads_q / p->heads_kv), j);
    double dot = 0;
    for (int64_t d = 0; d < p->dim_qk; d++)
        dot += load_element(p->query.data, p->dtype, q + d * p->query.stride[3]) *
               load_element(p->key.data, p->dtype, k + d * p->key.stride[3]);
    double x = p->scale * dot;
    if (p->softcap > 0)
        x = p->softcap * tanh(x / p->softcap);
    if (p->bias.data)
        x += load_element(p->bias.data, p->bias_dtype,
                          row(&p->bias, b, h, i) + j * p->bias.stride[3]);
    if (p->alibi_slopes.data)
        x -= load_element(p->alibi_slopes.data, DTYPE_F32,
                          b * p->alibi_slopes.stride[0] + h * p->alibi_slopes.stride[1]) *
             fabs((double)(i + s->diagonal - j));
    return x;
}

/* scores[n] = logit of key first + n, for the keys before `end`; -inf where the mask hides one. */
static void load_scores(double *scores, const struct problem *p, const struct sequence *s,
                        int64_t b, int64_t h, int64_t i, int64_t first, int64_t end) {
    for (int64_t j = first; j < end; j++)
        scores[j - first] = masked(p, b, h, i, j) ? -INFINITY : logit(p, s, b, h, i, j);
}

/* The weights of keys [first, end), relative to `most`: returns what they add up to. sum[d] gains
 * their values. A key whose logit is -inf, by mask or by bias, is as invisible as one outside the
 * window: its value is never read into the sum. */
static double add_values(double *sum, const double *scores, const struct problem *p,
                         const struct sequence *s, int64_t b, int64_t kv_head, int64_t first,
                         int64_t end, double most) {
    double total = 0;
    for (int64_t j = first; j < end; j++) {
        if (scores[j - first] == -INFINITY)
            continue;
        const double weight = exp(scores[j - first] - most);
        const int64_t v = key_row(p, &p->value, s, b, kv_head, j);
        total += weight;
        for (int64_t d = 0; d < p->dim_v; d++)
            sum[d] += weight * load_element(p->value.data, p->dtype, v + d * p->value.stride[3]);
    }
    return total;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* NaN in a visible key is kept, so that the caller sees it. */
void cpu_fwd_ref_row(const struct problem *p, const struct sequence *s, int64_t b, int64_t h,
                     int64_t i, double *scratch) {
    double *sum = scratch, *scores = scratch + p->dim_v;
    int64_t lo, hi;
    double sink = -INFINITY, most, total;
    visible_keys(p, s, i, &lo, &hi);
    if (p->sinks.data)
        sink = load_element(p->sinks.data, DTYPE_F32, h * p->sinks.stride[1]);
    most = sink;
    bool empty = true;
    for (int64_t j = lo; j < hi; j += CHUNK) {
        const int64_t end = least(hi, j + CHUNK);
        load_scores(scores, p, s, b, h, i, j, end);
        for (int64_t n = 0; n < end - j; n++) {
            most = fmax(most, scores[n]);
            empty &= scores[n] == -INFINITY;
        }
    }
    for (int64_t d = 0; d < p->dim_v; d++)
        sum[d] = 0;
    total = sink == -INFINITY ? 0 : exp(sink - most);
    for (int64_t j = lo; j < hi; j += CHUNK) {
        const int64_t end = least(hi, j + CHUNK);
        if (hi - lo > CHUNK)
            load_scores(scores, p, s, b, h, i, j, end);
        total += add_values(sum, scores, p, s, b, h / (p->heads_q / p->heads_kv), j, end, most);
    }
    const int64_t o = row(&p->output, b, h, s->q_start + i);
    for (int64_t d = 0; d < p->dim_v; d++)
        store_element(p->output.data, p->dtype, o + d * p->output.stride[3],
                      empty ? 0 : sum[d] / total);
    if (p->lse.data) {
        const double none = p->empty_lse_inf ? INFINITY : -INFINITY;
        const double lse = total == 0 ? none : most + log(total);
        store_element(p->lse.data, p->lse_dtype, row(&p->lse, b, h, s->q_start + i), lse);
    }
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

/* Per worker: one row of the output and a chunk of logits, in double. */
size_t cpu_fwd_ref_row_bytes(const struct problem *p) {
    const size_t numbers = (size_t)(p->dim_v + least(p->len_k, CHUNK));
    return (numbers * sizeof(double) + 63) / 64 * 64;
}

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
