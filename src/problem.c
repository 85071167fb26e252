/*
 * Attention: DLPack tensors and options -> struct problem. What all tensors have in common is read by slots.c; here stands how they go
 * together, and what their values must be.
 */
#include "src/problem.h"
#include "src/kernel.h"
#include "src/slots.h"
#include "src/threads.h"

#include <math.h>
#include <string.h>

const char *operation_name(enum operation operation) {
    static const char *const names[OPERATION_COUNT] = {"forward", "backward", "merge", "append"};
    return names[operation];
}

/* ---- Options --------------------------------------------------------------------------------- */

static int32_t check_window(const char *name, int64_t value) {
    if (value >= -1)
        return DLATTN_OK;
    return fail(DLATTN_INVALID_ARGUMENT, "%s: is %lld, must be at least -1 (unbounded)", name,
                (long long)value);
}

/* -1 is what a caller without a window may have written there to say so. */
static int32_t check_no_window(const char *name, int64_t value) {
    if (value == 0 || value == -1)
        return DLATTN_OK;
    return fail(DLATTN_INVALID_ARGUMENT, "%s: is %lld, but flags has no DLATTN_WINDOW", name,
                (long long)value);
}

static int32_t read_window(struct problem *p, const dlattn_forward_desc *d) {
    p->window_left = p->window_right = UNBOUNDED;
    if (d->flags & DLATTN_WINDOW) {
        TRY(check_window("window_left", d->window_left));
        TRY(check_window("window_right", d->window_right));
        if (d->window_left >= 0 && d->window_left < UNBOUNDED)
            p->window_left = d->window_left;
        if (d->window_right >= 0 && d->window_right < UNBOUNDED)
            p->window_right = d->window_right;
    } else {
        TRY(check_no_window("window_left", d->window_left));
        TRY(check_no_window("window_right", d->window_right));
    }
    if (p->window_left != UNBOUNDED || p->window_right != UNBOUNDED)
        p->features |= DLATTN_FEATURE_WINDOW;
    if (d->causal != 0 && d->causal != 1)
        return fail(DLATTN_INVALID_ARGUMENT, "causal: is %d, must be 0 or 1", d->causal);
    if (d->causal) {
        p->window_right = 0;
        p->features |= DLATTN_FEATURE_CAUSAL;
    }
    return DLATTN_OK;
}

static int32_t read_alignment(struct problem *p, const dlattn_forward_desc *d) {
    if (d->alignment != DLATTN_ALIGN_TOP_LEFT && d->alignment != DLATTN_ALIGN_BOTTOM_RIGHT)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "alignment: is %d, must be DLATTN_ALIGN_TOP_LEFT or DLATTN_ALIGN_BOTTOM_RIGHT",
                    d->alignment);
    if (d->diagonal_offset > INT32_MAX || d->diagonal_offset < -INT32_MAX)
        return fail(DLATTN_INVALID_ARGUMENT, "diagonal_offset: is %lld, must be from %d to %d",
                    (long long)d->diagonal_offset, -INT32_MAX, INT32_MAX);
    p->bottom_right = d->alignment == DLATTN_ALIGN_BOTTOM_RIGHT;
    p->diagonal_offset = d->diagonal_offset;
    if (d->diagonal_offset != 0)
        p->features |= DLATTN_FEATURE_DIAGONAL_OFFSET;
    return DLATTN_OK;
}

static int32_t read_dropout(struct problem *p, const dlattn_forward_desc *d) {
    if (!(d->dropout_probability >= 0 && d->dropout_probability < 1))
        return fail(DLATTN_INVALID_ARGUMENT,
                    "dropout_probability: is %g, must be at least 0 and below 1",
                    d->dropout_probability);
    p->dropout_probability = d->dropout_probability;
    p->dropout_seed = d->dropout_seed;
    p->dropout_offset = d->dropout_offset;
    if (d->dropout_probability > 0)
        p->features |= DLATTN_FEATURE_DROPOUT;
    return DLATTN_OK;
}

