/*
 * Which row of the CPU takes which problem, on every kind of machine: planning is a pure function of the problem and of what
 * the machine can do. A row that begins to decline, or to take what another does better, is seen here.
 */
#include "src/plan.h"
#include "tests/support/call.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <string.h>

enum machine { PLAIN, AVX2, AVX512, AVX512VBMI, AVX512BF16, FAST_BF16, AMX, MACHINES };

static const uint32_t sets[MACHINES] = {
    [AVX2] = CPU_AVX2,
    [AVX512] = CPU_AVX2 | CPU_AVX512,
    [AVX512VBMI] = CPU_AVX2 | CPU_AVX512 | CPU_AVX512VBMI,
    [AVX512BF16] = CPU_AVX2 | CPU_AVX512 | CPU_AVX512BF16,
    [FAST_BF16] = CPU_AVX2 | CPU_AVX512 | CPU_AVX512VBMI | CPU_AVX512BF16 | CPU_FAST_AVX512BF16,
    [AMX] = CPU_AVX2 | CPU_AVX512 | CPU_AVX512VBMI | CPU_AVX512BF16 | CPU_AMX_BF16,
};

/* The rows of each machine, for one kind of problem. */
typedef const char *const rows[MACHINES];
#define REF "cpu_fwd_ref"
static rows reference = {REF, REF, REF, REF, REF, REF, REF};
static rows decode = {REF,
                      "cpu_decode_avx2",
                      "cpu_decode_avx512",
                      "cpu_decode_avx512",
                      "cpu_decode_avx512",
                      "cpu_decode_avx512",
                      "cpu_decode_avx512"};
static rows decode_e4m3 = {REF,
                           "cpu_decode_avx2",
                           "cpu_decode_avx512",
                           "cpu_decode_avx512vbmi",
                           "cpu_decode_avx512",
                           "cpu_decode_avx512vbmi",
                           "cpu_decode_avx512vbmi"};
static rows decode_tiles = {REF,
                            "cpu_decode_avx2",
                            "cpu_decode_avx512",
                            "cpu_decode_avx512",
                            "cpu_decode_avx512",
                            "cpu_decode_avx512",
                            "cpu_decode_amx"};
static rows decode_e4m3_tiles = {REF,
                                 "cpu_decode_avx2",
                                 "cpu_decode_avx512",
                                 "cpu_decode_avx512vbmi",
                                 "cpu_decode_avx512",
                                 "cpu_decode_avx512vbmi",
                                 "cpu_decode_amx"};
static rows f64 = {REF,
                   "cpu_fwd_f64_avx2",
                   "cpu_fwd_f64_avx512",
                   "cpu_fwd_f64_avx512",
                   "cpu_fwd_f64_avx512",
                   "cpu_fwd_f64_avx512",
                   "cpu_fwd_f64_avx512"};
static rows f32 = {REF,
                   "cpu_fwd_avx2",
                   "cpu_fwd_avx512",
                   "cpu_fwd_avx512",
                   "cpu_fwd_avx512",
                   "cpu_fwd_avx512",
                   "cpu_fwd_avx512"};
static rows f16 = {REF,
                   "cpu_fwd_avx2",
                   "cpu_fwd_avx512",
                   "cpu_fwd_avx512",
                   "cpu_fwd_avx512",
                   "cpu_fwd_avx512",
                   "cpu_fwd_amx"};
static rows bf16 = {REF,
                    "cpu_fwd_avx2",
                    "cpu_fwd_avx512",
                    "cpu_fwd_avx512",
                    "cpu_fwd_avx512",
                    "cpu_fwd_avx512bf16",
                    "cpu_fwd_amx"};

#define BACKWARD_REF "cpu_bwd_ref"
static rows backward_f64 = {BACKWARD_REF, BACKWARD_REF, BACKWARD_REF, BACKWARD_REF,
                            BACKWARD_REF, BACKWARD_REF, BACKWARD_REF};
static rows backward_f32 = {BACKWARD_REF,     "cpu_bwd_avx2",   "cpu_bwd_avx512", "cpu_bwd_avx512",
                            "cpu_bwd_avx512", "cpu_bwd_avx512", "cpu_bwd_avx512"};
static rows backward_f16 = {BACKWARD_REF,     "cpu_bwd_avx2",   "cpu_bwd_avx512", "cpu_bwd_avx512",
                            "cpu_bwd_avx512", "cpu_bwd_avx512", "cpu_bwd_amx_f16"};
