// HSM and HSM + residual + RMSNorm on tensor cores, forward and backward. The contract is in hsm_fused.h.
//
// Each product has one narrow side r = d / 20. Forward does two of them, 4 r operations per element of x, against 4
// bytes (x in, y out): 104 a byte at r = 104. An H100 offers about 180 (3.35 TB/s; assuming 600 TFLOP/s by mma.sync),
// so these kernels are bound by memory, though not by far, and are designed to read x, residual and grad_y as few times
// as possible, in 16-byte pieces, with enough of them in flight. Figures below are for bf16, T tokens, n = d.
//
//   hsm_forward:           project (reads x, writes h and h*v), expand (reads x, writes y)
//   + residual + rmsnorm:  the same, expand adding the residual and squares, then normalise
//   hsm_backward:          scale_rows, project (reads grad_y, writes u*v), expand (reads grad_y and x, writes grad_x)
//   rmsnorm_backward:      one kernel over rows
//
// Sums over rows or over d are split over blocks and finished by a second kernel in a fixed order: no atomics.
#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include "device.cuh"
#include "hsm_fused.h"
#include "launch.h"
#include "ptx.cuh"

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 64;        // Of a block's output tile.
constexpr int kTileColumns = 128;    // Of a block's output tile: 8 warps, 2 x 4, of 32 x 32 each.
constexpr int kStageRowBytes = 128;  // Depth of one pipeline stage: 64 16-bit or 32 fp32 elements.
constexpr int kLeftBytes = kTileRows * kStageRowBytes;
constexpr int kStageBytes = kLeftBytes + kTileColumns * kStageRowBytes;
constexpr int kProjectStages = 4;
constexpr int kExpandRowBytes = 256;  // Depth of expand's one stage: all of r up to 128 16-bit or 64 fp32 elements.
constexpr int kExpandLeftBytes = kTileRows * kExpandRowBytes;
constexpr int kExpandStageBytes = kExpandLeftBytes + kTileColumns * kExpandRowBytes;
constexpr int kExpandBlocks = 2;    // Per SM.
constexpr int kQuadColumns = 8;     // Of a lane in expand's epilogue: the four lanes of a quad have a warp's 32.
constexpr int kSquareColumns = 32;  // Columns in one partial sum of squares.
constexpr int kFinishRows = 8;      // Rows per block of project_finish.
constexpr int kNormaliseColumns = 2048;
constexpr int kMaxRowsPerBlock = 64;  // Of rms_backward.
constexpr int kHeldPieces = 4;        // 16-byte pieces of each input that a thread of rms_backward_held holds at most.
constexpr int kSumThreads = 1024;     // Of sum_rows.

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // Elements in a 16-byte access.

template <typename T>
constexpr int kDepth = kStageRowBytes / sizeof(T);  // Elements of the summed dimension in one pipeline stage.

template <typename T>
constexpr int kExpandDepth = kExpandRowBytes / sizeof(T);

template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
};

using device::ceil_divide;
using device::from_float;
using device::to_float;

// How many of `count` elements from `first` on lie before `end`.
__device__ __forceinline__ int clip(int64_t first, int64_t end, int count) {
  return first + count <= end ? count : first < end ? static_cast<int>(end - first) : 0;
}

// 16 bytes, zero past `valid` elements. kReadOnly promises that this kernel does not write there.
template <bool kReadOnly, typename T>
__device__ __forceinline__ void load_vector(float (&out)[kVector<T>], const T* source, int valid, bool aligned) {
  union {
    uint4 bytes;
    T elements[kVector<T>];
  };
  if (aligned && valid == kVector<T>) {
    bytes = kReadOnly ? __ldg(reinterpret_cast<const uint4*>(source)) : *reinterpret_cast<const uint4*>(source);
  } else {
    for (int i = 0; i < kVector<T>; ++i) elements[i] = i < valid ? source[i] : from_float<T>(0.0f);
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) out[i] = to_float(elements[i]);
}

// kEvictFirst: L2 gives these bytes up before others where it needs room.
template <bool kEvictFirst = false, typename T>
__device__ __forceinline__ void store_vector(T* target, const float (&values)[kVector<T>], int valid, bool aligned) {
  union {
    uint4 bytes;
    T elements[kVector<T>];
  };
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = from_float<T>(values[i]);
  if (aligned && valid == kVector<T>) {
    if constexpr (kEvictFirst) {
      __stcs(reinterpret_cast<uint4*>(target), bytes);
    } else {
      *reinterpret_cast<uint4*>(target) = bytes;
    }
  } else {
    for (int i = 0; i < kVector<T>; ++i) {
      if (i < valid) target[i] = elements[i];
    }
  }
}

// Sum over groups of `width` neighbouring lanes, a power of two; every lane gets its group's.
__device__ __forceinline__ float sum_lanes(float value, int width = 32) {
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// One 64 x 128 tile of a product, summed over a pipeline of cp.async stages
// ---------------------------------------------------------------------------------------------------------------------

// The right factor as it lies in memory: [columns, depth] (l0 in forward: y = x l0^T) or [depth, columns].
enum class Right { kColumnsByDepth, kDepthByColumns };

// Tiles lie in shared memory as rows of 16-byte chunks, the chunk index xor-ed with row % 8: the eight rows of an
// ldmatrix, and the eight threads of a store, then touch different banks without padding.
__device__ __forceinline__ int chunk_offset(int row, int chunk, int row_bytes) {
  return row * row_bytes + ((chunk ^ (row & 7)) << 4);
}

// An order of 32 rows in which rows that lie 8 j + 2 q + e in shared memory (e < 2, q < 4, j < 4) are rows 8 q + 2 j +
// e of the matrix. It exchanges two pairs of bits, so that places add up like the rows. As columns of an mma result, of
// which lane q of a quad has 2 q and 2 q + 1 of every eight, they give it eight neighbours.
__device__ __forceinline__ constexpr int quad_order(int row) { return (row & ~30) | (row >> 2 & 6) | (row << 2 & 24); }

// Copies kRows x kRowBytes of a matrix from (row0, column0) on, with zeros outside; asynchronously where aligned.
template <typename T, int kRows, int kRowBytes, bool kQuadOrder = false>
__device__ __forceinline__ void load_tile(unsigned char* shared, const Matrix<T>& matrix, int64_t row0, int64_t column0,
                                          bool aligned) {
  constexpr int kChunks = kRowBytes / 16, kStep = kThreads / kChunks;
  static_assert(kRows % kStep == 0 && kStep % 8 == 0, "a thread's rows share one column and one swizzle");
  const auto in_matrix = [](int row) { return kQuadOrder ? quad_order(row) : row; };
  const int place = threadIdx.x / kChunks, row = in_matrix(place), chunk = threadIdx.x % kChunks;
  const int64_t column = column0 + chunk * kVector<T>, rows_left = matrix.rows - row0 - row;
  const int valid_columns = clip(column, matrix.columns, kVector<T>);
  const T* source = matrix.data + (row0 + row) * matrix.columns + column;
  unsigned char* target = shared + chunk_offset(place, chunk, kRowBytes);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      const int step = in_matrix(i);
      const bool inside = valid_columns > 0 && step < rows_left;
      ptx::cp_async_16(target + i * kRowBytes, inside ? source + step * matrix.columns : matrix.data, inside ? 16 : 0);
    }
  } else {
#pragma unroll 1  // It is slow anyway, and leaves registers to the other.
    for (int i = 0; i < kRows; i += kStep) {
      const int step = in_matrix(i), valid = step < rows_left ? valid_columns : 0;
      T* elements = reinterpret_cast<T*>(target + i * kRowBytes);
#pragma unroll 1
      for (int e = 0; e < kVector<T>; ++e) {
        elements[e] = e < valid ? source[step * matrix.columns + e] : from_float<T>(0.0f);
      }
    }
  }
}

