/* Query and key as words of two bf16, for rows with PAIRS 1. */

/* One row of bf16, its words padded with zeros to whole vectors. */
static void copy_pairs(float *to, const void *from, int64_t dim) {
    const int64_t words = padded((dim + 1) / 2, 16);
    memset((char *)to + dim * 2, 0, (size_t)(words * 4 - dim * 2));
    memcpy(to, from, (size_t)dim * 2);
}

VEC_FN static void pack_query(const struct block *b, const char *const *rows, int64_t dim,
                              enum dtype dtype, float *scratch) {
    (void)dtype;
    const int64_t stride = padded((dim + 1) / 2, 16), lanes = b->vectors * VEC_LANES;
    memset(scratch + b->rows * stride, 0, (size_t)((lanes - b->rows) * stride * 4));
    for (int32_t r = 0; r < b->rows; r++)
        copy_pairs(scratch + r * stride, rows[r], dim);
    transpose_in(b->query, scratch, stride, stride, lanes);
}

static struct operand load_key(float *to, const struct rows *rows, int32_t n, int64_t dim,
                               enum dtype dtype) {
    (void)dtype;
    if (!rows->rows && dim % 2 == 0 && rows->stride % 4 == 0)
        return (struct operand){(const float *)(const void *)rows->data, rows->stride / 4};
    const int64_t stride = padded((dim + 1) / 2, 16);
    for (int32_t r = 0; r < n; r++)
        copy_pairs(to + r * stride, row_at(rows, r), dim);
    return (struct operand){to, stride};
}
