/* kernels.inc as a table. */
#include "src/kernel.h"

#define F64 DTYPE_BIT(DTYPE_F64)
#define F32 DTYPE_BIT(DTYPE_F32)
#define F16 DTYPE_BIT(DTYPE_F16)
#define BF16 DTYPE_BIT(DTYPE_BF16)
#define E4M3 DTYPE_BIT(DTYPE_E4M3)
#define E5M2 DTYPE_BIT(DTYPE_E5M2)

/* What there was in 1.0; a later feature is one that a row has only if it names it. */
#define FLOAT8 (E4M3 | E5M2)
#define FEATURES_1_0 UINT64_C(0xffff)
#define FEATURES_FLOAT8 (FEATURES_1_0 | DLATTN_FEATURE_MIXED_DTYPES | DLATTN_FEATURE_SCALES)
#define EVERY_FEATURE UINT64_C(0x3fffff)

#define KERNEL(name, ...) ROW_FUNCTIONS(name);
#include "kernels/kernels.inc"
#undef KERNEL

#define KERNEL(name_, ...)                                                                         \
    {.name = #name_, __VA_ARGS__, .plan = name_##_plan, .launch = name_##_launch},
const struct kernel kernel_table[] = {
#include "kernels/kernels.inc"
};
#undef KERNEL

const int32_t kernel_table_size = sizeof kernel_table / sizeof kernel_table[0];
