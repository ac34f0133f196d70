// Error codes in words.
#include "dtype.h"
#include "launch.h"

namespace pyprune {

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace pyprune
