// For the CPU kernels: 16-bit element types, and the macros that make one table of kernels per instruction set.
//
// The build compiles each *_cpu.cpp once per instruction set, with PYPRUNE_ISA naming the table it defines
// (bindings.h picks one at run time). Everything here has internal linkage: an inline function shared between those
// builds could otherwise be resolved to an instruction set that the machine lacks. Include C headers only, and use no
// function templates of the standard library, for the same reason.
#pragma once

#include <stdint.h>
#include <string.h>

#include "dtype.h"

namespace pyprune {
namespace {

// Stored as integers, converted with integer arithmetic: gcc vectorises the loops below at every instruction set, which
// it does not for _Float16 or structs. Signed, because AVX2 compares only signed integers.
enum class bfloat16 : uint16_t {};
enum class float16 : uint16_t {};

inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr int32_t kMagnitude = 0x7fffffff;  // all bits but the sign
constexpr int32_t kInfinity = 0x7f800000;   // anything above is NaN

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) { return float_of(static_cast<int32_t>(value) << 16); }

// The half's exponent and fraction, read as an fp32, are 2^112 too small; infinity and NaN need the full exponent.
inline float to_float(float16 value) {
  const int32_t half = static_cast<int32_t>(value);
  const int32_t magnitude = (half & 0x7fff) << 13;
  const int32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  const int32_t bits = magnitude >= 0x0f800000 ? magnitude | kInfinity : scaled;
  return float_of(bits | (half & 0x8000) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
template <typename T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bfloat16 from_float<bfloat16>(float value) {
  const int32_t bits = bits_of(value);
  const int32_t magnitude = bits & kMagnitude;
  const int32_t rounded = (magnitude + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const int32_t result = magnitude > kInfinity ? 0x7fc0 : rounded;
  return static_cast<bfloat16>(result | (bits >> 16 & 0x8000));
}

template <>
inline float16 from_float<float16>(float value) {
  const int32_t magnitude = bits_of(value) & kMagnitude;
  const int32_t normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The last place of 0.5 in fp32 is the last place of a subnormal half, so this addition rounds to it.
  const int32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const int32_t finite = magnitude < bits_of(0x1p-14f) ? subnormal : normal;
  const int32_t overflow = magnitude > kInfinity ? 0x7e00 : 0x7c00;
  const int32_t result = magnitude >= bits_of(65520.0f) ? overflow : finite;
  return static_cast<float16>(result | (bits_of(value) >> 16 & 0x8000));
}

}  // namespace
}  // namespace pyprune

// Picks the instantiation of a kernel by dtype code.
#define PYPRUNE_BY_DTYPE(kernel)                             \
  [](DType dtype, auto... arguments) {                       \
    switch (dtype) {                                         \
      case kFloat32: return kernel<float>(arguments...);     \
      case kBFloat16: return kernel<bfloat16>(arguments...); \
      case kFloat16: return kernel<float16>(arguments...);   \
    }                                                        \
  }

// PYPRUNE_JOIN(name_, PYPRUNE_ISA) is the name of the table that this compilation defines.
#define PYPRUNE_JOIN_(a, b) a##b
#define PYPRUNE_JOIN(a, b) PYPRUNE_JOIN_(a, b)
