/* The lists of slots.inc as tables, and what is done to every tensor of a call alike. */
#ifndef DLATTN_SLOTS_H_
#define DLATTN_SLOTS_H_

#include "src/tensor.h"

enum kind { ELEMENT, WIDE, FLOAT, FLOAT32, INT32, BOOL };

struct slot {
    const char *name;
    enum kind kind;
    bool required, written;
    uint64_t feature;
    const char *axes, *packed, *paged, *other; /* see slots.inc */
    int of;                                    /* a gradient: the slot that it belongs to */
    size_t view;                               /* in struct problem */
};

/* Indices: SLOT_query ..., then those of the gradients, SLOT_d_output ... */
enum {
#define TENSOR(name, ...) SLOT_##name,
#include "src/slots.inc"
#undef TENSOR
    TENSOR_SLOTS,
    GRADIENTS_BEFORE = TENSOR_SLOTS - 1,
#define GRADIENT(name, ...) SLOT_##name,
#include "src/slots.inc"
#undef GRADIENT
    ATTENTION_SLOTS
};
enum {
#define APPENDED(name, ...) APPEND_##name,
#include "src/slots.inc"
#undef APPENDED
    APPEND_SLOTS
};
enum { GRADIENT_SLOTS = ATTENTION_SLOTS - TENSOR_SLOTS };

extern const struct slot attention_slots[ATTENTION_SLOTS]; /* tensors, then gradients */
extern const struct slot append_slots[APPEND_SLOTS];

/* In which form tensors come. */
struct forms {
    bool packed_q, packed_k, paged;
};

/* Opens the tensors that are given into t[count], and says in p->present and p->features which. */
int32_t slots_open(struct problem *p, const struct slot *slots, int count,
                   const DLTensor *const *given, struct forms forms, struct tensor *t,
                   bool with_data);
/* All on one device, which becomes the problem's. */
int32_t slots_check_devices(struct problem *p, const struct tensor *t, int count);

/* Dtype and shape of one tensor, into its view. `e` is known to have what other tensors say. */
int32_t slot_read(struct problem *p, const struct slot *slot, const struct tensor *t,
                  struct forms forms, struct extents *e);

/* Outputs: no element twice; with data also: none shared with another tensor, and on a GPU each aligned. `written`: which
 * tensors are outputs. */
int32_t slots_check_memory(const struct problem *p, const struct tensor *t, uint64_t written,
                           bool with_data);

/* for each slot i of a set such as p->present */
#define EACH_SLOT(i, set)                                                                          \
    for (uint64_t left_ = (set), i; left_ && ((i = (uint64_t)__builtin_ctzll(left_)), true);       \
         left_ &= left_ - 1)

static inline struct view *slot_view(struct problem *p, const struct slot *slot) {
    return (struct view *)(void *)((char *)p + slot->view);
}

#endif /* DLATTN_SLOTS_H_ */
