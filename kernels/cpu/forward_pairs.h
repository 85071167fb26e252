/* Query and key as words of two bf16, for rows with PAIRS 1. */

/* One row of bf16 or float8, its words padded with zeros to whole vectors. */
VEC_FN static void copy_pairs(float *to, const char *from, int64_t dim, enum dtype dtype) {
    if (dtype != DTYPE_BF16) {
        for (int64_t d = 0; d < dim; d += 2 * VEC_LANES)
            vec_store(to + d / 2,
                      pairs_of_float8(from + d, at_most(dim - d, 2 * VEC_LANES), dtype));
        return;
    }
    const int64_t words = padded((dim + 1) / 2, 16);
    memset((char *)to + dim * 2, 0, (size_t)(words * 4 - dim * 2));
    memcpy(to, from, (size_t)dim * 2);
}

VEC_FN static void pack_query(const struct block *b, const char *const *rows, int64_t dim,
                              enum dtype dtype, float *scratch) {
    const int64_t stride = padded((dim + 1) / 2, 16), lanes = b->vectors * VEC_LANES;
    memset(scratch + b->rows * stride, 0, (size_t)((lanes - b->rows) * stride * 4));
    for (int32_t r = 0; r < b->rows; r++)
        copy_pairs(scratch + r * stride, rows[r], dim, dtype);
    transpose_in(b->query, scratch, stride, stride, lanes);
}

static struct operand load_key(float *to, const struct rows *rows, int32_t n, int64_t dim,
                               enum dtype dtype) {
    if (dtype == DTYPE_BF16 && !rows->rows && dim % 2 == 0 && rows->stride % 4 == 0)
        return (struct operand){(const float *)(const void *)rows->data, rows->stride / 4};
    const int64_t stride = padded((dim + 1) / 2, 16);
    for (int32_t r = 0; r < n; r++)
        copy_pairs(to + r * stride, row_at(rows, r), dim, dtype);
    return (struct operand){to, stride};
}
