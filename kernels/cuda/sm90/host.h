/*
 * What the C files of Hopper's rows share: from a problem's numbers to those of params.h and of tensor maps.
 */
#ifndef DLATTN_SM90_HOST_H_
#define DLATTN_SM90_HOST_H_

#include "kernels/cuda/common/tile.h"
#include "kernels/cuda/sm90/params.h"

/* What a tensor map can say: [B, H, L, D] with strides above 0 and, also that of `pack` heads, below 2^40 bytes. */
static inline bool mappable(const struct view *v, int64_t batch, int64_t heads, int64_t length,
                            int64_t pack) {
    const int64_t extent[3] = {batch, heads, length}, most = INT64_C(1) << 39;
    for (int i = 0; i < 3; i++) {
        if (extent[i] > 1 && (v->stride[i] <= 0 || v->stride[i] >= (i == 1 ? most / pack : most)))
            return false;
    }
    return true;
}

static inline bool bounded(const struct problem *p) {
    return p->window_left != UNBOUNDED || p->window_right != UNBOUNDED;
}

static inline struct sm90_strides strides(const struct view *v) {
    return (struct sm90_strides){v->stride[0], v->stride[1], v->stride[2]};
}

/* Bytes of a stride; an axis of extent 1 may have any, and a tensor map wants a multiple of 16 above 0. */
static inline uint64_t step(const struct view *v, int64_t stride) {
    return stride > 0 ? (uint64_t)(stride * dtype_bytes(v->dtype)) : 16;
}

static inline struct sm90_divisor divisor(int64_t d) {
    struct sm90_divisor r = {0, 0};
    if (d > 1) {
        r.shift = 31u - (uint32_t)__builtin_clz((uint32_t)d - 1);
        r.multiplier =
            (uint32_t)(((UINT64_C(1) << (32 + r.shift)) + (uint64_t)d - 1) / (uint64_t)d);
    }
    return r;
}

static inline int32_t window(int64_t keys) {
    return keys < SM90_UNBOUNDED ? (int32_t)keys : SM90_UNBOUNDED;
}

/* Keys that one copy brings of pages to a tile of `keys`: as many as divide both. */
static inline int32_t box_keys(const struct problem *p, int32_t keys) {
    int64_t a = keys, b = p->page_size;
    while (b > 0) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return (int32_t)a;
}

#endif /* DLATTN_SM90_HOST_H_ */
