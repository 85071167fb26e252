/*
 * XLA FFI handlers, for JAX and every other program that runs XLA: dlattn_xla_forward_cpu and
 * dlattn_xla_forward_cuda, dlattn_xla_backward_cpu and dlattn_xla_backward_cuda.
 *
 * Arguments: the tensors that the attribute `slots` names, bit i being slot i of dlattn_tensors,
 * and bits from there on the slots of dlattn_gradients, in that order. Results are those of them
 * that the operation writes (forward: output and lse; backward: d_query and what follows it), and
 * workspace (u8) if the plugin asked for any when the program was traced. With heads_axis = 1,
 * query, key, value and output are [B, H, L, D] and lse [B, H, L]; with heads_axis = 2 they are
 * [B, L, H, D] and [B, L, H], read and written in place; so are their gradients. Further attributes have the names of dlattn_forward_desc; an absent one is 0, an unknown one
 * is refused. Integers are of any integer type, reals of float64, float32 or any integer type.
 */
#define _GNU_SOURCE
#include "abi/dlattn_loader.h"
#include "adapters/xla/xla_ffi.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    MAX_AXES = 4,
    OUTPUT = 3,
    LSE = 4,
    TENSORS = (sizeof(dlattn_tensors) - sizeof(size_t)) / sizeof(void *),
    D_QUERY = TENSORS + 2, /* behind d_output and d_lse */
    D_VALUE = D_QUERY + 2,
    SLOTS = TENSORS + (sizeof(dlattn_gradients) - sizeof(size_t)) / sizeof(void *)
};

static const dlattn_api *plugin;
static char why_not[4096];

static void open_plugin(void) { plugin = dlattn_open(why_not, sizeof why_not); }

static xla_error *refuse(const xla_call *call, int32_t code, const char *message) {
    xla_error_create_args args = {sizeof args, NULL, message, code};
    return call->api->error_create(&args);
}

static int32_t code_of(int32_t status) {
    switch (status) {
    case DLATTN_INVALID_ARGUMENT:
        return XLA_INVALID_ARGUMENT;
    case DLATTN_UNSUPPORTED:
        return XLA_UNIMPLEMENTED;
    case DLATTN_DEVICE_UNAVAILABLE:
        return XLA_FAILED_PRECONDITION;
    default:
        return XLA_INTERNAL;
    }
}

/* ---- Metadata ---- */

/* Whether XLA only asks what this handler is, and then the answer. */
static int describe(const xla_call *call, uint32_t traits) {
    for (xla_extension *e = call->extension; e; e = e->next) {
        if (e->type != XLA_EXTENSION_METADATA)
            continue;
        xla_metadata *metadata = ((xla_metadata_extension *)e)->metadata;
        metadata->api_version.major = 0;
        metadata->api_version.minor = 1;
        metadata->traits = traits;
        return 1;
    }
    return 0;
}

/* ---- Attributes ---- */

/* Everything of a call but its tensors; what the call does not say is 0. */
struct attributes {
    int64_t slots, heads_axis, flags, window_left, window_right, causal, alignment;
    int64_t max_seqlen_q, max_seqlen_k, diagonal_offset, num_threads;
    double scale, softcap;
};

#define FIELD(name) #name, offsetof(struct attributes, name)
static const struct known {
    const char *name;
    size_t offset;
    int is_real;
    int64_t least, most; /* of an integer */
} KNOWN[] = {
    {FIELD(slots), 0, 0, (INT64_C(1) << SLOTS) - 1},
    {FIELD(heads_axis), 0, 0, 2},
    {FIELD(flags), 0, 0, INT64_MAX},
    {FIELD(window_left), 0, INT64_MIN, INT64_MAX},
    {FIELD(window_right), 0, INT64_MIN, INT64_MAX},
    {FIELD(causal), 0, INT32_MIN, INT32_MAX},
    {FIELD(alignment), 0, INT32_MIN, INT32_MAX},
    {FIELD(max_seqlen_q), 0, INT64_MIN, INT64_MAX},
    {FIELD(max_seqlen_k), 0, INT64_MIN, INT64_MAX},
    {FIELD(diagonal_offset), 0, INT64_MIN, INT64_MAX},
    {FIELD(num_threads), 0, INT32_MIN, INT32_MAX},
    {FIELD(scale), 1, 0, 0},
    {FIELD(softcap), 1, 0, 0},
};

