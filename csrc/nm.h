// The GPU half of the `nm` family: masks that keep n of every m weights of a row, and weights packed by such masks.
// The packed format is docs/architecture.md, "Packed weights". Raw pointers, no torch.
//
// Common to every function
// - Matrices are contiguous and row-major, `columns` a multiple of m below 2^31, 1 <= n <= m <= 256. "typed" means
//   elements of `dtype`. Any size may be zero; pointers need the alignment of their elements, 16 bytes are faster.
// - All pointers are device pointers of the current device; `stream` is a cudaStream_t. No function synchronises.
// - Outputs are overwritten, never accumulated into, except where said. Results are the same from run to run.
// - The return value is a cudaError_t; arguments outside the above return cudaErrorInvalidValue.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

struct NmShape {
  int64_t rows, columns;  // of the dense matrix
  int n, m;
};

// scores [rows,columns] typed -> bits [rows, ceil(columns/8)]: the n largest of every m, of equal ones those of lower
// index. With previous_bits (or null), *flips += bits that differ. *first = min(*first, first group with a NaN), both
// as unsigned numbers, so that -1 stands for none: the caller sets 0 and -1 before.
int nm_prune(NmShape shape, int dtype, const void* scores, const uint8_t* previous_bits, uint8_t* bits, int64_t* flips,
             int64_t* first, void* stream);

// weight [rows,columns] typed -> values [rows, columns n/m] typed, metadata [rows, bytes of indices]. A group with
// fewer than n nonzeros takes its zeros of lowest index along, as +0. *first as above: the first group with more than
// n, of which the first n are packed.
int nm_compress(NmShape shape, int dtype, const void* weight, void* values, uint8_t* metadata, int64_t* first,
                void* stream);

// The dense weight [rows,columns] typed, +0 where nothing was kept. An index of m or above is left out.
int nm_decompress(NmShape shape, int dtype, const void* values, const uint8_t* metadata, void* weight, void* stream);

}  // namespace pyprune
