// The Python module: the families of *_bindings.h, the choice of the instruction set, what was built.
//
// PYPRUNE_MODULE names the module (the tests build the CUDA half alone, under another name, on an emulator).
#include <vector>

#include "bitmap_bindings.h"
#include "hsm_fused_bindings.h"
#include "lora_score_bindings.h"
#include "nm_adamw_bindings.h"
#include "nm_bindings.h"
#include "rank_bindings.h"
#include "sparse_gemm_bindings.h"
#include "sparsegpt_bindings.h"
#include "transposable_bindings.h"

#ifndef PYPRUNE_MODULE
#define PYPRUNE_MODULE _C
#endif
#ifndef PYPRUNE_BUILD_INFO
#define PYPRUNE_BUILD_INFO "{}"
#endif

namespace pyprune {
namespace {

struct InstructionSet {
  const char* name;
  bool supported;
};

// In the order of PYPRUNE_CPU_KERNELS, each containing the ones before it.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets = {{"generic", true}};
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vbmi2");
  sets.insert(sets.end(), {{"avx2", avx2}, {"avx512", avx512}, {"avx512_bf16", bf16}});
#endif
  return sets;
}

int best_isa() {
  const auto sets = instruction_sets();
  int best = 0;
  for (int i = 0; i < static_cast<int>(sets.size()); ++i)
    if (sets[i].supported) best = i;
  return best;
}

int active = best_isa();

py::tuple supported_isas() {
  py::list names;
  const auto sets = instruction_sets();
  for (auto set = sets.rbegin(); set != sets.rend(); ++set)
    if (set->supported) names.append(set->name);
  return py::tuple(names);
}

void set_isa(const std::string& name) {
  const auto sets = instruction_sets();
  std::string known;
  for (int i = 0; i < static_cast<int>(sets.size()); ++i) {
    if (!sets[i].supported) continue;
    if (name == sets[i].name) {
      active = i;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(sets[i].name);
  }
  throw py::value_error("isa '" + name + "' does not run on this machine; choose one of: " + known);
}

}  // namespace

int active_isa() { return active; }

}  // namespace pyprune

PYBIND11_MODULE(PYPRUNE_MODULE, m) {
  using namespace pyprune;
  m.doc() = "pyprune's compiled kernels on raw addresses.";
  m.def("build_info", [] { return PYPRUNE_BUILD_INFO; }, "What was built, by what and how, as JSON.");
#ifdef PYPRUNE_WITH_CPU
  py::module_ cpu = m.def_submodule("cpu", "CPU kernels; the contracts are csrc/*_cpu.h.");
  cpu.def("isas", &supported_isas, "Instruction sets that this machine can run, best first.");
  cpu.def("isa", [] { return instruction_sets()[active].name; }, "The instruction set in use.");
  cpu.def("set_isa", &set_isa, py::arg("name"), "Use another of isas(), for the whole process.");
  bind_bitmap_cpu(cpu);
  bind_hsm_fused_cpu(cpu);
  bind_lora_score_cpu(cpu);
  bind_nm_cpu(cpu);
  bind_nm_adamw_cpu(cpu);
  bind_rank_cpu(cpu);
  bind_sparse_gemm_cpu(cpu);
  bind_sparsegpt_cpu(cpu);
  bind_transposable_cpu(cpu);
#endif
#ifdef PYPRUNE_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda", "CUDA launchers; the contracts are the headers in csrc/.");
  bind_bitmap_cuda(cuda);
  bind_hsm_fused_cuda(cuda);
  bind_lora_score_cuda(cuda);
  bind_nm_cuda(cuda);
  bind_nm_adamw_cuda(cuda);
  bind_rank_cuda(cuda);
  bind_sparse_gemm_cuda(cuda);
  bind_sparsegpt_cuda(cuda);
  bind_transposable_cuda(cuda);
#endif
}
