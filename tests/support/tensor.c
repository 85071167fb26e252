#include "tests/support/tensor.h"

#include "src/element.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    DLDataType dtype;
    double epsilon;
} elements[] = {
    [F64] = {"f64", {kDLFloat, 64, 1}, 0x1p-53},
    [F32] = {"f32", {kDLFloat, 32, 1}, 0x1p-24},
    [F16] = {"f16", {kDLFloat, 16, 1}, 0x1p-11},
    [BF16] = {"bf16", {kDLBfloat, 16, 1}, 0x1p-8},
    [I32] = {"i32", {kDLInt, 32, 1}, 0},
    [U8] = {"u8", {kDLUInt, 8, 1}, 0},
    [E4M3] = {"e4m3", {kDLFloat8_e4m3fn, 8, 1}, 0x1p-4},
    [E5M2] = {"e5m2", {kDLFloat8_e5m2, 8, 1}, 0x1p-3},
};

size_t element_bytes(enum element e) { return elements[e].dtype.bits / 8; }

const char *element_name(enum element e) { return elements[e].name; }

double element_epsilon(enum element e) { return elements[e].epsilon; }

const char *layout_name(enum layout layout) {
    static const char *const names[LAYOUTS] = {
        "compact", "compact_null", "heads_inner", "sliced", "odd",
        "shifted", "inner_2",      "inner_last",  "mixed",
    };
    return names[layout];
}

bool element_is_listed(const char *dtypes, enum element e) {
    char padded[128], wanted[16];
    snprintf(padded, sizeof padded, " %s ", dtypes);
    snprintf(wanted, sizeof wanted, " %s ", element_name(e));
    return strstr(padded, wanted) != NULL;
}

/* ---- Elements --------------------------------------------------------------------------------------------- */

static uint16_t to_bf16(double x) {
    const float single = (float)x;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    if (isnan(x))
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float single;
    memcpy(&single, &bits, sizeof single);
    return single;
}

static void store(enum element e, unsigned char *at, double x) {
    const float single = (float)x;
    _Float16 half;
    uint16_t brain;
    int32_t integer;
    switch (e) {
    case F64:
        memcpy(at, &x, sizeof x);
        break;
    case F32:
        memcpy(at, &single, sizeof single);
        break;
    case F16:
        half = (_Float16)x;
        memcpy(at, &half, sizeof half);
        break;
    case BF16:
        brain = to_bf16(x);
        memcpy(at, &brain, sizeof brain);
        break;
    case I32:
        integer = (int32_t)x;
        memcpy(at, &integer, sizeof integer);
        break;
    case E4M3:
        *at = double_to_e4m3(x);
        break;
    case E5M2:
        *at = double_to_e5m2(x);
        break;
    default:
        *at = (unsigned char)x;
    }
}

static double load(enum element e, const unsigned char *at) {
    double wide;
    float single;
    _Float16 half;
    uint16_t brain;
    int32_t integer;
    switch (e) {
    case F64:
        memcpy(&wide, at, sizeof wide);
        return wide;
    case F32:
        memcpy(&single, at, sizeof single);
        return single;
    case F16:
        memcpy(&half, at, sizeof half);
        return (double)half;
    case BF16:
        memcpy(&brain, at, sizeof brain);
        return from_bf16(brain);
    case I32:
        memcpy(&integer, at, sizeof integer);
        return integer;
    case E4M3:
        return (double)e4m3_to_float(*at);
    case E5M2:
        return (double)e5m2_to_float(*at);
    default:
        return *at;
    }
}

double element_round(enum element e, double x) {
    unsigned char bytes[8];
    store(e, bytes, x);
    return load(e, bytes);
}

/* ---- Storage ---------------------------------------------------------------------------------------------- */

/* Axes from the innermost in memory to the outermost, and the elements left free after each. */
struct arrangement {
    int axis[4];
    int64_t gap[4];
    int64_t inner; /* distance of neighbours on the innermost axis in memory */
};

static struct arrangement arrange(int ndim, enum layout layout) {
    struct arrangement a = {.inner = layout == INNER_2 ? 2 : 1};
    for (int i = 0; i < ndim; i++)
        a.axis[i] = ndim - 1 - i;
    if (ndim < 3) { /* lengths, slopes, tables: other layouts only spread them */
        if (layout >= SLICED)
            a.inner = 2;
        return a;
    }
    const int row = ndim - 2,
              outer = ndim - 3; /* of [.., H, L, D]; packed [L, H, D] swaps the names */
    if (layout == HEADS_INNER) {
        a.axis[1] = outer;
        a.axis[2] = row;
    } else if (layout == SLICED) {
        a.gap[0] = 16;
        a.gap[1] = 32;
        a.gap[2] = 64;
    } else if (layout == ODD) {
        a.gap[0] = 3;
        a.gap[1] = 5;
        a.gap[2] = 7;
    } else if (layout == INNER_LAST) {
        a.axis[0] = row;
        a.axis[1] = ndim - 1;
    }
    return a;
}

