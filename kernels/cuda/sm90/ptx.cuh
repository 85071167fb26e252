// The instructions that only sm_90a has, one function each, beside those of common/ptx.cuh: mbarrier, TMA, wgmma, setmaxnreg.
// (PTX ISA 8.7, sections 9.7.9 to 9.7.15)
#pragma once

#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/registers.cuh"

// The same value in every thread of the warp, said in a way that lets the compiler use uniform registers.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// ---- mbarrier: one phase bit that flips when the expected arrivals and bytes are complete ----

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the async proxy (TMA).
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One lane of a warp arrives, which the hardware picks: no register says which.
__device__ __forceinline__ void mbarrier_arrive_by_one(uint32_t barrier) {
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\n"
                 "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(barrier)
                 : "memory");
}

// Arrives, and has the phase wait for this many bytes of TMA loads.
__device__ __forceinline__ void mbarrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Waits until the phase with this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra finished;\n"
                 "bra again;\n"
                 "finished:\n"
                 "}\n" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// ---- What L2 does with what TMA reads ----

// Read once: the first to go.
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Read again by other blocks: the last to go.
__device__ __forceinline__ uint64_t evict_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// ---- TMA: one box of a tensor map to shared memory; elements outside the tensor arrive as zeros ----

__device__ __forceinline__ void tma_prefetch_map(const void *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load_4d(uint32_t dst, const void *map, uint32_t barrier,
                                            uint64_t policy, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(dst),
                 "l"(map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

// The same from a warp of which each lane asks for the same box: one of them, which the hardware picks, brings it. To ptxas the branch of a
// single lane is one of many, for which it makes a loop.
__device__ __forceinline__ void tma_load_4d_by_one(uint32_t dst, const void *map, uint32_t barrier,
                                                   uint64_t policy, int c0, int c1, int c2,
                                                   int c3) {
    asm volatile(
        "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\n"
        "@p cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7}], [%2], %3;\n}\n" ::"r"(dst),
        "l"(map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

__device__ __forceinline__ void tma_load_5d(uint32_t dst, const void *map, uint32_t barrier,
                                            uint64_t policy, int c0, int c1, int c2, int c3,
                                            int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(dst),
                 "l"(map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

// One box from shared memory to a tensor map; elements outside the tensor are not written. Reads the buffer after the
// call returned: see bulk_wait_read().
__device__ __forceinline__ void tma_store_5d(const void *map, uint32_t src, int c0, int c1, int c2,
                                             int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group"
                 " [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                 "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but PENDING groups of this thread's stores have read their buffers.
template <int PENDING>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Bytes as they lie, a multiple of 16 of them, aligned to 16.
__device__ __forceinline__ void bulk_load(uint32_t dst, const void *src, uint32_t bytes,
                                          uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Waits until this thread's stores have been written.
__device__ __forceinline__ void bulk_wait_written() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Orders accesses to device memory by threads and by the async proxy (TMA).
__device__ __forceinline__ void global_proxy_fence() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Makes this thread's writes to shared memory visible to the async proxy (TMA).
__device__ __forceinline__ void async_proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// This thread arrives as soon as all of its cp.async so far have.
__device__ __forceinline__ void copies_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// What is `chunks` of 16 bytes behind `base`. In C++ the compiler adds before it multiplies, and takes an instruction more.
template <typename E>
__device__ __forceinline__ const E *chunks_behind(const E *base, uint32_t chunks) {
    const E *address;
    asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(address) : "r"(chunks), "l"(base));
    return address;
}

// Four 8 x 8 matrices of 16-bit elements, spread over the warp as wgmma leaves them; lane l has the address of row
// l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&w)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
}

// Two floats of shared memory, aligned as one.
__device__ __forceinline__ float2 load_pair(uint32_t address) {
    float2 r;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(address));
    return r;
}

// Counts one more. Who sees that by load_acquire() sees all that this thread has seen.
__device__ __forceinline__ void count_release(uint32_t *counter) {
    asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter)
                 : "memory");
}

// No fence, which would wait for all that the thread has under way.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t *counter) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(counter) : "memory");
    return x;
}

// ---- Registers of a warpgroup ----

template <int REGISTERS>
__device__ __forceinline__ void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- Arithmetic ----

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// `count` ones from bit `begin` on; both at most 32.
__device__ __forceinline__ uint32_t ones(int begin, int count) {
    uint32_t r;
    asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(r) : "r"(begin), "r"(count));
    return r;
}

// ---- wgmma ----

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most PENDING groups of this warpgroup are unfinished.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps ptxas from hoisting a wait above the computation of x, which is never negative: a store that depends on it
// and never happens.
__device__ __forceinline__ void hold(uint32_t address, float x) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %1, 0f00000000;\n"
                 "@p st.volatile.shared.f32 [%0], %1;\n}\n" ::"r"(address),
                 "f"(x)
                 : "memory");
}

// Keeps the compiler from moving accesses to these registers across the wait or the fence beside it.
template <int COUNT>
__device__ __forceinline__ void pin(float (&r)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+f"(r[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void pin(uint32_t (&r)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+r"(r[i])::"memory");
}

