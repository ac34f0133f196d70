// CPU kernels of the `nm` family, compiled once per instruction set (cpu_types.h).
//
// All are bound by memory where the pattern is 2:4, prune also for every n:4 and n:8. At s bytes an element: prune
// reads s and writes 1/8; compress reads s and writes s/2 + 1/8; decompress the reverse. prune ranks the members of a
// vector's groups by m - 1 shuffles and comparisons, without branches; 2:4 packs and unpacks 64 columns as one word, by
// tables of 16 bytes between masks and metadata. Other patterns go by plain loops over groups.
#include "nm_cpu.h"

#include "nm_words_cpu.h"

namespace pyprune {
namespace {

constexpr int64_t kNone = INT64_MAX;  // no offending group

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The bits of an element as an integer, and those of infinity.
template <typename T>
struct Bits {
  using Type = int16_t;
};
template <>
struct Bits<float> {
  using Type = int32_t;
};
constexpr int32_t infinity(float) { return kInfinity; }
constexpr int16_t infinity(bfloat16) { return 0x7f80; }
constexpr int16_t infinity(float16) { return 0x7c00; }

// ---------------------------------------------------------------------------------------------- masks, m = 4 and 8

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;  // two registers without AVX2
#endif

// Bit j is set where lane j of `flags`, all ones or zeros, is set.
template <typename Vector>
inline uint64_t lanes_set(Vector flags) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(flags[0]) == 2) {
    return _mm512_movepi16_mask((__m512i)flags);
  } else {
    return _mm512_movepi32_mask((__m512i)flags);
  }
#else
  constexpr int kCount = sizeof(Vector) / sizeof(flags[0]);
  uint64_t bits = 0;
  for (int i = 0; i < kCount; ++i) bits |= static_cast<uint64_t>(flags[i] & 1) << i;
  return bits;
#endif
}

template <typename Key>
constexpr Key kMagnitudes = sizeof(Key) == 2 ? static_cast<Key>(0x7fff) : static_cast<Key>(kMagnitude);

// The mask of 64 scores in groups of kM = 4 or 8. A member is kept when fewer than n others go before it: each compares
// itself with the one whose place differs by an exclusive or of 1, 2, ... kM - 1. `strange` is set by a NaN.
template <int kM, typename T>
uint64_t prune_word(const T* scores, int n, bool& strange) {
  using Key = typename Bits<T>::Type;
  typedef Key Keys __attribute__((vector_size(kVectorBytes)));
  constexpr int kCount = kVectorBytes / sizeof(Key);
  uint64_t word = 0;
  for (int begin = 0; begin < kWord; begin += kCount) {
    Keys bits;
    memcpy(&bits, scores + begin, sizeof bits);
    const Keys sign = bits >> (8 * sizeof(Key) - 1), magnitude = bits & kMagnitudes<Key>;
    const Keys key = (magnitude ^ sign) - sign;  // in the order of the numbers, -0 equal to +0
    const Keys nan = magnitude > infinity(T{});
    strange |= lanes_set(nan) != 0;
    Keys rank = {};  // minus the number that go before
#pragma GCC unroll 8
    for (int other = 1; other < kM; ++other) {
      Keys place, first;  // of equal ones the one further left goes before: it counts as one more
#pragma GCC unroll 32
      for (int i = 0; i < kCount; ++i) {
        place[i] = static_cast<Key>(i ^ other);
        first[i] = (i ^ other) < i;
      }
      rank += __builtin_shuffle(key, place) + first > key;
    }
    const Keys keep = rank > static_cast<Key>(-n);
    word |= lanes_set(keep) << begin;
  }
  return word;
}

// One row. Returns its first group with a NaN, or kNone.
template <int kM, typename T>
int64_t prune_row(int64_t columns, int n, int, const T* scores, uint8_t* bits) {
  bool strange = false;
  for (int64_t begin = 0; begin < columns; begin += kWord) {
    const int64_t width = smaller(kWord, columns - begin);
    T edge[kWord] = {};
    const T* source = scores + begin;
    if (width < kWord) {
      memcpy(edge, source, static_cast<size_t>(width) * sizeof(T));
      source = edge;
    }
    uint64_t word = prune_word<kM>(source, n, strange);
    if (width < kWord) word &= (uint64_t{1} << width) - 1;
    memcpy(bits + begin / 8, &word, static_cast<size_t>((width + 7) / 8));
  }
  for (int64_t j = 0; strange; ++j) {
    if (magnitude_bits(scores[j]) > static_cast<uint32_t>(infinity(T{})) * 2u) return j / kM;
  }
  return kNone;
}

