// The Python module: addresses become pointers, error codes become exceptions. Tensors, shapes, devices and streams are
// the caller's business (pyprune/ops.py), so nothing here knows torch.
//
// PYPRUNE_MODULE names the module (the tests build the CUDA half alone, under another name, on an emulator).
// PYPRUNE_WITH_CPU adds the functions of submodule `cpu`, PYPRUNE_WITH_CUDA those of submodule `cuda`.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "hsm_fused.h"
#ifdef PYPRUNE_WITH_CPU
#include "hsm_fused_cpu.h"
#endif

#ifndef PYPRUNE_MODULE
#define PYPRUNE_MODULE _C
#endif
#ifndef PYPRUNE_BUILD_INFO
#define PYPRUNE_BUILD_INFO "{}"
#endif

namespace py = pybind11;

namespace pyprune {
namespace {

using Address = uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef PYPRUNE_WITH_CPU

// The kernel tables this machine can run, best first.
template <typename Visit>
void for_each_supported(Visit visit) {
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    visit(hsm_cpu_avx512);
  }
  if (avx2) visit(hsm_cpu_avx2);
#endif
  visit(hsm_cpu_generic);
}

const HsmCpuKernels* best_kernels() {
  const HsmCpuKernels* best = nullptr;
  for_each_supported([&](const HsmCpuKernels& kernels) {
    if (!best) best = &kernels;
  });
  return best;
}

const HsmCpuKernels* active = best_kernels();

py::tuple supported_isas() {
  py::list names;
  for_each_supported([&](const HsmCpuKernels& kernels) { names.append(kernels.isa); });
  return py::tuple(names);
}

void set_isa(const std::string& name) {
  const HsmCpuKernels* found = nullptr;
  std::string known;
  for_each_supported([&](const HsmCpuKernels& kernels) {
    if (name == kernels.isa) found = &kernels;
    known += (known.empty() ? "" : ", ") + std::string(kernels.isa);
  });
  if (!found) throw py::value_error("isa '" + name + "' does not run on this machine; choose one of: " + known);
  active = found;
}

void bind_cpu(py::module_ m) {
  m.doc() = "CPU kernels; csrc/hsm_fused_cpu.h is their contract.";
  m.def("isas", &supported_isas, "Instruction sets that this machine can run, best first.");
  m.def("isa", [] { return active->isa; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another of isas(), for the whole process.");
  m.def(
      "scale",
      [](int dtype, int64_t rows, int64_t columns, Address a, Address row_scale, Address column_scale, Address out,
         int threads) {
        active->scale(DType(dtype), rows, columns, pointer(a), pointer<float>(row_scale), pointer<float>(column_scale),
                      pointer(out), threads);
      },
      ReleaseGil());
  m.def(
      "mask_add",
      [](int dtype, int64_t rows, int64_t columns, int64_t masked, Address x, int64_t x_stride, Address mask, Address z,
         Address y, int threads) {
        active->mask_add(DType(dtype), rows, columns, masked, pointer(x), x_stride, pointer<float>(mask), pointer(z),
                         pointer(y), threads);
      },
      ReleaseGil());
  m.def(
      "mask_add_rmsnorm",
      [](int dtype, int64_t rows, int64_t columns, float eps, Address x, int64_t x_stride, Address mask, Address z,
         Address residual, Address weight, Address residual_out, Address normed, Address rstd, int threads) {
        active->mask_add_rmsnorm(DType(dtype), rows, columns, eps, pointer(x), x_stride, pointer<float>(mask),
                                 pointer(z), pointer(residual), pointer(weight), pointer(residual_out), pointer(normed),
                                 pointer<float>(rstd), threads);
      },
      ReleaseGil());
  m.def(
      "rmsnorm_backward",
      [](int dtype, int64_t rows, int64_t columns, Address grad_residual_out, Address grad_normed, Address residual_out,
         Address rstd, Address weight, Address x, int64_t x_stride, Address grad_residual, int64_t blocks,
         Address grad_weight, Address column_dot, int threads) {
        active->rmsnorm_backward(DType(dtype), rows, columns, pointer(grad_residual_out), pointer(grad_normed),
                                 pointer(residual_out), pointer<float>(rstd), pointer(weight), pointer(x), x_stride,
                                 pointer(grad_residual), blocks, pointer<float>(grad_weight),
                                 pointer<float>(column_dot), threads);
      },
      ReleaseGil());
  m.def(
      "column_dot",
      [](int dtype, int64_t rows, int64_t columns, Address a, int64_t a_stride, Address b, int64_t b_stride,
         int64_t blocks, Address out, int threads) {
        active->column_dot(DType(dtype), rows, columns, pointer(a), a_stride, pointer(b), b_stride, blocks,
                           pointer<float>(out), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

void check(int code, const char* function) {
  if (code != 0)
    throw std::runtime_error(std::string(function) + ": CUDA error " + std::to_string(code) + ", " +
                             error_string(code));
}

HsmShape hsm_shape(const py::tuple& sizes) {
  if (sizes.size() != 4) throw py::value_error("shape must be (tokens, hidden, rank, outputs)");
  return {sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(), sizes[2].cast<int64_t>(), sizes[3].cast<int64_t>()};
}

void bind_cuda(py::module_ m) {
  m.doc() = "CUDA launchers; csrc/hsm_fused.h is their contract. `shape` is (tokens, hidden, rank, outputs).";
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

}  // namespace
}  // namespace pyprune

PYBIND11_MODULE(PYPRUNE_MODULE, m) {
  m.doc() = "pyprune's compiled kernels on raw addresses.";
  m.def("build_info", [] { return PYPRUNE_BUILD_INFO; }, "What was built, by what and how, as JSON.");
#ifdef PYPRUNE_WITH_CPU
  pyprune::bind_cpu(m.def_submodule("cpu"));
#endif
#ifdef PYPRUNE_WITH_CUDA
  pyprune::bind_cuda(m.def_submodule("cuda"));
#endif
}
