// The CPU half of SparseGPT's solve; sparsegpt.h has the formulas. The function allocates nothing and cannot fail:
// sizes are the caller's to check.
#pragma once

#include "sparsegpt.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct SparseGptCpuKernels {
  void (*slab)(const SparseGptSlab& slab, int threads);
};

}  // namespace pyprune
