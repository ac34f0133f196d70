// What every contract in csrc/ shares with Python: the codes of the element types.
#pragma once

namespace pyprune {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The text of a CUDA error code.
const char* error_string(int code);

}  // namespace pyprune
