// LoRAPrune's group score on the CPU. The contract is in lora_score_cpu.h; compiled once per instruction set.
//
// An entry of the weight takes 3 r multiply-adds (r = 8: 24) for 2 bytes of bf16, so it is bound by arithmetic: a core
// of 16 fp32 lanes twice a cycle would need 0.75 cycles an entry, about the time of reading 5 bytes. bf16 products
// would not help: a factor split into two bf16 numbers takes three of them at twice the rate.
//
// kRows rows by one vector of columns are made at a time in registers: for every k, three loads of factors serve
// 3 kRows multiply-adds, in 2 kRows independent chains. Columns come in strips whose packed factors stay in the
// first-level cache while the rows go by.
#include "lora_score_cpu.h"

#include "cpu_types.h"

namespace pyprune {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kStrip = kLoraScoreStrip;
constexpr int kLine = 64;  // bytes

inline Vector load(const float* source) {
  Vector value;
  memcpy(&value, source, sizeof value);
  return value;
}

inline void store(float* target, Vector value) { memcpy(target, &value, sizeof value); }

inline Vector absolute(Vector value) {
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vector))));
  return (Vector)((Bits)value & kMagnitude);
}

struct Problem {
  int64_t rank;
  const float* pairs;
};

// Some rows of a strip in fp32, and a request for those that follow them.
template <typename T>
inline void widen(const T* weight, int64_t rows, int64_t inputs, int64_t count, float (*strip)[kStrip]) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = weight + i * inputs;
    const char* ahead = reinterpret_cast<const char*>(row + rows * inputs);
    for (size_t byte = 0; byte < count * sizeof(T); byte += kLine) __builtin_prefetch(ahead + byte);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) strip[i][j] = to_float(row[j]);
  }
}

// Scores of R rows from `row` on and of one strip, whose weights are `strip` and factors [rank][3][kStrip]: summed over
// the columns into row_sums [R], or over the rows into column_sums [kStrip] if that is not null.
template <int R>
inline void add_rows(const Problem& p, int64_t row, const float* factors, const float (*strip)[kStrip], float* row_sums,
                     float* column_sums) {
  const float* pairs[R];
  for (int i = 0; i < R; ++i) pairs[i] = p.pairs + (row + i) * p.rank * 2;
  Vector sums[R] = {};
  for (int j = 0; j < kStrip; j += kLanes) {
    Vector gradient[R], updated[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      gradient[i] = Vector{};
      updated[i] = load(strip[i] + j);
    }
    const float* factor = factors + j;
    for (int64_t k = 0; k < p.rank; ++k, factor += 3 * kStrip) {
      const Vector difference = load(factor), grad_a = load(factor + kStrip), a = load(factor + 2 * kStrip);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Vector b = pairs[i][2 * k] - Vector{};
        gradient[i] += b * grad_a;
        updated[i] += b * a;
        gradient[i] += pairs[i][2 * k + 1] * difference;
      }
    }
    Vector column_sum = {};
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vector score = absolute(gradient[i] * updated[i]);
      if (column_sums) {
        column_sum += score;
      } else {
        sums[i] += score;
      }
    }
    if (column_sums) store(column_sums + j, load(column_sums + j) + column_sum);
  }
  for (int i = 0; i < R; ++i) {
    for (int l = 0; l < kLanes; ++l) row_sums[i] += sums[i][l];
  }
}

template <typename T>
void group_score(int64_t outputs, int64_t inputs, int64_t rank, int dim, const void* weight_, const float* factors,
                 const float* pairs, int64_t blocks, float* out, int threads) {
  const T* weight = static_cast<const T*>(weight_);
  const Problem problem{rank, pairs};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = outputs * block / blocks, end = outputs * (block + 1) / blocks;
    if (dim == 0 && begin < end) memset(out + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    for (int64_t column = 0; column < inputs; column += kStrip) {
      const int64_t count = inputs - column < kStrip ? inputs - column : kStrip;
      const float* part = factors + column * rank * 3;
      float strip[kRows][kStrip] = {}, column_sums[kStrip] = {}, unused[kRows] = {};
      int64_t rows;
      for (int64_t row = begin; row < end; row += rows) {
        rows = end - row >= kRows ? kRows : end - row >= 2 ? 2 : 1;
        widen(weight + row * inputs + column, rows, inputs, count, strip);
        float* row_sums = dim == 0 ? out + row : unused;
        float* columns = dim == 0 ? nullptr : column_sums;
        switch (rows) {
          case kRows: add_rows<kRows>(problem, row, part, strip, row_sums, columns); break;
          case 2: add_rows<2>(problem, row, part, strip, row_sums, columns); break;
          default: add_rows<1>(problem, row, part, strip, row_sums, columns); break;
        }
      }
      if (dim == 1) memcpy(out + block * inputs + column, column_sums, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

}  // namespace

extern const LoraScoreCpuKernels PYPRUNE_JOIN(lora_score_cpu_, PYPRUNE_ISA) = {
    PYPRUNE_BY_DTYPE(group_score),
};

}  // namespace pyprune
