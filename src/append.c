/* New keys and values, and the cache that they go into -> struct problem. */
#include "src/kernel.h"
#include "src/slots.h"

#include <string.h>

static int32_t read_lengths(struct problem *p, const struct tensor *t, struct forms forms,
                            struct extents *e) {
    p->batch = e->of['B'];
    p->heads_kv = p->heads_q = e->of['G'];
    p->dim_qk = e->of['D'];
    p->dim_v = e->of['V'];
    if (p->dim_qk < 1 || p->dim_v < 1)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "key and value: head_dim is %lld and %lld, must be at least 1",
                    (long long)p->dim_qk, (long long)p->dim_v);
    p->total_q = forms.packed_q ? e->of['T'] : 0;
    p->len_q = forms.packed_q ? p->total_q : e->of['Q'];
    p->len_k = e->of['K'];
    if (!forms.paged)
        return DLATTN_OK;
    p->pages = e->of['P'];
    p->page_size = e->of['S'];
    if (p->page_size < 1)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "key_cache: axis 2 (page_size) is %lld, must be at least 1",
                    (long long)p->page_size);
    TRY(slot_read(p, &append_slots[APPEND_block_table], &t[APPEND_block_table], forms, e));
    p->max_pages = p->pages == 0 && p->backend == BACKEND_CUDA ? 0 : e->of['N'];
    p->len_k = p->page_size * p->max_pages;
    return DLATTN_OK;
}

static int32_t read_tensors(struct problem *p, const struct tensor *t, struct forms forms) {
    struct extents e;
    extents_start(&e);
    if (forms.packed_q) {
        const int64_t ends = t[APPEND_cu_seqlens].dl->shape[0];
        if (ends < 1)
            return fail(DLATTN_INVALID_ARGUMENT, "cu_seqlens: has no entries, must have batch + 1");
        extents_set(&e, 'B', ends - 1, "cu_seqlens");
    } else {
        extents_set(&e, 'B', t[APPEND_key].dl->shape[0], "key");
    }
    for (int i = 0; i <= APPEND_value_cache; i++)
        TRY(slot_read(p, &append_slots[i], &t[i], forms, &e));
    if (p->key.dtype != p->value.dtype)
        return fail(DLATTN_INVALID_ARGUMENT, "value: dtype is %s, key's is %s",
                    dtype_full_name(p->value.dtype), dtype_full_name(p->key.dtype));
    TRY(read_lengths(p, t, forms, &e));
    extents_set(&e, 'C', p->batch + 1, "the batch");
    for (int i = APPEND_cache_lengths; i < APPEND_SLOTS; i++)
        TRY(slot_read(p, &append_slots[i], &t[i], forms, &e));
    p->dtype = p->key.dtype;
    if (p->key_cache.dtype != p->dtype || p->value_cache.dtype != p->dtype)
        p->features |= DLATTN_FEATURE_MIXED_DTYPES;
    if (p->dim_qk != p->dim_v)
        p->features |= DLATTN_FEATURE_HEAD_DIM_V;
    return DLATTN_OK;
}

static void read_layout(struct problem *p, const struct tensor *t) {
    p->contiguous = true;
    for (int i = 0; i <= APPEND_value_cache; i++) {
        const int inner = t[i].dl->ndim - 1;
        p->contiguous &= tensor_is_compact(&t[i]);
        if (t[i].dl->shape[inner] > 1 && t[i].stride[inner] != 1)
            p->features |= DLATTN_FEATURE_INNER_STRIDE;
        if (!tensor_is_aligned(&t[i]))
            p->features |= DLATTN_FEATURE_UNALIGNED;
    }
    if (!p->contiguous)
        p->features |= DLATTN_FEATURE_STRIDED;
}

int32_t append_build(struct problem *p, const dlattn_append_tensors *tensors, bool with_data) {
    const struct forms forms = {.packed_q = tensors->cu_seqlens != NULL,
                                .paged = tensors->block_table != NULL};
    const uint64_t written = UINT64_C(1) << APPEND_key_cache | UINT64_C(1) << APPEND_value_cache;
    struct tensor t[APPEND_SLOTS];
    memset(p, 0, sizeof *p);
    p->operation = APPEND;
    p->planning = !with_data;
    TRY(slots_open(p, append_slots, APPEND_SLOTS, &tensors->key, forms, t, with_data));
    TRY(slots_check_devices(p, t, APPEND_SLOTS));
    TRY(tensor_override_dtype(&t[APPEND_key_cache], tensors->key_cache_dtype));
    TRY(tensor_override_dtype(&t[APPEND_value_cache], tensors->value_cache_dtype));
    TRY(read_tensors(p, t, forms));
    read_layout(p, t);
    return slots_check_memory(p, t, written, with_data);
}
