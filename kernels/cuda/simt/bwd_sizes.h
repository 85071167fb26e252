/*
 * Shared memory of the blocks of cuda_bwd_simt, for the kernels and for their launches.
 */
#ifndef DLATTN_CUDA_SIMT_BWD_SIZES_H_
#define DLATTN_CUDA_SIMT_BWD_SIZES_H_

/* Two tiles that the block owns, two of a step, and weights, in rows that are 16 bytes longer than their data. */
#define BWD_SHARED_BYTES(CTYPE, D, R, C)                                                           \
    (2 * (8 * (R) + 16 * (C)) * ((D) * sizeof(CTYPE) + 16) +                                       \
     8 * (R) * (16 * (C) * sizeof(CTYPE) + 16))

#endif /* DLATTN_CUDA_SIMT_BWD_SIZES_H_ */
