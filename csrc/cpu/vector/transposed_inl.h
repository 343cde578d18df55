// Products with transposed weights, (k, n) with n contiguous: y[m, n] = sum over i of a[m, i] * b[i, n].
//
// A tile is a few activation rows by a few vectors of neighbouring columns. An element has one accumulator lane, which
// walks a chunk of k in order; chunks are added in order: the same bits in any tile. Columns that fill no vector are
// computed by scalars. With AVX-512 BF16 two rows of b are interleaved on the way, so that a lane has a pair of k.
//
// Cost: N loads and M broadcasts for M * N fused multiply-adds a step. A step reads one or two cache lines of a row of
// b and prefetches those of a row further on: the hardware does not follow strides of pages.
#pragma once

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kTransposedChunk = 512;  // of k: 64 columns of it are 128 KiB in float32
constexpr int64_t kRowsAhead = 12;

// M rows by N vectors: sums of `k` steps, left in or added to y.
template <typename A, typename W>
struct ColumnTile {
  static constexpr int kColumns = Vec::kLanes;  // of a vector

  template <int M, int N>
  static inline void run(const A* a, int64_t a_stride, const W* b, int64_t b_stride, int64_t k, bool add, float* y) {
    Vec acc[M][N];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) acc[m][n] = Vec::zero();
    }
    for (int64_t i = 0; i < k; ++i, b += b_stride) {
      const char* ahead = reinterpret_cast<const char*>(b + kRowsAhead * b_stride);
      for (int64_t byte = 0; byte < N * kColumns * static_cast<int64_t>(sizeof(W)); byte += kLineBytes) {
        __builtin_prefetch(ahead + byte, 0, 2);
      }
      Vec bv[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) bv[n] = Vec::load(b + n * kColumns);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec av = Vec::all(to_float(a[m * a_stride + i]));
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[m][n] = fma(av, bv[n], acc[m][n]);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        float* out = y + m * kBlockColumns + n * kColumns;
        (add ? Vec::load(out) + acc[m][n] : acc[m][n]).store(out);
      }
    }
  }
};

#if defined(MOE_EXT_ISA_AVX512_BF16)

template <>
struct ColumnTile<BFloat16, BFloat16> {
  static constexpr int kColumns = 32;

  template <int M, int N>
  static inline void run(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t b_stride, int64_t k, bool add,
                         float* y) {
    const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    __m512 acc[M][N][2];  // of even columns and of odd ones
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) acc[m][n][0] = acc[m][n][1] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < k; i += 2, b += 2 * b_stride) {
      const bool both = i + 1 < k;
      __m512i even[N], odd[N];  // a pair of k of every column
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const BFloat16* row = b + n * kColumns;
        __builtin_prefetch(row + kRowsAhead * b_stride, 0, 2);
        __builtin_prefetch(row + (kRowsAhead + 1) * b_stride, 0, 2);
        const __m512i first = _mm512_loadu_si512(row);
        const __m512i second = both ? _mm512_loadu_si512(row + b_stride) : _mm512_setzero_si512();
        even[n] = _mm512_or_si512(_mm512_andnot_si512(high_half, first), _mm512_slli_epi32(second, 16));
        odd[n] = _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(high_half, second));
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const BFloat16* at = a + m * a_stride + i;
        const uint32_t pair = at[0].bits | (both ? static_cast<uint32_t>(at[1].bits) << 16 : 0u);
        const __m512bh av = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          acc[m][n][0] = _mm512_dpbf16_ps(acc[m][n][0], av, (__m512bh)even[n]);
          acc[m][n][1] = _mm512_dpbf16_ps(acc[m][n][1], av, (__m512bh)odd[n]);
        }
      }
    }
    const __m512i first_half = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second_half = _mm512_add_epi32(first_half, _mm512_set1_epi32(8));
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        const Vec sums[2] = {{_mm512_permutex2var_ps(acc[m][n][0], first_half, acc[m][n][1])},
                             {_mm512_permutex2var_ps(acc[m][n][0], second_half, acc[m][n][1])}};
        float* out = y + m * kBlockColumns + n * kColumns;
        for (int half = 0; half < 2; ++half, out += Vec::kLanes) {
          (add ? Vec::load(out) + sums[half] : sums[half]).store(out);
        }
      }
    }
  }
};

#endif

// A typed Product whose weights are transposed.
template <typename A, typename W>
struct TransposedBlock {
  using Tile = ColumnTile<A, W>;
  static constexpr int kWidest = static_cast<int>(kBlockColumns) / Tile::kColumns < 4
                                     ? static_cast<int>(kBlockColumns) / Tile::kColumns
                                     : 4;  // vectors of a tile

  const Product& p;

  // Rows [row, row + M) by `columns` columns at b, of the chunk of k at `first`.
  template <int M>
  void columns(int64_t row, const W* b, int64_t columns, int64_t first, int64_t k, float* y) const {
    const A* a = static_cast<const A*>(p.rows) + row * p.k + first;
    b += first * p.transposed;
    const bool add = first > 0;
    int64_t n = 0;
    for (; n + kWidest * Tile::kColumns <= columns; n += kWidest * Tile::kColumns) {
      Tile::template run<M, kWidest>(a, p.k, b + n, p.transposed, k, add, y + n);
    }
    for (; n + Tile::kColumns <= columns; n += Tile::kColumns) {
      Tile::template run<M, 1>(a, p.k, b + n, p.transposed, k, add, y + n);
    }
    for (; n < columns; ++n) {
      for (int m = 0; m < M; ++m) {
        float sum = 0.0f;
        for (int64_t i = 0; i < k; ++i) sum += to_float(a[m * p.k + i]) * to_float(b[i * p.transposed + n]);
        float* out = y + m * kBlockColumns + n;
        *out = add ? *out + sum : sum;
      }
    }
  }

  // Chunk by chunk, so that a chunk of the block's weights stays in L2 for all rows.
  void run() const {
    const int64_t split = p.weights.split < p.columns ? p.weights.split : p.columns;
    const int64_t tiles = (p.row_count + kTileRows - 1) / kTileRows;
    for (int64_t first = 0; first < p.k; first += kTransposedChunk) {
      const int64_t k = p.k - first < kTransposedChunk ? p.k - first : kTransposedChunk;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = p.row_count * t / tiles, end = p.row_count * (t + 1) / tiles;
        Block<A, W>::template with_height<kTileRows>(end - row, [&](auto height) {
          constexpr int kHeight = decltype(height)::value;
          float* y = p.y + row * kBlockColumns;
          this->template columns<kHeight>(row, static_cast<const W*>(p.weights.first), split, first, k, y);
          this->template columns<kHeight>(row, static_cast<const W*>(p.weights.second), p.columns - split, first, k,
                                          y + split);
        });
      }
    }
  }
};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
