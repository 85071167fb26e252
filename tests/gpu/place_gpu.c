/* Blocks in the memory of GPU 0, between canaries. */
#include "tests/gpu/cuda.h"
#include "tests/support/place.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { CANARY = 0xc3, BORDER = 1024 };

static struct block take(size_t bytes, size_t alignment, enum side side) {
    const size_t inside = (bytes + alignment) / alignment * alignment;
    struct block b = {.bytes = bytes, .owner_bytes = inside + 2 * BORDER};
    unsigned char *const image = malloc(b.owner_bytes);
    assert(image && BORDER % alignment == 0);
    memset(image, CANARY, b.owner_bytes);
    b.owner = cuda_take(b.owner_bytes);
    cuda_store(b.owner, image, b.owner_bytes);
    free(image);
    b.data = (unsigned char *)b.owner + BORDER;
    if (side == AT_END)
        b.data += (inside - bytes) / alignment * alignment;
    return b;
}

static void give(struct block *b) {
    cuda_give(b->owner);
    b->data = NULL;
}

static void store(const struct block *b, const void *from) { cuda_store(b->data, from, b->bytes); }

static bool fetch(const struct block *b, void *to) {
    unsigned char *const image = malloc(b->owner_bytes);
    const size_t begin = (size_t)(b->data - (unsigned char *)b->owner), end = begin + b->bytes;
    bool holds = true;
    assert(image);
    cuda_fetch(image, b->owner, b->owner_bytes);
    memcpy(to, image + begin, b->bytes);
    for (size_t i = 0; i < b->owner_bytes && holds; i++)
        holds = (i >= begin && i < end) || image[i] == CANARY;
    free(image);
    return holds;
}

const struct place place_gpu = {
    .device = {kDLCUDA, 0},
    .take = take,
    .give = give,
    .store = store,
    .fetch = fetch,
    .wait = cuda_wait,
};
