/*
 * Causal self-attention in plain C. Nothing of dlattn is linked: the plugin is opened at run time.
 *
 *     cc -std=c11 -I abi -I .deps/dlpack/include adapters/c/attention.c -o attention
 *     DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 ./attention 2 4 9 64 <qkv.f32 >output.f32
 *
 * The arguments are batch, heads, length and head_dim. Standard input holds query, key and value,
 * each [batch, heads, length, head_dim] of float32; standard output gets the output in the same
 * shape, then the log-sum-exp of every row, [batch, heads, length].
 */
#include "dlattn_loader.h"

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "attention: " __VA_ARGS__);                                            \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* A compact float32 tensor in host memory: NULL strides say "row-major, no gaps". */
static DLTensor tensor(float *data, int32_t ndim, int64_t *shape) {
    return (DLTensor){
        .data = data,
        .device = {kDLCPU, 0},
        .ndim = ndim,
        .dtype = {kDLFloat, 32, 1},
        .shape = shape,
    };
}

int main(int argc, char **argv) {
    int64_t shape[4]; /* [B, H, L, D]; the lse has the first three axes */
    CHECK(argc == 5, "usage: attention BATCH HEADS LENGTH HEAD_DIM\n");
    for (int i = 0; i < 4; i++)
        CHECK((shape[i] = atoll(argv[i + 1])) > 0, "%s is not a length\n", argv[i + 1]);
    const size_t rows = (size_t)(shape[0] * shape[1] * shape[2]);
    const size_t count = rows * (size_t)shape[3];

    float *memory = malloc((4 * count + rows) * sizeof *memory);
    CHECK(memory, "no memory\n");
    CHECK(fread(memory, sizeof *memory, 3 * count, stdin) == 3 * count, "the input is too short\n");

    /* 1. The table of functions; once in a process. */
    char why[4096];
    const dlattn_api *api = dlattn_open(why, sizeof why);
    CHECK(api, "%s", why);

    /* 2. What to compute, on which tensors. A field left out is zero, and zero means default. */
    const DLTensor query = tensor(memory, 4, shape), key = tensor(memory + count, 4, shape);
    const DLTensor value = tensor(memory + 2 * count, 4, shape);
    const DLTensor output = tensor(memory + 3 * count, 4, shape);
    const DLTensor lse = tensor(memory + 4 * count, 3, shape);
    const dlattn_forward_desc desc = {.struct_size = sizeof desc, .causal = 1};
    const dlattn_tensors tensors = {
        .struct_size = sizeof tensors,
        .query = &query,
        .key = &key,
        .value = &value,
        .output = &output,
        .lse = &lse,
    };

    /* 3. Which kernel that is, and how much workspace it wants. */
    dlattn_sku sku = {.struct_size = sizeof sku};
    CHECK(!api->forward_query(&desc, &tensors, &sku), "%s\n", api->last_error());
    const size_t alignment = sku.workspace_alignment;
    const size_t size = (sku.workspace_bytes + alignment - 1) / alignment * alignment;
    void *workspace = aligned_alloc(alignment, size);
    CHECK(workspace || !size, "no memory for a workspace of %zu bytes\n", size);

    /* 4. Run it. On the CPU the result is there on return. */
    const dlattn_exec exec = {sizeof exec, 0, NULL, workspace, sku.workspace_bytes, NULL, NULL};
    CHECK(!api->forward(&desc, &tensors, &exec), "%s\n", api->last_error());
    fprintf(stderr, "attention: kernel %s of dlattn %s\n", sku.kernel, api->version());
    CHECK(fwrite(memory + 3 * count, sizeof *memory, count + rows, stdout) == count + rows &&
              fflush(stdout) == 0,
          "the output cannot be written\n");
    free(workspace);
    free(memory);
    return 0;
}
