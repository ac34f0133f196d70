// HSM and HSM + residual + RMSNorm on tensor cores, forward and backward. The contract is in hsm_fused.h.
//
// Each product has one narrow side r = d / 20. Forward does two of them, 4 r operations per element of x, against 4
// bytes (x in, y out): 104 a byte at r = 104. An H100 offers about 180 (3.35 TB/s; assuming 600 TFLOP/s by mma.sync),
// so these kernels are bound by memory, though not by far, and are designed to read x, residual and grad_y as few times
// as possible, in 16-byte pieces, with enough of them in flight. Figures below are for bf16, T tokens, n = d.
//
// On sm_90 and sm_100, 16-bit, aligned and not too wide, one kernel does each product pair: hsm_cluster, which reads x
// or grad_y once. Everywhere else:
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
constexpr int kExpandStages = 3;
constexpr int kRightBytes = kStageBytes - kLeftBytes;
constexpr int kClusterBlocks = 8;  // The largest portable cluster.
constexpr int kClusterStages = 4;  // Of kRightBytes each.
constexpr int kFinishRows = 8;     // Rows per block of project_finish.
constexpr int kNormaliseColumns = 2048;
constexpr int kMaxRowsPerBlock = 64;  // Of rms_backward.
constexpr int kHeldPieces = 4;        // 16-byte pieces of each input that a thread of rms_backward_held holds at most.
constexpr int kSumThreads = 512;      // Of sum_rows.
constexpr int kSumColumns = 8;        // Of a block of sum_rows.

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // Elements in a 16-byte access.

template <typename T>
constexpr int kDepth = kStageRowBytes / sizeof(T);  // Elements of the summed dimension in one pipeline stage.

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

