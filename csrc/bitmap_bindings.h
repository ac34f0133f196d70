// The `bitmap` family in Python; bitmap_cpu.h and bitmap.h are the contracts.
#pragma once

#include "bindings.h"
#include "bitmap.h"
#include "bitmap_cpu.h"

namespace pyprune {

#ifdef PYPRUNE_WITH_CPU
PYPRUNE_CPU_KERNELS(BitmapCpuKernels, bitmap_cpu);

inline void bind_bitmap_cpu(py::module_& m) {
  m.def(
      "bitmap_scan",
      [](int dtype, int64_t rows, int64_t columns, Address weight, Address bitmap, Address offsets, int threads) {
        bitmap_cpu().scan(DType(dtype), rows, columns, pointer(weight), pointer<uint8_t>(bitmap),
                          pointer<int64_t>(offsets), threads);
      },
      ReleaseGil());
  m.def(
      "bitmap_pack",
      [](int dtype, int64_t rows, int64_t columns, Address weight, Address bitmap, Address offsets, Address values,
         int threads) {
        bitmap_cpu().pack(DType(dtype), rows, columns, pointer(weight), pointer<uint8_t>(bitmap),
                          pointer<int64_t>(offsets), pointer(values), threads);
      },
      ReleaseGil());
  m.def("bitmap_misplaced", [](int64_t tiles, int64_t values_size, Address offsets) {
    return bitmap_cpu().misplaced(tiles, values_size, pointer<int64_t>(offsets));
  });
  m.def(
      "bitmap_unpack",
      [](int dtype, int64_t first_tile_row, int64_t rows, int64_t columns, Address values, Address bitmap,
         Address offsets, int64_t values_size, Address weight, int threads) {
        bitmap_cpu().unpack(DType(dtype), first_tile_row, rows, columns, pointer(values), pointer<uint8_t>(bitmap),
                            pointer<int64_t>(offsets), values_size, pointer(weight), threads);
      },
      ReleaseGil());
}

#endif  // PYPRUNE_WITH_CPU
#ifdef PYPRUNE_WITH_CUDA

inline void bind_bitmap_cuda(py::module_& m) {
  m.def("bitmap_scan",
        [](int64_t rows, int64_t columns, int dtype, Address weight, Address bitmap, Address offsets, Address stream) {
          check(bitmap_scan(rows, columns, dtype, pointer(weight), pointer<uint8_t>(bitmap), pointer<int64_t>(offsets),
                            pointer(stream)),
                "bitmap_scan");
        });
  m.def("bitmap_pack", [](int64_t rows, int64_t columns, int dtype, Address weight, Address bitmap, Address offsets,
                          Address values, Address stream) {
    check(bitmap_pack(rows, columns, dtype, pointer(weight), pointer<uint8_t>(bitmap), pointer<int64_t>(offsets),
                      pointer(values), pointer(stream)),
          "bitmap_pack");
  });
  m.def("bitmap_unpack", [](int64_t rows, int64_t columns, int dtype, Address values, int64_t values_size,
                            Address bitmap, Address offsets, Address weight, Address stream) {
    check(bitmap_unpack(rows, columns, dtype, pointer(values), values_size, pointer<uint8_t>(bitmap),
                        pointer<int64_t>(offsets), pointer(weight), pointer(stream)),
          "bitmap_unpack");
  });
}

#endif  // PYPRUNE_WITH_CUDA

}  // namespace pyprune
