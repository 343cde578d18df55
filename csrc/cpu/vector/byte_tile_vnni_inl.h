// Tiles of ByteBlocks and packed weights (byte_rows_inl.h) with AVX-512 VNNI.
//
// One instruction (vpdpbusd) adds 64 products of numbers without sign, the weights', and with sign, the activations',
// to 16 sums, which begin as the block's corrections: int8 weights are read as 128 more, four-bit numbers as 0 to 15,
// or mxfp4's twice, plus 12, from a table. A tile of M by N rows takes 2 such instructions for each of its M N blocks
// of 128 columns, a conversion (two in groups of 32) and one (int8), two (groups of 64 and 128) or four (32) products
// with scales; beside loads, each of its N weight rows 2 (int8) to 10 (mxfp4) instructions, each activation row 4.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "cpu/numeric.h"
#include "cpu/vector/byte_rows.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kFetchedBytes = 4096;  // ahead, at least

// Weight rows of a tile: as many as leave its M N sums, and what the N rows need, in 32 registers.
constexpr int byte_tile_columns(int rows, WeightType type, int group) {
  return rows > 2 && type != WeightType::kInt8 && group < 128 ? 2 : 4;
}

// Where the value of a block's column lies. A line of four-bit weights has columns j, j + 32, j + 64 and j + 96 in 16
// bits (packing.cpp); its even bytes first in every 16 and then the odd ones, they are spans of columns 0 and 2 in the
// low bits, 0 in the first half of every 16 bytes, and 1 and 3 in the high ones.
[[gnu::always_inline]] constexpr int64_t byte_position(bool four_bits, int64_t column) {
  if (!four_bits) return column;
  const int64_t span = column / 32, word = column % 32;
  return span % 2 * 64 + word / 8 * 16 + span / 2 * 8 + word % 8;
}

// Where the sum of columns [32 span, 32 span + 32) lies: lanes whose products are of these columns.
[[gnu::always_inline]] constexpr int64_t sum_position(int64_t span) { return span; }

static inline __m512i load_64(const void* p) { return _mm512_loadu_si512(p); }
static inline __m512i corrections_of(const ByteBlock& x) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.corrections)));
}

// y[m, n] = the sum of a tile's lanes, in an order that does not depend on N.
template <int M, int N>
[[gnu::always_inline]] static inline void store_sums(const __m512 (&sums)[M][N], float* y) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    if constexpr (N == 4) {
      sums_of({sums[m][0]}, {sums[m][1]}, {sums[m][2]}, {sums[m][3]}, y + m * kBlockColumns);
    } else {
      float of[4];
      sums_of({sums[m][0]}, {sums[m][N - 1]}, {sums[m][0]}, {sums[m][N - 1]}, of);
      for (int n = 0; n < N; ++n) y[m * kBlockColumns + n] = of[n];
    }
  }
}

// The products of `kLines` lines of a block.
template <int M, int N, int kLines>
[[gnu::always_inline]] static inline void int8_block(const ByteTile& t, const ByteColumn (&columns)[N], int64_t block,
                                                     __m512 (&sums)[M][N]) {
  const int64_t first = block * ByteBlock::kColumns;
  __m512i numbers[N][kLines];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 2
    for (int line = 0; line < kLines; ++line) {
      const int64_t byte = first + line * kByteLine;
      if (columns[n].next != nullptr) {
        _mm_prefetch(reinterpret_cast<const char*>(columns[n].next + byte), _MM_HINT_T0);
      }
      numbers[n][line] = _mm512_xor_si512(load_64(columns[n].weights + byte), _mm512_set1_epi8(-128));
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const ByteBlock& x = t.rows[m * t.blocks + block];
    const __m512i correction = corrections_of(x);
    const __m512 scale = _mm512_set1_ps(x.scale);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      __m512i dot = correction;
#pragma GCC unroll 2
      for (int line = 0; line < kLines; ++line) {
        dot = _mm512_dpbusd_epi32(dot, numbers[n][line], load_64(x.values + line * kByteLine));
      }
      sums[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sums[m][n]);
    }
  }
}

template <int M, int N>
[[gnu::always_inline]] static inline void int8_tile(const ByteTile& t, const ByteColumn (&columns)[N], float* y) {
  __m512 sums[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  const int64_t lines = (t.k + kByteLine - 1) / kByteLine;
  for (int64_t block = 0; block < lines / 2; ++block) int8_block<M, N, 2>(t, columns, block, sums);
  if (lines % 2 != 0) int8_block<M, N, 1>(t, columns, lines / 2, sums);
  store_sums<M, N>(sums, y);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) y[m * kBlockColumns + n] *= columns[n].scales[0];
  }
}

