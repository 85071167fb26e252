/*
 * Times the CPU rows beside what the machine can do at best: OpenBLAS's sgemm, loops of FMA and of vdpbf16ps, reads of
 * memory. Every round of a case times the row and then the limit it is compared with, so that both see the same
 * machine; figures are medians of the rounds.
 *
 *     cpu_bench [FILTER] [CSV] [COMMIT]      only cases whose line contains FILTER; lines of results to the file CSV
 */
#include "abi/dlattn_loader.h"
#include "bench/cpu_limits.h"

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

enum { ROUNDS_LEAST = 7, ROUNDS_MOST = 101 };
static const double seconds_of_case = 0.4;

static const dlattn_api *api;
static const char *filter = "", *commit = "";
static FILE *csv;
static char device[128];

struct element {
    const char *name;
    DLDataType type;
    size_t bytes;
};
static const struct element elements[] = {{"f32", {kDLFloat, 32, 1}, 4},
                                          {"f16", {kDLFloat, 16, 1}, 2},
                                          {"bf16", {kDLBfloat, 16, 1}, 2},
                                          {"f64", {kDLFloat, 64, 1}, 8}};

struct shape {
    const char *op;
    int64_t batch, heads_q, heads_kv, len_q, len_k, dim;
    int causal;
};
static const struct shape shapes[] = {
    {"fwd", 1, 8, 8, 2048, 2048, 64, 0},    {"fwd", 1, 8, 8, 2048, 2048, 64, 1},
    {"fwd", 1, 8, 8, 2048, 2048, 128, 0},   {"fwd", 1, 8, 8, 2048, 2048, 128, 1},
    {"fwd", 8, 12, 12, 128, 128, 64, 0},    {"decode", 1, 32, 8, 1, 32768, 128, 0},
    {"decode", 1, 32, 32, 1, 8192, 128, 0}, {"bwd", 1, 8, 8, 2048, 2048, 64, 0},
    {"bwd", 1, 8, 8, 2048, 2048, 64, 1},    {"bwd", 1, 8, 8, 2048, 2048, 128, 0},
    {"bwd", 1, 8, 8, 2048, 2048, 128, 1},   {"bwd", 8, 12, 12, 128, 128, 64, 0}};

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(double *sorted, int n, double q) { return sorted[(int)(q * (n - 1) + 0.5)]; }

/* Uniform in [-2, 2): f32 rounded towards zero to the element. */
static void fill(void *data, size_t count, const struct element *e, uint64_t state) {
    for (size_t i = 0; i < count; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        const float x = (float)((int64_t)(state >> 40) - (1 << 23)) * 0x1p-22f;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        const uint32_t exponent = bits >> 23 & 0xff;
        const uint16_t half = (uint16_t)(exponent < 113
                                             ? 0
                                             : (bits >> 16 & 0x8000) | (exponent - 112) << 10 |
                                                   (bits >> 13 & 0x3ff)),
                       brain = (uint16_t)(bits >> 16);
        const double wide = x;
        if (e->bytes == 8)
            memcpy((char *)data + 8 * i, &wide, 8);
        else if (e->bytes == 4)
            memcpy((char *)data + 4 * i, &x, 4);
        else
            memcpy((char *)data + 2 * i, e->type.code == kDLBfloat ? &brain : &half, 2);
    }
}

enum { QUERY, KEY, VALUE, OUTPUT, D_OUTPUT, D_QUERY, D_KEY, D_VALUE, LSE, TENSORS };

struct tensors {
    int64_t axes[TENSORS][4];
    DLTensor all[TENSORS];
    dlattn_tensors named;
    dlattn_gradients gradients; /* of a backward call, whose lse is named, too */
    bool backward;
};

