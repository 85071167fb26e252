/* kernels.inc as a table. */
#include "kernels/kernel.h"

#define F64 DTYPE_BIT(DTYPE_F64)
#define F32 DTYPE_BIT(DTYPE_F32)
#define F16 DTYPE_BIT(DTYPE_F16)
#define BF16 DTYPE_BIT(DTYPE_BF16)
#define EVERY_FEATURE UINT64_C(0xffff)

#define KERNEL(name, backend, ...)                                                                 \
    {#name, BACKEND_##backend, __VA_ARGS__, name##_plan, name##_launch},
const struct kernel kernel_table[] = {
#include "kernels/kernels.inc"
};
#undef KERNEL

const int32_t kernel_table_size = sizeof kernel_table / sizeof kernel_table[0];
