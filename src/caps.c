#include "src/caps.h"
#include "src/cpu.h"
#include "src/cuda_driver.h"
#include "src/threads.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *caps_cpu_names(uint32_t bits, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; i < cpu_set_count && used < size; i++) {
        if (bits & cpu_sets[i].bits)
            used += (size_t)snprintf(text + used, size - used, "%s%s", used ? " " : "",
                                     cpu_sets[i].name);
    }
    return text;
}

/* The sets that DLATTN_CPU names; all of them when it is not set. */
static uint32_t allowed(void) {
    const char *list = getenv("DLATTN_CPU");
    if (!list)
        return ~0u;
    uint32_t bits = 0;
    while (*list) {
        size_t length = strcspn(list, ", ");
        for (int i = 0; i < cpu_set_count; i++) {
            if (strlen(cpu_sets[i].name) == length && memcmp(cpu_sets[i].name, list, length) == 0)
                bits |= cpu_sets[i].bits;
        }
        list += length + strspn(list + length, ", ");
    }
    return bits;
}

static struct caps cpu;
static pthread_once_t cpu_once = PTHREAD_ONCE_INIT;

static void find_cpu(void) {
    cpu.cpu = cpu_detect() & allowed();
    cpu.threads = threads_default();
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

int32_t caps_describe(int32_t index, dlattn_device_info *info) {
    if (index != 0)
        return cuda_describe(index - 1, info);
    info->device_type = kDLCPU;
    info->multiprocessors = caps_cpu()->threads;
    cpu_name(info->name);
    caps_cpu_names(caps_cpu()->cpu, info->arch, sizeof info->arch);
    return DLATTN_OK;
}
