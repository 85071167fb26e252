/* What this machine can do. */
#ifndef DLATTN_CAPS_H_
#define DLATTN_CAPS_H_

#include "src/kernel.h"

/* Capabilities of the CPU, found once. DLATTN_CPU limits them to the named sets ("avx2,avx512" or
 * "none"). */
const struct caps *caps_cpu(void);

/* Capabilities for a problem's device; fails when there is no such device or no driver. */
int32_t caps_get(struct caps *caps, enum backend backend, int32_t device_id);

/* GPUs of this machine; 0 without a driver. */
int32_t caps_gpu_count(void);

/* Device 0 is the CPU, the others are GPUs. `info->struct_size` is left alone. */
int32_t caps_describe(int32_t index, dlattn_device_info *info);

/* Names of CPU_* bits, "avx2 avx512", into text[size]; returns text. */
const char *caps_cpu_names(uint32_t bits, char *text, size_t size);

#endif /* DLATTN_CAPS_H_ */
