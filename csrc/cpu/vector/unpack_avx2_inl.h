// Quantised weights to float32 with AVX2, a cache line of a row at a time: what unpack_inl.h says, to the bit.
//
// Cost of 8 columns, beside a store: int8 two instructions, int4 three and a quarter, mxfp4 five, fp8 six and a half. A
// word of four four-bit columns is widened once for all of them; in a tile's registers, span by span, it would be
// widened four times, which takes as many instructions as storing the weights in L1 and loading them. int4 leaves a
// number where it is, 4 i bits up: as a float it is 16^i times as large, which its zero and scale take into account,
// exactly. mxfp4 looks the magnitude up among the group's eight, and moves the sign. fp8 becomes float16 with an
// exponent 8 too small; of its codes one is no number.
#pragma once

#include <immintrin.h>

#include "cpu/numeric.h"
#include "cpu/vector/conversion_inl.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/unpack_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int kSpans = static_cast<int>(kPackedLineColumns / kPackedSpan);  // of a line: four

// 8 words as 32-bit numbers.
static inline __m256i load_words(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// The scales and zeros of a row over a chunk of columns.
struct ChunkScales {
  static constexpr int64_t kMost = kUnpackedColumns / kPackedSpan;
  float scales[kMost];
  float zeros[kMost];  // of kInt4

  void load(const WeightFormat& format, const QuantisedRow& row, int64_t first, int64_t count) {
    const int64_t group = first / format.group_size, from = row.first_scale + group;
    const int64_t groups = (count + format.group_size - 1) / format.group_size;
    switch (format.scales) {
      case ScaleType::kFloat32:
        widen(DType::kFloat32, static_cast<const float*>(row.scales) + from, scales, groups);
        break;
      case ScaleType::kBFloat16:
        widen(DType::kBFloat16, static_cast<const BFloat16*>(row.scales) + from, scales, groups);
        break;
      case ScaleType::kFloat16:
        widen(DType::kFloat16, static_cast<const Float16*>(row.scales) + from, scales, groups);
        break;
      case ScaleType::kE8M0:
        for (int64_t g = 0; g < groups; ++g) scales[g] = scale_at(ScaleType::kE8M0, row.scales, from + g);
        break;
    }
    if (format.type != WeightType::kInt4) return;
    for (int64_t g = 0; g < groups; ++g) zeros[g] = row.zeros == nullptr ? 8.0f : row.zeros[group + g];
  }
};

// kExact: a zero times its scale is exact in float32, as it is but for float32 scales: then (q - zero) * scale is one
// fused product and sum, of the same bits.
template <bool kExact>
static inline void unpack_line_int4(const uint8_t* line, const float (&scales)[kSpans], const float (&zeros)[kSpans],
                                    float* out) {
  Vec scale[kSpans], zero[kSpans];
#pragma GCC unroll 4
  for (int i = 0; i < kSpans; ++i) {
    const auto up = static_cast<float>(1 << 4 * i);
    scale[i] = Vec::all(scales[i]) * Vec::all(1.0f / up);
    zero[i] = Vec::all(kExact ? -zeros[i] * scales[i] : zeros[i] * up);
  }
  for (int j = 0; j < kPackedSpan; j += Vec::kLanes) {
    const __m256i words = load_words(line + 2 * j);
#pragma GCC unroll 4
    for (int i = 0; i < kSpans; ++i) {
      const Vec number{_mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15 << 4 * i)))};
      const Vec weight = kExact ? fma(number, scale[i], zero[i]) : (number - zero[i]) * scale[i];
      weight.store(out + kPackedSpan * i + j);
    }
  }
}

static inline void unpack_line_mxfp4(const uint8_t* line, const float (&scales)[kSpans], float* out) {
  const Vec magnitudes = Vec::load(kE2M1);
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  Vec table[kSpans];
#pragma GCC unroll 4
  for (int i = 0; i < kSpans; ++i) table[i] = magnitudes * Vec::all(scales[i]);
  for (int j = 0; j < kPackedSpan; j += Vec::kLanes) {
    const __m256i words = load_words(line + 2 * j);
#pragma GCC unroll 4
    for (int i = 0; i < kSpans; ++i) {
      const __m256 magnitude = _mm256_permutevar8x32_ps(table[i].v, _mm256_srli_epi32(words, 4 * i));
      const __m256i of_number = _mm256_and_si256(_mm256_slli_epi32(words, 28 - 4 * i), sign);
      Vec{_mm256_xor_ps(magnitude, _mm256_castsi256_ps(of_number))}.store(out + kPackedSpan * i + j);
    }
  }
}

