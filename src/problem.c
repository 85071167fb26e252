/*
 * DLPack tensors and options -> struct problem. Every refusal of a call is written here, with the
 * tensor's name and both values.
 */
#include "src/problem.h"
#include "kernels/kernel.h"
#include "src/threads.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

const char *dtype_name(enum dtype d) {
    static const char *const names[DTYPE_COUNT] = {"f64", "f32", "f16", "bf16"};
    return names[d];
}

/* As frameworks call it. */
static const char *dtype_full_name(enum dtype d) {
    static const char *const names[DTYPE_COUNT] = {"float64", "float32", "float16", "bfloat16"};
    return names[d];
}

/* ---- One tensor ------------------------------------------------------------------------------ */

/* A DLTensor that passed the checks which need no other tensor: axes in the caller's order. */
struct tensor {
    const char *name;
    const DLTensor *dl;
    int64_t stride[4];   /* elements; 0 on axes of extent 0 or 1 */
    int64_t bytes;       /* of an element */
    int64_t first, last; /* least and greatest offset of an element, in elements */
    bool empty;
};

static const char *device_name(DLDeviceType type) {
    switch (type) {
    case kDLCPU:
        return "cpu";
    case kDLCUDA:
        return "cuda";
    case kDLCUDAHost:
        return "cuda_host";
    case kDLCUDAManaged:
        return "cuda_managed";
    default:
        return "device type";
    }
}

static int32_t check_strides(struct tensor *t) {
    const DLTensor *dl = t->dl;
    int64_t compact = 1;
    t->empty = false;
    for (int axis = dl->ndim - 1; axis >= 0; axis--) {
        const int64_t extent = dl->shape[axis], stride = dl->strides ? dl->strides[axis] : compact;
        int64_t step;
        if (extent < 0)
            return fail(DLATTN_INVALID_ARGUMENT, "%s: axis %d has extent %lld, must be at least 0",
                        t->name, axis, (long long)extent);
        if (extent > INT32_MAX) /* so that sums and bytes of two extents never overflow */
            return fail(DLATTN_INVALID_ARGUMENT, "%s: axis %d has extent %lld, must be at most %d",
                        t->name, axis, (long long)extent, INT32_MAX);
        if (__builtin_mul_overflow(compact, extent > 0 ? extent : 1, &compact))
            return fail(DLATTN_INVALID_ARGUMENT,
                        "%s: the number of elements overflows 64 bits at axis %d (extent %lld)",
                        t->name, axis, (long long)extent);
        t->empty |= extent == 0;
        t->stride[axis] = extent > 1 ? stride : 0; /* DLPack: strides of size-1 axes mean nothing */
        if (extent < 2)
            continue;
        int64_t *end = stride < 0 ? &t->first : &t->last;
        if (__builtin_mul_overflow(extent - 1, stride, &step) ||
            __builtin_add_overflow(*end, step, end) || *end > INT64_MAX / 32 ||
            *end < INT64_MIN / 32)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "%s: offsets overflow at axis %d (extent %lld, stride %lld)", t->name, axis,
                        (long long)extent, (long long)stride);
    }
    return DLATTN_OK;
}

/* Shape-independent checks of one tensor; `ndim` is what its place asks for. */
static int32_t open_tensor(struct tensor *t, const char *name, const DLTensor *dl, int32_t ndim,
                           bool with_data) {
    *t = (struct tensor){.name = name, .dl = dl};
    if (dl->ndim != ndim)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: has %d axes, must have %d", name, dl->ndim, ndim);
    if (!dl->shape)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: shape is NULL with %d axes", name, ndim);
    if (dl->dtype.lanes != 1)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: dtype has %d lanes, must have 1", name,
                    dl->dtype.lanes);
    t->bytes = (dl->dtype.bits + 7) / 8;
    int32_t status = check_strides(t);
    if (status != DLATTN_OK)
        return status;
    if (with_data && !t->empty && !dl->data)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: data is NULL but the tensor has elements", name);
    return DLATTN_OK;
}

/* Extent of an axis of the caller's tensor; -1 as `axis` means the place is not there and counts 1.
 */
static int64_t extent(const struct tensor *t, int axis) {
    return axis < 0 ? 1 : t->dl->shape[axis];
}

static int32_t expect(const struct tensor *t, int axis, int64_t want, const char *what,
                      const char *whose) {
    if (t->dl->shape[axis] == want)
        return DLATTN_OK;
    return fail(DLATTN_INVALID_ARGUMENT, "%s: axis %d (%s) is %lld, %s makes it %lld", t->name,
                axis, what, (long long)t->dl->shape[axis], whose, (long long)want);
}

