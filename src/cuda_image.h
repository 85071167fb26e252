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
    uint32_t kind; /* enum cuda_image_kind */
    uint64_t bytes, packed_bytes;
    uint64_t offset; /* of what is packed, from the array's first byte */
};

/* Unpacks the best image for a GPU: code for the latest architecture that it runs, else such PTX. What *code points to ends with
 * a zero byte, as the driver wants text to, and is the caller's, for free(). Fails where no image is for the GPU, without memory,
 * and if what is packed has been damaged. */
int32_t cuda_image_unpack(const struct cuda_image *images, int32_t sm, void **code);

#endif /* DLATTN_CUDA_IMAGE_H_ */
