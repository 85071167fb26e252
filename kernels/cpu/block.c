#include "kernels/cpu/block.h"
#include "src/element.h"

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
