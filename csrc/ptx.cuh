// The only inline PTX of the project: asynchronous copies, fragment loads, the 16-bit tensor-core product, and the
// order of two kernels. Every primitive has a twin that the SIMT emulator of the tests executes (PYPRUNE_SIMT).
// tests/simt holds the twins, and tests/gpu the device, to the same formulas of the PTX ISA.
//
// Fragment layouts (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"), with group = lane / 4 and
// pair = 2 * (lane % 4):
//   A 16x16   a[0] = A[group][pair, pair + 1]   a[1]: row + 8   a[2]: column + 8   a[3]: row + 8 and column + 8
//   B 16x8    b[0] = B[pair, pair + 1][group]   b[1]: row + 8
//   D 16x8    d[0], d[1] = D[group][pair, pair + 1]   d[2], d[3]: row + 8
// mma.sp.m16n8k32 ("... for sparse mma.m16n8k32"): A holds 16x16 of 16x32, two of every four columns, laid out as
// above;
//   B 32x8    b[i] = B[pair + 8 i, + 1][group]
//   metadata  the place of each kept element in its four columns, 2 bits, so 16 bits for 16 columns of a row. Lane
//             4 r + 2 s + h holds those of row r (low half) and row r + 8 (high half), columns 16 h .. + 16, where s is
//             the selector: the other lanes' words are not read, so that one word a lane serves two products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "launch.h"

#ifndef PYPRUNE_SIMT
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pyprune::ptx {

#ifndef PYPRUNE_SIMT

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes from global to shared memory, past L1; both addresses are 16-byte aligned.
// Only the first `bytes` are read, the rest of the destination is zeroed.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// The same for 8 bytes, 8-byte aligned, through L1.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Closes the calling thread's current group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the N youngest groups of the calling thread are in flight.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Between two kernels of a stream (launch_early): from when on the blocks of the next one may take their places, and,
// in it, the wait until all of the kernel before it is done and seen. Before sm_90 kernels follow one another anyway.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Loads four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned).
// out[m] = elements [lane / 4][2 * (lane % 4), + 1] of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: out[m] = elements [2 * (lane % 4), + 1][lane / 4] of matrix m.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// Of the eight bytes of high:low, those that the four lowest digits of `selector` name, 0 to 7 each. Unlike
// __byte_perm, which first clears the digits' fourth bits, one instruction.
__device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

// d += A B for one 16x8 tile over k = 16, fp32 accumulation. T is __nv_bfloat16 or __half.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "mma_m16n8k16 takes __half or __nv_bfloat16");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Ascending places may be promised, and should be, from CUDA 12.5 on.
#if CUDART_VERSION >= 12050
#define PYPRUNE_MMA_SP "mma.sp::ordered_metadata"
#else
#define PYPRUNE_MMA_SP "mma.sp"
#endif

// d += A B for one 16x8 tile over k = 32, A with two of every four columns kept, fp32 accumulation.
// The two places of every four columns are ascending ("ordered"); anything else is undefined.
template <typename T, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                uint32_t metadata) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(PYPRUNE_MMA_SP
                 ".sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                   "r"(metadata), "n"(kSelector));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "mma_sp_m16n8k32 takes __half or __nv_bfloat16");
    asm volatile(PYPRUNE_MMA_SP
                 ".sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                   "r"(metadata), "n"(kSelector));
  }
}

#else  // The emulated twins. `line` is the caller's, for messages and for fault injection.

inline void cp_async_16(void* shared, const void* global, int bytes, int line = __builtin_LINE()) {
  simt::async_copy(shared, global, 16, bytes, line);
}

inline void cp_async_8(void* shared, const void* global, int bytes, int line = __builtin_LINE()) {
  simt::async_copy(shared, global, 8, bytes, line);
}

inline void cp_async_commit() { simt::async_commit(); }

template <int N>
void cp_async_wait(int line = __builtin_LINE()) {
  simt::async_wait(N, line);
}

inline void let_next_kernel_start() {}  // Kernels follow one another.
inline void wait_for_previous_kernel() {}

inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector, int line = __builtin_LINE()) {
  return simt::permute_bytes(low, high, selector, line);
}