/* The view of a tensor whose axes stand for [B, H, L, D] as `axes` says; -1: broadcast. */
static struct view view_of(const struct tensor *t, const int axes[4]) {
    struct view v = {.data = t->dl->data ? (char *)t->dl->data + t->dl->byte_offset : NULL};
    for (int i = 0; i < 4; i++)
        v.stride[i] = axes[i] < 0 ? 0 : t->stride[axes[i]];
    return v;
}

static bool element_dtype(DLDataType d, enum dtype *out) {
    if (d.code == kDLFloat && d.bits == 64)
        *out = DTYPE_F64;
    else if (d.code == kDLFloat && d.bits == 32)
        *out = DTYPE_F32;
    else if (d.code == kDLFloat && d.bits == 16)
        *out = DTYPE_F16;
    else if (d.code == kDLBfloat && d.bits == 16)
        *out = DTYPE_BF16;
    else
        return false;
    return true;
}

/* As frameworks print it, "int64"; into text[DTYPE_TEXT], which is returned. */
enum { DTYPE_TEXT = 32 };
static const char *dtype_text(DLDataType d, char *text) {
    static const char *const kinds[] = {
        [kDLInt] = "int",       [kDLUInt] = "uint",       [kDLFloat] = "float",
        [kDLBfloat] = "bfloat", [kDLComplex] = "complex",
    };
    if (d.code == kDLBool && d.bits == 8)
        return "bool";
    if (d.code < sizeof kinds / sizeof kinds[0] && kinds[d.code])
        snprintf(text, DTYPE_TEXT, "%s%d", kinds[d.code], d.bits);
    else
        snprintf(text, DTYPE_TEXT, "DLPack's code %d with %d bits", d.code, d.bits);
    return text;
}

static int32_t refuse_dtype(int32_t status, const struct tensor *t, const char *want) {
    char text[DTYPE_TEXT];
    return fail(status, "%s: dtype is %s, must be %s", t->name, dtype_text(t->dl->dtype, text),
                want);
}

static int32_t expect_element(const struct tensor *t, enum dtype *out) {
    if (element_dtype(t->dl->dtype, out))
        return DLATTN_OK;
    return refuse_dtype(DLATTN_UNSUPPORTED, t, "float16, bfloat16, float32 or float64");
}

/* float32 or the problem's element type: lse and bias. */
static int32_t expect_float(const struct tensor *t, enum dtype element, enum dtype *out) {
    if (element_dtype(t->dl->dtype, out) && (*out == DTYPE_F32 || *out == element))
        return DLATTN_OK;
    char text[DTYPE_TEXT];
    return fail(DLATTN_INVALID_ARGUMENT, "%s: dtype is %s, must be float32 or the query's %s",
                t->name, dtype_text(t->dl->dtype, text), dtype_full_name(element));
}

static int32_t expect_f32(const struct tensor *t) {
    enum dtype d;
    if (element_dtype(t->dl->dtype, &d) && d == DTYPE_F32)
        return DLATTN_OK;
    return refuse_dtype(DLATTN_INVALID_ARGUMENT, t, "float32");
}

static int32_t expect_int32(const struct tensor *t) {
    if (t->dl->dtype.code == kDLInt && t->dl->dtype.bits == 32)
        return DLATTN_OK;
    return refuse_dtype(DLATTN_INVALID_ARGUMENT, t, "int32");
}

static int32_t expect_bool(const struct tensor *t) {
    const DLDataType d = t->dl->dtype;
    if ((d.code == kDLBool || d.code == kDLUInt) && d.bits == 8)
        return DLATTN_OK;
    return refuse_dtype(DLATTN_INVALID_ARGUMENT, t, "bool or uint8");
}

static bool compact(const struct tensor *t) {
    int64_t want = 1;
    for (int axis = t->dl->ndim - 1; axis >= 0; axis--) {
        const int64_t n = t->dl->shape[axis];
        if (n > 1 && t->stride[axis] != want)
            return false;
        want *= n;
    }
    return true;
}

/* No two elements of an output may share memory: with axes in order of stride, each step must clear
 * all of the smaller axes together. */
static int64_t size_of(int64_t stride) { return stride < 0 ? -stride : stride; }

static int32_t check_writable(const struct tensor *t) {
    int order[4], n = 0;
    if (t->empty)
        return DLATTN_OK;
    for (int axis = 0; axis < t->dl->ndim; axis++) {
        if (t->dl->shape[axis] < 2)
            continue;
        if (t->stride[axis] == 0)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "%s: axis %d has stride 0 and extent %lld; an output cannot be broadcast",
                        t->name, axis, (long long)t->dl->shape[axis]);
        int at = n++;
        for (; at > 0 && size_of(t->stride[order[at - 1]]) > size_of(t->stride[axis]); at--)
            order[at] = order[at - 1];
        order[at] = axis;
    }
    int64_t reach = 0;
    for (int i = 0; i < n; i++) {
        const int axis = order[i];
        const int64_t step = size_of(t->stride[axis]);
        if (step <= reach)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "%s: axis %d has stride %lld, but the inner axes reach over %lld elements; "
                        "outputs may not overlap",
                        t->name, axis, (long long)t->stride[axis], (long long)reach + 1);
        reach += (t->dl->shape[axis] - 1) * step;
    }
    return DLATTN_OK;
}

