// CPU kernel of the `transposable` family, compiled once per instruction set.
//
// Bound by arithmetic: 90 sums of three additions, a comparison and two selections a tile, 34 operations a weight. All
// of them are done for kTiles neighbouring tiles at a time, one in each lane.
#include "transposable_cpu.h"

#include "cpu_types.h"
#include "transposable_patterns.h"

namespace pyprune {
namespace {

constexpr int kTiles = 32;  // even, so that a run of tiles starts with a byte of the mask

// The best pattern of each of `tiles` tiles, whose scores start at `scores`.
template <typename T>
void choose(const T* scores, int64_t columns, int tiles, int32_t (&best)[kTiles]) {
  float pairs[4][kPairs][kTiles];
  for (int row = 0; row < 4; ++row) {
    float score[4][kTiles] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      for (int i = 0; i < 4; ++i) score[i][tile] = to_float(scores[row * columns + 4 * tile + i]);
    }
    for (int pair = 0; pair < kPairs; ++pair) {
      for (int tile = 0; tile < kTiles; ++tile) {
        pairs[row][pair][tile] = score[kFirst[pair]][tile] + score[kSecond[pair]][tile];
      }
    }
  }
  float largest[kTiles];
  for (int pattern = 0; pattern < kPatterns; ++pattern) {
    const int* pair = kAll.pair[pattern];
    const float *a = pairs[0][pair[0]], *b = pairs[1][pair[1]], *c = pairs[2][pair[2]], *d = pairs[3][pair[3]];
    for (int tile = 0; tile < kTiles; ++tile) {
      const float sum = (a[tile] + b[tile]) + (c[tile] + d[tile]);
      const bool better = pattern == 0 || sum > largest[tile];
      largest[tile] = better ? sum : largest[tile];
      best[tile] = better ? pattern : best[tile];
    }
  }
}

template <typename T>
void prune(int64_t rows, int64_t columns, const void* scores, uint8_t* bits, int threads) {
  const int64_t row_bytes = (columns + 7) / 8;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row += 4) {
    for (int64_t column = 0; column < columns; column += 4 * kTiles) {
      const int64_t left = (columns - column) / 4;
      const int tiles = left < kTiles ? static_cast<int>(left) : kTiles;
      int32_t best[kTiles];
      choose(static_cast<const T*>(scores) + row * columns + column, columns, tiles, best);
      for (int i = 0; i < 4; ++i) {
        uint8_t* out = bits + (row + i) * row_bytes + column / 8;
        for (int tile = 0; tile < tiles; tile += 2) {
          const unsigned high = tile + 1 < tiles ? kAll.nibble[best[tile + 1]][i] << 4 : 0;
          out[tile / 2] = static_cast<uint8_t>(kAll.nibble[best[tile]][i] | high);
        }
      }
    }
  }
}

}  // namespace

extern const TransposableCpuKernels PYPRUNE_JOIN(transposable_cpu_, PYPRUNE_ISA) = {PYPRUNE_BY_DTYPE(prune)};

}  // namespace pyprune
