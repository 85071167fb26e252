/*
 * As much of the CUDA driver as the tests need, opened at run time: a test program asks for nothing but a driver.
 */
#ifndef DLATTN_TESTS_CUDA_H_
#define DLATTN_TESTS_CUDA_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The number of GPUs; 0 without a driver. The first call opens it and makes device 0's primary context current. */
int cuda_open(void);

/* Makes the primary context of a device current in this thread; -1: none. Memory and streams are the current one's. */
void cuda_use(int device);

/* Device memory, aligned to 512 bytes. These abort when the driver refuses: then no test can go on. */
unsigned char *cuda_take(size_t bytes);
void cuda_give(unsigned char *data);
unsigned char *cuda_take_managed(size_t bytes); /* given back like other device memory */
unsigned char *cuda_take_pinned(size_t bytes);  /* host memory that GPUs can reach */
void cuda_give_pinned(unsigned char *data);
void cuda_store(unsigned char *to, const void *from, size_t bytes);
void cuda_fetch(void *to, const unsigned char *from, size_t bytes);
void cuda_wait(void);

/* A stream of its own; or one that, by CUDA's rules, takes turns with the legacy default stream. */
void *cuda_stream(void);
void *cuda_stream_with_default(void);

/* What is enqueued between begin and end is not run but recorded; replay runs and awaits it. */
void cuda_record_begin(void *stream);
void *cuda_record_end(void *stream);
void cuda_record_give_up(void *stream);
void cuda_replay(void *graph, void *stream);

#endif /* DLATTN_TESTS_CUDA_H_ */
