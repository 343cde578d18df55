// Activations as whole numbers of eight bits: rows that Loops::quantise writes and Loops::multiply takes with int8,
// int4 and mxfp4 weights (LayerParams::int8_activations).
#pragma once

#include <stdint.h>

#include "moe.h"

namespace moe_ext::cpu {

// 128 columns of a row: x = scale * value, rounded to nearest, |value| <= 127; the scale is halved for mxfp4 weights,
// whose numbers are read twice as large. Where one of them is no finite number the scale is NaN, and all values are 0.
// Columns beyond the row's are 0.
struct ByteBlock {
  static constexpr int64_t kColumns = 128;

  int8_t values[kColumns];  // in the order in which a line of packed weights comes apart (byte_position)
  // With four-bit weights, whose numbers are read as 0 to 15 or 24: of the values of columns [0, 32), [64, 96), [32,
  // 64) and [96, 128) times what those numbers are too large by, or times 1 where zero points say it; then zeros.
  int32_t sums[8];
  float scale;
  int32_t unused[7];  // a block is three cache lines
};
static_assert(sizeof(ByteBlock) == 192);

[[gnu::always_inline]] constexpr int64_t byte_blocks(int64_t columns) {
  return (columns + ByteBlock::kColumns - 1) / ByteBlock::kColumns;
}

// Where the value of a block's column lies. A line of four-bit weights has columns j, j + 32, j + 64 and j + 96 in 16
// bits (packing.cpp); 32 bytes of it, even bytes first in each half and then the odd ones, are 32 columns in their low
// bits and 32 in their high ones.
[[gnu::always_inline]] constexpr int64_t byte_position(bool four_bits, int64_t column) {
  if (!four_bits) return column;
  const int64_t span = column / 32, word = column % 32;
  return (word / 16 * 2 + span % 2) * 32 + word % 16 / 8 * 16 + span / 2 * 8 + word % 8;
}

// Where the sum of columns [32 span, 32 span + 32) lies.
[[gnu::always_inline]] constexpr int64_t sum_position(int64_t span) { return span % 2 * 2 + span / 2; }

// What four-bit numbers are read as more than they are, in steps of a mxfp4 number's half; without zero points.
[[gnu::always_inline]] constexpr int32_t excess_of(WeightType type) { return type == WeightType::kMxfp4 ? 12 : 8; }

}  // namespace moe_ext::cpu
