// The `hsm` family in Python; hsm_fused_cpu.h and hsm_fused.h are the contracts.
#pragma once

#include "bindings.h"
#include "hsm_fused.h"
#include "hsm_fused_cpu.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(HsmCpuKernels, hsm_cpu);

// Whether the processor has tiles for bf16 (AMX), which torch's products use.
inline bool has_bf16_tiles() {
#ifdef __x86_64__
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
}

// `sizes` is (tokens, inputs, rank, outputs, masked).
inline LowRank low_rank_of(const py::tuple& sizes) {
  if (sizes.size() != 5) throw py::value_error("sizes must be (tokens, inputs, rank, outputs, masked)");
  LowRank op{};
  int64_t* const fields[] = {&op.tokens, &op.inputs, &op.rank, &op.outputs, &op.masked};
  for (size_t i = 0; i < 5; ++i) *fields[i] = sizes[i].cast<int64_t>();
  return op;
}

// `sizes` is (tokens, rank, columns).
inline SumProducts sum_products_of(const py::tuple& sizes) {
  if (sizes.size() != 3) throw py::value_error("sizes must be (tokens, rank, columns)");
  SumProducts op{};
  op.tokens = sizes[0].cast<int64_t>(), op.rank = sizes[1].cast<int64_t>(), op.columns = sizes[2].cast<int64_t>();
  return op;
}

inline void bind_products(py::module_& m) {
  m.def("has_bf16_tiles", &has_bf16_tiles, "Whether this processor has AMX.");
  m.def("has_products", [] { return hsm_cpu().low_rank != nullptr; }, "Whether low_rank and sum_products are there.");
  m.def("low_rank_workspace",
        [](const py::tuple& sizes, int threads) { return hsm_cpu().low_rank_workspace(low_rank_of(sizes), threads); });
  m.def("low_rank", [](const py::tuple& sizes, bool transposed, Address x, Address a, Address b, Address scale,
                       Address mask, Address beside, Address dot, Address h, Address y, Address residual,
                       Address weight, float eps, Address normed, Address rstd, Address workspace, int threads) {
    LowRank op = low_rank_of(sizes);
    op.transposed = transposed;
    op.x = pointer(x), op.a = pointer(a), op.b = pointer(b);
    op.scale = pointer<float>(scale), op.mask = pointer<float>(mask);
    op.beside = pointer(beside), op.dot = pointer<float>(dot);
    op.h = pointer(h), op.y = pointer(y);
    op.residual = pointer(residual), op.weight = pointer(weight), op.eps = eps;
    op.normed = pointer(normed), op.rstd = pointer<float>(rstd);
    const py::gil_scoped_release release;
    hsm_cpu().low_rank(op, pointer(workspace), threads);
  });
  m.def("sum_products_workspace", [](const py::tuple& sizes, int threads) {
    return hsm_cpu().sum_products_workspace(sum_products_of(sizes), threads);
  });
  m.def("sum_products", [](const py::tuple& sizes, Address a, Address b, Address out, Address workspace, int threads) {
    SumProducts op = sum_products_of(sizes);
    op.a = pointer(a), op.b = pointer(b), op.out = pointer(out);
    const py::gil_scoped_release release;
    hsm_cpu().sum_products(op, pointer(workspace), threads);
  });
}

