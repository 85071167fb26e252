/*
 * Code for GPUs as the build embeds it: a source compiled for several architectures, each packed by xz (LZMA2)
 * (third_party/cuda/image.bzl writes it, third_party/lzma says why).
 */
#ifndef DLATTN_CUDA_IMAGE_H_
#define DLATTN_CUDA_IMAGE_H_

#include <stdint.h>

enum cuda_image_kind {
    CUDA_CODE,       /* also for later GPUs of the same major number */
    CUDA_CODE_EXACT, /* sm_90a: for this architecture alone */
    CUDA_PTX,        /* text that the driver compiles for this architecture and all later ones */
};

/* In an array that ends with an sm of 0. */
struct cuda_image {
    int32_t sm;
    int32_t
        driver; /* the oldest that loads it, as cuDriverGetVersion counts: 12000 is CUDA 12.0's */
    uint32_t kind;   /* enum cuda_image_kind */
    uint32_t offset; /* of what is packed, from the array's first byte */
    uint64_t bytes, packed_bytes;
};

/* Unpacks the best image for a GPU and a driver: code for the latest architecture that the GPU runs, else such PTX, and of several
 * the one that asks for the newest driver. What *code points to ends with a zero byte, as the driver wants text to, and is the
 * caller's, for free(). Fails where no image is for the GPU, without memory, and if what is packed has been damaged. */
int32_t cuda_image_unpack(const struct cuda_image *images, int32_t sm, int32_t driver, void **code);

#endif /* DLATTN_CUDA_IMAGE_H_ */
