/* The exported table. A call copies the caller's structs into its own, builds the problem, chooses a row and launches it. */
#include "abi/dlattn.h"
#include "src/caps.h"
#include "src/cuda_driver.h"
#include "src/dlpack.h"
#include "src/empty.h"
#include "src/error.h"
#include "src/plan.h"
#include "src/version.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct dlattn_plan {
    struct plan choice;
    struct plan
        unaligned; /* for tensors that `choice` does not take as they lie; may be the same */
    struct problem problem;
    dlattn_forward_desc desc;
};

/* ---- Structs that may be older or newer than this library ------------------------------------ */

/* Bytes of each struct in the version that it came with: the least that a caller may hand over, forever. */
enum {
    DESC_1_0 = 88,
    TENSORS_1_0 = 120,
    EXEC_1_0 = 56,
    SKU_1_0 = 104,
    KERNEL_INFO_1_0 = 80,
    DEVICE_INFO_1_0 = 288,
    GRADIENTS_1_1 = 72,
    PARTIALS_1_1 = 48,
    APPEND_1_1 = 96
};

/* Copies the part that both sides know. */
static int32_t copy_in(void *own, size_t own_size, size_t least, const void *theirs,
                       const char *name) {
    size_t size;
    memset(own, 0, own_size);
    if (!theirs)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is NULL", name);
    memcpy(&size, theirs, sizeof size);
    if (size < least)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: struct_size is %zu, must be at least %zu", name,
                    size, least);
    for (size_t i = own_size; i < size; i++) {
        if (((const unsigned char *)theirs)[i])
            return fail(
                DLATTN_UNSUPPORTED,
                "%s: byte %zu is not zero, this library (ABI %d.%d) knows only the first %zu", name,
                i, DLATTN_ABI_MAJOR, DLATTN_ABI_MINOR, own_size);
    }
    memcpy(own, theirs, size < own_size ? size : own_size);
    return DLATTN_OK;
}

/* Checks an output struct before any work is done for it. */
static int32_t check_out(const void *theirs, size_t least, const char *name) {
    size_t size;
    if (!theirs)
        return fail(DLATTN_INVALID_ARGUMENT, "%s: is NULL", name);
    memcpy(&size, theirs, sizeof size);
    return size >= least ? DLATTN_OK
                         : fail(DLATTN_INVALID_ARGUMENT,
                                "%s: struct_size is %zu, must be at least %zu", name, size, least);
}

/* Fills as much of the caller's struct as both sides know; its struct_size stays. */
static void copy_out(void *theirs, const void *own, size_t own_size) {
    size_t size;
    memcpy(&size, theirs, sizeof size);
    memcpy((char *)theirs + sizeof size, (const char *)own + sizeof size,
           (size < own_size ? size : own_size) - sizeof size);
}

#define COPY_IN(own, theirs, least) copy_in(&(own), sizeof(own), least, theirs, #theirs)

/* ---- Every operation ------------------------------------------------------------------------- */

static int32_t find_caps(struct problem *p, struct caps *caps) {
    const int32_t status = caps_get(caps, p->backend, p->device_id);
    if (status == DLATTN_OK && p->threads == 0)
        p->threads = plan_threads(p, caps->threads);
    return status;
}

static int32_t check_workspace(const struct plan *plan, const dlattn_exec *e) {
    if (plan->workspace_bytes == 0)
        return DLATTN_OK;
    if (!e->workspace || e->workspace_bytes < plan->workspace_bytes)
        return fail(DLATTN_BUFFER_TOO_SMALL, "workspace: %zu bytes are given, kernel %s needs %zu",
                    e->workspace ? e->workspace_bytes : 0, plan->kernel->name,
                    plan->workspace_bytes);
    if ((uintptr_t)e->workspace % plan->workspace_alignment)
        return fail(DLATTN_INVALID_ARGUMENT, "workspace: address %p is not a multiple of %zu",
                    e->workspace, plan->workspace_alignment);
    return DLATTN_OK;
}

