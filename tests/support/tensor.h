/*
 * A tensor of a test. Its storage exists as an image in host memory, gaps between rows included, so that every byte can be
 * compared after a call; place.h puts the image where a kernel can reach it.
 */
#ifndef DLATTN_TESTS_TENSOR_H_
#define DLATTN_TESTS_TENSOR_H_

#include <dlattn.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum element { F64, F32, F16, BF16, I32, U8, E4M3, E5M2 };

size_t element_bytes(enum element e);
const char *element_name(enum element e);
/* Whether a list of dtypes as kernel_info has it, "f32 f16 bf16", names the element type. */
bool element_is_listed(const char *dtypes, enum element e);
/* x as the element type holds it: rounded to nearest even. */
double element_round(enum element e, double x);
/* Half a unit in the last place of 1. */
double element_epsilon(enum element e);

/* How [B, H, L, D] (or packed [L, H, D]) lies in memory. */
enum layout {
    COMPACT,
    COMPACT_NULL, /* strides == NULL */
    HEADS_INNER,  /* [B, L, H, D] memory, transposed */
    SLICED,       /* rows and heads cut out of larger ones, still multiples of 16 bytes */
    ODD,          /* rows 3 elements apart, heads 5 */
    SHIFTED,      /* compact, but the first element is one off a multiple of 16 bytes */
    INNER_2,      /* innermost stride 2 */
    INNER_LAST,   /* innermost axis outermost in memory: a transposed matrix */
    MIXED,        /* each tensor of the call its own */
    LAYOUTS
};
const char *layout_name(enum layout layout);

struct tensor {
    DLTensor dl; /* shape and strides point into this struct; data is set when it is placed */
    int64_t shape[4], stride[4];
    enum element element;
    unsigned char *image;
    size_t bytes;     /* of the storage */
    size_t first;     /* byte at which element 0 lies */
    size_t alignment; /* of the storage's first byte */
};

/* A new tensor whose storage is filled with the byte `fill`. Bit i of `broadcast` gives axis i stride 0. Free with
 * tensor_free. */
void tensor_make(struct tensor *t, enum element e, int ndim, const int64_t *shape,
                 enum layout layout, unsigned broadcast, unsigned char fill);
void tensor_free(struct tensor *t);
void tensor_fill(struct tensor *t, unsigned char fill);
/* A new tensor like `from`, with a copy of its storage. */
void tensor_copy(struct tensor *t, const struct tensor *from);
/* The elements of `from`, which has the shape of `t`, as the type of `t` holds them. */
void tensor_convert(struct tensor *t, const struct tensor *from);
/* All elements in row-major order, to be freed. */
double *tensor_values(const struct tensor *t);

int64_t tensor_count(const struct tensor *t);
/* The next index in row-major order; starts from all zeros. */
void tensor_next(const struct tensor *t, int64_t index[4]);
/* The index of element n in that order. */
void tensor_index(const struct tensor *t, int64_t n, int64_t index[4]);
double tensor_get(const struct tensor *t, const int64_t index[4]);
void tensor_set(struct tensor *t, const int64_t index[4], double value);

/* True where `image`, the storage after a call, still has the byte `fill` outside the elements; else *at is the first byte
 * that changed. */
bool tensor_gaps_hold(const struct tensor *t, unsigned char fill, size_t *at);

#endif /* DLATTN_TESTS_TENSOR_H_ */
