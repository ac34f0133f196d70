// y = x W^T + bias with a 2:4 or a bitmap weight, for few tokens. The contract is in sparse_gemm.h.
//
// For few tokens the product is bound by reading W once. A block makes 64 outputs of up to 64 tokens: it streams stages
// of 64 x 128 of W, packed, and of x through shared memory (cp.async), where each of its four warps takes 32 rows and
// 64 columns. W takes the left side of the products, so that tokens fill the short side (8) of the tensor cores'.
//
//   kernel                          bytes a weight    floor, 4096 x 11008  instructions a weight, of  shared memory, KB
//   stream<Nm>, 1-4 / 8 tokens      1 + 1/8           15 us                 2.5                   10  40 / 44
//   stream<Nm>, 9-16 / 32 / 64      1 + 1/8           15 us                 4 at 64 tokens        10  39 / 51 / 75
//   stream<Bitmap>, 1-4 / 8         2 (1 - s) + 1/8   15 us at s = 0.5      8                     10  36 / 38
//   stream<Bitmap>, 9-16 / 32 / 64  2 (1 - s) + 1/8   15 us at s = 0.5     10 at 64 tokens        10  42 / 50 / 66
//   stream<Nm>, plain, fp32         2 + 1/8           29 us                16 for 4 tokens        19  76
//   stream<Bitmap>, plain, fp32     4 (1 - s) + 1/8   29 us at s = 0.5     18 for 4 tokens        19  70
//   finish                          4 splits a result, written before, read here, from L2
//
// Floors at 3.35 TB/s. Instructions are those of the fast path in sm_90a's machine code, a lane's; "of" is what an
// H100's SM can issue while it receives that weight (128 lanes a clock, 14.5 bytes a clock); at s = 0.7 that is 6.4 for
// bf16. So 2:4 is bound by memory, and a bitmap by decoding it, at about the same time. The products themselves are
// nearly free on tensor cores, 1/8 of an instruction: that is why they serve a single token too, and the plain kernel
// fp32.
//
// Every address past the matrix reads as zero weights. Registers: docs/kernels.md. No atomics: with splits, `finish`
// adds partial sums in order.
#include "bitmap.cuh"
#include "ptx.cuh"
#include "sparse_gemm.h"

namespace pyprune {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kRows = kTile;  // of W that a block takes; a warp takes as many columns of a stage
constexpr int kStageColumns = 128;
constexpr int kWarpRows = 32;  // of W; warps 0, 1 the left tile of a stage, warps 2, 3 the right one
constexpr int kPlainTokens = 4;
constexpr int kFinishThreads = 256;

template <typename T>
constexpr int kVector = 16 / sizeof(T);

// Where a warp and a lane stand. A quad, four neighbouring lanes, shares a row (of W) or a token (of x).
struct Position {
  int half = threadIdx.x / 64;                  // of the stage's columns
  int row0 = threadIdx.x / 32 % 2 * kWarpRows;  // of the block's rows
  int quad = threadIdx.x % 32 / 4, in_quad = threadIdx.x % 4;
};

// The 16-byte chunks of a row of shared memory are permuted by row, so that eight rows at one column (ldmatrix), and
// four rows at two neighbouring chunks (8-byte loads of half a warp), lie in different banks.
__device__ __forceinline__ int swizzle(int row, int chunk) { return chunk ^ ((row & 3) << 1 | (row >> 2 & 1)); }

// What a thread copies of every stage of a matrix: kChunks chunks of each of kCount rows, with zeros where rows or
// columns end. Stages lie side by side, so that only a pointer and the columns left move on from one to the next.
// `aligned`: a chunk is wholly valid or not, and on a 16-byte boundary.
template <typename T, int kChunks, int kCount>
struct Rows {
  static constexpr int kStep = kThreads / kChunks;
  static_assert(kStep % 8 == 0 || kStep >= kCount, "a thread's rows share one permutation");
  const T* from;
  int64_t pitch;
  int rows, columns;  // left, from the thread's first row and column on
  bool aligned;

