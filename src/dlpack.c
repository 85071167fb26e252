#include "src/dlpack.h"
#include "src/kernel.h"

#include <string.h>

typedef struct DLManagedTensorVersioned managed_versioned;

static int32_t open_versioned(managed_versioned *m, int slot, const DLTensor **out) {
    if (m->version.major != DLPACK_MAJOR_VERSION) /* nothing past `flags` may be read then */
        return fail(DLATTN_VERSION_MISMATCH,
                    "%s: DLPack major version is %u, this library reads %d",
                    attention_slots[slot].name, m->version.major, DLPACK_MAJOR_VERSION);
    if (attention_slots[slot].written && m->flags & DLPACK_FLAG_BITMASK_READ_ONLY)
        return fail(DLATTN_INVALID_ARGUMENT,
                    "%s: is READ_ONLY (flags 0x%llx), an output must be writable",
                    attention_slots[slot].name, (unsigned long long)m->flags);
    *out = &m->dl_tensor;
    return DLATTN_OK;
}

int32_t managed_open(enum managed kind, const struct managed_slots *slots,
                     dlattn_tensors *tensors) {
    const DLTensor *opened[TENSOR_SLOTS] = {0};
    for (int i = 0; i < TENSOR_SLOTS; i++) {
        if (!slots->slot[i])
            continue;
        if (kind == MANAGED) {
            opened[i] = &((DLManagedTensor *)slots->slot[i])->dl_tensor;
            continue;
        }
        int32_t status = open_versioned(slots->slot[i], i, &opened[i]);
        if (status != DLATTN_OK)
            return status;
    }
    tensors->struct_size = sizeof *tensors;
    memcpy((char *)tensors + sizeof(size_t), opened, sizeof opened);
    return DLATTN_OK;
}

static void release(enum managed kind, void *tensor) {
    DLManagedTensor *m = tensor;
    managed_versioned *v = tensor;
    if (kind == MANAGED && m->deleter)
        m->deleter(m);
    if (kind == MANAGED_VERSIONED && v->deleter)
        v->deleter(v);
}

void managed_release(enum managed kind, const struct managed_slots *slots) {
    for (int i = 0; i < TENSOR_SLOTS; i++) {
        bool seen = !slots->slot[i];
        for (int j = 0; j < i && !seen; j++)
            seen = slots->slot[j] == slots->slot[i];
        if (!seen)
            release(kind, slots->slot[i]);
    }
}
