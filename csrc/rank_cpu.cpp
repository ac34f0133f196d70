// CPU kernels of the `rank` family, compiled once per instruction set (cpu_types.h).
//
// What bounds them: rank_mask memory, 6 bytes a 16-bit weight (10 an fp32 one), written past the cache where the
// instruction set can. rank_bucket_grad reads as much, and spends about two cycles a weight on the one part that is not
// vectorised, an add to the histogram; kHistograms copies of it, so that neighbours in one bucket do not wait for each
// other, and prefetching keep everything else off that path.
#include "rank_cpu.h"

#include "cpu_types.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace pyprune {
namespace {

constexpr int kChunk = 256;     // weights whose products and buckets wait in the first-level cache
constexpr int kHistograms = 8;  // as many as buckets in a word
constexpr int kMaxSteps = 255;
constexpr int kLine = 64;     // bytes
constexpr int kAhead = 2048;  // bytes to prefetch ahead

// Elements at `target` before the next whole cache line.
template <typename T>
inline int64_t before_line(const T* target, int64_t count) {
  const int64_t elements = (-reinterpret_cast<uintptr_t>(target) & (kLine - 1)) / sizeof(T);
  return elements < count ? elements : count;
}

template <typename T>
inline void mask_some(const T* weight, const uint16_t* rank, uint16_t last, T* out, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) out[j] = rank[j] > last ? weight[j] : T{};
}

// A line of results that does not enter the cache.
template <typename T>
inline void mask_line(const T* weight, const uint16_t* rank, uint16_t last, T* out) {
  constexpr int kCount = kLine / sizeof(T);
#ifdef __AVX2__
  alignas(kLine) T line[kCount];
  mask_some(weight, rank, last, line, 0, kCount);
  for (int i = 0; i < kLine / 32; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out) + i, _mm256_load_si256(reinterpret_cast<__m256i*>(line) + i));
  }
#else
  mask_some(weight, rank, last, out, 0, kCount);
#endif
}

template <typename T>
void rank_mask(int64_t rows, int64_t columns, const void* weight_, const uint16_t* rank_, const int32_t* threshold,
               void* out_, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const T* weight = static_cast<const T*>(weight_) + i * columns;
      const uint16_t* rank = rank_ + i * columns;
      T* out = static_cast<T*>(out_) + i * columns;
      if (threshold[i] == 0) {
        memcpy(out, weight, static_cast<size_t>(columns) * sizeof(T));
        continue;
      }
      const uint16_t last = static_cast<uint16_t>(threshold[i] - 1);  // the last rank that goes
      constexpr int64_t kCount = kLine / sizeof(T);
      int64_t j = before_line(out, columns);
      mask_some(weight, rank, last, out, 0, j);
      for (; j + kCount <= columns; j += kCount) mask_line(weight + j, rank + j, last, out + j);
      mask_some(weight, rank, last, out, j, columns);
    }
#ifdef __AVX2__
    _mm_sfence();  // before this thread says that it is done
#endif
  }
}

template <typename T>
inline void prefetch(const T* source, int count) {
  const char* first = reinterpret_cast<const char*>(source) + kAhead;
  for (int byte = 0; byte < count * static_cast<int>(sizeof(T)); byte += kLine) __builtin_prefetch(first + byte);
}

template <typename T>
void rank_bucket_grad(int64_t rows, int64_t columns, int steps, const void* grad_, const void* weight_,
                      const uint16_t* rank_, float* out_, int threads) {
  const BucketOfRank bucket_of = bucket_of_rank(columns, steps);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    float sums[kHistograms][kMaxSteps + 1] = {};
    for (int64_t begin = 0; begin < columns; begin += kChunk) {
      const int count = static_cast<int>(columns - begin < kChunk ? columns - begin : kChunk);
      const T* grad = static_cast<const T*>(grad_) + i * columns + begin;
      const T* weight = static_cast<const T*>(weight_) + i * columns + begin;
      const uint16_t* rank = rank_ + i * columns + begin;
      prefetch(grad, count);
      prefetch(weight, count);
      prefetch(rank, count);
      alignas(kLine) float product[kChunk];
      alignas(kLine) uint8_t bucket[kChunk];
#pragma omp simd
      for (int j = 0; j < count; ++j) product[j] = to_float(grad[j]) * to_float(weight[j]);
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const uint32_t n = bucket_of.steps * rank[j] + bucket_of.offset;
        bucket[j] = static_cast<uint8_t>(n * bucket_of.multiplier >> bucket_of.shift);
      }
      int j = 0;
      for (; j + kHistograms <= count; j += kHistograms) {
        uint64_t buckets;
        memcpy(&buckets, bucket + j, sizeof buckets);
        for (int k = 0; k < kHistograms; ++k) sums[k][buckets >> 8 * k & 0xff] += product[j + k];
      }
      for (; j < count; ++j) sums[0][bucket[j]] += product[j];
    }
    float* out = out_ + i * (steps + 1);
    float sum = 0.0f;
    for (int d = 0; d <= steps; ++d) {
      for (int k = 0; k < kHistograms; ++k) sum += sums[k][d];
      out[d] = -sum;
    }
  }
}

}  // namespace

extern const RankCpuKernels PYPRUNE_JOIN(rank_cpu_, PYPRUNE_ISA) = {
    PYPRUNE_BY_DTYPE(rank_mask),
    PYPRUNE_BY_DTYPE(rank_bucket_grad),
};

}  // namespace pyprune
