// What the kernels of several families share: element types, and the size of the machine.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "launch.h"

#ifndef PYPRUNE_SIMT
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pyprune::device {

constexpr unsigned kFullWarp = 0xffffffffu;

__host__ __device__ inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(value);
  } else {
    return value;
  }
}

// Elements as their bits, for what only moves or compares with zero. kCount of them in 4- to 16-byte accesses.
template <typename Bits, int kCount>
union Piece {
  static constexpr int kBytes = kCount * sizeof(Bits);
  static constexpr int kWords = kBytes >= 16 ? kBytes / 16 : 1;
  using Word = std::conditional_t<kBytes >= 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  Word words[kWords];
  Bits elements[kCount];

  __device__ __forceinline__ void load(const Bits* source) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const Word*>(source) + i);
  }
  __device__ __forceinline__ void store(Bits* target) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(target)[i] = words[i];
  }
};

// Sum over the warp's lanes; every lane gets it.
template <typename Value>
__device__ __forceinline__ Value sum_warp(Value value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// Sum over the lanes up to and including this one.
__device__ __forceinline__ int scan_warp(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

inline cudaError_t count_processors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Calls body(T{}) for the element type of `dtype`.
template <typename Body>
int with_float(int dtype, Body body) {
  switch (dtype) {
    case kFloat32: return body(float{});
    case kBFloat16: return body(__nv_bfloat16{});
    case kFloat16: return body(__half{});
    default: return cudaErrorInvalidValue;
  }
}

// Calls body(Bits{}) for an unsigned integer as large as an element of `dtype`.
template <typename Body>
int with_bits(int dtype, Body body) {
  switch (dtype) {
    case kFloat32: return body(uint32_t{});
    case kBFloat16:
    case kFloat16: return body(uint16_t{});
    default: return cudaErrorInvalidValue;
  }
}

// Whether an element's bits are those of anything but +0 and -0.
template <typename Bits>
__device__ __forceinline__ bool is_nonzero(Bits bits) {
  return static_cast<Bits>(bits << 1) != 0;
}

}  // namespace pyprune::device
