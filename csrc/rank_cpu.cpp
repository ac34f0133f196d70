// CPU kernels of the `rank` family, compiled once per instruction set (cpu_types.h).
//
// What bounds them: rank_mask memory, 6 bytes a 16-bit weight (10 an fp32 one), written past the cache where the
// instruction set can. rank_bucket_grad reads as much and adds every product to a histogram, which cannot be
// vectorised: five instructions and a store a weight, one cycle (Zen 3) in kHistograms copies, so that neighbours in
// one bucket do not wait for each other. Products and buckets are vectors, another half cycle.
#include "rank_cpu.h"

#include "cpu_types.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace pyprune {
namespace {

constexpr int kChunk = 128;     // weights whose products and buckets wait in the first-level cache
constexpr int kHistograms = 8;  // neighbours in one bucket add to different ones
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

// The bucket of a rank in fp32. It is ceil(x) for x = steps (rank + 1) / columns, and x is a multiple of 1 / columns,
// so it is also the integer nearest to y = x + 1/2 - 1 / (2 columns), which is at least 1 / (2 columns) from a tie. y
// is computed to (steps + 1/2) 2^-23, by the roundings of 1 / columns and of the product alone, and adding 2^23 leaves
// that integer in the low bits. Wider rows than that serves take integers, in 64 bits, and three times as long.
struct FloatBucketOfRank {
  float steps, offset, inverse;

  static bool is_exact(int64_t columns, int steps) { return (steps + 1) * columns <= int64_t{1} << 22; }

  FloatBucketOfRank(int64_t columns, int steps_)
      : steps(static_cast<float>(steps_)),
        offset(static_cast<float>(steps_) + 0.5f * static_cast<float>(columns - 1)),
        inverse(1.0f / static_cast<float>(columns)) {}

  uint32_t operator()(uint32_t rank) const {
    const float shifted = static_cast<float>(static_cast<int32_t>(rank)) * steps + offset;
    return static_cast<uint32_t>(bits_of(shifted * inverse + 0x1p23f) & 0xff);
  }
};

// Products and buckets of a chunk. 16-bit elements are taken as pairs, each half of one in a lane of 32 bits, so that
// no vector crosses its lanes; their products come out evens first, and product_of says where.
template <typename T>
inline void prepare(const T* grad, const T* weight, const uint16_t* rank, const FloatBucketOfRank& bucket_of,
                    float* product, uint16_t* bucket) {
  for (int i = 0; i < kChunk / 2; ++i) {
    uint32_t ranks;
    memcpy(&ranks, rank + 2 * i, sizeof ranks);
    const uint32_t buckets = bucket_of(ranks & 0xffff) | bucket_of(ranks >> 16) << 16;
    memcpy(bucket + 2 * i, &buckets, sizeof buckets);
  }
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < kChunk / 2; ++i) {
      uint32_t grads, weights;
      memcpy(&grads, grad + 2 * i, sizeof grads);
      memcpy(&weights, weight + 2 * i, sizeof weights);
      product[i] = to_float(static_cast<T>(grads & 0xffff)) * to_float(static_cast<T>(weights & 0xffff));
      product[i + kChunk / 2] = to_float(static_cast<T>(grads >> 16)) * to_float(static_cast<T>(weights >> 16));
    }
  } else {
    for (int j = 0; j < kChunk; ++j) product[j] = grad[j] * weight[j];
  }
}

template <typename T>
constexpr int product_of(int j) {
  return sizeof(T) == 2 ? j % 2 * kChunk / 2 + j / 2 : j;
}

template <typename T>
void rank_bucket_grad(int64_t rows, int64_t columns, int steps, const void* grad_, const void* weight_,
                      const uint16_t* rank_, float* out_, int threads) {
  const BucketOfRank bucket_of = bucket_of_rank(columns, steps);
  const FloatBucketOfRank float_bucket_of(columns, steps);
  const int64_t chunks = FloatBucketOfRank::is_exact(columns, steps) ? columns / kChunk : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T* grad = static_cast<const T*>(grad_) + i * columns;
    const T* weight = static_cast<const T*>(weight_) + i * columns;
    const uint16_t* rank = rank_ + i * columns;
    float sums[kHistograms][kMaxSteps + 1] = {};
    for (int64_t begin = 0; begin < chunks * kChunk; begin += kChunk) {
      prefetch(grad + begin, kChunk);
      prefetch(weight + begin, kChunk);
      prefetch(rank + begin, kChunk);
      alignas(kLine) float product[kChunk];
      alignas(kLine) uint16_t bucket[kChunk];
      prepare(grad + begin, weight + begin, rank + begin, float_bucket_of, product, bucket);
      for (int j = 0; j < kChunk; j += kHistograms) {
        uint64_t buckets[kHistograms / 4];
        memcpy(buckets, bucket + j, sizeof buckets);
        for (int k = 0; k < kHistograms; ++k) {
          sums[k][buckets[k / 4] >> k % 4 * 16 & 0xffff] += product[product_of<T>(j) + product_of<T>(k)];
        }
      }
    }
    for (int64_t j = chunks * kChunk; j < columns; ++j) {
      const uint64_t n = bucket_of.steps * rank[j] + bucket_of.offset;
      const uint8_t bucket = static_cast<uint8_t>(n * bucket_of.multiplier >> bucket_of.shift);
      sums[j % kHistograms][bucket] += to_float(grad[j]) * to_float(weight[j]);
    }
    for (int k = 1; k < kHistograms; ++k) {
      for (int d = 0; d <= steps; ++d) sums[0][d] += sums[k][d];
    }
    float* out = out_ + i * (steps + 1);
    float sum = 0.0f;
    for (int d = 0; d <= steps; ++d) out[d] = -(sum += sums[0][d]);
  }
}

}  // namespace

extern const RankCpuKernels PYPRUNE_JOIN(rank_cpu_, PYPRUNE_ISA) = {
    PYPRUNE_BY_DTYPE(rank_mask),
    PYPRUNE_BY_DTYPE(rank_bucket_grad),
};

}  // namespace pyprune
