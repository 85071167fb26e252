/*
 * The contract between the core and a kernel. A kernel is one row of kernels/kernels.inc and one file of that name; docs/add-a-kernel.md
 * says what it must keep. Kernels include what stands in src/, and nothing of src/ includes theirs.
 */
#ifndef DLATTN_KERNEL_H_
#define DLATTN_KERNEL_H_

#include "src/problem.h"

#include <stddef.h>

/* CPU instruction sets, as rows ask for them. */
#define CPU_AVX2 1u   /* AVX2 + FMA + F16C */
#define CPU_AVX512 2u /* AVX-512 F, BW, DQ, VL (and CPU_AVX2) */
#define CPU_AVX512BF16 4u
#define CPU_AMX_BF16 8u         /* tiles permitted by the kernel */
#define CPU_FAST_AVX512BF16 16u /* vdpbf16ps as often as FMA: AMD; Intel: a quarter */
#define CPU_FETCHES_TO_L2                                                                          \
    32u /* what is to be read soon had better be asked for there: AMD; Intel: in L1 */
#define CPU_AVX512VBMI 64u

/* What a machine can do. plan_choose() is a pure function of this and the problem. */
struct caps {
    uint32_t cpu;    /* CPU_* */
    int32_t threads; /* of the built-in pool */
    int32_t sm;      /* compute capability of the problem's GPU, 90 = 9.0; 0 = none */
    int32_t multiprocessors;
    int64_t shared_memory_bytes; /* most that one block may have */
};

struct kernel;

/* A chosen row with its numbers. Plain data; lives in a dlattn_plan or on the stack of one call. */
struct plan {
    const struct kernel *kernel;
    int32_t tile_q, tile_k;
    int32_t splits;          /* parts of the key axis; 1 = whole */
    int32_t threads;         /* CPU: workers that the workspace has room for */
    int32_t variant;         /* the kernel's own choice among its compiled tiles */
    int32_t blocks;          /* CUDA: of the grid; launch asks the driver for nothing */
    int32_t heads_per_group; /* CUDA: whose tiles are interleaved, for rows that walk over them, */
    int32_t neighbours;      /* and blocks that begin with tiles of one head */
    size_t workspace_bytes;
    size_t workspace_alignment;
    bool keeps_zero; /* over zeros launch leaves zeros; by default as the row says */
    const char *why; /* a row that declines may give its reason here, for the message */
};

/* Where a call runs. */
struct exec {
    void *stream;
    void *workspace;
    bool workspace_is_zero; /* only of plans with keeps_zero: they may use it, and leave it so */
    dlattn_parallel_for parallel_for;
    void *parallel_ctx;
};

struct kernel {
    const char *name;
    enum operation operation;
    enum backend backend;
    const char *arch;
    uint32_t cpu_needs;     /* CPU_* bits, all needed */
    int32_t sm_min, sm_max; /* CUDA: inclusive range of compute capabilities */
    uint32_t
        dtypes; /* DTYPE_BIT()s of query, key, value and output; the row takes mixtures with MIXED_DTYPES */
    int32_t max_head_dim, max_head_dim_v;
    uint64_t features;              /* DLATTN_FEATURE_* */
    const char *math, *accumulator; /* NULL: the problem's own */
    int32_t tile_q, tile_k;
    bool reference; /* the truth for others, not a choice to be proud of */
    bool
        any_order; /* its sums depend on who finishes first: only for calls with DLATTN_ANY_ORDER */
    bool keeps_zero; /* knows exec.workspace_is_zero */
    bool decode;     /* for few query rows over many keys: declines the rest */
    /* Refines a plan whose kernel, tiles and threads are set: splits, variant, workspace. False: this row does not want the
     * problem after all (too small, say), try the next. Pure. */
    bool (*plan)(struct plan *plan, const struct problem *p, const struct caps *caps);
    /* Runs (CPU) or enqueues (CUDA). Called with every check done and the workspace large enough. */
    int32_t (*launch)(const struct plan *plan, const struct problem *p, const struct exec *exec);
};

/* Declares the two functions of a row, in its file and in the table. */
#define ROW_FUNCTIONS(name)                                                                        \
    bool name##_plan(struct plan *, const struct problem *, const struct caps *);                  \
    int32_t name##_launch(const struct plan *, const struct problem *, const struct exec *)

/* kernels/table.c */
extern const struct kernel kernel_table[];
extern const int32_t kernel_table_size;

/* Runs body(ctx, worker) for worker in [0, workers), at the same time where there are threads;
 * returns when all are done. Workers take their tasks from an atomic counter of the kernel's own.
 * (src/threads.c) */
void threads_run(const struct exec *exec, int32_t workers, dlattn_parallel_body body, void *ctx);

/* Fails the call: records the message for last_error() and returns the status. (src/error.c) */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int32_t
fail(int32_t status, const char *format, ...);
/* So that a reader of one file, a compiler or an analyser, knows that what it returns is `status`. */
#define fail(status, ...) ((void)(fail)(status, __VA_ARGS__), (status))

#endif /* DLATTN_KERNEL_H_ */
