/*
 * Which tile a GPU that we do not have would run: planning is a pure function of the problem and the machine.
 */
#include "src/error.h"
#include "src/plan.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <string.h>

/* Shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities). */
static const struct machine {
    int32_t sm;
    int64_t shared_memory_bytes;
} machines[] = {{80, 166912}, {86, 101376},  {89, 101376},
                {90, 232448}, {100, 232448}, {120, 101376}};
enum { MACHINES = sizeof machines / sizeof machines[0] };

static struct caps caps_of(const struct machine *m) {
    return (struct caps){
        .sm = m->sm, .shared_memory_bytes = m->shared_memory_bytes, .multiprocessors = 100};
}

static struct problem problem_of(enum dtype dtype, int64_t dim_qk, int64_t dim_v,
                                 uint64_t features) {
    return (struct problem){.backend = BACKEND_CUDA,
                            .dtype = dtype,
                            .query.dtype = dtype,
                            .key.dtype = dtype,
                            .value.dtype = dtype,
                            .output.dtype = dtype,
                            .features = features,
                            .batch = 1,
                            .heads_q = 2,
                            .heads_kv = 2,
                            .len_q = 300,
                            .len_k = 300,
                            .dim_qk = dim_qk,
                            .dim_v = dim_v,
                            .scale = 1};
}

static const char *row_of(const struct machine *m, const struct problem *p) {
    const struct caps caps = caps_of(m);
    struct plan plan;
    return plan_choose(&plan, p, &caps) == DLATTN_OK ? plan.kernel->name : "";
}

/* The seed's kernel asked for more shared memory than these GPUs have at D 96 and 128. */
Test(gpu_plan, every_head_dim_on_every_gpu) {
    static const uint64_t features[] = {
        0, DLATTN_FEATURE_CAUSAL | DLATTN_FEATURE_LSE, DLATTN_FEATURE_BIAS,
        DLATTN_FEATURE_PAGED | DLATTN_FEATURE_UNALIGNED | DLATTN_FEATURE_STRIDED,
        DLATTN_FEATURE_DROPOUT | DLATTN_FEATURE_SEGMENTS | DLATTN_FEATURE_BLOCK_MASK |
            DLATTN_FEATURE_DIAGONAL_OFFSET};
    for (int m = 0; m < MACHINES; m++) {
        for (int64_t dim = 1; dim <= 256; dim++) {
            for (size_t f = 0; f < sizeof features / sizeof features[0]; f++) {
                for (enum dtype e = 0; e < DTYPE_E4M3; e++) {
                    const struct problem same = problem_of(e, dim, dim, features[f]),
                                         wider = problem_of(e, dim, 257 - dim, features[f]);
                    cr_expect(row_of(&machines[m], &same)[0] != 0, "sm_%d %s D %d", machines[m].sm,
                              dtype_name(e), (int)dim);
                    cr_expect(row_of(&machines[m], &wider)[0] != 0, "sm_%d %s D %d, D_v %d",
                              machines[m].sm, dtype_name(e), (int)dim, (int)(257 - dim));
                }
            }
        }
    }
}

/* Few rows of a wider query over float8 keys and values, which are each their own, on every GPU. */
Test(gpu_plan, caches_of_8_bits) {
    const struct caps h100 = caps_of(&machines[3]);
    struct problem p = problem_of(DTYPE_BF16, 128, 64, DLATTN_FEATURE_MIXED_DTYPES);
    struct plan plan;
    p.key.dtype = DTYPE_E4M3;
    p.value.dtype = DTYPE_E5M2;
    p.len_q = 4;
    for (int m = 0; m < MACHINES; m++)
        cr_expect(strcmp(row_of(&machines[m], &p), "cuda_decode_sm80") == 0, "%s", error_last());
    p.value.dtype = DTYPE_BF16;
    cr_expect(eq(int, plan_choose(&plan, &p, &h100), DLATTN_UNSUPPORTED));
    cr_expect(strstr(error_last(), "both float8") != NULL, "%s", error_last());
    p.value.dtype = DTYPE_E4M3;
    p.features |= DLATTN_FEATURE_PAGED | DLATTN_FEATURE_SCALES;
    p.page_size = 16;
    cr_expect(eq(int, plan_choose(&plan, &p, &h100), DLATTN_OK), "%s", error_last());
    p.key_scale.stride[0] = 2;
    cr_expect(eq(int, plan_choose(&plan, &p, &h100), DLATTN_UNSUPPORTED));
    cr_expect(strstr(error_last(), "all pages") != NULL, "%s", error_last());
    p = problem_of(DTYPE_BF16, 128, 128, DLATTN_FEATURE_SCALES);
    p.kernel = "cuda_decode_sm80";
    cr_expect(eq(int, plan_choose(&plan, &p, &h100), DLATTN_UNSUPPORTED));
    cr_expect(strstr(error_last(), "scales") != NULL, "%s", error_last());
}

/* Gradients: every feature but pages, in every dtype but f64. */
Test(gpu_plan, backward_of_every_head_dim_on_every_gpu) {
    static const uint64_t features[] = {
        0, DLATTN_FEATURE_CAUSAL | DLATTN_FEATURE_LSE | DLATTN_FEATURE_VARLEN,
        DLATTN_FEATURE_BIAS | DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_SOFTCAP,
        DLATTN_FEATURE_DROPOUT | DLATTN_FEATURE_SEGMENTS | DLATTN_FEATURE_BLOCK_MASK |
            DLATTN_FEATURE_DIAGONAL_OFFSET};
    for (int m = 0; m < MACHINES; m++) {
        for (int64_t dim = 1; dim <= 256; dim++) {
            for (size_t n = 0; n < 8 * (sizeof features / sizeof features[0]); n++) {
                const enum dtype dtype = n % 4;
                struct problem p =
                    problem_of(dtype, dim, n % 8 < 4 ? dim : 257 - dim, features[n / 8]);
                p.operation = BACKWARD;
                if (dtype == DTYPE_F64)
                    continue;
                p.kernel = dtype_bytes(dtype) == 2 ? "cuda_bwd_sm80" : "cuda_bwd_simt";
                cr_expect(strcmp(row_of(&machines[m], &p), p.kernel) == 0, "sm_%d %s D %d, D_v %d",
                          machines[m].sm, dtype_name(dtype), (int)p.dim_qk, (int)p.dim_v);
            }
        }
    }
    struct problem paged = problem_of(DTYPE_BF16, 64, 64, DLATTN_FEATURE_PAGED);
    paged.operation = BACKWARD;
    cr_expect(strcmp(row_of(&machines[3], &paged), "") == 0);
}

