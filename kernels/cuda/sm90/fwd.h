/*
 * What cuda_fwd_sm90.c has for the other rows of Hopper.
 */
#ifndef DLATTN_SM90_FWD_H_
#define DLATTN_SM90_FWD_H_

#include "kernels/cuda/sm90/host.h"

/* Whether the kernels can read what the problem has. */
bool sm90_takes(const struct problem *p);

/* Whether TMA can bring the problem's pages in boxes: those of a multiple of 4 keys; also where there are none. */
bool sm90_has_boxes(const struct problem *p);

/* Whether keys and values come row by row, from pages that TMA would bring in boxes too small for it. Up to D 128 there are kernels for
 * that. */
bool sm90_copies_rows(const struct problem *p);

/* Query heads of a group that share a tile of `tile_q` rows, as a power of two. */
int32_t sm90_pack_log2(const struct problem *p, int32_t tile_q);

/* Tiles of rows of each head, whose sequences all have as many as the longest, and of all. */
struct rows {
    int32_t pack_log2;
    int64_t per_head;
    int64_t tiles;
};
struct rows sm90_rows(const struct problem *p, int32_t tile_q);

/* Tiles of `tile_q` rows of all sequences and heads, as the blocks take them. */
int64_t sm90_tiles(const struct problem *p, int32_t tile_q);

/* Whether a kernel before it lists the tiles, which then depend on lengths that only the device knows. */
bool sm90_is_listed(const struct problem *p);

/* Whether cuda_fwd_pair_sm90 is made for it. */
bool sm90_pairs(const struct problem *p, const struct caps *caps);

/* What a tile makes of the plan. */
void sm90_plan_tile(struct plan *plan, const struct problem *p, const struct caps *caps,
                    const struct tile *tile);

/* All but the walk. */
int32_t sm90_fill(struct sm90_params *params, const struct problem *p, const struct plan *plan,
                  void *workspace);

/* K or V as [D, Lk, H_kv, B], in boxes of `box_keys` rows; pages are [D, page_size, H_kv, pages]. Packed: [D, Lk, end, H_kv] from
 * Lk rows before the tensor on. */
int32_t sm90_map_keys(struct cuda_tensor_map *map, const struct problem *p, const struct view *v,
                      int64_t dim, int32_t box_keys);

#endif /* DLATTN_SM90_FWD_H_ */
