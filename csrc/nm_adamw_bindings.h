// The `nm_adamw` family in Python; nm_adamw_cpu.h and nm_adamw.h are the contracts.
#pragma once

#include "bindings.h"
#include "nm_adamw.h"
#include "nm_adamw_cpu.h"

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(NmAdamwCpuKernels, nm_adamw_cpu);
#endif

// `options` is (beta1, new1, beta2, new2, keep, rate, correction, eps, masked_decay, seed).
inline AdamW adamw(const py::tuple& options) {
  if (options.size() != 10) throw py::value_error("options must be the ten fields of AdamW in csrc/nm_adamw.h");
  const auto number = [&](int i) { return options[i].cast<float>(); };
  return {number(0), number(1), number(2), number(3), number(4),
          number(5), number(6), number(7), number(8), options[9].cast<uint32_t>()};
}

#ifdef PYPRUNE_WITH_CPU

inline void bind_nm_adamw_cpu(py::module_& m) {
  m.def("nm_adamw", [](int dtype, int64_t rows, int64_t columns, const py::tuple& options, Address param, Address grad,
                       Address exp_avg, Address exp_avg_sq, Address mask, int threads) {
    const AdamW parsed = adamw(options);
    const py::gil_scoped_release release;
    nm_adamw_cpu().nm_adamw(DType(dtype), rows, columns, parsed, pointer(param), pointer(grad), pointer<float>(exp_avg),
                            pointer<float>(exp_avg_sq), pointer<uint8_t>(mask), threads);
  });
  m.def(
      "masked_weight",
      [](int dtype, int out_dtype, int64_t rows, int64_t columns, Address weight, Address mask, Address out,
         int threads) {
        nm_adamw_cpu().masked_weight(DType(dtype), DType(out_dtype), rows, columns, pointer(weight),
                                     pointer<uint8_t>(mask), pointer(out), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

inline void bind_nm_adamw_cuda(py::module_& m) {
  m.def("nm_adamw", [](int dtype, int64_t rows, int64_t columns, const py::tuple& options, Address param, Address grad,
                       Address exp_avg, Address exp_avg_sq, Address mask, Address stream) {
    check(nm_adamw(dtype, rows, columns, adamw(options), pointer(param), pointer(grad), pointer<float>(exp_avg),
                   pointer<float>(exp_avg_sq), pointer<uint8_t>(mask), pointer(stream)),
          "nm_adamw");
  });
  m.def("masked_weight", [](int dtype, int out_dtype, int64_t rows, int64_t columns, Address weight, Address mask,
                            Address out, Address stream) {
    check(masked_weight(dtype, out_dtype, rows, columns, pointer(weight), pointer<uint8_t>(mask), pointer(out),
                        pointer(stream)),
          "masked_weight");
  });
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
