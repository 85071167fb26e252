#include "kernels/cpu/block.h"
#include "src/element.h"

#include <math.h>

void point_at_rows(char **rows, const struct view *v, const struct task *t, int64_t first,
                   int32_t count) {
    const struct query_row row = query_row_at(t, first);
    const int64_t bytes = dtype_bytes(v->dtype), head = v->stride[1] * bytes,
                  back = v->stride[2] * bytes - t->heads * head;
    char *at = element_at(v, v->dtype, t->b, row.h, t->s.q_start + row.i);
    int64_t heads = t->first_head + t->heads - row.h; /* until the next row of the query */
    for (int32_t lane = 0; lane < count; lane++, at += head) {
        if (heads-- == 0) {
            heads = t->heads - 1;
            at += back;
        }
        rows[lane] = at;
    }
}

void start_block(struct block *b, const struct task *t, int64_t first, int32_t count,
                 int32_t vector_lanes) {
    const struct problem *p = t->p;
    b->rows = count;
    for (b->vectors = 1; b->vectors * vector_lanes < count;)
        b->vectors *= 2;
    b->fresh = b->unseen = true;
    b->vast = false;
    for (int32_t lane = 0; lane < b->vectors * vector_lanes; lane++) {
        b->max[lane] = -INFINITY;
        b->top[lane] = b->minus[lane] = 0;
        b->sum[lane] = b->slope[lane] = b->position[lane] = 0;
        b->lo[lane] = 0; /* lanes out of use compute with a query of 0 and are never stored */
        b->hi[lane] = INT64_MAX;
    }
    int64_t some_first = INT64_MAX, some_end = 0, all_first = 0, all_end = INT64_MAX;
    struct query_row row = query_row_at(t, first);
    for (int32_t lane = 0; lane < count; lane++, next_query_row(t, &row)) {
        int64_t lo, hi;
        visible_keys(p, &t->s, row.i, &lo, &hi);
        b->lo[lane] = lo;
        b->hi[lane] = hi;
        b->position[lane] = (float)(row.i + t->s.diagonal);
        if (p->alibi_slopes.data)
            b->slope[lane] = (float)load_element(p->alibi_slopes.data, DTYPE_F32,
                                                 t->b * p->alibi_slopes.stride[0] +
                                                     row.h * p->alibi_slopes.stride[1]);
        all_first = most(all_first, lo);
        all_end = least(all_end, hi);
        if (lo < hi) {
            some_first = least(some_first, lo);
            some_end = most(some_end, hi);
        }
    }
    b->first = some_first;
    b->end = some_end;
    b->full_first = all_first;
    b->full_end = all_end;
}

void find_masks(struct lane_masks *m, const struct task *t, const struct block *b,
                int64_t first_row) {
    const struct problem *p = t->p;
    const struct view *q = &p->query_segments, *k = &p->key_segments, *blocks = &p->block_mask;
    struct query_row row = query_row_at(t, first_row);
    m->segments = q->data != NULL;
    m->blocks = blocks->data != NULL;
    m->block_k = p->block_k;
    m->state_stride = blocks->stride[3];
    m->key_segment_stride = k->stride[2];
    if (m->segments)
        m->key_segments = element_at(k, DTYPE_F32, t->b, 0, t->s.k_start);
    memset(m->segment, 0, sizeof m->segment);
    for (int32_t lane = 0; lane < b->rows; lane++, next_query_row(t, &row)) {
        if (m->segments)
            memcpy(&m->segment[lane], element_at(q, DTYPE_F32, t->b, 0, t->s.q_start + row.i), 4);
        if (m->blocks)
            m->states[lane] = (const uint8_t *)blocks->data + t->b * blocks->stride[0] +
                              row.h * blocks->stride[1] + row.i / p->block_q * blocks->stride[2];
    }
}

struct extra_layout find_extra(struct extra_row *rows, const struct task *t, const struct block *b,
                               int64_t first_row) {
    const struct problem *p = t->p;
    struct query_row row = query_row_at(t, first_row);
    for (int32_t lane = 0; lane < b->rows; lane++, next_query_row(t, &row))
        rows[lane] = extra_row_at(p, t->b, row.h, row.i);
    return (struct extra_layout){p->bias.dtype, p->bias.stride[3], p->mask.stride[3]};
}

void find_dropout(struct dropout *d, const struct task *t, const struct block *b, int64_t first_row,
                  float factor) {
    const struct problem *p = t->p;
    struct query_row row = query_row_at(t, first_row);
    *d = (struct dropout){
        .threshold = (uint64_t)ceil(p->dropout_probability * 0x1p32),
        .factor = factor,
        .key = {(uint32_t)p->dropout_seed,
                (uint32_t)(p->dropout_seed >> 32) ^ (uint32_t)(p->dropout_offset >> 32)},
        .stream = (uint32_t)p->dropout_offset};
    for (int32_t lane = 0; lane < b->rows; lane++, next_query_row(t, &row)) {
        d->row[lane] = (uint32_t)row.i;
        d->head[lane] = (uint32_t)(t->b * p->heads_q + row.h);
    }
}
