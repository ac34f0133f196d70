// The `lora_score` family in Python; lora_score_cpu.h and lora_score.h are the contracts.
#pragma once

#include "bindings.h"
#include "lora_score.h"
#include "lora_score_cpu.h"

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(LoraScoreCpuKernels, lora_score_cpu);

inline void bind_lora_score_cpu(py::module_& m) {
  m.attr("LORA_SCORE_STRIP") = kLoraScoreStrip;
  m.def(
      "lora_group_score",
      [](int dtype, int64_t outputs, int64_t inputs, int64_t rank, int dim, Address weight, Address factors,
         Address pairs, int64_t blocks, Address out, int threads) {
        lora_score_cpu().group_score(DType(dtype), outputs, inputs, rank, dim, pointer(weight), pointer<float>(factors),
                                     pointer<float>(pairs), blocks, pointer<float>(out), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

inline void bind_lora_score_cuda(py::module_& m) {
  m.def("lora_group_score_sizes", [](int64_t outputs, int64_t inputs, int64_t rank, int dim) {
    int64_t partial_rows = 0, workspace_bytes = 0;
    lora_group_score_sizes(outputs, inputs, rank, dim, &partial_rows, &workspace_bytes);
    return py::make_tuple(partial_rows, workspace_bytes);
  });
  m.def("lora_group_score",
        [](int dtype, int64_t outputs, int64_t inputs, int64_t rank, float scale, int dim, Address weight, Address a,
           Address b, Address grad_a, Address grad_b, Address partials, Address workspace, Address stream) {
          check(lora_group_score(dtype, outputs, inputs, rank, scale, dim, pointer(weight), pointer<float>(a),
                                 pointer<float>(b), pointer<float>(grad_a), pointer<float>(grad_b),
                                 pointer<float>(partials), pointer(workspace), pointer(stream)),
                "lora_group_score");
        });
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
