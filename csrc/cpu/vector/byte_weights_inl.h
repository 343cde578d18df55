// int8 weights, and without AVX2 fp8 with a scale a row, multiplied by a few activation rows as they lie: the tiles of
// tile_inl.h read them as they read bfloat16 ones, and nothing is stored. The numbers and their order are those of
// unpacked rows: the same bits.
#pragma once

#include "cpu/vector/dot.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#include "cpu/vector/tile_inl.h"
#include "cpu/vector/unpack_inl.h"
#include "cpu/vector/vec.h"
#if defined(MOE_EXT_ISA_AVX2)
#include "cpu/vector/unpack_avx2_inl.h"
#endif

namespace moe_ext::cpu::MOE_EXT_ISA {

struct Int8 {
  int8_t bits;
};
struct Float8 {
  uint8_t bits;
};

using cpu::to_float;  // of other types, which these would hide
static inline float to_float(Int8 value) { return value.bits; }
static inline float to_float(Float8 value) { return kE4M3.of[value.bits]; }

static inline Vec load_bytes(const Int8* p) {
#if defined(MOE_EXT_ISA_AVX2)
  return floats_of_int8(&p->bits);
#else
  Vec r;
  for (int i = 0; i < Vec::kLanes; ++i) r.v[i] = to_float(p[i]);
  return r;
#endif
}

#if !defined(MOE_EXT_ISA_AVX2)  // which has packed_tile_avx2_inl.h
static inline Vec load_bytes(const Float8* p) {
  Vec r;
  for (int i = 0; i < Vec::kLanes; ++i) r.v[i] = to_float(p[i]);
  return r;
}
#endif

template <typename W>
struct DotOfBytes {
  using Row = Vec;
  using Weight = Vec;
  static constexpr int kStep = Vec::kLanes;
  static Row load_row(const float* p) { return Vec::load(p); }
  static Weight load_weight(const W* p) { return load_bytes(p); }
  static Vec add(Vec sum, Row a, Weight b) { return fma(a, b, sum); }
};
template <>
struct DotOf<float, Int8> : DotOfBytes<Int8> {};
#if !defined(MOE_EXT_ISA_AVX2)
template <>
struct DotOf<float, Float8> : DotOfBytes<Float8> {};
#endif

// M activation rows, in chunks of kChunk columns; a few weight rows from end to end, while the next few are fetched.
template <int M, typename W, int64_t kChunk>
static void few_rows_of_bytes(const Product& p) {
  const int64_t stride = p.quantised->row_bytes;
  Block<float, W>{p}.template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const auto row_at = [&](const WeightRows& weights, int64_t row) {
      return reinterpret_cast<const W*>(QuantisedRow::at(*p.quantised, weights, row).bytes);
    };
    const bool last = n + 2 * kWidth > p.columns;
    const W* weights = row_at(p.weights, n);
    const W* next = !last                             ? row_at(p.weights, n + kWidth)
                    : p.next_weights.first == nullptr ? nullptr
                                                      : row_at(p.next_weights, 0);
    for (int64_t first = 0; first < p.k; first += kChunk) {
      const int64_t columns = p.k - first < kChunk ? p.k - first : kChunk;
      Fetch<W> fetch;
      if (next != nullptr) fetch = {next + first, (columns + kLineBytes - 1) / kLineBytes};
      dot_tile<M, kWidth>(static_cast<const float*>(p.rows) + first, p.k, weights + first, stride, columns, first > 0,
                          p.y + n, fetch, NoRowAhead());
    }
  });
}

// Whether this is such a product; then it is computed. Sums are not multiplied by their scales yet.
template <int64_t kChunk>
static bool multiply_few_rows_of_bytes(const Product& p) {
  const WeightFormat& format = p.quantised->format;
  const bool bytes = format.type == WeightType::kInt8 || format.type == WeightType::kFloat8;
  if (!bytes || format.group_size != 0 || p.row_count > kTileRows) return false;
  Block<float, Int8>::template with_height<kTileRows>(p.row_count, [&](auto height) {
    constexpr int kHeight = decltype(height)::value;
    if (format.type == WeightType::kInt8) {
      few_rows_of_bytes<kHeight, Int8, kChunk>(p);
#if !defined(MOE_EXT_ISA_AVX2)
    } else {
      few_rows_of_bytes<kHeight, Float8, kChunk>(p);
#endif
    }
  });
  return true;
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
