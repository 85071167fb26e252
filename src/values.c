/*
 * Values of integer tensors and scales that lie in host memory: checked before anything is written, clamped whenever they are read.
 */
#include "src/kernel.h"
#include "src/tensor.h"

#include <math.h>
#include <string.h>

static int64_t int_at(const struct view *v, int64_t i, int64_t j) {
    int32_t value; /* DLPack promises no alignment */
    memcpy(&value, (const char *)v->data + (i * v->stride[0] + j * v->stride[1]) * 4, sizeof value);
    return value;
}

static int32_t check_cu_seqlens(const char *name, const struct view *v, int64_t batch,
                                int64_t total, int64_t longest) {
    if (!v->data)
        return DLATTN_OK;
    int64_t before = int_at(v, 0, 0);
    if (before != 0)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: entry 0 is %lld, must be 0", name,
                    (long long)before);
    for (int64_t b = 1; b <= batch; b++) {
        const int64_t end = int_at(v, b, 0);
        if (end < before || end > total)
            return fail(
                DLATTN_INVALID_ARGUMENT,
                "%s: entry %lld is %lld, must be from %lld (the entry before) to %lld (the total)",
                name, (long long)b, (long long)end, (long long)before, (long long)total);
        if (end - before > longest)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "%s: sequence %lld has %lld rows, max_seqlen says at most %lld", name,
                        (long long)b - 1, (long long)(end - before), (long long)longest);
        before = end;
    }
    if (before != total)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: the last entry is %lld, the tensor has %lld rows",
                    name, (long long)before, (long long)total);
    return DLATTN_OK;
}

static int32_t check_lengths(const char *name, const struct view *v, int64_t batch, int64_t most) {
    for (int64_t b = 0; v->data && b < batch; b++) {
        const int64_t n = int_at(v, b, 0);
        if (n < 0 || n > most)
            return fail(DLATTN_INVALID_ARGUMENT, "%s: entry %lld is %lld, must be from 0 to %lld",
                        name, (long long)b, (long long)n, (long long)most);
    }
    return DLATTN_OK;
}

/* Pages of keys [first, end) of batch b. */
static int32_t check_pages(const struct problem *p, int64_t b, int64_t first, int64_t end) {
    for (int64_t n = first / p->page_size; n * p->page_size < end; n++) {
        const int64_t page = int_at(&p->block_table, b, n);
        if (page < 0 || page >= p->pages)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "block_table: entry [%lld, %lld] is %lld, there are %lld pages",
                        (long long)b, (long long)n, (long long)page, (long long)p->pages);
    }
    return DLATTN_OK;
}

/* Scales, of a tensor with so many entries and heads; one element may stand for all, if there are any. */
static int32_t check_scales(const char *name, const struct view *v, int64_t entries,
                            int64_t heads) {
    if (!v->data)
        return DLATTN_OK;
    entries = v->stride[0] || entries == 0 ? entries : 1;
    heads = v->stride[1] || heads == 0 ? heads : 1;
    for (int64_t n = 0; n < entries * heads; n++) {
        const float scale = scale_at(v, n / heads, n % heads);
        if (!(scale > 0) || isinf(scale))
            return fail(DLATTN_INVALID_ARGUMENT,
                        "%s: entry [%lld, %lld] is %g, must be positive and finite", name,
                        (long long)(n / heads), (long long)(n % heads), (double)scale);
    }
    return DLATTN_OK;
}

