// LoRAPrune's group score. The contract is in lora_score.h.
//
// The weight is read once and nothing of its size is written. Ghat and B A are products over 2r and r, 6 r operations
// an entry: at r = 8 twice what fp32 units do in the time that 2 bytes take on an H100 (67 TFLOP/s, 3.35 TB/s), so they
// go to the tensor cores, whose 16-bit factors are made exact enough by splitting: x = high + low, x y = high high +
// high low + low high, three terms laid side by side along the summed dimension. At r = 8 an entry then takes 160
// operations of mma.sync: at 600 TFLOP/s 0.27 ns per thousand, against 0.6 for the bytes. Bound by memory.
//
//   lora_score_pack   the factors of both products as bf16 rows, [outputs, K] and [inputs, K]: two small launches
//   lora_score        blocks of 128 rows by 512 columns in tiles of 64: 8 warps of 16 rows
//
// A thread's 16 columns of a tile are neighbours in memory (two 16-byte loads of bf16): which column of W a column of
// the product stands for is free to choose, and chosen so.
#include "device.cuh"
#include "lora_score.h"
#include "ptx.cuh"

namespace pyprune {
namespace {

using namespace device;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16 * kWarps;   // of a block
constexpr int kColumns = 64;         // of a tile
constexpr int kBlockColumns = 512;   // of a block
constexpr int kSteps = 6;            // of 16 along the summed dimension that are in shared memory at one time
constexpr int kDepth = 16 * kSteps;  // elements
constexpr int kStride = kDepth + 8;  // 13 16-byte pieces, odd: eight rows of an ldmatrix touch different banks
constexpr int kSharedBytes = (kRows + kColumns) * kStride * 2 + kWarps * kColumns * 4;
constexpr int kPairs = kColumns / 8;  // a thread's pairs of columns, and the tile's mma columns

__host__ __device__ constexpr int64_t padded(int64_t terms) { return (terms + 15) / 16 * 16; }
__host__ __device__ constexpr int64_t gradient_depth(int64_t rank) { return padded(6 * rank); }
__host__ __device__ constexpr int64_t whole_depth(int64_t rank) { return gradient_depth(rank) + padded(3 * rank); }

// Element k of a packed row: of a product over `terms` values, [high, high, low] on the left and [high, low, high] on
// the right. Returns which value it is made of, -1 for padding, and whether it is the low part.
struct Piece16 {
  int64_t term;
  bool low;
};

__device__ __forceinline__ Piece16 piece_of(int64_t k, int64_t terms, bool left) {
  const int64_t part = terms ? k / terms : 3;
  if (part > 2) return {-1, false};
  return {k - part * terms, part == (left ? 2 : 1)};
}

// One thread an element. Left rows are of gB and B, then of scale B; right rows of A - gA and gA, then of A.
__global__ void __launch_bounds__(kThreads)
    lora_score_pack(int64_t count, int64_t rank, float scale, bool left, const float* a, const float* b,
                    const float* grad_a, const float* grad_b, __nv_bfloat16* out) {
  const int64_t depth = whole_depth(rank), index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count * depth) return;  // no barrier follows
  const int64_t i = index / depth, k = index % depth;
  const bool gradient = k < gradient_depth(rank);
  const Piece16 piece = gradient ? piece_of(k, 2 * rank, left) : piece_of(k - gradient_depth(rank), rank, left);
  float value = 0.0f;
  if (piece.term >= 0) {
    const int64_t q = piece.term % rank;
    const bool second = piece.term >= rank;  // of the gradient's terms
    const int64_t place = left ? i * rank + q : q * count + i;
    if (left) {
      value = !gradient ? scale * b[place] : second ? b[place] : grad_b[place];
    } else {
      value = !gradient ? a[place] : second ? grad_a[place] : a[place] - grad_a[place];
    }
  }
  const __nv_bfloat16 high = __float2bfloat16(value);
  out[index] = piece.low ? __float2bfloat16(value - __bfloat162float(high)) : high;
}

// Sixteen neighbouring elements of a row, zero past the end.
template <typename T>
struct Sixteen {
  union {
    uint4 pieces[sizeof(T)];
    T elements[16];
  };

