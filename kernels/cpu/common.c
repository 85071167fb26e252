#include "kernels/cpu/common.h"
#include "src/element.h"

#define LN_2 0.6931471805599453

void *carve(uintptr_t *at, int64_t bytes) {
    void *piece = (void *)*at;
    *at += (uintptr_t)round_up(bytes, 64);
    return piece;
}

int64_t group_of(const struct problem *p) { return p->heads_kv > 0 ? p->heads_q / p->heads_kv : 0; }

struct extra_row extra_row_at(const struct problem *p, int64_t b, int64_t h, int64_t i) {
    const int64_t m = b * p->mask.stride[0] + h * p->mask.stride[1] + i * p->mask.stride[2];
    return (struct extra_row){
        .bias = p->bias.data ? element_at(&p->bias, p->bias.dtype, b, h, i) : NULL,
        .mask = p->mask.data ? (const uint8_t *)p->mask.data + m : NULL,
    };
}

struct rows kv_rows(const struct problem *p, const struct view *v, const struct sequence *s,
                    int64_t b, int64_t h, int64_t first, int32_t n, const char **pointers) {
    const int64_t stride = v->stride[2] * dtype_bytes(v->dtype);
    if (!(p->features & DLATTN_FEATURE_PAGED))
        return (struct rows){.data = element_at(v, v->dtype, b, h, s->k_start + first),
                             .stride = stride};
    int64_t row = first % p->page_size;
    for (int32_t r = 0; r < n; row = 0) {
        const char *at = element_at(v, v->dtype, problem_page(p, b, first + r), h, row);
        const int32_t end = (int32_t)least(n, r + p->page_size - row);
        if (end - r == n)
            return (struct rows){.data = at, .stride = stride};
        for (; r < end; r++, at += stride)
            pointers[r] = at;
    }
    return (struct rows){.rows = pointers};
}

struct kv_tile kv_tile_at(const struct problem *p, const struct sequence *s, int64_t b, int64_t h,
                          int64_t first, int64_t end, int32_t tile_k, const char **pointers) {
    struct kv_tile tile = {.first = first, .n = (int32_t)most(0, least(tile_k, end - first))};
    if (tile.n == 0)
        return tile;
    tile.keys = kv_rows(p, &p->key, s, b, h, first, tile.n, pointers);
    tile.values = kv_rows(p, &p->value, s, b, h, first, tile.n, pointers + tile_k);
    return tile;
}

static int64_t fetched_bytes(const struct view *v, int64_t dim) {
    return is_dense(v, dim) ? dim * dtype_bytes(v->dtype) : 0;
}

struct fetch kv_tile_share(const struct problem *p, const struct kv_tile *next, int64_t n,
                           int64_t blocks) {
    return (struct fetch){.keys = next->keys,
                          .values = next->values,
                          .key_bytes = fetched_bytes(&p->key, p->dim_qk),
                          .value_bytes = fetched_bytes(&p->value, p->dim_v),
                          .row = next->n * n / blocks,
                          .end = next->n * (n + 1) / blocks,
                          .pace = 1};
}

int64_t runs_of(const struct problem *p, int64_t tile_q) {
    return (p->len_q * group_of(p) + tile_q - 1) / tile_q;
}

void plan_tasks(struct plan *plan, const struct problem *p, int64_t lanes) {
    const int64_t parts = p->batch * p->heads_kv * plan->splits, rows = p->len_q * group_of(p),
                  wanted = plan->threads == 1 ? 1 : 4 * plan->threads;
    while (plan->tile_q > lanes &&
           (plan->tile_q / 2 >= rows || parts * runs_of(p, plan->tile_q) < wanted))
        plan->tile_q /= 2;
    plan->threads = (int32_t)most(1, least(plan->threads, parts * runs_of(p, plan->tile_q)));
}

/* A few elements of each row at a time, so that rows across memory (a transposed matrix) are read by whole cache lines. */
static inline void copy_words(char *const *to, int64_t to_step, const char *const *from,
                              int64_t from_step, int32_t n, int64_t dim, size_t bytes) {
    enum { RUN = 8 };
    for (int64_t first = 0; first < dim; first += RUN)
        for (int32_t r = 0; r < n; r++)
            for (int64_t d = first; d < least(dim, first + RUN); d++)
                memcpy(to[r] + d * to_step, from[r] + d * from_step, bytes);
}

void copy_elements(char *const *to, int64_t to_step, const char *const *from, int64_t from_step,
                   int32_t n, int64_t dim, enum dtype dtype) {
    const int64_t bytes = dtype_bytes(dtype);
    if (bytes == 4)
        copy_words(to, to_step * 4, from, from_step * 4, n, dim, 4);
    else if (bytes == 2)
        copy_words(to, to_step * 2, from, from_step * 2, n, dim, 2);
    else
        copy_words(to, to_step, from, from_step, n, dim, 1);
}

struct rows dense_rows(const struct rows *rows, int32_t n, int64_t dim, const struct view *v,
                       enum dtype dtype, char *to) {
    enum { ROWS = 16 };
    const int64_t stride = dim * dtype_bytes(dtype);
    const char *from[ROWS];
    char *at[ROWS];
    if (is_dense(v, dim))
        return *rows;
    for (int32_t first = 0; first < n; first += ROWS) {
        const int32_t some = (int32_t)least(n - first, ROWS);
        for (int32_t r = 0; r < some; r++) {
            from[r] = row_at(rows, first + r);
            at[r] = to + (first + r) * stride;
        }
        copy_elements(at, 1, from, v->stride[3], some, dim, dtype);
    }
    return (struct rows){.data = to, .stride = stride};
}