static int32_t read_exec(dlattn_exec *own, const dlattn_exec *exec) {
    int32_t status = copy_in(own, sizeof *own, EXEC_1_0, exec, "exec");
    if (status == DLATTN_OK && own->flags & ~(DLATTN_TAKE_OWNERSHIP | DLATTN_WORKSPACE_IS_ZERO))
        return fail(DLATTN_UNSUPPORTED,
                    "exec.flags: 0x%llx has bits that this library (ABI %d.%d) does not know",
                    (unsigned long long)own->flags, DLATTN_ABI_MAJOR, DLATTN_ABI_MINOR);
    return status;
}

/* For plans that do not leave the zeros that they were given. */
static int32_t clear_workspace(const struct plan *plan, const struct problem *p,
                               const dlattn_exec *e) {
    if (plan->workspace_bytes == 0)
        return DLATTN_OK;
    if (p->backend == BACKEND_CUDA)
        return cuda_clear(e->workspace, plan->workspace_bytes, e->stream);
    memset(e->workspace, 0, plan->workspace_bytes);
    return DLATTN_OK;
}

static int32_t check_exec(const struct plan *plan, const struct problem *p, const dlattn_exec *e) {
    int32_t status = check_workspace(plan, e);
    if (status == DLATTN_OK)
        status = problem_check_values(p);
    if (status == DLATTN_OK && p->backend == BACKEND_CUDA && !problem_is_empty(p))
        status = cuda_check_pointers(p, e->workspace);
    return status;
}

/* On a GPU the problem's device is entered. */
static int32_t start(const struct plan *plan, const struct problem *p, const dlattn_exec *e) {
    if (problem_is_empty(p))
        return empty_write(p, e->stream);
    const bool zero = e->flags & DLATTN_WORKSPACE_IS_ZERO;
    const struct exec run = {
        .stream = e->stream,
        .workspace = e->workspace,
        .workspace_is_zero = zero && plan->keeps_zero,
        .parallel_for = e->parallel_for,
        .parallel_ctx = e->parallel_ctx,
    };
    const int32_t status = plan->kernel->launch(plan, p, &run);
    return status == DLATTN_OK && zero && !plan->keeps_zero ? clear_workspace(plan, p, e) : status;
}

static int32_t launch(const struct plan *plan, const struct problem *p, const dlattn_exec *exec) {
    dlattn_exec e;
    bool entered = false;
    int32_t status = read_exec(&e, exec);
    if (status == DLATTN_OK)
        status = check_exec(plan, p, &e);
    if (status == DLATTN_OK && p->backend == BACKEND_CUDA)
        status = cuda_enter(p->device_id, &entered);
    if (status != DLATTN_OK)
        return status;
    status = start(plan, p, &e);
    cuda_leave(entered);
    return status;
}

/* Chooses and runs a problem that has been built. */
static int32_t run(struct problem *p, const dlattn_exec *exec) {
    struct plan plan;
    struct caps caps;
    int32_t status = find_caps(p, &caps);
    if (status == DLATTN_OK)
        status = plan_choose(&plan, p, &caps);
    return status == DLATTN_OK ? launch(&plan, p, exec) : status;
}

/* What run() would use. */
static int32_t describe(struct problem *p, dlattn_sku *sku) {
    struct plan plan;
    struct caps caps;
    dlattn_sku own = {0};
    int32_t status = find_caps(p, &caps);
    if (status == DLATTN_OK)
        status = plan_choose(&plan, p, &caps);
    if (status != DLATTN_OK)
        return status;
    plan_describe(&plan, p, &own);
    copy_out(sku, &own, sizeof own);
    return DLATTN_OK;
}

/* ---- Forward and backward -------------------------------------------------------------------- */