#define TRY(call)                                                                                  \
    do {                                                                                           \
        const int32_t status_ = (call);                                                            \
        if (status_ != DLATTN_OK)                                                                  \
            return status_;                                                                        \
    } while (0)

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

static int32_t read_desc(struct problem *p, const dlattn_forward_desc *d) {
    const uint64_t known = DLATTN_WINDOW | DLATTN_EXACT_SCALE | DLATTN_EMPTY_LSE_INF;
    if (d->flags & ~known)
        return fail(DLATTN_UNSUPPORTED,
                    "flags: 0x%llx has bits that this library (ABI %d.%d) does not know",
                    (unsigned long long)d->flags, DLATTN_ABI_MAJOR, DLATTN_ABI_MINOR);
    if (!isfinite(d->scale))
        return fail(DLATTN_INVALID_ARGUMENT, "scale: is %g, must be finite", d->scale);
    if (!isfinite(d->softcap) || d->softcap < 0)
        return fail(DLATTN_INVALID_ARGUMENT, "softcap: is %g, must be finite and at least 0",
                    d->softcap);
    if (d->causal != 0 && d->causal != 1)
        return fail(DLATTN_INVALID_ARGUMENT, "causal: is %d, must be 0 or 1", d->causal);
    if (d->alignment != DLATTN_ALIGN_TOP_LEFT && d->alignment != DLATTN_ALIGN_BOTTOM_RIGHT)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "alignment: is %d, must be DLATTN_ALIGN_TOP_LEFT or DLATTN_ALIGN_BOTTOM_RIGHT",
                    d->alignment);
    if (d->num_threads < 0)
        return fail(DLATTN_INVALID_ARGUMENT, "num_threads: is %d, must be at least 0",
                    d->num_threads);
    if (d->reserved0 != 0)
        return fail(DLATTN_INVALID_ARGUMENT, "reserved0: is %d, must be 0", d->reserved0);
    if (d->max_seqlen_q < 0 || d->max_seqlen_k < 0)
        return fail(DLATTN_INVALID_ARGUMENT, "max_seqlen: %lld and %lld must be at least 0",
                    (long long)d->max_seqlen_q, (long long)d->max_seqlen_k);
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
    if (d->causal) {
        p->window_right = 0;
        p->features |= DLATTN_FEATURE_CAUSAL;
    }
    p->softcap = d->softcap;
    if (d->softcap > 0)
        p->features |= DLATTN_FEATURE_SOFTCAP;
    p->scale = d->scale;
    p->bottom_right = d->alignment == DLATTN_ALIGN_BOTTOM_RIGHT;
    p->empty_lse_inf = (d->flags & DLATTN_EMPTY_LSE_INF) != 0;
    p->kernel = d->kernel;
    p->threads = d->num_threads < MAX_THREADS ? d->num_threads : MAX_THREADS;
    return DLATTN_OK;
}

/* ---- The tensors of a call ------------------------------------------------------------------- */

/* All tensors of a call, opened; an absent one has dl == NULL. */
struct tensors {
    struct tensor query, key, value, output, lse, bias, mask, alibi_slopes, sinks;
    struct tensor query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, block_table;
};
enum { SLOTS = sizeof(struct tensors) / sizeof(struct tensor), REQUIRED = 4 };

/* The same as an array, in the order of dlattn_tensors. */
static struct tensor *slot(struct tensors *t, int index) { return &t->query + index; }

static const char *const slot_names[SLOTS] = {
    "query",       "key",          "value",        "output",      "lse",
    "bias",        "mask",         "alibi_slopes", "sinks",       "query_lengths",
    "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "block_table",
};

static bool is_on_gpu(const DLTensor *dl) {
    return dl->device.device_type == kDLCUDA || dl->device.device_type == kDLCUDAManaged;
}

/* Managed memory and page-locked memory have no device of their own: a tensor that has one decides for all. */
static void read_device(struct problem *p, struct tensors *t) {
    p->backend = is_on_gpu(t->query.dl) ? BACKEND_CUDA : BACKEND_CPU;
    p->device_id = p->backend == BACKEND_CUDA ? t->query.dl->device.device_id : 0;
    for (int i = 0; p->backend == BACKEND_CUDA && i < SLOTS; i++) {
        const DLTensor *dl = slot(t, i)->dl;
        if (dl && dl->device.device_type == kDLCUDA) {
            p->device_id = dl->device.device_id;
            return;
        }
    }
}

