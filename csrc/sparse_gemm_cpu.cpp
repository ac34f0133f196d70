// CPU kernels of the `sparse_gemm` family, compiled once per instruction set (cpu_types.h).
//
// One token is bound by memory: a weight of 16 bits costs 2 (1-s) + 0.127 bytes as a bitmap and 1.125 as 2:4, against 2
// dense. A core that reads 35 GB/s passes 64 elements at 50 % in about 8 cycles, so a word of 64 may cost no more: two
// loads, two vpexpandw and, for every token, two vdpbf16ps. From about 8 tokens on the products bound it, for dense
// weights as well: 32 multiply-adds a cycle, so 2 cycles a word and token, and decoding a word to memory (about 12) is
// shared by all tokens.
//
// A thread takes a block of rows and walks its columns. Three ways through them:
// - up to kDotTokens tokens, bf16 with AVX-512 BF16 and all types with AVX2: decode and multiply in registers, chunk by
//   chunk; the sums of a row and token are a vector in the first-level cache, added up across its lanes at the end.
// - the same tokens, other types: decode to a panel in the first-level cache, then the same.
// - more: decode to a panel of 256 columns, then small products with 16 tokens to a vector and weights broadcast, for
//   which a row's sums are loaded and stored once a panel. Meanwhile what the next panel needs is on its way.
// The elements of a panel are bf16 with AVX-512 BF16, fp32 otherwise. Each sum has one order, given by the shape.
#include "sparse_gemm_cpu.h"

#include "nm_words_cpu.h"

namespace pyprune {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------------ vectors

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float Eight __attribute__((vector_size(32)));

// Eight lanes where tokens do not fill whole vectors.
template <bool kWhole>
struct Filled {
  using Type = Vector;
};
template <>
struct Filled<false> {
  using Type = Eight;
};

template <typename V = Vector>
inline V load(const float* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <typename V>
inline void store(float* to, V value) {
  memcpy(to, &value, sizeof value);
}
inline float add_lanes(Vector value) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// The elements of a panel and of x beside it are fp32, or bf16 where two of them make one multiply-add for each lane.
template <typename T>
struct Panel {
  using Element = float;
};
template <typename V, typename E>
struct Operands {
  using Type = V;
};
#if defined(__AVX512BF16__)
template <>
struct Panel<bfloat16> {
  using Element = bfloat16;
};
template <>
struct Operands<Vector, bfloat16> {
  using Type = __m512bh;
};
template <>
struct Operands<Eight, bfloat16> {
  using Type = __m256bh;
};
#endif
template <typename V, typename E>
using Operand = typename Operands<V, E>::Type;
template <typename E>
constexpr int kStep = sizeof(E) == 2 ? 2 : 1;  // elements of a lane

template <typename E, typename T>
inline E to_element(T value) {
  if constexpr (sizeof(T) == sizeof(E)) {
    return value;
  } else {
    return to_float(value);
  }
}

template <typename O>
inline O broadcast(const float* from) {
  return O{} + *from;
}
template <typename V>
inline V multiply_add(V a, V b, V sum) {
  return sum + a * b;
}
#if defined(__AVX512BF16__)
template <typename O = __m512bh>
inline O load(const bfloat16* from) {
  O value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <typename O>
inline O broadcast(const bfloat16* from) {
  int32_t pair;
  memcpy(&pair, from, sizeof pair);
  if constexpr (sizeof(O) == 64) return (O)_mm512_set1_epi32(pair);
  if constexpr (sizeof(O) == 32) return (O)_mm256_set1_epi32(pair);
}
inline Vector multiply_add(__m512bh a, __m512bh b, Vector sum) { return (Vector)_mm512_dpbf16_ps((__m512)sum, a, b); }
inline Eight multiply_add(__m256bh a, __m256bh b, Eight sum) { return (Eight)_mm256_dpbf16_ps((__m256)sum, a, b); }
#endif

// ------------------------------------------------------------------------------------------- where weights come from
//
// A source deals out W in blocks of kRows rows and chunks of kWords words of 64 columns, as a Walk over one block:
// next() goes to the next chunk, and take(i, w) gives word w of its row i, zeros outside W. Words of a row must be
// taken in order, and for a bitmap rows too. take() gives elements as they are stored, in memory or (16-bit types with
// VBMI2) in two registers.

#if defined(__AVX512VBMI2__)
struct Halves {
  __m512i low, high;
};

template <typename T>
inline Halves expand_halves(uint64_t word, const T* values) {
  const uint32_t first = static_cast<uint32_t>(word);
  return {expand_half(first, values), expand_half(static_cast<uint32_t>(word >> 32), values + ones(first))};
}

inline Halves select_halves(uint64_t word, const void* values) {
  const __mmask32 first = static_cast<__mmask32>(word), second = static_cast<__mmask32>(word >> 32);
  return {_mm512_maskz_loadu_epi16(first, values),
          _mm512_maskz_loadu_epi16(second, static_cast<const uint16_t*>(values) + 32)};
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
#define PYPRUNE_EIGHTS
inline __m128i load_eight(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

inline __m256 widen(__m128i eight, bfloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}
inline __m256 widen(__m128i eight, float16) { return _mm256_cvtph_ps(eight); }

// Eight elements in fp32.
template <typename T>
inline __m256 load_wide(const T* from) {
  return widen(load_eight(from), T{});
}
inline __m256 load_wide(const float* from) { return _mm256_loadu_ps(from); }

// The next of `values` at the ones of `subset`, in fp32.
template <typename T>
inline __m256 expand_eight(int subset, const T* values) {
  return widen(_mm_shuffle_epi8(load_eight(values), load_eight(kExpand.bytes[subset])), T{});
}
inline __m256 expand_eight(int subset, const float* values) {
  return _mm256_castsi256_ps(wide_expand_eight(subset, values));
}

// Calls use(place, eight elements in fp32) for the 64 that expand_word would write. Returns how many values were taken.
template <typename T, typename Use>
inline int expand_eights(uint64_t word, const T* values, Use use) {
  int taken = 0;
  for (int j = 0; j < kWord; j += 8) {
    const int subset = static_cast<int>(word >> j & 0xff);
    use(j, expand_eight(subset, values + taken));
    taken += ones(subset);
  }
  return taken;
}

// The same for the elements that select_word would write.
template <typename T, typename Use>
inline void select_eights(uint64_t word, const T* in, Use use) {
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int j = 0; j < kWord; j += 8) {
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(word >> j & 0xff)), places);
    const __m256 keep = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, places));
    use(j, _mm256_and_ps(load_wide(in + j), keep));
  }
}
#endif

