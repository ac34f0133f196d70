// BESA's mask and the gradient of its rates. The contract is in rank.h. Both kernels are bound by memory: 6 bytes a
// 16-bit weight, each read or written once, in 16-byte pieces where rows begin on such a boundary.
#include <type_traits>

#include "device.cuh"
#include "launch.h"
#include "rank.h"

#ifndef PYPRUNE_SIMT
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pyprune {
namespace {

constexpr int kWarp = 32;
constexpr int kPiece = 8;  // consecutive weights of a thread: 16 bytes of ranks
constexpr int kMaskThreads = 256;
constexpr int kMaxRowsPerBlock = 4;           // of rank_bucket_grad, a warp each
constexpr size_t kHistogramBytes = 52 << 10;  // of a block: four rows at 100 steps

using device::to_float;

// kPiece consecutive elements, of which `valid` exist; the others are left alone.
template <typename T>
__device__ __forceinline__ void load(T (&out)[kPiece], const T* source, int valid, bool aligned) {
  constexpr int kWords = kPiece * sizeof(T) / 16;
  if (aligned) {
    union {
      uint4 words[kWords];
      T elements[kPiece];
    };
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const uint4*>(source) + i);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) out[i] = elements[i];
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (i < valid) out[i] = source[i];
    }
  }
}

template <typename T>
__device__ __forceinline__ void store(T* target, const T (&values)[kPiece], int valid, bool aligned) {
  constexpr int kWords = kPiece * sizeof(T) / 16;
  if (aligned) {
    union {
      uint4 words[kWords];
      T elements[kPiece];
    };
#pragma unroll
    for (int i = 0; i < kPiece; ++i) elements[i] = values[i];
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(target)[i] = words[i];
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (i < valid) target[i] = values[i];
    }
  }
}

__host__ __device__ inline int64_t pieces_of(int64_t columns) { return (columns + kPiece - 1) / kPiece; }

__device__ __forceinline__ int valid_in(int64_t column, int64_t columns) {
  return columns - column < kPiece ? static_cast<int>(columns - column) : kPiece;
}

// One piece a thread. W is the weight's bits: uint16_t or uint32_t.
template <typename W>
__global__ void __launch_bounds__(kMaskThreads)
    rank_mask_kernel(int64_t pieces, int64_t columns, const W* weight, const uint16_t* rank, const int32_t* threshold,
                     W* out, bool aligned) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t row = piece / pieces_of(columns), column = piece % pieces_of(columns) * kPiece;
  const int64_t start = row * columns + column;
  const int valid = valid_in(column, columns), first_kept = threshold[row];
  W w[kPiece] = {};
  uint16_t r[kPiece] = {};
  load(w, weight + start, valid, aligned);
  load(r, rank + start, valid, aligned);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) w[i] = r[i] >= first_kept ? w[i] : W{0};
  store(out + start, w, valid, aligned);
}