static int32_t check_device(const struct problem *p, const struct tensor *t,
                            const struct tensor *query) {
    const DLDevice device = t->dl->device, first = query->dl->device;
    if (!is_on_gpu(t->dl) && device.device_type != kDLCPU && device.device_type != kDLCUDAHost)
        return fail(DLATTN_UNSUPPORTED,
                    "%s: is on device type %d, this library knows cpu (1), cuda (2), cuda_host (3) "
                    "and cuda_managed (13)",
                    t->name, (int)device.device_type);
    if (is_on_gpu(t->dl) != is_on_gpu(query->dl))
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is on %s %d, query is on %s %d", t->name,
                    device_name(device.device_type), device.device_id,
                    device_name(first.device_type), first.device_id);
    if (device.device_type == kDLCUDA && device.device_id != p->device_id)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is on cuda %d, others are on cuda %d", t->name,
                    device.device_id, p->device_id);
    return DLATTN_OK;
}

static int32_t open_all(struct problem *p, struct tensors *t, const dlattn_tensors *in,
                        bool with_data) {
    const int32_t q_axes = in->cu_seqlens_q ? 3 : 4, k_axes = in->cu_seqlens_k ? 3 : 4,
                  slopes_axes = in->alibi_slopes && in->alibi_slopes->ndim == 2 ? 2 : 1;
    const int32_t axes[SLOTS] = {q_axes,      k_axes, k_axes, q_axes, q_axes - 1, 4, 4,
                                 slopes_axes, 1,      1,      1,      1,          1, 2};
    const DLTensor *const *given = &in->query;
    if (in->block_table && in->cu_seqlens_k)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "block_table: paged keys are not packed, leave cu_seqlens_k out");
    if (in->block_table && !in->key_lengths)
        return fail(DLATTN_INVALID_ARGUMENT, "key_lengths: is absent, block_table needs it");
    for (int i = 0; i < SLOTS; i++) {
        if (given[i])
            TRY(open_tensor(slot(t, i), slot_names[i], given[i], axes[i], with_data));
        else if (i < REQUIRED)
            return fail(DLATTN_INVALID_ARGUMENT, "%s: is absent", slot_names[i]);
        p->present |= given[i] ? 1u << i : 0;
    }
    read_device(p, t);
    for (int i = 0; i < SLOTS; i++) {
        if (given[i])
            TRY(check_device(p, slot(t, i), &t->query));
    }
    return DLATTN_OK;
}

/* ---- Addresses ------------------------------------------------------------------------------- */

/* A GPU faults on an element that is not aligned to its own size, and the fault ends the whole context. */
static int32_t check_alignment(const struct tensor *t) {
    const uintptr_t address = (uintptr_t)t->dl->data + t->dl->byte_offset;
    if (t->empty || address % (uintptr_t)t->bytes == 0)
        return DLATTN_OK;
    return fail(DLATTN_INVALID_ARGUMENT,
                "%s: its first element is at %p, which is not a multiple of its %lld bytes; a GPU "
                "cannot read that",
                t->name, (void *)address, (long long)t->bytes);
}

/* Bytes that a tensor can reach: [first, end). */
struct reach {
    intptr_t first, end;
};

static struct reach reach_of(const struct tensor *t) {
    const intptr_t base = (intptr_t)t->dl->data + (intptr_t)t->dl->byte_offset;
    return (struct reach){base + t->first * t->bytes, base + (t->last + 1) * t->bytes};
}

/* One step of an offset: a multiple of `stride` bytes, at most `most` times. */
struct step {
    int64_t stride, most;
};

/* Adds the steps of a tensor to steps[n], largest stride first, equal strides together. */
static int add_steps(struct step *steps, int n, const struct tensor *t) {
    for (int axis = 0; axis <= t->dl->ndim; axis++) {
        const bool inside = axis == t->dl->ndim; /* the bytes of an element */
        const struct step step = {
            inside ? 1 : size_of(t->stride[axis]) * t->bytes,
            (inside ? t->bytes : t->dl->shape[axis]) - 1,
        };
        int at = 0;
        if (step.stride == 0 || step.most == 0)
            continue;
        while (at < n && steps[at].stride > step.stride)
            at++;
        if (at < n && steps[at].stride == step.stride) {
            steps[at].most += step.most;
            continue;
        }
        memmove(steps + at + 1, steps + at, (size_t)(n++ - at) * sizeof *steps);
        steps[at] = step;
    }
    return n;
}

