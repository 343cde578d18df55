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

  int8_t values[kColumns];  // in the order in which the variant takes a line of packed weights apart (byte_position)
  // Of the values of every 32 columns (sum_position), times what the weights' numbers are read too large by, or times 1
  // where zero points say it, negated; then zeros.
  int32_t corrections[8];
  float scale;
  int32_t unused[7];  // a block is three cache lines
};
static_assert(sizeof(ByteBlock) == 192);

[[gnu::always_inline]] constexpr int64_t byte_blocks(int64_t columns) {
  return (columns + ByteBlock::kColumns - 1) / ByteBlock::kColumns;
}

// Most weight rows of a tile, and floats that Product::unpacked must have for the scales of each: a line of groups
// more.
inline constexpr int64_t kByteTileColumns = 4;
[[gnu::always_inline]] constexpr int64_t widened_scales(int64_t groups) { return groups + 4; }

// What numbers are read as more than they are, in steps of a mxfp4 number's half; of four bits, without zero points.
[[gnu::always_inline]] constexpr int32_t excess_of(WeightType type) {
  return type == WeightType::kInt8 ? 128 : type == WeightType::kMxfp4 ? 12 : 8;
}

inline constexpr int64_t kByteLine = 64;  // bytes of a line of packed weights

// M activation rows that are multiplied by some weight rows.
struct ByteTile {
  const ByteBlock* rows;  // the first activation row's
  int64_t blocks;         // of a row
  int64_t k;
};

// A weight row of a tile.
struct ByteColumn {
  const uint8_t* weights;    // packed
  const uint8_t* next;       // bytes to be fetched meanwhile, or null
  const uint8_t* zeros;      // of the row's groups, or null
  const uint8_t* exponents;  // plain ones of the row's groups, or null
  const float* scales;       // of the row's groups, if there are no exponents; of int8 its one
};

}  // namespace moe_ext::cpu
