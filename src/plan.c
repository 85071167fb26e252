#include "src/plan.h"

#include <dlattn_features.h>
#include <stdio.h>
#include <string.h>

const char *feature_names(uint64_t bits, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (size_t i = 0; i < DLATTN_FEATURE_COUNT && used < size; i++) {
        if (bits & dlattn_features[i].bit)
            used += (size_t)snprintf(text + used, size - used, "%s%s", used ? " " : "",
                                     dlattn_features[i].name);
    }
    return text;
}

uint64_t kernel_flags(const struct kernel *k) {
    return (k->reference ? DLATTN_KERNEL_REFERENCE : 0) |
           (k->any_order ? DLATTN_KERNEL_ANY_ORDER : 0) | (k->decode ? DLATTN_KERNEL_DECODE : 0) |
           (k->keeps_zero ? DLATTN_KERNEL_KEEPS_ZERO : 0);
}

bool kernel_available(const struct kernel *k, const struct caps *caps) {
    if (k->backend == BACKEND_CPU)
        return (k->cpu_needs & ~caps->cpu) == 0;
    return caps->sm >= k->sm_min && caps->sm <= k->sm_max;
}

/* How far a row gets with a problem; the row that gets furthest is the nearest one. */
enum fit {
    OTHER_OPERATION,
    OTHER_DEVICE,
    OTHER_ROW,
    NEEDS_MACHINE,
    LACKS_DTYPE,
    LACKS_HEAD_DIM,
    LACKS_FEATURE,
    DECLINES,
    FITS
};

/* Of the tensors that a row computes with. */
static uint32_t dtypes_of(const struct problem *p) {
    uint32_t dtypes = DTYPE_BIT(p->dtype);
    if (p->features & DLATTN_FEATURE_MIXED_DTYPES)
        dtypes |= DTYPE_BIT(p->key.dtype) | DTYPE_BIT(p->value.dtype);
    if (p->features & DLATTN_FEATURE_MIXED_DTYPES && p->operation == APPEND)
        dtypes |= DTYPE_BIT(p->key_cache.dtype) | DTYPE_BIT(p->value_cache.dtype);
    else if (p->features & DLATTN_FEATURE_MIXED_DTYPES)
        dtypes |= DTYPE_BIT(p->output.dtype);
    return dtypes;
}

static enum fit fit(struct plan *plan, const struct kernel *k, const struct problem *p,
                    const struct caps *caps) {
    if (k->operation != p->operation)
        return OTHER_OPERATION;
    if (k->backend != p->backend)
        return OTHER_DEVICE;
    if (p->kernel && strcmp(p->kernel, k->name) != 0)
        return OTHER_ROW;
    if (!kernel_available(k, caps))
        return NEEDS_MACHINE;
    if (dtypes_of(p) & ~k->dtypes)
        return LACKS_DTYPE;
    if (p->dim_qk > k->max_head_dim || p->dim_v > k->max_head_dim_v)
        return LACKS_HEAD_DIM;
    if (p->features & ~k->features || (k->any_order && !p->any_order))
        return LACKS_FEATURE;
    *plan = (struct plan){
        .kernel = k,
        .tile_q = k->tile_q,
        .tile_k = k->tile_k,
        .splits = 1,
        .threads = p->threads,
        .workspace_alignment = 64,
        .keeps_zero = k->keeps_zero,
    };
    return problem_is_empty(p) || k->plan(plan, p, caps) ? FITS : DECLINES;
}