struct MatrixLoad {
  const uint16_t* row;
  uint32_t out[4];
};

// The last lane to arrive loads for all, as the instruction does.
inline void load_matrices(MatrixLoad (&lanes)[32], bool transposed) {
  for (int l = 0; l < 32; ++l) {
    const int group = l / 4, pair = l % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const auto element = [&](int row, int column) -> uint32_t { return lanes[m * 8 + row].row[column]; };
      lanes[l].out[m] = transposed ? element(pair, group) | element(pair + 1, group) << 16
                                   : element(group, pair) | element(group, pair + 1) << 16;
    }
  }
}

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  simt::require_aligned(row, 16, "ldmatrix", line);
  const MatrixLoad mine = simt::exchange(simt::kFullMask, MatrixLoad{static_cast<const uint16_t*>(row), {}}, "ldmatrix",
                                         line, [](MatrixLoad(&lanes)[32]) { load_matrices(lanes, false); });
  std::memcpy(out, mine.out, sizeof out);
}

inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  simt::require_aligned(row, 16, "ldmatrix", line);
  const MatrixLoad mine = simt::exchange(simt::kFullMask, MatrixLoad{static_cast<const uint16_t*>(row), {}}, "ldmatrix",
                                         line, [](MatrixLoad(&lanes)[32]) { load_matrices(lanes, true); });
  std::memcpy(out, mine.out, sizeof out);
}

struct MmaLane {
  float d[4];
  uint32_t a[4], b[2];
};

template <typename T>
float fragment_element(uint32_t word, int parity) {
  return simt::to_float(T{static_cast<uint16_t>(word >> 16 * parity)});
}

template <typename T>
void multiply_fragments(MmaLane (&lanes)[32]) {
  constexpr auto element = fragment_element<T>;
  float left[16][16], right[16][8];
  for (int l = 0; l < 32; ++l) {
    const int group = l / 4, pair = l % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) left[group + i % 2 * 8][pair + e + i / 2 * 8] = element(lanes[l].a[i], e);
      for (int i = 0; i < 2; ++i) right[pair + e + i * 8][group] = element(lanes[l].b[i], e);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) lanes[l].d[i] += left[row][k] * right[k][column];
    }
  }
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  MmaLane mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  mine = simt::exchange(simt::kFullMask, mine, "mma", line, [](MmaLane(&lanes)[32]) { multiply_fragments<T>(lanes); });
  std::memcpy(d, mine.d, sizeof d);
}

struct SparseMmaLane {
  float d[4];
  uint32_t a[4], b[4], metadata;
};

template <typename T>
void multiply_sparse_fragments(SparseMmaLane (&lanes)[32], int selector, int line) {
  constexpr auto element = fragment_element<T>;
  float left[16][32] = {}, right[32][8];
  for (int l = 0; l < 32; ++l) {
    const int group = l / 4, pair = l % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) {
        const int row = group + i % 2 * 8, four = pair / 2 + i / 2 * 4;  // Four columns, of which two are kept.
        const uint32_t word = lanes[group * 4 + selector * 2 + four / 4].metadata;
        const uint32_t places = word >> (i % 2 * 16 + four % 4 * 4) & 15;
        if ((places & 3) >= places >> 2) simt::fail("mma.sp: the places in the metadata do not ascend", line);
        left[row][four * 4 + (e == 0 ? places & 3 : places >> 2)] = element(lanes[l].a[i], e);
      }
      for (int i = 0; i < 4; ++i) right[pair + e + i * 8][group] = element(lanes[l].b[i], e);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k) lanes[l].d[i] += left[row][k] * right[k][column];
    }
  }
}

template <typename T, int kSelector>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                     int line = __builtin_LINE()) {
  SparseMmaLane mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata};
  mine = simt::exchange(simt::kFullMask, mine, "mma.sp", line,
                        [line](SparseMmaLane(&lanes)[32]) { multiply_sparse_fragments<T>(lanes, kSelector, line); });
  std::memcpy(d, mine.d, sizeof d);
}

#endif

}  // namespace pyprune::ptx
