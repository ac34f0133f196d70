// SparseGPT's solve in Python; sparsegpt.h and sparsegpt_cpu.h are the contracts.
#pragma once

#include "bindings.h"
#include "sparsegpt_cpu.h"

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(SparseGptCpuKernels, sparsegpt_cpu);
#endif

inline SparseGptSlab make_slab(int64_t rows, int64_t columns, int64_t begin, int width, int n, int m, Address work,
                               Address upper, Address keep, int64_t groups, Address scale, Address zero, float levels,
                               Address errors) {
  if (width < 1 || width > kMaxSlab) throw py::value_error("width must be 1 to 128");
  return {rows,
          columns,
          begin,
          width,
          n,
          m,
          pointer<float>(work),
          pointer<const float>(upper),
          pointer<uint8_t>(keep),
          groups,
          pointer<const float>(scale),
          pointer<const float>(zero),
          levels,
          pointer<float>(errors)};
}

#ifdef PYPRUNE_WITH_CPU

inline void bind_sparsegpt_cpu(py::module_& m) {
  m.def("sparsegpt_slab",
        [](int64_t rows, int64_t columns, int64_t begin, int width, int n, int m, Address work, Address upper,
           Address keep, int64_t groups, Address scale, Address zero, float levels, Address errors, int threads) {
          const auto slab =
              make_slab(rows, columns, begin, width, n, m, work, upper, keep, groups, scale, zero, levels, errors);
          const py::gil_scoped_release release;
          sparsegpt_cpu().slab(slab, threads);
        });
  m.def("sparsegpt_select", [](int64_t rows, int64_t columns, int64_t begin, int width, Address work, Address upper,
                               Address keep, int64_t drop, int threads) {
    const auto slab = make_slab(rows, columns, begin, width, 0, 0, work, upper, keep, 0, 0, 0, 0.0f, 0);
    const py::gil_scoped_release release;
    sparsegpt_cpu().select(slab, drop, threads);
  });
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

inline void bind_sparsegpt_cuda(py::module_& m) {
  m.def("sparsegpt_slab",
        [](int64_t rows, int64_t columns, int64_t begin, int width, int n, int m, Address work, Address upper,
           Address keep, int64_t groups, Address scale, Address zero, float levels, Address errors, Address stream) {
          const auto slab =
              make_slab(rows, columns, begin, width, n, m, work, upper, keep, groups, scale, zero, levels, errors);
          check(sparsegpt_slab(slab, pointer(stream)), "sparsegpt_slab");
        });
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