// ------------------------------------------------------------------------------------------------- masks, any m

// Integers in the order of the numbers; -0 equals +0. NaN lies beyond the infinities.
template <typename T>
inline int32_t key(T value) {
  typename Bits<T>::Type bits;
  memcpy(&bits, &value, sizeof bits);
  const int32_t magnitude = static_cast<int32_t>(magnitude_bits(value) >> 1);
  return bits < 0 ? -magnitude : magnitude;
}

// One row, group by group. Returns its first group with a NaN, or kNone.
template <typename T>
int64_t prune_row_plainly(int64_t columns, int n, int m, const T* scores, uint8_t* bits) {
  memset(bits, 0, static_cast<size_t>((columns + 7) / 8));
  for (int64_t begin = 0; begin < columns; begin += m) {
    int32_t keys[256], before[256] = {};
    for (int j = 0; j < m; ++j) {
      keys[j] = key(scores[begin + j]);
      if (keys[j] > infinity(T{}) || keys[j] < -infinity(T{})) return begin / m;
      for (int i = 0; i < j; ++i) {
        const bool first = keys[i] >= keys[j];
        before[j] += first;
        before[i] += !first;
      }
    }
    for (int j = 0; j < m; ++j) {
      bits[(begin + j) / 8] |= static_cast<uint8_t>((before[j] < n) << (begin + j) % 8);
    }
  }
  return kNone;
}

template <typename T>
int64_t prune(int64_t rows, int64_t columns, int n, int m, const void* scores_, const uint8_t* previous, uint8_t* bits,
              int64_t* flips, int threads) {
  const T* scores = static_cast<const T*>(scores_);
  const auto prune_one = m == 4 ? prune_row<4, T> : m == 8 ? prune_row<8, T> : prune_row_plainly<T>;
  if (columns == 0) rows = 0;
  const int64_t row_bytes = (columns + 7) / 8;
  int64_t first = kNone, changed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : first) reduction(+ : changed)
  for (int64_t row = 0; row < rows; ++row) {
    uint8_t* row_bits = bits + row * row_bytes;
    const int64_t group = prune_one(columns, n, m, scores + row * columns, row_bits);
    if (group != kNone) first = smaller(first, row * (columns / m) + group);
    if (!previous) continue;
    const uint8_t* before = previous + row * row_bytes;
    for (int64_t b = 0; b < row_bytes; b += 8) {
      changed += ones(load_word(row_bits + b, row_bytes - b) ^ load_word(before + b, row_bytes - b));
    }
  }
  *flips = changed;
  return first == kNone ? -1 : first;
}

// ----------------------------------------------------------------------------------------------------------- packing

// One row of any pattern. Returns its first group with more than n nonzeros, or kNone.
template <typename T>
int64_t compress_row(int64_t columns, int n, int m, const T* weight, T* values, uint8_t* metadata) {
  const int bits = index_bits(m);
  memset(metadata, 0, static_cast<size_t>(metadata_bytes(columns / m * n, m)));
  int64_t value = 0;
  for (int64_t group = 0; group < columns / m; ++group) {
    const T* members = weight + group * m;
    int spare = n;  // zeros to take along
    for (int j = 0; j < m; ++j) spare -= magnitude_bits(members[j]) != 0;
    if (spare < 0) return group;
    for (int j = 0; j < m; ++j) {
      const bool nonzero = magnitude_bits(members[j]) != 0;
      if (!nonzero && spare-- <= 0) continue;
      values[value] = nonzero ? members[j] : T{};
      metadata[value * bits / 8] |= static_cast<uint8_t>(j << value * bits % 8);
      ++value;
    }
  }
  return kNone;
}

// One row of 2:4, 64 columns at a time.
template <typename T>
int64_t compress_row_pairs(int64_t columns, const T* weight, T* values, uint8_t* metadata) {
  for (int64_t begin = 0; begin < columns; begin += kWord) {
    const int64_t width = smaller(kWord, columns - begin);
    const T* source = weight + begin;
    T edge[kWord], clean[kWord];
    if (width < kWord) {
      memset(static_cast<void*>(edge), 0, sizeof edge);
      memcpy(edge, source, static_cast<size_t>(width) * sizeof(T));
      source = edge;
    }
    const uint64_t nonzero = nonzero_word(source);
    const uint64_t exist = ~uint64_t{0} >> (kWord - width);
    const uint64_t kept = map_nibbles(kPairs.completed, nonzero) & exist;
    if (ones(kept) != width / 2) {
      for (int64_t g = 0;; ++g) {
        if (ones(kept >> 4 * g & 15) != 2) return begin / 4 + g;
      }
    }
    select_word(nonzero, source, clean);  // -0 becomes +0
    values += compress_word(kept, clean, values);
    const uint64_t packed = map_nibbles(kPairs.metadata, kept);
    memcpy(metadata + begin / 8, &packed, static_cast<size_t>((width + 7) / 8));
  }
  return kNone;
}

