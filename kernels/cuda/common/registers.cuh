// Arrays in registers, and what keeps the compiler from spending registers where a loop has none to spare.
#pragma once

#include <stdint.h>
#include <utility>

// body(0) ... body(N - 1), each with its index as a constant: registers have no addresses, so what indexes them must be.
template <typename Body, int... I>
__device__ __forceinline__ void unrolled(std::integer_sequence<int, I...>, Body &&body) {
    (body(std::integral_constant<int, I>()), ...);
}
template <int N, typename Body>
__device__ __forceinline__ void unrolled(Body &&body) {
    unrolled(std::make_integer_sequence<int, N>(), body);
}

// x in a register from here on: the compiler would work it out again in every step, but repeats no shuffle of what might
// differ between lanes.
template <typename T>
__device__ __forceinline__ T kept(T x) {
    uint32_t lane;
    asm("mov.u32 %0, %laneid;" : "=r"(lane));
    return __shfl_sync(~0u, lane < 32 ? x : T(0), lane);
}

// The same for a number that all lanes have.
__device__ __forceinline__ int kept_by_all(int x) { return __reduce_max_sync(~0u, x); }

// The opposite: x, and what follows from it, is worked out here each time, so that no register holds it meanwhile.
__device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// threadIdx.x, read here: what is read once for a whole kernel is kept through loops that have no register for it, or read again in each of
// their steps, of which either costs some 50 cycles and more.
__device__ __forceinline__ unsigned thread_anew() {
    unsigned x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// Accumulators of N products side by side, of MT tiles of 16 rows.
template <int MT, int N>
__device__ __forceinline__ void clear(float (&x)[MT][N][4]) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                x[mt][n][e] = 0;
}

// Two numbers by way of one register of 64 bits, a product with 1, which ptxas does not know the grid's second extent to be.
// docs/tried.md
__device__ __forceinline__ void make_neighbours(float (&x)[2]) {
    asm volatile("{\n.reg .b32 one;\n.reg .b64 both;\n"
                 "mov.u32 one, %%nctaid.y;\nmov.b64 both, {0, %1};\n"
                 "mad.wide.u32 both, %0, one, both;\nmov.b64 {%0, %1}, both;\n}\n"
                 : "+r"(reinterpret_cast<uint32_t &>(x[0])),
                   "+r"(reinterpret_cast<uint32_t &>(x[1])));
}