template <typename T>
__device__ __forceinline__ void store_vector(T* target, const float (&values)[kVector<T>], int valid, bool aligned) {
  union {
    uint4 bytes;
    T elements[kVector<T>];
  };
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = from_float<T>(values[i]);
  if (aligned && valid == kVector<T>) {
    *reinterpret_cast<uint4*>(target) = bytes;
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

// Copies kRows x kRowBytes of a matrix from (row0, column0) on, with zeros outside; asynchronously where aligned.
template <typename T, int kRows, int kRowBytes>
__device__ __forceinline__ void load_tile(unsigned char* shared, const Matrix<T>& matrix, int64_t row0, int64_t column0,
                                          bool aligned) {
  constexpr int kChunks = kRowBytes / 16, kStep = kThreads / kChunks;
  static_assert(kRows % kStep == 0 && kStep % 8 == 0, "a thread's rows share one column and one swizzle");
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const int64_t column = column0 + chunk * kVector<T>, rows_left = matrix.rows - row0 - row;
  const int valid_columns = clip(column, matrix.columns, kVector<T>);
  const T* source = matrix.data + (row0 + row) * matrix.columns + column;
  unsigned char* target = shared + chunk_offset(row, chunk, kRowBytes);
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const int valid = i < rows_left ? valid_columns : 0;
    if (aligned) {
      ptx::cp_async_16(target + i * kRowBytes, valid ? source + i * matrix.columns : matrix.data, valid ? 16 : 0);
    } else {
      T* elements = reinterpret_cast<T*>(target + i * kRowBytes);
      for (int e = 0; e < kVector<T>; ++e) {
        elements[e] = e < valid ? source[i * matrix.columns + e] : from_float<T>(0.0f);
      }
    }
  }
}

// What one thread holds of its warp's 32 x 32: [i][j] is the mma result at rows 16 i, columns 8 j (layout in ptx.cuh).
using Accumulator = float[2][4][4];

// Adds one stage on tensor cores: per k = 16, four ldmatrix and eight mma.
template <typename T, Right kRight>
__device__ __forceinline__ void multiply_stage(Accumulator& sum, const unsigned char* left,
                                               const unsigned char* right) {
  constexpr int kRightRowBytes = kRight == Right::kColumnsByDepth ? kStageRowBytes : kTileColumns * sizeof(T);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = warp / 4 * 32, column0 = warp % 4 * 32;
#pragma unroll
  for (int k = 0; k < kDepth<T>; k += 16) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + i * 16 + lane % 16;
      ptx::ldmatrix_x4(a[i], left + chunk_offset(row, k / 8 + lane / 16, kStageRowBytes));
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
template <Right kRight>
__device__ __forceinline__ void multiply_stage_fp32(Accumulator& sum, const unsigned char* left,
                                                    const unsigned char* right) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = warp / 4 * 32 + lane / 4, column0 = warp % 4 * 32 + lane % 4 * 2;
  const auto at = [](const unsigned char* tile, int row, int column, int row_bytes) {
    return reinterpret_cast<const float*>(tile + chunk_offset(row, column / 4, row_bytes))[column % 4];
  };
#pragma unroll 4
  for (int k = 0; k < kDepth<float>; ++k) {
    float a[4], b[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = at(left, row0 + i * 8, k, kStageRowBytes);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = column0 + j / 2 * 8 + j % 2;
      if constexpr (kRight == Right::kColumnsByDepth) {
        b[j] = at(right, column, k, kStageRowBytes);
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

// The product's tile in shared memory, fp32, for an epilogue that walks it in rows: 16-byte accesses to global memory
// instead of the accumulator layout's 4-byte ones. Four columns of padding keep its writes off each other's banks.
struct Tile {
  static constexpr int kStride = kTileColumns + 4;
  static constexpr int kBytes = kTileRows * kStride * sizeof(float);
  float* values;

  __device__ __forceinline__ float* at(int row, int column) const { return values + row * kStride + column; }
};
static_assert(Tile::kBytes + kThreads * kVector<__half> * sizeof(float) <= kExpandStages * kStageBytes,
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
    if constexpr (std::is_same_v<T, float>) {
      multiply_stage_fp32<kRight>(sum, stage, stage + kLeftBytes);
    } else {
      multiply_stage<T, kRight>(sum, stage, stage + kLeftBytes);
    }
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

// Of RMSNorm over the rows of `input` [T, n], given sums of squares over kTileColumns columns each.
template <typename T>
struct Normalise {
  const T* input;
  const float* squares;  // [T, ceil(n / 128)]
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
  const int64_t parts = ceil_divide(p.columns, kTileColumns);
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
  float* sums;        // kResidual: squares [T, column blocks]. kGradient: [row blocks, n], or null.
  Normalise<T> norm;  // kResidual, used when one block owns whole rows.
  bool aligned;
};

// Turns one tile of z into outputs; thread t has 16 bytes of columns and every (256 / threads per row)-th row.
template <typename T, Epilogue kEpilogue>
__device__ __forceinline__ void expand_epilogue(const Expand<T>& p, const Tile& tile, float* column_sums, int64_t row0,
                                                int64_t column_block) {
  constexpr int kLanes = kTileColumns / kVector<T>, kRowStep = kThreads / kLanes;
  const int64_t tokens = p.left.rows, column0 = column_block * kTileColumns;
  const int tile_column = threadIdx.x % kLanes * kVector<T>;
  const int64_t column = column0 + tile_column;
  const int valid = clip(column, p.columns, kVector<T>);
  const int other_valid = clip(column, p.other_columns, kVector<T>);
  float mask[kVector<T>], sums[kVector<T>] = {};
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) mask[i] = i < other_valid ? p.mask[column + i] : 0.0f;

#pragma unroll 2
  for (int row = threadIdx.x / kLanes; row < kTileRows; row += kRowStep) {
    const int64_t token = row0 + row;
    const bool inside = token < tokens;
    const float* z = tile.at(row, tile_column);
    float x[kVector<T>] = {}, other[kVector<T>] = {}, out[kVector<T>];
    if (kEpilogue != Epilogue::kGradient || p.sums != nullptr)
      load_vector<true>(x, p.x + token * p.x_columns + column, inside ? other_valid : 0, p.aligned);
    if (kEpilogue != Epilogue::kMask)
      load_vector<true>(other, p.other + token * p.other_columns + column, inside ? other_valid : 0, p.aligned);
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if constexpr (kEpilogue == Epilogue::kMask) {
        out[i] = mask[i] * (x[i] + z[i]);
      } else if constexpr (kEpilogue == Epilogue::kResidual) {
        out[i] = to_float(from_float<T>(other[i] + mask[i] * (x[i] + z[i])));
        square += out[i] * out[i];
      } else {
        out[i] = mask[i] * other[i] + z[i];
        sums[i] += other[i] * x[i];
      }
    }
    store_vector(p.out + token * p.columns + column, out, inside ? valid : 0, p.aligned);
    if constexpr (kEpilogue == Epilogue::kResidual) {
      square = sum_lanes(square, kLanes);
      if (inside && threadIdx.x % kLanes == 0)
        p.sums[token * ceil_divide(p.columns, kTileColumns) + column_block] = square;
    }
  }

  if constexpr (kEpilogue == Epilogue::kGradient) {
    if (p.sums == nullptr) return;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) column_sums[threadIdx.x / kLanes * kTileColumns + tile_column + i] = sums[i];
    __syncthreads();
    const int64_t mine = column0 + threadIdx.x;
    if (threadIdx.x < kTileColumns && mine < p.other_columns) {
      float sum = 0.0f;
      for (int i = 0; i < kRowStep; ++i) sum += column_sums[i * kTileColumns + threadIdx.x];
      p.sums[row0 / kTileRows * p.other_columns + mine] = sum;
    }
  }
}

// Bytes (T n each): kMask reads x, writes y; kResidual reads x and residual, writes the sum (and normed, re-reading the
// sum); kGradient reads grad_y and, for column_dot, x, writes grad_x. l1 or l0 comes from L2 once per 64 rows, 0.4 MB
// at n = 2048, r = 104. Operations: 2 T n r. Floor at T = n = 2048 on an H100: 5.0, 7.5 (10 with normed), 7.5 us.
// Shared memory 72 KB (three stages of 24 KB), three blocks per SM on sm_90, two on sm_80, one on sm_120.
// Grid: row blocks; y: column blocks, or 1 for blocks that own whole rows. A kResidual block that owns its rows
// normalises them while they are in L2; otherwise the launcher follows with normalise.
template <typename T, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2) expand(Expand<T> p) {
  PYPRUNE_SHARED_MEMORY(shared);
  constexpr Right kRight = kEpilogue == Epilogue::kGradient ? Right::kDepthByColumns : Right::kColumnsByDepth;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int64_t column_blocks = ceil_divide(p.columns, kTileColumns);
  for (int64_t column_block = blockIdx.y; column_block < column_blocks; column_block += gridDim.y) {
    const Tile tile = multiply_tile<T, kRight, kExpandStages>(
        shared, p.left, row0, p.right, column_block * kTileColumns, 0, p.left.columns, p.aligned);
    expand_epilogue<T, kEpilogue>(p, tile, reinterpret_cast<float*>(shared + Tile::kBytes), row0, column_block);
    __syncthreads();  // The tile is read before the next one's stages overwrite it; the squares are written.
  }
  if constexpr (kEpilogue == Epilogue::kResidual) {
    if (gridDim.y == 1) normalise_rows(p.norm, row0, kTileRows, 0, p.columns);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// hsm_cluster: both products and everything around them, 64 rows by a cluster of blocks
// ---------------------------------------------------------------------------------------------------------------------

// How [tokens, d] is cut: 64 rows to a cluster, of which each block has `width` columns.
struct ClusterPlan {
  int64_t width, blocks, row_blocks, depth, shared_bytes;

  ClusterPlan(int64_t tokens, int64_t columns, int64_t rank)
      : width(ceil_divide(ceil_divide(columns, kClusterBlocks), kTileColumns) * kTileColumns),
        blocks(width > 0 ? ceil_divide(columns, width) : 0),
        row_blocks(ceil_divide(tokens, kTileRows)),
        depth(ceil_divide(rank, kDepth<__half>) * kDepth<__half>),
        shared_bytes(kTileRows * (width + depth) * 2 + kClusterStages * kRightBytes + kTileRows * kScratch * 4) {}

  static constexpr int kScratch = 4;  // Floats per row for the epilogues' sums.
};

template <typename T>
struct Fused {
  Project<T> narrow;  // Its `sums` are not used, `scaled` only in backward.
  Expand<T> wide;     // Its `left` is not used.
  ClusterPlan plan;
};

// Byte of an element in a matrix of kTileRows rows, stored as kTileRows x kStageRowBytes tiles side by side.
template <typename T>
__device__ __forceinline__ int element_offset(int row, int column) {
  constexpr int kShift = kVector<T>;
  return column / kDepth<T> * kLeftBytes + chunk_offset(row, column % kDepth<T> / kShift, kStageRowBytes) +
         column % kShift * static_cast<int>(sizeof(T));
}

// The first two of a sequence of tiles, whose stages are free early: stage of item i: (i + 2) % 4. load(item) asks for
// one and commits, also when there is none. (Loops that stay loops, here and below, for fewer addresses in registers.)
template <typename Load>
__device__ __forceinline__ void start_tiles(const Load& load) {
#pragma unroll 1
  for (int item = 0; item < 2; ++item) load(item);
}

// Runs body(item) for each, with three in flight.
template <typename Load, typename Body>
__device__ __forceinline__ void stream_tiles(int items, const Load& load, const Body& body) {
#pragma unroll 1
  for (int item = -1; item < items; ++item) {
    if (item >= 0) {
      ptx::cp_async_wait<2>();
      __syncthreads();  // This tile has arrived for all; all are done with the one before, whose stage is loaded next.
    }
    load(item + 3);
    if (item >= 0) body(item);
  }
  __syncthreads();  // The ring is free, and what the bodies wrote to shared memory is there.
}

// Adds the blocks' partial products of 64 rows and 128 columns in order, each block some rows, and gives what becomes
// of them, the left factor of the wide product, to all blocks. One thread has four columns of every eighth row.
template <bool kBackward, typename T>
__device__ __forceinline__ void exchange_projection(const Fused<T>& p, int block, int64_t row_block, int64_t column0,
                                                    float* partial, unsigned char* scaled) {
  using Four = device::Piece<T, 4>;
  const int blocks = static_cast<int>(p.plan.blocks), rows_each = (kTileRows + blocks - 1) / blocks;
  const int tile_column = threadIdx.x / 8 * 4;
  const int64_t rank = p.narrow.rank, column = column0 + tile_column;
  const bool exists = column < rank;  // All four, since rows are whole 16-byte pieces.
  float v[4], v_sums[4] = {};
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] = exists ? __ldg(p.narrow.v + column + e) : 0.0f;

#pragma unroll 1
  for (int i = threadIdx.x % 8; i < rows_each; i += 8) {
    const int row = block * rows_each + i;
    if (row >= kTileRows) break;
    device::Piece<float, 4> parts[kClusterBlocks];
    const float* mine = partial + row * kTileColumns + (tile_column ^ (row & 3) << 3);
#pragma unroll
    for (int peer = 0; peer < kClusterBlocks; ++peer) {
      if (peer < blocks) parts[peer].words[0] = *reinterpret_cast<const uint4*>(ptx::map_to_peer(mine, peer));
    }
    float u[4] = {};
#pragma unroll
    for (int peer = 0; peer < kClusterBlocks; ++peer) {
#pragma unroll
      for (int e = 0; e < 4; ++e) u[e] += peer < blocks ? parts[peer].elements[e] : 0.0f;
    }

    const int64_t token = row_block * kTileRows + row, at = token * rank + column;
    const bool inside = exists && token < p.narrow.left.rows;
    Four out;
    if constexpr (kBackward) {
      Four h{};
      if (inside) h.load(p.narrow.h + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out.elements[e] = from_float<T>(u[e] * v[e]);
        v_sums[e] += to_float(h.elements[e]) * u[e];
      }
      if (inside) out.store(p.narrow.scaled + at);
    } else {
      Four h;  // What backward will read is what y is made of.
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        h.elements[e] = from_float<T>(u[e]);
        out.elements[e] = from_float<T>(to_float(h.elements[e]) * v[e]);
      }
      if (inside) h.store(p.narrow.plain + at);
    }
    if (column < p.plan.depth) {
      unsigned char* target = scaled + element_offset<T>(row, static_cast<int>(column));
      for (int peer = 0; peer < blocks; ++peer) out.store(reinterpret_cast<T*>(ptx::map_to_peer(target, peer)));
    }
  }

  if constexpr (kBackward) {
#pragma unroll
    for (int e = 0; e < 4; ++e) v_sums[e] = sum_lanes(v_sums[e], 8);
    if (exists && threadIdx.x % 8 == 0) {
      float* sums = p.narrow.v_sums + (row_block * blocks + block) * rank + column;
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] = v_sums[e];
    }
  }
}

// One 64 x 128 tile of z into the outputs, which take the place of the inputs in `slice`; `other` is the tile of the
// second input. Each thread has the elements of its accumulators, a pair at a time.
template <typename T, Epilogue kEpilogue>
__device__ __forceinline__ void fused_epilogue(const Fused<T>& p, const Accumulator& z, unsigned char* slice,
                                               const unsigned char* other, float* scratch, float (&squares)[2][2],
                                               int64_t row_block, int64_t column0) {
  using Pair = device::Piece<T, 2>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int tile_column = warp % 4 * 32 + j * 8 + lane % 4 * 2;
    const int64_t column = column0 + tile_column;
    const bool inside = column < p.wide.columns, masked = column < p.wide.other_columns;
    float mask[2], sums[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e) mask[e] = masked ? __ldg(p.wide.mask + column + e) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp / 4 * 32 + i * 16 + half * 8 + lane / 4;
        Pair& place = *reinterpret_cast<Pair*>(slice + element_offset<T>(row, tile_column));
        Pair second{};
        if (kEpilogue != Epilogue::kMask && other != nullptr)
          second = *reinterpret_cast<const Pair*>(other + element_offset<T>(row, tile_column));
        Pair out;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float first = masked ? to_float(place.elements[e]) : 0.0f;
          const float extra = to_float(second.elements[e]), product = z[i][j][half * 2 + e];
          if constexpr (kEpilogue == Epilogue::kMask) {
            out.elements[e] = from_float<T>(mask[e] * (first + product));
          } else if constexpr (kEpilogue == Epilogue::kResidual) {
            out.elements[e] = from_float<T>(extra + mask[e] * (first + product));
            const float stored = to_float(out.elements[e]);
            squares[i][half] += inside ? stored * stored : 0.0f;
          } else {
            out.elements[e] = from_float<T>(mask[e] * first + product);
            sums[e] += first * extra;
          }
        }
        place = out;
      }
    }
    if constexpr (kEpilogue == Epilogue::kGradient) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // Over the lanes of a column.
        for (int step = 4; step < 32; step *= 2) sums[e] += __shfl_xor_sync(device::kFullWarp, sums[e], step);
        if (lane < 4) scratch[warp / 4 * kTileColumns + tile_column + e] = sums[e];
      }
    }
  }
  if constexpr (kEpilogue == Epilogue::kGradient) {
    if (other == nullptr) return;
    __syncthreads();
    const int64_t mine = column0 + threadIdx.x;
    if (threadIdx.x < kTileColumns && mine < p.wide.other_columns)
      p.wide.sums[row_block * p.wide.other_columns + mine] = scratch[threadIdx.x] + scratch[threadIdx.x + kTileColumns];
  }
}

