#include "kernels/cuda/common/tile.h"

static bool covers(const struct tile *t, int32_t extras, const struct problem *p,
                   const struct caps *caps) {
    return t->dim_qk >= p->dim_qk && t->dim_v >= p->dim_v && t->extras >= extras &&
           t->kernels[0].shared_memory_bytes <= caps->shared_memory_bytes;
}

/* A multiprocessor has 1 KiB more than one block may use, and the driver takes 1 KiB of each block. */
static bool held(const struct tile *t, const struct caps *caps) {
    return (caps->shared_memory_bytes + 1024) / (t->kernels[0].shared_memory_bytes + 1024) >=
           t->blocks;
}

int32_t choose_tile(const struct tile *tiles, int32_t count, int32_t extras,
                    const struct problem *p, const struct caps *caps, tile_suits suits) {
    int32_t best = -1;
    for (int32_t i = 0; i < count; i++) {
        const struct tile *const t = &tiles[i];
        if (!covers(t, extras, p, caps))
            continue;
        if (best >= 0 && (t->dim_qk != tiles[best].dim_qk || t->dim_v != tiles[best].dim_v))
            break;
        best = i;
        if (held(t, caps) && (!suits || suits(t, p, caps)))
            break;
    }
    return best;
}
