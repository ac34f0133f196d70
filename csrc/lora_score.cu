// LoRAPrune's group score. The contract is in lora_score.h.
//
// The weight is read once and nothing of its size is written. Ghat and B A are products over 2r and r, 6 r operations
// an entry: at r = 8 twice what fp32 units do in the time that 2 bytes take on an H100 (67 TFLOP/s, 3.35 TB/s), so they
// go to the tensor cores, whose 16-bit factors are made exact enough by splitting: x = high + low, x y = high high +
// high low + low high, three terms laid side by side along the summed dimension. At r = 8 an entry then takes 160
// operations of mma.sync: at 600 TFLOP/s 0.27 ns per thousand, against 0.6 for the bytes. Bound by memory.
//
//   lora_score        ranks up to 32 and rows of whole 16-byte pieces: factors are split where they are used
//   lora_score_any    any rank and alignment; lora_score_pack first lays the factors out as bf16 rows, [outputs, K] and
//                     [inputs, K]
//
// Both take 128 rows by 512 columns a block. Which column of W a column of the product stands for is free to choose,
// and chosen so that a thread's columns are neighbours in memory.
#include "device.cuh"
#include "lora_score.h"
#include "ptx.cuh"

namespace pyprune {
namespace {

using namespace device;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16 * kWarps;  // of a block
constexpr int kBlockColumns = 512;  // of a block

// ---------------------------------------------------------------------------------------------------------------------
// Ranks up to 32

constexpr int kSlot = 8;  // ranks that one mma takes of either product of the gradient
constexpr int kMostSlots = 4;
constexpr int kRowsAtOnce = 8;  // of a warp: the mma's columns; its rows are columns of W
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kAhead = 2;  // times kRowsAtOnce rows whose loads are under way; a third would spill there
#else
constexpr int kAhead = 3;
#endif

// Two values as bf16 pairs, high + low.
struct Split {
  uint32_t high, low;
};

__device__ __forceinline__ Split split(float x, float y) {
  union Word {
    __nv_bfloat16 elements[2];
    uint32_t bits;
  };
  Word high, low;
  high.elements[0] = __float2bfloat16(x);
  high.elements[1] = __float2bfloat16(y);
  low.elements[0] = __float2bfloat16(x - __bfloat162float(high.elements[0]));
  low.elements[1] = __float2bfloat16(y - __bfloat162float(high.elements[1]));
  return {high.bits, low.bits};
}

template <typename T>
struct Factors {
  int64_t outputs, inputs, rank;
  float scale;
  const T* weight;
  const float *a, *b, *grad_a, *grad_b;
};

// A warp holds the right factors of its columns in registers, as the left operand of mma, and walks down the block's
// rows, eight at a time, whose left factors are the right operand: one 16-byte shared load a lane and slot. Of a slot's
// 16 summed terms the first eight belong to gB (A - gA), the others to B gA, so that Ghat takes three products (high
// high, high low, low high); B A takes two, with high and low part of A side by side. 64 columns (at one slot) and
// eight rows cost a warp 20 mma and about 125 other instructions in sm_90a's machine code: at 4096 x 4096 on H100 5 us
// of issuing and 6 of tensor cores, against 12 for the bytes. No barrier but the one after the left factors are there;
// a thread's next rows of W, 96 bytes in bf16, are under way while it computes: 48 KB an SM at two blocks. With more
// slots a warp has fewer columns at once, and passes over the rows more often.
template <typename T, int kDim, int kSlots>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2)  // fp32 weights need more than 128 registers
    lora_score(Factors<T> f, float* partials) {
  constexpr int kTogether = kSlots == 4 ? 1 : 2;  // blocks whose products a lane has at one time
  constexpr int kBlocks = kMostSlots / kSlots;    // of 16 columns, of a warp at one time
  constexpr int kColumns = 2 * kBlocks;           // of a lane
  PYPRUNE_SHARED_MEMORY(shared);
  auto* left = reinterpret_cast<uint4*>(shared);  // [slot][row][pair of ranks]: gB and B high, gB and B low
  auto* row_sums = reinterpret_cast<float*>(left + kSlots * kRows * 4);  // [kWarps][kRows]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = f.outputs - row0 < kRows ? static_cast<int>(f.outputs - row0) : kRows;
  const int steps = (rows + kRowsAtOnce - 1) / kRowsAtOnce;

  for (int pass = 0; pass < kSlots; ++pass) {
    const int64_t column =
        int64_t{blockIdx.y} * kBlockColumns + (pass * kWarps + warp) * 16 * kBlocks + group * kColumns;
    const bool inside = column < f.inputs;
    // The lane's columns of rows 2 pair and 2 pair + 1 of every eight. What does not exist stays as it was, 0 or a
    // weight of the same column: its factors are 0. Loads do nothing else, since whatever touched their words would
    // wait.
    Piece<T, kColumns> ahead[kAhead][2] = {};
    const T* next = f.weight + (row0 + 2 * pair) * f.inputs + column;
    const auto fetch = [&](Piece<T, kColumns>(&pieces)[2], int step) {
      const int row = step * kRowsAtOnce + 2 * pair;
      if (inside && row < rows) pieces[0].load(next);
      if (inside && row + 1 < rows) pieces[1].load(next + f.inputs);
      next += kRowsAtOnce * f.inputs;
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(ahead[i], i);

    // For columns 2 block and 2 block + 1 of the lane, the mma's rows group and group + 8, ranks 2 pair and 2 pair + 1:
    // A - gA and gA high, the same low; A high and low.
    uint32_t high[kSlots][kBlocks][4], low[kSlots][kBlocks][4], plain[kSlots][kBlocks][4];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      Piece<float, kColumns> a[2] = {}, grad_a[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int q = slot * kSlot + 2 * pair + i;
        if (inside && q < f.rank) {
          a[i].load(f.a + q * f.inputs + column);
          grad_a[i].load(f.grad_a + q * f.inputs + column);
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float x[2] = {a[0].elements[c], a[1].elements[c]}, g[2] = {grad_a[0].elements[c], grad_a[1].elements[c]};
        const Split difference = split(x[0] - g[0], x[1] - g[1]), gradient = split(g[0], g[1]), all = split(x[0], x[1]);
        high[slot][c / 2][c % 2] = difference.high;
        high[slot][c / 2][2 + c % 2] = gradient.high;
        low[slot][c / 2][c % 2] = difference.low;
        low[slot][c / 2][2 + c % 2] = gradient.low;
        plain[slot][c / 2][c % 2] = all.high;
        plain[slot][c / 2][2 + c % 2] = all.low;
      }
    }
    if (pass == 0) {
      for (int i = threadIdx.x; i < kSlots * kRows * 4; i += kThreads) {
        const int row = i / 4 % kRows, q = i / 4 / kRows * kSlot + i % 4 * 2;
        float b[2] = {}, grad_b[2] = {};
        for (int j = 0; j < 2; ++j) {
          if (row >= rows || q + j >= f.rank) continue;
          b[j] = f.b[(row0 + row) * f.rank + q + j];
          grad_b[j] = f.grad_b[(row0 + row) * f.rank + q + j];
        }
        const Split gradient = split(grad_b[0], grad_b[1]), all = split(b[0], b[1]);
        left[i] = uint4{gradient.high, all.high, gradient.low, all.low};
      }
      __syncthreads();  // The left factors are there.
    }

    float column_sums[kColumns] = {};
    for (int step0 = 0; step0 < steps; step0 += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int step = step0 + i;
        if (step >= steps) break;
        float sums[2] = {0.0f, 0.0f};  // of the lane's two rows
#pragma unroll
        for (int block0 = 0; block0 < kBlocks; block0 += kTogether) {
          float gradient[kTogether][4] = {}, update[kTogether][4] = {};
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) {
            const uint4 l = left[(slot * kRows + step * kRowsAtOnce + group) * 4 + pair];
            const auto multiply = [&](float (&products)[kTogether][4], const uint32_t (&right)[kBlocks][4], uint32_t b0,
                                      uint32_t b1) {
#pragma unroll
              for (int t = 0; t < kTogether; ++t) {
                ptx::mma_m16n8k16<__nv_bfloat16>(products[t], right[block0 + t], b0, b1);
              }
            };
            multiply(gradient, low[slot], l.x, l.y);
            multiply(update, plain[slot], l.w, 0);
            multiply(gradient, high[slot], l.z, l.w);
            multiply(update, plain[slot], l.y, l.y);
            multiply(gradient, high[slot], l.x, l.y);
          }
#pragma unroll
          for (int c = 0; c < 2 * kTogether; ++c) {
            const int column = 2 * block0 + c;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int place = c % 2 * 2 + h;
              const float weight = to_float(ahead[i][h].elements[column]) + f.scale * update[c / 2][place];
              const float score = fabsf(gradient[c / 2][place] * weight);
              if constexpr (kDim == 0) {
                sums[h] += score;
              } else {
                column_sums[column] += score;
              }
            }
          }
        }
        fetch(ahead[i], step + kAhead);
        if constexpr (kDim == 0) {
          const bool odd = group % 2 != 0;  // The lane keeps row 2 pair + odd, its neighbour the other.
          float sum = odd ? sums[1] : sums[0];
          sum += __shfl_xor_sync(kFullWarp, odd ? sums[0] : sums[1], 4);
          sum += __shfl_xor_sync(kFullWarp, sum, 8);
          sum += __shfl_xor_sync(kFullWarp, sum, 16);
          float& all = row_sums[warp * kRows + step * kRowsAtOnce + 2 * pair + odd];
          if (group < 2) all = pass == 0 ? sum : all + sum;
        }
      }
    }
    if constexpr (kDim == 1) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float sum = column_sums[c] + __shfl_xor_sync(kFullWarp, column_sums[c], 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        if (pair == 0 && inside) partials[blockIdx.x * f.inputs + column + c] = sum;
      }
    }
  }
  if constexpr (kDim == 0) {
    __syncthreads();  // Every warp's sums are there.
    if (threadIdx.x < rows) {
      float sum = 0.0f;
      for (int i = 0; i < kWarps; ++i) sum += row_sums[i * kRows + threadIdx.x];
      partials[blockIdx.y * f.outputs + row0 + threadIdx.x] = sum;
    }
  }
}

