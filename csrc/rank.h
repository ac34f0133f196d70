// The `rank` family: weights masked by their rank in the row, and what the mask's rate earns. Raw pointers, no torch.
//
//   rank_mask          out_rj = weight_rj if rank_rj >= threshold_r, else 0
//   rank_bucket_grad   out_rd = - sum of grad_rj * weight_rj over the j with rank_rj < floor(columns * d / steps)
//
// A row's ranks are uint16, 0 for the element that goes first; they may repeat. d runs over 0 ... steps, the candidate
// rates d / steps (BESA, arXiv 2402.16880). The second is a histogram over `steps` buckets of rank and a running sum.
//
// Common to every function
// - weight, grad and rank_mask's out are [rows, columns] of `dtype`; threshold is int32 [rows], 0 to columns;
//   rank_bucket_grad's out is fp32 [rows, steps + 1]. Products are summed in fp32. All contiguous.
// - columns <= 65536 and every rank < columns; 1 <= steps <= 255. A larger rank makes its row's sums wrong, no more.
// - What is dropped comes out as +0, whatever it was. A NaN in grad or weight stays in its row.
// - Results are bitwise the same from run to run and for any number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

// ceil(steps * (rank + 1) / columns), the first d whose threshold lies above a rank, without a division:
// floor(n / columns) = n * multiplier >> shift for n = steps * (rank + 1) + columns - 1 < 2^25. With
// shift = 31 + ceil(log2(columns)) and multiplier = ceil(2^shift / columns) < 2^32, the multiplier is too large by
// e / columns with e < columns, so the quotient by n e / (columns 2^shift) < 2^-6 / columns, less than it may.
struct BucketOfRank {
  uint32_t steps, offset;
  uint64_t multiplier;
  int shift;
};

inline BucketOfRank bucket_of_rank(int64_t columns, int steps) {
  int bits = 0;
  while ((int64_t{1} << bits) < columns) ++bits;
  const int shift = 31 + bits;
  const uint64_t power = uint64_t{1} << shift, divisor = static_cast<uint64_t>(columns);
  const uint32_t s = static_cast<uint32_t>(steps);
  return {s, s + static_cast<uint32_t>(columns) - 1, (power + divisor - 1) / divisor, shift};
}

// On the GPU: device pointers of the current device, `stream` a cudaStream_t, nothing synchronises. Pointers and row
// lengths need no alignment; rows of whole 16-byte pieces take the fast path. Returns a cudaError_t.
int rank_mask(int dtype, int64_t rows, int64_t columns, const void* weight, const uint16_t* rank,
              const int32_t* threshold, void* out, void* stream);
int rank_bucket_grad(int dtype, int64_t rows, int64_t columns, int steps, const void* grad, const void* weight,
                     const uint16_t* rank, float* out, void* stream);

}  // namespace pyprune