static const struct known *find_known(const xla_span *name) {
    for (size_t i = 0; i < sizeof KNOWN / sizeof KNOWN[0]; i++) {
        if (strlen(KNOWN[i].name) == name->length &&
            memcmp(KNOWN[i].name, name->text, name->length) == 0)
            return &KNOWN[i];
    }
    return NULL;
}

/* Whether the scalar is an integer that int64 holds, and then its value. */
static int read_integer(const xla_scalar *s, int64_t *value) {
    const uint64_t *wide = s->value;
    switch (s->dtype) {
    case XLA_PRED:
    case XLA_U8:
        *value = *(const uint8_t *)s->value;
        return 1;
    case XLA_S8:
        *value = (int64_t)*(const int8_t *)s->value;
        return 1;
    case XLA_S16:
        *value = *(const int16_t *)s->value;
        return 1;
    case XLA_U16:
        *value = *(const uint16_t *)s->value;
        return 1;
    case XLA_S32:
        *value = *(const int32_t *)s->value;
        return 1;
    case XLA_U32:
        *value = *(const uint32_t *)s->value;
        return 1;
    case XLA_S64:
        *value = *(const int64_t *)s->value;
        return 1;
    case XLA_U64:
        *value = (int64_t)*wide;
        return *wide <= INT64_MAX;
    default:
        return 0;
    }
}

/* Whether the scalar is a number that a double stands for, and then its value. */
static int read_real(const xla_scalar *s, double *value) {
    int64_t whole;
    switch (s->dtype) {
    case XLA_F32:
        *value = (double)*(const float *)s->value;
        return 1;
    case XLA_F64:
        *value = *(const double *)s->value;
        return 1;
    default:
        if (!read_integer(s, &whole))
            return 0;
        *value = (double)whole;
        return 1;
    }
}

enum { MESSAGE = 256 };

/* 0, or -1 with a message that names the attribute. */
static int read_attribute(struct attributes *a, int32_t type, const xla_span *name,
                          const void *item, char *message) {
    const int length = name->length < 64 ? (int)name->length : 64;
    const struct known *k = find_known(name);
    if (!k) {
        snprintf(message, MESSAGE, "dlattn: attribute %.*s: is not known", length, name->text);
        return -1;
    }
    void *field = (char *)a + k->offset;
    const xla_scalar *scalar = item;
    if (type != XLA_ATTRIBUTE_SCALAR ||
        !(k->is_real ? read_real(scalar, field) : read_integer(scalar, field))) {
        snprintf(message, MESSAGE, "dlattn: attribute %s: must be a scalar of %s", k->name,
                 k->is_real ? "float64, float32 or an integer type" : "an integer type");
        return -1;
    }
    const int64_t whole = k->is_real ? 0 : *(const int64_t *)field;
    if (whole < k->least || whole > k->most) {
        snprintf(message, MESSAGE, "dlattn: attribute %s: is %lld, must be from %lld to %lld",
                 k->name, (long long)whole, (long long)k->least, (long long)k->most);
        return -1;
    }
    return 0;
}

static int read_attributes(const xla_call *call, struct attributes *a, char *message) {
    const xla_attributes *from = &call->attributes;
    *a = (struct attributes){0};
    for (int64_t i = 0; i < from->size; i++) {
        if (read_attribute(a, from->types[i], from->names[i], from->items[i], message) != 0)
            return -1;
    }
    return 0;
}

