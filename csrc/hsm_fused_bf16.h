// The `hsm` family's matrix products in bf16, for the instruction set with a bf16 dot product (vdpbf16ps).
//
// Included by hsm_fused_cpu.cpp alone. Everywhere else, and where the processor has tiles (AMX), torch's products
// serve.
//
// One format for all factors: "pairs", uint32 of two bf16 that are neighbours along the summed dimension, stored
// [summed / 2][columns], so that a product is  sum[i][j] += a[k][i] . b[k][j]  over k. A tile of the result has 8 rows
// and 48 columns: 24 accumulators, 3 registers of b, one broadcast of a; 11 loads for 24 dot products, of which a core
// with two 512-bit pipes does two a cycle. b comes in panels of 48 columns.
//
// What bounds it: the dot products. T = d = 2048, r = 104 are 1.74 GFLOP forward and 3.49 backward; a Zen 5 core at
// 3.6 GHz does 463 GFLOP/s, so 3.8 and 7.5 ms, and `multiply` alone reaches that. Around it, with warm caches: packing
// x, 48 tokens at a time (196 KB, second-level cache), 9 % of the first product; finishing tiles in registers (mask, x,
// residual) 18 % of the second; packing for sums over tokens, where rows stand pages apart, 20 % of those.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include "hsm_fused_cpu.h"

