// The CPU half of the `nm` family: masks that keep n of every m, packing, unpacking. The formats are
// docs/architecture.md, "Packed weights".
//
// Everything is contiguous; "typed" means elements of `dtype`; columns % m == 0, 1 <= n <= m <= 256. Outputs are
// overwritten, results do not depend on `threads`, any size may be zero, no function allocates or fails. Functions that
// can refuse return the lowest flat index, row * (columns / m) + group, of an offending group, or -1. Metadata is
// trusted to be indices below m that rise within a group.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct NmCpuKernels {
  // bits [rows,ceil(columns/8)] of the n largest of every m scores, ties to the lower index. flips [1] = how many
  // differ from `previous` (null: 0). Returns the first group with a NaN, whose bits are then undefined.
  int64_t (*prune)(DType dtype, int64_t rows, int64_t columns, int n, int m, const void* scores,
                   const uint8_t* previous, uint8_t* bits, int64_t* flips, int threads);

  // weight [rows,columns] typed -> values [rows,columns n/m] typed, metadata [rows,ceil(columns n/m b/8)]. Returns the
  // first group with more than n nonzeros, whose row of values and metadata is then undefined.
  int64_t (*compress)(DType dtype, int64_t rows, int64_t columns, int n, int m, const void* weight, void* values,
                      uint8_t* metadata, int threads);

  // The inverse: weight [rows,columns] typed.
  void (*decompress)(DType dtype, int64_t rows, int64_t columns, int n, int m, const void* values,
                     const uint8_t* metadata, void* weight, int threads);
};

}  // namespace pyprune
