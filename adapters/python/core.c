/*
 * dlattn._core: from Python objects to one call of the plugin, for every framework that speaks
 * DLPack.
 *
 * A call costs about a microsecond: tensors are read in place (through the framework's C exchange
 * table where it has one, else through a capsule), the plan comes from a cache, and CPU workspace
 * from the thread. Python's limited API alone is used, so one file serves CPython 3.10 and all
 * later ones. All state below is guarded by the GIL, which is released while a kernel runs.
 */
#define _GNU_SOURCE /* dladdr() */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "abi/dlattn_loader.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>

static const dlattn_api *api;
static PyObject *errors; /* dlattn._errors.BY_STATUS: exception classes, indexed by status */
static PyObject *max_version_kw; /* {"max_version": (1, 3)} */
static PyObject *str_dlpack, *str_dlpack_device, *str_stream, *str_max_version;

enum { LIBRARY_NOT_FOUND = 0 }; /* status 0 is never an error, so its place in BY_STATUS is free */

static PyObject *raise(int32_t status, const char *message) {
    PyErr_SetString(PyTuple_GetItem(errors, status), message);
    return NULL;
}

/* Opens the plugin at the first use, so that the package can be imported, and asked for help,
 * without it. */
static int open_library(void) {
    char why[4096];
    if (api)
        return 0;
    api = dlattn_open(why, sizeof why);
    if (!api)
        raise(LIBRARY_NOT_FOUND, why);
    return api ? 0 : -1;
}

/* Whether the plugin has the operation, which came with ABI 1.1; else raises Unsupported. */
static int require_1_1(const char *operation) {
    char message[128];
    if (api->abi_minor >= 1)
        return 0;
    snprintf(message, sizeof message, "%s: needs ABI 1.1, the library has %u.%u", operation,
             api->abi_major, api->abi_minor);
    raise(DLATTN_UNSUPPORTED, message);
    return -1;
}

/* What is passed: by position the tensors and options of ABI 1.0, as __init__.py has them; by name what came later. */
enum {
    OUTPUT = 3,
    LSE = 4,
    SCALE = 14, /* behind the tensors */
    SOFTCAP,
    WINDOW_LEFT,
    WINDOW_RIGHT,
    CAUSAL,
    ALIGNMENT,
    MAX_SEQLEN_Q,
    MAX_SEQLEN_K,
    KERNEL,
    NUM_THREADS,
    STREAM,
    ALLOCATE,
    POSITIONAL,
    MORE_TENSORS =
        POSITIONAL, /* those of dlattn_tensors since 1.1, in its order, then the gradients */
    D_OUTPUT = MORE_TENSORS + 6,
    D_LSE,
    D_QUERY,
    D_SINKS = D_QUERY + 5,
    DROPOUT_PROBABILITY,
    DROPOUT_SEED,
    DROPOUT_OFFSET,
    DIAGONAL_OFFSET,
    BLOCK_Q,
    BLOCK_K,
    ARGUMENTS
};

static const char *const names[ARGUMENTS] = {"query",
                                             "key",
                                             "value",
                                             "output",
                                             "lse",
                                             "bias",
                                             "mask",
                                             "alibi_slopes",
                                             "sinks",
                                             "query_lengths",
                                             "key_lengths",
                                             "cu_seqlens_q",
                                             "cu_seqlens_k",
                                             "block_table",
                                             "scale",
                                             "softcap",
                                             "window_left",
                                             "window_right",
                                             "causal",
                                             "alignment",
                                             "max_seqlen_q",
                                             "max_seqlen_k",
                                             "kernel",
                                             "num_threads",
                                             "stream",
                                             "workspace",
                                             "query_segments",
                                             "key_segments",
                                             "block_mask",
                                             "query_scale",
                                             "key_scale",
                                             "value_scale",
                                             "d_output",
                                             "d_lse",
                                             "d_query",
                                             "d_key",
                                             "d_value",
                                             "d_bias",
                                             "d_alibi_slopes",
                                             "d_sinks",
                                             "dropout_probability",
                                             "dropout_seed",
                                             "dropout_offset",
                                             "diagonal_offset",
                                             "block_q",
                                             "block_k"};

/* Slots of a call: those of dlattn_tensors, then those of dlattn_gradients. */
enum {
    TENSORS = (sizeof(dlattn_tensors) - sizeof(size_t)) / sizeof(void *),
    GRADIENTS = (sizeof(dlattn_gradients) - sizeof(size_t)) / sizeof(void *),
    SLOTS = TENSORS + GRADIENTS
};
_Static_assert(SCALE + (D_SINKS + 1 - MORE_TENSORS) == SLOTS, "an argument for each slot");

static int position_of(int slot) { return slot < SCALE ? slot : slot - SCALE + MORE_TENSORS; }

static int is_written(int position) {
    return position == OUTPUT || position == LSE || (position >= D_QUERY && position <= D_SINKS);
}

/* What an argument is called that is not in the list; guarded by the GIL. */
static const char *other_name;

/* Raises InvalidArgument that begins with the argument's name; -1. */
static int refuse(int position, const char *format, ...) {
    va_list values;
    va_start(values, format);
    PyObject *what = PyUnicode_FromFormatV(format, values);
    va_end(values);
    if (what)
        PyErr_Format(PyTuple_GetItem(errors, DLATTN_INVALID_ARGUMENT), "%s: %U",
                     other_name ? other_name : names[position], what);
    Py_XDECREF(what);
    return -1;
}

/* ---- Tensors --------------------------------------------------------------------------------- */

enum { MAX_AXES = 4 };

/* An argument while a call lasts. */
struct argument {
    DLTensor tensor;
    PyObject *
        capsule; /* keeps `tensor` alive; its own destructor runs the deleter, as nobody consumes it
        */
    int64_t shape[MAX_AXES], strides[MAX_AXES]; /* of a spec */
};