// The sources with whole rows take few at a time, because each row is a stream of its own, and longer pieces of them:
// kManyRows where tokens are many and the products bound them, and where they are few so many as measured best. More
// than four are streams that the processor does not foresee.
constexpr int kLongWords = 4, kPanelColumns = kWord * kLongWords, kManyRows = 24, kDenseRows = 4;
#if defined(__AVX512F__)
constexpr int kNmRows = 16;
#else
constexpr int kNmRows = 4;
#endif

// What the next panel is decoded from, as cache lines. They are asked for one by one while this panel is multiplied, so
// that reading memory and multiplying go on together; requests in a bunch hold up the loads behind them.
struct Ahead {
  static constexpr int kMost = 640;
  const char* lines[kMost];
  int count = 0;

  void add(const void* from, int64_t bytes) {
    const char* line = static_cast<const char*>(from);
    for (const char* end = line + bytes; line < end && count < kMost; line += 64) lines[count++] = line;
  }
};

template <typename T>
struct BitmapSource {
  static constexpr int kRows = kWord, kWords = 1;
  const T* values;
  int64_t values_size;
  const uint8_t* bitmap;
  const int64_t* offsets;
  int64_t words;  // of a row: tiles side by side

  struct Walk {
    const BitmapSource& from;
    int64_t tile;
    const int64_t last;  // behind this block's
    const T* packed = nullptr;
    uint64_t words[kRows] = {};
    T tail[kWord * kWord + kWord] = {};

    Walk(const BitmapSource& source, int64_t block)
        : from(source), tile(block * source.words), last(tile + source.words) {}

    void next() {
      memcpy(words, from.bitmap + tile * sizeof words, sizeof words);
      packed = readable(from.values, from.offsets[tile], from.values_size, tail);
      ++tile;
    }

    // The lines of the next panel.
    void list(Ahead& ahead) const {
      const int64_t stop = smaller(tile + kLongWords, last), begin = from.offsets[tile], end = from.offsets[stop];
      if (stop == tile || begin < 0 || end < begin || end > from.values_size) return;
      ahead.add(from.bitmap + tile * sizeof words, (stop - tile) * sizeof words);
      ahead.add(from.values + begin, (end - begin) * sizeof(T));
    }

    void take_all(T* out, int stride) {
      next();
      const T* source = packed;  // a copy: the compiler must expect `out` to change the member
      for (int i = 0; i < kRows; ++i) source += expand_word(words[i], source, out + i * stride);
      packed = source;
    }

#if defined(PYPRUNE_EIGHTS)
    template <typename Use>
    void take_eights(int i, int, Use use) {
      packed += expand_eights(words[i], packed, use);
    }
#endif

#if defined(__AVX512VBMI2__)
    Halves take(int i, int) {
      const Halves halves = expand_halves(words[i], packed);
      packed += ones(words[i]);
      return halves;
    }
#endif
  };
};

// Asks for `bytes` at `row` + `ahead` bytes, which are needed later. Into the second-level cache: the first level has
// few requests at a time. Called for each piece as it is used, since requests in a bunch hold up the loads behind them.
inline void fetch_ahead(const void* row, int64_t ahead, int bytes) {
  for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(row) + ahead + byte, 0, 2);
}

// kFew: for up to kDotTokens tokens, whose time is that of reading: they ask for what comes far ahead as they go.
template <typename T, bool kFew>
struct NmSource {
  static constexpr int kRows = kFew ? kNmRows : kManyRows, kWords = kLongWords;
  const T* values;
  const uint8_t* metadata;
  int64_t rows, columns;
  int n, m;
  int64_t words = ceil_div(columns, kWord);  // of a row

