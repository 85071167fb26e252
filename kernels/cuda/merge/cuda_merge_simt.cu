// The instances of cuda_merge_simt: of vectors by the narrowest type among them, of elements by the type of the sums.
#include "kernels/cuda/merge/merge.cuh"

#define INSTANCE(name, ...)                                                                        \
    extern "C" __global__ void __launch_bounds__(MERGE_THREADS)                                    \
        name(const __grid_constant__ merge_params p) {                                             \
        cuda_merge_simt<__VA_ARGS__>(p);                                                           \
    }
INSTANCE(cuda_merge_simt_f16, Vectors<__half>)
INSTANCE(cuda_merge_simt_bf16, Vectors<__nv_bfloat16>)
INSTANCE(cuda_merge_simt_f32, Vectors<float>)
INSTANCE(cuda_merge_simt_elements_f32, Elements<float>)
INSTANCE(cuda_merge_simt_elements_f64, Elements<double>)

// Puts some of the parts into the table.
extern "C" __global__ void __launch_bounds__(MERGE_PARTS)
    cuda_merge_simt_table(const __grid_constant__ merge_params p) {
    const int n = threadIdx.x;
    if (p.first + n < p.count)
        p.table[p.first + n] = p.parts[n];
}