/* The exchange table of a type or NULL, remembered for the few types that a program uses. */
static const DLPackExchangeAPI *exchange_of(PyTypeObject *type) {
    static struct {
        PyTypeObject *type;
        const DLPackExchangeAPI *table;
    } known[8];
    static unsigned next;
    for (int i = 0; i < 8; i++) {
        if (known[i].type == type)
            return known[i].table;
    }
    const DLPackExchangeAPIHeader *header = NULL;
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (capsule)
        header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    PyErr_Clear();
    Py_XDECREF(capsule);
    while (header && header->version.major != DLPACK_MAJOR_VERSION)
        header = header->prev_api;
    const DLPackExchangeAPI *table = (const DLPackExchangeAPI *)header;
    if (table && !table->dltensor_from_py_object_no_sync)
        table = NULL;
    Py_INCREF(type);
    Py_XDECREF(known[next].type);
    known[next].type = type;
    known[next].table = table;
    next = (next + 1) % 8;
    return table;
}

/* What a producer raises when it cannot show its memory, as InvalidArgument with the argument's name
 * and dtype; any other exception stays. */
static int refuse_export(int position, PyObject *object) {
    PyObject *kind, *error, *traceback;
    if (!PyErr_ExceptionMatches(PyExc_BufferError) && !PyErr_ExceptionMatches(PyExc_RuntimeError) &&
        !PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_ValueError))
        return -1;
    PyErr_Fetch(&kind, &error, &traceback);
    PyObject *dtype = PyObject_GetAttrString(object, "dtype");
    PyErr_Clear();
    refuse(position, "dtype is %S, its producer refuses the export: %S", dtype ? dtype : Py_None,
           error ? error : kind);
    Py_XDECREF(dtype);
    Py_XDECREF(kind);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return -1;
}

/* object.__dlpack__(max_version=..., stream=...), and the older form for those who do not know
 * max_version. */
static PyObject *export_capsule(PyObject *object, int position, PyObject *stream) {
    PyObject *capsule = NULL, *keywords = max_version_kw;
    PyObject *method = PyObject_GetAttr(object, str_dlpack);
    if (!method) {
        PyErr_Clear();
        refuse(position, "is of %S, must be an array that supports DLPack", Py_TYPE(object));
        return NULL;
    }
    PyObject *none = PyTuple_New(0);
    Py_INCREF(keywords);
    if (stream != Py_None) {
        Py_DECREF(keywords);
        keywords = PyDict_Copy(max_version_kw);
        PyDict_SetItem(keywords, str_stream, stream);
    }
    capsule = PyObject_Call(method, none, keywords);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyObject *older = PyDict_Copy(keywords);
        PyErr_Clear();
        PyDict_DelItem(older, str_max_version);
        capsule = PyObject_Call(method, none, older);
        Py_DECREF(older);
    }
    if (!capsule)
        refuse_export(position, object);
    Py_DECREF(keywords);
    Py_DECREF(method);
    Py_DECREF(none);
    return capsule;
}

/* Whether the capsule holds the object's own memory, and not a copy that the producer made on
 * another device; who names no device is believed. */
static int check_device(const struct argument *a, PyObject *object, int position) {
    int type, id;
    PyObject *device = PyObject_CallMethodObjArgs(object, str_dlpack_device, NULL);
    const int known = device && PyArg_ParseTuple(device, "ii", &type, &id);
    PyErr_Clear();
    Py_XDECREF(device);
    if (!known || (type == (int)a->tensor.device.device_type && id == a->tensor.device.device_id))
        return 0;
    return refuse(position,
                  "is on DLPack device (%d, %d), its producer hands over a copy on (%d, %d), in "
                  "which the result would be lost",
                  type, id, (int)a->tensor.device.device_type, a->tensor.device.device_id);
}

static int open_capsule(struct argument *a, PyObject *object, int position) {
    const int is_output = is_written(position);
    if (PyCapsule_IsValid(a->capsule, "dltensor")) {
        const DLManagedTensor *m = PyCapsule_GetPointer(a->capsule, "dltensor");
        a->tensor = m->dl_tensor;
        return is_output ? check_device(a, object, position) : 0;
    }
    const DLManagedTensorVersioned *m = PyCapsule_GetPointer(a->capsule, "dltensor_versioned");
    if (!m) {
        PyErr_Clear();
        return refuse(position, "the __dlpack__ of %S gives %R, must be a DLPack capsule",
                      Py_TYPE(object), a->capsule);
    }
    if (m->version.major != DLPACK_MAJOR_VERSION) {
        PyErr_Format(PyTuple_GetItem(errors, DLATTN_VERSION_MISMATCH),
                     "%s: DLPack major version is %u, dlattn reads %d", names[position],
                     m->version.major, DLPACK_MAJOR_VERSION);
        return -1;
    }
    if (is_output && m->flags & DLPACK_FLAG_BITMASK_READ_ONLY)
        return refuse(position, "is read-only");
    if (is_output && m->flags & DLPACK_FLAG_BITMASK_IS_COPIED)
        return refuse(position,
                      "its producer hands over a copy, in which the result would be lost");
    a->tensor = m->dl_tensor;
    return is_output ? check_device(a, object, position) : 0;
}

/* A tensor without data: (shape, strides, dtype code, bits, device type, device id). */
static int open_spec(struct argument *a, PyObject *spec, int position) {
    PyObject *shape, *strides;
    int code, bits, device_type, device_id;
    if (!PyArg_ParseTuple(spec, "O!O!iiii", &PyTuple_Type, &shape, &PyTuple_Type, &strides, &code,
                          &bits, &device_type, &device_id))
        return -1;
    const Py_ssize_t axes = PyTuple_Size(shape);
    if (axes > MAX_AXES || PyTuple_Size(strides) != axes)
        return refuse(position, "has %zd axes, must have at most %d", axes, MAX_AXES);
    for (Py_ssize_t i = 0; i < axes; i++) {
        a->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        a->strides[i] = PyLong_AsLongLong(PyTuple_GetItem(strides, i));
    }
    a->tensor = (DLTensor){
        .device = {(DLDeviceType)device_type, device_id},
        .ndim = (int32_t)axes,
        .dtype = {(uint8_t)code, (uint8_t)bits, 1},
        .shape = a->shape,
        .strides = a->strides,
    };
    return PyErr_Occurred() ? -1 : 0;
}