// What one thread holds of its warp's 32 x 32: [i][j] is the mma result at rows 16 i, columns 8 j (layout in ptx.cuh).
using Accumulator = float[2][4][4];

// Adds one stage, kRowBytes deep, on tensor cores: per k = 16, four ldmatrix and eight mma.
template <typename T, Right kRight, int kRowBytes>
__device__ __forceinline__ void multiply_stage_16bit(Accumulator& sum, const unsigned char* left,
                                                     const unsigned char* right) {
  constexpr int kRightRowBytes = kRight == Right::kColumnsByDepth ? kRowBytes : kTileColumns * sizeof(T);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = warp / 4 * 32, column0 = warp % 4 * 32;
#pragma unroll
  for (int k = 0; k < kRowBytes / static_cast<int>(sizeof(T)); k += 16) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + i * 16 + lane % 16;
      ptx::ldmatrix_x4(a[i], left + chunk_offset(row, k / 8 + lane / 16, kRowBytes));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (kRight == Right::kColumnsByDepth) {
        const int column = column0 + j * 16 + lane / 16 * 8 + lane % 8;
        ptx::ldmatrix_x4(b[j], right + chunk_offset(column, k / 8 + lane / 8 % 2, kRightRowBytes));
      } else {
        const int chunk = column0 / 8 + j * 2 + lane / 16;
        ptx::ldmatrix_x4_trans(b[j], right + chunk_offset(k + lane % 16, chunk, kRightRowBytes));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        ptx::mma_m16n8k16<T>(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// The same in fp32 on the ordinary units: exact products, the order of accumulation of the mma layout.
template <Right kRight, int kRowBytes>
__device__ __forceinline__ void multiply_stage_fp32(Accumulator& sum, const unsigned char* left,
                                                    const unsigned char* right) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = warp / 4 * 32 + lane / 4, column0 = warp % 4 * 32 + lane % 4 * 2;
  const auto at = [](const unsigned char* tile, int row, int column, int row_bytes) {
    return reinterpret_cast<const float*>(tile + chunk_offset(row, column / 4, row_bytes))[column % 4];
  };
#pragma unroll 4
  for (int k = 0; k < kRowBytes / static_cast<int>(sizeof(float)); ++k) {
    float a[4], b[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = at(left, row0 + i * 8, k, kRowBytes);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = column0 + j / 2 * 8 + j % 2;
      if constexpr (kRight == Right::kColumnsByDepth) {
        b[j] = at(right, column, k, kRowBytes);
      } else {
        b[j] = at(right, k, column, kTileColumns * sizeof(float));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i / 2][j / 2][i % 2 * 2 + j % 2] += a[i] * b[j];
    }
  }
}

template <typename T, Right kRight, int kRowBytes>
__device__ __forceinline__ void multiply_stage(Accumulator& sum, const unsigned char* left,
                                               const unsigned char* right) {
  if constexpr (std::is_same_v<T, float>) {
    multiply_stage_fp32<kRight, kRowBytes>(sum, left, right);
  } else {
    multiply_stage_16bit<T, kRight, kRowBytes>(sum, left, right);
  }
}

// The product's tile in shared memory, fp32, for an epilogue that walks it in rows: 16-byte accesses to global memory
// instead of the accumulator layout's 4-byte ones. Four columns of padding keep its writes off each other's banks.
struct Tile {
  static constexpr int kStride = kTileColumns + 4;
  static constexpr int kBytes = kTileRows * kStride * sizeof(float);
  float* values;

  __device__ __forceinline__ float* at(int row, int column) const { return values + row * kStride + column; }
};
static_assert(Tile::kBytes + kThreads * sizeof(float) <= kProjectStages * kStageBytes,
              "the epilogue's tile and column sums reuse the pipeline's memory");

// left[row0 .. + 64, first .. last) times right[.., column0 .. + 128], left in shared memory for all threads to read.
// `first` is a multiple of the stage depth. Call with all threads, none of them still reading `shared`.
template <typename T, Right kRight, int kStages>
__device__ __forceinline__ Tile multiply_tile(unsigned char* shared, const Matrix<T>& left, int64_t row0,
                                              const Matrix<T>& right, int64_t column0, int64_t first, int64_t last,
                                              bool aligned) {
  const int64_t steps = ceil_divide(last - first, kDepth<T>);
  const auto load = [&](int64_t step) {
    if (step < steps) {
      unsigned char* stage = shared + step % kStages * kStageBytes;
      const int64_t depth = first + step * kDepth<T>;
      load_tile<T, kTileRows, kStageRowBytes>(stage, left, row0, depth, aligned);
      if constexpr (kRight == Right::kColumnsByDepth) {
        load_tile<T, kTileColumns, kStageRowBytes>(stage + kLeftBytes, right, column0, depth, aligned);
      } else {
        load_tile<T, kDepth<T>, kTileColumns * sizeof(T)>(stage + kLeftBytes, right, depth, column0, aligned);
      }
    }
    ptx::cp_async_commit();  // Also when empty, so that the wait below can count groups.
  };

  Accumulator sum = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // This stage has arrived for all; all are done with the one that is loaded next.
    load(step + kStages - 1);
    const unsigned char* stage = shared + step % kStages * kStageBytes;
    multiply_stage<T, kRight, kStageRowBytes>(sum, stage, stage + kLeftBytes);
  }
  __syncthreads();  // The last stages are read; only empty groups are in flight.

  const Tile tile{reinterpret_cast<float*>(shared)};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = warp / 4 * 32 + i * 16 + lane / 4, column = warp % 4 * 32 + j * 8 + lane % 4 * 2;
      tile.at(row, column)[0] = sum[i][j][0];
      tile.at(row, column)[1] = sum[i][j][1];
      tile.at(row + 8, column)[0] = sum[i][j][2];
      tile.at(row + 8, column)[1] = sum[i][j][3];
    }
  }
  __syncthreads();
  return tile;
}