  __device__ __forceinline__ Rows(const T* source, int64_t pitch_, int64_t rows_left, int64_t columns_left,
                                  bool aligned_)
      : from(source + threadIdx.x / kChunks * pitch_ + threadIdx.x % kChunks * kVector<T>),
        pitch(pitch_),
        rows(static_cast<int>(rows_left < kCount ? rows_left : kCount) - static_cast<int>(threadIdx.x / kChunks)),
        columns(static_cast<int>(columns_left) - static_cast<int>(threadIdx.x % kChunks * kVector<T>)),
        aligned(aligned_) {}

  __device__ __forceinline__ void load(unsigned char* shared) {
    const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    unsigned char* target = shared + (first * kChunks + swizzle(first, chunk)) * 16;
    if (aligned) {
      const int inside = columns > 0 ? rows : 0;
#pragma unroll
      for (int row = 0; row < kCount; row += kStep) {
        if (kCount < kStep && first >= kCount) break;
        // Of a row that does not exist no byte is read.
        ptx::cp_async_16(target + row * kChunks * 16, from + row * pitch, row < inside ? 16 : 0);
      }
    } else {
      const int valid = columns >= kVector<T> ? kVector<T> : columns;
      for (int row = 0; row < kCount && first + row < kCount; row += kStep) {
        T* elements = reinterpret_cast<T*>(target + row * kChunks * 16);
        for (int i = 0; i < kVector<T>; ++i) {
          elements[i] = row < rows && i < valid ? from[row * pitch + i] : from_float<T>(0.0f);
        }
      }
    }
    from += kChunks * kVector<T>;
    columns -= kChunks * kVector<T>;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The tokens of a stage: kStageColumns columns of x
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
struct Tokens {
  static constexpr int kChunks = kStageColumns / kVector<T>;
  static constexpr int kRowBytes = kChunks * 16;
  const T* x;
  int64_t tokens, inputs;
  bool aligned;

  template <int kRows>
  __device__ __forceinline__ Rows<T, kChunks, kRows> source(int64_t token0, int64_t column0) const {
    return {x + token0 * inputs + column0, inputs, tokens - token0, inputs - column0, aligned};
  }

  // Where four neighbouring elements are, from a column that is a multiple of four.
  static __device__ __forceinline__ unsigned four(int token, int column) {
    return token * kRowBytes + swizzle(token, column / kVector<T>) * 16 + column % kVector<T> * sizeof(T);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// 2:4
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
struct Nm {
  static constexpr int kChunks = kStageColumns / 2 / kVector<T>;
  static constexpr int kRowBytes = kChunks * 16;
  static constexpr int kMetadataRowBytes = kStageColumns / 8;
  static_assert(kMetadataRowBytes == 16 && kThreads == 2 * kRows, "two threads copy the metadata of a row");
  static constexpr int kBytes = kRows * (kRowBytes + kMetadataRowBytes);
  static constexpr unsigned kNoPlaces = 0x44;  // Places 0 and 1, twice: what stands for weights that do not exist.

  const T* values;
  const uint8_t* metadata;
  int64_t outputs, inputs;
  bool aligned;

  // The i-th of the four rows that a quad has of the warp's 32.
  static __device__ __forceinline__ int row_of(const Position& at, int i) { return at.row0 + i * 8 + at.quad; }

  // What a thread copies of every stage, the first one from column0 on.
  struct Source {
    Rows<T, kChunks, kRows> values;
    const uint8_t* metadata;  // Eight bytes a thread, for 64 columns.
    int bytes;                // left; none of a row that does not exist
    bool half_byte;           // ends the row

    __device__ __forceinline__ Source(const Nm& weight, int64_t row0, int64_t column0)
        : values(weight.values + row0 * (weight.inputs / 2) + column0 / 2, weight.inputs / 2, weight.outputs - row0,
                 (weight.inputs - column0) / 2, weight.aligned),
          half_byte(weight.inputs % 8 == 4) {
      const int64_t row = row0 + threadIdx.x / 2, pitch = ceil_divide(weight.inputs, 8);
      const int64_t byte = column0 / 8 + threadIdx.x % 2 * 8;
      metadata = weight.metadata + row * pitch + byte;
      bytes = row < weight.outputs ? static_cast<int>(pitch - byte) : 0;
    }

    __device__ __forceinline__ void load(unsigned char* shared) {
      values.load(shared);
      unsigned char* target = shared + kRows * kRowBytes + threadIdx.x * 8;
      if (values.aligned && bytes > 0) {
        ptx::cp_async_8(target, metadata, 8);
      } else {
        for (int i = 0; i < 8; ++i) {
          unsigned places = i < bytes ? metadata[i] : kNoPlaces;
          if (half_byte && i == bytes - 1) places = (places & 0xf) | (kNoPlaces & 0xf0);
          target[i] = static_cast<unsigned char>(places);
        }
      }
      metadata += kMetadataRowBytes;
      bytes -= kMetadataRowBytes;
    }
  };

  // On tensor cores: a word of metadata per lane serves two products (see ptx.cuh).
  template <int kTokens, int kTiles>
  static __device__ __forceinline__ void multiply(float (&sums)[2][kTiles][4], int tiles, unsigned weight, unsigned x) {
    PYPRUNE_SHARED_MEMORY(memory);
    const Position at;
    const int lane = threadIdx.x % 32;
    const unsigned char *shared = memory + weight, *metadata = shared + kRows * kRowBytes;
    uint32_t a[2][2][4], places[2];  // [16 rows][32 columns]
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = at.row0 + i * 16;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int chunk = at.half * 4 + k * 2 + lane / 16;
        ptx::ldmatrix_x4(a[i][k], shared + (row + lane % 16) * kRowBytes + swizzle(row + lane % 16, chunk) * 16);
      }
      const auto* mine =
          reinterpret_cast<const uint16_t*>(metadata + (row + at.quad) * kMetadataRowBytes) + at.half * 4 + at.in_quad;
      places[i] = mine[0] | static_cast<uint32_t>(mine[8 * kMetadataRowBytes / 2]) << 16;
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j > kTiles / 2 && j >= tiles) break;
      const int token = j * 8 + lane % 8 % kTokens;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t b[4];
        const int chunk = at.half * 8 + k * 4 + lane / 8;
        ptx::ldmatrix_x4(b, memory + x + token * Tokens<T>::kRowBytes + swizzle(token, chunk) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (k == 0) {
            ptx::mma_sp_m16n8k32<T, 0>(sums[i][j], a[i][k], b, places[i]);
          } else {
            ptx::mma_sp_m16n8k32<T, 1>(sums[i][j], a[i][k], b, places[i]);
          }
        }
      }
    }
  }