/* A multiprocessor of an H100 holds one block of 128 keys, and of smaller GPUs one of 64; statistics take 12 bytes for a row of
 * those that are padded to 64, and sums of slopes 4 for a block of rows. Where there is room for five products, and rows see
 * enough keys, statistics take 20, sums of queries 4 for an element, and facts 1152 for a kv head. */
Test(gpu_plan, backward_follows_shared_memory) {
    static const int32_t keys[MACHINES] = {64, 64, 64, 128, 128, 64};
    struct problem p = problem_of(DTYPE_BF16, 128, 128, 0);
    p.operation = BACKWARD;
    p.kernel = "cuda_bwd_sm80";
    p.window_left = p.window_right = UNBOUNDED;
    for (int m = 0; m < MACHINES; m++) {
        const struct caps caps = caps_of(&machines[m]);
        struct plan plan;
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK));
        cr_expect(eq(int, plan.tile_k, keys[m]), "sm_%d", machines[m].sm);
        cr_expect(eq(int, plan.tile_q, 128), "sm_%d", machines[m].sm);
        cr_expect(eq(sz, plan.workspace_bytes, 2 * (320 * 12 + 3 * 4)), "sm_%d", machines[m].sm);
        p.len_q = p.len_k = 1000;
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK));
        p.len_q = p.len_k = 300;
        const size_t bytes =
            keys[m] == 128 ? 2 * (1024 * (20 + 128 * 4) + 1152) : 2 * (1024 * 12 + 8 * 4);
        cr_expect(eq(sz, plan.workspace_bytes, bytes), "sm_%d", machines[m].sm);
    }
}

/* Indices of rows, keys and an offset diagonal meet in 32 bits. */
static void expect_most_offset(struct problem *p, const char *row) {
    const struct caps caps = caps_of(&machines[3]);
    struct plan plan;
    p->kernel = row;
    p->diagonal_offset = -((1 << 29) - 600);
    cr_expect(eq(int, plan_choose(&plan, p, &caps), DLATTN_OK), "%s", error_last());
    p->diagonal_offset--;
    cr_expect(eq(int, plan_choose(&plan, p, &caps), DLATTN_UNSUPPORTED));
    cr_expect(strstr(error_last(), "diagonal_offset") != NULL, "%s", error_last());
}

/* ALiBi of a part of the keys. */
Test(gpu_plan, forward_on_an_offset_diagonal) {
    struct problem p =
        problem_of(DTYPE_BF16, 64, 64, DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_DIAGONAL_OFFSET);
    p.diagonal_offset = 7;
    for (int m = 0; m < MACHINES; m++)
        cr_expect(strcmp(row_of(&machines[m], &p), "cuda_fwd_sm80") == 0, "sm_%d", machines[m].sm);
    expect_most_offset(&p, "cuda_fwd_sm80");
    p = problem_of(DTYPE_F32, 64, 64, DLATTN_FEATURE_DIAGONAL_OFFSET);
    expect_most_offset(&p, "cuda_fwd_tf32x3");
    expect_most_offset(&p, "cuda_fwd_simt");
}

/* What came with ABI 1.1 takes no dtype from its row, but Hopper's own has segments alone; and it has tiles of its own. */
Test(gpu_plan, forward_with_options_of_pairs) {
    static const uint64_t features[] = {DLATTN_FEATURE_DROPOUT, DLATTN_FEATURE_SEGMENTS,
                                        DLATTN_FEATURE_BLOCK_MASK, DLATTN_FEATURE_DIAGONAL_OFFSET};
    static const char *const rows[] = {
        [DTYPE_F64] = "cuda_fwd_simt",
        [DTYPE_F32] = "cuda_fwd_tf32x3",
        [DTYPE_F16] = "cuda_fwd_sm80",
        [DTYPE_BF16] = "cuda_fwd_sm80",
    };
    const struct caps caps = caps_of(&machines[0]);
    for (size_t f = 0; f < sizeof features / sizeof features[0]; f++) {
        for (enum dtype e = 0; e < DTYPE_E4M3; e++) {
            const struct problem p = problem_of(e, 64, 64, features[f]),
                                 plain = problem_of(e, 64, 64, 0);
            struct plan plan, without;
            cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
            cr_assert(eq(int, plan_choose(&without, &plain, &caps), DLATTN_OK));
            cr_expect(strcmp(plan.kernel->name, rows[e]) == 0, "%s: %s", dtype_name(e),
                      plan.kernel->name);
            cr_expect(plan.kernel == without.kernel && plan.variant != without.variant, "%s",
                      dtype_name(e));
        }
    }
}

/* Blocks of few rows while that makes more of them than four for each multiprocessor, and of no more than there are slots for;
 * what the parameters have no room for is in the workspace. */