// ---------------------------------------------------------------------------------------------------------------------
// project: the narrow product, [T, d] times l0^T or [T, n] times (mask * l1), to [T, r]
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
struct Project {
  Matrix<T> left, right;
  int64_t rank;
  int64_t steps_per_split;  // Pipeline stages of one split.
  const float* v;
  const T* h;     // Backward's input.
  T* plain;       // Forward: h. Backward: not written.
  T* scaled;      // Forward: h * v. Backward: u * v.
  float* sums;    // Splits: partial products [splits, T, r].
  float* v_sums;  // Backward: partial grad_v [row blocks, r].
  bool aligned;
};

// Rounds and scales a block of rows of the product, value(row, column) in fp32; 128 columns from column0 on.
// `shared` holds kThreads floats that nothing else uses.
template <bool kBackward, int kRows, typename T, typename Value>
__device__ __forceinline__ void finish_projection(const Project<T>& p, int64_t row_block, int64_t column0,
                                                  float* shared, Value value) {
  const int column = threadIdx.x % kTileColumns;
  constexpr int kStep = kThreads / kTileColumns, kGroup = 4;  // Rows that a thread has in flight.
  static_assert(kRows % (kStep * kGroup) == 0);
  const bool inside = column0 + column < p.rank;
  const float v = inside ? p.v[column0 + column] : 0.0f;
  float v_sum = 0.0f;
  for (int row0 = threadIdx.x / kTileColumns; row0 < kRows; row0 += kStep * kGroup) {
    const int64_t first = row_block * kRows + row0;
    float u[kGroup], before[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t token = first + i * kStep;
      const bool exists = inside && token < p.left.rows;
      u[i] = exists ? value(row0 + i * kStep, column) : 0.0f;
      if constexpr (kBackward) before[i] = exists ? to_float(p.h[token * p.rank + column0 + column]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t token = first + i * kStep, at = token * p.rank + column0 + column;
      if (!inside || token >= p.left.rows) continue;
      if constexpr (kBackward) {
        p.scaled[at] = from_float<T>(u[i] * v);
        v_sum += before[i] * u[i];
      } else {
        const T h = from_float<T>(u[i]);  // What backward will read is what y is made of.
        p.plain[at] = h;
        p.scaled[at] = from_float<T>(to_float(h) * v);
      }
    }
  }
  if constexpr (kBackward) {
    shared[threadIdx.x] = v_sum;
    __syncthreads();
    if (threadIdx.x < kTileColumns && inside) {
      p.v_sums[row_block * p.rank + column0 + column] = shared[column] + shared[column + kTileColumns];
    }
  }
}

// Bytes: T d for x, r d for l0 once per 64 rows from L2 (2048 x 104 x 2 = 0.4 MB), T r to write. Operations: 2 T d r.
// Floor at T = d = 2048: 8.4 MB, 2.5 us on an H100. Shared memory 96 KB (four stages of 24 KB: 24 KB of x in flight),
// so one or two blocks per SM; where T / 64 blocks do not fill the machine, d is split over more of them, which costs
// 8 T r bytes per split (L2).
// Grid: row blocks x column blocks, column fastest so that neighbours share x; y: splits.
template <typename T, bool kBackward, bool kSplit>
__global__ void __launch_bounds__(kThreads, 2) project(Project<T> p) {
  PYPRUNE_SHARED_MEMORY(shared);
  constexpr Right kRight = kBackward ? Right::kDepthByColumns : Right::kColumnsByDepth;
  const int64_t column_blocks = ceil_divide(p.rank, kTileColumns);
  const int64_t row_block = blockIdx.x / column_blocks, column0 = blockIdx.x % column_blocks * kTileColumns;
  const int64_t row0 = row_block * kTileRows;
  const int64_t depth_per_split = p.steps_per_split * kDepth<T>;
  const int64_t first = blockIdx.y * depth_per_split;
  const int64_t last = first + depth_per_split < p.left.columns ? first + depth_per_split : p.left.columns;
  const Tile tile =
      multiply_tile<T, kRight, kProjectStages>(shared, p.left, row0, p.right, column0, first, last, p.aligned);
  if constexpr (kSplit) {
    float* sums = p.sums + (static_cast<int64_t>(blockIdx.y) * p.left.rows + row0) * p.rank + column0;
    for (int i = threadIdx.x; i < kTileRows * kTileColumns; i += kThreads) {
      const int row = i / kTileColumns, column = i % kTileColumns;
      if (row0 + row < p.left.rows && column0 + column < p.rank) sums[row * p.rank + column] = *tile.at(row, column);
    }
  } else {
    finish_projection<kBackward, kTileRows>(p, row_block, column0, reinterpret_cast<float*>(shared + Tile::kBytes),
                                            [&](int row, int column) { return *tile.at(row, column); });
  }
}

// Adds the splits in order. Bytes: 4 T r per split, from L2: little, so that latency is what counts, and a thread asks
// for all splits of its four rows at once. Grid: blocks of 8 rows, blocks of 128 columns.
template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads) project_finish(Project<T> p, int splits) {
  PYPRUNE_SHARED_MEMORY(shared);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kFinishRows, column0 = blockIdx.y * kTileColumns;
  const auto value = [&](int row, int column) {
    const float* sums = p.sums + (row0 + row) * p.rank + column0 + column;
    float sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) sum += __ldg(sums + split * p.left.rows * p.rank);
    return sum;
  };
  finish_projection<kBackward, kFinishRows>(p, blockIdx.x, column0, reinterpret_cast<float*>(shared), value);
}

// ---------------------------------------------------------------------------------------------------------------------
// expand: the wide product, (h * v) l1^T or (u * v) l0, with everything that happens to its elements
// ---------------------------------------------------------------------------------------------------------------------

// Of RMSNorm over the rows of `input` [T, n], given sums of squares over kSquareColumns columns each.
template <typename T>
struct Normalise {
  const T* input;
  const float* squares;  // [T, ceil(n / 32)]
  const T* weight;
  T* output;
  float* rstd;
  int64_t tokens, columns;
  float eps;
  bool aligned;
};

// One warp per row: rstd from the partial sums, in their order, then columns [first, last).
template <typename T>
__device__ __forceinline__ void normalise_rows(const Normalise<T>& p, int64_t row0, int rows, int64_t first,
                                               int64_t last) {
  const int lane = threadIdx.x % 32;
  const int64_t parts = ceil_divide(p.columns, kSquareColumns);
  for (int row = threadIdx.x / 32; row < rows && row0 + row < p.tokens; row += kWarps) {
    const int64_t token = row0 + row;
    float square = 0.0f;
    for (int64_t part = lane; part < parts; part += 32) square += p.squares[token * parts + part];
    const float rstd = rsqrtf(sum_lanes(square) / p.columns + p.eps);
    if (lane == 0 && first == 0) p.rstd[token] = rstd;
    for (int64_t column = first + lane * kVector<T>; column < last; column += 32 * kVector<T>) {
      const int valid = clip(column, last, kVector<T>);
      float values[kVector<T>], weight[kVector<T>];
      // Not a read-only load: in the fused kernel this block has just written the row.
      load_vector<false>(values, p.input + token * p.columns + column, valid, p.aligned);
      load_vector<true>(weight, p.weight + column, valid, p.aligned);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) values[i] = values[i] * rstd * weight[i];
      store_vector(p.output + token * p.columns + column, values, valid, p.aligned);
    }
  }
}