  // The lane's four rows of the warp's 32, and of each step's 16 columns four: 16 step + 4 in_quad .. + 4.
  struct PlainRows {
    const unsigned char* values;
    uint2 places[4];

    __device__ __forceinline__ explicit PlainRows(unsigned weight) {
      PYPRUNE_SHARED_MEMORY(memory);
      values = memory + weight;
      const Position at;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row_of(at, i);
        places[i] = reinterpret_cast<const uint2*>(values + kRows * kRowBytes + row * kMetadataRowBytes)[at.half];
      }
    }
    __device__ __forceinline__ void four(int i, int step, float (&out)[4]) const {
      const Position at;
      const int row = row_of(at, i), value = at.half * 32 + step * 8 + at.in_quad * 2;
      const unsigned mine = (step < 2 ? places[i].x : places[i].y) >> (step % 2 * 16 + at.in_quad * 4);
      const T* pair = reinterpret_cast<const T*>(values + row * kRowBytes + swizzle(row, value / kVector<T>) * 16) +
                      value % kVector<T>;
      const float first = to_float(pair[0]), second = to_float(pair[1]);
#pragma unroll
      for (unsigned c = 0; c < 4; ++c) out[c] = (mine & 3) == c ? first : (mine >> 2 & 3) == c ? second : 0.0f;
    }
  };
};