// Descriptor of a tile in shared memory with the 128-byte swizzle: rows of 64 elements (128 bytes), eight rows to
// a 1024-byte atom that must be aligned to 1024. `leading` and `stride` are byte distances:
// K-major (rows run along M or N): stride = between groups of 8 rows, leading unused.
// MN-major (rows run along K): leading = between 64-element columns of the tile, stride = between groups of 8 rows.
struct Descriptor {
    uint32_t low, high;
    __device__ __forceinline__ Descriptor(uint32_t address, uint32_t leading, uint32_t stride)
        : low(uniform((address & 0x3ffff) >> 4 | leading >> 4 << 16)),
          high(stride >> 4 | 1u << 30) {}
    __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
        return static_cast<uint64_t>(high) << 32 | (low + (bytes >> 4));
    }
};

// Of a K-major tile that is not swizzled: eight rows of 16 bytes one after the other, and the next eight `stride` bytes on; a depth of
// 16 reads the same eight twice. The address is the same for all threads, and known to be.
__device__ __forceinline__ uint64_t plain_descriptor(uint32_t address, uint32_t stride) {
    return static_cast<uint64_t>(stride >> 4) << 32 | (address & 0x3ffff) >> 4;
}

// D[64, N] (f32, N / 2 registers a thread) = or += A[64, 16] B[16, N].
template <typename E, int N>
struct Wgmma;

#define SM90_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SM90_R16 SM90_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SM90_R24 SM90_R16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define SM90_R32 SM90_R24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define SM90_R40 SM90_R32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define SM90_R48 SM90_R40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define SM90_R56 SM90_R48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define SM90_R64 SM90_R56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define SM90_R72 SM90_R64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define SM90_R80 SM90_R72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define SM90_R88 SM90_R80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define SM90_R96 SM90_R88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define SM90_R104 SM90_R96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define SM90_R112 SM90_R104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define SM90_R120 SM90_R112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define SM90_R128 SM90_R120 ",%120,%121,%122,%123,%124,%125,%126,%127"

#define SM90_D8(i)                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SM90_D16 SM90_D8(0), SM90_D8(8)
#define SM90_D32 SM90_D16, SM90_D8(16), SM90_D8(24)
#define SM90_D40 SM90_D32, SM90_D8(32)
#define SM90_D48 SM90_D40, SM90_D8(40)
#define SM90_D56 SM90_D48, SM90_D8(48)
#define SM90_D64 SM90_D56, SM90_D8(56)
#define SM90_D72 SM90_D64, SM90_D8(64)
#define SM90_D80 SM90_D72, SM90_D8(72)
#define SM90_D88 SM90_D80, SM90_D8(80)
#define SM90_D96 SM90_D88, SM90_D8(88)
#define SM90_D112 SM90_D96, SM90_D8(96), SM90_D8(104)
#define SM90_D128 SM90_D112, SM90_D8(112), SM90_D8(120)

// R = N / 2; i0 to i6 = R to R + 6, the numbers of the operands that follow the accumulators.
#define SM90_WGMMA(E, name, N, R, i0, i1, i2, i3, i4, i5, i6)                                      \
    template <>                                                                                    \
    struct Wgmma<E, N> {                                                                           \
        /* A and B in shared memory: A K-major, B K-major (D = A B^T) or MN-major. */              \
        template <int MN_MAJOR = 0>                                                                \
        static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b,           \
                                                  int accumulate) {                                \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name           \
                         " {" SM90_R##R "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, %" #i3 ";\n}\n"        \
                         : SM90_D##R                                                               \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(MN_MAJOR));                        \
        }                                                                                          \
        /* The same, both MN-major: D = A^T B. */                                                  \
        static __device__ __forceinline__ void ss_transposed(float (&d)[R], uint64_t a,            \
                                                             uint64_t b, int accumulate) {         \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name           \
                         " {" SM90_R##R "}, %" #i0 ", %" #i1 ", p, 1, 1, 1, 1;\n}\n"               \
                         : SM90_D##R                                                               \
                         : "l"(a), "l"(b), "r"(accumulate));                                       \
        }                                                                                          \
        /* A in registers, B MN-major in shared memory, or K-major. */                             \
        template <int MN_MAJOR = 1>                                                                \
        static __device__ __forceinline__ void rs(float (&d)[R], uint32_t a0, uint32_t a1,         \
                                                  uint32_t a2, uint32_t a3, uint64_t b,            \
                                                  int accumulate) {                                \
            asm volatile(                                                                          \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                                  \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" SM90_R##R     \
                "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}\n"   \
                : SM90_D##R                                                                        \
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(MN_MAJOR));     \
        }                                                                                          \
    };
#define SM90_WGMMA_BOTH(N, R, ...)                                                                 \
    SM90_WGMMA(__nv_bfloat16, "bf16", N, R, __VA_ARGS__)                                           \
    SM90_WGMMA(__half, "f16", N, R, __VA_ARGS__)

SM90_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21, 22)
SM90_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37, 38)
SM90_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45, 46)
SM90_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53, 54)
SM90_WGMMA_BOTH(112, 56, 56, 57, 58, 59, 60, 61, 62)
SM90_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69, 70)
SM90_WGMMA_BOTH(144, 72, 72, 73, 74, 75, 76, 77, 78)
SM90_WGMMA_BOTH(160, 80, 80, 81, 82, 83, 84, 85, 86)
SM90_WGMMA_BOTH(176, 88, 88, 89, 90, 91, 92, 93, 94)
SM90_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101, 102)
SM90_WGMMA_BOTH(224, 112, 112, 113, 114, 115, 116, 117, 118)
SM90_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133, 134)
