// The kinds of packed weights, as types, and the scales of a few rows of them over a chunk of columns; AVX-512.
#pragma once

#include <immintrin.h>

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/unpack_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// Groups of 32 << kShift columns; kBlocks: a scale is of as many rows, too.
template <WeightType kTypeOf, int kShift, bool kBlocks = false>
struct Packing {
  static constexpr WeightType kType = kTypeOf;
  static constexpr bool kFourBits = kType == WeightType::kInt4 || kType == WeightType::kMxfp4;
  static constexpr int kGroupShift = kShift;
  static constexpr bool kRowBlocks = kBlocks;
};
using Int8Packing = Packing<WeightType::kInt8, 0>;
using Mxfp4Packing = Packing<WeightType::kMxfp4, 0>;
template <int kShift>
using Int4Packing = Packing<WeightType::kInt4, kShift>;
using Float8Packing = Packing<WeightType::kFloat8, 0>;
using Float8BlockPacking = Packing<WeightType::kFloat8, 2, true>;

// Calls f(packing) for the one that a format is.
template <typename F>
static inline void with_packing(const WeightFormat& format, const F& f) {
  switch (format.type) {
    case WeightType::kInt8:
      return f(Int8Packing());
    case WeightType::kMxfp4:
      return f(Mxfp4Packing());
    case WeightType::kFloat8:
      return format.row_blocks ? f(Float8BlockPacking()) : f(Float8Packing());
    case WeightType::kInt4:
      return format.group_size == 32   ? f(Int4Packing<0>())
             : format.group_size == 64 ? f(Int4Packing<1>())
                                       : f(Int4Packing<2>());
    case WeightType::kPlain:
      return;
  }
}

// The scales of N rows of weights over a chunk of columns, read where they lie. (Tables of them in memory would be
// written and read back at once, which stops a tile until all before it has ended.)
template <int N>
struct TileScales {
  static constexpr int kLeastExponent = 2, kMostExponent = 252;

  ScaleType type;
  const char* scales[N];    // of the chunk's first group
  const uint8_t* zeros[N];  // the same, of int4 that has them, or null

  // Of N rows over `count` columns from `first` on. False if what is made of them cannot hold them: row blocks that
  // differ among the rows, or exponents whose weights bfloat16 does not have. Fetches those of N rows at `later`,
  // unless it is null.
  template <typename P>
  bool find(const QuantisedRows& q, const QuantisedRow (&rows)[N], int64_t first, int64_t count, const char* later) {
    if constexpr (P::kGroupShift == 0 && !P::kFourBits) return true;
    constexpr int64_t kGroup = kPackedSpan << P::kGroupShift;
    const int64_t group = first / kGroup, groups = (count + kGroup - 1) / kGroup;
    type = q.format.scales;
    for (int n = 0; n < N; ++n) {
      if (P::kRowBlocks && rows[n].first_scale != rows[0].first_scale) return false;
      scales[n] = place<P>(q, rows[n], first);
      zeros[n] = rows[n].zeros == nullptr ? nullptr : rows[n].zeros + group;
      if (later != nullptr) fetch(later + n * q.groups * q.format.scale_bytes(), groups * q.format.scale_bytes());
      if (P::kType == WeightType::kMxfp4 && !usual_exponents(scales[n], groups)) return false;
    }
    return true;
  }

  // Where the scales of the chunk at `first` lie.
  template <typename P>
  static const char* place(const QuantisedRows& q, const QuantisedRow& row, int64_t first) {
    const int64_t group = first / (kPackedSpan << P::kGroupShift);
    return static_cast<const char*>(row.scales) + (row.first_scale + group) * q.format.scale_bytes();
  }

  // A group's of row n, as float32.
  Vec scale(int n, int64_t group) const {
    if (type == ScaleType::kBFloat16) {
      const __m512i twice = _mm512_set1_epi16(reinterpret_cast<const int16_t*>(scales[n])[group]);
      return {_mm512_castsi512_ps(_mm512_and_si512(twice, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    if (type == ScaleType::kFloat16) {
      return {_mm512_cvtph_ps(_mm256_set1_epi16(reinterpret_cast<const int16_t*>(scales[n])[group]))};
    }
    return Vec::all(reinterpret_cast<const float*>(scales[n])[group]);
  }
  // Of mxfp4.
  int exponent(int n, int64_t group) const { return static_cast<uint8_t>(scales[n][group]); }

 private:
  static void fetch(const char* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
  }

  static bool usual_exponents(const char* exponents, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
      const auto which = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
      const __m128i above = _mm_sub_epi8(_mm_maskz_loadu_epi8(which, exponents + i), _mm_set1_epi8(kLeastExponent));
      const __m128i most = _mm_set1_epi8(static_cast<char>(kMostExponent - kLeastExponent));
      if (_mm_mask_cmpgt_epu8_mask(which, above, most)) return false;
    }
    return true;
  }
};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
