// N:M masks, packing and unpacking. The contract is in nm.h.
//
// All of it is bound by memory. Each job has two kernels: one for the patterns that matter (2:4 to pack; groups of 4 or
// 8 to prune), a thread to every eight columns, in 16-byte accesses, so a mask or metadata byte a thread and no
// division; and one for any pattern, size and alignment, a block to every row. None uses shared memory or a barrier.
// Figures for bf16; floors of 4096 x 11008 at H100's 3.35 TB/s; instructions of a lane in sm_90a's machine code, "of"
// what an SM can issue in the time in which it moves that weight. Registers: docs/kernels.md.
//
//   kernel          bytes per weight        floor   instructions per weight, of
//   prune           2 + 1/8, 1/8 previous   30 us   17: six comparisons, sixteen additions for four weights     19
//   compress_24     2 + 1 + 1/8             42 us   13                                                          27
//   decompress_24   1 + 1/8 + 2             42 us    6                                                          27
#include <initializer_list>

#include "device.cuh"
#include "nm.h"

namespace pyprune {
namespace {

using namespace device;

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;
constexpr int kColumns = 8;  // of a thread

using Count = unsigned long long;  // What atomics take; the contract's int64.

// The first thread of this launch in a flat numbering, and how many there are.
__device__ __forceinline__ int64_t first_thread() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t all_threads() { return int64_t{gridDim.x} * kThreads; }

// ---------------------------------------------------------------------------------------------------------------------
// The mask

struct Prune {
  int64_t columns;
  int n, m;
  const uint8_t* previous;  // or null
  uint8_t* bits;
  Count *flips, *first;
};

// The n largest of each kM scores as bits. Score i beats a later j unless j is larger: ties keep the lower index.
template <int kM>
__device__ __forceinline__ unsigned keep_largest(const float (&scores)[kColumns], int n) {
  unsigned bits = 0;
#pragma unroll
  for (int group = 0; group < kColumns; group += kM) {
    int beaten_by[kM] = {};
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = i + 1; j < kM; ++j) {
        const int wins = scores[group + i] >= scores[group + j];
        beaten_by[j] += wins;
        beaten_by[i] += 1 - wins;
      }
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) bits |= unsigned{beaten_by[i] < n} << (group + i);
  }
  return bits;
}

// Groups of kM = 4 or 8, `columns` a multiple of eight: the bytes of all rows stand in one line, `count` of them.
template <typename T, int kM>
__global__ void __launch_bounds__(kThreads) prune(const T* scores, int64_t count, Prune p) {
  Count flips = 0;
  for (int64_t byte = first_thread(); byte < count; byte += all_threads()) {
    union {
      uint4 words[sizeof(T) * kColumns / 16];
      T elements[kColumns];
    };
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) * kColumns / 16); ++i) {
      words[i] = __ldg(reinterpret_cast<const uint4*>(scores + byte * kColumns) + i);
    }
    float values[kColumns];
    int nan = kColumns;  // The first NaN.
#pragma unroll
    for (int i = kColumns - 1; i >= 0; --i) {
      values[i] = to_float(elements[i]);
      if (values[i] != values[i]) nan = i;
    }
    if (nan < kColumns) atomicMin(p.first, static_cast<Count>(byte * (kColumns / kM) + nan / kM));
    const unsigned bits = keep_largest<kM>(values, p.n);
    p.bits[byte] = static_cast<uint8_t>(bits);
    if (p.previous != nullptr) flips += __popc(bits ^ p.previous[byte]);
  }
  flips = sum_warp(flips);
  if (threadIdx.x % 32 == 0 && flips != 0) atomicAdd(p.flips, flips);
}