// ---------------------------------------------------------------------------------------------------------------------
// Bitmap
// ---------------------------------------------------------------------------------------------------------------------

// For each set of four columns, the `prmt` selectors that spread values v0 v1 v2 and a zero over them, two columns in
// each half of the word. Where all four are kept the last column takes its value v3 from elsewhere: the selectors give
// it zero by another number, which makes them the only ones from kAll on.
constexpr uint32_t kAll = 0x77000000;

__device__ __forceinline__ uint32_t selectors_of(unsigned bits) {
  if (bits == 15) return kAll | 0x543210;
  uint32_t selectors = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned value = bits >> i & 1 ? __popc(bits & ((1u << i) - 1)) : 3;
    selectors |= (value * 0x22 + 0x10) << 8 * i;
  }
  return selectors;
}

template <typename T>
struct Bitmap {
  static constexpr int kTileElements = kRows * kTile;
  static constexpr int kBitmapBytes = kTileElements / 8;
  static constexpr int kTileBytes = kTileElements * sizeof(T) + kBitmapBytes;
  static constexpr int kBytes = 2 * kTileBytes;

  const T* values;
  int64_t values_size;
  const uint8_t* bitmap;
  const int64_t* offsets;
  int64_t tile_columns;

  // The i-th of the four rows that a quad has of the warp's 32. At 50 % a row's values are half of the banks: of eight
  // neighbouring rows four would begin in the same bank, give or take two or three. Rows 0, 1, 8, 9, 16, ... spread
  // more.
  static __device__ __forceinline__ int row_of(const Position& at, int i) {
    return at.row0 + at.quad / 2 * 8 + i * 2 + at.quad % 2;
  }

  // What a thread copies of every stage, the first one from column0 on: half of the threads for each tile. Where a
  // tile's values lie is read one stage ahead, so that no copy waits for it.
  struct Source {
    const uint8_t* bits;     // of the next tile
    const int64_t* offsets;  // of the tile behind
    const T* values;
    int64_t values_size;
    TileValues next;  // the next tile's
    int tiles;        // left in the row

    __device__ __forceinline__ Source(const Bitmap& weight, int64_t row0, int64_t column0)
        : values(weight.values), values_size(weight.values_size), next{0, 0} {
      const int64_t column = column0 / kTile + threadIdx.x / 64, tile = row0 / kTile * weight.tile_columns + column;
      bits = weight.bitmap + tile * kBitmapBytes + threadIdx.x % 64 * 16;
      offsets = weight.offsets + tile;
      tiles = static_cast<int>(weight.tile_columns - column);
      look_ahead();
    }

    __device__ __forceinline__ void look_ahead() {
      if (tiles > 0) next = values_of_tile(offsets, values_size);
      offsets += 2;
    }

    __device__ __forceinline__ void load(unsigned char* shared) {
      const int thread = threadIdx.x % 64;
      unsigned char* target = shared + threadIdx.x / 64 * kTileBytes + thread * 16;
      if (thread < kBitmapBytes / 16) ptx::cp_async_16(target + kTileElements * sizeof(T), bits, tiles > 0 ? 16 : 0);
      if (tiles > 0) {
        const T* from = values + next.begin + thread * kVector<T>;
        int left = static_cast<int>(static_cast<unsigned>(next.count) / kVector<T>) - thread;
#pragma unroll 1
        for (; left > 0; left -= 128) {
          ptx::cp_async_16(target, from, 16);
          if (left > 64) ptx::cp_async_16(target + 64 * 16, from + 64 * kVector<T>, 16);
          target += 128 * 16;
          from += 128 * kVector<T>;
        }
      }
      bits += 2 * kBitmapBytes;
      tiles -= 2;
      look_ahead();
    }
  };

  // What a warp knows of its tile, in bytes from the start of shared memory, so that an address is one addition: where
  // the tile is, and where in it the values of rows 2 lane (low half) and 2 lane + 1 begin.
  struct Starts {
    unsigned tile, mine;

