/*
 * What each DLATTN_FEATURE_* bit is called: for hosts that print what a row has, such as dlattn-info.
 */
#ifndef DLATTN_FEATURES_H_
#define DLATTN_FEATURES_H_

#include "dlattn.h"

static const struct {
    uint64_t bit;
    const char *name;
} dlattn_features[] = {
    {DLATTN_FEATURE_CAUSAL, "causal"},
    {DLATTN_FEATURE_WINDOW, "window"},
    {DLATTN_FEATURE_SOFTCAP, "softcap"},
    {DLATTN_FEATURE_BIAS, "bias"},
    {DLATTN_FEATURE_MASK, "mask"},
    {DLATTN_FEATURE_ALIBI, "alibi"},
    {DLATTN_FEATURE_SINKS, "sinks"},
    {DLATTN_FEATURE_LENGTHS, "lengths"},
    {DLATTN_FEATURE_VARLEN, "varlen"},
    {DLATTN_FEATURE_PAGED, "paged"},
    {DLATTN_FEATURE_GQA, "gqa"},
    {DLATTN_FEATURE_HEAD_DIM_V, "head_dim_v"},
    {DLATTN_FEATURE_STRIDED, "strided"},
    {DLATTN_FEATURE_INNER_STRIDE, "inner_stride"},
    {DLATTN_FEATURE_UNALIGNED, "unaligned"},
    {DLATTN_FEATURE_LSE, "lse"},
    {DLATTN_FEATURE_DROPOUT, "dropout"},
    {DLATTN_FEATURE_SEGMENTS, "segments"},
    {DLATTN_FEATURE_BLOCK_MASK, "block_mask"},
    {DLATTN_FEATURE_DIAGONAL_OFFSET, "diagonal_offset"},
    {DLATTN_FEATURE_MIXED_DTYPES, "mixed_dtypes"},
    {DLATTN_FEATURE_SCALES, "scales"},
};
enum { DLATTN_FEATURE_COUNT = sizeof dlattn_features / sizeof dlattn_features[0] };

#endif /* DLATTN_FEATURES_H_ */