// Bytes: 2 T n, the read from L2 where T n fits it. Grid: blocks of 8 rows, of 2048 columns.
template <typename T>
__global__ void __launch_bounds__(kThreads) normalise(Normalise<T> p) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kNormaliseColumns;
  const int64_t last = first + kNormaliseColumns < p.columns ? first + kNormaliseColumns : p.columns;
  normalise_rows(p, static_cast<int64_t>(blockIdx.x) * kWarps, kWarps, first, last);
}

enum class Epilogue {
  kMask,      // out = mask * (x + z)
  kResidual,  // out = other + mask * (x + z), and its squares' sums
  kGradient,  // out = mask * other (0 past n) + z, and the column sums of other * x
};

template <typename T>
struct Expand {
  Matrix<T> left, right;
  int64_t columns;  // Of out.
  int64_t other_columns;
  int64_t x_columns;
  const T* x;
  const float* mask;
  const T* other;  // residual or grad_y
  T* out;
  float* sums;        // kResidual: squares [T, ceil(n / 32)]. kGradient: [row groups, n], or null.
  bool owns_rows;     // A block takes all columns of its rows, and normalises them. kResidual only.
  Normalise<T> norm;  // For that.
  bool aligned;
};

// Bytes in which a thread of expand receives its part of each tile that the epilogue reads, ahead of time. Not in fp32,
// where the products take longer than the bytes and shared memory is short.
template <typename T>
constexpr int kAheadBytes = sizeof(T) == 2 ? kTileRows * kTileColumns * 2 : 0;

template <typename T, Epilogue kEpilogue>
constexpr int kExpandBytes = kExpandStageBytes + (kEpilogue == Epilogue::kMask ? 1 : 2) * kAheadBytes<T>;

// Gives lane q of a quad columns 8 q .. + 8 of its warp's 32, as quad_order does where it can be had: of each four
// pairs that the quad's lanes hold, lane q keeps its own and takes the q-th of the others.
__device__ __forceinline__ void exchange_in_quads(Accumulator& sum) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j & bit) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float &low = sum[i][j][e], &up = sum[i][j | bit][e];
          const float received = __shfl_xor_sync(0xffffffffu, high ? low : up, bit);
          (high ? low : up) = received;
        }
      }
    }
  }
}

// Bytes (T n each): kMask reads x, writes y; kResidual reads x and residual, writes the sum (and normed, re-reading the
// sum); kGradient reads grad_y and, for column_dot, x, writes grad_x. Operations: 2 T n r. Floor at T = n = 2048 on an
// H100: 5.0, 7.5 (10 with normed), 7.5 us.
// A block walks through tiles: down the rows of one block of columns, all columns at about the same rows at a time, or,
// where it owns its rows, through their columns. The factor that stays the same (up to r = 128 in 16 bits) is loaded
// once: from L2 come 13 KB a tile (r = 104) going down, 27 KB otherwise. The next tile's other factor is on its way
// during the epilogue, and its x and residual or grad_y (16 KB each in 16 bits) from the moment at which the thread
// that asks for them has used up those of this tile: each thread copies what it will read itself, so that this needs no
// barrier. Results leave from registers: four lanes write 64 bytes of a row, in 16-byte pieces.
// Rows go from the last to the first: where L2 cannot hold everything, it may hold the rows that project read last, and
// normalise, which goes the other way, starts with those of the sum that were written last.
// Shared memory 48 KB, and 16 KB for each input that is asked for ahead; two blocks per SM on sm_80, 90 and 100, one on
// sm_120. Grid: row groups x column blocks, column fastest; or row blocks.
template <typename T, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, kExpandBlocks) expand(Expand<T> p) {
  PYPRUNE_SHARED_MEMORY(shared);
  constexpr Right kRight = kEpilogue == Epilogue::kGradient ? Right::kDepthByColumns : Right::kColumnsByDepth;
  constexpr int kParts = kQuadColumns / kVector<T>;  // 16-byte pieces of a lane in a row.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tokens = p.left.rows, row_blocks = ceil_divide(tokens, kTileRows);
  const int64_t column_blocks = ceil_divide(p.columns, kTileColumns);
  const bool owns_rows = kEpilogue == Epilogue::kResidual && p.owns_rows;
  const int64_t group = owns_rows ? blockIdx.x : blockIdx.x / column_blocks;
  const int64_t groups = gridDim.x / column_blocks;
  const int64_t tiles = owns_rows ? column_blocks : ceil_divide(row_blocks - group, groups);
  const auto row_of = [&](int64_t tile) {
    return (row_blocks - 1 - group - (owns_rows ? 0 : tile * groups)) * kTileRows;
  };
  const auto column_of = [&](int64_t tile) { return (owns_rows ? tile : blockIdx.x % column_blocks) * kTileColumns; };

  const int64_t steps = p.left.columns > 0 ? ceil_divide(p.left.columns, kExpandDepth<T>) : 1;
  unsigned char* const right = shared + kExpandLeftBytes;
  const auto load_factors = [&](int64_t tile, int64_t step) {
    const int64_t depth = step * kExpandDepth<T>;
    if (tile == 0 || steps > 1 || !owns_rows)
      load_tile<T, kTileRows, kExpandRowBytes>(shared, p.left, row_of(tile), depth, p.aligned);
    if (tile == 0 || steps > 1 || owns_rows) {
      if constexpr (kRight == Right::kColumnsByDepth) {
        load_tile<T, kTileColumns, kExpandRowBytes, true>(right, p.right, column_of(tile), depth, p.aligned);
      } else {
        load_tile<T, kExpandDepth<T>, kTileColumns * sizeof(T)>(right, p.right, depth, column_of(tile), p.aligned);
      }
    }
  };

  // This lane's part of a tile: eight columns of rows 0, 8, 16 and 24 of its warp's 32.
  const int lane_row = warp / 4 * 32 + lane / 4, lane_column = warp % 4 * 32 + lane % 4 * kQuadColumns;
  const bool reads_x = kEpilogue != Epilogue::kGradient || p.sums != nullptr;
  const bool ahead = kAheadBytes<T> > 0 && p.aligned;
  unsigned char* const mine = shared + kExpandStageBytes + threadIdx.x * 16;
  const auto ask = [&](int64_t tile, int piece) {
    const int64_t token = row_of(tile) + lane_row + piece * 8, column = column_of(tile) + lane_column;
    const bool inside = token < tokens && column < p.other_columns;
    unsigned char* const target = mine + piece * (kThreads * 16);
    if (reads_x) ptx::cp_async_16(target, inside ? p.x + token * p.x_columns + column : p.x, inside ? 16 : 0);
    if constexpr (kEpilogue != Epilogue::kMask) {
      ptx::cp_async_16(target + kAheadBytes<T>, inside ? p.other + token * p.other_columns + column : p.other,
                       inside ? 16 : 0);
    }
  };

  load_factors(0, 0);
  ptx::cp_async_commit();
  if (ahead) {
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) ask(0, piece);
  }
  ptx::cp_async_commit();

  float sums[kQuadColumns] = {};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row0 = row_of(tile) + lane_row, column0 = column_of(tile) + lane_column;
    Accumulator z = {};
    for (int64_t step = 0; step < steps; ++step) {
      ptx::cp_async_wait<1>();  // The factors: only what was asked for ahead is younger.
      __syncthreads();          // They have arrived for all.
      multiply_stage<T, kRight, kExpandRowBytes>(z, shared, right);
      __syncthreads();  // They are read, and may be overwritten.
      if (step + 1 < steps) {
        load_factors(tile, step + 1);
        ptx::cp_async_commit();  // And an empty group, for the wait above.
      } else if (tile + 1 < tiles) {
        load_factors(tile + 1, 0);
      }
      ptx::cp_async_commit();
    }
    if constexpr (kRight == Right::kDepthByColumns) exchange_in_quads(z);

    float mask[kQuadColumns];
