#include <cuda_bf16.h>
extern "C" __global__ void add(float *x, const __nv_bfloat16 *y) { x[threadIdx.x] += __bfloat162float(y[threadIdx.x]); }
