/* The body that the files above have put together. */

static const struct forward_body body = {
    .lanes = LANES,
    .vector_lanes = VEC_LANES,
    .tile_k = TILE_K,
    .step_k = PAIRS ? 2 : 1,
    .elements_per_word = PAIRS ? 2 : 1,
    .terms = 1,
    .score_bytes = TILE_K * LANES * 4,
    .enter = enter,
    .leave = leave,
    .pack_query = pack_query,
    .load_key = load_key,
    .load_value = load_value,
    .load_extra = load_extra,
    .draw = draw,
    .attend = attend,
    .store = store,
};
