/*
 * Where the tensors of a test lie while a kernel runs. A place hands out blocks at whose ends a stray access is noticed: on
 * the CPU (place_cpu) by pages that may not be touched; a GPU's place fills the surroundings with canaries.
 */
#ifndef DLATTN_TESTS_PLACE_H_
#define DLATTN_TESTS_PLACE_H_

#include <dlattn.h>

#include <stdbool.h>
#include <stddef.h>

/* Which end of a block touches the forbidden memory; the other is as near as its size permits. */
enum side { AT_BEGIN, AT_END };

struct block {
    unsigned char *data;
    size_t bytes;
    void *owner; /* the place's own */
    size_t owner_bytes;
};

struct place {
    DLDevice device;
    /* A block of `bytes` bytes, `data` a multiple of `alignment` (at most 256). Aborts when there is no memory. */
    struct block (*take)(size_t bytes, size_t alignment, enum side side);
    void (*give)(struct block *block);
    /* Between host memory and the block. fetch() is false if memory around the block has changed. */
    void (*store)(const struct block *block, const void *from);
    bool (*fetch)(const struct block *block, void *to);
    /* Waits for what was enqueued; NULL where calls return when they are done. */
    void (*wait)(void);
};

extern const struct place place_cpu;
extern const struct place place_gpu; /* //tests/gpu */

#endif /* DLATTN_TESTS_PLACE_H_ */