#pragma unroll
    for (int i = 0; i < kQuadColumns; ++i) mask[i] = column0 + i < p.other_columns ? __ldg(p.mask + column0 + i) : 0.0f;
    ptx::cp_async_wait<1>();  // What was asked for ahead: only the next tile's factors are younger.
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      const int64_t token = row0 + piece * 8;
      const bool inside = token < tokens;
      float square = 0.0f;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int first = part * kVector<T>;
        const int64_t column = column0 + first;
        const int valid = inside ? clip(column, p.columns, kVector<T>) : 0;
        const int other_valid = inside ? clip(column, p.other_columns, kVector<T>) : 0;
        float x[kVector<T>] = {}, other[kVector<T>] = {}, out[kVector<T>];
        if (ahead) {
          const unsigned char* const source = mine + piece * (kThreads * 16);
          if (reads_x) load_vector<false>(x, reinterpret_cast<const T*>(source), kVector<T>, true);
          if constexpr (kEpilogue != Epilogue::kMask)
            load_vector<false>(other, reinterpret_cast<const T*>(source + kAheadBytes<T>), kVector<T>, true);
          if (tile + 1 < tiles) ask(tile + 1, piece);
        } else {
          if (reads_x) load_vector<true>(x, p.x + token * p.x_columns + column, other_valid, p.aligned);
          if constexpr (kEpilogue != Epilogue::kMask)
            load_vector<true>(other, p.other + token * p.other_columns + column, other_valid, p.aligned);
        }
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          const int at = first + i;
          const float product = z[piece / 2][at / 2][piece % 2 * 2 + at % 2];
          if constexpr (kEpilogue == Epilogue::kMask) {
            out[i] = mask[at] * (x[i] + product);
          } else if constexpr (kEpilogue == Epilogue::kResidual) {
            out[i] = to_float(from_float<T>(other[i] + mask[at] * (x[i] + product)));
            square += out[i] * out[i];
          } else {
            out[i] = mask[at] * other[i] + product;
            sums[at] += other[i] * x[i];
          }
        }
        // Makes room of itself rather than of the x or grad_y that project has left in L2; normalise reads the sum.
        store_vector<kEpilogue != Epilogue::kResidual>(p.out + token * p.columns + column, out, valid, p.aligned);
      }
      if constexpr (kEpilogue == Epilogue::kResidual) {
        square = sum_lanes(square, 4);
        if (inside && lane % 4 == 0 && column0 < p.columns)
          p.sums[token * ceil_divide(p.columns, kSquareColumns) + column0 / kSquareColumns] = square;
      }
    }
    ptx::cp_async_commit();
  }

  if constexpr (kEpilogue == Epilogue::kResidual) {
    if (!owns_rows) return;
    __syncthreads();  // The squares and the sums are written.
    normalise_rows(p.norm, row_of(0), kTileRows, 0, p.columns);
  }
  if constexpr (kEpilogue == Epilogue::kGradient) {
    if (p.sums == nullptr) return;
    float* const halves = reinterpret_cast<float*>(shared);  // Of the two rows of warps. The last factors are read.
#pragma unroll
    for (int i = 0; i < kQuadColumns; ++i) {
      for (int step = 4; step < 32; step *= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
      if (lane < 4) halves[warp / 4 * kTileColumns + lane_column + i] = sums[i];
    }
    __syncthreads();
    const int64_t column = column_of(0) + threadIdx.x;
    if (threadIdx.x < kTileColumns && column < p.other_columns)
      p.sums[group * p.other_columns + column] = halves[threadIdx.x] + halves[kTileColumns + threadIdx.x];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The rest of backward
// ---------------------------------------------------------------------------------------------------------------------

// out = scale[:, None] * matrix. Bytes: 2 n r.
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_rows(Matrix<T> matrix, const float* scale, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < matrix.rows * matrix.columns) out[i] = from_float<T>(scale[i / matrix.columns] * to_float(matrix.data[i]));
}

// out[c] = sum of parts[:, c], fp32, in a fixed order. Bytes: 4 rows columns, a few hundred rows at most: many warps
// with eight rows each in flight, for latency. Grid: blocks of 32 columns.
__global__ void __launch_bounds__(kSumThreads) sum_rows(Matrix<float> parts, float* out) {
  PYPRUNE_SHARED_MEMORY(shared);
  constexpr int kSumWarps = kSumThreads / 32;
  float* sums = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (column < parts.columns) {
#pragma unroll 8
    for (int64_t row = warp; row < parts.rows; row += kSumWarps)
      sum += __ldg(parts.data + row * parts.columns + column);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= parts.columns) return;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSumWarps; ++i) sum += sums[i * 32 + lane];
  out[column] = sum;
}

template <typename T>
struct RmsBackward {
  const T *grad_output, *grad_normed, *input, *weight;  // grad_output is that of `input` itself.
  const float* rstd;
  T* grad_input;
  float* weight_sums;  // [row blocks, n]
  int64_t tokens, columns;
  int rows_per_block;
  bool aligned;
};

