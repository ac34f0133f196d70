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
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

}  // namespace pyprune
