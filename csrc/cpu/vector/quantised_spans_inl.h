// Quantised weights in registers, with AVX-512: blocks of kSpanBlock neighbouring columns of N weight rows, of which
// span<i>(n) is the i-th vector of row n, as products multiply it: the weights of unpack_inl.h, rounded once to the
// operands' type. Scales of groups count in the tables where four or eight bits are looked up.
//
// Cost of 32 columns in bfloat16, beside loads: four bits one permutation and three quarters of a shift, int8 five
// instructions, fp8 six. Of a group's table: int4 a multiplication and a conversion, mxfp4 an addition to exponents.
#pragma once

#include <immintrin.h>

#include "cpu/numeric.h"
#include "cpu/vector/dot.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#include "cpu/vector/quantised_scales_inl.h"
#include "cpu/vector/unpack_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kSpanBlock = kPackedLineColumns;  // columns of a block

// -16, -15, ... 15: from 16 - z on, four-bit numbers less z.
constexpr float kWholeNumbers[32] = {-16, -15, -14, -13, -12, -11, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1,
                                     0,   1,   2,   3,   4,   5,   6,   7,  8,  9,  10, 11, 12, 13, 14, 15};

// Bytes of a block of columns in a row.
template <typename P>
constexpr int64_t kSpanBlockBytes = P::kFourBits ? kSpanBlock / 2 : kSpanBlock;

// The 16 weights of a group of row n.
template <typename P, int N>
static inline Vec four_bit_table(const TileScales<N>& scales, int n, int64_t group) {
  if constexpr (P::kType == WeightType::kMxfp4) {
    return Vec::load(kE2M1) * Vec::all(float_of_bits(static_cast<uint32_t>(scales.exponent(n, group)) << 23));
  } else {
    Vec numbers = Vec::load(kWholeNumbers + 8);  // -8, -7, ... 7
    if (scales.zeros[n] != nullptr) numbers = Vec::load(kWholeNumbers + 16 - (scales.zeros[n][group] & 15));
    return numbers * scales.scale(n, group);
  }
}

// Magnitudes of fp8 as bfloat16, times a scale, by seven bits: two tables of 64, of which the seventh bit chooses.
struct Float8Tables {
  __m512i parts[4];

  // Rounded to bfloat16, which holds all of them where the scale is 1.
  void make(Vec scale) {
    for (int part = 0; part < 4; ++part) {
      const Vec low = Vec::load(kE4M3.of + 32 * part) * scale;
      const Vec high = Vec::load(kE4M3.of + 32 * part + 16) * scale;
#if defined(MOE_EXT_ISA_AVX512_BF16)
      parts[part] = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
#else
      alignas(64) BFloat16 values[32];
      low.store(values);
      high.store(values + 16);
      parts[part] = _mm512_load_si512(values);
#endif
    }
  }
  // 32 neighbouring columns at p.
  __m512i look_up(const uint8_t* p) const {
    const __m512i codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
    const __m512i magnitudes = _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(parts[0], codes, parts[1]),
                                                       _mm512_permutex2var_epi16(parts[2], codes, parts[3]));
    // magnitude xor the sign of the code: 0x6c is b ^ (a & c).
    return _mm512_ternarylogic_epi32(codes, magnitudes, _mm512_set1_epi16(static_cast<short>(0x8000)), 0x6c);
  }
};

// Where blocks of bytes lie.
struct ByteRows {
  const uint8_t* block;
  int64_t stride;

  void open(const uint8_t* at, int64_t row_stride) {
    block = at;
    stride = row_stride;
  }
};

static inline __m512 floats_of_int8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// open() a block, then for every i in turn scale<i>() and span<i>(n) of every row; `column` is the block's in its
// chunk.
template <typename A, typename P, int N, typename = void>
struct Spans;

// ---- float32 operands: 16 columns a span

static inline void store_span(Vec span, float* out) { span.store(out); }

template <typename P, int N>
struct Spans<float, P, N, std::enable_if_t<P::kFourBits>> {
  __m512i halves[N][2];  // words 0..15 and 16..31 of a line
  Vec tables[N];

  void open(const uint8_t* block, int64_t stride) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      for (int half = 0; half < 2; ++half) {
        const auto* words = reinterpret_cast<const __m256i*>(block + n * stride) + half;
        halves[n][half] = _mm512_cvtepu16_epi32(_mm256_loadu_si256(words));
      }
    }
  }
  template <int i>
  void scale(const TileScales<N>& scales, int64_t column) {
    if constexpr (i % (2 << P::kGroupShift) != 0) return;
    const int64_t group = (column / kPackedSpan + i / 2) >> P::kGroupShift;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) tables[n] = four_bit_table<P>(scales, n, group);
  }
  template <int i>
  Vec span(int n) const {
    const __m512i words = halves[n][i % 2];
    return {_mm512_permutexvar_ps(i < 2 ? words : _mm512_srli_epi32(words, i / 2 * 4), tables[n].v)};
  }
};