  __device__ __forceinline__ void load(const T* source, int64_t valid, bool aligned) {
    if (aligned && valid >= 16) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(T)); ++i)
        pieces[i] = __ldg(reinterpret_cast<const uint4*>(source) + i);
    } else {
      for (int i = 0; i < 16; ++i) elements[i] = i < valid ? source[i] : from_float<T>(0.0f);
    }
  }
};

// Copies rows of packed factors to shared memory: `count` rows from `first` on, elements from `depth0` on, zeros past
// `rows` and past the depth. The tile's row of source row c is where(c).
template <typename Where>
__device__ __forceinline__ void stage(__nv_bfloat16* shared, const __nv_bfloat16* packed, int64_t first, int count,
                                      int64_t rows, int64_t depth, int64_t depth0, Where where) {
  constexpr int kPieces = kDepth / 8;
  for (int i = threadIdx.x; i < count * kPieces; i += kThreads) {
    const int row = i / kPieces, k = i % kPieces * 8;
    const bool valid = first + row < rows && depth0 + k < depth;
    const uint4* source = reinterpret_cast<const uint4*>(packed + (first + row) * depth + depth0 + k);
    *reinterpret_cast<uint4*>(shared + where(row) * kStride + k) = valid ? __ldg(source) : uint4{0, 0, 0, 0};
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2)  // fp32 weights need more than 128 registers
    lora_score(int64_t outputs, int64_t inputs, int64_t rank, bool aligned, const T* weight, const __nv_bfloat16* left,
               const __nv_bfloat16* right, float* partials) {
  PYPRUNE_SHARED_MEMORY(shared);
  auto* shared_left = reinterpret_cast<__nv_bfloat16*>(shared);
  __nv_bfloat16* shared_right = shared_left + kRows * kStride;
  auto* column_sums = reinterpret_cast<float*>(shared_right + kColumns * kStride);  // [kWarps][kColumns]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows, column_begin = int64_t{kBlockColumns} * blockIdx.y;
  const int64_t column_end = column_begin + kBlockColumns < inputs ? column_begin + kBlockColumns : inputs;
  const int64_t depth = whole_depth(rank), gradient_steps = gradient_depth(rank) / 16, steps = depth / 16;
  // Rows of an ldmatrix that this lane names: of the left factor rows 0-15 by k 0-15, of the right two mma columns.
  const __nv_bfloat16* left_row = shared_left + (warp * 16 + lane % 16) * kStride + lane / 16 * 8;
  const __nv_bfloat16* right_row = shared_right + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;

  float row_sum[2] = {0.0f, 0.0f};
  for (int64_t column0 = column_begin; column0 < column_end; column0 += kColumns) {
    Sixteen<T> w[2];  // rows group and group + 8 of the warp's, columns 16 pair ... + 15 of the tile
    const int64_t column = column0 + 16 * pair;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = row0 + warp * 16 + group + 8 * h;
      const bool inside = row < outputs && column < inputs;
      w[h].load(weight + (inside ? row * inputs + column : 0), inside ? inputs - column : 0, aligned);
    }

    float gradient[kPairs][4] = {}, update[kPairs][4] = {};
    for (int64_t step0 = 0; step0 < steps; step0 += kSteps) {
      __syncthreads();  // the tile before has been read
      if (steps > kSteps || column0 == column_begin) {
        stage(shared_left, left, row0, kRows, outputs, depth, step0 * 16, [](int row) { return row; });
      }
      // Column c of the tile goes where mma's output gives it to the thread that has its weight.
      stage(shared_right, right, column0, kColumns, inputs, depth, step0 * 16,
            [](int c) { return c % 16 / 2 * 8 + c / 16 * 2 + c % 2; });
      __syncthreads();
      for (int step = 0; step < kSteps && step0 + step < steps; ++step) {
        uint32_t l[4];
        ptx::ldmatrix_x4(l, left_row + step * 16);
#pragma unroll
        for (int t = 0; t < kPairs; t += 2) {
          uint32_t r[4];
          ptx::ldmatrix_x4(r, right_row + t * 8 * kStride + step * 16);
          if (step0 + step < gradient_steps) {
            ptx::mma_m16n8k16<__nv_bfloat16>(gradient[t], l, r[0], r[1]);
            ptx::mma_m16n8k16<__nv_bfloat16>(gradient[t + 1], l, r[2], r[3]);
          } else {
            ptx::mma_m16n8k16<__nv_bfloat16>(update[t], l, r[0], r[1]);
            ptx::mma_m16n8k16<__nv_bfloat16>(update[t + 1], l, r[2], r[3]);
          }
        }
      }
    }

    float column_sum[16];
#pragma unroll
    for (int c = 0; c < 16; ++c) {  // pair c / 2 of the thread's columns, element c % 2
      column_sum[c] = 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float score =
            fabsf(gradient[c / 2][2 * h + c % 2] * (to_float(w[h].elements[c]) + update[c / 2][2 * h + c % 2]));
        column_sum[c] += score;
        row_sum[h] += score;
      }
    }
    if constexpr (kDim == 1) {
#pragma unroll
      for (int c = 0; c < 16; ++c) {
        for (int step = 4; step < 32; step *= 2) column_sum[c] += __shfl_xor_sync(kFullWarp, column_sum[c], step);
        if (group == 0) column_sums[warp * kColumns + 16 * pair + c] = column_sum[c];
      }
      __syncthreads();
      if (threadIdx.x < kColumns && column0 + threadIdx.x < inputs) {
        float sum = 0.0f;
        for (int i = 0; i < kWarps; ++i) sum += column_sums[i * kColumns + threadIdx.x];
        partials[blockIdx.x * inputs + column0 + threadIdx.x] = sum;
      }
    }
  }
  if constexpr (kDim == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = row_sum[h] + __shfl_xor_sync(kFullWarp, row_sum[h], 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int64_t row = row0 + warp * 16 + group + 8 * h;
      if (pair == 0 && row < outputs) partials[blockIdx.y * outputs + row] = sum;
    }
  }
}

}  // namespace

