/*
 * The part of XLA's FFI (C API, versions 0.1 and later) that one handler needs. Fields and values
 * are as xla/ffi/api/c_api.h has them; what no handler of ours reads is left out at the end of a
 * struct. Structs that XLA checks by size are whole.
 *
 * A handler that uses 0.1 alone is loaded by every later runtime, so nothing newer may be added.
 */
#ifndef DLATTN_XLA_FFI_H_
#define DLATTN_XLA_FFI_H_

#include <stddef.h>
#include <stdint.h>

typedef struct xla_error xla_error;     /* opaque; XLA owns what a handler returns */
typedef struct xla_context xla_context; /* opaque */

typedef struct xla_extension {
    size_t struct_size;
    int32_t type;
    struct xla_extension *next;
} xla_extension;

typedef struct xla_version {
    size_t struct_size;
    xla_extension *extension;
    int32_t major, minor;
} xla_version;

/* ---- Metadata: what XLA asks a handler before its first call ---- */

enum { XLA_EXTENSION_METADATA = 1 };
enum { XLA_COMMAND_BUFFER_COMPATIBLE = 1 }; /* may be captured in a CUDA graph */

typedef struct xla_metadata {
    size_t struct_size;
    xla_version api_version;
    uint32_t traits;
} xla_metadata;

typedef struct xla_metadata_extension {
    xla_extension base;
    xla_metadata *metadata;
} xla_metadata_extension;

/* ---- Buffers and attributes ---- */

enum {
    XLA_PRED = 1,
    XLA_S8 = 2,
    XLA_S16 = 3,
    XLA_S32 = 4,
    XLA_S64 = 5,
    XLA_U8 = 6,
    XLA_U16 = 7,
    XLA_U32 = 8,
    XLA_U64 = 9,
    XLA_F16 = 10,
    XLA_F32 = 11,
    XLA_F64 = 12,
    XLA_BF16 = 16,
    XLA_F8E5M2 = 19,
    XLA_F8E4M3FN = 20,
};

/* Dense, in the layout that ffi_call asked for: row-major. */
typedef struct xla_buffer {
    size_t struct_size;
    xla_extension *extension;
    int32_t dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} xla_buffer;

typedef struct xla_buffers {
    size_t struct_size;
    xla_extension *extension;
    int64_t size;
    int32_t *types;
    xla_buffer **items;
} xla_buffers;

typedef struct xla_span {
    const char *text; /* not terminated */
    size_t length;
} xla_span;

enum { XLA_ATTRIBUTE_SCALAR = 3 };

typedef struct xla_scalar {
    int32_t dtype;
    const void *value;
} xla_scalar;

typedef struct xla_attributes {
    size_t struct_size;
    xla_extension *extension;
    int64_t size;
    int32_t *types;
    xla_span **names;
    void **items;
} xla_attributes;

/* ---- The runtime's functions ---- */

/* Codes are those of absl::StatusCode. */
enum {
    XLA_INVALID_ARGUMENT = 3,
    XLA_FAILED_PRECONDITION = 9,
    XLA_UNIMPLEMENTED = 12,
    XLA_INTERNAL = 13
};

typedef struct xla_error_create_args {
    size_t struct_size;
    xla_extension *extension;
    const char *message; /* copied */
    int32_t code;
} xla_error_create_args;

typedef struct xla_error_destroy_args {
    size_t struct_size;
    xla_extension *extension;
    xla_error *error;
} xla_error_destroy_args;

typedef struct xla_stream_get_args {
    size_t struct_size;
    xla_extension *extension;
    xla_context *context;
    void *stream; /* out */
} xla_stream_get_args;

typedef struct xla_schedule_args {
    size_t struct_size;
    xla_extension *extension;
    xla_context *context;
    void (*task)(void *data);
    void *data;
} xla_schedule_args;

typedef void (*xla_unused)(void);

/* The runtime's table: jaxlib and its CUDA plugin have one each, so it is never kept. */
typedef struct xla_api {
    size_t struct_size;
    xla_extension *extension;
    xla_version version;
    const void *internal;
    xla_error *(*error_create)(xla_error_create_args *);
    xla_unused error_get_message;
    void (*error_destroy)(xla_error_destroy_args *);
    xla_unused handler_register;
    xla_error *(*stream_get)(xla_stream_get_args *);
    xla_unused type_register, context_get, state_set, state_get, memory_allocate, memory_free;
    xla_error *(*schedule)(xla_schedule_args *);
} xla_api;

/* ---- A call ---- */

typedef struct xla_call {
    size_t struct_size;
    xla_extension *extension;
    const xla_api *api;
    xla_context *context;
    int32_t stage;
    xla_buffers arguments;
    xla_buffers results;
    xla_attributes attributes;
} xla_call;

_Static_assert(sizeof(xla_buffer) == 48 && sizeof(xla_buffers) == 40, "as XLA has them");
_Static_assert(offsetof(xla_call, arguments) == 40 && offsetof(xla_call, results) == 80 &&
                   offsetof(xla_call, attributes) == 120,
               "as XLA has them");
_Static_assert(offsetof(xla_api, error_create) == 48 && offsetof(xla_api, stream_get) == 80 &&
                   offsetof(xla_api, schedule) == 136,
               "as XLA has them");

#endif /* DLATTN_XLA_FFI_H_ */