// Calls body(row, column, where in the slice) for the block's 16-byte pieces, a warp to a row.
template <typename T, typename Body>
__device__ __forceinline__ void for_pieces(const Fused<T>& p, unsigned char* slice, int64_t row0, int64_t column0,
                                           const Body& body) {
  const int pieces = clip(column0, p.wide.columns, static_cast<int>(p.plan.width)) / kVector<T>;
  for (int row = threadIdx.x / 32; row < kTileRows && row0 + row < p.narrow.left.rows; row += kWarps) {
    for (int piece = threadIdx.x % 32; piece < pieces; piece += 32) {
      const int column = piece * kVector<T>;
      body(row, column, *reinterpret_cast<device::Piece<T, kVector<T>>*>(slice + element_offset<T>(row, column)));
    }
  }
}

// A cluster of up to 8 blocks has 64 rows, each block an eighth of the columns (256 at d = 2048) of x, in shared
// memory.
//   1. Its part of h, over its columns, for 128 of the ranks at a time.
//   2. The blocks add up their parts through distributed shared memory, each an eighth of the rows, and give h * v to
//   all.
//   3. z for its columns, 128 at a time, and y in the place of x; from there to memory in rows. RMSNorm adds up the
//   rows'
//      squares through distributed shared memory and normalises what is still in shared memory.
// Backward is the same with grad_y in the place of x.
// Bytes (T n each): reads x, writes y: 2, the floor; + residual + RMSNorm: 4; backward: 3 (grad_y, x, grad_x). From L2,
// l0 and l1 once per 64 rows: 0.85 MB for 0.5 MB of x and y at d = 2048, r = 104, which with the ldmatrix traffic (16
// KB of shared memory per 16 ranks or columns deep, 128 cycles) is what bounds it beside DRAM. Operations: 4 T d r.
// Shared memory at d = 2048: 32 KB of x, four stages of 16 KB (tiles of l0, l1, residual; the parts of h alias two of
// them while the others already fetch l1), 16 KB of h * v, 1 KB: 113 KB, two blocks per SM, so that one's copies and
// barriers overlap the other's products. Above d = 2048 one block per SM.
// Grid: row blocks x cluster.
template <typename T, Epilogue kEpilogue>
__device__ __forceinline__ void mix_rows(const Fused<T>& p, unsigned char* shared) {
  constexpr bool kBackward = kEpilogue == Epilogue::kGradient;
  constexpr Right kRight = kBackward ? Right::kDepthByColumns : Right::kColumnsByDepth;
  const int blocks = static_cast<int>(p.plan.blocks), block = static_cast<int>(blockIdx.x % p.plan.blocks);
  const int width = static_cast<int>(p.plan.width), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row_block = blockIdx.x / p.plan.blocks, row0 = row_block * kTileRows;
  const int64_t column0 = static_cast<int64_t>(block) * width;
  unsigned char* slice = shared;
  unsigned char* ring = slice + kTileRows * width * sizeof(T);
  unsigned char* scaled = ring + kClusterStages * kRightBytes;
  float* scratch = reinterpret_cast<float*>(scaled + kTileRows * p.plan.depth * sizeof(T));
  float* partial = reinterpret_cast<float*>(ring);  // Of stages 0 and 1.
  const auto stage = [&](int item) { return ring + (item + 2) % kClusterStages * kRightBytes; };
  // 128 columns of a right factor from column on, and kDepth of its summed dimension.
  const auto load_right = [&](int item, const Matrix<T>& right, int64_t column, int64_t depth) {
    if constexpr (kRight == Right::kColumnsByDepth) {
      load_tile<T, kTileColumns, kStageRowBytes>(stage(item), right, column, depth, true);
    } else {
      load_tile<T, kDepth<T>, kTileColumns * sizeof(T)>(stage(item), right, depth, column, true);
    }
  };

  // The narrow product.
  const int steps = static_cast<int>(ceil_divide(clip(column0, p.narrow.left.columns, width), kDepth<T>));
  int64_t rank0 = 0;
  const auto load_narrow = [&](int item) {
    if (item < steps) {
      const int64_t depth = column0 + item * kDepth<T>;
      if (rank0 == 0)
        load_tile<T, kTileRows, kStageRowBytes>(slice + item * kLeftBytes, p.narrow.left, row0, depth, true);
      load_right(item, p.narrow.right, rank0, depth);
    }
    ptx::cp_async_commit();
  };

  // The wide product: per 128 columns its tiles of the right factor, then the tile of the second input.
  const Matrix<T> second{kBackward ? p.wide.x : p.wide.other, p.narrow.left.rows,
                         kBackward ? p.wide.x_columns : p.wide.other_columns};
  const bool has_second = kEpilogue == Epilogue::kResidual || (kBackward && p.wide.sums != nullptr);
  const int depth_steps = static_cast<int>(p.plan.depth) / kDepth<T>, per_tile = depth_steps + has_second;
  const int items = static_cast<int>(ceil_divide(clip(column0, p.wide.columns, width), kTileColumns)) * per_tile;
  const auto load_wide = [&](int item) {
    if (item < items) {
      const int64_t column = column0 + item / per_tile * kTileColumns;
      const int step = item % per_tile;
      if (step < depth_steps) {
        load_right(item, p.wide.right, column, step * kDepth<T>);
      } else {
        for (int half = 0; half < 2; ++half) {
          load_tile<T, kTileRows, kStageRowBytes>(stage(item) + half * kLeftBytes, second, row0,
                                                  column + half * kDepth<T>, true);
        }
      }
    }
    ptx::cp_async_commit();
  };

  start_tiles(load_narrow);
#pragma unroll 1
  while (rank0 < p.narrow.rank) {
    Accumulator sum = {};
    stream_tiles(steps, load_narrow,
                 [&](int item) { multiply_stage<T, kRight>(sum, slice + item * kLeftBytes, stage(item)); });
    const int64_t mine = rank0;
    rank0 += kTileColumns;
    if (rank0 < p.narrow.rank) {
      start_tiles(load_narrow);
    } else {
      start_tiles(load_wide);
    }
    const int row = warp / 4 * 32 + lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Element (row, column) at row * 128 + (column ^ row % 4 * 8): off each other's banks.
      float* target = partial + row * kTileColumns + warp % 4 * 32 + (j ^ (row & 3)) * 8 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        target[i * 8 * kTileColumns] = sum[i / 2][j][i % 2 * 2];
        target[i * 8 * kTileColumns + 1] = sum[i / 2][j][i % 2 * 2 + 1];
      }
    }
    ptx::cluster_sync();  // All blocks' parts are there.
    exchange_projection<kBackward>(p, block, row_block, mine, partial, scaled);
    ptx::cluster_sync();  // All blocks have the left factor, and have read the parts.
  }

  float squares[2][2] = {};
  Accumulator sum;
  stream_tiles(items, load_wide, [&](int item) {
    const int step = item % per_tile;
    if (step == 0) {
#pragma unroll
      for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }
    if (step < depth_steps) multiply_stage<T, kRight>(sum, scaled + step * kLeftBytes, stage(item));
    if (step == per_tile - 1) {
      const int tile = item / per_tile;
      fused_epilogue<T, kEpilogue>(p, sum, slice + tile * 2 * kLeftBytes, has_second ? stage(item) : nullptr, scratch,
                                   squares, row_block, column0 + tile * kTileColumns);
    }
  });
  for_pieces(p, slice, row0, column0, [&](int row, int column, const auto& piece) {
    piece.store(p.wide.out + (row0 + row) * p.wide.columns + column0 + column);
  });

  if constexpr (kEpilogue == Epilogue::kResidual) {
    const Normalise<T>& norm = p.wide.norm;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float square = sum_lanes(squares[i / 2][i % 2], 4);
      const int row = warp / 4 * 32 + i * 8 + lane / 4;
      if (lane % 4 == 0) scratch[row * ClusterPlan::kScratch + warp % 4] = square;
    }
    float* rstds = reinterpret_cast<float*>(scaled);
    ptx::cluster_sync();  // All blocks' squares are there.
    if (threadIdx.x < kTileRows) {
      float square = 0.0f;
      for (int peer = 0; peer < blocks; ++peer) {
        const float* parts = ptx::map_to_peer(scratch + threadIdx.x * ClusterPlan::kScratch, peer);
        square += (parts[0] + parts[1]) + (parts[2] + parts[3]);
      }
      const float rstd = rsqrtf(square / norm.columns + norm.eps);
      rstds[threadIdx.x] = rstd;
      if (block == 0 && row0 + threadIdx.x < norm.tokens) norm.rstd[row0 + threadIdx.x] = rstd;
    }
    ptx::cluster_sync();  // The rows' rstd is there, and nobody reads the memory of a block that has left.
    for_pieces(p, slice, row0, column0, [&](int row, int column, const auto& piece) {
      float weight[kVector<T>], out[kVector<T>];
      load_vector<true>(weight, norm.weight + column0 + column, kVector<T>, true);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) out[i] = to_float(piece.elements[i]) * rstds[row] * weight[i];
      store_vector(norm.output + (row0 + row) * norm.columns + column0 + column, out, kVector<T>, true);
    });
  }
}

