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

#include "dlattn.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DLATTN_SONAME "libdlattn.so.1"

/* dladdr() and its Dl_info under names of our own: <dlfcn.h> has them only with _GNU_SOURCE, which
 * is too late to define where a system header came before this one. */
struct dlattn_dl_info {
    const char *file_name;
    void *file_base;
    const char *symbol_name;
    void *symbol_address;
};
extern int dlattn_dladdr(const void *address, struct dlattn_dl_info *info) __asm__("dladdr");

/* Appends text to the string in why[size], as far as there is room. */
static inline void dlattn_append(char *why, size_t size, const char *text) {
    size_t used = strlen(why);
    while (*text && used + 1 < size)
        why[used++] = *text++;
    why[used] = '\0';
}

/* Appends "  path: reason" and a newline. */
static inline void dlattn_append_reason(char *why, size_t size, const char *path, const char *reason) {
    dlattn_append(why, size, "  ");
    dlattn_append(why, size, path);
    dlattn_append(why, size, ": ");
    dlattn_append(why, size, reason);
    dlattn_append(why, size, "\n");
}

/* Opens one file; on failure appends a line to why[size]. */
static inline const dlattn_api *dlattn_open_file(const char *path, char *why, size_t size) {
    char versions[80];
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *reason = dlerror();
        dlattn_append_reason(why, size, path, reason ? reason : "cannot be opened");
        return NULL;
    }
    dlattn_get_api_fn get = NULL;
    void *symbol = dlsym(library, "dlattn_get_api");
    memcpy(&get, &symbol, sizeof get); /* ISO C has no cast from object to function pointer */
    const dlattn_api *api = get ? get(DLATTN_ABI_MAJOR) : NULL;
    if (!get) {
        dlattn_append_reason(why, size, path, "has no dlattn_get_api");
    } else if (!api) {
        snprintf(versions, sizeof versions, "does not serve ABI %d", DLATTN_ABI_MAJOR);
        dlattn_append_reason(why, size, path, versions);
    } else if (api->struct_size < offsetof(dlattn_api, device_info) + sizeof api->device_info) {
        snprintf(versions, sizeof versions, "serves ABI %u.%u, this program needs %d.%d", api->abi_major,
                 api->abi_minor, DLATTN_ABI_MAJOR, DLATTN_ABI_MINOR);
        dlattn_append_reason(why, size, path, versions);
        api = NULL;
    }
    return api;
}

/* Path of libdlattn.so.1 in the folder of the file that holds this code; "" if that folder has no
 * name. */
static inline void dlattn_path_beside(char *path, size_t size) {
    static const char here = 0;
    struct dlattn_dl_info info;
    path[0] = '\0';
    if (!dlattn_dladdr(&here, &info) || !info.file_name)
        return;
    const char *slash = strrchr(info.file_name, '/');
    const char *name = slash ? DLATTN_SONAME : "./" DLATTN_SONAME;
    const size_t folder = slash ? strlen(info.file_name) - strlen(slash) + 1 : 0;
    if (folder + strlen(name) >= size)
        return;
    memcpy(path, info.file_name, folder);
    path[folder] = '\0';
    dlattn_append(path, size, name);
}

/* The library's table, or NULL with the places searched, and why each failed, in why[size]. size is
 * at least 1. */
static inline const dlattn_api *dlattn_open(char *why, size_t size) {
    const char *named = getenv("DLATTN_LIBRARY");
    const dlattn_api *api;
    char beside[4096];
    why[0] = '\0';
    dlattn_append(why, size, "libdlattn was not found");
    if (named && *named) {
        dlattn_append(why, size, " where DLATTN_LIBRARY says:\n");
        return dlattn_open_file(named, why, size);
    }
    dlattn_append(why, size, ":\n");
    dlattn_path_beside(beside, sizeof beside);
    if (beside[0] && (api = dlattn_open_file(beside, why, size)) != NULL)
        return api;
    return dlattn_open_file(DLATTN_SONAME, why, size);
}

#ifdef __cplusplus
}
#endif

#endif /* DLATTN_LOADER_H_ */