bool has_mask(const struct problem *p) {
    return p->mask.data || p->query_segments.data || p->block_mask.data;
}

bool differs_by_page(const struct problem *p, const struct view *scale) {
    return p->features & DLATTN_FEATURE_PAGED && scale->stride[0] != 0;
}

const struct problem *problem_of_head(const struct problem *p, int64_t b, int64_t kv_head,
                                      struct problem *own) {
    if (!(p->features & DLATTN_FEATURE_SCALES))
        return p;
    *own = *p;
    if (p->query_scale.stride[1] == 0 || group_of(p) == 1) {
        own->scale *= scale_at(&p->query_scale, b, kv_head);
        own->query_scale.data = NULL;
    }
    if (!differs_by_page(p, &p->key_scale)) {
        own->scale *= scale_at(&p->key_scale, b, kv_head);
        own->key_scale.data = NULL;
    }
    return own;
}

int64_t page_scale_bytes(const struct problem *p, const struct view *scale, int64_t n) {
    return differs_by_page(p, scale) ? n * (int64_t)sizeof(float) : 0;
}

const float *page_scales(const struct problem *p, const struct view *scale, int64_t b, int64_t h,
                         int64_t first, int32_t n, float *to) {
    if (!differs_by_page(p, scale))
        return NULL;
    for (int32_t j = 0; j < n; j++)
        to[j] = scale_at(scale, problem_page(p, b, first + j), h);
    return to;
}

/* A scale of 0 or below would turn the -inf of a masked key into NaN or +inf. */
bool needs_rule(const struct problem *p) {
    return p->softcap > 0 || p->bias.data || has_mask(p) || p->alibi_slopes.data || p->scale <= 0 ||
           p->query_scale.data || p->key_scale.data;
}

static double exact_scale(const struct problem *p) {
    return needs_rule(p) ? LOG2_E : p->scale * LOG2_E;
}

float score_scale(const struct problem *p) { return (float)exact_scale(p); }

static bool fits_f32(double x) { return fabs(x) >= 0x1p-126 && fabs(x) <= 0x1p126; }

bool options_fit_f32(const struct problem *p) {
    return (p->scale == 0 || fits_f32(p->scale)) && (p->softcap == 0 || fits_f32(p->softcap));
}

/* What tiles of terms lose shows with scales from 2^60 on. */
static bool scale_overflows(const struct problem *p) {
    return p->features & DLATTN_FEATURE_SCALES && p->scale != 0 &&
           !(fabs(p->scale) >= 0x1p-126 && fabs(p->scale) < 0x1p60);
}

/* A mask or bias may hide all of a row's keys, which is no overflow. */
bool row_overflowed(const struct problem *p, const struct sequence *s, int64_t i, float max,
                    float sum) {
    int64_t lo, hi;
    if (scale_overflows(p))
        return true;
    if (sum != 0)
        return max == INFINITY;
    visible_keys(p, s, i, &lo, &hi);
    return lo < hi && !p->bias.data && !has_mask(p);
}

struct row_total row_total_of(const struct problem *p, int64_t h, float max, float sum) {
    const float scale = score_scale(p);
    const struct origin origin = origin_of(max, scale);
    /* What f32 lost of the scale, the weights next to the maximum have in common; a sink has not. */
    const double lost = isfinite(max) ? (double)max * (exact_scale(p) - (double)scale) : 0;
    struct row_total t = {.base = (double)origin.top * scale - origin.minus + lost,
                          .shrink = 1,
                          .sink = 0,
                          .sum = sum};
    if (p->sinks.data) {
        const double sink = load_element(p->sinks.data, DTYPE_F32, h * p->sinks.stride[1]) * LOG2_E,
                     before = max == -INFINITY ? -INFINITY : t.base;
        t.base = before > sink ? before : sink;
        t.shrink = before == -INFINITY ? 0 : (float)exp2(before - t.base);
        t.sink = sink == -INFINITY ? 0 : (float)exp2(sink - t.base);
        t.sum = sum * t.shrink + t.sink;
    }
    return t;
}

/* Of all values that query head h sees; 1 where they differ. */
static float value_scale_of(const struct problem *p, int64_t b, int64_t h) {
    const struct view *scale = &p->value_scale;
    if (!scale->data || differs_by_page(p, scale))
        return 1;
    return scale_at(scale, b, h * p->heads_kv / p->heads_q);
}

float end_row(const struct problem *p, const struct sequence *s, int64_t b, int64_t h, int64_t i,
              float max, float sum) {
    const float value_scale = value_scale_of(p, b, h);
    if (!p->sinks.data && !p->lse.data) /* nobody asks what they are relative to */
        return sum == 0 ? 0 : value_scale / sum;
    const struct row_total t = row_total_of(p, h, max, sum);
    if (p->lse.data) {
        const double none = p->empty_lse_inf ? INFINITY : -INFINITY;
        const double lse = t.sum == 0 ? none : LN_2 * (t.base + (double)log2f(t.sum));
        store_element(
            p->lse.data, p->lse.dtype,
            b * p->lse.stride[0] + h * p->lse.stride[1] + (s->q_start + i) * p->lse.stride[2], lse);
    }
    return t.sum == 0 ? 0 : value_scale * t.shrink / t.sum;
}
