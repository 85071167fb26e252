/*
 * Causal self-attention in plain C. Nothing of dlattn is linked: the plugin is opened at run time.
 *
 *     cc -std=c11 -I abi -I .deps/dlpack/include adapters/c/attention.c -o attention
 *     DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 ./attention 2 4 9 64 <qkv.f32 >output.f32
 *
 * The arguments are batch, heads, length and head_dim. Standard input holds query, key and value,
 * each [batch, heads, length, head_dim] of float32; standard output gets the output in the same
 * shape, then the log-sum-exp of every row, [batch, heads, length]. With `backward` behind the
 * arguments, the output's gradient follows the value, and those of query, key and value the
 * log-sum-exp.
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

/* Memory of the size and alignment that a kernel asks for. */
static void *workspace_of(const dlattn_sku *sku) {
    const size_t alignment = sku->workspace_alignment;
    const size_t size = (sku->workspace_bytes + alignment - 1) / alignment * alignment;
    void *workspace = aligned_alloc(alignment, size);
    CHECK(workspace || !size, "no memory for a workspace of %zu bytes\n", size);
    return workspace;
}

static void forward(const dlattn_api *api, const dlattn_forward_desc *desc,
                    const dlattn_tensors *tensors) {
    dlattn_sku sku = {.struct_size = sizeof sku};
    CHECK(!api->forward_query(desc, tensors, &sku), "%s\n", api->last_error());
    void *workspace = workspace_of(&sku);
    const dlattn_exec exec = {sizeof exec, 0, NULL, workspace, sku.workspace_bytes, NULL, NULL};
    CHECK(!api->forward(desc, tensors, &exec), "%s\n", api->last_error());
    fprintf(stderr, "attention: kernel %s of dlattn %s\n", sku.kernel, api->version());
    free(workspace);
}

/* The same options and tensors, output and lse among them, and beside them the gradients. */
static void backward(const dlattn_api *api, const dlattn_forward_desc *desc,
                     const dlattn_tensors *tensors, const dlattn_gradients *gradients) {
    dlattn_sku sku = {.struct_size = sizeof sku};
    CHECK(api->abi_minor >= 1, "the library has no backward: its ABI is 1.0\n");
    CHECK(!api->backward_query(desc, tensors, gradients, &sku), "%s\n", api->last_error());
    void *workspace = workspace_of(&sku);
    const dlattn_exec exec = {sizeof exec, 0, NULL, workspace, sku.workspace_bytes, NULL, NULL};
    CHECK(!api->backward(desc, tensors, gradients, &exec), "%s\n", api->last_error());
    fprintf(stderr, "attention: kernel %s\n", sku.kernel);
    free(workspace);
}

/* Those that are wanted, one behind the other; d_bias, for one, is left out. */
static void gradients(const dlattn_api *api, const dlattn_forward_desc *desc,
                      const dlattn_tensors *tensors, int64_t *shape, float *given, float *made) {
    const int64_t count = shape[0] * shape[1] * shape[2] * shape[3];
    const DLTensor d_output = tensor(given, 4, shape), d_query = tensor(made, 4, shape);
    const DLTensor d_key = tensor(made + count, 4, shape);
    const DLTensor d_value = tensor(made + 2 * count, 4, shape);
    const dlattn_gradients wanted = {
        .struct_size = sizeof wanted,
        .d_output = &d_output,
        .d_query = &d_query,
        .d_key = &d_key,
        .d_value = &d_value,
    };
    backward(api, desc, tensors, &wanted);
}

int main(int argc, char **argv) {
    int64_t shape[4]; /* [B, H, L, D]; the lse has the first three axes */
    const int with_gradients = argc == 6 && strcmp(argv[5], "backward") == 0;
    CHECK(argc == 5 || with_gradients, "usage: attention BATCH HEADS LENGTH HEAD_DIM [backward]\n");
    for (int i = 0; i < 4; i++)
        CHECK((shape[i] = atoll(argv[i + 1])) > 0, "%s is not a length\n", argv[i + 1]);
    const size_t rows = (size_t)(shape[0] * shape[1] * shape[2]);
    const size_t count = rows * (size_t)shape[3];
    const size_t given = with_gradients ? 4 : 3, written = with_gradients ? 4 : 1;

    float *memory = malloc(((given + written) * count + rows) * sizeof *memory);
    CHECK(memory, "no memory\n");
    CHECK(fread(memory, sizeof *memory, given * count, stdin) == given * count,
          "the input is too short\n");
    float *results = memory + given * count;

    /* 1. The table of functions; once in a process. */
    char why[4096];
    const dlattn_api *api = dlattn_open(why, sizeof why);
    CHECK(api, "%s", why);

    /* 2. What to compute, on which tensors. A field left out is zero, and zero means default. */
    const DLTensor query = tensor(memory, 4, shape), key = tensor(memory + count, 4, shape);
    const DLTensor value = tensor(memory + 2 * count, 4, shape);
    const DLTensor output = tensor(results, 4, shape), lse = tensor(results + count, 3, shape);
    const dlattn_forward_desc desc = {.struct_size = sizeof desc, .causal = 1};
    const dlattn_tensors tensors = {
        .struct_size = sizeof tensors,
        .query = &query,
        .key = &key,
        .value = &value,
        .output = &output,
        .lse = &lse,
    };

    /* 3. Ask for the kernel and its workspace, and run it. On the CPU the result is there on return. */
    forward(api, &desc, &tensors);

    /* 4. Gradients of all that goes in. */
    if (with_gradients)
        gradients(api, &desc, &tensors, shape, memory + 3 * count, results + count + rows);
    const size_t all = written * count + rows;
    CHECK(fwrite(results, sizeof *results, all, stdout) == all && fflush(stdout) == 0,
          "the output cannot be written\n");
    free(memory);
    return 0;
}
