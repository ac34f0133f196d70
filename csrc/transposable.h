// The `transposable` family: masks of 4 x 4 tiles with two ones in every row and every column. Raw pointers, no torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

// scores [rows, columns] of `dtype`, both multiples of 4 -> bits uint8 [rows, ceil(columns / 8)]: of each tile the
// pattern of largest sum among all 90, of equal sums the first in the order of transposable_patterns.h. A sum is
// ((row 0 + row 1) + (row 2 + row 3)) in fp32, a row's two scores added first. `flips` += bits that differ from those
// of previous_bits, which may be null; `nans` += scores that are NaN, whose tiles get any pattern. On the current
// device and `stream`; does not synchronise. The return value is a cudaError_t, cudaErrorInvalidValue for an unknown
// dtype.
int transposable_prune(int dtype, int64_t rows, int64_t columns, const void* scores, const uint8_t* previous_bits,
                       uint8_t* bits, int64_t* flips, int64_t* nans, void* stream);

}  // namespace pyprune
