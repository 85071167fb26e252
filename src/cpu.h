/* What is different on each architecture of CPU: src/x86_64 and src/aarch64. */
#ifndef DLATTN_CPU_H_
#define DLATTN_CPU_H_

#include <stdint.h>

/* Instruction sets by the names that DLATTN_CPU and listings give them. */
struct cpu_set {
    uint32_t bits; /* CPU_* */
    const char *name;
};
extern const struct cpu_set cpu_sets[];
extern const int32_t cpu_set_count;

/* The CPU_* of this machine, with what the operating system must do for them. */
uint32_t cpu_detect(void);

void cpu_name(char name[128]);

/* In a loop that waits for another thread. */
void cpu_pause(void);

#endif /* DLATTN_CPU_H_ */
