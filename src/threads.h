/* The built-in pool; kernels enter through threads_run() of kernel.h. */
#ifndef DLATTN_THREADS_H_
#define DLATTN_THREADS_H_

#include <stdint.h>

/* More threads than this are not planned for. */
enum { MAX_THREADS = 1024 };

/* DLATTN_NUM_THREADS, or the cores that this process may use. Found once. */
int32_t threads_default(void);

#endif /* DLATTN_THREADS_H_ */