// A warp walks a row. Every lane has a histogram of its own, sums[bucket][lane] in shared memory: no atomics, so the
// order of summation is fixed, and no bank conflicts, whatever the ranks. A weight costs one shared load and store; the
// next piece's global loads are under way meanwhile. At 100 steps, 12.6 KB a warp and so 17 warps an SM of 228 KB. The
// last phase reads the histograms once: 1 shared load for 40 weights of a row of 4096.
template <typename T>
__global__ void __launch_bounds__(kMaxRowsPerBlock* kWarp)
    rank_bucket_grad_kernel(int64_t rows, int columns, BucketOfRank bucket_of, const T* grad, const T* weight,
                            const uint16_t* rank, float* out, bool aligned) {
  PYPRUNE_SHARED_MEMORY(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int steps = static_cast<int>(bucket_of.steps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (row >= rows) return;  // A whole warp: the barriers below are the warp's.
  float* sums = reinterpret_cast<float*>(shared) + warp * (steps + 1) * kWarp;
  for (int d = 0; d <= steps; ++d) sums[d * kWarp + lane] = 0.0f;

  T g[kPiece] = {}, w[kPiece] = {};
  uint16_t r[kPiece] = {};
  grad += row * columns;
  weight += row * columns;
  rank += row * columns;
  const auto fetch = [&](int column) {
    if (column >= columns) return;
    const int valid = valid_in(column, columns);
    load(g, grad + column, valid, aligned);
    load(w, weight + column, valid, aligned);
    load(r, rank + column, valid, aligned);
  };
  fetch(lane * kPiece);
  for (int column = lane * kPiece; column < columns; column += kWarp * kPiece) {
    float product[kPiece];
    int bucket[kPiece];
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const uint64_t n = bucket_of.steps * r[i] + bucket_of.offset;
      bucket[i] = static_cast<int>(n * bucket_of.multiplier >> bucket_of.shift);
      product[i] = to_float(g[i]) * to_float(w[i]);
    }
    fetch(column + kWarp * kPiece);
    const int valid = valid_in(column, columns);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (i < valid) sums[bucket[i] * kWarp + lane] += product[i];
    }
  }
  __syncwarp();

  // 32 buckets at a time, one a lane, each lane starting at another bank; then their running sum.
  float before = 0.0f;
  for (int first = 0; first <= steps; first += kWarp) {
    const int bucket = first + lane;
    float sum = 0.0f;
    if (bucket <= steps) {
      for (int i = 0; i < kWarp; ++i) sum += sums[bucket * kWarp + (i + lane) % kWarp];
    }
#pragma unroll
    for (int reach = 1; reach < kWarp; reach *= 2) {
      const float left = __shfl_up_sync(0xffffffffu, sum, reach);
      if (lane >= reach) sum += left;
    }
    if (bucket <= steps) out[row * (steps + 1) + bucket] = -(before + sum);
    before += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
}

template <typename... Pointers>
bool all_aligned(int64_t columns, Pointers... pointers) {
  return columns % kPiece == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <typename W>
cudaError_t mask(int64_t rows, int64_t columns, const void* weight, const uint16_t* rank, const int32_t* threshold,
                 void* out, cudaStream_t stream) {
  const int64_t pieces = rows * pieces_of(columns);
  const dim3 grid(static_cast<unsigned>((pieces + kMaskThreads - 1) / kMaskThreads));
  return launch(rank_mask_kernel<W>, grid, kMaskThreads, 0, stream, pieces, columns, static_cast<const W*>(weight),
                rank, threshold, static_cast<W*>(out), all_aligned(columns, weight, rank, out));
}

template <typename T>
cudaError_t bucket_grad(int64_t rows, int64_t columns, int steps, const void* grad, const void* weight,
                        const uint16_t* rank, float* out, cudaStream_t stream) {
  const size_t row_bytes = static_cast<size_t>(steps + 1) * kWarp * sizeof(float);
  const int fitting = static_cast<int>(kHistogramBytes / row_bytes);
  const int rows_per_block = fitting < kMaxRowsPerBlock ? fitting : kMaxRowsPerBlock;
  const dim3 grid(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block));
  return launch(rank_bucket_grad_kernel<T>, grid, rows_per_block * kWarp, rows_per_block * row_bytes, stream, rows,
                static_cast<int>(columns), bucket_of_rank(columns, steps), static_cast<const T*>(grad),
                static_cast<const T*>(weight), rank, out, all_aligned(columns, grad, weight, rank));
}

}  // namespace

int rank_mask(int dtype, int64_t rows, int64_t columns, const void* weight, const uint16_t* rank,
              const int32_t* threshold, void* out, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (dtype) {
    case kFloat32: return mask<uint32_t>(rows, columns, weight, rank, threshold, out, stream);
    case kBFloat16:
    case kFloat16: return mask<uint16_t>(rows, columns, weight, rank, threshold, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

int rank_bucket_grad(int dtype, int64_t rows, int64_t columns, int steps, const void* grad, const void* weight,
                     const uint16_t* rank, float* out, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (steps < 1 || steps > 255) return cudaErrorInvalidValue;
  switch (dtype) {
    case kFloat32: return bucket_grad<float>(rows, columns, steps, grad, weight, rank, out, stream);
    case kBFloat16: return bucket_grad<__nv_bfloat16>(rows, columns, steps, grad, weight, rank, out, stream);
    case kFloat16: return bucket_grad<__half>(rows, columns, steps, grad, weight, rank, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace pyprune