template <int N>
struct Spans<float, Int8Packing, N> : ByteRows {
  template <int i>
  void scale(const TileScales<N>&, int64_t) {}
  template <int i>
  Vec span(int n) const {
    return {floats_of_int8(block + n * stride + 16 * i)};
  }
};

template <typename P, int N>
struct Spans<float, P, N, std::enable_if_t<P::kType == WeightType::kFloat8>> : ByteRows {
  Float8Tables tables;
  __m512i codes[N];  // 32 columns as bfloat16
  Vec factor;

  Spans() { tables.make(Vec::all(1.0f)); }

  template <int i>
  void scale(const TileScales<N>& scales, int64_t column) {
    if constexpr (P::kRowBlocks && i == 0) factor = scales.scale(0, column / kSpanBlock);
    if constexpr (i % 2 == 0) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) codes[n] = tables.look_up(block + n * stride + 16 * i);
    }
  }
  template <int i>
  Vec span(int n) const {
    const __m256i half = _mm512_extracti64x4_epi64(codes[n], i % 2);
    const Vec exact{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    return P::kRowBlocks ? exact * factor : exact;
  }
};

// ---- bfloat16 operands: 32 columns a span

#if defined(MOE_EXT_ISA_AVX512_BF16)

static inline void store_span(BFloat16Pairs span, BFloat16* out) { _mm512_storeu_si512(out, (__m512i)span.v); }

static inline __m512i twice(Vec table) { return (__m512i)_mm512_cvtne2ps_pbh(table.v, table.v); }

// What 2^(s - 127) adds to the bits of a bfloat16, by s.
struct Powers {
  int16_t of[256];
};
constexpr Powers powers() {
  Powers made{};
  for (int s = 0; s < 256; ++s) made.of[s] = static_cast<int16_t>((s - 127) * 128);
  return made;
}
constexpr Powers kPowers = powers();

template <typename P, int N>
struct Spans<BFloat16, P, N, std::enable_if_t<P::kFourBits>> {
  __m512i lines[N], tables[N];

  void open(const uint8_t* block, int64_t stride) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) lines[n] = _mm512_loadu_si512(block + n * stride);
  }
  template <int i>
  void scale(const TileScales<N>& scales, int64_t column) {
    if constexpr (i % (1 << P::kGroupShift) != 0) return;
    const int64_t group = (column / kPackedSpan + i) >> P::kGroupShift;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if constexpr (P::kType == WeightType::kMxfp4) {
        const __m512i numbers = twice(Vec::load(kE2M1));
        constexpr __mmask32 kNonzero = 0xfefefefe;
        const __m512i power = _mm512_set1_epi16(kPowers.of[scales.exponent(n, group)]);
        tables[n] = _mm512_mask_add_epi16(numbers, kNonzero, numbers, power);
      } else {
        tables[n] = twice(four_bit_table<P>(scales, n, group));
      }
    }
  }
  template <int i>
  BFloat16Pairs span(int n) const {
    const __m512i numbers = i == 0 ? lines[n] : _mm512_srli_epi16(lines[n], 4 * i);
    return {(__m512bh)_mm512_permutexvar_epi16(numbers, tables[n])};
  }
};

// Whole numbers of eight bits are exact in bfloat16: the upper halves of their floats.
template <int N>
struct Spans<BFloat16, Int8Packing, N> : ByteRows {
  __m512i upper_halves;

  Spans() {
    alignas(64) uint16_t odd[32];
    for (int j = 0; j < 32; ++j) odd[j] = static_cast<uint16_t>(2 * j + 1);
    upper_halves = _mm512_load_si512(odd);
  }
  template <int i>
  void scale(const TileScales<N>&, int64_t) {}
  template <int i>
  BFloat16Pairs span(int n) const {
    const uint8_t* at = block + n * stride + 32 * i;
    const __m512i first = (__m512i)floats_of_int8(at), second = (__m512i)floats_of_int8(at + 16);
    return {(__m512bh)_mm512_permutex2var_epi16(first, upper_halves, second)};
  }
};

template <typename P, int N>
struct Spans<BFloat16, P, N, std::enable_if_t<P::kType == WeightType::kFloat8>> : ByteRows {
  Float8Tables tables;

  Spans() { tables.make(Vec::all(1.0f)); }

  template <int i>
  void scale(const TileScales<N>& scales, int64_t column) {
    if constexpr (P::kRowBlocks && i == 0) tables.make(scales.scale(0, column / kSpanBlock));
  }
  template <int i>
  BFloat16Pairs span(int n) const {
    return {(__m512bh)tables.look_up(block + n * stride + 32 * i)};
  }
};

#endif

}  // namespace moe_ext::cpu::MOE_EXT_ISA
