// CPU kernels of the `hsm` family, compiled once per instruction set (cpu_types.h). Loops are written so that the
// compiler vectorises them; the bf16 products are apart, in hsm_fused_bf16.h.
//
// What bounds them: every kernel is one pass over rows that are read and written once. At T x d elements of s bytes,
// mask_add moves 3 T d s bytes (z is still in cache: 2 T d s from memory), mask_add_rmsnorm 5 T d s and
// rmsnorm_backward 5 T d s; a few multiply-adds per element keep up with memory at any vector width. The second pass of
// the RMSNorm kernels finds its row (at most tens of KiB) in the first-level cache.
#include "hsm_fused_cpu.h"

#include <math.h>

#include "cpu_types.h"

namespace pyprune {
namespace {

// Rows of block `block` when `rows` rows are dealt to `blocks` blocks as evenly as possible.
struct RowRange {
  int64_t begin, end;
};
inline RowRange block_rows(int64_t block, int64_t blocks, int64_t rows) {
  return {rows * block / blocks, rows * (block + 1) / blocks};
}

template <typename T>
void scale(int64_t rows, int64_t columns, const void* a_, const float* row_scale, const float* column_scale, void* out_,
           int threads) {
  const T* a = static_cast<const T*>(a_);
  T* out = static_cast<T*>(out_);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T* source = a + i * columns;
    T* target = out + i * columns;
    const float factor = row_scale ? row_scale[i] : 1.0f;
    if (column_scale) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) target[j] = from_float<T>(factor * column_scale[j] * to_float(source[j]));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) target[j] = from_float<T>(factor * to_float(source[j]));
    }
  }
}

template <typename T>
void mask_add(int64_t rows, int64_t columns, int64_t masked, const void* x_, int64_t x_stride, const float* mask,
              const void* z_, void* y_, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T* x = static_cast<const T*>(x_) + i * x_stride;
    const T* z = static_cast<const T*>(z_) + i * columns;
    T* y = static_cast<T*>(y_) + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < masked; ++j) y[j] = from_float<T>(mask[j] * to_float(x[j]) + to_float(z[j]));
    if (y != z) memcpy(y + masked, z + masked, static_cast<size_t>(columns - masked) * sizeof(T));
  }
}

template <typename T>
void mask_add_rmsnorm(int64_t rows, int64_t columns, float eps, const void* x_, int64_t x_stride, const float* mask,
                      const void* z_, const void* residual_, const void* weight_, void* residual_out_, void* normed_,
                      float* rstd, int threads) {
  const T* weight = static_cast<const T*>(weight_);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T* x = static_cast<const T*>(x_) + i * x_stride;
    const T* z = static_cast<const T*>(z_) + i * columns;
    const T* residual = static_cast<const T*>(residual_) + i * columns;
    T* residual_out = static_cast<T*>(residual_out_) + i * columns;
    T* normed = static_cast<T*>(normed_) + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      residual_out[j] = from_float<T>(to_float(residual[j]) + (mask[j] * to_float(x[j]) + to_float(z[j])));
    }
    // A loop of its own, because the rounded row counts and gcc does not vectorise rounding and summing together.
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < columns; ++j) squares += to_float(residual_out[j]) * to_float(residual_out[j]);
    const float scale = 1.0f / sqrtf(squares / static_cast<float>(columns) + eps);
    rstd[i] = scale;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      normed[j] = from_float<T>(to_float(residual_out[j]) * scale * to_float(weight[j]));
    }
  }
}

template <typename T>
void rmsnorm_backward(int64_t rows, int64_t columns, const void* grad_residual_out_, const void* grad_normed_,
                      const void* residual_out_, const float* rstd, const void* weight_, const void* x_,
                      int64_t x_stride, void* grad_residual_, int64_t blocks, float* grad_weight_, float* column_dot_,
                      int threads) {
  const T* weight = static_cast<const T*>(weight_);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const RowRange range = block_rows(block, blocks, rows);
    float* grad_weight = grad_weight_ + block * columns;
    float* column_dot = column_dot_ ? column_dot_ + block * columns : nullptr;
    memset(grad_weight, 0, static_cast<size_t>(columns) * sizeof(float));
    if (column_dot) memset(column_dot, 0, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t i = range.begin; i < range.end; ++i) {
      const T* grad_residual_out = static_cast<const T*>(grad_residual_out_) + i * columns;
      const T* grad_normed = static_cast<const T*>(grad_normed_) + i * columns;
      const T* residual_out = static_cast<const T*>(residual_out_) + i * columns;
      T* grad_residual = static_cast<T*>(grad_residual_) + i * columns;
      const float scale = rstd[i];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < columns; ++j) {
        dot += to_float(weight[j]) * to_float(grad_normed[j]) * to_float(residual_out[j]);
      }
      // mean(a * q) = rstd * mean(weight * grad_normed * residual_out)
      const float mean = scale * dot / static_cast<float>(columns);
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) {
        const float q = to_float(residual_out[j]) * scale;
        const float grad = to_float(grad_normed[j]);
        grad_weight[j] += grad * q;
        grad_residual[j] =
            from_float<T>(to_float(grad_residual_out[j]) + scale * (to_float(weight[j]) * grad - q * mean));
      }
      if (column_dot) {
        const T* x = static_cast<const T*>(x_) + i * x_stride;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) column_dot[j] += to_float(grad_residual[j]) * to_float(x[j]);
      }
    }
  }
}

template <typename T>
void column_dot(int64_t rows, int64_t columns, const void* a_, int64_t a_stride, const void* b_, int64_t b_stride,
                int64_t blocks, float* out_, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const RowRange range = block_rows(block, blocks, rows);
    float* out = out_ + block * columns;
    memset(out, 0, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t i = range.begin; i < range.end; ++i) {
      const T* a = static_cast<const T*>(a_) + i * a_stride;
      const T* b = static_cast<const T*>(b_) + i * b_stride;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) out[j] += to_float(a[j]) * to_float(b[j]);
    }
  }
}

}  // namespace
}  // namespace pyprune

#ifdef __AVX512BF16__
#include "hsm_fused_bf16.h"
#define PYPRUNE_BF16(kernel) kernel
#else
#define PYPRUNE_BF16(kernel) nullptr
#endif

namespace pyprune {

extern const HsmCpuKernels PYPRUNE_JOIN(hsm_cpu_, PYPRUNE_ISA) = {
    PYPRUNE_BY_DTYPE(scale),
    PYPRUNE_BY_DTYPE(mask_add),
    PYPRUNE_BY_DTYPE(mask_add_rmsnorm),
    PYPRUNE_BY_DTYPE(rmsnorm_backward),
    PYPRUNE_BY_DTYPE(column_dot),
    PYPRUNE_BF16(low_rank_workspace),
    PYPRUNE_BF16(low_rank),
    PYPRUNE_BF16(sum_products_workspace),
    PYPRUNE_BF16(sum_products),
};

}  // namespace pyprune