// Bytes: reads grad_residual_out, grad_normed and residual_out, writes grad_residual: 4 T n, the floor, 10 us for
// T = n = 2048 on an H100. A thread has the same kPieces pieces of 16 bytes of every row, which keeps the column sums
// of grad_weight in its registers, and takes two rows at once where n <= 2048 (in 16 bits), one where n <= 8192. They
// stay in registers while the block adds up the rows' means of a * q, so nothing is read twice; 24 KB in flight per
// block, two or three blocks per SM, one's loads beside the others' sums. Partial sums cost 4 n bytes per block. For
// whole, aligned pieces. Shared memory: a float per row and warp, twice, so that one barrier a step is enough. Grid:
// row blocks.
template <typename T, int kPieces>
__global__ void __launch_bounds__(kThreads, kPieces == kHeldPieces ? 1 : 2) rms_backward_held(RmsBackward<T> p) {
  PYPRUNE_SHARED_MEMORY(shared);
  using Piece = device::Piece<T, kVector<T>>;
  constexpr int kRows = kPieces == 1 ? 2 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * p.rows_per_block;
  const int rows = clip(row0, p.tokens, p.rows_per_block);
  const auto column = [](int piece) { return (piece * kThreads + static_cast<int64_t>(threadIdx.x)) * kVector<T>; };
  Piece weight[kPieces] = {};
  float sums[kPieces][kVector<T>] = {};
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    if (column(piece) < p.columns) weight[piece].load(p.weight + column(piece));
  }

  for (int row = 0; row < rows; row += kRows) {
    Piece grad[kRows][kPieces] = {}, input[kRows][kPieces] = {}, out[kRows][kPieces] = {};
    float rstd[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool exists = row + i < rows;
      rstd[i] = exists ? __ldg(p.rstd + row0 + row + i) : 0.0f;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int64_t at = (row0 + row + i) * p.columns + column(piece);
        if (!exists || column(piece) >= p.columns) continue;
        grad[i][piece].load(p.grad_normed + at);
        input[i][piece].load(p.input + at);
        out[i][piece].load(p.grad_output + at);
      }
    }

    float* parts = reinterpret_cast<float*>(shared) + row / kRows % 2 * (kRows * kWarps);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          sum += to_float(weight[piece].elements[e]) * to_float(grad[i][piece].elements[e]) *
                 to_float(input[i][piece].elements[e]);
        }
      }
      sum = sum_lanes(sum);
      if (lane == 0) parts[i * kWarps + warp] = sum;
    }
    __syncthreads();  // The parts are there, and the other half's, of the step before, are read.

#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float mean = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) mean += parts[i * kWarps + w];
      mean *= rstd[i] / p.columns;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          const float g = to_float(grad[i][piece].elements[e]),
                      normal = to_float(input[i][piece].elements[e]) * rstd[i];
          sums[piece][e] += g * normal;
          out[i][piece].elements[e] =
              from_float<T>(to_float(out[i][piece].elements[e]) +
                            rstd[i] * (to_float(weight[piece].elements[e]) * g - normal * mean));
        }
        if (row + i < rows && column(piece) < p.columns)
          out[i][piece].store(p.grad_input + (row0 + row + i) * p.columns + column(piece));
      }
    }
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    if (column(piece) >= p.columns) continue;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) p.weight_sums[blockIdx.x * p.columns + column(piece) + e] = sums[piece][e];
  }
}

// The same for rows of any length and alignment. A block's rows are read twice, the second time from L2: first one warp
// per row for the mean of a * q, then one thread per 16 bytes of columns down the rows.
// Shared memory: one float per row. Grid: row blocks.
template <typename T>
__global__ void __launch_bounds__(kThreads) rms_backward(RmsBackward<T> p) {
  PYPRUNE_SHARED_MEMORY(shared);
  float* means = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * p.rows_per_block;
  const int rows = clip(row0, p.tokens, p.rows_per_block);
  float grad[kVector<T>], input[kVector<T>], weight[kVector<T>];

  for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
    const int64_t start = (row0 + row) * p.columns;
    float sum = 0.0f;
    for (int64_t column = lane * kVector<T>; column < p.columns; column += 32 * kVector<T>) {
      const int valid = clip(column, p.columns, kVector<T>);
      load_vector<true>(grad, p.grad_normed + start + column, valid, p.aligned);
      load_vector<true>(input, p.input + start + column, valid, p.aligned);
      load_vector<true>(weight, p.weight + column, valid, p.aligned);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sum += weight[i] * grad[i] * input[i];
    }
    sum = sum_lanes(sum);
    if (lane == 0) means[row] = sum * p.rstd[row0 + row] / p.columns;
  }
  __syncthreads();

  for (int64_t column = threadIdx.x * kVector<T>; column < p.columns; column += kThreads * kVector<T>) {
    const int valid = clip(column, p.columns, kVector<T>);
    float sums[kVector<T>] = {}, out[kVector<T>];
    load_vector<true>(weight, p.weight + column, valid, p.aligned);
    for (int row = 0; row < rows; ++row) {
      const int64_t at = (row0 + row) * p.columns + column;
      const float rstd = p.rstd[row0 + row];
      load_vector<true>(grad, p.grad_normed + at, valid, p.aligned);
      load_vector<true>(input, p.input + at, valid, p.aligned);
      load_vector<true>(out, p.grad_output + at, valid, p.aligned);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        const float normal = input[i] * rstd;
        out[i] += rstd * (weight[i] * grad[i] - normal * means[row]);
        sums[i] += grad[i] * normal;
      }
      store_vector(p.grad_input + at, out, valid, p.aligned);
    }
    for (int i = 0; i < valid; ++i) p.weight_sums[blockIdx.x * p.columns + column + i] = sums[i];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side: plans, scratch, launches
// ---------------------------------------------------------------------------------------------------------------------

// Gives out pieces of the caller's scratch; from a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_divide(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 256;
  unsigned char* base_;
  int64_t used_ = 0;
};

// How a projection to [tokens, rank] over `depth` is cut: into as many blocks as there are SMs, if it is long enough.
struct ProjectPlan {
  int64_t row_blocks, column_blocks, steps_per_split, splits;

  ProjectPlan(int64_t tokens, int64_t depth, int64_t rank, int64_t stage_depth, int processors)
      : row_blocks(ceil_divide(tokens, kTileRows)), column_blocks(ceil_divide(rank, kTileColumns)) {
    const int64_t steps = depth > 0 ? ceil_divide(depth, stage_depth) : 1;
    const int64_t blocks = row_blocks * column_blocks;
    const int64_t wanted = blocks > 0 && blocks < processors ? processors / blocks : 1;
    steps_per_split = ceil_divide(steps, wanted < steps ? wanted : steps);
    splits = ceil_divide(steps, steps_per_split);
  }
  int64_t v_sum_rows(int64_t tokens) const { return splits > 1 ? ceil_divide(tokens, kFinishRows) : row_blocks; }
};

// How the tiles of expand are dealt to blocks: each takes one block of columns, of every `groups`-th block of rows. As
// many groups as fill every SM once, and of those as few as leave no block with a row block more.
struct ExpandPlan {
  int64_t row_blocks, column_blocks, groups;

  ExpandPlan(int64_t tokens, int64_t columns, int processors)
      : row_blocks(ceil_divide(tokens, kTileRows)), column_blocks(ceil_divide(columns, kTileColumns)), groups(0) {
    if (row_blocks == 0 || column_blocks == 0) return;
    const int64_t wanted = std::max<int64_t>(kExpandBlocks * processors / column_blocks, 1);
    groups = ceil_divide(row_blocks, ceil_divide(row_blocks, wanted));
  }
};

