// The CPU half of SparseGPT's solve; sparsegpt.h has the formulas. The function allocates nothing and cannot fail:
// sizes are the caller's to check.
#pragma once

#include "sparsegpt.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct SparseGptCpuKernels {
  void (*slab)(const SparseGptSlab& slab, int threads);

  // keep of the slab: 0 for the `drop` lowest scores (w_j / U_jj)^2 of all rows together, 1 for the others; among equal
  // ones the first go, row by row. NaN counts as the highest. Reads rows, columns, begin, width, work and upper.
  void (*select)(const SparseGptSlab& slab, int64_t drop, int threads);
};

}  // namespace pyprune