static rows backward_bf16 = {BACKWARD_REF,     "cpu_bwd_avx2",   "cpu_bwd_avx512",
                             "cpu_bwd_avx512", "cpu_bwd_avx512", "cpu_bwd_avx512bf16",
                             "cpu_bwd_amx"};

static const char *row_of(const struct test_case *from, uint32_t cpu, const char *kernel) {
    const struct caps caps = {.cpu = cpu, .threads = 2};
    struct problem p;
    struct plan plan;
    struct call c;
    const char *row = "none";
    call_make(&c, from);
    call_use_images(&c);
    c.desc.kernel = kernel;
    c.desc.num_threads = 2;
    const dlattn_tensors tensors = call_tensors(&c);
    const dlattn_gradients gradients = call_gradients(&c);
    cr_assert(
        eq(int,
           problem_build(&p, &c.desc, &tensors, from->features.backward ? &gradients : NULL, false),
           DLATTN_OK));
    if (plan_choose(&plan, &p, &caps) == DLATTN_OK)
        row = plan.kernel->name;
    call_free(&c);
    return row;
}

static void expect_rows(const struct test_case *c, rows want) {
    char text[256];
    case_print(c, text, sizeof text);
    for (int m = 0; m < MACHINES; m++)
        cr_expect(strcmp(row_of(c, sets[m], NULL), want[m]) == 0, "%s, CPU 0x%x: %s instead of %s",
                  text, sets[m], row_of(c, sets[m], NULL), want[m]);
}

static const char *const *forward_rows(enum element e) {
    return e == F64 ? f64 : e == F32 ? f32 : e == F16 ? f16 : bf16;
}