static int32_t refuse(const struct problem *p, const struct kernel *nearest, enum fit how,
                      const char *why) {
    const char *device = p->backend == BACKEND_CPU ? "the CPU" : "this GPU";
    char missing[256];
    switch (how) {
    case OTHER_OPERATION:
    case OTHER_DEVICE:
        return fail(DLATTN_UNSUPPORTED, "this build has no kernel for %s on %s",
                    operation_name(p->operation), device);
    case OTHER_ROW:
        return fail(DLATTN_INVALID_ARGUMENT, "kernel: there is no kernel \"%s\" for %s", p->kernel,
                    device);
    case NEEDS_MACHINE:
        return fail(DLATTN_UNSUPPORTED, "no kernel for %s: %s needs %s", device, nearest->name,
                    nearest->arch);
    case LACKS_DTYPE:
        return fail(DLATTN_UNSUPPORTED, "no kernel for %s on %s: the nearest, %s, takes %s",
                    dtype_list(dtypes_of(p)), device, nearest->name, dtype_list(nearest->dtypes));
    case LACKS_HEAD_DIM:
        return fail(DLATTN_UNSUPPORTED,
                    "no kernel on %s for head_dim %lld and head_dim_v %lld: the nearest, %s, goes "
                    "up to %d and %d",
                    device, (long long)p->dim_qk, (long long)p->dim_v, nearest->name,
                    nearest->max_head_dim, nearest->max_head_dim_v);
    case LACKS_FEATURE:
        return fail(DLATTN_UNSUPPORTED,
                    "no kernel on %s for this problem: the nearest, %s, lacks: %s", device,
                    nearest->name,
                    feature_names(p->features & ~nearest->features, missing, sizeof missing));
    case DECLINES:
    case FITS:
        break;
    }
    return fail(DLATTN_UNSUPPORTED, "kernel %s declines this problem on %s%s%s", nearest->name,
                device, why ? ": " : "", why ? why : "");
}

int32_t plan_choose(struct plan *plan, const struct problem *p, const struct caps *caps) {
    const struct kernel *nearest = NULL;
    const char *why = NULL;
    enum fit best = OTHER_OPERATION;
    for (int32_t i = 0; i < kernel_table_size; i++) {
        enum fit how = fit(plan, &kernel_table[i], p, caps);
        if (how == FITS)
            return DLATTN_OK;
        const bool wider = how == LACKS_HEAD_DIM && how == best &&
                           kernel_table[i].max_head_dim > nearest->max_head_dim;
        if (how > best || wider || (how == DECLINES && plan->why)) {
            best = how;
            nearest = &kernel_table[i];
            why = how == DECLINES ? plan->why : NULL;
        }
    }
    return refuse(p, nearest, best, why);
}

int32_t plan_threads(const struct problem *p, int32_t most) {
    const double passes = p->operation == BACKWARD ? 2.5 : 1; /* 5 products instead of 2 */
    const double keys =
                     passes * (double)p->batch * (double)p->len_k * (double)(p->dim_qk + p->dim_v),
                 products = keys * (double)p->heads_q * (double)p->len_q,
                 bytes = keys * (double)p->heads_kv * (double)dtype_bytes(p->dtype);
    const double worth = products / (1 << 20) + bytes / (1 << 18);
    return worth < 1 ? 1 : worth > most ? most : (int32_t)worth;
}

void plan_describe(const struct plan *plan, const struct problem *p, dlattn_sku *sku) {
    const struct kernel *k = plan->kernel;
    sku->kernel = k->name;
    sku->backend = k->backend == BACKEND_CPU ? "cpu" : "cuda";
    sku->arch = k->arch;
    sku->math = k->math ? k->math : dtype_name(p->dtype);
    sku->accumulator = k->accumulator ? k->accumulator : p->dtype == DTYPE_F64 ? "f64" : "f32";
    sku->features = p->features;
    sku->workspace_bytes = plan->workspace_bytes;
    sku->workspace_alignment = plan->workspace_alignment;
    sku->contiguous = p->contiguous;
    sku->operation = operation_name(k->operation);
    sku->deterministic = !k->any_order;
    sku->bit_stable = !k->any_order;
    sku->tile_q = plan->tile_q;
    sku->tile_k = plan->tile_k;
    sku->num_splits = plan->splits;
    sku->num_threads = k->backend == BACKEND_CPU ? plan->threads : 0;
    sku->reserved0 = 0;
    sku->flags = kernel_flags(k);
}