template <typename T, int kSlots>
cudaError_t launch_score(dim3 grid, int dim, cudaStream_t stream, const Factors<T>& factors, float* partials) {
  const size_t bytes = kSlots * kRows * 4 * sizeof(uint4) + (dim == 0 ? kWarps * kRows * sizeof(float) : 0);
  return launch(dim == 0 ? lora_score<T, 0, kSlots> : lora_score<T, 1, kSlots>, grid, kThreads, bytes, stream, factors,
                partials);
}

// ---------------------------------------------------------------------------------------------------------------------
// Any rank: the summed terms laid side by side, [high, high, low] by [high, low, high]

constexpr int kColumns = 64;         // of a tile; 8 warps of 16 rows
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
    lora_score_any(int64_t outputs, int64_t inputs, int64_t rank, bool aligned, const T* weight,
                   const __nv_bfloat16* left, const __nv_bfloat16* right, float* partials) {
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
    const auto* w = static_cast<const T*>(weight);
    const dim3 grid(blocks(ceil_divide(outputs, kRows)), blocks(ceil_divide(inputs, kBlockColumns)));
    if (inputs % 8 == 0 && aligned(weight, 16) && aligned(a, 16) && aligned(grad_a, 16) && rank <= kSlot * kMostSlots) {
      const Factors<T> factors{outputs, inputs, rank, scale, w, a, b, grad_a, grad_b};
      return rank <= kSlot       ? launch_score<T, 1>(grid, dim, s, factors, partials)
             : rank <= 2 * kSlot ? launch_score<T, 2>(grid, dim, s, factors, partials)
                                 : launch_score<T, 4>(grid, dim, s, factors, partials);
    }
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
    const bool rows_aligned = aligned(weight, 16) && inputs * sizeof(T) % 16 == 0;
    return launch(dim == 0 ? lora_score_any<T, 0> : lora_score_any<T, 1>, grid, kThreads, kSharedBytes, s, outputs,
                  inputs, rank, rows_aligned, w, left, right, partials);
  });
}

}  // namespace pyprune
