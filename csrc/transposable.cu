// Masks that are 2:4 along both sides. The contract is in transposable.h.
//
// One thread takes two neighbouring tiles, so that it reads 16 bytes (bf16) and writes whole bytes of four rows. All
// sums stay in registers. A weight costs 2.1 bytes, so that an SM of H100 has 47 cycles for 32 lanes' weights of a
// tile; the additions are cheap, but comparisons and selections go to units of half that rate and bound the search.
// What the rows above need from the rows below depends on their two pairs alone, so 36 pairs of pairs are compared, not
// 90 patterns:
//
//   pairs a and 5 - a, which are complements   any pair and its complement: six ways, the largest found once a tile
//   pairs a and b otherwise                    5 - a and 5 - b in either order, the larger found once for (a, b), (b,
//   a)
//
// Rounding keeps order, so the largest of the sums is the sum with the largest: the value is exact. Of equal sums the
// first pattern is asked for, and which way of the pair below came first is settled once, at the end, by adding again:
// about 180 comparisons and selections a tile instead of 272.
#include "device.cuh"
#include "transposable.h"
#include "transposable_patterns.h"

namespace pyprune {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kColumns = 8;          // of a thread: a byte of the mask
constexpr int64_t kMaxRows = 65535;  // of a grid; blocks walk on from there
constexpr int kLast = kPairs - 1;    // pair p and pair kLast - p are complements

using Count = unsigned long long;

// kFirst and kSecond, whose elements device code may not name.
__host__ __device__ constexpr int first(int pair) { return pair < 3 ? 0 : pair < 5 ? 1 : 2; }
__host__ __device__ constexpr int second(int pair) { return pair < 3 ? pair + 1 : pair < 5 ? pair - 1 : 3; }

constexpr bool same_pairs() {
  for (int p = 0; p < kPairs; ++p) {
    if (first(p) != kFirst[p] || second(p) != kSecond[p]) return false;
  }
  return true;
}
static_assert(same_pairs(), "first() and second() name the pairs of transposable_patterns.h");

__device__ __forceinline__ constexpr unsigned nibble(int pair) { return 1u << first(pair) | 1u << second(pair); }

__device__ __forceinline__ constexpr unsigned lower_bits(int third, int fourth) {
  return nibble(third) << 8 | nibble(fourth) << 12;
}

// The best mask of a tile, a nibble a row; whether its scores add up to NaN.
__device__ __forceinline__ unsigned best_mask(const float (&scores)[4][4], bool& nan) {
  float pairs[4][kPairs], lower[kPairs][kPairs];
#pragma unroll
  for (int row = 0; row < 4; ++row) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) pairs[row][p] = scores[row][first(p)] + scores[row][second(p)];
  }
#pragma unroll
  for (int c = 0; c < kPairs; ++c) {
#pragma unroll
    for (int d = 0; d < kPairs; ++d) lower[c][d] = pairs[2][c] + pairs[3][d];
  }
  float complements = lower[0][kLast];
#pragma unroll
  for (int c = 1; c < kPairs; ++c) complements = fmaxf(complements, lower[c][kLast - c]);

  // Of the best so far: its sum; the sum with the first of the two ways below, or where there are six that of the rows
  // above; and its mask with the first way in the low half, with the second in the high one, which is 0 if there are
  // six.
  float largest = 0.0f, first_way = 0.0f;
  unsigned masks = 0;
#pragma unroll
  for (int a = 0; a < kPairs; ++a) {
#pragma unroll
    for (int b = 0; b < kPairs; ++b) {
      const bool six = a + b == kLast;
      const int c = kLast - (a > b ? a : b), d = kLast - (a > b ? b : a);
      const float upper = pairs[0][a] + pairs[1][b];
      const float sum = upper + (six ? complements : fmaxf(lower[c][d], lower[d][c]));
      const unsigned bits = nibble(a) | nibble(b) << 4;
      if (a + b == 0 || sum > largest) {
        largest = sum;
        first_way = six ? upper : upper + lower[c][d];
        masks = six ? bits : (bits | lower_bits(c, d)) | (bits | lower_bits(d, c)) << 16;
      }
    }
  }
  unsigned way = lower_bits(kLast, 0);
#pragma unroll
  for (int c = kLast - 1; c >= 0; --c) {
    if (first_way + lower[c][kLast - c] == largest) way = lower_bits(c, kLast - c);
  }
  const float all = ((pairs[0][0] + pairs[0][kLast]) + (pairs[1][0] + pairs[1][kLast])) +
                    ((pairs[2][0] + pairs[2][kLast]) + (pairs[3][0] + pairs[3][kLast]));
  nan = all != all;
  if (masks >> 16 == 0) return masks | way;
  return first_way == largest ? masks & 0xffff : masks >> 16;
}

template <bool kAligned, typename T>
__global__ void __launch_bounds__(kThreads) prune(int64_t bands, int64_t columns, const T* scores,
                                                  const uint8_t* previous, uint8_t* bits, Count* flips, Count* nans) {
  const int64_t row_bytes = ceil_divide(columns, kColumns);
  const int64_t byte = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  int flipped = 0;
  for (int64_t band = blockIdx.y; band < bands && byte < row_bytes; band += gridDim.y) {
    const int valid = columns - byte * kColumns < kColumns ? 4 : kColumns;
    Piece<T, kColumns> pieces[4];
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const T* source = scores + (band * 4 + row) * columns + byte * kColumns;
      if constexpr (kAligned) {
        pieces[row].load(source);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) pieces[row].elements[i] = i < valid ? source[i] : from_float<T>(0.0f);
      }
    }
    unsigned masks[2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float tile_scores[4][4];
#pragma unroll
      for (int i = 0; i < 16; ++i) tile_scores[i / 4][i % 4] = to_float(pieces[i / 4].elements[tile * 4 + i % 4]);
      bool nan;
      masks[tile] = best_mask(tile_scores, nan);
      if (nan) {  // or infinities of both signs
        int count = 0;
        for (int i = 0; i < 16; ++i) count += tile_scores[i / 4][i % 4] != tile_scores[i / 4][i % 4];
        if (count != 0) atomicAdd(nans, static_cast<Count>(count));
      }
    }
    if (valid < kColumns) masks[1] = 0;
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const int64_t place = (band * 4 + row) * row_bytes + byte;
      const unsigned mask = (masks[0] >> 4 * row & 15) | (masks[1] >> 4 * row & 15) << 4;
      bits[place] = static_cast<uint8_t>(mask);
      if (previous != nullptr) flipped += __popc(mask ^ previous[place]);
    }
  }
  flipped = sum_warp(flipped);
  if (threadIdx.x % 32 == 0 && flipped != 0) atomicAdd(flips, static_cast<Count>(flipped));
}

}  // namespace

int transposable_prune(int dtype, int64_t rows, int64_t columns, const void* scores, const uint8_t* previous_bits,
                       uint8_t* bits, int64_t* flips, int64_t* nans, void* stream) {
  return with_float(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const int64_t bands = rows / 4;
    const dim3 grid(blocks(ceil_divide(ceil_divide(columns, kColumns), kThreads)),
                    blocks(bands < kMaxRows ? bands : kMaxRows));
    const bool whole = columns % kColumns == 0 && aligned(scores, 16);
    return launch(whole ? prune<true, T> : prune<false, T>, grid, kThreads, 0, static_cast<cudaStream_t>(stream), bands,
                  columns, static_cast<const T*>(scores), previous_bits, bits, reinterpret_cast<Count*>(flips),
                  reinterpret_cast<Count*>(nans));
  });
}

}  // namespace pyprune
