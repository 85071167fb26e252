/* Element types: one line for each, from which all that is known of them is made. */
#ifndef DLATTN_DTYPE_H_
#define DLATTN_DTYPE_H_

#include "abi/dlattn.h"

#include <stdbool.h>
#include <stdint.h>

/* DTYPE(constant, name in listings, name as frameworks print it, DLPack code, bytes) */
#define DTYPE_LIST(DTYPE)                                                                          \
    DTYPE(F64, "f64", "float64", kDLFloat, 8)                                                      \
    DTYPE(F32, "f32", "float32", kDLFloat, 4)                                                      \
    DTYPE(F16, "f16", "float16", kDLFloat, 2)                                                      \
    DTYPE(BF16, "bf16", "bfloat16", kDLBfloat, 2)                                                  \
    DTYPE(E4M3, "e4m3", "float8_e4m3fn", kDLFloat8_e4m3fn, 1)                                      \
    DTYPE(E5M2, "e5m2", "float8_e5m2", kDLFloat8_e5m2, 1)

enum dtype {
#define CONSTANT(constant, ...) DTYPE_##constant,
    DTYPE_LIST(CONSTANT)
#undef CONSTANT
        DTYPE_COUNT
};

#define DTYPE_BIT(d) (1u << (d))

/* What an output may be. */
#define WIDE_DTYPES                                                                                \
    (DTYPE_BIT(DTYPE_F64) | DTYPE_BIT(DTYPE_F32) | DTYPE_BIT(DTYPE_F16) | DTYPE_BIT(DTYPE_BF16))

static inline int64_t dtype_bytes(enum dtype d) {
    switch (d) {
#define BYTES(constant, name, full_name, code, bytes)                                              \
    case DTYPE_##constant:                                                                         \
        return bytes;
        DTYPE_LIST(BYTES)
#undef BYTES
    case DTYPE_COUNT:
        break;
    }
    return 0;
}

static inline bool dtype_is_float8(enum dtype d) { return d == DTYPE_E4M3 || d == DTYPE_E5M2; }

/* "bf16", and as frameworks call it, "bfloat16". */
const char *dtype_name(enum dtype d);
const char *dtype_full_name(enum dtype d);

/* False for types that are not in the list. */
bool dtype_of(DLDataType dl, enum dtype *dtype);

/* Names of a set of DTYPE_BIT()s, "f32 f16 bf16". Static. */
const char *dtype_list(uint32_t set);

/* As frameworks print it, "int64", also for types that are not in the list; into text[DTYPE_TEXT], which is returned. */
enum { DTYPE_TEXT = 48 };
const char *dtype_text(DLDataType dl, char *text);

#endif /* DLATTN_DTYPE_H_ */
