/*
 * The order in which blocks take the tiles of calls that are not listed: tile.cuh walks, and here is what a plan says of it.
 */
#ifndef DLATTN_SM90_WALK_H_
#define DLATTN_SM90_WALK_H_

#include "kernels/cuda/sm90/fwd.h"

/* Heads whose tiles are interleaved, and neighbours, once the plan has its tile and its blocks. */
void sm90_plan_walk(struct plan *plan, const struct problem *p);

/* All heads at once, so that blocks which wait for others have the tiles with the fewest keys. */
void sm90_plan_longest_first(struct plan *plan, const struct problem *p);

/* Whether the plan looks at what each block gets: under a causal mask, in not too many rounds. */
bool sm90_walks_evenly(const struct problem *p, int32_t tile_q, int32_t blocks);
/* If so, keys of the block that has most of them, for each row of a tile. */
int64_t sm90_busiest_keys(const struct problem *p, int32_t tile_q, int32_t blocks);

void sm90_fill_walk(struct sm90_params *params, const struct problem *p, const struct plan *plan);

#endif /* DLATTN_SM90_WALK_H_ */
