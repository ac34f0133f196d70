// What every *_bindings.h shares. The Python module knows addresses, sizes and codes; tensors, shapes, devices and
// streams are the caller's business (pyprune/_ops), so nothing here knows torch.
//
// A family of ops binds its functions in NAME_bindings.h, once for each half that the build has (PYPRUNE_WITH_CPU,
// PYPRUNE_WITH_CUDA). bindings.cpp includes all of them: whatever includes pybind11 compiles for seconds before its own
// first line, so there is one such file.
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

// The position of the instruction set in use among those below.
int active_isa();

// Declares a family's tables, which NAME_cpu.cpp defines once per instruction set, and `prefix()`, the one in use.
#ifdef __x86_64__
#define PYPRUNE_CPU_KERNELS(Table, prefix)                                                                             \
  extern const Table prefix##_generic, prefix##_avx2, prefix##_avx512, prefix##_avx512_bf16;                           \
  inline const Table& prefix() {                                                                                       \
    static const Table* const tables[] = {&prefix##_generic, &prefix##_avx2, &prefix##_avx512, &prefix##_avx512_bf16}; \
    return *tables[active_isa()];                                                                                      \
  }                                                                                                                    \
  static_assert(true, "")
#else
#define PYPRUNE_CPU_KERNELS(Table, prefix)                  \
  extern const Table prefix##_generic;                      \
  inline const Table& prefix() { return prefix##_generic; } \
  static_assert(true, "")
#endif

// Raises RuntimeError for a CUDA error code.
inline void check(int code, const char* function) {
  if (code != 0)
    throw std::runtime_error(std::string(function) + ": CUDA error " + std::to_string(code) + ", " +
                             error_string(code));
}

}  // namespace pyprune
