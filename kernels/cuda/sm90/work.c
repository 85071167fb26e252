#include "kernels/cuda/sm90/work.h"

/* Key tiles that tile `i` of a head visits. */
static int64_t visited(const struct problem *p, int32_t pack_log2, int32_t tile_q, int32_t tile_k,
                       int64_t i) {
    const int64_t diagonal = p->bottom_right ? p->len_k - p->len_q : 0,
                  first = i * tile_q >> pack_log2, end = (((i + 1) * tile_q - 1) >> pack_log2) + 1,
                  last = (end < p->len_q ? end : p->len_q) - 1;
    const int64_t low = p->window_left == UNBOUNDED ? 0 : first + diagonal - p->window_left,
                  high = p->window_right == UNBOUNDED ? p->len_k
                                                      : last + diagonal + p->window_right + 1;
    const int64_t begin = (low > 0 ? low : 0) / tile_k,
                  finish = ceil_divide(high < p->len_k ? high : p->len_k, tile_k);
    return finish > begin ? finish - begin : 0;
}

struct work sm90_work(const struct problem *p, int32_t tile_q, int32_t tile_k, int64_t columns) {
    const struct rows r = sm90_rows(p, tile_q);
    struct work w = {.tiles = r.tiles, .least = INT64_MAX, .columns = columns};
    for (int64_t i = 0; i < r.per_head; i++) {
        const int64_t n = visited(p, r.pack_log2, tile_q, tile_k, i);
        w.least = n < w.least ? n : w.least;
        w.most = n > w.most ? n : w.most;
        w.all += n;
    }
    w.all *= r.tiles / r.per_head;
    const int64_t visited_keys = r.per_head * w.most * tile_k,
                  keys = visited_keys < p->len_k ? visited_keys : p->len_k;
    w.bytes = p->batch * p->heads_kv * keys * (p->dim_qk + p->dim_v) * 2;
    return w;
}

/* In a 32nd of the time that a key tile takes. A round of tiles costs as much as one key tile more, a round of parts
 * as much as four, or two where two warpgroups share rows, and each part of 128 rows one 32nd, or one for so many columns; a merge half as
 * much again as a key tile for each eight parts but the first. What cuda_fwd_sm90 needs at first, as its code is longer, are three key
 * tiles, cuda_fwd_pair_sm90 three quarters of one. A step of two key tiles for shared rows takes a part that grows with the columns, and
 * three eighths more where there are parts. All keys and values come from memory once, so many bytes at a time. */
enum {
    UNIT = 32,
    PER_ROUND = UNIT,
    PER_ROUND_OF_PARTS = 4 * UNIT,
    ROUND_OF_PAIRS = 2 * UNIT,
    COLUMNS_STORED = 128,
    MERGED_AT_ONCE = 8,
    PER_MORE = 3 * UNIT / 2,
    WHOLE_CODE = 3 * UNIT,
    PAIR_CODE = 3 * UNIT / 4,
    PAIR_STEP = 25,
    PAIR_COLUMNS = 7,
    BYTES_READ = 96 << 10
};

/* Of two things at the same time: the longer one, and more if the other takes nearly as long. */
static int64_t both(int64_t a, int64_t b) {
    const int64_t longer = a > b ? a : b, shorter = a + b - longer, even = shorter - longer * 3 / 4;
    return longer + (even > 0 ? even / 2 : 0);
}

/* Of the busiest block: blocks get large and small tiles or parts in turn, so what they have to do is even but for `uneven`, unless one
 * is more than that, or as many of the smallest as there are rounds. */
static int64_t visits(const struct work *w, int64_t parts, int64_t uneven, int32_t blocks) {
    const int64_t rounds = ceil_divide(w->tiles * parts, blocks),
                  even = ceil_divide(w->all, blocks) + uneven,
                  largest = ceil_divide(w->most, parts),
                  smallest = rounds * ceil_divide(w->least, parts),
                  most = even > largest ? even : largest;
    return most > smallest ? most : smallest;
}

int64_t sm90_time_whole(const struct work *w, int32_t multiprocessors) {
    return both(UNIT * visits(w, 1, 0, multiprocessors), w->bytes / BYTES_READ) +
           PER_ROUND * ceil_divide(w->tiles, multiprocessors) + WHOLE_CODE;
}

/* A step of two key tiles, on two warpgroups that share rows. */
static int64_t pair_step(const struct work *w) { return PAIR_STEP + w->columns / PAIR_COLUMNS; }

/* Blocks that have to wait for another one's place start late by as much as their output's columns say, and the first of them are three key
 * tiles late on top. */
int64_t sm90_time_paired(const struct work *w, int32_t multiprocessors) {
    const int64_t steps = (visits(w, 1, 0, multiprocessors) + 1) / 2,
                  waiting = w->tiles - multiprocessors;
    return both(steps * pair_step(w), w->bytes / BYTES_READ) + PAIR_CODE +
           (waiting > 0 ? waiting * w->columns * 5 / 4 / multiprocessors + 3 * UNIT : 0);
}

/* Storing parts and merging them; `strips` of 128 rows. */
static int64_t merging(const struct work *w, int64_t strips, int64_t parts) {
    return strips * ceil_divide(w->columns, COLUMNS_STORED) +
           (parts - 1) / MERGED_AT_ONCE * PER_MORE;
}

int64_t sm90_time_split(const struct work *w, int64_t parts, int32_t multiprocessors) {
    const int64_t uneven = (w->most - w->least) / parts / 2;
    return both(UNIT * visits(w, parts, uneven, multiprocessors), w->bytes / BYTES_READ) +
           PER_ROUND_OF_PARTS * ceil_divide(w->tiles * parts, multiprocessors) +
           merging(w, w->tiles * parts, parts);
}

int64_t sm90_time_split_paired(const struct work *w, int64_t parts) {
    const int64_t steps = (ceil_divide(w->most, parts) + 1) / 2;
    return both(steps * pair_step(w) * 11 / 8, w->bytes / BYTES_READ) + ROUND_OF_PAIRS +
           merging(w, w->tiles * parts / 2, parts);
}

bool sm90_has_whole_columns(const struct problem *p) { return (p->dim_qk | p->dim_v) % 64 == 0; }

bool sm90_fills_tiles(const struct problem *p, int32_t tile_q, int32_t share) {
    return p->batch * p->heads_q * p->len_q * share >= sm90_rows(p, tile_q).tiles * tile_q;
}
