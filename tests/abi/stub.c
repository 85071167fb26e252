/*
 * A library as old as ABI 1.0: its table and structs have the sizes of the frozen header, and it does nothing else. Built with
 * BROKEN it is a library that the loader must refuse: 1 has another symbol, 2 another major version, 3 a table cut short.
 */
#include "abi/frozen/dlattn_v1_0.h"

#include <stdbool.h>

#ifndef BROKEN
#define BROKEN 0
#endif

static const char *version(void) { return "stub"; }

static const char *last_error(void) { return "a stub"; }

static const char *status_name(int32_t status) { return status == DLATTN_OK ? "ok" : "not ok"; }

static bool has_tail(const void *theirs, size_t own, size_t size) {
    for (size_t i = own; i < size; i++) {
        if (((const unsigned char *)theirs)[i])
            return true;
    }
    return false;
}

/* Reads as 1.0 read: its own size at least, and a zero tail. */
static int32_t forward_query(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                             dlattn_sku *sku) {
    if (desc->struct_size < sizeof *desc || tensors->struct_size < sizeof *tensors ||
        sku->struct_size < sizeof *sku)
        return DLATTN_INVALID_ARGUMENT;
    if (has_tail(desc, sizeof *desc, desc->struct_size) ||
        has_tail(tensors, sizeof *tensors, tensors->struct_size))
        return DLATTN_UNSUPPORTED;
    const size_t size = sku->struct_size;
    *sku = (dlattn_sku){.struct_size = size, .kernel = "stub"};
    return DLATTN_OK;
}

#if BROKEN == 1
#define dlattn_get_api dlattn_get_something
DLATTN_EXPORT const dlattn_api *dlattn_get_something(uint32_t major);
#endif

const dlattn_api *dlattn_get_api(uint32_t major) {
    static const dlattn_api api = {
        .struct_size = BROKEN == 3 ? offsetof(dlattn_api, plan_run) : sizeof api,
        .abi_major = 1,
        .version = version,
        .last_error = last_error,
        .status_name = status_name,
        .forward_query = forward_query,
    };
    return major == (BROKEN == 2 ? 2 : 1) ? &api : NULL;
}