static int32_t read_desc(struct problem *p, const dlattn_forward_desc *d) {
    const uint64_t known =
        DLATTN_WINDOW | DLATTN_EXACT_SCALE | DLATTN_EMPTY_LSE_INF | DLATTN_ANY_ORDER;
    if (d->flags & ~known)
        return fail(DLATTN_UNSUPPORTED,
                    "flags: 0x%llx has bits that this library (ABI %d.%d) does not know",
                    (unsigned long long)d->flags, DLATTN_ABI_MAJOR, DLATTN_ABI_MINOR);
    if (!isfinite(d->scale))
        return fail(DLATTN_INVALID_ARGUMENT, "scale: is %g, must be finite", d->scale);
    if (!isfinite(d->softcap) || d->softcap < 0)
        return fail(DLATTN_INVALID_ARGUMENT, "softcap: is %g, must be finite and at least 0",
                    d->softcap);
    if (d->num_threads < 0)
        return fail(DLATTN_INVALID_ARGUMENT, "num_threads: is %d, must be at least 0",
                    d->num_threads);
    if (d->reserved0 != 0 || d->reserved1 != 0)
        return fail(DLATTN_INVALID_ARGUMENT, "reserved0 and reserved1: are %d and %d, must be 0",
                    d->reserved0, d->reserved1);
    if (d->max_seqlen_q < 0 || d->max_seqlen_k < 0)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "max_seqlen_q and max_seqlen_k: are %lld and %lld, must be at least 0",
                    (long long)d->max_seqlen_q, (long long)d->max_seqlen_k);
    p->scale = d->scale;
    p->softcap = d->softcap;
    if (d->softcap > 0)
        p->features |= DLATTN_FEATURE_SOFTCAP;
    p->empty_lse_inf = (d->flags & DLATTN_EMPTY_LSE_INF) != 0;
    p->any_order = (d->flags & DLATTN_ANY_ORDER) != 0;
    p->kernel = d->kernel;
    p->threads = d->num_threads < MAX_THREADS ? d->num_threads : MAX_THREADS;
    TRY(read_window(p, d));
    TRY(read_alignment(p, d));
    return read_dropout(p, d);
}

/* ---- Dtypes ---------------------------------------------------------------------------------- */

/* Float8 stands beside anything; the others are of one dtype. */
static int32_t check_dtypes(struct problem *p, const struct tensor *t) {
    const struct view *const views[] = {&p->query, &p->key, &p->value, &p->output};
    p->dtype = p->query.dtype;
    for (int i = 1; i < 4; i++) {
        if (views[i]->dtype != p->dtype)
            p->features |= DLATTN_FEATURE_MIXED_DTYPES;
        for (int j = 0; j < i; j++) {
            if (!dtype_is_float8(views[i]->dtype) && !dtype_is_float8(views[j]->dtype) &&
                views[i]->dtype != views[j]->dtype)
                return fail(DLATTN_INVALID_ARGUMENT, "%s: dtype is %s, %s's is %s", t[i].name,
                            dtype_full_name(views[i]->dtype), t[j].name,
                            dtype_full_name(views[j]->dtype));
        }
    }
    return DLATTN_OK;
}

/* ---- Shapes ---------------------------------------------------------------------------------- */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int32_t check_together(const dlattn_tensors *in, const dlattn_forward_desc *d) {
    if (in->block_table && in->cu_seqlens_k)
        return fail(DLATTN_INVALID_ARGUMENT, "block_table: cannot be combined with cu_seqlens_k");
    if (in->block_table && !in->key_lengths)
        return fail(DLATTN_INVALID_ARGUMENT, "key_lengths: is absent, block_table needs it");
    if (!in->query_segments != !in->key_segments)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is absent, %s needs it",
                    in->query_segments ? "key_segments" : "query_segments",
                    in->query_segments ? "query_segments" : "key_segments");
    if (in->block_mask ? d->block_q < 1 || d->block_k < 1 : d->block_q != 0 || d->block_k != 0)
        return fail(DLATTN_INVALID_ARGUMENT, "block_q and block_k: are %d and %d, must be %s",
                    d->block_q, d->block_k,
                    in->block_mask ? "at least 1 with block_mask" : "0 without block_mask");
    return DLATTN_OK;
}