    __device__ __forceinline__ explicit Starts(unsigned weight) : tile(weight + Position().half * kTileBytes) {
      PYPRUNE_SHARED_MEMORY(memory);
      const uint4 bits = reinterpret_cast<const uint4*>(memory + tile + kTileElements * sizeof(T))[threadIdx.x % 32];
      const int first = __popc(bits.x) + __popc(bits.y), second = __popc(bits.z) + __popc(bits.w);
      const unsigned start = static_cast<unsigned>(scan_warp(first + second) - first - second);
      mine = (start | (start + first) << 16) * sizeof(T);
    }
    __device__ __forceinline__ unsigned of(int row) const {
      return tile + ptx::prmt(__shfl_sync(kFullWarp, mine, row / 2), 0, row % 2 == 0 ? 0x4410 : 0x4432);
    }
  };

  // A row of the warp's tile, of which this lane takes columns 16 step + 4 in_quad .. + 4 for step < 4.
  struct Row {
    uint2 bits;
    unsigned start, middle;  // Where the values of columns 0 and 32 begin, as above.

    Row() = default;
    __device__ __forceinline__ Row(const Starts& starts, int row) : start(starts.of(row)) {
      PYPRUNE_SHARED_MEMORY(memory);
      bits = reinterpret_cast<const uint2*>(memory + starts.tile + kTileElements * sizeof(T))[row];
      middle = start + __popc(bits.x) * sizeof(T);
    }

    // The bits of the lane's four columns as the lowest ones, and where their values begin.
    __device__ __forceinline__ unsigned four_bits(int step, unsigned* first) const {
      const unsigned word = step < 2 ? bits.x : bits.y, shift = step % 2 * 16 + threadIdx.x % 4 * 4;
      *first = (step < 2 ? start : middle) + __popc(word & ((1u << shift) - 1)) * sizeof(T);
      return word >> shift;
    }
  };

  // The four columns of a 16-bit type as two pairs. `table` is selectors_of(lane % 16), so that a shuffle looks it up.
  static __device__ __forceinline__ void pairs(const Row& row, int step, uint32_t table, uint32_t* low,
                                               uint32_t* high) {
    PYPRUNE_SHARED_MEMORY(memory);
    unsigned first;
    const unsigned bits = row.four_bits(step, &first);
    const uint32_t selectors = __shfl_sync(kFullWarp, table, bits);  // The lane is bits % 32.
    const auto* words = reinterpret_cast<const uint32_t*>(memory + (first & ~3u));
    const uint32_t left = __funnelshift_r(words[0], words[1], first * 8);  // Values may begin inside a word.
    const uint32_t right = __funnelshift_r(words[1], 0u, first * 8) & 0xffff;
    *low = ptx::prmt(left, right, selectors);
    *high = ptx::prmt(left, right, selectors >> 16);
    if (selectors >= kAll) *high = ptx::prmt(*high, *reinterpret_cast<const uint16_t*>(memory + first + 6), 0x5410);
  }

  struct PlainRows {
    Row rows[4];
    uint32_t table;