int64_t rms_rows_per_block(int64_t tokens, int processors) {
  const int64_t rows = ceil_divide(tokens, 2 * processors);
  return rows < kWarps             ? kWarps
         : rows > kMaxRowsPerBlock ? kMaxRowsPerBlock
                                   : ceil_divide(rows, kHeldPieces) * kHeldPieces;
}

template <typename T>
struct ForwardScratch {
  ProjectPlan plan;
  T* scaled;
  float *sums, *squares;

  ForwardScratch(Workspace& space, const HsmShape& s, int processors)
      : plan(s.tokens, s.hidden, s.rank, kDepth<T>, processors),
        scaled(space.take<T>(s.tokens * s.rank)),
        sums(space.take<float>(plan.splits > 1 ? plan.splits * s.tokens * s.rank : 0)),
        squares(space.take<float>(s.tokens * ceil_divide(s.outputs, kSquareColumns))) {}
};

template <typename T>
struct BackwardScratch {
  ProjectPlan plan;
  ExpandPlan expand_plan;
  T* masked;
  float *sums, *v_sums, *column_sums;

  BackwardScratch(Workspace& space, const HsmShape& s, int processors)
      : plan(s.tokens, s.outputs, s.rank, kDepth<T>, processors),
        expand_plan(s.tokens, s.hidden, processors),
        masked(space.take<T>(s.outputs * s.rank)),
        sums(space.take<float>(plan.splits > 1 ? plan.splits * s.tokens * s.rank : 0)),
        v_sums(space.take<float>(plan.v_sum_rows(s.tokens) * s.rank)),
        column_sums(space.take<float>(expand_plan.groups * s.outputs)) {}
};

struct RmsScratch {
  int64_t rows_per_block, row_blocks;
  float* weight_sums;

  RmsScratch(Workspace& space, const HsmShape& s, int processors)
      : rows_per_block(rms_rows_per_block(s.tokens, processors)),
        row_blocks(ceil_divide(s.tokens, rows_per_block)),
        weight_sums(space.take<float>(row_blocks * s.outputs)) {}
};

// Whether rows of every given length are whole 16-byte pieces and every pointer starts one.
template <typename T>
bool all_aligned(std::initializer_list<int64_t> lengths, std::initializer_list<const void*> pointers) {
  for (const int64_t length : lengths) {
    if (length % kVector<T> != 0) return false;
  }
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return true;
}

unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

template <typename T, bool kBackward>
cudaError_t run_project(const Project<T>& project_arguments, const ProjectPlan& plan, cudaStream_t stream) {
  Project<T> p = project_arguments;
  p.steps_per_split = plan.steps_per_split;
  const dim3 grid(blocks(plan.row_blocks * plan.column_blocks), blocks(plan.splits));
  constexpr size_t kSharedBytes = kProjectStages * kStageBytes;
  if (plan.splits == 1) return launch(project<T, kBackward, false>, grid, kThreads, kSharedBytes, stream, p);
  const cudaError_t error = launch(project<T, kBackward, true>, grid, kThreads, kSharedBytes, stream, p);
  if (error != cudaSuccess) return error;
  const dim3 finish(blocks(ceil_divide(p.left.rows, kFinishRows)), blocks(plan.column_blocks));
  return launch(project_finish<T, kBackward>, finish, kThreads, kThreads * sizeof(float), stream, p,
                static_cast<int>(plan.splits));
}

template <typename T, Epilogue kEpilogue>
cudaError_t run_expand(const Expand<T>& p, const ExpandPlan& plan, cudaStream_t stream) {
  const int64_t grid = p.owns_rows ? plan.row_blocks : plan.groups * plan.column_blocks;
  return launch(expand<T, kEpilogue>, dim3(blocks(grid)), kThreads, kExpandBytes<T, kEpilogue>, stream, p);
}

cudaError_t run_sum_rows(const float* parts, int64_t rows, int64_t columns, float* out, cudaStream_t stream) {
  return launch(sum_rows, dim3(blocks(ceil_divide(columns, 32))), kSumThreads, kSumThreads * sizeof(float), stream,
                Matrix<float>{parts, rows, columns}, out);
}

