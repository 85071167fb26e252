#include "src/tensor.h"
#include "src/kernel.h"

#include <stddef.h>
#include <string.h>

/* ---- Opening --------------------------------------------------------------------------------- */

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

int32_t tensor_open(struct tensor *t, const char *name, const DLTensor *dl, int32_t axes,
                    bool with_data) {
    *t = (struct tensor){.name = name, .dl = dl, .dtype = dl->dtype};
    if (dl->ndim != axes)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: has %d axes, must have %d", name, dl->ndim, axes);
    if (!dl->shape)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: shape is NULL with %d axes", name, axes);
    if (dl->dtype.lanes != 1)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: dtype has %d lanes, must have 1", name,
                    dl->dtype.lanes);
    t->bytes = (dl->dtype.bits + 7) / 8;
    TRY(check_strides(t));
    if (with_data && !t->empty && !dl->data)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: data is NULL but the tensor has elements", name);
    return DLATTN_OK;
}

bool tensor_is_compact(const struct tensor *t) {
    int64_t want = 1;
    for (int axis = t->dl->ndim - 1; axis >= 0; axis--) {
        const int64_t n = t->dl->shape[axis];
        if (n > 1 && t->stride[axis] != want)
            return false;
        want *= n;
    }
    return true;
}

bool tensor_is_aligned(const struct tensor *t) {
    if (t->dl->data && ((uintptr_t)t->dl->data + t->dl->byte_offset) % 16)
        return false;
    for (int axis = 0; axis < t->dl->ndim - 1; axis++) {
        if (t->stride[axis] * t->bytes % 16)
            return false;
    }
    return true;
}

/* ---- Devices --------------------------------------------------------------------------------- */

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

bool tensor_is_on_gpu(const struct tensor *t) {
    return t->dl->device.device_type == kDLCUDA || t->dl->device.device_type == kDLCUDAManaged;
}

/* Managed memory has no device of its own: a tensor that has one decides for all. */
void tensor_device(struct problem *p, const struct tensor *tensors, int count) {
    p->backend = tensor_is_on_gpu(&tensors[0]) ? BACKEND_CUDA : BACKEND_CPU;
    p->device_id = p->backend == BACKEND_CUDA ? tensors[0].dl->device.device_id : 0;
    for (int i = 0; p->backend == BACKEND_CUDA && i < count; i++) {
        if (tensors[i].dl && tensors[i].dl->device.device_type == kDLCUDA) {
            p->device_id = tensors[i].dl->device.device_id;
            return;
        }
    }
}

int32_t tensor_check_device(const struct problem *p, const struct tensor *t,
                            const struct tensor *first) {
    const DLDevice device = t->dl->device, of_first = first->dl->device;
    if (!tensor_is_on_gpu(t) && device.device_type != kDLCPU && device.device_type != kDLCUDAHost)
        return fail(DLATTN_UNSUPPORTED,
                    "%s: is on device type %d, this library knows cpu (1), cuda (2), cuda_host (3) "
                    "and cuda_managed (13)",
                    t->name, (int)device.device_type);
    if (tensor_is_on_gpu(t) != tensor_is_on_gpu(first))
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is on %s %d, %s is on %s %d", t->name,
                    device_name(device.device_type), device.device_id, first->name,
                    device_name(of_first.device_type), of_first.device_id);
    if (device.device_type == kDLCUDA && device.device_id != p->device_id)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is on cuda %d, others are on cuda %d", t->name,
                    device.device_id, p->device_id);
    return DLATTN_OK;
}

/* ---- Shapes ---------------------------------------------------------------------------------- */

/* What an axis is called, and where it stands in a view of a tensor that has fewer than four. */
static const struct {
    const char *name;
    int place;
} axes_of[LETTERS] = {
    ['B'] = {"batch", 0},     ['H'] = {"heads", 1},      ['G'] = {"heads", 1},
    ['Q'] = {"length", 2},    ['K'] = {"length", 2},     ['D'] = {"head_dim", 3},
    ['V'] = {"head_dim", 3},  ['T'] = {"total_q", 2},    ['U'] = {"total_k", 2},
    ['P'] = {"pages", 0},     ['S'] = {"page_size", 2},  ['N'] = {"pages", 1},
    ['C'] = {"batch + 1", 0}, ['M'] = {"row blocks", 2}, ['W'] = {"key blocks", 3},
    ['1'] = {"numbers", 3},
};

void extents_start(struct extents *e) {
    memset(e->of, 0xff, sizeof e->of);
    extents_set(e, '1', 1, "its shape");
}

void extents_set(struct extents *e, char letter, int64_t extent, const char *from) {
    e->of[(int)letter] = extent;
    e->from[(int)letter] = from;
}

