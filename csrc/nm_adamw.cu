// The optimiser step on masked weights, and the masked weight. The contract is in nm_adamw.h.
//
// One thread takes one byte of the mask, eight columns, in 16-byte accesses where rows begin on such a boundary. Both
// kernels are bound by memory, every element is read and written once: nm_adamw moves 28.1 bytes an fp32 weight, 22.1 a
// bf16 one, masked_weight 4.1 bytes from bf16 to bf16. Neither uses shared memory or waits for other threads.
#include "device.cuh"
#include "nm_adamw.h"

namespace pyprune {
namespace {

using device::ceil_divide;
using device::from_float;
using device::to_float;

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a thread

__device__ __forceinline__ uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <typename To, typename From>
__device__ __forceinline__ To reinterpret(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  union {
    From from;
    To to;
  } bits;
  bits.from = value;
  return bits.to;
}

template <typename T>
__device__ __forceinline__ T rounded(float value, uint32_t noise) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    const uint32_t bits = reinterpret<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return __float2bfloat16(value);
    const uint32_t finite = (magnitude + (noise >> 16)) & 0xffff0000u;
    return __float2bfloat16(reinterpret<float>(finite | (bits & 0x80000000u)));  // exact
  }
}

// Eight elements, of which `valid` exist; the others are read as zero and not written.
template <typename T>
__device__ __forceinline__ void load(T (&out)[kColumns], const T* source, int valid, bool aligned) {
  if (aligned) {
    constexpr int kPieces = kColumns * sizeof(T) / 16;
    union {
      uint4 pieces[kPieces];
      T elements[kColumns];
    };
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = reinterpret_cast<const uint4*>(source)[i];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i] = elements[i];
  } else {
    for (int i = 0; i < kColumns; ++i) out[i] = i < valid ? source[i] : from_float<T>(0.0f);
  }
}

template <typename T>
__device__ __forceinline__ void store(T* target, const T (&values)[kColumns], int valid, bool aligned) {
  if (aligned) {
    constexpr int kPieces = kColumns * sizeof(T) / 16;
    union {
      uint4 pieces[kPieces];
      T elements[kColumns];
    };
#pragma unroll
    for (int i = 0; i < kColumns; ++i) elements[i] = values[i];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) reinterpret_cast<uint4*>(target)[i] = pieces[i];
  } else {
    for (int i = 0; i < kColumns; ++i) {
      if (i < valid) target[i] = values[i];
    }
  }
}

// The thread's eight columns: where they start, how many exist, and the index of their byte of the mask.
struct Place {
  int64_t start, byte;
  int valid;
};

__device__ __forceinline__ Place place(int64_t columns) {
  const int64_t row_bytes = ceil_divide(columns, kColumns);
  const int64_t byte = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = byte / row_bytes, column = byte % row_bytes * kColumns;
  const int64_t left = columns - column;
  return {row * columns + column, byte, left < kColumns ? static_cast<int>(left) : kColumns};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    nm_adamw_kernel(int64_t bytes, int64_t columns, AdamW o, T* param, const T* grad, float* exp_avg, float* exp_avg_sq,
                    const uint8_t* mask, bool aligned) {
  const Place p = place(columns);
  if (p.byte >= bytes) return;
  T w[kColumns], g[kColumns];
  float m[kColumns], v[kColumns];
  load(w, param + p.start, p.valid, aligned);
  load(g, grad + p.start, p.valid, aligned);
  load(m, exp_avg + p.start, p.valid, aligned);
  load(v, exp_avg_sq + p.start, p.valid, aligned);
  const unsigned kept = mask ? mask[p.byte] : 0xffu;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const float weight = to_float(w[i]);
    const float gradient = to_float(g[i]);
    m[i] = o.beta1 * m[i] + o.new1 * gradient;
    const float u = m[i] + ((kept >> i) & 1 ? 0.0f : o.masked_decay * weight);
    const float s = mask ? u : gradient;
    v[i] = o.beta2 * v[i] + o.new2 * s * s;
    const float next = o.keep * weight - o.rate * u / (sqrtf(v[i] * o.correction) + o.eps);
    w[i] = rounded<T>(next, hash32(o.seed + static_cast<uint32_t>(p.start + i)));
  }
  store(param + p.start, w, p.valid, aligned);
  store(exp_avg + p.start, m, p.valid, aligned);
  store(exp_avg_sq + p.start, v, p.valid, aligned);
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) masked_weight_kernel(int64_t bytes, int64_t columns, const In* weight,
                                                                 const uint8_t* mask, Out* out, bool aligned) {
  const Place p = place(columns);
  if (p.byte >= bytes) return;
  In w[kColumns];
  Out masked[kColumns];
  load(w, weight + p.start, p.valid, aligned);
  const unsigned kept = mask[p.byte];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) masked[i] = from_float<Out>((kept >> i) & 1 ? to_float(w[i]) : 0.0f);
  store(out + p.start, masked, p.valid, aligned);
}

