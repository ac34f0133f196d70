// The CPU half of the `lora_score` family; lora_score.h has the maths.
#pragma once

#include <cstdint>

#include "lora_score.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct LoraScoreCpuKernels {
  // Sums of |Ghat * (W + scale B A)| that leave dimension `dim`. weight [outputs, inputs] of `dtype`; a, grad_a and
  // difference = A - gA [rank, inputs], b, grad_b [outputs, rank]. Rows are shared out in `blocks` ranges.
  //   dim 0: out [outputs];   dim 1: out [blocks, inputs], partial rows which the caller adds
  // Overwritten; bitwise the same for any number of threads. Any size may be zero. Arithmetic is fp32.
  void (*group_score)(DType dtype, int64_t outputs, int64_t inputs, int64_t rank, float scale, int dim,
                      const void* weight, const float* a, const float* b, const float* difference, const float* grad_a,
                      const float* grad_b, int64_t blocks, float* out, int threads);
};

}  // namespace pyprune