  struct Walk {
    const NmSource& from;
    const T* const end;
    int present;  // rows of this block
    int64_t column = -kWord * kWords;
    int64_t values_ahead = 0, metadata_ahead = 0;  // bytes from what a row needs now to what it asks for
    const T* packed[kRows] = {};
    PatternCursor cursors[kRows] = {};
    uint64_t words[kRows][kWords] = {};

    Walk(const NmSource& source, int64_t block)
        : from(source),
          end(source.values + source.rows * (source.columns / source.m * source.n)),
          present(static_cast<int>(smaller(kRows, source.rows - block * kRows))) {
      const int64_t kept = from.columns / from.m * from.n;
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = i < present ? block * kRows + i : 0;  // one that is not there has no bits
        packed[i] = from.values + row * kept;
        cursors[i] = {from.metadata + row * metadata_bytes(kept, from.m), from.n, from.m, kept};
      }
    }

    // 2048 columns on, or behind the end of the row in the next block, which the same thread has most times.
    void look_ahead() {
      const int64_t kept = from.columns / from.m * from.n, bits = index_bits(from.m);
      int64_t columns_on = 2048, rows_on = 0;
      if (column + columns_on >= from.columns) {
        columns_on = smaller(columns_on, from.columns) - from.columns;
        rows_on = kRows;
      }
      const int64_t kept_on = columns_on / from.m * from.n;
      values_ahead = (kept_on + rows_on * kept) * static_cast<int64_t>(sizeof(T));
      metadata_ahead = kept_on * bits / 8 + rows_on * metadata_bytes(kept, from.m);
    }

    void next() {
      column += kWord * kWords;
      if (kFew) look_ahead();
      for (int i = 0; i < present; ++i) {
        if (kFew)
          fetch_ahead(cursors[i].metadata + column * from.n / from.m * index_bits(from.m) / 8, metadata_ahead, 1);
        if (from.n == 2 && from.m == 4) {
          next_pairs(cursors[i].metadata, words[i]);
        } else {
          for (int w = 0; w < kWords; ++w) words[i][w] = cursors[i].next(column + w * kWord);
        }
      }
    }

    void next_pairs(const uint8_t* row, uint64_t* bits) const {
      const int64_t rest = smaller(from.columns - column, kWord * kWords);
      pair_words(row + column / 8, ceil_div(rest, 8), bits);
      // What follows the last group of a row has metadata 0, which is no mask.
      for (int w = static_cast<int>(rest / kWord); w < kWords; ++w) {
        bits[w] = w == rest / kWord ? bits[w] & ((uint64_t{1} << rest % kWord) - 1) : 0;
      }
    }

    void list(Ahead& ahead) const {
      const int64_t done = column + kPanelColumns, left = smaller(from.columns - done, kPanelColumns);
      if (left <= 0) return;
      const int64_t before = done / from.m * from.n * index_bits(from.m) / 8;
      const int64_t kept = ceil_div(left, from.m) * from.n;
      for (int i = 0; i < present; ++i) {
        ahead.add(packed[i] + kWord / 2, kept * sizeof(T));  // so much further this panel has read
        ahead.add(cursors[i].metadata + before, ceil_div(kept * index_bits(from.m), 8));
      }
    }

    // Where word w of row i may be read from, by up to 64 elements.
    const T* advance(int i, int w, T (&tail)[2 * kWord]) {
      const int count = ones(words[i][w]);
      const T* source = packed[i];
      packed[i] += count;
      if (kFew) fetch_ahead(source, values_ahead, kWord / 2 * sizeof(T));
      return end - source >= kWord ? source : readable(source, 0, end - source, tail);
    }

    void take_all(T* out, int stride) {
      next();
      for (int i = 0; i < kRows; ++i) {
        for (int w = 0; w < kWords; ++w) {
          T tail[2 * kWord];
          expand_word(words[i][w], advance(i, w, tail), out + i * stride + w * kWord);
        }
      }
    }

#if defined(PYPRUNE_EIGHTS)
    template <typename Use>
    void take_eights(int i, int w, Use use) {
      T tail[2 * kWord];
      expand_eights(words[i][w], advance(i, w, tail), use);
    }
#endif

#if defined(__AVX512VBMI2__)
    Halves take(int i, int w) {
      T tail[2 * kWord];
      return expand_halves(words[i][w], advance(i, w, tail));
    }
#endif
  };
};

// A dense weight: all of it, under a mask, or some rows and some words of 64 columns.
template <typename T>
struct DenseWeight {
  const T* weight;
  const uint8_t* mask;           // null: none
  const int64_t* out_index;      // null: all rows
  const int64_t* used;           // the columns / 64 that are used, null: all
  int64_t rows, columns, words;  // words of a row that are used
};

template <typename T, bool kFew>
struct DenseSource : DenseWeight<T> {
  static constexpr int kRows = kFew ? kDenseRows : kManyRows, kWords = kLongWords;

  struct Walk {
    const DenseSource& from;
    int64_t chunk = 0;
    int64_t mask_bytes;      // of a row
    const T* starts[kRows];  // of the rows
    const uint8_t* masks[kRows] = {};
    int64_t columns[kWords] = {};  // of the words
    int widths[kWords] = {};       // elements of the words that exist

