#include "src/cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The driver's API, as documented in cuda.h ---------------------------------------------------------------- */

typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;
typedef struct CUstream_st *CUstream;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_NO_DEVICE = 100,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9,
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
    CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2,
    CU_POINTER_ATTRIBUTE_IS_MANAGED = 8,
    CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9,
    CU_MEMORYTYPE_DEVICE = 2,
    CU_STREAM_CAPTURE_MODE_RELAXED = 2,
    CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT64 = 8,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3,
};

/* CUlaunchAttribute */
struct launch_attribute {
    int id;
    int padding;
    int value[16]; /* a union of what attributes need */
};

/* CUlaunchConfig */
struct launch_config {
    unsigned grid[3], block[3];
    unsigned shared_bytes;
    CUstream stream;
    struct launch_attribute *attributes;
    unsigned attribute_count;
};

/* What is used of it: result, name, parameters. */
#define DRIVER_FUNCTIONS(F)                                                                        \
    F(cuInit, (unsigned flags))                                                                    \
    F(cuGetErrorName, (CUresult error, const char **text))                                         \
    F(cuGetErrorString, (CUresult error, const char **text))                                       \
    F(cuDeviceGetCount, (int *count))                                                              \
    F(cuDeviceGet, (CUdevice * device, int ordinal))                                               \
    F(cuDeviceGetName, (char *name, int length, CUdevice device))                                  \
    F(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device))                          \
    F(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                            \
    F(cuCtxGetCurrent, (CUcontext * context))                                                      \
    F(cuCtxGetDevice, (CUdevice * device, CUcontext context))                                      \
    F(cuCtxPushCurrent, (CUcontext context))                                                       \
    F(cuCtxPopCurrent, (CUcontext * context))                                                      \
    F(cuLibraryLoadData,                                                                           \
      (CUlibrary * library, const void *image, int *jit_options, void **jit_values,                \
       unsigned jit_count, int *options, void **values, unsigned count))                           \
    F(cuLibraryGetKernel, (CUkernel * kernel, CUlibrary library, const char *name))                \
    F(cuKernelSetAttribute, (int attribute, int value, CUkernel kernel, CUdevice device))          \
    F(cuLaunchKernelEx,                                                                            \
      (const struct launch_config *config, CUkernel function, void **parameters, void **extra))    \
    F(cuPointerGetAttributes, (unsigned count, int *attributes, void **values, uint64_t pointer))  \
    F(cuStreamSynchronize, (CUstream stream))                                                      \
    F(cuMemsetD8Async, (uint64_t address, unsigned char value, size_t count, CUstream stream))     \
    F(cuThreadExchangeStreamCaptureMode, (int *mode))                                              \
    F(cuTensorMapEncodeTiled,                                                                      \
      (void *map, int type, uint32_t rank, void *address, const uint64_t *extent,                  \
       const uint64_t *stride, const uint32_t *box, const uint32_t *element_stride,                \
       int interleave, int swizzle, int l2_promotion, int fill))

static struct {
#define MEMBER(name, parameters) CUresult(*name) parameters;
    DRIVER_FUNCTIONS(MEMBER)
#undef MEMBER
} cu;

/* ---- Opening it, once ----------------------------------------------------------------------------------------- */

/* The first driver that takes the embedded code: third_party/cuda/image.bzl. Blackwell has none before 570. */
enum { NEEDED_VERSION = 12000 };

struct device {
    CUdevice handle;
    struct caps caps; /* the GPU part */
    int arch;         /* which of archs[] */
    _Atomic(CUcontext) primary;
};

static struct device devices[CUDA_MAX_DEVICES];
static int device_total;
static int driver_version;            /* 13000 is CUDA 13.0's */
static int32_t archs[CUDA_MAX_ARCHS]; /* compute capabilities of this machine, zeroes at the end */
static char why_not[256];             /* why there is no GPU */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t slow_path = PTHREAD_MUTEX_INITIALIZER;

static int32_t driver_failed(CUresult error, const char *call) {
    const char *name = NULL, *text = NULL;
    if (cu.cuGetErrorName(error, &name) != CUDA_SUCCESS ||
        cu.cuGetErrorString(error, &text) != CUDA_SUCCESS)
        return fail(DLATTN_DEVICE_ERROR, "%s: CUDA error %d", call, error);
    return fail(DLATTN_DEVICE_ERROR, "%s: %s: %s", call, name, text);
}

#define TRY(function, ...)                                                                         \
    do {                                                                                           \
        const CUresult error_ = cu.function(__VA_ARGS__);                                          \
        if (error_ != CUDA_SUCCESS)                                                                \
            return driver_failed(error_, #function);                                               \
    } while (0)

/* The versions of the functions that CUDA 12.0 defines, whatever newer ones the driver has. */
static bool find_functions(void *library) {
    CUresult (*version)(int *) = NULL;
    CUresult (*find)(const char *, void **, int, uint64_t, int *) = NULL;
    *(void **)&version = dlsym(library, "cuDriverGetVersion");
    *(void **)&find = dlsym(library, "cuGetProcAddress_v2");
    if (!version || version(&driver_version) != CUDA_SUCCESS || driver_version < NEEDED_VERSION ||
        !find) {
        snprintf(why_not, sizeof why_not,
                 "the CUDA driver is too old: it serves CUDA %d.%d, needed is %d.%d (driver 525 or "
                 "newer)",
                 driver_version / 1000, driver_version % 1000 / 10, NEEDED_VERSION / 1000,
                 NEEDED_VERSION % 1000 / 10);
        return false;
    }
#define FIND(name, parameters)                                                                     \
    if (find(#name, (void **)&cu.name, NEEDED_VERSION, 0, NULL) != CUDA_SUCCESS || !cu.name) {     \
        snprintf(why_not, sizeof why_not, "the CUDA driver has no function %s", #name);            \
        return false;                                                                              \
    }
    DRIVER_FUNCTIONS(FIND)
#undef FIND
    return true;
}

/* Finds or adds a compute capability; false if there are too many. */
static bool find_arch(struct device *d) {
    for (d->arch = 0; d->arch < CUDA_MAX_ARCHS; d->arch++) {
        if (archs[d->arch] == 0)
            archs[d->arch] = d->caps.sm;
        if (archs[d->arch] == d->caps.sm)
            return true;
    }
    return false;
}

static bool read_device(struct device *d, int ordinal) {
    int major, minor, multiprocessors, shared;
    if (cu.cuDeviceGet(&d->handle, ordinal) != CUDA_SUCCESS ||
        cu.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, d->handle) !=
            CUDA_SUCCESS ||
        cu.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, d->handle) !=
            CUDA_SUCCESS ||
        cu.cuDeviceGetAttribute(&multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                                d->handle) != CUDA_SUCCESS ||
        cu.cuDeviceGetAttribute(&shared, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                                d->handle) != CUDA_SUCCESS)
        return false;
    d->caps.sm = major * 10 + minor;
    d->caps.multiprocessors = multiprocessors;
    d->caps.shared_memory_bytes = shared;
    return find_arch(d);
}

static void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why_not, sizeof why_not, "no CUDA driver: %s", dlerror());
        return;
    }
    if (!find_functions(library))
        return;
    int found = 0;
    CUresult error = cu.cuInit(0);
    if (error == CUDA_SUCCESS)
        error = cu.cuDeviceGetCount(&found);
    if (error != CUDA_SUCCESS || found == 0) {
        const char *text = "no device";
        if (error != CUDA_SUCCESS)
            cu.cuGetErrorString(error, &text);
        snprintf(why_not, sizeof why_not, "the CUDA driver finds no GPU: %s", text);
        return;
    }
    for (int i = 0; i < found && i < CUDA_MAX_DEVICES && read_device(&devices[i], i); i++)
        device_total = i + 1;
}

