#define _GNU_SOURCE
#include "src/caps.h"
#include "src/cuda_driver.h"
#include "src/threads.h"

#include <cpuid.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static const struct {
    uint32_t bit;
    const char *name;
} sets[] = {
    {CPU_AVX2, "avx2"},
    {CPU_AVX512, "avx512"},
    {CPU_AVX512BF16 | CPU_FAST_AVX512BF16, "avx512bf16"},
    {CPU_AVX512FP16, "avx512fp16"},
    {CPU_AMX_BF16, "amx_bf16"},
    {CPU_AMX_FP16, "amx_fp16"},
};
enum { SET_COUNT = sizeof sets / sizeof sets[0] };

const char *caps_cpu_names(uint32_t bits, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; i < SET_COUNT && used < size; i++) {
        if (bits & sets[i].bit)
            used +=
                (size_t)snprintf(text + used, size - used, "%s%s", used ? " " : "", sets[i].name);
    }
    return text;
}

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

static uint32_t detect(void) {
    uint32_t a, b, c, d, c1, b7, d7, a71, found = 0;
    if (!__get_cpuid(1, &a, &b, &c1, &d) || !all(c1, bit_OSXSAVE | bit_FMA | bit_F16C))
        return 0;
    const uint64_t saved = xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d7) || !all(b7, bit_AVX2) || (saved & 0x6) != 0x6)
        return 0;
    found |= CPU_AVX2;
    if (!__get_cpuid_count(7, 1, &a71, &b, &c, &d))
        a71 = 0;
    if (!all(b7, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) ||
        (saved & 0xe0) != 0xe0)
        return found;
    found |= CPU_AVX512;
    const uint32_t avx512_bf16 = 1u << 5, amx_fp16 = 1u << 21; /* leaf 7.1 eax */
    const uint32_t avx512_fp16 = 1u << 23, amx_bf16 = 1u << 22,
                   amx_tile = 1u << 24; /* leaf 7.0 edx */
    if (all(a71, avx512_bf16))
        found |= CPU_AVX512BF16 | (is_amd() ? CPU_FAST_AVX512BF16 : 0);
    if (all(d7, avx512_fp16))
        found |= CPU_AVX512FP16;
    if (all(d7, amx_bf16 | amx_tile) && (saved & 0x60000) == 0x60000 && amx_permitted())
        found |= CPU_AMX_BF16 | (all(a71, amx_fp16) ? CPU_AMX_FP16 : 0);
    return found;
}

/* The sets that DLATTN_CPU names; all of them when it is not set. */
static uint32_t allowed(void) {
    const char *list = getenv("DLATTN_CPU");
    if (!list)
        return ~0u;
    uint32_t bits = 0;
    while (*list) {
        size_t length = strcspn(list, ", ");
        for (int i = 0; i < SET_COUNT; i++) {
            if (strlen(sets[i].name) == length && memcmp(sets[i].name, list, length) == 0)
                bits |= sets[i].bit;
        }
        list += length + strspn(list + length, ", ");
    }
    return bits;
}

static struct caps cpu;
static pthread_once_t cpu_once = PTHREAD_ONCE_INIT;

static void find_cpu(void) {
    cpu.cpu = detect() & allowed();
    cpu.threads = threads_default();
    long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    cpu.l2_bytes = l2 > 0 ? l2 : 1 << 20;
}

const struct caps *caps_cpu(void) {
    pthread_once(&cpu_once, find_cpu);
    return &cpu;
}

int32_t caps_get(struct caps *caps, enum backend backend, int32_t device_id) {
    *caps = *caps_cpu();
    if (backend == BACKEND_CPU)
        return DLATTN_OK;
    return cuda_caps(caps, device_id);
}

int32_t caps_gpu_count(void) { return cuda_device_count(); }

/* The brand string, CPUID leaves 0x80000002 to 0x80000004. */
static void cpu_name(char name[128]) {
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

int32_t caps_describe(int32_t index, dlattn_device_info *info) {
    if (index != 0)
        return cuda_describe(index - 1, info);
    info->device_type = kDLCPU;
    info->multiprocessors = caps_cpu()->threads;
    cpu_name(info->name);
    caps_cpu_names(caps_cpu()->cpu, info->arch, sizeof info->arch);
    return DLATTN_OK;
}
