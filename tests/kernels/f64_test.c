/* The f64 rows against long double: exp and tanh to the last bits, and logits up to the end of the type's range. */
#include "tests/support/cpu_rows.h"

#include <float.h>
#include <math.h>

/* One head; compact tensors. */
struct attention {
    int64_t len_q, len_k, dim;
    double *query, *key, *value, *output, *lse;
    dlattn_forward_desc desc;
};

static void run(const struct attention *a, const char *kernel) {
    int64_t rows[] = {1, 1, a->len_q, a->dim}, keys[] = {1, 1, a->len_k, a->dim};
    const DLTensor like = {
        .device = {kDLCPU, 0}, .ndim = 4, .dtype = {kDLFloat, 64, 1}, .shape = rows};
    DLTensor query = like, key = like, value = like, output = like, lse = like;
    query.data = a->query, key.data = a->key, value.data = a->value, output.data = a->output;
    key.shape = value.shape = keys;
    lse.data = a->lse, lse.ndim = 3;
    const dlattn_tensors tensors = {.struct_size = sizeof tensors,
                                    .query = &query,
                                    .key = &key,
                                    .value = &value,
                                    .output = &output,
                                    .lse = &lse};
    dlattn_forward_desc desc = a->desc;
    desc.struct_size = sizeof desc;
    desc.kernel = kernel;
    desc.num_threads = 1;
    dlattn_sku sku;
    cr_assert(run_tensors(&desc, &tensors, &sku), "%s", test_api()->last_error());
}

/* Units in the last place of f64. */
static double ulps(double got, long double want) {
    const double rounded = (double)want;
    return rounded == 0 ? (got == 0 ? 0 : INFINITY)
                        : (double)fabsl((got - want) / (nextafter(rounded, INFINITY) - rounded));
}

enum { MOST_ROWS = 4000 };
static double query[MOST_ROWS], output[MOST_ROWS], lse[MOST_ROWS];

/* The first key has logit 0 and value 0, the second logit x and value 1: the output is e^x / (1 + e^x). */
Test(f64, exp_to_the_last_bits) {
    struct cpu_rows rows;
    double key[] = {0, 1}, value[] = {0, 1};
    const struct attention a = {MOST_ROWS, 2, 1, query, key, value, output, lse, {.scale = 1}};
    for (int i = 0; i < MOST_ROWS; i++)
        query[i] = i == 0 ? -DBL_MAX : -708.0 * i / MOST_ROWS;
    find_cpu_rows(&rows, F64);
    for (int row = 0; row < rows.count; row++) {
        const char *const kernel = rows.info[row].name;
        double worst = 0;
        run(&a, kernel);
        for (int i = 0; i < MOST_ROWS; i++) {
            const long double weight = expl(query[i]);
            worst = fmax(worst, ulps(output[i], weight / (1 + weight)));
        }
        fprintf(stderr, "%s: exp to %.2f ulp\n", kernel, worst);
        cr_expect(worst <= 3, "%s: %.2f ulp", kernel, worst);
    }
}

/* Of a single key, lse is the logit. */
Test(f64, tanh_to_the_last_bits) {
    struct cpu_rows rows;
    double key[] = {1}, value[] = {1};
    const struct attention a = {
        MOST_ROWS, 1, 1, query, key, value, output, lse, {.scale = 1, .softcap = 3}};
    for (int i = 0; i < MOST_ROWS; i++)
        query[i] = (i & 1 ? -1 : 1) * ldexp(1 + i / (double)MOST_ROWS, i % 64 - 50);
    query[0] = INFINITY, query[1] = -DBL_MAX, query[2] = 0;
    find_cpu_rows(&rows, F64);
    for (int row = 0; row < rows.count; row++) {
        const char *const kernel = rows.info[row].name;
        double worst = 0;
        run(&a, kernel);
        for (int i = 0; i < MOST_ROWS; i++)
            worst = fmax(worst, ulps(lse[i], 3 * tanhl(query[i] / 3.0L)));
        fprintf(stderr, "%s: tanh to %.2f ulp\n", kernel, worst);
        cr_expect(worst <= 5, "%s: %.2f ulp", kernel, worst);
    }
}

/* Keys up to the largest number, enough for two tiles, the largest in the second; weight have only those next to it. A
 * logit is scale * key, rounded: with one FMA, exponents would have the rounding of the maximum, vast itself. */
Test(f64, logits_to_the_end_of_the_range) {
    enum { KEYS = 100, LARGEST = 80 };
    static const double scale = 0.7, tops[] = {1e3,     0x1p31, 1e10,  0x1p53, 1e100,       1e300,
                                               DBL_MAX, -1e3,   -1e10, -1e100, -DBL_MAX / 2};
    struct cpu_rows rows;
    double key[KEYS], value[KEYS];
    query[0] = 1;
    for (size_t t = 0; t < sizeof tops / sizeof tops[0]; t++) {
        const double top = tops[t], most = scale * top;
        long double total = 0, sum = 0;
        for (int j = 0; j < KEYS; j++) {
            key[j] = j == LARGEST ? top
                     : j % 7 == 3 ? nextafter(top, -INFINITY)
                     : j % 7 == 4 ? -DBL_MAX
                                  : top - fabs(top) / 2;
            value[j] = j;
            const long double weight = expl((long double)(scale * key[j]) - most);
            total += weight;
            sum += weight * value[j];
        }
        const struct attention a = {1, KEYS, 1, query, key, value, output, lse, {.scale = scale}};
        find_cpu_rows(&rows, F64);
        for (int row = 0; row < rows.count; row++) {
            const char *const kernel = rows.info[row].name;
            run(&a, kernel);
            cr_expect(fabsl(output[0] - sum / total) <= 1e-13L * KEYS,
                      "%s: top %g: output %.17g, must be %.17g", kernel, top, output[0],
                      (double)(sum / total));
            cr_expect(ulps(lse[0], most + logl(total)) <= 2, "%s: top %g: lse %.17g, must be %.17g",
                      kernel, top, lse[0], (double)(most + logl(total)));
        }
    }
}
