#include "tests/gpu/attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const DLDataType f16 = {kDLFloat, 16, 1}, f32 = {kDLFloat, 32, 1};

const dlattn_api *gpu_api(void) {
    if (cuda_open() == 0)
        cr_skip_test("no NVIDIA device");
    return test_api();
}

const dlattn_api *api_of_two(void) {
    const dlattn_api *api = gpu_api();
    if (cuda_open() < 2)
        cr_skip_test("one NVIDIA device, this needs two");
    return api;
}

/* ---- Self-attention ------------------------------------------------------------------------------------------- */

void make_on(struct attention *a, int device, DLDataType dtype, const int64_t shape[4],
             uint64_t seed) {
    const size_t count = (size_t)(shape[0] * shape[1] * shape[2] * shape[3]);
    *a = (struct attention){.shape = {shape[0], shape[1], shape[2], shape[3]},
                            .bytes = count * dtype.bits / 8,
                            .tensors = {.struct_size = sizeof a->tensors},
                            .desc = {.struct_size = sizeof a->desc, .causal = 1}};
    cr_assert(cuda_open() > device);
    cuda_use(device);
    a->workspace = cuda_take(WORKSPACE_BYTES);
    uint32_t *const image = malloc(count * sizeof *image);
    cr_assert(image != NULL);
    for (int t = 0; t < 4; t++) {
        for (size_t i = 0; i < count; i++) { /* from -2 to 2 */
            const uint32_t fraction = (uint32_t)random_below(seed + (uint64_t)t, i, 0x1000),
                           sign = (uint32_t)random_below(seed, i, 2);
            if (dtype.bits == 16)
                ((uint16_t *)image)[i] = (uint16_t)(0x3000 + fraction + 0x8000 * sign);
            else
                image[i] = 0x3f000000 + (fraction << 11) + (sign << 31);
        }
        a->tensor[t] = (DLTensor){.data = cuda_take(a->bytes),
                                  .device = {kDLCUDA, device},
                                  .ndim = 4,
                                  .dtype = dtype,
                                  .shape = a->shape};
        cuda_store(a->tensor[t].data, image, a->bytes);
    }
    a->tensors.query = &a->tensor[0];
    a->tensors.key = &a->tensor[1];
    a->tensors.value = &a->tensor[2];
    a->tensors.output = &a->tensor[3];
    free(image);
}

void make(struct attention *a, int64_t batch, int64_t heads, int64_t length, int64_t dim,
          uint64_t seed) {
    make_on(a, 0, f16, (const int64_t[]){batch, heads, length, dim}, seed);
}

void drop(struct attention *a) {
    for (int t = 0; t < 4; t++)
        cuda_give(a->tensor[t].data);
    cuda_give(a->workspace);
}

int32_t forward(const dlattn_api *api, const struct attention *a, void *stream) {
    const dlattn_exec exec = {.struct_size = sizeof exec,
                              .stream = stream,
                              .workspace = a->workspace,
                              .workspace_bytes = WORKSPACE_BYTES};
    return api->forward(&a->desc, &a->tensors, &exec);
}

static void tell_kernel(const struct attention *a) {
    static char told[256];
    dlattn_sku sku = {.struct_size = sizeof sku};
    if (test_api()->forward_query(&a->desc, &a->tensors, &sku) != DLATTN_OK ||
        strstr(told, sku.kernel))
        return;
    fprintf(stderr, "gpu/%s: %s\n", criterion_current_test->name, sku.kernel);
    snprintf(told + strlen(told), sizeof told - strlen(told), " %s", sku.kernel);
}

unsigned char *result(const struct attention *a) {
    unsigned char *const image = malloc(a->bytes);
    cr_assert(image != NULL);
    tell_kernel(a);
    cuda_use(a->tensor[3].device.device_id);
    cuda_wait();
    cuda_fetch(image, a->tensor[3].data, a->bytes);
    return image;
}

void poison(const struct attention *a) {
    unsigned char *const image = malloc(a->bytes);
    cr_assert(image != NULL);
    memset(image, 0xff, a->bytes);
    cuda_use(a->tensor[3].device.device_id);
    cuda_store(a->tensor[3].data, image, a->bytes);
    free(image);
}

bool same_result(const struct attention *a, const struct attention *b) {
    unsigned char *const one = result(a), *const other = result(b);
    const bool same = memcmp(one, other, a->bytes) == 0;
    free(one);
    free(other);
    return same;
}