static void set_strides(struct tensor *t, enum layout layout, unsigned broadcast) {
    const int ndim = t->dl.ndim;
    const struct arrangement a = arrange(ndim, layout);
    int64_t stride = a.inner, reach = 0;
    for (int i = 0; i < ndim; i++) {
        const int axis = a.axis[i];
        if (broadcast >> axis & 1)
            continue;
        /* A multiple of 16 elements keeps sliced rows aligned whatever D is. */
        if (layout == SLICED && i > 0)
            stride = (stride + 15) / 16 * 16;
        t->stride[axis] = stride;
        if (t->shape[axis] > 1)
            reach += (t->shape[axis] - 1) * stride;
        stride = stride * (t->shape[axis] > 1 ? t->shape[axis] : 1) + a.gap[i];
        if (t->shape[axis] == 1 && layout != COMPACT)
            t->stride[axis] = -77; /* DLPack: means nothing on an axis of extent 1 */
    }
    t->bytes = tensor_count(t) == 0 ? 0 : (size_t)(reach + 1) * element_bytes(t->element);
}

void tensor_make(struct tensor *t, enum element e, int ndim, const int64_t *shape,
                 enum layout layout, unsigned broadcast, unsigned char fill) {
    *t = (struct tensor){.element = e, .dl = {.ndim = ndim, .dtype = elements[e].dtype}};
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
    t->dl.ndim = ndim;
    set_strides(t, layout, broadcast);
    t->dl.shape = t->shape;
    t->dl.strides = layout == COMPACT_NULL && !broadcast ? NULL : t->stride;
    t->alignment = layout == ODD || layout == SHIFTED ? element_bytes(e) : 16;
    if (layout == SHIFTED)
        t->first = element_bytes(e);
    t->bytes += t->first;
    t->image = malloc(t->bytes + 1);
    assert(t->image);
    tensor_fill(t, fill);
}

void tensor_fill(struct tensor *t, unsigned char fill) { memset(t->image, fill, t->bytes); }

void tensor_copy(struct tensor *t, const struct tensor *from) {
    *t = *from;
    t->dl.shape = t->shape;
    t->dl.strides = from->dl.strides ? t->stride : NULL;
    t->image = malloc(t->bytes + 1);
    assert(t->image);
    memcpy(t->image, from->image, t->bytes);
}

void tensor_free(struct tensor *t) {
    free(t->image);
    t->image = NULL;
}

int64_t tensor_count(const struct tensor *t) {
    int64_t n = 1;
    for (int axis = 0; axis < t->dl.ndim; axis++)
        n *= t->shape[axis];
    return n;
}

void tensor_next(const struct tensor *t, int64_t index[4]) {
    for (int axis = t->dl.ndim - 1; axis >= 0; axis--) {
        if (++index[axis] < t->shape[axis])
            return;
        index[axis] = 0;
    }
}

void tensor_index(const struct tensor *t, int64_t n, int64_t index[4]) {
    for (int axis = t->dl.ndim - 1; axis >= 0; axis--) {
        index[axis] = n % t->shape[axis];
        n /= t->shape[axis];
    }
}

static size_t byte_of(const struct tensor *t, const int64_t index[4]) {
    int64_t offset = 0;
    for (int axis = 0; axis < t->dl.ndim; axis++)
        offset += t->shape[axis] > 1 ? index[axis] * t->stride[axis] : 0;
    return t->first + (size_t)offset * element_bytes(t->element);
}

double tensor_get(const struct tensor *t, const int64_t index[4]) {
    return load(t->element, t->image + byte_of(t, index));
}

void tensor_set(struct tensor *t, const int64_t index[4], double value) {
    store(t->element, t->image + byte_of(t, index), value);
}

/* Bytes from an element to the next of its row. */
static int64_t step_of(const struct tensor *t) {
    return t->stride[t->dl.ndim - 1] * (int64_t)element_bytes(t->element);
}

void tensor_convert(struct tensor *t, const struct tensor *from) {
    const int last = t->dl.ndim - 1;
    int64_t index[4] = {0};
    for (int64_t n = tensor_count(t), row = t->shape[last]; n > 0; n -= row) {
        unsigned char *const to = t->image + byte_of(t, index);
        const unsigned char *const at = from->image + byte_of(from, index);
        for (int64_t d = 0; d < row; d++)
            store(t->element, to + d * step_of(t), load(from->element, at + d * step_of(from)));
        index[last] = row - 1;
        tensor_next(t, index);
    }
}

double *tensor_values(const struct tensor *t) {
    struct tensor wide;
    tensor_make(&wide, F64, t->dl.ndim, t->shape, COMPACT, 0, 0);
    tensor_convert(&wide, t);
    return (double *)(void *)wide.image;
}

bool tensor_gaps_hold(const struct tensor *t, unsigned char fill, size_t *at) {
    unsigned char *element = calloc(t->bytes + 1, 1);
    assert(element);
    int64_t index[4] = {0};
    const int last = t->dl.ndim - 1;
    const bool dense = step_of(t) == (int64_t)element_bytes(t->element);
    const int64_t run = dense ? t->shape[last] : 1; /* elements side by side */
    for (int64_t n = tensor_count(t); n > 0; n -= run) {
        memset(element + byte_of(t, index), 1, (size_t)run * element_bytes(t->element));
        index[last] += run - 1;
        tensor_next(t, index);
    }
    bool hold = true;
    for (*at = 0; *at < t->bytes && hold; *at += hold)
        hold = element[*at] || t->image[*at] == fill;
    free(element);
    return hold;
}
