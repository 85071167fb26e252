#include "src/dtype.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name, *full_name;
    DLDataType dl;
} dtypes[DTYPE_COUNT] = {
#define ROW(constant, name, full_name, code, bytes) {name, full_name, {code, 8 * (bytes), 1}},
    DTYPE_LIST(ROW)
#undef ROW
};

const char *dtype_name(enum dtype d) { return dtypes[d].name; }
const char *dtype_full_name(enum dtype d) { return dtypes[d].full_name; }

bool dtype_of(DLDataType dl, enum dtype *dtype) {
    for (int d = 0; d < DTYPE_COUNT; d++) {
        if (dtypes[d].dl.code == dl.code && dtypes[d].dl.bits == dl.bits) {
            *dtype = (enum dtype)d;
            return true;
        }
    }
    return false;
}

/* ---- Lists: made once, as callers keep them */

enum { LISTS = 1 << DTYPE_COUNT, LIST_BYTES = 6 * DTYPE_COUNT };
static char lists[LISTS][LIST_BYTES];
static pthread_once_t lists_once = PTHREAD_ONCE_INIT;

static void make_lists(void) {
    for (uint32_t set = 0; set < LISTS; set++) {
        size_t used = 0;
        for (int d = 0; d < DTYPE_COUNT; d++) {
            if (set & DTYPE_BIT(d))
                used += (size_t)snprintf(lists[set] + used, LIST_BYTES - used, "%s%s",
                                         used ? " " : "", dtypes[d].name);
        }
    }
}

const char *dtype_list(uint32_t set) {
    pthread_once(&lists_once, make_lists);
    return lists[set & (LISTS - 1)];
}

const char *dtype_text(DLDataType dl, char *text) {
    static const char *const kinds[] = {
        [kDLInt] = "int",       [kDLUInt] = "uint",       [kDLFloat] = "float",
        [kDLBfloat] = "bfloat", [kDLComplex] = "complex",
    };
    enum dtype known;
    if (dtype_of(dl, &known))
        return dtype_full_name(known);
    if (dl.code == kDLBool && dl.bits == 8)
        return "bool";
    if (dl.code < sizeof kinds / sizeof kinds[0] && kinds[dl.code])
        snprintf(text, DTYPE_TEXT, "%s%d", kinds[dl.code], dl.bits);
    else
        snprintf(text, DTYPE_TEXT, "DLPack's code %d with %d bits", dl.code, dl.bits);
    return text;
}
