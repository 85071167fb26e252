/* The thread's last failure; fail() itself is declared in kernel.h, because kernels call it, too. */
#ifndef DLATTN_ERROR_H_
#define DLATTN_ERROR_H_

#include <stdint.h>

const char *error_last(void);
const char *error_name(int32_t status);

#endif /* DLATTN_ERROR_H_ */
