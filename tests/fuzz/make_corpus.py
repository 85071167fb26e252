"""Writes the fuzzer's seeds: calls that are right, with the integers they need, and some spoiled.

usage: make_corpus.py FILE...    the name of each FILE picks its content
"""

import sys
from pathlib import Path

FORWARD, BACKWARD, MERGE, APPEND = range(4)
PACKED, PACKED_K, PAGED, HEAD_DIM_V, OTHER, ONES = (1 << n for n in range(6))
LSE, BIAS, MASK, ALIBI, SINKS, Q_LENGTHS, K_LENGTHS = (1 << n for n in range(4, 11))
SEGMENTS, BLOCK_MASK, SCALES = 1 << 14, 1 << 16, 7 << 17
NEW_LENGTHS, CACHE_SCALES = 1 << 5, 3 << 8  # of append
MERGED_LSE = 1 << 5
EVERY_GRADIENT, F16, BF16, F64 = 255, 64, 128, 192


def seed(
    operation,
    *integers,
    lengths=24,
    dims=7,
    forms=0,
    options=0,
    later=0,
    gradients=0,
    tensors=0,
    changes=(),
):
    """What call_fuzz.c reads: the call, changes of three bytes, integer tensors in slot order."""
    head = [operation, lengths, dims, forms, options, later, gradients]
    return [*head, *tensors.to_bytes(4, "little"), len(changes) // 3, *changes, *integers]


SEEDS = {
    "plain": seed(FORWARD, dims=16, tensors=LSE),
    "causal": seed(FORWARD, dims=16, options=1 | 2, tensors=LSE),
    "window": seed(FORWARD, lengths=49, dims=20, options=4 | 64, tensors=LSE),
    "bf16_gqa": seed(FORWARD, lengths=24 | 128, dims=BF16 | 31, options=1, tensors=LSE),
    "f16": seed(FORWARD, dims=F16 | 31, tensors=LSE),
    "f64_head_dim_v": seed(FORWARD, dims=F64 | 12, forms=HEAD_DIM_V, tensors=LSE),
    "bias_mask": seed(FORWARD, options=1, tensors=LSE | BIAS | MASK | ALIBI | SINKS),
    "bias_ones": seed(FORWARD, forms=ONES | OTHER, tensors=LSE | BIAS | MASK | ALIBI),
    "lengths": seed(FORWARD, 3, 0, 5, 2, tensors=LSE | Q_LENGTHS | K_LENGTHS),
    "varlen": seed(FORWARD, 0, 5, 10, 0, 5, 10, forms=PACKED | PACKED_K, tensors=LSE),
    "paged": seed(FORWARD, 5, 3, 0, 1, 2, 3, forms=PAGED, tensors=LSE),
    "segments": seed(FORWARD, *[0, 0, 1, 1, 2] * 4, tensors=LSE | SEGMENTS),
    "block_mask": seed(FORWARD, tensors=LSE | BLOCK_MASK | MASK),
    "scales": seed(FORWARD, later=64, tensors=LSE | SCALES),
    "scales_heads": seed(FORWARD, forms=OTHER, later=64, tensors=LSE | SCALES),
    "dropout_offset": seed(FORWARD, options=1, later=1 | 2 | 16, tensors=LSE),
    "strided": seed(FORWARD, tensors=LSE, changes=[1, 3 + 16 * 2, 99]),
    "spoiled": seed(FORWARD, tensors=LSE, changes=[0, 8, 16, 210, 2, 255]),
    "backward": seed(BACKWARD, options=1, gradients=EVERY_GRADIENT),
    "backward_all": seed(
        BACKWARD, gradients=EVERY_GRADIENT, later=1 | 32, tensors=BIAS | MASK | ALIBI | SINKS
    ),
    "backward_ones": seed(
        BACKWARD, forms=ONES | OTHER, gradients=EVERY_GRADIENT, dims=F64 | 5, tensors=BIAS | ALIBI
    ),
    "backward_key": seed(BACKWARD, gradients=8, dims=BF16 | 15, options=1 | 32),
    "backward_varlen": seed(
        BACKWARD, 0, 5, 10, 0, 5, 10, forms=PACKED | PACKED_K, gradients=EVERY_GRADIENT
    ),
    "backward_spoiled": seed(BACKWARD, gradients=EVERY_GRADIENT, changes=[22, 0, 9, 250, 2, 8]),
    "merge": seed(MERGE, tensors=MERGED_LSE),
    "merge_packed": seed(MERGE, forms=PACKED, dims=F16 | 9),
    "merge_spoiled": seed(MERGE, tensors=MERGED_LSE, changes=[250, 3, 4]),
    "append": seed(APPEND, 1, 0, 3, 2, lengths=74, tensors=NEW_LENGTHS),
    "append_packed": seed(APPEND, 1, 0, 0, 5, 10, lengths=74, forms=PACKED),
    "append_paged": seed(APPEND, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, lengths=74, forms=PAGED),
    "append_float8": seed(APPEND, 1, 0, lengths=74, later=64, tensors=CACHE_SCALES),
    "append_spoiled": seed(APPEND, 1, 0, lengths=74, changes=[2, 6, 3, 230, 7, 1]),
}

if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_bytes(bytes(SEEDS[path.name]))