    Walk(const DenseSource& source, int64_t block) : from(source), mask_bytes(ceil_div(source.columns, 8)) {
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = smaller(block * kRows + i, from.rows - 1);
        starts[i] = from.weight + (from.out_index ? from.out_index[row] : row) * from.columns;
        if (from.mask) masks[i] = from.mask + row * mask_bytes;
      }
    }

    void next() {
      for (int w = 0; w < kWords; ++w, ++chunk) {
        const bool is_used = chunk < from.words;
        columns[w] = is_used ? (from.used ? from.used[chunk] : chunk) * kWord : 0;
        widths[w] = is_used ? static_cast<int>(smaller(kWord, from.columns - columns[w])) : 0;
      }
    }

    const T* start(int i, int w) const {
      const T* place = starts[i] + columns[w];
      if (kFew) fetch_ahead(place, 2048, kWord * sizeof(T));
      return place;
    }

    void list(Ahead& ahead) const {
      for (int64_t w = chunk; w < smaller(chunk + kWords, from.words); ++w) {
        const int64_t column = (from.used ? from.used[w] : w) * kWord, width = smaller(kWord, from.columns - column);
        for (int i = 0; i < kRows; ++i) {
          ahead.add(starts[i] + column, width * sizeof(T));
          if (from.mask && w % 8 == 0) ahead.add(masks[i] + column / 8, 1);
        }
      }
    }

    // The elements of a word that exist and count.
    uint64_t bits(int i, int w) const {
      const uint64_t all = widths[w] ? ~uint64_t{0} >> (kWord - widths[w]) : 0;
      if (!from.mask || !all) return all;
      return load_word(masks[i] + columns[w] / 8, mask_bytes - columns[w] / 8) & all;
    }

    void take_all(T* out, int stride) {
      next();
      for (int i = 0; i < kRows; ++i) {
        for (int w = 0; w < kWords; ++w) take(i, w, out + i * stride + w * kWord);
      }
    }

    void take(int i, int w, T* out) const {
      const T* in = start(i, w);
      const uint64_t word = bits(i, w);
      if (widths[w] == kWord) {
        select_word(word, in, out);
      } else {
        for (int j = 0; j < kWord; ++j) out[j] = word >> j & 1 ? in[j] : T{};
      }
    }

#if defined(PYPRUNE_EIGHTS)
    template <typename Use>
    void take_eights(int i, int w, Use use) const {
      T tail[kWord];
      const T* in = start(i, w);
      if (widths[w] < kWord) {
        take(i, w, tail);
        in = tail;
      }
      select_eights(bits(i, w), in, use);
    }
#endif

#if defined(__AVX512VBMI2__)
    // A masked load reads nothing where the mask is 0.
    Halves take(int i, int w) const { return select_halves(bits(i, w), start(i, w)); }
#endif
  };
};

template <typename Source>
inline int64_t chunks_of(const Source& source) {
  return ceil_div(source.words, Source::kWords);
}

// The next chunk into a panel whose rows are `stride` apart.
template <typename T, typename Source, typename E>
inline void decode(typename Source::Walk& walk, E* panel, int stride) {
  if constexpr (sizeof(T) == sizeof(E)) {
    walk.take_all(panel, stride);
  } else {
    constexpr int kColumns = Source::kWords * kWord;
    alignas(64) T stored[Source::kRows * kColumns];
    walk.take_all(stored, kColumns);
    for (int i = 0; i < Source::kRows; ++i) {
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) panel[i * stride + j] = to_element<E>(stored[i * kColumns + j]);
    }
  }
}

// --------------------------------------------------------------------------------------------- products with a panel

// sums [kRows][kTokens][lanes] += panel . x, for x [kTokens][stride].
template <int kTokens, int kRows, int kColumns, typename E>
inline void dot_panel(const E* panel, const E* x, int64_t stride, float* sums) {
  for (int i = 0; i < kRows; ++i) {
    Vector values[kTokens];
    for (int t = 0; t < kTokens; ++t) values[t] = load(sums + (i * kTokens + t) * kLanes);
    for (int c = 0; c < kColumns; c += kLanes * kStep<E>) {
      for (int t = 0; t < kTokens; ++t) {
        values[t] = multiply_add(load(panel + i * kColumns + c), load(x + t * stride + c), values[t]);
      }
    }
    for (int t = 0; t < kTokens; ++t) store(sums + (i * kTokens + t) * kLanes, values[t]);
  }
}