template <typename... Pointers>
bool all_aligned(int64_t columns, Pointers... pointers) {
  return columns % kColumns == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <typename T>
cudaError_t step(int64_t rows, int64_t columns, const AdamW& options, void* param, const void* grad, float* exp_avg,
                 float* exp_avg_sq, const uint8_t* mask, cudaStream_t stream) {
  const int64_t bytes = rows * ceil_divide(columns, kColumns);
  return launch(nm_adamw_kernel<T>, dim3(device::blocks(ceil_divide(bytes, kThreads))), kThreads, 0, stream, bytes,
                columns, options, static_cast<T*>(param), static_cast<const T*>(grad), exp_avg, exp_avg_sq, mask,
                all_aligned(columns, param, grad, exp_avg, exp_avg_sq));
}

template <typename In, typename Out>
cudaError_t apply(int64_t rows, int64_t columns, const void* weight, const uint8_t* mask, void* out,
                  cudaStream_t stream) {
  const int64_t bytes = rows * ceil_divide(columns, kColumns);
  return launch(masked_weight_kernel<In, Out>, dim3(device::blocks(ceil_divide(bytes, kThreads))), kThreads, 0, stream,
                bytes, columns, static_cast<const In*>(weight), mask, static_cast<Out*>(out),
                all_aligned(columns, weight, out));
}

}  // namespace

int nm_adamw(int dtype, int64_t rows, int64_t columns, const AdamW& options, void* param, const void* grad,
             float* exp_avg, float* exp_avg_sq, const uint8_t* mask, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (dtype) {
    case kFloat32: return step<float>(rows, columns, options, param, grad, exp_avg, exp_avg_sq, mask, stream);
    case kBFloat16: return step<__nv_bfloat16>(rows, columns, options, param, grad, exp_avg, exp_avg_sq, mask, stream);
    default: return cudaErrorInvalidValue;
  }
}

int masked_weight(int dtype, int out_dtype, int64_t rows, int64_t columns, const void* weight, const uint8_t* mask,
                  void* out, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (dtype == kFloat32 && out_dtype == kFloat32) return apply<float, float>(rows, columns, weight, mask, out, stream);
  if (dtype == kFloat32 && out_dtype == kBFloat16) {
    return apply<float, __nv_bfloat16>(rows, columns, weight, mask, out, stream);
  }
  if (dtype == kFloat32 && out_dtype == kFloat16) {
    return apply<float, __half>(rows, columns, weight, mask, out, stream);
  }
  if (dtype == kBFloat16 && out_dtype == kBFloat16) {
    return apply<__nv_bfloat16, __nv_bfloat16>(rows, columns, weight, mask, out, stream);
  }
  if (dtype == kFloat16 && out_dtype == kFloat16) {
    return apply<__half, __half>(rows, columns, weight, mask, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyprune
