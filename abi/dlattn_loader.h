/*
 * Finding and opening libdlattn from a C or C++ host; header only, needs libdl (part of libc since
 * glibc 2.34).
 *
 *     char why[1024];
 *     const dlattn_api *api = dlattn_open(why, sizeof why);
 *     if (!api) puts(why);
 *
 * The search order is: the file that DLATTN_LIBRARY names and no other; libdlattn.so.1 beside the
 * program or library that this code is compiled into; the system's search (LD_LIBRARY_PATH,
 * ld.so.cache). The library is never closed: kernels, drivers and thread-local state may outlive
 * every caller. Thread-safe; costs a dlopen() each time, so keep the pointer.
 */
#ifndef DLATTN_LOADER_H_
#define DLATTN_LOADER_H_

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr() */
#endif

#include "dlattn.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef RTLD_DEFAULT
#error "dlattn_loader.h needs dladdr(): include it before system headers, or define _GNU_SOURCE"
#endif

#define DLATTN_SONAME "libdlattn.so.1"

/* Opens one file; on failure appends a line to why[size]. */
static inline const dlattn_api *dlattn_open_file(const char *path, char *why, size_t size) {
    const size_t used = strlen(why);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why + used, size - used, "  %s: %s\n", path, dlerror());
        return NULL;
    }
    dlattn_get_api_fn get = NULL;
    void *symbol = dlsym(library, "dlattn_get_api");
    memcpy(&get, &symbol, sizeof get); /* ISO C has no cast from object to function pointer */
    const dlattn_api *api = get ? get(DLATTN_ABI_MAJOR) : NULL;
    if (!get)
        snprintf(why + used, size - used, "  %s: has no dlattn_get_api\n", path);
    else if (!api)
        snprintf(why + used, size - used, "  %s: does not serve ABI %d\n", path, DLATTN_ABI_MAJOR);
    else if (api->struct_size < offsetof(dlattn_api, device_info) + sizeof api->device_info) {
        snprintf(why + used, size - used, "  %s: serves ABI %u.%u, this program needs %d.%d\n", path, api->abi_major,
                 api->abi_minor, DLATTN_ABI_MAJOR, DLATTN_ABI_MINOR);
        api = NULL;
    }
    return api;
}

/* Path of libdlattn.so.1 in the folder of the file that holds this code; "" if that folder has no
 * name. */
static inline void dlattn_path_beside(char *path, size_t size) {
    static const char here = 0;
    Dl_info info;
    path[0] = '\0';
    if (!dladdr(&here, &info) || !info.dli_fname)
        return;
    const char *slash = strrchr(info.dli_fname, '/');
    const int folder = slash ? (int)(slash - info.dli_fname) + 1 : 0;
    const int length =
        snprintf(path, size, "%.*s%s", folder, info.dli_fname, slash ? DLATTN_SONAME : "./" DLATTN_SONAME);
    if (length < 0 || (size_t)length >= size)
        path[0] = '\0';
}

/* The library's table, or NULL with the places searched, and why each failed, in why[size]. size is
 * at least 1. */
static inline const dlattn_api *dlattn_open(char *why, size_t size) {
    const char *named = getenv("DLATTN_LIBRARY");
    const dlattn_api *api;
    char beside[4096];
    snprintf(why, size, "libdlattn was not found%s:\n", named && *named ? " where DLATTN_LIBRARY says" : "");
    if (named && *named)
        return dlattn_open_file(named, why, size);
    dlattn_path_beside(beside, sizeof beside);
    if (beside[0] && (api = dlattn_open_file(beside, why, size)) != NULL)
        return api;
    return dlattn_open_file(DLATTN_SONAME, why, size);
}

#endif /* DLATTN_LOADER_H_ */
