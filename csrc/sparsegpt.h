// SparseGPT's solve (arXiv 2301.00774) inside a slab of columns. Raw pointers, no torch.
//
// With U the upper Cholesky factor of the inverse Hessian, for each column j of [begin, begin + width) in turn:
//   q = rounded(w_j) where the weight stays, else 0;   e = (w_j - q) / U_jj;   w_k -= e U_jk for the k behind j in the
//   slab
// The caller applies the errors to the columns behind the slab, one matrix product.
//
// Common to every function
// - work [rows, columns] and upper [columns, columns] are the whole matrices, fp32; the slab of work is changed in
// place.
// - keep [rows, columns], a byte a weight, 1 = stays: read if n = 0. Otherwise written: n of every m neighbours stay,
//   the highest (w_j / U_jj)^2 when the first of them is reached, the lower index among equal ones. m divides columns,
//   begin and width.
// - scale, zero [rows, groups]: rounded(w) = scale (code - zero) with code = round(w / scale) + zero, to nearest, ties
// to
//   even, clamped to 0 ... levels; columns / groups neighbours share one. Null: no rounding.
// - errors [rows, width] is overwritten.
// - 1 <= width <= kMaxSlab. Results are bitwise the same from run to run and for any number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

constexpr int kMaxSlab = 128;

struct SparseGptSlab {
  int64_t rows, columns, begin;
  int width, n, m;
  float* work;
  const float* upper;
  uint8_t* keep;
  int64_t groups;
  const float *scale, *zero;
  float levels;
  float* errors;
};

// On the GPU: device pointers of the current device, `stream` a cudaStream_t, nothing synchronises. Returns a
// cudaError_t.
int sparsegpt_slab(const SparseGptSlab& slab, void* stream);

}  // namespace pyprune
