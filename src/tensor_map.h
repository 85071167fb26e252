/* For C11 and CUDA C++. */
#ifndef DLATTN_TENSOR_MAP_H_
#define DLATTN_TENSOR_MAP_H_

#include <stdint.h>

#ifdef __cplusplus
#define DLATTN_ALIGN64 alignas(64)
#else
#define DLATTN_ALIGN64 _Alignas(64)
#endif

/* A CUtensorMap: opaque, 128 bytes, aligned to 64. */
struct cuda_tensor_map {
    DLATTN_ALIGN64 uint64_t opaque[16];
};

#endif /* DLATTN_TENSOR_MAP_H_ */
