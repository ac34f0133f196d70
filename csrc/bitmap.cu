// Packing and unpacking weights of any sparsity. The contract is in bitmap.h.
//
// All of it is bound by memory. A block takes a tile, a thread two pieces of eight columns, 32 rows apart, so that a
// warp's accesses to the weight are whole lines (16-bit types) and a piece's bits are a byte. Packed values pass
// through shared memory, 8 or 16 KB of the tile: scattered there, an element at a time, they are read and written
// outside in 16-byte pieces one behind the other. Figures for bf16 at sparsity s; floors of 4096 x 11008 at s = 0.5 and
// H100's 3.35 TB/s; shared memory takes one access for a kept weight, of about three lanes to a bank.
//
//   kernel   bytes per weight        floor
//   scan     2 + 1/8                 29 us
//   pack     2 + 1/8 + 2 (1 - s)     42 us
//   unpack   2 (1 - s) + 1/8 + 2     42 us
#include "bitmap.cuh"
#include "bitmap.h"

namespace pyprune {
namespace {

using namespace device;

constexpr int kColumns = 8;                                 // of a piece
constexpr int kPiecesPerRow = kTile / kColumns;             // 8
constexpr int kPieces = 2;                                  // of a thread
constexpr int kThreads = kTile * kPiecesPerRow / kPieces;   // 256
constexpr size_t kSumsBytes = kThreads / 32 * sizeof(int);  // a sum for each warp

template <typename Pointer>
struct Dense {
  Pointer data;
  int64_t rows, columns;
};

// A piece of this thread's in its block's tile: the one numbered threadIdx.x + piece * kThreads.
struct Place {
  int64_t row, column;

  __device__ __forceinline__ explicit Place(int piece)
      : row(int64_t{blockIdx.y} * kTile + (threadIdx.x + piece * kThreads) / kPiecesPerRow),
        column(int64_t{blockIdx.x} * kTile + threadIdx.x % kPiecesPerRow * kColumns) {}

  // How many of the columns exist.
  template <typename Pointer>
  __device__ __forceinline__ int valid(const Dense<Pointer>& dense) const {
    if (row >= dense.rows || column >= dense.columns) return 0;
    return dense.columns - column < kColumns ? static_cast<int>(dense.columns - column) : kColumns;
  }
};

__device__ __forceinline__ int64_t this_tile() { return blockIdx.y * int64_t{gridDim.x} + blockIdx.x; }

// kWhole: rows are whole pieces on 16-byte boundaries. Known at compile time, so that one load is not waited for before
// the next is issued, and so that stores are wide.
template <bool kWhole, typename Bits>
__device__ __forceinline__ void load(Piece<Bits, kColumns>& out, const Dense<const Bits*>& dense, int piece) {
  const Place place(piece);
  const int valid = place.valid(dense);
  const Bits* source = dense.data + place.row * dense.columns + place.column;
  if constexpr (kWhole) {
    out = {};
    if (valid != 0) out.load(source);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out.elements[i] = i < valid ? source[i] : Bits{0};
  }
}

// Where the values of this thread's pieces begin in the tile; the tile's number of ones. The barrier inside is also the
// one behind which the block sees what its threads wrote to shared memory before.
__device__ __forceinline__ int first_values(const unsigned (&bits)[kPieces], int (&first)[kPieces]) {
  PYPRUNE_SHARED_MEMORY(shared);
  int* sums = reinterpret_cast<int*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int ones = __popc(bits[0]) | __popc(bits[1]) << 16;  // two counts in one, each at most 2048
  const int through = scan_warp(ones);
  if (lane == 31) sums[warp] = through;
  __syncthreads();  // Every warp's sum is there.
  int before = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    before += i < warp ? sums[i] : 0;
    total += sums[i];
  }
  before += through - ones;
  first[0] = before & 0xffff;
  first[1] = (total & 0xffff) + (before >> 16);
  return (total & 0xffff) + (total >> 16);
}

template <typename Bits>
__device__ __forceinline__ Bits* staged_values() {
  PYPRUNE_SHARED_MEMORY(shared);
  return reinterpret_cast<Bits*>(shared + kSumsBytes);
}

__device__ __forceinline__ void load_bits(unsigned (&bits)[kPieces], const uint8_t* bitmap) {
#pragma unroll
  for (int p = 0; p < kPieces; ++p) bits[p] = __ldg(bitmap + (this_tile() * kPieces + p) * kThreads + threadIdx.x);
}

// Copies `count` elements, a multiple of kTileAlignment and at most a tile, between shared and global memory, the whole
// block at it.
template <typename Bits>
__device__ __forceinline__ void copy_values(Bits* target, const Bits* source, int count, bool wide) {
  constexpr int kWide = 16 / sizeof(Bits), kMost = kTile * kTile / kWide / kThreads;
  if (wide) {
    uint4 words[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int place = i * kThreads + threadIdx.x;
      if (place < count / kWide) words[i] = reinterpret_cast<const uint4*>(source)[place];
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int place = i * kThreads + threadIdx.x;
      if (place < count / kWide) reinterpret_cast<uint4*>(target)[place] = words[i];
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) target[i] = source[i];
  }
}

template <bool kWhole, typename Bits>
__global__ void __launch_bounds__(kThreads) scan(Dense<const Bits*> weight, uint8_t* bitmap, int64_t* offsets) {
  Piece<Bits, kColumns> pieces[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) load<kWhole>(pieces[p], weight, p);
  unsigned bits[kPieces] = {};
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) bits[p] |= unsigned{is_nonzero(pieces[p].elements[i])} << i;
    bitmap[(this_tile() * kPieces + p) * kThreads + threadIdx.x] = static_cast<uint8_t>(bits[p]);
  }
  int first[kPieces];
  const int total = first_values(bits, first);
  if (threadIdx.x == 0) offsets[this_tile() + 1] = ceil_divide(total, kTileAlignment) * kTileAlignment;
  if (threadIdx.x == 0 && this_tile() == 0) offsets[0] = 0;
}

