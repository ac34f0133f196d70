// The CPU half of the `bitmap` family: packing and unpacking. The format is docs/architecture.md, "Packed weights".
//
// Everything is contiguous; "typed" means elements of `dtype`. Tiles are 64 x 64, numbered row by row. Outputs are
// overwritten, results do not depend on `threads`, any size may be zero, no function allocates or fails. Bits and
// offsets are trusted to describe what is written; `unpack` reads nothing outside values whatever they say.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

// One instruction set's build of the kernels.
struct BitmapCpuKernels {
  // weight [rows,columns] typed -> bitmap [tiles,64,8]; offsets[t+1] = ones of tile t rounded up to 8, offsets[0] = 0.
  // The caller turns offsets into their running sum and allocates values.
  void (*scan)(DType dtype, int64_t rows, int64_t columns, const void* weight, uint8_t* bitmap, int64_t* offsets,
               int threads);

  // values [offsets[tiles]] typed: the nonzeros of every tile, then zeros to the next tile.
  void (*pack)(DType dtype, int64_t rows, int64_t columns, const void* weight, const uint8_t* bitmap,
               const int64_t* offsets, void* values, int threads);

  // The first tile whose values, from its offset to the next, are not a multiple of 8 of at most 4096 inside an array
  // of values_size, or begin off a multiple of 8; -1 if there is none.
  int64_t (*misplaced)(int64_t tiles, int64_t values_size, const int64_t* offsets);

  // weight [rows,columns] typed from a packed one with tile rows first_tile_row .. first_tile_row + ceil(rows/64).
  void (*unpack)(DType dtype, int64_t first_tile_row, int64_t rows, int64_t columns, const void* values,
                 const uint8_t* bitmap, const int64_t* offsets, int64_t values_size, void* weight, int threads);
};

}  // namespace pyprune
