// Where the values of a bitmap's tile lie: what the kernels that read them share.
#pragma once

#include "device.cuh"

namespace pyprune::device {

constexpr int kTile = 64;          // rows and columns of a tile
constexpr int kTileAlignment = 8;  // of a tile's values, in elements

struct TileValues {
  int64_t begin;
  int count;
};

// Those of the tile whose place is *offset, in an array of `size`. Offsets that are no tile's give none: nothing
// outside the array is read, and no address is not a multiple of the alignment. (What the tile's bits then stand for is
// whatever shared memory holds.)
__device__ __forceinline__ TileValues values_of_tile(const int64_t* offset, int64_t size) {
  const int64_t begin = __ldg(offset), end = __ldg(offset + 1);
  const bool fits =
      begin >= 0 && begin <= end && end <= size && end - begin <= kTile * kTile && begin % kTileAlignment == 0;
  return {begin, fits ? static_cast<int>(end - begin) : 0};
}

}  // namespace pyprune::device
