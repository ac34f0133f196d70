// Small kernels, right and wrong, for what the emulator must accept and report (test_emulator.py).
#include "ptx.cuh"
#include "run.h"

using namespace pyprune;

namespace {

constexpr int kThreads = 128;

// out[i] = in[127 - i] by way of shared memory, which needs the barrier between warps.
__global__ void reverse(const int* in, int* out) {
  PYPRUNE_SHARED_MEMORY(shared);
  int* values = reinterpret_cast<int*>(shared);
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();  // barrier of reverse
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// The same through cp.async, which needs the wait as well.
__global__ void reverse_async(const uint4* in, uint4* out) {
  PYPRUNE_SHARED_MEMORY(shared);
  uint4* values = reinterpret_cast<uint4*>(shared);
  ptx::cp_async_16(values + threadIdx.x, in + threadIdx.x, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();  // wait of reverse_async
  __syncthreads();          // the barrier after it
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// out[i] = in[i] for the whole grid: too large a count reads and writes past the end.
__global__ void copy(const int* in, int* out, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = in[i];
}

// out[i] = shared[i + offset] of kThreads ints.
__global__ void read_shared(int* out, int offset) {
  PYPRUNE_SHARED_MEMORY(shared);
  int* values = reinterpret_cast<int*>(shared);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[static_cast<int>(threadIdx.x) + offset];
}

// Each call keeps a kilobyte on the stack.
__attribute__((noinline)) int descend(int depth) {
  volatile int frame[256];
  frame[0] = depth;
  return depth == 0 ? 0 : descend(depth - 1) + frame[0] - depth + 1;
}

// out[i] = depth, by so many calls inside each other.
__global__ void use_stack(int* out, int depth) { out[threadIdx.x] = descend(depth); }

__global__ void divergent_barriers() {
  if (threadIdx.x < 64) {
    __syncthreads();  // first of divergent_barriers
  } else {
    __syncthreads();  // second of divergent_barriers
  }
}

__global__ void divergent_lanes(int* out) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 2 == 0) {
    value = __shfl_xor_sync(0xffffffffu, value, 2);
  } else {
    value = __shfl_xor_sync(0xffffffffu, value, 4);  // odd lanes of divergent_lanes
  }
  out[threadIdx.x] = value;
}

__global__ void missing_lane(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffffffu, true));  // ballot of missing_lane
}

__global__ void misaligned_copy(const unsigned char* in) {
  PYPRUNE_SHARED_MEMORY(shared);
  ptx::cp_async_16(shared, in + 4, 16);
}

// Half-warps meet on their own masks: out = ballot of odd lanes, then the neighbour's index.
__global__ void half_warps(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const unsigned odd = __ballot_sync(mask, lane % 2 == 1);
  out[threadIdx.x] = odd;
  out[kThreads + threadIdx.x] = __shfl_sync(mask, lane, lane / 16 * 16 + (lane + 1) % 16);
}

}  // namespace

extern "C" {

const char* run_reverse(const int* in, int* out) {
  return run([&] { return launch(reverse, dim3(1), kThreads, kThreads * sizeof(int), nullptr, in, out); });
}
const char* run_reverse_async(const void* in, void* out) {
  return run([&] {
    return launch(reverse_async, dim3(1), kThreads, kThreads * sizeof(uint4), nullptr, static_cast<const uint4*>(in),
                  static_cast<uint4*>(out));
  });
}
const char* run_grid_copy(const int* in, int* out, int count) {
  return run([&] { return launch(copy, dim3(count / kThreads + 1), kThreads, 0, nullptr, in, out, count); });
}
const char* run_read_shared(int* out, int offset) {
  return run([&] { return launch(read_shared, dim3(1), kThreads, kThreads * sizeof(int), nullptr, out, offset); });
}
const char* run_use_stack(int* out, int depth) {
  return run([&] { return launch(use_stack, dim3(1), kThreads, 0, nullptr, out, depth); });
}
const char* run_divergent_barriers() {
  return run([&] { return launch(divergent_barriers, dim3(1), kThreads, 0, nullptr); });
}
const char* run_divergent_lanes(int* out) {
  return run([&] { return launch(divergent_lanes, dim3(1), kThreads, 0, nullptr, out); });
}
const char* run_missing_lane(int* out) {
  return run([&] { return launch(missing_lane, dim3(1), kThreads, 0, nullptr, out); });
}
const char* run_misaligned_copy(const unsigned char* in) {
  return run([&] { return launch(misaligned_copy, dim3(1), 32, 64, nullptr, in); });
}
const char* run_half_warps(unsigned* out) {
  return run([&] { return launch(half_warps, dim3(1), kThreads, 0, nullptr, out); });
}

}  // extern "C"