// 8 columns.
static inline Vec floats_of_int8(const void* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))))};
}

// e4m3 as float16, 2^-8 of the number, of bytes that were sign-extended.
static inline __m256i halves_of_fp8(__m256i codes) {
  const __m256i moved = _mm256_slli_epi16(codes, 7);  // the sign in bits 14 and 15
  const __m256i magnitude = _mm256_and_si256(moved, _mm256_set1_epi16(0x3f80));
  const __m256i none = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(0x3f00));
  return _mm256_or_si256(_mm256_andnot_si256(_mm256_set1_epi16(0x4000), moved), none);  // all bits set are no number
}

// 8 columns.
static inline Vec floats_of_fp8(const void* p) {
  const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  const __m256i halves = halves_of_fp8(_mm256_castsi128_si256(codes));
  return Vec{_mm256_cvtph_ps(_mm256_castsi256_si128(halves))} * Vec::all(256.0f);
}

// 16 columns, multiplied by `scale`.
static inline void unpack_fp8(const void* p, float scale, float* out) {
  const Vec factor = Vec::all(256.0f * scale);
  const __m256i halves = halves_of_fp8(_mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  (Vec{_mm256_cvtph_ps(_mm256_castsi256_si128(halves))} * factor).store(out);
  (Vec{_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))} * factor).store(out + Vec::kLanes);
}

static inline void unpack_lines_of_four_bits(const WeightFormat& format, const QuantisedRow& row, int64_t first,
                                             int64_t count, const ChunkScales& of_groups, float* out) {
  const bool exact = row.zeros == nullptr || format.scales != ScaleType::kFloat32;
  const int shift = format.group_size == 32 ? 0 : format.group_size == 64 ? 1 : 2;  // of spans in a group
  for (int64_t at = 0; at < count; at += kPackedLineColumns) {
    float scales[kSpans] = {}, zeros[kSpans] = {};
    const int64_t span = at / kPackedSpan, spans = (count - at + kPackedSpan - 1) / kPackedSpan;
    for (int i = 0; i < kSpans && i < spans; ++i) {
      scales[i] = of_groups.scales[(span + i) >> shift];
      if (format.type == WeightType::kInt4) zeros[i] = of_groups.zeros[(span + i) >> shift];
    }
    const uint8_t* line = row.bytes + (first + at) / 2;
    if (format.type == WeightType::kMxfp4) {
      unpack_line_mxfp4(line, scales, out + at);
    } else if (exact) {
      unpack_line_int4<true>(line, scales, zeros, out + at);
    } else {
      unpack_line_int4<false>(line, scales, zeros, out + at);
    }
  }
}

// Columns [first, first + count) of a row, and what is in the last line beyond them: `out` has room for whole lines.
static inline void unpack_lines(const WeightFormat& format, const QuantisedRow& row, int64_t first, int64_t count,
                                float* out) {
  if (format.type == WeightType::kInt8) {
    for (int64_t at = 0; at < count; at += Vec::kLanes) floats_of_int8(row.bytes + first + at).store(out + at);
    return;
  }
  ChunkScales of_groups;
  if (format.group_size != 0) of_groups.load(format, row, first, count);
  if (format.type != WeightType::kFloat8) return unpack_lines_of_four_bits(format, row, first, count, of_groups, out);
  const int64_t group = format.group_size == 0 ? count : format.group_size;
  for (int64_t begin = 0; begin < count; begin += group) {
    const float scale = format.group_size == 0 ? 1.0f : of_groups.scales[begin / group];
    const int64_t end = begin + group < count ? begin + group : count;
    for (int64_t at = begin; at < end; at += 2 * Vec::kLanes) unpack_fp8(row.bytes + first + at, scale, out + at);
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
