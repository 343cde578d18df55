// Tiles of ByteBlocks and packed weights (byte_rows_inl.h) in plain C++.
#pragma once

#include "cpu/numeric.h"
#include "cpu/vector/byte_rows.h"
#include "cpu/vector/loops.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kFetchedBytes = 2048;  // ahead, at least

// Weight rows of a tile.
constexpr int byte_tile_columns(int, WeightType, int) { return 1; }

// A block's values and sums, column by column.
constexpr int64_t byte_position(bool, int64_t column) { return column; }
constexpr int64_t sum_position(int64_t span) { return span; }

template <int M, int N>
static void int8_tile(const ByteTile& t, const ByteColumn (&column)[1], float* y) {
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (int64_t block = 0; block < t.blocks; ++block) {
      const ByteBlock& x = t.rows[m * t.blocks + block];
      const int64_t first = block * ByteBlock::kColumns;
      const int64_t columns = t.k - first < ByteBlock::kColumns ? t.k - first : ByteBlock::kColumns;
      int32_t whole = 0;
      for (int64_t i = 0; i < columns; ++i) whole += static_cast<int8_t>(column[0].weights[first + i]) * x.values[i];
      sum += static_cast<float>(whole) * x.scale;
    }
    y[m * kBlockColumns] = sum * column[0].scales[0];
  }
}

template <int M, int N, WeightType kType, int kGroup, bool kZeros, bool kExponents>
static void four_bit_tile(const ByteTile& t, const ByteColumn (&column)[1], float* y) {
  constexpr int kTwice[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (int64_t block = 0; block < t.blocks; ++block) {
      const ByteBlock& x = t.rows[m * t.blocks + block];
      for (int64_t span = 0; span < 4; ++span) {
        const int64_t first = block * ByteBlock::kColumns + 32 * span;
        if (first >= t.k) break;
        int32_t whole = 0;
        for (int64_t word = 0; word < 32; ++word) {
          const int number = column[0].weights[block * kByteLine + 2 * word + span / 2] >> (span % 2 * 4) & 15;
          whole +=
              (kType == WeightType::kMxfp4 ? kTwice[number] : number) * x.values[byte_position(true, 32 * span + word)];
        }
        const int32_t correction = x.corrections[sum_position(span)];
        whole += kZeros ? column[0].zeros[first / kGroup] * correction : correction;
        const float scale = kExponents ? float_of_bits(uint32_t{column[0].exponents[first / kGroup]} << 23)
                                       : column[0].scales[first / kGroup];
        sum += static_cast<float>(whole) * (scale * x.scale);
      }
    }
    y[m * kBlockColumns] = sum;
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
