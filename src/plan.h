/* Choosing a row of the kernel table. */
#ifndef DLATTN_PLAN_H_
#define DLATTN_PLAN_H_

#include "src/kernel.h"

/* The first row that accepts, with its numbers. Pure: any problem on any machine, no device is
 * asked. When nothing accepts, the message names the nearest row and what it lacks. */
int32_t plan_choose(struct plan *plan, const struct problem *p, const struct caps *caps);

/* CPU threads that pay where the caller left the number open, at most `most`: waking one takes 5 to 35 us, so each gets
 * about as much work. */
int32_t plan_threads(const struct problem *p, int32_t most);

/* What a caller is told about a choice. `sku->struct_size` is left alone. */
void plan_describe(const struct plan *plan, const struct problem *p, dlattn_sku *sku);

/* DLATTN_KERNEL_* of a row. */
uint64_t kernel_flags(const struct kernel *k);

/* True if a machine with these capabilities can run the row. */
bool kernel_available(const struct kernel *k, const struct caps *caps);

/* Names of feature bits, "causal softcap", into text[size]; returns text. */
const char *feature_names(uint64_t bits, char *text, size_t size);

#endif /* DLATTN_PLAN_H_ */