/* Whether some choice of steps sums up to `distance`. Strides that nest, as those of all usual layouts do, leave one or
 * two choices at each step; `tries` bounds the work for the others, which count as sharing. */
static bool reachable(const struct step *steps, int n, int64_t distance, int *tries) {
    int64_t rest = 0;
    if (distance == 0 || --*tries < 0)
        return distance >= 0;
    for (int i = 1; i < n; i++)
        rest += steps[i].stride * steps[i].most;
    if (n == 0 || distance < 0 || distance > rest + steps[0].stride * steps[0].most)
        return false;
    int64_t times = distance / steps[0].stride;
    times = times < steps[0].most ? times : steps[0].most;
    for (; times >= 0 && distance - times * steps[0].stride <= rest; times--) {
        if (reachable(steps + 1, n - 1, distance - times * steps[0].stride, tries))
            return true;
    }
    return false;
}

/* Whether two tensors have a byte in common: they may lie in turns in one buffer. Element i of `a` and j of `b` begin at
 * the same byte if the offset of i, and the way of j to the end of b, sum up to the distance between a's begin and b's end. */
static bool share_memory(const struct tensor *a, const struct tensor *b) {
    enum { MOST_TRIES = 1000 };
    const struct reach x = reach_of(a), y = reach_of(b);
    struct step steps[10];
    int tries = MOST_TRIES;
    if (a->empty || b->empty || x.first >= y.end || y.first >= x.end)
        return false;
    return reachable(steps, add_steps(steps, add_steps(steps, 0, a), b), y.end - 1 - x.first,
                     &tries);
}

/* Rows are read again after others have been written. */
static int32_t check_outputs_apart(struct tensors *t) {
    struct tensor *const outputs[] = {&t->output, &t->lse};
    for (int o = 0; o < 2; o++) {
        for (int i = 0; outputs[o]->dl && i < SLOTS; i++) {
            const struct tensor *other = slot(t, i);
            if (other->dl && other != outputs[o] && share_memory(outputs[o], other))
                return fail(DLATTN_INVALID_ARGUMENT,
                            "%s: shares memory with %s; what a call writes must be apart from all "
                            "else that it is given",
                            outputs[o]->name, other->name);
        }
    }
    return DLATTN_OK;
}

static int32_t check_addresses(const struct problem *p, struct tensors *t) {
    for (int i = 0; p->backend == BACKEND_CUDA && i < SLOTS; i++) {
        if (slot(t, i)->dl)
            TRY(check_alignment(slot(t, i)));
    }
    return check_outputs_apart(t);
}

/* ---- The call -------------------------------------------------------------------------------- */

static const int dense_axes[4] = {0, 1, 2, 3}, packed_axes[4] = {-1, 1, 0, 2};

