/*
 * Asks for attention of GPU tensors and prints the status and the message; then the CPU must work all the same.
 */
#include <dlattn_loader.h>

#include <stdio.h>
#include <string.h>

static const dlattn_api *api;

static int32_t attention(DLDevice device, float *data, float *output) {
    int64_t shape[4] = {1, 1, 2, 4};
    DLTensor in = {
        .data = data, .device = device, .ndim = 4, .dtype = {kDLFloat, 32, 1}, .shape = shape};
    DLTensor out = in;
    out.data = output;
    const dlattn_tensors tensors = {
        .struct_size = sizeof tensors, .query = &in, .key = &in, .value = &in, .output = &out};
    const dlattn_forward_desc desc = {.struct_size = sizeof desc};
    static unsigned char workspace[1 << 20] __attribute__((aligned(64)));
    const dlattn_exec exec = {
        .struct_size = sizeof exec, .workspace = workspace, .workspace_bytes = sizeof workspace};
    return api->forward(&desc, &tensors, &exec);
}

int main(void) {
    char why[4096];
    float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1}, output[8] = {0};
    api = dlattn_open(why, sizeof why);
    if (!api) {
        puts(why);
        return 1;
    }
    const int32_t status = attention((DLDevice){kDLCUDA, 0}, ones, output);
    printf("%s: %s\n", api->status_name(status), api->last_error());
    printf("devices: %d\n", api->device_count());
    if (attention((DLDevice){kDLCPU, 0}, ones, output) != DLATTN_OK ||
        memcmp(ones, output, sizeof ones) != 0) {
        printf("the CPU: %s\n", api->last_error());
        return 1;
    }
    return 0;
}
