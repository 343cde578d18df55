// Tiles of ByteBlocks and packed weights (byte_rows_inl.h) with AVX2.
//
// 32 products are one instruction (vpmaddubsw), whose one operand has no sign: of int8 weights the magnitude, and the
// activation takes the sign; four-bit numbers are read as 0 to 15, or mxfp4's twice, plus 12, from a table. Sums of
// four such products fit 16 bits, of four-bit numbers of eight. A line of 128 four-bit weights takes 8 to 15
// instructions for itself, and 12 to 14 for an activation row. Scales that are exponents become floats where they lie.
#pragma once

#include <immintrin.h>

#include "cpu/numeric.h"
#include "cpu/vector/byte_rows.h"
#include "cpu/vector/loops.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kFetchedBytes = 2048;  // ahead, at least

// Weight rows of a tile.
constexpr int byte_tile_columns(int, WeightType, int) { return 1; }

// Where the value of a block's column lies. A line of four-bit weights has columns j, j + 32, j + 64 and j + 96 in 16
// bits (packing.cpp); 32 bytes of it, even bytes first in each half and then the odd ones, are 32 columns in their low
// bits and 32 in their high ones.
[[gnu::always_inline]] constexpr int64_t byte_position(bool four_bits, int64_t column) {
  if (!four_bits) return column;
  const int64_t span = column / 32, word = column % 32;
  return (word / 16 * 2 + span % 2) * 32 + word % 16 / 8 * 16 + span / 2 * 8 + word % 8;
}

// Where the sum of columns [32 span, 32 span + 32) lies: those of spans 0, 2, 1, 3.
[[gnu::always_inline]] constexpr int64_t sum_position(int64_t span) { return span % 2 * 2 + span / 2; }

static inline __m256i load_32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Lanes in a fixed order.
static inline float sum_of_lanes(__m256 sum) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// Sums of four neighbouring products; of a in [0, 255], b in [-127, 127].
static inline __m256i dot_4(__m256i a, __m256i b) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
}

// The same of four-bit numbers, a in [0, 24]: the sums of eight products fit 16 bits.
using Line = const __m256i (&)[4];

static inline __m256i pairs_4(__m256i a, __m256i b, __m256i c, __m256i d) {
  return _mm256_add_epi16(_mm256_maddubs_epi16(a, b), _mm256_maddubs_epi16(c, d));
}

// Of all.
static inline __m256i dot_16(Line a, Line b) {
  const __m256i sums = _mm256_add_epi16(pairs_4(a[0], b[0], a[1], b[1]), pairs_4(a[2], b[2], a[3], b[3]));
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

// By spans of 32 columns, each in two lanes: 0, 2, 1, 3, 0, 2, 1, 3.
static inline __m256i dot_of_spans(Line a, Line b) {
  const __m256i sums = _mm256_hadd_epi16(pairs_4(a[0], b[0], a[2], b[2]), pairs_4(a[1], b[1], a[3], b[3]));
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

template <int M, int N>
[[gnu::always_inline]] static inline void int8_tile(const ByteTile& t, const ByteColumn (&columns)[N], float* y) {
  const ByteColumn& column = columns[0];
  __m256 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_ps();
  const int64_t lines = (t.k + kByteLine - 1) / kByteLine;
  for (int64_t block = 0; block < t.blocks; ++block) {
    const int64_t here = lines - 2 * block < 2 ? 1 : 2;  // of the block's lines, those that the row has
    __m256i whole[M];
    for (int m = 0; m < M; ++m) whole[m] = _mm256_setzero_si256();
    for (int64_t line = 0; line < here; ++line) {
      const uint8_t* bytes = column.weights + (2 * block + line) * kByteLine;
      if (column.next != nullptr)
        _mm_prefetch(reinterpret_cast<const char*>(column.next + (bytes - column.weights)), _MM_HINT_T0);
      const __m256i first = load_32(bytes), second = load_32(bytes + 32);
      const __m256i first_size = _mm256_abs_epi8(first), second_size = _mm256_abs_epi8(second);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const int8_t* x = t.rows[m * t.blocks + block].values + line * kByteLine;
        const __m256i a = dot_4(first_size, _mm256_sign_epi8(load_32(x), first));
        const __m256i b = dot_4(second_size, _mm256_sign_epi8(load_32(x + 32), second));
        whole[m] = _mm256_add_epi32(whole[m], _mm256_add_epi32(a, b));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const __m256 scale = _mm256_broadcast_ss(&t.rows[m * t.blocks + block].scale);
      sums[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[m]), scale, sums[m]);
    }
  }
  for (int m = 0; m < M; ++m) y[m * kBlockColumns] = sum_of_lanes(sums[m]) * column.scales[0];
}

// A line of four-bit weights as numbers without sign: 0 and 2 columns of the low bits, 1 and 3 of the high ones.
template <WeightType kType>
[[gnu::always_inline]] static inline void take_apart(const uint8_t* line, __m256i (&numbers)[4]) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i pairs = _mm256_shuffle_epi8(load_32(line + 32 * half), order);
    numbers[2 * half] = _mm256_and_si256(pairs, low);
    numbers[2 * half + 1] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low);
  }
  if constexpr (kType == WeightType::kMxfp4) {  // twice the number, plus 12
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) numbers[i] = _mm256_shuffle_epi8(table, numbers[i]);
  }
}