Test(gpu_plan, merge) {
    static const struct {
        int64_t count, batch, rows;
        int32_t block_rows, blocks;
        size_t workspace_bytes;
    } cases[] = {
        {2, 1, 1, 1, 2, 0},        {2, 3, 133, 1, 798, 0},        {2, 8, 75, 3, 400, 0},
        {2, 8, 5000, 64, 1250, 0}, {33, 8, 5000, 31, 2581, 2640}, {1024, 1, 9, 1, 18, 81920}};
    const struct caps caps = caps_of(&machines[3]);
    for (size_t n = 0; n < sizeof cases / sizeof cases[0]; n++) {
        const dlattn_partials partials = {.count = cases[n].count};
        struct problem p = problem_of(DTYPE_F16, 64, 64, DLATTN_FEATURE_LSE);
        struct plan plan;
        p.operation = MERGE;
        p.partials = &partials;
        p.batch = cases[n].batch;
        p.len_q = cases[n].rows;
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
        cr_expect(eq(int, plan.tile_q, cases[n].block_rows), "case %zu", n);
        cr_expect(eq(int, plan.blocks, cases[n].blocks), "case %zu", n);
        cr_expect(eq(sz, plan.workspace_bytes, cases[n].workspace_bytes), "case %zu", n);
    }
}

Test(gpu_plan, backward_refuses_what_an_index_cannot_hold) {
    const struct caps caps = caps_of(&machines[3]);
    struct problem p = problem_of(DTYPE_BF16, 64, 64, DLATTN_FEATURE_DIAGONAL_OFFSET);
    struct plan plan;
    p.operation = BACKWARD;
    expect_most_offset(&p, "cuda_bwd_sm80");
    p.diagonal_offset = 0;
    p.batch = 1 << 13;
    p.heads_q = p.heads_kv = 64;
    p.len_q = p.len_k = p.total_q = p.total_k = 1 << 20;
    cr_expect(eq(int, plan_choose(&plan, &p, &caps), DLATTN_UNSUPPORTED));
    cr_expect(strstr(error_last(), "max_seqlen_q") != NULL, "%s", error_last());
}

/* At D 128: with two stages, with one, or of eight warps, whichever fills the GPU. */
Test(gpu_plan, tiles_follow_shared_memory) {
    const struct problem p = problem_of(DTYPE_BF16, 128, 128, 0);
    struct problem sm80 = p;
    struct plan plan[3];
    sm80.kernel = "cuda_fwd_sm80";
    for (int m = 0; m < 3; m++) {
        const struct caps caps = caps_of(&machines[m == 2 ? 3 : m]);
        cr_assert(eq(int, plan_choose(&plan[m], &sm80, &caps), DLATTN_OK));
    }
    cr_expect(eq(int, plan[0].tile_k, 64));
    cr_expect(eq(int, plan[1].tile_k, 32));
    cr_expect(eq(int, plan[2].tile_k, 64));
    cr_expect(ne(int, plan[0].variant, plan[2].variant));
}

/* At D 256 on an H100: blocks of 128 rows where there are enough of them, and masks leave them enough keys. */
Test(gpu_plan, tiles_follow_lengths) {
    static const struct {
        int64_t batch, length, window_left, window_right;
        int tile_q;
    } cases[] = {
        {16, 1024, UNBOUNDED, UNBOUNDED, 128}, {4, 1024, UNBOUNDED, UNBOUNDED, 64},
        {64, 256, UNBOUNDED, UNBOUNDED, 64},   {16, 1024, UNBOUNDED, 0, 64},
        {16, 2048, UNBOUNDED, 0, 128},         {16, 2048, 500, 0, 64},
    };
    const struct caps caps = caps_of(&machines[3]);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct problem p = problem_of(DTYPE_F16, 256, 256, 0);
        struct plan plan;
        p.kernel = "cuda_fwd_sm80";
        p.batch = cases[i].batch;
        p.len_q = p.len_k = cases[i].length;
        p.window_left = cases[i].window_left;
        p.window_right = cases[i].window_right;
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK));
        cr_expect(eq(int, plan.tile_q, cases[i].tile_q), "case %d", (int)i);
    }
}

Test(gpu_plan, rows_by_dtype) {
    const struct problem half = problem_of(DTYPE_F16, 128, 128, 0),
                         single = problem_of(DTYPE_F32, 128, 128, 0);
    cr_expect(strcmp(row_of(&machines[2], &half), "cuda_fwd_sm80") == 0);
    for (int m = 0; m < MACHINES; m++) {
        const bool fast_tf32 =
            machines[m].sm == 80 || machines[m].sm == 90 || machines[m].sm == 100;
        const char *const want = fast_tf32 ? "cuda_fwd_tf32x3" : "cuda_fwd_simt";
        cr_expect(strcmp(row_of(&machines[m], &single), want) == 0, "sm_%d", machines[m].sm);
    }
}

/* Gradients of f32 on tensor cores where tf32 is fast and a block has the shared memory. The workspace has 16 bytes for a row of those
 * that are padded to 64, 8 for each element of its sums, and 16 for a kv head. */
Test(gpu_plan, backward_of_f32) {
    static const struct {
        int64_t dim;
        int32_t keys[MACHINES]; /* 0: cuda_bwd_simt */
    } cases[] = {
        {64, {64, 0, 0, 64, 64, 0}}, {65, {64, 0, 0, 64, 64, 0}}, {256, {32, 0, 0, 64, 64, 0}}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const int64_t dim = cases[i].dim, padded = dim == 65 ? 128 : dim;
        struct problem p = problem_of(DTYPE_F32, dim, dim, 0);
        p.operation = BACKWARD;
        for (int m = 0; m < MACHINES; m++) {
            const struct caps caps = caps_of(&machines[m]);
            const int32_t keys = cases[i].keys[m];
            struct plan plan;
            cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
            cr_expect(strcmp(plan.kernel->name, keys ? "cuda_bwd_tf32x3" : "cuda_bwd_simt") == 0,
                      "sm_%d D %d is %s", machines[m].sm, (int)dim, plan.kernel->name);
            if (!keys)
                continue;
            cr_expect(eq(int, plan.tile_k, keys), "sm_%d D %d", machines[m].sm, (int)dim);
            cr_expect(eq(sz, plan.workspace_bytes, 2 * (320 * (16 + 8 * (size_t)padded) + 16)),
                      "sm_%d D %d", machines[m].sm, (int)dim);
        }
    }
}

