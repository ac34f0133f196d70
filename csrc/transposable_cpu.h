// The CPU half of the `transposable` family; transposable.h has the definition. Allocates nothing, cannot fail: sizes
// and dtype are the caller's to check. Results do not depend on `threads`.
#pragma once

#include "transposable.h"

namespace pyprune {

// One instruction set's build of the kernel.
struct TransposableCpuKernels {
  void (*prune)(DType dtype, int64_t rows, int64_t columns, const void* scores, uint8_t* bits, int threads);
};

}  // namespace pyprune