/* Pages without a key that some row sees may be any. */
static int32_t check_attention(const struct problem *p) {
    const int64_t scaled = p->page_size ? p->pages : p->batch;
    TRY(check_cu_seqlens("cu_seqlens_q", &p->cu_seqlens_q, p->batch, p->total_q, p->len_q));
    TRY(check_cu_seqlens("cu_seqlens_k", &p->cu_seqlens_k, p->batch, p->total_k, p->len_k));
    TRY(check_lengths("query_lengths", &p->query_lengths, p->batch, p->len_q));
    TRY(check_lengths("key_lengths", &p->key_lengths, p->batch, p->len_k));
    TRY(check_scales("query_scale", &p->query_scale, p->batch, p->heads_q));
    TRY(check_scales("key_scale", &p->key_scale, scaled, p->heads_kv));
    TRY(check_scales("value_scale", &p->value_scale, scaled, p->heads_kv));
    for (int64_t b = 0; p->page_size && b < p->batch; b++) {
        const struct sequence s = problem_sequence(p, b);
        int64_t first, end, unused;
        if (s.q_len == 0)
            continue;
        visible_keys(p, &s, 0, &first, &unused);
        visible_keys(p, &s, s.q_len - 1, &unused, &end);
        TRY(check_pages(p, b, first, end));
    }
    return DLATTN_OK;
}

static int32_t check_append(const struct problem *p) {
    const int64_t scaled = p->page_size ? p->pages : p->batch;
    TRY(check_cu_seqlens("cu_seqlens", &p->cu_seqlens_q, p->batch, p->total_q, p->len_q));
    TRY(check_lengths("new_lengths", &p->query_lengths, p->batch, p->len_q));
    TRY(check_lengths("cache_lengths", &p->key_lengths, p->batch, p->len_k));
    TRY(check_scales("key_scale", &p->key_scale, scaled, p->heads_kv));
    TRY(check_scales("value_scale", &p->value_scale, scaled, p->heads_kv));
    for (int64_t b = 0; b < p->batch; b++) {
        const struct sequence s = problem_sequence(p, b);
        if (s.k_len + s.q_len > p->len_k)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "cache_lengths: entry %lld is %lld, and %lld rows are to be appended; the "
                        "cache has room for %lld",
                        (long long)b, (long long)s.k_len, (long long)s.q_len, (long long)p->len_k);
        if (p->page_size)
            TRY(check_pages(p, b, s.k_len, s.k_len + s.q_len));
    }
    return DLATTN_OK;
}

int32_t problem_check_values(const struct problem *p) {
    if (p->backend != BACKEND_CPU || p->operation == MERGE)
        return DLATTN_OK;
    return p->operation == APPEND ? check_append(p) : check_attention(p);
}

static int64_t clamped(int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

/* Rows [*start, *start + length) of sequence b. The values were checked, but a thread of the host may write there meanwhile:
 * clamped, they never lead outside a tensor. */
static int64_t read_span(const struct view *cu_seqlens, int64_t b, int64_t total, int64_t longest,
                         int64_t *start) {
    *start = clamped(int_at(cu_seqlens, b, 0), total);
    const int64_t end = clamped(int_at(cu_seqlens, b + 1, 0), total);
    return clamped(end - *start, longest);
}

struct sequence problem_sequence(const struct problem *p, int64_t b) {
    struct sequence s = {.q_rows = p->len_q, .k_rows = p->len_k};
    if (p->cu_seqlens_q.data)
        s.q_rows = read_span(&p->cu_seqlens_q, b, p->total_q, p->len_q, &s.q_start);
    if (p->cu_seqlens_k.data)
        s.k_rows = read_span(&p->cu_seqlens_k, b, p->total_k, p->len_k, &s.k_start);
    s.q_len = p->query_lengths.data ? clamped(int_at(&p->query_lengths, b, 0), s.q_rows) : s.q_rows;
    s.k_len = p->key_lengths.data ? clamped(int_at(&p->key_lengths, b, 0), s.k_rows) : s.k_rows;
    s.diagonal = (p->bottom_right ? s.k_len - s.q_len : 0) + p->diagonal_offset;
    return s;
}

int64_t problem_page(const struct problem *p, int64_t b, int64_t j) {
    return clamped(int_at(&p->block_table, b, j / p->page_size), p->pages - 1);
}
