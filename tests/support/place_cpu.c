#define _GNU_SOURCE
#include "tests/support/place.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLACK = 0xc3 }; /* of the bytes between a block and the further guard page */

static struct block take(size_t bytes, size_t alignment, enum side side) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t inside = (bytes + alignment + page) / page * page;
    struct block b = {.bytes = bytes, .owner_bytes = inside + 2 * page};
    unsigned char *map = mmap(NULL, b.owner_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map + page, inside, PROT_READ | PROT_WRITE) != 0)
        abort();
    memset(map + page, SLACK, inside);
    const uintptr_t end = (uintptr_t)map + page + inside;
    b.owner = map;
    b.data = side == AT_BEGIN ? map + page
                              : map + ((end - bytes) / alignment * alignment - (uintptr_t)map);
    return b;
}

static void give(struct block *b) {
    munmap(b->owner, b->owner_bytes);
    b->data = NULL;
}

static void store(const struct block *b, const void *from) { memcpy(b->data, from, b->bytes); }

static bool all_slack(const unsigned char *begin, const unsigned char *end) {
    return begin >= end ||
           (*begin == SLACK && memcmp(begin, begin + 1, (size_t)(end - begin) - 1) == 0);
}

static bool fetch(const struct block *b, void *to) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const unsigned char *begin = (unsigned char *)b->owner + page,
                        *end = begin + b->owner_bytes - 2 * page;
    memcpy(to, b->data, b->bytes);
    return all_slack(begin, b->data) && all_slack(b->data + b->bytes, end);
}

const struct place place_cpu = {
    .device = {kDLCPU, 0},
    .take = take,
    .give = give,
    .store = store,
    .fetch = fetch,
};
