#define _GNU_SOURCE
#include "src/cpu.h"
#include "src/kernel.h"

#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

const struct cpu_set cpu_sets[] = {
    {CPU_AVX2 | CPU_FETCHES_TO_L2, "avx2"},
    {CPU_AVX512, "avx512"},
    {CPU_AVX512VBMI, "avx512vbmi"},
    {CPU_AVX512BF16 | CPU_FAST_AVX512BF16, "avx512bf16"},
    {CPU_AMX_BF16, "amx_bf16"},
};
const int32_t cpu_set_count = sizeof cpu_sets / sizeof cpu_sets[0];

/* Register state that the operating system saves (Intel SDM, XCR0): bits 1-2 AVX, 5-7 AVX-512,
 * 17-18 AMX. */
static uint64_t xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Linux hands out the 8 KiB of tile state per thread only to processes that ask (x86/xstate.rst).
 */
static bool amx_permitted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static bool all(uint32_t reg, uint32_t mask) { return (reg & mask) == mask; }

static bool is_amd(void) {
    uint32_t a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx &&
           d == signature_AMD_edx;
}

uint32_t cpu_detect(void) {
    uint32_t a, b, c, d, c1, b7, c7, d7, a71, found = 0;
    if (!__get_cpuid(1, &a, &b, &c1, &d) || !all(c1, bit_OSXSAVE | bit_FMA | bit_F16C))
        return 0;
    const uint64_t saved = xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !all(b7, bit_AVX2) || (saved & 0x6) != 0x6)
        return 0;
    found |= CPU_AVX2 | (is_amd() ? CPU_FETCHES_TO_L2 : 0);
    if (!__get_cpuid_count(7, 1, &a71, &b, &c, &d))
        a71 = 0;
    if (!all(b7, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) ||
        (saved & 0xe0) != 0xe0)
        return found;
    found |= CPU_AVX512 | (all(c7, bit_AVX512VBMI) ? CPU_AVX512VBMI : 0);
    const uint32_t avx512_bf16 = 1u << 5;                    /* leaf 7.1 eax */
    const uint32_t amx_bf16 = 1u << 22, amx_tile = 1u << 24; /* leaf 7.0 edx */
    if (all(a71, avx512_bf16))
        found |= CPU_AVX512BF16 | (is_amd() ? CPU_FAST_AVX512BF16 : 0);
    if (all(d7, amx_bf16 | amx_tile) && (saved & 0x60000) == 0x60000 && amx_permitted())
        found |= CPU_AMX_BF16;
    return found;
}

/* The brand string, CPUID leaves 0x80000002 to 0x80000004. */
void cpu_name(char name[128]) {
    uint32_t regs[12];
    strcpy(name, "x86-64");
    for (uint32_t i = 0; i < 3; i++) {
        if (!__get_cpuid(0x80000002 + i, &regs[4 * i], &regs[4 * i + 1], &regs[4 * i + 2],
                         &regs[4 * i + 3]))
            return;
    }
    memcpy(name, regs, sizeof regs);
    name[sizeof regs] = '\0';
}

void cpu_pause(void) { __builtin_ia32_pause(); }
