// The `nm` family in Python; nm_cpu.h and nm.h are the contracts.
#pragma once

#include "bindings.h"
#include "nm.h"
#include "nm_cpu.h"

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(NmCpuKernels, nm_cpu);

inline void bind_nm_cpu(py::module_& m) {
  m.def(
      "nm_prune",
      [](int dtype, int64_t rows, int64_t columns, int n, int m, Address scores, Address previous, Address bits,
         Address flips, int threads) {
        return nm_cpu().prune(DType(dtype), rows, columns, n, m, pointer(scores), pointer<uint8_t>(previous),
                              pointer<uint8_t>(bits), pointer<int64_t>(flips), threads);
      },
      ReleaseGil());
  m.def(
      "nm_compress",
      [](int dtype, int64_t rows, int64_t columns, int n, int m, Address weight, Address values, Address metadata,
         int threads) {
        return nm_cpu().compress(DType(dtype), rows, columns, n, m, pointer(weight), pointer(values),
                                 pointer<uint8_t>(metadata), threads);
      },
      ReleaseGil());
  m.def(
      "nm_decompress",
      [](int dtype, int64_t rows, int64_t columns, int n, int m, Address values, Address metadata, Address weight,
         int threads) {
        nm_cpu().decompress(DType(dtype), rows, columns, n, m, pointer(values), pointer<uint8_t>(metadata),
                            pointer(weight), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

// `shape` is (rows, columns, n, m).
inline NmShape nm_shape(const py::tuple& sizes) {
  if (sizes.size() != 4) throw py::value_error("shape must be (rows, columns, n, m)");
  return {sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(), sizes[2].cast<int>(), sizes[3].cast<int>()};
}

inline void bind_nm_cuda(py::module_& m) {
  m.def("nm_prune", [](const py::tuple& shape, int dtype, Address scores, Address previous_bits, Address bits,
                       Address flips, Address first, Address stream) {
    check(nm_prune(nm_shape(shape), dtype, pointer(scores), pointer<uint8_t>(previous_bits), pointer<uint8_t>(bits),
                   pointer<int64_t>(flips), pointer<int64_t>(first), pointer(stream)),
          "nm_prune");
  });
  m.def("nm_compress", [](const py::tuple& shape, int dtype, Address weight, Address values, Address metadata,
                          Address first, Address stream) {
    check(nm_compress(nm_shape(shape), dtype, pointer(weight), pointer(values), pointer<uint8_t>(metadata),
                      pointer<int64_t>(first), pointer(stream)),
          "nm_compress");
  });
  m.def("nm_decompress",
        [](const py::tuple& shape, int dtype, Address values, Address metadata, Address weight, Address stream) {
          check(nm_decompress(nm_shape(shape), dtype, pointer(values), pointer<uint8_t>(metadata), pointer(weight),
                              pointer(stream)),
                "nm_decompress");
        });
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