static dlattn_forward_desc desc_of(const struct attributes *a) {
    return (dlattn_forward_desc){
        .struct_size = sizeof(dlattn_forward_desc),
        .flags = (uint64_t)a->flags,
        .scale = a->scale,
        .softcap = a->softcap,
        .window_left = a->window_left,
        .window_right = a->window_right,
        .causal = (int32_t)a->causal,
        .alignment = (int32_t)a->alignment,
        .max_seqlen_q = a->max_seqlen_q,
        .max_seqlen_k = a->max_seqlen_k,
        .num_threads = (int32_t)a->num_threads,
        .diagonal_offset = a->diagonal_offset,
    };
}

/* ---- Tensors ---- */

struct tensor {
    DLTensor dl;
    int64_t shape[MAX_AXES], strides[MAX_AXES];
};

static DLDataType dtype_of(int32_t xla) {
    switch (xla) {
    case XLA_PRED:
        return (DLDataType){kDLBool, 8, 1};
    case XLA_S8:
        return (DLDataType){kDLInt, 8, 1};
    case XLA_S16:
        return (DLDataType){kDLInt, 16, 1};
    case XLA_S32:
        return (DLDataType){kDLInt, 32, 1};
    case XLA_S64:
        return (DLDataType){kDLInt, 64, 1};
    case XLA_U8:
        return (DLDataType){kDLUInt, 8, 1};
    case XLA_U16:
        return (DLDataType){kDLUInt, 16, 1};
    case XLA_U32:
        return (DLDataType){kDLUInt, 32, 1};
    case XLA_U64:
        return (DLDataType){kDLUInt, 64, 1};
    case XLA_F16:
        return (DLDataType){kDLFloat, 16, 1};
    case XLA_F32:
        return (DLDataType){kDLFloat, 32, 1};
    case XLA_F64:
        return (DLDataType){kDLFloat, 64, 1};
    case XLA_BF16:
        return (DLDataType){kDLBfloat, 16, 1};
    case XLA_F8E4M3FN:
        return (DLDataType){kDLFloat8_e4m3fn, 8, 1};
    case XLA_F8E5M2:
        return (DLDataType){kDLFloat8_e5m2, 8, 1};
    default:
        return (DLDataType){kDLOpaqueHandle, 0, 1}; /* refused by the plugin, with the name */
    }
}

static void swap(int64_t *a, int64_t *b) {
    const int64_t kept = *a;
    *a = *b;
    *b = kept;
}

static int open_tensor(struct tensor *t, const xla_buffer *b, DLDevice device, int heads_last) {
    int64_t compact = 1;
    if (b->rank > MAX_AXES)
        return -1;
    for (int64_t axis = b->rank - 1; axis >= 0; axis--) {
        t->shape[axis] = b->dims[axis];
        t->strides[axis] = compact;
        compact *= b->dims[axis];
    }
    if (heads_last && b->rank >= 3) {
        swap(&t->shape[1], &t->shape[2]);
        swap(&t->strides[1], &t->strides[2]);
    }
    t->dl = (DLTensor){
        .data = b->data,
        .device = device,
        .ndim = (int32_t)b->rank,
        .dtype = dtype_of(b->dtype),
        .shape = t->shape,
        .strides = t->strides,
    };
    return 0;
}

/* A call of forward, or of backward. */
struct attention {
    int backward;
    struct tensor opened[SLOTS];
    dlattn_tensors tensors;
    dlattn_gradients gradients;
};

static const DLTensor **slot_of(struct attention *c, int slot) {
    return slot < TENSORS ? (const DLTensor **)&c->tensors.query + slot
                          : (const DLTensor **)&c->gradients.d_output + slot - TENSORS;
}

static int is_result(const struct attention *c, int slot) {
    return c->backward ? slot >= D_QUERY : slot == OUTPUT || slot == LSE;
}

/* Whether heads are an axis that heads_axis moves. */
static int has_heads(int slot) { return slot <= LSE || (slot >= TENSORS && slot <= D_VALUE); }