template <typename T>
int64_t compress(int64_t rows, int64_t columns, int n, int m, const void* weight_, void* values_, uint8_t* metadata_,
                 int threads) {
  if (columns == 0) rows = 0;
  const int64_t kept = columns / m * n, row_bytes = metadata_bytes(kept, m);
  const bool pairs = n == 2 && m == 4;
  int64_t first = kNone;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : first)
  for (int64_t row = 0; row < rows; ++row) {
    const T* weight = static_cast<const T*>(weight_) + row * columns;
    T* values = static_cast<T*>(values_) + row * kept;
    uint8_t* metadata = metadata_ + row * row_bytes;
    const int64_t group = pairs ? compress_row_pairs(columns, weight, values, metadata)
                                : compress_row(columns, n, m, weight, values, metadata);
    if (group != kNone) first = smaller(first, row * (columns / m) + group);
  }
  return first == kNone ? -1 : first;
}

// One row of any pattern.
template <typename T>
void decompress_row(int64_t columns, int n, int m, const T* values, const uint8_t* metadata, T* weight) {
  const int bits = index_bits(m);
  const int64_t kept = columns / m * n;
  memset(weight, 0, static_cast<size_t>(columns) * sizeof(T));
  for (int64_t value = 0; value < kept; ++value) {
    const int64_t bit = value * bits;
    const int place = metadata[bit / 8] >> bit % 8 & ((1 << bits) - 1);
    if (place < m) weight[value / n * m + place] = values[value];  // Else damaged: nothing is written elsewhere.
  }
}

// One row of 2:4. `size` values exist from `values` on, of which expand_word may read some that are not this row's.
template <typename T>
void decompress_row_pairs(int64_t columns, const T* values, int64_t size, const uint8_t* metadata, T* weight) {
  for (int64_t begin = 0; begin < columns; begin += kWord) {
    const int64_t width = smaller(kWord, columns - begin);
    const uint64_t packed = load_word(metadata + begin / 8, (width + 7) / 8);
    const uint64_t word = map_nibbles(kPairs.mask, packed) & ~uint64_t{0} >> (kWord - width);
    T tail[kWord * 3 / 2], edge[kWord];
    const T* source = readable(values, begin / 2, size, tail);
    expand_word(word, source, width == kWord ? weight + begin : edge);
    if (width < kWord) memcpy(weight + begin, edge, static_cast<size_t>(width) * sizeof(T));
  }
}

template <typename T>
void decompress(int64_t rows, int64_t columns, int n, int m, const void* values_, const uint8_t* metadata_,
                void* weight_, int threads) {
  if (columns == 0) rows = 0;
  const int64_t kept = columns / m * n, row_bytes = metadata_bytes(kept, m);
  const bool pairs = n == 2 && m == 4;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* values = static_cast<const T*>(values_) + row * kept;
    T* weight = static_cast<T*>(weight_) + row * columns;
    const uint8_t* metadata = metadata_ + row * row_bytes;
    if (pairs) {
      decompress_row_pairs(columns, values, (rows - row) * kept, metadata, weight);
    } else {
      decompress_row(columns, n, m, values, metadata, weight);
    }
  }
}

}  // namespace

extern const NmCpuKernels PYPRUNE_JOIN(nm_cpu_, PYPRUNE_ISA) = {
    [](DType dtype, auto... arguments) {
      switch (dtype) {
        case kFloat32: return prune<float>(arguments...);
        case kBFloat16: return prune<bfloat16>(arguments...);
        case kFloat16: return prune<float16>(arguments...);
      }
      return int64_t{-1};
    },
    [](DType dtype, auto... arguments) {
      switch (dtype) {
        case kFloat32: return compress<float>(arguments...);
        case kBFloat16: return compress<bfloat16>(arguments...);
        case kFloat16: return compress<float16>(arguments...);
      }
      return int64_t{-1};
    },
    PYPRUNE_BY_DTYPE(decompress),
};

}  // namespace pyprune
