// SparseGPT's solve inside a slab. The contract is in sparsegpt.h.
//
// A warp solves one row: lane l holds columns l, l + 32, l + 64 and l + 96 of the slab in registers, and so their
// update is a shared load of U and a multiply-add each, with the error of the step handed round by a shuffle. U's part
// of the slab, 64 KB, lies in shared memory, read once for kRows rows. Bound by instructions: about 20 a column and
// row, 128 dependent steps; 3 blocks or 24 warps an SM of 228 KB hide the latency of a step. Against the matrix product
// behind the slab, 2 in flops a weight, this is small for any width above a few thousand.
#include "launch.h"
#include "sparsegpt.h"

namespace pyprune {
namespace {

constexpr int kWarp = 32;
constexpr int kRows = 8;  // of a block, a warp each
constexpr int kThreads = kRows * kWarp;
constexpr int kParts = kMaxSlab / kWarp;  // columns of a lane
constexpr unsigned kAll = 0xffffffffu;

// What a lane knows of its columns: the entry of part p is column p * 32 + lane.
struct Row {
  float w[kParts], error[kParts], scale[kParts], zero[kParts];
  bool kept[kParts];
};

__device__ __forceinline__ float rounded(float w, float scale, float zero, float levels) {
  const float code = fminf(fmaxf(rintf(w / scale) + zero, 0.0f), levels);
  return scale * (code - zero);
}

// Keeps the n highest scores among columns [first, first + m), which the lanes hold; called by the whole warp.
__device__ __forceinline__ void choose(Row& row, const float (&diagonal)[kParts], int first, int n, int m, int lane) {
  float score[kParts];
  int ahead[kParts] = {};
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const float ratio = row.w[p] / diagonal[p];
    score[p] = ratio * ratio;
  }
#pragma unroll
  for (int q = 0; q < kParts; ++q) {
    const int from = first > q * kWarp ? first : q * kWarp;
    const int to = first + m < (q + 1) * kWarp ? first + m : (q + 1) * kWarp;
    for (int k = from; k < to; ++k) {
      const float other = __shfl_sync(kAll, score[q], k % kWarp);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const int j = p * kWarp + lane;
        ahead[p] += k < j ? other >= score[p] : other > score[p];
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int j = p * kWarp + lane;
    if (j >= first && j < first + m) row.kept[p] = ahead[p] < n;
  }
}

__global__ void __launch_bounds__(kThreads) sparsegpt_slab_kernel(SparseGptSlab s) {
  PYPRUNE_SHARED_MEMORY(shared);
  float* upper = reinterpret_cast<float*>(shared);  // [width][kMaxSlab], zero below the diagonal and behind the slab
  for (int i = threadIdx.x; i < s.width * kMaxSlab; i += kThreads) {
    const int j = i / kMaxSlab, k = i % kMaxSlab;
    upper[i] = k >= j && k < s.width ? s.upper[(s.begin + j) * s.columns + s.begin + k] : 0.0f;
  }
  __syncthreads();

  const int lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (index >= s.rows) return;  // a whole warp, behind the only barrier of the block
  const int64_t start = index * s.columns + s.begin;
  Row row;
  float diagonal[kParts];
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int j = p * kWarp + lane;
    const bool inside = j < s.width;
    const int64_t group = index * s.groups + (s.begin + j) * s.groups / s.columns;
    row.w[p] = inside ? s.work[start + j] : 0.0f;
    row.kept[p] = inside && s.n == 0 && s.keep[start + j];
    row.scale[p] = inside && s.scale ? s.scale[group] : 1.0f;
    row.zero[p] = inside && s.scale ? s.zero[group] : 0.0f;
    row.error[p] = 0.0f;
    diagonal[p] = inside ? upper[j * kMaxSlab + j] : 1.0f;
  }

#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    for (int l = 0; l < kWarp && part * kWarp + l < s.width; ++l) {
      const int j = part * kWarp + l;
      if (s.n != 0 && j % s.m == 0) choose(row, diagonal, j, s.n, s.m, lane);
      const float w = row.w[part];
      const float stays = row.kept[part] ? (s.scale ? rounded(w, row.scale[part], row.zero[part], s.levels) : w) : 0.0f;
      const float error = __shfl_sync(kAll, (w - stays) / diagonal[part], l);
      if (lane == l) row.error[part] = error;
#pragma unroll
      for (int p = part; p < kParts; ++p) {
        if (p * kWarp + lane > j) row.w[p] -= error * upper[j * kMaxSlab + p * kWarp + lane];
      }
      if (lane == l) row.w[part] = stays;
    }
  }

#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int j = p * kWarp + lane;
    if (j >= s.width) continue;
    s.work[start + j] = row.w[p];
    s.errors[index * s.width + j] = row.error[p];
    if (s.n != 0) s.keep[start + j] = row.kept[p];
  }
}

}  // namespace

int sparsegpt_slab(const SparseGptSlab& slab, void* stream) {
  const dim3 grid(static_cast<unsigned>((slab.rows + kRows - 1) / kRows));
  const size_t shared_bytes = static_cast<size_t>(slab.width) * kMaxSlab * sizeof(float);
  return launch(sparsegpt_slab_kernel, grid, kThreads, shared_bytes, static_cast<cudaStream_t>(stream), slab);
}

}  // namespace pyprune