// Any pattern: a block takes a row, a lane a column, whose score it compares with all of its group.
template <typename T>
__global__ void __launch_bounds__(kThreads) prune_any(const T* scores, Prune p) {
  const int lane = threadIdx.x % 32, columns = static_cast<int>(p.columns);
  const int64_t row = blockIdx.x, row_bytes = ceil_divide(columns, 8);
  Count flips = 0;
  for (int first = threadIdx.x - lane; first < columns; first += kThreads) {
    const int column = first + lane;
    bool keep = false;
    if (column < columns) {
      const int group = column / p.m, place = column % p.m;
      const T* others = scores + row * columns + int64_t{group} * p.m;
      const float mine = to_float(others[place]);
      int beaten_by = 0;
      for (int i = 0; i < p.m; ++i) {
        const float other = to_float(others[i]);
        beaten_by += other > mine || (other == mine && i < place);
      }
      keep = beaten_by < p.n;
      if (mine != mine) atomicMin(p.first, static_cast<Count>(row * (columns / p.m) + group));
    }
    const unsigned bits = __ballot_sync(kFullWarp, keep) >> lane & 0xff;  // Of eight columns, for every eighth lane.
    if (lane % 8 == 0 && column < columns) {
      const int64_t byte = row * row_bytes + column / 8;
      p.bits[byte] = static_cast<uint8_t>(bits);
      if (p.previous != nullptr) {
        const unsigned used = columns - column < 8 ? (1u << (columns - column)) - 1 : 0xff;
        flips += __popc((bits ^ p.previous[byte]) & used);
      }
    }
  }
  flips = sum_warp(flips);
  if (lane == 0 && flips != 0) atomicAdd(p.flips, flips);
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing

// The two places to keep of four columns, as the metadata has them (first | second << 2): of the nonzeros the first
// two, then zeros of lowest index.
constexpr unsigned places_of(unsigned nonzeros) {
  unsigned kept = 0, count = 0;
  for (const unsigned wanted : {nonzeros, ~nonzeros}) {
    for (unsigned i = 0; i < 4; ++i) {
      if ((wanted >> i & 1) == 0 || count == 2) continue;
      kept |= 1u << i;
      ++count;
    }
  }
  unsigned places = 0, shift = 0;
  for (unsigned i = 0; i < 4; ++i) {
    if ((kept >> i & 1) == 0) continue;
    places |= i << shift;
    shift += 2;
  }
  return places;
}

// The same for all sixteen sets of nonzeros, a digit each.
constexpr uint64_t all_places() {
  uint64_t table = 0;
  for (unsigned nonzeros = 0; nonzeros < 16; ++nonzeros) table |= uint64_t{places_of(nonzeros)} << 4 * nonzeros;
  return table;
}

constexpr uint64_t kPlaces = all_places();

// 2:4, `columns` a multiple of eight: eight weights in, four and a byte out, `count` times.
template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    compress_24(const Bits* weight, int64_t count, Bits* values, uint8_t* metadata, Count* first) {
  for (int64_t byte = first_thread(); byte < count; byte += all_threads()) {
    Piece<Bits, kColumns> in;
    Piece<Bits, kColumns / 2> out;
    in.load(weight + byte * kColumns);
    unsigned indices = 0;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const Bits* four = in.elements + group * 4;
      unsigned nonzeros = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) nonzeros |= unsigned{is_nonzero(four[i])} << i;
      if (__popc(nonzeros) > 2) atomicMin(first, static_cast<Count>(byte * 2 + group));
      const unsigned places = static_cast<unsigned>(kPlaces >> 4 * nonzeros) & 15;
      indices |= places << 4 * group;
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const unsigned place = places >> 2 * slot & 3;
        Bits value = 0;
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) value = place == i && (nonzeros >> i & 1) ? four[i] : value;  // -0 becomes +0.
        out.elements[group * 2 + slot] = value;
      }
    }
    out.store(values + byte * kColumns / 2);
    metadata[byte] = static_cast<uint8_t>(indices);
  }
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    decompress_24(const Bits* values, const uint8_t* metadata, int64_t count, Bits* weight) {
  for (int64_t byte = first_thread(); byte < count; byte += all_threads()) {
    Piece<Bits, kColumns / 2> in;
    Piece<Bits, kColumns> out;
    in.load(values + byte * kColumns / 2);
    const unsigned indices = metadata[byte];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const unsigned places = indices >> i / 4 * 4;
      const Bits first = (places & 3) == i % 4 ? in.elements[i / 4 * 2] : 0;
      out.elements[i] = (places >> 2 & 3) == i % 4 ? in.elements[i / 4 * 2 + 1] : first;
    }
    out.store(weight + byte * kColumns);
  }
}

// Bits of an index within a group of m: 2, 4 or 8.
__host__ __device__ inline int index_bits(int m) { return m <= 4 ? 2 : m <= 16 ? 4 : 8; }

struct Pattern {
  int columns, n, m;

  __host__ __device__ int kept() const { return columns / m * n; }
  __host__ __device__ int metadata_bytes() const {
    return static_cast<int>(ceil_divide(int64_t{kept()} * index_bits(m), 8));
  }
};

// The place in a group of the `slot`-th element to keep: nonzeros, and zeros of lowest index until there are n.
template <typename Bits>
__device__ __forceinline__ int place_of_slot(const Bits* group, const Pattern& p, int slot, int nonzeros) {
  int zeros_to_take = nonzeros < p.n ? p.n - nonzeros : 0;
  for (int i = 0; i < p.m; ++i) {
    const bool keep = is_nonzero(group[i]) || zeros_to_take-- > 0;
    if (keep && slot-- == 0) return i;
  }
  return 0;  // Not reached: there are n to keep.
}

// Any pattern: a block takes a row, a thread a byte of metadata with its one, two or four values.
template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    compress_any(const Bits* weight, Pattern p, Bits* values, uint8_t* metadata, Count* first) {
  const int bits = index_bits(p.m), kept = p.kept(), bytes = p.metadata_bytes();
  const int64_t row = blockIdx.x;
  for (int byte = threadIdx.x; byte < bytes; byte += kThreads) {
    unsigned indices = 0;
    for (int i = 0; i < 8 / bits; ++i) {
      const int at = byte * (8 / bits) + i;
      if (at >= kept) break;
      const int group = at / p.n, slot = at % p.n;
      const Bits* elements = weight + row * p.columns + int64_t{group} * p.m;
      int nonzeros = 0;
      for (int k = 0; k < p.m; ++k) nonzeros += is_nonzero(elements[k]);
      if (nonzeros > p.n && slot == 0) atomicMin(first, static_cast<Count>(row * (p.columns / p.m) + group));
      const int place = place_of_slot(elements, p, slot, nonzeros);
      indices |= static_cast<unsigned>(place) << bits * i;
      values[row * kept + at] = is_nonzero(elements[place]) ? elements[place] : Bits{0};
    }
    metadata[row * bytes + byte] = static_cast<uint8_t>(indices);
  }
}

