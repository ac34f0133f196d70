// LoRAPrune's group score on the CPU. The contract is in lora_score_cpu.h; compiled once per instruction set.
//
// An entry of the weight takes 6 r operations (r = 8: 48) for 2 bytes of bf16: bound by arithmetic. Four rows by one
// vector of columns are made at a time, so that each of the three loads from A - gA, gA and A feeds four products, and
// the columns are taken in strips whose factors stay in the first-level cache while the rows go by.
#include "lora_score_cpu.h"

#include "cpu_types.h"

namespace pyprune {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kRows = 4;
constexpr int64_t kStrip = 256;  // columns

inline Vector load(const float* source) {
  Vector value;
  memcpy(&value, source, sizeof value);
  return value;
}

inline Vector absolute(Vector value) {
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vector))));
  return (Vector)((Bits)value & kMagnitude);
}

struct Problem {
  int64_t inputs, rank;
  float scale;
  const float *a, *b, *difference, *grad_a, *grad_b;
};

// Scores of R rows from `row` on, of `count` columns from `column` on: added to row_sums [R] and, if not null, to
// column_sums [count]. `weight` [R][kStrip] is the strip in fp32.
template <int R>
void add_strip(const Problem& p, int64_t row, int64_t column, int64_t count, const float (*weight)[kStrip],
               float* row_sums, float* column_sums) {
  Vector sums[R] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Vector gradient[R] = {}, update[R] = {};
    for (int64_t k = 0; k < p.rank; ++k) {
      const int64_t place = k * p.inputs + column + j;
      const Vector difference = load(p.difference + place), grad_a = load(p.grad_a + place), a = load(p.a + place);
      for (int i = 0; i < R; ++i) {
        const float b = p.b[(row + i) * p.rank + k], grad_b = p.grad_b[(row + i) * p.rank + k];
        gradient[i] += grad_b * difference + b * grad_a;
        update[i] += b * a;
      }
    }
    Vector column_sum = {};
    for (int i = 0; i < R; ++i) {
      const Vector score = absolute(gradient[i] * (load(weight[i] + j) + p.scale * update[i]));
      sums[i] += score;
      column_sum += score;
    }
    if (column_sums) {
      column_sum += load(column_sums + j);
      memcpy(column_sums + j, &column_sum, sizeof column_sum);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int l = 0; l < kLanes; ++l) row_sums[i] += sums[i][l];
    for (int64_t tail = j; tail < count; ++tail) {
      float gradient = 0.0f, update = 0.0f;
      for (int64_t k = 0; k < p.rank; ++k) {
        const int64_t place = k * p.inputs + column + tail, mine = (row + i) * p.rank + k;
        gradient += p.grad_b[mine] * p.difference[place] + p.b[mine] * p.grad_a[place];
        update += p.b[mine] * p.a[place];
      }
      const float score = __builtin_fabsf(gradient * (weight[i][tail] + p.scale * update));
      row_sums[i] += score;
      if (column_sums) column_sums[tail] += score;
    }
  }
}

template <typename T>
void group_score(int64_t outputs, int64_t inputs, int64_t rank, float scale, int dim, const void* weight_,
                 const float* a, const float* b, const float* difference, const float* grad_a, const float* grad_b,
                 int64_t blocks, float* out, int threads) {
  const T* weight = static_cast<const T*>(weight_);
  const Problem problem{inputs, rank, scale, a, b, difference, grad_a, grad_b};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = outputs * block / blocks, end = outputs * (block + 1) / blocks;
    float* column_sums = dim == 1 ? out + block * inputs : nullptr;
    if (column_sums && inputs > 0) memset(column_sums, 0, static_cast<size_t>(inputs) * sizeof(float));
    if (dim == 0 && begin < end) memset(out + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    for (int64_t column = 0; column < inputs; column += kStrip) {
      const int64_t count = inputs - column < kStrip ? inputs - column : kStrip;
      for (int64_t row = begin; row < end; row += kRows) {
        const int64_t rows = end - row < kRows ? end - row : kRows;
        float strip[kRows][kStrip], unused[kRows] = {};
        for (int64_t i = 0; i < rows; ++i) {
          const T* source = weight + (row + i) * inputs + column;
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) strip[i][j] = to_float(source[j]);
        }
        float* row_sums = dim == 0 ? out + row : unused;
        float* columns = column_sums ? column_sums + column : nullptr;
        switch (rows) {
          case 4: add_strip<4>(problem, row, column, count, strip, row_sums, columns); break;
          case 3: add_strip<3>(problem, row, column, count, strip, row_sums, columns); break;
          case 2: add_strip<2>(problem, row, column, count, strip, row_sums, columns); break;
          default: add_strip<1>(problem, row, column, count, strip, row_sums, columns); break;
        }
      }
    }
  }
}

}  // namespace

extern const LoraScoreCpuKernels PYPRUNE_JOIN(lora_score_cpu_, PYPRUNE_ISA) = {
    PYPRUNE_BY_DTYPE(group_score),
};

}  // namespace pyprune
