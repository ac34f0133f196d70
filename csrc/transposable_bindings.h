// The `transposable` family in Python; transposable_cpu.h and transposable.h are the contracts.
#pragma once

#include "bindings.h"
#include "transposable.h"
#include "transposable_cpu.h"

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(TransposableCpuKernels, transposable_cpu);

inline void bind_transposable_cpu(py::module_& m) {
  m.def(
      "transposable_prune",
      [](int dtype, int64_t rows, int64_t columns, Address scores, Address bits, int threads) {
        transposable_cpu().prune(DType(dtype), rows, columns, pointer(scores), pointer<uint8_t>(bits), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

inline void bind_transposable_cuda(py::module_& m) {
  m.def("transposable_prune", [](int dtype, int64_t rows, int64_t columns, Address scores, Address previous_bits,
                                 Address bits, Address flips, Address nans, Address stream) {
    check(transposable_prune(dtype, rows, columns, pointer(scores), pointer<uint8_t>(previous_bits),
                             pointer<uint8_t>(bits), pointer<int64_t>(flips), pointer<int64_t>(nans), pointer(stream)),
          "transposable_prune");
  });
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