static int open_array(struct argument *a, PyObject *array, int position, PyObject *stream) {
    const DLPackExchangeAPI *exchange = exchange_of(Py_TYPE(array));
    if (exchange)
        return exchange->dltensor_from_py_object_no_sync(array, &a->tensor) == 0
                   ? 0
                   : refuse_export(position, array);
    a->capsule = export_capsule(array, position, stream);
    return a->capsule ? open_capsule(a, array, position) : -1;
}

/* (array, DLPack type code): the array's memory, whose elements are of that kind and of the array's
 * size. NumPy exports no bfloat16, but the same bits as uint16. */
static int open_retyped(struct argument *a, PyObject *pair, int position, PyObject *stream) {
    const long code = PyLong_AsLong(PyTuple_GetItem(pair, 1));
    if (PyErr_Occurred() || open_array(a, PyTuple_GetItem(pair, 0), position, stream) != 0)
        return -1;
    a->tensor.dtype.code = (uint8_t)code;
    return 0;
}

static int open_argument(struct argument *a, PyObject *object, int position, PyObject *stream) {
    if (!PyTuple_Check(object))
        return open_array(a, object, position, stream);
    return PyTuple_Size(object) == 2 ? open_retyped(a, object, position, stream)
                                     : open_spec(a, object, position);
}

static void close_arguments(struct argument *a, int count) {
    for (int i = 0; i < count; i++)
        Py_XDECREF(a[i].capsule);
}

/* ---- Options --------------------------------------------------------------------------------- */

static int read_double(double *number, PyObject *const *args, int position) {
    *number = PyFloat_AsDouble(args[position]);
    if (!PyErr_Occurred())
        return 0;
    PyErr_Clear();
    return refuse(position, "is %.80R, must be a number", args[position]);
}

static int read_int64(int64_t *integer, PyObject *const *args, int position) {
    *integer = PyLong_AsLongLong(args[position]);
    if (!PyErr_Occurred())
        return 0;
    PyErr_Clear();
    return refuse(position, "is %.80R, must be an int of at most 64 bits", args[position]);
}

static int read_int32(int32_t *integer, PyObject *const *args, int position) {
    int64_t wide;
    if (read_int64(&wide, args, position) != 0)
        return -1;
    *integer = (int32_t)wide;
    return *integer == wide
               ? 0
               : refuse(position, "is %.80R, must be an int of at most 32 bits", args[position]);
}

static int read_uint64(uint64_t *integer, PyObject *const *args, int position) {
    *integer = PyLong_AsUnsignedLongLong(args[position]);
    if (!PyErr_Occurred())
        return 0;
    PyErr_Clear();
    return refuse(position, "is %.80R, must be an int from 0 to 2^64 - 1", args[position]);
}

static int read_bool(int32_t *truth, PyObject *const *args, int position) {
    *truth = PyObject_IsTrue(args[position]);
    if (*truth >= 0)
        return 0;
    PyErr_Clear();
    return refuse(position, "is %.80R, must be True or False", args[position]);
}

/* The name of a kernel, in kernel[size]; no row's is longer. */
static int read_kernel(char *kernel, size_t size, PyObject *name) {
    char *text = NULL;
    PyObject *bytes = PyUnicode_Check(name) ? PyUnicode_AsUTF8String(name) : NULL;
    const int fits = bytes && PyBytes_AsStringAndSize(bytes, &text, NULL) == 0 && /* no NUL in it */
                     strlen(text) < size;
    if (fits)
        strcpy(kernel, text);
    Py_XDECREF(bytes);
    PyErr_Clear();
    return fits ? 0 : refuse(KERNEL, "is %.80R, must be the name of a kernel", name);
}

static int read_desc(dlattn_forward_desc *d, PyObject *const *args, char *kernel, size_t size) {
    *d = (dlattn_forward_desc){.struct_size = sizeof *d, .flags = DLATTN_WINDOW}; /* -1: no bound */
    if (args[SCALE] != Py_None) {
        d->flags |= DLATTN_EXACT_SCALE;
        if (read_double(&d->scale, args, SCALE) != 0)
            return -1;
    }
    if (args[KERNEL] != Py_None) {
        d->kernel = kernel;
        if (read_kernel(kernel, size, args[KERNEL]) != 0)
            return -1;
    }
    return read_double(&d->softcap, args, SOFTCAP) == 0 &&
                   read_int64(&d->window_left, args, WINDOW_LEFT) == 0 &&
                   read_int64(&d->window_right, args, WINDOW_RIGHT) == 0 &&
                   read_bool(&d->causal, args, CAUSAL) == 0 &&
                   read_int32(&d->alignment, args, ALIGNMENT) == 0 &&
                   read_int64(&d->max_seqlen_q, args, MAX_SEQLEN_Q) == 0 &&
                   read_int64(&d->max_seqlen_k, args, MAX_SEQLEN_K) == 0 &&
                   read_int32(&d->num_threads, args, NUM_THREADS) == 0 &&
                   read_double(&d->dropout_probability, args, DROPOUT_PROBABILITY) == 0 &&
                   read_uint64(&d->dropout_seed, args, DROPOUT_SEED) == 0 &&
                   read_uint64(&d->dropout_offset, args, DROPOUT_OFFSET) == 0 &&
                   read_int64(&d->diagonal_offset, args, DIAGONAL_OFFSET) == 0 &&
                   read_int32(&d->block_q, args, BLOCK_Q) == 0 &&
                   read_int32(&d->block_k, args, BLOCK_K) == 0
               ? 0
               : -1;
}

/* ---- Threads --------------------------------------------------------------------------------- */

/* The process's OpenMP team, PyTorch's for one. Its threads spin for a while after each parallel region, and threads of the plugin's own
 * would fight them. GOMP_parallel is libgomp's entry for compiled code; LLVM's runtime has it, too. */
static struct {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
    int (*thread)(void);
    int (*threads)(void);
    int (*most_threads)(void);
    bool counts; /* its size is that of a call which names none */
    bool runs;   /* calls, too */
} openmp;

struct team_job {
    dlattn_parallel_body body;
    void *ctx;
    int64_t count;
};

/* In a region within another the team is one thread, which then has every index. */
static void on_team(void *data) {
    const struct team_job *job = data;
    for (int64_t i = openmp.thread(); i < job->count; i += openmp.threads())
        job->body(job->ctx, i);
}

