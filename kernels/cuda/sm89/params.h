/*
 * What a kernel of cuda_fwd_fp8_sm89 gets, by value. Shared by the C side, which fills it, and CUDA C++.
 */
#ifndef DLATTN_CUDA_SM89_PARAMS_H_
#define DLATTN_CUDA_SM89_PARAMS_H_

#include "kernels/cuda/common/params.h"

/* sm89_params.output_dtype; a bias and lse are of it, too, unless they are f32 */
enum { SM89_F32, SM89_F16, SM89_BF16 };

struct sm89_params {
    struct fwd_params fwd;
    int32_t output_dtype;
};

#endif /* DLATTN_CUDA_SM89_PARAMS_H_ */