/* `gradients` is NULL for forward; `own_desc` receives the options. */
static int32_t build(struct problem *p, dlattn_forward_desc *own_desc,
                     const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                     const dlattn_gradients *gradients, bool with_data) {
    dlattn_tensors t;
    dlattn_gradients g;
    int32_t status = copy_in(own_desc, sizeof *own_desc, DESC_1_0, desc, "desc");
    if (status == DLATTN_OK)
        status = COPY_IN(t, tensors, TENSORS_1_0);
    if (status == DLATTN_OK && gradients)
        status = COPY_IN(g, gradients, GRADIENTS_1_1);
    return status == DLATTN_OK ? problem_build(p, own_desc, &t, gradients ? &g : NULL, with_data)
                               : status;
}

static int32_t check_gradients(const dlattn_gradients *gradients) {
    return gradients ? DLATTN_OK : fail(DLATTN_INVALID_ARGUMENT, "gradients: is NULL");
}

static int32_t attention_query(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                               const dlattn_gradients *gradients, dlattn_sku *sku) {
    dlattn_forward_desc d;
    struct problem p;
    int32_t status = check_out(sku, SKU_1_0, "sku");
    if (status == DLATTN_OK)
        status = build(&p, &d, desc, tensors, gradients, false);
    return status == DLATTN_OK ? describe(&p, sku) : status;
}

static int32_t forward_query(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                             dlattn_sku *sku) {
    return attention_query(desc, tensors, NULL, sku);
}

static int32_t backward_query(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                              const dlattn_gradients *gradients, dlattn_sku *sku) {
    const int32_t status = check_gradients(gradients);
    return status == DLATTN_OK ? attention_query(desc, tensors, gradients, sku) : status;
}

static int32_t forward(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                       const dlattn_exec *exec) {
    dlattn_forward_desc d;
    struct problem p;
    const int32_t status = build(&p, &d, desc, tensors, NULL, true);
    return status == DLATTN_OK ? run(&p, exec) : status;
}

static int32_t backward(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                        const dlattn_gradients *gradients, const dlattn_exec *exec) {
    dlattn_forward_desc d;
    struct problem p;
    int32_t status = check_gradients(gradients);
    if (status == DLATTN_OK)
        status = build(&p, &d, desc, tensors, gradients, true);
    return status == DLATTN_OK ? run(&p, exec) : status;
}

/* ---- Merge and append ------------------------------------------------------------------------ */

static int32_t merge_problem(struct problem *p, dlattn_partials *own,
                             const dlattn_partials *partials, bool with_data) {
    const int32_t status = copy_in(own, sizeof *own, PARTIALS_1_1, partials, "partials");
    return status == DLATTN_OK ? merge_build(p, own, with_data) : status;
}

static int32_t merge_query(const dlattn_partials *partials, dlattn_sku *sku) {
    dlattn_partials own;
    struct problem p;
    int32_t status = check_out(sku, SKU_1_0, "sku");
    if (status == DLATTN_OK)
        status = merge_problem(&p, &own, partials, false);
    return status == DLATTN_OK ? describe(&p, sku) : status;
}

static int32_t merge(const dlattn_partials *partials, const dlattn_exec *exec) {
    dlattn_partials own;
    struct problem p;
    const int32_t status = merge_problem(&p, &own, partials, true);
    return status == DLATTN_OK ? run(&p, exec) : status;
}

static int32_t append_problem(struct problem *p, const dlattn_append_tensors *tensors,
                              bool with_data) {
    dlattn_append_tensors t;
    const int32_t status = COPY_IN(t, tensors, APPEND_1_1);
    return status == DLATTN_OK ? append_build(p, &t, with_data) : status;
}

static int32_t append_query(const dlattn_append_tensors *tensors, dlattn_sku *sku) {
    struct problem p;
    int32_t status = check_out(sku, SKU_1_0, "sku");
    if (status == DLATTN_OK)
        status = append_problem(&p, tensors, false);
    return status == DLATTN_OK ? describe(&p, sku) : status;
}

