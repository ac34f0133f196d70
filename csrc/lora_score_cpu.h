// The CPU half of the `lora_score` family; lora_score.h has the maths.
#pragma once

#include <cstdint>

#include "lora_score.h"

namespace pyprune {

// Columns whose factors stand together.
constexpr int kLoraScoreStrip = 128;

// One instruction set's build of the kernels.
struct LoraScoreCpuKernels {
  // Sums of |Ghat * (W + scale B A)| that leave dimension `dim`. weight [outputs, inputs] of `dtype`; factors
  // [ceil(inputs / strip), rank, 3, strip] = A - gA, gA and scale A, strip columns at a time and zeros past the last;
  // pairs [outputs, rank, 2] = B and gB. Rows are shared out in `blocks` ranges.
  //   dim 0: out [outputs];   dim 1: out [blocks, inputs], partial rows which the caller adds
  // Overwritten; bitwise the same for any number of threads. Any size may be zero. Arithmetic is fp32.
  void (*group_score)(DType dtype, int64_t outputs, int64_t inputs, int64_t rank, int dim, const void* weight,
                      const float* factors, const float* pairs, int64_t blocks, float* out, int threads);
};

}  // namespace pyprune
