// 2:4 products for many tokens (prefill) on sm_90a, by CUTLASS's sparse collective. Built only on request: setup.py.
#pragma once

#include <cstdint>

#include "../sparse_gemm.h"

namespace pyprune {

// Bytes of scratch that nm_linear_cutlass needs.
int nm_linear_cutlass_workspace(SparseShape shape, int dtype, int64_t* bytes);

// y [tokens,outputs] = x W^T for a 2:4 weight; bf16 and fp16, inputs a multiple of 16, outputs of 8, nothing empty; all
// pointers at multiples of 16 bytes, `workspace` of 256. Otherwise as in sparse_gemm.h. What CUTLASS refuses returns
// cudaErrorInvalidValue.
int nm_linear_cutlass(SparseShape shape, int dtype, const void* x, const void* values, const uint8_t* metadata, void* y,
                      void* workspace, void* stream);

}  // namespace pyprune