/* Tensors of a call and its workspace; NULL, or what is wrong with the buffers. */
static const char *open_tensors(const xla_call *call, const struct attributes *a, DLDevice device,
                                struct attention *c, dlattn_exec *exec) {
    int64_t argument = 0, result = 0;
    if (!c->backward && a->slots >> TENSORS)
        return "dlattn: attribute slots: names gradients, which are those of backward";
    for (int i = 0; i < SLOTS; i++) {
        const xla_buffers *from = is_result(c, i) ? &call->results : &call->arguments;
        int64_t *next = is_result(c, i) ? &result : &argument;
        if (!(a->slots >> i & 1))
            continue;
        if (*next >= from->size)
            return "dlattn: fewer buffers than the attribute slots names";
        if (open_tensor(&c->opened[i], from->items[(*next)++], device,
                        a->heads_axis == 2 && has_heads(i)) != 0)
            return "dlattn: a buffer has more than 4 axes";
        *slot_of(c, i) = &c->opened[i].dl;
    }
    if (argument != call->arguments.size || result + 1 < call->results.size)
        return "dlattn: more buffers than the attribute slots names";
    if (result < call->results.size) {
        const xla_buffer *workspace = call->results.items[result];
        if (workspace->dtype != XLA_U8 || workspace->rank != 1)
            return "dlattn: workspace: must be of uint8, with one axis";
        exec->workspace = workspace->data;
        exec->workspace_bytes = (size_t)workspace->dims[0];
    }
    return NULL;
}

/* ---- XLA's threads ---- */

/* Work that scheduled tasks and the caller share. A task may start after the caller has left, or
 * never run beside it at all: whoever comes last frees the job, and the caller waits for nothing
 * but indices that somebody is already at. */
struct job {
    dlattn_parallel_body body;
    void *ctx;
    int64_t count;
    _Atomic int64_t next, done;
    atomic_int users;
};

static void work(struct job *job) {
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < job->count;) {
        job->body(job->ctx, i);
        atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
    }
}

static void leave(struct job *job) {
    if (atomic_fetch_sub(&job->users, 1) == 1)
        free(job);
}

static void task(void *data) {
    work(data);
    leave(data);
}

static void parallel_for(void *ctx, int64_t count, dlattn_parallel_body body, void *body_ctx) {
    const xla_call *call = ctx;
    struct job *job = malloc(sizeof *job);
    if (!job) {
        for (int64_t i = 0; i < count; i++)
            body(body_ctx, i);
        return;
    }
    *job = (struct job){.body = body, .ctx = body_ctx, .count = count};
    atomic_init(&job->users, (int)count); /* the caller, and one task for every other index */
    for (int64_t i = 1; i < count; i++) {
        xla_schedule_args args = {sizeof args, NULL, call->context, task, job};
        xla_error *error = call->api->schedule(&args);
        if (error) {
            xla_error_destroy_args destroy = {sizeof destroy, NULL, error};
            call->api->error_destroy(&destroy);
            atomic_fetch_sub(&job->users, 1); /* not to 0: the caller is still there */
        }
    }
    work(job);
    while (atomic_load_explicit(&job->done, memory_order_acquire) < count)
        sched_yield();
    leave(job);
}

/* ---- CUDA ---- */

/* The driver that XLA has already loaded; NULL without one. */
static int (*pointer_attribute)(void *value, int attribute, uint64_t pointer);

static void find_driver(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *symbol = driver ? dlsym(driver, "cuPointerGetAttribute") : NULL;
    memcpy(&pointer_attribute, &symbol, sizeof symbol);
}

/* The device of a pointer, from the driver: the runtime itself can say it only since FFI 0.3. */
static int32_t device_of(const void *pointer) {
    enum { DEVICE_ORDINAL = 9 };
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int32_t ordinal = 0;
    pthread_once(&once, find_driver);
    if (!pointer_attribute ||
        pointer_attribute(&ordinal, DEVICE_ORDINAL, (uint64_t)(uintptr_t)pointer) != 0)
        return 0;
    return ordinal;
}

/* ---- The handlers ---- */