/* Few rows: their own kernel, in about as many blocks as the GPU has multiprocessors, and workspace for what those leave. */
Test(gpu_plan, decoding_is_split_until_it_fills_the_gpu) {
    static const struct {
        int64_t batch, heads_q, heads_kv, len_q, len_k;
        int32_t splits, rows;
        bool keeps_zero; /* few enough rows of splits for one block to merge */
    } cases[] = {{1, 32, 8, 1, 8192, 12, 8, true},   {1, 32, 8, 1, 1000, 7, 8, true},
                 {1, 32, 8, 1, 100, 1, 8, true},     {60, 8, 8, 1, 8192, 1, 8, true},
                 {1, 16, 1, 1, 8192, 64, 16, false}, {1, 64, 8, 3, 8192, 25, 32, false},
                 {1, 12, 4, 100, 8192, 5, 32, false}};
    for (size_t n = 0; n < sizeof cases / sizeof cases[0]; n++) {
        struct problem p = problem_of(DTYPE_BF16, 128, 128, DLATTN_FEATURE_GQA);
        p.batch = cases[n].batch;
        p.heads_q = cases[n].heads_q;
        p.heads_kv = cases[n].heads_kv;
        p.len_q = cases[n].len_q;
        p.len_k = cases[n].len_k;
        for (int m = 0; m < MACHINES; m++) {
            const struct caps caps = caps_of(&machines[m]);
            struct plan plan;
            cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK));
            cr_expect(strcmp(plan.kernel->name, "cuda_decode_sm80") == 0, "case %d", (int)n);
            cr_expect(eq(int, plan.splits, cases[n].splits), "case %d", (int)n);
            cr_expect(eq(int, plan.tile_q, cases[n].rows), "case %d", (int)n);
            cr_expect(eq(int, plan.keeps_zero, cases[n].keeps_zero), "case %d", (int)n);
            const int64_t packed = p.heads_q / p.heads_kv * p.len_q,
                          tiles = p.batch * p.heads_kv * ((packed + plan.tile_q - 1) / plan.tile_q),
                          floats = tiles * plan.splits * plan.tile_q * (128 + 2);
            cr_expect(
                eq(sz, plan.workspace_bytes, plan.splits > 1 ? (size_t)(floats + tiles) * 4 : 0),
                "case %d", (int)n);
        }
    }
}

/* Heads wider than 256, on every GPU: tiles of what fits its shared memory, and splits of the keys of few rows. */
Test(gpu_plan, wide_heads) {
    static const struct {
        int32_t rows, keys;
    } want[MACHINES] = {{64, 32}, {32, 16}, {32, 16}, {64, 64}, {64, 64}, {32, 16}};
    for (int m = 0; m < MACHINES; m++) {
        const struct caps caps = caps_of(&machines[m]);
        struct problem p = problem_of(DTYPE_BF16, 576, 512, DLATTN_FEATURE_GQA);
        struct plan plan;
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
        cr_expect(strcmp(plan.kernel->name, "cuda_fwd_wide_sm80") == 0);
        cr_expect(eq(int, plan.tile_q, want[m].rows), "sm_%d", machines[m].sm);
        cr_expect(eq(int, plan.tile_k, want[m].keys), "sm_%d", machines[m].sm);
        p.heads_q = 16;
        p.heads_kv = 1;
        p.len_q = 1;
        p.len_k = 4096;
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
        cr_expect(eq(int, plan.tile_q, 16), "sm_%d", machines[m].sm);
        cr_expect(eq(int, plan.tile_k, 32), "sm_%d", machines[m].sm);
        cr_expect(eq(int, plan.splits, 100), "sm_%d", machines[m].sm);
        cr_expect(eq(sz, plan.workspace_bytes, (size_t)plan.splits * 16 * (512 + 2) * 4));
    }
}

static struct view compact(int64_t heads, int64_t length, int64_t dim) {
    return (struct view){.stride = {heads * length * dim, length * dim, dim, 1}};
}

/* Rows of the query have their part of the workspace whether keys are packed or not. */
Test(gpu_plan, packed_keys_leave_the_query_its_workspace) {
    const struct caps caps = {.sm = 90, .shared_memory_bytes = 232448, .multiprocessors = 132};
    struct problem p = problem_of(DTYPE_BF16, 128, 128, 0);
    struct plan dense, packed;
    p.operation = BACKWARD;
    p.kernel = "cuda_bwd_sm90";
    p.batch = 3;
    p.query = p.key = p.value = p.d_output = compact(2, 300, 128);
    p.d_output.dtype = DTYPE_BF16;
    p.lse.dtype = DTYPE_F32;
    cr_assert(eq(int, plan_choose(&dense, &p, &caps), DLATTN_OK));
    p.features = DLATTN_FEATURE_VARLEN;
    p.total_k = 900;
    cr_assert(eq(int, plan_choose(&packed, &p, &caps), DLATTN_OK));
    cr_expect(eq(sz, packed.workspace_bytes, dense.workspace_bytes));
}

/* Hopper's gradients: the narrowest tile that covers both head dims. Above 128, and at 128 while few rows see a key, there are no sums
 * in memory; from 257 on there is no tile. */