static void make_tensors(struct tensors *t, const struct shape *s, const struct element *e) {
    for (int n = 0; n < TENSORS; n++) {
        const bool of_key = n == KEY || n == VALUE || n == D_KEY || n == D_VALUE;
        const int64_t axes[4] = {s->batch, of_key ? s->heads_kv : s->heads_q,
                                 of_key ? s->len_k : s->len_q, s->dim};
        const size_t count = (size_t)(axes[0] * axes[1] * axes[2] * axes[3]);
        const struct element *type =
            n == LSE && e->bytes == 2 ? &elements[0] : e; /* at least f32 */
        memcpy(t->axes[n], axes, sizeof axes);
        t->all[n] = (DLTensor){.data = aligned_alloc(64, (count * type->bytes + 63) / 64 * 64),
                               .device = {kDLCPU, 0},
                               .ndim = n == LSE ? 3 : 4,
                               .dtype = type->type,
                               .shape = t->axes[n]};
        fill(t->all[n].data, count, type, 88172645463325252u + (uint64_t)n);
    }
    t->backward = strcmp(s->op, "bwd") == 0;
    t->named = (dlattn_tensors){.struct_size = sizeof t->named,
                                .query = &t->all[QUERY],
                                .key = &t->all[KEY],
                                .value = &t->all[VALUE],
                                .output = &t->all[OUTPUT],
                                .lse = t->backward ? &t->all[LSE] : NULL};
    t->gradients = (dlattn_gradients){.struct_size = sizeof t->gradients,
                                      .d_output = &t->all[D_OUTPUT],
                                      .d_query = &t->all[D_QUERY],
                                      .d_key = &t->all[D_KEY],
                                      .d_value = &t->all[D_VALUE]};
}

/* Output and lse of the call whose gradients are timed. */
static void run_forward(const struct tensors *t, bool causal) {
    const dlattn_forward_desc desc = {.struct_size = sizeof desc, .causal = causal};
    dlattn_sku sku = {.struct_size = sizeof sku};
    api->forward_query(&desc, &t->named, &sku);
    const dlattn_exec exec = {.struct_size = sizeof exec,
                              .workspace = aligned_alloc(64, (sku.workspace_bytes + 63) / 64 * 64),
                              .workspace_bytes = sku.workspace_bytes};
    api->forward(&desc, &t->named, &exec);
    free(exec.workspace);
}

static int32_t create(const struct tensors *t, const dlattn_forward_desc *desc,
                      dlattn_plan **plan) {
    return t->backward ? api->backward_plan_create(desc, &t->named, &t->gradients, plan)
                       : api->plan_create(desc, &t->named, plan);
}

static void run(const struct tensors *t, const dlattn_plan *plan, const dlattn_exec *exec) {
    if (t->backward)
        api->backward_plan_run(plan, &t->named, &t->gradients, exec);
    else
        api->plan_run(plan, &t->named, exec);
}

struct result {
    dlattn_sku sku;
    double median, spread; /* seconds; (90th - 10th percentile) / median */
    double best;           /* seconds: what a round without disturbance takes */
    double limit; /* median of the samples between the rounds; a vector has half as many f64 */
};

/* False if the row declines. `which` = LIMIT_COUNT: no limit is sampled. */
static bool measure(struct result *r, const char *kernel, const struct shape *s,
                    const struct element *e, int threads, enum limit which) {
    struct tensors t;
    dlattn_plan *plan;
    double times[ROUNDS_MOST], limits[ROUNDS_MOST];
    const dlattn_forward_desc desc = {
        .struct_size = sizeof desc, .causal = s->causal, .kernel = kernel, .num_threads = threads};
    make_tensors(&t, s, e);
    if (t.backward)
        run_forward(&t, s->causal);
    const bool fits = create(&t, &desc, &plan) == DLATTN_OK;
    if (fits) {
        r->sku = (dlattn_sku){.struct_size = sizeof r->sku};
        api->plan_sku(plan, &r->sku);
        const dlattn_exec exec = {.struct_size = sizeof exec,
                                  .workspace =
                                      aligned_alloc(64, (r->sku.workspace_bytes + 63) / 64 * 64),
                                  .workspace_bytes = r->sku.workspace_bytes};
        int n = 0;
        run(&t, plan, &exec);
        for (const double start = seconds();
             n < ROUNDS_MOST && (n < ROUNDS_LEAST || seconds() - start < seconds_of_case); n++) {
            const double begin = seconds();
            run(&t, plan, &exec);
            times[n] = seconds() - begin;
            limits[n] = which == LIMIT_COUNT ? 0 : limit_sample(which, threads);
        }
        qsort(times, (size_t)n, sizeof times[0], compare);
        qsort(limits, (size_t)n, sizeof limits[0], compare);
        r->median = quantile(times, n, 0.5);
        r->spread = (quantile(times, n, 0.9) - quantile(times, n, 0.1)) / r->median;
        r->best = times[0];
        r->limit = quantile(limits, n, 0.5) / (which == LIMIT_FMA && e->bytes == 8 ? 2 : 1);
        free(exec.workspace);
        api->plan_destroy(plan);
    }
    for (int n = 0; n < TENSORS; n++)
        free(t.all[n].data);
    return fits;
}

