// The CPU half of the `rank` family; rank.h has the formulas. No function allocates or fails: sizes and dtypes are the
// caller's to check.
#pragma once

#include "rank.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct RankCpuKernels {
  void (*rank_mask)(DType dtype, int64_t rows, int64_t columns, const void* weight, const uint16_t* rank,
                    const int32_t* threshold, void* out, int threads);
  void (*rank_bucket_grad)(DType dtype, int64_t rows, int64_t columns, int steps, const void* grad, const void* weight,
                           const uint16_t* rank, float* out, int threads);
};

}  // namespace pyprune