static void openmp_for(void *ctx, int64_t count, dlattn_parallel_body body, void *body_ctx) {
    struct team_job job = {body, body_ctx, count};
    (void)ctx;
    openmp.parallel(on_team, &job, (unsigned)count, 0);
}

/* The child of a fork has none of the team's threads, and libgomp does not notice. */
static void leave_openmp(void) { openmp.runs = false; }

static bool find_openmp(void) {
    *(void **)&openmp.parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    *(void **)&openmp.thread = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    *(void **)&openmp.threads = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    *(void **)&openmp.most_threads = dlsym(RTLD_DEFAULT, "omp_get_max_threads");
    return openmp.parallel && openmp.thread && openmp.threads && openmp.most_threads;
}

/* use_openmp() -> whether calls on the CPU run on the process's OpenMP team from now on. With DLATTN_NUM_THREADS they never do. */
static PyObject *use_openmp(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    if (!openmp.counts && !getenv("DLATTN_NUM_THREADS") && find_openmp())
        openmp.counts = openmp.runs = pthread_atfork(NULL, NULL, leave_openmp) == 0;
    return PyBool_FromLong(openmp.runs);
}

/* ---- Plans ----------------------------------------------------------------------------------- */

enum { CACHE = 256, KEY_WORDS = 320, KERNEL_NAME = 128 };

/* A call: its slots point into its arguments. */
struct call {
    struct argument arguments[SLOTS];
    dlattn_tensors tensors;
    dlattn_gradients gradients;
    int backward; /* whether there are gradients */
    dlattn_forward_desc desc;
    char kernel[KERNEL_NAME];
};

static const DLTensor **slot_of(struct call *c, int slot) {
    return slot < TENSORS ? (const DLTensor **)&c->tensors.query + slot
                          : (const DLTensor **)&c->gradients.d_output + slot - TENSORS;
}

struct planned {
    dlattn_plan *plan;
    size_t workspace_bytes, workspace_alignment;
    int users; /* the cache and the calls that are running */
    size_t words;
    uint64_t key[];
};

static struct planned *cache[CACHE];

static void release_plan(struct planned *p) {
    if (p && --p->users == 0) {
        api->plan_destroy(p->plan);
        free(p);
    }
}

/* Everything that a plan depends on, as words; also whether addresses are aligned, since other
 * kernels, with other workspace, take those that are not. */
static size_t make_key(uint64_t *key, struct call *c) {
    const dlattn_forward_desc *desc = &c->desc;
    dlattn_forward_desc d = *desc;
    size_t n = sizeof d / 8 + 1;
    d.kernel = NULL;
    memcpy(key, &d, sizeof d);
    key[n - 1] = 0;
    for (int i = 0; i < SLOTS; i++) {
        if (!*slot_of(c, i))
            continue;
        const DLTensor *t = &c->arguments[i].tensor;
        const uint64_t aligned = ((uintptr_t)t->data + t->byte_offset) % 16 == 0;
        const int axes = t->ndim < 0 ? 0 : t->ndim > MAX_AXES ? MAX_AXES : t->ndim;
        key[sizeof d / 8] |= UINT64_C(1) << i;
        key[n++] = (uint64_t)t->device.device_type << 32 | (uint32_t)t->device.device_id;
        key[n++] = (uint64_t)t->dtype.code << 40 | (uint64_t)t->dtype.bits << 32 |
                   (uint64_t)t->dtype.lanes << 16 | (uint64_t)(t->ndim & 0xff) << 8 | aligned << 1 |
                   (t->strides != NULL);
        for (int axis = 0; axis < axes; axis++) {
            key[n++] = (uint64_t)t->shape[axis];
            if (t->strides)
                key[n++] = (uint64_t)t->strides[axis];
        }
    }
    if (desc->kernel) {
        memset(key + n, 0, KERNEL_NAME);
        memcpy(key + n, desc->kernel, strlen(desc->kernel));
        n += KERNEL_NAME / 8;
    }
    return n;
}
_Static_assert(sizeof(dlattn_forward_desc) / 8 + 1 + SLOTS * (2 + 2 * MAX_AXES) + KERNEL_NAME / 8 <=
                   KEY_WORDS,
               "the longest key fits");

/* A plan that the caller releases, or NULL with an exception. */
static struct planned *find_plan(struct call *c) {
    uint64_t key[KEY_WORDS], hash = 0;
    const size_t words = make_key(key, c);
    for (size_t i = 0; i < words; i++)
        hash = (hash ^ key[i]) * UINT64_C(0x9e3779b97f4a7c15), hash ^= hash >> 29;
    struct planned **slot = &cache[hash % CACHE], *p = *slot;
    if (p && p->words == words && memcmp(p->key, key, words * sizeof *key) == 0) {
        p->users++;
        return p;
    }

    dlattn_plan *plan;
    dlattn_sku sku = {.struct_size = sizeof sku};
    int32_t status = c->backward
                         ? api->backward_plan_create(&c->desc, &c->tensors, &c->gradients, &plan)
                         : api->plan_create(&c->desc, &c->tensors, &plan);
    if (status != DLATTN_OK) {
        raise(status, api->last_error());
        return NULL;
    }
    api->plan_sku(plan, &sku);
    p = malloc(sizeof *p + words * sizeof *key);
    if (!p) {
        api->plan_destroy(plan);
        PyErr_NoMemory();
        return NULL;
    }
    *p = (struct planned){plan, sku.workspace_bytes, sku.workspace_alignment, 2, words};
    memcpy(p->key, key, words * sizeof *key);
    release_plan(*slot);
    *slot = p;
    return p;
}

/* ---- Workspace ------------------------------------------------------------------------------- */

struct scratch {
    size_t bytes;
    void *memory;
};

static pthread_key_t scratch_key;

static void free_scratch(void *scratch) {
    free(((struct scratch *)scratch)->memory);
    free(scratch);
}

