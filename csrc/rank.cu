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

template <typename T>
using Piece = device::Piece<T, kPiece>;

// kPiece consecutive elements, of which `valid` exist; the others are left alone. Whether rows are whole pieces on
// 16-byte boundaries is known at compile time, so that what is loaded stays in the words as they came: to unpack it
// early is to wait for it.
template <bool kAligned, typename T>
__device__ __forceinline__ void load(Piece<T>& out, const T* source, int valid) {
  if constexpr (kAligned) {
    out.load(source);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (i < valid) out.elements[i] = source[i];
    }
  }
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store(T* target, const Piece<T>& values, int valid) {
  if constexpr (kAligned) {
    values.store(target);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (i < valid) target[i] = values.elements[i];
    }
  }
}

__host__ __device__ inline int64_t pieces_of(int64_t columns) { return (columns + kPiece - 1) / kPiece; }

__device__ __forceinline__ int valid_in(int64_t column, int64_t columns) {
  return columns - column < kPiece ? static_cast<int>(columns - column) : kPiece;
}

// One piece a thread. W is the weight's bits: uint16_t or uint32_t.
template <bool kAligned, typename W>
__global__ void __launch_bounds__(kMaskThreads)
    rank_mask_kernel(int64_t pieces, int64_t columns, const W* weight, const uint16_t* rank, const int32_t* threshold,
                     W* out) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t row = piece / pieces_of(columns), column = piece % pieces_of(columns) * kPiece;
  const int64_t start = row * columns + column;
  const int valid = valid_in(column, columns), first_kept = threshold[row];
  Piece<W> w = {};
  Piece<uint16_t> r = {};
  load<kAligned>(w, weight + start, valid);
  load<kAligned>(r, rank + start, valid);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) w.elements[i] = r.elements[i] >= first_kept ? w.elements[i] : W{0};
  store<kAligned>(out + start, w, valid);
}

// A warp walks a row. Every lane has a histogram of its own, sums[bucket][lane] in shared memory: no atomics, so the
// order of summation is fixed, and no bank conflicts, whatever the ranks, which may repeat. A weight costs 17
// instructions in sm_90a's machine code, a shared load and store among them that wait for those before: at 4096 x 11008
// on H100 26 us of issuing and 20 us of waiting, against 94 us (bf16) for the bytes. At 100 steps a warp has 12.6 KB
// and an SM of 228 KB so 17 warps; what a lane loads ahead, two pieces or one of fp32, is 50 or 42 KB an SM under way,
// where bandwidth times latency asks for about 25. The last phase reads the histograms once: 1 shared load for 40
// weights of a row of 4096.
template <bool kAligned, typename T>
__global__ void __launch_bounds__(kMaxRowsPerBlock* kWarp)
    rank_bucket_grad_kernel(int64_t rows, int columns, BucketOfRank bucket_of, const T* grad, const T* weight,
                            const uint16_t* rank, float* out) {
  PYPRUNE_SHARED_MEMORY(shared);
  constexpr int kStep = kWarp * kPiece;
  constexpr int kAhead = sizeof(T) == 2 ? 2 : 1;  // pieces of a lane whose loads are under way
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int steps = static_cast<int>(bucket_of.steps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (row >= rows) return;  // A whole warp: the barriers below are the warp's.
  float* sums = reinterpret_cast<float*>(shared) + warp * (steps + 1) * kWarp;
  float* mine = sums + lane;

  struct {
    Piece<T> grad, weight;
    Piece<uint16_t> rank;
  } ahead[kAhead];
  grad += row * columns;
  weight += row * columns;
  rank += row * columns;
  const auto fetch = [&](auto& pieces, int column) {
    if (column >= columns) return;
    const int valid = valid_in(column, columns);
    load<kAligned>(pieces.grad, grad + column, valid);
    load<kAligned>(pieces.weight, weight + column, valid);
    load<kAligned>(pieces.rank, rank + column, valid);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch(ahead[i], lane * kPiece + i * kStep);
  for (int d = 0; d <= steps; ++d) mine[d * kWarp] = 0.0f;

  for (int begin = lane * kPiece; begin < columns; begin += kAhead * kStep) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int column = begin + a * kStep;
      if (column >= columns) break;
      const int valid = kAligned ? kPiece : valid_in(column, columns);
      float product[kPiece];
      int bucket[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if (i >= valid) break;
        const uint64_t n = bucket_of.steps * ahead[a].rank.elements[i] + bucket_of.offset;
        const int found = static_cast<int>(n * static_cast<uint32_t>(bucket_of.multiplier) >> bucket_of.shift);
        bucket[i] = found < steps ? found : steps;  // a rank that no row has must not lead outside the histogram
        product[i] = to_float(ahead[a].grad.elements[i]) * to_float(ahead[a].weight.elements[i]);
      }
      fetch(ahead[a], column + kAhead * kStep);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if (i >= valid) break;
        mine[bucket[i] * kWarp] += product[i];
      }
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
  const bool aligned = all_aligned(columns, weight, rank, out);
  return launch(aligned ? rank_mask_kernel<true, W> : rank_mask_kernel<false, W>, grid, kMaskThreads, 0, stream, pieces,
                columns, static_cast<const W*>(weight), rank, threshold, static_cast<W*>(out));
}

template <typename T>
cudaError_t bucket_grad(int64_t rows, int64_t columns, int steps, const void* grad, const void* weight,
                        const uint16_t* rank, float* out, cudaStream_t stream) {
  const size_t row_bytes = static_cast<size_t>(steps + 1) * kWarp * sizeof(float);
  const int fitting = static_cast<int>(kHistogramBytes / row_bytes);
  const int rows_per_block = fitting < kMaxRowsPerBlock ? fitting : kMaxRowsPerBlock;
  const dim3 grid(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block));
  const bool aligned = all_aligned(columns, grad, weight, rank);
  return launch(aligned ? rank_bucket_grad_kernel<true, T> : rank_bucket_grad_kernel<false, T>, grid,
                rows_per_block * kWarp, rows_per_block * row_bytes, stream, rows, static_cast<int>(columns),
                bucket_of_rank(columns, steps), static_cast<const T*>(grad), static_cast<const T*>(weight), rank, out);
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
