/*
 * Arbitrary tensors and options for every operation. The input picks a call that is right, made from the lists of slots, then
 * spoils it: after the bytes that choose operation, shape, tensors and options, every three bytes change one field. Whatever
 * comes, the library must answer with a status, write nothing where it refuses, and touch no byte that the tensors do not have
 * (AddressSanitizer, exact allocations).
 */
#include "src/slots.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PARTS = 2, MERGE_SLOTS = 2 * PARTS + 2, MOST_AXES = 6, MOST_BYTES = 1 << 20 };

/* Outputs, then lses, then what they become. */
static const struct slot merge_slots[MERGE_SLOTS] = {
    {"outputs[0]", WIDE, true, false, 0, "BHQV", "THV", NULL, NULL, -1, 0},
    {"outputs[1]", WIDE, true, false, 0, "BHQV", "THV", NULL, NULL, -1, 0},
    {"lses[0]", FLOAT, true, false, 0, "BHQ", "HT", NULL, NULL, -1, 0},
    {"lses[1]", FLOAT, true, false, 0, "BHQ", "HT", NULL, NULL, -1, 0},
    {"output", WIDE, true, true, 0, "BHQV", "THV", NULL, NULL, -1, 0},
    {"lse", FLOAT, false, true, 0, "BHQ", "HT", NULL, NULL, -1, 0},
};

static const struct {
    const struct slot *slots;
    int count;
} operations[OPERATION_COUNT] = {
    [FORWARD] = {attention_slots, TENSOR_SLOTS},
    [BACKWARD] = {attention_slots, ATTENTION_SLOTS},
    [MERGE] = {merge_slots, MERGE_SLOTS},
    [APPEND] = {append_slots, APPEND_SLOTS},
};

struct tensor_of_call {
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
    enum operation operation;
    const struct slot *slots;
    int count;
    struct forms forms;
    int64_t extents[LETTERS];
    struct tensor_of_call tensor[ATTENTION_SLOTS];
    bool has[ATTENTION_SLOTS];
    dlattn_forward_desc desc;
    dlattn_exec exec;
    DLDataType cache_dtype; /* of append */
    int64_t parts;          /* of merge */
    size_t gradients_size;  /* struct_size */
    bool runnable;          /* every tensor has storage */
};

static uint8_t next(struct input *in) {
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->data++;
}

