/*
 * In place of libcuda.so.1: a driver of the version that STUB_VERSION says (12040 is CUDA 12.4), without the function
 * STUB_LACKS, whose cuInit() returns STUB_INIT. Any other function fails.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { CUDA_ERROR_UNKNOWN = 999, CUDA_ERROR_NOT_FOUND = 500, CUDA_ERROR_NO_DEVICE = 100 };

static int number(const char *name) {
    const char *const text = getenv(name);
    return text ? atoi(text) : 0;
}

EXPORT int cuDriverGetVersion(int *version);
EXPORT int cuDriverGetVersion(int *version) {
    *version = number("STUB_VERSION");
    return 0;
}

static int init(unsigned flags) {
    (void)flags;
    return number("STUB_INIT");
}

static int error_string(int error, const char **text) {
    *text = error == CUDA_ERROR_NO_DEVICE ? "no CUDA-capable device is detected" : "unknown error";
    return 0;
}

static int fail(void) { return CUDA_ERROR_UNKNOWN; }

EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                               int *found);
EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                               int *found) {
    const char *const lacks = getenv("STUB_LACKS");
    (void)version, (void)flags, (void)found;
    if (lacks && strcmp(name, lacks) == 0)
        return CUDA_ERROR_NOT_FOUND;
    if (strcmp(name, "cuInit") == 0)
        *function = (void *)(uintptr_t)init;
    else if (strcmp(name, "cuGetErrorString") == 0)
        *function = (void *)(uintptr_t)error_string;
    else
        *function = (void *)(uintptr_t)fail;
    return 0;
}