static int32_t read_extent(const struct tensor *t, int axis, char letter, struct extents *e) {
    const bool may_be_one = letter >= 'a' && letter <= 'z';
    const char known = may_be_one ? (char)(letter - 'a' + 'A') : letter;
    const int64_t extent = t->dl->shape[axis], want = e->of[(int)known];
    if (extent == want || (may_be_one && extent == 1))
        return DLATTN_OK;
    if (want < 0) {
        extents_set(e, known, extent, t->name);
        return DLATTN_OK;
    }
    return fail(DLATTN_INVALID_ARGUMENT, "%s: axis %d (%s) is %lld, must be %lld as in %s%s",
                t->name, axis, axes_of[(int)known].name, (long long)extent, (long long)want,
                e->from[(int)known], may_be_one ? ", or 1" : "");
}

int32_t tensor_read(const struct tensor *t, const char *axes, struct extents *e, struct view *v) {
    const int count = t->dl->ndim;
    v->data = t->dl->data ? (char *)t->dl->data + t->dl->byte_offset : NULL;
    for (int axis = 0; axis < count; axis++) {
        const char letter = axes[axis], known = letter >= 'a' ? (char)(letter - 'a' + 'A') : letter;
        TRY(read_extent(t, axis, letter, e));
        v->stride[count == 4 ? axis : axes_of[(int)known].place] = t->stride[axis];
    }
    return DLATTN_OK;
}

/* ---- Dtypes ---------------------------------------------------------------------------------- */

int32_t tensor_refuse_dtype(int32_t status, const struct tensor *t, const char *want) {
    char text[DTYPE_TEXT];
    return fail(status, "%s: dtype is %s, must be %s", t->name, dtype_text(t->dtype, text), want);
}

int32_t tensor_read_dtype(const struct tensor *t, uint32_t dtypes, const char *want,
                          enum dtype *dtype) {
    if (dtype_of(t->dtype, dtype) && dtypes & DTYPE_BIT(*dtype))
        return DLATTN_OK;
    return tensor_refuse_dtype(DLATTN_INVALID_ARGUMENT, t, want);
}

int32_t tensor_expect_int32(const struct tensor *t) {
    return t->dtype.code == kDLInt && t->dtype.bits == 32
               ? DLATTN_OK
               : tensor_refuse_dtype(DLATTN_INVALID_ARGUMENT, t, "int32");
}

int32_t tensor_expect_bool(const struct tensor *t) {
    return (t->dtype.code == kDLBool || t->dtype.code == kDLUInt) && t->dtype.bits == 8
               ? DLATTN_OK
               : tensor_refuse_dtype(DLATTN_INVALID_ARGUMENT, t, "bool or uint8");
}

int32_t tensor_override_dtype(struct tensor *t, DLDataType holds) {
    enum dtype dtype;
    char own[DTYPE_TEXT], said[DTYPE_TEXT];
    if (holds.bits == 0 && holds.code == 0 && holds.lanes == 0)
        return DLATTN_OK;
    if (t->dtype.code != kDLUInt || t->dtype.bits != 8 || holds.lanes != 1 ||
        !dtype_of(holds, &dtype) || !dtype_is_float8(dtype))
        return fail(DLATTN_INVALID_ARGUMENT,
                    "%s: dtype is %s, said to hold %s; a uint8 tensor may hold float8_e4m3fn or "
                    "float8_e5m2",
                    t->name, dtype_text(t->dtype, own), dtype_text(holds, said));
    t->dtype = holds;
    return DLATTN_OK;
}

/* ---- Memory ---------------------------------------------------------------------------------- */

static int64_t size_of(int64_t stride) { return stride < 0 ? -stride : stride; }

/* No two elements of an output may share memory: with axes in order of stride, each step must clear
 * all of the smaller axes together. */
int32_t tensor_check_writable(const struct tensor *t) {
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

/* A GPU faults on an element that is not aligned to its own size, and the fault ends the whole context. */
int32_t tensor_check_alignment(const struct tensor *t) {
    const uintptr_t address = (uintptr_t)t->dl->data + t->dl->byte_offset;
    if (t->empty || address % (uintptr_t)t->bytes == 0)
        return DLATTN_OK;
    return fail(DLATTN_INVALID_ARGUMENT,
                "%s: its first element is at %p, which is not a multiple of an element's %lld "
                "bytes; a GPU cannot read that",
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

/* Whether some choice of steps adds up to `distance`. Strides that nest, as those of all usual layouts do, leave one or
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

/* Whether two tensors have a byte in common: they may interleave in one buffer. Element i of `a` and j of `b` begin at
 * the same byte if the offset of i, and the way of j to the end of b, add up to the distance between a's begin and b's end. */
bool tensor_overlap(const struct tensor *a, const struct tensor *b) {
    enum { MOST_TRIES = 1000 };
    const struct reach x = reach_of(a), y = reach_of(b);
    struct step steps[10];
    int tries = MOST_TRIES;
    if (a->empty || b->empty || x.first >= y.end || y.first >= x.end)
        return false;
    return reachable(steps, add_steps(steps, add_steps(steps, 0, a), b), y.end - 1 - x.first,
                     &tries);
}
