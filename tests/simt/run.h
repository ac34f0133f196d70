// Runs a launch of a test kernel to its end; the error's text, or null. For the emulator and for a device.
#pragma once

#include <exception>

#include "launch.h"

template <typename Launch>
const char* run(Launch launch) {
#ifdef PYPRUNE_SIMT
  static char message[512];
  try {
    const cudaError_t error = launch();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
#else
  cudaError_t error = launch();
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}