static int32_t run(struct attention *c, const dlattn_forward_desc *desc, const dlattn_exec *exec) {
    return c->backward ? plugin->backward(desc, &c->tensors, &c->gradients, exec)
                       : plugin->forward(desc, &c->tensors, exec);
}

/* On a CPU, of a program that was planned on another (jax.export), whose kernel needs less. */
static int32_t run_with_more_room(struct attention *c, const dlattn_forward_desc *desc,
                                  dlattn_exec exec) {
    dlattn_sku sku = {.struct_size = sizeof sku};
    int32_t status = c->backward ? plugin->backward_query(desc, &c->tensors, &c->gradients, &sku)
                                 : plugin->forward_query(desc, &c->tensors, &sku);
    if (status != DLATTN_OK)
        return status;
    const size_t mask = sku.workspace_alignment - 1;
    exec.workspace_bytes = (sku.workspace_bytes + mask) & ~mask;
    exec.workspace = aligned_alloc(sku.workspace_alignment, exec.workspace_bytes);
    status = exec.workspace ? run(c, desc, &exec) : DLATTN_OUT_OF_MEMORY;
    free(exec.workspace);
    return status;
}

static xla_error *attend(const xla_call *call, int backward, DLDevice device, dlattn_exec *exec) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct attention c = {.backward = backward,
                          .tensors = {.struct_size = sizeof c.tensors},
                          .gradients = {.struct_size = sizeof c.gradients}};
    struct attributes attributes;
    char message[MESSAGE];
    pthread_once(&once, open_plugin);
    if (!plugin)
        return refuse(call, XLA_FAILED_PRECONDITION, why_not);
    if (backward && plugin->abi_minor < 1)
        return refuse(call, XLA_UNIMPLEMENTED, "dlattn: backward: needs a library of ABI 1.1");
    if (read_attributes(call, &attributes, message) != 0)
        return refuse(call, XLA_INVALID_ARGUMENT, message);
    const dlattn_forward_desc desc = desc_of(&attributes);
    const char *wrong = open_tensors(call, &attributes, device, &c, exec);
    if (wrong)
        return refuse(call, XLA_INVALID_ARGUMENT, wrong);
    int32_t status = run(&c, &desc, exec);
    if (status == DLATTN_BUFFER_TOO_SMALL && device.device_type == kDLCPU)
        status = run_with_more_room(&c, &desc, *exec);
    return status == DLATTN_OK ? NULL : refuse(call, code_of(status), plugin->last_error());
}

static xla_error *attend_on_cpu(const xla_call *call, int backward) {
    dlattn_exec exec = {.struct_size = sizeof exec, .parallel_for = parallel_for};
    if (describe(call, 0))
        return NULL;
    exec.parallel_ctx = (void *)(uintptr_t)call;
    return attend(call, backward, (DLDevice){kDLCPU, 0}, &exec);
}

static xla_error *attend_on_cuda(const xla_call *call, int backward) {
    dlattn_exec exec = {.struct_size = sizeof exec};
    xla_stream_get_args stream = {sizeof stream, NULL, NULL, NULL};
    if (describe(call, XLA_COMMAND_BUFFER_COMPATIBLE))
        return NULL;
    stream.context = call->context;
    xla_error *error = call->api->stream_get(&stream);
    if (error)
        return error;
    exec.stream = stream.stream;
    const void *query = call->arguments.size > 0 ? call->arguments.items[0]->data : NULL;
    return attend(call, backward, (DLDevice){kDLCUDA, device_of(query)}, &exec);
}

#define HANDLER(name, place, backward)                                                             \
    EXPORT xla_error *name(const xla_call *call);                                                  \
    EXPORT xla_error *name(const xla_call *call) { return attend_on_##place(call, backward); }

HANDLER(dlattn_xla_forward_cpu, cpu, 0)
HANDLER(dlattn_xla_forward_cuda, cuda, 0)
HANDLER(dlattn_xla_backward_cpu, cpu, 1)
HANDLER(dlattn_xla_backward_cuda, cuda, 1)