/* Two products forward, five backward. */
static double gflop(const struct shape *s) {
    return (strcmp(s->op, "bwd") == 0 ? 10e-9 : 4e-9) *
           (double)(s->batch * s->heads_q * s->len_q * s->len_k * s->dim) / (s->causal ? 2 : 1);
}

static double gigabytes(const struct shape *s, const struct element *e) {
    return 2e-9 * (double)(s->batch * s->heads_kv * s->len_k * s->dim) * (double)e->bytes;
}

static void write_line(const char *op, const char *dtype, const struct shape *s, int threads,
                       const char *impl, const char *kernel, double median, double spread,
                       double gflops, double gbs) {
    char date[16];
    const time_t now = time(NULL);
    if (!csv)
        return;
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    fprintf(csv,
            "%s,%s,%s,%s,%s,%lld,%lld,%lld,%lld,%lld,%lld,%lld,%d,%d,%s,%s,%.3f,%.1f,%.4f,%.2f\n",
            date, commit, device, op, dtype, (long long)s->batch, (long long)s->heads_q,
            (long long)s->heads_kv, (long long)s->len_q, (long long)s->len_k, (long long)s->dim,
            (long long)s->dim, s->causal, threads, impl, kernel, median * 1e6, spread * 100,
            gflops * 1e-3, gbs);
}

/* One case on one row; decode is held against reading, the others against the row's own kind of product. */
static void bench_case(const dlattn_kernel_info *row, const struct shape *s,
                       const struct element *e, int threads) {
    char line[160];
    struct result r;
    const bool decode = strcmp(s->op, "decode") == 0, dot = strcmp(row->arch, "avx512bf16") == 0;
    snprintf(line, sizeof line, "%-18s %-4s %-6s B%lld H%lld/%lld Lq%lld Lk%lld D%lld %-6s t%d",
             row->name, e->name, s->op, (long long)s->batch, (long long)s->heads_q,
             (long long)s->heads_kv, (long long)s->len_q, (long long)s->len_k, (long long)s->dim,
             s->causal ? "causal" : "", threads);
    if (!strstr(line, filter) || !measure(&r, row->name, s, e, threads,
                                          decode ? LIMIT_READ
                                          : dot  ? LIMIT_BF16_DOT
                                                 : LIMIT_FMA))
        return;
    const double work = decode ? gigabytes(s, e) : gflop(s), rate = work / r.median;
    printf("%-72s %10.1f us +-%3.0f%%  %7.1f %s  %.2f (best %.2f) of %s %.1f  %zu KiB/thread\n",
           line, r.median * 1e6, r.spread * 100, rate, decode ? "GB/s   " : "GFLOP/s",
           rate / r.limit, work / r.best / r.limit,
           decode ? "read"
           : dot  ? "vdpbf16ps"
                  : "FMA",
           r.limit, r.sku.workspace_bytes / (size_t)r.sku.num_threads / 1024);
    fflush(stdout);
    write_line(s->op, e->name, s, threads, "dlattn", r.sku.kernel, r.median, r.spread,
               gflop(s) / r.median, gigabytes(s, e) / r.median);
}

static void bench_limits(int threads) {
    static const struct {
        const char *name, *op;
        enum limit which;
    } kinds[] = {{"fma_loop", "fma", LIMIT_FMA},
                 {"vdpbf16ps_loop", "dot", LIMIT_BF16_DOT},
                 {"read_loop", "read", LIMIT_READ},
                 {"sgemm_2048", "gemm", LIMIT_COUNT}};
    const struct shape none = {0};
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
        double rates[ROUNDS_LEAST];
        for (int n = 0; n < ROUNDS_LEAST; n++)
            rates[n] = kinds[k].which == LIMIT_COUNT ? sgemm_sample(threads)
                                                     : limit_sample(kinds[k].which, threads);
        qsort(rates, ROUNDS_LEAST, sizeof rates[0], compare);
        const double rate = quantile(rates, ROUNDS_LEAST, 0.5);
        const bool bytes = kinds[k].which == LIMIT_READ;
        printf("%-24s t%-3d %8.1f %s\n", kinds[k].name, threads, rate, bytes ? "GB/s" : "GFLOP/s");
        write_line(kinds[k].op, kinds[k].which == LIMIT_BF16_DOT ? "bf16" : "f32", &none, threads,
                   kinds[k].which == LIMIT_COUNT ? "openblas" : "loop", kinds[k].name, 0, 0,
                   bytes ? 0 : rate, bytes ? rate : 0);
    }
}

