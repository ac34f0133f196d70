// The only kernel launch of the project and the only way to shared memory. Under PYPRUNE_SIMT the same kernels run on
// the CPU, one fiber per CUDA thread (tests/simt/simt.h).
#pragma once

#include <cstddef>

#ifdef PYPRUNE_SIMT
#include "simt.h"
// Declares `name`, the block's dynamic shared memory: the only kind in use, so that the emulator can guard all of it.
#define PYPRUNE_SHARED_MEMORY(name) unsigned char* const name = simt::shared_memory()
#else
#include <cuda_runtime.h>
#define PYPRUNE_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace pyprune {

#ifndef PYPRUNE_SIMT
template <typename... Parameters, typename... Arguments>
cudaError_t launch_configured(cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Arguments... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (config.dynamicSmemBytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.dynamicSmemBytes));
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

inline cudaLaunchConfig_t configured(dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return config;
}
#endif

// Runs `kernel` on one-dimensional blocks of `threads` with `shared_bytes` of dynamic shared memory.
// An empty grid has nothing to do and succeeds.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef PYPRUNE_SIMT
  static_cast<void>(stream);
  return simt::launch(grid, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  cudaLaunchConfig_t config = configured(grid, threads, shared_bytes, stream);
  return launch_configured(config, kernel, arguments...);
#endif
}

// The same for a kernel that calls ptx::wait_for_previous_kernel before it reads what the kernel before it on the
// stream has written: where both were compiled for sm_90 or later, its blocks are in place by then.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes,
                         cudaStream_t stream, Arguments... arguments) {
#ifdef PYPRUNE_SIMT
  return launch(kernel, grid, threads, shared_bytes, stream, arguments...);
#else
  cudaFuncAttributes code{};  // Compiled for an earlier device it does not wait.
  const cudaError_t error = cudaFuncGetAttributes(&code, kernel);
  if (error != cudaSuccess) return error;
  if (code.ptxVersion < 90) return launch(kernel, grid, threads, shared_bytes, stream, arguments...);
  cudaLaunchConfig_t config = configured(grid, threads, shared_bytes, stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = 1;
  return launch_configured(config, kernel, arguments...);
#endif
}

}  // namespace pyprune
