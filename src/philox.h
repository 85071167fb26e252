/*
 * Philox4x32-10: four random words that depend on a counter and a key alone (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As
 * Easy as 1, 2, 3, SC 2011). What dropout drops is defined by it in docs/numerics.md. Plain C, which CUDA C++ reads, too.
 */
#ifndef DLATTN_PHILOX_H_
#define DLATTN_PHILOX_H_

#include <stdint.h>

#if defined(__CUDACC__)
#define PHILOX_FUNCTION __host__ __device__ static inline
#else
#define PHILOX_FUNCTION static inline
#endif

PHILOX_FUNCTION void philox(uint32_t x[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xd2511f53 * x[0], b = (uint64_t)0xcd9e8d57 * x[2];
        const uint32_t x1 = x[1], x3 = x[3];
        x[0] = (uint32_t)(b >> 32) ^ x1 ^ key0;
        x[1] = (uint32_t)b;
        x[2] = (uint32_t)(a >> 32) ^ x3 ^ key1;
        x[3] = (uint32_t)a;
        key0 += 0x9e3779b9;
        key1 += 0xbb67ae85;
    }
}

#endif /* DLATTN_PHILOX_H_ */
