// Products of activations and weights that both are whole numbers: int8, int4 and mxfp4 weights by rows of ByteBlock.
//
// A weight's number times an activation's, summed over the columns of a scale in integers, exactly; times the weights'
// scale and the block's in float32, blocks in order. So an output's bits depend on its row and its weights alone.
// Instructions that multiply bytes take one operand without sign: numbers are read as more than they are, and the
// excess times the activations' sum, which the block holds, is taken away.
#pragma once

#include <string.h>

#if defined(MOE_EXT_BYTE_VNNI)
#include "cpu/vector/byte_tile_vnni_inl.h"
#elif defined(MOE_EXT_ISA_AVX2) || defined(MOE_EXT_ISA_AVX512)
#include "cpu/vector/byte_tile_avx2_inl.h"
#else
#include "cpu/vector/byte_tile_portable_inl.h"
#endif
#include "cpu/numeric.h"
#include "cpu/vector/byte_rows.h"
#include "cpu/vector/conversion_inl.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/unpack_inl.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int kByteTileRows = 4;  // activation rows whose products share a line that has come apart

// ---- activations

template <bool kFourBits>
static void quantise_block(const float* row, int64_t columns, int32_t excess, float unit, ByteBlock* block) {
  float x[ByteBlock::kColumns];
  memcpy(x, row, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t i = columns; i < ByteBlock::kColumns; ++i) x[i] = 0.0f;
  uint32_t largest = 0;  // bits of magnitudes order as they do; infinity and NaN are the largest
  for (const float value : x) {
    const uint32_t magnitude = bits_of_float(value) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7f800000u;
  const float inverse = 127.0f / float_of_bits(finite ? largest : 0x7f800000u);
  const bool any = finite && bits_of_float(inverse) < 0x7f800000u;  // not 0, nor so small that this is beyond float32
  block->scale = finite ? (any ? float_of_bits(largest) / 127.0f : 0.0f) : float_of_bits(0x7fc00000u);
  block->scale *= unit;
  const float factor = any ? inverse : 0.0f;
  // Loops that compilers turn into vectors: hence what is in between.
  int32_t numbers[ByteBlock::kColumns];
  for (int64_t i = 0; i < ByteBlock::kColumns; ++i) {
    constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: the sum's last bit is 1
    const float value = finite ? x[i] : 0.0f;
    numbers[i] = static_cast<int32_t>(bits_of_float(value * factor + kWhole) - bits_of_float(kWhole));
  }
  int8_t bytes[ByteBlock::kColumns];
  for (int64_t i = 0; i < ByteBlock::kColumns; ++i) bytes[i] = static_cast<int8_t>(numbers[i]);
  for (int64_t i = 0; i < ByteBlock::kColumns; i += 8)
    memcpy(block->values + byte_position(kFourBits, i), bytes + i, 8);
  for (int32_t& correction : block->corrections) correction = 0;
  for (int64_t span = 0; span < 4; ++span) {
    int32_t sum = 0;
    for (int64_t i = 0; i < 32; ++i) sum += numbers[32 * span + i];
    block->corrections[sum_position(span)] = -sum * excess;
  }
}

// A row of k floats as byte_blocks(k) blocks.
static void quantise(WeightType type, bool zeros, const float* row, int64_t k, ByteBlock* blocks) {
  for (int64_t first = 0; first < k; first += ByteBlock::kColumns) {
    const int64_t columns = k - first < ByteBlock::kColumns ? k - first : ByteBlock::kColumns;
    ByteBlock* block = blocks + first / ByteBlock::kColumns;
    if (has_four_bits(type)) {
      quantise_block<true>(row + first, columns, zeros ? 1 : excess_of(type), type == WeightType::kMxfp4 ? 0.5f : 1.0f,
                           block);
    } else {
      quantise_block<false>(row + first, columns, excess_of(type), 1.0f, block);
    }
  }
}

// ---- weights

// `count` scales of a layer, from `first` on, as floats.
static inline void widen_scales(ScaleType type, const void* scales, int64_t first, int64_t count, float* floats) {
  switch (type) {
    case ScaleType::kFloat32:
      widen(DType::kFloat32, static_cast<const float*>(scales) + first, floats, count);
      break;
    case ScaleType::kBFloat16:
      widen(DType::kBFloat16, static_cast<const BFloat16*>(scales) + first, floats, count);
      break;
    case ScaleType::kFloat16:
      widen(DType::kFloat16, static_cast<const Float16*>(scales) + first, floats, count);
      break;
    case ScaleType::kE8M0: {
      const uint8_t* exponents = static_cast<const uint8_t*>(scales) + first;
      for (int64_t g = 0; g < count; ++g) {
        const uint32_t bits = exponents[g] == 0 ? 0x00400000u : uint32_t{exponents[g]} << 23;
        floats[g] = float_of_bits(exponents[g] == 255 ? 0x7fc00000u : bits);
      }
      break;
    }
  }
}

// Whether every one of these exponents, shifted, is a float's bits.
static inline bool plain_exponents(const uint8_t* exponents, int64_t count) {
  uint8_t special = 0;
  for (int64_t g = 0; g < count; ++g) special |= static_cast<uint8_t>(static_cast<uint8_t>(exponents[g] + 1) < 2);
  return special == 0;
}

// ---- products

// y of M activation rows, whose ByteBlocks begin at `rows`, and of N weight rows of one kind that follow each other
// from n on. `scales` has room for those of N rows.
template <int M, int N, WeightType kType, int kGroup, bool kZeros, typename Fetched>
static void multiply_byte_tile(const Product& p, const ByteBlock* rows, int64_t n, const Fetched& fetched,
                               float* scales, float* y) {
  const QuantisedRows& q = *p.quantised;
  const QuantisedRow first = QuantisedRow::at(q, p.weights, n);
  const bool whole = p.k % ByteBlock::kColumns == 0;  // then lines have the scales of all their columns
  bool plain = false;
  const uint8_t* exponents = nullptr;
  if constexpr (kType == WeightType::kMxfp4) {
    exponents = static_cast<const uint8_t*>(first.scales) + first.first_scale;
    plain = whole && plain_exponents(exponents, N * q.groups);
  }
  const int64_t stride = whole ? q.groups : widened_scales(q.groups);
  ByteColumn columns[N];
  for (int i = 0; i < N; ++i) {
    columns[i].weights = first.bytes + i * q.row_bytes;
    columns[i].next = fetched(n + i);
    columns[i].zeros = kZeros ? first.zeros + i * q.groups : nullptr;
    columns[i].exponents = plain ? exponents + i * q.groups : nullptr;
    columns[i].scales = scales + i * stride;
  }
  if (whole && !plain) {
    widen_scales(q.format.scales, first.scales, first.first_scale, N * q.groups, scales);
  } else if (!plain) {
    for (int64_t i = 0; i < N; ++i) {
      widen_scales(q.format.scales, first.scales, first.first_scale + i * q.groups, q.groups, scales + i * stride);
      for (int64_t g = q.groups; g < stride; ++g) scales[i * stride + g] = 0.0f;
    }
  }
  const ByteTile tile{rows, byte_blocks(p.k), p.k};
  if constexpr (kType == WeightType::kInt8) {
    int8_tile<M, N>(tile, columns, y + n);
  } else if (plain) {
    four_bit_tile<M, N, kType, kGroup, kZeros, true>(tile, columns, y + n);
  } else {
    four_bit_tile<M, N, kType, kGroup, kZeros, false>(tile, columns, y + n);
  }
}

// y of M activation rows and all weight rows.
template <int M, WeightType kType, int kGroup, bool kZeros>
static void multiply_byte_rows(const Product& p, const ByteBlock* rows, float* y) {
  constexpr int kColumns = byte_tile_columns(M, kType, kGroup);
  static_assert(kColumns <= kByteTileColumns, "p.unpacked has room for the scales of so many rows");
  const QuantisedRows& q = *p.quantised;
  float* scales = static_cast<float*>(p.unpacked);
  // What is fetched meanwhile: as many rows on as make kFetchedBytes, for a short row is over before the next is there.
  const int64_t distance = (kFetchedBytes + q.row_bytes - 1) / q.row_bytes;
  const int64_t ahead = distance < kColumns ? kColumns : distance;
  const WeightRows& following = p.next_weights;
  const auto fetched = [&](int64_t n) -> const uint8_t* {
    n += ahead;
    if (n < p.columns) return QuantisedRow::at(q, p.weights, n).bytes;
    n -= p.columns;
    const void* rows = n < following.split ? following.first : following.second;
    return rows == nullptr ? nullptr : QuantisedRow::at(q, following, n).bytes;
  };
  const int64_t split = p.weights.split < p.columns ? p.weights.split : p.columns;
  for (int64_t n = 0; n < p.columns;) {  // no tile has rows from both sides of the split
    if (kColumns > 1 && n + kColumns <= (n < split ? split : p.columns)) {
      multiply_byte_tile<M, kColumns, kType, kGroup, kZeros>(p, rows, n, fetched, scales, y);
      n += kColumns;
    } else {
      multiply_byte_tile<M, 1, kType, kGroup, kZeros>(p, rows, n, fetched, scales, y);
      ++n;
    }
  }
}

// y of a product whose rows are ByteBlocks. Activation rows by fours, which stay in L1, against all weight rows of the
// block, which stay in L2.
template <WeightType kType, int kGroup = 128, bool kZeros = false>
static void multiply_bytes_of(const Product& p) {
  for (int64_t r = 0; r < p.row_count; r += kByteTileRows) {
    const ByteBlock* rows = static_cast<const ByteBlock*>(p.rows) + r * byte_blocks(p.k);
    float* y = p.y + r * kBlockColumns;
    const int64_t count = p.row_count - r;
    if (count == 1) multiply_byte_rows<1, kType, kGroup, kZeros>(p, rows, y);
    if (count == 2) multiply_byte_rows<2, kType, kGroup, kZeros>(p, rows, y);
    if (count == 3) multiply_byte_rows<3, kType, kGroup, kZeros>(p, rows, y);
    if (count >= 4) multiply_byte_rows<4, kType, kGroup, kZeros>(p, rows, y);
  }
}

static void multiply_bytes(const Product& p) {
  constexpr WeightType kInt4 = WeightType::kInt4;
  const WeightFormat& format = p.quantised->format;
  const bool zeros = p.weights.zeros != nullptr;
  if (format.type == WeightType::kInt8) return multiply_bytes_of<WeightType::kInt8>(p);
  if (format.type == WeightType::kMxfp4) return multiply_bytes_of<WeightType::kMxfp4, 32>(p);
  if (format.group_size == 32) return zeros ? multiply_bytes_of<kInt4, 32, true>(p) : multiply_bytes_of<kInt4, 32>(p);
  if (format.group_size == 64) return zeros ? multiply_bytes_of<kInt4, 64, true>(p) : multiply_bytes_of<kInt4, 64>(p);
  return zeros ? multiply_bytes_of<kInt4, 128, true>(p) : multiply_bytes_of<kInt4>(p);
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
