/* Operands of f32, for rows with PAIRS 0: f32 keys and values are used as they lie, other dtypes are widened. */

VEC_FN static void pack_query(const struct block *b, const char *const *rows, int64_t dim,
                              enum dtype dtype, float *scratch) {
    const int64_t stride = padded(dim, 16), lanes = b->vectors * VEC_LANES;
    memset(scratch + b->rows * stride, 0, (size_t)((lanes - b->rows) * stride * 4));
    for (int32_t r = 0; r < b->rows; r++)
        widen(scratch + r * stride, rows[r], dim, dtype);
    transpose_in(b->query, scratch, stride, stride, lanes);
}

static struct operand load_key(float *to, const struct rows *rows, int32_t n, int64_t dim,
                               enum dtype dtype) {
    return load_floats(to, rows, n, dim, dtype);
}

VEC_FN static struct operand load_value(float *to, const struct rows *rows, int32_t n, int64_t dim,
                                        enum dtype dtype) {
    if (!rows->scale)
        return load_floats(to, rows, n, dim, dtype);
    const struct operand value = widen_rows(to, rows, n, dim, dtype);
    for (int32_t j = 0; j < n; j++)
        for (float *at = to + j * value.stride; at < to + j * value.stride + dim; at += VEC_LANES)
            vec_store(at, vec_mul(vec_load(at), vec_set(rows->scale[j])));
    return value;
}