/* Query, key, value and output. */
static int32_t read_main(struct problem *p, const struct tensor *t, struct forms forms,
                         struct extents *e) {
    if (forms.packed_q) {
        const int64_t ends = t[SLOT_cu_seqlens_q].dl->shape[0];
        if (ends < 1)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "cu_seqlens_q: has no entries, must have batch + 1");
        extents_set(e, 'B', ends - 1, "cu_seqlens_q");
    }
    TRY(slot_read(p, &attention_slots[SLOT_query], &t[SLOT_query], forms, e));
    TRY(slot_read(p, &attention_slots[SLOT_key], &t[SLOT_key], forms, e));
    TRY(slot_read(p, &attention_slots[SLOT_value], &t[SLOT_value], forms, e));
    TRY(slot_read(p, &attention_slots[SLOT_output], &t[SLOT_output], forms, e));
    TRY(check_dtypes(p, t));
    p->batch = e->of['B'];
    p->heads_q = e->of['H'];
    p->heads_kv = e->of['G'];
    p->dim_qk = e->of['D'];
    p->dim_v = e->of['V'];
    if (p->dim_qk < 1 || p->dim_v < 1)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "query and value: head_dim is %lld and %lld, must be at least 1",
                    (long long)p->dim_qk, (long long)p->dim_v);
    if (p->heads_kv == 0 ? p->heads_q != 0 : p->heads_q % p->heads_kv != 0)
        return fail(DLATTN_INVALID_ARGUMENT, "key: has %lld heads, must divide the query's %lld",
                    (long long)p->heads_kv, (long long)p->heads_q);
    return DLATTN_OK;
}

static int32_t read_pages(struct problem *p, const struct tensor *t, struct forms forms,
                          struct extents *e) {
    p->pages = e->of['P'];
    p->page_size = e->of['S'];
    if (p->page_size < 1)
        return fail(DLATTN_INVALID_ARGUMENT, "key: axis 2 (page_size) is %lld, must be at least 1",
                    (long long)p->page_size);
    TRY(slot_read(p, &attention_slots[SLOT_block_table], &t[SLOT_block_table], forms, e));
    p->max_pages = e->of['N'];
    if (p->pages == 0 && p->backend == BACKEND_CUDA) /* no entry of the table can be right */
        p->max_pages = 0;
    p->len_k = p->page_size * p->max_pages;
    if (p->len_k > INT32_MAX)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "block_table: %lld pages of %lld keys exceed the limit of %d keys",
                    (long long)p->max_pages, (long long)p->page_size, INT32_MAX);
    extents_set(e, 'K', p->len_k, "block_table");
    return DLATTN_OK;
}

static void read_packed(struct problem *p, const dlattn_forward_desc *d, struct forms forms,
                        struct extents *e) {
    p->len_q = e->of['Q'];
    if (forms.packed_q) {
        p->total_q = e->of['T'];
        p->len_q = d->max_seqlen_q ? least(d->max_seqlen_q, p->total_q) : p->total_q;
        extents_set(e, 'Q', p->len_q, "max_seqlen_q");
    }
    p->len_k = e->of['K'];
    if (forms.packed_k) {
        p->total_k = e->of['U'];
        p->len_k = d->max_seqlen_k ? least(d->max_seqlen_k, p->total_k) : p->total_k;
        extents_set(e, 'K', p->len_k, "max_seqlen_k");
    }
}

static void read_blocks(struct problem *p, const dlattn_forward_desc *d, struct extents *e) {
    p->block_q = d->block_q;
    p->block_k = d->block_k;
    if (p->block_q > 0) {
        extents_set(e, 'M', (p->len_q + p->block_q - 1) / p->block_q, "block_q");
        extents_set(e, 'W', (p->len_k + p->block_k - 1) / p->block_k, "block_k");
    }
}

/* Stride-0 heads are one kv head, unless they have scales of their own; a gradient's elements are apart, so for backward they
 * stay as many as they are. */
