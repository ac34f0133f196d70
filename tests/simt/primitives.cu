// One kernel per primitive of csrc/ptx.cuh, one warp each, for the emulator (test_primitives.py) and, compiled by nvcc,
// for a device (tests/gpu/test_device_primitives.py): both take the same inputs and must give the same outputs.
#include "ptx.cuh"
#include "run.h"

using namespace pyprune;

namespace {

// shared[lane] = the first bytes[lane] bytes of in[lane], then zeros; both committed groups are read after their wait.
__global__ void copy(const uint4* in, const int* bytes, uint4* out) {
  PYPRUNE_SHARED_MEMORY(shared);
  uint4* first = reinterpret_cast<uint4*>(shared);
  uint4* second = first + 32;
  const int lane = threadIdx.x;
  ptx::cp_async_16(first + lane, in + lane, bytes[lane]);
  ptx::cp_async_commit();
  ptx::cp_async_16(second + lane, in + 32 + lane, bytes[32 + lane]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  out[lane] = first[31 - lane];
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[32 + lane] = second[31 - lane];
}

// The same of 8 bytes each, one group.
__global__ void copy_8(const uint2* in, const int* bytes, uint2* out) {
  PYPRUNE_SHARED_MEMORY(shared);
  uint2* tile = reinterpret_cast<uint2*>(shared);
  const int lane = threadIdx.x;
  ptx::cp_async_8(tile + lane, in + lane, bytes[lane]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[lane] = tile[31 - lane];
}

template <bool kTransposed>
__global__ void load_matrices(const uint4* rows, uint32_t* out) {
  PYPRUNE_SHARED_MEMORY(shared);
  uint4* tile = reinterpret_cast<uint4*>(shared);
  const int lane = threadIdx.x;
  tile[lane] = rows[lane];
  __syncthreads();
  uint32_t fragment[4];
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_trans(fragment, tile + lane);
  } else {
    ptx::ldmatrix_x4(fragment, tile + lane);
  }
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = fragment[i];
}

template <typename T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = threadIdx.x;
  uint32_t left[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[lane * 4 + i];
    sum[i] = c[lane * 4 + i];
  }
  ptx::mma_m16n8k16<T>(sum, left, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

template <typename T, int kSelector>
__global__ void multiply_sparse(const uint32_t* a, const uint32_t* b, const uint32_t* metadata, const float* c,
                                float* d) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[lane * 4 + i];
    right[i] = b[lane * 4 + i];
    sum[i] = c[lane * 4 + i];
  }
  ptx::mma_sp_m16n8k32<T, kSelector>(sum, left, right, metadata[lane]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

// out[lane] = bytes of b:a, b:a shifted right by `selector` bits, ones of a, a of two lanes below.
__global__ void bits(const uint32_t* a, const uint32_t* b, const uint32_t* selector, uint32_t* out) {
  const int lane = threadIdx.x;
  out[lane * 4] = ptx::prmt(a[lane], b[lane], selector[lane]);
  out[lane * 4 + 1] = __funnelshift_r(a[lane], b[lane], selector[lane]);
  out[lane * 4 + 2] = __popc(a[lane]);
  out[lane * 4 + 3] = __shfl_up_sync(0xffffffffu, a[lane], 2);
}

__global__ void atomics(const unsigned long long* in, unsigned long long* out) {
  atomicAdd(out, in[threadIdx.x]);
  atomicMin(out + 1, in[threadIdx.x]);
}

}  // namespace

extern "C" {

// in [64, 16] bytes, bytes [64] -> out [64, 16], each half in reverse order.
const char* run_copy(const void* in, const int* bytes, void* out) {
  return run([&] {
    return launch(copy, dim3(1), 32, 64 * sizeof(uint4), nullptr, static_cast<const uint4*>(in), bytes,
                  static_cast<uint4*>(out));
  });
}

// in [32, 8] bytes, bytes [32] -> out [32, 8] in reverse order.
const char* run_copy_8(const void* in, const int* bytes, void* out) {
  return run([&] {
    return launch(copy_8, dim3(1), 32, 32 * sizeof(uint2), nullptr, static_cast<const uint2*>(in), bytes,
                  static_cast<uint2*>(out));
  });
}

// rows [4, 8, 8] of 16 bits -> out [32 lanes, 4] pairs.
const char* run_ldmatrix(const void* rows, uint32_t* out, bool transposed) {
  return run([&] {
    return launch(transposed ? load_matrices<true> : load_matrices<false>, dim3(1), 32, 32 * sizeof(uint4), nullptr,
                  static_cast<const uint4*>(rows), out);
  });
}

// a [32 lanes, 4], b [32, 2] pairs of 16 bits, c [32, 4] -> d [32, 4].
const char* run_mma(const uint32_t* a, const uint32_t* b, const float* c, float* d, bool bfloat16) {
  return run([&] {
    return launch(bfloat16 ? multiply<__nv_bfloat16> : multiply<__half>, dim3(1), 32, 0, nullptr, a, b, c, d);
  });
}

// a, b [32 lanes, 4] pairs of 16 bits, metadata [32], c [32, 4] -> d [32, 4].
const char* run_mma_sp(const uint32_t* a, const uint32_t* b, const uint32_t* metadata, const float* c, float* d,
                       bool bfloat16, bool selector) {
  return run([&] {
    const auto kernel = bfloat16   ? selector ? multiply_sparse<__nv_bfloat16, 1> : multiply_sparse<__nv_bfloat16, 0>
                        : selector ? multiply_sparse<__half, 1>
                                   : multiply_sparse<__half, 0>;
    return launch(kernel, dim3(1), 32, 0, nullptr, a, b, metadata, c, d);
  });
}

// a, b, selector [32] -> out [32, 4].
const char* run_bits(const uint32_t* a, const uint32_t* b, const uint32_t* selector, uint32_t* out) {
  return run([&] { return launch(bits, dim3(1), 32, 0, nullptr, a, b, selector, out); });
}

// in [32] -> out [2]: its sum and the least added to what stands there.
const char* run_atomics(const void* in, void* out) {
  return run([&] {
    return launch(atomics, dim3(1), 32, 0, nullptr, static_cast<const unsigned long long*>(in),
                  static_cast<unsigned long long*>(out));
  });
}

}  // extern "C"
