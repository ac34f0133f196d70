// The GPU half of the `lora_score` family: what lora_score_bindings.h calls and lora_score.cu defines. Raw pointers,
// no torch.
//
//   Ghat = gB (A - gA) + B gA      S = |Ghat * (W + scale B A)|      out = S summed over the dimension that is not
//   `dim`
//
// with W [outputs, inputs] of `dtype`; A, gA [rank, inputs] and B, gB [outputs, rank] fp32.
//
// - Matrices are contiguous and row-major; all pointers are device pointers of the current device; `stream` is a
//   cudaStream_t. No function synchronises. Sizes are at least one.
// - `partials` [rows, length of dim `dim`] fp32 is overwritten; the caller adds its rows. Their number follows from the
//   sizes alone, so results are bitwise the same from run to run.
// - The products are made of bf16 pairs (high and low part of each factor) with fp32 accumulation: an entry of Ghat or
//   B A is off by at most 2^-15 of the sum of its terms' magnitudes. Not finite inputs give scores that are not finite.
// - `workspace` holds workspace_bytes, 256-byte aligned, contents undefined before and after.
// - The return value is a cudaError_t. A dtype or dim outside the known ones returns cudaErrorInvalidValue.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

// What the caller must allocate: rows of partials, and bytes of scratch.
void lora_group_score_sizes(int64_t outputs, int64_t inputs, int64_t rank, int dim, int64_t* partial_rows,
                            int64_t* workspace_bytes);

int lora_group_score(int dtype, int64_t outputs, int64_t inputs, int64_t rank, float scale, int dim, const void* weight,
                     const float* a, const float* b, const float* grad_a, const float* grad_b, float* partials,
                     void* workspace, void* stream);

}  // namespace pyprune