Test(gpu_plan, wide_gradients) {
    static const struct {
        int64_t dim_qk, dim_v, len;
        int32_t tile_k; /* 0: declined */
    } cases[] = {{128, 128, 513, 128}, {128, 128, 512, 64}, {136, 64, 513, 64}, {192, 128, 513, 64},
                 {64, 256, 513, 64},   {264, 64, 513, 0},   {64, 64, 100, 128}};
    const struct caps caps = {.sm = 90, .shared_memory_bytes = 232448, .multiprocessors = 132};
    size_t narrow = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const uint64_t feature = cases[i].dim_qk == cases[i].dim_v ? 0 : DLATTN_FEATURE_HEAD_DIM_V;
        struct problem p = problem_of(DTYPE_BF16, cases[i].dim_qk, cases[i].dim_v, feature);
        struct plan plan = {.tile_k = 0};
        p.operation = BACKWARD;
        p.kernel = "cuda_bwd_sm90";
        p.len_q = p.len_k = cases[i].len;
        p.window_left = p.window_right = UNBOUNDED;
        p.query = p.key = compact(2, cases[i].len, cases[i].dim_qk);
        p.value = p.d_output = compact(2, cases[i].len, cases[i].dim_v);
        p.d_output.dtype = DTYPE_BF16;
        p.lse.dtype = DTYPE_F32;
        const int32_t status = plan_choose(&plan, &p, &caps);
        cr_expect(eq(int, status == DLATTN_OK, cases[i].tile_k > 0), "D %d", (int)p.dim_qk);
        cr_expect(eq(int, plan.tile_k, cases[i].tile_k), "D %d", (int)p.dim_qk);
        if (i == 0)
            narrow = plan.workspace_bytes;
        else if (cases[i].tile_k == 64)
            cr_expect(lt(sz, plan.workspace_bytes, narrow / 4), "D %d", (int)p.dim_qk);
    }
}

/* An H100's choices for the calls that shapes_test runs. */
Test(gpu_plan, long_and_half_empty) {
    static const struct {
        const char *wanted;
        enum dtype dtype;
        int64_t batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v;
        bool causal;
        const char *row;
        int32_t tile_q, tile_k, splits;
        uint64_t features;
    } choices[] = {
#define CHOICE(wanted, element, ...) {wanted, DTYPE_##element, __VA_ARGS__, 0},
#define OPTION(feature, wanted, element, ...)                                                      \
    {wanted, DTYPE_##element, __VA_ARGS__, DLATTN_FEATURE_##feature},
#include "tests/gpu/choices.inc"
#undef CHOICE
#undef OPTION
    };
    struct caps caps = caps_of(&machines[3]);
    caps.multiprocessors = 132;
    for (size_t n = 0; n < sizeof choices / sizeof choices[0]; n++) {
        struct problem p =
            problem_of(choices[n].dtype, choices[n].dim_qk, choices[n].dim_v, choices[n].features);
        struct plan plan;
        p.kernel = choices[n].wanted;
        p.batch = choices[n].batch;
        p.heads_q = choices[n].heads_q;
        p.heads_kv = choices[n].heads_kv;
        p.len_q = choices[n].len_q;
        p.len_k = choices[n].len_k;
        p.window_left = UNBOUNDED;
        p.window_right = choices[n].causal ? 0 : UNBOUNDED;
        p.query = compact(p.heads_q, p.len_q, p.dim_qk);
        p.key = compact(p.heads_kv, p.len_k, p.dim_qk);
        p.value = compact(p.heads_kv, p.len_k, p.dim_v);
        p.output = compact(p.heads_q, p.len_q, p.dim_v);
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK));
        cr_expect(strcmp(plan.kernel->name, choices[n].row) == 0, "choice %d is %s", (int)n,
                  plan.kernel->name);
        cr_expect(eq(int, plan.tile_q, choices[n].tile_q), "choice %d", (int)n);
        cr_expect(eq(int, plan.tile_k, choices[n].tile_k), "choice %d", (int)n);
        cr_expect(eq(int, plan.splits, choices[n].splits), "choice %d", (int)n);
    }
}

Test(gpu_plan, refuses_older_gpus_and_wider_heads) {
    const struct machine turing = {75, 65536};
    const struct problem p = problem_of(DTYPE_F16, 64, 64, 0),
                         wide = problem_of(DTYPE_F16, 577, 64, 0),
                         wide_v = problem_of(DTYPE_F16, 576, 513, 0),
                         wide_f32 = problem_of(DTYPE_F32, 257, 64, 0);
    cr_expect(strcmp(row_of(&turing, &p), "") == 0);
    cr_expect(strcmp(row_of(&machines[0], &wide), "") == 0);
    cr_expect(strstr(error_last(), "cuda_fwd_wide_sm80, goes up to 576 and 512") != NULL, "%s",
              error_last());
    cr_expect(strcmp(row_of(&machines[0], &wide_v), "") == 0);
    cr_expect(strcmp(row_of(&machines[0], &wide_f32), "") == 0);
}

/* Indices inside the kernels are 32 bits wide. */
Test(gpu_plan, refuses_what_an_index_cannot_hold) {
    struct problem p = problem_of(DTYPE_BF16, 64, 64, 0);
    p.len_k = INT64_C(1) << 31;
    cr_expect(strcmp(row_of(&machines[3], &p), "") == 0);
    p = problem_of(DTYPE_BF16, 64, 64, 0);
    p.batch = p.heads_q = p.heads_kv = 1 << 16;
    cr_expect(strcmp(row_of(&machines[3], &p), "") == 0);
}

