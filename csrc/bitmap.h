// The GPU half of the `bitmap` family: weights of any sparsity as bits and packed values, in tiles of 64 x 64.
// The packed format is docs/architecture.md, "Packed weights". Raw pointers, no torch.
//
// Common to every function
// - Matrices are contiguous and row-major. "typed" means elements of `dtype`. Tiles are numbered row by row; there are
//   ceil(rows/64) ceil(columns/64), rows at most 65535 * 64. Any size may be zero; pointers need the alignment of their
//   elements, `bitmap` 16.
// - All pointers are device pointers of the current device; `stream` is a cudaStream_t. No function synchronises.
// - Outputs are overwritten, never accumulated into. Results are the same from run to run.
// - The return value is a cudaError_t; an unknown dtype returns cudaErrorInvalidValue.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyprune {

// weight [rows,columns] typed -> bitmap [tiles,64,8]; offsets[t+1] = ones of tile t rounded up to 8, offsets[0] = 0.
// The caller turns offsets into their running sum and allocates values.
int bitmap_scan(int64_t rows, int64_t columns, int dtype, const void* weight, uint8_t* bitmap, int64_t* offsets,
                void* stream);

// values [offsets[tiles]] typed: the nonzeros of every tile, then zeros to the next tile.
int bitmap_pack(int64_t rows, int64_t columns, int dtype, const void* weight, const uint8_t* bitmap,
                const int64_t* offsets, void* values, void* stream);

// The dense weight [rows,columns] typed, +0 where no bit is set, from values [values_size]. Bits and offsets that do
// not fit them give a wrong weight, but nothing outside values is read.
int bitmap_unpack(int64_t rows, int64_t columns, int dtype, const void* values, int64_t values_size,
                  const uint8_t* bitmap, const int64_t* offsets, void* weight, void* stream);

}  // namespace pyprune
