// CPU kernels of the `bitmap` family, compiled once per instruction set (cpu_types.h).
//
// All are bound by memory. At s bytes an element and sparsity z: scan reads s bytes and writes 1/8; pack reads s and
// writes (1-z) s, s more where the processor fetches lines before it writes them; unpack reads (1-z) s + 1/8 and writes
// s. A row of a tile is one 64-bit word, so the work per 64 elements is a handful of vector instructions. Threads take
// rows of tiles, whose packed values are one stream.
#include "bitmap_cpu.h"

#include "expand_cpu.h"

namespace pyprune {
namespace {

constexpr int64_t kTile = kWord;
constexpr int64_t kAlignment = 8;  // elements

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A row of a tile: 64 elements at `row`, of which `width` exist; the others read as zeros from `edge`.
template <typename T>
inline const T* whole_row(const T* row, int64_t width, T (&edge)[kWord]) {
  if (width == kTile) return row;
  memset(edge, 0, sizeof edge);
  memcpy(edge, row, static_cast<size_t>(width) * sizeof(T));
  return edge;
}

template <typename T>
void scan(int64_t rows, int64_t columns, const void* weight_, uint8_t* bitmap, int64_t* offsets, int threads) {
  const T* weight = static_cast<const T*>(weight_);
  const int64_t tile_rows = ceil_div(rows, kTile), tile_columns = ceil_div(columns, kTile);
  offsets[0] = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile_row = 0; tile_row < tile_rows; ++tile_row) {
    const int64_t height = smaller(kTile, rows - tile_row * kTile);
    for (int64_t tile_column = 0; tile_column < tile_columns; ++tile_column) {
      const int64_t tile = tile_row * tile_columns + tile_column;
      const int64_t width = smaller(kTile, columns - tile_column * kTile);
      const T* source = weight + tile_row * kTile * columns + tile_column * kTile;
      uint64_t words[kTile] = {};
      int64_t count = 0;
      for (int64_t i = 0; i < height; ++i) {
        T edge[kWord];
        words[i] = nonzero_word(whole_row(source + i * columns, width, edge));
        count += ones(words[i]);
      }
      memcpy(bitmap + tile * sizeof words, words, sizeof words);
      offsets[tile + 1] = ceil_div(count, kAlignment) * kAlignment;
    }
  }
}

template <typename T>
void pack(int64_t rows, int64_t columns, const void* weight_, const uint8_t* bitmap, const int64_t* offsets,
          void* values_, int threads) {
  const T* weight = static_cast<const T*>(weight_);
  const int64_t tile_rows = ceil_div(rows, kTile), tile_columns = ceil_div(columns, kTile);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile_row = 0; tile_row < tile_rows; ++tile_row) {
    const int64_t height = smaller(kTile, rows - tile_row * kTile);
    for (int64_t tile_column = 0; tile_column < tile_columns; ++tile_column) {
      const int64_t tile = tile_row * tile_columns + tile_column;
      const int64_t width = smaller(kTile, columns - tile_column * kTile);
      const T* source = weight + tile_row * kTile * columns + tile_column * kTile;
      T* values = static_cast<T*>(values_) + offsets[tile];
      T* const end = static_cast<T*>(values_) + offsets[tile + 1];
      for (int64_t i = 0; i < height; ++i) {
        T edge[kWord];
        const uint64_t word = load_word(bitmap + (tile * kTile + i) * 8, 8);
        values += compress_word(word, whole_row(source + i * columns, width, edge), values);
      }
      for (; values < end; ++values) *values = T{};
    }
  }
}

// Four cycles a tile, 32 us for 28672 x 4096: less than a hundredth of its product with one token.
int64_t misplaced(int64_t tiles, int64_t values_size, const int64_t* offsets) {
  const auto wrong = [=](int64_t begin, int64_t end) {
    const bool outside = (begin < 0) | (end < begin) | (end > values_size);
    return outside || end - begin > kTile * kTile || ((begin | end) & 7) != 0;
  };
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (wrong(offsets[tile], offsets[tile + 1])) return tile;
  }
  return -1;
}

// Tiles side by side that are unpacked together, row by row: a row of one tile is too short a piece to write, and rows
// often lie a power of two apart, where the cache holds only a few.
constexpr int kTogether = 8;

template <typename T>
void unpack(int64_t first_tile_row, int64_t rows, int64_t columns, const void* values_, const uint8_t* bitmap,
            const int64_t* offsets, int64_t values_size, void* weight_, int threads) {
  T* weight = static_cast<T*>(weight_);
  const T* values = static_cast<const T*>(values_);
  const int64_t tile_rows = ceil_div(rows, kTile), tile_columns = ceil_div(columns, kTile);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile_row = 0; tile_row < tile_rows; ++tile_row) {
    const int64_t height = smaller(kTile, rows - tile_row * kTile);
    int64_t tile_column = 0;
    while (tile_column < tile_columns) {
      const int64_t tile = (first_tile_row + tile_row) * tile_columns + tile_column;
      int64_t together = smaller(kTogether, tile_columns - tile_column);
      T tail[kTile * kTile + kWord];
      bool whole = true;
      for (int64_t k = 0; k < together; ++k) whole &= within<kTile * kTile + kWord>(offsets[tile + k], values_size);
      if (!whole) together = 1;  // the tail is that of one tile
      const T* next[kTogether] = {readable(values, offsets[tile], values_size, tail)};
      for (int64_t k = 1; k < together; ++k) next[k] = values + offsets[tile + k];
      for (int64_t i = 0; i < height; ++i) {
        T* target = weight + (tile_row * kTile + i) * columns + tile_column * kTile;
        for (int64_t k = 0; k < together; ++k) {
          const uint64_t word = load_word(bitmap + ((tile + k) * kTile + i) * 8, 8);
          const int64_t width = smaller(kTile, columns - (tile_column + k) * kTile);
          T edge[kWord];
          T* out = target + k * kTile;
          next[k] += expand_word(word, next[k], width == kTile ? out : edge);
          if (width < kTile) memcpy(out, edge, static_cast<size_t>(width) * sizeof(T));
        }
      }
      tile_column += together;
    }
  }
}

}  // namespace

extern const BitmapCpuKernels PYPRUNE_JOIN(bitmap_cpu_, PYPRUNE_ISA) = {
    PYPRUNE_BY_DTYPE(scan),
    PYPRUNE_BY_DTYPE(pack),
    misplaced,
    PYPRUNE_BY_DTYPE(unpack),
};

}  // namespace pyprune