template <bool kWhole, typename Bits>
__global__ void __launch_bounds__(kThreads)
    pack(Dense<const Bits*> weight, const uint8_t* bitmap, const int64_t* offsets, Bits* values, bool wide) {
  unsigned bits[kPieces];
  load_bits(bits, bitmap);
  Piece<Bits, kColumns> pieces[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) load<kWhole>(pieces[p], weight, p);
  Bits* staged = staged_values<Bits>();
  int first[kPieces];
  const int total = first_values(bits, first);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (bits[p] >> i & 1) staged[first[p]++] = pieces[p].elements[i];
    }
  }
  const int count = (total + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  if (total + static_cast<int>(threadIdx.x) < count) staged[total + threadIdx.x] = Bits{0};
  __syncthreads();  // The tile's values are there.
  copy_values(values + offsets[this_tile()], staged, count, wide);
}

template <bool kWhole, typename Bits>
__global__ void __launch_bounds__(kThreads) unpack(const Bits* values, int64_t values_size, const uint8_t* bitmap,
                                                   const int64_t* offsets, Dense<Bits*> weight, bool wide) {
  unsigned bits[kPieces];
  load_bits(bits, bitmap);
  const TileValues mine = values_of_tile(offsets + this_tile(), values_size);
  Bits* staged = staged_values<Bits>();
  copy_values(staged, values + mine.begin, mine.count, wide);
  int first[kPieces];
  first_values(bits, first);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    Piece<Bits, kColumns> piece;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const Bits value = staged[first[p]];  // read whether it is this column's or not
      const bool kept = bits[p] >> i & 1;
      piece.elements[i] = kept ? value : Bits{0};
      first[p] += kept;
    }
    const Place place(p);
    const int valid = place.valid(weight);
    if constexpr (kWhole) {
      // Counted in 16-byte words from a pointer to such: from one to elements the compiler stores four bytes at a time.
      constexpr int kWords = kColumns * sizeof(Bits) / 16;
      auto* words = reinterpret_cast<uint4*>(weight.data);
      const int64_t begin = (place.row * (weight.columns / kColumns) + place.column / kColumns) * kWords;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (valid != 0) words[begin + i] = piece.words[i];
      }
    } else {
      Bits* target = weight.data + place.row * weight.columns + place.column;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (i < valid) target[i] = piece.elements[i];
      }
    }
  }
}

bool whole(int64_t columns, const void* weight) { return columns % kColumns == 0 && aligned(weight, 16); }

// A block to every tile.
template <typename Kernel, typename... Arguments>
cudaError_t launch_tiles(Kernel kernel, int64_t rows, int64_t columns, size_t element_bytes, void* stream,
                         Arguments... arguments) {
  const dim3 grid(blocks(ceil_divide(columns, kTile)), blocks(ceil_divide(rows, kTile)));
  const size_t shared_bytes = kSumsBytes + kTile * kTile * element_bytes;
  return launch(kernel, grid, kThreads, shared_bytes, static_cast<cudaStream_t>(stream), arguments...);
}

bool valid(int64_t rows, int64_t columns) { return rows >= 0 && columns >= 0 && rows <= int64_t{65535} * kTile; }

}  // namespace

int bitmap_scan(int64_t rows, int64_t columns, int dtype, const void* weight, uint8_t* bitmap, int64_t* offsets,
                void* stream) {
  if (!valid(rows, columns)) return cudaErrorInvalidValue;
  return with_bits(dtype, [&](auto zero) -> int {
    using Bits = decltype(zero);
    return launch_tiles(whole(columns, weight) ? scan<true, Bits> : scan<false, Bits>, rows, columns, 0, stream,
                        Dense<const Bits*>{static_cast<const Bits*>(weight), rows, columns}, bitmap, offsets);
  });
}

int bitmap_pack(int64_t rows, int64_t columns, int dtype, const void* weight, const uint8_t* bitmap,
                const int64_t* offsets, void* values, void* stream) {
  if (!valid(rows, columns)) return cudaErrorInvalidValue;
  return with_bits(dtype, [&](auto zero) -> int {
    using Bits = decltype(zero);
    return launch_tiles(whole(columns, weight) ? pack<true, Bits> : pack<false, Bits>, rows, columns, sizeof(Bits),
                        stream, Dense<const Bits*>{static_cast<const Bits*>(weight), rows, columns}, bitmap, offsets,
                        static_cast<Bits*>(values), aligned(values, 16));
  });
}

int bitmap_unpack(int64_t rows, int64_t columns, int dtype, const void* values, int64_t values_size,
                  const uint8_t* bitmap, const int64_t* offsets, void* weight, void* stream) {
  if (!valid(rows, columns)) return cudaErrorInvalidValue;
  return with_bits(dtype, [&](auto zero) -> int {
    using Bits = decltype(zero);
    return launch_tiles(whole(columns, weight) ? unpack<true, Bits> : unpack<false, Bits>, rows, columns, sizeof(Bits),
                        stream, static_cast<const Bits*>(values), values_size, bitmap, offsets,
                        Dense<Bits*>{static_cast<Bits*>(weight), rows, columns}, aligned(values, 16));
  });
}

}  // namespace pyprune
