// The CPU half of the `hsm` family: everything around the matrix products, which stay with the caller's BLAS.
//
// Common to every function
// - "typed" means elements of `dtype` (bf16, fp16, fp32); everything else is fp32. Arithmetic is fp32.
// - `*_stride` counts elements from one row to the next; matrices without one are contiguous.
// - Outputs are overwritten. `z` may be the same buffer as the output; nothing else may overlap.
// - Sums over rows come back as `blocks` partial rows, which the caller adds. Their number depends on the caller, not
//   on `threads`, so results are bitwise the same for any thread count. Any size may be zero.
// - No function allocates or fails; sizes and dtype are the caller's to check.
#pragma once

#include <cstdint>

#include "hsm_fused.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct HsmCpuKernels {
  // out [rows,columns] = row_scale[:, None] * a * column_scale. A null scale means ones. a, out typed.
  void (*scale)(DType dtype, int64_t rows, int64_t columns, const void* a, const float* row_scale,
                const float* column_scale, void* out, int threads);

  // y[:, :masked] = mask * x + z[:, :masked];  y[:, masked:] = z[:, masked:]. z, y [rows,columns], x typed.
  void (*mask_add)(DType dtype, int64_t rows, int64_t columns, int64_t masked, const void* x, int64_t x_stride,
                   const float* mask, const void* z, void* y, int threads);

  // residual_out = residual + mask * x + z, rounded to dtype; rstd [rows] = rsqrt(mean(residual_out^2) + eps);
  // normed = residual_out * rstd * weight. Everything [rows,columns] and weight [columns] typed.
  void (*mask_add_rmsnorm)(DType dtype, int64_t rows, int64_t columns, float eps, const void* x, int64_t x_stride,
                           const float* mask, const void* z, const void* residual, const void* weight,
                           void* residual_out, void* normed, float* rstd, int threads);

  // With q = residual_out * rstd and a = weight * grad_normed:
  //   grad_residual            = grad_residual_out + rstd * (a - q * mean(a * q))
  //   grad_weight [blocks,n]   : sums to sum_t grad_normed * q
  //   column_dot [blocks,n]    : sums to sum_t grad_residual * x   (skipped when null)
  void (*rmsnorm_backward)(DType dtype, int64_t rows, int64_t columns, const void* grad_residual_out,
                           const void* grad_normed, const void* residual_out, const float* rstd, const void* weight,
                           const void* x, int64_t x_stride, void* grad_residual, int64_t blocks, float* grad_weight,
                           float* column_dot, int threads);

  // out [blocks,columns] : sums to sum_t a * b. a, b typed with their own strides.
  void (*column_dot)(DType dtype, int64_t rows, int64_t columns, const void* a, int64_t a_stride, const void* b,
                     int64_t b_stride, int64_t blocks, float* out, int threads);
};

}  // namespace pyprune