#if defined(__AVX512BF16__)
// The same without the panel: the next chunk is decoded and multiplied in registers, a few rows at a time.
template <int kTokens, typename Source>
inline void dot_chunk(typename Source::Walk& walk, const bfloat16* x, int64_t stride, float* sums) {
  constexpr int kAtATime = kTokens <= 4 ? 4 : 2;
  walk.next();
  for (int i = 0; i < Source::kRows; i += kAtATime) {
    Vector values[kAtATime][kTokens];
    for (int r = 0; r < kAtATime; ++r) {
      for (int t = 0; t < kTokens; ++t) values[r][t] = load(sums + ((i + r) * kTokens + t) * kLanes);
    }
    for (int w = 0; w < Source::kWords; ++w) {
      Halves weights[kAtATime];
      for (int r = 0; r < kAtATime; ++r) weights[r] = walk.take(i + r, w);
      for (int t = 0; t < kTokens; ++t) {
        const __m512bh low = load(x + t * stride + w * kWord), high = load(x + t * stride + w * kWord + kWord / 2);
        for (int r = 0; r < kAtATime; ++r) {
          values[r][t] = multiply_add((__m512bh)weights[r].low, low, values[r][t]);
          values[r][t] = multiply_add((__m512bh)weights[r].high, high, values[r][t]);
        }
      }
    }
    for (int r = 0; r < kAtATime; ++r) {
      for (int t = 0; t < kTokens; ++t) store(sums + ((i + r) * kTokens + t) * kLanes, values[r][t]);
    }
  }
}
#endif

#if defined(PYPRUNE_EIGHTS)
// The same in fp32, a row and eight elements at a time.
template <int kTokens, typename Source>
inline void dot_chunk(typename Source::Walk& walk, const float* x, int64_t stride, float* sums) {
  constexpr int kChains = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;  // of multiply-adds that wait for each other
  walk.next();
  for (int i = 0; i < Source::kRows; ++i) {
    Vector values[kTokens][kChains] = {};
    for (int t = 0; t < kTokens; ++t) values[t][0] = load(sums + (i * kTokens + t) * kLanes);
    for (int w = 0; w < Source::kWords; ++w) {
      walk.take_eights(i, w, [&](int j, __m256 weights) {
        for (int t = 0; t < kTokens; ++t) {
          Vector& value = values[t][j / 8 % kChains];
          value = multiply_add((Vector)weights, load(x + t * stride + w * kWord + j), value);
        }
      });
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int c = 1; c < kChains; ++c) values[t][0] += values[t][c];
      store(sums + (i * kTokens + t) * kLanes, values[t][0]);
    }
  }
}
#endif

constexpr int kGroup = kLanes == 16 ? 64 : 16;      // tokens that a product takes at most
constexpr int kMaxTokens = 32 * kLanes;             // for which a panel is decoded once
constexpr int kRegisters = kLanes == 16 ? 24 : 12;  // for sums: enough to hide the latency of multiply-adds

// Up to kGroup tokens, filled up.
inline int64_t padded_tokens(int64_t tokens) {
  const int64_t unit = tokens <= kGroup / 2 ? 8 : 16;
  return ceil_div(tokens, unit) * unit;
}

template <int kTokens_>
struct Group {
  static constexpr int kTokens = kTokens_;
};

// use(Group<padded>()).
template <typename Use>
inline void by_tokens(int64_t padded, Use use) {
  if constexpr (kGroup == 64) {
    switch (padded) {
      case 24: return use(Group<24>());
      case 32: return use(Group<32>());
      case 48: return use(Group<48>());
      case 64: return use(Group<64>());
    }
  }
  return padded == 8 ? use(Group<8>()) : use(Group<16>());
}

// Walks through the lines of the next panel at the pace of the products with this one.
struct Fetch {
  const char* const* lines;
  uint32_t place, pace;  // 1/256 of a line

  void next() {
    __builtin_prefetch(lines[place / 256], 0, 2);  // into the second-level cache
    place += pace;
  }
};

// kRows rows of multiply_panel, whose sums stay in registers.
template <int kRows, int kVectors, typename V, typename E>
inline void multiply_rows(const E* panel, int columns, const E* x, float* sums, Fetch& fetch) {
  constexpr int kLanesOf = sizeof(V) / sizeof(float), kTokens = kVectors * kLanesOf;
  using Operand = Operand<V, E>;
  V values[kRows][kVectors];
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) values[r][v] = load<V>(sums + r * kTokens + v * kLanesOf);
  }
  for (int c = 0; c < columns; c += kStep<E>) {
    Operand tokens[kVectors];
    for (int v = 0; v < kVectors; ++v) tokens[v] = load<Operand>(x + c * kTokens + v * kLanesOf * kStep<E>);
    fetch.next();
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
      const Operand weight = broadcast<Operand>(panel + r * kPanelColumns + c);
      for (int v = 0; v < kVectors; ++v) values[r][v] = multiply_add(weight, tokens[v], values[r][v]);
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(sums + r * kTokens + v * kLanesOf, values[r][v]);
  }
}

// sums [rows][kTokens] += panel x^T, for `columns` of the panel and x [columns / step][kTokens][step].
template <int kTokens, int kRows, typename E>
inline void multiply_panel(const E* panel, int columns, const E* x, float* sums, const Ahead& ahead) {
  using V = typename Filled<kTokens % kLanes == 0>::Type;
  constexpr int kVectors = kTokens * sizeof(float) / sizeof(V);
  constexpr int kAtATime = kRegisters > kVectors ? kRegisters / kVectors : 1;
  constexpr int kRest = kRows % kAtATime;
  const int steps = (kRows / kAtATime + (kRest > 0)) * columns / kStep<E>;
  Fetch fetch{ahead.lines, 0, static_cast<uint32_t>(ahead.count - 1) * 256 / static_cast<uint32_t>(steps)};
  for (int i = 0; i + kAtATime <= kRows; i += kAtATime) {
    multiply_rows<kAtATime, kVectors, V>(panel + i * kPanelColumns, columns, x, sums + i * kTokens, fetch);
  }
  if constexpr (kRest > 0) {
    constexpr int i = kRows - kRest;
    multiply_rows<kRest, kVectors, V>(panel + i * kPanelColumns, columns, x, sums + i * kTokens, fetch);
  }
}

