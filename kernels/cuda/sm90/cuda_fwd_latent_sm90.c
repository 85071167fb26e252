/* Attention over a latent cache on Hopper, f16 and bf16, where value is the first columns of key. See docs/cuda-wide.md. */
#include "kernels/cuda/common/packed.h"
#include "kernels/cuda/sm90/fwd.h"
#include "kernels/cuda/sm90/latent_params.h"

extern const struct cuda_image cuda_fwd_latent_sm90_images[];

static struct cuda_module module = {.images = cuda_fwd_latent_sm90_images};

#define KERNEL(NAME)                                                                               \
    CUDA_KERNEL(module, "cuda_fwd_latent_sm90_" NAME, LATENT_THREADS, LATENT_SHARED_BYTES)
static struct cuda_kernel kernels[] = {KERNEL("f16"), KERNEL("bf16")};
#define MERGE(NAME)                                                                                \
    CUDA_KERNEL(module, "cuda_fwd_latent_sm90_merge_" NAME, LATENT_MERGE_WARPS * 32,               \
                LATENT_MERGE_BYTES)
static struct cuda_kernel merge[] = {MERGE("f16"), MERGE("bf16")};

ROW_FUNCTIONS(cuda_fwd_wide_sm80);
ROW_FUNCTIONS(cuda_fwd_latent_sm90);

static bool takes(const struct problem *p) {
    const bool pages = p->page_size > 0;
    return p->dim_qk > LATENT_DV && p->scale > 0 && p->window_left == UNBOUNDED && p->len_k > 0 &&
           p->page_size % 8 == 0 &&
           mappable(&p->key, pages ? p->pages : p->batch, p->heads_kv,
                    pages ? p->page_size : p->len_k, 1);
}

/* That of cuda_fwd_wide_sm80, which a call takes whose value turns out to be no view of key: only addresses tell. */
bool cuda_fwd_latent_sm90_plan(struct plan *plan, const struct problem *p,
                               const struct caps *caps) {
    return takes(p) && caps->shared_memory_bytes >= LATENT_SHARED_BYTES &&
           cuda_fwd_wide_sm80_plan(plan, p, caps) && plan->tile_q == LATENT_ROWS;
}

int32_t cuda_fwd_latent_sm90_launch(const struct plan *plan, const struct problem *p,
                                    const struct exec *exec) {
    if (!value_is_view_of_key(p))
        return cuda_fwd_wide_sm80_launch(plan, p, exec);
    const int bf16 = p->dtype == DTYPE_BF16;
    struct latent_params params;
    packed_fill(&params.packed, plan, p, exec, LATENT_ROWS);
    params.box_keys = box_keys(p, LATENT_KEYS);
    params.boxes = LATENT_KEYS / params.box_keys;
    const int32_t status = sm90_map_keys(&params.key_map, p, &p->key, p->dim_qk, params.box_keys);
    return status == DLATTN_OK
               ? packed_launch(plan, p, exec, &kernels[bf16], &merge[bf16], &params.packed)
               : status;
}
