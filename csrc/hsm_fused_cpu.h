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

// bf16: h = (x a^T) * scale;   y = mask * x + h b^T [+ residual, then RMSNorm]. The product is in fp32 until y is
// rounded.
struct LowRank {
  int64_t tokens, inputs, rank, outputs;
  int64_t masked;             // <= inputs, outputs: the columns that x is added to
  bool transposed;            // a is [inputs,rank] and b [rank,outputs], not a [rank,inputs] and b [outputs,rank]
  const void *x, *a, *b;      // x [tokens,inputs]
  const float *scale, *mask;  // [rank], null for ones; [masked]
  const void* beside;         // [tokens,rank], read for dot
  float* dot;                 // [blocks,rank] with a block for every 48 tokens: sums to sum_t (x a^T) * beside, or null
  void *h, *y;                // [tokens,rank]; [tokens,outputs], or null
  const void *residual, *weight;  // [tokens,outputs], [outputs], or null: y is the sum, and
  float eps;
  void* normed;  // [tokens,outputs] = y * rstd * weight
  float* rstd;   // [tokens] = rsqrt(mean(y^2) + eps), of y as rounded
};

// bf16: out [rank,columns] = a^T b, summed over the tokens.
struct SumProducts {
  int64_t tokens, rank, columns;
  const void *a, *b;  // [tokens,rank], [tokens,columns]
  void* out;
};

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

  // Null but for the instruction set that has a bf16 dot product. The workspaces are in bytes, 64-byte aligned.
  int64_t (*low_rank_workspace)(const LowRank& op, int threads);
  void (*low_rank)(const LowRank& op, void* workspace, int threads);
  int64_t (*sum_products_workspace)(const SumProducts& op, int threads);
  void (*sum_products)(const SumProducts& op, void* workspace, int threads);
};

}  // namespace pyprune
