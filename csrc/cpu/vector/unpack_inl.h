// Quantised weights to float32, some columns of a row at a time.
//
// Where a row has one scale the numbers come as they are, exact in float32 and bfloat16, and the finished sums are
// multiplied by it. Elsewhere they come multiplied by their scale, rounded once. kInt4 and kMxfp4 look their number up
// in a table of 16, multiplied once a group.
#pragma once

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kPackedLineColumns = 128;  // of four bits, in a cache line: see packing.cpp
constexpr int64_t kPackedSpan = 32;          // neighbouring columns of the same shift; no group is smaller

constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

struct E4M3Values {
  float of[256];
};

// Sign, four bits of exponent, three of mantissa; no infinities.
constexpr E4M3Values e4m3_values() {
  E4M3Values values{};
  for (int bits = 0; bits < 256; ++bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float value = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) / 1024.0f;
    for (int i = 0; i < (exponent == 0 ? 1 : exponent); ++i) value *= 2.0f;
    if ((bits & 127) == 127) value = __builtin_nanf("");
    values.of[bits] = bits < 128 ? value : -value;
  }
  return values;
}
constexpr E4M3Values kE4M3 = e4m3_values();

// Of so many columns from a row's first.
static inline int64_t packed_bytes(const WeightFormat& format, int64_t columns) {
  return format.type == WeightType::kInt4 || format.type == WeightType::kMxfp4 ? columns / 2 : columns;
}

static inline float scale_at(ScaleType type, const void* scales, int64_t index) {
  switch (type) {
    case ScaleType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(scales)[index]);
    case ScaleType::kFloat16:
      return to_float(static_cast<const Float16*>(scales)[index]);
    case ScaleType::kE8M0: {
      const uint32_t exponent = static_cast<const uint8_t*>(scales)[index];
      if (exponent == 0) return float_of_bits(0x00400000u);  // 2^-127 has no exponent field
      return float_of_bits(exponent == 255 ? 0x7fc00000u : exponent << 23);
    }
    case ScaleType::kFloat32:
      break;
  }
  return static_cast<const float*>(scales)[index];
}

// A row of quantised weights.
struct QuantisedRow {
  const uint8_t* bytes;
  const void* scales;    // of the expert
  int64_t first_scale;   // of the row
  const uint8_t* zeros;  // of the row, or null

  [[gnu::always_inline]] static QuantisedRow at(const QuantisedRows& q, const WeightRows& weights, int64_t n) {
    const bool first = n < weights.split;
    const int64_t number = first ? weights.first_row + n : weights.second_row + n - weights.split;
    const int64_t from = first ? n : n - weights.split;
    const int64_t scale = (q.format.row_blocks ? number / WeightFormat::kRowBlock : number) * q.groups;
    return {static_cast<const uint8_t*>(first ? weights.first : weights.second) + from * q.row_bytes, weights.scales,
            scale, weights.zeros == nullptr ? nullptr : weights.zeros + scale};
  }
  float scale(const WeightFormat& format, int64_t group) const {
    return scale_at(format.scales, scales, first_scale + group);
  }
};

// What the sum of a whole row is multiplied by, where the weights are not.
static inline float row_scale(const WeightFormat& format, const QuantisedRow& row) {
  return format.group_size == 0 ? row.scale(format, 0) : 1.0f;
}

// The 16 weights that four bits can be, in a group.
static inline void four_bit_weights(const WeightFormat& format, const QuantisedRow& row, int64_t group, float* values) {
  const float scale = row.scale(format, group);
  if (format.type == WeightType::kMxfp4) {
    for (int i = 0; i < 16; ++i) values[i] = kE2M1[i] * scale;
  } else {
    const int zero = row.zeros == nullptr ? 8 : row.zeros[group];
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i - zero) * scale;
  }
}

static inline void unpack_four_bits(const WeightFormat& format, const QuantisedRow& row, int64_t first, int64_t count,
                                    float* out) {
  float values[16];
  int64_t group = -1;
  for (int64_t span = 0; span < count; span += kPackedSpan) {
    const int64_t column = first + span, in_line = column % kPackedLineColumns / kPackedSpan;
    if (column / format.group_size != group) {
      group = column / format.group_size;
      four_bit_weights(format, row, group, values);
    }
    // Four columns share a word of two bytes.
    const uint8_t* bytes = row.bytes + column / kPackedLineColumns * 64 + in_line / 2;
    const int shift = static_cast<int>(in_line % 2 * 4);
    const int64_t columns = count - span < kPackedSpan ? count - span : kPackedSpan;
    for (int64_t j = 0; j < columns; ++j) out[span + j] = values[bytes[2 * j] >> shift & 15];
  }
}

// Columns [first, first + count) of a row; `first` is a multiple of kUnpackedColumns.
static inline void unpack(const WeightFormat& format, const QuantisedRow& row, int64_t first, int64_t count,
                          float* out) {
  switch (format.type) {
    case WeightType::kInt8:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int8_t>(row.bytes[first + i]);
      return;
    case WeightType::kFloat8:
      for (int64_t i = 0; i < count; ++i) out[i] = kE4M3.of[row.bytes[first + i]];
      if (format.group_size == 0) return;
      for (int64_t i = 0; i < count; i += format.group_size) {
        const float scale = row.scale(format, (first + i) / format.group_size);
        const int64_t end = i + format.group_size < count ? i + format.group_size : count;
        for (int64_t j = i; j < end; ++j) out[j] *= scale;
      }
      return;
    case WeightType::kInt4:
    case WeightType::kMxfp4:
      return unpack_four_bits(format, row, first, count, out);
    case WeightType::kPlain:
      return;
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
