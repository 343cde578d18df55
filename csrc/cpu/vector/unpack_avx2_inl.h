// Quantised weights to float32 with AVX2, a cache line of a row at a time: what unpack_inl.h says, to the bit.
//
// Cost of 8 columns, beside a store: int8 two instructions, int4 and mxfp4 four and a quarter, fp8 nine. A 16-bit word
// of four-bit columns is widened once for all four. int4 leaves a number where it is, 4 i bits up: as a float it is
// 16^i times as large, which its zero and scale take into account, exactly. mxfp4 looks the magnitude up among the
// group's eight, and moves the sign. fp8 becomes float16 with an exponent 8 too small; of its codes one is no number.
#pragma once

#include <immintrin.h>

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/unpack_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int kSpans = static_cast<int>(kPackedLineColumns / kPackedSpan);  // of a line: four
constexpr int kByteLine = 64;                                               // columns of a byte in a line

// 8 words as 32-bit numbers.
static inline __m256i load_words(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

static inline void unpack_line_int4(const uint8_t* line, const float (&scales)[kSpans], const float (&zeros)[kSpans],
                                    float* out) {
  Vec scale[kSpans], zero[kSpans];
#pragma GCC unroll 4
  for (int i = 0; i < kSpans; ++i) {
    const auto up = static_cast<float>(1 << 4 * i);
    scale[i] = Vec::all(scales[i] / up);
    zero[i] = Vec::all(zeros[i] * up);
  }
  for (int j = 0; j < kPackedSpan; j += Vec::kLanes) {
    const __m256i words = load_words(line + 2 * j);
#pragma GCC unroll 4
    for (int i = 0; i < kSpans; ++i) {
      const Vec number{_mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15 << 4 * i)))};
      ((number - zero[i]) * scale[i]).store(out + kPackedSpan * i + j);
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

static inline void unpack_line_int8(const uint8_t* line, float* out) {
#pragma GCC unroll 8
  for (int j = 0; j < kByteLine; j += Vec::kLanes) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(line + j));
    Vec{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))}.store(out + j);
  }
}

// `scale` counts in the numbers.
static inline void unpack_line_fp8(const uint8_t* line, float scale, float* out) {
  const Vec factor = Vec::all(256.0f * scale);
#pragma GCC unroll 4
  for (int j = 0; j < kByteLine; j += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line + j));
    const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);  // the sign in bits 14 and 15
    const __m256i none =
        _mm256_cmpgt_epi16(_mm256_and_si256(moved, _mm256_set1_epi16(0x3f80)), _mm256_set1_epi16(0x3f00));
    const __m256i signless = _mm256_andnot_si256(_mm256_set1_epi16(0x4000), moved);
    const __m256i halves = _mm256_or_si256(signless, _mm256_and_si256(none, _mm256_set1_epi16(0x7fff)));
    const Vec low{_mm256_cvtph_ps(_mm256_castsi256_si128(halves))};
    const Vec high{_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
    (low * factor).store(out + j);
    (high * factor).store(out + j + Vec::kLanes);
  }
}

// Columns [first, first + count) of a row, and what is in the last line beyond them: `out` has room for whole lines.
static inline void unpack_lines(const WeightFormat& format, const QuantisedRow& row, int64_t first, int64_t count,
                                float* out) {
  if (format.type == WeightType::kInt8) {
    for (int64_t at = 0; at < count; at += kByteLine) unpack_line_int8(row.bytes + first + at, out + at);
    return;
  }
  if (format.type == WeightType::kFloat8) {
    for (int64_t at = 0; at < count; at += kByteLine) {
      const float scale = format.group_size == 0 ? 1.0f : row.scale(format, (first + at) / format.group_size);
      unpack_line_fp8(row.bytes + first + at, scale, out + at);
    }
    return;
  }
  for (int64_t at = 0; at < count; at += kPackedLineColumns) {
    float scales[kSpans] = {}, zeros[kSpans] = {};
    for (int i = 0; i < kSpans && at + i * kPackedSpan < count; ++i) {
      const int64_t group = (first + at + i * kPackedSpan) / format.group_size;
      scales[i] = row.scale(format, group);
      zeros[i] = row.zeros == nullptr ? 8.0f : static_cast<float>(row.zeros[group]);
    }
    const uint8_t* line = row.bytes + (first + at) / 2;
    if (format.type == WeightType::kInt4) {
      unpack_line_int4(line, scales, zeros, out + at);
    } else {
      unpack_line_mxfp4(line, scales, out + at);
    }
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