#pragma GCC diagnostic push
// gcc 12 warns of its own headers: intrinsics that overwrite a register start from an undefined one.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
namespace pyprune {
namespace {

using Pair = uint32_t;

constexpr int64_t kTileRows = 8;
constexpr int64_t kVector = 16;  // pairs, or fp32 numbers, in a register
constexpr int64_t kVectors = 3;
constexpr int64_t kPanel = kVectors * kVector;  // columns of a tile; tokens that a thread works on at a time

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` of 16 elements.
inline __mmask16 first(int64_t count) {
  return count >= kVector ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 widen(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}
inline __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

// The first `count` of 16 numbers, zeros behind them. Whole registers go without a mask, which made the second product
// a third slower.
inline __m512 load(const bfloat16* source, int64_t count) {
  return widen(count >= kVector ? _mm256_loadu_si256((const __m256i*)source)
                                : _mm256_maskz_loadu_epi16(first(count), source));
}
inline void store(bfloat16* target, __m512 values, int64_t count) {
  const __m256i rounded = narrow(values);
  if (count >= kVector)
    _mm256_storeu_si256((__m256i*)target, rounded);
  else
    _mm256_mask_storeu_epi16(target, first(count), rounded);
}

// ------------------------------------------------------------------------------------------------------------ packing

// out[k][row] for 16 rows and 16 pairs of a row-major matrix; rows and bytes beyond the given ones become zero.
// Quarters of 16 bytes of four rows each meet in one register, where 4 x 4 transpositions finish.
template <typename Store>
inline void transpose_block(const char* source, int64_t stride, int64_t rows, int64_t bytes, Store&& put) {
  alignas(64) char padded[kVector * sizeof(__m512i)];
  if (rows < kVector || bytes < static_cast<int64_t>(sizeof(__m512i))) {
    memset(padded, 0, sizeof padded);
    for (int64_t i = 0; i < least(rows, kVector); ++i)
      memcpy(padded + i * sizeof(__m512i), source + i * stride, static_cast<size_t>(least(bytes, sizeof(__m512i))));
    source = padded;
    stride = sizeof(__m512i);
  }
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512i rows_of[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const char* at = source + i * stride + quarter * 16;
      const auto piece = [&](int64_t lane) { return _mm_loadu_si128((const __m128i*)(at + 4 * lane * stride)); };
      __m512i row = _mm512_castsi128_si512(piece(0));
      row = _mm512_inserti32x4(row, piece(1), 1);
      row = _mm512_inserti32x4(row, piece(2), 2);
      rows_of[i] = _mm512_inserti32x4(row, piece(3), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(rows_of[0], rows_of[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(rows_of[0], rows_of[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(rows_of[2], rows_of[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(rows_of[2], rows_of[3]);
    put(4 * quarter + 0, _mm512_unpacklo_epi64(low01, low23));
    put(4 * quarter + 1, _mm512_unpackhi_epi64(low01, low23));
    put(4 * quarter + 2, _mm512_unpacklo_epi64(high01, high23));
    put(4 * quarter + 3, _mm512_unpackhi_epi64(high01, high23));
  }
}

// pairs [depth/2][width] of source [columns][depth]: the two of a pair lie side by side. Columns beyond are zero up to
// `width`, a multiple of 8.
inline void pack_rows(const bfloat16* source, int64_t stride, int64_t columns, int64_t depth, Pair* pairs,
                      int64_t width) {
  const int64_t depth_pairs = divide_up(depth, 2);
  for (int64_t column = 0; column < width; column += kVector) {
    for (int64_t k = 0; k < depth_pairs; k += kVector) {
      const char* block = (const char*)(source + column * stride + 2 * k);
      transpose_block(block, stride * 2, columns - column, (depth - 2 * k) * 2, [&](int64_t i, __m512i values) {
        if (k + i < depth_pairs)
          _mm512_mask_storeu_epi32(pairs + (k + i) * width + column, first(width - column), values);
      });
    }
  }
}

// pairs [depth/2][width] of source [depth][columns]: the two of a pair stand in neighbouring rows.
inline void pack_columns(const bfloat16* source, int64_t stride, int64_t columns, int64_t depth, Pair* pairs,
                         int64_t width) {
  for (int64_t row = 0; row < depth; row += 2, pairs += width) {
    const bfloat16* even = source + row * stride;
    for (int64_t column = 0; column < width; column += kVector) {
      const __mmask16 valid = first(columns - column), valid_odd = row + 1 < depth ? valid : 0;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, even + column));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid_odd, even + stride + column));
      const __m512i both = _mm512_or_si512(_mm512_slli_epi32(high, 16), low);
      _mm512_mask_storeu_epi32(pairs + column, first(width - column), both);
    }
  }
}

// The left factor, rank by depth: [rank/8][depth/2][8], so that each tile reads one stream. `transposed` says that it
// is stored [depth][rank].
inline void pack_left(const bfloat16* source, int64_t stride, bool transposed, int64_t rank, int64_t depth,
                      Pair* pairs) {
  for (int64_t row = 0; row < rank; row += kTileRows, pairs += divide_up(depth, 2) * kTileRows) {
    if (transposed)
      pack_columns(source + row, stride, rank - row, depth, pairs, kTileRows);
    else
      pack_rows(source + row * stride, stride, rank - row, depth, pairs, kTileRows);
  }
}

// The numbers of sixteen pairs.
inline __m512 low_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 high_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))); }

// ------------------------------------------------------------------------------------------------------------ products

// sum [R][48] += a [pairs][.. R ..] . b [pairs][48].
template <int R>
inline void multiply(int64_t pairs, const Pair* a, int64_t a_stride, const Pair* b, __m512 (&sum)[R][kVectors]) {
  for (int64_t k = 0; k < pairs; ++k, a += a_stride, b += kPanel) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + kVector);
    const __m512bh b2 = (__m512bh)_mm512_loadu_si512(b + 2 * kVector);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], factor, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], factor, b1);
      sum[i][2] = _mm512_dpbf16_ps(sum[i][2], factor, b2);
    }
  }
}

// out [R][48] of a row stride += a . b.
template <int R>
inline void multiply_into(int64_t pairs, const Pair* a, int64_t a_stride, const Pair* b, float* out,
                          int64_t out_stride) {
  __m512 sum[R][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_loadu_ps(out + i * out_stride + j * kVector);
  multiply<R>(pairs, a, a_stride, b, sum);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(out + i * out_stride + j * kVector, sum[i][j]);
}

// out [round_up(rank, 8)][48] of a row stride += a . b; a as of pack_left. `ahead` is called with each tile's first
// row.
template <typename Ahead>
inline void multiply_panel(int64_t pairs, int64_t rank, const Pair* a, const Pair* b, float* out, int64_t out_stride,
                           Ahead&& ahead) {
  for (int64_t row = 0; row < rank; row += kTileRows) {
    ahead(row);
    const auto multiply_rows = rank - row <= 4 ? multiply_into<4> : multiply_into<8>;
    multiply_rows(pairs, a + row * pairs, kTileRows, b, out + row * out_stride, out_stride);
  }
}

// ---------------------------------------------------------------------------------------------------------- low_rank

// The parts of low_rank's workspace: both small factors, and for each thread the tokens it works on.
struct LowRankSpace {
  int64_t width, input_pairs, rank_pairs, panels;
  int64_t a, b, tokens, hidden, hidden_pairs;  // in Pairs

  explicit LowRankSpace(const LowRank& op)
      : width(round_up(op.rank, kTileRows)),
        input_pairs(divide_up(op.inputs, 2)),
        rank_pairs(divide_up(op.rank, 2)),
        panels(divide_up(op.outputs, kPanel)),
        a(round_up(input_pairs * width, kVector)),
        b(panels * rank_pairs * kPanel),
        tokens(input_pairs * kPanel),
        hidden(width * kPanel),
        hidden_pairs(width / 2 * kPanel) {}

  int64_t bytes(int threads) const { return 4 * (a + b + threads * (tokens + hidden + hidden_pairs)); }
};

int64_t low_rank_workspace(const LowRank& op, int threads) { return LowRankSpace(op).bytes(threads); }

// hidden_pairs [rank/2][48] = bf16(scale * hidden [rank][48]). An odd rank's last partner is zero.
inline void round_hidden(const LowRank& op, const float* hidden, Pair* hidden_pairs) {
  for (int64_t row = 0; row < op.rank; row += 2) {
    const __m512 even_scale = _mm512_set1_ps(op.scale ? op.scale[row] : 1.0f);
    const bool odd = row + 1 < op.rank;
    const __m512 odd_scale = _mm512_set1_ps(odd && op.scale ? op.scale[row + 1] : 1.0f);
    for (int64_t t = 0; t < kPanel; t += kVector) {
      const float* at = hidden + row * kPanel + t;
      const __m256i low = narrow(_mm512_mul_ps(_mm512_loadu_ps(at), even_scale));
      const __m256i high =
          odd ? narrow(_mm512_mul_ps(_mm512_loadu_ps(at + kPanel), odd_scale)) : _mm256_setzero_si256();
      const __m512i both =
          _mm512_or_si512(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16), _mm512_cvtepu16_epi32(low));
      _mm512_storeu_si512(hidden_pairs + row / 2 * kPanel + t, both);
    }
  }
}

// h [tokens][rank] from hidden_pairs [rank/2][48].
inline void store_hidden(const Pair* hidden_pairs, int64_t tokens, int64_t rank, bfloat16* h) {
  for (int64_t k = 0; k < rank; k += 2 * kVector) {
    const int64_t rows = divide_up(rank - k, 2);
    const __mmask32 valid = rank - k >= 32 ? ~0u : (1u << (rank - k)) - 1;
    for (int64_t t = 0; t < tokens; t += kVector) {
      const Pair* block = hidden_pairs + k / 2 * kPanel + t;
      transpose_block((const char*)block, kPanel * 4, rows, 64, [&](int64_t i, __m512i values) {
        if (t + i < tokens) _mm512_mask_storeu_epi16(h + (t + i) * rank + k, valid, values);
      });
    }
  }
}

// dot [rank] = sum over tokens of hidden [rank][48] * other [tokens][rank]. `space` [rank/2][48].
inline void dot_hidden(const float* hidden, const bfloat16* other, int64_t tokens, int64_t rank, Pair* space,
                       float* dot) {
  pack_rows(other, rank, tokens, rank, space, kPanel);
  for (int64_t row = 0; row < rank; ++row) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < kPanel; t += kVector) {
      const __m512i pairs = _mm512_loadu_si512(space + row / 2 * kPanel + t);
      sum = _mm512_fmadd_ps(row % 2 ? high_of(pairs) : low_of(pairs), _mm512_loadu_ps(hidden + row * kPanel + t), sum);
    }
    dot[row] = _mm512_reduce_add_ps(sum);
  }
}

// y [8][48] of a tile at (token, column): the second product and everything that is added to it.
template <bool kResidual>
inline void expand_tile(const LowRank& op, const Pair* hidden_pairs, const Pair* b, int64_t token, int64_t tokens,
                        int64_t column) {
  const bfloat16* x = static_cast<const bfloat16*>(op.x) + token * op.inputs + column;
  const bfloat16* residual = static_cast<const bfloat16*>(op.residual) + token * op.outputs + column;
  bfloat16* y = static_cast<bfloat16*>(op.y) + token * op.outputs + column;
  __m512 sum[kTileRows][kVectors] = {};
  multiply<kTileRows>(divide_up(op.rank, 2), hidden_pairs, kPanel, b, sum);
#pragma GCC unroll 3
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = j * kVector, masked = op.masked - column - at, valid = op.outputs - column - at;
    const __m512 mask = _mm512_maskz_loadu_ps(first(masked), op.mask + column + at);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      if (i >= tokens) break;
      sum[i][j] = _mm512_fmadd_ps(mask, load(x + i * op.inputs + at, masked), sum[i][j]);
      if (kResidual) sum[i][j] = _mm512_add_ps(sum[i][j], load(residual + i * op.outputs + at, valid));
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
    if (i >= tokens) break;
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      store(y + i * op.outputs + j * kVector, sum[i][j], op.outputs - column - j * kVector);
    }
  }
}

// normed [columns] = row * rstd * weight; returns rstd.
inline float normalise_row(int64_t columns, float eps, const bfloat16* row, const bfloat16* weight, bfloat16* normed) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns; j += kVector) {
    const __m512 values = load(row + j, columns - j);
    squares = _mm512_fmadd_ps(values, values, squares);
  }
  const float rstd = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / static_cast<float>(columns) + eps);
  for (int64_t j = 0; j < columns; j += kVector) {
    const __m512 scaled = _mm512_mul_ps(load(row + j, columns - j), _mm512_set1_ps(rstd));
    store(normed + j, _mm512_mul_ps(scaled, load(weight + j, columns - j)), columns - j);
  }
  return rstd;
}

// y for the tokens of a chunk, eight whole rows after eight, which the norm then finds in the cache.
template <bool kResidual>
inline void expand(const LowRank& op, const LowRankSpace& space, const Pair* hidden_pairs, const Pair* b, int64_t token,
                   int64_t tokens) {
  for (int64_t row = 0; row < tokens; row += kTileRows) {
    for (int64_t panel = 0; panel < space.panels; ++panel) {
      expand_tile<kResidual>(op, hidden_pairs + row, b + panel * space.rank_pairs * kPanel, token + row, tokens - row,
                             panel * kPanel);
    }
    if (!kResidual) continue;
    for (int64_t i = token + row; i < token + least(row + kTileRows, tokens); ++i) {
      const int64_t start = i * op.outputs;
      op.rstd[i] = normalise_row(op.outputs, op.eps, static_cast<const bfloat16*>(op.y) + start,
                                 static_cast<const bfloat16*>(op.weight), static_cast<bfloat16*>(op.normed) + start);
    }
  }
}

void low_rank(const LowRank& op, void* workspace, int threads) {
  const LowRankSpace space(op);
  Pair* const a = static_cast<Pair*>(workspace);
  Pair* const b = a + space.a;
  Pair* const own = b + space.b;
  const bfloat16* const source_a = static_cast<const bfloat16*>(op.a);
  const bfloat16* const source_b = static_cast<const bfloat16*>(op.b);
  const int64_t chunks = divide_up(op.tokens, kPanel);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < op.rank; row += kTileRows) {
      const int64_t rows = least(kTileRows, op.rank - row);
      const bfloat16* from = source_a + (op.transposed ? row : row * op.inputs);
      const int64_t stride = op.transposed ? op.rank : op.inputs;
      pack_left(from, stride, op.transposed, rows, op.inputs, a + row * space.input_pairs);
    }
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < space.panels; ++panel) {
      const int64_t column = panel * kPanel, columns = least(kPanel, op.outputs - column);
      Pair* target = b + panel * space.rank_pairs * kPanel;
      if (op.transposed)
        pack_columns(source_b + column, op.outputs, columns, op.rank, target, kPanel);
      else
        pack_rows(source_b + column * op.rank, op.rank, columns, op.rank, target, kPanel);
    }
    Pair* const tokens_pairs = own + omp_get_thread_num() * (space.tokens + space.hidden + space.hidden_pairs);
    float* const hidden = reinterpret_cast<float*>(tokens_pairs + space.tokens);
    Pair* const hidden_pairs = tokens_pairs + space.tokens + space.hidden;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t token = chunk * kPanel, tokens = least(kPanel, op.tokens - token);
      pack_rows(static_cast<const bfloat16*>(op.x) + token * op.inputs, op.inputs, tokens, op.inputs, tokens_pairs,
                kPanel);
      memset(hidden, 0, static_cast<size_t>(space.hidden) * sizeof(float));
      multiply_panel(space.input_pairs, op.rank, a, tokens_pairs, hidden, kPanel, [](int64_t) {});
      if (op.dot) {
        const bfloat16* beside = static_cast<const bfloat16*>(op.beside) + token * op.rank;
        dot_hidden(hidden, beside, tokens, op.rank, hidden_pairs, op.dot + chunk * op.rank);
      }
      round_hidden(op, hidden, hidden_pairs);
      store_hidden(hidden_pairs, tokens, op.rank, static_cast<bfloat16*>(op.h) + token * op.rank);
      if (!op.y) continue;
      const auto expand_chunk = op.residual ? expand<true> : expand<false>;
      expand_chunk(op, space, hidden_pairs, b, token, tokens);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- sum_products

constexpr int64_t kStrip = 2 * kPanel;  // columns that a thread sums at a time: whole cache lines of b
constexpr int64_t kDepth = 128;         // tokens between two visits to the sums: a panel of b stays in the first cache

struct SumSpace {
  int64_t width, a, sums, panel;  // in Pairs

  explicit SumSpace(const SumProducts& op)
      : width(round_up(op.rank, kTileRows)),
        a(round_up(divide_up(op.tokens, 2) * width, kVector)),
        sums(width * kStrip),
        panel(kDepth / 2 * kPanel) {}

  int64_t bytes(int threads) const { return 4 * (a + threads * (sums + panel)); }
};

// Asks for a panel's rows that are read soon: they stand pages apart, where the processor's own prefetching does not
// help. Not _mm_prefetch, because gcc 12 drops calls of functions that do nothing else.
inline void prefetch(const bfloat16* panel, int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i, panel += stride) {
    __asm__ volatile("prefetcht1 %0" ::"m"(*panel));
    __asm__ volatile("prefetcht1 %0" ::"m"(panel[kPanel - 1]));
  }
}

int64_t sum_products_workspace(const SumProducts& op, int threads) { return SumSpace(op).bytes(threads); }

void sum_products(const SumProducts& op, void* workspace, int threads) {
  const SumSpace space(op);
  Pair* const a = static_cast<Pair*>(workspace);
  const int64_t strips = divide_up(op.columns, kStrip), slices = divide_up(op.tokens, kDepth);
  const int64_t share = divide_up(kDepth, divide_up(op.rank, kTileRows));  // of the next panel, for a tile of this one
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t token = slice * kDepth, depth = least(kDepth, op.tokens - token);
      const bfloat16* source = static_cast<const bfloat16*>(op.a) + token * op.rank;
      pack_left(source, op.rank, true, op.rank, depth, a + token / 2 * space.width);
    }
    float* const sums = reinterpret_cast<float*>(a + space.a + omp_get_thread_num() * (space.sums + space.panel));
    Pair* const panel = reinterpret_cast<Pair*>(sums + space.sums);
#pragma omp for schedule(dynamic)
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t begin = strip * kStrip, width = least(kStrip, op.columns - begin);
      memset(sums, 0, static_cast<size_t>(space.sums) * sizeof(float));
      for (int64_t token = 0; token < op.tokens; token += kDepth) {
        const int64_t depth = least(kDepth, op.tokens - token);
        for (int64_t column = 0; column < width; column += kPanel) {
          const bfloat16* b = static_cast<const bfloat16*>(op.b) + token * op.columns + begin + column;
          pack_columns(b, op.columns, width - column, depth, panel, kPanel);
          const bfloat16* next = column + kPanel < width ? b + kPanel : b - column + kDepth * op.columns;
          const auto ahead = [&](int64_t row) {
            prefetch(next + row / kTileRows * share * op.columns, op.columns, share);
          };
          multiply_panel(divide_up(depth, 2), op.rank, a + token / 2 * space.width, panel, sums + column, kStrip,
                         ahead);
        }
      }
      for (int64_t column = 0; column < width; column += kVector) {
        for (int64_t row = 0; row < op.rank; ++row) {
          bfloat16* out = static_cast<bfloat16*>(op.out) + row * op.columns + begin + column;
          store(out, _mm512_loadu_ps(sums + row * kStrip + column), width - column);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pyprune
#pragma GCC diagnostic pop
