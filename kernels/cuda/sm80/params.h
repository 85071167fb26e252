/*
 * What a kernel of cuda_fwd_sm80 gets, by value. Shared by the C side, which fills it, and CUDA C++.
 */
#ifndef DLATTN_CUDA_SM80_PARAMS_H_
#define DLATTN_CUDA_SM80_PARAMS_H_

#include "kernels/cuda/common/params.h"

struct sm80_params {
    struct fwd_params fwd;
    int32_t diagonal_offset; /* read by tiles with EXTRAS */
};

#endif /* DLATTN_CUDA_SM80_PARAMS_H_ */
