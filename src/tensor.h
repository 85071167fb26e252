/*
 * One DLTensor of a call: opened, its shape read axis by axis, its addresses compared with those of others. Every refusal names
 * the tensor, the axis and both values.
 */
#ifndef DLATTN_TENSOR_H_
#define DLATTN_TENSOR_H_

#include "src/problem.h"

/* Fails the calling function, too. */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        const int32_t status_ = (call);                                                            \
        if (status_ != DLATTN_OK)                                                                  \
            return status_;                                                                        \
    } while (0)

/* A DLTensor that passed the checks which need no other tensor: axes in the caller's order. Absent: dl == NULL. */
struct tensor {
    const char *name;
    const DLTensor *dl;
    DLDataType dtype;    /* its own, or what the caller says that a uint8 tensor holds */
    int64_t stride[4];   /* elements; 0 on axes of extent 0 or 1 */
    int64_t bytes;       /* of an element */
    int64_t first, last; /* least and greatest offset of an element, in elements */
    bool empty;
};

/* `axes`: how many the tensor must have. Without data, `dl->data` may be NULL. */
int32_t tensor_open(struct tensor *t, const char *name, const DLTensor *dl, int32_t axes,
                    bool with_data);

bool tensor_is_on_gpu(const struct tensor *t);
/* Base and all strides of the outer axes are multiples of 16 bytes. */
bool tensor_is_aligned(const struct tensor *t);
bool tensor_is_compact(const struct tensor *t);

/* The tensor lies where the call runs: p->backend and p->device_id, as tensor_device() has set them from query. */
void tensor_device(struct problem *p, const struct tensor *tensors, int count);
int32_t tensor_check_device(const struct problem *p, const struct tensor *t,
                            const struct tensor *first);

/* An output: no two of its elements share memory. */
int32_t tensor_check_writable(const struct tensor *t);
/* Whether two tensors have a byte in common; they may interleave in one buffer. */
bool tensor_overlap(const struct tensor *a, const struct tensor *b);
/* A GPU faults on an element that is not aligned to its own size, and the fault ends the whole context. */
int32_t tensor_check_alignment(const struct tensor *t);

/*
 * Axes are letters: B batch, H query heads, G kv heads, Q and K lengths, D and V head dims, T and U rows of packed query and key,
 * P pages, S page size, N columns of a block table, C batch + 1, M and W blocks of rows and keys, 1 one. The first tensor that
 * has a letter says how long it is, the others must agree; a small letter may also be 1.
 */
enum { LETTERS = 128 };
struct extents {
    int64_t of[LETTERS];       /* -1: not known yet */
    const char *from[LETTERS]; /* of those that are known */
};
void extents_start(struct extents *e);
void extents_set(struct extents *e, char letter, int64_t extent, const char *from);

/* Reads a shape, and makes the view: the axes of four letters in their order, those of fewer where `struct view` says. */
int32_t tensor_read(const struct tensor *t, const char *axes, struct extents *e, struct view *v);

/* dtypes: DTYPE_BIT()s; `want` says in words what they are. */
int32_t tensor_read_dtype(const struct tensor *t, uint32_t dtypes, const char *want,
                          enum dtype *dtype);
int32_t tensor_refuse_dtype(int32_t status, const struct tensor *t, const char *want);
int32_t tensor_expect_int32(const struct tensor *t);
int32_t tensor_expect_bool(const struct tensor *t);

/* What a uint8 tensor holds, where the caller says so; all zero: it does not. */
int32_t tensor_override_dtype(struct tensor *t, DLDataType holds);

#endif /* DLATTN_TENSOR_H_ */