/* Packed sequences of which each might have all rows: the launch would fail, so the query does, and says what helps. */
Test(gpu_plan, refuses_more_blocks_than_a_grid_has) {
    for (enum dtype e = 0; e < DTYPE_E4M3; e++) {
        const struct caps caps = caps_of(&machines[3]);
        struct problem p = problem_of(e, 64, 64, DLATTN_FEATURE_VARLEN);
        struct plan plan;
        p.batch = 1 << 13;
        p.heads_q = p.heads_kv = 64;
        p.len_q = p.len_k = p.total_q = p.total_k = 1 << 20;
        cr_expect(eq(int, plan_choose(&plan, &p, &caps), DLATTN_UNSUPPORTED), "%s", dtype_name(e));
        cr_expect(strstr(error_last(), "max_seqlen_q") != NULL, "%s", error_last());
        p.len_q = 1 << 10;
        cr_expect(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
    }
}

static struct problem hopper_problem(uint64_t features) {
    struct problem p = problem_of(DTYPE_BF16, 128, 128, features);
    p.query = p.key = p.value = p.output = compact(p.heads_q, p.len_q, 128);
    return p;
}

/* Every option runs on Hopper's own row. */
Test(gpu_plan, options_on_hopper) {
    static const uint64_t features[] = {DLATTN_FEATURE_VARLEN,
                                        DLATTN_FEATURE_VARLEN | DLATTN_FEATURE_SINKS,
                                        DLATTN_FEATURE_ALIBI,
                                        DLATTN_FEATURE_SOFTCAP,
                                        DLATTN_FEATURE_BIAS | DLATTN_FEATURE_SEGMENTS,
                                        DLATTN_FEATURE_MASK | DLATTN_FEATURE_SEGMENTS,
                                        DLATTN_FEATURE_ALIBI | DLATTN_FEATURE_SOFTCAP};
    for (size_t n = 0; n < sizeof features / sizeof features[0]; n++) {
        const struct problem p = hopper_problem(features[n]);
        cr_expect(strcmp(row_of(&machines[3], &p), "cuda_fwd_sm90") == 0, "0x%llx",
                  (unsigned long long)features[n]);
    }
}

/* Sinks run on whatever row the same call runs on without them. */
Test(gpu_plan, sinks_on_hopper) {
    for (int64_t length = 64; length <= 16384; length *= 4) {
        struct problem plain = hopper_problem(0), sinks = hopper_problem(DLATTN_FEATURE_SINKS);
        plain.len_q = plain.len_k = sinks.len_q = sinks.len_k = length;
        cr_expect(strcmp(row_of(&machines[3], &sinks), row_of(&machines[3], &plain)) == 0, "%d",
                  (int)length);
    }
}

static struct problem paged_problem(enum dtype dtype, int64_t dim, int64_t page_size,
                                    uint64_t features) {
    struct problem p = problem_of(dtype, dim, dim, DLATTN_FEATURE_PAGED | features);
    p.page_size = page_size;
    p.pages = p.max_pages = (p.len_k + page_size - 1) / page_size;
    p.query = p.output = compact(p.heads_q, p.len_q, dim);
    p.key = p.value = compact(2, page_size, dim);
    return p;
}

/* Boxes of TMA have four keys or more; of smaller ones rows are copied, if nothing changes scores, a cache is not vast and elements have
 * 16 bits. */
Test(gpu_plan, pages_on_hopper) {
    for (int64_t size = 1; size <= 64; size++) {
        const struct problem plain = paged_problem(DTYPE_BF16, 128, size, 0),
                             sinks = paged_problem(DTYPE_BF16, 64, size, DLATTN_FEATURE_SINKS),
                             alibi = paged_problem(DTYPE_BF16, 64, size, DLATTN_FEATURE_ALIBI),
                             wide = paged_problem(DTYPE_BF16, 192, size, 0);
        struct problem float8 = paged_problem(DTYPE_E4M3, 128, size, DLATTN_FEATURE_MIXED_DTYPES);
        float8.query.dtype = float8.key.dtype = float8.value.dtype = DTYPE_E4M3;
        float8.output.dtype = DTYPE_F32;
        const char *const others = size % 4 == 0 ? "cuda_fwd_sm90" : "cuda_fwd_sm80";
        cr_expect(strcmp(row_of(&machines[3], &plain), "cuda_fwd_sm90") == 0, "%d", (int)size);
        cr_expect(strcmp(row_of(&machines[3], &sinks), "cuda_fwd_sm90") == 0, "%d", (int)size);
        cr_expect(strcmp(row_of(&machines[3], &alibi), others) == 0, "ALiBi, %d", (int)size);
        cr_expect(strcmp(row_of(&machines[3], &wide), others) == 0, "D 192, %d", (int)size);
        cr_expect(strcmp(row_of(&machines[3], &float8),
                         size % 4 == 0 ? "cuda_fwd_fp8_sm90" : "cuda_fwd_fp8_sm89") == 0,
                  "float8, %d", (int)size);
        struct problem vast = plain;
        vast.pages = 1 << 20;
        vast.key.stride[0] = 1 << 14; /* 32 GiB */
        cr_expect(strcmp(row_of(&machines[3], &vast), "cuda_fwd_sm90") == 0, "%d", (int)size);
        vast.pages = (1 << 21) + 1;
        cr_expect(strcmp(row_of(&machines[3], &vast), others) == 0, "64 GiB, %d", (int)size);
    }
}

static size_t alibi_workspace(int64_t rows, int64_t keys, int64_t window_left, int64_t window_right,
                              bool bottom_right) {
    const struct caps caps = caps_of(&machines[3]);
    struct problem p = hopper_problem(DLATTN_FEATURE_ALIBI);
    struct plan plan;
    p.len_q = rows;
    p.len_k = keys;
    p.window_left = window_left;
    p.window_right = window_right;
    p.bottom_right = bottom_right;
    p.query = p.output = compact(p.heads_q, rows, p.dim_qk);
    p.key = p.value = compact(p.heads_kv, keys, p.dim_qk);
    p.kernel = "cuda_fwd_sm90";
    cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
    return plan.workspace_bytes;
}

/* How far rows with ALiBi have to look is found out where many of them may look at many keys. */
Test(gpu_plan, reach_of_alibi) {
    cr_expect(alibi_workspace(4096, 4096, UNBOUNDED, 0, false) > 0);
    cr_expect(alibi_workspace(8192, 8192, UNBOUNDED, UNBOUNDED, false) > 0);
    cr_expect(alibi_workspace(8192, 65536, UNBOUNDED, 0, true) > 0);
    cr_expect(alibi_workspace(8192, 65536, 4096, 0, true) > 0);
    cr_expect(eq(sz, alibi_workspace(8192, 65536, 4095, 0, true), 0), "a window");
    cr_expect(eq(sz, alibi_workspace(8192, 65536, UNBOUNDED, 0, false), 0), "first keys alone");
    cr_expect(eq(sz, alibi_workspace(8192, 4000, UNBOUNDED, 0, false), 0), "few keys");
    cr_expect(eq(sz, alibi_workspace(1000, 65536, UNBOUNDED, 0, true), 0), "few rows");
}

/* A block of pairs has one part. Packed sequences of which one is long may have as many tiles each as that one. */
Test(gpu_plan, each_part_of_pairs_has_a_block) {
    struct caps caps = caps_of(&machines[3]);
    caps.multiprocessors = 132;
    for (int64_t rows = 64; rows <= 8192; rows *= 2) {
        struct problem p = hopper_problem(DLATTN_FEATURE_VARLEN);
        struct plan plan;
        p.kernel = "cuda_fwd_split_sm90";
        p.batch = 4;
        p.heads_q = p.heads_kv = 1;
        p.len_q = rows;
        p.len_k = 4096;
        p.total_q = rows + 3;
        p.total_k = 4096 + 3;
        p.query = p.output = compact(1, p.total_q, 128);
        p.key = p.value = compact(1, p.total_k, 128);
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
        const int64_t parts = (rows + plan.tile_q - 1) / plan.tile_q * p.batch * plan.splits;
        cr_expect(plan.tile_q == 64 ? plan.blocks == parts : plan.blocks <= 132, "%d rows",
                  (int)rows);
    }
}

/* Queries of e4m3, on Hopper by its own row where that has the option; the message names what is not taken. */
Test(gpu_plan, queries_of_8_bits) {
    const struct caps h100 = caps_of(&machines[3]);
    struct problem p = problem_of(DTYPE_E4M3, 128, 64, DLATTN_FEATURE_MIXED_DTYPES);
    struct plan plan;
    p.query = p.key = p.value = p.output = compact(p.heads_q, p.len_q, 128);
    p.query.dtype = p.key.dtype = p.value.dtype = DTYPE_E4M3;
    p.output.dtype = DTYPE_F32;
    cr_expect(strcmp(row_of(&machines[3], &p), "cuda_fwd_fp8_sm90") == 0, "%s", error_last());
    for (int m = 0; m < MACHINES; m++) {
        if (machines[m].sm == 90)
            continue;
        cr_expect(
            strcmp(row_of(&machines[m], &p), machines[m].sm < 89 ? "" : "cuda_fwd_fp8_sm89") == 0,
            "sm_%d: %s", machines[m].sm, error_last());
    }
    p.features |= DLATTN_FEATURE_BIAS;
    cr_expect(strcmp(row_of(&machines[3], &p), "cuda_fwd_fp8_sm89") == 0, "%s", error_last());
    p.features &= ~(uint64_t)DLATTN_FEATURE_BIAS;
    p.key.dtype = p.value.dtype = DTYPE_E5M2;
    cr_expect(strcmp(row_of(&machines[3], &p), "cuda_fwd_fp8_sm90") == 0, "%s", error_last());
    p.key.dtype = DTYPE_E4M3;
    cr_expect(eq(int, plan_choose(&plan, &p, &h100), DLATTN_UNSUPPORTED));
    cr_expect(strstr(error_last(), "both float8_e4m3fn") != NULL, "%s", error_last());
    p.value.dtype = p.output.dtype = DTYPE_E4M3;
    cr_expect(eq(int, plan_choose(&plan, &p, &h100), DLATTN_UNSUPPORTED));
    cr_expect(strstr(error_last(), "outputs are") != NULL, "%s", error_last());
    p.dtype = p.query.dtype = DTYPE_E5M2;
    cr_expect(eq(int, plan_choose(&plan, &p, &h100), DLATTN_UNSUPPORTED));
    cr_expect(strstr(error_last(), "queries are") != NULL, "%s", error_last());
}

/* Sequences of so few keys that O need not be settled have tiles of their own, of which a multiprocessor holds two at D 64. */
Test(gpu_plan, queries_of_8_bits_over_few_keys) {
    static const struct {
        int64_t dim, len, softcap, window_right;
        int32_t tile_q, tile_k, blocks; /* of 132 multiprocessors */
    } cases[] = {
        {64, 1024, 0, 0, 128, 64, 264},         {64, 1025, 0, 0, 192, 128, 132},
        {64, 512, 0, UNBOUNDED, 128, 64, 264},  {64, 768, 0, 0, 128, 64, 264},
        {64, 768, 0, UNBOUNDED, 192, 128, 132}, {64, 1024, 20, 0, 192, 128, 132},
        {128, 1024, 0, 0, 128, 128, 132},       {256, 2048, 0, UNBOUNDED, 128, 128, 132},
    };
    struct caps caps = caps_of(&machines[3]);
    caps.multiprocessors = 132;
    for (size_t n = 0; n < sizeof cases / sizeof cases[0]; n++) {
        struct problem p = problem_of(DTYPE_E4M3, (int32_t)cases[n].dim, (int32_t)cases[n].dim,
                                      cases[n].softcap ? DLATTN_FEATURE_SOFTCAP : 0);
        struct plan plan;
        p.batch = 32;
        p.heads_q = p.heads_kv = 16;
        p.len_q = p.len_k = cases[n].len;
        p.softcap = (double)cases[n].softcap;
        p.window_left = UNBOUNDED;
        p.window_right = cases[n].window_right;
        p.query = p.key = p.value = p.output = compact(16, p.len_q, cases[n].dim);
        p.query.dtype = p.key.dtype = p.value.dtype = DTYPE_E4M3;
        p.output.dtype = DTYPE_BF16;
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
        cr_expect(strcmp(plan.kernel->name, "cuda_fwd_fp8_sm90") == 0, "case %d", (int)n);
        cr_expect(eq(int, plan.tile_q, cases[n].tile_q), "case %d", (int)n);
        cr_expect(eq(int, plan.tile_k, cases[n].tile_k), "case %d", (int)n);
        cr_expect(eq(int, plan.blocks, cases[n].blocks), "case %d", (int)n);
    }
}

/* Of any head dims, on every GPU that multiplies float8. */
Test(gpu_plan, queries_of_8_bits_of_every_head_dim) {
    static const uint64_t features[] = {0, DLATTN_FEATURE_MASK | DLATTN_FEATURE_ALIBI,
                                        DLATTN_FEATURE_PAGED | DLATTN_FEATURE_UNALIGNED};
    for (int m = 0; m < MACHINES; m++) {
        for (int64_t dim = 1; dim <= 256 && machines[m].sm >= 89; dim++) {
            for (size_t f = 0; f < sizeof features / sizeof features[0]; f++) {
                struct problem p = problem_of(DTYPE_E4M3, dim, 257 - dim,
                                              features[f] | DLATTN_FEATURE_MIXED_DTYPES);
                p.output.dtype = DTYPE_BF16;
                p.kernel = "cuda_fwd_fp8_sm89";
                cr_expect(strcmp(row_of(&machines[m], &p), p.kernel) == 0, "sm_%d, D %d: %s",
                          machines[m].sm, (int)dim, error_last());
            }
        }
    }
}

/* What depends on data has room in the workspace: the list of packed tiles, however many sequences there are, and a bit for each
 * tile of rows and keys that a mask may hide. */
Test(gpu_plan, hopper_has_room_for_what_it_finds_out) {
    const struct caps caps = caps_of(&machines[3]);
    struct problem p = hopper_problem(DLATTN_FEATURE_VARLEN);
    struct plan plan;
    p.batch = 1000;
    p.total_q = p.total_k = p.len_q = p.len_k = 1 << 20;
    cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
    cr_expect(eq(sz, plan.workspace_bytes, 16 + ((1 << 20) / 128 + 1000) * 8));
    p = hopper_problem(DLATTN_FEATURE_MASK);
    p.len_q = p.len_k = 8192;
    cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
    cr_expect(eq(sz, plan.workspace_bytes, 64 * 2 * 2 * 4));
}

/* The last rows of long sequences on an H100: as many parts of the keys as fill it once, or more often where that is more even; none
 * where tiles are many, where packed rows are few (32 of a key head are), and where most rows of a tile would be empty. */
Test(gpu_plan, few_rows_on_hopper_are_split) {
    static const struct {
        int64_t batch, heads_q, heads_kv, len_q, len_k;
        int32_t splits; /* 0: another row */
    } cases[] = {{1, 32, 8, 32, 4096, 8},    {1, 32, 8, 64, 32768, 8},  {1, 32, 8, 256, 131072, 2},
                 {1, 32, 8, 384, 32768, 4},  {1, 8, 8, 100, 5000, 8},   {2, 8, 1, 64, 1 << 20, 33},
                 {1, 32, 8, 1024, 32768, 0}, {1, 32, 8, 384, 4096, 0},  {1, 32, 8, 16, 32768, 8},
                 {1, 28, 4, 16, 32768, 4},   {60, 32, 8, 64, 32768, 0}, {1, 32, 8, 64, 1024, 4},
                 {1, 32, 8, 16, 65536, 8},   {1, 32, 8, 8, 65536, 0},   {1, 32, 8, 16, 2000, 8},
                 {1, 28, 4, 12, 32768, 0},   {1, 24, 8, 16, 32768, 0},  {1, 32, 8, 64, 1000, 0}};
    struct caps caps = caps_of(&machines[3]);
    caps.multiprocessors = 132;
    for (size_t n = 0; n < sizeof cases / sizeof cases[0]; n++) {
        struct problem p = hopper_problem(DLATTN_FEATURE_GQA | DLATTN_FEATURE_CAUSAL);
        struct plan plan;
        p.batch = cases[n].batch;
        p.heads_q = cases[n].heads_q;
        p.heads_kv = cases[n].heads_kv;
        p.len_q = cases[n].len_q;
        p.len_k = cases[n].len_k;
        p.window_left = UNBOUNDED;
        p.window_right = 0;
        p.bottom_right = true;
        p.query = p.output = compact(p.heads_q, p.len_q, 128);
        p.key = p.value = compact(p.heads_kv, p.len_k, 128);
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK));
        const bool split = strcmp(plan.kernel->name, "cuda_fwd_split_sm90") == 0;
        cr_expect(eq(int, split ? plan.splits : 0, cases[n].splits), "case %d", (int)n);
        if (!split)
            continue;
        const int64_t rows = p.batch * p.heads_q * p.len_q;
        cr_expect(ge(sz, plan.workspace_bytes, (size_t)(rows * plan.splits * (128 + 2)) * 4),
                  "case %d", (int)n);
        p.features |= DLATTN_FEATURE_SOFTCAP;
        cr_assert(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK));
        cr_expect(strcmp(plan.kernel->name, "cuda_fwd_split_sm90") != 0, "case %d", (int)n);
    }
}

/* The heads that share a tile of cuda_fwd_sm90 are one axis of its tensor map, whose strides end at 2^40 bytes. */
Test(gpu_plan, tensor_maps_reach_no_further_than_2_to_the_40) {
    const struct caps caps = caps_of(&machines[3]);
    struct problem p = problem_of(DTYPE_BF16, 64, 64, DLATTN_FEATURE_GQA);
    struct plan plan;
    p.kernel = "cuda_fwd_sm90";
    p.heads_q = 64;
    p.heads_kv = 1;
    p.len_q = 8;
    p.query.stride[1] = p.output.stride[1] = INT64_C(1) << 32;
    p.query.stride[2] = p.output.stride[2] = p.key.stride[2] = p.value.stride[2] = 64;
    cr_expect(eq(int, plan_choose(&plan, &p, &caps), DLATTN_OK), "%s", error_last());
    p.output.stride[1] = INT64_C(1) << 33;
    cr_expect(eq(int, plan_choose(&plan, &p, &caps), DLATTN_UNSUPPORTED));
}
