#include "src/slots.h"
#include "src/kernel.h"

#include <stddef.h>
#include <string.h>

enum { OPTIONAL, REQUIRED };
enum { READ, WRITTEN };

#define SLOT(index, name, view, kind, need, use, feature, axes, packed, paged, other)              \
    [index] = {name,                                                                               \
               kind,                                                                               \
               need == REQUIRED,                                                                   \
               use == WRITTEN,                                                                     \
               feature,                                                                            \
               axes,                                                                               \
               packed,                                                                             \
               paged,                                                                              \
               other,                                                                              \
               -1,                                                                                 \
               offsetof(struct problem, view)},
#define TENSOR(name, ...) SLOT(SLOT_##name, #name, name, __VA_ARGS__)
#define GRADIENT(slot, of_, need, use)                                                             \
    [SLOT_##slot] = {.name = #slot,                                                                \
                     .required = need == REQUIRED,                                                 \
                     .written = use == WRITTEN,                                                    \
                     .of = SLOT_##of_,                                                             \
                     .view = offsetof(struct problem, slot)},
const struct slot attention_slots[ATTENTION_SLOTS] = {
#include "src/slots.inc"
};
#undef TENSOR
#undef GRADIENT

#define APPENDED(name, view, ...) SLOT(APPEND_##name, #name, view, __VA_ARGS__)
const struct slot append_slots[APPEND_SLOTS] = {
#include "src/slots.inc"
};
#undef APPENDED
#undef SLOT

#define POINTERS(bytes) (((bytes) - sizeof(size_t)) / sizeof(const DLTensor *))
_Static_assert(POINTERS(sizeof(dlattn_tensors)) == TENSOR_SLOTS, "a line for each slot");
_Static_assert(POINTERS(sizeof(dlattn_gradients)) == GRADIENT_SLOTS, "a line for each slot");
_Static_assert(POINTERS(offsetof(dlattn_append_tensors, key_cache_dtype)) == APPEND_SLOTS,
               "a line for each slot");

/* ---- Opening --------------------------------------------------------------------------------- */

static bool is_form(const char *axes, int32_t count) {
    return axes && strlen(axes) == (size_t)count;
}

static const char *axes_of(const struct slot *slot, struct forms f, int32_t count) {
    const bool packed = slot->packed && (slot->packed[0] == 'U' ? f.packed_k : f.packed_q);
    if (f.paged && is_form(slot->paged, count))
        return slot->paged;
    if (packed)
        return slot->packed;
    return is_form(slot->other, count) ? slot->other : slot->axes;
}

int32_t slots_open(struct problem *p, const struct slot *slots, int count,
                   const DLTensor *const *given, struct forms forms, struct tensor *t,
                   bool with_data) {
    for (int i = 0; i < count; i++) {
        const struct slot *slot = &slots[i];
        t[i].dl = NULL;
        if (!given[i] && slot->required)
            return fail(DLATTN_INVALID_ARGUMENT, "%s: is absent", slot->name);
        if (!given[i])
            continue;
        const struct slot *shape = slot->of < 0 ? slot : &slots[slot->of];
        const char *axes = axes_of(shape, forms, given[i]->ndim);
        TRY(tensor_open(&t[i], slot->name, given[i], (int32_t)strlen(axes), with_data));
        p->present |= UINT64_C(1) << i;
        p->features |= slot->feature;
    }
    return DLATTN_OK;
}

int32_t slots_check_devices(struct problem *p, const struct tensor *t, int count) {
    tensor_device(p, t, count);
    EACH_SLOT(i, p->present)
    TRY(tensor_check_device(p, &t[i], &t[0]));
    return DLATTN_OK;
}

/* ---- Reading --------------------------------------------------------------------------------- */

#define EVERY_DTYPE ((1u << DTYPE_COUNT) - 1)

static int32_t read_float(const struct problem *p, const struct tensor *t, enum dtype *dtype) {
    const uint32_t may = DTYPE_BIT(DTYPE_F32) | DTYPE_BIT(p->output.dtype);
    char text[DTYPE_TEXT];
    if (dtype_of(t->dtype, dtype) && may & DTYPE_BIT(*dtype))
        return DLATTN_OK;
    return fail(DLATTN_INVALID_ARGUMENT, "%s: dtype is %s, must be float32 or the query's %s",
                t->name, dtype_text(t->dtype, text), dtype_full_name(p->output.dtype));
}

static int32_t read_dtype(const struct problem *p, enum kind kind, const struct tensor *t,
                          enum dtype *dtype) {
    switch (kind) {
    case ELEMENT:
        if (dtype_of(t->dtype, dtype))
            return DLATTN_OK;
        return tensor_refuse_dtype(DLATTN_UNSUPPORTED, t,
                                   "float16, bfloat16, float32, float64 or float8");
    case WIDE:
        if (dtype_of(t->dtype, dtype) && WIDE_DTYPES & DTYPE_BIT(*dtype))
            return DLATTN_OK;
        return tensor_refuse_dtype(DLATTN_UNSUPPORTED, t, "float16, bfloat16, float32 or float64");
    case FLOAT:
        return read_float(p, t, dtype);
    case FLOAT32:
        return tensor_read_dtype(t, DTYPE_BIT(DTYPE_F32), "float32", dtype);
    case INT32:
        return tensor_expect_int32(t);
    case BOOL:
        return tensor_expect_bool(t);
    }
    return DLATTN_INTERNAL;
}