Test(choice, shapes) {
    static const struct {
        struct shape shape;
        bool decodes;
    } cases[] = {
        {{2, 4, 2, 17, 40, 64, 64}, false},    {{1, 1, 1, 300, 300, 64, 64}, false},
        {{1, 2, 2, 1000, 70, 32, 128}, false}, {{1, 1, 1, 17, 33, 1024, 1024}, false},
        {{1, 1, 1, 1, 1, 8, 8}, true},         {{3, 8, 1, 1, 90, 64, 64}, true},
        {{2, 4, 2, 4, 90, 128, 128}, true},    {{1, 1, 1, 1, 40, 1024, 1024}, true},
        {{1, 1, 1, 9, 256, 64, 64}, false},    {{1, 1, 1, 9, 257, 64, 64}, true},
        {{1, 16, 1, 1, 300, 64, 64}, true},    {{1, 17, 1, 1, 300, 64, 64}, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (enum element e = F64; e <= BF16; e++) {
            const struct test_case c = {cases[i].shape, {.name = "plain"}, e, 1};
            expect_rows(&c, cases[i].decodes && e != F64 ? decode : forward_rows(e));
        }
    }
    for (enum element e = F64; e <= BF16; e++) { /* beyond what the fast rows claim */
        expect_rows(&(struct test_case){{1, 1, 1, 20, 5, 1025, 8}, {.name = "plain"}, e, 1},
                    reference);
        expect_rows(&(struct test_case){{1, 1, 1, 1, 5, 8, 1025}, {.name = "plain"}, e, 1},
                    reference);
    }
}

/* What came after 1.0 and neither f64 nor decoding has in a row of its own. */
static bool is_later(const struct features *f) {
    return f->diagonal_offset != 0 || f->segments || f->block_q > 0 || f->dropout > 0;
}

/* No option, no float8, no scale and no layout takes a problem away from its row; f64's have those of ABI 1.0. */
Test(choice, features) {
    for (int n = 0; n < feature_set_count; n++) {
        const struct features *f = &feature_sets[n];
        for (enum element e = F64; e <= BF16; e++) {
            const struct test_case many = {{2, 8, 2, 20, 50, 64, 64}, *f, e, 3},
                                   few = {{2, 4, 2, 2, 50, 64, 64}, *f, e, 3};
            const bool later = is_later(f), refer = e == F64 && (later || features_have_8_bits(f));
            expect_rows(&many, refer ? reference : forward_rows(e));
            if (!refer && !f->varlen_q) /* whose rows may be as many as all sequences have */
                expect_rows(&few, later || e == F64                    ? forward_rows(e)
                                  : f->key == E4M3 || f->value == E4M3 ? decode_e4m3
                                                                       : decode);
        }
    }
}

/* Over many keys, decoding by AMX tiles takes more than four rows, or e4m3. */
Test(choice, many_keys) {
    static const struct {
        struct shape shape;
        enum element element, cache;
        const char *const *rows;
    } cases[] = {
        {{1, 10, 2, 1, 1024, 64, 64}, BF16, BF16, decode_tiles},
        {{1, 10, 2, 1, 1023, 64, 64}, BF16, BF16, decode},
        {{1, 8, 2, 1, 4096, 64, 64}, BF16, BF16, decode},
        {{1, 8, 2, 2, 1024, 64, 64}, BF16, E5M2, decode_tiles},
        {{1, 8, 2, 2, 4096, 64, 64}, F16, F16, decode},
        {{1, 8, 2, 2, 4096, 64, 64}, F16, E5M2, decode},
        {{1, 8, 2, 2, 4096, 64, 64}, F32, E5M2, decode},
        {{1, 8, 2, 1, 4096, 64, 64}, BF16, E5M2, decode},
        {{1, 8, 2, 1, 1024, 64, 128}, BF16, E4M3, decode_e4m3_tiles},
        {{1, 8, 2, 1, 1024, 64, 80}, BF16, E4M3, decode_e4m3},
        {{1, 8, 2, 1, 1023, 64, 64}, BF16, E4M3, decode_e4m3},
        {{1, 8, 2, 1, 1024, 64, 64}, F16, E4M3, decode_e4m3},
        {{1, 8, 8, 1, 65536, 64, 64}, BF16, E4M3, decode_e4m3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct test_case c = {cases[i].shape, {.name = "cache"}, cases[i].element, 1};
        if (cases[i].cache != cases[i].element)
            c.features.key = c.features.value = cases[i].cache;
        expect_rows(&c, cases[i].rows);
    }
}

static const char *const *backward_rows(enum element e) {
    return e == F64   ? backward_f64
           : e == F32 ? backward_f32
           : e == F16 ? backward_f16
                      : backward_bf16;
}

/* No option takes a problem away from a row of backward. */
Test(choice, gradients) {
    for (int n = 0; n < feature_set_count; n++) {
        struct test_case c = {{2, 8, 2, 20, 50, 64, 64}, feature_sets[n], F64, 3};
        c.features.backward = true;
        for (; !features_are_forward_only(&feature_sets[n]) && c.element <= BF16; c.element++)
            expect_rows(&c, backward_rows(c.element));
    }
}

/* Two rows are taken by name where the library prefers another. */
Test(choice, by_name) {
    const struct test_case single = {{2, 4, 2, 40, 50, 64, 64}, {.name = "plain"}, F32, 1},
                           brain = {{2, 4, 2, 40, 50, 64, 64}, {.name = "plain"}, BF16, 1};
    cr_expect(strcmp(row_of(&single, sets[AMX], "cpu_fwd_amx"), "cpu_fwd_amx") == 0);
    cr_expect(
        strcmp(row_of(&brain, sets[AVX512BF16], "cpu_fwd_avx512bf16"), "cpu_fwd_avx512bf16") == 0);
    cr_expect(strcmp(row_of(&single, sets[AVX512], "cpu_fwd_amx"), "none") == 0);
}

/* Each operation has one reference row, behind all others of the CPU: what it says of itself is what tests and hosts go by. */
Test(choice, references) {
    for (enum operation operation = FORWARD; operation < OPERATION_COUNT; operation++) {
        const struct kernel *last = NULL;
        int references = 0;
        for (int32_t i = 0; i < kernel_table_size; i++) {
            const struct kernel *k = &kernel_table[i];
            if (k->operation != operation || k->backend != BACKEND_CPU)
                continue;
            references += (kernel_flags(k) & DLATTN_KERNEL_REFERENCE) != 0;
            last = k;
        }
        cr_expect(eq(int, references, 1), "%s", operation_name(operation));
        cr_expect(last && last->reference && last->cpu_needs == 0, "%s", operation_name(operation));
    }
}

/* Rows for few query rows, and they alone, say that they decline others. */
Test(choice, decode) {
    for (int32_t i = 0; i < kernel_table_size; i++) {
        const struct kernel *k = &kernel_table[i];
        bool one_of_them = false;
        for (int m = AVX2; m < MACHINES; m++)
            one_of_them |=
                strcmp(k->name, decode_e4m3[m]) == 0 || strcmp(k->name, decode_e4m3_tiles[m]) == 0;
        if (k->backend == BACKEND_CPU)
            cr_expect(eq(int, (kernel_flags(k) & DLATTN_KERNEL_DECODE) != 0, one_of_them), "%s",
                      k->name);
    }
}