static int32_t open_device(struct device **d, int32_t ordinal) {
    pthread_once(&once, open_driver);
    if (device_total == 0)
        return fail(DLATTN_DEVICE_UNAVAILABLE, "CUDA device %d: %s", ordinal, why_not);
    if (ordinal < 0 || ordinal >= device_total)
        return fail(DLATTN_DEVICE_UNAVAILABLE, "CUDA device %d: this machine has %d", ordinal,
                    device_total);
    *d = &devices[ordinal];
    return DLATTN_OK;
}

/* ---- Devices -------------------------------------------------------------------------------------------------- */

int32_t cuda_device_count(void) {
    pthread_once(&once, open_driver);
    return device_total;
}

int32_t cuda_caps(struct caps *caps, int32_t device) {
    struct device *d;
    const int32_t status = open_device(&d, device);
    if (status != DLATTN_OK)
        return status;
    caps->sm = d->caps.sm;
    caps->multiprocessors = d->caps.multiprocessors;
    caps->shared_memory_bytes = d->caps.shared_memory_bytes;
    return DLATTN_OK;
}

int32_t cuda_describe(int32_t device, dlattn_device_info *info) {
    struct device *d;
    const int32_t status = open_device(&d, device);
    if (status != DLATTN_OK)
        return status;
    TRY(cuDeviceGetName, info->name, sizeof info->name, d->handle);
    snprintf(info->arch, sizeof info->arch, "sm_%d", d->caps.sm);
    info->device_type = kDLCUDA;
    info->device_id = device;
    info->multiprocessors = d->caps.multiprocessors;
    info->shared_memory_bytes = d->caps.shared_memory_bytes;
    return DLATTN_OK;
}

