/* The truth of merge: row by row, in double. A row is read whole before it is written, so it may be merged in place. */
#include "kernels/ref/pair.h"

#include <math.h>
#include <stdatomic.h>

struct call {
    const struct problem *p;
    _Atomic int64_t next_row;
};

static double lse_of(const struct problem *p, int64_t n, int64_t b, int64_t h, int64_t l) {
    const struct partial part = problem_partial(p, n);
    return load_element(part.lse.data, part.lse.dtype, row_of(&part.lse, b, h, l));
}

/* Element d of the row: parts without weight are not read. */
static double merged(const struct problem *p, double lse, int64_t b, int64_t h, int64_t l,
                     int64_t d) {
    double sum = 0;
    for (int64_t n = 0; n < p->partials->count; n++) {
        const struct partial part = problem_partial(p, n);
        const double of_part = lse_of(p, n, b, h, l);
        if (of_part != -INFINITY)
            sum += exp(of_part - lse) * element(&part.output, row_of(&part.output, b, h, l), d);
    }
    return sum;
}

static void merge_row(const struct problem *p, int64_t b, int64_t h, int64_t l) {
    double top = -INFINITY, total = 0;
    for (int64_t n = 0; n < p->partials->count; n++)
        top = fmax(top, lse_of(p, n, b, h, l));
    for (int64_t n = 0; n < p->partials->count; n++) {
        const double of_part = lse_of(p, n, b, h, l);
        total += of_part == -INFINITY ? 0 : exp(of_part - top);
    }
    const double lse = total == 0 ? -INFINITY : top + log(total);
    for (int64_t d = 0; d < p->dim_v; d++)
        store_element(p->output.data, p->output.dtype,
                      row_of(&p->output, b, h, l) + d * p->output.stride[3],
                      merged(p, lse, b, h, l, d));
    if (p->lse.data)
        store_element(p->lse.data, p->lse.dtype, row_of(&p->lse, b, h, l), lse);
}

static void worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    const struct problem *p = c->p;
    (void)index;
    for (int64_t n; (n = atomic_fetch_add_explicit(&c->next_row, 1, memory_order_relaxed)) <
                    p->batch * p->heads_q * p->len_q;)
        merge_row(p, n / p->len_q / p->heads_q, n / p->len_q % p->heads_q, n % p->len_q);
}

ROW_FUNCTIONS(cpu_merge_ref);

bool cpu_merge_ref_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)plan, (void)p, (void)caps;
    return true;
}

int32_t cpu_merge_ref_launch(const struct plan *plan, const struct problem *p,
                             const struct exec *exec) {
    struct call c = {.p = p};
    threads_run(exec, plan->threads, worker, &c);
    return DLATTN_OK;
}
