/*
 * What a forward call has to do, and how long each row of Hopper takes for it, as fitted to an H100: what their plans compare.
 */
#ifndef DLATTN_SM90_WORK_H_
#define DLATTN_SM90_WORK_H_

#include "kernels/cuda/sm90/fwd.h"

/* Of all tiles of rows: how many they are, the key tiles that are visited by that with the fewest, by that with the most, and by all, and
 * the bytes of keys and values that they see. */
struct work {
    int64_t tiles, least, most, all, bytes;
    int64_t columns; /* of a row of the output */
};
/* Of tiles of `tile_q` rows and `tile_k` keys, if all sequences are as long as they may be. */
struct work sm90_work(const struct problem *p, int32_t tile_q, int32_t tile_k, int64_t columns);

/* In cuda_fwd_sm90, on so many multiprocessors. */
int64_t sm90_time_whole(const struct work *w, int32_t multiprocessors);
/* In cuda_fwd_pair_sm90. */
int64_t sm90_time_paired(const struct work *w, int32_t multiprocessors);
/* In cuda_fwd_split_sm90, by more than one part of the keys. */
int64_t sm90_time_split(const struct work *w, int64_t parts, int32_t multiprocessors);

/* There, too, where two warpgroups share the rows of a tile, and each part has a multiprocessor. */
int64_t sm90_time_split_paired(const struct work *w, int64_t parts);

/* Whether at least one in `share` of the rows of all tiles is one of the query. */
bool sm90_fills_tiles(const struct problem *p, int32_t tile_q, int32_t share);

/* Whether rows of query, key and value are whole columns of 64 elements. Of others, which do not begin where lines of memory do, two
 * warpgroups that share rows get two thirds as much at a time. */
bool sm90_has_whole_columns(const struct problem *p);

#endif /* DLATTN_SM90_WORK_H_ */