// Any pattern: a block takes a row, a thread a column, which it looks up among the n indices of its group.
template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    decompress_any(const Bits* values, const uint8_t* metadata, Pattern p, Bits* weight) {
  const int bits = index_bits(p.m), kept = p.kept();
  const int64_t row = blockIdx.x;
  const uint8_t* indices = metadata + row * p.metadata_bytes();
  for (int column = threadIdx.x; column < p.columns; column += kThreads) {
    const int place = column % p.m, first = column / p.m * p.n;
    Bits value = 0;
    for (int at = first; at < first + p.n; ++at) {
      const int index = indices[at * bits / 8] >> at * bits % 8 & ((1 << bits) - 1);
      if (index == place) value = values[row * kept + at];
    }
    weight[row * p.columns + column] = value;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side

bool valid(const NmShape& s) {
  return s.rows >= 0 && s.columns >= 0 && s.columns <= INT32_MAX && 1 <= s.n && s.n <= s.m && s.m <= 256 &&
         s.columns % s.m == 0;
}

// Launches a kernel that walks `count` pieces of eight columns.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_walk(void (*kernel)(Parameters...), int64_t count, void* stream, Arguments... arguments) {
  int processors = 0;
  const cudaError_t error = count_processors(&processors);
  if (error != cudaSuccess) return error;
  const int64_t most = int64_t{processors} * kBlocksPerProcessor, wanted = ceil_divide(count, kThreads);
  const dim3 grid(blocks(wanted < most ? wanted : most));
  return launch(kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream), arguments...);
}

// Launches a kernel of which a block takes a row.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_rows(void (*kernel)(Parameters...), const NmShape& s, void* stream, Arguments... arguments) {
  return launch(kernel, dim3(blocks(s.columns > 0 ? s.rows : 0)), kThreads, 0, static_cast<cudaStream_t>(stream),
                arguments...);
}

// Whether the kernels for 2:4 take these matrices.
bool is_24(const NmShape& s, const void* weight, const void* values) {
  return s.n == 2 && s.m == 4 && s.columns % kColumns == 0 && aligned(weight, 16) && aligned(values, 16);
}

}  // namespace

int nm_prune(NmShape s, int dtype, const void* scores, const uint8_t* previous_bits, uint8_t* bits, int64_t* flips,
             int64_t* first, void* stream) {
  if (!valid(s)) return cudaErrorInvalidValue;
  return with_float(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const auto* input = static_cast<const T*>(scores);
    const Prune p{
        s.columns, s.n, s.m, previous_bits, bits, reinterpret_cast<Count*>(flips), reinterpret_cast<Count*>(first)};
    if ((s.m != 4 && s.m != 8) || s.columns % kColumns != 0 || !aligned(scores, 16)) {
      return launch_rows(prune_any<T>, s, stream, input, p);
    }
    return launch_walk(s.m == 4 ? prune<T, 4> : prune<T, 8>, s.rows * s.columns / kColumns, stream, input,
                       s.rows * s.columns / kColumns, p);
  });
}

int nm_compress(NmShape s, int dtype, const void* weight, void* values, uint8_t* metadata, int64_t* first,
                void* stream) {
  if (!valid(s)) return cudaErrorInvalidValue;
  return with_bits(dtype, [&](auto zero) -> int {
    using Bits = decltype(zero);
    const auto* in = static_cast<const Bits*>(weight);
    auto* out = static_cast<Bits*>(values);
    auto* offender = reinterpret_cast<Count*>(first);
    if (!is_24(s, weight, values)) {
      const Pattern p{static_cast<int>(s.columns), s.n, s.m};
      return launch_rows(compress_any<Bits>, s, stream, in, p, out, metadata, offender);
    }
    const int64_t count = s.rows * s.columns / kColumns;
    return launch_walk(compress_24<Bits>, count, stream, in, count, out, metadata, offender);
  });
}

int nm_decompress(NmShape s, int dtype, const void* values, const uint8_t* metadata, void* weight, void* stream) {
  if (!valid(s)) return cudaErrorInvalidValue;
  return with_bits(dtype, [&](auto zero) -> int {
    using Bits = decltype(zero);
    const auto* in = static_cast<const Bits*>(values);
    auto* out = static_cast<Bits*>(weight);
    if (!is_24(s, weight, values)) {
      const Pattern p{static_cast<int>(s.columns), s.n, s.m};
      return launch_rows(decompress_any<Bits>, s, stream, in, metadata, p, out);
    }
    const int64_t count = s.rows * s.columns / kColumns;
    return launch_walk(decompress_24<Bits>, count, stream, in, metadata, count, out);
  });
}

}  // namespace pyprune
