/*
 * XLA FFI handlers, for JAX and every other program that runs XLA: dlattn_xla_forward_cpu and
 * dlattn_xla_forward_cuda.
 *
 * Arguments: the tensors that the attribute `slots` names, bit i being slot i of dlattn_tensors, in
 * that order; results: output, lse if its bit is set, and workspace (u8) if the plugin asked for
 * any when the program was traced. With heads_axis = 1, query, key, value, output are [B, H, L, D]
 * and lse [B, H, L]; with heads_axis = 2 they are [B, L, H, D] and [B, L, H], read and written in
 * place. Further attributes have the names of dlattn_forward_desc; an absent one is 0.
 */
#define _GNU_SOURCE
#include "abi/dlattn_loader.h"
#include "adapters/xla/xla_ffi.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define EXPORT __attribute__((visibility("default")))

enum { OUTPUT = 3, LSE = 4, MAX_AXES = 4, SLOTS = (sizeof(dlattn_tensors) - sizeof(size_t)) / 8 };

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

static const xla_scalar *attribute(const xla_call *call, const char *name) {
    const xla_attributes *a = &call->attributes;
    const size_t length = strlen(name);
    for (int64_t i = 0; i < a->size; i++) {
        if (a->types[i] == XLA_ATTRIBUTE_SCALAR && a->names[i]->length == length &&
            memcmp(a->names[i]->text, name, length) == 0)
            return a->items[i];
    }
    return NULL;
}

static int64_t integer(const xla_call *call, const char *name) {
    const xla_scalar *s = attribute(call, name);
    int64_t value = 0;
    if (s)
        memcpy(&value, s->value, s->dtype == XLA_S64 ? 8 : s->dtype == XLA_PRED ? 1 : 4);
    return value;
}

static double number(const xla_call *call, const char *name) {
    const xla_scalar *s = attribute(call, name);
    double value = 0;
    float narrow;
    if (s && s->dtype == XLA_F32) {
        memcpy(&narrow, s->value, sizeof narrow);
        value = (double)narrow;
    } else if (s) {
        memcpy(&value, s->value, sizeof value);
    }
    return value;
}

static dlattn_forward_desc read_desc(const xla_call *call) {
    return (dlattn_forward_desc){
        .struct_size = sizeof(dlattn_forward_desc),
        .flags = (uint64_t)integer(call, "flags"),
        .scale = number(call, "scale"),
        .softcap = number(call, "softcap"),
        .window_left = integer(call, "window_left"),
        .window_right = integer(call, "window_right"),
        .causal = (int32_t)integer(call, "causal"),
        .alignment = (int32_t)integer(call, "alignment"),
        .max_seqlen_q = integer(call, "max_seqlen_q"),
        .max_seqlen_k = integer(call, "max_seqlen_k"),
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
    case XLA_S32:
        return (DLDataType){kDLInt, 32, 1};
    case XLA_U8:
        return (DLDataType){kDLUInt, 8, 1};
    case XLA_F16:
        return (DLDataType){kDLFloat, 16, 1};
    case XLA_F32:
        return (DLDataType){kDLFloat, 32, 1};
    case XLA_F64:
        return (DLDataType){kDLFloat, 64, 1};
    case XLA_BF16:
        return (DLDataType){kDLBfloat, 16, 1};
    default:
        return (DLDataType){kDLOpaqueHandle, 0, 1}; /* the plugin refuses it, by the tensor's name
        */
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

/* Tensors of a call and its workspace; NULL, or what is wrong with the number of buffers. */
static const char *open_tensors(const xla_call *call, DLDevice device, struct tensor *opened,
                                dlattn_tensors *tensors, dlattn_exec *exec) {
    const DLTensor **slot = (const DLTensor **)&tensors->query;
    const int64_t present = integer(call, "slots");
    const int heads_last = integer(call, "heads_axis") == 2;
    int64_t argument = 0, result = 0;
    for (int i = 0; i < SLOTS; i++) {
        const int output = i == OUTPUT || i == LSE;
        const xla_buffers *from = output ? &call->results : &call->arguments;
        int64_t *next = output ? &result : &argument;
        if (!(present >> i & 1))
            continue;
        if (*next >= from->size)
            return "dlattn: fewer buffers than the attribute slots names";
        if (open_tensor(&opened[i], from->items[(*next)++], device, heads_last && i <= LSE) != 0)
            return "dlattn: a buffer has more than 4 axes";
        slot[i] = &opened[i].dl;
    }
    if (argument != call->arguments.size || result + 1 < call->results.size)
        return "dlattn: more buffers than the attribute slots names";
    if (result < call->results.size) {
        const xla_buffer *workspace = call->results.items[result];
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

static xla_error *forward(const xla_call *call, DLDevice device, dlattn_exec *exec) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct tensor opened[SLOTS];
    dlattn_tensors tensors = {.struct_size = sizeof tensors};
    const dlattn_forward_desc desc = read_desc(call);
    pthread_once(&once, open_plugin);
    if (!plugin)
        return refuse(call, XLA_FAILED_PRECONDITION, why_not);
    const char *wrong = open_tensors(call, device, opened, &tensors, exec);
    if (wrong)
        return refuse(call, XLA_INVALID_ARGUMENT, wrong);
    const int32_t status = plugin->forward(&desc, &tensors, exec);
    return status == DLATTN_OK ? NULL : refuse(call, code_of(status), plugin->last_error());
}

EXPORT xla_error *dlattn_xla_forward_cpu(const xla_call *call);
EXPORT xla_error *dlattn_xla_forward_cpu(const xla_call *call) {
    dlattn_exec exec = {.struct_size = sizeof exec, .parallel_for = parallel_for};
    if (describe(call, 0))
        return NULL;
    exec.parallel_ctx = (void *)(uintptr_t)call;
    return forward(call, (DLDevice){kDLCPU, 0}, &exec);
}

EXPORT xla_error *dlattn_xla_forward_cuda(const xla_call *call);
EXPORT xla_error *dlattn_xla_forward_cuda(const xla_call *call) {
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
    return forward(call, (DLDevice){kDLCUDA, device_of(query)}, &exec);
}
