// Packing and unpacking weights of any sparsity. The contract is in bitmap.h.
//
// All of it is bound by memory. A block takes a tile, a thread a quarter of one of its 64 rows: sixteen columns, 32
// bytes of a 16-bit type, with consecutive threads in the order of the values. 32 bytes of shared memory, for the sums
// of the eight warps. Figures for bf16 at sparsity s; floors of 4096 x 11008 at s = 0.5 and H100's 3.35 TB/s;
// instructions of a lane in sm_90a's machine code, "of" what an SM can issue in the time in which it moves that weight.
//
//   kernel   bytes per weight        floor    instructions per weight, of
//   scan     2 + 1/8                 29 us     8                       19
//   pack     2 + 1/8 + 2 (1 - s)     42 us    16                       27
//   unpack   2 (1 - s) + 1/8 + 2     42 us    17                       27
#include "bitmap.h"
#include "device.cuh"

namespace pyprune {
namespace {

using namespace device;

constexpr int kTile = 64;
constexpr int kColumns = 16;                                  // of a thread
constexpr int kThreadsPerRow = kTile / kColumns;              // 4
constexpr int kThreads = kTile * kThreadsPerRow;              // 256
constexpr int kAlignment = 8;                                 // of a tile's values, in elements
constexpr size_t kSharedBytes = kThreads / 32 * sizeof(int);  // a sum for each warp

// A dense matrix, and whether its rows are whole pieces of sixteen elements on 16-byte boundaries.
template <typename Pointer>
struct Dense {
  Pointer data;
  int64_t rows, columns;
  bool whole;
};

// The sixteen columns that this thread has of its block's tile.
struct Place {
  int64_t tile, row, column;

  template <typename Pointer>
  __device__ __forceinline__ explicit Place(const Dense<Pointer>& dense)
      : tile(blockIdx.y * int64_t{gridDim.x} + blockIdx.x),
        row(int64_t{blockIdx.y} * kTile + threadIdx.x / kThreadsPerRow),
        column(int64_t{blockIdx.x} * kTile + threadIdx.x % kThreadsPerRow * kColumns) {}

  // How many of the columns exist.
  template <typename Pointer>
  __device__ __forceinline__ int valid(const Dense<Pointer>& dense) const {
    if (row >= dense.rows || column >= dense.columns) return 0;
    return dense.columns - column < kColumns ? static_cast<int>(dense.columns - column) : kColumns;
  }
};

template <typename Bits>
__device__ __forceinline__ void load(Piece<Bits, kColumns>& out, const Dense<const Bits*>& dense, const Place& place) {
  const int valid = place.valid(dense);
  const Bits* source = dense.data + place.row * dense.columns + place.column;
  if (dense.whole && valid == kColumns) {
    out.load(source);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out.elements[i] = i < valid ? source[i] : Bits{0};
  }
}

// The bits of this thread's columns, and where their values begin in the tile. `total` is the tile's number of ones.
__device__ __forceinline__ int first_value(unsigned bits, int* total) {
  PYPRUNE_SHARED_MEMORY(shared);
  int* sums = reinterpret_cast<int*>(shared);
  const int ones = __popc(bits), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int through = scan_warp(ones);
  if (lane == 31) sums[warp] = through;
  __syncthreads();  // Every warp's sum is there.
  int before = 0;
  *total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    before += i < warp ? sums[i] : 0;
    *total += sums[i];
  }
  return before + through - ones;
}

__device__ __forceinline__ unsigned bits_of(const uint16_t* bitmap, int64_t tile) {
  return __ldg(bitmap + tile * kThreads + threadIdx.x);
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads) scan(Dense<const Bits*> weight, uint16_t* bitmap, int64_t* offsets) {
  const Place place(weight);
  Piece<Bits, kColumns> piece;
  load(piece, weight, place);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) bits |= unsigned{is_nonzero(piece.elements[i])} << i;
  bitmap[place.tile * kThreads + threadIdx.x] = static_cast<uint16_t>(bits);
  int total;
  first_value(bits, &total);
  if (threadIdx.x == 0) offsets[place.tile + 1] = ceil_divide(total, kAlignment) * kAlignment;
  if (threadIdx.x == 0 && place.tile == 0) offsets[0] = 0;
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    pack(Dense<const Bits*> weight, const uint16_t* bitmap, const int64_t* offsets, Bits* values) {
  const Place place(weight);
  Piece<Bits, kColumns> piece;
  load(piece, weight, place);
  const unsigned bits = bits_of(bitmap, place.tile);
  int total;
  Bits* target = values + offsets[place.tile] + first_value(bits, &total);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (bits >> i & 1) *target++ = piece.elements[i];
  }
  const int64_t past = offsets[place.tile] + total + threadIdx.x;
  if (past < offsets[place.tile + 1]) values[past] = Bits{0};
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    unpack(const Bits* values, const uint16_t* bitmap, const int64_t* offsets, Dense<Bits*> weight) {
  const Place place(weight);
  const unsigned bits = bits_of(bitmap, place.tile);
  int total;
  const Bits* source = values + offsets[place.tile] + first_value(bits, &total);
  Piece<Bits, kColumns> piece;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    piece.elements[i] = Bits{0};
    if (bits >> i & 1) piece.elements[i] = __ldg(source++);
  }
  const int valid = place.valid(weight);
  Bits* target = weight.data + place.row * weight.columns + place.column;
  if (weight.whole && valid == kColumns) {
    piece.store(target);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i < valid) target[i] = piece.elements[i];
    }
  }
}

