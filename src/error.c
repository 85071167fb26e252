/* Status names and the thread's last message. */
#include "src/error.h"
#include "src/kernel.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512];

int32_t(fail)(int32_t status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

const char *error_last(void) { return message; }

const char *error_name(int32_t status) {
    static const char *const names[] = {
        [DLATTN_OK] = "ok",
        [DLATTN_INVALID_ARGUMENT] = "invalid argument",
        [DLATTN_UNSUPPORTED] = "unsupported",
        [DLATTN_BUFFER_TOO_SMALL] = "buffer too small",
        [DLATTN_OUT_OF_MEMORY] = "out of memory",
        [DLATTN_DEVICE_UNAVAILABLE] = "device unavailable",
        [DLATTN_DEVICE_ERROR] = "device error",
        [DLATTN_VERSION_MISMATCH] = "version mismatch",
        [DLATTN_INTERNAL] = "internal error",
    };
    const int32_t count = (int32_t)(sizeof names / sizeof names[0]);
    return status >= 0 && status < count ? names[status] : "unknown status";
}
