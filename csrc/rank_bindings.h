// The `rank` family in Python; rank.h and rank_cpu.h are the contracts.
#pragma once

#include "bindings.h"
#include "rank_cpu.h"

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(RankCpuKernels, rank_cpu);

inline void bind_rank_cpu(py::module_& m) {
  m.def(
      "rank_mask",
      [](int dtype, int64_t rows, int64_t columns, Address weight, Address rank, Address threshold, Address out,
         int threads) {
        rank_cpu().rank_mask(DType(dtype), rows, columns, pointer(weight), pointer<uint16_t>(rank),
                             pointer<int32_t>(threshold), pointer(out), threads);
      },
      ReleaseGil());
  m.def(
      "rank_bucket_grad",
      [](int dtype, int64_t rows, int64_t columns, int steps, Address grad, Address weight, Address rank, Address out,
         int threads) {
        rank_cpu().rank_bucket_grad(DType(dtype), rows, columns, steps, pointer(grad), pointer(weight),
                                    pointer<uint16_t>(rank), pointer<float>(out), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

inline void bind_rank_cuda(py::module_& m) {
  m.def("rank_mask", [](int dtype, int64_t rows, int64_t columns, Address weight, Address rank, Address threshold,
                        Address out, Address stream) {
    check(rank_mask(dtype, rows, columns, pointer(weight), pointer<uint16_t>(rank), pointer<int32_t>(threshold),
                    pointer(out), pointer(stream)),
          "rank_mask");
  });
  m.def("rank_bucket_grad", [](int dtype, int64_t rows, int64_t columns, int steps, Address grad, Address weight,
                               Address rank, Address out, Address stream) {
    check(rank_bucket_grad(dtype, rows, columns, steps, pointer(grad), pointer(weight), pointer<uint16_t>(rank),
                           pointer<float>(out), pointer(stream)),
          "rank_bucket_grad");
  });
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
