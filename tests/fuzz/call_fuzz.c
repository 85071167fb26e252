/*
 * Arbitrary tensors and options. The input picks a call that is right, then spoils it: byte 0 to 3 choose shape and
 * features, every three bytes after that change one field. Whatever comes, the library must answer with a status, write
 * nothing where it refuses, and touch no byte that the tensors do not have (AddressSanitizer, exact allocations).
 */
#include "abi/dlattn.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SLOTS = 14,
    OUTPUT = 3,
    LSE = 4,
    FIRST_INTEGER = 9,
    BLOCK_TABLE = 13,
    MOST_AXES = 6,
    MOST_BYTES = 1 << 20
};

struct tensor {
    DLTensor dl;
    int64_t shape[MOST_AXES], stride[MOST_AXES];
    bool compact; /* strides follow the shape until a change says otherwise */
    unsigned char *storage, *before;
    size_t bytes;
};

struct input {
    const uint8_t *data;
    size_t left;
};

struct attempt {
    struct tensor tensor[SLOTS];
    bool has[SLOTS];
    dlattn_forward_desc desc;
    dlattn_exec exec;
    bool runnable; /* every tensor has storage */
};

static uint8_t next(struct input *in) {
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->data++;
}

/* Numbers at which things go wrong. */
static int64_t number(uint8_t byte) {
    static const int64_t odd[] = {
        -1, -2, INT32_MAX, INT64_C(1) << 31, INT64_C(1) << 40, INT64_MAX, INT64_MIN, INT64_MAX / 2};
    return byte < 240 ? byte : odd[byte % 8];
}

static double real(uint8_t byte) {
    static const double odd[] = {0, -0.0, 1, -1, 1e300, 1e-300, INFINITY, NAN};
    return byte < 128 ? byte / 16.0 : odd[byte % 8];
}

/* ---- A call that is right --------------------------------------------------------------------------------- */

static void make(struct attempt *a, int slot, DLDataType dtype, int ndim, const int64_t *shape) {
    struct tensor *t = &a->tensor[slot];
    a->has[slot] = true;
    t->dl = (DLTensor){.device = {kDLCPU, 0},
                       .ndim = ndim,
                       .dtype = dtype,
                       .shape = t->shape,
                       .strides = t->stride};
    t->compact = true;
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
}

static void start(struct attempt *a, struct input *in) {
    static const DLDataType types[] = {
        {kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 64, 1}};
    const DLDataType f32 = {kDLFloat, 32, 1}, i32 = {kDLInt, 32, 1}, u8 = {kDLUInt, 8, 1};
    const uint8_t lengths = next(in), dims = next(in), features = next(in), more = next(in);
    const DLDataType e = types[dims >> 6];
    const int64_t b = 2, g = 1 + (lengths >> 7), h = 2 * g, lq = 1 + lengths % 5,
                  lk = 1 + lengths / 5 % 20;
    const int64_t d = 1 + dims % 33, dv = more & 1 ? 1 + dims % 7 : d, page = 4,
                  columns = (lk + page - 1) / page;
    const bool packed = features & 1, paged = !packed && features & 2;
    const int64_t keys = paged ? page * columns : lk;
    if (packed) {
        make(a, 0, e, 3, (int64_t[]){b * lq, h, d});
        make(a, 1, e, 3, (int64_t[]){b * lk, g, d});
        make(a, 2, e, 3, (int64_t[]){b * lk, g, dv});
        make(a, OUTPUT, e, 3, (int64_t[]){b * lq, h, dv});
        make(a, 11, i32, 1, (int64_t[]){b + 1});
        make(a, 12, i32, 1, (int64_t[]){b + 1});
        a->desc.max_seqlen_q = lq;
        a->desc.max_seqlen_k = lk;
    } else {
        make(a, 0, e, 4, (int64_t[]){b, h, lq, d});
        make(a, 1, e, 4, (int64_t[]){paged ? b * columns : b, g, paged ? page : lk, d});
        make(a, 2, e, 4, (int64_t[]){paged ? b * columns : b, g, paged ? page : lk, dv});
        make(a, OUTPUT, e, 4, (int64_t[]){b, h, lq, dv});
    }
    if (features & 4 && packed)
        make(a, LSE, f32, 2, (int64_t[]){h, b * lq});
    else if (features & 4)
        make(a, LSE, f32, 3, (int64_t[]){b, h, lq});
    if (features & 8)
        make(a, 5, f32, 4, (int64_t[]){1, h, lq, keys});
    if (features & 16)
        make(a, 6, u8, 4, (int64_t[]){b, 1, 1, keys});
    if (features & 32)
        make(a, 7, f32, 1, (int64_t[]){h});
    if (features & 64)
        make(a, 8, f32, 1, (int64_t[]){h});
    if (features & 128)
        make(a, 9, i32, 1, (int64_t[]){b});
    if (paged || features & 128)
        make(a, 10, i32, 1, (int64_t[]){b});
    if (paged)
        make(a, BLOCK_TABLE, i32, 2, (int64_t[]){b, columns});
    a->desc.struct_size = sizeof a->desc;
    a->desc.causal = more >> 1 & 1;
    a->desc.alignment = more >> 2 & 1;
    a->desc.flags = more >> 3 & 7;
    a->desc.window_left = a->desc.window_right = more >> 6;
    a->desc.num_threads = 1;
    a->exec.struct_size = sizeof a->exec;
}

