/* The body that the files above have put together. */

static void weigh(struct backward_block *b, const struct backward_tile *t) {
    score(t->weights, &t->key, b->rows.query, t, t->dim_qk, &b->rows);
    score(t->d_weights, &t->value, b->d_output, t, t->dim_v, &b->rows);
    if (t->rule)
        apply_rule(t->weights, t->rule, &b->rows, t->first_key, t->n, t->cap_slopes);
    if (bounded(&b->rows, t->first_key, t->n))
        apply_bounds(t->weights, &b->rows, t->first_key, t->n);
    end_weights(b, t);
}

static void accumulate(struct backward_block *b, const struct backward_tile *t,
                       const struct backward_sums *sums, const uint64_t *seen,
                       const uint64_t *kept) {
    if (sums->distances)
        add_distances(b, t);
    if (t->cap_slopes)
        apply_cap_slopes(b, t);
    add_products(b, t, sums, seen, kept);
    b->rows.fresh = false;
}

VEC_FN static float dot_rows(const char *x, enum dtype x_dtype, const char *y, enum dtype y_dtype,
                             int64_t n) {
    vec sum = vec_set(0);
    for (int64_t d = 0; d < n; d += VEC_LANES) {
        const int64_t some = at_most(n - d, VEC_LANES);
        sum = vec_fma(load_some(x + d * dtype_bytes(x_dtype), x_dtype, some),
                      load_some(y + d * dtype_bytes(y_dtype), y_dtype, some), sum);
    }
    return vec_sum(sum);
}

VEC_INLINE void store_sums_as(char *to, const float *const *sums, int32_t count, int64_t stride,
                              float factor, int64_t n, enum dtype dtype) {
    for (int64_t d = 0; d < n; d += VEC_LANES) {
        vec sum = vec_set(0);
        for (int32_t i = 0; i < count; i++)
            sum = vec_add(sum, vec_load(sums[i] + d / LANES * stride + d % LANES));
        store_some(to + d * dtype_bytes(dtype), vec_mul(sum, vec_set(factor)), dtype,
                   at_most(n - d, VEC_LANES));
    }
}

VEC_FN static void store_sums(char *to, const float *const *sums, int32_t count, int64_t stride,
                              float factor, int64_t n, enum dtype dtype) {
    if (dtype == DTYPE_F32)
        store_sums_as(to, sums, count, stride, factor, n, DTYPE_F32);
    else if (dtype == DTYPE_F16)
        store_sums_as(to, sums, count, stride, factor, n, DTYPE_F16);
    else
        store_sums_as(to, sums, count, stride, factor, n, DTYPE_BF16);
}

static const struct backward_body body = {
    .blocks = BLOCKS,
    .lanes = LANES,
    .vector_lanes = VEC_LANES,
    .tile_k = TILE_K,
    .step = STEP_D,
    .terms = TERMS,
    .packed_bytes = PACKED_BYTES,
    .one_walk = ONE_WALK,
    .finite_only = FINITE_ONLY,
    .stand_in_plan = STAND_IN(plan),
    .stand_in_launch = STAND_IN(launch),
    .enter = enter,
    .leave = leave,
    .pack = pack,
    .load_key = load_key,
    .load_value = load_value,
    .finite = finite_rows,
    .load_extra = load_extra,
    .draw = draw,
    .dot = dot_rows,
    .weigh = weigh,
    .differentiate = differentiate,
    .accumulate = accumulate,
    .store = store,
    .store_sums = store_sums,
};