// A line of four-bit weights as numbers without sign: of spans 0 and 2, and of 1 and 3.
template <WeightType kType>
[[gnu::always_inline]] static inline void take_apart(const uint8_t* line, __m512i& low, __m512i& high) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const __m512i low_bits = _mm512_set1_epi8(15);
  const __m512i pairs = _mm512_shuffle_epi8(load_64(line), order);
  low = _mm512_and_si512(pairs, low_bits);
  high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low_bits);
  if constexpr (kType == WeightType::kMxfp4) {  // twice the number, plus 12
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    low = _mm512_shuffle_epi8(table, low);
    high = _mm512_shuffle_epi8(table, high);
  }
}

// What the sums of a line's lanes are multiplied by; `high` is only there in groups of 32, whose low and high bits
// differ.
template <int kGroup, bool kExponents>
[[gnu::always_inline]] static inline void line_scales(const ByteColumn& column, int64_t block, __m512& low,
                                                      __m512& high) {
  constexpr int kGroups = static_cast<int>(ByteBlock::kColumns) / kGroup;
  if constexpr (kExponents) {
    int32_t exponents;
    memcpy(&exponents, column.exponents + block * kGroups, sizeof(exponents));
    const __m512i four = _mm512_set1_epi32(exponents);
    const __m512i low_bytes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 0, -1, -1, -1, 2, -1, -1, -1, 2));
    const __m512i high_bytes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(-1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 3, -1, -1, -1, 3));
    low = _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_shuffle_epi8(four, low_bytes), 1));
    high = _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_shuffle_epi8(four, high_bytes), 1));
  } else if constexpr (kGroup == 128) {
    low = _mm512_set1_ps(column.scales[block]);
  } else if constexpr (kGroup == 64) {
    double two;
    memcpy(&two, column.scales + block * kGroups, sizeof(two));
    low = _mm512_permute_ps(_mm512_castpd_ps(_mm512_set1_pd(two)), 0b01010000);
  } else {
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(column.scales + block * kGroups));
    low = _mm512_permute_ps(four, 0b10100000);
    high = _mm512_permute_ps(four, 0b11110101);
  }
}

// The zero points of a line's spans, in the lanes of their corrections.
template <int kGroup>
[[gnu::always_inline]] static inline __m512i line_zeros(const ByteColumn& column, int64_t block, int64_t k) {
  constexpr int kGroups = static_cast<int>(ByteBlock::kColumns) / kGroup;
  int of_group[kGroups] = {column.zeros[block * kGroups]};
  for (int g = 1; g < kGroups; ++g) {
    if (block * ByteBlock::kColumns + g * kGroup < k) of_group[g] = column.zeros[block * kGroups + g];
  }
  return _mm512_zextsi128_si512(
      _mm_setr_epi32(of_group[0], of_group[kGroups / 4], of_group[kGroups / 2], of_group[kGroups * 3 / 4]));
}

template <int M, int N, WeightType kType, int kGroup, bool kZeros, bool kExponents>
[[gnu::always_inline]] static inline void four_bit_tile(const ByteTile& t, const ByteColumn (&columns)[N], float* y) {
  __m512 sums[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  for (int64_t block = 0; block < t.blocks; ++block) {
    __m512i low[N], high[N];
    __m512 low_scales[N], high_scales[N];
    __m512i zeros[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      if (columns[n].next != nullptr) {
        _mm_prefetch(reinterpret_cast<const char*>(columns[n].next + block * kByteLine), _MM_HINT_T0);
      }
      take_apart<kType>(columns[n].weights + block * kByteLine, low[n], high[n]);
      line_scales<kGroup, kExponents>(columns[n], block, low_scales[n], high_scales[n]);
      if constexpr (kZeros) zeros[n] = line_zeros<kGroup>(columns[n], block, t.k);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const ByteBlock& x = t.rows[m * t.blocks + block];
      const __m512i first = load_64(x.values), second = load_64(x.values + 64);
      const __m512i given = corrections_of(x);
      const __m512 scale = _mm512_set1_ps(x.scale);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        __m512i correction = given;
        if constexpr (kZeros) correction = _mm512_mullo_epi32(given, zeros[n]);
        if constexpr (kGroup == 32) {
          const __m512i of_low = _mm512_maskz_mov_epi32(0b0101, correction);
          const __m512i of_high = _mm512_maskz_mov_epi32(0b1010, correction);
          const __m512 dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(of_low, low[n], first));
          const __m512 more = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(of_high, high[n], second));
          sums[m][n] = _mm512_fmadd_ps(dots, _mm512_mul_ps(low_scales[n], scale), sums[m][n]);
          sums[m][n] = _mm512_fmadd_ps(more, _mm512_mul_ps(high_scales[n], scale), sums[m][n]);
        } else {
          const __m512i dots = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(correction, low[n], first), high[n], second);
          const __m512 scales = _mm512_mul_ps(low_scales[n], scale);
          sums[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scales, sums[m][n]);
        }
      }
    }
  }
  store_sums<M, N>(sums, y);
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