static int32_t append(const dlattn_append_tensors *tensors, const dlattn_exec *exec) {
    struct problem p;
    const int32_t status = append_problem(&p, tensors, true);
    return status == DLATTN_OK ? run(&p, exec) : status;
}

/* ---- Managed tensors ------------------------------------------------------------------------- */

/* Deleters may free what an enqueued kernel still reads, also where a later step of the call failed. */
static int32_t wait_for_gpu(int32_t status, const struct problem *p, void *stream) {
    const bool enqueued =
        status == DLATTN_OK || status == DLATTN_DEVICE_ERROR || status == DLATTN_INTERNAL;
    if (!enqueued || p->backend != BACKEND_CUDA)
        return status;
    const int32_t waited = cuda_synchronize(p->device_id, stream);
    return waited == DLATTN_OK ? status : waited;
}

/* Until both structs could be read, nothing says whose the tensors are, and they stay the caller's. */
static int32_t forward_owned(enum managed kind, const dlattn_forward_desc *desc,
                             const void *managed, const dlattn_exec *exec) {
    struct managed_slots slots;
    dlattn_tensors tensors;
    dlattn_exec e;
    dlattn_forward_desc d;
    struct problem p = {.backend = BACKEND_CPU};
    int32_t status = copy_in(&slots, sizeof slots, TENSORS_1_0, managed, "tensors");
    if (status == DLATTN_OK)
        status = COPY_IN(e, exec, EXEC_1_0);
    if (status != DLATTN_OK)
        return status;
    const bool owned = e.flags & DLATTN_TAKE_OWNERSHIP;
    status = managed_open(kind, &slots, &tensors);
    if (status == DLATTN_OK)
        status = build(&p, &d, desc, &tensors, NULL, true);
    if (status == DLATTN_OK)
        status = run(&p, exec);
    if (owned) {
        status = wait_for_gpu(status, &p, e.stream);
        managed_release(kind, &slots);
    }
    return status;
}

static int32_t forward_managed(const dlattn_forward_desc *desc,
                               const dlattn_managed_tensors *tensors, const dlattn_exec *exec) {
    return forward_owned(MANAGED, desc, tensors, exec);
}

static int32_t forward_versioned(const dlattn_forward_desc *desc,
                                 const dlattn_versioned_tensors *tensors, const dlattn_exec *exec) {
    return forward_owned(MANAGED_VERSIONED, desc, tensors, exec);
}

/* ---- Plans ----------------------------------------------------------------------------------- */

/* What a plan runs where an address or a stride turns out not to be a multiple of 16 bytes, which a plan made without data
 * cannot know. Both choices get one workspace. Without such a row the plan takes aligned tensors alone. */
static void plan_unaligned(dlattn_plan *plan, const struct caps *caps) {
    struct problem p = plan->problem;
    p.features |= DLATTN_FEATURE_UNALIGNED;
    plan->unaligned = plan->choice;
    if ((plan->choice.kernel->features & DLATTN_FEATURE_UNALIGNED) || p.kernel ||
        plan_choose(&plan->unaligned, &p, caps) != DLATTN_OK)
        return;
    struct plan *const both[] = {&plan->choice, &plan->unaligned};
    for (int i = 0; i < 2; i++) {
        const struct plan *other = both[1 - i];
        if (both[i]->workspace_bytes < other->workspace_bytes)
            both[i]->workspace_bytes = other->workspace_bytes;
        if (both[i]->workspace_alignment < other->workspace_alignment)
            both[i]->workspace_alignment = other->workspace_alignment;
    }
}

