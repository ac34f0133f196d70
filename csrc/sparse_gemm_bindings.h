// The `sparse_gemm` family in Python; sparse_gemm_cpu.h and sparse_gemm.h are the contracts.
#pragma once

#include "bindings.h"
#include "sparse_gemm.h"
#ifdef PYPRUNE_WITH_CUTLASS
#include "cutlass/sparse_gemm.h"
#endif
#include "sparse_gemm_cpu.h"

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(SparseGemmCpuKernels, sparse_gemm_cpu);

inline void bind_sparse_gemm_cpu(py::module_& m) {
  m.def("sparse_gemm_workspace",
        [](int64_t tokens, int64_t in_features) { return sparse_gemm_cpu().workspace(tokens, in_features); });
  m.def(
      "bitmap_linear",
      [](int dtype, int64_t tokens, int64_t out_features, int64_t in_features, Address x, Address values,
         int64_t values_size, Address bitmap, Address offsets, Address bias, Address y, Address workspace,
         int threads) {
        sparse_gemm_cpu().bitmap_linear(DType(dtype), tokens, out_features, in_features, pointer(x), pointer(values),
                                        values_size, pointer<uint8_t>(bitmap), pointer<int64_t>(offsets), pointer(bias),
                                        pointer(y), pointer(workspace), threads);
      },
      ReleaseGil());
  m.def(
      "nm_linear",
      [](int dtype, int64_t tokens, int64_t out_features, int64_t in_features, int n, int m, Address x, Address values,
         Address metadata, Address bias, Address y, Address workspace, int threads) {
        sparse_gemm_cpu().nm_linear(DType(dtype), tokens, out_features, in_features, n, m, pointer(x), pointer(values),
                                    pointer<uint8_t>(metadata), pointer(bias), pointer(y), pointer(workspace), threads);
      },
      ReleaseGil());
  m.def(
      "masked_linear",
      [](int dtype, int64_t tokens, int64_t out_features, int64_t in_features, Address x, Address weight, Address mask,
         Address bias, Address y, Address workspace, int threads) {
        sparse_gemm_cpu().masked_linear(DType(dtype), tokens, out_features, in_features, pointer(x), pointer(weight),
                                        pointer<uint8_t>(mask), pointer(bias), pointer(y), pointer(workspace), threads);
      },
      ReleaseGil());
  m.def(
      "gathered_linear",
      [](int dtype, int64_t tokens, int64_t outputs, int64_t inputs, int64_t in_features, Address x, Address weight,
         Address in_index, Address out_index, Address bias, Address y, Address workspace, int threads) {
        sparse_gemm_cpu().gathered_linear(DType(dtype), tokens, outputs, inputs, in_features, pointer(x),
                                          pointer(weight), pointer<int64_t>(in_index), pointer<int64_t>(out_index),
                                          pointer(bias), pointer(y), pointer(workspace), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

// `shape` is (tokens, inputs, outputs).
inline SparseShape sparse_shape(const py::tuple& sizes) {
  if (sizes.size() != 3) throw py::value_error("shape must be (tokens, inputs, outputs)");
  return {sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(), sizes[2].cast<int64_t>()};
}

inline void bind_sparse_gemm_cuda(py::module_& m) {
  m.def("nm_linear", [](const py::tuple& shape, bool tensor_cores, int splits, int dtype, Address x, Address values,
                        Address metadata, Address bias, Address y, Address partial, Address stream) {
    check(nm_linear(sparse_shape(shape), {tensor_cores, splits}, dtype, pointer(x), pointer(values),
                    pointer<uint8_t>(metadata), pointer(bias), pointer(y), pointer<float>(partial), pointer(stream)),
          "nm_linear");
  });
  m.def("bitmap_linear", [](const py::tuple& shape, bool tensor_cores, int splits, int dtype, Address x, Address values,
                            int64_t values_size, Address bitmap, Address offsets, Address bias, Address y,
                            Address partial, Address stream) {
    check(bitmap_linear(sparse_shape(shape), {tensor_cores, splits}, dtype, pointer(x), pointer(values), values_size,
                        pointer<uint8_t>(bitmap), pointer<int64_t>(offsets), pointer(bias), pointer(y),
                        pointer<float>(partial), pointer(stream)),
          "bitmap_linear");
  });
#ifdef PYPRUNE_WITH_CUTLASS
  m.def("nm_linear_cutlass_workspace", [](const py::tuple& shape, int dtype) {
    int64_t bytes = 0;
    check(nm_linear_cutlass_workspace(sparse_shape(shape), dtype, &bytes), "nm_linear_cutlass_workspace");
    return bytes;
  });
  m.def("nm_linear_cutlass", [](const py::tuple& shape, int dtype, Address x, Address values, Address metadata,
                                Address y, Address workspace, Address stream) {
    check(nm_linear_cutlass(sparse_shape(shape), dtype, pointer(x), pointer(values), pointer<uint8_t>(metadata),
                            pointer(y), pointer(workspace), pointer(stream)),
          "nm_linear_cutlass");
  });
#endif
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