/* ---- Spoiling it ------------------------------------------------------------------------------------------ */

static void spoil_tensor(struct attempt *a, int slot, uint8_t field, uint8_t value) {
    struct tensor *t = &a->tensor[slot];
    const int axis = field / 16 % MOST_AXES;
    switch (field % 16) {
    case 0:
    case 1:
    case 2:
        t->shape[axis] = number(value);
        break;
    case 3:
    case 4:
    case 5:
        t->compact = false;
        t->stride[axis] = number(value);
        break;
    case 6:
        t->dl.ndim = value % (MOST_AXES + 1) - (value > 250);
        break;
    case 7:
        t->dl.dtype.code = value;
        break;
    case 8:
        t->dl.dtype.bits = value;
        break;
    case 9:
        t->dl.dtype.lanes = value;
        break;
    case 10:
        memcpy(&t->dl.device.device_type, &(int){value % 20}, sizeof(int));
        break;
    case 11:
        t->dl.strides = NULL;
        break;
    case 12:
        a->has[slot] = false;
        break;
    case 13:
        t->dl.byte_offset = value % 64;
        break;
    case 14:
        t->dl.device.device_id = value - 2;
        break;
    default:
        t->dl.shape = value > 200 ? NULL : t->shape;
    }
}

static void spoil_options(struct attempt *a, uint8_t field, uint8_t value) {
    switch (field % 14) {
    case 0:
        a->desc.flags = (uint64_t)number(value);
        break;
    case 1:
        a->desc.scale = real(value);
        break;
    case 2:
        a->desc.softcap = real(value);
        break;
    case 3:
        a->desc.window_left = number(value);
        break;
    case 4:
        a->desc.window_right = number(value);
        break;
    case 5:
        a->desc.causal = (int32_t)number(value);
        break;
    case 6:
        a->desc.alignment = (int32_t)number(value);
        break;
    case 7:
        a->desc.max_seqlen_q = number(value);
        break;
    case 8:
        a->desc.max_seqlen_k = number(value);
        break;
    case 9:
        a->desc.num_threads = (int32_t)number(value) % 3; /* the workspace stays small */
        break;
    case 10:
        a->desc.struct_size = (size_t)(value % 89);
        break;
    case 11:
        a->exec.struct_size = (size_t)(value % 57);
        break;
    case 12:
        a->exec.flags = (uint64_t)number(value);
        break;
    default:
        a->desc.kernel = value & 1 ? "cpu_fwd_ref" : "no such row";
    }
}

/* ---- Memory ----------------------------------------------------------------------------------------------- */

/* Exactly the bytes that a tensor's elements reach; false if that is more than a test can have. */
static bool reach(struct tensor *t) {
    int64_t last = 0, compact = 1;
    const int64_t bytes = (t->dl.dtype.bits + 7) / 8;
    bool empty = false;
    for (int axis = t->dl.ndim - 1; axis >= 0; axis--) {
        const int64_t extent = t->shape[axis];
        if (t->compact)
            t->stride[axis] = compact;
        const int64_t stride = t->dl.strides ? t->stride[axis] : compact;
        if (extent < 0 || extent > 4096 || stride < 0 || stride > MOST_BYTES ||
            compact > MOST_BYTES)
            return false;
        empty |= extent == 0;
        last += extent > 1 ? (extent - 1) * stride : 0;
        compact *= extent > 0 ? extent : 1;
    }
    t->bytes = empty ? 0 : (size_t)((last + 1) * bytes) + t->dl.byte_offset;
    return t->bytes <= MOST_BYTES;
}