static void read_heads(struct problem *p) {
    const int64_t between_heads =
        p->key.stride[1] | p->value.stride[1] | p->key_scale.stride[1] | p->value_scale.stride[1];
    if (p->operation == FORWARD && p->heads_kv > 1 && between_heads == 0)
        p->heads_kv = 1;
    if (p->heads_kv != p->heads_q)
        p->features |= DLATTN_FEATURE_GQA;
    if (p->dim_qk != p->dim_v)
        p->features |= DLATTN_FEATURE_HEAD_DIM_V;
}

static void read_layout(struct problem *p, const struct tensor *t) {
    static const int with_rows[] = {SLOT_query,    SLOT_key,     SLOT_value, SLOT_output,
                                    SLOT_d_output, SLOT_d_query, SLOT_d_key, SLOT_d_value};
    const int count = p->operation == BACKWARD ? 8 : 4;
    p->contiguous = !t[SLOT_lse].dl || tensor_is_compact(&t[SLOT_lse]);
    for (int i = 0; i < count; i++) {
        const struct tensor *rows = &t[with_rows[i]];
        if (!rows->dl)
            continue;
        const int inner = rows->dl->ndim - 1;
        p->contiguous &= tensor_is_compact(rows);
        if (rows->dl->shape[inner] > 1 && rows->stride[inner] != 1)
            p->features |= DLATTN_FEATURE_INNER_STRIDE;
        if (!tensor_is_aligned(rows))
            p->features |= DLATTN_FEATURE_UNALIGNED;
    }
    if (!p->contiguous)
        p->features |= DLATTN_FEATURE_STRIDED;
}

/* ---- Gradients ------------------------------------------------------------------------------- */

static int32_t read_gradient(struct problem *p, const struct slot *slot, const struct tensor *t,
                             const struct tensor *of) {
    struct view *v = slot_view(p, slot);
    const struct view *like = slot_view(p, &attention_slots[slot->of]);
    char text[DTYPE_TEXT];
    if (!of->dl)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is given, but %s is absent", t->name,
                    attention_slots[slot->of].name);
    if (!dtype_of(t->dtype, &v->dtype) || (v->dtype != like->dtype && v->dtype != DTYPE_F32))
        return fail(DLATTN_INVALID_ARGUMENT, "%s: dtype is %s, must be float32 or %s's %s", t->name,
                    dtype_text(t->dtype, text), of->name, dtype_full_name(like->dtype));
    for (int axis = 0; axis < of->dl->ndim; axis++) {
        if (t->dl->shape[axis] != of->dl->shape[axis])
            return fail(DLATTN_INVALID_ARGUMENT, "%s: axis %d is %lld, must be %lld as in %s",
                        t->name, axis, (long long)t->dl->shape[axis],
                        (long long)of->dl->shape[axis], of->name);
    }
    return DLATTN_OK;
}

/* Shapes are those of the tensors that they belong to, and so are the views, but for strides and data. */
static int32_t read_gradients(struct problem *p, const struct tensor *t, struct forms forms,
                              struct extents *e) {
    bool wanted = false;
    for (int i = TENSOR_SLOTS; i < ATTENTION_SLOTS; i++) {
        const struct slot *slot = &attention_slots[i];
        if (!t[i].dl)
            continue;
        TRY(read_gradient(p, slot, &t[i], &t[slot->of]));
        struct slot as = attention_slots[slot->of];
        as.view = slot->view;
        const enum dtype dtype = slot_view(p, slot)->dtype;
        as.kind = ELEMENT;
        TRY(slot_read(p, &as, &t[i], forms, e));
        slot_view(p, slot)->dtype = dtype;
        if (slot->written && t[i].empty) /* its strides of 0 do not say that an extent is 1 */
            slot_view(p, slot)->data = NULL;
        wanted |= slot->written;
    }
    if (!wanted)
        return fail(DLATTN_INVALID_ARGUMENT, "gradients: all are absent, must have at least one");
    if (!t[SLOT_lse].dl)
        return fail(DLATTN_INVALID_ARGUMENT, "lse: is absent, backward needs it");
    if (p->features & (DLATTN_FEATURE_PAGED | DLATTN_FEATURE_MIXED_DTYPES | DLATTN_FEATURE_SCALES))
        return fail(DLATTN_UNSUPPORTED,
                    "backward: takes no pages, no float8 and no scales; this call has %s",
                    p->features & DLATTN_FEATURE_PAGED    ? "block_table"
                    : p->features & DLATTN_FEATURE_SCALES ? "scales"
                                                          : "float8 tensors");
    return DLATTN_OK;
}

