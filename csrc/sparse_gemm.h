// The GPU half of the `sparse_gemm` family: y = x W^T + bias with a packed W, for few tokens. Raw pointers, no torch.
// The packed formats, docs/architecture.md, "Packed weights", are read as they are: nothing is prepacked.
//
// Common to every function
// - x [tokens,inputs], y [tokens,outputs], bias [outputs] (or null) are contiguous, row-major elements of `dtype`.
//   Products are accumulated in fp32.
// - All pointers are device pointers of the current device; `stream` is a cudaStream_t. No function synchronises.
// - Any size may be zero, inputs at most 2^31 - 1. Pointers need the alignment of their elements; bitmap and its
//   values need 16 bytes, and multiples of 16 bytes (2:4: rows of a multiple of 64 inputs) take the fast path for the
//   others.
// - y is overwritten. Results are bitwise the same from run to run, for the same `plan`.
// - Indices, bits and offsets that do not fit the values give wrong results, but nothing outside values is read.
// - The return value is a cudaError_t; an unknown dtype or a plan that the contract below excludes returns
//   cudaErrorInvalidValue.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

struct SparseShape {
  int64_t tokens, inputs, outputs;
};

struct SparsePlan {
  // Tensor cores: bf16 and fp16, 64 tokens at a time. Otherwise plain multiply-adds: also fp32, four tokens at a time.
  // At most 65535 times.
  bool tensor_cores;
  // The inputs are cut into so many parts (1 to 65535), of which blocks of their own sum the products; a second kernel
  // adds them in order. More than one needs `partial`, fp32 [splits,tokens,outputs], contents undefined before and
  // after.
  int splits;
};

// values [outputs, inputs/2], metadata [outputs, ceil(inputs/8)]: 2:4 alone; inputs a multiple of four.
int nm_linear(SparseShape shape, SparsePlan plan, int dtype, const void* x, const void* values, const uint8_t* metadata,
              const void* bias, void* y, float* partial, void* stream);

// values [values_size], bitmap [tiles,64,8], offsets [tiles + 1].
int bitmap_linear(SparseShape shape, SparsePlan plan, int dtype, const void* x, const void* values, int64_t values_size,
                  const uint8_t* bitmap, const int64_t* offsets, const void* bias, void* y, float* partial,
                  void* stream);

}  // namespace pyprune