/* ---- Pointers ------------------------------------------------------------------------------------------------- */

static int32_t check_pointer(const char *name, const void *data, int32_t device) {
    unsigned type = 0;
    int managed = 0, ordinal = -1;
    int attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED,
                        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL};
    void *values[] = {&type, &managed, &ordinal};
    /* For memory that CUDA does not know this succeeds and leaves the type 0. */
    TRY(cuPointerGetAttributes, 3, attributes, values, (uint64_t)(uintptr_t)data);
    if (managed)
        return DLATTN_OK;
    if (type != CU_MEMORYTYPE_DEVICE)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "%s: %p is host memory, the tensor says CUDA device %d", name, data, device);
    if (ordinal != device)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "%s: %p is memory of CUDA device %d, the tensor says device %d", name, data,
                    ordinal, device);
    return DLATTN_OK;
}

static int32_t check_view(void *ctx, const char *name, const struct view *view) {
    const struct problem *p = *(const struct problem *const *)ctx;
    /* Without elements the address may be anything. */
    const bool empty = (view == &p->key || view == &p->value) && p->batch * p->len_k == 0;
    return empty ? DLATTN_OK : check_pointer(name, view->data, p->device_id);
}

int32_t cuda_check_pointers(const struct problem *p, const void *workspace) {
    const int32_t status = problem_visit(p, check_view, &p);
    return status == DLATTN_OK && workspace ? check_pointer("workspace", workspace, p->device_id)
                                            : status;
}

/* ---- Launching ------------------------------------------------------------------------------------------------ */

int32_t cuda_enter(int32_t device, bool *entered) {
    CUcontext context = NULL;
    CUdevice current;
    struct device *d;
    *entered = false;
    const int32_t status = open_device(&d, device);
    if (status != DLATTN_OK)
        return status;
    TRY(cuCtxGetCurrent, &context);
    if (context) {
        TRY(cuCtxGetDevice, &current, context);
        if (current == d->handle)
            return DLATTN_OK;
    }
    context = atomic_load_explicit(&d->primary, memory_order_acquire);
    if (!context) { /* kept for the life of the process: a race costs one more reference */
        TRY(cuDevicePrimaryCtxRetain, &context, d->handle);
        atomic_store_explicit(&d->primary, context, memory_order_release);
    }
    TRY(cuCtxPushCurrent, context);
    *entered = true;
    return DLATTN_OK;
}

void cuda_leave(bool entered) {
    CUcontext context;
    if (entered)
        cu.cuCtxPopCurrent(&context);
}

static int32_t load_module(CUlibrary *library, const struct cuda_module *module, int32_t sm) {
    void *code;
    const int32_t status = cuda_image_unpack(module->images, sm, driver_version, &code);
    if (status != DLATTN_OK)
        return status;
    const CUresult error = cu.cuLibraryLoadData(library, code, NULL, NULL, 0, NULL, NULL, 0);
    free(code); /* the driver has a copy */
    return error == CUDA_SUCCESS ? DLATTN_OK : driver_failed(error, "cuLibraryLoadData");
}

/* Loads the code and raises the shared memory limit to all that the kernel can ever ask, once per device: raising it
 * per call would race between threads that want different amounts. */