int32_t slot_read(struct problem *p, const struct slot *slot, const struct tensor *t,
                  struct forms forms, struct extents *e) {
    struct view *v = slot_view(p, slot);
    if (!t->dl)
        return DLATTN_OK;
    TRY(read_dtype(p, slot->kind, t, &v->dtype));
    return tensor_read(t, axes_of(slot, forms, t->dl->ndim), e, v);
}

/* ---- Memory ---------------------------------------------------------------------------------- */

/* Rows are read again after others have been written. */
static int32_t check_apart(const struct problem *p, const struct tensor *t, uint64_t output) {
    EACH_SLOT(i, p->present) {
        if (i != output && tensor_overlap(&t[output], &t[i]))
            return fail(
                DLATTN_INVALID_ARGUMENT,
                "%s: shares memory with %s; an output may not overlap another tensor of the "
                "call",
                t[output].name, t[i].name);
    }
    return DLATTN_OK;
}

int32_t slots_check_memory(const struct problem *p, const struct tensor *t, uint64_t written,
                           bool with_data) {
    EACH_SLOT(i, p->present) {
        if (written >> i & 1)
            TRY(tensor_check_writable(&t[i]));
        if (with_data && p->backend == BACKEND_CUDA)
            TRY(tensor_check_alignment(&t[i]));
        if (with_data && written >> i & 1)
            TRY(check_apart(p, t, i));
    }
    return DLATTN_OK;
}

/* ---- All tensors of a problem ---------------------------------------------------------------- */

static int slots_of(const struct problem *p, const struct slot **slots) {
    *slots = p->operation == APPEND ? append_slots : attention_slots;
    return p->operation == APPEND     ? APPEND_SLOTS
           : p->operation == BACKWARD ? ATTENTION_SLOTS
                                      : TENSOR_SLOTS;
}

static const struct view *view_of(const struct problem *p, const struct slot *slot) {
    return (const struct view *)(const void *)((const char *)p + slot->view);
}

int32_t problem_visit(const struct problem *p, problem_visitor visit, void *ctx) {
    const struct slot *slots;
    const int count = slots_of(p, &slots);
    for (int i = 0; i < count; i++) {
        const struct view *v = view_of(p, &slots[i]);
        if (v->data)
            TRY(visit(ctx, slots[i].name, v));
    }
    for (int64_t n = 0; p->operation == MERGE && n < p->partials->count; n++) {
        const struct partial part = problem_partial(p, n);
        TRY(visit(ctx, "outputs", &part.output));
        TRY(visit(ctx, "lses", &part.lse));
    }
    return DLATTN_OK;
}

static int32_t check_same_tensor(const struct slot *slot, const struct problem *planned,
                                 const struct problem *p, uint64_t bit) {
    const struct view *a = view_of(planned, slot), *b = view_of(p, slot);
    if ((planned->present ^ p->present) & bit)
        return fail(DLATTN_INVALID_ARGUMENT, "plan: was made %s %s, which is %s now",
                    planned->present & bit ? "with" : "without", slot->name,
                    p->present & bit ? "given" : "absent");
    if (a->dtype != b->dtype)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "plan: was made for another problem, %s is %s now, not %s", slot->name,
                    dtype_full_name(b->dtype), dtype_full_name(a->dtype));
    for (int axis = 0; axis < 4; axis++) {
        static const char *const axes[] = {"the batch", "heads", "rows", "the last axis"};
        if (a->stride[axis] != b->stride[axis])
            return fail(DLATTN_INVALID_ARGUMENT,
                        "plan: was made for another problem, %s's stride along %s is %lld now, not "
                        "%lld",
                        slot->name, axes[axis], (long long)b->stride[axis],
                        (long long)a->stride[axis]);
    }
    return DLATTN_OK;
}

static int32_t check_same_device(const struct problem *planned, const struct problem *p) {
    if (planned->backend != p->backend)
        return fail(DLATTN_INVALID_ARGUMENT, "plan: was made for tensors %s, and these are %s",
                    planned->backend == BACKEND_CPU ? "on the CPU" : "on a GPU",
                    p->backend == BACKEND_CPU ? "on the CPU" : "on a GPU");
    if (planned->device_id != p->device_id)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "plan: was made for device %d, and these tensors are on %d", planned->device_id,
                    p->device_id);
    return DLATTN_OK;
}

#define FIELD(name) {#name, offsetof(struct problem, name)}

int32_t problem_check_same(const struct problem *planned, const struct problem *p) {
    static const struct {
        const char *name;
        size_t offset; /* of an int64_t */
    } fields[] = {
        FIELD(batch),   FIELD(heads_q),   FIELD(heads_kv), FIELD(len_q),
        FIELD(len_k),   FIELD(dim_qk),    FIELD(dim_v),    FIELD(total_q),
        FIELD(total_k), FIELD(page_size), FIELD(pages),    FIELD(max_pages),
    };
    const struct slot *slots;
    slots_of(p, &slots);
    TRY(check_same_device(planned, p));
    EACH_SLOT(i, planned->present | p->present)
    TRY(check_same_tensor(&slots[i], planned, p, UINT64_C(1) << i));
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        int64_t was, is;
        memcpy(&was, (const char *)planned + fields[i].offset, sizeof was);
        memcpy(&is, (const char *)p + fields[i].offset, sizeof is);
        if (was != is)
            return fail(DLATTN_INVALID_ARGUMENT,
                        "plan: was made for another problem, %s is %lld now, not %lld",
                        fields[i].name, (long long)is, (long long)was);
    }
    return DLATTN_OK;
}