cudaError_t count_processors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Checks the shape, then calls body(element type's zero, processors).
template <typename Body>
int with_type(const HsmShape& s, int dtype, Body body) {
  if (s.tokens < 0 || s.rank < 0 || s.outputs < 0 || s.outputs > s.hidden) return cudaErrorInvalidValue;
  int processors = 0;
  const cudaError_t error = count_processors(&processors);
  if (error != cudaSuccess) return error;
  switch (dtype) {
    case kFloat32: return body(float{}, processors);
    case kBFloat16: return body(__nv_bfloat16{}, processors);
    case kFloat16: return body(__half{}, processors);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

int hsm_workspace(HsmShape s, int dtype, int64_t* bytes) {
  return with_type(s, dtype, [&](auto zero, int processors) -> int {
    using T = decltype(zero);
    Workspace forward(nullptr), backward(nullptr), rms(nullptr);
    ForwardScratch<T>(forward, s, processors);
    BackwardScratch<T>(backward, s, processors);
    RmsScratch(rms, s, processors);
    *bytes = std::max({forward.used(), backward.used(), rms.used()});
    return cudaSuccess;
  });
}

namespace {

template <typename T>
Project<T> forward_projection(const HsmShape& s, const ForwardScratch<T>& scratch, const T* x, const T* l0,
                              const float* v, T* h) {
  Project<T> p{};
  p.left = {x, s.tokens, s.hidden};
  p.right = {l0, s.rank, s.hidden};
  p.rank = s.rank;
  p.v = v;
  p.plain = h;
  p.scaled = scratch.scaled;
  p.sums = scratch.sums;
  p.aligned = all_aligned<T>({s.hidden}, {x, l0});
  return p;
}

template <typename T>
Expand<T> forward_expansion(const HsmShape& s, const ForwardScratch<T>& scratch, const T* x, const T* l1,
                            const float* mask, const T* residual, T* out) {
  Expand<T> p{};
  p.left = {scratch.scaled, s.tokens, s.rank};
  p.right = {l1, s.outputs, s.rank};
  p.columns = p.other_columns = s.outputs;
  p.x_columns = s.hidden;
  p.x = x;
  p.mask = mask;
  p.other = residual;
  p.out = out;
  p.sums = scratch.squares;
  p.aligned = all_aligned<T>({s.hidden, s.rank, s.outputs}, {x, l1, scratch.scaled, residual, out});
  return p;
}

}  // namespace

int hsm_forward(HsmShape s, int dtype, const void* x, const void* l0, const float* v, const void* l1, const float* mask,
                void* y, void* h, void* workspace, void* stream) {
  return with_type(s, dtype, [&](auto zero, int processors) -> int {
    using T = decltype(zero);
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto* input = static_cast<const T*>(x);
    Workspace space(workspace);
    const ForwardScratch<T> scratch(space, s, processors);
    const Project<T> narrow = forward_projection(s, scratch, input, static_cast<const T*>(l0), v, static_cast<T*>(h));
    const cudaError_t error = run_project<T, false>(narrow, scratch.plan, queue);
    if (error != cudaSuccess) return error;
    const Expand<T> wide = forward_expansion(s, scratch, input, static_cast<const T*>(l1), mask,
                                             static_cast<const T*>(nullptr), static_cast<T*>(y));
    return run_expand<T, Epilogue::kMask>(wide, ExpandPlan(s.tokens, s.outputs, processors), queue);
  });
}

int hsm_residual_rmsnorm_forward(HsmShape s, int dtype, float eps, const void* x, const void* l0, const float* v,
                                 const void* l1, const float* mask, const void* residual, const void* weight,
                                 void* residual_out, void* normed, void* h, float* rstd, void* workspace,
                                 void* stream) {
  return with_type(s, dtype, [&](auto zero, int processors) -> int {
    using T = decltype(zero);
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto* input = static_cast<const T*>(x);
    auto* sum = static_cast<T*>(residual_out);
    Workspace space(workspace);
    const ForwardScratch<T> scratch(space, s, processors);
    const Project<T> narrow = forward_projection(s, scratch, input, static_cast<const T*>(l0), v, static_cast<T*>(h));
    cudaError_t error = run_project<T, false>(narrow, scratch.plan, queue);
    if (error != cudaSuccess) return error;

    Expand<T> wide =
        forward_expansion(s, scratch, input, static_cast<const T*>(l1), mask, static_cast<const T*>(residual), sum);
    Normalise<T>& norm = wide.norm;
    norm = {sum,
            scratch.squares,
            static_cast<const T*>(weight),
            static_cast<T*>(normed),
            rstd,
            s.tokens,
            s.outputs,
            eps,
            all_aligned<T>({s.outputs}, {sum, weight, normed})};
    // Two blocks per SM keep it busy; with fewer, rows are cut too and normalised by a second kernel.
    const ExpandPlan plan(s.tokens, s.outputs, processors);
    wide.owns_rows = plan.row_blocks >= kExpandBlocks * processors;
    error = run_expand<T, Epilogue::kResidual>(wide, plan, queue);
    if (error != cudaSuccess || wide.owns_rows) return error;
    const dim3 grid(blocks(ceil_divide(s.tokens, kWarps)), blocks(ceil_divide(s.outputs, kNormaliseColumns)));
    return launch(normalise<T>, grid, kThreads, 0, queue, norm);
  });
}

int hsm_backward(HsmShape s, int dtype, const void* grad_y, const void* x, const void* h, const void* l0,
                 const float* v, const void* l1, const float* mask, void* grad_x, void* grad_p, float* grad_v,
                 float* column_dot, void* workspace, void* stream) {
  return with_type(s, dtype, [&](auto zero, int processors) -> int {
    using T = decltype(zero);
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto* grad = static_cast<const T*>(grad_y);
    Workspace space(workspace);
    const BackwardScratch<T> scratch(space, s, processors);
    cudaError_t error = launch(scale_rows<T>, dim3(blocks(ceil_divide(s.outputs * s.rank, kThreads))), kThreads, 0,
                               queue, Matrix<T>{static_cast<const T*>(l1), s.outputs, s.rank}, mask, scratch.masked);
    if (error != cudaSuccess) return error;

    Project<T> narrow{};
    narrow.left = {grad, s.tokens, s.outputs};
    narrow.right = {scratch.masked, s.outputs, s.rank};
    narrow.rank = s.rank;
    narrow.v = v;
    narrow.h = static_cast<const T*>(h);
    narrow.scaled = static_cast<T*>(grad_p);
    narrow.sums = scratch.sums;
    narrow.v_sums = scratch.v_sums;
    narrow.aligned = all_aligned<T>({s.outputs, s.rank}, {grad, scratch.masked});
    error = run_project<T, true>(narrow, scratch.plan, queue);
    if (error != cudaSuccess) return error;
    error = run_sum_rows(scratch.v_sums, scratch.plan.v_sum_rows(s.tokens), s.rank, grad_v, queue);
    if (error != cudaSuccess) return error;

    Expand<T> wide{};
    wide.left = {narrow.scaled, s.tokens, s.rank};
    wide.right = {static_cast<const T*>(l0), s.rank, s.hidden};
    wide.columns = wide.x_columns = s.hidden;
    wide.other_columns = s.outputs;
    wide.x = static_cast<const T*>(x);
    wide.mask = mask;
    wide.other = grad;
    wide.out = static_cast<T*>(grad_x);
    wide.sums = column_dot != nullptr ? scratch.column_sums : nullptr;
    wide.aligned = all_aligned<T>({s.hidden, s.rank, s.outputs}, {x, l0, grad, grad_x, grad_p});
    error = run_expand<T, Epilogue::kGradient>(wide, scratch.expand_plan, queue);
    if (error != cudaSuccess || column_dot == nullptr) return error;
    return run_sum_rows(scratch.column_sums, scratch.expand_plan.groups, s.outputs, column_dot, queue);
  });
}

int rmsnorm_backward(HsmShape s, int dtype, const void* grad_residual_out, const void* grad_normed,
                     const void* residual_out, const float* rstd, const void* weight, void* grad_residual,
                     float* grad_weight, void* workspace, void* stream) {
  return with_type(s, dtype, [&](auto zero, int processors) -> int {
    using T = decltype(zero);
    const auto queue = static_cast<cudaStream_t>(stream);
    Workspace space(workspace);
    const RmsScratch scratch(space, s, processors);
    RmsBackward<T> p{};
    p.grad_output = static_cast<const T*>(grad_residual_out);
    p.grad_normed = static_cast<const T*>(grad_normed);
    p.input = static_cast<const T*>(residual_out);
    p.weight = static_cast<const T*>(weight);
    p.rstd = rstd;
    p.grad_input = static_cast<T*>(grad_residual);
    p.weight_sums = scratch.weight_sums;
    p.tokens = s.tokens;
    p.columns = s.outputs;
    p.rows_per_block = static_cast<int>(scratch.rows_per_block);
    p.aligned = all_aligned<T>({s.outputs}, {grad_residual_out, grad_normed, residual_out, weight, grad_residual});
    const int64_t pieces = ceil_divide(s.outputs, kThreads * kVector<T>);  // Of a thread, in each row.
    const auto kernel = !p.aligned || pieces > kHeldPieces ? rms_backward<T>
                        : pieces <= 1                      ? rms_backward_held<T, 1>
                        : pieces <= 2                      ? rms_backward_held<T, 2>
                                                           : rms_backward_held<T, kHeldPieces>;
    static_assert(2 * kHeldPieces * kWarps <= kMaxRowsPerBlock);
    const cudaError_t error =
        launch(kernel, dim3(blocks(scratch.row_blocks)), kThreads, kMaxRowsPerBlock * sizeof(float), queue, p);
    if (error != cudaSuccess) return error;
    return run_sum_rows(scratch.weight_sums, scratch.row_blocks, s.outputs, grad_weight, queue);
  });
}

}  // namespace pyprune