static int32_t read_main(struct problem *p, const struct tensors *t, const dlattn_forward_desc *d) {
    const bool packed_q = t->cu_seqlens_q.dl, packed_k = t->cu_seqlens_k.dl,
               paged = t->block_table.dl;
    const int *q = packed_q ? packed_axes : dense_axes, *k = packed_k ? packed_axes : dense_axes;
    enum dtype dtype;

    TRY(expect_element(&t->query, &p->dtype));
    const struct tensor *const others[] = {&t->key, &t->value, &t->output};
    for (int i = 0; i < 3; i++) {
        TRY(expect_element(others[i], &dtype));
        if (dtype != p->dtype)
            return fail(DLATTN_INVALID_ARGUMENT, "%s: dtype is %s, query's is %s", others[i]->name,
                        dtype_full_name(dtype), dtype_full_name(p->dtype));
    }

    p->heads_q = extent(&t->query, q[1]);
    p->heads_kv = extent(&t->key, k[1]);
    p->dim_qk = extent(&t->query, q[3]);
    p->dim_v = extent(&t->value, k[3]);
    p->batch = packed_q ? extent(&t->cu_seqlens_q, 0) - 1 : extent(&t->query, 0);
    if (p->batch < 0)
        return fail(DLATTN_INVALID_ARGUMENT, "cu_seqlens_q: has no entries, must have batch + 1");
    p->total_q = packed_q ? extent(&t->query, 0) : 0;
    p->total_k = packed_k ? extent(&t->key, 0) : 0;
    p->len_q = !packed_q ? extent(&t->query, 2) : d->max_seqlen_q ? d->max_seqlen_q : p->total_q;
    p->len_k = !packed_k ? extent(&t->key, 2) : d->max_seqlen_k ? d->max_seqlen_k : p->total_k;
    if (p->len_q > p->total_q && packed_q)
        p->len_q = p->total_q;
    if (p->len_k > p->total_k && packed_k)
        p->len_k = p->total_k;
    if (p->dim_qk < 1 || p->dim_v < 1)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "query and value: head_dim is %lld and %lld, must be at least 1",
                    (long long)p->dim_qk, (long long)p->dim_v);

    TRY(expect(&t->key, k[3], p->dim_qk, "head_dim", "query"));
    if (!packed_k && !paged)
        TRY(expect(&t->key, 0, p->batch, "batch", packed_q ? "cu_seqlens_q" : "query"));
    TRY(expect(&t->value, 0, t->key.dl->shape[0],
               paged      ? "pages"
               : packed_k ? "total_k"
                          : "batch",
               "key"));
    TRY(expect(&t->value, k[1], p->heads_kv, "heads", "key"));
    if (!packed_k)
        TRY(expect(&t->value, 2, t->key.dl->shape[2], paged ? "page_size" : "length", "key"));
    TRY(expect(&t->output, 0, t->query.dl->shape[0], packed_q ? "total_q" : "batch", "query"));
    TRY(expect(&t->output, q[1], p->heads_q, "heads", "query"));
    TRY(expect(&t->output, q[3], p->dim_v, "head_dim", "value"));
    if (!packed_q)
        TRY(expect(&t->output, 2, p->len_q, "length", "query"));
    if (p->heads_kv == 0 ? p->heads_q != 0 : p->heads_q % p->heads_kv != 0)
        return fail(DLATTN_INVALID_ARGUMENT, "key: %lld heads do not divide the query's %lld",
                    (long long)p->heads_kv, (long long)p->heads_q);
    if (paged) {
        p->pages = t->key.dl->shape[0];
        p->page_size = p->len_k;
        if (p->page_size < 1)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "key: axis 2 (page_size) is %lld, must be at least 1",
                        (long long)p->page_size);
        p->max_pages = extent(&t->block_table, 1);
        if (p->pages == 0 && p->backend == BACKEND_CUDA) /* no entry of the table can be right */
            p->max_pages = 0;
        p->len_k = p->page_size * p->max_pages;
        if (p->len_k > INT32_MAX)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "block_table: %lld pages of %lld keys are more than the %d of an int32",
                        (long long)p->max_pages, (long long)p->page_size, INT32_MAX);
        p->features |= DLATTN_FEATURE_PAGED;
    }
    TRY(check_writable(&t->output));
    p->query = view_of(&t->query, q);
    p->key = view_of(&t->key, k);
    p->value = view_of(&t->value, k);
    p->output = view_of(&t->output, q);
    if (packed_q || packed_k)
        p->features |= DLATTN_FEATURE_VARLEN;
    if (p->heads_kv > 1 && p->key.stride[1] == 0 && p->value.stride[1] == 0)
        p->heads_kv = 1;
    if (p->heads_kv != p->heads_q)
        p->features |= DLATTN_FEATURE_GQA;
    if (p->dim_qk != p->dim_v)
        p->features |= DLATTN_FEATURE_HEAD_DIM_V;
    return DLATTN_OK;
}

static int32_t read_lse(struct problem *p, const struct tensors *t) {
    const struct tensor *lse = &t->lse;
    if (!lse->dl)
        return DLATTN_OK;
    TRY(expect_float(lse, p->dtype, &p->lse_dtype));
    if (t->cu_seqlens_q.dl) {
        TRY(expect(lse, 0, p->heads_q, "heads", "query"));
        TRY(expect(lse, 1, p->total_q, "total_q", "query"));
        p->lse = view_of(lse, (const int[4]){-1, 0, 1, -1});
    } else {
        TRY(expect(lse, 0, p->batch, "batch", "query"));
        TRY(expect(lse, 1, p->heads_q, "heads", "query"));
        TRY(expect(lse, 2, p->len_q, "length", "query"));
        p->lse = view_of(lse, (const int[4]){0, 1, 2, -1});
    }
    p->features |= DLATTN_FEATURE_LSE;
    return check_writable(lse);
}

/* [B|1, H|1, Lq|1, Lk|1] */
static int32_t read_broadcast(const struct problem *p, const struct tensor *t, struct view *view) {
    const int64_t want[4] = {p->batch, p->heads_q, p->len_q, p->len_k};
    static const char *const what[4] = {"batch", "heads", "query length", "key length"};
    for (int axis = 0; axis < 4; axis++) {
        if (t->dl->shape[axis] != 1)
            TRY(expect(t, axis, want[axis], what[axis], "the problem"));
    }
    *view = view_of(t, dense_axes);
    return DLATTN_OK;
}

