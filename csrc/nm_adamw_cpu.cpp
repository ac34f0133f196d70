// CPU kernels of the `nm_adamw` family, compiled once per instruction set.
//
// nm_adamw reads W, g, m, v and writes W, m, v once: 28 bytes and a bit an fp32 weight, 22 a bf16 one; masked_weight
// reads and writes a weight once. Both are bound by memory: a square root, a division and the hash take about four
// cycles a weight with 8 lanes, 28 bytes from memory about six. A row is worked on in tiles, whose bits are first
// spread to floats, so that one loop over plain arrays is left for the compiler to vectorise.
#include "nm_adamw_cpu.h"

#include <math.h>

#include "cpu_types.h"

namespace pyprune {
namespace {

constexpr int64_t kTile = 512;  // columns; a multiple of 8, so that a tile starts with a byte of the mask

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// out [width] = all bits set where the mask has a one, else 0; writes whole bytes of the mask, up to kTile.
template <typename Integer>
inline void spread(const uint8_t* bits, int64_t width, Integer* out) {
  for (int64_t b = 0; b < (width + 7) / 8; ++b) {
    const int32_t byte = bits[b];
    for (int j = 0; j < 8; ++j) out[8 * b + j] = static_cast<Integer>(-((byte >> j) & 1));
  }
}

inline uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <typename T>
inline T rounded(float value, uint32_t noise);

template <>
inline float rounded<float>(float value, uint32_t) {
  return value;
}

template <>
inline bfloat16 rounded<bfloat16>(float value, uint32_t noise) {
  const int32_t bits = bits_of(value);
  const int32_t magnitude = bits & kMagnitude;
  const int32_t finite = (magnitude + static_cast<int32_t>(noise >> 16)) >> 16;
  const int32_t special = magnitude > kInfinity ? 0x7fc0 : 0x7f80;
  const int32_t result = magnitude >= kInfinity ? special : finite;
  return static_cast<bfloat16>(result | (bits >> 16 & 0x8000));
}

template <typename T, bool kMasked>
void nm_adamw(int64_t rows, int64_t columns, const AdamW& o, void* param_, const void* grad_, float* exp_avg_,
              float* exp_avg_sq_, const uint8_t* mask, int threads) {
  const int64_t row_bytes = (columns + 7) / 8, tiles = (columns + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < rows * tiles; ++tile) {
    const int64_t row = tile / tiles, column = tile % tiles * kTile;
    const int64_t start = row * columns + column, width = smaller(kTile, columns - column);
    T* param = static_cast<T*>(param_) + start;
    const T* grad = static_cast<const T*>(grad_) + start;
    float* exp_avg = exp_avg_ + start;
    float* exp_avg_sq = exp_avg_sq_ + start;
    const uint32_t first = o.seed + static_cast<uint32_t>(start);
    int32_t kept[kTile];
    if (kMasked) {
      spread(mask + row * row_bytes + column / 8, width, kept);
    } else {
      memset(kept, 0xff, sizeof kept);
    }
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float w = to_float(param[j]);
      const float g = to_float(grad[j]);
      const float m = o.beta1 * exp_avg[j] + o.new1 * g;
      const float u = m + float_of(bits_of(o.masked_decay * w) & ~kept[j]);
      const float s = kMasked ? u : g;
      const float v = o.beta2 * exp_avg_sq[j] + o.new2 * s * s;
      exp_avg[j] = m;
      exp_avg_sq[j] = v;
      const float next = o.keep * w - o.rate * u / (sqrtf(v * o.correction) + o.eps);
      param[j] = rounded<T>(next, hash32(first + static_cast<uint32_t>(j)));
    }
  }
}

// The bits of a number as `Out` stores it; only bits are masked, so a masked NaN becomes zero too.
template <typename Out, typename In>
inline auto stored(In value) {
  if constexpr (sizeof(Out) == 4) {
    return bits_of(value);
  } else if constexpr (sizeof(In) == 2) {
    return static_cast<int16_t>(value);
  } else {
    return static_cast<int16_t>(from_float<Out>(value));
  }
}

template <typename In, typename Out>
void masked_weight(int64_t rows, int64_t columns, const void* weight_, const uint8_t* mask, void* out_, int threads) {
  using Integer = decltype(stored<Out>(In{}));
  const int64_t row_bytes = (columns + 7) / 8;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += kTile) {
      const int64_t start = row * columns + column, width = smaller(kTile, columns - column);
      const In* weight = static_cast<const In*>(weight_) + start;
      Integer* out = static_cast<Integer*>(out_) + start;
      Integer kept[kTile];
      spread(mask + row * row_bytes + column / 8, width, kept);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) out[j] = stored<Out>(weight[j]) & kept[j];
    }
  }
}

void nm_adamw_typed(DType dtype, int64_t rows, int64_t columns, const AdamW& options, void* param, const void* grad,
                    float* exp_avg, float* exp_avg_sq, const uint8_t* mask, int threads) {
  const auto masked = dtype == kFloat32 ? nm_adamw<float, true> : nm_adamw<bfloat16, true>;
  const auto plain = dtype == kFloat32 ? nm_adamw<float, false> : nm_adamw<bfloat16, false>;
  const auto kernel = mask ? masked : plain;
  kernel(rows, columns, options, param, grad, exp_avg, exp_avg_sq, mask, threads);
}

void masked_weight_typed(DType dtype, DType out_dtype, int64_t rows, int64_t columns, const void* weight,
                         const uint8_t* mask, void* out, int threads) {
  const auto to_bfloat16 = dtype == kFloat32 ? masked_weight<float, bfloat16> : masked_weight<bfloat16, bfloat16>;
  const auto to_float16 = dtype == kFloat32 ? masked_weight<float, float16> : masked_weight<float16, float16>;
  const auto kernel = out_dtype == kFloat32    ? masked_weight<float, float>
                      : out_dtype == kBFloat16 ? to_bfloat16
                                               : to_float16;
  kernel(rows, columns, weight, mask, out, threads);
}

}  // namespace

extern const NmAdamwCpuKernels PYPRUNE_JOIN(nm_adamw_cpu_, PYPRUNE_ISA) = {nm_adamw_typed, masked_weight_typed};

}  // namespace pyprune