// --------------------------------------------------------------------------------------------------------- the driver

constexpr int kDotTokens = 4;  // fewer are filled up with zeros to a power of two

// x [tokens,inputs] as the products read it: as groups of up to `group` tokens, each filled up with zeros to padded(t)
// tokens and to whole panels, which have `columns` columns. Column c of them is column places[c] of x, none for -1, or
// c itself without places.
template <bool kTransposed, typename T, typename E, typename Padded>
void pack_x(const T* x, int64_t tokens, int64_t group, Padded padded_of, int64_t inputs, const int64_t* places,
            int64_t columns, E* packed, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t first = 0; first < tokens; first += group) {
    for (int64_t begin = 0; begin < columns; begin += kWord) {
      const int64_t count = smaller(group, tokens - first), padded = padded_of(count);
      for (int64_t t = 0; t < padded; ++t) {
        const T* from = x + (first + t) * inputs;
        E part[kWord] = {};
        if (t < count && places) {
          for (int j = 0; j < kWord; ++j) {
            if (places[begin + j] >= 0) part[j] = to_element<E>(from[places[begin + j]]);
          }
        } else if (t < count) {
          const int64_t width = smaller(kWord, inputs - begin);
          for (int64_t j = 0; j < width; ++j) part[j] = to_element<E>(from[begin + j]);
        }
        if constexpr (kTransposed) {
          E* to = packed + first * columns + begin * padded + t * kStep<E>;
          for (int j = 0; j < kWord; j += kStep<E>) memcpy(to + j * padded, part + j, kStep<E> * sizeof(E));
        } else {
          memcpy(packed + t * columns + begin, part, sizeof part);
        }
      }
    }
  }
}

struct Output {
  int64_t rows;
  const void* bias;          // null: none
  const int64_t* out_index;  // of bias, null: all
  void* y;

  // y[token, row] = sum + bias[row]
  template <typename T>
  void put(int64_t token, int64_t row, float sum) const {
    if (bias) sum += to_float(static_cast<const T*>(bias)[out_index ? out_index[row] : row]);
    static_cast<T*>(y)[token * rows + row] = from_float<T>(sum);
  }

