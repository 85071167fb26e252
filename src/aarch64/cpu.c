/* No row asks for an instruction set of Arm yet: rows without needs run everywhere. */
#include "src/cpu.h"

#include <string.h>

const struct cpu_set cpu_sets[] = {{0, ""}};
const int32_t cpu_set_count = 0;

uint32_t cpu_detect(void) { return 0; }

void cpu_name(char name[128]) { strcpy(name, "aarch64"); }

/* Longer than `yield`, which most cores skip. */
void cpu_pause(void) { __asm__ volatile("isb" ::: "memory"); }