/* ---- The whole ------------------------------------------------------------------------------- */

static uint64_t written_slots(const struct problem *p) {
    uint64_t written = 0;
    const bool backward = p->operation == BACKWARD;
    for (int i = backward ? TENSOR_SLOTS : 0; i < (backward ? ATTENTION_SLOTS : TENSOR_SLOTS); i++)
        written |= attention_slots[i].written ? UINT64_C(1) << i : 0;
    return written;
}

/* Of those that are not the four main ones, nor gradients. */
#define OPTIONAL_SLOTS ((UINT64_C(1) << TENSOR_SLOTS) - (UINT64_C(1) << SLOT_lse))

static int32_t read_tensors(struct problem *p, struct tensor *t, const dlattn_forward_desc *d,
                            struct forms forms) {
    struct extents e;
    extents_start(&e);
    TRY(read_main(p, t, forms, &e));
    read_packed(p, d, forms, &e);
    if (forms.paged)
        TRY(read_pages(p, t, forms, &e));
    read_blocks(p, d, &e);
    extents_set(&e, 'C', p->batch + 1, "the batch");
    EACH_SLOT(i, p->present & OPTIONAL_SLOTS)
    TRY(slot_read(p, &attention_slots[i], &t[i], forms, &e));
    if (p->operation == BACKWARD)
        TRY(read_gradients(p, t, forms, &e));
    read_heads(p);
    read_layout(p, t);
    return DLATTN_OK;
}

int32_t problem_build(struct problem *p, const dlattn_forward_desc *desc,
                      const dlattn_tensors *tensors, const dlattn_gradients *gradients,
                      bool with_data) {
    struct tensor t[ATTENTION_SLOTS];
    const int count = gradients ? ATTENTION_SLOTS : TENSOR_SLOTS;
    const struct forms forms = {.packed_q = tensors->cu_seqlens_q != NULL,
                                .packed_k = tensors->cu_seqlens_k != NULL,
                                .paged = tensors->block_table != NULL};
    const DLTensor *given[ATTENTION_SLOTS];
    memset(p, 0, sizeof *p);
    p->operation = gradients ? BACKWARD : FORWARD;
    p->planning = !with_data;
    TRY(read_desc(p, desc));
    TRY(check_together(tensors, desc));
    memcpy(given, &tensors->query, TENSOR_SLOTS * sizeof *given);
    if (gradients)
        memcpy(given + TENSOR_SLOTS, &gradients->d_output, GRADIENT_SLOTS * sizeof *given);
    TRY(slots_open(p, attention_slots, count, given, forms, t, with_data));
    TRY(slots_check_devices(p, t, count));
    TRY(tensor_override_dtype(&t[SLOT_query], desc->query_dtype));
    TRY(tensor_override_dtype(&t[SLOT_key], desc->key_dtype));
    TRY(tensor_override_dtype(&t[SLOT_value], desc->value_dtype));
    TRY(read_tensors(p, t, desc, forms));
    TRY(slots_check_memory(p, t, written_slots(p), with_data));
    if (p->scale == 0 && !(desc->flags & DLATTN_EXACT_SCALE))
        p->scale = 1 / sqrt((double)p->dim_qk);
    return DLATTN_OK;
}

bool problem_is_empty(const struct problem *p) {
    switch (p->operation) {
    case FORWARD:
    case MERGE:
        return p->batch == 0 || p->heads_q == 0 || p->len_q == 0;
    case BACKWARD: /* keys have gradients, if only zeros */
        return p->batch == 0 || p->heads_q == 0 || (p->len_q == 0 && p->len_k == 0);
    case APPEND:
        return p->batch == 0 || p->heads_kv == 0 || p->len_q == 0;
    case OPERATION_COUNT:
        break;
    }
    return true;
}
