/* Managed DLPack tensors: opening the slots of a call, and giving them back. */
#ifndef DLATTN_DLPACK_H_
#define DLATTN_DLPACK_H_

#include "src/slots.h"

enum managed { MANAGED, MANAGED_VERSIONED };

/* dlattn_managed_tensors or dlattn_versioned_tensors: both are a size and the same pointers. */
struct managed_slots {
    size_t struct_size;
    void *slot[TENSOR_SLOTS];
};
_Static_assert(sizeof(struct managed_slots) == sizeof(dlattn_tensors),
               "slots are pointers after struct_size");
_Static_assert(sizeof(dlattn_managed_tensors) == sizeof(dlattn_tensors),
               "the slot lists are one list");
_Static_assert(sizeof(dlattn_versioned_tensors) == sizeof(dlattn_tensors),
               "the slot lists are one list");

/* Borrows the DLTensor of each slot. Refuses another major version and READ_ONLY outputs. */
int32_t managed_open(enum managed kind, const struct managed_slots *slots, dlattn_tensors *tensors);

/* Runs the deleter of each distinct tensor once. */
void managed_release(enum managed kind, const struct managed_slots *slots);

#endif /* DLATTN_DLPACK_H_ */