/* CPU workspace of this thread, which grows and lives as long as the thread. */
static void *thread_workspace(size_t bytes) {
    struct scratch *s = pthread_getspecific(scratch_key);
    if (!s) {
        s = calloc(1, sizeof *s);
        if (!s || pthread_setspecific(scratch_key, s) != 0)
            return PyErr_NoMemory();
    }
    if (s->bytes < bytes) {
        free(s->memory);
        s->bytes = (bytes + 4095) / 4096 * 4096;
        s->memory = aligned_alloc(4096, s->bytes);
        if (!s->memory) {
            s->bytes = 0;
            return PyErr_NoMemory();
        }
    }
    return s->memory;
}

/* GPU workspace from the framework's own allocator, which knows when the stream is done with it. */
static void *device_workspace(size_t bytes, PyObject *const *args, PyObject **owner) {
    struct argument a = {0};
    *owner = PyObject_CallFunction(args[ALLOCATE], "On", args[0], (Py_ssize_t)bytes);
    if (!*owner || open_argument(&a, *owner, ALLOCATE, args[STREAM]) != 0)
        return NULL;
    Py_XDECREF(a.capsule);
    return (char *)a.tensor.data + a.tensor.byte_offset;
}

/* ---- Calls ----------------------------------------------------------------------------------- */

/* `args`: every argument, None or 0 for those that the caller left out. */
static int open_call(struct call *c, PyObject *const *args) {
    memset(c->arguments, 0, sizeof c->arguments);
    c->tensors = (dlattn_tensors){.struct_size = sizeof c->tensors};
    c->gradients = (dlattn_gradients){.struct_size = sizeof c->gradients};
    c->backward = args[D_OUTPUT] != Py_None;
    if (open_library() != 0 || (c->backward && require_1_1("backward") != 0) ||
        read_desc(&c->desc, args, c->kernel, sizeof c->kernel) != 0)
        return -1;
    if (openmp.counts && c->desc.num_threads == 0)
        c->desc.num_threads = openmp.most_threads();
    for (int slot = 0; slot < SLOTS; slot++) {
        const int position = position_of(slot);
        if (args[position] == Py_None)
            continue;
        if (open_argument(&c->arguments[slot], args[position], position, args[STREAM]) != 0)
            return -1;
        *slot_of(c, slot) = &c->arguments[slot].tensor;
    }
    return 0;
}

/* The stream that the caller names, else the framework's current one, else the legacy default
 * stream. */
static int find_stream(void **stream, const DLTensor *query, PyObject *const *args) {
    *stream = NULL;
    if (args[STREAM] != Py_None) {
        *stream = PyLong_AsVoidPtr(args[STREAM]);
        if (!PyErr_Occurred())
            return 0;
        PyErr_Clear();
        return refuse(STREAM, "is %.80R, must be a CUstream as an int", args[STREAM]);
    }
    const DLPackExchangeAPI *exchange = exchange_of(Py_TYPE(args[0]));
    if (!exchange)
        return 0;
    return exchange->current_work_stream(query->device.device_type, query->device.device_id,
                                         stream);
}

static int run(struct call *c, PyObject *const *args, struct planned *p, PyObject **owner) {
    dlattn_exec exec = {.struct_size = sizeof exec, .workspace_bytes = p->workspace_bytes};
    const DLTensor *query = &c->arguments[0].tensor;
    const int on_gpu =
        query->device.device_type == kDLCUDA || query->device.device_type == kDLCUDAManaged;
    if (on_gpu && find_stream(&exec.stream, query, args) != 0)
        return -1;
    if (p->workspace_bytes > 0) {
        exec.workspace = on_gpu ? device_workspace(p->workspace_bytes, args, owner)
                                : thread_workspace(p->workspace_bytes);
        if (!exec.workspace)
            return -1;
    }
    if (openmp.runs)
        exec.parallel_for = openmp_for;
    int32_t status;
    Py_BEGIN_ALLOW_THREADS;
    status = c->backward ? api->backward_plan_run(p->plan, &c->tensors, &c->gradients, &exec)
                         : api->plan_run(p->plan, &c->tensors, &exec);
    Py_END_ALLOW_THREADS;
    if (status != DLATTN_OK)
        raise(status, api->last_error());
    return status == DLATTN_OK ? 0 : -1;
}

/* Plans and computes a call that has been opened. */
static int compute(struct call *c, PyObject *const *args) {
    PyObject *owner = NULL;
    struct planned *p = find_plan(c);
    const int status = p ? run(c, args, p, &owner) : -1;
    release_plan(p);
    Py_XDECREF(owner);
    return status;
}

static PyObject *defaults[ARGUMENTS];

/* Brings what a function got into args[ARGUMENTS]. */
static int read_arguments(PyObject **args, PyObject *const *given, Py_ssize_t count,
                          PyObject *keywords) {
    const Py_ssize_t named = keywords ? PyTuple_Size(keywords) : 0;
    memcpy(args, defaults, ARGUMENTS * sizeof *args);
    if (count != POSITIONAL) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, must be %d", count, POSITIONAL);
        return -1;
    }
    memcpy(args, given, POSITIONAL * sizeof *args);
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *name = PyTuple_GetItem(keywords, i);
        int position = POSITIONAL;
        while (position < ARGUMENTS && PyUnicode_CompareWithASCIIString(name, names[position]) != 0)
            position++;
        if (position == ARGUMENTS) {
            PyErr_Format(PyExc_TypeError, "there is no argument %R", name);
            return -1;
        }
        args[position] = given[count + i];
    }
    return 0;
}

/* forward(query, ..., allocate, **more): computes into output and lse; with d_output into the gradients. */
static PyObject *forward(PyObject *self, PyObject *const *given, Py_ssize_t count,
                         PyObject *keywords) {
    struct call c;
    PyObject *args[ARGUMENTS];
    (void)self;
    if (read_arguments(args, given, count, keywords) != 0)
        return NULL;
    int status = open_call(&c, args);
    if (status == 0)
        status = compute(&c, args);
    close_arguments(c.arguments, SLOTS);
    if (status != 0)
        return NULL;
    Py_RETURN_NONE;
}

/* query(query, ..., allocate, **more) -> what forward() would use; reads no data, so that tensors may be
 * specs. */
