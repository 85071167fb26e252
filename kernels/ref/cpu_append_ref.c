/* The truth of append: element by element, rounded once from double. */
#include "kernels/ref/pair.h"

#include <stdatomic.h>

struct call {
    const struct problem *p;
    _Atomic int64_t next_row;
};

struct row {
    struct sequence s;
    int64_t b, g, i;
};

/* n elements, a stride apart, as they are divided by `factor`. */
__attribute__((always_inline)) static inline void
convert(const struct view *from, int64_t source, enum dtype from_dtype, const struct view *to,
        int64_t target, enum dtype to_dtype, double factor, int64_t n) {
    for (int64_t d = 0; d < n; d++)
        store_element(to->data, to_dtype, target + d * to->stride[3],
                      load_element(from->data, from_dtype, source + d * from->stride[3]) / factor);
}

/* The same with the dtypes as constants, of which the cache's is float8 or that of the row. */
static void convert_row(const struct view *from, int64_t source, const struct view *to,
                        int64_t target, double factor, int64_t n) {
#define CASE(of_row)                                                                               \
    case of_row:                                                                                   \
        if (to->dtype == DTYPE_E4M3)                                                               \
            convert(from, source, of_row, to, target, DTYPE_E4M3, factor, n);                      \
        else if (to->dtype == DTYPE_E5M2)                                                          \
            convert(from, source, of_row, to, target, DTYPE_E5M2, factor, n);                      \
        else                                                                                       \
            convert(from, source, of_row, to, target, to->dtype, factor, n);                       \
        break
    switch (from->dtype) {
        CASE(DTYPE_F64);
        CASE(DTYPE_F32);
        CASE(DTYPE_F16);
        CASE(DTYPE_BF16);
    default:
        break;
    }
#undef CASE
}

/* Position of row i in the cache, and the scale that goes with it. */
static void append_row(const struct problem *p, const struct row *r, const struct view *from,
                       const struct view *cache, const struct view *scale, int64_t dim) {
    const int64_t at = r->s.k_len + r->i, paged = p->features & DLATTN_FEATURE_PAGED;
    const int64_t entry = paged ? problem_page(p, r->b, at) : r->b,
                  l = paged ? at % p->page_size : at;
    const int64_t source = row_of(from, r->b, r->g, r->s.q_start + r->i),
                  target = row_of(cache, entry, r->g, l);
    convert_row(from, source, cache, target, scale_at(scale, entry, r->g), dim);
}

static void worker(void *ctx, int64_t index) {
    struct call *c = ctx;
    const struct problem *p = c->p;
    (void)index;
    for (int64_t n; (n = atomic_fetch_add_explicit(&c->next_row, 1, memory_order_relaxed)) <
                    p->batch * p->heads_kv * p->len_q;) {
        const int64_t b = n / p->len_q / p->heads_kv;
        const struct row r = {problem_sequence(p, b), b, n / p->len_q % p->heads_kv, n % p->len_q};
        if (r.i >= r.s.q_len || r.s.k_len + r.i >= p->len_k)
            continue;
        append_row(p, &r, &p->key, &p->key_cache, &p->key_scale, p->dim_qk);
        append_row(p, &r, &p->value, &p->value_cache, &p->value_scale, p->dim_v);
    }
}

ROW_FUNCTIONS(cpu_append_ref);

bool cpu_append_ref_plan(struct plan *plan, const struct problem *p, const struct caps *caps) {
    (void)plan, (void)p, (void)caps;
    return true;
}

int32_t cpu_append_ref_launch(const struct plan *plan, const struct problem *p,
                              const struct exec *exec) {
    struct call c = {.p = p};
    threads_run(exec, plan->threads, worker, &c);
    return DLATTN_OK;
}