    __device__ __forceinline__ explicit PlainRows(unsigned weight) : table(selectors_of(threadIdx.x % 16)) {
      const Position at;
      const Starts starts(weight);
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = Row(starts, row_of(at, i));
    }
    __device__ __forceinline__ void four(int i, int step, float (&out)[4]) const {
      if constexpr (std::is_same_v<T, float>) {
        unsigned first;
        const unsigned bits = rows[i].four_bits(step, &first);
        PYPRUNE_SHARED_MEMORY(memory);
        const auto* value = reinterpret_cast<const float*>(memory + first);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          out[c] = 0.0f;
          if (bits >> c & 1) out[c] = *value++;
        }
      } else {
        union {
          uint32_t words[2];
          T elements[4];
        };
        pairs(rows[i], step, table, &words[0], &words[1]);
#pragma unroll
        for (int c = 0; c < 4; ++c) out[c] = to_float(elements[c]);
      }
    }
  };

  // On tensor cores. A product sums over 16 columns in any order, the same on both sides: a lane's two pairs are four
  // neighbouring columns, of W and of x.
  template <int kTokens, int kTiles>
  static __device__ __forceinline__ void multiply(float (&sums)[2][kTiles][4], int tiles, unsigned weight, unsigned x) {
    PYPRUNE_SHARED_MEMORY(memory);
    const Position at;
    const uint32_t table = selectors_of(threadIdx.x % 16);
    const Starts starts(weight);
    // Where the lane's columns of its first token are: 32 bytes further with each step, and so, as bits 5 and 6 of what
    // is swizzled are those of the step, and tokens begin at multiples of 128.
    const unsigned tokens = x + Tokens<T>::four(at.quad % kTokens, at.half * kTile + at.in_quad * 4);
    Row rows[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = Row(starts, row_of(at, i));
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint2 b[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j > kTiles / 2 && j >= tiles) break;
        b[j] = *reinterpret_cast<const uint2*>(memory + (tokens ^ step * 32) + j * 8 * Tokens<T>::kRowBytes);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
        pairs(rows[i][0], step, table, &a[0], &a[2]);
        pairs(rows[i][1], step, table, &a[1], &a[3]);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (j > kTiles / 2 && j >= tiles) break;
          ptx::mma_m16n8k16<T>(sums[i][j], a, b[j].x, b[j].y);
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The kernels
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
struct Output {
  int64_t tokens, outputs;
  const T* bias;  // or null
  T* y;
  float* partial;  // [splits,tokens,outputs], or null: this block's sums are whole

  __device__ __forceinline__ void store(int64_t at, int64_t output, float sum) const {
    y[at] = from_float<T>(bias == nullptr ? sum : sum + to_float(bias[output]));
  }
};

// What each thread sums, of kTokens tokens: on tensor cores in tiles of eight, of which four tokens fill one half.
template <typename T, typename Weight, int kMost>
struct Tiled {
  static constexpr int kTokens = kMost, kTiles = (kMost + 7) / 8;
  static_assert(kTokens % 8 == 0 || kTokens == 4);
  float values[2][kTiles][4] = {};

  __device__ __forceinline__ void add(unsigned weight, unsigned x, int tiles) {
    Weight::template multiply<kTokens>(values, tiles, weight, x);
  }
  // put(row, token, sum) for everything that this thread has.
  template <typename Put>
  __device__ __forceinline__ void finish(int tiles, Put put) const {
    const Position at;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j > kTiles / 2 && j >= tiles) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = j * 8 + at.in_quad * 2 + e % 2;
          if (kTokens >= 8 || token < kTokens) put(Weight::row_of(at, i * 2 + e / 2), token, values[i][j][e]);
        }
      }
    }
  }
};

// Or without them.
template <typename T, typename Weight>
struct Plain {
  static constexpr int kTokens = kPlainTokens;
  float values[4][kPlainTokens] = {};

  __device__ __forceinline__ void add(unsigned weight, unsigned x, int) {
    PYPRUNE_SHARED_MEMORY(memory);
    const Position at;
    const typename Weight::PlainRows rows(weight);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      float left[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.four(i, step, left[i]);
#pragma unroll
      for (int token = 0; token < kPlainTokens; ++token) {
        const unsigned four = Tokens<T>::four(token, at.half * kTile + step * 16 + at.in_quad * 4);
        const T* right = reinterpret_cast<const T*>(memory + x + four);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float factor = to_float(right[c]);
#pragma unroll
          for (int i = 0; i < 4; ++i) values[i][token] += left[i][c] * factor;
        }
      }
    }
  }
  template <typename Put>
  __device__ __forceinline__ void finish(int, Put put) const {
    const Position at;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int token = 0; token < kPlainTokens; ++token) {
        float sum = values[i][token];  // Of a quarter of the columns.
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        if (at.in_quad == token) put(Weight::row_of(at, i), token, sum);
      }
    }
  }
};