static int32_t load_locked(struct cuda_kernel *k, struct device *d) {
    CUlibrary library = atomic_load(&k->module->library[d->arch]);
    CUkernel function = atomic_load(&k->function[d->arch]);
    if (!library) {
        const int32_t status = load_module(&library, k->module, d->caps.sm);
        if (status != DLATTN_OK)
            return status;
        atomic_store(&k->module->library[d->arch], library);
    }
    if (!function)
        TRY(cuLibraryGetKernel, &function, library, k->name);
    TRY(cuKernelSetAttribute, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        k->shared_memory_bytes, function, d->handle);
    TRY(cuKernelSetAttribute, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100, function,
        d->handle);
    atomic_store(&k->function[d->arch], function);
    atomic_fetch_or(&k->ready, UINT64_C(1) << (d - devices));
    return DLATTN_OK;
}

/* Loading is not a stream operation, so it is legal while this thread captures one, but only in relaxed mode. */
static int32_t load(struct cuda_kernel *k, struct device *d) {
    int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    TRY(cuThreadExchangeStreamCaptureMode, &mode);
    pthread_mutex_lock(&slow_path);
    int32_t status = load_locked(k, d);
    pthread_mutex_unlock(&slow_path);
    cu.cuThreadExchangeStreamCaptureMode(&mode);
    return status;
}

static int32_t launch(struct cuda_kernel *k, int32_t device, int32_t blocks, bool early,
                      void *stream, void *params) {
    struct device *const d = &devices[device];
    struct launch_attribute at_once = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                       .value = {1}};
    const struct launch_config config = {.grid = {(unsigned)blocks, 1, 1},
                                         .block = {(unsigned)k->threads, 1, 1},
                                         .shared_bytes = (unsigned)k->shared_memory_bytes,
                                         .stream = stream,
                                         .attributes = &at_once,
                                         .attribute_count = early && d->caps.sm >= 90};
    if (!(atomic_load_explicit(&k->ready, memory_order_acquire) >> device & 1)) {
        const int32_t status = load(k, d);
        if (status != DLATTN_OK)
            return status;
    }
    if (blocks == 0)
        return DLATTN_OK;
    const CUresult error = cu.cuLaunchKernelEx(
        &config, atomic_load_explicit(&k->function[d->arch], memory_order_relaxed), &params, NULL);
    return error == CUDA_SUCCESS ? DLATTN_OK : driver_failed(error, k->name);
}

int32_t cuda_launch(struct cuda_kernel *k, int32_t device, int32_t blocks, void *stream,
                    void *params) {
    return launch(k, device, blocks, false, stream, params);
}

int32_t cuda_launch_early(struct cuda_kernel *k, int32_t device, int32_t blocks, void *stream,
                          void *params) {
    return launch(k, device, blocks, true, stream, params);
}

int32_t cuda_synchronize(int32_t device, void *stream) {
    bool entered;
    const int32_t status = cuda_enter(device, &entered);
    if (status != DLATTN_OK)
        return status;
    const CUresult error = cu.cuStreamSynchronize(stream);
    cuda_leave(entered);
    return error == CUDA_SUCCESS ? DLATTN_OK : driver_failed(error, "cuStreamSynchronize");
}

int32_t cuda_clear(void *data, size_t bytes, void *stream) {
    TRY(cuMemsetD8Async, (uint64_t)(uintptr_t)data, 0, bytes, stream);
    return DLATTN_OK;
}

static int tensor_map_type(enum dtype dtype) {
    switch (dtype) {
    case DTYPE_F64:
        return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
    case DTYPE_F32:
        return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case DTYPE_F16:
        return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DTYPE_BF16:
        return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DTYPE_E4M3:
    case DTYPE_E5M2:
        return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case DTYPE_COUNT:
        break;
    }
    return -1;
}

int32_t cuda_tensor_map(struct cuda_tensor_map *map, enum dtype dtype, const void *data,
                        uint32_t rank, const uint64_t *extent, const uint64_t *stride,
                        const uint32_t *box, int32_t swizzle) {
    static const uint32_t every[5] = {1, 1, 1, 1, 1};
    const int code = swizzle == 128  ? 3
                     : swizzle == 64 ? 2
                                     : swizzle == 32; /* CU_TENSOR_MAP_SWIZZLE_* */
    union {
        const void *in;
        void *out; /* the driver's signature lacks a const */
    } address = {data};
    TRY(cuTensorMapEncodeTiled, map, tensor_map_type(dtype), rank, address.out, extent, stride, box,
        every, 0, code, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, 0);
    return DLATTN_OK;
}
