// Sixty-four elements and their bits: what packing, unpacking and the products share. Internal linkage and compiled per
// instruction set, as everything in cpu_types.h.
//
// expand_word puts packed values to the places of the ones of a 64-bit word (bit j = element j) and zeros elsewhere;
// compress_word is the inverse. With AVX-512 VBMI2 a 16-bit half word is one vpexpandw; with AVX-512 alone the elements
// are widened to 32 bits; AVX2 shuffles bytes by a table; otherwise a loop without branches.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu_types.h"

namespace pyprune {
namespace {

constexpr int kWord = 64;  // elements of a word: a row of a tile

// The word at `bytes`, of which only the first `count` exist.
inline uint64_t load_word(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  if (count >= 8) {
    memcpy(&word, bytes, 8);
  } else {
    for (int64_t i = 0; i < count; ++i) word |= static_cast<uint64_t>(bytes[i]) << 8 * i;
  }
  return word;
}

inline int ones(uint64_t word) { return __builtin_popcountll(word); }

inline uint32_t magnitude_bits(float value) { return static_cast<uint32_t>(bits_of(value)) << 1; }
inline uint32_t magnitude_bits(bfloat16 value) { return static_cast<uint16_t>(static_cast<uint32_t>(value) << 1); }
inline uint32_t magnitude_bits(float16 value) { return static_cast<uint16_t>(static_cast<uint32_t>(value) << 1); }

#if defined(__AVX2__) && !defined(__AVX512VBMI2__)
// For every subset of eight places, the byte shuffle that moves packed 16-bit elements to them; 0x80 gives zero.
struct ExpandTable {
  alignas(16) uint8_t bytes[256][16];
  constexpr ExpandTable() : bytes() {
    for (int subset = 0; subset < 256; ++subset) {
      int rank = 0;
      for (int place = 0; place < 8; ++place) {
        const bool kept = subset >> place & 1;
        bytes[subset][2 * place] = static_cast<uint8_t>(kept ? 2 * rank : 0x80);
        bytes[subset][2 * place + 1] = static_cast<uint8_t>(kept ? 2 * rank + 1 : 0x80);
        rank += kept;
      }
    }
  }
};
constexpr ExpandTable kExpand;
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// The same for elements of 32 bits: which of eight packed ones goes to each place, negative for none.
struct WideExpandTable {
  alignas(8) int8_t packed[256][8];
  constexpr WideExpandTable() : packed() {
    for (int subset = 0; subset < 256; ++subset) {
      int8_t rank = 0;
      for (int place = 0; place < 8; ++place) packed[subset][place] = subset >> place & 1 ? rank++ : int8_t{-1};
    }
  }
};
constexpr WideExpandTable kWideExpand;

// The next of `values` at the ones of `subset`, zeros elsewhere. Reads eight elements.
inline __m256i wide_expand_eight(int subset, const float* values) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kWideExpand.packed[subset]));
  const __m256i places = _mm256_cvtepi8_epi32(bytes), missing = _mm256_srai_epi32(places, 31);
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm256_andnot_si256(missing, _mm256_permutevar8x32_epi32(packed, places));
}
#endif

#if defined(__AVX512VBMI2__)
// The next of `values` at the ones of `word`, zeros elsewhere. Kept from reading memory itself: vpexpandw is fast on a
// register and microcoded with a memory operand, which the compiler would choose.
inline __m512i expand_half(uint32_t word, const void* values) {
  __m512i packed = _mm512_loadu_si512(values);
  __asm__("" : "+v"(packed));
  return _mm512_maskz_expand_epi16(word, packed);
}
#endif

// out[j] = the next of `values` where bit j of `word` is set, else 0. Returns how many values were taken.
// Reads up to 64 elements from `values`.
template <typename T>
inline int expand_word(uint64_t word, const T* values, T* out) {
  int taken = 0;
#if defined(__AVX512VBMI2__)
  if constexpr (sizeof(T) == 2) {
    const int low = ones(static_cast<uint32_t>(word));
    _mm512_storeu_si512(out, expand_half(static_cast<uint32_t>(word), values));
    _mm512_storeu_si512(out + 32, expand_half(static_cast<uint32_t>(word >> 32), values + low));
    return ones(word);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {
    for (int j = 0; j < kWord; j += 8) {
      const int subset = static_cast<int>(word >> j & 0xff);
      const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand.bytes[subset]));
      const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + taken));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), _mm_shuffle_epi8(packed, shuffle));
      taken += ones(subset);
    }
    return taken;
  }
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    for (int j = 0; j < kWord; j += 16) {
      const __mmask16 part = static_cast<__mmask16>(word >> j);
      __m512 packed = _mm512_loadu_ps(values + taken);
      __asm__("" : "+v"(packed));  // as in expand_half
      _mm512_storeu_ps(out + j, _mm512_maskz_expand_ps(part, packed));
      taken += ones(part);
    }
    return taken;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    for (int j = 0; j < kWord; j += 8) {
      const int subset = static_cast<int>(word >> j & 0xff);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), wide_expand_eight(subset, values + taken));
      taken += ones(subset);
    }
    return taken;
  }
