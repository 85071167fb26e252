#include "src/empty.h"
#include "src/cuda_driver.h"

#include <string.h>

static int32_t clear(const struct problem *p, char *data, int64_t bytes, void *stream) {
    if (p->backend == BACKEND_CUDA)
        return cuda_clear(data, (size_t)bytes, stream);
    memset(data, 0, (size_t)bytes);
    return DLATTN_OK;
}

/* Zeros in v[extent]: a run of neighbours at a time. */
static int32_t clear_view(const struct problem *p, const struct view *v, const int64_t extent[4],
                          void *stream) {
    const int64_t size = dtype_bytes(v->dtype);
    const int64_t run = v->stride[3] == 1 ? extent[3] : 1, runs = extent[3] / (run ? run : 1);
    int32_t status = DLATTN_OK;
    for (int64_t n = 0; n < extent[0] * extent[1] * extent[2] * runs && status == DLATTN_OK; n++) {
        const int64_t row = n / runs, at = n % runs * v->stride[3] +
                                           row % extent[2] * v->stride[2] +
                                           row / extent[2] % extent[1] * v->stride[1] +
                                           row / extent[2] / extent[1] * v->stride[0];
        status = clear(p, (char *)v->data + at * size, run * size, stream);
    }
    return status;
}

/* An axis of stride 0 has extent 1 in a gradient. */
static int64_t span(const struct view *v, int axis, int64_t extent) {
    return v->stride[axis] != 0 ? extent : 1;
}

/* Where there are keys, but no heads or batch entries that look at them. */
static int32_t clear_keys(const struct problem *p, const struct view *v, int64_t dim,
                          void *stream) {
    const bool packed = p->total_k > 0;
    const int64_t extent[] = {packed ? 1 : p->batch, p->heads_kv, packed ? p->total_k : p->len_k,
                              dim};
    return v->data ? clear_view(p, v, extent, stream) : DLATTN_OK;
}

int32_t empty_write(const struct problem *p, void *stream) {
    const struct view *bias = &p->d_bias, *slopes = &p->d_alibi_slopes, *sinks = &p->d_sinks;
    const int64_t of_bias[] = {span(bias, 0, p->batch), span(bias, 1, p->heads_q),
                               span(bias, 2, p->len_q), span(bias, 3, p->len_k)};
    const int64_t of_slopes[] = {span(slopes, 0, p->batch), p->heads_q, 1, 1};
    const int64_t of_sinks[] = {1, p->heads_q, 1, 1};
    int32_t status = bias->data ? clear_view(p, bias, of_bias, stream) : DLATTN_OK;
    if (status == DLATTN_OK && slopes->data)
        status = clear_view(p, slopes, of_slopes, stream);
    if (status == DLATTN_OK && sinks->data)
        status = clear_view(p, sinks, of_sinks, stream);
    if (status == DLATTN_OK)
        status = clear_keys(p, &p->d_key, p->dim_qk, stream);
    if (status == DLATTN_OK)
        status = clear_keys(p, &p->d_value, p->dim_v, stream);
    return status;
}
