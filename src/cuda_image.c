#include "src/cuda_image.h"

#include "src/kernel.h"

#include <lzma.h>
#include <stdlib.h>

/* That of third_party/cuda/image.bzl. */
enum { DICTIONARY_BYTES = 8 << 20 };

static bool runs_on(const struct cuda_image *image, int32_t sm) {
    switch ((enum cuda_image_kind)image->kind) {
    case CUDA_CODE:
        return image->sm <= sm && image->sm / 10 == sm / 10;
    case CUDA_CODE_EXACT:
        return image->sm == sm;
    case CUDA_PTX:
        return image->sm <= sm;
    }
    return false;
}

static bool is_better(const struct cuda_image *a, const struct cuda_image *b) {
    if ((a->kind == CUDA_PTX) != (b->kind == CUDA_PTX))
        return b->kind == CUDA_PTX;
    return a->sm != b->sm ? a->sm > b->sm : a->driver > b->driver;
}

static const struct cuda_image *best_of(const struct cuda_image *images, int32_t sm,
                                        int32_t driver) {
    const struct cuda_image *best = NULL;
    for (const struct cuda_image *i = images; i->sm != 0; i++)
        if (i->driver <= driver && runs_on(i, sm) && (!best || is_better(i, best)))
            best = i;
    return best;
}

int32_t cuda_image_unpack(const struct cuda_image *images, int32_t sm, int32_t driver,
                          void **code) {
    const struct cuda_image *const best = best_of(images, sm, driver);
    if (!best)
        return fail(DLATTN_UNSUPPORTED, "there is no code for sm_%d", sm);
    uint8_t *const out = malloc(best->bytes + 1);
    if (!out)
        return fail(DLATTN_OUT_OF_MEMORY, "code for sm_%d: no memory for %llu bytes", sm,
                    (unsigned long long)best->bytes);
    lzma_options_lzma options = {.dict_size = DICTIONARY_BYTES};
    const lzma_filter filters[] = {{LZMA_FILTER_LZMA2, &options}, {LZMA_VLI_UNKNOWN, NULL}};
    size_t from = 0, to = 0;
    const lzma_ret result =
        lzma_raw_buffer_decode(filters, NULL, (const uint8_t *)images + best->offset, &from,
                               best->packed_bytes, out, &to, best->bytes);
    if (result != LZMA_OK || to != best->bytes) {
        free(out);
        return result == LZMA_MEM_ERROR
                   ? fail(DLATTN_OUT_OF_MEMORY, "code for sm_%d: no memory to unpack it", sm)
                   : fail(DLATTN_INTERNAL, "code for sm_%d: damaged (lzma %d)", sm, (int)result);
    }
    out[to] = 0;
    *code = out;
    return DLATTN_OK;
}
