// The `nm_adamw` family: the optimiser step on masked weights, and the masked weight. Raw pointers, no torch.
//
//   m <- b1 m + (1 - b1) g;   u = m + masked_decay (1 - mask) W;   v <- b2 v + (1 - b2) s^2
//   W <- keep W - rate u / (sqrt(v correction) + eps)
//
// - Matrices are [rows, columns], contiguous. `mask` is uint8 [rows, ceil(columns / 8)], bit j % 8 (least significant
//   first) of byte j / 8 is column j, 1 = kept.
// - With a mask s = u; with none (null) s = g and u = m, which is AdamW.
// - "typed" means elements of `dtype`: W and g. m and v are fp32, arithmetic is fp32. W, m and v are changed in place.
// - fp32 weights are stored as they are. bf16 ones are rounded stochastically: of element i = row columns + column the
//   magnitude's lower 16 bits gain hash32(i + seed) >> 16 before they are cut off; NaN and infinity stay.
//     hash32(x): x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
// - Any size may be zero. No sums over elements, so results do not depend on threads or blocks.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

struct AdamW {
  float beta1, new1;   // b1 and 1 - b1
  float beta2, new2;   // b2 and 1 - b2
  float keep;          // 1 - lr weight_decay
  float rate;          // lr / (1 - b1^step)
  float correction;    // 1 / (1 - b2^step)
  float eps;           //
  float masked_decay;  // lambda
  uint32_t seed;       // of the rounding
};

// On the current device and `stream`, a cudaStream_t; does not synchronise. The return value is a cudaError_t: 0 when
// it was launched, cudaErrorInvalidValue for a dtype other than kFloat32 and kBFloat16.
int nm_adamw(int dtype, int64_t rows, int64_t columns, const AdamW& options, void* param, const void* grad,
             float* exp_avg, float* exp_avg_sq, const uint8_t* mask, void* stream);

// out [rows, columns] of `out_dtype` = mask ? weight : 0, weight of `dtype`; every dtype to itself, and fp32 to 16 bits
// (to nearest). Other pairs return cudaErrorInvalidValue.
int masked_weight(int dtype, int out_dtype, int64_t rows, int64_t columns, const void* weight, const uint8_t* mask,
                  void* out, void* stream);

}  // namespace pyprune