static int32_t make_plan(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                         const dlattn_gradients *gradients, dlattn_plan **plan) {
    dlattn_plan made;
    struct caps caps;
    if (!plan)
        return fail(DLATTN_INVALID_ARGUMENT, "plan: is NULL");
    int32_t status = build(&made.problem, &made.desc, desc, tensors, gradients, false);
    if (status == DLATTN_OK)
        status = find_caps(&made.problem, &caps);
    if (status == DLATTN_OK)
        status = plan_choose(&made.choice, &made.problem, &caps);
    if (status != DLATTN_OK)
        return status;
    plan_unaligned(&made, &caps);
    /* The choice is made, and the caller's string need not outlive this call. */
    made.desc.kernel = made.problem.kernel = NULL;
    made.desc.num_threads = made.problem.threads;
    made.desc.struct_size = sizeof made.desc; /* it is this library's now */
    dlattn_plan *kept = malloc(sizeof *kept);
    if (!kept)
        return fail(DLATTN_OUT_OF_MEMORY, "plan: no memory for %zu bytes", sizeof *kept);
    *kept = made;
    *plan = kept;
    return DLATTN_OK;
}

static int32_t plan_create(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                           dlattn_plan **plan) {
    return make_plan(desc, tensors, NULL, plan);
}

static int32_t backward_plan_create(const dlattn_forward_desc *desc, const dlattn_tensors *tensors,
                                    const dlattn_gradients *gradients, dlattn_plan **plan) {
    const int32_t status = check_gradients(gradients);
    return status == DLATTN_OK ? make_plan(desc, tensors, gradients, plan) : status;
}

static void plan_destroy(dlattn_plan *plan) { free(plan); }

/* The problem of these tensors under the plan's options, refused unless it is the one planned for. */
static int32_t plan_problem(const dlattn_plan *plan, const dlattn_tensors *tensors,
                            const dlattn_gradients *gradients, bool with_data, struct problem *p) {
    dlattn_forward_desc d;
    if (!plan)
        return fail(DLATTN_INVALID_ARGUMENT, "plan: is NULL");
    if ((plan->problem.operation == BACKWARD) != (gradients != NULL))
        return fail(DLATTN_INVALID_ARGUMENT, "plan: was made for %s",
                    operation_name(plan->problem.operation));
    const int32_t status = build(p, &d, &plan->desc, tensors, gradients, with_data);
    return status == DLATTN_OK ? problem_check_same(&plan->problem, p) : status;
}

static int32_t plan_can_run(const dlattn_plan *plan, const dlattn_tensors *tensors) {
    struct problem p;
    return plan_problem(plan, tensors, NULL, false, &p);
}

static int32_t backward_plan_can_run(const dlattn_plan *plan, const dlattn_tensors *tensors,
                                     const dlattn_gradients *gradients) {
    struct problem p;
    const int32_t status = check_gradients(gradients);
    return status == DLATTN_OK ? plan_problem(plan, tensors, gradients, false, &p) : status;
}

static int32_t plan_sku(const dlattn_plan *plan, dlattn_sku *sku) {
    dlattn_sku own = {0};
    int32_t status = check_out(sku, SKU_1_0, "sku");
    if (status == DLATTN_OK && !plan)
        status = fail(DLATTN_INVALID_ARGUMENT, "plan: is NULL");
    if (status != DLATTN_OK)
        return status;
    plan_describe(&plan->choice, &plan->problem, &own);
    copy_out(sku, &own, sizeof own);
    return DLATTN_OK;
}

static int32_t run_plan(const dlattn_plan *plan, const dlattn_tensors *tensors,
                        const dlattn_gradients *gradients, const dlattn_exec *exec) {
    struct problem p;
    const int32_t status = plan_problem(plan, tensors, gradients, true, &p);
    if (status != DLATTN_OK)
        return status;
    const bool aligned = (p.features & ~plan->choice.kernel->features) == 0;
    const struct plan *choice = aligned ? &plan->choice : &plan->unaligned;
    if (p.features & ~choice->kernel->features)
        return fail(
            DLATTN_UNSUPPORTED,
            "plan: kernel %s needs data pointers that are multiples of 16 bytes, and those of "
            "these tensors are not",
            choice->kernel->name);
    return launch(choice, &p, exec);
}

