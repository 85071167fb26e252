"""Writes the fuzzer's seeds: calls that are right, with the integers they need, and one spoiled.

usage: make_corpus.py FILE...    the name of each FILE picks its content
"""

import sys
from pathlib import Path

# lengths, dims, features, more, number of changes; then changes; then integer tensors in slot order
SEEDS = {
    "plain": [24, 16, 4, 0, 0],
    "causal": [24, 16, 4, 2 | 4, 0],
    "window": [49, 20, 4, 8 | 64, 0],
    "bf16_gqa": [24 | 128, 128 | 31, 4, 2, 0],
    "f16": [24, 64 | 31, 4, 0, 0],
    "f64_head_dim_v": [24, 192 | 12, 4, 1, 0],
    "bias_mask_alibi_sinks": [24, 7, 4 | 8 | 16 | 32 | 64, 2, 0],
    "lengths": [24, 7, 4 | 128, 0, 0, 3, 0, 5, 2],
    "varlen": [24, 7, 4 | 1, 0, 0, 0, 5, 10, 0, 5, 10],
    "paged": [24, 7, 4 | 2, 0, 0, 5, 3, 0, 1, 2, 3],
    "strided": [24, 7, 4, 0, 1, 1, 3 + 16 * 2, 99],
    "spoiled": [24, 7, 4, 0, 2, 0, 8, 16, 15, 2, 255],
}

for path in map(Path, sys.argv[1:]):
    path.write_bytes(bytes(SEEDS[path.name]))