static PyObject *query(PyObject *self, PyObject *const *given, Py_ssize_t count,
                       PyObject *keywords) {
    struct call c;
    PyObject *args[ARGUMENTS];
    dlattn_sku s = {.struct_size = sizeof s};
    (void)self;
    if (read_arguments(args, given, count, keywords) != 0)
        return NULL;
    int status = open_call(&c, args);
    if (status == 0) {
        const int32_t answer = c.backward
                                   ? api->backward_query(&c.desc, &c.tensors, &c.gradients, &s)
                                   : api->forward_query(&c.desc, &c.tensors, &s);
        if (answer != DLATTN_OK)
            raise(answer, api->last_error());
        status = answer == DLATTN_OK ? 0 : -1;
    }
    close_arguments(c.arguments, SLOTS);
    if (status != 0)
        return NULL;
    return Py_BuildValue("sssssKnnNNNiiiiN", s.kernel, s.backend, s.arch, s.math, s.accumulator,
                         (unsigned long long)s.features, (Py_ssize_t)s.workspace_bytes,
                         (Py_ssize_t)s.workspace_alignment, PyBool_FromLong(s.contiguous),
                         PyBool_FromLong(s.deterministic), PyBool_FromLong(s.bit_stable), s.tile_q,
                         s.tile_k, s.num_splits, s.num_threads,
                         PyBool_FromLong((s.flags & DLATTN_KERNEL_REFERENCE) != 0));
}

/* ---- Merge and append ------------------------------------------------------------------------ */

/* Arrays by name, for messages and to be kept while a call lasts. */
struct arrays {
    struct argument *arguments;
    int count;
};

static const DLTensor *open_named(struct arrays *held, PyObject *object, const char *name,
                                  int written) {
    struct argument *a = &held->arguments[held->count];
    if (object == Py_None)
        return NULL;
    other_name = name;
    const int status = open_argument(a, object, written ? OUTPUT : 0, Py_None);
    other_name = NULL;
    if (status != 0)
        return NULL;
    held->count++;
    return &a->tensor;
}

/* The workspace and the stream of a call on `first`'s device, whose owner the caller releases. */
static int open_exec(dlattn_exec *exec, const dlattn_sku *sku, const DLTensor *first,
                     PyObject *array, PyObject *stream, PyObject *allocate, PyObject **owner) {
    PyObject *args[ARGUMENTS];
    const int on_gpu =
        first->device.device_type == kDLCUDA || first->device.device_type == kDLCUDAManaged;
    memcpy(args, defaults, sizeof args);
    args[0] = array;
    args[STREAM] = stream;
    args[ALLOCATE] = allocate;
    *exec = (dlattn_exec){.struct_size = sizeof *exec,
                          .workspace_bytes = sku->workspace_bytes,
                          .parallel_for = openmp.runs ? openmp_for : NULL};
    if (on_gpu && find_stream(&exec->stream, first, args) != 0)
        return -1;
    if (sku->workspace_bytes == 0)
        return 0;
    exec->workspace = on_gpu ? device_workspace(sku->workspace_bytes, args, owner)
                             : thread_workspace(sku->workspace_bytes);
    return exec->workspace ? 0 : -1;
}

static int answer(int32_t status) {
    if (status != DLATTN_OK && !PyErr_Occurred())
        raise(status, api->last_error());
    return status == DLATTN_OK ? 0 : -1;
}

