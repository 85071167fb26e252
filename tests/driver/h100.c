/*
 * In place of libcuda.so.1: the driver of a machine with one H100 that does nothing, and counts how often each of its functions is
 * called. Memory of the host counts as the GPU's.
 */
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

#define FUNCTIONS(F)                                                                               \
    F(cuInit)                                                                                      \
    F(cuGetErrorName)                                                                              \
    F(cuGetErrorString)                                                                            \
    F(cuDeviceGetCount)                                                                            \
    F(cuDeviceGet)                                                                                 \
    F(cuDeviceGetName)                                                                             \
    F(cuDeviceGetAttribute)                                                                        \
    F(cuDevicePrimaryCtxRetain)                                                                    \
    F(cuCtxGetCurrent)                                                                             \
    F(cuCtxGetDevice)                                                                              \
    F(cuCtxPushCurrent)                                                                            \
    F(cuCtxPopCurrent)                                                                             \
    F(cuLibraryLoadData)                                                                           \
    F(cuLibraryGetKernel)                                                                          \
    F(cuKernelSetAttribute)                                                                        \
    F(cuLaunchKernelEx)                                                                            \
    F(cuPointerGetAttributes)                                                                      \
    F(cuStreamSynchronize)                                                                         \
    F(cuMemsetD8Async)                                                                             \
    F(cuThreadExchangeStreamCaptureMode)                                                           \
    F(cuTensorMapEncodeTiled)

enum function {
#define NAME(name) name,
    FUNCTIONS(NAME)
#undef NAME
        FUNCTION_COUNT
};

static int counts[FUNCTION_COUNT];

/* Of compute capability 9.0, 132 multiprocessors, 227 KiB of shared memory for a block. */
static int attribute(uint64_t which) {
    switch (which) {
    case 16:
        return 132;
    case 75:
        return 9;
    case 97:
        return 232448;
    default:
        return 0;
    }
}

static int answer(enum function f, void *out, uint64_t second, void *const *values) {
    static char handle;
    counts[f]++;
    switch (f) {
    case cuDeviceGetCount:
        *(int *)out = 1;
        break;
    case cuDeviceGet:
    case cuCtxGetDevice:
        *(int *)out = 0;
        break;
    case cuDeviceGetAttribute:
        *(int *)out = attribute(second);
        break;
    case cuDevicePrimaryCtxRetain:
    case cuCtxGetCurrent:
    case cuLibraryLoadData:
    case cuLibraryGetKernel:
        *(void **)out = &handle;
        break;
    case cuPointerGetAttributes: /* the type of the memory, whether it is managed, its device */
        *(unsigned *)values[0] = 2;
        *(int *)values[1] = *(int *)values[2] = 0;
        break;
    default:
        break;
    }
    return 0;
}

#define STUB(name)                                                                                 \
    static int name##_stub(void *out, uint64_t second, void *const *values) {                      \
        return answer(name, out, second, values);                                                  \
    }
FUNCTIONS(STUB)

static const struct {
    const char *name;
    int (*call)(void *, uint64_t, void *const *);
} functions[] = {
#define ENTRY(name) {#name, name##_stub},
    FUNCTIONS(ENTRY)
#undef ENTRY
};

EXPORT int cuDriverGetVersion(int *version);
EXPORT int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                               int *found);
EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                               int *found) {
    (void)version, (void)flags, (void)found;
    for (int i = 0; i < FUNCTION_COUNT; i++) {
        if (strcmp(functions[i].name, name) == 0) {
            memcpy(function, &functions[i].call, sizeof *function);
            return 0;
        }
    }
    return 500; /* CUDA_ERROR_NOT_FOUND */
}

/* Calls of a function since the last reset; NULL: of all of them. */
EXPORT int h100_calls(const char *name);
EXPORT int h100_calls(const char *name) {
    int sum = 0;
    for (int i = 0; i < FUNCTION_COUNT; i++)
        sum += !name || strcmp(functions[i].name, name) == 0 ? counts[i] : 0;
    return sum;
}

EXPORT void h100_reset(void);
EXPORT void h100_reset(void) { memset(counts, 0, sizeof counts); }
