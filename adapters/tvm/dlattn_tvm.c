/*
 * libdlattn_tvm.so: dlattn for whatever calls through TVM's FFI: tvm_ffi in Python, C++ and Rust,
 * and Relax's VM.
 *
 *     m = tvm_ffi.load_module("libdlattn_tvm.so")   # finds libdlattn.so.1 as dlattn_loader.h says
 *     m.dlattn_forward(query, key, value, "causal", True, output, lse)
 *
 *   dlattn_forward(query, key, value, [name, value]..., output[, lse]) -> None
 *                                          destination-passing: Relax's call_dps_packed appends the
 *                                          outputs to its arguments
 *   dlattn_backward(d_output, query, key, value, output, lse, [name, value]...,
 *                   d_query, d_key, d_value) -> None       gradients; None for one that is not wanted
 *   dlattn_kernel(the same arguments) -> str               the row that forward would run
 *   dlattn_workspace_bytes(the same arguments) -> int      what "workspace" must hold for them
 *   dlattn_backward_kernel, dlattn_backward_workspace_bytes    the same for backward
 *   dlattn_version() -> str                                of libdlattn.so.1
 *
 * Before what is written stand pairs of an option's name and its value; None says "absent". The
 * options are the fields of dlattn_forward_desc and dlattn_tensors (abi/dlattn.h has their meaning
 * and shapes), and
 *   stream      int or handle; default: the one that the caller's framework has told tvm-ffi
 *               (TVMFFIEnvGetStream)
 *   workspace   compact uint8 tensor on the same device; default: allocated for the call, on a GPU by
 *               tvm-ffi's allocator (torch's, when a torch tensor is among the arguments), which
 *               must reuse memory in the stream's order
 *   d_lse, d_bias, d_alibi_slopes, d_sinks    tensors, of backward alone: the gradient of lse, and
 *               where those of bias, ALiBi slopes and sinks go
 *
 * Errors are raised with the plugin's message: TypeError for an argument of the wrong kind,
 * ValueError for an invalid one, MemoryError, and RuntimeError for the rest (unsupported, device,
 * missing library). Thread-safe.
 */
#include "dlattn_loader.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

/* Declares and begins one exported function; tvm-ffi finds it by the prefix of its symbol. */
#define FUNCTION(name)                                                                             \
    __attribute__((visibility("default"))) int __tvm_ffi_##name(void *self, const TVMFFIAny *args, \
                                                                int32_t count, TVMFFIAny *result); \
    int __tvm_ffi_##name(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)

enum { OK = 0, RAISED = -1 };

/* What the arguments of one call say. */
struct call {
    bool backward;
    dlattn_forward_desc desc;
    dlattn_tensors tensors;
    dlattn_gradients gradients;
    dlattn_exec exec;
    const DLTensor *workspace;
    bool has_stream;
};

/* ---- Errors --------------------------------------------------------------------------------- */

