/*
 * The CUDA driver, opened at run time: the plugin links nothing of CUDA, and a machine without it is one without GPUs.
 * The types of cuda.h that rows need are declared here under the names that NVIDIA's documentation uses.
 * Every function may be called from any thread. After a kernel's first launch on a device nothing here locks,
 * allocates or synchronises, so a launch may be captured into a graph.
 */
#ifndef DLATTN_CUDA_DRIVER_H_
#define DLATTN_CUDA_DRIVER_H_

#include "src/cuda_image.h"
#include "src/kernel.h"
#include "src/tensor_map.h"

#include <stdatomic.h>

/* Devices of one compute capability run the same code. GPUs beyond these numbers are not used. */
enum { CUDA_MAX_DEVICES = 64, CUDA_MAX_ARCHS = 4 };

/* Embedded code (cuda_images of Bazel), loaded when its first kernel is launched on an architecture. Static storage. */
struct cuda_module {
    const struct cuda_image *images;
    _Atomic(void *) library[CUDA_MAX_ARCHS]; /* CUlibrary */
};

/* One __global__ function and the launch shape it was compiled for. Static storage, zeroes at the end. */
struct cuda_kernel {
    struct cuda_module *module;
    const char *name;
    int32_t threads;
    int32_t shared_memory_bytes;
    _Atomic(void *)
        function[CUDA_MAX_ARCHS]; /* CUkernel: one handle for all contexts and devices */
    _Atomic uint64_t ready;       /* devices whose shared memory limit has been raised for it */
};

/* GPUs of this machine; 0 without a driver. */
int32_t cuda_device_count(void);

/* Fills the GPU part of *caps. Fails without a driver, with one that is too old, and if there is no such device. */
int32_t cuda_caps(struct caps *caps, int32_t device);

/* Name, arch and sizes of a GPU. */
int32_t cuda_describe(int32_t device, dlattn_device_info *info);

/* Fails unless every tensor of the problem, and the workspace if there is one, lies on the problem's device.
 * Asks the driver, reads no data: about 0.1 microseconds for each tensor. */
int32_t cuda_check_pointers(const struct problem *p, const void *workspace);

/* Before the calls below, of this thread for `device`: in the caller's context if that is on the device, else in the device's
 * primary context, which cuda_leave() takes off again. A kernel's launch() finds that done. */
int32_t cuda_enter(int32_t device, bool *entered);
void cuda_leave(bool entered);

/* Enqueues `kernel` with one by-value struct as its only parameter. `stream` keeps CUDA's special values 0, 1 and 2. */
int32_t cuda_launch(struct cuda_kernel *kernel, int32_t device, int32_t blocks, void *stream,
                    void *params);

/* The same for a kernel that, compiled for sm_90 or later, waits by griddepcontrol for the kernel before it in the stream:
 * there it may start before that has ended. */
int32_t cuda_launch_early(struct cuda_kernel *kernel, int32_t device, int32_t blocks, void *stream,
                          void *params);

/* Waits for a stream: only where the ABI says that a call does. */
int32_t cuda_synchronize(int32_t device, void *stream);

/* Enqueues zeros. */
int32_t cuda_clear(void *data, size_t bytes, void *stream);

/* A tensor map for the copy engine of sm_90 (CUtensorMap, 128 bytes, 64-byte aligned): a tile of a tensor of float8, f16, bf16 or f32 with
 * `rank` axes, innermost first. `stride` has rank - 1 entries in bytes. Swizzle: bytes, 0, 32, 64 or 128. Pure.
 * Elements outside the extents read as zero. */
int32_t cuda_tensor_map(struct cuda_tensor_map *map, enum dtype dtype, const void *data,
                        uint32_t rank, const uint64_t *extent, const uint64_t *stride,
                        const uint32_t *box, int32_t swizzle);

#endif /* DLATTN_CUDA_DRIVER_H_ */