  // The same for up to kMost rows from `row` on of `count` tokens, from sums [kMost][padded]. They are turned around in
  // the first-level cache, four rows at a time, which the compiler makes shuffles of: single elements, so far apart in
  // y, took as long as decoding.
  template <typename T, int kMost>
  void put(int64_t token, int64_t count, int64_t row, const float* sums, int64_t padded) const {
    constexpr int kFour = 4;
    static_assert(kMost % kFour == 0, "no rows are left over");
    const int64_t present = smaller(kMost, rows - row);
    alignas(64) T by_token[kGroup * kMost];
    for (int64_t first = 0; first < present; first += kFour) {
      alignas(64) T by_row[kFour * kGroup], across[kGroup * kFour];
      for (int64_t i = 0; i < kFour; ++i) {
        const int64_t place = row + smaller(first + i, present - 1);
        const float add = bias ? to_float(static_cast<const T*>(bias)[out_index ? out_index[place] : place]) : 0.0f;
#pragma omp simd
        for (int64_t t = 0; t < padded; ++t) {
          by_row[i * padded + t] = from_float<T>(sums[(first + i) * padded + t] + add);
        }
      }
      for (int64_t t = 0; t < padded; ++t) {
        for (int i = 0; i < kFour; ++i) across[t * kFour + i] = by_row[i * padded + t];
      }
      for (int64_t t = 0; t < padded; ++t) {
        memcpy(by_token + t * kMost + first, across + t * kFour, kFour * sizeof(T));
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      T* to = static_cast<T*>(y) + (token + t) * rows + row;
      if (present == kMost) {
        memcpy(to, by_token + t * kMost, kMost * sizeof(T));
      } else {
        memcpy(to, by_token + t * kMost, static_cast<size_t>(present) * sizeof(T));
      }
    }
  }
};

// Blocks that a thread takes in a row, because each asks for what the next one needs, and they share cache lines of y:
// four, or fewer where that would leave threads without work.
inline int64_t together_of(int64_t blocks, int threads) {
  const int64_t share = blocks / (4 * int64_t{threads});
  return share < 1 ? 1 : smaller(4, share);
}

template <typename T, int kTokens, typename Source, typename E>
void few_tokens(const Source& source, const E* x, int64_t stride, int64_t tokens, const Output& out, int threads) {
  constexpr int kRows = Source::kRows, kColumns = Source::kWords * kWord;
  const int64_t together = together_of(ceil_div(out.rows, kRows), threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, together)
  for (int64_t block = 0; block < ceil_div(out.rows, kRows); ++block) {
    alignas(64) float sums[kRows * kTokens * kLanes] = {};
    typename Source::Walk walk(source, block);
    for (int64_t chunk = 0; chunk < chunks_of(source); ++chunk) {
      const E* part = x + chunk * kColumns;
#if defined(__AVX512BF16__) || defined(PYPRUNE_EIGHTS)
      if constexpr (sizeof(E) == 2 || kLanes == 8) {
        dot_chunk<kTokens, Source>(walk, part, stride, sums);
        continue;
      }
#endif
      alignas(64) E panel[kRows * kColumns];
      decode<T, Source>(walk, panel, kColumns);
      dot_panel<kTokens, kRows, kColumns>(panel, part, stride, sums);
    }
    for (int64_t i = 0; i < smaller(kRows, out.rows - block * kRows); ++i) {
      for (int64_t t = 0; t < tokens; ++t) {
        out.template put<T>(t, block * kRows + i, add_lanes(load(sums + (i * kTokens + t) * kLanes)));
      }
    }
  }
}

// The tokens from `first` on, up to kMaxTokens, as groups of up to kGroup: each has its part of x and of the sums.
template <typename T, typename Source, typename E>
void many_tokens(const Source& source, const E* x, int64_t first, int64_t tokens, const Output& out, int threads) {
  constexpr int kRows = Source::kRows, kColumns = Source::kWords * kWord, kChunks = kPanelColumns / kColumns;
  constexpr int kTogether = kRows < 32 ? 4 : 1;  // blocks that a thread takes in a row: they share cache lines of y
  const int64_t chunks = chunks_of(source), columns = chunks * kColumns;
#pragma omp parallel for num_threads(threads) schedule(dynamic, kTogether)
  for (int64_t block = 0; block < ceil_div(out.rows, kRows); ++block) {
    alignas(64) float sums[kRows * kMaxTokens];
    memset(sums, 0, sizeof(float) * kRows * kGroup * ceil_div(tokens, kGroup));
    typename Source::Walk walk(source, block);
    for (int64_t chunk = 0; chunk < chunks; chunk += kChunks) {
      const int present = static_cast<int>(smaller(kChunks, chunks - chunk));
      const int width = static_cast<int>(smaller(kPanelColumns, source.words * kWord - chunk * kColumns));
      alignas(64) E panel[kRows * kPanelColumns];
      for (int c = 0; c < present; ++c) decode<T, Source>(walk, panel + c * kColumns, kPanelColumns);
      Ahead ahead;
      ahead.add(panel, 1);  // the only one where nothing follows
      walk.list(ahead);
      for (int64_t begin = 0; begin < tokens; begin += kGroup) {
        const int64_t padded = padded_tokens(smaller(kGroup, tokens - begin));
        const E* part = x + begin * columns + chunk * kColumns * padded;
        float* to = sums + begin * kRows;
        by_tokens(padded, [&](auto group) { multiply_panel<group.kTokens, kRows>(panel, width, part, to, ahead); });
        ahead.count = 1;
      }
    }
    for (int64_t begin = 0; begin < tokens; begin += kGroup) {
      const int64_t count = smaller(kGroup, tokens - begin);
      out.template put<T, kRows>(first + begin, count, block * kRows, sums + begin * kRows, padded_tokens(count));
    }
  }
}

// The product for up to kDotTokens tokens, x [tokens,inputs] packed into `workspace`.
template <typename T, typename Source>
void linear_few(const Source& source, int64_t tokens, int64_t inputs, const void* x, const int64_t* places,
                const Output& out, void* workspace, int threads) {
  using E = typename Panel<T>::Element;
  E* packed = static_cast<E*>(workspace);
  const int64_t columns = chunks_of(source) * Source::kWords * kWord;
  const int64_t padded = tokens <= 2 ? tokens : kDotTokens;
  const auto fill = [=](int64_t) { return padded; };
  pack_x<false>(static_cast<const T*>(x), tokens, tokens, fill, inputs, places, columns, packed, threads);
  switch (padded) {
    case 1: return few_tokens<T, 1>(source, packed, columns, tokens, out, threads);
    case 2: return few_tokens<T, 2>(source, packed, columns, tokens, out, threads);
    case kDotTokens: return few_tokens<T, kDotTokens>(source, packed, columns, tokens, out, threads);
    default: return;
  }
}

// The same for more.
template <typename T, typename Source>
void linear_many(const Source& source, int64_t tokens, int64_t inputs, const void* x_, const int64_t* places,
                 const Output& out, void* workspace, int threads) {
  using E = typename Panel<T>::Element;
  const T* x = static_cast<const T*>(x_);
  E* packed = static_cast<E*>(workspace);
  const int64_t columns = chunks_of(source) * Source::kWords * kWord;
  for (int64_t first = 0; first < tokens; first += kMaxTokens) {
    const int64_t count = smaller(kMaxTokens, tokens - first);
    pack_x<true>(x + first * inputs, count, kGroup, padded_tokens, inputs, places, columns, packed, threads);
    many_tokens<T>(source, packed, first, count, out, threads);
  }
}

template <typename T>
void bitmap_linear(int64_t tokens, int64_t out_features, int64_t in_features, const void* x, const void* values,
                   int64_t values_size, const uint8_t* bitmap, const int64_t* offsets, const void* bias, void* y,
                   void* workspace, int threads) {
  const BitmapSource<T> source{static_cast<const T*>(values), values_size, bitmap, offsets,
                               ceil_div(in_features, kWord)};
  const Output out{out_features, bias, nullptr, y};
  if (tokens <= kDotTokens) return linear_few<T>(source, tokens, in_features, x, nullptr, out, workspace, threads);
  linear_many<T>(source, tokens, in_features, x, nullptr, out, workspace, threads);
}

template <typename T>
void nm_linear(int64_t tokens, int64_t out_features, int64_t in_features, int n, int m, const void* x,
               const void* values, const uint8_t* metadata, const void* bias, void* y, void* workspace, int threads) {
  const Output out{out_features, bias, nullptr, y};
  const T* packed = static_cast<const T*>(values);
  if (tokens <= kDotTokens) {
    const NmSource<T, true> source{packed, metadata, out_features, in_features, n, m};
    return linear_few<T>(source, tokens, in_features, x, nullptr, out, workspace, threads);
  }
  const NmSource<T, false> source{packed, metadata, out_features, in_features, n, m};
  linear_many<T>(source, tokens, in_features, x, nullptr, out, workspace, threads);
}

template <typename T>
void dense_linear(const DenseWeight<T>& weight, int64_t tokens, int64_t inputs, const void* x, const int64_t* places,
                  const Output& out, void* workspace, int threads) {
  if (tokens <= kDotTokens) {
    const DenseSource<T, true> source{weight};
    return linear_few<T>(source, tokens, inputs, x, places, out, workspace, threads);
  }
  const DenseSource<T, false> source{weight};
  linear_many<T>(source, tokens, inputs, x, places, out, workspace, threads);
}

template <typename T>
void masked_linear(int64_t tokens, int64_t out_features, int64_t in_features, const void* x, const void* weight,
                   const uint8_t* mask, const void* bias, void* y, void* workspace, int threads) {
  const DenseWeight<T> masked{static_cast<const T*>(weight), mask, nullptr, nullptr, out_features, in_features,
                              ceil_div(in_features, kWord)};
  dense_linear(masked, tokens, in_features, x, nullptr, {out_features, bias, nullptr, y}, workspace, threads);
}

// Which words of 64 columns hold one of in_index [inputs] (rising), and for every column of those words its place in
// in_index, or -1. Returns the number of words; places are filled up to whole panels.
int64_t place_columns(const int64_t* in_index, int64_t inputs, int64_t* words, int64_t* places) {
  int64_t used = 0;
  for (int64_t j = 0; j < inputs; ++j) {
    const int64_t word = in_index[j] / kWord;
    if (used == 0 || words[used - 1] != word) {
      words[used] = word;
      for (int c = 0; c < kWord; ++c) places[used * kWord + c] = -1;
      ++used;
    }
    places[(used - 1) * kWord + in_index[j] % kWord] = j;
  }
  for (int64_t w = used; w % kLongWords; ++w) {
    for (int c = 0; c < kWord; ++c) places[w * kWord + c] = -1;
  }
  return used;
}

// Columns of x filled up to whole panels.
inline int64_t padded_columns(int64_t in_features) {
  return ceil_div(in_features, kWord * kLongWords) * kWord * kLongWords;
}

template <typename T>
void gathered_linear(int64_t tokens, int64_t outputs, int64_t inputs, int64_t in_features, const void* x,
                     const void* weight, const int64_t* in_index, const int64_t* out_index, const void* bias, void* y,
                     void* workspace, int threads) {
  DenseWeight<T> part{static_cast<const T*>(weight), nullptr, out_index, nullptr, outputs, in_features,
                      ceil_div(in_features, kWord)};
  int64_t* places = nullptr;
  if (in_index) {
    places = static_cast<int64_t*>(workspace);
    int64_t* words = places + padded_columns(in_features);
    workspace = words + ceil_div(in_features, kWord * 8) * 8;  // x stays aligned
    part.words = place_columns(in_index, inputs, words, places);
    part.used = words;
  }
  dense_linear(part, tokens, inputs, x, places, {outputs, bias, out_index, y}, workspace, threads);
}

int64_t workspace(int64_t tokens, int64_t in_features) {
  const int64_t padded = smaller(kMaxTokens, ceil_div(tokens, kGroup) * kGroup);
  const int64_t x = padded * padded_columns(in_features) * 4;
  const int64_t index = (padded_columns(in_features) + ceil_div(in_features, kWord * 8) * 8) * 8;
  return x + index;
}

}  // namespace

extern const SparseGemmCpuKernels PYPRUNE_JOIN(sparse_gemm_cpu_, PYPRUNE_ISA) = {
    workspace,
    PYPRUNE_BY_DTYPE(bitmap_linear),
    PYPRUNE_BY_DTYPE(nm_linear),
    PYPRUNE_BY_DTYPE(masked_linear),
    PYPRUNE_BY_DTYPE(gathered_linear),
};

}  // namespace pyprune