template <typename T, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 2) hsm_cluster(Fused<T> p) {
  PYPRUNE_SHARED_MEMORY(shared);
  if constexpr (ptx::kHasClusters) mix_rows<T, kEpilogue>(p, shared);
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

// out[c] = sum of parts[:, c], fp32, in a fixed order. Bytes: 4 rows columns, some hundred rows: few columns to a block
// and eight rows of a thread in flight, for latency. Grid: blocks of 8 columns.
__global__ void __launch_bounds__(kSumThreads) sum_rows(Matrix<float> parts, float* out) {
  PYPRUNE_SHARED_MEMORY(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane % kSumColumns;
  float sum = 0.0f;
  if (column < parts.columns) {
    constexpr int kStep = kSumThreads / kSumColumns;
#pragma unroll 8
    for (int64_t row = threadIdx.x / kSumColumns; row < parts.rows; row += kStep)
      sum += __ldg(parts.data + row * parts.columns + column);
  }
  for (int step = kSumColumns; step < 32; step *= 2) sum += __shfl_xor_sync(device::kFullWarp, sum, step);
  if (lane < kSumColumns) sums[warp * kSumColumns + lane] = sum;
  __syncthreads();
  if (threadIdx.x >= kSumColumns || column >= parts.columns) return;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSumThreads / 32; ++i) sum += sums[i * kSumColumns + lane];
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
        squares(space.take<float>(s.tokens * ceil_divide(s.outputs, kTileColumns))) {}
};

template <typename T>
struct BackwardScratch {
  ProjectPlan plan;
  T* masked;
  float *sums, *v_sums, *column_sums;

  BackwardScratch(Workspace& space, const HsmShape& s, int processors)
      : plan(s.tokens, s.outputs, s.rank, kDepth<T>, processors),
        masked(space.take<T>(s.outputs * s.rank)),
        sums(space.take<float>(plan.splits > 1 ? plan.splits * s.tokens * s.rank : 0)),
        v_sums(space.take<float>(
            std::max(plan.v_sum_rows(s.tokens), ceil_divide(s.tokens, kTileRows) * kClusterBlocks) * s.rank)),
        column_sums(space.take<float>(ceil_divide(s.tokens, kTileRows) * s.outputs)) {}
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
cudaError_t run_expand(const Expand<T>& p, int64_t column_grid, cudaStream_t stream) {
  const dim3 grid(blocks(ceil_divide(p.left.rows, kTileRows)), blocks(column_grid));
  return launch(expand<T, kEpilogue>, grid, kThreads, kExpandStages * kStageBytes, stream, p);
}

cudaError_t run_sum_rows(const float* parts, int64_t rows, int64_t columns, float* out, cudaStream_t stream) {
  return launch(sum_rows, dim3(blocks(ceil_divide(columns, kSumColumns))), kSumThreads,
                kSumThreads / 32 * kSumColumns * sizeof(float), stream, Matrix<float>{parts, rows, columns}, out);
}

// Whether this device can run the plan; aligned data is the caller's.
template <typename T>
cudaError_t can_cluster(const HsmShape& s, const ClusterPlan& plan, bool* can) {
  *can = false;
  if (sizeof(T) != 2 || s.rank == 0 || s.outputs == 0) return cudaSuccess;
  int device = 0, clusters = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // Also for a plan that needs less: devices with less (sm_120) have clusters, but not this kernel (ptx::kHasClusters).
  constexpr int kSharedBytes = 227 << 10;
  *can = clusters != 0 && shared_bytes >= kSharedBytes && plan.shared_bytes <= kSharedBytes;
  return error;
}

template <Epilogue kEpilogue, typename T>
cudaError_t run_cluster(const Project<T>& narrow, const Expand<T>& wide, const ClusterPlan& plan, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    return launch_clusters(hsm_cluster<T, kEpilogue>, dim3(blocks(plan.row_blocks * plan.blocks)), blocks(plan.blocks),
                           kThreads, plan.shared_bytes, stream, Fused<T>{narrow, wide, plan});
  } else {
    return cudaErrorInvalidValue;
  }
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
    const Expand<T> wide = forward_expansion(s, scratch, input, static_cast<const T*>(l1), mask,
                                             static_cast<const T*>(nullptr), static_cast<T*>(y));
    const ClusterPlan plan(s.tokens, s.hidden, s.rank);
    bool clusters = false;
    cudaError_t error = can_cluster<T>(s, plan, &clusters);
    if (error != cudaSuccess) return error;
    if (clusters && narrow.aligned && wide.aligned && all_aligned<T>({}, {h}))
      return run_cluster<Epilogue::kMask>(narrow, wide, plan, queue);
    error = run_project<T, false>(narrow, scratch.plan, queue);
    if (error != cudaSuccess) return error;
    return run_expand<T, Epilogue::kMask>(wide, ceil_divide(s.outputs, kTileColumns), queue);
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
    const ClusterPlan plan(s.tokens, s.hidden, s.rank);
    bool clusters = false;
    cudaError_t error = can_cluster<T>(s, plan, &clusters);
    if (error != cudaSuccess) return error;
    if (clusters && narrow.aligned && wide.aligned && norm.aligned && all_aligned<T>({}, {h}))
      return run_cluster<Epilogue::kResidual>(narrow, wide, plan, queue);
    error = run_project<T, false>(narrow, scratch.plan, queue);
    if (error != cudaSuccess) return error;

    // Two blocks per SM keep it busy; with fewer, rows are cut too and normalised by a second kernel.
    const bool owns_rows = ceil_divide(s.tokens, kTileRows) >= 2 * processors;
    error = run_expand<T, Epilogue::kResidual>(wide, owns_rows ? 1 : ceil_divide(s.outputs, kTileColumns), queue);
    if (error != cudaSuccess || owns_rows) return error;
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

    const ClusterPlan plan(s.tokens, s.hidden, s.rank);
    bool clusters = false;
    error = can_cluster<T>(s, plan, &clusters);
    if (error != cudaSuccess) return error;
    clusters = clusters && narrow.aligned && wide.aligned && all_aligned<T>({}, {h});
    if (clusters) {
      error = run_cluster<Epilogue::kGradient>(narrow, wide, plan, queue);
    } else {
      error = run_project<T, true>(narrow, scratch.plan, queue);
      if (error != cudaSuccess) return error;
      error = run_expand<T, Epilogue::kGradient>(wide, ceil_divide(s.hidden, kTileColumns), queue);
    }
    if (error != cudaSuccess) return error;
    const int64_t v_sum_rows = clusters ? plan.row_blocks * plan.blocks : scratch.plan.v_sum_rows(s.tokens);
    error = run_sum_rows(scratch.v_sums, v_sum_rows, s.rank, grad_v, queue);
    if (error != cudaSuccess || column_dot == nullptr) return error;
    return run_sum_rows(scratch.column_sums, ceil_divide(s.tokens, kTileRows), s.outputs, column_dot, queue);
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