void lora_group_score_sizes(int64_t outputs, int64_t inputs, int64_t rank, int dim, int64_t* partial_rows,
                            int64_t* workspace_bytes) {
  *partial_rows = dim == 0 ? ceil_divide(inputs, kBlockColumns) : ceil_divide(outputs, kRows);
  *workspace_bytes = (outputs + inputs) * whole_depth(rank) * 2;
}

int lora_group_score(int dtype, int64_t outputs, int64_t inputs, int64_t rank, float scale, int dim, const void* weight,
                     const float* a, const float* b, const float* grad_a, const float* grad_b, float* partials,
                     void* workspace, void* stream) {
  if (dim != 0 && dim != 1) return cudaErrorInvalidValue;
  return with_float(dtype, [&](auto element) -> int {
    using T = decltype(element);
    const auto s = static_cast<cudaStream_t>(stream);
    const int64_t depth = whole_depth(rank);
    auto* left = static_cast<__nv_bfloat16*>(workspace);
    __nv_bfloat16* right = left + outputs * depth;
    const auto packing = [&](int64_t count) { return dim3(blocks(ceil_divide(count * depth, kThreads))); };
    cudaError_t error = launch(lora_score_pack, packing(outputs), kThreads, 0, s, outputs, rank, scale, true, a, b,
                               grad_a, grad_b, left);
    if (error != cudaSuccess) return error;
    error = launch(lora_score_pack, packing(inputs), kThreads, 0, s, inputs, rank, scale, false, a, b, grad_a, grad_b,
                   right);
    if (error != cudaSuccess) return error;
    const dim3 grid(blocks(ceil_divide(outputs, kRows)), blocks(ceil_divide(inputs, kBlockColumns)));
    const bool rows_aligned = device::aligned(weight, 16) && inputs * sizeof(T) % 16 == 0;
    return launch(dim == 0 ? lora_score<T, 0> : lora_score<T, 1>, grid, kThreads, kSharedBytes, s, outputs, inputs,
                  rank, rows_aligned, static_cast<const T*>(weight), left, right, partials);
  });
}

}  // namespace pyprune
