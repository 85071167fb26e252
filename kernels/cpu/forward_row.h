/* The body that the files above have put together. */

static const struct forward_body body = {
    .lanes = LANES,
    .vector_lanes = VEC_LANES,
    .tile_k = TILE_K,
    .elements_per_word = PAIRS ? 2 : 1,
    .word_step = WORD_STEP,
    .key_step = KEY_STEP,
    .enter = enter,
    .leave = leave,
    .pack_query = pack_query,
    .load_key = load_key,
    .load_value = load_value,
    .scores = scores,
    .load_extra = load_extra,
    .apply_rule = apply_rule,
    .apply_bounds = apply_bounds,
    .softmax = softmax,
    .accumulate = accumulate,
    .store = store,
};
