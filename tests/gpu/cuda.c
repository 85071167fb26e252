#include "tests/gpu/cuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

/* Names as the driver exports them: with the version that these signatures belong to. */
#define FUNCTIONS(F)                                                                               \
    F(cuInit, (unsigned flags))                                                                    \
    F(cuDeviceGetCount, (int *count))                                                              \
    F(cuDevicePrimaryCtxRetain, (void **context, int device))                                      \
    F(cuCtxSetCurrent, (void *context))                                                            \
    F(cuCtxSynchronize, (void))                                                                    \
    F(cuMemAlloc_v2, (uint64_t *data, size_t bytes))                                               \
    F(cuMemFree_v2, (uint64_t data))                                                               \
    F(cuMemAllocManaged, (uint64_t *data, size_t bytes, unsigned flags))                           \
    F(cuMemHostAlloc, (void **data, size_t bytes, unsigned flags))                                 \
    F(cuMemFreeHost, (void *data))                                                                 \
    F(cuMemcpyHtoD_v2, (uint64_t to, const void *from, size_t bytes))                              \
    F(cuMemcpyDtoH_v2, (void *to, uint64_t from, size_t bytes))                                    \
    F(cuStreamCreate, (void **stream, unsigned flags))                                             \
    F(cuStreamSynchronize, (void *stream))                                                         \
    F(cuStreamBeginCapture_v2, (void *stream, int mode))                                           \
    F(cuStreamEndCapture, (void *stream, void **graph))                                            \
    F(cuGraphInstantiateWithFlags, (void **executable, void *graph, unsigned long long flags))     \
    F(cuGraphLaunch, (void *executable, void *stream))

static struct {
#define MEMBER(name, parameters) int(*name) parameters;
    FUNCTIONS(MEMBER)
#undef MEMBER
} cu;

enum { MAX_DEVICES = 16 };
static int devices = -1;
static void *primary[MAX_DEVICES]; /* contexts */

static void must(int error, const char *call) {
    if (error) {
        fprintf(stderr, "%s: CUDA error %d\n", call, error);
        abort();
    }
}
#define MUST(function, ...) must(cu.function(__VA_ARGS__), #function)

static int open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    int count = 0;
    if (!library)
        return 0;
#define FIND(name, parameters) *(void **)&cu.name = dlsym(library, #name);
    FUNCTIONS(FIND)
#undef FIND
    if (cu.cuInit(0) || cu.cuDeviceGetCount(&count) || count == 0)
        return 0;
    cuda_use(0);
    return count < MAX_DEVICES ? count : MAX_DEVICES;
}

void cuda_use(int device) {
    if (device >= 0 && !primary[device])
        MUST(cuDevicePrimaryCtxRetain, &primary[device], device);
    MUST(cuCtxSetCurrent, device < 0 ? NULL : primary[device]);
}

int cuda_open(void) {
    if (devices < 0)
        devices = open_driver();
    return devices;
}

unsigned char *cuda_take(size_t bytes) {
    uint64_t data = 0;
    cuda_open();
    MUST(cuMemAlloc_v2, &data, bytes ? bytes : 1);
    return (unsigned char *)(uintptr_t)data;
}

unsigned char *cuda_take_managed(size_t bytes) {
    uint64_t data = 0;
    cuda_open();
    MUST(cuMemAllocManaged, &data, bytes, 1); /* CU_MEM_ATTACH_GLOBAL */
    return (unsigned char *)(uintptr_t)data;
}

unsigned char *cuda_take_pinned(size_t bytes) {
    void *data = NULL;
    cuda_open();
    MUST(cuMemHostAlloc, &data, bytes, 0);
    return data;
}

void cuda_give_pinned(unsigned char *data) { MUST(cuMemFreeHost, data); }

void cuda_give(unsigned char *data) { MUST(cuMemFree_v2, (uint64_t)(uintptr_t)data); }

void cuda_store(unsigned char *to, const void *from, size_t bytes) {
    if (!bytes)
        return;
    MUST(cuMemcpyHtoD_v2, (uint64_t)(uintptr_t)to, from, bytes);
    cuda_wait(); /* the copy may return before the device has it, and other streams do not wait */
}

void cuda_fetch(void *to, const unsigned char *from, size_t bytes) {
    if (bytes)
        MUST(cuMemcpyDtoH_v2, to, (uint64_t)(uintptr_t)from, bytes);
}

void cuda_wait(void) { MUST(cuCtxSynchronize); }

static void *stream_of(unsigned flags) {
    void *stream;
    MUST(cuStreamCreate, &stream, flags);
    return stream;
}

void *cuda_stream(void) { return stream_of(1); } /* CU_STREAM_NON_BLOCKING */
void *cuda_stream_with_default(void) { return stream_of(0); }

void cuda_record_begin(void *stream) { MUST(cuStreamBeginCapture_v2, stream, 0); } /* GLOBAL */

void *cuda_record_end(void *stream) {
    void *graph, *executable;
    MUST(cuStreamEndCapture, stream, &graph);
    MUST(cuGraphInstantiateWithFlags, &executable, graph, 0);
    return executable;
}

void cuda_record_give_up(void *stream) {
    void *graph = NULL;
    cu.cuStreamEndCapture(stream, &graph); /* says, again, that the recording has failed */
}

void cuda_replay(void *graph, void *stream) {
    MUST(cuGraphLaunch, graph, stream);
    MUST(cuStreamSynchronize, stream);
}
