// SparseGPT's solve inside a slab, compiled once per instruction set (cpu_types.h).
//
// Threads share the rows. kLanes rows are solved together, transposed, so that a vector holds one column of them and
// the dependent steps of all run side by side. A slab of 128 columns is 8128 multiply-adds a row, and its tile, 8 KB,
// stays in the first-level cache, with U's rows streamed from the second: bound by one load, one multiply-add and one
// store a vector, a hundredth of the matrix product behind the slab.
#include "sparsegpt_cpu.h"

#include <math.h>

#include "cpu_types.h"

namespace pyprune {
namespace {

constexpr int kLanes = 16;

// The slab's columns of kLanes rows, one column behind the other.
using Tile = float[kMaxSlab][kLanes];
using Kept = int32_t[kMaxSlab][kLanes];  // 1 = stays

// Chooses the n highest scores (w / U_jj)^2 of each row among the m columns from `first` on.
void choose(const SparseGptSlab& s, const float* upper, const Tile& tile, int first, Kept& kept) {
  Tile scores;
  for (int j = first; j < first + s.m; ++j) {
    const float diagonal = upper[j * s.columns + j];
    for (int r = 0; r < kLanes; ++r) {
      const float ratio = tile[j][r] / diagonal;
      scores[j][r] = ratio * ratio;
    }
  }
  for (int j = first; j < first + s.m; ++j) {
    int32_t ahead[kLanes] = {};
    for (int k = first; k < first + s.m; ++k) {
      for (int r = 0; r < kLanes; ++r) {
        ahead[r] += k < j ? scores[k][r] >= scores[j][r] : scores[k][r] > scores[j][r];
      }
    }
    for (int r = 0; r < kLanes; ++r) kept[j][r] = ahead[r] < s.n;
  }
}

// Rounds one column; scale and zero are those of the rows' group.
void round_column(const float* w, const float* scale, const float* zero, float levels, float* out) {
#pragma omp simd
  for (int r = 0; r < kLanes; ++r) {
    float code = rintf(w[r] / scale[r]) + zero[r];
    code = code < 0.0f ? 0.0f : code;
    code = code > levels ? levels : code;
    out[r] = scale[r] * (code - zero[r]);
  }
}

void solve_rows(const SparseGptSlab& s, int64_t first_row, int count) {
  const float* upper = s.upper + s.begin * s.columns + s.begin;
  Tile tile = {}, errors;
  Kept kept = {};
  for (int r = 0; r < count; ++r) {
    const int64_t start = (first_row + r) * s.columns + s.begin;
    for (int j = 0; j < s.width; ++j) tile[j][r] = s.work[start + j];
    for (int j = 0; j < s.width && s.n == 0; ++j) kept[j][r] = s.keep[start + j];
  }
  float scale[kLanes], zero[kLanes], solved[kLanes];
  int64_t group = -1;
  for (int r = 0; r < kLanes; ++r) scale[r] = 1.0f, zero[r] = 0.0f;
  for (int j = 0; j < s.width; ++j) {
    if (s.n != 0 && j % s.m == 0) choose(s, upper, tile, j, kept);
    const float *row = upper + j * s.columns, *w = tile[j];
    memcpy(solved, w, sizeof solved);
    if (s.scale) {
      const int64_t now = (s.begin + j) * s.groups / s.columns;
      for (int r = 0; r < count && now != group; ++r) {
        scale[r] = s.scale[(first_row + r) * s.groups + now];
        zero[r] = s.zero[(first_row + r) * s.groups + now];
      }
      group = now;
      round_column(w, scale, zero, s.levels, solved);
    }
    const float diagonal = row[j];
    float error[kLanes];
#pragma omp simd
    for (int r = 0; r < kLanes; ++r) {
      const float stays = kept[j][r] ? solved[r] : 0.0f;
      error[r] = (tile[j][r] - stays) / diagonal;
      errors[j][r] = error[r];
      tile[j][r] = stays;
    }
    for (int k = j + 1; k < s.width; ++k) {
      const float u = row[k];
#pragma omp simd
      for (int r = 0; r < kLanes; ++r) tile[k][r] -= error[r] * u;
    }
  }
  for (int r = 0; r < count; ++r) {
    const int64_t start = (first_row + r) * s.columns + s.begin;
    for (int j = 0; j < s.width; ++j) s.work[start + j] = tile[j][r];
    for (int j = 0; j < s.width; ++j) s.errors[(first_row + r) * s.width + j] = errors[j][r];
    for (int j = 0; j < s.width && s.n != 0; ++j) s.keep[start + j] = static_cast<uint8_t>(kept[j][r]);
  }
}

void slab(const SparseGptSlab& s, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s.rows; row += kLanes) {
    solve_rows(s, row, static_cast<int>(s.rows - row < kLanes ? s.rows - row : kLanes));
  }
}

// The scores of one row of the slab as integers of the same order: squares have no sign.
void score_row(const SparseGptSlab& s, const float* diagonal, int64_t row, int32_t* scores) {
  const float* w = s.work + row * s.columns + s.begin;
#pragma omp simd
  for (int j = 0; j < s.width; ++j) {
    const float ratio = w[j] / diagonal[j];
    scores[j] = bits_of(ratio * ratio);
  }
}

// A radix select: three rounds of counting find the 31 bits of the highest score that goes, one pass over the slab
// each.
void select(const SparseGptSlab& s, int64_t drop, int threads) {
  constexpr int kMaxBins = 2048;
  constexpr struct {
    int shift, bits;
  } kRounds[] = {{20, 11}, {9, 11}, {0, 9}};
  float diagonal[kMaxSlab];
  for (int j = 0; j < s.width; ++j) diagonal[j] = s.upper[(s.begin + j) * (s.columns + 1)];

  int32_t found = 0;    // the bits so far
  int64_t left = drop;  // how many go among the scores that begin with them
  int64_t equal = 0;    // how many there are
  for (const auto& round : kRounds) {
    const int32_t bins = 1 << round.bits;
    int64_t counts[kMaxBins] = {};
#pragma omp parallel num_threads(threads)
    {
      int32_t mine[kMaxBins] = {}, scores[kMaxSlab];
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < s.rows; ++row) {
        score_row(s, diagonal, row, scores);
        for (int j = 0; j < s.width; ++j) {
          const int32_t begins = scores[j] >> round.shift;
          if (begins >> round.bits == found) ++mine[begins & (bins - 1)];
        }
      }
#pragma omp critical(pyprune_sparsegpt_select)
      for (int32_t bin = 0; bin < bins; ++bin) counts[bin] += mine[bin];
    }
    int32_t bin = 0;
    for (; bin < bins - 1 && counts[bin] < left; ++bin) left -= counts[bin];
    found = found << round.bits | bin;
    equal = counts[bin];
  }

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s.rows; ++row) {
    int32_t scores[kMaxSlab];
    score_row(s, diagonal, row, scores);
    uint8_t* keep = s.keep + row * s.columns + s.begin;
    for (int j = 0; j < s.width; ++j) keep[j] = drop == 0 || scores[j] > found;
  }
  for (int64_t row = 0; row < s.rows && drop != 0 && equal > left; ++row) {  // ties at the threshold are rare
    int32_t scores[kMaxSlab];
    score_row(s, diagonal, row, scores);
    for (int j = 0; j < s.width; ++j) {
      if (scores[j] == found && left-- <= 0) s.keep[row * s.columns + s.begin + j] = 1;
    }
  }
}

}  // namespace

extern const SparseGptCpuKernels PYPRUNE_JOIN(sparsegpt_cpu_, PYPRUNE_ISA) = {slab, select};

}  // namespace pyprune