#endif
  for (int j = 0; j < kWord; ++j) {
    const bool kept = word >> j & 1;
    out[j] = kept ? values[taken] : T{};
    taken += kept;
  }
  return taken;
}

// out[j] = in[j] where bit j of `word` is set, else 0, whatever stands there.
template <typename T>
inline void select_word(uint64_t word, const T* in, T* out) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(word), in));
    _mm512_storeu_si512(out + 32, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(word >> 32), in + 32));
  } else {
    for (int j = 0; j < kWord; j += 16) {
      _mm512_storeu_si512(out + j, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(word >> j), in + j));
    }
  }
#elif defined(__AVX2__)
  const __m256i places = sizeof(T) == 2 ? _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                                            8192, 16384, static_cast<int16_t>(32768))
                                        : _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  constexpr int kElements = 32 / sizeof(T);
  for (int j = 0; j < kWord; j += kElements) {
    const int part = static_cast<int>(word >> j);
    const __m256i spread = sizeof(T) == 2 ? _mm256_set1_epi16(static_cast<int16_t>(part)) : _mm256_set1_epi32(part);
    const __m256i set = _mm256_and_si256(spread, places);
    const __m256i keep = sizeof(T) == 2 ? _mm256_cmpeq_epi16(set, places) : _mm256_cmpeq_epi32(set, places);
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + j));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), _mm256_and_si256(values, keep));
  }
#else
  for (int j = 0; j < kWord; ++j) out[j] = word >> j & 1 ? in[j] : T{};
#endif
}

// Whether kSize elements can be read from values[begin] on: as much as a tile takes whatever its bits say.
template <size_t kSize>
inline bool within(int64_t begin, int64_t size) {
  return begin >= 0 && begin <= size - static_cast<int64_t>(kSize);
}

// values[begin], from where kSize elements may be read: copied to `tail` where the array ends before, with zeros behind
// it, and all zeros where it does not begin there.
template <typename T, size_t kSize>
inline const T* readable(const T* values, int64_t begin, int64_t size, T (&tail)[kSize]) {
  if (within<kSize>(begin, size)) return values + begin;
  const size_t left = begin < 0 || begin >= size
                          ? 0
                          : static_cast<size_t>(size - begin < int64_t{kSize} ? size - begin : int64_t{kSize});
  if (left > 0) memcpy(tail, values + begin, left * sizeof(T));
  memset(tail + left, 0, (kSize - left) * sizeof(T));
  return tail;
}

// Bit j is set where in[j] is neither +0 nor -0.
template <typename T>
inline uint64_t nonzero_word(const T* in) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    const uint64_t low = _mm512_test_epi16_mask(_mm512_loadu_si512(in), magnitude);
    const uint64_t high = _mm512_test_epi16_mask(_mm512_loadu_si512(in + 32), magnitude);
    return low | high << 32;
  } else {
    uint64_t word = 0;
    for (int j = 0; j < kWord; j += 16) {
      const __m512i part = _mm512_loadu_si512(in + j);
      word |= static_cast<uint64_t>(_mm512_test_epi32_mask(part, _mm512_set1_epi32(kMagnitude))) << j;
    }
    return word;
  }
#else
  uint64_t word = 0;
  for (int j = 0; j < kWord; ++j) word |= static_cast<uint64_t>(magnitude_bits(in[j]) != 0) << j;
  return word;
#endif
}

// Puts the elements at the ones of `word` next to each other; returns how many. Writes no element past them.
template <typename T>
inline int compress_word(uint64_t word, const T* in, T* values) {
#if defined(__AVX512VBMI2__)
  if constexpr (sizeof(T) == 2) {
    // A masked store of the compressed register: vpcompressw with a memory operand is microcoded.
    int taken = 0;
    for (int j = 0; j < kWord; j += 32) {
      const __mmask32 part = static_cast<__mmask32>(word >> j);
      const int count = ones(part);
      const __mmask32 filled = static_cast<__mmask32>((uint64_t{1} << count) - 1);
      _mm512_mask_storeu_epi16(values + taken, filled, _mm512_maskz_compress_epi16(part, _mm512_loadu_si512(in + j)));
      taken += count;
    }
    return taken;
  }
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    int taken = 0;
    for (int j = 0; j < kWord; j += 16) {
      const __mmask16 part = static_cast<__mmask16>(word >> j);
      const int count = ones(part);
      const __mmask16 filled = static_cast<__mmask16>((uint32_t{1} << count) - 1);
      _mm512_mask_storeu_ps(values + taken, filled, _mm512_maskz_compress_ps(part, _mm512_loadu_ps(in + j)));
      taken += count;
    }
    return taken;
  }
#endif
  int taken = 0;
  for (; word != 0; word &= word - 1) values[taken++] = in[__builtin_ctzll(word)];
  return taken;
}

}  // namespace
}  // namespace pyprune