static int32_t plan_run(const dlattn_plan *plan, const dlattn_tensors *tensors,
                        const dlattn_exec *exec) {
    return run_plan(plan, tensors, NULL, exec);
}

static int32_t backward_plan_run(const dlattn_plan *plan, const dlattn_tensors *tensors,
                                 const dlattn_gradients *gradients, const dlattn_exec *exec) {
    const int32_t status = check_gradients(gradients);
    return status == DLATTN_OK ? run_plan(plan, tensors, gradients, exec) : status;
}

/* ---- Listings -------------------------------------------------------------------------------- */

static int32_t kernel_count(void) { return kernel_table_size; }

static bool available(const struct kernel *k) {
    struct caps caps;
    if (k->backend == BACKEND_CPU)
        return kernel_available(k, caps_cpu());
    for (int32_t id = 0; id < caps_gpu_count(); id++) {
        if (caps_get(&caps, BACKEND_CUDA, id) == DLATTN_OK && kernel_available(k, &caps))
            return true;
    }
    return false;
}

static int32_t kernel_info(int32_t index, dlattn_kernel_info *info) {
    int32_t status = check_out(info, KERNEL_INFO_1_0, "info");
    if (status == DLATTN_OK && (index < 0 || index >= kernel_table_size))
        status = fail(DLATTN_INVALID_ARGUMENT, "index: is %d, there are %d rows", index,
                      kernel_table_size);
    if (status != DLATTN_OK)
        return status;
    const struct kernel *k = &kernel_table[index];
    const dlattn_kernel_info own = {
        .name = k->name,
        .operation = operation_name(k->operation),
        .backend = k->backend == BACKEND_CPU ? "cpu" : "cuda",
        .arch = k->arch,
        .dtypes = dtype_list(k->dtypes),
        .features = k->features,
        .max_head_dim = k->max_head_dim,
        .max_head_dim_v = k->max_head_dim_v,
        .tile_q = k->tile_q,
        .tile_k = k->tile_k,
        .available = available(k),
        .flags = kernel_flags(k),
    };
    copy_out(info, &own, sizeof own);
    return DLATTN_OK;
}

static int32_t device_count(void) { return 1 + caps_gpu_count(); }

static int32_t device_info(int32_t index, dlattn_device_info *info) {
    dlattn_device_info own = {0};
    int32_t status = check_out(info, DEVICE_INFO_1_0, "info");
    if (status == DLATTN_OK && (index < 0 || index >= device_count()))
        status = fail(DLATTN_INVALID_ARGUMENT, "index: is %d, there are %d devices", index,
                      device_count());
    if (status == DLATTN_OK)
        status = caps_describe(index, &own);
    if (status == DLATTN_OK)
        copy_out(info, &own, sizeof own);
    return status;
}

static const char *version(void) { return DLATTN_VERSION; }

const dlattn_api *dlattn_get_api(uint32_t major) {
    static const dlattn_api api = {
        .struct_size = sizeof api,
        .abi_major = DLATTN_ABI_MAJOR,
        .abi_minor = DLATTN_ABI_MINOR,
        .version = version,
        .last_error = error_last,
        .status_name = error_name,
        .forward_query = forward_query,
        .forward = forward,
        .forward_managed = forward_managed,
        .forward_versioned = forward_versioned,
        .plan_create = plan_create,
        .plan_destroy = plan_destroy,
        .plan_can_run = plan_can_run,
        .plan_sku = plan_sku,
        .plan_run = plan_run,
        .kernel_count = kernel_count,
        .kernel_info = kernel_info,
        .device_count = device_count,
        .device_info = device_info,
        .backward_query = backward_query,
        .backward = backward,
        .backward_plan_create = backward_plan_create,
        .backward_plan_can_run = backward_plan_can_run,
        .backward_plan_run = backward_plan_run,
        .merge_query = merge_query,
        .merge = merge,
        .append_query = append_query,
        .append = append,
    };
    return major == DLATTN_ABI_MAJOR ? &api : NULL;
}
