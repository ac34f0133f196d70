// The GPU half of the `hsm` family: what bindings.cpp calls and hsm_fused.cu defines. Raw pointers, no torch.
//
//   h = x l0^T                                   y = mask * (x[:, :n] + (h * v) l1^T)
//   residual_out = residual + y                  normed = residual_out * rstd * weight
//
// with T = tokens, d = hidden, r = rank, n = outputs <= hidden, and rstd = rsqrt(mean(residual_out^2) + eps).
//
// Common to every function
// - Matrices are contiguous and row-major. "typed" means elements of `dtype`; everything else is fp32.
// - All pointers are device pointers of the current device; `stream` is a cudaStream_t. No function synchronises.
// - Any size may be zero. Pointers and row lengths need no alignment; multiples of 16 bytes take the fast path.
// - Outputs are overwritten, never accumulated into, and may not overlap an input or each other.
// - Products are accumulated in fp32. Results are bitwise the same from run to run on one device model.
// - `workspace` holds hsm_workspace() bytes, 256-byte aligned, contents undefined before and after.
// - The return value is a cudaError_t: 0 when everything was launched; error_string() names the others.
//   A dtype code outside DType or outputs > hidden returns cudaErrorInvalidValue.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

struct HsmShape {
  int64_t tokens;   // T
  int64_t hidden;   // d
  int64_t rank;     // r
  int64_t outputs;  // n <= d
};

// Bytes of scratch that are enough for each of the functions below at this shape, on the current device.
int hsm_workspace(HsmShape shape, int dtype, int64_t* bytes);

// x [T,d], l0 [r,d], l1 [n,r] typed; v [r], mask [n] -> y [T,n], h [T,r] typed.
int hsm_forward(HsmShape shape, int dtype, const void* x, const void* l0, const float* v, const void* l1,
                const float* mask, void* y, void* h, void* workspace, void* stream);

// The same inputs, residual [T,n] and weight [n] typed -> residual_out [T,n], normed [T,n], h [T,r] typed; rstd [T].
// The mean square is that of residual_out as stored (rounded to dtype), so rstd agrees with what backward reads.
int hsm_residual_rmsnorm_forward(HsmShape shape, int dtype, float eps, const void* x, const void* l0, const float* v,
                                 const void* l1, const float* mask, const void* residual, const void* weight,
                                 void* residual_out, void* normed, void* h, float* rstd, void* workspace, void* stream);

// The part of hsm's backward that is not a weight gradient. With u = (grad_y * mask) l1:
//   grad_x [T,d] typed    = [grad_y * mask, 0] + (u * v) l0
//   grad_p [T,r] typed    = u * v                        (so grad_l0 = grad_p^T x, one GEMM for the caller)
//   grad_v [r]            = sum_t h * u
//   column_dot [n]        = sum_t grad_y * x[:, :n]      (skipped when the pointer is null)
// The caller finishes with G = grad_y^T (h * v) [n,r]: grad_l1 = mask[:, None] * G and
// grad_mask = column_dot + sum_k l1 * G, which needs no second product with l1.
int hsm_backward(HsmShape shape, int dtype, const void* grad_y, const void* x, const void* h, const void* l0,
                 const float* v, const void* l1, const float* mask, void* grad_x, void* grad_p, float* grad_v,
                 float* column_dot, void* workspace, void* stream);

// The RMSNorm half of hsm_residual_rmsnorm's backward; feed grad_residual to hsm_backward as grad_y.
//   q = normalised row = residual_out * rstd;   a = weight * grad_normed
//   grad_residual [T,n] typed = grad_residual_out + rstd * (a - q * mean(a * q))
//   grad_weight [n]           = sum_t grad_normed * q
// Reads shape.tokens and shape.outputs only.
int rmsnorm_backward(HsmShape shape, int dtype, const void* grad_residual_out, const void* grad_normed,
                     const void* residual_out, const float* rstd, const void* weight, void* grad_residual,
                     float* grad_weight, void* workspace, void* stream);

}  // namespace pyprune
