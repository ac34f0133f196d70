// All 90 masks of a 4 x 4 tile with two ones in every row and column, computed by the compiler.
#pragma once

namespace pyprune {
namespace {

constexpr int kPairs = 6, kPatterns = 90;

// The places of a row's two ones: (0,1), (0,2), (0,3), (1,2), (1,3), (2,3).
constexpr int kFirst[kPairs] = {0, 0, 0, 1, 1, 2};
constexpr int kSecond[kPairs] = {1, 2, 3, 2, 3, 3};

struct Patterns {
  int pair[kPatterns][4];         // of each row
  unsigned nibble[kPatterns][4];  // the same as bits
};

// In lexicographic order of the rows' pairs.
constexpr Patterns all_patterns() {
  Patterns all{};
  int count = 0;
  for (int code = 0; code < kPairs * kPairs * kPairs * kPairs; ++code) {
    const int pair[4] = {code / 216, code / 36 % 6, code / 6 % 6, code % 6};
    int ones[4] = {};
    for (int row = 0; row < 4; ++row) {
      ++ones[kFirst[pair[row]]];
      ++ones[kSecond[pair[row]]];
    }
    if (ones[0] != 2 || ones[1] != 2 || ones[2] != 2 || ones[3] != 2) continue;
    for (int row = 0; row < 4; ++row) {
      all.pair[count][row] = pair[row];
      all.nibble[count][row] = 1u << kFirst[pair[row]] | 1u << kSecond[pair[row]];
    }
    ++count;
  }
  return all;
}

constexpr Patterns kAll = all_patterns();
static_assert(kAll.nibble[kPatterns - 1][0] == 12 && kAll.nibble[kPatterns - 1][3] == 3, "exactly 90 patterns");

}  // namespace
}  // namespace pyprune
