// The CPU half of the `nm_adamw` family; nm_adamw.h has the formulas. No function allocates or fails: sizes and dtypes
// are the caller's to check. Results do not depend on `threads`.
#pragma once

#include "nm_adamw.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct NmAdamwCpuKernels {
  // W [rows,columns] and g of dtype fp32 or bf16.
  void (*nm_adamw)(DType dtype, int64_t rows, int64_t columns, const AdamW& options, void* param, const void* grad,
                   float* exp_avg, float* exp_avg_sq, const uint8_t* mask, int threads);

  // Every dtype to itself, and fp32 to 16 bits.
  void (*masked_weight)(DType dtype, DType out_dtype, int64_t rows, int64_t columns, const void* weight,
                        const uint8_t* mask, void* out, int threads);
};

}  // namespace pyprune