static void give_memory(struct attempt *a, struct input *in) {
    a->runnable = true;
    for (int slot = 0; slot < SLOTS; slot++) {
        struct tensor *t = &a->tensor[slot];
        if (!a->has[slot])
            continue;
        if (t->dl.ndim < 0 || t->dl.ndim > MOST_AXES || !t->dl.shape || !reach(t)) {
            a->runnable = false;
            continue;
        }
        t->storage = malloc(t->bytes ? t->bytes : 1);
        t->before = malloc(t->bytes ? t->bytes : 1);
        t->dl.data = t->bytes ? t->storage : NULL;
        for (size_t i = 0; i < t->bytes; i++)
            t->storage[i] = slot >= FIRST_INTEGER ? 0 : (unsigned char)(i * 37 % 61);
        for (size_t i = 0; slot >= FIRST_INTEGER && i + 4 <= t->bytes && in->left; i += 4) {
            const int32_t value = (int32_t)number(next(in));
            memcpy(t->storage + i, &value, sizeof value);
        }
        memcpy(t->before, t->storage, t->bytes);
    }
}

static void release(struct attempt *a) {
    for (int slot = 0; slot < SLOTS; slot++) {
        free(a->tensor[slot].storage);
        free(a->tensor[slot].before);
    }
}

/* ---- The rules -------------------------------------------------------------------------------------------- */

static void must(bool rule, const char *what) {
    if (rule)
        return;
    fprintf(stderr, "broken rule: %s\n", what);
    abort();
}

static bool untouched(const struct attempt *a, bool outputs_too) {
    for (int slot = 0; slot < SLOTS; slot++) {
        const struct tensor *t = &a->tensor[slot];
        const bool output = slot == OUTPUT || slot == LSE;
        if (t->storage && (outputs_too || !output) && memcmp(t->storage, t->before, t->bytes) != 0)
            return false;
    }
    return true;
}

static dlattn_tensors slots_of(const struct attempt *a) {
    const DLTensor *slots[SLOTS];
    dlattn_tensors tensors = {.struct_size = sizeof tensors};
    for (int slot = 0; slot < SLOTS; slot++)
        slots[slot] = a->has[slot] ? &a->tensor[slot].dl : NULL;
    memcpy((char *)&tensors + offsetof(dlattn_tensors, query), slots, sizeof slots);
    return tensors;
}

static void run(struct attempt *a, const dlattn_api *api, size_t workspace_bytes) {
    const dlattn_tensors tensors = slots_of(a);
    a->exec.workspace = aligned_alloc(64, (workspace_bytes + 127) / 64 * 64);
    a->exec.workspace_bytes = workspace_bytes;
    const int32_t status = api->forward(&a->desc, &tensors, &a->exec);
    must(untouched(a, status != DLATTN_OK),
         "inputs are never written, outputs not by a refused call");
    must(status == DLATTN_OK || status == DLATTN_INVALID_ARGUMENT || status == DLATTN_UNSUPPORTED,
         "a call that was planned runs, or its data or exec are wrong");
    free(a->exec.workspace);
}

static void try_call(struct attempt *a, const dlattn_api *api) {
    const dlattn_tensors tensors = slots_of(a);
    dlattn_sku sku = {.struct_size = sizeof sku};
    dlattn_plan *plan = NULL;
    const int32_t status = api->forward_query(&a->desc, &tensors, &sku);
    must(strcmp(api->status_name(status), "unknown status") != 0, "every status has a name");
    must(status == DLATTN_OK || api->last_error()[0], "a refusal says why");
    must(api->plan_create(&a->desc, &tensors, &plan) == status,
         "plan_create and forward_query agree");
    must((status == DLATTN_OK) == (plan != NULL), "a plan is set on success alone");
    api->plan_destroy(plan);
    must(untouched(a, true), "a query writes nothing");
    if (a->runnable && status != DLATTN_OK)
        run(a, api, 0);
    else if (a->runnable && sku.workspace_bytes <= MOST_BYTES)
        run(a, api, sku.workspace_bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    struct attempt a;
    memset(&a, 0, sizeof a);
    start(&a, &in);
    for (int changes = next(&in) % 8; changes > 0; changes--) {
        const uint8_t what = next(&in), field = next(&in), value = next(&in);
        if (what % 16 < SLOTS)
            spoil_tensor(&a, what % 16, field, value);
        else
            spoil_options(&a, field, value);
    }
    give_memory(&a, &in);
    try_call(&a, dlattn_get_api(DLATTN_ABI_MAJOR));
    release(&a);
    return 0;
}
