// Masks that are 2:4 along both sides. The contract is in transposable.h.
//
// One thread takes two neighbouring tiles, so that it writes whole bytes of four rows. A weight costs 2.1 bytes (bf16)
// and 90 (3 additions, a comparison, two selections) / 16 = 34 instructions, so the arithmetic is the limit: about
// twice the time of the bytes on H100. The patterns are constants of the unrolled code, all sums stay in registers.
#include <utility>

#include "device.cuh"
#include "transposable.h"
#include "transposable_patterns.h"

namespace pyprune {
namespace {

using device::ceil_divide;
using device::to_float;

constexpr int kThreads = 128;

using Pairs = float[4][kPairs];

template <int kPattern>
__device__ __forceinline__ void consider(const Pairs& pairs, float& largest, unsigned& mask) {
  constexpr int a = kAll.pair[kPattern][0], b = kAll.pair[kPattern][1];
  constexpr int c = kAll.pair[kPattern][2], d = kAll.pair[kPattern][3];
  constexpr unsigned bits = kAll.nibble[kPattern][0] | kAll.nibble[kPattern][1] << 4 | kAll.nibble[kPattern][2] << 8 |
                            kAll.nibble[kPattern][3] << 12;
  const float sum = (pairs[0][a] + pairs[1][b]) + (pairs[2][c] + pairs[3][d]);
  if (kPattern == 0 || sum > largest) {
    largest = sum;
    mask = bits;
  }
}

template <int... kPattern>
__device__ __forceinline__ unsigned best_of(const Pairs& pairs, std::integer_sequence<int, kPattern...>) {
  float largest = 0.0f;
  unsigned mask = 0;
  (consider<kPattern>(pairs, largest, mask), ...);
  return mask;
}

// The best mask of the tile at `scores`, a nibble a row.
template <typename T>
__device__ __forceinline__ unsigned best_mask(const T* scores, int64_t columns) {
  Pairs pairs;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    float score[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] = to_float(scores[row * columns + i]);
    pairs[row][0] = score[0] + score[1];
    pairs[row][1] = score[0] + score[2];
    pairs[row][2] = score[0] + score[3];
    pairs[row][3] = score[1] + score[2];
    pairs[row][4] = score[1] + score[3];
    pairs[row][5] = score[2] + score[3];
  }
  return best_of(pairs, std::make_integer_sequence<int, kPatterns>());
}

template <typename T>
__global__ void __launch_bounds__(kThreads) prune(int64_t bands, int64_t columns, const T* scores, uint8_t* bits) {
  const int64_t row_bytes = ceil_divide(columns, 8);
  const int64_t place = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (place >= bands * row_bytes) return;
  const int64_t row = place / row_bytes * 4, byte = place % row_bytes;
  const T* tile = scores + row * columns + byte * 8;
  const unsigned low = best_mask(tile, columns);
  const unsigned high = byte * 8 + 4 < columns ? best_mask(tile + 4, columns) : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits[(row + i) * row_bytes + byte] = static_cast<uint8_t>((low >> 4 * i & 15) | (high >> 4 * i & 15) << 4);
  }
}

template <typename T>
cudaError_t launch_prune(int64_t rows, int64_t columns, const void* scores, uint8_t* bits, cudaStream_t stream) {
  const int64_t bands = rows / 4;
  const dim3 grid(device::blocks(ceil_divide(bands * ceil_divide(columns, 8), kThreads)));
  return launch(prune<T>, grid, kThreads, 0, stream, bands, columns, static_cast<const T*>(scores), bits);
}

}  // namespace

int transposable_prune(int dtype, int64_t rows, int64_t columns, const void* scores, uint8_t* bits, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (dtype) {
    case kFloat32: return launch_prune<float>(rows, columns, scores, bits, stream);
    case kBFloat16: return launch_prune<__nv_bfloat16>(rows, columns, scores, bits, stream);
    case kFloat16: return launch_prune<__half>(rows, columns, scores, bits, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace pyprune
