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

}  // namespace

extern "C" {

// in [64, 16] bytes, bytes [64] -> out [64, 16], each half in reverse order.
const char* run_copy(const void* in, const int* bytes, void* out) {
  return run([&] {
    return launch(copy, dim3(1), 32, 64 * sizeof(uint4), nullptr, static_cast<const uint4*>(in), bytes,
                  static_cast<uint4*>(out));
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

}  // extern "C"
