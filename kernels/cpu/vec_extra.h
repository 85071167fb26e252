/* Bias and mask of a query row, whatever their strides. Included after vec_*.h. */
#ifndef DLATTN_VEC_EXTRA_H_
#define DLATTN_VEC_EXTRA_H_

#include "kernels/cpu/vec_math.h"

/* n elements, `stride` apart. */
VEC_INLINE vec load_strided(const char *p, enum dtype dtype, int64_t stride, int64_t n) {
    const int64_t bytes = dtype_bytes(dtype);
    char part[VEC_LANES * sizeof(float)];
    if (stride == 1)
        return load_some(p, dtype, n);
    if (stride == 0)
        return vec_set((float)load_element(p, dtype, 0));
    for (int64_t j = 0; j < n; j++) {
        if (bytes == 4)
            memcpy(part + j * 4, p + j * stride * 4, 4);
        else
            memcpy(part + j * 2, p + j * stride * 2, 2);
    }
    return load_some(part, dtype, n);
}

/* x, HIDDEN where the mask is 0. */
VEC_INLINE vec hide(vec x, const uint8_t *mask, int64_t stride, int64_t n) {
    const vec hidden = vec_set(bits_float(HIDDEN_BITS));
    uint8_t part[VEC_LANES];
    if (stride == 0)
        return *mask ? x : hidden;
    for (int64_t j = 0; stride != 1 && j < n; j++)
        part[j] = mask[j * stride];
    return vec_blend(hidden, x, vec_load_flags(stride == 1 ? mask : part, n));
}

/* to[j] = extra logit of key first_key + j, padded to whole vectors. */
VEC_FN static void load_extra_row(float *to, const struct extra_row *row,
                                  const struct extra_layout *layout, int64_t first_key, int32_t n) {
    for (int64_t j = 0; j < n; j += VEC_LANES) {
        const int64_t some = at_most(n - j, VEC_LANES), k = first_key + j;
        vec x = vec_set(0);
        if (row->bias)
            x = load_strided(row->bias + k * layout->bias_stride * dtype_bytes(layout->bias_dtype),
                             layout->bias_dtype, layout->bias_stride, some);
        if (row->mask)
            x = hide(x, row->mask + k * layout->mask_stride, layout->mask_stride, some);
        vec_store(to + j, x);
    }
}

#endif /* DLATTN_VEC_EXTRA_H_ */