static int raise_error(const char *kind, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static int raise_error(const char *kind, const char *format, ...) {
    char text[4096];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    TVMFFIErrorSetRaisedFromCStr(kind, text);
    return RAISED;
}

static int raise_status(const dlattn_api *api, int32_t status) {
    const char *kind = status == DLATTN_INVALID_ARGUMENT || status == DLATTN_BUFFER_TOO_SMALL
                           ? "ValueError"
                       : status == DLATTN_OUT_OF_MEMORY ? "MemoryError"
                                                        : "RuntimeError";
    TVMFFIErrorSetRaisedFromCStr(kind, api->last_error());
    return RAISED;
}

/* The plugin's table, opened at the first call; NULL with the error raised. Threads that meet here
 * open it twice, which gives the same table. */
static const dlattn_api *open_api(void) {
    static _Atomic(const dlattn_api *) opened;
    const dlattn_api *api = atomic_load(&opened);
    if (!api) {
        char why[4096];
        api = dlattn_open(why, sizeof why);
        if (!api)
            raise_error("RuntimeError", "%s", why);
        atomic_store(&opened, api);
    }
    return api;
}

/* ---- Arguments ------------------------------------------------------------------------------ */

static const void *object_body(const TVMFFIAny *any) {
    return (const char *)any->v_ptr + sizeof(TVMFFIObject);
}

static const char *type_name(const TVMFFIAny *any) {
    return TVMFFIGetTypeInfo(any->type_index)->type_key.data;
}

static bool read_tensor(const TVMFFIAny *any, const DLTensor **tensor) {
    if (any->type_index == kTVMFFIDLTensorPtr)
        *tensor = any->v_ptr;
    else if (any->type_index == kTVMFFITensor)
        *tensor = object_body(any);
    return any->type_index == kTVMFFIDLTensorPtr || any->type_index == kTVMFFITensor;
}

/* NULL unless it is a string. Every form of it ends with a NUL. */
static const char *read_string(const TVMFFIAny *any) {
    switch (any->type_index) {
    case kTVMFFIRawStr:
        return any->v_c_str;
    case kTVMFFISmallStr:
        return any->v_bytes;
    case kTVMFFIStr:
        return ((const TVMFFIByteArray *)object_body(any))->data;
    default:
        return NULL;
    }
}

static bool read_integer(const TVMFFIAny *any, int64_t *integer) {
    *integer = any->v_int64;
    return any->type_index == kTVMFFIInt || any->type_index == kTVMFFIBool;
}

static bool read_number(const TVMFFIAny *any, double *number) {
    *number = any->type_index == kTVMFFIInt ? (double)any->v_int64 : any->v_float64;
    return any->type_index == kTVMFFIInt || any->type_index == kTVMFFIFloat;
}

enum kind { TENSOR, INT32, INT64, WINDOW, NUMBER, SCALE, STRING, STREAM };

static const char *const kind_names[] = {"a tensor", "an int",   "an int",   "an int",
                                         "a number", "a number", "a string", "an int or a handle"};

/* Every option: its name, the kind of its value, and where it goes. */
static const struct option {
    const char *name;
    enum kind kind;
    size_t offset;
} options[] = {
    {"causal", INT32, offsetof(struct call, desc.causal)},
    {"alignment", INT32, offsetof(struct call, desc.alignment)},
    {"scale", SCALE, offsetof(struct call, desc.scale)},
    {"softcap", NUMBER, offsetof(struct call, desc.softcap)},
    {"window_left", WINDOW, offsetof(struct call, desc.window_left)},
    {"window_right", WINDOW, offsetof(struct call, desc.window_right)},
    {"max_seqlen_q", INT64, offsetof(struct call, desc.max_seqlen_q)},
    {"max_seqlen_k", INT64, offsetof(struct call, desc.max_seqlen_k)},
    {"kernel", STRING, offsetof(struct call, desc.kernel)},
    {"num_threads", INT32, offsetof(struct call, desc.num_threads)},
    {"bias", TENSOR, offsetof(struct call, tensors.bias)},
    {"mask", TENSOR, offsetof(struct call, tensors.mask)},
    {"alibi_slopes", TENSOR, offsetof(struct call, tensors.alibi_slopes)},
    {"sinks", TENSOR, offsetof(struct call, tensors.sinks)},
    {"query_lengths", TENSOR, offsetof(struct call, tensors.query_lengths)},
    {"key_lengths", TENSOR, offsetof(struct call, tensors.key_lengths)},
    {"cu_seqlens_q", TENSOR, offsetof(struct call, tensors.cu_seqlens_q)},
    {"cu_seqlens_k", TENSOR, offsetof(struct call, tensors.cu_seqlens_k)},
    {"block_table", TENSOR, offsetof(struct call, tensors.block_table)},
    {"workspace", TENSOR, offsetof(struct call, workspace)},
    {"stream", STREAM, offsetof(struct call, exec.stream)},
    /* Of backward alone. */
    {"d_lse", TENSOR, offsetof(struct call, gradients.d_lse)},
    {"d_bias", TENSOR, offsetof(struct call, gradients.d_bias)},
    {"d_alibi_slopes", TENSOR, offsetof(struct call, gradients.d_alibi_slopes)},
    {"d_sinks", TENSOR, offsetof(struct call, gradients.d_sinks)},
};
enum { OPTION_COUNT = sizeof options / sizeof options[0], FORWARD_OPTIONS = OPTION_COUNT - 4 };

static int option_count(const struct call *call) {
    return call->backward ? OPTION_COUNT : FORWARD_OPTIONS;
}

static int raise_unknown(const struct call *call, const char *name) {
    char known[512] = "";
    for (int i = 0; i < option_count(call); i++) {
        const size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", options[i].name);
    }
    return raise_error("ValueError", "dlattn has no option \"%s\"; it has %s", name, known);
}

static bool read_option(const struct option *option, const TVMFFIAny *any, struct call *call) {
    void *place = (char *)call + option->offset;
    int64_t integer;
    switch (option->kind) {
    case TENSOR:
        return read_tensor(any, place);
    case INT32:
        if (!read_integer(any, &integer) || integer != (int32_t)integer)
            return false;
        *(int32_t *)place = (int32_t)integer;
        return true;
    case WINDOW:
        call->desc.flags |= DLATTN_WINDOW;
        return read_integer(any, place);
    case INT64:
        return read_integer(any, place);
    case SCALE:
        call->desc.flags |= DLATTN_EXACT_SCALE;
        return read_number(any, place);
    case NUMBER:
        return read_number(any, place);
    case STRING:
        return (*(const char **)place = read_string(any)) != NULL;
    case STREAM:
        call->has_stream = true;
        call->exec.stream = any->v_ptr;
        return any->type_index == kTVMFFIInt || any->type_index == kTVMFFIOpaquePtr;
    }
    return false;
}

/* Reads the pair at args[0] and args[1]. */
static int read_pair(const TVMFFIAny *args, struct call *call) {
    const char *name = read_string(&args[0]);
    int i = 0;
    while (i < option_count(call) && strcmp(options[i].name, name) != 0)
        i++;
    if (i == option_count(call))
        return raise_unknown(call, name);
    if (args[1].type_index == kTVMFFINone || read_option(&options[i], &args[1], call))
        return OK;
    return raise_error("TypeError", "%s: must be %s, is of tvm-ffi's type %s", name,
                       kind_names[options[i].kind], type_name(&args[1]));
}

/* The arguments of an operation that have no names: `inputs` of them before the pairs, and from
 * `needed` on they may be left out. */
struct form {
    int inputs, needed, count;
    const char *usage;
    struct {
        const char *name;
        size_t offset;
        bool may_be_none;
    } slots[9];
};

#define INPUT(name, at) {name, offsetof(struct call, at), false}
#define OUTPUT(name, at) {name, offsetof(struct call, at), true}

static const struct form forms[] = {
    {3,
     4,
     5,
     "query, key, value, [name, value]..., output[, lse]",
     {INPUT("query", tensors.query), INPUT("key", tensors.key), INPUT("value", tensors.value),
      INPUT("output", tensors.output), OUTPUT("lse", tensors.lse)}},
    {6,
     9,
     9,
     "d_output, query, key, value, output, lse, [name, value]..., d_query, d_key, d_value",
     {INPUT("d_output", gradients.d_output), INPUT("query", tensors.query),
      INPUT("key", tensors.key), INPUT("value", tensors.value), INPUT("output", tensors.output),
      INPUT("lse", tensors.lse), OUTPUT("d_query", gradients.d_query),
      OUTPUT("d_key", gradients.d_key), OUTPUT("d_value", gradients.d_value)}},
};

static int read_call(const TVMFFIAny *args, int32_t count, bool backward, struct call *call) {
    const struct form *form = &forms[backward];
    *call = (struct call){
        .backward = backward,
        .desc = {.struct_size = sizeof call->desc, .window_left = -1, .window_right = -1},
        .tensors = {.struct_size = sizeof call->tensors},
        .gradients = {.struct_size = sizeof call->gradients},
        .exec = {.struct_size = sizeof call->exec},
    };
    int slot = 0;
    for (int32_t i = 0; i < count; i++) {
        if (slot == form->inputs && read_string(&args[i])) {
            if (i + 1 == count)
                return raise_error("TypeError", "%s: has no value", read_string(&args[i]));
            if (read_pair(&args[i++], call) != OK)
                return RAISED;
        } else if (slot == form->count) {
            return raise_error("TypeError", "unexpected argument after %s",
                               form->slots[slot - 1].name);
        } else if (read_tensor(&args[i],
                               (const DLTensor **)((char *)call + form->slots[slot].offset)) ||
                   (form->slots[slot].may_be_none && args[i].type_index == kTVMFFINone)) {
            slot++;
        } else {
            return raise_error("TypeError", "%s: must be a tensor, is of tvm-ffi's type %s",
                               form->slots[slot].name, type_name(&args[i]));
        }
    }
    return slot >= form->needed ? OK
                                : raise_error("TypeError", "%s: is missing; the arguments are %s",
                                              form->slots[slot].name, form->usage);
}

/* ---- Running -------------------------------------------------------------------------------- */

static bool on_host(DLDevice device) {
    return device.device_type == kDLCPU || device.device_type == kDLCUDAHost;
}

/* The caller's own workspace, whose bytes the plugin cannot tell from any others. */
static int use_workspace(struct call *call) {
    const DLTensor *workspace = call->workspace;
    const DLDevice wanted = call->tensors.query->device, given = workspace->device;
    int64_t bytes = 1;
    bool compact = true;
    for (int32_t axis = workspace->ndim - 1; axis >= 0; axis--) {
        if (workspace->strides && workspace->shape[axis] > 1)
            compact &= workspace->strides[axis] == bytes;
        bytes *= workspace->shape[axis];
    }
    if (workspace->dtype.code != kDLUInt || workspace->dtype.bits != 8 ||
        workspace->dtype.lanes != 1 || (!compact && bytes > 0))
        return raise_error("ValueError", "workspace: must be a compact tensor of uint8");
    if (given.device_type != wanted.device_type || given.device_id != wanted.device_id)
        return raise_error(
            "ValueError", "workspace: is on DLPack device (%d, %d), query on (%d, %d)",
            (int)given.device_type, given.device_id, (int)wanted.device_type, wanted.device_id);
    call->exec.workspace = (char *)workspace->data + workspace->byte_offset;
    call->exec.workspace_bytes = (size_t)bytes;
    return OK;
}

static int32_t compute(const dlattn_api *api, const struct call *call) {
    return call->backward
               ? api->backward(&call->desc, &call->tensors, &call->gradients, &call->exec)
               : api->forward(&call->desc, &call->tensors, &call->exec);
}

static int32_t choose(const dlattn_api *api, const struct call *call, dlattn_sku *sku) {
    *sku = (dlattn_sku){.struct_size = sizeof *sku};
    return call->backward ? api->backward_query(&call->desc, &call->tensors, &call->gradients, sku)
                          : api->forward_query(&call->desc, &call->tensors, sku);
}

/* Runs with a workspace of the size that the kernel asks for, from the host's heap or the caller's allocator. */
static int run_with_workspace(const dlattn_api *api, struct call *call) {
    dlattn_sku sku;
    int32_t status = choose(api, call, &sku);
    if (status != DLATTN_OK)
        return raise_status(api, status);
    const DLDevice device = call->tensors.query->device;
    const size_t alignment = sku.workspace_alignment;
    int64_t bytes = (int64_t)(sku.workspace_bytes + alignment);
    void *memory = NULL;
    TVMFFIObjectHandle tensor = NULL;
    if (on_host(device)) {
        memory = malloc((size_t)bytes);
        if (!memory)
            return raise_error("MemoryError", "workspace: no memory for %lld bytes",
                               (long long)bytes);
    } else {
        DLTensor prototype = {
            .device = device, .ndim = 1, .dtype = {kDLUInt, 8, 1}, .shape = &bytes};
        if (TVMFFIEnvTensorAlloc(&prototype, &tensor) != 0)
            return RAISED;
        const DLTensor *made = (const DLTensor *)((const char *)tensor + sizeof(TVMFFIObject));
        memory = (char *)made->data + made->byte_offset;
    }
    const uintptr_t first = ((uintptr_t)memory + alignment - 1) / alignment * alignment;
    call->exec.workspace = (char *)memory + (first - (uintptr_t)memory);
    call->exec.workspace_bytes = sku.workspace_bytes;
    status = compute(api, call);
    if (tensor)
        TVMFFIObjectDecRef(tensor);
    else
        free(memory);
    return status == DLATTN_OK ? OK : raise_status(api, status);
}

/* The table, if it has the operation, and the call; NULL with the error raised. */
static const dlattn_api *open_call(const TVMFFIAny *args, int32_t count, bool backward,
                                   struct call *call) {
    const dlattn_api *api = open_api();
    if (!api || read_call(args, count, backward, call) != OK)
        return NULL;
    if (!backward || api->abi_minor >= 1)
        return api;
    raise_error("RuntimeError", "dlattn_backward: needs ABI 1.1, the library has %u.%u",
                api->abi_major, api->abi_minor);
    return NULL;
}

static int run(const TVMFFIAny *args, int32_t count, bool backward) {
    struct call call;
    const dlattn_api *api = open_call(args, count, backward, &call);
    if (!api)
        return RAISED;
    const DLDevice device = call.tensors.query->device;
    if (!call.has_stream && !on_host(device))
        call.exec.stream = TVMFFIEnvGetStream(device.device_type, device.device_id);
    if (call.workspace && use_workspace(&call) != OK)
        return RAISED;
    int32_t status = compute(api, &call);
    if (status == DLATTN_BUFFER_TOO_SMALL && !call.workspace)
        return run_with_workspace(api, &call);
    return status == DLATTN_OK ? OK : raise_status(api, status);
}

FUNCTION(dlattn_forward) {
    (void)self, (void)result;
    return run(args, count, false);
}

FUNCTION(dlattn_backward) {
    (void)self, (void)result;
    return run(args, count, true);
}

static int query(const TVMFFIAny *args, int32_t count, bool backward, dlattn_sku *sku) {
    struct call call;
    const dlattn_api *api = open_call(args, count, backward, &call);
    if (!api)
        return RAISED;
    int32_t status = choose(api, &call, sku);
    return status == DLATTN_OK ? OK : raise_status(api, status);
}

static int return_string(const char *text, TVMFFIAny *result) {
    const TVMFFIByteArray bytes = {text, strlen(text)};
    return TVMFFIStringFromByteArray(&bytes, result);
}

static int return_kernel(const TVMFFIAny *args, int32_t count, bool backward, TVMFFIAny *result) {
    dlattn_sku sku;
    return query(args, count, backward, &sku) == OK ? return_string(sku.kernel, result) : RAISED;
}

static int return_bytes(const TVMFFIAny *args, int32_t count, bool backward, TVMFFIAny *result) {
    dlattn_sku sku;
    if (query(args, count, backward, &sku) != OK)
        return RAISED;
    *result = (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = (int64_t)sku.workspace_bytes};
    return OK;
}

FUNCTION(dlattn_kernel) {
    (void)self;
    return return_kernel(args, count, false, result);
}

FUNCTION(dlattn_workspace_bytes) {
    (void)self;
    return return_bytes(args, count, false, result);
}

FUNCTION(dlattn_backward_kernel) {
    (void)self;
    return return_kernel(args, count, true, result);
}

FUNCTION(dlattn_backward_workspace_bytes) {
    (void)self;
    return return_bytes(args, count, true, result);
}

FUNCTION(dlattn_version) {
    (void)self, (void)args, (void)count;
    const dlattn_api *api = open_api();
    return api ? return_string(api->version(), result) : RAISED;
}