/* What a planned call costs besides the work: nearly all of this one. */
static void bench_call(void) {
    const struct shape s = {"call", 1, 1, 1, 16, 16, 64, 0};
    struct result r;
    if (!measure(&r, NULL, &s, &elements[0], 1, LIMIT_COUNT))
        return;
    printf("planned call, 1x1x16x64 f32, one thread: %.2f us (%s)\n", r.median * 1e6, r.sku.kernel);
    write_line("call", "f32", &s, 1, "dlattn", r.sku.kernel, r.median, r.spread, 0, 0);
}

static bool lists(const char *dtypes, const char *name) {
    const char *at = strstr(dtypes, name);
    return at && (at == dtypes || at[-1] == ' ');
}

/* What the column `op` says of the row's cases; merge and append say it themselves. */
static const char *op_of(const dlattn_kernel_info *row) {
    if (row->flags & DLATTN_KERNEL_DECODE)
        return "decode";
    if (strcmp(row->operation, "forward") == 0)
        return "fwd";
    return strcmp(row->operation, "backward") == 0 ? "bwd" : row->operation;
}

static void bench_row(const dlattn_kernel_info *row, int threads) {
    const char *const op = op_of(row);
    for (size_t e = 0; e < sizeof elements / sizeof elements[0]; e++)
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
            if (lists(row->dtypes, elements[e].name) && strcmp(shapes[s].op, op) == 0)
                bench_case(row, &shapes[s], &elements[e], threads);
}

/* "Intel(R) Xeon(R) Processor" -> "intel-xeon-processor". */
static void name_device(void) {
    dlattn_device_info info = {.struct_size = sizeof info};
    size_t used = 0;
    api->device_info(0, &info);
    for (const char *c = info.name; *c && used + 1 < sizeof device; c++) {
        if (*c == '(')
            c = strchr(c, ')') ? strchr(c, ')') : c;
        else if ((*c >= 'a' && *c <= 'z') || (*c >= '0' && *c <= '9'))
            device[used++] = *c;
        else if (*c >= 'A' && *c <= 'Z')
            device[used++] = (char)(*c - 'A' + 'a');
        else if (used > 0 && device[used - 1] != '-')
            device[used++] = '-';
    }
}

int main(int count, char **words) {
    char why[1024];
    dlattn_device_info cpu = {.struct_size = sizeof cpu};
    api = dlattn_open(why, sizeof why);
    if (!api) {
        fputs(why, stderr);
        return 1;
    }
    filter = count > 1 ? words[1] : "";
    csv = count > 2 ? fopen(words[2], "w") : NULL;
    commit = count > 3 ? words[3] : "";
    name_device();
    api->device_info(0, &cpu);
    printf("%s, %d threads, %s\n", cpu.name, cpu.multiprocessors, cpu.arch);
    if (csv)
        fputs(
            "date,commit,device,op,dtype,B,Hq,Hkv,Lq,Lk,D,Dv,causal,threads,impl,kernel,median_us,"
            "spread_pct,tflops,gbs\n",
            csv);
    for (int threads = 1; threads <= cpu.multiprocessors;
         threads = threads < cpu.multiprocessors && 2 * threads > cpu.multiprocessors
                       ? cpu.multiprocessors
                       : 2 * threads) {
        bench_limits(threads);
        for (int32_t n = 0; n < api->kernel_count(); n++) {
            dlattn_kernel_info row = {.struct_size = sizeof row};
            api->kernel_info(n, &row);
            if (row.available && strcmp(row.backend, "cpu") == 0 &&
                !(row.flags & DLATTN_KERNEL_REFERENCE))
                bench_row(&row, threads);
        }
    }
    bench_call();
    return csv && fclose(csv) != 0;
}