template <typename Pointer>
Dense<Pointer> dense(Pointer data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns % kColumns == 0 && aligned(data, 16)};
}

// A block to every tile.
template <typename Kernel, typename... Arguments>
cudaError_t launch_tiles(Kernel kernel, int64_t rows, int64_t columns, void* stream, Arguments... arguments) {
  const dim3 grid(blocks(ceil_divide(columns, kTile)), blocks(ceil_divide(rows, kTile)));
  return launch(kernel, grid, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream), arguments...);
}

bool valid(int64_t rows, int64_t columns) { return rows >= 0 && columns >= 0 && rows <= int64_t{65535} * kTile; }

}  // namespace

int bitmap_scan(int64_t rows, int64_t columns, int dtype, const void* weight, uint8_t* bitmap, int64_t* offsets,
                void* stream) {
  if (!valid(rows, columns)) return cudaErrorInvalidValue;
  return with_bits(dtype, [&](auto zero) -> int {
    using Bits = decltype(zero);
    return launch_tiles(scan<Bits>, rows, columns, stream, dense(static_cast<const Bits*>(weight), rows, columns),
                        reinterpret_cast<uint16_t*>(bitmap), offsets);
  });
}

int bitmap_pack(int64_t rows, int64_t columns, int dtype, const void* weight, const uint8_t* bitmap,
                const int64_t* offsets, void* values, void* stream) {
  if (!valid(rows, columns)) return cudaErrorInvalidValue;
  return with_bits(dtype, [&](auto zero) -> int {
    using Bits = decltype(zero);
    return launch_tiles(pack<Bits>, rows, columns, stream, dense(static_cast<const Bits*>(weight), rows, columns),
                        reinterpret_cast<const uint16_t*>(bitmap), offsets, static_cast<Bits*>(values));
  });
}

int bitmap_unpack(int64_t rows, int64_t columns, int dtype, const void* values, const uint8_t* bitmap,
                  const int64_t* offsets, void* weight, void* stream) {
  if (!valid(rows, columns)) return cudaErrorInvalidValue;
  return with_bits(dtype, [&](auto zero) -> int {
    using Bits = decltype(zero);
    return launch_tiles(unpack<Bits>, rows, columns, stream, static_cast<const Bits*>(values),
                        reinterpret_cast<const uint16_t*>(bitmap), offsets,
                        dense(static_cast<Bits*>(weight), rows, columns));
  });
}

}  // namespace pyprune