static uint32_t next_32(struct input *in) {
    uint32_t bits = next(in);
    for (int i = 1; i < 4; i++)
        bits |= (uint32_t)next(in) << 8 * i;
    return bits;
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

static bool writes(const struct attempt *a, int slot) {
    const bool is_input = a->operation == BACKWARD && slot < TENSOR_SLOTS;
    return a->slots[slot].written && !is_input;
}

/* ---- A call that is right --------------------------------------------------------------------------------- */

static const DLDataType f32 = {kDLFloat, 32, 1};

static DLDataType dtype_for(enum kind kind, DLDataType element) {
    switch (kind) {
    case ELEMENT:
    case WIDE:
        return element;
    case FLOAT:
    case FLOAT32:
        return f32;
    case INT32:
        return (DLDataType){kDLInt, 32, 1};
    case BOOL:
        return (DLDataType){kDLUInt, 8, 1};
    }
    return f32;
}

/* A capital letter is its extent, a small one may be 1 instead. */
static void make(struct attempt *a, int slot, const char *axes, DLDataType dtype, bool ones) {
    struct tensor_of_call *t = &a->tensor[slot];
    a->has[slot] = true;
    t->dl = (DLTensor){.device = {kDLCPU, 0},
                       .ndim = (int32_t)strlen(axes),
                       .dtype = dtype,
                       .shape = t->shape,
                       .strides = t->stride};
    t->compact = true;
    for (int axis = 0; axes[axis]; axis++) {
        const bool may_be_one = axes[axis] >= 'a';
        t->shape[axis] =
            may_be_one && ones ? 1 : a->extents[axes[axis] & (may_be_one ? ~0x20 : ~0)];
    }
}

static const char *axes_of(const struct attempt *a, const struct slot *slot, bool other) {
    const bool packed =
        slot->packed && (slot->packed[0] == 'U' ? a->forms.packed_k : a->forms.packed_q);
    if (a->forms.paged && slot->paged)
        return slot->paged;
    return packed ? slot->packed : other && slot->other ? slot->other : slot->axes;
}

static void choose_extents(struct attempt *a, uint8_t lengths, uint8_t dims, bool head_dim_v) {
    const int64_t batch = 2, heads_kv = 1 + (lengths >> 7), rows = 1 + lengths % 5, page = 4,
                  columns = (lengths / 5 % 20 + page) / page;
    const int64_t keys = a->forms.paged ? page * columns : 1 + lengths / 5 % 20;
    const int64_t block = a->desc.block_q = a->desc.block_k = 1 + dims % 4;
    const int64_t of[LETTERS] = {
        ['B'] = batch,
        ['H'] = 2 * heads_kv,
        ['G'] = heads_kv,
        ['Q'] = rows,
        ['K'] = keys,
        ['D'] = 1 + dims % 33,
        ['V'] = head_dim_v ? 1 + dims % 7 : 1 + dims % 33,
        ['T'] = batch * rows,
        ['U'] = batch * keys,
        ['P'] = batch * columns,
        ['S'] = page,
        ['N'] = columns,
        ['C'] = batch + 1,
        ['M'] = (rows + block - 1) / block,
        ['W'] = (keys + block - 1) / block,
        ['1'] = 1,
    };
    memcpy(a->extents, of, sizeof of);
}

static void choose_options(struct attempt *a, uint8_t options, uint8_t later) {
    a->desc.struct_size = sizeof a->desc;
    a->desc.causal = options & 1;
    a->desc.alignment = options >> 1 & 1;
    a->desc.flags = options >> 2 & 15;
    a->desc.window_left = a->desc.window_right = options >> 6;
    a->desc.num_threads = 1;
    a->desc.dropout_probability = later & 1 ? 0.25 : 0;
    a->desc.diagonal_offset = later >> 1 & 7;
    a->exec.struct_size = sizeof a->exec;
    a->exec.flags = later & 16 ? DLATTN_WORKSPACE_IS_ZERO : 0;
    a->parts = PARTS;
    a->gradients_size = sizeof(dlattn_gradients);
    if (a->forms.packed_q)
        a->desc.max_seqlen_q = a->extents['Q'];
    if (a->forms.packed_k)
        a->desc.max_seqlen_k = a->extents['K'];
}

/* Whether a tensor that may be absent is there; those that say how others lie, and those that go in pairs, follow. */
static bool wants(const struct attempt *a, int slot, uint32_t optional) {
    const bool attention = a->operation == FORWARD || a->operation == BACKWARD;
    if (a->slots[slot].required)
        return true;
    if (!attention)
        return slot == APPEND_cu_seqlens    ? a->forms.packed_q
               : slot == APPEND_block_table ? a->forms.paged
                                            : optional >> slot & 1;
    switch (slot) {
    case SLOT_lse:
        return a->operation == BACKWARD || optional >> slot & 1;
    case SLOT_cu_seqlens_q:
        return a->forms.packed_q;
    case SLOT_cu_seqlens_k:
        return a->forms.packed_k;
    case SLOT_block_table:
        return a->forms.paged;
    case SLOT_key_lengths:
        return a->forms.paged || optional >> slot & 1;
    case SLOT_key_segments:
        return a->has[SLOT_query_segments];
    default:
        return optional >> (slot % 32) & 1;
    }
}

/* A gradient is shaped as its tensor, of that one's dtype or f32. */
static void make_gradient(struct attempt *a, int slot, bool single) {
    const struct tensor_of_call *of = &a->tensor[a->slots[slot].of];
    struct tensor_of_call *t = &a->tensor[slot];
    if (!a->has[a->slots[slot].of])
        return;
    make(a, slot, "", single ? f32 : of->dl.dtype, false);
    t->dl.ndim = of->dl.ndim;
    memcpy(t->shape, of->shape, sizeof t->shape);
}

static void start(struct attempt *a, struct input *in) {
    static const DLDataType types[] = {
        {kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 64, 1}};
    const uint8_t operation = next(in), lengths = next(in), dims = next(in), forms = next(in),
                  options = next(in), later = next(in), gradients = next(in);
    const uint32_t optional = next_32(in);
    const DLDataType e = types[dims >> 6];
    a->operation = operation % OPERATION_COUNT;
    a->slots = operations[a->operation].slots;
    a->count = operations[a->operation].count;
    a->forms = (struct forms){forms & 1, forms & 2, forms & 4 && a->operation != BACKWARD};
    a->forms.packed_k &= !a->forms.paged;
    choose_extents(a, lengths, dims, forms & 8);
    choose_options(a, options, later);
    for (int slot = 0; slot < a->count; slot++) {
        const struct slot *s = &a->slots[slot];
        if (s->of >= 0 && a->operation == BACKWARD && slot >= TENSOR_SLOTS) {
            if (s->required || gradients >> (slot - TENSOR_SLOTS) & 1)
                make_gradient(a, slot, later & 32);
        } else if (wants(a, slot, optional)) {
            const bool is_float8 = later & 64 && s->kind == ELEMENT && a->operation != BACKWARD;
            make(a, slot, axes_of(a, s, forms & 16),
                 is_float8 ? (DLDataType){kDLFloat8_e4m3fn, 8, 1} : dtype_for(s->kind, e),
                 forms & 32);
        }
    }
    if (!a->has[SLOT_block_mask])
        a->desc.block_q = a->desc.block_k = 0;
}

/* ---- Spoiling it ------------------------------------------------------------------------------------------ */

static void spoil_tensor(struct attempt *a, int slot, uint8_t field, uint8_t value) {
    struct tensor_of_call *t = &a->tensor[slot];
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

static void spoil_sizes(struct attempt *a, uint8_t field, uint8_t value) {
    switch (field % 4) {
    case 0:
        a->desc.struct_size = value % (sizeof a->desc + 1);
        break;
    case 1:
        a->exec.struct_size = value % (sizeof a->exec + 1);
        break;
    case 2:
        a->gradients_size = value % (sizeof(dlattn_gradients) + 1);
        break;
    default:
        a->parts = value % 4 ? value % (PARTS + 1) : number(value | 240);
    }
}

static void spoil_later_options(struct attempt *a, uint8_t field, uint8_t value) {
    static const DLDataType types[] = {{kDLFloat8_e4m3fn, 8, 1}, {kDLFloat8_e5m2, 8, 1}};
    switch (field % 8) {
    case 0:
        a->desc.dropout_probability = real(value);
        break;
    case 1:
        a->desc.dropout_seed = a->desc.dropout_offset = (uint64_t)number(value);
        break;
    case 2:
        a->desc.diagonal_offset = number(value);
        break;
    case 3:
        a->desc.block_q = (int32_t)number(value);
        break;
    case 4:
        a->desc.block_k = (int32_t)number(value);
        break;
    case 5:
        a->desc.query_dtype = types[value % 2];
        break;
    case 6:
        a->desc.key_dtype = a->desc.value_dtype = types[value % 2];
        break;
    default:
        a->cache_dtype = types[value % 2];
    }
}

static void spoil_options(struct attempt *a, uint8_t field, uint8_t value) {
    switch (field % 12) {
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
        a->exec.flags = (uint64_t)number(value);
        break;
    default:
        a->desc.kernel = value & 1 ? "cpu_fwd_ref" : "no such row";
    }
}

static void spoil(struct attempt *a, struct input *in) {
    const uint8_t what = next(in), field = next(in), value = next(in);
    if (what < 200)
        spoil_tensor(a, what % a->count, field, value);
    else if (what < 225)
        spoil_options(a, field, value);
    else if (what < 245)
        spoil_later_options(a, field, value);
    else
        spoil_sizes(a, field, value);
}

/* ---- Memory ----------------------------------------------------------------------------------------------- */

/* Exactly the bytes that a tensor's elements reach; false if that is more than a test can have. */
static bool reach(struct tensor_of_call *t) {
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

/* Integers come from the input, all other tensors hold finite numbers above 0. */
static void fill(struct tensor_of_call *t, bool integers, struct input *in) {
    for (size_t i = 0; i < t->bytes; i++)
        t->storage[i] = integers ? 0 : (unsigned char)(i * 37 % 61);
    for (size_t i = 0; integers && i + 4 <= t->bytes && in->left; i += 4) {
        const int32_t value = (int32_t)number(next(in));
        memcpy(t->storage + i, &value, sizeof value);
    }
    memcpy(t->before, t->storage, t->bytes);
}

static void give_memory(struct attempt *a, struct input *in) {
    a->runnable = true;
    for (int slot = 0; slot < a->count; slot++) {
        struct tensor_of_call *t = &a->tensor[slot];
        if (!a->has[slot])
            continue;
        if (t->dl.ndim < 0 || t->dl.ndim > MOST_AXES || !t->dl.shape || !reach(t)) {
            a->runnable = false;
            continue;
        }
        t->storage = malloc(t->bytes ? t->bytes : 1);
        t->before = malloc(t->bytes ? t->bytes : 1);
        t->dl.data = t->bytes ? t->storage : NULL;
        fill(t, a->slots[slot].kind == INT32, in);
    }
}

static void release(struct attempt *a) {
    for (int slot = 0; slot < a->count; slot++) {
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
    for (int slot = 0; slot < a->count; slot++) {
        const struct tensor_of_call *t = &a->tensor[slot];
        if (t->storage && (outputs_too || !writes(a, slot)) &&
            memcmp(t->storage, t->before, t->bytes) != 0)
            return false;
    }
    return true;
}

/* What each operation takes. */
struct arguments {
    const DLTensor *slot[ATTENTION_SLOTS];
    dlattn_tensors tensors;
    dlattn_gradients gradients;
    dlattn_partials partials;
    dlattn_append_tensors appended;
};

static void put_slots(void *to, size_t first, const DLTensor *const *slots, size_t count) {
    memcpy((char *)to + first, slots, count * sizeof *slots);
}

static void collect(struct arguments *g, const struct attempt *a) {
    memset(g, 0, sizeof *g);
    for (int slot = 0; slot < a->count; slot++)
        g->slot[slot] = a->has[slot] ? &a->tensor[slot].dl : NULL;
    g->tensors.struct_size = sizeof g->tensors;
    g->gradients.struct_size = a->gradients_size;
    put_slots(&g->tensors, offsetof(dlattn_tensors, query), g->slot, TENSOR_SLOTS);
    put_slots(&g->gradients, offsetof(dlattn_gradients, d_output), g->slot + TENSOR_SLOTS,
              GRADIENT_SLOTS);
    g->partials = (dlattn_partials){.struct_size = sizeof g->partials,
                                    .count = a->parts,
                                    .outputs = g->slot,
                                    .lses = g->slot + PARTS,
                                    .output = g->slot[2 * PARTS],
                                    .lse = g->slot[2 * PARTS + 1]};
    g->appended.struct_size = sizeof g->appended;
    put_slots(&g->appended, offsetof(dlattn_append_tensors, key), g->slot, APPEND_SLOTS);
    g->appended.key_cache_dtype = g->appended.value_cache_dtype = a->cache_dtype;
}

static int32_t query(const struct attempt *a, const struct arguments *g, const dlattn_api *api,
                     dlattn_sku *sku) {
    switch (a->operation) {
    case FORWARD:
        return api->forward_query(&a->desc, &g->tensors, sku);
    case BACKWARD:
        return api->backward_query(&a->desc, &g->tensors, &g->gradients, sku);
    case MERGE:
        return api->merge_query(&g->partials, sku);
    default:
        return api->append_query(&g->appended, sku);
    }
}

static int32_t call(const struct attempt *a, const struct arguments *g, const dlattn_api *api) {
    switch (a->operation) {
    case FORWARD:
        return api->forward(&a->desc, &g->tensors, &a->exec);
    case BACKWARD:
        return api->backward(&a->desc, &g->tensors, &g->gradients, &a->exec);
    case MERGE:
        return api->merge(&g->partials, &a->exec);
    default:
        return api->append(&g->appended, &a->exec);
    }
}

static void try_plan(const struct attempt *a, const struct arguments *g, const dlattn_api *api,
                     int32_t status) {
    dlattn_plan *plan = NULL;
    const int32_t created =
        a->operation == FORWARD
            ? api->plan_create(&a->desc, &g->tensors, &plan)
            : api->backward_plan_create(&a->desc, &g->tensors, &g->gradients, &plan);
    must(created == status, "creating a plan and asking agree");
    must((status == DLATTN_OK) == (plan != NULL), "a plan is set on success alone");
    api->plan_destroy(plan);
}

static bool is_zero(const unsigned char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (bytes[i])
            return false;
    }
    return true;
}

/* `asked`: what the query said of it. */
static void run(struct attempt *a, const struct arguments *g, const dlattn_api *api, int32_t asked,
                size_t workspace_bytes) {
    a->exec.workspace = aligned_alloc(64, (workspace_bytes + 127) / 64 * 64);
    a->exec.workspace_bytes = workspace_bytes;
    memset(a->exec.workspace, 0, workspace_bytes);
    const int32_t status = call(a, g, api);
    must(untouched(a, status != DLATTN_OK),
         "inputs are never written, outputs not by a refused call");
    const bool is_judged =
        asked == DLATTN_OK || asked == DLATTN_INVALID_ARGUMENT || asked == DLATTN_UNSUPPORTED;
    must(is_judged ? status == DLATTN_OK || status == DLATTN_INVALID_ARGUMENT ||
                         status == DLATTN_UNSUPPORTED
                   : status == asked || status == DLATTN_INVALID_ARGUMENT,
         "a call that was planned runs, or its data or exec are wrong; one for a device that is "
         "not there is refused as its query was");
    must(status != DLATTN_OK || !(a->exec.flags & DLATTN_WORKSPACE_IS_ZERO) ||
             is_zero(a->exec.workspace, workspace_bytes),
         "a workspace that is given with zeros comes back so");
    free(a->exec.workspace);
}

static void try_call(struct attempt *a, const dlattn_api *api) {
    struct arguments g;
    dlattn_sku sku = {.struct_size = sizeof sku};
    collect(&g, a);
    const int32_t status = query(a, &g, api, &sku);
    must(strcmp(api->status_name(status), "unknown status") != 0, "every status has a name");
    must(status == DLATTN_OK || api->last_error()[0], "a refusal says why");
    if (a->operation == FORWARD || a->operation == BACKWARD)
        try_plan(a, &g, api, status);
    must(untouched(a, true), "a query writes nothing");
    if (a->runnable && status != DLATTN_OK)
        run(a, &g, api, status, 0);
    else if (a->runnable && sku.workspace_bytes <= MOST_BYTES)
        run(a, &g, api, status, sku.workspace_bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    struct attempt a;
    memset(&a, 0, sizeof a);
    start(&a, &in);
    for (int changes = next(&in) % 8; changes > 0; changes--)
        spoil(&a, &in);
    give_memory(&a, &in);
    try_call(&a, dlattn_get_api(DLATTN_ABI_MAJOR));
    release(&a);
    return 0;
}
