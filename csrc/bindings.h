// What every *_bindings.cpp shares. The Python module knows addresses, sizes and codes; tensors, shapes, devices and
// streams are the caller's business (pyprune/_ops), so nothing here knows torch.
//
// A family of ops binds its functions in NAME_bindings.cpp and registers itself with a static `Family`; no list of
// families exists. PYPRUNE_WITH_CPU and PYPRUNE_WITH_CUDA say which halves the build has.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace pyprune {

namespace py = pybind11;
using Address = uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Adds a family's functions to the submodules `cpu` and `cuda`.
struct Family {
  using Bind = void (*)(py::module_& module);
  Family(Bind cpu, Bind cuda);
};

// Registers `bind_cpu` and `bind_cuda`, as far as the build has them.
#if defined(PYPRUNE_WITH_CPU) && defined(PYPRUNE_WITH_CUDA)
#define PYPRUNE_REGISTER_FAMILY const Family family(bind_cpu, bind_cuda)
#elif defined(PYPRUNE_WITH_CPU)
#define PYPRUNE_REGISTER_FAMILY const Family family(bind_cpu, nullptr)
#else
#define PYPRUNE_REGISTER_FAMILY const Family family(nullptr, bind_cuda)
#endif

// The position of the instruction set in use among those below.
int active_isa();

// Declares a family's tables, which NAME_cpu.cpp defines once per instruction set, and `kernels()`, the one in use.
#ifdef __x86_64__
#define PYPRUNE_CPU_KERNELS(Table, prefix)                                                                             \
  extern const Table prefix##_generic, prefix##_avx2, prefix##_avx512, prefix##_avx512_bf16;                           \
  static const Table& kernels() {                                                                                      \
    static const Table* const tables[] = {&prefix##_generic, &prefix##_avx2, &prefix##_avx512, &prefix##_avx512_bf16}; \
    return *tables[active_isa()];                                                                                      \
  }                                                                                                                    \
  static_assert(true, "")
#else
#define PYPRUNE_CPU_KERNELS(Table, prefix)                   \
  extern const Table prefix##_generic;                       \
  static const Table& kernels() { return prefix##_generic; } \
  static_assert(true, "")
#endif

// Raises RuntimeError for a CUDA error code.
inline void check(int code, const char* function) {
  if (code != 0)
    throw std::runtime_error(std::string(function) + ": CUDA error " + std::to_string(code) + ", " +
                             error_string(code));
}

}  // namespace pyprune