// Block (b, s, t): outputs 64 b .. + 64, the s-th part of the stages, the t-th kTokens tokens.
// kBlocks: how many the registers shall leave room for on a multiprocessor.
template <typename T, typename Weight, typename Sums, int kStages, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) stream(Weight weight, Tokens<T> x, Output<T> out, int64_t stages) {
  PYPRUNE_SHARED_MEMORY(shared);
  constexpr int kTokens = Sums::kTokens;
  if (out.partial != nullptr) ptx::let_next_kernel_start();
  const int64_t row0 = int64_t{blockIdx.x} * kRows, token0 = int64_t{blockIdx.z} * kTokens;
  const int64_t first = stages * blockIdx.y / gridDim.y;
  const int count = static_cast<int>(stages * (blockIdx.y + 1) / gridDim.y - first);
  const int64_t tokens_left = x.tokens - token0;
  const int tokens = tokens_left < kTokens ? static_cast<int>(tokens_left) : kTokens;
  const int tiles = (tokens + 7) / 8;
  constexpr int kStageBytes = Weight::kBytes + kTokens * Tokens<T>::kRowBytes;
  static_assert(Weight::kBytes % 128 == 0 && kStageBytes % 128 == 0, "addresses in x are exclusive ors");

  typename Weight::Source weights(weight, row0, first * kStageColumns);
  auto rows = x.template source<kTokens>(token0, first * kStageColumns);
  const auto load = [&](int step) {
    if (step < count) {
      unsigned char* stage = shared + step % kStages * kStageBytes;
      weights.load(stage);
      rows.load(stage + Weight::kBytes);
    }
    ptx::cp_async_commit();  // Also when empty, so that the wait below can count groups.
  };
  Sums sums;
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < count; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // This stage has arrived for all; all are done with the one that is loaded next.
    load(step + kStages - 1);
    const unsigned stage = step % kStages * kStageBytes;
    sums.add(stage, stage + Weight::kBytes, tiles);
  }
  __syncthreads();  // The last stage is read; its memory takes the sums of both halves, [half][token][row].

  float* tile = reinterpret_cast<float*>(shared);
  const int half = Position().half;
  sums.finish(tiles, [&](int row, int token, float sum) { tile[(half * kTokens + token) * kRows + row] = sum; });
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * kRows; i += kThreads) {
    const int64_t output = row0 + i % kRows, at = (token0 + i / kRows) * out.outputs + output;
    if (output >= out.outputs) continue;
    const float sum = tile[i] + tile[kTokens * kRows + i];
    if (out.partial != nullptr) {
      out.partial[blockIdx.y * out.tokens * out.outputs + at] = sum;
    } else {
      out.store(at, output, sum);
    }
  }
}

// y from the sums of all splits. 4 bytes read per split and result, of few enough tokens to come from L2.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish(Output<T> out, int splits) {
  const int64_t output = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (output >= out.outputs) return;
  ptx::wait_for_previous_kernel();
  for (int64_t token = blockIdx.y; token < out.tokens; token += gridDim.y) {
    const int64_t at = token * out.outputs + output;
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split) sum += out.partial[split * out.tokens * out.outputs + at];
    out.store(at, output, sum);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side

template <typename T, typename Weight>
struct Problem {
  Weight weight;
  Tokens<T> x;
  Output<T> out;
  SparsePlan plan;
  cudaStream_t queue;

  template <typename Sums, int kStages, int kBlocks>
  cudaError_t run() {
    constexpr int kTokens = Sums::kTokens;
    const int64_t stages = x.inputs > 0 ? ceil_divide(x.inputs, kStageColumns) : 1;
    const int64_t splits = plan.splits < stages ? plan.splits : stages;
    if (splits == 1) out.partial = nullptr;
    constexpr size_t kBytes = kStages * (Weight::kBytes + kTokens * Tokens<T>::kRowBytes);
    const dim3 grid(blocks(ceil_divide(out.outputs, kRows)), blocks(splits), blocks(ceil_divide(x.tokens, kTokens)));
    const cudaError_t error =
        launch(stream<T, Weight, Sums, kStages, kBlocks>, grid, kThreads, kBytes, queue, weight, x, out, stages);
    if (error != cudaSuccess || splits == 1) return error;
    const dim3 few(blocks(ceil_divide(out.outputs, kFinishThreads)), blocks(x.tokens < 65535 ? x.tokens : 65535));
    return launch_early(pyprune::finish<T>, few, kFinishThreads, 0, queue, out, static_cast<int>(splits));
  }
};

