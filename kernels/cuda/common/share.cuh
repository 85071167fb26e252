// The part of a head that a block computes, and each of its warps.
#pragma once

#include "kernels/cuda/common/registers.cuh"
#include "kernels/cuda/common/sequence.cuh"

// Which rows and tiles a warp of this block works on.
template <int ROWS, int WARP_ROWS, int BN, int SPLIT>
struct Share {
    const int warp, part;       // of the warps that share rows, `part` says which
    const int block_row, rows;  // of the block; as many rows of its tile exist
    const int first_row;        // of the warp
    int first, end;             // tiles that the block sees
    int warp_first, warp_end;   // that this warp sees
    int whole_first, whole_end; // that all rows of the warp see whole

    __device__ __forceinline__ Share(const Work &work, const Sequence &seq, int warps)
        : warp(warps / SPLIT), part(warps % SPLIT), block_row(work.row_block * ROWS),
          rows(min(ROWS, seq.q_rows - block_row)), first_row(block_row + warp * WARP_ROWS) {}

    __device__ __forceinline__ static void tiles(const fwd_params &p, const Sequence &seq, int row,
                                                 int count, int &first, int &end) {
        const int last = min(row + count, seq.q_len) - 1;
        first = seq.first_key(p, row) / BN;
        end = last < row ? 0 : (seq.end_key(p, last) + BN - 1) / BN;
    }

    __device__ __forceinline__ void find_tiles(const fwd_params &p, const Sequence &seq) {
        tiles(p, seq, block_row, ROWS, first, end);
        end = kept_by_all(end);
        warp_first = first;
        warp_end = end; // pairs of warps all take the same steps, with the same barriers
        if (SPLIT == 1)
            tiles(p, seq, first_row, WARP_ROWS, warp_first, warp_end);
        warp_first = kept_by_all(warp_first);
        warp_end = kept_by_all(warp_end);
        whole_first = kept_by_all((seq.first_key(p, first_row + WARP_ROWS - 1) + BN - 1) / BN);
        whole_end = kept_by_all(seq.end_key(p, first_row) / BN);
    }
};