/* ---- Rows of the table ---------------------------------------------------------------------------------------- */

int rows_here(const dlattn_api *api, dlattn_kernel_info rows[MAX_ROWS]) {
    int count = 0;
    for (int32_t i = 0; i < api->kernel_count() && count < MAX_ROWS; i++) {
        rows[count] = (dlattn_kernel_info){.struct_size = sizeof rows[count]};
        cr_assert(eq(int, api->kernel_info(i, &rows[count]), DLATTN_OK));
        count += strcmp(rows[count].backend, "cuda") == 0 &&
                 strcmp(rows[count].operation, "forward") == 0 && rows[count].available &&
                 !strstr(rows[count].name, "_fp8_") && !strstr(rows[count].name, "_latent_");
    }
    cr_assert(gt(int, count, 0));
    return count;
}

const char *row_if_here(const dlattn_api *api, const char *name) {
    dlattn_kernel_info rows[MAX_ROWS];
    for (int row = 0, count = rows_here(api, rows); row < count; row++) {
        if (strcmp(rows[row].name, name) == 0)
            return name;
    }
    return NULL;
}

DLDataType dtype_of(const dlattn_kernel_info *row) {
    return strstr(row->dtypes, "f16") ? f16 : f32;
}

bool row_takes(const dlattn_kernel_info *row, enum element e) {
    char padded[128], wanted[16];
    snprintf(padded, sizeof padded, " %s ", row->dtypes);
    snprintf(wanted, sizeof wanted, " %s ", element_name(e));
    return strstr(padded, wanted) != NULL;
}

/* ---- Tensors of //tests/support on the device ------------------------------------------------------------------ */

void upload(struct tensor *t) {
    unsigned char *const memory = cuda_take(t->bytes);
    cuda_store(memory, t->image, t->bytes);
    t->dl.device = (DLDevice){kDLCUDA, 0};
    t->dl.data = memory;
    t->dl.byte_offset = t->first;
}

void download(struct tensor *t) { cuda_fetch(t->image, t->dl.data, t->bytes); }

void discard(struct tensor *t) {
    cuda_give(t->dl.data);
    tensor_free(t);
}

int32_t run_call(const dlattn_api *api, const dlattn_forward_desc *desc,
                 const dlattn_tensors *tensors, dlattn_sku *sku) {
    *sku = (dlattn_sku){.struct_size = sizeof *sku};
    int32_t status = api->forward_query(desc, tensors, sku);
    if (status != DLATTN_OK)
        return status;
    unsigned char *const workspace = cuda_take(sku->workspace_bytes);
    const dlattn_exec exec = {.struct_size = sizeof exec,
                              .workspace = workspace,
                              .workspace_bytes = sku->workspace_bytes};
    status = api->forward(desc, tensors, &exec);
    cuda_wait();
    cuda_give(workspace);
    return status;
}

/* ---- A row in double ------------------------------------------------------------------------------------------ */

static double logit_in_double(const struct row_in_double *r, int64_t j) {
    const int64_t dim = r->query->shape[3];
    double x = 0;
    for (int64_t d = 0; d < dim; d++)
        x += tensor_get(r->query, (const int64_t[4]){r->batch, r->head, r->row, d}) *
             tensor_get(r->key, (const int64_t[4]){r->batch, r->head_kv, j, d});
    x /= sqrt((double)dim);
    if (r->softcap > 0)
        x = r->softcap * tanh(x / r->softcap);
    return x - r->slope * fabs((double)(r->met - j));
}

double attend_in_double(const struct row_in_double *r, double *output) {
    const int64_t dim = r->value->shape[3];
    double *const x = malloc((size_t)r->keys * sizeof *x), most = -INFINITY, total = 0;
    for (int64_t j = 0; j < r->keys; j++) {
        x[j] = logit_in_double(r, j);
        most = x[j] > most || isnan(x[j]) ? x[j] : most;
    }
    memset(output, 0, (size_t)dim * sizeof *output);
    for (int64_t j = 0; j < r->keys; j++) {
        const double weight = exp(x[j] - most);
        total += weight;
        for (int64_t d = 0; d < dim; d++)
            output[d] +=
                weight * tensor_get(r->value, (const int64_t[4]){r->batch, r->head_kv, j, d});
    }
    for (int64_t d = 0; d < dim; d++)
        output[d] /= total;
    free(x);
    return most + log(total);
}
