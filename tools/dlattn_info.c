/*
 * dlattn-info [--json | --markdown]: what this plugin is, what this machine can do, and which row
 * does what. It links nothing of dlattn: the plugin is found by dlattn_loader.h, as any host would
 * find it.
 */
#include "dlattn_loader.h"

#include "dlattn_features.h"
#include <stdbool.h>

/* A way to print: text for people, JSON for programs, Markdown for docs/support.md. */
struct format {
    void (*head)(const dlattn_api *api);
    void (*device)(const dlattn_device_info *d, bool first);
    void (*between)(void);
    void (*kernel)(const dlattn_kernel_info *k, bool first);
    void (*tail)(void);
};

static void print_nothing(void) {}

static void print_dim(int32_t dim) {
    if (dim == INT32_MAX)
        printf("any");
    else
        printf("%d", dim);
}

/* ---- Text ------------------------------------------------------------------------------------ */

static void text_head(const dlattn_api *api) {
    printf("dlattn %s, ABI %u.%u\n\nDevices\n", api->version(), api->abi_major, api->abi_minor);
}

static void text_device(const dlattn_device_info *d, bool first) {
    (void)first;
    printf("  %s %d: %s, %d %s, %s\n", d->device_type == kDLCPU ? "cpu" : "cuda", d->device_id,
           d->name, d->multiprocessors, d->device_type == kDLCPU ? "threads" : "multiprocessors",
           d->arch[0] ? d->arch : "no vector instructions beyond the baseline");
}

static void text_between(void) { printf("\nKernels, best first (* = runs on this machine)\n"); }

static void text_kernel(const dlattn_kernel_info *k, bool first) {
    (void)first;
    printf("%c %-22s %-8s %-14s %-16s head_dim <= ", k->available ? '*' : ' ', k->name,
           k->operation, k->arch, k->dtypes);
    print_dim(k->max_head_dim);
    printf("\n   ");
    for (int i = 0; i < DLATTN_FEATURE_COUNT; i++) {
        if (k->features & dlattn_features[i].bit)
            printf(" %s", dlattn_features[i].name);
    }
    printf("\n");
}

/* ---- JSON ------------------------------------------------------------------------------------ */

/* Names in this table are plain ASCII; only a device's name could hold a quote. */
static void json_string(const char *text) {
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            putchar('\\');
        putchar(*text);
    }
    putchar('"');
}

static void json_head(const dlattn_api *api) {
    printf("{\"version\": \"%s\", \"abi\": [%u, %u],\n \"devices\": [", api->version(),
           api->abi_major, api->abi_minor);
}

static void json_device(const dlattn_device_info *d, bool first) {
    printf("%s\n  {\"type\": %d, \"id\": %d, \"name\": ", first ? "" : ",", d->device_type,
           d->device_id);
    json_string(d->name);
    printf(", \"arch\": ");
    json_string(d->arch);
    printf(", \"multiprocessors\": %d, \"shared_memory_bytes\": %lld}", d->multiprocessors,
           (long long)d->shared_memory_bytes);
}

static void json_between(void) { printf("],\n \"kernels\": ["); }

static void json_kernel(const dlattn_kernel_info *k, bool first) {
    printf("%s\n  {\"name\": \"%s\", \"operation\": \"%s\", \"backend\": \"%s\", \"arch\": \"%s\", "
           "\"dtypes\": \"%s\", "
           "\"max_head_dim\": %d, \"max_head_dim_v\": %d, \"tile_q\": %d, \"tile_k\": %d, "
           "\"available\": %s, \"reference\": %s, "
           "\"features\": [",
           first ? "" : ",", k->name, k->operation, k->backend, k->arch, k->dtypes, k->max_head_dim,
           k->max_head_dim_v, k->tile_q, k->tile_k, k->available ? "true" : "false",
           k->flags & DLATTN_KERNEL_REFERENCE ? "true" : "false");
    const char *comma = "";
    for (int i = 0; i < DLATTN_FEATURE_COUNT; i++) {
        if (k->features & dlattn_features[i].bit) {
            printf("%s\"%s\"", comma, dlattn_features[i].name);
            comma = ", ";
        }
    }
    printf("]}");
}

static void json_tail(void) { printf("]}\n"); }

/* ---- Markdown: the same on every machine, for docs/support.md -------------------------------- */

static void markdown_head(const dlattn_api *api) {
    printf("# Support matrix of dlattn %s (ABI %u.%u)\n\n"
           "For each operation best first: the first row that accepts a problem gets it. Made by "
           "`dlattn-info --markdown`.\n\n"
           "| kernel | operation | machine | dtypes | head_dim, head_dim_v up to |",
           api->version(), api->abi_major, api->abi_minor);
    for (int i = 0; i < DLATTN_FEATURE_COUNT; i++)
        printf(" %s |", dlattn_features[i].name);
    printf("\n|");
    for (int i = 0; i < DLATTN_FEATURE_COUNT + 5; i++)
        printf(" --- |");
    printf("\n");
}

static void markdown_device(const dlattn_device_info *d, bool first) {
    (void)d;
    (void)first;
}

static void markdown_kernel(const dlattn_kernel_info *k, bool first) {
    (void)first;
    printf("| %s | %s | %s | %s | ", k->name, k->operation, k->arch, k->dtypes);
    print_dim(k->max_head_dim);
    printf(", ");
    print_dim(k->max_head_dim_v);
    printf(" |");
    for (int i = 0; i < DLATTN_FEATURE_COUNT; i++)
        printf(" %s |", k->features & dlattn_features[i].bit ? "yes" : "");
    printf("\n");
}

/* ---- Main ------------------------------------------------------------------------------------ */

static const struct format text = {text_head, text_device, text_between, text_kernel,
                                   print_nothing};
static const struct format json = {json_head, json_device, json_between, json_kernel, json_tail};
static const struct format markdown = {markdown_head, markdown_device, print_nothing,
                                       markdown_kernel, print_nothing};

static int print_all(const dlattn_api *api, const struct format *f) {
    f->head(api);
    for (int32_t i = 0; i < api->device_count(); i++) {
        dlattn_device_info d = {.struct_size = sizeof d};
        if (api->device_info(i, &d) != DLATTN_OK) {
            fprintf(stderr, "dlattn-info: device %d: %s\n", i, api->last_error());
            return 1;
        }
        f->device(&d, i == 0);
    }
    f->between();
    for (int32_t i = 0; i < api->kernel_count(); i++) {
        dlattn_kernel_info k = {.struct_size = sizeof k};
        if (api->kernel_info(i, &k) != DLATTN_OK) {
            fprintf(stderr, "dlattn-info: kernel %d: %s\n", i, api->last_error());
            return 1;
        }
        f->kernel(&k, i == 0);
    }
    f->tail();
    return 0;
}

int main(int argc, char **argv) {
    const struct format *format = argc == 1                                     ? &text
                                  : argc == 2 && !strcmp(argv[1], "--json")     ? &json
                                  : argc == 2 && !strcmp(argv[1], "--markdown") ? &markdown
                                                                                : NULL;
    if (!format) {
        fprintf(stderr, "usage: dlattn-info [--json | --markdown]\n");
        return 2;
    }
    char why[4096];
    const dlattn_api *api = dlattn_open(why, sizeof why);
    if (!api) {
        fprintf(stderr, "%s", why);
        return 1;
    }
    return print_all(api, format);
}