// Tiles of eight tokens, stages in flight, blocks: the fewer tokens, the more blocks find room, in shared memory too.
// 2:4 needs fewer registers than its bound leaves; a tighter bound made the compiler compute more of them anew.
template <template <typename> class Weight, typename T>
int run(Problem<T, Weight<T>> p) {
  constexpr bool kNm = std::is_same_v<Weight<T>, Nm<T>>;
  if (p.plan.splits < 1) return cudaErrorInvalidValue;
  if (p.x.tokens == 0 || p.out.outputs == 0) return cudaSuccess;
  if (p.plan.splits > 1 && p.out.partial == nullptr) return cudaErrorInvalidValue;
  using W = Weight<T>;
  if (!p.plan.tensor_cores) return p.template run<Plain<T, W>, kNm ? 4 : 2, 3>();
  if constexpr (std::is_same_v<T, float>) {
    return cudaErrorInvalidValue;
  } else {
    if (p.x.tokens <= 4) return p.template run<Tiled<T, W, 4>, kNm ? 4 : 2, kNm ? 5 : 6>();
    if (p.x.tokens <= 8) return p.template run<Tiled<T, W, 8>, kNm ? 4 : 2, 5>();
    if (p.x.tokens <= 16) return p.template run<Tiled<T, W, 16>, kNm ? 3 : 2, kNm ? 4 : 5>();
    if (p.x.tokens <= 32) return p.template run<Tiled<T, W, 32>, kNm ? 3 : 2, 4>();
    return p.template run<Tiled<T, W, 64>, kNm ? 3 : 2, 3>();
  }
}

bool valid(const SparseShape& s) { return s.tokens >= 0 && s.inputs >= 0 && s.inputs <= INT32_MAX && s.outputs >= 0; }

template <typename T>
Tokens<T> tokens(const SparseShape& s, const void* x) {
  return {static_cast<const T*>(x), s.tokens, s.inputs, s.inputs % kVector<T> == 0 && aligned(x, 16)};
}

template <typename T>
Output<T> output(const SparseShape& s, const void* bias, void* y, float* partial) {
  return {s.tokens, s.outputs, static_cast<const T*>(bias), static_cast<T*>(y), partial};
}

}  // namespace

int nm_linear(SparseShape s, SparsePlan plan, int dtype, const void* x, const void* values, const uint8_t* metadata,
              const void* bias, void* y, float* partial, void* stream) {
  if (!valid(s) || s.inputs % 4 != 0) return cudaErrorInvalidValue;
  return with_float(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const bool whole = s.inputs % kTile == 0 && aligned(values, 16) && aligned(metadata, 8);
    const Nm<T> weight{static_cast<const T*>(values), metadata, s.outputs, s.inputs, whole};
    return run<Nm, T>(
        {weight, tokens<T>(s, x), output<T>(s, bias, y, partial), plan, static_cast<cudaStream_t>(stream)});
  });
}

int bitmap_linear(SparseShape s, SparsePlan plan, int dtype, const void* x, const void* values, int64_t values_size,
                  const uint8_t* bitmap, const int64_t* offsets, const void* bias, void* y, float* partial,
                  void* stream) {
  if (!valid(s) || !aligned(values, 16) || !aligned(bitmap, 16)) return cudaErrorInvalidValue;
  return with_float(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const Bitmap<T> weight{static_cast<const T*>(values), values_size, bitmap, offsets, ceil_divide(s.inputs, kTile)};
    return run<Bitmap, T>(
        {weight, tokens<T>(s, x), output<T>(s, bias, y, partial), plan, static_cast<cudaStream_t>(stream)});
  });
}

}  // namespace pyprune
