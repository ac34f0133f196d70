// The CPU half of the `sparse_gemm` family: y = x W^T + bias for few tokens, W packed, masked or used in part. The
// formats are docs/architecture.md, "Packed weights".
//
// Common to every function
// - x [tokens,in], values, weight, bias [out] (or null) and y are contiguous elements of `dtype`. Sums are fp32,
// rounded
//   once.
// - `workspace` is 64-byte aligned and holds workspace() bytes, contents undefined before and after.
// - y is overwritten. Any size may be zero. Results do not depend on `threads`. No function allocates or fails.
// - Any number of tokens is right; the weight is decoded once for every 512 (AVX-512), 256 (AVX2) or 128.
// - Metadata is trusted: every read stays inside what it describes. Bits and offsets that do not fit the values give
//   wrong results, but nothing outside values is read.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct SparseGemmCpuKernels {
  // Bytes of scratch for any function below at these sizes.
  int64_t (*workspace)(int64_t tokens, int64_t in_features);

  // values has values_size elements; bitmap [tiles,64,8], offsets [tiles+1].
  void (*bitmap_linear)(DType dtype, int64_t tokens, int64_t out_features, int64_t in_features, const void* x,
                        const void* values, int64_t values_size, const uint8_t* bitmap, const int64_t* offsets,
                        const void* bias, void* y, void* workspace, int threads);

  // values [out,in n/m], metadata [out,ceil(in n/m b/8)].
  void (*nm_linear)(DType dtype, int64_t tokens, int64_t out_features, int64_t in_features, int n, int m, const void* x,
                    const void* values, const uint8_t* metadata, const void* bias, void* y, void* workspace,
                    int threads);

  // weight [out,in], mask [out,ceil(in/8)].
  void (*masked_linear)(DType dtype, int64_t tokens, int64_t out_features, int64_t in_features, const void* x,
                        const void* weight, const uint8_t* mask, const void* bias, void* y, void* workspace,
                        int threads);

  // x [tokens,inputs], y [tokens,outputs], weight [out,in] of which the columns in_index [inputs] (rising; null: all)
  // and the rows out_index [outputs] (null: all) are used, and bias[out_index].
  void (*gathered_linear)(DType dtype, int64_t tokens, int64_t outputs, int64_t inputs, int64_t in_features,
                          const void* x, const void* weight, const int64_t* in_index, const int64_t* out_index,
                          const void* bias, void* y, void* workspace, int threads);
};

}  // namespace pyprune