static inline __m256 twice(__m128 half) { return _mm256_set_m128(half, half); }

template <int M, int N, WeightType kType, int kGroup, bool kZeros, bool kExponents>
[[gnu::always_inline]] static inline void four_bit_tile(const ByteTile& t, const ByteColumn (&columns)[N], float* y) {
  const ByteColumn& column = columns[0];
  __m256 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_ps();
  constexpr int kGroups = static_cast<int>(ByteBlock::kColumns) / kGroup;  // of a line
  for (int64_t block = 0; block < t.blocks; ++block) {
    const uint8_t* line = column.weights + block * kByteLine;
    if (column.next != nullptr)
      _mm_prefetch(reinterpret_cast<const char*>(column.next + block * kByteLine), _MM_HINT_T0);
    __m256i numbers[4];
    take_apart<kType>(line, numbers);
    __m256 of_lanes;  // scales
    if constexpr (kExponents) {
      int32_t four;
      memcpy(&four, column.exponents + block * kGroups, sizeof(four));
      const __m256i last_bytes =
          _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 2, -1, -1, -1, 1, -1, -1, -1, 3));
      of_lanes = _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_shuffle_epi8(_mm256_set1_epi32(four), last_bytes), 1));
    } else if constexpr (kGroup == 128) {
      of_lanes = _mm256_broadcast_ss(column.scales + block);
    } else if constexpr (kGroup == 64) {
      const __m128 two = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(column.scales + block * kGroups)));
      of_lanes = twice(_mm_permute_ps(two, 0b01010000));
    } else {
      of_lanes = twice(_mm_permute_ps(_mm_loadu_ps(column.scales + block * kGroups), 0b11011000));
    }
    __m256i zeros = _mm256_setzero_si256();  // in the order of ByteBlock::corrections
    if constexpr (kZeros) {
      int of_group[kGroups] = {column.zeros[block * kGroups]};
      for (int g = 1; g < kGroups; ++g) {
        if (block * ByteBlock::kColumns + g * kGroup < t.k) of_group[g] = column.zeros[block * kGroups + g];
      }
      const int span_1 = of_group[kGroups / 4], span_2 = of_group[kGroups / 2], span_3 = of_group[kGroups * 3 / 4];
      zeros = _mm256_setr_epi32(of_group[0], span_2, span_1, span_3, 0, 0, 0, 0);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const ByteBlock& x = t.rows[m * t.blocks + block];
      const __m256i values[4] = {load_32(x.values), load_32(x.values + 32), load_32(x.values + 64),
                                 load_32(x.values + 96)};
      __m256i correction = load_32(x.corrections);
      if constexpr (kZeros) correction = _mm256_mullo_epi32(correction, zeros);
      if constexpr (kGroup == 64) correction = _mm256_shuffle_epi32(correction, 0b11011000);
      const __m256i dots = kGroup == 32 ? dot_of_spans(numbers, values) : dot_16(numbers, values);
      const __m256 whole = _mm256_cvtepi32_ps(_mm256_add_epi32(dots, correction));
      sums[m] = _mm256_fmadd_ps(whole, _mm256_mul_ps(of_lanes, _mm256_broadcast_ss(&x.scale)), sums[m]);
    }
  }
  for (int m = 0; m < M; ++m) y[m * kBlockColumns] = sum_of_lanes(sums[m]);
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
