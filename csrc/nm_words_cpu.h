// N:M metadata as bits: how the packed indices of a row become the 64-bit words that expand_word takes.
#pragma once

#include "expand_cpu.h"

namespace pyprune {
namespace {

// Bits of an index in the metadata.
constexpr int index_bits(int m) { return m <= 4 ? 2 : m <= 16 ? 4 : 8; }

inline int64_t metadata_bytes(int64_t kept, int m) { return (kept * index_bits(m) + 7) / 8; }

// For 2:4 a group is a nibble, of the metadata (idx0 | idx1 << 2) and of a mask.
struct PairTable {
  alignas(16) uint8_t mask[16];       // of metadata
  alignas(16) uint8_t metadata[16];   // of a mask with two ones; 0 for 0
  alignas(16) uint8_t completed[16];  // a mask of nonzeros and, where it has fewer than two, its lowest zeros
  constexpr PairTable() : mask(), metadata(), completed() {
    for (int group = 0; group < 16; ++group) {
      mask[group] = static_cast<uint8_t>(1 << (group & 3) | 1 << (group >> 2));
      int done = group, count = 0;
      for (int place = 0; place < 4; ++place) count += group >> place & 1;
      for (int place = 0; place < 4 && count < 2; ++place) {
        count += !(group >> place & 1);
        done |= 1 << place;
      }
      completed[group] = static_cast<uint8_t>(done);
    }
    for (int second = 1; second < 4; ++second) {
      for (int first = 0; first < second; ++first) {
        metadata[1 << first | 1 << second] = static_cast<uint8_t>(first | second << 2);
      }
    }
  }
};
constexpr PairTable kPairs;

// Every nibble of `word` replaced by its entry in `table`.
inline uint64_t map_nibbles(const uint8_t (&table)[16], uint64_t word) {
#if defined(__AVX2__)
  const __m128i entries = _mm_load_si128(reinterpret_cast<const __m128i*>(table)), half = _mm_set1_epi8(15);
  const __m128i both = _mm_cvtsi64_si128(static_cast<int64_t>(word));
  const __m128i low = _mm_shuffle_epi8(entries, _mm_and_si128(both, half));
  const __m128i high = _mm_shuffle_epi8(entries, _mm_and_si128(_mm_srli_epi16(both, 4), half));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(low, _mm_slli_epi16(high, 4))));
#else
  uint64_t mapped = 0;
  for (int shift = 0; shift < kWord; shift += 4) mapped |= uint64_t{table[word >> shift & 15]} << shift;
  return mapped;
#endif
}

// The 64-bit words of a mask [ceil(bytes/8)] from 2:4 metadata.
inline void pair_words(const uint8_t* metadata, int64_t bytes, uint64_t* words) {
#if defined(__AVX2__)
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kPairs.mask)));
  const __m256i half = _mm256_set1_epi8(15);
  for (; bytes >= 32; bytes -= 32, metadata += 32, words += 4) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(metadata));
    const __m256i low = _mm256_shuffle_epi8(entries, _mm256_and_si256(both, half));
    const __m256i high = _mm256_shuffle_epi8(entries, _mm256_and_si256(_mm256_srli_epi16(both, 4), half));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_or_si256(low, _mm256_slli_epi16(high, 4)));
  }
#endif
  for (; bytes > 0; bytes -= 8, metadata += 8) *words++ = map_nibbles(kPairs.mask, load_word(metadata, bytes));
}

// Walks the values of a row with any pattern, in column order.
struct PatternCursor {
  const uint8_t* metadata;
  int n, m;
  int64_t kept;       // values of the row
  int64_t value = 0;  // the next one
  int within = 0;     // its place in its group
  int64_t group = 0;  // the group's first column

  // The bits of columns begin .. begin + 63, which follow the last ones asked for.
  uint64_t next(int64_t begin) {
    const int bits = index_bits(m);
    uint64_t word = 0;
    for (; value < kept; ++value) {
      const int64_t bit = value * bits;
      const int64_t column = group + (metadata[bit / 8] >> bit % 8 & ((1 << bits) - 1));
      if (column >= begin + kWord) break;
      word |= uint64_t{1} << (column - begin);
      if (++within == n) {
        within = 0;
        group += m;
      }
    }
    return word;
  }
};

}  // namespace
}  // namespace pyprune