/* Opens the arrays of a tuple into list[count]. */
static int open_list(struct arrays *held, PyObject *tuple, const char *name,
                     const DLTensor **list) {
    char text[32];
    for (Py_ssize_t n = 0; n < PyTuple_Size(tuple); n++) {
        snprintf(text, sizeof text, "%s[%zd]", name, n);
        list[n] = open_named(held, PyTuple_GetItem(tuple, n), text, 0);
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

static int run_merge(struct arrays *held, const DLTensor **lists, PyObject *const *given) {
    const Py_ssize_t count = PyTuple_Size(given[0]);
    dlattn_partials partials = {
        .struct_size = sizeof partials, .count = count, .outputs = lists, .lses = lists + count};
    dlattn_sku sku = {.struct_size = sizeof sku};
    dlattn_exec exec;
    PyObject *owner = NULL;
    int32_t status = DLATTN_INTERNAL;
    if (open_list(held, given[0], "outputs", lists) != 0 ||
        open_list(held, given[1], "lses", lists + count) != 0)
        return -1;
    partials.output = open_named(held, given[2], "output", 1);
    partials.lse = PyErr_Occurred() ? NULL : open_named(held, given[3], "lse", 1);
    if (PyErr_Occurred() || answer(api->merge_query(&partials, &sku)) != 0)
        return -1;
    if (open_exec(&exec, &sku, partials.output, given[2], given[4], given[5], &owner) == 0) {
        Py_BEGIN_ALLOW_THREADS;
        status = api->merge(&partials, &exec);
        Py_END_ALLOW_THREADS;
    }
    Py_XDECREF(owner);
    return answer(status);
}

/* merge(outputs, lses, output, lse or None, stream, allocate); the first two are tuples of one length. */
static PyObject *merge(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    (void)self;
    if (count != 6 || !PyTuple_Check(given[0]) || !PyTuple_Check(given[1]) ||
        PyTuple_Size(given[0]) != PyTuple_Size(given[1]))
        return PyErr_Format(PyExc_TypeError, "merge: 6 arguments, the first two tuples alike");
    if (open_library() != 0 || require_1_1("merge") != 0)
        return NULL;
    const size_t parts = (size_t)PyTuple_Size(given[0]);
    struct arrays held = {calloc(2 * parts + 2, sizeof *held.arguments), 0};
    const DLTensor **lists = calloc(2 * parts + 1, sizeof *lists);
    int status = -1;
    if (held.arguments && lists)
        status = run_merge(&held, lists, given);
    else
        PyErr_NoMemory();
    close_arguments(held.arguments, held.count);
    free(held.arguments);
    free(lists);
    if (status != 0)
        return NULL;
    Py_RETURN_NONE;
}

/* append(the ten tensors of dlattn_append_tensors or None, stream, allocate). */
static PyObject *append(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    enum { APPENDED = 10, KEY_CACHE = 2, VALUE_CACHE = 3 };
    static const char *const of[APPENDED] = {
        "key",         "value",      "key_cache",   "value_cache", "cache_lengths",
        "new_lengths", "cu_seqlens", "block_table", "key_scale",   "value_scale"};
    struct argument arguments[APPENDED] = {0};
    struct arrays held = {arguments, 0};
    dlattn_append_tensors t = {.struct_size = sizeof t};
    const DLTensor **slots = (const DLTensor **)&t.key;
    dlattn_sku sku = {.struct_size = sizeof sku};
    dlattn_exec exec;
    PyObject *owner = NULL;
    int32_t status = DLATTN_INTERNAL;
    (void)self;
    if (count != APPENDED + 2)
        return PyErr_Format(PyExc_TypeError, "append: %zd arguments", count);
    if (open_library() != 0 || require_1_1("append") != 0)
        return NULL;
    for (int i = 0; i < APPENDED && !PyErr_Occurred(); i++)
        slots[i] = open_named(&held, given[i], of[i], i == KEY_CACHE || i == VALUE_CACHE);
    if (!PyErr_Occurred() && answer(api->append_query(&t, &sku)) == 0 &&
        open_exec(&exec, &sku, t.key_cache, given[KEY_CACHE], given[APPENDED], given[APPENDED + 1],
                  &owner) == 0) {
        Py_BEGIN_ALLOW_THREADS;
        status = api->append(&t, &exec);
        Py_END_ALLOW_THREADS;
    }
    Py_XDECREF(owner);
    close_arguments(arguments, held.count);
    if (answer(status) != 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---- PyTorch's common case ------------------------------------------------------------------- */

/* What of PyTorch is_plain() and plain() ask, as dlattn.torch has named it. */
static struct {
    PyObject *tensor, *parameter; /* the types of tensors that stand for no others */
    /* Transforms, modes and tracers, which see every call of this thread, are dispatch keys; the
     * two quiet sets have none of them. */
    PyObject *keys_of_thread, *quiet_keys, *quiet_inference_keys;
    PyObject *has_function_mode;
    PyObject *forward_ad, *level;           /* not below 0 where tensors may have tangents */
    PyObject *is_casting;                   /* by autocast */
    PyObject *is_recording, *requires_grad; /* whether a tensor's gradient is recorded */
    PyObject *is_negated;                   /* whether its memory holds the negative */
    PyObject *empty_like;
} torch;

/* bind_torch(...): the members of `torch`, in their order. */
static PyObject *bind_torch(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    PyObject **members = (PyObject **)&torch;
    (void)self;
    if (count != sizeof torch / sizeof *members)
        return PyErr_Format(PyExc_TypeError, "bind_torch: %zd arguments", count);
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_INCREF(args[i]);
        Py_XDECREF(members[i]);
        members[i] = args[i];
    }
    Py_RETURN_NONE;
}

/* Whether that object, which is given away, is true; an error is. */
static int is_true(PyObject *object) {
    const int truth = object ? PyObject_IsTrue(object) : -1;
    Py_XDECREF(object);
    PyErr_Clear();
    return truth != 0;
}

static int is_level_open(void) {
    PyObject *level = PyObject_GetAttr(torch.forward_ad, torch.level);
    const int is_open = !level || PyLong_AsLong(level) >= 0;
    Py_XDECREF(level);
    PyErr_Clear();
    return is_open;
}

/* Whether PyTorch has something on this thread that must see every call. */
static int is_watched(void) {
    PyObject *keys = PyObject_CallNoArgs(torch.keys_of_thread);
    const int is_quiet =
        keys && (PyObject_RichCompareBool(keys, torch.quiet_keys, Py_EQ) == 1 ||
                 PyObject_RichCompareBool(keys, torch.quiet_inference_keys, Py_EQ) == 1);
    Py_XDECREF(keys);
    PyErr_Clear();
    return !is_quiet || is_level_open() || is_true(PyObject_CallNoArgs(torch.has_function_mode));
}

/* Whether these tensors, some of which may be None, are what their memory says and want no
 * gradient. */
static int are_plain(PyObject *const *tensors, Py_ssize_t count) {
    const int recording = is_true(PyObject_CallNoArgs(torch.is_recording));
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *x = tensors[i], *type = (PyObject *)Py_TYPE(x);
        if (x == Py_None)
            continue;
        if ((type != torch.tensor && type != torch.parameter) ||
            (recording && is_true(PyObject_GetAttr(x, torch.requires_grad))) ||
            is_true(PyObject_CallFunctionObjArgs(torch.is_negated, x, NULL)))
            return 0;
    }
    return 1;
}

/* Whether a tensor has memory, which those of meta, sparse, nested and other layouts, wrappers and
 * zeros that are nowhere have not. Before PyTorch 2.10, which has no exchange table, that shows
 * later. */
static int has_memory(PyObject *object) {
    const DLPackExchangeAPI *exchange = exchange_of(Py_TYPE(object));
    DLTensor t = {0};
    if (!exchange)
        return 1;
    if (exchange->dltensor_from_py_object_no_sync(object, &t) != 0) {
        PyErr_Clear();
        return 0;
    }
    int64_t elements = 1;
    for (int axis = 0; axis < t.ndim; axis++)
        elements = t.shape[axis] ? elements : 0;
    return t.data || !elements;
}

/* is_plain(tensor or None, ...) -> whether nobody watches a call with these. */
static PyObject *is_plain(PyObject *self, PyObject *const *tensors, Py_ssize_t count) {
    int plain = are_plain(tensors, count) && !is_watched();
    (void)self;
    for (Py_ssize_t i = 0; i < count && plain; i++)
        plain = tensors[i] == Py_None || has_memory(tensors[i]);
    return PyBool_FromLong(plain);
}

/* Whether None, a float or an int: anything else, as a tensor, may have a gradient. */
static int is_number(PyObject *scale) {
    return scale == Py_None || PyFloat_Check(scale) || PyLong_Check(scale);
}

/* The output of [B, H, L, D] tensors whose output is like the query; NULL without an exception if
 * they are others. */
static PyObject *output_like_query(const struct call *c, PyObject *query, int any_heads) {
    const DLTensor *q = &c->arguments[0].tensor, *k = &c->arguments[1].tensor,
                   *v = &c->arguments[2].tensor;
    if (q->ndim != 4 || k->ndim != 4 || v->ndim != 4 || q->shape[3] != v->shape[3] ||
        (q->shape[1] != k->shape[1] && k->shape[1] != 1 && !any_heads))
        return NULL;
    return PyObject_CallFunctionObjArgs(torch.empty_like, query, NULL);
}

/* plain(query, key, value, scale, causal, any_heads) -> the output; or None where dlattn.torch must
 * look closer: somebody watches, the output is not like the query, or an error is to be said. Half
 * the steps that the same takes in Python, which on tiny problems are a third of the time. */
static PyObject *plain(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    struct call c;
    PyObject *args[ARGUMENTS], *output = NULL;
    int status = -1;
    (void)self;
    if (count != 6)
        return PyErr_Format(PyExc_TypeError, "plain: %zd arguments, must be 6", count);
    if (!are_plain(given, OUTPUT) || !exchange_of(Py_TYPE(given[0])) || !is_number(given[3]) ||
        is_true(PyObject_CallNoArgs(torch.is_casting)) || is_watched())
        Py_RETURN_NONE;
    memcpy(args, defaults, sizeof args);
    memcpy(args, given, OUTPUT * sizeof *args);
    args[SCALE] = given[3];
    args[CAUSAL] = given[4];
    if (open_call(&c, args) == 0)
        output = output_like_query(&c, given[0], PyObject_IsTrue(given[5]) == 1);
    if (output && open_argument(&c.arguments[OUTPUT], output, OUTPUT, Py_None) == 0) {
        c.tensors.output = &c.arguments[OUTPUT].tensor;
        status = compute(&c, args);
    }
    close_arguments(c.arguments, SLOTS);
    if (status == 0)
        return output;
    Py_XDECREF(output);
    PyErr_Clear();
    Py_RETURN_NONE;
}

/* ---- Listings -------------------------------------------------------------------------------- */

/* library() -> (path, version, (abi major, abi minor)) of the plugin that is in use. */
static PyObject *library(PyObject *self, PyObject *none) {
    Dl_info info = {0};
    (void)self, (void)none;
    if (open_library() != 0)
        return NULL;
    dladdr(api, &info);
    return Py_BuildValue("ss(II)", info.dli_fname ? info.dli_fname : "", api->version(),
                         api->abi_major, api->abi_minor);
}

/* kernels() -> one tuple for each row of the table, best first. */
static PyObject *kernels(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    PyObject *rows = open_library() == 0 ? PyList_New(0) : NULL;
    for (int32_t i = 0; rows && i < api->kernel_count(); i++) {
        dlattn_kernel_info k = {.struct_size = sizeof k};
        api->kernel_info(i, &k);
        PyObject *row = Py_BuildValue("sssssKiiN", k.name, k.operation, k.backend, k.arch, k.dtypes,
                                      (unsigned long long)k.features, k.max_head_dim,
                                      k.max_head_dim_v, PyBool_FromLong(k.available));
        if (!row || PyList_Append(rows, row) != 0)
            Py_CLEAR(rows);
        Py_XDECREF(row);
    }
    return rows;
}

/* devices() -> (device type, id, name, arch, multiprocessors) of each; the CPU is the first. */
static PyObject *devices(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    PyObject *rows = open_library() == 0 ? PyList_New(0) : NULL;
    for (int32_t i = 0; rows && i < api->device_count(); i++) {
        dlattn_device_info d = {.struct_size = sizeof d};
        api->device_info(i, &d);
        PyObject *row =
            Py_BuildValue("iissi", d.device_type, d.device_id, d.name, d.arch, d.multiprocessors);
        if (!row || PyList_Append(rows, row) != 0)
            Py_CLEAR(rows);
        Py_XDECREF(row);
    }
    return rows;
}

/* bind_errors(classes): the exceptions by status, before anything else is called. */
static PyObject *bind_errors(PyObject *self, PyObject *classes) {
    (void)self;
    errors = Py_NewRef(classes);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"query", (PyCFunction)(void (*)(void))query, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"merge", (PyCFunction)(void (*)(void))merge, METH_FASTCALL, NULL},
    {"append", (PyCFunction)(void (*)(void))append, METH_FASTCALL, NULL},
    {"bind_torch", (PyCFunction)(void (*)(void))bind_torch, METH_FASTCALL, NULL},
    {"is_plain", (PyCFunction)(void (*)(void))is_plain, METH_FASTCALL, NULL},
    {"plain", (PyCFunction)(void (*)(void))plain, METH_FASTCALL, NULL},
    {"use_openmp", use_openmp, METH_NOARGS, NULL},
    {"library", library, METH_NOARGS, NULL},
    {"kernels", kernels, METH_NOARGS, NULL},
    {"devices", devices, METH_NOARGS, NULL},
    {"bind_errors", bind_errors, METH_O, NULL},
    {0},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "dlattn._core", .m_size = -1,
                                    .m_methods = methods};

PyMODINIT_FUNC PyInit__core(void); /* Python looks for it by this name */
PyMODINIT_FUNC PyInit__core(void) {
    str_dlpack = PyUnicode_InternFromString("__dlpack__");
    str_dlpack_device = PyUnicode_InternFromString("__dlpack_device__");
    str_stream = PyUnicode_InternFromString("stream");
    str_max_version = PyUnicode_InternFromString("max_version");
    max_version_kw =
        Py_BuildValue("{s(ii)}", "max_version", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
    for (int i = 0; i < ARGUMENTS; i++) {
        const int is_count = i == CAUSAL || i == ALIGNMENT || i == NUM_THREADS ||
                             i == MAX_SEQLEN_Q || i == MAX_SEQLEN_K || i > DROPOUT_PROBABILITY;
        defaults[i] = i == SOFTCAP || i == DROPOUT_PROBABILITY ? PyFloat_FromDouble(0)
                      : i == WINDOW_LEFT || i == WINDOW_RIGHT  ? PyLong_FromLong(-1)
                      : is_count                               ? PyLong_FromLong(0)
                                                               : Py_NewRef(Py_None);
    }
    if (!max_version_kw)
        return NULL;
    if (pthread_key_create(&scratch_key, free_scratch) != 0)
        return PyErr_NoMemory();
    return PyModule_Create(&module);
}