static int32_t read_masks(struct problem *p, const struct tensors *t) {
    if (t->bias.dl) {
        TRY(expect_float(&t->bias, p->dtype, &p->bias_dtype));
        TRY(read_broadcast(p, &t->bias, &p->bias));
        p->features |= DLATTN_FEATURE_BIAS;
    }
    if (t->mask.dl) {
        TRY(expect_bool(&t->mask));
        TRY(read_broadcast(p, &t->mask, &p->mask));
        p->features |= DLATTN_FEATURE_MASK;
    }
    if (t->alibi_slopes.dl) {
        const struct tensor *slopes = &t->alibi_slopes;
        const bool per_batch = slopes->dl->ndim == 2;
        TRY(expect_f32(slopes));
        if (per_batch)
            TRY(expect(slopes, 0, p->batch, "batch", "the problem"));
        TRY(expect(slopes, per_batch, p->heads_q, "heads", "query"));
        p->alibi_slopes = view_of(slopes, per_batch ? (const int[4]){0, 1, -1, -1}
                                                    : (const int[4]){-1, 0, -1, -1});
        p->features |= DLATTN_FEATURE_ALIBI;
    }
    if (t->sinks.dl) {
        TRY(expect_f32(&t->sinks));
        TRY(expect(&t->sinks, 0, p->heads_q, "heads", "query"));
        p->sinks = view_of(&t->sinks, (const int[4]){-1, 0, -1, -1});
        p->features |= DLATTN_FEATURE_SINKS;
    }
    return DLATTN_OK;
}

static int32_t read_integers(struct problem *p, const struct tensors *t) {
    const struct {
        const struct tensor *tensor;
        struct view *view;
        int64_t want;
        uint64_t feature;
    } slots[] = {
        {&t->query_lengths, &p->query_lengths, p->batch, DLATTN_FEATURE_LENGTHS},
        {&t->key_lengths, &p->key_lengths, p->batch, DLATTN_FEATURE_LENGTHS},
        {&t->cu_seqlens_q, &p->cu_seqlens_q, p->batch + 1, DLATTN_FEATURE_VARLEN},
        {&t->cu_seqlens_k, &p->cu_seqlens_k, p->batch + 1, DLATTN_FEATURE_VARLEN},
        {&t->block_table, &p->block_table, p->batch, DLATTN_FEATURE_PAGED},
    };
    for (size_t i = 0; i < sizeof slots / sizeof slots[0]; i++) {
        if (!slots[i].tensor->dl)
            continue;
        TRY(expect_int32(slots[i].tensor));
        TRY(expect(slots[i].tensor, 0, slots[i].want, "batch", "the problem"));
        *slots[i].view = view_of(
            slots[i].tensor, (const int[4]){0, slots[i].tensor->dl->ndim == 2 ? 1 : -1, -1, -1});
        p->features |= slots[i].feature;
    }
    return DLATTN_OK;
}

static bool unaligned(const struct tensor *t, int inner) {
    const int64_t step = 16 / t->bytes;
    if (t->dl->data && ((uintptr_t)t->dl->data + t->dl->byte_offset) % 16)
        return true;
    for (int axis = 0; axis < t->dl->ndim; axis++) {
        if (axis != inner && t->stride[axis] % step)
            return true;
    }
    return false;
}

static void read_layout(struct problem *p, const struct tensors *t) {
    const struct tensor *const all[] = {&t->query, &t->key, &t->value, &t->output};
    p->contiguous = !t->lse.dl || compact(&t->lse);
    for (int i = 0; i < 4; i++) {
        const int inner = all[i]->dl->ndim - 1;
        p->contiguous &= compact(all[i]);
        if (all[i]->dl->shape[inner] > 1 && all[i]->stride[inner] != 1)
            p->features |= DLATTN_FEATURE_INNER_STRIDE;
        if (unaligned(all[i], inner))
            p->features |= DLATTN_FEATURE_UNALIGNED;
    }
    if (!p->contiguous)
        p->features |= DLATTN_FEATURE_STRIDED;
}

int32_t problem_build(struct problem *p, const dlattn_forward_desc *desc,
                      const dlattn_tensors *tensors, bool with_data) {
    struct tensors t;
    memset(&t, 0, sizeof t);
    memset(p, 0, sizeof *p);
    p->lse_dtype = p->bias_dtype = DTYPE_F32;
    p->planning = !with_data;
    TRY(read_desc(p, desc));
    TRY(open_all(p, &t, tensors, with_data));
    TRY(read_main(p, &t, desc));
    TRY(read_lse(p, &t));
    TRY(read_masks(p, &t));
    TRY(read_integers(p, &t));
    read_layout(p, &t);
    if (with_data)
        TRY(check_addresses(p, &t));
    if (p->scale == 0 && !(desc->flags & DLATTN_EXACT_SCALE))
        p->scale = 1 / sqrt((double)p->dim_qk);
    return DLATTN_OK;
}

/* ---- Values of integer tensors, in host memory ----------------------------------------------- */

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