inline void bind_hsm_fused_cpu(py::module_& m) {
  bind_products(m);
  m.def(
      "scale",
      [](int dtype, int64_t rows, int64_t columns, Address a, Address row_scale, Address column_scale, Address out,
         int threads) {
        hsm_cpu().scale(DType(dtype), rows, columns, pointer(a), pointer<float>(row_scale),
                        pointer<float>(column_scale), pointer(out), threads);
      },
      ReleaseGil());
  m.def(
      "mask_add",
      [](int dtype, int64_t rows, int64_t columns, int64_t masked, Address x, int64_t x_stride, Address mask, Address z,
         Address y, int threads) {
        hsm_cpu().mask_add(DType(dtype), rows, columns, masked, pointer(x), x_stride, pointer<float>(mask), pointer(z),
                           pointer(y), threads);
      },
      ReleaseGil());
  m.def(
      "mask_add_rmsnorm",
      [](int dtype, int64_t rows, int64_t columns, float eps, Address x, int64_t x_stride, Address mask, Address z,
         Address residual, Address weight, Address residual_out, Address normed, Address rstd, int threads) {
        hsm_cpu().mask_add_rmsnorm(DType(dtype), rows, columns, eps, pointer(x), x_stride, pointer<float>(mask),
                                   pointer(z), pointer(residual), pointer(weight), pointer(residual_out),
                                   pointer(normed), pointer<float>(rstd), threads);
      },
      ReleaseGil());
  m.def(
      "rmsnorm_backward",
      [](int dtype, int64_t rows, int64_t columns, Address grad_residual_out, Address grad_normed, Address residual_out,
         Address rstd, Address weight, Address x, int64_t x_stride, Address grad_residual, int64_t blocks,
         Address grad_weight, Address column_dot, int threads) {
        hsm_cpu().rmsnorm_backward(DType(dtype), rows, columns, pointer(grad_residual_out), pointer(grad_normed),
                                   pointer(residual_out), pointer<float>(rstd), pointer(weight), pointer(x), x_stride,
                                   pointer(grad_residual), blocks, pointer<float>(grad_weight),
                                   pointer<float>(column_dot), threads);
      },
      ReleaseGil());
  m.def(
      "column_dot",
      [](int dtype, int64_t rows, int64_t columns, Address a, int64_t a_stride, Address b, int64_t b_stride,
         int64_t blocks, Address out, int threads) {
        hsm_cpu().column_dot(DType(dtype), rows, columns, pointer(a), a_stride, pointer(b), b_stride, blocks,
                             pointer<float>(out), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

// `shape` is (tokens, hidden, rank, outputs).
inline HsmShape hsm_shape(const py::tuple& sizes) {
  if (sizes.size() != 4) throw py::value_error("shape must be (tokens, hidden, rank, outputs)");
  return {sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(), sizes[2].cast<int64_t>(), sizes[3].cast<int64_t>()};
}

inline void bind_hsm_fused_cuda(py::module_& m) {
  m.def("hsm_workspace", [](const py::tuple& shape, int dtype) {
    int64_t bytes = 0;
    check(hsm_workspace(hsm_shape(shape), dtype, &bytes), "hsm_workspace");
    return bytes;
  });
  m.def("hsm_forward", [](const py::tuple& shape, int dtype, Address x, Address l0, Address v, Address l1, Address mask,
                          Address y, Address h, Address workspace, Address stream) {
    check(hsm_forward(hsm_shape(shape), dtype, pointer(x), pointer(l0), pointer<float>(v), pointer(l1),
                      pointer<float>(mask), pointer(y), pointer(h), pointer(workspace), pointer(stream)),
          "hsm_forward");
  });
  m.def("hsm_residual_rmsnorm_forward",
        [](const py::tuple& shape, int dtype, float eps, Address x, Address l0, Address v, Address l1, Address mask,
           Address residual, Address weight, Address residual_out, Address normed, Address h, Address rstd,
           Address workspace, Address stream) {
          check(hsm_residual_rmsnorm_forward(hsm_shape(shape), dtype, eps, pointer(x), pointer(l0), pointer<float>(v),
                                             pointer(l1), pointer<float>(mask), pointer(residual), pointer(weight),
                                             pointer(residual_out), pointer(normed), pointer(h), pointer<float>(rstd),
                                             pointer(workspace), pointer(stream)),
                "hsm_residual_rmsnorm_forward");
        });
  m.def("hsm_backward", [](const py::tuple& shape, int dtype, Address grad_y, Address x, Address h, Address l0,
                           Address v, Address l1, Address mask, Address grad_x, Address grad_p, Address grad_v,
                           Address column_dot, Address workspace, Address stream) {
    check(hsm_backward(hsm_shape(shape), dtype, pointer(grad_y), pointer(x), pointer(h), pointer(l0), pointer<float>(v),
                       pointer(l1), pointer<float>(mask), pointer(grad_x), pointer(grad_p), pointer<float>(grad_v),
                       pointer<float>(column_dot), pointer(workspace), pointer(stream)),
          "hsm_backward");
  });
  m.def("rmsnorm_backward", [](const py::tuple& shape, int dtype, Address grad_residual_out, Address grad_normed,
                               Address residual_out, Address rstd, Address weight, Address grad_residual,
                               Address grad_weight, Address workspace, Address stream) {
    check(rmsnorm_backward(hsm_shape(shape), dtype, pointer(grad_residual_out), pointer(grad_normed),
                           pointer(residual_out), pointer<float>(rstd), pointer(weight), pointer(grad_residual),
                           pointer<float>(grad_weight), pointer(workspace), pointer(stream)),
          "rmsnorm_backward");
  });
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