/* The pages of keys that some row sees; the others may be anything. */
static int32_t check_block_table(const struct problem *p) {
    for (int64_t b = 0; p->block_table.data && b < p->batch; b++) {
        const struct sequence s = problem_sequence(p, b);
        int64_t first, end, unused;
        visible_keys(p, &s, 0, &first, &unused);
        visible_keys(p, &s, s.q_len - 1, &unused, &end);
        for (int64_t n = first / p->page_size; s.q_len > 0 && n * p->page_size < end; n++) {
            const int64_t page = int_at(&p->block_table, b, n);
            if (page < 0 || page >= p->pages)
                return fail(DLATTN_INVALID_ARGUMENT,
                            "block_table: entry [%lld, %lld] is %lld, there are %lld pages",
                            (long long)b, (long long)n, (long long)page, (long long)p->pages);
        }
    }
    return DLATTN_OK;
}

int32_t problem_check_values(const struct problem *p) {
    if (p->backend != BACKEND_CPU)
        return DLATTN_OK;
    TRY(check_cu_seqlens("cu_seqlens_q", &p->cu_seqlens_q, p->batch, p->total_q, p->len_q));
    TRY(check_cu_seqlens("cu_seqlens_k", &p->cu_seqlens_k, p->batch, p->total_k, p->len_k));
    TRY(check_lengths("query_lengths", &p->query_lengths, p->batch, p->len_q));
    TRY(check_lengths("key_lengths", &p->key_lengths, p->batch, p->len_k));
    return check_block_table(p);
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
    struct sequence s = {.q_rows = p->len_q, .k_len = p->len_k};
    if (p->cu_seqlens_q.data)
        s.q_rows = read_span(&p->cu_seqlens_q, b, p->total_q, p->len_q, &s.q_start);
    if (p->cu_seqlens_k.data)
        s.k_len = read_span(&p->cu_seqlens_k, b, p->total_k, p->len_k, &s.k_start);
    s.q_len = p->query_lengths.data ? clamped(int_at(&p->query_lengths, b, 0), s.q_rows) : s.q_rows;
    s.k_len = p->key_lengths.data ? clamped(int_at(&p->key_lengths, b, 0), s.k_len) : s.k_len;
    s.diagonal = p->bottom_right ? s.k_len - s.q_len : 0;
    return s;
}

int64_t problem_page(const struct problem *p, int64_t b, int64_t j) {
    return clamped(int_at(&p->block_table, b, j / p->page_size), p->pages - 1);
}

/* ---- Plans ----------------------------------------------------------------------------------- */

#define FIELD(name) {#name, offsetof(struct problem, name), sizeof(((struct problem *)0)->name)}
#define STRIDES(name)                                                                              \
    {#name " strides", offsetof(struct problem, name.stride), sizeof(((struct view *)0)->stride)}

/* The first tensor that only one of the two has. */
static int32_t check_same_tensors(const struct problem *planned, const struct problem *p) {
    const uint32_t differ = planned->present ^ p->present;
    if (differ == 0)
        return DLATTN_OK;
    const int first = __builtin_ctz(differ);
    return fail(DLATTN_INVALID_ARGUMENT, "plan: was made %s %s, which is %s now",
                planned->present >> first & 1 ? "with" : "without", slot_names[first],
                p->present >> first & 1 ? "given" : "absent");
}

int32_t problem_check_same(const struct problem *planned, const struct problem *p) {
    static const struct {
        const char *name;
        size_t offset, size;
    } fields[] = {
        FIELD(backend),        FIELD(device_id),      FIELD(dtype),          FIELD(batch),
        FIELD(heads_q),        FIELD(heads_kv),       FIELD(len_q),          FIELD(len_k),
        FIELD(dim_qk),         FIELD(dim_v),          FIELD(total_q),        FIELD(total_k),
        FIELD(page_size),      FIELD(pages),          FIELD(max_pages),      FIELD(lse_dtype),
        FIELD(bias_dtype),     STRIDES(query),        STRIDES(key),          STRIDES(value),
        STRIDES(output),       STRIDES(lse),          STRIDES(bias),         STRIDES(mask),
        STRIDES(alibi_slopes), STRIDES(sinks),        STRIDES(block_table),  STRIDES(query_lengths),
        STRIDES(key_lengths),  STRIDES(cu_seqlens_q), STRIDES(cu_seqlens_k),
    };
    TRY(check_same_tensors(planned, p));
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (memcmp((const char *)planned + fields[i].offset, (const char *)p + fields[i].offset,
                   fields[i].size) != 0)
            return fail(DLATTN_INVALID_ARGUMENT, "plan: was made for another problem, %s differs",
                        fields[i].name);
    }
    return DLATTN_OK;
}
